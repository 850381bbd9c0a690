"""Claims: intervals, paired differences and tables equal hand-computed ones; the direct answer is the likeliest option; answers
are parsed as said; the tool executor runs good calls, counts bad ones and stops at its limit; the latent loop on the KV cache
equals a loop that encodes everything anew."""

import json
import subprocess
import sys

import pytest
import torch

import data
import evaluate
from baselines import reconstruction
from support import images, answers
from analysis import tables
from world import scenes
from conftest import TINY
from model import VLM
from predictor import LatentScale


def test_wilson_interval_by_hand():
    # n = 10, 8 right: (8 + 1.9208 -+ 1.96 * sqrt(1.6 + 0.9604)) / 13.8416
    assert tables.wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    assert tables.wilson(0, 5)[0] == pytest.approx(0) and tables.wilson(5, 5)[1] == pytest.approx(1)


@pytest.mark.parametrize("text, prefix, answer", [
    ("The digit is seven. Answer: seven", "Answer:", "seven"), ("Answer: seven.", "Answer:", "seven"), (" seven ", "Answer:", "seven"),
    ("Answer: six Answer: two", "Answer:", "two"), ("Zoom in on", "Answer:", "Zoom in on"), ("B", "", "B")])
def test_parse_answer(text, prefix, answer):
    assert answers.parse_answer(text, prefix) == answer


def test_summary_by_hand():
    rows = [dict(family="crop", options=list("abcd"), direct_right=r, free_right=False, tool_right=True)
            for r in (True, True, False, True)]
    rows += [dict(family=scenes.HELD_OUT, options=list("ab"), direct_right=False, free_right=True)]
    table = tables.summarise(rows)
    assert table["crop"]["direct"][0] == 0.75 and table["crop"]["chance"] == 0.25 and table["crop"]["n"] == 4
    assert table["all"]["n"] == 4 and table["all"]["direct"][0] == 0.75  # the held-out family is not in "all"
    assert "tool" not in table[scenes.HELD_OUT] and table[scenes.HELD_OUT]["free"][0] == 1
    text = tables.format_table({"before": table})
    assert " 75.0 [" in text and "tallest (held out)" in text


def test_direct_answer_is_the_likeliest_option():
    vlm = VLM(TINY).eval()
    examples = scenes.make_world("mixed", "test", 10)
    serializer, store = data.Serializer(vlm.family, 2048), images.ImageStore(vlm.family)
    for ex, record in zip(examples, evaluate.answer_questions(vlm, examples)):
        view = serializer.prompt(ex, *(x[:1] for x in store.add(ex)), "Answer:")
        batch = data.collate([view], vlm.pad_id)
        with torch.no_grad():
            features = vlm.encode_images([store.inputs(i) for i in view.images])
            states, _ = vlm(batch, features, [store.grids[i] for i in view.images])
            logits = vlm.logits(states[0, -1])
        tokens = [vlm.tokenizer.encode(" " + option) for option in ex.options]
        assert all(len(t) == 1 for t in tokens)  # the world's answers are single words of the shipped tokenizer
        assert record["direct"] == max(zip(ex.options, tokens), key=lambda pair: logits[pair[1][0]])[0]
        assert record["direct_right"] == (record["direct"] == ex.answer)


def test_options_of_several_tokens_and_of_one_prefix():
    vlm = VLM(TINY)
    ex = scenes.make_example("crop", "test", 0, 0)
    ex.options, ex.answer = ["red disc", "red disc two", "a strange word"], "red disc two"
    assert evaluate.answer_questions(vlm, [ex])[0]["direct"] in ex.options


# ---- explicit tool use ----


class Script:
    """An Asker whose model says what is written here, turn by turn, whatever it is shown."""

    def __init__(self, monkeypatch, examples, turns):
        self.asker, self.turns, self.shown = evaluate.Answerer(VLM(TINY), examples), list(turns), []
        monkeypatch.setattr(self.asker, "_generate", self.say)

    def say(self, views, tokens):
        self.shown.append([len(v.images) for v in views])
        return [dict(ids=[], text=text, tokens=5, images=len(v.images), passes=5) for text, v in zip(self.turns.pop(0), views)]


