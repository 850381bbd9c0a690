"""Pretrain the small VLM of this folder from nothing. It stands in for an off-the-shelf Qwen2.5-VL.

    python tiny-vlm/pretrain.py --out DIR [--device cuda] [--seed 0]

The result is an ordinary Qwen2_5_VLForConditionalGeneration checkpoint (1.9M parameters); its
architecture, chat template and image processor are the files of this folder.
  1. Vision: tower and merger learn dense labels (what is in each cell of 8 x 8 px) on scenes and
     on tool outputs.
  2. Language: the language model learns dialogues on the features of the frozen tower. Most are
     about one to three of these images: captions, boxes, short answers such as "Answer: seven".
     Some have no image ("Repeat: ..."): they train the embedding of every word. Two auxiliary heads
     teach what a large model knows by itself: where an image token is in its image, and an
     end-of-turn state that sums up the turn. The checkpoint does not keep them.
The model never sees a trajectory: no call, no plan, no answer after a tool's output. Its scenes
come from the world's "pretrain" split (world/scenes.py) and from the tasks of WEIGHTS alone.
"""

import itertools
import math
import random
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # before any other `world`

from support.options import option, parse
from world import scenes, tools

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
PATCH, MERGE = 8, 2  # as in preprocessor_config.json
COLOURS, SHAPES, DIGITS = list(scenes.COLOURS), scenes.SHAPES, scenes.DIGITS
QA = tuple[str, str]  # a question about a picture and its answer


def build_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE, which can write any text. The words of the world and the numbers from 0 to
    100 are one token each."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=768, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        # ChatML with the image tokens of the Qwen-VL family, without a system turn
        chat_template=(HERE / "chat_template.jinja").read_text(encoding="utf-8"))


