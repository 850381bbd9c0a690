"""Claims: the six files, support/ and tiny-vlm/ alone are enough; the README's Python lines run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import train
from support import records
from world import scenes

ROOT = Path(train.__file__).resolve().parent
SIX = ("losses", "predictor", "data", "model", "train", "evaluate")

# one process runs all the programs, because importing torch takes longer than they do
DRIVER = f"""
import runpy, sys
for line in sys.stdin:
    sys.argv = line.split()
    # nothing of the program before may stay
    for name in [name for name in sys.modules if name.split('.')[0] in {(*SIX, "support")}]:
        del sys.modules[name]
    sys.path[0] = '.'
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as end:
        print('ended with', end.code)
    print('----')
"""


def test_a_fork_of_the_six_files_trains_answers_and_merges(tmp_path):
    for name in SIX:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    for name in ("support", "tiny-vlm"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    records.write_folder(tmp_path / "set", [
        example for split, count in (("train", 6), ("validation", 2), ("test", 2))
        for example in scenes.make_world("single", split, count)])
    small = "--data set --steps 2 --batch 2 --lora_rank 2 --device cpu --workers 0"
    programs = [f"train.py --method pearl --out pearl {small}", "evaluate.py pearl",
                "train.py --merge pearl merged", f"train.py --method sft --out sft {small}",
                "train.py --method ema --out none", "train.py --steps 1 --out none --device cpu"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", DRIVER], input="\n".join(programs), cwd=tmp_path,
                          env=env, capture_output=True, encoding="utf-8", check=False)
    trained, table, merged, sft, *missing = done.stdout.split("----\n")[:-1]
    assert "direct" in trained and "direct" in sft and "crop" in table, done.stderr
    assert (tmp_path / "merged" / "config.json").is_file() and "AutoProcessor" in merged
    for text, room in zip(missing, ("baselines", "world"), strict=True):
        assert f"ended with error: there is no folder {room}/ here" in text, done.stdout
    assert "Traceback" not in done.stderr


def test_the_readmes_python_lines_run(tmp_path, monkeypatch, capsys):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["pearl"].predictor.pred_embeddings.grad.any()
    assert capsys.readouterr().out.split()[-1] in names["records"][0].options