def test_tools_run_on_the_last_image_until_the_answer(monkeypatch):
    ex = scenes.make_example("zoom", "test", next(i for i in range(50) if scenes.make_spec("zoom", "test", i, 0)["calls"] == 2), 0)
    script = Script(monkeypatch, [ex], [[ex.texts[0]], [ex.texts[1] + " and so on"], [ex.texts[2]]])
    [record] = script.asker.call(limit=3)
    assert script.shown == [[1], [2], [3]]  # I0, then each tool's image with it
    assert record == dict(text=ex.texts[2], calls=2, tokens=15, images=6, passes=15)
    by_hand = []
    for image, made in zip(ex.images[1:], script.asker.store.pictures[-2:]):  # the expert's images, made anew by the calls
        by_hand.append(image.tobytes() == made.tobytes())
    assert by_hand == [True, True]


def test_an_answer_that_is_none_of_the_options_is_wrong(monkeypatch):
    """A model that has broken down may write outside the words it is confined to."""
    vlm, ex = VLM(TINY), scenes.make_example("crop", "test", 0, 0)
    monkeypatch.setattr(evaluate.Answerer, "_generate", lambda self, views, *rest: [dict(ids=[0], text="?", tokens=1, images=1, passes=1)
                                                                              for _ in views])
    record, = evaluate.answer_questions(vlm, [ex])
    assert record["direct"] == "" and not record["direct_right"]


@pytest.mark.parametrize("said, why",
                         [("Zoom in. [crop 10 20]", "wrong number of arguments"), ("Zoom in. [zoom 1 2 3 4]", "no tool call"),
                          ("Zoom in. [crop 50 50 40 60]", "is empty"), ("Zoom [crop 1 2 3", "no tool call")])
def test_malformed_calls_are_counted_and_answered_directly(monkeypatch, said, why):
    ex = scenes.make_example("crop", "test", 0, 0)
    [record] = Script(monkeypatch, [ex], [[said]]).asker.call(limit=3)
    assert why in record["failed"] and record["text"] == "" and record["calls"] == 0


def test_calls_stop_at_the_limit(monkeypatch):
    examples = scenes.make_world("single", "test", 2)
    call = "Again. [crop 0 0 90 90]"
    script = Script(monkeypatch, examples, [[call, "Answer: two"], [call], [call]])
    records = script.asker.call(limit=2)
    assert records[0]["failed"] == "one call too many" and records[0]["calls"] == 2
    assert records[1]["text"] == "Answer: two" and records[1]["calls"] == 0


def test_a_failed_attempt_counts_as_answered_directly(monkeypatch):
    examples = scenes.make_world("single", "test", 6)
    monkeypatch.setattr(evaluate.Answerer, "call", lambda self, limit: [dict(text="", failed="no tool call", calls=0, tokens=1,
                                                                          images=1, passes=1)] * 6)
    for record in evaluate.answer_questions(VLM(TINY), examples, call_limit=1):
        assert record["call_right"] == record["direct_right"] and record["call"] == "(no tool call)"


# ---- the latent loop ----


def naive_latent(vlm, view, store, scale, latents, markers, end_id, limit):
    """One example, no cache: everything so far is embedded and encoded anew for each word."""
    features = vlm.encode_images([store.inputs(i) for i in view.images])
    ids, extra, words = list(view.ids), [], []  # extra: (position, embedding) of each latent so far

    def state():
        slots = tuple(position for position, _ in extra)
        batch = data.collate([data.View(ids, [-100] * len(ids), view.images, len(ids) - 1, slots)], vlm.pad_id)
        filled = torch.stack([e for _, e in extra]) if extra else None
        return vlm(batch, features, [store.grids[i] for i in view.images], filled)[0][0, -1]

    while len(words) < limit:
        words.append(int(vlm.logits(state()).argmax()))
        ids.append(words[-1])
        if words[-1] == end_id:
            break
        if words[-1] == markers[0]:
            for _ in range(latents):
                extra.append((len(ids), scale.input(state())))
                ids.append(end_id)  # a placeholder under the latent
            ids.append(markers[1])
    return words, [e for _, e in extra]


