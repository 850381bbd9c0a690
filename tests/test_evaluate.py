"""Claims: intervals, paired differences and tables equal hand-computed ones; the direct answer is
the likeliest option; answers are parsed as said; the tool executor runs good calls, counts bad ones
and stops at its limit; the latent loop on the KV cache equals a loop that encodes all anew."""

import json
import sys

import pytest
import torch

import data
import evaluate
from analysis import tables as comparisons
from baselines import reconstruction, tool_use
from baselines.reconstruction import LatentScale
from support import answers, images, tables
from world import scenes

from conftest import TINY


def test_wilson_interval_by_hand():
    # n = 10, 8 right: (8 + 1.9208 -+ 1.96 * sqrt(1.6 + 0.9604)) / 13.8416
    assert tables.wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    assert tables.wilson(0, 5)[0] == pytest.approx(0) and tables.wilson(5, 5)[1] == pytest.approx(1)


@pytest.mark.parametrize("text, prefix, answer", [
    ("The digit is seven. Answer: seven", "Answer:", "seven"),
    ("Answer: seven.", "Answer:", "seven"), (" seven ", "Answer:", "seven"),
    ("Answer: six Answer: two", "Answer:", "two"),
    ("two, I think. Answer: three", "Answer:", None), ("Zoom in on", "Answer:", "Zoom in on"),
    ("B", "", "B")])
def test_a_reply_is_the_option_that_it_states_last(text, prefix, answer):
    options = ["six", "two", "seven", "Zoom in on", "B"]
    assert answers.says(text, options, prefix) == (options.index(answer) if answer else None)


def test_summary_by_hand():
    rows = [dict(task="crop", options=list("abcd"), direct_right=r, free_right=False,
                 tool_right=True) for r in (True, True, False, True)]
    rows += [dict(task=scenes.HELD_OUT, options=list("ab"), direct_right=False, free_right=True)]
    table = tables.summarise(rows)
    crop, held_out = table["crop"], table[scenes.HELD_OUT]
    assert crop["direct"][0] == 0.75 and crop["chance"] == 0.25 and crop["n"] == 4
    assert table["all"]["n"] == 4 and table["all"]["direct"][0] == 0.75  # without the held-out one
    assert "tool" not in held_out and held_out["free"][0] == 1
    text = tables.format_table({"before": table})
    assert " 75.0 [" in text and "tallest (held out)" in text


@torch.no_grad()
def next_logits(vlm, store, view, latents=()):
    """(V) after the last token; latents: (position, embedding) of what stands for no word."""
    view = view._replace(inject_at=tuple(position for position, _ in latents))
    batch = data.collate([view], vlm.pad_id)
    injected = torch.stack([e for _, e in latents]) if latents else None
    states = vlm(batch, store.encoded(batch.images), injected).states
    return vlm.logits(states[0, -1]), states[0, -1]


def test_direct_answer_is_the_likeliest_option(shipped):
    examples, store = scenes.make_world("mixed", "test", 10), images.ImageStore(shipped.family)
    for ex, record in zip(examples, evaluate.answer_questions(shipped, examples)):
        numbers, texts = store.add(ex)
        text = (f"<|im_start|>user\n<|vision_start|>{texts[0]}<|vision_end|>{ex.question}"
                "<|im_end|>\n<|im_start|>assistant\nAnswer:")
        ids = shipped.tokenizer(text, add_special_tokens=False).input_ids
        view = data.View(ids, [-100] * len(ids), numbers[:1], len(ids) - 1)
        logits, _ = next_logits(shipped, store, view)
        tokens = [shipped.tokenizer.encode(" " + option) for option in ex.options]
        # the world's answers are single words of the shipped tokenizer
        assert all(len(t) == 1 for t in tokens)
        likeliest = max(zip(ex.options, tokens), key=lambda pair: logits[pair[1][0]])[0]
        assert record["direct"] == likeliest
        assert record["direct_right"] == (likeliest == ex.answer)


