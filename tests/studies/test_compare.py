"""Claims: intervals, accuracies and paired differences equal hand-computed ones; only runs of one
base, training set and set of questions are averaged or subtracted; two runs of one arm and seed
have two names; the text says how many comparisons were made."""

import sys
from pathlib import Path

import numpy as np
import pytest

import evaluate
from analysis import compare
from analysis.compare import arms, comparison, difference
from support.files import read_json, write_json
from support.tables import conclusion, format_table, overall, summarise, wilson


def answers(rights, task="crop", **ways):
    """One answer each; ways: more ways to answer, the same for all."""
    ways = dict(direct=None) | ways
    return [{"id": f"{task}{n}", "task": task, "options": list("abcd"), "answer": "a",
             **{f"{way}_right": right if value is None else value for way, value in ways.items()},
             "cost": {way: dict(tokens=2, images=1, passes=2) for way in ways}}
            for n, right in enumerate(rights)]


def a_run(method, seed, rights, task="crop", **settings):
    config = dict(method=method, seed=seed, model="bases/tiny", data="", regime="mixed",
                  workers=2, out=f"{method}{seed}") | settings
    after = answers(rights, task, **dict(latent=None) if "recon" in method else {})
    return dict(config=config, answers=after, before=answers(rights, task))


def test_wilson_interval_by_hand():
    # n = 10, 8 right: (8 + 1.9208 -+ 1.96 * sqrt(1.6 + 0.9604)) / 13.8416
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    assert wilson(0, 5)[0] == pytest.approx(0) and wilson(5, 5)[1] == pytest.approx(1)


def test_the_interval_of_a_difference_is_over_seeds_and_questions():
    draw = np.random.default_rng(1)
    ours, theirs = (draw.random((5, 300)) < p for p in (0.6, 0.5))

    def interval(ours, theirs):
        return difference(*([dict(enumerate(row.astype(int))) for row in one]
                            for one in (ours, theirs)))

    mean, low, high = interval(ours, theirs)
    gaps = 100 * (ours.astype(int) - theirs)
    # with independent answers seeds, questions and their pairs each add the variance of the mean
    half = 1.96 * (3 * gaps.var() / gaps.size) ** 0.5
    assert mean == pytest.approx(gaps.mean()) and high - low == pytest.approx(2 * half, rel=0.2)
    # seeds that differ by as much as this decide alone; so do questions, where seeds are equal
    one, other = np.ones((2, 300)), np.zeros((2, 300))
    one[1] = 0
    assert interval(one, other) == (50, 0, 100)
    same = np.repeat(ours[:1], 5, axis=0)
    assert interval(same, same * 0)[1:] == pytest.approx(
        interval(same[:1], same[:1] * 0)[1:], abs=1.5)
    # questions that one did not answer do not count
    assert difference([{"a": 1, "b": 0}], [{"a": 0}]) == (100, 100, 100)
    assert difference([{"a": 1}], [{}]) is None


def test_a_summary_by_hand_has_the_row_all_only_for_several_tasks():
    rows = answers([1, 1, 0, 1], free=0, tool=1) + answers([0], "tallest", free=1)
    table = summarise(rows)
    assert list(table) == ["crop", "tallest"] and overall(table) == "crop"
    assert table["crop"]["direct"][0] == 0.75 and table["crop"]["chance"] == 0.25
    assert "tool" not in table["tallest"] and table["tallest"]["free"][0] == 1
    several = summarise(rows + answers([0, 0, 0, 0], "path"))
    # the held-out task is not in it
    assert several["all"]["n"] == 8 and several["all"]["direct"][0] == 0.375
    text = format_table({"before": table})
    assert " 75.0 [" in text and "tallest (held out)" in text and "\nall" not in text
    assert "37.5% were right before and 75.0% are now" in conclusion(several | dict(
        crop=several["all"]), table)


