"""Rebuild the small VLM of this folder from nothing: the stand-in for an off-the-shelf Qwen2.5-VL.

    python tiny-vlm/pretrain.py --out DIR [--device cuda] [--seed 0]

It is an ordinary Qwen2_5_VLForConditionalGeneration checkpoint (1.9M parameters), pretrained in two
stages:
  1. vision: tower and merger learn dense labels (what is in each 8 x 8 px cell) on scenes and on
     tool outputs;
  2. language: the language model learns dialogues on the tower's frozen features: about one to
     three of these images (captions, boxes, short answers such as "Answer: seven"; tool outputs are
     just further images), and without images (repeat these words), which trains the embedding of
     every word it may ever have to read or write. Two auxiliary heads, dropped afterwards, teach a
     model of this size what a large one picks up by itself: where an image token lies in its image,
     and an end-of-turn state that sums up the turn (the words of the last question and reply).
It never sees a fine-tuning trajectory: no call, no plan, no reading after a tool's output. Its
scenes come from the world's "pretrain" split, which no training, validation or test scene shares
(world/scenes.py), and from the families of WEIGHTS alone: a family that is added to the world
leaves what this model has seen as it is.
"""

import argparse
import json
import math
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (AutoImageProcessor, PreTrainedTokenizerFast, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration, get_cosine_schedule_with_warmup)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `world`

from world import scenes, tools

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
# ChatML turns; an image is <|vision_start|><|image_pad|><|vision_end|>, as in the Qwen-VL family,
# without a system turn
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part['text'] -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}")
PATCH, MERGE = 8, 2
COLOURS, SHAPES, DIGITS = list(scenes.COLOURS), scenes.SHAPES, scenes.DIGITS


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written; the world's words and the numbers 0 to 100 are one
    token each."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=768, special_tokens=SPECIAL, show_progress=False, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:], chat_template=CHAT_TEMPLATE)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLForConditionalGeneration:
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=math.ceil(len(tokenizer) / 64) * 64, hidden_size=128,
                         intermediate_size=384,
                         num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=2048, tie_word_embeddings=True,
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0,
                                              mrope_section=[4, 6, 6]),
                         bos_token_id=None, eos_token_id=token("<|im_end|>"),
                         pad_token_id=token("<|endoftext|>")),
        vision_config=dict(depth=4, hidden_size=128, intermediate_size=256, num_heads=4,
                           in_channels=3, patch_size=PATCH, spatial_merge_size=MERGE,
                           temporal_patch_size=1, out_hidden_size=128, window_size=64,
                           fullatt_block_indexes=[0, 1, 2, 3], tokens_per_second=2),
        image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=True)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = token("<|im_end|>")
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model


def image_processor_config() -> dict:
    return dict(image_processor_type="Qwen2VLImageProcessor", patch_size=PATCH, merge_size=MERGE,
                temporal_patch_size=1, size=dict(shortest_edge=32 * 32, longest_edge=64 * 64),
                image_mean=[0.5] * 3, image_std=[0.5] * 3)


# ---- pictures with dense labels and with questions ----------------------------------------------
# Labels live on cells of 8 x 8 shown px, four to a merged token.

FLAGS = COLOURS + ["dotted", "route", "other route", "ring", "near", "answer", "bright"]
CHANNEL = {name: n for n, name in enumerate(FLAGS)}