def test_options_of_several_tokens_and_of_one_prefix(shipped, capsys):
    ex = scenes.make_example("crop", "test", 0, 0)
    ex.options, ex.answer = ["red disc", "red disc two", "a strange word"], "red disc two"
    assert evaluate.answer_questions(shipped, [ex])[0]["direct"] in ex.options
    asker = evaluate.Answerer(shipped, [ex])
    written = shipped.tokenizer("Answer: a strange word<|im_end|>", add_special_tokens=False)
    assert asker.answer_tokens() == [len(written.input_ids)] and len(written.input_ids) > 5
    assert asker.free()[0]["tokens"] <= len(written.input_ids)
    assert "1 of 1 questions" not in capsys.readouterr().out
    asker.free(4)
    assert "1 of 1 questions have options that take more than" in capsys.readouterr().out


def test_a_question_without_room_for_its_answer_stops_before_training(shipped):
    """Neither the answer asked for directly nor the one behind the expert's tool is too long."""
    for ex in (scenes.make_example("crop", "test", 0, 0),
               scenes.make_example(scenes.HELD_OUT, "test", 0, 0)):
        asker = evaluate.Answerer(shipped, [ex])
        prompt, options = asker.begun[0]
        told = 0
        if ex.trajectory:
            view = asker.serializer.views(ex, *asker.placed[0], 0, "trajectory").full
            told = len(view.ids)
        longest = max(told, len(prompt.ids) + max(map(len, options)))
        assert (longest == told) == (len(ex.images) > 1)
        asker.serializer.max_tokens = longest
        asker.check_lengths()
        asker.serializer.max_tokens = longest - 1
        with pytest.raises(ValueError, match=f"{longest} tokens, the limit is {longest - 1}"):
            asker.check_lengths()


# ---- explicit tool use ----


class Script:
    """An Answerer whose model says what is written here, turn by turn, whatever it is shown."""

    def __init__(self, vlm, monkeypatch, examples, turns):
        self.asker, self.turns, self.shown = evaluate.Answerer(vlm, examples), list(turns), []
        monkeypatch.setattr(self.asker, "generate", self.say)

    def say(self, views, tokens):
        self.shown.append([len(v.images) for v in views])
        return [dict(ids=[], text=text, tokens=5, images=len(v.images), passes=5)
                for text, v in zip(self.turns.pop(0), views)]

    def answer(self, limit):
        return tool_use.answer(self.asker, limit)


def test_tools_run_on_the_last_image_until_the_answer(shipped, monkeypatch):
    number = next(i for i in range(50) if scenes.make_spec("zoom", "test", i, 0)["calls"] == 2)
    ex = scenes.make_example("zoom", "test", number, 0)
    script = Script(shipped, monkeypatch, [ex],
                    [[ex.texts[0]], [ex.texts[1] + " and so on"], [ex.texts[2]]])
    [record] = script.answer(limit=3)
    assert script.shown == [[1], [2], [3]]  # I0, then each tool's image with it
    assert record == dict(text=ex.texts[2], calls=2, tokens=15, images=6, passes=15)
    made = script.asker.store.pictures[-2:]  # the expert's images, made anew by the calls
    assert [image.tobytes() for image in made] == [image.tobytes() for image in ex.images[1:]]


def test_an_answer_that_is_none_of_the_options_is_wrong(shipped, monkeypatch):
    """A model that has broken down may write outside the words it is confined to."""
    ex = scenes.make_example("crop", "test", 0, 0)
    broken = dict(ids=[0], text="?", tokens=1, images=1, passes=1)
    monkeypatch.setattr(evaluate.Answerer, "generate",
                        lambda self, views, *rest: [dict(broken) for _ in views])
    record, = evaluate.answer_questions(shipped, [ex])
    assert record["direct"] == "" and not record["direct_right"]


