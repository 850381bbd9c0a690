"""Claims: a step's rows depend on the seed alone, every row comes once an epoch, and a resumed run
goes on with the rows of its step; passes hold views of similar length and only their own pixels; a
record is read when it is used; workers prepare the same batches; a faulty record is one sentence.
"""

from itertools import islice

import pytest
import torch
from PIL import Image

import data
from support import run
from support.chat import Chat
from support.features import (ImageEncoder, LoadedImage, StoredTargets, load_image, load_images,
                              with_pixels)
from support.records import Example
from train import Config
from world import loader

RECORDS = loader.examples("all", "train", 6, seed=3)


def views(chat, example, images):
    return data.make_views(chat, example, images, 2)


@pytest.fixture
def dataset(shipped):
    return data.Trajectories(RECORDS, "train", views, Chat(shipped.family, 2048))


class Folder:
    """Records that are read from disk, as those of a data folder are; it counts them."""

    def __init__(self, folder, sizes):
        self.folder, self.sizes, self.read = folder, sizes, []
        for n, size in enumerate(sizes):
            Image.new("RGB", size, (40 * n, 0, 0)).save(folder / f"{n}.png")

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, n):
        self.read.append(n)
        return Example(f"r{n}", "zoom", self.folder / f"{n}.png", "Which?", ["a", "b"], "a",
                       ["Look. " * n + "Answer: a"])


# ---- the rows of each step ----------------------------------------------------------------------


def test_every_row_comes_once_an_epoch_in_an_order_of_the_seed():
    steps = list(islice(data.StepRows(10, 4, seed=1), 10))
    rows = [row for step in steps for row in step]
    assert all(len(step) == 4 for step in steps)
    epochs = [rows[start:start + 10] for start in range(0, 40, 10)]
    # a step may end one epoch and begin the next
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and epochs[0] != epochs[1]
    generator = torch.Generator().manual_seed(1)
    assert epochs[0] == torch.randperm(10, generator=generator).tolist()
    assert steps == list(islice(data.StepRows(10, 4, seed=1), 10))
    assert steps != list(islice(data.StepRows(10, 4, seed=2), 10))
    # more rows in a step than there are records
    assert sorted(next(iter(data.StepRows(3, 6, seed=0)))) == [0, 0, 1, 1, 2, 2]


def test_a_resumed_run_continues_with_its_next_step():
    steps = list(islice(data.StepRows(10, 4, seed=1), 7))
    for start in (1, 5):
        assert list(islice(data.StepRows(10, 4, 1, start), 7 - start)) == steps[start:]


# ---- records and passes -------------------------------------------------------------------------


def test_passes_hold_views_of_similar_length(dataset):
    def lengths(passes):
        return [[len(example.views.full.ids) for example in part] for part in passes]

    order = [3, 0, 5, 1, 2]
    passes = dataset.passes(order, 2)
    assert lengths(passes) == [sorted(sum(lengths(passes), []))[a:b]
                               for a, b in ((0, 2), (2, 4), (4, 5))]
    assert sorted(example.row[1] for part in passes for example in part) == sorted(order)
    # one pass alone keeps the order of its rows, and each process has every second pass
    (one,) = dataset.passes(order, 5)
    assert [example.row for example in one] == [("train", row) for row in order]
    for rank in (0, 1):
        assert lengths(dataset.passes(order, 2, rank, 2)) == lengths(passes)[rank::2]


def test_a_training_example_holds_what_a_step_needs(dataset):
    example, record = dataset[2], RECORDS[2]
    assert len(dataset) == 6 and example.row == ("train", 2) and not example.bare
    assert (example.task, example.answer) == (record.task, record.answer)
    assert example.views == views(dataset.chat, record, example.images)
    # records in memory keep what was made of them
    assert dataset[2] is example and dataset[1] is not dataset[2]


def test_a_record_is_read_when_it_is_used(shipped, tmp_path, monkeypatch):
    records, opened = Folder(tmp_path, [(64, 64)] * 5), []
    real = load_image.__globals__["opened"]
    monkeypatch.setitem(load_image.__globals__, "opened",
                        lambda picture: opened.append(picture) or real(picture))
    dataset = data.Trajectories(records, "train", views, Chat(shipped.family, 2048))
    # the first record shows whether the tokenizer is read as its own processor reads it
    assert records.read == [0]
    records.read.clear(), opened.clear()
    for _ in range(2):
        dataset.passes([3, 1], 2)
    assert records.read == [3, 1] * 2 and opened == [tmp_path / f"{n}.png" for n in (3, 1)] * 2
    # an image whose features are kept needs no pixels
    dataset.known = {str(tmp_path / "3.png")}
    ((three, one),) = dataset.passes([3, 1], 2)
    assert three.images[0].pixels is None and one.images[0].pixels is not None
    assert three.images[0].picture is None is one.images[0].picture


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_prepare_the_same_batches(dataset, workers):
    torch.manual_seed(5)
    rows = list(islice(data.StepRows(6, 4, seed=1), 3))
    state, found = torch.get_rng_state(), list(data.load(dataset, rows, 2, workers))
    # dropout must draw the same numbers with and without workers
    assert torch.equal(state, torch.get_rng_state()) and len(found) == 3
    for step, passes in zip(rows, found):
        for one, other in zip(passes, dataset.passes(step, 2), strict=True):
            assert [ex[:5] for ex in one] == [ex[:5] for ex in other]
            for a, b in zip((i for ex in one for i in ex.images),
                            (i for ex in other for i in ex.images), strict=True):
                assert a[:4] == b[:4]
                assert torch.equal(a.pixels["pixel_values"], b.pixels["pixel_values"])
    (share,) = data.load(dataset, [[3, 0, 5]], 2, workers, 1, 2)
    assert [[ex.row for ex in part] for part in share] == [
        [ex.row for ex in part] for part in dataset.passes([3, 0, 5], 2, 1, 2)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_faulty_record_is_one_sentence(shipped, tmp_path, workers):
    folder = Folder(tmp_path, [(64, 64), (2000, 4), (64, 64)])
    dataset = data.Trajectories(folder, "train", views, Chat(shipped.family, 2048))
    (tmp_path / "2.png").unlink()
    for row, kind, message in (
            (1, ValueError, r"example r1: image 0 \(2000 x 4 px\) is rejected .*; crop or drop it"),
            (2, OSError, "2.png not found")):
        with pytest.raises(kind, match=message):
            list(data.load(dataset, [[0, row]], 2, workers))


def test_how_many_workers():
    assert run.workers(Config(workers=3)) == 3 and run.workers(Config()) == 0
    assert 1 <= run.workers(Config(data="folder")) <= 8
