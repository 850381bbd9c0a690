"""Claims: the model's own calls are run and their images appended; an answer that holds brackets
is an answer; a call that cannot be run ends the attempt, as does one call too many, or a
conversation that has outgrown the model's positions."""

import pytest

import evaluate
from baselines import tool_use
from world import loader


@pytest.fixture
def talk(vlm64, monkeypatch):
    """The record of an attempt in which the model says these texts, and the prompts that it had."""
    def run(*texts, limit=3):
        evaluator = evaluate.Evaluator(vlm64, loader.questions("single", 1)[:1])
        prompts, end = [], evaluator.chat.end_id
        replies = iter([[*vlm64.tokenizer(text).input_ids, end] for text in texts])
        monkeypatch.setattr(vlm64, "generate", lambda views, images, encode, tokens: (
            prompts.extend(views) or [next(replies)]))
        (record,) = tool_use.answer(evaluator, limit)
        return record, prompts
    return run


@pytest.mark.parametrize("text, why", [
    # brackets without a tool's name are an answer
    ("It is. Answer: [3, 4, 10, 12]", ""), ("See [1]. Answer: red", ""), ("[x]", ""),
    ("Answer: [cropped]", ""), ("[zoom 1 2 3 4] x", ""), ("[[", ""),
    # a call that cannot be run ends the attempt
    ("[crop 10 20]", "wrong number of arguments"), ("[crop 50 50 40 60]", "is empty"),
    ("Zoom [crop 1 2 3", "no tool call"), ("[Crop 1 2 30 40]", "no tool call")])
def test_an_answer_or_a_call_that_cannot_be_run(talk, text, why):
    record, _ = talk(text)
    assert record["text"] == ("" if why else text) and record["calls"] == 0
    assert why in record.get("failed", "") and ("failed" in record) == bool(why)


def test_a_call_is_run_and_its_image_shown(talk, vlm64):
    texts = "Box [1, 2]: [crop 0 0 50 50] and more", "Answer: two"
    record, (first, second) = talk(*texts)
    count = sum(len(vlm64.tokenizer(text).input_ids) + 1 for text in texts)
    assert record == dict(text="Answer: two", calls=1, tokens=count, images=3, passes=count)
    assert len(first.images) == 1 and len(second.images) == 2
    # what the model wrote behind its call is dropped
    added = vlm64.tokenizer.decode(second.ids[len(first.ids):])
    assert added.startswith("Box [1, 2]: [crop 0 0 50 50]<|im_end|>") and "more" not in added
    assert talk(*["[crop 0 0 50 50]"] * 3, limit=2)[0]["failed"] == "one call too many"


def test_a_conversation_without_room_for_a_turn_is_not_asked(talk, vlm64):
    length = len(talk("red")[1][0].ids)
    for room, failed in ((tool_use.TURN_TOKENS, False), (tool_use.TURN_TOKENS - 1, True)):
        vlm64.max_positions = length + room
        assert ("tokens left" in talk("red")[0].get("failed", "")) == failed
