"""Claims: a run's folder is made and used by one process at a time, however others end; a run goes
on only with the data and the model that it began with; a signal ends it as it ends any program;
files and places mean the same in every locale and from every folder."""

import ast
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support import files, processes, run_folder
from support.files import Lock, new_folder, write_json, write_text
from support.processes import asked_to_stop, finishing_steps, run_program
from support.records import Example, read_folder, write_folder
from support.run_folder import (absolute_paths, base_digests, collapse_hint, example_digest, held,
                                refuse_other_inputs, refuse_used_folder, start_folder)

ROOT = Path(run_folder.__file__).resolve().parent.parent


def forked(file: Path, work) -> int:
    """A copy of this process that does `work`, with its output in `file`; returns its number."""
    child = os.fork()
    if child:
        return child
    try:
        for stream, number in (("stdout", 1), ("stderr", 2)):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            setattr(sys, stream, open(number, "w", encoding="utf-8", closefd=False, buffering=1))
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(99)


# ---- one process at a time ----


@pytest.mark.parametrize("system_locks", [True, False])
def test_a_folder_in_use_is_refused_and_free_again_when_its_process_is_killed(
        tmp_path, system_locks, monkeypatch):
    """Killed, not ended: nothing of ours runs any more that could free it."""
    if not system_locks:
        monkeypatch.setattr(files, "fcntl", None)
    out = tmp_path / "out"

    def hold():
        with held(out, resume=False):
            print("held")
            time.sleep(60)

    other = forked(tmp_path / "said", hold)
    while not (tmp_path / "said").is_file() or not (tmp_path / "said").stat().st_size:
        time.sleep(0.01)
    for resume in (True, False):  # its config.json is not written yet
        with pytest.raises(ValueError, match=f"out is in use by process {other} on "):
            held(out, resume).__enter__()
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    assert (out / "lock").exists()
    with held(out, resume=False):
        assert (out / "lock").read_text(encoding="utf-8").split()[1] == str(os.getpid())
    assert not any(out.iterdir())


