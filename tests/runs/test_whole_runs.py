"""Claims about whole runs: the best checkpoint answers as plain transformers do; a run that was
interrupted ends as the uninterrupted one; several processes train as one."""

import dataclasses
import itertools
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

import evaluate
import train
from support import run
from support.files import read_json
from world import scenes
from conftest import log_of, train_until
from programs import Program, together

TINY_RUN = ["--device", "cpu", "--steps", "12", "--batch", "2", "--train_examples", "20",
            "--test_per_task", "1", "--eval_every", "3", "--lora_rank", "2", "--lr", "5e-3",
            "--method", "dropout+pearl"]


SHARED_RUN = [*TINY_RUN, "--accumulate", "4", "--steps", "3", "--method", "shuffled"]


def contents(out):
    """What a run must end with, bit for bit: weights, moments, log without times, answers."""
    return dict(state={name: t.numpy().tobytes()
                       for name, t in load_file(out / "state.safetensors").items()},
                log=log_of(out), best=read_json(out / "best.json"),
                answers=read_json(out / "results.json")["answers"],
                adapter=[p.read_bytes() for p in sorted(out.glob("checkpoint-*/*.safetensors"))],
                names=sorted(path.name for path in out.iterdir()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from beginning to end: its folder and config."""
    config = train.parse_config([*TINY_RUN, "--out", str(tmp_path_factory.mktemp("a") / "run")])
    return train.train(config), config


def test_the_run_folder_holds_what_the_docs_say(finished):
    out, config = finished
    best = read_json(out / "best.json")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "inputs.json", "environment.json", "before.json", "log.jsonl",
        "state.safetensors", "best.json", "results.json", best["checkpoint"]}
    assert {path.name for path in (out / best["checkpoint"]).iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "predictor.safetensors"}
    assert read_json(out / "config.json") == dataclasses.asdict(config)
    environment = read_json(out / "environment.json")
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert environment["threads"] == torch.get_num_threads() and environment["command"]
    lines = log_of(out)
    valid = {line["step"]: line["loss"] for line in lines if line["kind"] == "valid"}
    assert list(valid) == [3, 6, 9, 12] and best["step"] == min(valid, key=valid.get)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 13))
    for line in lines:
        total = line["vlm"] + config.lambda_latent * (line["jepa"] + line["nextlat"])
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert {"r2", "spread_pred", "effective_rank", "mean_cosine", "retrieval"} <= line.keys()


def test_the_merged_folder_answers_in_plain_transformers_as_the_run_does(finished, tmp_path):
    out, merged = finished[0], tmp_path / "merged"
    run.merge(train.VLM, out, merged)
    plain, tokenizer, processor = (kind.from_pretrained(merged) for kind in (
        AutoModelForImageTextToText, AutoTokenizer, AutoImageProcessor))
    vlm, _, _ = evaluate.load_model(out, "cpu")
    evaluator = evaluate.Evaluator(vlm, scenes.make_world("mixed", "test", 3))
    for example, question, answer in zip(evaluator.examples, evaluator.questions,
                                         evaluator.free(6)):
        ids = torch.tensor([question.prompt.ids])
        made = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
            mm_token_type_ids=(ids == plain.config.image_token_id).int(),
            **processor(images=[example.image], return_tensors="pt"))
        text = tokenizer.decode(made[0, ids.shape[1]:], skip_special_tokens=True)
        assert answer["text"] == text


def test_steps_without_a_finite_gradient_are_skipped_then_stop(tmp_path, monkeypatch, capsys):
    factors, forward = itertools.chain([1.0], itertools.repeat(float("nan"))), train.SFT.forward

    def broken(*args):
        result = forward(*args)
        factor = next(factors) if torch.is_grad_enabled() else 1.0
        return result._replace(total=result.total * factor)

    monkeypatch.setattr(train.SFT, "forward", broken)
    config = train.parse_config([*TINY_RUN, "--method", "sft", "--out", str(tmp_path / "run")])
    with pytest.raises(ValueError, match="five steps in a row"):
        train.train(config)
    assert capsys.readouterr().out.count("step skipped") == 5
    state = run.read_state(tmp_path / "run" / "state.safetensors")
    assert all(torch.isfinite(t).all() for t in state["weights"].values())


# ---- interruption, several processes ----


def test_a_run_interrupted_in_every_way_ends_as_the_uninterrupted_one(finished, tmp_path,
                                                                      as_program):
    """Killed at a random moment, asked to end by SIGTERM and by SIGINT, killed again."""
    out, moments = tmp_path / "run", []
    for number, step in ((signal.SIGKILL, 4), (signal.SIGTERM, 5), (signal.SIGINT, 8),
                         (signal.SIGKILL, 10)):
        begun = (out / "config.json").is_file()
        program = Program(*(["--resume", out] if begun else [*TINY_RUN, "--out", out]),
                          log=tmp_path / f"said-{step}")
        program.wait_for_step(step)
        if number == signal.SIGKILL:
            moments.append(random.uniform(0, 0.1))
            time.sleep(moments[-1])
        status = program.status(number)
        if number != signal.SIGKILL and status:
            assert status == -number, program.said()  # as signals do, so that `a && b` ends, too
            assert "saving after this step" in program.said() and "--resume" in program.said()
            assert step <= run.read_state(out / "state.safetensors")["step"] < 12
    if not (out / "results.json").is_file():
        as_program(train.__file__, "--resume", out)
    ended, whole = contents(out), contents(finished[0])
    for key, value in whole.items():
        assert ended[key] == value, (key, moments)


@pytest.fixture(scope="module")
def alone_trained(tmp_path_factory):
    """One process makes all four passes of a step; beside it a copy of its folder after two."""
    out = tmp_path_factory.mktemp("one") / "run"
    config = train.parse_config([*SHARED_RUN, "--out", str(out)])
    half = shutil.copytree(train_until(config, 2), out.with_name("half"))
    train.train(config, resume=True)
    return out, half


def test_sharding_wants_several_processes_and_frozen_weights(monkeypatch):
    with pytest.raises(ValueError, match="with torchrun and two or more"):
        train.train(train.Config(device="cpu", shard=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="with --lora_rank"):
        train.train(train.Config(device="cpu", shard=True, lora_rank=0))


@pytest.mark.parametrize("way", ["begun by two", "sharded", "begun by one"])
def test_two_processes_train_as_one(alone_trained, tmp_path, way):
    """The same passes, so the same weights. With --shard each process holds half of every frozen
    weight of the layers; a run that one process began is continued by two."""
    alone, half = alone_trained
    out = half if way == "begun by one" else tmp_path / "run"
    begin = ["--resume", half] if way == "begun by one" else [*SHARED_RUN, "--out", out]
    shard = ["--shard", "--gradient_checkpointing"] * (way == "sharded")
    together(*begin, *shard, log=tmp_path / "said", watched=bool(shard))
    one, two = (run.read_state(folder / "state.safetensors")["weights"] for folder in (alone, out))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=2e-5)
    one, two = (log_of(folder)[-1] for folder in (alone, out))
    assert two["kind"] == "valid" and two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    if shard:
        said = (tmp_path / f"said.{rank}" for rank in range(2))
        assert all("each process holds its share" in file.read_text("utf-8") for file in said)
        vlm, _, _ = evaluate.load_model(out, "cpu")
        assert evaluate.Evaluator(vlm, scenes.make_world("mixed", "test", 1)).direct()
