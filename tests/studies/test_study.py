"""Claims: a study plans every system in every regime with options that train.py knows, repeats
nothing, keeps what was interrupted and asks sft for its own tool calls; a search tries as many
settings for each arm, on validation questions; a benchmark's variants share one model."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from analysis import benchmark, search, study
from support.files import write_json
from support.lora import lora_layers
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
            made = a_run(config.method, config.seed, [0, 1], regime=config.regime)
            Path(config.out).mkdir()
            write_json(Path(config.out) / "config.json", made.pop("config"))
            write_json(Path(config.out) / "results.json", made)
        else:
            file = options[options.index("--json") + 1]
            write_json(Path(file), dict(answers=answers([1, 1], tool=1, call=1)))
        return SimpleNamespace(returncode="--steps 13" in " ".join(command))

    monkeypatch.setattr(study.subprocess, "run", run)
    return commands


def call(monkeypatch, main, *options):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, options)])
    main()


def test_every_arm_is_a_run_of_train_in_every_regime_it_belongs_to(tmp_path):
    args = study.parse_args(["--out", str(tmp_path), "--seeds", "0", "1", "--", "--batch", "3"])
    assert sorted(args.regimes) == sorted(REGIMES) and args.regimes[0] == "mixed"
    jobs = study.plan(args)
    assert len({job.folder for job in jobs}) == len(jobs)
    assert len(jobs) == 2 * (4 * len(study.SYSTEMS) + len(study.ABLATIONS))
    # one seed is enough to see that train.py knows every option
    for job in (job for job in jobs if job.folder.name.endswith("-seed1")):
        config = train.parse_config(job.options)
        assert (config.batch, config.steps, config.regime) == (3, 300, job.folder.parent.name)
        assert bool(job.ask) == (job.folder.name == "sft-seed1")
    tracked = train.parse_config(study.method_options("dropout+sft --lr 1", 7))
    assert tracked.method == "tracked+dropout+sft" and tracked.track == 7 and tracked.lr == 1
    args.arms = ["best"]
    with pytest.raises(ValueError, match="unknown arm 'best'"):
        study.plan(args)


def test_a_study_keeps_what_was_interrupted_and_repeats_nothing(programs, tmp_path, monkeypatch,
                                                                capsys):
    folder = tmp_path / "study" / "other" / "multi"
    (folder / "sft-seed0").mkdir(parents=True)
    (folder / "sft-seed0" / "log.jsonl").write_text("interrupted", encoding="utf-8")
    options = ["--out", tmp_path / "study", "--base", "other=DIR", "--arms", "sft", "pearl",
               "pearl K=8", "--regimes", "multi", "--seeds", 0, "--jobs", 1, "--",
               "--test_per_task", 9]
    call(monkeypatch, study.main, *options)
    kept, = folder.glob("sft-seed0.interrupted-*/log.jsonl")
    assert kept.read_text(encoding="utf-8") == "interrupted"
    assert [command[0] for command in programs] == ["train.py", "evaluate.py", *["train.py"] * 2]
    assert all("--model DIR" in " ".join(command) for command in programs if "--seed" in command)
    assert "--again --call_limit 3 --per_task 9" in " ".join(programs[1])
    rows = json.loads((folder.parent / "multi.json").read_text("utf-8"))
    assert [row["system"] for row in rows] == ["no fine-tuning", "sft", "sft + tools", "pearl",
                                               "pearl K=8"]
    # the direct answers are those of the run
    assert rows[1]["own"] == [50] and rows[2]["own"] == [100]
    capsys.readouterr()
    call(monkeypatch, study.main, *options)
    assert len(programs) == 4 and capsys.readouterr().out.count("done before") == 3
    with pytest.raises(SystemExit, match="1 runs failed"):
        call(monkeypatch, study.main, "--out", tmp_path / "b", "--arms", "pearl", "--regimes",
             "multi", "--seeds", 0, "--", "--steps", 13)


def test_a_search_chooses_on_validation_questions(programs, tmp_path, monkeypatch, capsys):
    assert {len(settings) for _, settings in search.GRIDS.values()} == {4}
    jobs = search.plan(Path("found"), list(search.GRIDS), [])
    assert len({job.folder for job in jobs.values()}) == len(jobs)
    for (_, setting), job in jobs.items():
        assert setting in " ".join(job.options) and train.parse_config(job.options).seed == 0
    with pytest.raises(ValueError, match="unknown arm 'nobody'"):
        search.plan(Path("found"), ["nobody"], [])
    call(monkeypatch, search.main, "--out", tmp_path, "--arms", "pearl EMA", "--",
         "--test_per_task", 9)
    assert sum("--split validation --per_task 9" in " ".join(given) for given in programs) == 4
    assert capsys.readouterr().out.count("**100.0 / 100.0**") == 1
    found = {("arm", f"--x {n}"): answers([1, n], tool=1) for n in range(2)}
    assert search.table(found).splitlines()[-1] == (
        "| arm | `--x 0` 50.0 / 100.0, `--x 1` **100.0 / 100.0** |")


# ---- benchmark ----


@pytest.mark.parametrize("options, name", [
    ("steps --steps 1 --batch 2 --train_examples 4", "release_over_sft"),
    ("answers tiny-vlm --per_task 1", "tool_ms"),
    ("data --records 40 --pictures 10 --steps 2 --batch 2 --workers 0", "share_of_a_step_waiting")])
def test_a_benchmark_ends_with_one_json_line_and_writes_nothing(tmp_path, monkeypatch, capsys,
                                                                options, name):
    (tmp_path / "tiny-vlm").symlink_to(Path(train.__file__).parent / "tiny-vlm")
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, benchmark.main, *options.split(), "--device", "cpu")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[name] >= 0
    assert [file.name for file in tmp_path.iterdir()] == ["tiny-vlm"]


def test_all_variants_train_one_model():
    methods = benchmark.build(train.parse_config(["--device", "cpu"]))
    vlm, = {method.vlm for method in methods.values()}
    # LoRA is there once, and each method has its own options
    assert lora_layers(vlm) and not any(lora_layers(x.base) for x in lora_layers(vlm).values())
    assert methods["release"].config.nextlat_mean == "examples"
