"""Claims: a study runs every arm in every regime with options that train.py knows, repeats nothing,
keeps what was interrupted, asks sft for its own tool calls, and asks validation questions where it
chooses settings; a benchmark's variants share one model."""

import json
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate
import train
from analysis import benchmark, study
from analysis.compare import arm_of
from support.files import write_json
from support.adapters import lora_layers
from world.scenes import REGIMES

from test_compare import a_run, answers


@pytest.fixture
def programs(monkeypatch):
    """Instead of train.py and evaluate.py: forged files, and the commands that were given."""
    commands = []

    def run(command, **_):
        program, options = Path(command[1]).name, command[2:]
        commands.append([program, *options])
        if program == "train.py":
            config = train.parse_config(options)
            fake = a_run(config.method, config.seed, [0, 1], regime=config.regime)
            Path(config.out).mkdir()
            write_json(Path(config.out) / "config.json", fake.pop("config"))
            write_json(Path(config.out) / "results.json", fake)
        else:
            file = options[options.index("--json") + 1]
            write_json(Path(file), dict(answers=answers([1, 1], tool=1, call=1)))
        return SimpleNamespace(returncode="--steps 13" in " ".join(command))

    monkeypatch.setattr(study.subprocess, "run", run)
    return commands


def call(monkeypatch, main, *options):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, options)])
    main()


def test_an_arm_is_what_follows_method_and_has_a_folder_of_its_own(tmp_path):
    args = study.parse_args(["--out", str(tmp_path), "--seeds", "0", "1", "--", "--batch", "3"])
    assert sorted(args.regimes) == sorted(REGIMES)
    args.arms = [*study.SYSTEMS, "target_state --target_layer -1", "pearl --lambda_latent 0.2"]
    jobs = study.plan(args)
    assert len({job.folder for job in jobs}) == len(jobs) == 2 * len(REGIMES) * len(args.arms)
    for job, (seed, regime, arm) in zip(jobs, product(args.seeds, args.regimes, args.arms)):
        assert job.options[:1 + len(arm.split())] == ["--method", *arm.split()]
        config = train.parse_config(job.options)
        assert (config.batch, config.steps, config.seed, config.regime) == (3, 300, seed, regime)
        assert job.folder.parent.name == regime and arm_of(job.folder.name) == arm
        assert bool(job.ask) == (arm == "sft")
    for args.arms in (["best"], ["sft --best 1"]):
        with pytest.raises(ValueError, match="best"):
            study.plan(args)


def test_a_study_keeps_what_was_interrupted_and_repeats_nothing(programs, tmp_path, monkeypatch,
                                                                capsys):
    folder = tmp_path / "study" / "other" / "multi"
    (folder / "sft-seed0").mkdir(parents=True)
    (folder / "sft-seed0" / "log.jsonl").write_text("interrupted", encoding="utf-8")
    options = ["--out", tmp_path / "study", "--base", "other=DIR", "--arms", "sft", "pearl",
               "pearl --pred_tokens 8", "--regimes", "multi", "--seeds", 0, "--jobs", 1, "--",
               "--test_per_task", 9]
    call(monkeypatch, study.main, *options)
    log, = folder.glob("sft-seed0.interrupted-*/log.jsonl")
    assert log.read_text(encoding="utf-8") == "interrupted"
    assert [command[0] for command in programs] == ["train.py", "evaluate.py", *["train.py"] * 2]
    assert all("--model DIR" in " ".join(command) for command in programs if "--seed" in command)
    assert "--again --call_limit 3 --per_task 9" in " ".join(programs[1])
    rows = json.loads((folder.parent / "multi.json").read_text("utf-8"))
    # the direct answers are those of the run
    assert [(row["system"], *row["own"]) for row in rows] == [
        ("no fine-tuning", 50), ("sft", 50), ("sft + tools", 100), ("pearl", 50),
        ("pearl --pred_tokens 8", 50)]
    capsys.readouterr()
    call(monkeypatch, study.main, *options)
    assert len(programs) == 4 and capsys.readouterr().out.count("done before") == 3
    with pytest.raises(SystemExit, match="1 runs failed"):
        call(monkeypatch, study.main, "--out", tmp_path / "b", "--arms", "pearl", "--regimes",
             "multi", "--seeds", 0, "--", "--steps", 13)


def test_settings_are_chosen_on_validation_questions(programs, tmp_path, monkeypatch):
    call(monkeypatch, study.main, "--out", tmp_path, "--split", "validation", "--arms", "ema",
         "ema --ema 0.9", "--regimes", "single", "--seeds", 0, "--jobs", 1, "--",
         "--test_per_task", 9)
    for train_options, ask in (programs[:2], programs[2:]):
        assert train.parse_config(train_options[1:]).test_per_task == 1
        assert "--again --split validation --per_task 9" in " ".join(ask)
    text = (tmp_path / "tiny-vlm" / "single.md").read_text(encoding="utf-8")
    # of the answers to what was asked, and nothing of the run's own test questions
    assert "| ema --ema 0.9 | 1 | 100.0 | - | 100.0 |" in text and "no fine-tuning" not in text


@pytest.mark.parametrize("options, name", [
    ("steps --steps 1 --batch 2 --train_examples 4", "paper_over_sft"),
    ("answers tiny-vlm --per_task 1", "tool_ms"),
    ("data --records 40 --steps 2 --batch 2 --workers 0", "share_of_a_step_waiting")])
def test_a_benchmark_ends_with_one_json_line_and_writes_nothing(tmp_path, monkeypatch, capsys,
                                                                options, name):
    (tmp_path / "tiny-vlm").symlink_to(Path(train.__file__).parent / "tiny-vlm")
    monkeypatch.chdir(tmp_path)
    # no run of it asks its questions
    monkeypatch.setattr(evaluate, "answer_questions", None)
    call(monkeypatch, benchmark.main, *options.split(), "--device", "cpu")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[name] >= 0
    assert [file.name for file in tmp_path.iterdir()] == ["tiny-vlm"]


def test_all_variants_train_one_model():
    methods = benchmark.build(train.parse_config(["--device", "cpu"]))
    vlm, = {method.vlm for method in methods.values()}
    # LoRA is there once
    assert lora_layers(vlm) and not any(lora_layers(x.base) for x in lora_layers(vlm).values())
