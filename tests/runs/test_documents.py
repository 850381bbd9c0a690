"""Claims: the documents' commands are understood, and their links lead to files."""

import re
import shlex
from pathlib import Path

import pytest

import baselines
import evaluate
import train
from analysis import study

ROOT = Path(train.__file__).resolve().parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/*.md"))]
COMMAND = re.compile(r"(?:python|torchrun --nproc-per-node=\w+) ([\w/-]+\.py)((?: [^`\n#&;|]*)?)")
OPTIONS = {name for method in baselines.METHODS
           for name in train.config_class(method).__dataclass_fields__}


def options_of(script: str) -> set[str]:
    """The options of a program, as its source names them, and those that it hands on."""
    source = (ROOT / script).read_text(encoding="utf-8")
    names = set(re.findall(r'"(?:--)?([a-z]\w+)"|^    (\w+): \w+ = option', source, re.MULTILINE))
    handed_on = (OPTIONS if "config" in source and script != "evaluate.py" else set()) | (
        evaluate.Options.__dataclass_fields__.keys() if "evaluate" in script + source else set())
    return handed_on | {"help"}.union(*names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_commands_are_understood(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")  # commands of several lines
    common = re.search(r'COMMON="(.*?)"', text)
    for script, rest in COMMAND.findall(text):
        rest = rest.replace("$COMMON", common[1] if common else "").replace("...", "")
        for placeholder, value in (("M*N", "2"), ("NAME", "ema"), ("[", ""), ("]", "")):
            rest = rest.replace(placeholder, value)
        own, _, passed_on = rest.partition(" -- ")  # what study.py hands to train.py
        words = own.split()
        if script == "train.py" and not {"--resume", "--merge", "--help"} & set(words):
            train.parse_config(words)
        elif script == "analysis/study.py":
            study.plan(study.parse_args(shlex.split(rest)))
        elif (ROOT / script).is_file():
            words_used = {word.split("=")[0][2:] for word in words if word.startswith("--")}
            assert words_used <= options_of(script), (script, words_used - options_of(script))
        else:
            assert script.endswith("x.py"), script
        train.parse_config(re.sub(r"--arms.*?(?=--|$)", "", passed_on).split())


def test_links_lead_to_files():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), (page, link)