class Labels:
    """Dense labels of an image's cells: flags (cells, cells, flags) soft targets in [0, 1]; digit
    and shape (cells, cells) classes, -1 where there is none; measure (cells, cells, 3): where in
    the cell an object is centred, and its size, NaN where no object is centred."""

    def __init__(self, cells: int, origin=(0, 0), size: int = scenes.SIZE):
        self.flags = np.zeros((cells, cells, len(FLAGS)), dtype=np.float16)
        self.digit, self.shape = (np.full((cells, cells), -1, dtype=np.int8) for _ in range(2))
        self.measure = np.full((cells, cells, 3), np.nan, dtype=np.float16)
        self.origin, self.scale, self.cells = origin, cells / size, cells

    def at(self, x: float, y: float):
        column, row = ((v - o) * self.scale for v, o in zip((x, y), self.origin))
        inside = 0 <= column < self.cells and 0 <= row < self.cells
        return (int(row), int(column)) if inside else None

    def put(self, x: float, y: float, name: str, value: float = 1.0) -> None:
        if (cell := self.at(x, y)) is not None:
            self.flags[cell][CHANNEL[name]] = value

    def read(self, x: float, y: float, digit: int) -> None:
        if (cell := self.at(x, y)) is not None:
            self.digit[cell] = digit

    def measured(self, x: float, y: float, size: float) -> None:
        """An object of `size` (a share of the image shown whole) is centred at (x, y)."""
        if (cell := self.at(x, y)) is not None:
            column, row = ((v - o) * self.scale for v, o in zip((x, y), self.origin))
            self.measure[cell] = column % 1, row % 1, size

    def area(self, x0: float, y0: float, x1: float, y1: float, name: str) -> None:
        """All cells whose centre lies in the box."""
        centre = (np.arange(self.cells) + 0.5) / self.scale
        rows = (centre + self.origin[1] >= y0) & (centre + self.origin[1] <= y1)
        columns = (centre + self.origin[0] >= x0) & (centre + self.origin[0] <= x1)
        self.flags[np.ix_(rows, columns, [CHANNEL[name]])] = 1.0


def label_objects(labels: Labels, objects: list) -> None:
    for x, y, r, shape, colour, digit in objects:
        labels.area(x - r, y - r, x + r, y + r, colour)
        labels.put(x, y, colour)
        labels.measured(x, y, r / 20)
        labels.read(x, y, digit)
        if (cell := labels.at(x, y)) is not None:
            labels.shape[cell] = SHAPES.index(shape)


def label_scene(labels: Labels, spec: dict) -> None:
    if "objects" in spec:
        label_objects(labels, spec["objects"])
    if "bars" in spec:
        dotted = [bar for bar in spec["bars"] if bar[3]]
        for bar in spec["bars"]:
            x, height, colour, has_dot, digit = bar
            labels.area(x, 110 - height, x + 14, 110, colour)
            labels.put(x + 7, 103, colour)
            labels.measured(x + 7, 103, height / 100)
            labels.put(x + 7, 103, "dotted", float(has_dot))
            tallest = max(dotted, key=lambda b: b[1])
            labels.put(x + 7, 103, "answer", float(has_dot and bar == tallest))
            if spec["family"] == "highlight+crop":
                labels.read(x + 7, 119, digit)
    if "balls" in spec:
        for row in range(labels.cells):
            for column in range(labels.cells):
                x, y = (column + 0.5) / labels.scale, (row + 0.5) / labels.scale
                for a, b, r, z in spec["balls"]:
                    if (x - a) ** 2 + (y - b) ** 2 <= r * r:
                        labels.put(x, y, "near", (z + 1) / 16)
        for i, name in spec["marks"]:
            labels.put(*spec["balls"][i][:2], name)
            labels.measured(*spec["balls"][i][:2], 0.15)
            labels.put(*spec["balls"][i][:2], "near", (spec["balls"][i][3] + 1) / 16)
            labels.put(*spec["balls"][i][:2], "answer", float(name == spec["answer"]))
    if "pictures" in spec:
        for (x, y), frame, content in zip(tools.PIECES, spec["frames"], spec["order"]):
            labels.area(x, y, x + 42, y + 42, frame)
            if content == 0:
                labels.area(x, y, x + 42, y + 42, "answer")
    if "walks" in spec:
        routes = zip(spec["walks"], spec["colours"], spec["digits"])
        for n, (walk, colour, digit) in enumerate(routes):
            points = [scenes.node_xy(node) for node in walk]
            for (x0, y0), (x1, y1) in zip(points, points[1:]):
                for t in np.linspace(0, 1, 7):
                    name = "other route" if n else "route"
                    labels.put(x0 + t * (x1 - x0), y0 + t * (y1 - y0), name)
            labels.put(*points[-1], colour)
            labels.measured(*points[-1], 0.5)
            if spec["family"] == "path+crop":
                labels.read(*points[-1], digit)
            if n == 0:
                labels.put(*points[0], "ring")
                labels.measured(*points[0], 0.5)
                labels.put(*points[-1], "answer")


def answer(text) -> str:
    return f"Answer: {text}"


