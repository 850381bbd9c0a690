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
    """A copy to change: its template and its tokenizer."""
    family = copy.copy(shipped.family)
    family.tokenizer = copy.deepcopy(family.tokenizer)
    family.processor = copy.copy(family.processor)
    family.processor.tokenizer = family.tokenizer
    return family


def views_of(family, pred_tokens=1):
    chat = Chat(family, 2048)
    return data.make_views(chat, RECORD, load_images(RECORD, family), pred_tokens)


def supervised(family, view):
    return family.tokenizer.decode([label for label in view.labels if label != -100])


def change(family, old, new):
    assert old in family.processor.chat_template
    family.processor.chat_template = family.processor.chat_template.replace(old, new)


def test_a_blank_before_the_words_is_the_models_to_write(family):
    """The generation prompt ends before it. Behind the words it belongs to them too."""
    change(family, "['role'] + '\\n'", "['role'] + ':'")
    change(family, "assistant\\n", "assistant:")
    change(family, "part['text']", "(' ' if message['role'] == 'assistant' else '') + part['text']")
    change(family, "'<|im_end|>", "' <|im_end|>")
    full, prompt, target = views_of(family)
    expected = "".join(f" {text} <|im_end|>" for text in RECORD.texts)
    assert supervised(family, full) == supervised(family, target) == expected
    assert family.tokenizer.decode(prompt.ids[:-1]).endswith("<|im_start|>assistant:")
    assert target.ids == full.ids[-len(target.ids):]


def test_a_blank_in_the_generation_prompt_that_turns_lack(family):
    """The generation prompt ends in a blank, a turn has none: the words are found from the end."""
    change(family, "assistant\\n'", "assistant\\n  '")
    full = views_of(family).full
    assert supervised(family, full) == "".join(f"{text}<|im_end|>" for text in RECORD.texts)


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


def test_every_view_opens_with_bos_where_every_text_does(family):
    tokenizer, plain = family.tokenizer, views_of(family)
    tokenizer.bos_token, encode = "<|endoftext|>", family.encode

    def with_bos(text):
        ids, spans = encode(text)
        return [tokenizer.bos_token_id, *ids], [(0, 0), *spans]

    family.encode = with_bos
    for view, before in zip(views_of(family), plain):
        assert view.ids == [tokenizer.bos_token_id, *before.ids]
        assert view.labels == [-100, *before.labels]
        assert view.embed_at == before.embed_at + 1
    # a turn that opens with the same token needs no second one
    tokenizer.bos_token, family.encode = "<|im_start|>", encode
    assert views_of(family) == plain


def test_ids_must_be_those_of_the_familys_own_processor(family):
    images, chat = load_images(RECORD, family), Chat(family, 2048)
    chat.check_ids(RECORD, images)
    family.own_ids = lambda messages, pictures: [1]
    with pytest.raises(ValueError, match=f"example {RECORD.id}: the model's own processor"):
        chat.check_ids(RECORD, images)


def test_batches_are_padded_on_the_right_or_on_the_left():
    long = View([1, 2, 3, 4], [-100, 2, 3, 4], ["a"], 3, (2, 3))
    short = View([5, 6], [-100, 6], ["b", "c"], 1, (1,))
    batch = data.collate([long, short], pad_id=9)
    assert batch.ids.tolist() == [[1, 2, 3, 4], [5, 6, 9, 9]]
    assert batch.labels.tolist() == [[-100, 2, 3, 4], [-100, 6, -100, -100]]
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.inject_at.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert batch.embed_at.tolist() == [3, 1] and batch.images == ["a", "b", "c"]
    assert batch.shared is None and batch.branch == 0
    left = data.collate([long, short], pad_id=9, left=True)
    assert left.ids.tolist() == [[1, 2, 3, 4], [9, 9, 5, 6]]
    for name in ("labels", "mask", "inject_at"):
        one, other = getattr(left, name).tolist(), getattr(batch, name).tolist()
        assert one == [other[0], other[1][2:] + other[1][:2]]
    assert left.embed_at.tolist() == [3, 3]
    moved = batch.to("meta")
    assert moved.ids.device == moved.embed_at.device == torch.device("meta")
    assert moved.images == batch.images
