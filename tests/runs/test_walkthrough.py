"""Claims: the code of docs/walkthrough.md stands in its files; the record, the view and every
number are what the shipped model gives."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

import train
from analysis import show
from evaluate import Evaluator
from support import step
from support.records import write_folder
from world import loader

ROOT = Path(train.__file__).parent
PAGE = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
PROSE = re.sub(r"^```.*?^```$|`[^`\n]*`", "", PAGE, flags=re.DOTALL | re.MULTILINE)
# the numbers of each section, but for those of names (I0)
NUMBER = re.compile(r"(?<![\w.,])-?\d+(?:,\d{3})*(?:\.\d+)?")
SECTIONS = {title: NUMBER.findall(text) for title, text in
            re.findall(r"^##? (.*)\n([^#]*)", PROSE, re.MULTILINE)}
CONFIG = train.Config(device="cpu")
EXAMPLE = loader.examples(CONFIG.regime, "train", 1)[0]


def code(text):
    """Without indentation, blank lines and comments of their own."""
    lines = [line.strip() for line in text.splitlines()]
    return "\n".join(line for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("block", [text for kind, text in BLOCKS if kind == "python"])
def test_code_stands_in_its_file(block):
    name, pieces = block.split()[1], re.split(r"^\.\.\.$", block, flags=re.MULTILINE)
    in_order = ".*".join(f"^{re.escape(code(piece))}$" for piece in pieces)
    there = code((ROOT / name).read_text(encoding="utf-8"))
    assert re.search(in_order, there, re.DOTALL | re.MULTILINE), name


def test_the_record_and_the_view(shipped, tmp_path):
    write_folder(folder := tmp_path / "folder", [EXAMPLE])
    record, view = (text for kind, text in BLOCKS if kind in ("json", "text"))
    assert json.loads(record) == json.loads((folder / "trajectories.jsonl").read_text("utf-8"))
    lines = show.lines(train.Pearl, CONFIG, shipped.family, EXAMPLE)
    assert "\n".join(lines).startswith("\n" + view)


def of_the_inputs(vlm, method, record):
    (full, prompt, target), rows = record.views, method.predictor.pred_embeddings
    images = method.encode_images(record.images)
    batch = step.add_branches([full], [prompt], lambda views: train.collate(views, vlm.pad_id))
    inputs, encoded = vlm.lm_inputs(batch, images, rows), vlm(batch, images, rows)
    shared, pred = int(batch.shared[0]), len(rows)
    image_tokens, words = int(inputs["is_image"].sum()), sum(n != -100 for n in full.labels)
    processor, positions = vlm.family.processor.image_processor, inputs["position_ids"][0, 0]
    patch, merge = [processor.patch_size] * 2, [processor.merge_size] * 2
    pixels, crop_pixels = (image.pixels["pixel_values"].shape for image in record.images)
    tokens, crop_tokens = (images[image.key].features[0].shape for image in record.images)
    return {
        "One step, with its numbers": [CONFIG.seed, CONFIG.batch, 1],
        "The record": [side for image in EXAMPLE.images for side in image.size],
        "Three views": [len(full.ids), image_tokens, words, shared, pred, len(target.ids)],
        "Images, once": [*patch, 3, *pixels, *merge, *tokens, *crop_pixels, *crop_tokens],
        "One forward pass": [
            shared, *batch.ids.shape, pred, image_tokens, pred, *positions[[-pred, -1]],
            *inputs["attention_mask"].shape, *encoded.states.shape, *encoded.embedding.shape]}


def of_the_losses(vlm, method, record):
    """Takes the step of the page."""
    trained = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=CONFIG.lr, weight_decay=method.weight_decay)
    full, _ = method.encode_views([record], method.encode_images(record.images))
    at = full.padded.labels != -100
    n, vocabulary = vlm.lm.lm_head(full.states[:, :-1][at[:, 1:]]).shape
    ((forecast, _),) = method.predictor.latent.forecasts(full.states, full.input_embeddings, at, 1)
    result = method([record])
    result.total.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, method.clip)
    optimizer.step()
    total, vlm_loss, jepa, nextlat = result.parts.values()
    (total_after, *after), (predicted, h_R) = method([record]).parts.values(), result.pair
    lora, frozen = (sum(p.numel() for p in vlm.parameters() if p.requires_grad == trains)
                    for trains in (True, False))
    added = sum(p.numel() for p in method.predictor.parameters())
    return {
        "Eq. 3: the expert's words": [n, n, vocabulary, vlm_loss, vocabulary, math.log(vocabulary)],
        "Eq. 1: the embedding of the trajectory": [1, len(record.views.target.ids), *h_R.shape,
                                                   torch.cosine_similarity(predicted, h_R), jepa],
        "Eq. 2: the next state": [n, *forecast.shape, nextlat],
        "Eq. 4 and the optimiser": [
            vlm_loss, CONFIG.lambda_latent, jepa, nextlat, total, norm, method.clip, lora, added,
            frozen, CONFIG.lr, *after, total_after, CONFIG.lr,
            math.ceil(method.warmup * CONFIG.steps), CONFIG.steps, 0]}  # 0: the first rate


def test_numbers():
    """Those of each section, in the order of its text, are the model's."""
    vlm = train.VLM(CONFIG.model).eval()
    evaluator = Evaluator(vlm, [EXAMPLE])
    (before,), (question,) = evaluator.direct(), evaluator.questions
    torch.manual_seed(CONFIG.seed)
    method = train.Pearl(vlm, CONFIG).train()
    ((record,),) = train.dataset(method, [EXAMPLE], "train").micro_batches([0], 1)
    numbers = of_the_inputs(vlm, method, record) | of_the_losses(vlm, method, record)
    # the step has been taken: the model's answer now
    (after,), options, started = evaluator.direct(), question.options, len(question.started.ids)
    assert before["text"] == after["text"] == EXAMPLE.answer
    numbers["From question to answer"] = [
        len(question.prompt.ids), started - len(question.prompt.ids), len(options), len(options[0]),
        before["passes"], started, *before["log_probs"], after["log_probs"][0]]
    for section, texts in SECTIONS.items():
        digits = [len(text.partition(".")[2]) for text in texts]
        assert texts == [f"{float(value):,.{count}f}" for value, count in zip(
            numbers[section], digits, strict=True)], section
