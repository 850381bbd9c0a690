"""Claims: an arm's alpha is the smallest that keeps 95% of its tool skill on validation; a run is
asked once, and the table has the trained tasks, the held-out one and a paired difference."""

import pytest

import evaluate
from analysis import figures, shrink
from support.tables import HELD_OUT
from world import loader


def marks(direct, tool, held_out="1"):
    """The marks of one alpha, the same on both splits, from strings of 0 and 1."""
    ways = {"crop/direct": direct, "crop/free": "0", "crop/tool": tool,
            f"{HELD_OUT}/direct": held_out}
    return {f"{split}/{way}": [int(mark) for mark in row]
            for split in ("validation", "test") for way, row in ways.items()}


def arm(name, *tools):
    """One run: what it answers directly at each alpha, and its skill with the tool."""
    return shrink.Arm(name, [{alpha: marks("1100", tool, "10")
                              for alpha, tool in zip(shrink.ALPHAS, tools, strict=True)}])


def test_the_smallest_alpha_that_keeps_the_skill():
    full, most, less = "1" * 20, "1" * 19 + "0", "1" * 18 + "00"
    assert arm("a", full, full, most, less, full).alpha == 0.35
    assert arm("a", full, full, most, less, less).alpha == 0.65
    assert arm("a", full, less, less, less, less).alpha == 1
    # the skill that counts is that at alpha 1, and not the best
    assert arm("a", less, full, full, less, most).alpha == 0.35
    text = shrink.table([arm("a", full, full, most, less, less), arm("b", *[full] * 5)])
    assert "| a | 1 | 0.65 | 50.0 | 95.0 | 0.0 | 50.0 | - |" in text
    assert "| b | 1 | 0.35 | 50.0 | 100.0 | 0.0 | 50.0 | +0.0 [+0.0, +0.0] |" in text


def test_a_run_is_asked_at_each_alpha_once(shipped, tmp_path, monkeypatch):
    config, alphas = evaluate.load_model(shipped.path, "cpu")[1], []
    config.regime = "single"
    monkeypatch.setattr(evaluate, "load_model", lambda run, device, alpha: alphas.append(alpha)
                        or (shipped, config, {}))
    monkeypatch.setattr(shrink, "test_questions",
                        lambda config, count, split: loader.questions("single", count, split))
    first = shrink.marks_of(tmp_path, 3, "cpu")
    assert alphas == list(shrink.ALPHAS) and first == shrink.marks_of(tmp_path, 3, "cpu")
    assert alphas == list(shrink.ALPHAS)
    records = evaluate.answer_questions(evaluate.Evaluator(shipped, loader.questions("single", 3)))
    right = [int(r["direct_right"]) for r in records if r["task"] == HELD_OUT]
    assert first[1.0][f"test/{HELD_OUT}/direct"] == right and len(right) == 3
    assert first[1.0].keys() == {f"{split}/{way}" for split in ("validation", "test") for way in (
        "crop/direct", "crop/free", "crop/tool", f"{HELD_OUT}/direct", f"{HELD_OUT}/free")}


def test_the_figure_has_a_curve_for_each_arm():
    pytest.importorskip("matplotlib")
    full, none = "1111", "0000"
    (axis,) = figures.shrinking([arm("a", full, full, full, none, none), arm("b", *[full] * 5)],
                                shrink.ALPHAS, (40, 60)).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "before training", "a (1 seed)", "b (1 seed)"]
    hollow = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
    assert len(hollow) == 2 and hollow[0].get_xydata().tolist() == [[50, 50]]
