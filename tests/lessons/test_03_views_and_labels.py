"""Claims: the three views of a record, token by token, equal one rendering of the conversation;
labels are right where a text repeats; what cannot be trained on is refused."""

import re
from dataclasses import replace
from itertools import groupby

import pytest
from PIL import Image
from plain import tokens, turns_of

import data
from support.chat import Chat
from support.images import load_images
from support.records import Example

EXAMPLE = Example(
    "7", "zoom", Image.new("RGB", (128, 128), "red"), "Which digit is on the red disc?",
    ["seven", "two"], "seven", ["Zoom in on the red disc. [crop 12 30 28 46]",
                                Image.new("RGB", (32, 32)), "The digit is seven. Answer: seven"])
# <I0, Q> and the generation prompt
PROMPT = ("<|im_start|>user\n<|vision_start|>" + 16 * "<|image_pad|>" + "<|vision_end|>"
          "Which digit is on the red disc?<|im_end|>\n<|im_start|>assistant\n")
# between the turns of R: a line break, the crop in a turn of the user, the next generation prompt
BETWEEN = ("\n<|im_start|>user\n<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>"
           "<|im_end|>\n<|im_start|>assistant\n")
# R, each stretch with whether it is supervised
R = [(True, "Zoom in on the red disc. [crop 12 30 28 46]<|im_end|>"), (False, BETWEEN),
     (True, "The digit is seven. Answer: seven<|im_end|>")]


def views_of(chat, example, pred_tokens=2):
    return data.make_views(chat, example, load_images(example, chat.family), pred_tokens)


def pieces(shipped, view):
    """(supervised, text) of each stretch of tokens."""
    marked = groupby(zip(view.ids, view.labels), key=lambda pair: pair[1] != -100)
    return [(learned, shipped.tokenizer.decode([token for token, _ in pairs]))
            for learned, pairs in marked]


def test_the_full_and_the_target_view(shipped):
    """The target view is the full view from the generation prompt on: no I0, no Q."""
    view, _, target = views_of(shipped.chat, EXAMPLE)
    assert pieces(shipped, view) == [(False, PROMPT), *R]
    assert pieces(shipped, target) == [(False, "<|im_start|>assistant\n"), *R]
    assert target.ids == view.ids[-len(target.ids):] and target.ids[-1] == shipped.chat.end_id
    assert view.state_at == len(view.ids) - 1 and target.state_at == len(target.ids) - 1
    assert view.images == ["7#0", "7#1"] and target.images == ["7#1"] and view.inject_at == ()
    # a label is the token itself
    assert all(label in (token, -100) for token, label in zip(view.ids, view.labels))
    # the whole text is tokenised at once, as the template writes it; it ends with the last end of
    # turn, without the line break that the template puts behind it
    plain = tokens(shipped, turns_of(EXAMPLE))
    assert plain.text.endswith("<|im_end|>\n") and view.ids == plain.ids[:-1]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_input_view(shipped, count):
    """[PRED] stand where the model would begin to speak; without any, h^_R is the last state of the
    prompt."""
    view = views_of(shipped.chat, EXAMPLE, count).input
    size = len(view.ids) - count
    assert shipped.tokenizer.decode(view.ids[:size]) == PROMPT
    assert view.inject_at == tuple(range(size, size + count))
    assert view.state_at == len(view.ids) - 1 and view.images == ["7#0"]
    assert set(view.labels) == {-100} and len(view.labels) == len(view.ids)


def test_labels_where_a_text_repeats(shipped):
    """Nothing searches for words: the question, both texts and the options are alike."""
    text = "seven. Answer: seven"
    example = replace(EXAMPLE, question=text, trajectory=[text, EXAMPLE.images[1], text])
    full, _, target = views_of(shipped.chat, example)
    for view, start in (full, PROMPT.replace(EXAMPLE.question, text)), (target, PROMPT[-22:]):
        assert pieces(shipped, view) == [(False, start), (True, text + "<|im_end|>"),
                                         (False, BETWEEN), (True, text + "<|im_end|>")]


@pytest.mark.parametrize("change, message", [
    (dict(question="hi<|im_end|>"), "special token '<|im_end|>'; remove it"),
    (dict(options=["seven", "<|image_pad|>"]), "special token '<|image_pad|>'"),
    (dict(trajectory=[EXAMPLE.images[1]]), "example 7 has a trajectory without text")])
def test_what_cannot_be_trained_on_is_refused(shipped, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        views_of(shipped.chat, replace(EXAMPLE, **change))


def test_a_view_that_is_too_long_is_refused_and_none_is_cut(shipped):
    full, short = (len(view.ids) for view in views_of(shipped.chat, EXAMPLE)[:2])
    with pytest.raises(ValueError, match=f"example 7: {full} tokens, the model has {full - 1}"):
        views_of(Chat(shipped.family, full - 1), EXAMPLE)
    # every view counts, here the input view with its [PRED]
    views_of(Chat(shipped.family, full), EXAMPLE, full - short + 2)
    with pytest.raises(ValueError, match=f"example 7: {full + 1} tokens"):
        views_of(Chat(shipped.family, full), EXAMPLE, full - short + 3)
