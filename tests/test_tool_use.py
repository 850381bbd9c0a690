"""Claims: an answer that holds brackets is an answer; a call to a known tool that cannot be run
fails the attempt, and so does a conversation that has outgrown the model's positions."""

import pytest
from PIL import Image

import evaluate
from baselines import tool_use


def talk_after(text):
    """What the talk is after one turn, at its first call."""
    talk = dict(turns=[], shown=[Image.new("RGB", (64, 64))], indices=[0], calls=0)

    class Store:
        def add_image(self, picture, where):
            return 1

    class Asker:
        store = Store()

    tool_use.run_call(Asker(), talk, text, limit=3)
    return talk


@pytest.mark.parametrize("text", ["It is. Answer: [3, 4, 10, 12]", "See [1]. Answer: red", "[x]",
                                  "Answer: red", "Answer: [cropped]", "[zoom 1 2 3 4] x", "[["])
def test_brackets_without_a_tools_name_are_an_answer(text):
    talk = talk_after(text)
    assert talk["text"] == text and "failed" not in talk and talk["calls"] == 0


@pytest.mark.parametrize("text, why", [
    ("[crop 10 20]", "wrong number of arguments"), ("[crop 50 50 40 60]", "is empty"),
    ("Zoom [crop 1 2 3", "no tool call"), ("[crop a b c d]", "no tool call"),
    ("[Crop 1 2 30 40]", "no tool call"), ("[ crop 1 2 30 40]", "no tool call"),
    ("Box [1, 2] [crop 1 2]", "wrong number")])
def test_a_call_that_cannot_be_run_fails_the_attempt(text, why):
    talk = talk_after(text)
    assert why in talk["failed"] and talk["text"] == "" and talk["calls"] == 0


def test_a_call_behind_other_brackets_is_run():
    talk = talk_after("Box [1, 2]: [crop 0 0 50 50] and more")
    assert talk["calls"] == 1 and talk["shown"][-1].size == (32, 32)
    assert talk["turns"][0] == ("assistant", ["Box [1, 2]: [crop 0 0 50 50]"])


def test_a_conversation_without_room_for_a_turn_is_not_asked(shipped, mixed):
    asker = evaluate.Answerer(shipped, mixed[:2])
    first, second = (len(prompt.ids) for prompt in asker.prompts)
    assert first != second  # the shorter question just fits, the longer does not
    asker.serializer.max_tokens = min(first, second) + tool_use.TURN_TOKENS
    said = tool_use.answer(asker, limit=0)
    failed = ["tokens left" in one.get("failed", "") for one in said]
    assert failed == [first > second, second > first]
    assert [one["tokens"] == 0 for one in said] == failed
