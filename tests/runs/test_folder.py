"""Claims about a run's folder: nothing is overwritten, one process has it, a failed start leaves
nothing; half-written checkpoints go, whole files stay; what a run began with is compared when it is
resumed; a state is read without executing anything; a signal ends a program as signals do."""

import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

import train
from support import processes, run
from support.files import read_json, write_json, write_tensors

from conftest import log_of


@pytest.fixture
def config(tmp_path):
    return train.Config(out=str(tmp_path / "runs" / "a"), device="cpu")


def test_one_run_has_the_folder_and_leaves_what_it_did_not_make(config):
    out = Path(config.out)
    with pytest.raises(ValueError, match="bad data"), run.Run(config, resume=False):
        with pytest.raises(ValueError, match="is in use by another process"):
            run.Run(config, resume=True).__enter__()
        raise ValueError("bad data")
    assert not out.exists()  # a failed start leaves nothing
    out.mkdir()  # an empty folder of the user's is used, and stays
    with run.Run(config, resume=False):
        pass
    assert out.is_dir() and not any(out.iterdir())
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match="already holds files.*choose another --out"):
        run.Run(config, resume=False).__enter__()
    assert [path.name for path in out.iterdir()] == ["notes.txt"]


def test_a_checkpoint_replaces_what_an_interruption_left_and_older_ones(tmp_path):
    for name in ("checkpoint-3", "checkpoint-9", "checkpoint-9.partial", "checkpoint-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    vlm = SimpleNamespace(save_adapter=lambda folder: (folder / "whole").touch())
    run.save_best(tmp_path, SimpleNamespace(vlm=vlm, predictor=None), 9, dict(loss=1.0))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "best.json", "checkpoint-9", "checkpoint-9/whole", "checkpoint-mine",
        "checkpoint-mine/half"]
    # a name cannot lead out of the run, whose folder may have been moved
    write_json(tmp_path / "config.json", dict(out="elsewhere"))
    write_json(tmp_path / "best.json", dict(checkpoint="../checkpoint-9"))
    assert run.config_and_checkpoint(tmp_path) == (
        SimpleNamespace(out=str(tmp_path)), tmp_path / "checkpoint-9")


def test_the_log_names_each_record_that_was_left_out_once(config):
    with run.Run(config, resume=False) as current:
        for step in (5, 6):
            current.save(step, SimpleNamespace(faults={3: "line 4: no image"}))
    assert log_of(config.out) == [dict(kind="left out", step=5, fault="line 4: no image")]


def test_a_state_comes_back_as_it_was_or_not_at_all(tmp_path):
    file, tensor = tmp_path / "state.safetensors", torch.arange(3, dtype=torch.bfloat16)
    state = dict(step=4, best=0.5, none=None, pair=[1, tensor],
                 optimizer={0: dict(exp_avg=tensor.clone())})
    run.write_state(file, state)
    torch.testing.assert_close(run.read_state(file), state, rtol=0, atol=0)
    # nothing of a pickle is executed
    for spoil, message in ((lambda: file.write_bytes(file.read_bytes()[:-3]), "not a whole safet"),
                           (lambda: torch.save(state, file), "not a whole safetensors file"),
                           (lambda: run.write_state(file, dict(x=tensor / 0)), "are not finite"),
                           (lambda: save_file(dict(a=tensor), file), "another version")):
        spoil()
        with pytest.raises(ValueError, match=message):
            run.read_state(file)


def test_a_failed_write_leaves_the_last_good_file(tmp_path, monkeypatch):
    write_json(file := tmp_path / "best.json", dict(step=1))
    monkeypatch.setattr(os, "replace", Mock(side_effect=OSError(28, "no space")))
    for write in (lambda: write_json(file, {}), lambda: write_tensors({}, file)):
        with pytest.raises(OSError, match="cannot be written"):
            write()
    assert read_json(file) == dict(step=1) and len(list(tmp_path.iterdir())) == 1


def test_other_inputs_than_a_run_began_with_are_named(tmp_path):
    """Large weights are told apart by pieces."""
    weights, out = tmp_path / "model.safetensors", tmp_path / "run"
    weights.write_bytes(bytes(64 << 20) + b"start")
    began = dict.fromkeys(("training records", "validation records"), run.digest([]))
    out.mkdir()
    write_json(out / "inputs.json", began | run.base_digests(str(tmp_path)) | dict(old="1"))
    weights.write_bytes(bytes(64 << 20) + b"other")
    with run.Run(train.Config(model=str(tmp_path), out=str(out), device="cpu"), True) as current:
        with pytest.raises(ValueError, match="model.safetensors of the model, old, test records"):
            current.start(None, None, None, ([], [], []))


def test_paths_become_absolute_and_names_on_the_hub_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    absolute = run.absolute_paths(train.Config(model="model", data="~/set"))
    assert (absolute.model, absolute.data) == (str(tmp_path / "model"), str(Path.home() / "set"))
    assert run.absolute_paths(train.Config(model="org/name")).model == "org/name"


def test_only_a_run_that_can_continue_is_resumed(config):
    saved, out = vars(config) | dict(steps=7), Path(config.out)
    out.mkdir(parents=True)
    for words, files, message in (
            ([], {}, "takes the run folder"),
            ([out], {}, "is not a run folder"),
            ([out], {"config.json": saved | dict(colour=1)}, "unknown field 'colour'"),
            ([out], {"config.json": saved, "results.json": {}}, "is finished")):
        for name, content in files.items():
            write_json(out / name, content)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            run.read_config(train.config_class, words)
    (out / "results.json").unlink()
    assert run.read_config(train.config_class, [str(out)]).steps == 7


def test_the_hint_of_a_collapse_names_what_to_try():
    fine = dict(effective_rank=20.0, mean_cosine=0.5, retrieval_chance=0.02)
    alike = fine | dict(effective_rank=2.0)
    assert "try the frozen target" in run.collapse_hint(alike, False)
    assert "try another --model" in run.collapse_hint(fine | dict(mean_cosine=0.98), True)
    # nine examples span eight directions at most
    for metrics in (fine, {}, alike | dict(retrieval_chance=1 / 9)):
        assert not run.collapse_hint(metrics, False)


@pytest.mark.parametrize("sent, in_loop, world, saves", [
    ([signal.SIGINT], False, "1", False), ([signal.SIGINT, signal.SIGTERM], True, "1", False),
    # with several processes torchrun sends its own after the terminal's, which undoes nothing
    ([signal.SIGINT, signal.SIGTERM], True, "2", True)])
def test_a_signal_ends_the_program_as_signals_do(monkeypatch, capfd, sent, in_loop, world, saves):
    """A shell then sees 128 + number and ends `a && b`."""
    def main():
        for number in sent:
            os.kill(os.getpid(), number)
        print("saved")

    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr(processes.SIGNALS, "in_loop", in_loop)
    program = multiprocessing.get_context("fork").Process(
        target=processes.run_program, args=(main, "stopped; --resume continues"))
    program.start()
    program.join()
    text = "".join(capfd.readouterr())
    assert program.exitcode == -sent[0] and "Traceback" not in text, text
    assert ("saving after this step" in text) == in_loop
    assert ("saved" in text) == saves and ("--resume continues" in text) != saves
