"""Claims about whole runs: the folder holds what the docs say; a run that was interrupted ends as
the uninterrupted one; several processes train as one, each with its share of the frozen weights.

train.py runs as a process of its own, forked from one that has everything imported: to start Python
and import PyTorch takes longer than any of these runs.
"""

import dataclasses
import itertools
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore

import evaluate
import train
from support import run
from support.files import read_json
from world import scenes
from conftest import log_of, train_until

TESTS = Path(__file__).resolve().parents[1]
# children of the process that preloads find this module, and the repository's, by this path
os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "runs")))
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["test_whole_runs"])
TINY_RUN = ["--device", "cpu", "--steps", "12", "--batch", "2", "--train_examples", "20",
            "--test_per_task", "1", "--eval_every", "3", "--lora_rank", "2", "--lr", "5e-3",
            "--method", "dropout+pearl"]
SHARED_RUN = [*TINY_RUN, "--accumulate", "4", "--steps", "3", "--method", "shuffled"]


def train_program(args: list[str], log: str, env: dict[str, str]) -> None:
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(file, descriptor)
        stream.reconfigure(line_buffering=True)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.argv = [train.__file__, *args]
    runpy.run_path(train.__file__, run_name="__main__")


class Program(CONTEXT.Process):
    """`python train.py ARGS`, begun at once; its output is in the file `log`."""

    def __init__(self, *args, log: Path, **env: str):
        super().__init__(target=train_program, args=([*map(str, args)], str(log), env))
        self.log = log
        self.start()

    def text(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Until the loop has printed it, or the program has ended."""
        until = time.time() + seconds
        while self.is_alive():
            if any(int(n) >= step for n in re.findall(r"^ *(\d+)/\d+ ", self.text(), re.MULTILINE)):
                return
            assert time.time() < until, self.text()
            time.sleep(0.002)


def together(*args, log: Path) -> None:
    """Two processes, as torchrun starts them, to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [Program(*args, log=log.with_suffix(f".{rank}"), RANK=rank, LOCAL_RANK=rank,
                    WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS="1")
            for rank in "01"]
    for program in both:
        program.join()
    assert [program.exitcode for program in both] == [0, 0], [program.text() for program in both]


def contents(out):
    """What a run must end with, bit for bit: weights, moments, log without times, answers."""
    return dict(state={name: t.numpy().tobytes()
                       for name, t in load_file(out / "state.safetensors").items()},
                log=log_of(out), best=read_json(out / "best.json"),
                answers=read_json(out / "results.json")["answers"],
                adapter=[p.read_bytes() for p in sorted(out.glob("checkpoint-*/*.safetensors"))],
                names=sorted(path.name for path in out.iterdir()))


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run from beginning to end: its folder and config."""
    config = train.parse_config([*TINY_RUN, "--out", str(tmp_path_factory.mktemp("a") / "run")])
    return train.train(config), config


def test_the_run_folder_holds_what_the_docs_say(whole_run):
    out, config = whole_run
    best = read_json(out / "best.json")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "inputs.json", "environment.json", "before.json", "log.jsonl",
        "state.safetensors", "best.json", "results.json", best["checkpoint"]}
    assert {path.name for path in (out / best["checkpoint"]).iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "predictor.safetensors"}
    assert read_json(out / "config.json") == dataclasses.asdict(config)
    environment = read_json(out / "environment.json")
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert environment["threads"] == torch.get_num_threads() and environment["command"]
    lines = log_of(out)
    valid = {line["step"]: line["loss"] for line in lines if line["kind"] == "valid"}
    assert list(valid) == [3, 6, 9, 12] and best["step"] == min(valid, key=valid.get)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 13))
    for line in lines:
        assert {"vlm", "jepa", "nextlat", "r2", "spread_pred", "effective_rank", "mean_cosine",
                "retrieval"} <= line.keys()


def test_steps_without_a_finite_gradient_are_skipped_then_stop(tmp_path, monkeypatch, capsys):
    factors, forward = itertools.chain([1.0], itertools.repeat(float("nan"))), train.SFT.forward

    def broken(*args):
        result = forward(*args)
        factor = next(factors) if torch.is_grad_enabled() else 1.0
        return result._replace(total=result.total * factor)

    monkeypatch.setattr(train.SFT, "forward", broken)
    config = train.parse_config([*TINY_RUN, "--method", "sft", "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="five steps in a row"):
        train.train(config)
    assert capsys.readouterr().out.count("step skipped") == 5
    state = run.read_state(tmp_path / "run" / "state.safetensors")
    assert all(torch.isfinite(t).all() for t in state["weights"].values()) and state["step"] == 5


def test_a_fault_in_a_step_leaves_the_state_before_it(tmp_path, monkeypatch):
    numbers, forward = itertools.count(1), train.SFT.forward

    def faulty(*args):
        if torch.is_grad_enabled() and next(numbers) == 3:
            raise ValueError("record 7 has no tool image")
        return forward(*args)

    monkeypatch.setattr(train.SFT, "forward", faulty)
    config = train.parse_config([*TINY_RUN, "--method", "sft", "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="record 7"):
        train.train(config)
    state = run.read_state(tmp_path / "run" / "state.safetensors")
    assert state["step"] == 2
    train.train(config, resume=True)
    # the time before the fault counts, too
    assert read_json(tmp_path / "run" / "results.json")["train_seconds"] > state["seconds"] > 0
    steps = [line["step"] for line in log_of(tmp_path / "run") if line["kind"] == "train"]
    assert steps == list(range(1, 13))


def test_a_run_interrupted_in_every_way_ends_as_the_uninterrupted_one(whole_run, tmp_path,
                                                                      as_program):
    """Killed at a random moment, asked to end by SIGTERM and by SIGINT, killed again."""
    out, moments = tmp_path / "run", []
    for number, step in ((signal.SIGKILL, 4), (signal.SIGTERM, 5), (signal.SIGINT, 8),
                         (signal.SIGKILL, 10)):
        exists = (out / "config.json").is_file()
        program = Program(*(["--resume", out] if exists else [*TINY_RUN, "--out", out]),
                          log=tmp_path / f"said-{step}")
        program.wait_for_step(step)
        if number == signal.SIGKILL:
            moments.append(random.uniform(0, 0.1))
            time.sleep(moments[-1])
        if program.is_alive():
            os.kill(program.pid, number)
        program.join()
        if number != signal.SIGKILL and program.exitcode:
            # as signals do, so that `a && b` ends, too
            assert program.exitcode == -number, program.text()
            assert "saving after this step" in program.text() and "--resume" in program.text()
            assert step <= run.read_state(out / "state.safetensors")["step"] < 12
    if not (out / "results.json").is_file():
        as_program(train.__file__, "--resume", out)
    ended, whole = contents(out), contents(whole_run[0])
    for key, value in whole.items():
        assert ended[key] == value, (key, moments)


# ---- several processes ----


@pytest.fixture(scope="module")
def alone_trained(tmp_path_factory):
    """One process makes all four passes of a step; beside it a copy of its folder after two."""
    out = tmp_path_factory.mktemp("one") / "run"
    config = train.parse_config([*SHARED_RUN, "--out", str(out)])
    half = shutil.copytree(train_until(config, 2), out.with_name("half"))
    train.train(config, resume=True)
    return out, half


def test_sharding_wants_several_processes_and_frozen_weights(monkeypatch):
    with pytest.raises(ValueError, match="with torchrun and two or more"):
        train.train(train.Config(device="cpu", shard=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="with --lora_rank"):
        train.train(train.Config(device="cpu", shard=True, lora_rank=0))


def test_each_process_holds_half_of_every_frozen_weight(vlm64):
    # the first of two processes, of which the other does not exist
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    vlm64.set_trainable(train.Config(device="cpu", shard=True, lora_rank=2), world_size=2)
    dist.destroy_process_group()
    for name, p in vlm64.lm.get_decoder().layers.named_parameters():
        assert hasattr(p, "to_local") != p.requires_grad, name
        assert p.requires_grad or p.to_local().numel() == p.numel() // 2, name


@pytest.mark.parametrize("way", ["begun by two", "sharded", "begun by one"])
def test_two_processes_train_as_one(alone_trained, tmp_path, way):
    """The same passes, so the same weights; a run that one process began is continued by two."""
    alone, half = alone_trained
    out = half if way == "begun by one" else tmp_path / "run"
    begin = ["--resume", half] if way == "begun by one" else [*SHARED_RUN, "--out", out]
    shard = ["--shard", "--gradient_checkpointing"] * (way == "sharded")
    together(*begin, *shard, log=tmp_path / "said")
    one, two = (run.read_state(folder / "state.safetensors")["weights"] for folder in (alone, out))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-5)
    one, two = (log_of(folder)[-1] for folder in (alone, out))
    assert two["kind"] == "valid" and two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    if shard:
        vlm, _, _ = evaluate.load_model(out, "cpu")
        assert evaluate.Evaluator(vlm, scenes.make_world("mixed", "test", 1)).direct()
