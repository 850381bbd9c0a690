"""Claims: views follow templates that differ from the shipped one, or say why they cannot; views of
several records become one batch; the order of the records depends on the seed alone; a record is
read when it is used; workers prepare the same batches; a faulty record is one sentence."""

import copy
from functools import partial
from itertools import islice

import pytest
import torch
from PIL import Image

import data
from support import images
from support.chat import Chat, View
from support.processes import step_batches
from support.records import Example
from world import loader

RECORDS = loader.examples("all", "train", 6, seed=3)
RECORD = RECORDS[2]


def views_with(changes, family):
    """The views of RECORD by the family's template with these changes, old text -> new."""
    family = copy.copy(family)
    family.processor = copy.copy(family.processor)
    for old, new in changes.items():
        assert old in family.processor.chat_template
        family.processor.chat_template = family.processor.chat_template.replace(old, new)
    return data.make_views(Chat(family, 2048), RECORD, images.load_images(RECORD, family), 1)


@pytest.mark.parametrize("changes, header, turn", [
    # the generation prompt ends before a blank, and there is one behind the words: both are theirs
    ({"['role'] + '\\n'": "['role'] + ':'", "assistant\\n": "assistant:",
      "part['text']": "(' ' if message['role'] == 'assistant' else '') + part['text']",
      "'<|im_end|>": "' <|im_end|>"}, "assistant:", " {} <|im_end|>"),
    # the generation prompt ends in a blank that turns lack: the words are found from the end
    ({"assistant\\n'": "assistant\\n  '"}, "assistant\n  ", "{}<|im_end|>")])
def test_blanks_beside_the_words_are_the_models_to_write(shipped, changes, header, turn):
    full, prompt, target = views_with(changes, shipped.family)
    expected = "".join(turn.format(text) for text in RECORD.texts)
    for view in (full, target):
        assert shipped.tokenizer.decode([n for n in view.labels if n != -100]) == expected
    assert shipped.tokenizer.decode(prompt.ids[:-1]).endswith(f"<|im_start|>{header}")
    assert target.ids == full.ids[-len(target.ids):]


@pytest.mark.parametrize("old, new, message", [
    # a turn opens with other words than the generation prompt
    ("assistant\\n'", "robot\\n'", "does not write an assistant's turn as generation prompt"),
    # nothing ends a turn
    ("{{- '<|im_end|>\\n' -}}", "", "does not write an assistant's turn as generation prompt"),
    ("part['text']", "part['text'] | replace('digit', 'sign')", "changes the assistant's text"),
    # earlier turns depend on later ones
    ("{%- for message", "{{- messages | length }}{%- for message", "rewrites earlier turns")])
def test_a_template_that_cannot_be_followed_is_refused(shipped, old, new, message):
    with pytest.raises(ValueError, match=f"{message}.*chat_template.jinja"):
        views_with({old: new}, shipped.family)


def test_ids_must_be_those_of_the_familys_own_processor(shipped, monkeypatch):
    monkeypatch.setattr(shipped.family, "own_ids", lambda turns, pictures: [1])
    with pytest.raises(ValueError, match=f"example {RECORD.id}: the model's own processor"):
        shipped.chat.check_ids(RECORD, images.load_images(RECORD, shipped.family))


def test_batches_are_padded_on_the_right_or_on_the_left():
    views = [View([1, 2, 3], [-100, 2, 3], ["a"], 2, (1, 2)), View([5], [5], ["b", "c"], 0, (0,))]
    right, left = data.collate(views, pad_id=9), data.collate(views, pad_id=9, left=True)
    assert right.ids.tolist() == [[1, 2, 3], [5, 9, 9]]
    assert right.labels.tolist() == [[-100, 2, 3], [5, -100, -100]]
    assert right.mask.tolist() == [[True, True, True], [True, False, False]]
    assert right.inject_at.tolist() == [[False, True, True], [True, False, False]]
    assert right.state_at.tolist() == [2, 0] and left.state_at.tolist() == [2, 2]
    for name in ("ids", "labels", "mask", "inject_at"):
        (one, other), (same, padded) = getattr(left, name), getattr(right, name)
        assert torch.equal(one, same) and torch.equal(other, padded.roll(2)), name
    assert right.images == left.images == ["a", "b", "c"]
    on_meta = right.to("meta")
    assert on_meta.ids.is_meta and on_meta.state_at.is_meta and on_meta.images == right.images


