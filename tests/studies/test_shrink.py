"""Claims: an arm's alpha is the smallest that keeps 95% of its tool skill on validation; a run is
asked once; the table has the trained tasks, the held-out one and a paired difference; the figure
has a curve for each arm."""

import pytest

import evaluate
from analysis import shrink
from support import splits
from support.tables import HELD_OUT
from world import loader

FULL, MOST, LESS = "1" * 20, "1" * 19 + "0", "1" * 18 + "00"


def runs(*tools):
    """One run, the same on both splits: its skill with the tool at each alpha."""
    return [{alpha: {f"{split}/{way}": [int(mark) for mark in row]
                     for split in ("validation", "test") for way, row in {
                         "crop/direct": "1100", "crop/free": "0", "crop/tool": tool,
                         f"{HELD_OUT}/direct": "10"}.items()}
             for alpha, tool in zip(shrink.ALPHAS, tools, strict=True)}]


@pytest.mark.parametrize("alpha, tools", [
    (0.35, [FULL, FULL, MOST, LESS, FULL]), (0.65, [FULL, FULL, MOST, LESS, LESS]),
    (1, [FULL, LESS, LESS, LESS, LESS]),
    # the skill that counts is that at alpha 1, and not the best
    (0.35, [LESS, FULL, FULL, LESS, MOST])])
def test_the_smallest_alpha_that_keeps_the_skill(alpha, tools):
    assert shrink.smallest_alpha(runs(*tools)) == alpha


def test_the_table_and_the_figure_have_every_arm():
    arms = dict(a=runs(FULL, FULL, MOST, LESS, LESS), b=runs(*[FULL] * 5))
    text = shrink.table(arms)
    assert "| a | 1 | 0.65 | 50.0 | 95.0 | 0.0 | 50.0 | - |" in text
    assert "| b | 1 | 0.35 | 50.0 | 100.0 | 0.0 | 50.0 | +0.0 [+0.0, +0.0] |" in text
    # data of one's own have no held-out task
    bare = [{alpha: {key: row for key, row in marks.items() if HELD_OUT not in key}
             for alpha, marks in arms["b"][0].items()}]
    assert "| 1 | 0.35 | 50.0 | 100.0 | 0.0 | - | - |" in shrink.table(dict(a=bare))
    pytest.importorskip("matplotlib")
    (axis,) = shrink.figure(arms, (40, 60)).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "before training", "a (1 seed)", "b (1 seed)"]
    hollow = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
    assert len(hollow) == 2 and hollow[0].get_xydata().tolist() == [[50, 50]]


def test_a_run_is_asked_at_each_alpha_once(shipped, tmp_path, monkeypatch):
    config, alphas = evaluate.load_model(shipped.path, "cpu")[1], []
    config.regime = "single"
    monkeypatch.setattr(evaluate, "load_model", lambda run, device, alpha: alphas.append(alpha)
                        or (shipped, config, {}))
    monkeypatch.setattr(splits, "test_questions",
                        lambda config, count, split: loader.questions("single", count, split))
    first = shrink.answers_of(tmp_path, 3, "cpu")
    assert first == shrink.answers_of(tmp_path, 3, "cpu") and alphas == list(shrink.ALPHAS)
    records = evaluate.answer_questions(evaluate.Evaluator(shipped, loader.questions("single", 3)))
    right = [int(r["direct_right"]) for r in records if r["task"] == HELD_OUT]
    assert first[1.0][f"test/{HELD_OUT}/direct"] == right and len(right) == 3
    assert first[1.0].keys() == {f"{split}/{way}" for split in ("validation", "test") for way in (
        "crop/direct", "crop/free", "crop/tool", f"{HELD_OUT}/direct", f"{HELD_OUT}/free")}