def test_a_comparison_by_hand():
    rows, text = comparison({
        "a": a_run("sft", 0, [1, 0, 0, 0]), "b": a_run("sft", 1, [1, 1, 0, 0]),
        "c": a_run("pearl", 0, [1, 1, 1, 0]), "d": a_run("pearl", 1, [1, 1, 1, 0]),
        "e": a_run("image_first+recon", 0, [0, 0, 0, 1])})
    rows = {row["system"]: row for row in rows}
    assert rows["sft"]["own"] == [25, 50] and rows["pearl"]["own"] == [75, 75]
    # over seeds and questions: 0 1 1 0 and 0 0 1 0 are the gaps
    assert rows["pearl"]["difference"] == pytest.approx((37.5, 0, 87.5))
    # who guesses is no opponent
    recon = rows["image_first+recon"]
    assert recon["way"] == "latent" and "difference" not in recon
    for cells in ("| system | seeds | `crop` | `crop` - sft [95%] |", "| sft | 2 | 37.5 +/- 17.7 |",
                  "+recon | 1 | 25.0 | guesses |", "+37.5 [+0.0, +87.5]",
                  "\n\nComparisons with sft: 1. "):
        assert cells in text
    assert comparison({"a": a_run("sft", 0, [1])}, "pearl")[1].count("\n") == 3


def test_a_second_run_of_one_arm_and_seed_is_a_row_that_names_it():
    called = a_run("sft", 1, [0, 0]) | dict(answers=answers([0, 0], call=1))
    rows, _ = comparison({"runs/a": a_run("sft", 0, [1, 0]), "runs/b": a_run("sft", 0, [1, 1]),
                          "c": called})
    # explicit tool use is a system of its own
    assert {row["system"]: (row["way"], row["own"]) for row in rows[1:]} == {
        "sft": ("direct", [50, 0]), "sft + tools": ("call", [100]),
        "sft again (runs/b)": ("direct", [100])}


def test_arms_are_named_by_what_differs():
    runs = [a_run("pearl", seed, [1], pred_tokens=k) for seed, k in ((0, 4), (1, 4), (0, 0))]
    runs.append(a_run("sft", 0, [1], pred_tokens=4, model="elsewhere"))
    assert [*arms({n: run["config"] for n, run in enumerate(runs)}).values()] == [
        "pearl pred_tokens=4", "pearl pred_tokens=4", "pearl pred_tokens=0", "sft"]


@pytest.mark.parametrize("name, changed", [
    ("base", dict(model="bases/other")), ("data", dict(data="set")), ("data", dict(regime="multi")),
    ("questions", dict(task="count"))])
def test_only_runs_of_one_setting_are_compared(name, changed):
    runs = {"a": a_run("sft", 0, [1, 0]), "b": a_run("sft", 1, [1, 0], **changed),
            "c": a_run("pearl", 0, [1, 1])}
    with pytest.raises(ValueError, match=f"^a, b, c differ in {name}: compare runs of one base"):
        comparison(runs)
    # a copy of the base, and another order of the questions, make no difference
    runs["b"] = a_run("sft", 1, [1, 0], model="/elsewhere/tiny", workers=0)
    runs["b"]["answers"].reverse()
    assert [row["seeds"] for row in comparison(runs)[0]] == [1, 2, 1]


def test_the_program_compares_runs_and_a_checkpoint(tmp_path, monkeypatch, capsys):
    for name, run in dict(a=a_run("sft", 0, [1, 0]), b=a_run("pearl", 0, [1, 1])).items():
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", run.pop("config"))
        write_json(tmp_path / name / "results.json", run)
    models = []
    monkeypatch.setattr(evaluate, "ask", lambda path, options: models.append(path) or answers([0]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare.py", "a", "b", "model", "--device", "cpu", "--json",
                                      "all.json"])
    compare.main()
    text, tables = capsys.readouterr().out, read_json(tmp_path / "all.json")
    assert models == ["model"] and tables["model"]["table"]["crop"]["direct"][0] == 0
    assert [row["system"] for row in tables["systems"]] == ["no fine-tuning", "sft", "pearl"]
    assert "| pearl | 1 | 100.0 |" in text
    # an option that changes the question
    options = evaluate.Options(alpha=0.5, device="cpu")
    assert compare.answers_of(Path("a"), options)["answers"] == answers([0]) and models[1:] == ["a"]