@pytest.fixture
def trajectories(shipped):
    """Records -> what a run reads them from."""
    return partial(data.Trajectories, split="train", views=partial(data.make_views, pred_tokens=2),
                   chat=Chat(shipped.family, 2048))


def with_files(folder, count):
    """A tuple of records with pictures on disk, of which the fourth is too thin. (Only of a list is
    kept what was made of its records.)"""
    for n in range(count):
        Image.new("RGB", (2000, 4) if n == 3 else (64, 64)).save(folder / f"{n}.png")
    return tuple(Example(f"r{n}", "zoom", folder / f"{n}.png", "Which?", ["a", "b"], "a",
                         ["Answer: a"]) for n in range(count))


def test_every_row_comes_once_an_epoch_in_an_order_of_the_seed():
    generator = torch.Generator().manual_seed(1)
    rows = torch.cat([torch.randperm(3, generator=generator) for _ in range(14)])
    # a step may have more rows than there are records, and end in the middle of an epoch
    steps = rows.view(6, 7).tolist()
    assert list(islice(data.StepRows(3, 7, seed=1), 6)) == steps
    # a resumed run continues with its next step
    assert list(islice(data.StepRows(3, 7, seed=1, start=2), 4)) == steps[2:]


def test_passes_hold_views_of_similar_length(trajectories):
    dataset, order = trajectories(RECORDS), [3, 0, 5, 1, 2]
    ranked = sorted(order, key=lambda row: len(dataset[row].views.full.ids))
    # one pass alone keeps the order of its rows, and each process has every second pass
    for share, expected in (((2,), [ranked[:2], ranked[2:4], ranked[4:]]), ((5,), [order]),
                            ((2, 0, 2), [ranked[:2], ranked[4:]]), ((2, 1, 2), [ranked[2:4]])):
        passes = dataset.micro_batches(order, *share)
        assert [[example.index[1] for example in part] for part in passes] == expected


def test_a_record_is_read_when_it_is_used(trajectories, tmp_path, monkeypatch):
    dataset = trajectories(RECORDS)  # records in memory keep what was made of them
    assert dataset[2] is dataset[2] and dataset[2].index == ("train", 2)
    opened, real = [], images.open_image
    monkeypatch.setattr(images, "open_image", lambda file: opened.append(file.name) or real(file))
    dataset = trajectories(with_files(tmp_path, 3))
    dataset.micro_batches([2, 1, 2, 1], 4)
    # the first record shows whether the tokenizer is read as its own processor reads it
    assert opened == ["0.png", "2.png", "1.png", "2.png", "1.png"]
    dataset.cache = {str(tmp_path / "2.png")}  # an image whose features are kept needs no pixels
    ((two, one),) = dataset.micro_batches([2, 1], 2)
    assert two.images[0].pixels is None and one.images[0].pixels is not None
    assert two.images[0].picture is None is one.images[0].picture


def content(passes):
    """What can be compared with ==."""
    return [(*ex[:5], [(*image[:4], image.pixels["pixel_values"].tolist()) for image in ex.images])
            for part in passes for ex in part]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_prepare_the_same_batches(trajectories, workers):
    dataset, rows, state = trajectories(RECORDS), [[3, 0, 5], [1, 2, 4]], torch.get_rng_state()
    batches = list(step_batches(dataset, rows, 2, workers))
    # dropout must draw the same numbers with and without workers
    assert torch.equal(state, torch.get_rng_state())
    for step, passes in zip(rows, batches, strict=True):
        assert content(passes) == content(dataset.micro_batches(step, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_faulty_record_is_one_sentence_or_left_out(trajectories, tmp_path, workers):
    """No more than one in a hundred is left out."""
    records = with_files(tmp_path, 100)
    strict, lenient = trajectories(records), trajectories(records, skip=True)
    # the next record takes its place
    ((one, other),), _ = step_batches(lenient, [[3, 0], [1, 3]], 2, workers)
    assert one.index == ("train", 4) and other.index == ("train", 0)
    assert list(lenient.faults) == [3] and "example r3: image 0" in lenient.faults[3]
    (tmp_path / "50.png").unlink()
    for dataset, row, kind, message in (
            (strict, 3, ValueError, r"^example r3: image 0 \(2000 x 4 px\) .*; crop or drop it$"),
            (strict, 50, OSError, "50.png not found"),
            (lenient, 50, ValueError, "2 of 100 records are faulty, .* the last one: .*50.png")):
        with pytest.raises(kind, match=message):
            list(step_batches(dataset, [[0, row]], 2, workers))
