"""Claims: what is kept of an answer, and what it cost; a question that cannot be asked stops the
program before any is asked; the model's own calls are run, and their images appended."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

import evaluate
from baselines import tool_use
from support import tables
from world import loader
from conftest import TINY

QUESTIONS = loader.questions("single", 2)[1:3]


def test_a_record_has_each_way_with_its_answer_and_cost():
    example = replace(QUESTIONS[0], options=["two", "six"], answer="six")
    answers = dict(direct=dict(text="two", option=0, log_probs=[-1.0, -2.0], tokens=0, images=1),
                   free=dict(text="Answer: Six.", tokens=5), call=dict(text="", failed="lost"))
    record = tables.answer_record(example, answers, "Answer:")
    assert record == dict(
        id=example.id, task=example.task, options=["two", "six"], answer="six",
        direct="two", direct_right=False, free="Answer: Six.", free_right=True,
        # a tool call that fails gives no answer, and the direct one counts
        call="(lost)", call_right=False,
        cost=dict(direct=dict(tokens=0, images=1), free=dict(tokens=5), call=dict(failed="lost")))
    answers["direct"]["option"], answers["free"]["text"] = 1, "Reply: two"
    record = tables.answer_record(example, answers, "Reply:")
    assert [record[f"{way}_right"] for way in answers] == [True, False, True]


def test_every_question_is_answered_in_every_way_without_dropout(vlm64):
    def echo(evaluator):
        assert not vlm64.training
        return [dict(text=example.answer) for example in evaluator.examples]

    evaluator = evaluate.Evaluator(vlm64.train(), QUESTIONS)
    records = evaluate.answer_questions(evaluator, 2, dict(echo=echo))
    for example, record, free in zip(QUESTIONS, records, evaluator.free(2), strict=True):
        assert record["id"] == example.id and record["echo_right"] and record["direct"]
        assert record["free"] == free["text"] and record["cost"]["free"]["tokens"] <= 2
        # the task without trajectories has no tool image to give
        assert ("tool" in record) == (len(example.images) > 1)


def test_a_question_that_cannot_be_asked_is_refused_at_once(vlm64):
    example = QUESTIONS[0]
    (question,) = evaluate.Evaluator(vlm64, [example]).questions
    # an answer must fit, and so must the expert's whole conversation where it is given
    for record, longest in ((replace(example, trajectory=[]), len(question.started.ids) + 1),
                            (example, len(question.tool.ids) + 9)):
        vlm64.chat.max_tokens = longest
        evaluate.Evaluator(vlm64, [record])
        vlm64.chat.max_tokens = longest - 1
        with pytest.raises(ValueError, match=f"example {example.id}: {longest} tokens"):
            evaluate.Evaluator(vlm64, [record])


def test_one_question_about_one_picture(tmp_path, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    options = evaluate.Options(image=str(tmp_path / "a.png"), question="Which colour is it?",
                               device="cpu", options="red,, blue,")
    assert evaluate.ask(TINY, options) == []
    best, one, least, other = capsys.readouterr().out.split()
    assert {one, other} == {"red", "blue"} and float(best) >= float(least)
    for wrong in (dict(image=""), dict(question=""), dict(json="a.json")):
        with pytest.raises(ValueError, match="--image and --question need each other"):
            evaluate.ask(TINY, replace(options, **wrong))
    evaluate.ask(TINY, replace(options, options=""))  # without options, what the model writes
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_the_questions_of_a_checkpoint(monkeypatch):
    """By the defaults that change an answer; the options go before what a run was trained with."""
    options, calls = evaluate.Options(device="cpu"), []
    assert (options.again, options.alpha, options.free_tokens, options.call_limit,
            options.max_pixels) == (False, 1.0, 0, 0, 0)
    monkeypatch.setattr(evaluate, "test_questions", lambda config, *rest: calls.append(
        (vars(config).copy(), *rest)) or QUESTIONS[:1])
    for more in (dict(), dict(data="DIR", per_task=7, split="validation", answer_prefix="So:")):
        assert evaluate.ask(TINY, replace(options, **more))[0]["id"] == QUESTIONS[0].id
    plain = dict(method="sft", data="", regime="", answer_prefix="Answer:")
    other = plain | dict(data="DIR", answer_prefix="So:")
    assert calls == [(plain, 200, "test"), (other, 7, "validation")]


def test_tool_shows_trajectories_as_training_did(vlm64, monkeypatch):
    """Here with the tool image before the text that calls it, and without the calls."""
    config = SimpleNamespace(method="image_first+strip_calls", data="", regime="multi",
                             answer_prefix="So:")
    monkeypatch.setattr(evaluate, "load_model", lambda *_: (vlm64, config, {}))
    monkeypatch.setattr(evaluate, "answer_questions", lambda evaluator, *_: evaluator.examples)
    example = evaluate.ask("", evaluate.Options(per_task=2, device="cpu"))[1]
    first, text, second, last = example.trajectory
    assert [first, second] == example.images[1:] and text == "Zoom in on the top right panel."
    assert last.split()[-7:] == "triangle. The digit is nine. Answer: nine".split()


@pytest.fixture
def talk(vlm64, monkeypatch):
    """The record of an attempt in which the model says these texts, and the prompts that it had."""
    def run(*texts, limit=3):
        evaluator = evaluate.Evaluator(vlm64, loader.questions("single", 1)[:1])
        prompts, end = [], evaluator.chat.end_id
        replies = iter([[*vlm64.tokenizer(text).input_ids, end] for text in texts])

        def generate(views, images, encode, tokens):
            assert [image.key for image in images] == views[0].images
            prompts.extend(views)
            return [next(replies)]

        monkeypatch.setattr(vlm64, "generate", generate)
        (record,) = tool_use.answer(evaluator, limit)
        return record, prompts
    return run


@pytest.mark.parametrize("text, why", [
    # brackets without a tool's name are an answer
    ("It is. Answer: [3, 4, 10, 12]", ""), ("Answer: [cropped]", ""), ("[zoom 1 2 3 4] x", ""),
    # a call that cannot be run ends the attempt
    ("[crop 10 20]", "wrong number of arguments"), ("Zoom [Crop 1 2 3", "no tool call")])
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
    # a conversation without room for a turn is not asked
    vlm64.chat.max_tokens = len(first.ids) + tool_use.TURN_TOKENS - 1
    assert "tokens left" in talk("red")[0]["failed"]
