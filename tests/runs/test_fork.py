"""Claim: a fork of the six files, support/ and tiny-vlm/ alone trains Pearl and SFT, answers and
merges; what it misses is said in one sentence. The README's Python lines run as they stand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from support import records
from world import scenes

ROOT = Path(train.__file__).resolve().parent
SIX = ("losses", "predictor", "data", "model", "train", "evaluate")


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fork")
    for name in SIX:
        shutil.copy(ROOT / f"{name}.py", folder)
    for name in ("support", "tiny-vlm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    records.write_folder(folder / "set", [
        example for split, count in (("train", 6), ("validation", 2), ("test", 2))
        for example in scenes.make_world("single", split, count)])
    return folder


def python(folder, *args):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, *args], cwd=folder, capture_output=True, env=env,
                          encoding="utf-8", check=False)


@pytest.mark.parametrize("method", ["pearl", "sft"])
def test_a_fork_of_the_six_files_trains_answers_and_merges(fork, method):
    done = python(fork, "train.py", "--data", "set", "--method", method, "--steps", "2", "--batch",
                  "2", "--lora_rank", "2", "--out", method, "--device", "cpu", "--workers", "0")
    assert done.returncode == 0 and "direct" in done.stdout, done.stderr
    if method == "pearl":
        table = python(fork, "evaluate.py", method)
        assert table.returncode == 0 and "crop" in table.stdout, table.stderr
        merged = python(fork, "train.py", "--merge", method, "merged")
        assert merged.returncode == 0 and (fork / "merged" / "config.json").is_file(), merged.stderr


def test_a_fork_says_what_it_misses(fork):
    for args, missing in ((("--method", "ema"), "baselines"), (("--steps", "1"), "world")):
        done = python(fork, "train.py", *args, "--out", "none", "--device", "cpu")
        assert re.fullmatch(f"(?s).*error: there is no folder {missing}/ here.*", done.stderr)
        assert "Traceback" not in done.stderr


def test_the_readmes_python_lines_run(tmp_path, monkeypatch, capsys):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(code.splitlines()) <= 20
    monkeypatch.chdir(tmp_path)
    head, tail = code.split("losses = pearl(batch)")
    torch.manual_seed(0)
    names = {}
    exec(head, names)
    before = {name: p.detach().clone() for name, p in names["pearl"].named_parameters()}
    exec("losses = pearl(batch)" + tail, names)
    parts = {name: float(value) for name, value in names["losses"].parts.items()}
    assert parts["loss"] == pytest.approx(
        parts["vlm"] + names["config"].lambda_latent * (parts["jepa"] + parts["nextlat"]))
    moved = {name for name, p in names["pearl"].named_parameters()
             if not torch.equal(p, before[name])}
    assert all("lora_" in name or name.startswith("predictor.") for name in moved)
    assert "predictor.pred_tokens" in moved and any("lora_B" in name for name in moved)
    assert capsys.readouterr().out.split()[-1] in names["records"][0].options
