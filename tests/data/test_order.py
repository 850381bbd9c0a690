"""Claims: the order of the records depends on the seed alone; a record is read when it is used;
workers prepare the same batches; a faulty record is one sentence."""

from itertools import islice

import pytest
import torch
from PIL import Image

import data
from support import images
from support.chat import Chat
from support.processes import step_batches
from support.records import Example
from world import loader

RECORDS = loader.examples("all", "train", 6, seed=3)


def views(chat, example, images):
    return data.make_views(chat, example, images, 2)


@pytest.fixture
def chat(shipped):
    return Chat(shipped.family, 2048)


@pytest.fixture
def dataset(chat):
    return data.Trajectories(RECORDS, "train", views, chat)


def on_disk(folder, sizes):
    """Records that are no list, so that nothing made of them is kept, with pictures on disk."""
    for n, size in enumerate(sizes):
        Image.new("RGB", size, (n, 0, 0)).save(folder / f"{n}.png")
    return tuple(Example(f"r{n}", "zoom", folder / f"{n}.png", "Which?", ["a", "b"], "a",
                         ["Look. " * n + "Answer: a"]) for n in range(len(sizes)))


def test_every_row_comes_once_an_epoch_in_an_order_of_the_seed():
    steps = list(islice(data.StepRows(10, 4, seed=1), 10))
    generator = torch.Generator().manual_seed(1)
    rows = sum((torch.randperm(10, generator=generator).tolist() for _ in range(4)), [])
    # a step may end one epoch and begin the next
    assert steps == [rows[start:start + 4] for start in range(0, 40, 4)]
    # more rows in a step than there are records
    assert sorted(next(iter(data.StepRows(3, 6, seed=0)))) == [0, 0, 1, 1, 2, 2]
    # a resumed run continues with its next step
    assert list(islice(data.StepRows(10, 4, 1, start=5), 5)) == steps[5:]


def test_passes_hold_views_of_similar_length(dataset):
    order = [3, 0, 5, 1, 2]
    ranked = sorted(order, key=lambda row: len(dataset[row].views.full.ids))
    # one pass alone keeps the order of its rows, and each process has every second pass
    for share, expected in (((2,), [ranked[:2], ranked[2:4], ranked[4:]]), ((5,), [order]),
                            ((2, 0, 2), [ranked[:2], ranked[4:]]), ((2, 1, 2), [ranked[2:4]])):
        passes = dataset.micro_batches(order, *share)
        assert [[example.index[1] for example in part] for part in passes] == expected


def test_a_record_is_read_when_it_is_used(dataset, chat, tmp_path, monkeypatch):
    # records in memory keep what was made of them
    assert dataset[2] is dataset[2] and dataset[2].index == ("train", 2)
    opened, real = [], images.open_image
    monkeypatch.setattr(images, "open_image",
                        lambda file: opened.append(file.name) or real(file))
    dataset = data.Trajectories(on_disk(tmp_path, [(64, 64)] * 5), "train", views, chat)
    # the first record shows whether the tokenizer is read as its own processor reads it
    assert opened == ["0.png"]
    for _ in range(2):
        dataset.micro_batches([3, 1], 2)
    assert opened[1:] == ["3.png", "1.png"] * 2
    # an image whose features are kept needs no pixels
    dataset.cache = {str(tmp_path / "3.png")}
    ((three, one),) = dataset.micro_batches([3, 1], 2)
    assert three.images[0].pixels is None and one.images[0].pixels is not None
    assert three.images[0].picture is None is one.images[0].picture


def content(passes):
    """What can be compared with ==."""
    return [(*ex[:5], [(*image[:4], image.pixels["pixel_values"].tolist()) for image in ex.images])
            for part in passes for ex in part]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_prepare_the_same_batches(dataset, workers):
    torch.manual_seed(5)
    state, rows = torch.get_rng_state(), [[3, 0, 5], [1, 2, 4]]
    batches = list(step_batches(dataset, rows, 2, workers))
    # dropout must draw the same numbers with and without workers
    assert torch.equal(state, torch.get_rng_state())
    for step, passes in zip(rows, batches, strict=True):
        assert content(passes) == content(dataset.micro_batches(step, 2))
    (share,) = step_batches(dataset, rows[:1], 2, workers, 1, 2)
    assert [ex.index for ex in share[0]] == [ex.index for ex in batches[0][1]] and len(share) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_faulty_record_is_one_sentence_or_left_out(chat, tmp_path, workers):
    """No more than one in a hundred is left out."""
    records = on_disk(tmp_path, [(64, 64)] * 3 + [(2000, 4)] + [(64, 64)] * 96)
    strict, lenient = (data.Trajectories(records, "train", views, chat, skip=skip)
                       for skip in (False, True))
    # the next record takes its place
    ((one, *others),), _ = step_batches(lenient, [[3, 0], [1, 3]], 2, workers)
    assert one.index == ("train", 4) and others[0].index == ("train", 0)
    assert list(lenient.faults) == [3] and "example r3: image 0" in lenient.faults[3]
    (tmp_path / "50.png").unlink()
    for dataset, row, kind, message in (
            (strict, 3, ValueError, r"^example r3: image 0 \(2000 x 4 px\) .*; crop or drop it$"),
            (strict, 50, OSError, "50.png not found"),
            (lenient, 50, ValueError, "2 of 100 records are faulty, and --skip_bad leaves out 1%, "
                                      "the last one: .*50.png")):
        with pytest.raises(kind, match=message):
            list(step_batches(dataset, [[0, row]], 2, workers))