@pytest.mark.parametrize("said, why", [
    ("Zoom in. [crop 10 20]", "wrong number of arguments"),
    ("Zoom in. [Crop 1 2 3 4]", "no tool call"), ("Zoom in. [crop 50 50 40 60]", "is empty"),
    ("Zoom [crop 1 2 3", "no tool call")])
def test_malformed_calls_are_counted_and_answered_directly(shipped, monkeypatch, said, why):
    ex = scenes.make_example("crop", "test", 0, 0)
    [record] = Script(shipped, monkeypatch, [ex], [[said]]).answer(limit=3)
    assert why in record["failed"] and record["text"] == "" and record["calls"] == 0


def test_calls_stop_at_the_limit(shipped, monkeypatch):
    examples = scenes.make_world("single", "test", 2)
    call = "Again. [crop 0 0 90 90]"
    script = Script(shipped, monkeypatch, examples, [[call, "Answer: two"], [call], [call]])
    records = script.answer(limit=2)
    assert records[0]["failed"] == "one call too many" and records[0]["calls"] == 2
    assert records[1]["text"] == "Answer: two" and records[1]["calls"] == 0


def test_a_failed_attempt_counts_as_answered_directly(shipped, monkeypatch):
    examples = scenes.make_world("single", "test", 6)
    failed = dict(text="", failed="no tool call", calls=0, tokens=1, images=1, passes=1)
    monkeypatch.setattr(tool_use, "answer", lambda asker, limit: [dict(failed)] * 6)
    found = evaluate.answer_questions(shipped, examples, call_limit=1)
    assert {record["direct_right"] for record in found} == {True, False}
    for record in found:
        assert record["call_right"] == record["direct_right"]
        assert record["call"] == "(no tool call)"


# ---- the latent loop ----


def naive_latent(vlm, view, store, scale, latents, markers, end_id, limit):
    """One example, no cache: everything so far is embedded and encoded anew for each word."""
    ids, fed, words = list(view.ids), [], []  # fed: (position, embedding) of each latent so far

    def step():
        return next_logits(vlm, store, view._replace(ids=ids, labels=[-100] * len(ids),
                                                     embed_at=len(ids) - 1), fed)

    while len(words) < limit:
        words.append(int(step()[0].argmax()))
        ids.append(words[-1])
        if words[-1] == end_id:
            break
        if words[-1] == markers[0]:
            for _ in range(latents):
                fed.append((len(ids), scale.input(step()[1])))
                ids.append(end_id)  # a placeholder under the latent
            ids.append(markers[1])
    return words, [e for _, e in fed]


@pytest.mark.parametrize("latents", [0, 1, 3])
def test_latent_loop_equals_encoding_everything_anew(vlm64, monkeypatch, latents):
    """Any token may be the start marker: the commonest first words, so that runs begin early, late
    and twice."""
    torch.manual_seed(0)
    examples = scenes.make_world("mixed", "test", 3)
    asker = evaluate.Answerer(vlm64.eval(), examples)
    views, end, token = asker.prompts, asker.serializer.end_id, vlm64.tokenizer
    scale = LatentScale(3 + 5 * torch.randn(20, vlm64.dim), torch.full((vlm64.dim,), 0.1))
    scale.double()  # and far from doing nothing
    said = vlm64.generate(views, asker.store, 4)
    # fed: what the loop gave the language model after the prompt, one position a row each time
    runs, fed, alone = 0, [], []

    def keep(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] == 1:
            fed.append(kwargs["inputs_embeds"])

    vlm64.lm.model.language_model.register_forward_pre_hook(keep, with_kwargs=True)
    for start in {said[0][0], said[1][1], said[2][1]}:
        markers = start, token.convert_tokens_to_ids(reconstruction.LATENT_END)
        monkeypatch.setattr(reconstruction, "LATENT_START", token.convert_ids_to_tokens(start))
        together = reconstruction.generate_latent(vlm64, views, asker.store, scale, latents, end, 7)
        alone = [naive_latent(vlm64, view, asker.store, scale, latents, markers, end, 7)
                 for view in views]
        assert [(list(w), n) for w, n in together] == [(w, len(e)) for w, e in alone]
        for row, (_, embeddings) in enumerate(alone):  # and the same latents went in
            for latent in embeddings:
                assert any(torch.allclose(inputs[row, 0], latent, rtol=1e-4, atol=1e-4)
                           for inputs in fed)
        fed.clear()
        runs += sum(words.count(start) for words, _ in together)
    assert runs > 3


