"""Claims: only runs of one base, training set and set of questions are averaged or subtracted; no
run is lost from a table, and two of one arm and seed are told apart by name; p-values are those of
the paired t-test, enlarged by Holm's rule."""

import math
import statistics
from pathlib import Path

import pytest

from analysis import search, study
from analysis.tables import T95, comparable, compare, comparison, corrected, holm, p_value


def a_run(method, seed, rights, task="crop", **settings):
    answers = [dict(id=str(i), task=task, options=list("abcd"), answer="a", direct=right,
                    direct_right=right, cost=dict(direct=dict(tokens=2, images=1, passes=2)))
               for i, right in enumerate(rights)]
    config = dict(method=method, seed=seed, model="bases/tiny", data="", regime="mixed",
                  world_seed=0, workers=2) | settings
    return dict(config=config, answers=answers, before=answers)


def test_a_second_run_of_one_arm_and_seed_is_a_row_that_names_it():
    runs = {"runs/a": a_run("sft", 0, [1, 0]), "runs/b": a_run("sft", 0, [1, 1]),
            "runs/c": a_run("sft", 1, [0, 0]), "runs/d": a_run("pearl", 0, [1, 1])}
    rows = {row["system"]: row for row in compare(runs)}
    assert rows["sft"]["own"] == [50.0, 0.0] and rows["sft"]["seeds"] == 2
    assert rows["sft again (runs/b)"]["own"] == [100.0] and rows["pearl"]["own"] == [100.0]


@pytest.mark.parametrize("name, changed", [
    ("base", dict(model="bases/other")), ("data", dict(data="set")), ("data", dict(regime="multi")),
    ("data", dict(world_seed=1)), ("questions", dict(task="count"))])
def test_runs_of_unlike_settings_are_told_apart(name, changed):
    runs = {"a": a_run("sft", 0, [1, 0]), "b": a_run("sft", 1, [1, 0], **changed),
            "c": a_run("pearl", 0, [1, 1])}
    assert [list(group) for group in comparable(runs)] == [["a", "c"], ["b"]]
    with pytest.raises(ValueError, match="a and b differ in base, data or questions"):
        compare(runs)
    rows, text = comparison(runs)
    first, *tables = text.split("\n\n")
    assert first.startswith(f"These runs differ in {name}: only those within one table")
    assert [part for part in tables if part.endswith(":")] == ["a, c:", "b:"]
    assert [row["seeds"] for row in rows if row["system"] == "sft"] == [1, 1]


def test_runs_of_one_setting_are_one_table_wherever_their_base_lies():
    moved = a_run("sft", 1, [1, 0], model="/elsewhere/tiny", workers=0)
    runs = {"a": a_run("sft", 0, [1, 0]), "b": moved}
    rows, text = comparison(runs)
    assert len(comparable(runs)) == 1 and text.startswith("| system |")
    assert [(row["system"], row["seeds"]) for row in rows] == [("no fine-tuning", 1), ("sft", 2)]
    other = a_run("sft", 1, [1, 0])
    other["answers"].reverse()  # the order in which they were asked is no difference
    assert len(comparable({"a": runs["a"], "b": other})) == 1
    other["answers"].pop()
    assert len(comparable({"a": runs["a"], "b": other})) == 2


@pytest.mark.parametrize("pairs", range(2, 12))
def test_p_is_5_in_100_where_the_interval_of_the_printed_table_ends(pairs):
    gaps = [(-1.0) ** n for n in range(pairs)]
    unit = [(gap - statistics.mean(gaps)) / statistics.stdev(gaps) for gap in gaps]
    ends = [one + T95[pairs - 2] / math.sqrt(pairs) for one in unit]
    # the table has three digits
    assert p_value(ends, [0.0] * pairs) == pytest.approx(0.05, abs=4e-4)


def test_p_of_a_worked_example_and_where_there_is_none():
    # t = 3 with 2 degrees of freedom: 1 - 3 / sqrt(11); t = 1 with 1: 1/2
    third = [1 - math.sqrt(1 / 3), 1.0, 1 + math.sqrt(1 / 3)]
    assert p_value(third, [0.0] * 3) == pytest.approx(1 - 3 / math.sqrt(11))
    assert p_value([2.0, 0.0], [0.0, 0.0]) == pytest.approx(0.5)
    assert p_value([1.0], [0.0]) == p_value([3.0, 4.0], [3.0, 4.0]) == 1
    assert p_value([3.0, 4.0], [2.0, 3.0]) == 0  # the same difference each time


def test_holm_enlarges_and_keeps_the_order():
    # the smallest three times, the next twice, the largest once, and never below one before it
    assert holm(dict(a=0.01, b=0.04, c=0.03)) == pytest.approx(dict(a=0.03, b=0.06, c=0.06))
    assert holm(dict(a=0.5, b=0.9)) == dict(a=1.0, b=1.0) and holm({}) == {}


def test_all_arms_are_compared_with_the_one_that_is_named():
    runs = {f"{arm}{seed}": a_run(arm, seed, rights) for arm, marks in dict(
        sft=([1, 0, 0, 0], [1, 1, 0, 0]), pearl=([1, 1, 1, 0], [1, 1, 1, 1]),
        direct=([0, 0, 0, 1], [0, 1, 0, 1])).items() for seed, rights in enumerate(marks)}
    rows = {row["system"]: row for row in compare(runs, "pearl")}
    assert rows["sft"]["difference"][0] == rows["direct"]["difference"][0] == -50
    assert "difference" not in rows["pearl"] and rows["sft"]["p"] == 0
    said = corrected(list(rows.values()), "pearl")
    assert "differences to pearl" in said and "2 comparisons" in said
    assert said.endswith("sft 0.000, direct 0.000")


def test_every_arm_is_searched_with_as_many_settings_and_the_best_stands_out():
    assert {len(settings) for _, settings in search.GRIDS.values()} == {4}
    tries = search.plan(Path("found"), ["pearl EMA"], ["--test_per_family", "9"])
    assert len({one.folder for one in tries}) == 4
    for one in tries:
        assert one.options[-2:] == ["--test_per_family", "9"]
        assert "--test_split validation" in " ".join(one.options)
        assert one.setting in " ".join(one.options)
    with pytest.raises(ValueError, match="unknown arm 'nobody'"):
        search.plan(Path("found"), ["nobody"], [])

    def answered(*rights):
        return [dict(task=family, options=["a", "b"], direct_right=right, tool_right=True)
                for family, right in zip(("crop", "crop", "tallest"), rights)]
    text = search.table({"arm": {"--x 1": answered(1, 0, 1), "--x 2": answered(1, 1, 0)}})
    assert text.splitlines()[-1] == "| arm | `--x 1` 50.0 / 100.0, `--x 2` **100.0 / 100.0** |"


def test_a_run_has_the_name_under_which_a_study_made_it():
    config = dict(method="pearl", seed=0, lambda_latent=5.0)
    names = study.named({"runs/mixed/pearl,_bias_head-seed1": config,
                         "runs/pearl-mixed-seed0": config | dict(lambda_latent=1.0)})
    assert list(names.values()) == ["pearl, bias head", "pearl lambda_latent=1.0"]
