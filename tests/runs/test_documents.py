"""Claims: the documents' commands are understood, their links lead to files, the README's Python
lines run; the six files, support/ and tiny-vlm/ alone are enough."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import train
from analysis import study
from support import records
from world import scenes

ROOT = Path(train.__file__).resolve().parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/*.md"))]
COMMAND = re.compile(r"(?:python|torchrun --nproc-per-node=\w+) ([\w/-]+\.py)((?: [^`\n#&;|]*)?)")
OPTION = re.compile(r"--(\w+)")
SIX = ("losses", "predictor", "data", "model", "train", "evaluate")
ROOMS = ("support", "baselines", "world", "analysis", "published")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_commands_are_understood(page, as_program, capsys):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")  # commands of several lines
    common = re.search(r'COMMON="(.*?)"', text)
    for script, words in COMMAND.findall(text):
        words = words.replace("$COMMON", common[1] if common else "").replace("...", "")
        for placeholder, value in (("M*N", "2"), ("NAME", "ema"), ("[", ""), ("]", "")):
            words = words.replace(placeholder, value)
        if script == "analysis/study.py":
            study.plan(study.parse_args(shlex.split(words)))
        elif script == "train.py" and not re.search("--(resume|merge|help)", words):
            train.parse_config(words.split())
        else:
            with pytest.raises(SystemExit) as end:
                as_program(ROOT / script, "--help")
            explained = capsys.readouterr().out + str(end.value)
            options = {"help", *OPTION.findall(explained)}
            if "options of train.py" in explained:
                options |= train.Config.__dataclass_fields__.keys()
            assert {*OPTION.findall(words)} <= options, (script, words)


def test_links_lead_to_files():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), (page, link)


def test_the_readmes_python_lines_run(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), re.DOTALL)
    names = {}
    exec(code, names)
    assert names["pearl"].predictor.pred_embeddings.grad.any()
    assert capsys.readouterr().out.split()[-1] in names["records"][0].options


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """A copy of what is enough, the only place from which our modules can be imported now."""
    for name in SIX:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    for name in ("support", "tiny-vlm"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in list(sys.modules):
        if name.split(".")[0] in (*SIX, *ROOMS):
            monkeypatch.delitem(sys.modules, name)
    elsewhere = [folder for folder in sys.path if Path(folder).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_fork_of_the_six_files_trains_answers_and_merges(fork, as_program, capsys):
    records.write_folder(fork / "set", [
        example for split, count in (("train", 6), ("validation", 2), ("test", 2))
        for example in scenes.make_world("single", split, count)])
    small = "--data set --steps 2 --batch 2 --lora_rank 2 --device cpu --workers 0"
    for method in ("sft", "pearl"):
        as_program("train.py", "--method", method, "--out", method, *small.split())
        assert "direct" in capsys.readouterr().out
    as_program("evaluate.py", "pearl")
    assert "crop" in capsys.readouterr().out
    as_program("train.py", "--merge", "pearl", "merged")
    assert (fork / "merged" / "config.json").is_file()
    assert sys.modules["train"].__file__ == str(fork / "train.py")
    for words, room in (("--method ema", "baselines"), ("--out none --device cpu", "world")):
        with pytest.raises(SystemExit, match=f"error: there is no folder {room}/ here"):
            as_program("train.py", *words.split())