@pytest.mark.parametrize("latents", [0, 1, 3])
def test_latent_loop_equals_encoding_everything_anew(vlm64, latents):
    """Any token may be the start marker: the commonest first words, so that runs begin early, late and twice."""
    torch.manual_seed(0)
    examples = scenes.make_world("mixed", "test", 3)
    asker = evaluate.Answerer(vlm64.eval(), examples)
    views = [asker.serializer.prompt(ex, i[:1], n[:1]) for ex, (i, n) in zip(examples, asker.placed)]
    scale = LatentScale(3 + 5 * torch.randn(20, vlm64.dim), torch.full((vlm64.dim,), 0.1)).double()  # far from doing nothing
    said = vlm64.generate(views, asker.store, 4)
    runs, fed = 0, []  # fed: what the loop gave the language model after the prompt, one position a row each time
    vlm64.lm.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["inputs_embeds"]) if kwargs["inputs_embeds"].shape[1] == 1 else None, with_kwargs=True)
    for start in {said[0][0], said[1][1], said[2][1]}:
        markers = start, vlm64.tokenizer.convert_tokens_to_ids(reconstruction.LATENT_END)
        with torch.no_grad():
            together = vlm64.generate_latent(views, asker.store, scale, latents, markers, asker.serializer.end_id, 7)
            alone = [naive_latent(vlm64, view, asker.store, scale, latents, markers, asker.serializer.end_id, 7) for view in views]
        assert [(list(w), n) for w, n in together] == [(words, len(latents_fed)) for words, latents_fed in alone]
        for row, (_, latents_fed) in enumerate(alone):  # and the same latents went in, not only the same words came out
            for latent in latents_fed:
                assert any(torch.allclose(inputs[row, 0], latent, rtol=1e-4, atol=1e-4) for inputs in fed)
        fed.clear()
        runs += sum(words.count(start) for words, _ in together)
    assert runs > 3


# ---- comparison ----


def a_run(method, seed, rights, way="direct", **settings):
    rows = [{"id": str(i), "family": "crop", "options": list("abcd"), f"{way}_right": r, "direct_right": r,
             "cost": {way: dict(tokens=2, images=1, passes=2)}}
            for i, r in enumerate(rights)]
    return dict(config=dict(method=method, seed=seed, out=f"{method}{seed}", **settings), answers=rows, ms={way: 10.0 + seed})


def test_comparison_by_hand():
    runs = {"a": a_run("sft", 0, [1, 0, 0, 0]), "b": a_run("sft", 1, [1, 1, 0, 0]), "c": a_run("pearl", 0, [1, 1, 1, 0]),
            "d": a_run("pearl", 1, [1, 1, 1, 0]),
            "e": a_run("recon", 0, [0, 0, 0, 1], way="latent")}
    rows = {row["system"]: row for row in tables.compare(runs)}
    assert rows["sft"]["own"] == [25.0, 50.0] and rows["pearl"]["own"] == [75.0, 75.0] and rows["recon"]["own_way"] == "latent"
    # differences by seed 50 and 25: mean 37.5, std 17.678, t(1) = 12.71, half width 12.71 * 17.678 / sqrt(2) = 158.9
    assert rows["pearl"]["difference"] == pytest.approx((37.5, 158.875))
    assert "difference" not in rows["recon"] and not rows["recon"]["compared"]  # 25%: it guesses
    assert rows["pearl"]["cost"]["tokens"] == 2 and rows["pearl"]["cost"]["ms"] == [10.0, 11.0]
    text = tables.markdown(list(rows.values()))
    assert "| recon | 1 | 25.0 | guesses |" in text and "| sft | 2 | 37.5 +/- 17.7 |" in text and "+37.5 [-121.4, +196.4]" in text


def test_arms_are_named_by_what_differs():
    runs = {"a": a_run("pearl", 0, [1], pred_tokens=4), "b": a_run("pearl", 1, [1], pred_tokens=4),
            "c": a_run("pearl", 0, [1], pred_tokens=0), "d": a_run("sft", 0, [1], pred_tokens=4)}
    assert tables.arms({k: r["config"] for k, r in runs.items()}) == {"a": "pearl pred_tokens=4", "b": "pearl pred_tokens=4",
                                                                      "c": "pearl pred_tokens=0", "d": "sft"}


def test_command_line_needs_something_to_evaluate(tmp_path, monkeypatch, capsys):
    done = subprocess.run([sys.executable, evaluate.__file__, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "results.json not found" in done.stderr and "Traceback" not in done.stderr
    call = lambda *args: (monkeypatch.setattr(sys, "argv", ["evaluate.py", *args]), evaluate.main())
    with pytest.raises(FileNotFoundError, match="config.json not found"):
        call(str(tmp_path), "--again")
    with pytest.raises(SystemExit):
        call()
    assert "name at least one RUN folder, or --model" in capsys.readouterr().err
    call("--model", TINY, "--per_family", "2", "--json", str(tmp_path / "a.json"), "--device", "cpu")
    assert "path+crop" in capsys.readouterr().out
    written = json.loads((tmp_path / "a.json").read_text())[TINY]
    assert len(written["answers"]) == 2 * len(scenes.FAMILIES) and written["table"]["all"]["n"] == 2 * (len(scenes.FAMILIES) - 1)