def build_model(vocabulary: int):
    config = transformers.AutoConfig.from_pretrained(HERE)
    config.text_config.vocab_size = math.ceil(vocabulary / 64) * 64
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    for name in ("eos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, getattr(config.text_config, name))
    return model


# ---- pictures with dense labels and with questions ----
# Labels belong to cells of 8 x 8 px as the model sees them; a merged token has four cells.

FLAGS = COLOURS + ["dotted", "route", "other route", "ring", "near", "answer", "bright"]
CHANNEL = {name: n for n, name in enumerate(FLAGS)}


class Labels:
    """Dense labels of a picture's cells.

    flags (cells, cells, flags): soft targets in [0, 1]. digit and shape (cells, cells): classes, -1
    where there is none. measure (cells, cells, 3): where in the cell the centre of an object is,
    and the object's size, about 0 to 1; NaN where no object has its centre.
    """

    names = "flags", "digit", "shape", "measure"

    def __init__(self, cells: int, origin=(0, 0), size: int = scenes.SIZE):
        """cells: on each side of a picture that shows the `size` px from `origin` on."""
        self.flags = np.zeros((cells, cells, len(FLAGS)), dtype=np.float16)
        self.digit, self.shape = (np.full((cells, cells), -1, dtype=np.int8) for _ in range(2))
        self.measure = np.full((cells, cells, 3), np.nan, dtype=np.float16)
        self.origin, self.scale, self.cells = origin, cells / size, cells

    def put(self, x: float, y: float, size: float | None = None, digit: int = -1, shape: str = "",
            **flags: float) -> None:
        """What is at the point (x, y), if the picture shows it."""
        column, row = ((v - o) * self.scale for v, o in zip((x, y), self.origin))
        if 0 <= column < self.cells and 0 <= row < self.cells:
            cell = int(row), int(column)
            for name, value in flags.items():
                self.flags[cell][CHANNEL[name]] = value
            if size is not None:
                self.measure[cell] = column % 1, row % 1, size
            if digit >= 0:
                self.digit[cell] = digit
            if shape:
                self.shape[cell] = SHAPES.index(shape)

    def area(self, x0: float, y0: float, x1: float, y1: float, name: str) -> None:
        """Set a flag in all cells whose centre is in the box."""
        centre = (np.arange(self.cells) + 0.5) / self.scale
        rows = (centre + self.origin[1] >= y0) & (centre + self.origin[1] <= y1)
        columns = (centre + self.origin[0] >= x0) & (centre + self.origin[0] <= x1)
        self.flags[np.ix_(rows, columns, [CHANNEL[name]])] = 1.0


def answer(*words: str | int) -> str:
    return f"Answer: {' '.join(map(str, words))}"


def captions(*things: str) -> list[QA]:
    """A description of the picture, with a question and without one (a turn without words)."""
    caption = f"I see: {', '.join(things)}."
    return [("Describe the picture.", caption), ("", caption)]


def label_objects(labels: Labels, objects: list) -> None:
    for x, y, r, shape, colour, digit in objects:
        labels.area(x - r, y - r, x + r, y + r, colour)
        labels.put(x, y, r / 20, digit, shape, **{colour: 1})


def object_questions(objects: list, origin=(0, 0), size: int = scenes.SIZE) -> list[QA]:
    rows, shapes = [], [o[3] for o in objects]
    for x, y, r, shape, colour, digit in objects:
        rows += [(f"Which digit is on the {colour} {shape}?", answer(DIGITS[digit]))] * 3
        place = answer(*scenes.box(x, y, r, origin, size))
        rows += [(f"Where is the {colour} {shape}?", place)] * 3
        rows += [(f"What shape is the {colour} object?", answer(shape))] * 3
        if shapes.count(shape) == 1:
            rows.append((f"What colour is the {shape}?", answer(colour)))
    rows.append(("How many objects are there?", answer(DIGITS[len(objects)])))
    # a caption reads from top to bottom and from left to right
    in_order = sorted(objects, key=lambda o: (o[1] // 40, o[0]))
    return rows + captions(*(f"{o[4]} {o[3]} {DIGITS[o[5]]}" for o in in_order)) * 2


# ---- for each kind of scene: label its cells, return questions about it with their answers ----
def describe_objects(labels: Labels, spec: dict) -> list[QA]:
    label_objects(labels, spec["objects"])
    rows = object_questions(spec["objects"])
    if spec["family"] == "zoom":
        for x, y, _, shape, colour, _ in spec["objects"]:
            question = f"Which panel is the {colour} {shape} in?"
            rows += [(question, answer(scenes.panel_of(x, y)))] * 2
    return rows


def describe_bars(labels: Labels, spec: dict) -> list[QA]:
    bars, tallest = spec["bars"], scenes.tallest(scenes.dotted(spec["bars"]))
    rows = [("Which bar is the tallest?", answer(scenes.tallest(bars)[2])),
            ("Which bar is the shortest?", answer(min(bars, key=lambda b: b[1])[2])),
            ("Which bars are dotted?", answer(*(b[2] for b in bars if b[3]))),
            ("Which colours are the bars?", answer(*(b[2] for b in bars)))]
    rows += captions(*(b[2] + " bar" + " dotted" * b[3] for b in bars))
    for x, height, colour, has_dot, digit in bars:
        labels.area(x, 110 - height, x + 14, 110, colour)
        flags = {colour: 1, "dotted": has_dot, "answer": colour == tallest[2]}
        labels.put(x + 7, 103, height / 100, **flags)
        place = map(scenes.percent, (x - 1, 108 - height, x + 16))
        rows.append((f"Where is the {colour} bar?", answer(*place, 87)))
        if spec["family"] == "highlight+crop":
            labels.put(x + 7, 119, digit=digit)
            place = answer(*scenes.box(x + 7, 118, 9))
            rows += [(f"Which digit is under the {colour} bar?", answer(DIGITS[digit])),
                     (f"Where is the digit under the {colour} bar?", place)]
    return rows


def describe_balls(labels: Labels, spec: dict) -> list[QA]:
    rows, centres = [], (np.arange(labels.cells) + 0.5) / labels.scale
    for x, y in itertools.product(centres, centres):
        for a, b, r, z in spec["balls"]:
            if (x - a) ** 2 + (y - b) ** 2 <= r * r:
                labels.put(x, y, near=(z + 1) / 16)
    for i, name in spec["marks"]:
        x, y, _, z = spec["balls"][i]
        labels.put(x, y, 0.15, near=(z + 1) / 16, answer=name == spec["answer"], **{name: 1})
        rows.append((f"Where is the {name} mark?", answer(*map(scenes.percent, (x, y)))))
    return rows + captions(*(f"{name} mark" for _, name in spec["marks"]))


def describe_pieces(labels: Labels, spec: dict) -> list[QA]:
    for (x, y), frame, content in zip(tools.PIECES, spec["frames"], spec["order"]):
        labels.area(x, y, x + 42, y + 42, frame)
        if content == 0:
            labels.area(x, y, x + 42, y + 42, "answer")
    return [("Which colours are the frames?", answer(*spec["frames"])),
            *captions(*(f"{frame} frame" for frame in spec["frames"]))]


def describe_routes(labels: Labels, spec: dict) -> list[QA]:
    routes = [[scenes.node_xy(node) for node in walk] for walk in spec["walks"]]
    rows = [("Where is the ring?", answer(*map(scenes.percent, routes[0][0])))] * 2
    rows += captions("ring", *(f"{colour} disc" for colour in spec["colours"]))
    for points, colour, digit in zip(routes, spec["colours"], spec["digits"]):
        flag = "route" if points is routes[0] else "other route"
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            for t in np.linspace(0, 1, 7):
                labels.put(x0 + t * (x1 - x0), y0 + t * (y1 - y0), **{flag: 1})
        labels.put(*points[-1], 0.5, **{colour: 1})
        rows.append((f"Where is the {colour} disc?", answer(*scenes.box(*points[-1], 11))))
        if spec["family"] == "path+crop":
            labels.put(*points[-1], digit=digit)
            rows.append((f"Which digit is on the {colour} disc?", answer(DIGITS[digit])))
    labels.put(*routes[0][0], 0.5, ring=1)
    labels.put(*routes[0][-1], answer=1)
    return rows


# by the key of a spec that only such scenes have
DESCRIBE = dict(objects=describe_objects, bars=describe_bars, balls=describe_balls,
                pictures=describe_pieces, walks=describe_routes)


def describe(spec: dict) -> tuple[Labels, list[QA]]:
    """Labels of a scene, and questions about it, among them the task's own."""
    labels = Labels(8)
    rows = next(DESCRIBE[key] for key in spec if key in DESCRIBE)(labels, spec)
    # the task's own question is one of the object questions
    task_rows = [] if "objects" in spec else [(spec["question"], answer(spec["answer"]))] * 5
    return labels, task_rows + rows


def object_crop(spec: dict, image: Image.Image, rng: random.Random):
    """A crop of a panel, of an object, or of the digit on it: see `tool_picture`."""
    x, y, r, shape, colour, digit = rng.choice(spec["objects"])
    kind = rng.choice(("panel", "object", "mark")) if spec["family"] == "zoom" else "object"
    if kind == "panel":
        corner = (64 * (x >= 64), 64 * (y >= 64))
        labels = Labels(8, corner, 64)
        label_objects(labels, spec["objects"])
        inside = [o for o in spec["objects"] if all(c <= v < c + 64 for c, v in zip(corner, o))]
        out = tools.crop(image, *scenes.box(corner[0] + 32, corner[1] + 32, 32))
        return out, labels, object_questions(inside, corner, 64)
    offset = scenes.digit_offset(r, shape)
    centre, half = ((x, y), r) if kind == "object" else ((x, y + offset), 7)
    labels = Labels(4, (centre[0] - half, centre[1] - half), 2 * half)
    labels.area(0, 0, scenes.SIZE, scenes.SIZE, colour)
    labels.put(x, y + offset, digit=digit)
    name = "" if kind == "mark" else f"{colour} {shape} "
    questions = [("Which digit is this?", answer(DIGITS[digit])),
                 *captions(name + DIGITS[digit])]
    if kind == "object":
        labels.put(x, y, shape=shape)
        questions += [("What is this?", answer(f"{colour} {shape}")),
                      (f"Which digit is on the {colour} {shape}?", answer(DIGITS[digit])),
                      ("Where is the mark?", answer(*scenes.box(r, r + offset, 7, size=2 * r)))]
    return tools.crop(image, *scenes.box(*centre, half)), labels, questions


def digit_crop(spec: dict, image: Image.Image, rng: random.Random):
    """A crop of the digit under a bar or at the end of a route: see `tool_picture`."""
    if "bars" in spec:
        bar = rng.choice(spec["bars"])
        x, y, r, digit = bar[0] + 7, 118, 9, bar[4]
    else:
        n = rng.randrange(len(spec["walks"]))
        (x, y), r, digit = scenes.node_xy(spec["walks"][n][-1]), 11, spec["digits"][n]
    labels = Labels(4, (x - r, y - r), 2 * r)
    labels.put(x, y, digit=digit)
    questions = [("Which digit is this?", answer(DIGITS[digit])), *captions(DIGITS[digit])]
    return tools.crop(image, *scenes.box(x, y, r)), labels, questions


def tool_picture(spec: dict, image: Image.Image, rng: random.Random):
    """The output of one tool on the scene, as a picture by itself: (image, labels, questions)."""
    if "objects" in spec:
        return object_crop(spec, image, rng)
    if spec["family"].endswith("+crop") and rng.random() < 0.5:
        return digit_crop(spec, image, rng)
    call, *_ = scenes.TASKS[spec["family"]].solve(spec)
    out, (labels, _) = tools.call_tool(call, image), describe(spec)
    if "pictures" in spec:
        # the whole picture, in a frame of the colour of the piece that fits
        labels = Labels(8)
        for edge in ((0, 0, 128, 14), (0, 114, 128, 128), (0, 0, 14, 128), (114, 0, 128, 128)):
            labels.area(*edge, spec["answer"])
        return out, labels, [("What colour is the frame?", answer(spec["answer"])),
                             *captions(f"{spec['answer']} frame")]
    if "balls" in spec:
        return out, labels, [("Which mark is brighter?", answer(spec["answer"])),
                             *captions(f"{spec['answer']} brighter")]
    if "walks" in spec:
        colour, end = spec["colours"][0], scenes.node_xy(spec["walks"][0][-1])
        return out, labels, [("Which disc does the pink route reach?", answer(colour)),
                             *captions(f"pink route, {colour} disc"),
                             (f"Where is the {colour} disc?", answer(*scenes.box(*end, 11)))]
    bright = scenes.dotted(spec["bars"])
    for x, height, *_ in bright:
        labels.area(x, 110 - height, x + 14, 110, "bright")
    x, _, colour, *_ = scenes.tallest(bright)
    return out, labels, [("Which bright bar is the tallest?", answer(colour)),
                         ("Which bars are bright?", answer(*(bar[2] for bar in bright))),
                         *captions(*(f"{bar[2]} bar" for bar in bright), f"{colour} tallest"),
                         (f"Where is the digit under the {colour} bar?",
                          answer(*scenes.box(x + 7, 118, 9)))]


# The tasks of the pretraining, and how often each is drawn. A list of its own: the model has never
# seen a task that the world gets later.
WEIGHTS = {"crop": 7, "highlight": 3, "depth": 3, "jigsaw": 6, "path": 3, "zoom": 3,
           "highlight+crop": 3, "path+crop": 3}


def make_pictures(start: int, count: int, seed: int) -> list[tuple[np.ndarray, Labels, list[QA]]]:
    """(pixels, labels, questions) of `count` scenes, each followed by one tool output on it."""
    rows = []
    for index in range(start, start + count):
        rng = random.Random(f"{seed}-{index}")
        task = rng.choices(list(WEIGHTS), WEIGHTS.values())[0]
        spec = scenes.make_spec(task, "pretrain", index, seed)
        image = scenes.TASKS[task].draw(spec)
        rows += [(image, *describe(spec)), tool_picture(spec, image, rng)]
    return [(np.asarray(image), labels, questions) for image, labels, questions in rows]


def tokenizer_texts(seed: int, count: int = 300) -> list[str]:
    """Texts that make the tokenizer: the dialogues of `count` scenes, numbers, and trajectories, so
    that their words are few tokens (training embeds no trajectory)."""
    texts = [text for _, _, rows in make_pictures(0, count, seed) for row in rows for text in row]
    texts += [f"{a} {b}" for a in range(101) for b in range(101)]
    texts += ["user\n", "assistant\n"] * 100
    texts += [f"Answer: {word}." for word in (*COLOURS, *SHAPES, *DIGITS)] * 50
    return texts + [text for task in WEIGHTS for i in range(40)
                    for text in scenes.make_example(task, "pretrain", i, 0).texts]


def to_tokens(cells: np.ndarray) -> np.ndarray:
    """(2h, 2w, ...) cells -> (h * w, 4, ...): the four cells of each merged token, raster order."""
    h, w = cells.shape[0] // 2, cells.shape[1] // 2
    cells = cells.reshape(h, 2, w, 2, *cells.shape[2:]).swapaxes(1, 2)
    return cells.reshape(h * w, 4, *cells.shape[4:])


class Picture(NamedTuple):
    patches: np.ndarray
    grid: tuple[int, int, int]
    labels: dict[str, np.ndarray]  # by name, of its tokens, (tokens, 4, ...) each
    questions: list[QA]


def prepare(job: tuple[int, int, int, str]) -> list[Picture]:
    """The pictures of a chunk of scenes, in a process of its own."""
    start, count, seed, folder = job
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pictures = []
    for image, labels, questions in make_pictures(start, count, seed):
        out = processor(images=[Image.fromarray(image)], return_tensors="np")
        grid = tuple(int(v) for v in out["image_grid_thw"][0])
        # the edge of the image may cut a crop short: then labels and tokens do not match
        if grid[1:] == labels.digit.shape:
            tokens = {name: to_tokens(getattr(labels, name)) for name in Labels.names}
            pictures.append(Picture(out["pixel_values"].astype(np.float16), grid, tokens,
                                    questions))
    return pictures


def make_pool(count: int, seed: int, folder: Path, workers: int) -> list[Picture]:
    jobs = [(start, min(500, count - start), seed, str(folder)) for start in range(0, count, 500)]
    with ProcessPoolExecutor(workers) as executor:
        return [picture for part in executor.map(prepare, jobs) for picture in part]


# ---- training ----


def fit(stage: str, modules, lr: float, steps: int, losses_of: Callable, held_out: Callable):
    """losses_of(step) -> losses by name; held_out() -> a line for the log, every 250 steps."""
    parameters = [p for module in modules for p in module.parameters()]
    adam = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = transformers.get_cosine_schedule_with_warmup(adam, min(200, steps // 10), steps)
    start = time.time()
    for step in range(1, steps + 1):
        sum(losses_of(step).values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step(), schedule.step(), adam.zero_grad()
        if step % 250 == 0 or step == steps:
            with torch.no_grad():
                print(f"{stage} {step}/{steps} held out: {held_out()} | "
                      f"{time.time() - start:.0f} s", flush=True)


def line(values: dict) -> str:
    return " ".join(f"{name} {value:.3f}" for name, value in values.items())


# ---- stage 1: vision ----


def vision_batch(pictures: list[Picture], device, noise: float):
    """(pixels, grids, labels): the labels by name, for all tokens of the batch."""
    def join(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(device).float()

    pixels = join([p.patches for p in pictures])
    grid = torch.tensor([p.grid for p in pictures], device=device)
    labels = {name: join([p.labels[name] for p in pictures]) for name in Labels.names}
    labels["colour"] = pixels.view(-1, 4, 3, PATCH ** 2).mean(dim=-1)  # mean colour of each cell
    return pixels + noise * torch.randn_like(pixels), grid, labels


def features(model, pixels, grid) -> torch.Tensor:
    return torch.cat(model.model.get_image_features(pixels, grid, return_dict=True).pooler_output)


# outputs of the dense head for each cell
OUTPUTS = dict(flags=len(FLAGS), digit=10, shape=len(SHAPES), measure=3, colour=3)


def dense_losses(out: torch.Tensor, labels: dict[str, torch.Tensor]):
    """out (tokens, 4, outputs) -> losses and accuracies, each a dict by kind of label.

    They are means over the cells that have such a label.
    """
    parts = dict(zip(OUTPUTS, out.split(list(OUTPUTS.values()), dim=-1)))
    losses = dict(flags=10 * F.binary_cross_entropy_with_logits(parts["flags"], labels["flags"]))
    accuracies = {}
    for name in ("digit", "shape"):
        valid = labels[name] >= 0
        logits, classes = parts[name][valid], labels[name][valid].long()
        losses[name] = F.cross_entropy(logits, classes)
        accuracies[name] = (logits.argmax(-1) == classes).float().mean()
    valid = ~labels["measure"].isnan()
    losses["measure"] = 3 * F.mse_loss(parts["measure"][valid], labels["measure"][valid])
    losses["colour"] = F.mse_loss(parts["colour"], labels["colour"])
    return losses, accuracies


def train_vision(model, pool, valid, steps: int, device) -> None:
    head = nn.Sequential(nn.LayerNorm(128, elementwise_affine=False),
                         nn.Linear(128, 4 * sum(OUTPUTS.values()))).to(device)
    rng = random.Random(0)

    def outputs(pixels, grid) -> torch.Tensor:
        return head(features(model, pixels, grid)).unflatten(-1, (4, -1)).float()

    def losses_of(step: int) -> dict[str, torch.Tensor]:
        pixels, grid, labels = vision_batch(rng.choices(pool, k=64), device, 0.06)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            out = outputs(pixels, grid)
        return dense_losses(out, labels)[0]

    def held_out() -> str:
        pixels, grid, labels = vision_batch(valid[:400], device, 0.0)
        losses, right = dense_losses(outputs(pixels, grid), labels)
        return f"{line(losses)} | right: {line(right)}"

    fit("vision", [model.model.visual, head], 1e-3, steps, losses_of, held_out)


# ---- stage 2: language ----


class Dialogue(NamedTuple):
    ids: list[int]
    # the assistant's words and end-of-turn tokens; -100 elsewhere
    labels: list[int]
    # indices into the pool
    pictures: list[int]
    # for each turn of the assistant: the place of its end, the words of its question and reply
    ends: list[tuple[int, list[int]]]


class Talker:
    """Writes dialogues as token ids of the chat template."""

    def __init__(self, tokenizer, pool: list[Picture]):
        self.pool, self.special = pool, tokenizer.convert_tokens_to_ids
        self.encode = lru_cache(maxsize=None)(lambda text: tuple(tokenizer.encode(text)))
        special_ids = tokenizer.all_special_ids
        self.words = [i for i in range(len(tokenizer)) if i not in special_ids]

    def exchanges(self, rng: random.Random):
        """(picture or None, question ids, reply ids) of each exchange of a dialogue."""
        # without pictures: the assistant repeats random words
        if rng.random() < 0.15:
            for _ in range(rng.choice((1, 2))):
                words = rng.choices(self.words, k=rng.randint(3, 14))
                yield None, [*self.encode("Repeat: "), *words], words
            return
        for _ in range(rng.choice((1, 2, 2, 3))):
            index = rng.randrange(len(self.pool))
            rows = self.pool[index].questions
            wordless = [row for row in rows if not row[0]]
            chosen = rng.choices([row for row in rows if row[0]], k=rng.choice((1, 2, 3)))
            if rng.random() < 0.3:
                chosen[0] = rng.choice(wordless)
            # two sentences: a description, then an answer
            elif rng.random() < 0.15:
                question, reply = chosen[-1]
                chosen[-1] = (f"Describe, then answer. {question}", f"{wordless[0][1]} {reply}")
            for n, (question, reply) in enumerate(chosen):
                yield (None if n else index), self.encode(question), self.encode(reply)

    def dialogue(self, rng: random.Random) -> Dialogue:
        newline, end = self.encode("\n"), self.special("<|im_end|>")
        ids, labels, pictures, ends = [], [], [], []

        def header(role: str) -> list[int]:
            return [self.special("<|im_start|>"), *self.encode(role), *newline]

        for index, question, reply in self.exchanges(rng):
            image = []
            if index is not None:
                pictures.append(index)
                tokens = len(self.pool[index].labels["digit"])
                names = ["<|vision_start|>", *["<|image_pad|>"] * tokens, "<|vision_end|>"]
                image = [self.special(name) for name in names]
            prompt = [*header("user"), *image, *question, end, *newline, *header("assistant")]
            ids += [*prompt, *reply, end, *newline]
            labels += [-100] * len(prompt) + [*reply, end] + [-100] * len(newline)
            ends.append((len(ids) - len(newline) - 1, [*question, *reply]))
        return Dialogue(ids, labels, pictures, ends)


@torch.no_grad()
def all_features(model, pool, device) -> list[torch.Tensor]:
    """The frozen tower's features of each picture of the pool, (tokens, 128) each."""
    cache = []
    for i in range(0, len(pool), 200):
        pixels, grid, _ = vision_batch(pool[i:i + 200], device, 0.0)
        counts = (grid.prod(-1) // MERGE ** 2).tolist()
        cache += [f.to(torch.float16) for f in features(model, pixels, grid).split(counts)]
    return cache


def language_losses(model, heads, rows: list[Dialogue], pool, cache,
                    device) -> dict[str, torch.Tensor]:
    """words: L_VLM of the assistant's turns. place: row and column of each image token, from the
    states after two layers. summary: the words of a turn, from its end-of-turn state."""
    ids, labels, mask = (
        pad_sequence([torch.tensor(part) for part in parts], True, value).to(device)
        for parts, value in (([r.ids for r in rows], model.config.text_config.pad_token_id),
                             ([r.labels for r in rows], -100),
                             ([[1] * len(r.ids) for r in rows], 0)))
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
        # the state at a token predicts the next one
        next_ids = labels[:, 1:]
        logits = model.lm_head(out.last_hidden_state[:, :-1][next_ids != -100])
        losses = dict(words=F.cross_entropy(logits.float(), next_ids[next_ids != -100]))
        if index:
            h, w = (grid[:, 1:] // MERGE).T.tolist()
            places = torch.cat([torch.cartesian_prod(torch.arange(a), torch.arange(b)).view(-1, 2)
                                for a, b in zip(h, w)]).to(device)  # (tokens, 2) row, column
            guess = heads["place"](out.hidden_states[2][is_image]).float().view(-1, 2, 4)
            losses["place"] = 0.2 * F.cross_entropy(guess.transpose(1, 2), places)
        turns = [(b, at, words) for b, r in enumerate(rows) for at, words in r.ends]
        has_word = torch.zeros(len(turns), model.config.text_config.vocab_size, device=device)
        for n, (_, _, words) in enumerate(turns):
            has_word[n, words] = 1
        states = torch.stack([out.last_hidden_state[b, at] for b, at, _ in turns])
        guess = heads["summary"](states).float()
        losses["summary"] = F.binary_cross_entropy_with_logits(guess, has_word)
    return losses


def train_language(model, tokenizer, pool, valid, steps: int, device, summary: float) -> None:
    """The language model learns the dialogues, on frozen features with a little noise; summary: the
    weight of that loss."""
    cache, talker = all_features(model, pool, device), Talker(tokenizer, pool)
    valid_cache, valid_talker = all_features(model, valid, device), Talker(tokenizer, valid)
    place, words = nn.Linear(128, 8), nn.Linear(128, model.config.text_config.vocab_size)
    heads = nn.ModuleDict(dict(place=place, summary=words)).to(device)
    rng, rows, batch = random.Random(1), [], 32

    def losses_of(step: int) -> dict[str, torch.Tensor]:
        # four batches at a time, by length: dialogues of similar length need little padding
        if not rows:
            rows.extend(sorted((talker.dialogue(rng) for _ in range(batch * 4)),
                               key=lambda row: len(row.ids)))
        part, rows[:] = rows[:batch], rows[batch:]
        losses = language_losses(model, heads, part, pool, cache, device)
        return losses | dict(summary=summary * losses["summary"])

    def held_out() -> str:
        same = random.Random(0)
        part = [valid_talker.dialogue(same) for _ in range(64)]
        return line(language_losses(model, heads, part, valid, valid_cache, device))

    fit("language", [model.model.language_model, heads], 1.5e-3, steps, losses_of, held_out)


def save(model, tokenizer, out: Path) -> None:
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.copyfile(HERE / "preprocessor_config.json", out / "preprocessor_config.json")


@dataclass
class Options:
    out: str = option("", "new folder for the checkpoint")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "any PyTorch device")
    seed: int = option(0, "of the scenes and the first weights")
    scenes: int = option(30000, "each gives itself and one tool output as a picture")
    vision_steps: int = option(5000, "of 64 pictures")
    language_steps: int = option(5000, "of 32 dialogues")
    workers: int = option(2, "processes that draw pictures")
    summary: float = option(10.0, "weight of the end-of-turn loss; 0 leaves it out")
    vision: str = option("", "a checkpoint: use its vision tower and skip stage 1")


def main() -> None:
    args = parse(Options, None, __doc__)
    out = Path(args.out)
    if out.exists():
        sys.exit(f"--out {args.out} exists already or is not given: choose a new folder")
    out.mkdir(parents=True)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(tokenizer_texts(args.seed))
    model = build_model(len(tokenizer)).to(args.device)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{size:.2f}M parameters, vocabulary {len(tokenizer)}")
    save(model, tokenizer, out)
    start = time.time()
    pool = make_pool(args.scenes, args.seed, out, args.workers)
    valid = make_pool(300, args.seed + 10_000, out, args.workers)
    print(f"{len(pool)} pictures drawn in {time.time() - start:.0f} s", flush=True)
    torch.manual_seed(args.seed)
    if args.vision:
        vision = type(model).from_pretrained(args.vision).model.visual
        model.model.visual.load_state_dict(vision.state_dict())
    else:
        train_vision(model, pool, valid, args.vision_steps, args.device)
    save(model, tokenizer, out)
    torch.manual_seed(args.seed)
    train_language(model, tokenizer, pool, valid, args.language_steps, args.device, args.summary)
    save(model, tokenizer, out)
    print(f"saved {out} after {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
