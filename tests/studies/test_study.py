"""Claims: intervals, accuracies and paired differences equal hand-computed ones; only runs of one
base, training set and set of questions are averaged or subtracted; two runs of one arm and seed
have two names. A study runs every arm in every regime with options that train.py knows, repeats
nothing, keeps what was interrupted, asks sft for its own tool calls, and asks validation questions
where it chooses settings. A benchmark's variants share one model."""

import json
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import evaluate
import train
from analysis import benchmark, compare, study
from analysis.compare import arm_of, comparison, difference
from support.adapters import lora_layers
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


def write_run(folder, run):
    folder.mkdir()
    write_json(folder / "config.json", run["config"])
    write_json(folder / "results.json", dict(answers=run["answers"], before=run["before"]))


def test_the_interval_of_a_difference_is_over_seeds_and_questions():
    draw = np.random.default_rng(1)
    ours, theirs = (1 * (draw.random((5, 300)) < p) for p in (0.6, 0.5))

    def interval(*sides):
        return difference(*([dict(enumerate(row)) for row in side] for side in sides))

    (mean, low, high), gaps = interval(ours, theirs), 100 * (ours - theirs)
    # with independent answers seeds, questions and their pairs each add the variance of the mean
    half = 1.96 * (3 * gaps.var() / gaps.size) ** 0.5
    assert mean == pytest.approx(gaps.mean()) and high - low == pytest.approx(2 * half, rel=0.2)
    # seeds that differ by as much as this decide alone, and so do questions
    seeds = np.repeat([[1], [0]], 300, axis=1)
    assert interval(seeds, 0 * seeds) == interval(seeds.T, 0 * seeds.T) == (50, 0, 100)
    # a single seed of the other is compared with each of ours
    assert interval(seeds, seeds[:1])[0] == -50
    # questions that one did not answer do not count
    assert difference([{"a": 1, "b": 0}], [{"a": 0}]) == (100, 100, 100)


def test_a_summary_by_hand_has_the_row_all_only_for_several_tasks():
    # n = 10, 8 right: (8 + 1.9208 -+ 1.96 * sqrt(1.6 + 0.9604)) / 13.8416
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-4)
    rows = answers([1, 1, 0, 1], free=0, tool=1) + answers([0], "tallest", free=1)
    table = summarise(rows)
    assert list(table) == ["crop", "tallest"] and overall(table) == "crop"
    assert table["crop"]["direct"] == [0.75, *wilson(3, 4)] and table["crop"]["chance"] == 0.25
    assert table["tallest"].keys() == {"n", "chance", "direct", "free"}
    every = summarise(rows + answers([0, 0, 0, 0], "path"))["all"]  # the held-out task is not in it
    assert every["n"] == 8 and every["direct"][0] == 0.375
    text = format_table({"before": table}) + conclusion(summarise(answers([1, 0])), table)
    for words in (" 75.0 [", "tallest (held out)", "50.0% were right before and 75.0% are now"):
        assert words in text


def test_a_comparison_by_hand():
    rows, text = comparison({
        "a": a_run("sft", 0, [1, 0, 0, 0]), "c": a_run("pearl", 0, [1, 1, 1, 0], pred_tokens=4),
        "b": a_run("sft", 1, [1, 1, 0, 0]) | dict(answers=answers([1, 1, 0, 0], call=1)),
        "d": a_run("pearl", 1, [1, 1, 1, 0], pred_tokens=4),
        "e": a_run("pearl", 1, [0, 0, 1, 1], pred_tokens=0),
        "f": a_run("image_first+recon", 0, [0, 0, 0, 1]), "runs/g": a_run("sft", 0, [1, 1, 1, 1])})
    # an arm is named by what differs; explicit tool use and a second run of one seed stand alone
    assert {row["system"]: (row["way"], *row["own"]) for row in rows} == {
        "no fine-tuning": ("direct", 25), "sft": ("direct", 25, 50), "sft + tools": ("call", 100),
        "pearl pred_tokens=4": ("direct", 75, 75), "pearl pred_tokens=0": ("direct", 50),
        "image_first+recon": ("latent", 25), "sft again (runs/g)": ("direct", 100)}
    # over seeds and questions: 0 1 1 0 and 0 0 1 0 are the gaps; who guesses is no opponent
    for cells in ("| system | seeds | `crop` | `crop` - sft [95%] |", "| sft | 2 | 37.5 +/- 17.7 |",
                  "| pearl pred_tokens=4 | 2 | 75.0 +/- 0.0 | +37.5 [+0.0, +87.5] |",
                  "+recon | 1 | 25.0 | guesses |", "\n\nComparisons with sft: 3. "):
        assert cells in text


def test_only_runs_of_one_setting_are_compared():
    runs = {"a": a_run("sft", 0, [1, 0])}
    for name, changed in (("base", dict(model="bases/other")), ("data", dict(data="set")),
                          ("data", dict(regime="multi")), ("questions", dict(task="count"))):
        runs["b"] = a_run("sft", 1, [1, 0], **changed)
        with pytest.raises(ValueError, match=f"^a, b differ in {name}: compare runs of one base"):
            comparison(runs)
    # a copy of the base, and another order of the questions, make no difference
    runs["b"] = a_run("sft", 1, [1, 0], model="/elsewhere/tiny", workers=0)
    runs["b"]["answers"].reverse()
    assert [row["seeds"] for row in comparison(runs)[0]] == [1, 2]


