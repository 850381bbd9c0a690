"""Claims: on docs/walkthrough.md every line of code stands in the file that its block names, in the
order of the page; the record, the view and every number are what the shipped model gives."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

import train
from analysis.show import Printer
from evaluate import Evaluator
from support import packing
from support.records import write_folder
from world import loader

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
TEXT = re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE)
# the numbers of each section, without those of equations, of names (I0) and in quoted code
SECTIONS = {part.partition("\n")[0]: re.findall(
    r"(?<![\w.,^])-?\d+(?:,\d{3})*(?:\.\d+)?",
    re.sub(r"`[^`]*`|Eq\. \d", "", part.partition("\n")[2]))
    for part in re.split(r"^##? ", TEXT, flags=re.MULTILINE)[1:]}
CONFIG = train.Config(device="cpu")
EXAMPLE = loader.examples(CONFIG.regime, "train", 1)[0]


def code_lines(text):
    """Without indentation, blank lines and comments of their own."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "python"])
def test_code_stands_in_its_file(block):
    name = re.match(r"# (\S+\.py)\n", block)[1]
    there, at = code_lines((ROOT / name).read_text(encoding="utf-8")), 0
    for piece in re.split(r"^\.\.\.$", block, flags=re.MULTILINE):
        lines = code_lines(piece)
        at = next((n for n in range(at, len(there)) if there[n:n + len(lines)] == lines), None)
        assert at is not None, f"{name} does not have, after the lines before: {lines}"
        at += len(lines)


def test_the_record(tmp_path):
    write_folder(tmp_path / "folder", [EXAMPLE])
    line = (tmp_path / "folder" / "trajectories.jsonl").read_text(encoding="utf-8")
    (shown,) = [text for kind, text in BLOCKS if kind == "json"]
    assert json.loads(shown) == json.loads(line)


def test_the_view(shipped):
    (shown,) = [text for kind, text in BLOCKS if kind == "text"]
    lines = "\n".join(Printer(train.Pearl, CONFIG, shipped.family, EXAMPLE).lines())
    assert lines.startswith("\n" + shown)


class Step:
    """The step of the page: what goes into it, what comes out, and the answer before and after."""

    def __init__(self):
        self.vlm = vlm = train.VLM(CONFIG.model)
        self.frozen = sum(p.numel() for p in vlm.parameters())
        self.evaluator = Evaluator(vlm.eval(), [EXAMPLE])
        (self.before,) = self.evaluator.direct()
        torch.manual_seed(CONFIG.seed)
        self.method = train.Pearl(vlm, CONFIG)
        ((self.record,),) = train.dataset(self.method, [EXAMPLE], "train").passes([0], 1)
        self.seen = {"embed": [], "forward": [], "forecasts": [], "head": []}
        vlm.lm.lm_head.register_forward_hook(lambda *a: self.seen["head"].append(a[-1]))
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((vlm, "embed"), (vlm, "forward"),
                                (self.method.predictor.latent, "forecasts")):
                patch.setattr(owner, name, self.watched(getattr(owner, name), self.seen[name]))
            self.losses = self.method.train()([self.record])
        parameters = [p for p in self.method.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=CONFIG.lr, weight_decay=0.0)
        self.losses.total.backward()
        self.norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.method.clip))
        optimizer.step()
        self.after = self.method([self.record]).parts
        vlm.eval()
        (self.answer,) = self.evaluator.direct()
        self.warmup = math.ceil(self.method.warmup * CONFIG.steps)
        schedule = get_cosine_schedule_with_warmup(optimizer, self.warmup, CONFIG.steps)
        self.first_lr = schedule.get_last_lr()[0]

    @staticmethod
    def watched(function, results):
        def call(*args, **kwargs):
            results.append(function(*args, **kwargs))
            return results[-1]
        return call


