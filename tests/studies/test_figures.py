"""Claims: the figures' numbers equal hand-computed ones; every figure is drawn from finished runs;
runs of several data sets are refused, and so is a name that exists. What draws is skipped where
matplotlib or scikit-learn is missing."""

import sys

import pytest
import torch
from PIL import Image

import train
from analysis import figures
from model import VLM
from support import run, splits
from support.files import read_json, write_json
from world import scenes


def test_probes_and_separation_by_hand():
    pytest.importorskip("sklearn")
    # unit vectors at 0, 0 and 90, 90 degrees: distance 0 within a group, 1 between groups
    points = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert figures.separation(points, ["a", "a", "b", "b"]) == pytest.approx(1)
    assert figures.separation(points, ["a"] * 4) == 0
    torch.manual_seed(0)
    x = torch.randn(300, 8)
    assert figures.probe(x, [str(bool(v > 0)) for v in x[:, 2]]) > 0.9
    assert figures.probe(x, x[:, :2] * 3 + 1) > 0.95 and figures.probe(x, torch.randn(300, 2)) < 0.2


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A recon and a Pearl run as train.py leaves them, untrained, with two validations."""
    folders, folder = [], tmp_path_factory.mktemp("study")
    for name in ("recon", "pearl"):
        config = train.config_class(name)(method=name, device="cpu", lora_rank=4)
        method, out = train.find_method(name)(VLM(config.model), config), folder / f"{name}-seed0"
        out.mkdir()
        run.save_best(out, method, 1, {})
        answers = [dict(task="crop", options=["a", "b"], direct_right=n == 0) for n in range(4)]
        write_json(out / "config.json", vars(config))
        write_json(out / "results.json", dict(answers=answers, before=answers))
        for step, (direct, tool) in enumerate(((0.5, 0.25), (0.4, float("nan"))), start=1):
            run.log(out, "valid", dict(step=step, direct=direct, tool=tool, loss=1.0))
            run.log(out, "train", dict(step=step, lr=1e-3))
        folders.append(out)
    return folders


def test_curves_show_what_was_logged_in_a_new_file(runs, tmp_path, monkeypatch):
    out = tmp_path / "curves.png"
    monkeypatch.setattr(sys, "argv", ["figures.py", "--out", str(out), "--curves", *map(str, runs)])
    with monkeypatch.context() as patch:
        patch.setattr(figures.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ValueError, match="pip install matplotlib scikit-learn"):
            figures.main()
    pytest.importorskip("matplotlib")
    log, named = figures.logged(runs[0]), {out.name: out for out in runs}
    assert log["valid: direct"] == [(1, 0.5), (2, 0.4)] and log["valid: tool"] == [(1, 0.25)]
    titles = [axis.get_title() for axis in figures.curves(named).axes]
    assert titles[:4] == ["valid: direct", "valid: loss", "valid: tool", "train: lr"]
    figures.main()
    assert Image.open(out).width > 1000
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        figures.main()


def test_all_figures_of_two_runs(runs, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    world = scenes.make_world("mixed", "test", 10)
    records = [world, world[:2], world[:6]]
    monkeypatch.setattr(splits, "load_splits", lambda config: records)
    monkeypatch.setattr(figures, "COUNTS", [0, 1, 2, 4])
    # with n latents n answers are right
    monkeypatch.setattr(figures.reconstruction, "answer", lambda evaluator, scale, count: [
        dict(text=f"Answer: {ex.answer if n < count else ''}")
        for n, ex in enumerate(evaluator.examples)])
    figures.all_figures(runs, tmp_path / "out", 3)
    assert {file.stem for file in (tmp_path / "out").glob("*.png")} == {
        "latents-per-example", "latents-decoded", "embeddings", "curves"}
    numbers = read_json(tmp_path / "out" / "analyses.json")
    assert "nan" not in str(numbers) and numbers["latents per example"]["single"]["median"] == 16
    assert list(numbers["latents decoded"]["accuracy"].values()) == pytest.approx(
        [0, 100 / 6, 200 / 6, 400 / 6])
    assert numbers["latents decoded"]["pearson_r"] == pytest.approx(0.982, abs=1e-3)
    known = numbers["what the embedding knows"]
    # an untrained method reads R as the starting model does
    assert list(known) == ["no fine-tuning", str(runs[1])]
    assert known[str(runs[1])]["h_R"] == known["no fine-tuning"]["h_R"]
    records[2] = world[:5]
    with pytest.raises(ValueError, match="5 test questions have a trajectory with images"):
        figures.all_figures(runs, tmp_path / "few", 3)
    one, other = (figures.config_of(runs[1], "cpu") for _ in range(2))
    other.data = "mine"
    monkeypatch.setattr(figures, "config_of", lambda *_, configs=[one, other]: configs.pop())
    with pytest.raises(ValueError, match="were trained on different data"):
        figures.all_figures(runs, tmp_path / "new", 3)
