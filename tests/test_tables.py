"""Claims: only runs of one base, training set and set of questions are averaged or subtracted; no
run is lost from a table, and two of one arm and seed are told apart by name."""

import pytest

from analysis.tables import comparable, compare, comparison


def a_run(method, seed, rights, family="crop", **settings):
    answers = [dict(id=str(i), family=family, options=list("abcd"), answer="a", direct=right,
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
    ("data", dict(world_seed=1)), ("questions", dict(family="count"))])
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