def numbers(values) -> str:
    return answer(" ".join(map(str, values)))


def seen(*things) -> list[tuple[str, str]]:
    """The picture described, asked for or not (a turn with a picture and no words)."""
    said = f"I see: {', '.join(map(str, things))}."
    return [("Describe the picture.", said), ("", said)]


def object_questions(objects: list, origin=(0, 0),
                     size: int = scenes.SIZE) -> list[tuple[str, str]]:
    rows = []
    shapes = [o[3] for o in objects]
    for x, y, r, shape, colour, digit in objects:
        rows += [(f"Which digit is on the {colour} {shape}?", answer(DIGITS[digit]))] * 3
        place = numbers(scenes.box(x, y, r, origin, size))
        rows += [(f"Where is the {colour} {shape}?", place)] * 3
        rows += [(f"What shape is the {colour} object?", answer(shape))] * 3
        if shapes.count(shape) == 1:
            rows.append((f"What colour is the {shape}?", answer(colour)))
    rows.append(("How many objects are there?", answer(DIGITS[len(objects)])))
    listed = [f"{o[4]} {o[3]} {DIGITS[o[5]]}"
              for o in sorted(objects, key=lambda o: (o[1] // 40, o[0]))]
    return rows + seen(*listed) * 2


def percent(v: float) -> int:
    return min(100, round(100 * v / scenes.SIZE))


def scene_questions(spec: dict) -> list[tuple[str, str]]:
    """(question, answer) pairs about a scene; the family's own direct question is among them."""
    rows = [(spec["question"], answer(spec["answer"]))] * 5
    if "objects" in spec:
        rows = object_questions(spec["objects"])
        if "calls" in spec:
            for x, y, _, shape, colour, _ in spec["objects"]:
                panel = answer(scenes.panel_name(x, y))
                rows += [(f"Which panel is the {colour} {shape} in?", panel)] * 2
    if "bars" in spec:
        bars = spec["bars"]
        rows += [("Which bar is the tallest?", answer(max(bars, key=lambda b: b[1])[2])),
                 ("Which bar is the shortest?", answer(min(bars, key=lambda b: b[1])[2])),
                 ("Which bars are dotted?", answer(" ".join(b[2] for b in bars if b[3]))),
                 ("Which colours are the bars?", answer(" ".join(b[2] for b in bars)))]
        rows += seen(*(b[2] + " bar" + " dotted" * b[3] for b in bars))
        for x, height, colour, _, digit in bars:
            place = (percent(x - 1), percent(108 - height), percent(x + 16), 87)
            rows.append((f"Where is the {colour} bar?", numbers(place)))
            if spec["family"] == "highlight+crop":
                rows.append((f"Which digit is under the {colour} bar?", answer(DIGITS[digit])))
                place = numbers(scenes.box(x + 7, 118, 9))
                rows.append((f"Where is the digit under the {colour} bar?", place))
    if "balls" in spec:
        for i, name in spec["marks"]:
            place = numbers(percent(v) for v in spec["balls"][i][:2])
            rows.append((f"Where is the {name} mark?", place))
        rows += seen(*(f"{name} mark" for _, name in spec["marks"]))
    if "pictures" in spec:
        rows.append(("Which colours are the frames?", answer(" ".join(spec["frames"]))))
        rows += seen(*(f"{frame} frame" for frame in spec["frames"]))
    if "walks" in spec:
        x, y = scenes.node_xy(spec["walks"][0][0])
        rows += [("Where is the ring?", numbers((percent(x), percent(y))))] * 2
        rows += seen("ring", *(f"{colour} disc" for colour in spec["colours"]))
        for walk, colour, digit in zip(spec["walks"], spec["colours"], spec["digits"]):
            place = numbers(scenes.box(*scenes.node_xy(walk[-1]), 11))
            rows.append((f"Where is the {colour} disc?", place))
            if spec["family"] == "path+crop":
                rows.append((f"Which digit is on the {colour} disc?", answer(DIGITS[digit])))
    return rows


def object_crop(spec: dict, image: Image.Image, rng: random.Random):
    """A panel, an object or a mark, cut out."""
    x, y, r, shape, colour, digit = rng.choice(spec["objects"])
    kind = rng.choice(("panel", "object", "mark")) if "calls" in spec else "object"
    lower = r // 4 if shape == "triangle" else 0  # where a triangle's mark stands
    if kind == "panel":
        corner = (64 * (x >= 64), 64 * (y >= 64))
        labels = Labels(8, corner, 64)
        label_objects(labels, spec["objects"])
        inside = [o for o in spec["objects"] if all(c <= v < c + 64 for c, v in zip(corner, o))]
        out = tools.crop(image, *scenes.box(corner[0] + 32, corner[1] + 32, 32))
        return out, labels, object_questions(inside, corner, 64)
    centre, half = ((x, y), r) if kind == "object" else ((x, y + lower), 7)
    labels = Labels(4, (centre[0] - half, centre[1] - half), 2 * half)
    labels.area(0, 0, scenes.SIZE, scenes.SIZE, colour)
    labels.read(x, y + lower, digit)
    questions = [("Which digit is this?", answer(DIGITS[digit]))]
    questions += seen(DIGITS[digit]) if kind == "mark" else []
    if kind == "object":
        labels.shape[labels.at(x, y)] = SHAPES.index(shape)
        questions += seen(f"{colour} {shape} {DIGITS[digit]}")
        questions += [("What is this?", answer(f"{colour} {shape}")),
                      (f"Which digit is on the {colour} {shape}?", answer(DIGITS[digit])),
                      ("Where is the mark?", numbers(scenes.box(r, r + lower, 7, size=2 * r)))]
    return tools.crop(image, *scenes.box(*centre, half)), labels, questions


def digit_crop(spec: dict, image: Image.Image, rng: random.Random):
    """The digit under a bar or at the end of a route, cut out."""
    if "bars" in spec:
        bar = rng.choice(spec["bars"])
        x, y, r, digit = bar[0] + 7, 118, 9, bar[4]
    else:
        n = rng.randrange(len(spec["walks"]))
        (x, y), r, digit = scenes.node_xy(spec["walks"][n][-1]), 11, spec["digits"][n]
    labels = Labels(4, (x - r, y - r), 2 * r)
    labels.read(x, y, digit)
    questions = [("Which digit is this?", answer(DIGITS[digit])), *seen(DIGITS[digit])]
    return tools.crop(image, *scenes.box(x, y, r)), labels, questions


def tool_picture(spec: dict, image: Image.Image, rng: random.Random):
    """One tool output of the scene as a picture in its own right: (image, labels, questions)."""
    if "objects" in spec:
        return object_crop(spec, image, rng)
    if spec["family"].endswith("+crop") and rng.random() < 0.5:
        return digit_crop(spec, image, rng)
    labels = Labels(8)
    steps = scenes.FAMILIES[spec["family"]].tell(spec, image)
    out = next(step for step in steps if not isinstance(step, str))
    if "pictures" in spec:  # the assembled picture: a frame in the fitting piece's colour
        for edge in ((0, 0, 128, 14), (0, 114, 128, 128), (0, 0, 14, 128), (114, 0, 128, 128)):
            labels.area(*edge, spec["answer"])
        return out, labels, [("What colour is the frame?", answer(spec["answer"])),
                             *seen(f"{spec['answer']} frame")]
    label_scene(labels, spec)
    if "balls" in spec:
        return out, labels, [("Which mark is brighter?", answer(spec["answer"])),
                             *seen(f"{spec['answer']} brighter")]
    if "walks" in spec:
        colour, end = spec["colours"][0], scenes.node_xy(spec["walks"][0][-1])
        return out, labels, [("Which disc does the pink route reach?", answer(colour)),
                             *seen(f"pink route, {colour} disc"),
                             (f"Where is the {colour} disc?", numbers(scenes.box(*end, 11)))]
    bright = [bar for bar in spec["bars"] if bar[3]]
    for x, height, *_ in bright:
        labels.area(x, 110 - height, x + 14, 110, "bright")
    tallest = max(bright, key=lambda bar: bar[1])
    return out, labels, [("Which bright bar is the tallest?", answer(tallest[2])),
                         ("Which bars are bright?", answer(" ".join(bar[2] for bar in bright))),
                         *seen(*(f"{bar[2]} bar" for bar in bright), f"{tallest[2]} tallest"),
                         (f"Where is the digit under the {tallest[2]} bar?",
                          numbers(scenes.box(tallest[0] + 7, 118, 9)))]


# The families this model was pretrained on, and how often each is drawn. A list of its own, and not
# the world's: what is added to the world later was never seen.
WEIGHTS = {"crop": 7, "highlight": 3, "depth": 3, "jigsaw": 6, "path": 3, "zoom": 3,
           "highlight+crop": 3, "path+crop": 3}


def make_pictures(start: int, count: int, seed: int) -> list[tuple]:
    """(image, labels, questions) for scenes start..start+count: the scene and one tool output."""
    rows = []
    for index in range(start, start + count):
        rng = random.Random(f"{seed}-{index}")
        family = rng.choices(list(WEIGHTS), WEIGHTS.values())[0]
        spec = scenes.make_spec(family, "pretrain", index, seed)
        image = scenes.FAMILIES[family].draw(spec)
        labels = Labels(8)
        label_scene(labels, spec)
        scene = (image, labels, scene_questions(spec))
        for picture, target, questions in (scene, tool_picture(spec, image, rng)):
            rows.append((np.asarray(picture), target, questions))
    return rows


def tokenizer_texts(seed: int, count: int = 300) -> list[str]:
    """What the tokenizer is made from: the dialogues' texts of `count` scenes, numbers, and the
    trajectories' texts, so that their words are few tokens (no embedding is trained on them)."""
    texts = [t for _, _, rows in make_pictures(0, count, seed) for row in rows for t in row]
    texts += [f"{a} {b}" for a in range(101) for b in range(101)]
    texts += ["user\n", "assistant\n"] * 100
    texts += [f"Answer: {word}." for word in (*COLOURS, *SHAPES, *DIGITS)] * 50
    return texts + [text for family in WEIGHTS for i in range(40)
                    for text in scenes.make_example(family, "pretrain", i, 0).texts]


def to_tokens(cells: np.ndarray) -> np.ndarray:
    """(2h, 2w, ...) cells -> (h * w, 4, ...): the four cells of each merged token, raster order."""
    h, w = cells.shape[0] // 2, cells.shape[1] // 2
    cells = cells.reshape(h, 2, w, 2, *cells.shape[2:]).swapaxes(1, 2)
    return cells.reshape(h * w, 4, *cells.shape[4:])


class Picture(NamedTuple):
    """A picture as the processor's patches, with the labels of its tokens' four cells (tokens, 4,
    ...)."""

    patches: np.ndarray
    grid: tuple[int, int, int]
    flags: np.ndarray
    digit: np.ndarray
    shape: np.ndarray
    measure: np.ndarray
    questions: list[tuple[str, str]]


def prepare(args) -> list[Picture]:
    start, count, seed, folder = args
    processor = AutoImageProcessor.from_pretrained(folder)
    pictures = []
    for image, labels, questions in make_pictures(start, count, seed):
        out = processor(images=[Image.fromarray(image)], return_tensors="np")
        grid = tuple(int(v) for v in out["image_grid_thw"][0])
        if grid[1:] != labels.digit.shape:
            continue  # a crop cut short by the image's edge: its labels would not line up
        dense = [to_tokens(a) for a in (labels.flags, labels.digit, labels.shape, labels.measure)]
        pictures.append(Picture(out["pixel_values"].astype(np.float16), grid, *dense, questions))
    return pictures


def make_pool(count: int, seed: int, folder: Path, workers: int) -> list[Picture]:
    chunk = 500
    jobs = [(start, min(chunk, count - start), seed, str(folder))
            for start in range(0, count, chunk)]
    with ProcessPoolExecutor(workers) as executor:
        return [picture for part in executor.map(prepare, jobs) for picture in part]


# ---- training -----------------------------------------------------------------------------------


def optimiser(modules, lr: float, steps: int):
    parameters = [p for m in modules for p in m.parameters()]
    adam = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    return adam, get_cosine_schedule_with_warmup(adam, min(200, steps // 10), steps), parameters


def vision_batch(pictures: list[Picture], device, noise: float):
    """(pixels, grids, labels): labels by name, of all tokens of the batch."""
    def join(name: str) -> torch.Tensor:
        parts = [getattr(picture, name) for picture in pictures]
        return torch.from_numpy(np.concatenate(parts)).to(device).float()

    pixels, grid = join("patches"), torch.tensor([p.grid for p in pictures], device=device)
    labels = {name: join(name) for name in ("flags", "digit", "shape", "measure")}
    labels["colour"] = pixels.view(-1, 4, 3, PATCH ** 2).mean(dim=-1)  # mean colour of each cell
    return pixels + noise * torch.randn_like(pixels), grid, labels


def features(model, pixels, grid) -> torch.Tensor:
    return torch.cat(model.model.get_image_features(pixels, grid, return_dict=True).pooler_output)


# of the dense head, for each cell
OUTPUTS = dict(flags=len(FLAGS), digit=10, shape=len(SHAPES), measure=3, colour=3)


def dense_losses(out: torch.Tensor, labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """out (tokens, 4, sum of OUTPUTS) against the labels: one loss a kind of label, over the cells
    that have it."""
    parts = dict(zip(OUTPUTS, out.split(list(OUTPUTS.values()), dim=-1)))
    measured = ~labels["measure"].isnan()
    losses = dict(flags=10 * F.binary_cross_entropy_with_logits(parts["flags"], labels["flags"]))
    for kind in ("digit", "shape"):
        there = labels[kind] >= 0
        losses[kind] = F.cross_entropy(parts[kind][there], labels[kind][there].long())
    losses["measure"] = 3 * F.mse_loss(parts["measure"][measured], labels["measure"][measured])
    losses["colour"] = F.mse_loss(parts["colour"], labels["colour"])
    return losses


def shares_right(out: torch.Tensor, labels: dict[str, torch.Tensor]) -> dict[str, float]:
    """Of the cells with a digit or a shape, how many are named rightly."""
    parts = dict(zip(OUTPUTS, out.split(list(OUTPUTS.values()), dim=-1)))
    return {kind: float((parts[kind].argmax(-1) == labels[kind])[labels[kind] >= 0].float().mean())
            for kind in ("digit", "shape")}


def train_vision(model, pool, valid, steps: int, batch: int, lr: float, device) -> None:
    head = nn.Sequential(nn.LayerNorm(128, elementwise_affine=False),
                         nn.Linear(128, 4 * sum(OUTPUTS.values()))).to(device)
    adam, schedule, parameters = optimiser([model.model.visual, head], lr, steps)
    start, rng = time.time(), random.Random(0)
    for step in range(1, steps + 1):
        pixels, grid, labels = vision_batch(rng.choices(pool, k=batch), device, 0.06)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            out = head(features(model, pixels, grid)).unflatten(-1, (4, -1)).float()
        sum(dense_losses(out, labels).values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step(), schedule.step(), adam.zero_grad()
        if step % 250 == 0 or step == steps:
            with torch.no_grad():
                pixels, grid, labels = vision_batch(valid[:400], device, 0.0)
                out = head(features(model, pixels, grid)).unflatten(-1, (4, -1))
                right = shares_right(out, labels)
                shown = " ".join(f"{k} {v:.3f}" for k, v in dense_losses(out, labels).items())
            print(f"vision {step}/{steps} held out: {shown} | right: digit {right['digit']:.3f} "
                  f"shape {right['shape']:.3f} | {time.time() - start:.0f} s", flush=True)


class Dialogue(NamedTuple):
    ids: list[int]
    labels: list[int]  # the assistant's words; -100 elsewhere
    pictures: list[int]  # indices into the pool
    # of each assistant's turn: where it ends, the words of its question and reply
    ends: list[tuple[int, list[int]]]


class Talker:
    """Writes dialogues in the chat template's own tokens."""

    def __init__(self, tokenizer, pool: list[Picture]):
        self.tokenizer, self.pool = tokenizer, pool
        self.special = tokenizer.convert_tokens_to_ids
        self.encoded = lru_cache(maxsize=None)(lambda text: tuple(tokenizer.encode(text)))
        reserved = set(tokenizer.all_special_ids)
        self.words = [i for i in range(len(tokenizer)) if i not in reserved]

    def turns(self):
        """(picture or None, question ids, reply ids) of a dialogue, one exchange after another."""
        rng = self.rng
        if rng.random() < 0.15:  # without pictures: any words whatever, said again
            for _ in range(rng.choice((1, 2))):
                words = rng.choices(self.words, k=rng.randint(3, 14))
                yield None, [*self.encoded("Repeat: "), *words], words
            return
        for _ in range(rng.choice((1, 2, 2, 3))):
            index = rng.randrange(len(self.pool))
            rows = self.pool[index].questions
            alone = [row for row in rows if not row[0]]
            asked = rng.choices([row for row in rows if row[0]], k=rng.choice((1, 2, 3)))
            if rng.random() < 0.3:
                asked = [rng.choice(alone)] + asked[1:]
            elif rng.random() < 0.15:  # two sentences: describe, then answer
                said = f"{alone[0][1]} {asked[-1][1]}"
                asked[-1] = (f"Describe, then answer. {asked[-1][0]}", said)
            for n, (question, reply) in enumerate(asked):
                yield (None if n else index), self.encoded(question), self.encoded(reply)

    def dialogue(self, rng: random.Random) -> Dialogue:
        self.rng = rng
        newline = self.encoded("\n")

        def turn(role: str) -> list[int]:
            return [self.special("<|im_start|>"), *self.encoded(role), *newline]

        ids, labels, pictures, ends = [], [], [], []
        for index, question, reply in self.turns():
            image = []
            if index is not None:
                pictures.append(index)
                tokens = len(self.pool[index].digit)
                names = ["<|vision_start|>", *["<|image_pad|>"] * tokens, "<|vision_end|>"]
                image = [self.special(name) for name in names]
            asked = [*turn("user"), *image, *question, self.special("<|im_end|>"), *newline,
                     *turn("assistant")]
            said = [*reply, self.special("<|im_end|>")]
            ids += asked + said
            labels += [-100] * len(asked) + said + [-100] * len(newline)
            ends.append((len(ids) - 1, [*question, *reply]))
            ids += newline
        return Dialogue(ids, labels, pictures, ends)


@torch.no_grad()
def all_features(model, pool, device) -> list[torch.Tensor]:
    """The frozen tower's features of every picture of the pool, once."""
    cache = []
    for i in range(0, len(pool), 200):
        pixels, grid, _ = vision_batch(pool[i:i + 200], device, 0.0)
        counts = (grid.prod(-1) // MERGE ** 2).tolist()
        cache += [f.to(torch.float16) for f in features(model, pixels, grid).split(counts)]
    return cache


def language_losses(model, heads, rows: list[Dialogue], pool, cache,
                    device) -> dict[str, torch.Tensor]:
    """words: L_VLM of the assistant's turns. place: from the states after two layers, row and
    column of each image token. summary: from the end-of-turn state, which words the turn had."""
    pad, width = model.config.text_config.pad_token_id, max(len(r.ids) for r in rows)

    def padded(sequences, value: int) -> torch.Tensor:
        return torch.tensor([s + [value] * (width - len(s)) for s in sequences], device=device)

    ids, labels = padded((r.ids for r in rows), pad), padded((r.labels for r in rows), -100)
    mask = padded(([1] * len(r.ids) for r in rows), 0)
    index = [i for r in rows for i in r.pictures]
    embeds, grid = model.get_input_embeddings()(ids), None
    is_image = ids == model.config.image_token_id
    if index:
        grid = torch.tensor([pool[i].grid for i in index], device=device)
        vision = torch.cat([cache[i] for i in index]).to(device).float()
        vision = vision + 0.05 * vision.std() * torch.randn_like(vision)
        embeds = embeds.masked_scatter(is_image[..., None], vision)
    position_ids, _ = model.model.get_rope_index(ids, is_image.int(), grid, attention_mask=mask)
    with torch.autocast(torch.device(device).type, torch.bfloat16):
        out = model.model.language_model(inputs_embeds=embeds, attention_mask=mask,
                                         position_ids=position_ids, output_hidden_states=True)
        follows = labels[:, 1:]
        logits = model.lm_head(out.last_hidden_state[:, :-1][follows != -100])
        losses = dict(words=F.cross_entropy(logits.float(), follows[follows != -100]))
        if index:
            # (tokens, 2) row, column
            h, w = (grid[:, 1:] // MERGE).T.tolist()
            where = torch.cat([torch.cartesian_prod(torch.arange(a), torch.arange(b)).view(-1, 2)
                               for a, b in zip(h, w)]).to(device)
            guess = heads["place"](out.hidden_states[2][is_image]).float().view(-1, 2, 4)
            losses["place"] = 0.2 * F.cross_entropy(guess.transpose(1, 2), where)
        ends = torch.tensor([(b, at) for b, r in enumerate(rows) for at, _ in r.ends],
                            device=device)
        words = torch.zeros(len(ends), model.config.text_config.vocab_size, device=device)
        for n, said in enumerate(words_ for r in rows for _, words_ in r.ends):
            words[n, said] = 1
        guess = heads["summary"](out.last_hidden_state[ends[:, 0], ends[:, 1]]).float()
        losses["summary"] = F.binary_cross_entropy_with_logits(guess, words)
    return losses


def train_language(model, tokenizer, pool, valid, steps: int, batch: int, lr: float, device,
                   summary: float) -> None:
    """The language model learns the dialogues, on cached features with a little noise. summary:
    weight of that auxiliary task."""
    cache, talker, start = all_features(model, pool, device), Talker(tokenizer, pool), time.time()
    valid_cache, valid_talker = all_features(model, valid, device), Talker(tokenizer, valid)
    vocabulary = model.config.text_config.vocab_size
    heads = nn.ModuleDict(dict(place=nn.Linear(128, 8),
                               summary=nn.Linear(128, vocabulary))).to(device)
    adam, schedule, parameters = optimiser([model.model.language_model, heads], lr, steps)
    rng = random.Random(1)
    for step in range(steps):
        # four batches at a time, sorted: neighbours in length need little padding
        if step % 4 == 0:
            rows = sorted((talker.dialogue(rng) for _ in range(batch * 4)),
                          key=lambda row: len(row.ids))
        part = rows[step % 4 * batch:(step % 4 + 1) * batch]
        losses = language_losses(model, heads, part, pool, cache, device)
        losses["summary"] = summary * losses["summary"]
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step(), schedule.step(), adam.zero_grad()
        if (step + 1) % 250 == 0 or step + 1 == steps:
            with torch.no_grad():
                chosen = random.Random(0)
                told = [valid_talker.dialogue(chosen) for _ in range(64)]
                losses = language_losses(model, heads, told, valid, valid_cache, device)
            shown = " ".join(f"{k} {v:.4f}" for k, v in losses.items())
            print(f"language {step + 1}/{steps} held out: {shown} | {time.time() - start:.0f} s",
                  flush=True)


def save(model, tokenizer, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    text = json.dumps(image_processor_config(), indent=2) + "\n"
    (out / "preprocessor_config.json").write_text(text, encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder for the checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=30000,
                        help="scenes in the pool; each gives itself and one tool output")
    parser.add_argument("--vision_steps", type=int, default=5000, help="of 64 pictures")
    parser.add_argument("--language_steps", type=int, default=5000, help="of 32 dialogues")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--summary", type=float, default=10.0,
                        help="weight of the end-of-turn task; 0: without it")
    parser.add_argument("--vision", type=Path,
                        help="a checkpoint whose vision tower is taken instead of stage 1")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} exists already: choose a new folder")
    args.out.mkdir(parents=True)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(tokenizer_texts(args.seed))
    model = build_model(tokenizer).to(args.device)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f}M parameters, vocabulary {len(tokenizer)}")
    save(model, tokenizer, args.out)
    start = time.time()
    pool = make_pool(args.scenes, args.seed, args.out, args.workers)
    valid = make_pool(300, args.seed + 10_000, args.out, args.workers)
    print(f"{len(pool)} pictures drawn in {time.time() - start:.0f} s", flush=True)
    torch.manual_seed(args.seed)
    if args.vision:
        trained = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.vision).model.visual
        model.model.visual.load_state_dict(trained.state_dict())
    else:
        train_vision(model, pool, valid, args.vision_steps, 64, 1e-3, args.device)
    save(model, tokenizer, args.out)
    torch.manual_seed(args.seed)
    train_language(model, tokenizer, pool, valid, args.language_steps, 32, 1.5e-3, args.device,
                   args.summary)
    save(model, tokenizer, args.out)
    print(f"saved {args.out} after {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
