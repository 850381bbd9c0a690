"""Claims: the analyses' numbers equal hand-computed ones; the study plans, skips what is done, keeps what was interrupted; its
figures are drawn from its runs; the benchmark's release variant has the losses of the ordinary pass; Pearl's memory is SFT's."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import data
import train
from world import scenes

ROOT = Path(data.__file__).parent
sys.path.insert(0, str(ROOT / "analysis"))
import benchmark  # noqa: E402
import figures  # noqa: E402
import study  # noqa: E402
import targets  # noqa: E402


def test_pearson_separation_and_probe_by_hand():
    assert figures.pearson([1, 2, 3, 4], [2, 4, 6, 8]) == pytest.approx(1)
    assert figures.pearson([0, 1, 2], [1, 0, 1]) == pytest.approx(0)
    # unit vectors at 0, 0 and 90, 90 degrees: distance 0 within, 1 between: silhouette 1; mixed groups: within 1 at half, between 0 and 1
    points = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert figures.separation(points, ["a", "a", "b", "b"]) == pytest.approx(1)
    assert figures.separation(points, ["a", "b", "a", "b"]) == pytest.approx(-0.5)
    torch.manual_seed(0)
    x = torch.randn(300, 8)
    assert figures.probe(x, (x[:, 2] > 0).long()) > 0.9 and figures.probe(x, torch.randint(2, (300,))) < 0.7
    assert figures.probe(x, x[:, :2] * 3 + 1) > 0.99 and figures.probe(x, torch.randn(300, 2)) < 0.2


def test_shares_of_an_embedding_are_those_it_was_made_of():
    """Orthogonal parts of known size: what is common, what the family adds, what the answer adds, noise."""
    examples, rows = [], []
    for n in range(1200):
        family, answer = n % 2, n // 2 % 3
        rows.append(torch.zeros(8))
        for place, size in ((0, 3.0), (1 + family, 2.0), (3 + answer, 1.0), (6 + n // 6 % 2, 0.5)):
            rows[-1][place] = size
        examples.append(SimpleNamespace(family=f"family {family}", answer=f"{answer}"))
    h = torch.stack(rows)
    found = targets.shares(7 * h, examples)  # length does not matter
    total = 9 + 4 + 1 + 0.25
    assert found["common"] == pytest.approx((9 + 4 / 2 + 1 / 3 + 0.25 / 2) / total)  # each part's own mean is common too
    assert found["family"] == pytest.approx(4 / 2 / total) and found["answer"] == pytest.approx(2 / 3 / total)
    assert found["rest"] == pytest.approx(0.25 / 2 / total)
    assert 0 <= found["answer_by_chance"] < 0.02 * found["answer"]
    keep, dealt = [n for n in range(1200) if n % 4 != 3], set()  # families of two sizes
    for name in "abcdefgh":  # Python's own order of strings in a set differs from run to run
        renamed = [SimpleNamespace(family=examples[n].family[-1] + name, answer=examples[n].answer) for n in keep]
        dealt.add(round(targets.shares(h[keep], renamed)["answer_by_chance"], 9))
    assert len(dealt) == 1


def test_targets_of_the_shipped_model_tell_the_answer():
    said = targets.report(train.parse_config(["--train_examples", "150", "--device", "cpu"]))
    shares = [float(share) for share in re.findall(r"^  (\d\.\d+) (?:is|tells)", said, re.MULTILINE)]
    assert len(shares) == 4 and sum(shares) == pytest.approx(1, abs=0.003)
    assert shares[2] > 0.2 and "of tiny-vlm on 150 trajectories of mixed" in said.replace(f"{ROOT}/", "")


def test_tsne_keeps_clusters_together():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(40, 10) + 6 * torch.eye(10)[i] for i in range(3)])
    y = figures.tsne(x, perplexity=15, steps=300)
    nearest = torch.cdist(y, y).fill_diagonal_(torch.inf).argmin(1)
    assert (nearest // 40 == torch.arange(120) // 40).float().mean() > 0.95


def test_the_release_variant_computes_the_same_loss(vlm64, mixed, config):
    from test_train import setup
    predictor, examples = setup(vlm64, mixed[:4], config)
    released, _, _ = benchmark.release_losses(vlm64, predictor, examples, [0, 1, 2, 3], config)
    ours, _, _ = train.compute_losses(vlm64, predictor, examples, [0, 1, 2, 3], config)
    torch.testing.assert_close(released, ours)


def test_the_benchmark_prints_one_json_line(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), "--benchmark", "--device", "cpu", "--steps", "1", "--batch", "2",
                           "--train_examples", "4"],
                          capture_output=True, text=True, cwd=tmp_path)
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert {"sft_ms", "packed_ms", "plain_ms", "release_ms", "packed_over_sft"} <= numbers.keys() and not list(tmp_path.iterdir())


def test_memory_is_counted_by_hand():
    layer, x = torch.nn.Linear(100, 50, bias=False), torch.randn(8, 100)
    weights, given, hidden = 4 * 100 * 50, 4 * 8 * 100, 4 * 8 * 50
    with benchmark.LiveTensors() as count:
        start = count.now
        assert start >= weights + given
        hidden_state = layer(x)
        assert (count.now, count.peak) == (start + hidden,) * 2
        hidden_state.view(-1), hidden_state.mul_(2)  # a view and an operation in place take nothing
        assert count.peak == start + hidden
        hidden_state.sum().backward()
        assert count.peak >= start + hidden + weights  # the gradient
        layer.weight.grad = None
        del hidden_state
    assert count.now == start


def test_a_step_of_pearl_takes_about_the_memory_of_a_step_of_sft(vlm64, mixed, config):
    from test_train import setup
    predictor, examples = setup(vlm64, mixed * 2, config)

    def peak(extra, **settings):  # above what is there before the step
        settings = dataclasses.replace(config, **settings)
        train.compute_losses(vlm64, extra, examples, list(range(20)), settings)  # caches the images' features
        with benchmark.LiveTensors() as count:
            start = count.now
            train.compute_losses(vlm64, extra, examples, list(range(20)), settings)[0].backward()
        vlm64.zero_grad(), predictor.zero_grad()
        return count.peak - start

    sft = peak(None)
    assert peak(predictor) < 1.06 * sft  # 1.09 if the pass for the target came while the graph of the other is held
    assert peak(predictor, packed=False) > 1.2 * sft and peak(predictor, nextlat_view="trajectory") > 1.2 * sft


@pytest.mark.parametrize("size, parameters", [("3B", 3_754_622_976), ("7B", 8_292_166_656)])
def test_the_random_models_have_the_true_sizes(size, parameters):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(benchmark.true_config(size))
    assert model.num_parameters() == parameters


SMALL = ["--device", "cpu", "--steps", "2", "--batch", "4", "--train_examples", "10", "--valid_examples", "6",
         "--test_per_family", "1", "--eval_every", "1", "--track", "5", "--lora_rank", "4"]


def test_a_small_study_from_runs_to_figures(tmp_path):
    out = tmp_path / "study"
    command = [sys.executable, str(ROOT / "analysis" / "study.py"), "--out", str(out), "--arms", "sft", "recon", "pearl",
               "--regimes", "mixed", "--seeds", "0", "--jobs", "2", "--", *SMALL]
    (out / "tiny-vlm" / "mixed" / "sft-seed0").mkdir(parents=True)
    (out / "tiny-vlm" / "mixed" / "sft-seed0" / "log.jsonl").write_text("interrupted")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = out / "tiny-vlm" / "mixed"
    assert (folder / "sft-seed0.interrupted-1" / "log.jsonl").read_text() == "interrupted"
    rows = {row["system"]: row for row in json.loads((out / "tiny-vlm" / "mixed.json").read_text())}
    assert list(rows) == ["no fine-tuning", "sft", "sft + tools", "recon", "pearl"]
    assert rows["pearl"]["cost"]["passes"] == rows["no fine-tuning"]["cost"]["passes"] == 2  # inference costs what the base model's does
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout.count("done before") == 3
    done = subprocess.run([sys.executable, str(ROOT / "analysis" / "figures.py"), str(folder), "--per_family", "1",
                           "--count", "30"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("latents-per-example", "latents-decoded", "embeddings", "skill", "curves", "neighbours"):
        assert Image.open(folder / "figures" / f"{name}.png").width > 500
    numbers = json.loads((folder / "figures" / "analyses.json").read_text())
    assert set(numbers["what the embedding knows"]) == {"no fine-tuning", "sft", "pearl"}


def test_the_plan_has_every_system_in_every_regime_and_refuses_unknown_arms(tmp_path):
    import argparse
    args = argparse.Namespace(out=tmp_path, base="tiny-vlm", arms=None, regimes=list(scenes.REGIMES), seeds=[0, 1],
                              rest=["--steps", "3"])
    jobs = study.plan(args)
    assert len(jobs) == 2 * (4 * len(study.SYSTEMS) + len(study.ABLATIONS)) and len({out for out, _ in jobs}) == len(jobs)
    for out, options in jobs:  # every option is one of train.py's
        config = train.parse_config(options)
        assert config.out == str(out) and config.steps == 3
    with pytest.raises(ValueError, match="unknown arm 'best'"):
        study.plan(argparse.Namespace(**{**vars(args), "arms": ["best"]}))


def test_the_picture_of_the_views(tmp_path):
    assert subprocess.run([sys.executable, str(ROOT / "analysis" / "figures.py"), "--views",
                           str(tmp_path / "views.png")]).returncode == 0
    assert Image.open(tmp_path / "views.png").width > 1000