def test_the_program_compares_runs_and_a_checkpoint(tmp_path, monkeypatch, as_program):
    write_run(tmp_path / "a", a_run("sft", 0, [1, 0]))
    write_run(tmp_path / "b", a_run("pearl", 0, [1, 1]))
    models = []
    monkeypatch.setattr(evaluate, "ask", lambda path, options: models.append(path) or answers([0]))
    monkeypatch.chdir(tmp_path)
    as_program(compare.__file__, "a", "b", "model", "--device", "cpu", "--json", "all.json")
    tables = read_json(tmp_path / "all.json")
    assert models == ["model"] and tables["model"]["table"]["crop"]["direct"][0] == 0
    assert [row["system"] for row in tables["systems"]] == ["no fine-tuning", "sft", "pearl"]
    as_program(compare.__file__, "a", "--alpha", 0.5)  # is another question
    assert models == ["model", "a"]


@pytest.fixture
def commands(monkeypatch):
    """The commands that were given; instead of train.py and evaluate.py there are forged files."""
    commands = []

    def run(command, **_):
        program, options = Path(command[1]).name, command[2:]
        commands.append(" ".join([program, *options]))
        if program == "train.py":
            c = train.parse_config(options)
            write_run(Path(c.out), a_run(c.method, c.seed, [0, 1], regime=c.regime))
        else:
            write_json(Path(options[-1]), dict(answers=answers([1, 1], tool=1, call=1)))
        return subprocess.CompletedProcess(command, int("--steps 13" in commands[-1]))

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_an_arm_is_what_follows_method_and_has_a_folder_of_its_own(tmp_path):
    args = study.parse_args(["--out", str(tmp_path), "--seeds", "0", "1", "--", "--batch", "3"])
    args.arms = [*study.SYSTEMS, "target_state --target_layer -1", "pearl --lambda_latent 0.2"]
    jobs = study.plan(args)
    settings = [*product(args.seeds, args.regimes, args.arms)]
    for (folder, commands), (seed, regime, arm) in zip(jobs.items(), settings, strict=True):
        assert " ".join(commands["results.json"]).startswith(f"train.py --method {arm} --")
        config = train.parse_config(commands["results.json"][1:])
        assert (config.batch, config.steps, config.seed, config.regime) == (3, 300, seed, regime)
        assert folder.parent.name == regime and arm_of(folder.name) == arm
    for args.arms in (["best"], ["sft --best 1"]):
        with pytest.raises(ValueError, match="best"):
            study.plan(args)


def test_a_study_keeps_what_was_interrupted_and_repeats_nothing(commands, tmp_path, as_program):
    folder = tmp_path / "study" / "other" / "multi"
    (folder / "sft-seed0").mkdir(parents=True)
    (folder / "sft-seed0" / "log.jsonl").write_text("interrupted", encoding="utf-8")
    options = ["--out", tmp_path / "study", "--base", "other=DIR", "--arms", "sft", "pearl",
               "pearl --pred_tokens 8", "--regimes", "multi", "--seeds", 0, "--jobs", 1, "--",
               "--test_per_task", 9]
    as_program(study.__file__, *options)
    log, = folder.glob("sft-seed0.interrupted-*/log.jsonl")
    assert log.read_text(encoding="utf-8") == "interrupted"
    sft, ask, *others = commands
    assert len(others) == 2 and all("--model DIR" in command for command in (sft, *others))
    assert ask.startswith("evaluate.py") and "--again --call_limit 3 --per_task 9" in ask
    rows = json.loads((folder.parent / "multi.json").read_text(encoding="utf-8"))
    # the direct answers are those of the run
    assert [(row["system"], *row["own"]) for row in rows] == [
        ("no fine-tuning", 50), ("sft", 50), ("sft + tools", 100), ("pearl", 50),
        ("pearl --pred_tokens 8", 50)]
    as_program(study.__file__, *options)
    assert len(commands) == 4
    with pytest.raises(SystemExit, match="3 runs failed"):
        as_program(study.__file__, *options[:1], tmp_path / "b", *options[2:-2], "--steps", 13)


def test_settings_are_chosen_on_validation_questions(commands, tmp_path, as_program):
    as_program(study.__file__, "--out", tmp_path, "--split", "validation", "--arms", "ema",
               "ema --ema 0.9", "--regimes", "single", "--seeds", 0, "--jobs", 1, "--",
               "--test_per_task", 9)
    for command, ask in (commands[:2], commands[2:]):
        assert train.parse_config(command.split()[1:]).test_per_task == 1
        assert "--again --split validation --per_task 9" in ask
    text = (tmp_path / "tiny-vlm" / "single.md").read_text(encoding="utf-8")
    # of the answers to what was asked, and nothing of the run's own test questions
    assert "| ema --ema 0.9 | 1 | 100.0 | - | 100.0 |" in text and "no fine-tuning" not in text


def test_a_benchmark_ends_with_json_and_writes_no_file(tmp_path, monkeypatch, capsys, as_program):
    monkeypatch.chdir(tmp_path)
    options = "--steps 1 --batch 2 --train_examples 4 --device cpu"
    as_program(benchmark.__file__, *options.split())
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["paper_over_sft"] > 0
    assert not list(tmp_path.iterdir())
    # the variants train one model, and LoRA is there once
    methods = benchmark.build(train.parse_config(["--device", "cpu"]))
    layers, = (lora_layers(vlm) for vlm in {method.vlm for method in methods.values()})
    assert layers and not any(lora_layers(layer.base) for layer in layers.values())
