"""Claims: a run equals plain loops over AdamW's formula; a run that was stopped and resumed ends
with the same log and weights, bit for bit, with any number of workers; validation weighs each
record alike; the best checkpoint answers at the end."""

import dataclasses
import json
import math

import pytest
import torch

import data
import evaluate
import train
from conftest import TINY, build
from model import VLM
from support import processes, run
from support.files import read_json
from world import loader


def small(out, method="pearl", **options):
    return train.config_class(method)(**dict(
        method=method, device="cpu", steps=4, batch=2, train_examples=6, test_per_task=1,
        eval_every=2, lora_rank=2, out=str(out)) | options)


def log_of(out):
    """The lines of the log without their times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("ms", "waited")}
            for line in lines]


def weights_of(out):
    state = run.read_state(out / "state.safetensors")
    assert state["step"] == 4
    return state["weights"]


def trained_like(config):
    """The weights and losses of the same run, told in plain loops."""
    torch.manual_seed(config.seed)
    method = train.Pearl(VLM(TINY), config).train()
    dataset = train.dataset(method, loader.examples("single", "train", 6), "train")
    weights = {n: p for n, p in method.named_parameters() if p.requires_grad}
    means, squares = ({n: torch.zeros_like(p) for n, p in weights.items()} for _ in range(2))
    order, generator = [], torch.Generator().manual_seed(config.seed)
    size, history = config.batch * config.accumulate, []
    for step in range(1, config.steps + 1):
        while len(order) < size:
            order += torch.randperm(len(dataset), generator=generator).tolist()
        rows, order = order[:size], order[size:]
        rows.sort(key=lambda row: len(dataset[row].views.full.ids))
        passes = [rows[n:n + config.batch] for n in range(0, size, config.batch)]
        loss = sum(method(dataset.passes(part, 9)[0]).total for part in passes) / len(passes)
        grads = dict(zip(weights, torch.autograd.grad(loss, weights.values())))
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        # the first twentieth of the steps rises, then half a cosine falls to zero
        rate = config.lr * (0 if step == 1 else 0.5 + 0.5 * math.cos(math.pi * (step - 2) / 3))
        for name, p in weights.items():
            grad = grads[name] / max(1.0, norm)
            means[name] = 0.9 * means[name] + 0.1 * grad
            squares[name] = 0.999 * squares[name] + 0.001 * grad ** 2
            m, v = means[name] / (1 - 0.9 ** step), squares[name] / (1 - 0.999 ** step)
            p.data -= rate * m / (v.sqrt() + 1e-8)
        history.append(dict(step=step, loss=loss.item(), lr=rate, grad_norm=norm))
    return weights, history


def test_a_run_equals_plain_loops(tmp_path, capsys):
    config = small(tmp_path / "run", accumulate=2)
    train.train(config)
    expected, history = trained_like(config)
    found = weights_of(tmp_path / "run")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight.detach(), rtol=1e-3, atol=2e-5)
    lines = [line for line in log_of(tmp_path / "run") if line["kind"] == "train"]
    for line, plain in zip(lines, history, strict=True):
        assert {name: line[name] for name in plain} == pytest.approx(plain, rel=1e-3, abs=1e-9)
        assert {"vlm", "jepa", "nextlat", "r2", "retrieval"} < line.keys()
    # at its end: the table of the questions before and after, and every answer in a file
    results, best = read_json(tmp_path / "run/results.json"), read_json(tmp_path / "run/best.json")
    assert results["best"] == best and len(results["answers"]) == len(results["before"]) == 2
    shown = capsys.readouterr().out
    minutes = f"({results['train_seconds'] / 60:.1f} minutes); best checkpoint: step {best['step']}"
    assert "before and after 4 steps " + minutes in shown
    # the answers are those of the best checkpoint, loaded as a user loads it
    vlm, saved, ways = evaluate.load_model(tmp_path / "run", "cpu")
    evaluator = evaluate.Evaluator(vlm, loader.questions("single", 1), saved.answer_prefix)
    assert evaluate.answer_questions(evaluator, ways=ways) == results["answers"]
    assert not vlm.training and len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    with pytest.raises(ValueError, match="is finished"):
        run.read_config(train.config_class, [str(tmp_path / "run")])


@pytest.mark.parametrize("method, workers", [("pearl", (0, 1, 2)), ("dropout+ema+infonce", (0, 0))])
def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, method, workers):
    # questions before and after change nothing here
    monkeypatch.setattr(evaluate, "answer_questions", lambda *_, **__: [])
    monkeypatch.setattr(evaluate, "report", lambda *_: None)
    for n, count in enumerate(workers):
        config, stops = small(tmp_path / f"{n}", method, workers=count), iter([False, n > 0])
        with monkeypatch.context() as patch:
            patch.setattr(processes, "asked_to_stop", lambda *_, s=stops: next(s, False))
            train.train(config)
        if n:
            assert [line["step"] for line in log_of(tmp_path / f"{n}")][-1] == 2
            train.train(run.read_config(train.config_class, [config.out]), resume=True)
        assert log_of(tmp_path / f"{n}") == log_of(tmp_path / "0")
        for name, weight in weights_of(tmp_path / "0").items():
            assert torch.equal(weights_of(tmp_path / f"{n}")[name], weight), name


def test_validation_weighs_each_record_alike(vlm64):
    """Five records in passes of two: the last pass has one. Gauges are those of all five."""
    records = loader.examples("multi", "validation", 5)
    method, _ = build(vlm64, "pearl", records, batch=2)
    dataset = train.dataset(method.train(), records, "validation")
    found = train.validate(method, dataset)
    assert method.training and not method.eval().training
    parts = [method(dataset.passes(rows, 2)[0]).parts for rows in ([0, 1], [2, 3], [4])]
    for name in parts[0]:
        mean = sum(size * part[name] for size, part in zip((2, 2, 1), parts)) / 5
        assert found[name] == pytest.approx(float(mean), rel=1e-6)
    whole = method(dataset.passes([0, 1, 2, 3, 4], 5)[0])
    gauges = train.losses.collapse_gauges(*whole.pair)
    assert {name: found[name] for name in gauges} == pytest.approx(gauges, rel=1e-4)


def test_the_default_run_is_the_one_of_the_readme():
    config = dataclasses.asdict(train.parse_config([]))
    assert config["out"] == "runs/pearl-single-seed0" and config["model"] == TINY
    assert {name: config[name] for name in (
        "lambda_latent", "pred_tokens", "distance", "horizon", "steps", "batch", "accumulate",
        "lr", "lora_rank", "train_examples", "test_per_task", "eval_every")} == dict(
        lambda_latent=5.0, pred_tokens=4, distance="cosine", horizon=1, steps=200, batch=32,
        accumulate=1, lr=1e-3, lora_rank=64, train_examples=1500, test_per_task=120, eval_every=50)
    with pytest.raises(ValueError, match="unknown method 'perl': choose from .*pearl"):
        train.parse_config(["--method", "perl"])
    assert data.StepRows(5, 2, 0).start == 0