def test_without_system_locks_another_computers_file_is_not_guessed_at(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "fcntl", None)
    dead = forked(tmp_path / "said", lambda: None)
    os.waitpid(dead, 0)
    (tmp_path / "lock").write_text(f"elsewhere {dead}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"process {dead} on elsewhere: if that is gone, delete"):
        Lock(tmp_path / "lock", "it")
    (tmp_path / "lock").write_text(f"{socket.gethostname()} {os.getpid()}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
        Lock(tmp_path / "lock", "it")


def test_a_lock_that_its_holder_deletes_meanwhile_is_asked_for_anew(tmp_path, monkeypatch):
    """A holder lets go between the opening and the locking: its file is no lock any more."""
    first, system_lock = Lock(tmp_path / "lock", "it"), Lock._system_lock

    def late(lock):
        monkeypatch.setattr(Lock, "_system_lock", system_lock)
        first.release()
        return system_lock(lock)

    monkeypatch.setattr(Lock, "_system_lock", late)
    second = Lock(tmp_path / "lock", "it")
    assert os.path.samestat(os.fstat(second.handle), os.stat(tmp_path / "lock"))
    with pytest.raises(ValueError, match="it is in use"):
        Lock(tmp_path / "lock", "it")


def test_a_start_that_comes_to_nothing_leaves_nothing_and_a_used_folder_is_left_alone(tmp_path):
    out = tmp_path / "runs" / "a"
    with pytest.raises(ValueError, match="bad data"):
        with held(out, resume=False):
            assert out.is_dir()
            raise ValueError("bad data")
    assert not (tmp_path / "runs").exists()
    out.mkdir(parents=True)  # an empty folder of the user's is used, and stays
    with held(out, resume=False):
        pass
    assert out.is_dir() and not any(out.iterdir())
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    for use in (lambda: refuse_used_folder(out), lambda: held(out, resume=False).__enter__()):
        with pytest.raises(FileExistsError, match="already holds files.*choose another --out"):
            use()
    with pytest.raises(FileExistsError, match="is a file: choose another --out"):
        refuse_used_folder(out / "notes.txt")
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


def test_a_resumed_run_removes_half_files_and_old_checkpoints_and_nothing_else(tmp_path):
    for name in ("checkpoint-3", "checkpoint-6", "checkpoint-9.partial", "checkpoint-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    for name in ("state.safetensors.partial", "log.jsonl.partial", "my notes.partial", "a.txt"):
        (tmp_path / name).touch()
    write_json(tmp_path / "best.json", dict(checkpoint="checkpoint-6"))
    with held(tmp_path, resume=True):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.txt", "best.json", "checkpoint-6", "checkpoint-mine", "my notes.partial"]
    write_json(tmp_path / "results.json", {})
    with pytest.raises(ValueError, match="is finished"):
        with held(tmp_path, resume=True):
            pass


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path):
    out = tmp_path / "new" / "out"
    with pytest.raises(ZeroDivisionError):
        with new_folder(out) as partial:
            (partial / "a").touch()
            with pytest.raises(FileExistsError, match="out.partial exists: another process is"):
                with new_folder(out):
                    pass
            1 / 0
    assert not out.exists() and not partial.exists()
    with new_folder(out) as partial:
        (partial / "a").touch()
    assert (out / "a").exists() and not partial.exists()
    with pytest.raises(FileExistsError, match="exists already: choose a new folder"):
        with new_folder(out):
            pass
    with pytest.raises(FileExistsError, match="has been made by another process meanwhile"):
        with new_folder(tmp_path / "late") as partial:
            (tmp_path / "late").mkdir()
    assert not partial.exists()


def test_a_failed_write_leaves_no_half_file(tmp_path, monkeypatch):
    write_text(tmp_path / "a", "before")

    def full(self, *args, **kwargs):
        with open(self, "w", encoding="utf-8") as file:
            file.write("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="a cannot be written: .*No space left"):
        write_text(tmp_path / "a", "after")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text(encoding="utf-8") == "before"


# ---- what a run began with ----


@dataclasses.dataclass
class Settings:
    model: str
    data: str = ""
    out: str = ""
    feature_cache: str = ""


def examples(tmp_path):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    rows = [Example(str(n), "f", tmp_path / "a.png", "Which?", ["x", "y"], "x",
                    ["Look.", Image.new("RGB", (2, 2)), "x"]) for n in range(3)]
    return [rows[:2], rows[2:], []]


def test_other_data_or_another_base_than_a_run_began_with_are_named(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    (base / "config.json").write_text("{}", encoding="utf-8")
    (base / "model.safetensors").write_bytes(bytes(1000))
    (base / "notes.md").touch()
    config, (train, valid, test) = Settings(str(base), out=str(out)), examples(tmp_path)
    start_folder(config, [train, valid, test])

    def complaint(*splits) -> str:
        with pytest.raises(ValueError, match="restore it, or begin a new run") as caught:
            refuse_other_inputs(config, splits or [train, valid, test])
        return str(caught.value)

    refuse_other_inputs(config, [train, valid, test])
    other = dataclasses.replace(train[1], question="What?")
    assert "record '1' of the train split" in complaint([train[0], other], valid, test)
    assert "the test split (0 records then, 1 now)" in complaint(train, valid, valid)
    assert "record '1' of the train split" in complaint(train[::-1], valid, test)
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "a.png")  # the same name, another picture
    assert "record '0' of the train split" in complaint()
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    (base / "notes.md").write_text("no matter", encoding="utf-8")
    refuse_other_inputs(config, [train, valid, test])
    (base / "chat_template.jinja").touch()
    assert f"chat_template.jinja of the model {base}" in complaint()
    (base / "chat_template.jinja").unlink()
    (base / "model.safetensors").write_bytes(bytes(999) + b"\1")
    assert "model.safetensors of the model" in complaint()
    (base / "model.safetensors").unlink()
    assert "model.safetensors of the model" in complaint()
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="base not found: the run began with this model"):
        refuse_other_inputs(config, [train, valid, test])


def test_a_run_of_an_earlier_version_says_that_it_cannot_compare(tmp_path, capsys):
    refuse_other_inputs(Settings(str(tmp_path), out=str(tmp_path)), [[], [], []])
    assert "does not say what it began with" in capsys.readouterr().out


@pytest.mark.parametrize("field, value", [
    ("id", "z"), ("task", "g"), ("question", "Q"), ("options", ["y", "x"]), ("answer", "y"),
    ("split", "test"), ("image", Image.new("RGB", (4, 4))), ("trajectory", ["x"]),
    ("trajectory", ["Look.", Image.new("RGB", (2, 2), "red"), "x"])])
def test_a_digest_covers_every_part_of_an_example_and_no_place(tmp_path, field, value):
    example = examples(tmp_path)[0][0]
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.png").replace(tmp_path / "moved" / "b.png")
    moved = dataclasses.replace(example, image=tmp_path / "moved" / "b.png")
    examples(tmp_path)
    assert example_digest(moved) == example_digest(example)
    assert example_digest(dataclasses.replace(example, **{field: value})) != example_digest(example)


def test_large_weights_are_told_apart_by_pieces(tmp_path):
    """70 MB: further training changes all of them, and every piece tells."""
    weights = np.zeros(70_000_000, np.uint8)
    for changed in (None, slice(0, 10), slice(-10, None), slice(35_000_000, 37_000_000)):
        content = weights.copy()
        if changed:
            content[changed] = 1
        (tmp_path / "model.safetensors").write_bytes(content.tobytes())
        digest = base_digests(str(tmp_path))["model.safetensors"]
        first = digest if changed is None else first
        assert (digest == first) == (changed is None), changed


# ---- places ----


def test_paths_are_made_absolute_and_names_on_the_hub_are_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    found = absolute_paths(Settings("base", "set", "runs/a", "features"))
    assert dataclasses.astuple(found) == tuple(
        str(tmp_path / name) for name in ("base", "set", "runs/a", "features"))
    found = absolute_paths(Settings("owner/name"))
    assert (found.model, found.data, found.feature_cache) == ("owner/name", "", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute_paths(Settings("~/base", "~/set")).model == str(tmp_path / "base")
    assert absolute_paths(absolute_paths(Settings("base"))) == absolute_paths(Settings("base"))


NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
THERE = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from support.files import write_json
from support.processes import run_program
from support.records import read_folder, write_folder

def main():
    assert sys.getfilesystemencoding() != "utf-8" and sys.stdout.encoding == "ascii"
    out, rows = Path(sys.argv[2]), read_folder(sys.argv[3])
    print(rows[0].question[:2], sys.argv[3][-1])
    write_folder(out, rows)
    write_json(out / "config.json", dict(data=sys.argv[3], text=rows[0].question))
    raise ValueError(rows[0].id)

run_program(main)
"""


def test_files_and_names_are_utf8_in_a_locale_that_is_not(tmp_path):
    """Written there and read here, and the other way round; what is printed is spelt out."""
    picture = Image.new("RGB", (4, 4), "red")
    row = Example("é", "f", picture, "ما هو الرقم؟", ["x", "y"], "x", ["Schön. Answer: x"])
    write_folder(tmp_path / "here-ü", [row])
    done = subprocess.run([sys.executable, "-c", THERE, str(ROOT), tmp_path / "there",
                           tmp_path / "here-ü"], capture_output=True, encoding="utf-8",
                          env={**os.environ, **NO_UTF8})
    assert (done.stdout, done.stderr) == ("\\u0645\\u0627 \\udcbc\n", "error: \\xe9\n")
    (again,) = read_folder(tmp_path / "there")
    assert (again.id, again.question, again.texts) == (row.id, row.question, row.texts)
    assert again.image.is_file()
    config = json.loads((tmp_path / "there" / "config.json").read_text(encoding="utf-8"))
    assert config["text"] == row.question
    assert os.fsencode(config["data"]) == os.fsencode(tmp_path / "here-ü")


def test_every_text_file_is_opened_as_utf8():
    """The interpreter's default is the locale's; so the encoding is written at every call."""
    for path in sorted(ROOT.rglob("*.py")):
        if {"runs", "figures", ".venv", "venv"} & set(path.relative_to(ROOT).parts):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            assert names_an_encoding(call), f"{path.relative_to(ROOT)}, line {call.lineno}"


def names_an_encoding(call: ast.Call) -> bool:
    given = {k.arg: k.value for k in call.keywords}
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    of = getattr(getattr(call.func, "value", None), "id", "") if name == "open" else ""
    if "encoding" in given or None in given or of in ("Image", "os", "webbrowser"):
        return True
    if name in ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile"):
        modes = [*call.args, *([given["mode"]] if "mode" in given else [])]
        words = [m.value for m in modes if isinstance(m, ast.Constant) and isinstance(m.value, str)]
        return any("b" in word and set(word) <= set("rwaxb+") for word in words)
    if name == "read_text":
        return bool(call.args)
    if name == "write_text":  # Path.write_text(text), or ours: write_text(file, text)
        return len(call.args) > 1
    as_text = (given.get("text"), given.get("universal_newlines"))
    return not any(isinstance(value, ast.Constant) and value.value is True for value in as_text)


@pytest.mark.parametrize("code, fine", [
    ("open(f)", False), ("open(f, 'w')", False), ("open(f, 'rb')", True), ("f.open()", False),
    ("open(f, mode='ab')", True), ("open(f, encoding='utf-8')", True), ("Image.open(f)", True),
    ("f.read_text()", False), ("f.write_text('b')", False), ("write_text(f, text)", True),
    ("subprocess.run(x, text=True)", False), ("dict(text='a')", True),
    ("subprocess.run(x, capture_output=True)", True)])
def test_the_check_of_encodings_sees(code, fine):
    assert names_an_encoding(ast.parse(code, mode="eval").body) == fine


def test_a_foreign_package_of_the_same_name_does_not_win(tmp_path):
    """A regular package anywhere on the path is preferred to a folder without __init__.py."""
    scripts = [path for path in ROOT.glob("*/*.py")
               if path.parent.name not in ("tests", "tiny-vlm")]
    for room in {path.parent.name for path in scripts}:
        assert (ROOT / room / "__init__.py").is_file(), f"{room} is no package"
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("raise ImportError", encoding="utf-8")
    for path in scripts:
        source = path.read_text(encoding="utf-8")
        if "__main__" in source:
            assert "sys.path.insert(0, str(" in source, f"{path} may import another's"
    done = subprocess.run([sys.executable, ROOT / "analysis" / "study.py", "--help"],
                          capture_output=True, encoding="utf-8",
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr


# ---- signals ----

def signalled(where: str, number: int) -> None:
    def main():
        if where == "before":
            os.kill(os.getpid(), number)
        with finishing_steps():
            assert not asked_to_stop(1, "cpu")
            for _ in range(dict(loop=1, twice=2, after=0)[where]):
                os.kill(os.getpid(), number)
            assert asked_to_stop(1, "cpu") == (where == "loop")
            print("saved")
        if where == "after":
            os.kill(os.getpid(), number)
            print("not reached")

    run_program(main, stopped="stopped; go on with --resume")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["loop", "before", "twice", "after"])
def test_a_signal_ends_the_program_as_signals_do(tmp_path, number, where):
    """Whether it saves first or not: a shell, which then sees 128 + number, ends `a && b`."""
    child = forked(tmp_path / "said", lambda: signalled(where, number))
    _, status = os.waitpid(child, 0)
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == number, said
    assert ("saved\n" in said) == (where in ("loop", "after"))
    assert "Traceback" not in said and "not reached" not in said
    assert ("go on with --resume" in said) == (where != "loop")


def test_with_several_processes_a_second_signal_does_not_undo_the_first(monkeypatch):
    """torchrun sends its own after the terminal's."""
    monkeypatch.setattr(processes, "SIGNALS", processes.Signals(in_loop=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number in (signal.SIGINT, signal.SIGTERM):
        processes.on_signal(number, None)
    assert processes.SIGNALS.number == signal.SIGINT
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(KeyboardInterrupt):
        processes.on_signal(signal.SIGTERM, None)


# ---- the collapse hint ----


def test_the_hint_of_a_collapse_knows_the_target_and_when_it_means_nothing():
    fine = dict(effective_rank=20.0, mean_cosine=0.5)
    alike = fine | dict(effective_rank=2.0)
    assert not collapse_hint(fine, "current", 50) and not collapse_hint({}, "current", 50)
    assert "try --target_encoder frozen" in collapse_hint(alike, "current", 50)
    assert "collapsed" in collapse_hint(fine | dict(mean_cosine=0.98), "current", 50)
    frozen = collapse_hint(alike, "frozen", 50)
    assert "another --target_view or --model" in frozen and "collapsed" not in frozen
    assert "--target_encoder" not in frozen
    assert not collapse_hint(alike, "current", 9)  # nine examples span eight directions at most
    assert not collapse_hint(alike, "frozen", 50, targets="family")