# ---- comparison ----


def a_run(method, seed, rights, way="direct", **settings):
    rows = [{"id": str(i), "task": "crop", "options": list("abcd"), f"{way}_right": r,
             "direct_right": r, "cost": {way: dict(tokens=2, images=1, passes=2)}}
            for i, r in enumerate(rights)]
    config = dict(method=method, seed=seed, out=f"{method}{seed}", **settings)
    return dict(config=config, answers=rows, ms={way: 10.0 + seed})


def test_comparison_by_hand():
    runs = {"a": a_run("sft", 0, [1, 0, 0, 0]), "b": a_run("sft", 1, [1, 1, 0, 0]),
            "c": a_run("pearl", 0, [1, 1, 1, 0]), "d": a_run("pearl", 1, [1, 1, 1, 0]),
            "e": a_run("recon", 0, [0, 0, 0, 1], way="latent")}
    rows = {row["system"]: row for row in comparisons.compare(runs)}
    sft, pearl, recon = (rows[name] for name in ("sft", "pearl", "recon"))
    assert sft["own"] == [25.0, 50.0] and pearl["own"] == [75.0, 75.0]
    # differences by seed 50 and 25: mean 37.5, std 17.678, t(1) = 12.71,
    # half width 12.71 * 17.678 / sqrt(2) = 158.9
    assert pearl["difference"] == pytest.approx((37.5, 158.875))
    assert recon["own_way"] == "latent"
    assert "difference" not in recon and not recon["compared"]  # 25%: it guesses
    assert pearl["cost"]["tokens"] == 2 and pearl["cost"]["ms"] == [10.0, 11.0]
    text = comparisons.markdown(list(rows.values()))
    for cells in ("| recon | 1 | 25.0 | guesses |", "| sft | 2 | 37.5 +/- 17.7 |",
                  "+37.5 [-121.4, +196.4]"):
        assert cells in text


def test_arms_are_named_by_what_differs():
    runs = {"a": a_run("pearl", 0, [1], pred_tokens=4), "b": a_run("pearl", 1, [1], pred_tokens=4),
            "c": a_run("pearl", 0, [1], pred_tokens=0), "d": a_run("sft", 0, [1], pred_tokens=4)}
    assert comparisons.arms({name: run["config"] for name, run in runs.items()}) == {
        "a": "pearl pred_tokens=4", "b": "pearl pred_tokens=4", "c": "pearl pred_tokens=0",
        "d": "sft"}


def test_command_line_needs_something_to_evaluate(tmp_path, monkeypatch, capsys, as_program):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
        evaluate.main()

    with pytest.raises(SystemExit, match="error: .*results.json not found"):  # no traceback
        as_program(evaluate.__file__, tmp_path)
    with pytest.raises(FileNotFoundError, match="config.json not found"):
        call(tmp_path, "--again")
    with pytest.raises(SystemExit):
        call()
    assert "name at least one RUN folder, or --model" in capsys.readouterr().err


def test_command_line_evaluates_an_untrained_checkpoint(tmp_path, monkeypatch, capsys):
    file, count = tmp_path / "a.json", len(scenes.FAMILIES)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", TINY, "--per_family", "2",
                                      "--json", str(file), "--device", "cpu"])
    evaluate.main()
    assert "path+crop" in capsys.readouterr().out
    written = json.loads(file.read_text(encoding="utf-8"))[TINY]
    assert len(written["answers"]) == 2 * count and written["table"]["all"]["n"] == 2 * (count - 1)
