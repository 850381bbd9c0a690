"""Claims about a run's folder: nothing is overwritten, one process has it, a failed start leaves
nothing; half-written files go, whole ones stay; what a run began with is compared when it is
resumed; a state is read without executing anything; a signal ends a program as signals do."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from support import processes, run
from support.files import write_json, write_tensors

ROOT = Path(train.__file__).resolve().parent


@pytest.fixture
def config(tmp_path):
    return train.Config(out=str(tmp_path / "runs" / "a"), device="cpu")


def test_a_failed_start_leaves_nothing_and_a_used_folder_is_left_alone(config):
    out = Path(config.out)
    with pytest.raises(ValueError, match="bad data"):
        with run.Run(config, resume=False):
            assert out.is_dir()
            raise ValueError("bad data")
    assert not out.parent.exists()
    out.mkdir(parents=True)  # an empty folder of the user's is used, and stays
    with run.Run(config, resume=False):
        pass
    assert out.is_dir() and not any(out.iterdir())
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="already holds files.*choose another --out"):
        run.Run(config, resume=False).__enter__()
    with pytest.raises(FileExistsError, match="is a file or already.*choose another --out"):
        run.refuse_used_folder(out / "notes.txt")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_one_process_at_a_time_has_the_folder(config):
    code = ("import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire()\n"
            "print('held', flush=True); sys.stdin.read()")
    Path(config.out).mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", code, str(Path(config.out) / run.LOCK)],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="is in use by another process"):
            run.Run(config, resume=True).__enter__()
        other.kill()
    # the system's lock goes with its process
    with run.Run(config, resume=True):
        pass


def test_a_resumed_run_removes_half_files_and_old_checkpoints_and_nothing_else(config):
    out = Path(config.out)
    for name in ("checkpoint-3", "checkpoint-6", "checkpoint-9.partial", "checkpoint-mine"):
        (out / name).mkdir(parents=True)
    for name in ("state.safetensors.partial", "log.jsonl.partial", "my notes.partial", "a.txt"):
        (out / name).touch()
    write_json(out / "best.json", dict(checkpoint="checkpoint-6"))
    with run.Run(config, resume=True):
        pass
    assert sorted(path.name for path in out.iterdir()) == [
        "a.txt", "best.json", "checkpoint-6", "checkpoint-mine", "my notes.partial"]


def test_the_log_forgets_what_came_after_the_state(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st', encoding="utf-8")
    run.truncate_log(log, 2)
    assert log.read_text(encoding="utf-8") == '{"step": 1}\n{"step": 2}\n'


def test_the_log_names_each_record_that_was_left_out_once(config):
    dataset = SimpleNamespace(faults={3: "line 4: no image"})
    with run.Run(config, resume=False) as current:
        for step in (5, 6):
            current.step = step
            current.log_faults(dataset)
    lines = (Path(config.out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [dict(kind="left out", step=5,
                                                         fault="line 4: no image")]


def test_a_state_comes_back_as_it_was(tmp_path):
    tensor = torch.arange(3, dtype=torch.bfloat16)
    state = dict(step=4, best=0.5, none=None, pair=[1, tensor],
                 optimizer={0: dict(exp_avg=tensor.clone())})
    run.write_state(tmp_path / "s.safetensors", state)
    back = run.read_state(tmp_path / "s.safetensors")
    assert torch.equal(back["pair"].pop(), tensor) and back["pair"] == [1]
    assert torch.equal(back["optimizer"][0].pop("exp_avg"), tensor) and back["optimizer"] == {0: {}}
    assert (back["step"], back["best"], back["none"]) == (4, 0.5, None)


@pytest.mark.parametrize("kind, message", [
    ("cut", "not a whole safetensors file"), ("pickle", "not a whole safetensors file"),
    ("nan", "not finite"), ("foreign", "another version")])
def test_a_spoilt_state_says_so_and_runs_nothing(tmp_path, kind, message):
    file = tmp_path / "state.safetensors"
    run.write_state(file, dict(weights=dict(a=torch.ones(4))))
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-3])
    elif kind == "pickle":
        torch.save(dict(a=1), file)
    else:
        save_file(dict(a=torch.full((2,), float("nan") if kind == "nan" else 1.0)), file)
    with pytest.raises(ValueError, match=message):
        run.read_state(file)


def test_a_failed_write_leaves_the_last_good_file(tmp_path, monkeypatch):
    file = tmp_path / "state.safetensors"
    write_tensors(dict(a=torch.ones(2)), file)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError, match="cannot be written"):
        write_tensors(dict(a=torch.zeros(2)), file)
    assert torch.equal(load_file(file)["a"], torch.ones(2)) and len(list(tmp_path.iterdir())) == 1


def test_other_inputs_than_a_run_began_with_are_named(tmp_path):
    began = {"config.json of the model": "1", "training records": "2"}
    write_json(tmp_path / "inputs.json", began)
    run.refuse_other_inputs(tmp_path, began)
    other = {"model.safetensors of the model": "1", "training records": "3"}
    with pytest.raises(ValueError, match=r"\(config.json of the model, training records, "
                                         r"model.safetensors of the model\).*--out"):
        run.refuse_other_inputs(tmp_path, other)


def test_large_weights_are_told_apart_by_pieces(tmp_path):
    file, size = tmp_path / "model.safetensors", (64 << 20) + 5
    file.write_bytes(bytes(size))
    before = run.base_digests(str(tmp_path))
    with open(file, "r+b") as content:
        content.seek(size - 1)
        content.write(b"x")
    assert run.base_digests(str(tmp_path)) != before


def test_paths_become_absolute_and_names_on_the_hub_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    made = run.absolute_paths(train.Config(model="model", data="set", out="~/x"))
    assert (made.model, made.data) == (str(tmp_path / "model"), str(tmp_path / "set"))
    assert made.out == str(Path.home() / "x")
    assert run.absolute_paths(train.Config(model="org/name")).model == "org/name"


def test_only_a_run_that_can_continue_is_resumed(config):
    out = Path(config.out)
    for argv, message in (([], "takes the run folder"), ([str(out)], "is not a run folder")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run.read_config(train.config_class, argv)
    out.mkdir(parents=True)
    write_json(out / "config.json", dict(dataclasses.asdict(config), colour=1))
    with pytest.raises(ValueError, match="unknown field 'colour'"):
        run.read_config(train.config_class, [str(out)])
    write_json(out / "config.json", dict(dataclasses.asdict(config), steps=7))
    assert run.read_config(train.config_class, [str(out)]).steps == 7
    write_json(out / "results.json", {})
    with pytest.raises(ValueError, match="is finished"):
        run.read_config(train.config_class, [str(out)])


def test_the_hint_of_a_collapse_names_what_to_try():
    fine = dict(effective_rank=20.0, mean_cosine=0.5, retrieval_chance=0.02)
    alike = fine | dict(effective_rank=2.0)
    assert not run.collapse_hint(fine, False) and not run.collapse_hint({}, False)
    assert "try the frozen target" in run.collapse_hint(alike, False)
    assert "try another --model" in run.collapse_hint(fine | dict(mean_cosine=0.98), True)
    # nine examples span eight directions at most
    assert not run.collapse_hint(alike | dict(retrieval_chance=1 / 9), False)


# ---- signals ----


def signalled(where: str, number: int) -> None:
    def main():
        if where == "before":
            os.kill(os.getpid(), number)
        with processes.finishing_steps():
            for _ in range(dict(loop=1, twice=2)[where]):
                os.kill(os.getpid(), number)
            assert processes.asked_to_stop(1, "cpu")
            print("saved", flush=True)

    processes.run_program(main, stopped="stopped; --resume continues")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["loop", "before", "twice"])
def test_a_signal_ends_the_program_as_signals_do(tmp_path, number, where):
    """A shell then sees 128 + number and ends `a && b`."""
    said = tmp_path / "said"
    if not (child := os.fork()):
        file = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", encoding="utf-8")
        signalled(where, number)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    text = said.read_text(encoding="utf-8")
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number, text
    assert ("saved" in text) == (where == "loop") and "Traceback" not in text
    assert ("--resume continues" in text) == (where != "loop")


def test_with_several_processes_a_second_signal_does_not_undo_the_first(monkeypatch):
    """torchrun sends its own after the terminal's."""
    monkeypatch.setattr(processes, "SIGNALS", processes.Signals(in_loop=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in (signal.SIGINT, signal.SIGTERM):
        processes.on_signal(number, None)
    assert processes.SIGNALS.number == signal.SIGINT
