"""Claims: intervals and tables equal hand-computed ones; the direct answer is the likeliest option; answers are parsed as said."""

import json
import subprocess
import sys

import pytest
import torch

import data
import evaluate
from conftest import TINY
from model import VLM


def test_wilson_interval_by_hand():
    # n = 10, 8 right: (8 + 1.9208 -+ 1.96 * sqrt(1.6 + 0.9604)) / 13.8416
    assert evaluate.wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    assert evaluate.wilson(0, 5)[0] == pytest.approx(0) and evaluate.wilson(5, 5)[1] == pytest.approx(1)


@pytest.mark.parametrize("text, prefix, answer", [
    ("The digit is seven. Answer: seven", "Answer:", "seven"), ("Answer: seven.", "Answer:", "seven"), (" seven ", "Answer:", "seven"),
    ("Answer: six Answer: two", "Answer:", "two"), ("Zoom in on", "Answer:", "Zoom in on"), ("B", "", "B")])
def test_parse_answer(text, prefix, answer):
    assert evaluate.parse_answer(text, prefix) == answer


def test_summary_by_hand():
    rows = [dict(family="crop", options=list("abcd"), direct_right=r, free_right=False, tool_right=True) for r in (True, True, False, True)]
    rows += [dict(family=data.HELD_OUT, options=list("ab"), direct_right=False, free_right=True)]
    table = evaluate.summarise(rows)
    assert table["crop"]["direct"][0] == 0.75 and table["crop"]["chance"] == 0.25 and table["crop"]["n"] == 4
    assert table["all"]["n"] == 4 and table["all"]["direct"][0] == 0.75  # the held-out family is not in "all"
    assert "tool" not in table[data.HELD_OUT] and table[data.HELD_OUT]["free"][0] == 1
    text = evaluate.format_table({"before": table})
    assert " 75.0 [" in text and "tallest (held out)" in text


def test_direct_answer_is_the_likeliest_option():
    vlm = VLM(TINY).eval()
    examples = data.make_world("mixed", "test", 10)
    serializer, store = data.Serializer(vlm.tokenizer, vlm.image_token_id, 2048), data.ImageStore(vlm.image_processor)
    for ex, record in zip(examples, evaluate.answer_questions(vlm, examples)):
        view = serializer.prompt(ex, *(x[:1] for x in store.add(ex)), "Answer:")
        batch = data.collate([view], vlm.pad_id)
        with torch.no_grad():
            features = vlm.encode_images([store.pixels[i] for i in view.images], [store.grids[i] for i in view.images])
            states, _ = vlm(batch, features, [store.grids[i] for i in view.images])
            logits = vlm.logits(states[0, -1])
        tokens = [vlm.tokenizer.encode(" " + option) for option in ex.options]
        assert all(len(t) == 1 for t in tokens)  # the world's answers are single words of the shipped tokenizer
        assert record["direct"] == max(zip(ex.options, tokens), key=lambda pair: logits[pair[1][0]])[0]
        assert record["direct_right"] == (record["direct"] == ex.answer)


def test_options_of_several_tokens_and_of_one_prefix():
    vlm = VLM(TINY)
    ex = data.make_example("crop", "test", 0, 0)
    ex.options, ex.answer = ["red disc", "red disc two", "a strange word"], "red disc two"
    assert evaluate.answer_questions(vlm, [ex])[0]["direct"] in ex.options


def test_command_line_needs_something_to_evaluate(tmp_path):
    run = lambda *args: subprocess.run([sys.executable, evaluate.__file__, *args], capture_output=True, text=True)
    done = run(str(tmp_path))
    assert done.returncode == 1 and "config.json not found" in done.stderr and "Traceback" not in done.stderr
    done = run("--model", TINY, "--per_family", "2", "--json", str(tmp_path / "a.json"), "--device", "cpu")
    assert done.returncode == 0 and "path+crop" in done.stdout
    written = json.loads((tmp_path / "a.json").read_text())[TINY]
    assert len(written["answers"]) == 2 * len(data.FAMILIES) and written["table"]["all"]["n"] == 2 * (len(data.FAMILIES) - 1)