@pytest.fixture(scope="module")
def numbers():
    """The numbers of each section in the order of its text, from the model."""
    step = Step()
    assert step.before["text"] == step.answer["text"] == EXAMPLE.answer
    return of_the_inputs(step) | of_the_losses(step) | of_the_answer(step)


def count(view):
    return sum(label != -100 for label in view.labels)


def of_the_inputs(step):
    full, prompt, target = step.record.views
    batch = packing.add_branches([full], [prompt], lambda views: train.collate(views, 0))
    shared, pred = int(batch.shared[0]), CONFIG.pred_tokens
    assert prompt.ids[:shared] == full.ids[:shared] and target.ids == full.ids[-len(target.ids):]
    processor = step.vlm.family.processor
    pixels = [image.pixels["pixel_values"].shape for image in step.record.images]
    features = [image.features[0].shape for image in step.method.encode_images.kept.values()]
    images = full.ids.count(step.vlm.lm.config.image_token_id)
    inputs, states = step.seen["embed"][0], step.seen["forward"][0].states
    first, *_, last = inputs["position_ids"][0, 0, -pred:].tolist()
    sizes = [side for image in EXAMPLE.images for side in image.size]
    patch, merge = processor.patch_size, processor.merge_size
    return {
        "One step, with its numbers": [CONFIG.seed, CONFIG.batch, len(batch.ids)],
        "The record": sizes,
        "Three views": [len(full.ids), images, count(full), shared, pred, len(target.ids)],
        "Images, once": [patch, patch, 3, *pixels[0], merge, merge, *features[0], *pixels[1],
                         *features[1]],
        "One forward pass": [shared, *batch.ids.shape, pred, images, pred, first, last,
                             *inputs["attention_mask"].shape, *states.shape,
                             *step.losses.pair[0].shape]}


def of_the_losses(step):
    full, _, target = step.record.views
    (logits, *_), [[(forecast, at)]] = step.seen["head"], step.seen["forecasts"]
    predicted, h_R = step.losses.pair
    assert int(at.sum()) == len(logits) == count(full)
    loss, after = step.losses.parts, step.after
    terms = ("vlm", "jepa", "nextlat", "loss")
    lora = sum(p.numel() for p in step.vlm.parameters() if p.requires_grad)
    added = sum(p.numel() for p in step.method.predictor.parameters())
    return {
        "Eq. 3: the expert's words": [count(full), *logits.shape, loss["vlm"], logits.shape[1],
                                      math.log(logits.shape[1])],
        "Eq. 1: the embedding of the trajectory": [
            1, len(target.ids), *h_R.shape, torch.cosine_similarity(predicted, h_R), loss["jepa"]],
        "Eq. 2: the next state": [count(full), *forecast.shape, loss["nextlat"]],
        "Eq. 4 and the optimiser": [
            loss["vlm"], CONFIG.lambda_latent, loss["jepa"], loss["nextlat"], loss["loss"],
            step.norm, step.method.clip, lora, added, step.frozen, CONFIG.lr,
            *(after[name] for name in terms), CONFIG.lr, step.warmup, CONFIG.steps,
            step.first_lr]}


def of_the_answer(step):
    (question,) = step.evaluator.questions
    prompt, started = question.prompt.ids, question.started.ids
    assert prompt == step.record.views.full.ids[:len(prompt)] and started[:len(prompt)] == prompt
    (one,) = {len(option) for option in question.options}
    return {"From question to answer": [
        len(prompt), len(started) - len(prompt), len(question.options), one, 1, len(started),
        *step.before["log_probs"], step.answer["log_probs"][0]]}


@pytest.mark.parametrize("section", list(SECTIONS))
def test_numbers(section, numbers):
    found, want = SECTIONS[section], [float(value) for value in numbers[section]]
    assert len(found) == len(want), f"{found} on the page, {want} from the model"
    for text, value in zip(found, want):
        # half a unit of the last digit that the page gives
        half = 0.51 * 10.0 ** -len(text.partition(".")[2])
        assert abs(float(text.replace(",", "")) - value) < half, (text, value, want)
