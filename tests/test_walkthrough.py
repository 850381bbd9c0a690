"""Claims: on docs/walkthrough.md every line of code stands in the file that it names, one after the
other; the record, the view and every number of the text are what the shipped model gives."""

import json
import math
import re

import pytest
import torch

import train
from analysis.token_view import Printer
from evaluate import Answerer
from support import packing
from support.options import Config
from support.records import write_folder
from test_style import ROOT
from world.scenes import make_world

PAGE = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
TEXT = re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE)
# a section's numbers: not those of equations, of names (I0) and in quoted code
SECTIONS = {part.partition("\n")[0]: re.findall(
    r"(?<![\w.,^])\d+(?:,\d{3})*(?:\.\d+)?",
    re.sub(r"`[^`]*`|Eq\. \d", "", part.partition("\n")[2]))
    for part in re.split(r"^##? ", TEXT, flags=re.MULTILINE)[1:]}


def code_lines(text):
    """Without blank lines and comments of their own, indentation left off."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "python"])
def test_code_stands_in_its_file(block):
    name = re.match(r"# (\S+\.py)\n", block)[1]
    there, at = code_lines((ROOT / name).read_text(encoding="utf-8")), 0
    for piece in re.split(r"^\.\.\.$", block, flags=re.MULTILINE):
        lines = code_lines(piece)
        at = next((n for n in range(at, len(there)) if there[n:n + len(lines)] == lines), None)
        assert at is not None, f"{name} does not have, behind the lines before: {lines}"
        at += len(lines)


@pytest.fixture(scope="module")
def config():
    return Config(device="cpu")


@pytest.fixture(scope="module")
def example(config):
    return make_world(config.regime, "train", 1, config.world_seed)[0]


def test_the_record(example, tmp_path):
    write_folder(tmp_path / "folder", [example])
    line = (tmp_path / "folder" / "trajectories.jsonl").read_text(encoding="utf-8")
    [shown] = [text for kind, text in BLOCKS if kind == "json"]
    assert json.loads(shown) == json.loads(line)


@pytest.fixture(scope="module")
def made(config, example):
    """The step of the page, before it is taken: (train.Step, optimiser, the VLM's own numbers)."""
    vlm = train.VLM(config.model)
    own, examples = sum(p.numel() for p in vlm.parameters()), train.prepared([example], vlm, config)
    torch.manual_seed(0)
    step = train.trainable(vlm, examples, config)
    trained = [p for p in step.parameters() if p.requires_grad]
    return step, torch.optim.AdamW(trained, lr=config.lr), own


def test_the_view(made, config):
    [shown] = [text for kind, text in BLOCKS if kind == "text"]
    lines = "\n".join(Printer(made[0].examples, 0, config).lines())
    assert lines.startswith("\n" + shown)


@pytest.fixture(scope="module")
def taken(made, config):
    """The step is taken: by name what these functions gave, each time that they were called; the
    result and the gradient's norm; and the losses of the same record afterwards."""
    step, optimizer, _ = made
    seen = {}

    def watched(owner, name):
        function, seen[name] = getattr(owner, name), []

        def call(*args, **kwargs):
            seen[name].append(function(*args, **kwargs))
            return seen[name][-1]
        return call

    with pytest.MonkeyPatch.context() as patched:
        for owner, name in ((step.vlm, "embed"), (step.vlm, "forward"), (step.vlm, "logits"),
                            (step.predictor.latent, "forecasts")):
            patched.setattr(owner, name, watched(owner, name))
        seen["result"], seen["norm"] = train.train_step(step, optimizer, [0], config)
    seen["after"] = step([0]).parts
    return seen


@pytest.fixture(scope="module")
def numbers(made, config, example, taken):
    """Of each section the numbers in the order of its text, from the model."""
    return before_the_losses(made[0], config, example, taken) | \
        of_the_losses(made[0], config, made[2], taken) | of_the_answer(made[0], example, taken)


def before_the_losses(step, config, example, taken):
    vlm, examples, (full, _, target) = step.vlm, step.examples, step.examples.views[0]
    batch = packing.add_branches(train.data.collate([full], vlm.pad_id), [examples.views[0]])
    shared, pred = int(batch.shared[0]), config.pred_tokens
    assert examples.views[0].input.ids[:shared] == full.ids[:shared]
    assert target.ids == full.ids[-len(target.ids):]
    patch, merge = vlm.family.processor.patch_size, vlm.family.processor.merge_size
    pixels = [examples.store.inputs(i)["pixel_values"].shape for i in full.images]
    features = [image.features[0].shape for image in examples.store.encoded(full.images).values()]
    image_tokens = full.ids.count(vlm.lm.config.image_token_id)
    inputs, states = taken["embed"][0], taken["forward"][0].states
    positions = inputs["position_ids"][0, 0, -pred:].tolist()
    return {
        "One step, with its numbers": [config.seed, config.batch, len(batch.ids)],
        "The record": [*example.images[0].size, *example.images[1].size],
        "Three views": [len(full.ids), image_tokens, supervised(full), shared, pred,
                        len(target.ids)],
        "Images, once": [patch, patch, 3, *pixels[0], merge, merge, *features[0], *pixels[1],
                         *features[1]],
        "One forward pass": [
            shared, *batch.ids.shape, pred, image_tokens, pred, *inputs["attention_mask"].shape,
            positions[0], positions[-1], *states.shape, *taken["result"].pair[0].shape]}


def supervised(view):
    return sum(label != -100 for label in view.labels)


def of_the_losses(step, config, own, taken):
    (full, _, target), (logits,) = step.examples.views[0], taken["logits"]
    [[(forecast, at)]], (predicted, h_r) = taken["forecasts"], taken["result"].pair
    assert int(at.sum()) == supervised(full)
    vlm, jepa, nextlat, total = (float(taken["result"].parts[name])
                                 for name in ("vlm", "jepa", "nextlat", "loss"))
    return {
        "Eq. 3: say what the expert said": [
            supervised(full), *logits.shape, vlm, logits.shape[1], math.log(logits.shape[1])],
        "Eq. 1: predict the trajectory's embedding": [
            1, len(target.ids), *h_r.shape, float(torch.cosine_similarity(predicted, h_r)), jepa],
        "Eq. 2: forecast the next state": [supervised(full), *forecast.shape, nextlat],
        "Eq. 4, and the step": [
            vlm, config.lambda_latent, jepa, nextlat, total, float(taken["norm"]), config.clip,
            sum(p.numel() for p in step.vlm.parameters() if p.requires_grad),
            sum(p.numel() for p in step.predictor.parameters()), config.lr, own,
            *(float(taken["after"][name]) for name in ("vlm", "jepa", "nextlat", "loss"))]}


def of_the_answer(step, example, taken):
    """Asked after the step, so `taken` comes first."""
    questions = Answerer(step.vlm.eval(), [example])
    [direct], [(begun, options)], [asked] = questions.direct(), questions.begun, questions.prompts
    assert f'says "{direct["text"]}"' in TEXT and direct["text"] == example.answer
    full, question, _ = step.examples.views[0]
    assert asked.ids == question.ids[:-len(question.inject_at)] == full.ids[:len(asked.ids)]
    [ends] = {len(option) for option in options}
    return {"From question to answer": [len(asked.ids), len(begun.ids) - len(asked.ids),
                                        len(options), ends, direct["passes"]]}


@pytest.mark.parametrize("section", list(SECTIONS))
def test_numbers(section, numbers):
    found, want = SECTIONS[section], numbers[section]
    assert len(found) == len(want), f"{found} on the page, {want} from the model"
    for text, value in zip(found, want):
        unit = 10.0 ** -len(text.partition(".")[2])  # of the last digit that the page gives
        assert abs(float(text.replace(",", "")) - value) < 0.51 * unit, (text, value)
