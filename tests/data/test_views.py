"""Claims: views follow templates and tokenizers that differ from the shipped one, or say why they
cannot; views of several records become one batch."""

import copy

import pytest
import torch

import data
from support.chat import Chat, View
from support.images import load_images
from world import loader

RECORD = loader.examples("single", "train", 1)[0]
NO_TURN = "does not write an assistant's turn as generation prompt, text, end of turn"


@pytest.fixture
def family(shipped):
    """A copy whose template may change."""
    family = copy.copy(shipped.family)
    family.processor = copy.copy(family.processor)
    return family


def views_of(family):
    return data.make_views(Chat(family, 2048), RECORD, load_images(RECORD, family), pred_tokens=1)


def supervised(family, view):
    return family.tokenizer.decode([label for label in view.labels if label != -100])


def change(family, old, new):
    assert old in family.processor.chat_template
    family.processor.chat_template = family.processor.chat_template.replace(old, new)


@pytest.mark.parametrize("changes, header, turn", [
    # the generation prompt ends before a blank, and there is one behind the words: both are theirs
    ({"['role'] + '\\n'": "['role'] + ':'", "assistant\\n": "assistant:",
      "part['text']": "(' ' if message['role'] == 'assistant' else '') + part['text']",
      "'<|im_end|>": "' <|im_end|>"}, "assistant:", " {} <|im_end|>"),
    # the generation prompt ends in a blank that turns lack: the words are found from the end
    ({"assistant\\n'": "assistant\\n  '"}, "assistant\n  ", "{}<|im_end|>")])
def test_blanks_beside_the_words_are_the_models_to_write(family, changes, header, turn):
    for old, new in changes.items():
        change(family, old, new)
    full, prompt, target = views_of(family)
    expected = "".join(turn.format(text) for text in RECORD.texts)
    assert supervised(family, full) == supervised(family, target) == expected
    assert family.tokenizer.decode(prompt.ids[:-1]).endswith(f"<|im_start|>{header}")
    assert target.ids == full.ids[-len(target.ids):]


@pytest.mark.parametrize("old, new, message", [
    # a turn opens with other words than the generation prompt
    ("assistant\\n'", "robot\\n'", NO_TURN),
    # words are lost, or changed
    ("part['text']", "part['text'][:3] and 'x'", NO_TURN),
    ("part['text']", "part['text'] | replace('digit', 'sign')", "changes the assistant's"),
    # nothing ends a turn
    ("{{- '<|im_end|>\\n' -}}", "", NO_TURN),
    # earlier turns depend on later ones
    ("{%- for message", "{{- messages | length }}{%- for message", "rewrites earlier turns")])
def test_a_template_that_cannot_be_followed_is_refused(family, old, new, message):
    change(family, old, new)
    with pytest.raises(ValueError, match=f"{message}.*chat_template.jinja"):
        views_of(family)


def test_ids_must_be_those_of_the_familys_own_processor(family):
    family.own_ids = lambda turns, pictures: [1]
    with pytest.raises(ValueError, match=f"example {RECORD.id}: the model's own processor"):
        Chat(family, 2048).check_ids(RECORD, load_images(RECORD, family))


def test_batches_are_padded_on_the_right_or_on_the_left():
    long = View([1, 2, 3, 4], [-100, 2, 3, 4], ["a"], 3, (2, 3))
    short = View([5, 6], [-100, 6], ["b", "c"], 1, (1,))
    batch = data.collate([long, short], pad_id=9)
    assert batch.ids.tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert batch.labels.tolist() == [[-100, 2, 3, 4], [-100, 6, -100, -100]]
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.inject_at.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert batch.state_at.tolist() == [3, 1] and batch.images == ["a", "b", "c"]
    assert batch.shared is None and batch.branch == 0
    left = data.collate([long, short], pad_id=9, left=True)
    assert left.ids.tolist() == [[1, 2, 3, 4], [9, 9, 5, 6]]
    for name in ("labels", "mask", "inject_at"):
        one, other = getattr(left, name).tolist(), getattr(batch, name).tolist()
        assert one == [other[0], other[1][2:] + other[1][:2]]
    assert left.state_at.tolist() == [3, 3]
    on_meta = batch.to("meta")
    assert on_meta.ids.device == on_meta.state_at.device == torch.device("meta")
    assert on_meta.images == batch.images
