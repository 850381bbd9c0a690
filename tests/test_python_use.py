"""Claims: the lines of README.md run as they stand there, are at most twenty, compute the
losses of the three views, move what trains and nothing else, and answer the question."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

PAGE = Path(__file__).resolve().parent.parent / "README.md"
[CODE] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_lines_of_the_page_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (128, 128), "grey").save("scene.png")
    Image.new("RGB", (20, 20), "red").save("crop.png")
    lines = [line for line in CODE.splitlines() if line.strip()]
    assert len(lines) <= 20
    split = lines.index("losses = step([0])  # of row 0: Eq. 3, 1, 2 and their total, Eq. 4")
    torch.manual_seed(0)
    names = {}
    exec("\n".join(lines[:split]), names)
    before = {name: p.detach().clone() for name, p in names["step"].named_parameters()}
    exec("\n".join(lines[split:]), names)

    parts = {name: float(value) for name, value in names["losses"].parts.items()}
    assert parts["loss"] == pytest.approx(
        parts["vlm"] + names["config"].lambda_latent * (parts["jepa"] + parts["nextlat"]))
    assert all(value > 0 for value in parts.values())
    moved = {name for name, p in names["step"].named_parameters()
             if not torch.equal(p, before[name])}
    assert all("lora_" in name or name.startswith("predictor.") for name in moved)
    assert "predictor.pred_tokens" in moved and any("lora_B" in name for name in moved)
    said = capsys.readouterr().out.split()[-1]
    assert said in names["example"].options
    assert sorted(file.name for file in tmp_path.iterdir()) == ["crop.png", "scene.png"]
