"""Claims about whole runs: the folder holds what the docs say; a run that was interrupted ends as
the uninterrupted one; several processes train as one, each with its share of the frozen weights.

train.py runs as a process of its own, forked from one that has everything imported: to start Python
and import PyTorch takes longer than any of these runs.
"""

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
from contextlib import redirect_stderr, redirect_stdout
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
TINY_RUN = ("--device cpu --steps 12 --batch 2 --train_examples 20 --test_per_task 1 "
            "--eval_every 3 --lora_rank 2 --lr 5e-3 --method dropout+pearl").split()
SHARED_RUN = [*TINY_RUN, "--accumulate", "4", "--steps", "3", "--method", "shuffled"]


def train_program(args: list[str], log: Path, env: dict[str, str]) -> None:
    os.environ.update(env)
    sys.argv = [train.__file__, *args]
    with open(log, "a", buffering=1, encoding="utf-8") as file:
        with redirect_stdout(file), redirect_stderr(file):
            runpy.run_path(train.__file__, run_name="__main__")


def program(*args, log: Path, **env: str):
    """`python train.py ARGS`, begun at once; what it prints is in the file `log`."""
    log.touch()
    process = CONTEXT.Process(target=train_program, args=([*map(str, args)], log, env))
    process.start()
    return process


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
    """The folder of a run from beginning to end."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return train.train(train.parse_config([*TINY_RUN, "--out", str(out)]))


def test_the_run_folder_holds_what_the_docs_say(whole_run):
    out, best = whole_run, read_json(whole_run / "best.json")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "inputs.json", "environment.json", "before.json", "log.jsonl",
        "state.safetensors", "best.json", "results.json", best["checkpoint"]}
    assert {path.name for path in (out / best["checkpoint"]).iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "predictor.safetensors"}
    assert read_json(out / "environment.json")["threads"] == torch.get_num_threads()
    valid = {line["step"]: line["loss"] for line in log_of(out) if line["kind"] == "valid"}
    assert list(valid) == [3, 6, 9, 12] and best["step"] == min(valid, key=valid.get)
    for line in log_of(out):
        assert {"vlm", "jepa", "nextlat", "r2", "spread_pred", "effective_rank", "mean_cosine",
                "retrieval"} <= line.keys()


@pytest.mark.parametrize("faulty, message, done", [
    (range(2, 7), "five steps in a row", 5), ([12], "record 7", 11)])
def test_a_fault_in_a_step_leaves_the_state_before_it(tmp_path, monkeypatch, faulty, message, done):
    """Steps without a finite gradient are skipped; the fifth in a row is a fault."""
    numbers, real = itertools.count(1), train.SFT.forward

    def forward(*args):
        result = real(*args)
        if not result.total.requires_grad or next(numbers) not in faulty:
            return result
        if message == "record 7":
            raise ValueError(message)
        return result._replace(total=result.total * float("nan"))

    monkeypatch.setattr(train.SFT, "forward", forward)
    config = train.parse_config([*TINY_RUN, "--method", "sft", "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match=message):
        train.train(config)
    state = run.read_state(tmp_path / "run" / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state["weights"].values())
    assert state["step"] == done
    train.train(config, resume=True)  # the rest of the run; the time before the fault counts, too
    assert read_json(tmp_path / "run" / "results.json")["train_seconds"] > state["seconds"] > 0
    steps = [line["step"] for line in log_of(tmp_path / "run") if line["kind"] == "train"]
    assert steps == list(range(1, 13))


def test_a_run_interrupted_in_every_way_ends_as_the_uninterrupted_one(whole_run, tmp_path):
    """Killed at a random moment, asked to end by SIGTERM and by SIGINT, killed again."""
    out, moments = tmp_path / "run", (random.uniform(0, 0.1), 0, 0, random.uniform(0, 0.1))
    numbers = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL
    for number, step, moment in zip(numbers, (4, 5, 8, 10), moments):
        resumes, log = (out / "config.json").is_file(), tmp_path / f"log-{step}"
        process = program(*(["--resume"] if resumes else [*TINY_RUN, "--out"]), out, log=log)
        limit, steps = time.monotonic() + 120, re.compile(r"\n +(\d+)/")
        while process.is_alive() and time.monotonic() < limit and step > max(
                map(int, steps.findall(log.read_text(encoding="utf-8"))), default=0):
            time.sleep(0.002)
        time.sleep(moment)
        if process.is_alive():
            os.kill(process.pid, number)
        process.join()
        if number != signal.SIGKILL and not (out / "results.json").is_file():
            # as signals do, so that `a && b` ends, too
            text = log.read_text(encoding="utf-8")
            assert process.exitcode == -number and "--resume" in text, text
            assert step <= run.read_state(out / "state.safetensors")["step"] < 12
    if not (out / "results.json").is_file():
        program("--resume", out, log=tmp_path / "said").join()
    ended, whole = contents(out), contents(whole_run)
    for key, value in whole.items():
        assert ended[key] == value, (key, moments)


def together(*args, log: Path) -> None:
    """Two processes, as torchrun starts them, to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [program(*args, log=log, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2",
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank in "01"]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0], log.read_text(encoding="utf-8")


@pytest.mark.parametrize("world_size, lora_rank", [("1", 64), ("2", 0)])
def test_sharding_wants_several_processes_and_frozen_weights(monkeypatch, world_size, lora_rank):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ValueError, match="torchrun and two or more, and with --lora_rank above 0"):
        train.train(train.Config(device="cpu", shard=True, lora_rank=lora_rank))


def test_each_process_holds_half_of_every_frozen_weight(vlm64):
    # the first of two processes, of which the other does not exist
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    vlm64.set_trainable(train.Config(device="cpu", shard=True, lora_rank=2), world_size=2)
    dist.destroy_process_group()
    for name, p in vlm64.lm.get_decoder().layers.named_parameters():
        assert hasattr(p, "to_local") != p.requires_grad, name
        assert p.requires_grad or p.to_local().numel() == p.numel() // 2, name


def test_two_processes_train_as_one(tmp_path):
    """The same passes, so the same weights; a run that one process began is continued by two."""
    config = train.parse_config([*SHARED_RUN, "--out", str(tmp_path / "alone")])
    shutil.copytree(train_until(config, 2), tmp_path / "half")
    alone = train.train(config, resume=True)
    shard = ["--shard", "--gradient_checkpointing"]
    for name, words in dict(whole=[*SHARED_RUN, "--out"], half=["--resume"],
                            sharded=[*SHARED_RUN, *shard, "--out"]).items():
        together(*words, tmp_path / name, log=tmp_path / f"log-{name}")
        one, two = (run.read_state(out / "state.safetensors")["weights"]
                    for out in (alone, tmp_path / name))
        torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-5)
        one, two = (log_of(out)[-1] for out in (alone, tmp_path / name))
        assert two["kind"] == "valid" and two["loss"] == pytest.approx(one["loss"], rel=1e-3), name
    vlm, _, _ = evaluate.load_model(tmp_path / "sharded", "cpu")
    assert evaluate.Evaluator(vlm, scenes.make_world("mixed", "test", 1)).direct()
