"""Claims: a run equals plain loops over AdamW's formula; resumed, it ends as the uninterrupted one,
bit for bit; the best checkpoint answers at the end, without its predictor."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

import evaluate
import baselines
import train
from model import VLM
from support import run
from support.files import read_json, write_json
from world import loader
from conftest import TINY, assert_close, build, log_of, merged_weights, train_until


def small(out, method="pearl", **options):
    return train.config_class(method)(**dict(
        method=method, device="cpu", steps=4, batch=2, train_examples=6, test_per_task=1,
        eval_every=2, lora_rank=2, out=str(out)) | options)


def weights_of(config):
    return run.read_state(Path(config.out) / "state.safetensors")["weights"]


def trained_like(config):
    """The weights and losses of the same run, in plain loops."""
    torch.manual_seed(config.seed)
    method = train.Pearl(VLM(TINY), config).train()
    dataset = train.dataset(method, loader.examples("single", "train", 6), "train")
    weights = {n: p for n, p in method.named_parameters() if p.requires_grad}
    means, squares = (dict.fromkeys(weights, 0) for _ in range(2))
    order, generator = [], torch.Generator().manual_seed(config.seed)
    size, history = config.batch * config.accumulate, []
    for step in range(1, config.steps + 1):
        while len(order) < size:
            order += torch.randperm(len(dataset), generator=generator).tolist()
        rows, order = order[:size], order[size:]
        rows.sort(key=lambda row: len(dataset[row].views.full.ids))
        passes = [rows[n:n + config.batch] for n in range(0, size, config.batch)]
        loss = sum(method(dataset.micro_batches(part, 9)[0]).total for part in passes) / len(passes)
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
    return {name: p.detach() for name, p in weights.items()}, history


def test_a_run_equals_plain_loops(tmp_path, as_program, capsys):
    config, out = small(tmp_path / "run", accumulate=2), tmp_path / "run"
    as_program(train.__file__, *(word for name, value in dataclasses.asdict(config).items()
                                 for word in (f"--{name}", value)))
    expected, history = trained_like(config)
    torch.testing.assert_close(weights_of(config), expected, rtol=1e-3, atol=2e-5)
    lines = [line for line in log_of(out) if line["kind"] == "train"]
    for line, plain in zip(lines, history, strict=True):
        assert {name: line[name] for name in plain} == pytest.approx(plain, rel=1e-3, abs=1e-9)
    # at its end: the questions asked again of the best checkpoint, loaded as a user loads it; the
    # predictor is not even opened
    results, best = read_json(out / "results.json"), read_json(out / "best.json")
    (out / best["checkpoint"] / "predictor.safetensors").write_bytes(b"not a predictor")
    vlm, saved, ways = evaluate.load_model(out, "cpu")
    evaluator = evaluate.Evaluator(vlm, loader.questions("single", 1), saved.answer_prefix)
    assert evaluate.answer_questions(evaluator, ways=ways) == results["answers"]
    assert results["best"] == best and not vlm.training
    minutes = f"({results['train_seconds'] / 60:.1f} minutes); best checkpoint: step {best['step']}"
    assert f"before and after 4 steps {minutes}" in capsys.readouterr().out
    # a finished run's table has its stored answers, unless other questions are asked for
    results["answers"][0]["free"] = "stored"
    write_json(out / "results.json", results)
    for more in ("", "--device cpu", "--again --per_task 1", "--split validation --per_task 1"):
        as_program(evaluate.__file__, out, "--json", tmp_path / "a.json", *more.split())
        assert "tallest (held out)" in capsys.readouterr().out
        answers = read_json(tmp_path / "a.json")["answers"]
        assert (answers[0]["free"] == "stored") == (more in ("", "--device cpu"))
    assert all("-validation-" in answer["id"] for answer in answers)
    # an ordinary checkpoint, which transformers loads
    as_program(train.__file__, "--merge", out, tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert_close(merged.state_dict(), merged_weights(vlm))
    with pytest.raises(ValueError, match="--merge RUN DIR"):
        run.merge(train.VLM, str(out))


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, as_program):
    # the questions before and after change nothing here
    monkeypatch.setattr(evaluate, "answer_questions", lambda *_, **__: [])
    monkeypatch.setattr(evaluate, "report", lambda *_: None)
    # with workers and without; both methods have buffers, a mean and a teacher
    whole, parts = (small(tmp_path / str(n), "dropout+running_mean+ema", steps=3, workers=n)
                    for n in (0, 2))
    train.train(whole)
    train_until(parts, 2)
    # the log forgets what came after the state
    with (tmp_path / "2" / "log.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 3}\n{"st')
    as_program(train.__file__, "--resume", parts.out)
    assert log_of(parts.out) == log_of(whole.out)
    torch.testing.assert_close(weights_of(parts), weights_of(whole), rtol=0, atol=0)


def test_validation_weighs_each_record_alike(vlm64):
    """Five records in passes of two: the last pass has one."""
    records = loader.examples("multi", "validation", 5)
    method, _ = build(vlm64, "pearl", records, batch=2)
    dataset = train.dataset(method.train(), records, "validation")
    metrics = train.validate(method, dataset)
    assert method.training and not method.eval().training
    results = [method(dataset.micro_batches(rows, 2)[0]) for rows in ([0, 1], [2, 3], [4])]
    assert metrics == pytest.approx(train.losses.average(results, [2, 2, 1]), rel=1e-6)


def test_the_default_run_is_the_one_of_the_readme():
    assert dataclasses.asdict(train.parse_config(["--device", "cpu"])) == dict(
        method="pearl", model=TINY, data="", regime="single", answer_prefix="Answer:",
        skip_bad=False, out="runs/pearl-single-seed0", seed=0, device="cpu", dtype="float32",
        lambda_latent=5.0, pred_tokens=4, distance="cosine", horizon=1, steps=200, batch=32,
        accumulate=1, lr=1e-3, lora_rank=64, train_vision=False, gradient_checkpointing=False,
        shard=False, workers=-1, min_pixels=0, max_pixels=0, train_examples=1500, test_per_task=120,
        eval_every=50)


def test_help_is_short_for_every_method_and_bad_options_are_named(capsys):
    for name in baselines.METHODS:
        with pytest.raises(SystemExit, match="0"):
            train.parse_config(["--method", name, "--help"])
        assert 0 < capsys.readouterr().out.count("\n") <= (60 if name == "pearl" else 70), name
    for words, message in (("--method centred --sample 0", "--sample must be at least 1, not 0"),
                           ("--device nowhere", "--device nowhere: PyTorch has no such device on")):
        with pytest.raises(SystemExit):
            train.parse_config(words.split())
        assert message in capsys.readouterr().err
