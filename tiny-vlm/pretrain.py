"""Pretrain the small VLM of this folder from nothing (README.md: what it is and what it has seen).

    python tiny-vlm/pretrain.py --out DIR [--device cuda] [--seed 0]

  1. Vision: tower and merger learn dense labels (what is in each cell of 8 x 8 px) on scenes and
     on tool outputs.
  2. Language: the language model learns dialogues on the features of the frozen tower. Most are
     about one to three of these images: captions, boxes, short answers such as "Answer: seven".
     Some have no image ("Repeat: ..."): they train the embedding of every word. Two auxiliary
     heads, which the checkpoint does not keep, learn where an image token is and, from its
     end-of-turn state, which words a turn had (--summary).
"""

import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # before any other `world`
from support.options import option, parse
from world import scenes, tools

PATCH, MERGE = 8, 2  # as in preprocessor_config.json
COLOURS, SHAPES, DIGITS = list(scenes.COLOURS), scenes.SHAPES, scenes.DIGITS
QA = tuple[str, str]  # a question about a picture and its answer


# ---- pictures with dense labels and with questions ----
FLAGS = COLOURS + ["dotted", "route", "other route", "ring", "near", "answer", "bright"]
CHANNEL = {name: n for n, name in enumerate([*FLAGS, "digit", "shape", "dx", "dy", "size"])}


class Labels:
    """Dense labels of a picture's cells, in `values` (cells, cells, channels). A cell has 8 x 8 px
    as the model sees them; a merged token has four cells.

    Flags are soft targets in [0, 1]. The others are NaN where there is none: the classes of digit
    and shape; where in the cell the centre of an object is, and the object's size, about 0 to 1.
    """

    def __init__(self, cells: int, origin=(0, 0), size: int = scenes.SIZE):
        """cells: on each side of a picture that shows the `size` px from `origin` on."""
        self.values = np.full((cells, cells, len(CHANNEL)), np.nan, dtype=np.float16)
        self.values[..., :len(FLAGS)] = 0
        self.cells, self.origin, self.size = cells, origin, size
        centres = (np.arange(cells) + 0.5) * size / cells
        self.x, self.y = origin[0] + centres, origin[1] + centres[:, None]

    def put(self, x: float, y: float, size: float | None = None, **values: float) -> None:
        """What is at the point (x, y), if the picture shows it; size: of an object around it."""
        column, row = ((v - o) * self.cells / self.size for v, o in zip((x, y), self.origin))
        if 0 <= column < self.cells and 0 <= row < self.cells:
            if size is not None:
                values |= dict(dx=column % 1, dy=row % 1, size=size)
            for name, value in values.items():
                self.values[int(row), int(column), CHANNEL[name]] = value

    def area(self, x0: float, y0: float, x1: float, y1: float, name: str) -> None:
        """Set a flag in all cells whose centre is in the box."""
        inside = (x0 <= self.x) & (self.x <= x1) & (y0 <= self.y) & (self.y <= y1)
        self.values[inside, CHANNEL[name]] = 1


def qa(question: str, *answer: str | int) -> QA:
    """A question, and its answer as the assistant writes it."""
    return question, f"Answer: {' '.join(map(str, answer))}"


def captions(*things: str) -> list[QA]:
    """A description of the picture, with a question and without one (a turn without words)."""
    caption = f"I see: {', '.join(things)}."
    return [("Describe the picture.", caption), ("", caption)]


# ---- for each kind of scene: label its cells; questions about it, and about its tool's output ----
def describe_objects(labels: Labels, spec: dict):
    rows, objects, shapes = [], spec["objects"], [o[3] for o in spec["objects"]]
    for x, y, r, shape, colour, digit in objects:
        labels.area(x - r, y - r, x + r, y + r, colour)
        labels.put(x, y, r / 20, digit=digit, shape=SHAPES.index(shape), **{colour: 1})
        place = scenes.box(x, y, r, labels.origin, labels.size)
        rows += [qa(f"Which digit is on the {colour} {shape}?", DIGITS[digit])] * 3
        rows += [qa(f"Where is the {colour} {shape}?", *place)] * 3
        rows += [qa(f"What shape is the {colour} object?", shape)] * 3
        if shapes.count(shape) == 1:
            rows.append(qa(f"What colour is the {shape}?", colour))
    rows.append(qa("How many objects are there?", DIGITS[len(objects)]))
    in_order = sorted(objects, key=lambda o: (o[1] // 40, o[0]))  # top to bottom, left to right
    rows += captions(*(f"{o[4]} {o[3]} {DIGITS[o[5]]}" for o in in_order)) * 2
    if spec["family"] == "zoom":
        for x, y, _, shape, colour, _ in objects:
            rows += [qa(f"Which panel is the {colour} {shape} in?", scenes.panel_of(x, y))] * 2
    return rows, []


def describe_bars(labels: Labels, spec: dict):
    bars, dotted = spec["bars"], scenes.dotted(spec["bars"])
    left, _, tallest, *_ = scenes.tallest(dotted)
    dotted_colours = [bar[2] for bar in dotted]
    rows = [qa("Which bar is the tallest?", scenes.tallest(bars)[2]),
            qa("Which bar is the shortest?", min(bars, key=lambda bar: bar[1])[2]),
            qa("Which bars are dotted?", *dotted_colours),
            qa("Which colours are the bars?", *(bar[2] for bar in bars)),
            *captions(*(bar[2] + " bar" + " dotted" * bar[3] for bar in bars))]
    for x, height, colour, has_dot, digit in bars:
        labels.area(x, 110 - height, x + 14, 110, colour)
        labels.put(x + 7, 103, height / 100, dotted=has_dot, answer=colour == tallest,
                   **{colour: 1})
        place = map(scenes.percent, (x - 1, 108 - height, x + 16))
        rows.append(qa(f"Where is the {colour} bar?", *place, 87))
        if spec["family"] == "highlight+crop":
            labels.put(x + 7, 119, digit=digit)
            rows += [qa(f"Which digit is under the {colour} bar?", DIGITS[digit]),
                     qa(f"Where is the digit under the {colour} bar?", *scenes.box(x + 7, 118, 9))]
    return rows, [qa("Which bright bar is the tallest?", tallest),
                  qa("Which bars are bright?", *dotted_colours),
                  *captions(*(f"{c} bar" for c in dotted_colours), f"{tallest} tallest"),
                  qa(f"Where is the digit under the {tallest} bar?", *scenes.box(left + 7, 118, 9))]


def describe_balls(labels: Labels, spec: dict):
    rows, nearer = [], spec["answer"]
    for x, y, r, z in spec["balls"]:
        inside = (labels.x - x) ** 2 + (labels.y - y) ** 2 <= r * r
        labels.values[inside, CHANNEL["near"]] = (z + 1) / 16
    for i, name in spec["marks"]:
        x, y, _, z = spec["balls"][i]
        labels.put(x, y, 0.15, near=(z + 1) / 16, answer=name == nearer, **{name: 1})
        rows.append(qa(f"Where is the {name} mark?", *map(scenes.percent, (x, y))))
    rows += captions(*(f"{name} mark" for _, name in spec["marks"]))
    return rows, [qa("Which mark is brighter?", nearer), *captions(f"{nearer} brighter")]


def describe_pieces(labels: Labels, spec: dict):
    right = spec["answer"]
    for (x, y), frame in zip(tools.PIECES, spec["frames"]):
        for flag in (frame, "answer") if frame == right else (frame,):
            labels.area(x, y, x + 42, y + 42, flag)
    rows = [qa("Which colours are the frames?", *spec["frames"]),
            *captions(*(f"{frame} frame" for frame in spec["frames"]))]
    return rows, [qa("What colour is the frame?", right), *captions(f"{right} frame")]


def describe_routes(labels: Labels, spec: dict):
    routes = [[scenes.node_xy(node) for node in walk] for walk in spec["walks"]]
    rows = [qa("Where is the ring?", *map(scenes.percent, routes[0][0]))] * 2
    rows += captions("ring", *(f"{colour} disc" for colour in spec["colours"]))
    for points, colour, digit in zip(routes, spec["colours"], spec["digits"]):
        flag = "route" if points is routes[0] else "other route"
        for start, stop in zip(points, points[1:]):
            for point in np.linspace(start, stop, 7):
                labels.put(*point, **{flag: 1})
        labels.put(*points[-1], 0.5, **{colour: 1})
        rows.append(qa(f"Where is the {colour} disc?", *scenes.box(*points[-1], 11)))
        if spec["family"] == "path+crop":
            labels.put(*points[-1], digit=digit)
            rows.append(qa(f"Which digit is on the {colour} disc?", DIGITS[digit]))
    labels.put(*routes[0][0], 0.5, ring=1)
    labels.put(*routes[0][-1], answer=1)
    end = spec["colours"][0]
    return rows, [qa("Which disc does the pink route reach?", end),
                  *captions(f"pink route, {end} disc"),
                  qa(f"Where is the {end} disc?", *scenes.box(*routes[0][-1], 11))]


# The tasks of the pretraining, how often each is drawn, and its description. A list of its own: the
# model has never seen a task that the world gets later.
TASKS = {"crop": (7, describe_objects), "highlight": (3, describe_bars),
         "depth": (3, describe_balls), "jigsaw": (6, describe_pieces),
         "path": (3, describe_routes), "zoom": (3, describe_objects),
         "highlight+crop": (3, describe_bars), "path+crop": (3, describe_routes)}


def describe(spec: dict) -> tuple[Labels, list[QA], list[QA]]:
    """Labels of a scene, questions about it, and about the output of its (first) tool."""
    labels = Labels(8)
    rows, tool_rows = TASKS[spec["family"]][1](labels, spec)
    # the task's own question, which is one of the object questions
    task_rows = [] if "objects" in spec else [qa(spec["question"], spec["answer"])] * 5
    return labels, task_rows + rows, tool_rows


# ---- for each tool: its output on a scene as a picture by itself, (image, labels, questions) ----
def close_up(image: Image.Image, x: int, y: int, r: int, digit: int, below: int = 0, name=""):
    """A crop around (x, y); the digit is `below` px under the centre of what `name` names."""
    labels = Labels(4, (x - r, y - r), 2 * r)
    labels.put(x, y + below, digit=digit)
    questions = [qa("Which digit is this?", DIGITS[digit]), *captions(name + DIGITS[digit])]
    return tools.crop(image, *scenes.box(x, y, r)), labels, questions


def object_crop(spec: dict, image: Image.Image, rng: random.Random):
    """A crop of a panel, of an object, or of the digit on it."""
    x, y, r, shape, colour, digit = thing = rng.choice(spec["objects"])
    kind = rng.choice(("panel", "object", "mark")) if spec["family"] == "zoom" else "object"
    if kind == "panel":  # which has this object alone
        corner = (64 * (x >= 64), 64 * (y >= 64))
        labels = Labels(8, corner, 64)
        out = tools.crop(image, *scenes.box(corner[0] + 32, corner[1] + 32, 32))
        return out, labels, describe_objects(labels, dict(family="panel", objects=[thing]))[0]
    below, name = scenes.digit_offset(r, shape), f"{colour} {shape}"
    if kind == "mark":
        out, labels, questions = close_up(image, x, y + below, 7, digit)
    else:
        out, labels, questions = close_up(image, x, y, r, digit, below, f"{name} ")
        labels.put(x, y, shape=SHAPES.index(shape))
        questions += [qa("What is this?", name),
                      qa(f"Which digit is on the {name}?", DIGITS[digit]),
                      qa("Where is the mark?", *scenes.box(r, r + below, 7, size=2 * r))]
    labels.area(0, 0, scenes.SIZE, scenes.SIZE, colour)
    return out, labels, questions


def tool_picture(spec: dict, image: Image.Image, rng: random.Random):
    if "objects" in spec:
        return object_crop(spec, image, rng)
    if spec["family"] == "highlight+crop" and rng.random() < 0.5:
        x, _, _, _, digit = rng.choice(spec["bars"])
        return close_up(image, x + 7, 118, 9, digit)
    if spec["family"] == "path+crop" and rng.random() < 0.5:
        walk, digit = rng.choice(list(zip(spec["walks"], spec["digits"])))
        return close_up(image, *scenes.node_xy(walk[-1]), 11, digit)
    labels, _, rows = describe(spec)
    if "pictures" in spec:
        # the whole picture, in a frame of the colour of the piece that fits
        labels, flag = Labels(8), CHANNEL[spec["answer"]]
        labels.values[[0, -1], :, flag] = labels.values[:, [0, -1], flag] = 1
    for x, height, *_ in scenes.dotted(spec.get("bars", [])):
        labels.area(x, 110 - height, x + 14, 110, "bright")
    call, *_ = scenes.TASKS[spec["family"]].solve(spec)
    return tools.call_tool(call, image), labels, rows


def make_pictures(count: int, seed: int) -> Iterator[tuple[Image.Image, Labels, list[QA]]]:
    """(image, labels, questions) of `count` scenes, each followed by one tool output on it."""
    for index in range(count):
        rng = random.Random(f"{seed}-{index}")
        task, = rng.choices(list(TASKS), [weight for weight, _ in TASKS.values()])
        spec = scenes.make_spec(task, "pretrain", index, seed)
        image = scenes.TASKS[task].draw(spec)
        yield image, *describe(spec)[:2]
        yield tool_picture(spec, image, rng)


def tokenizer_texts(seed: int, count: int = 300) -> list[str]:
    """Texts that make the tokenizer: the dialogues of `count` scenes, numbers, and trajectories, so
    that their words are few tokens (training embeds no trajectory)."""
    texts = [text for _, _, rows in make_pictures(count, seed) for row in rows for text in row]
    texts += [f"{a} {b}" for a in range(101) for b in range(101)] + ["user\n", "assistant\n"] * 100
    texts += [f"Answer: {word}." for word in (*COLOURS, *SHAPES, *DIGITS)] * 50
    return texts + [text for task in TASKS for i in range(40)
                    for text in scenes.make_example(task, "pretrain", i, 0).texts]


@dataclass
class Picture:
    patches: np.ndarray
    grid: tuple[int, int, int]
    labels: np.ndarray  # (tokens, 4, channels)
    questions: list[QA]
    features: torch.Tensor | None = None  # the trained tower's, (tokens, 128)


def make_pool(count: int, seed: int) -> list[Picture]:
    processor, pool = transformers.AutoImageProcessor.from_pretrained(HERE), []
    for image, labels, questions in make_pictures(count, seed):
        out = processor(images=[image], return_tensors="np")
        grid = tuple(out["image_grid_thw"][0].tolist())
        # the edge of the image may cut a crop short: then labels and tokens do not match
        if grid[1:] == (labels.cells, labels.cells):
            patches = out["pixel_values"].astype(np.float16)
            n = labels.cells // 2
            # (tokens, 4, channels): the four cells of each merged token, in raster order
            cells = labels.values.reshape(n, 2, n, 2, -1).swapaxes(1, 2).reshape(n * n, 4, -1)
            pool.append(Picture(patches, grid, cells, questions))
    return pool


# ---- training ----
def fit(stage: str, modules, lr: float, steps: int, batches: Iterator, losses_of: Callable, valid):
    """losses_of(a batch) -> losses by name, whose sum is learned; valid: a batch held out."""
    parameters = [p for module in modules for p in module.parameters()]
    adam = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = transformers.get_cosine_schedule_with_warmup(adam, min(200, steps // 10), steps)
    losses_of = torch.autocast(parameters[0].device.type, torch.bfloat16)(losses_of)
    start = time.time()
    for step, batch in zip(range(1, steps + 1), batches):
        sum(losses_of(batch).values()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step(), schedule.step(), adam.zero_grad()
        if step % 250 == 0 or step == steps:
            with torch.no_grad():
                losses = " ".join(f"{name} {loss:.3f}" for name, loss in losses_of(valid).items())
            print(f"{stage} {step}/{steps} held out: {losses} | {time.time() - start:.0f} s",
                  flush=True)


# ---- stage 1: vision ----
# outputs of the dense head for each cell, and channels of its labels
OUTPUTS = dict(flags=len(FLAGS), digit=10, shape=len(SHAPES), measure=3, colour=3)
LABELS = dict(flags=len(FLAGS), digit=1, shape=1, measure=3, colour=3)


def features(model, pictures: list[Picture], noise: float):
    """(tokens, 128) of each picture; the labels of all tokens and the mean colours of their cells,
    (all tokens, 4, channels)."""
    pixels, labels = (torch.from_numpy(np.concatenate(parts)).to(model.device).float()
                      for parts in zip(*((p.patches, p.labels) for p in pictures)))
    labels = torch.cat([labels, pixels.view(-1, 4, 3, PATCH ** 2).mean(dim=-1)], dim=-1)
    grid = torch.tensor([p.grid for p in pictures], device=model.device)
    pixels = pixels + noise * torch.randn_like(pixels)
    return model.model.get_image_features(pixels, grid, return_dict=True).pooler_output, labels


def train_vision(model, pool, valid, steps: int) -> None:
    head = nn.Sequential(nn.LayerNorm(128, elementwise_affine=False),
                         nn.Linear(128, 4 * sum(OUTPUTS.values()))).to(model.device)
    rng = random.Random(0)

    def losses_of(pictures: list[Picture]) -> dict[str, torch.Tensor]:
        """Means over the labels that there are."""
        states, labels = features(model, pictures, 0.06)
        out = head(torch.cat(states)).unflatten(-1, (4, -1)).float()  # (tokens, 4, outputs)
        guess = dict(zip(OUTPUTS, out.split([*OUTPUTS.values()], dim=-1)))
        truth = dict(zip(LABELS, labels.split([*LABELS.values()], dim=-1)))
        losses = dict(flags=10 * F.binary_cross_entropy_with_logits(guess["flags"], truth["flags"]))
        for name in ("digit", "shape"):
            classes = truth[name].nan_to_num(-100).long().flatten()
            losses[name] = F.cross_entropy(guess[name].flatten(0, 1), classes)
        for name, weight in (("measure", 3), ("colour", 1)):
            known = ~truth[name].isnan()
            losses[name] = weight * F.mse_loss(guess[name][known], truth[name][known])
        return losses

    batches = (rng.choices(pool, k=64) for _ in range(steps))
    fit("vision", [model.model.visual, head], 1e-3, steps, batches, losses_of, valid[:400])


# ---- stage 2: language ----
class Dialogue(NamedTuple):
    ids: list[int]
    labels: list[int]  # the assistant's words and end-of-turn tokens; -100 elsewhere
    pictures: list[Picture]
    ends: list[tuple[int, list[int]]]  # of each reply: its end; the words of question and reply


class Talker:
    """Writes dialogues as token ids of the chat template."""

    def __init__(self, tokenizer):
        self.encode = cache(lambda text: tuple(tokenizer.encode(text)))
        self.words = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]

    def exchanges(self, rng: random.Random, pool: list[Picture]):
        """([a new picture], question ids, reply ids) of each exchange of a dialogue."""
        if rng.random() < 0.15:  # without pictures: the assistant repeats random words
            for _ in range(rng.choice((1, 2))):
                words = rng.choices(self.words, k=rng.randint(3, 14))
                yield [], [*self.encode("Repeat: "), *words], words
            return
        for _ in range(rng.choice((1, 2, 2, 3))):
            picture = rng.choice(pool)
            wordless = [row for row in picture.questions if not row[0]]
            with_words = [row for row in picture.questions if row[0]]
            chosen = rng.choices(with_words, k=rng.choice((1, 2, 3)))
            if rng.random() < 0.3:
                chosen[0] = rng.choice(wordless)
            elif rng.random() < 0.15:  # two sentences: a description, then an answer
                question, reply = chosen[-1]
                chosen[-1] = (f"Describe, then answer. {question}", f"{wordless[0][1]} {reply}")
            for n, (question, reply) in enumerate(chosen):
                yield [] if n else [picture], self.encode(question), self.encode(reply)

    def dialogue(self, rng: random.Random, pool: list[Picture]) -> Dialogue:
        talk = Dialogue([], [], [], [])
        end, newline = self.encode("<|im_end|>\n")
        for pictures, question, reply in self.exchanges(rng, pool):
            talk.pictures.extend(pictures)
            images = "".join("<|vision_start|>" + "<|image_pad|>" * len(picture.labels)
                             + "<|vision_end|>" for picture in pictures)
            prompt = [*self.encode(f"<|im_start|>user\n{images}"), *question,
                      *self.encode("<|im_end|>\n<|im_start|>assistant\n")]
            talk.ids.extend([*prompt, *reply, end, newline])
            talk.labels.extend([-100] * len(prompt) + [*reply, end, -100])
            talk.ends.append((len(talk.ids) - 2, [*question, *reply]))
        return talk


def language_losses(rows: list[Dialogue], model, heads, summary: float) -> dict[str, torch.Tensor]:
    """words: L_VLM of the assistant's turns. place: row and column of each image token, from the
    states after two layers. summary: the words of a turn, from its end-of-turn state."""
    ids, labels = pad_sequence([torch.tensor([r.ids, r.labels]).T for r in rows], True,
                               -100).to(model.device).unbind(-1)
    # token 0 pads
    mask, ids, is_image = (ids != -100).long(), ids.clamp(min=0), ids == model.config.image_token_id
    pictures = [picture for r in rows for picture in r.pictures]
    grid = torch.tensor([picture.grid for picture in pictures], device=model.device)
    # the features are frozen, and get a little noise
    vision = torch.cat([picture.features.float() for picture in pictures])
    vision = vision + 0.05 * vision.std() * torch.randn_like(vision)
    embeds = model.get_input_embeddings()(ids).masked_scatter(is_image[..., None], vision)
    position_ids, _ = model.model.get_rope_index(ids, is_image.int(), grid, attention_mask=mask)
    out = model.model.language_model(inputs_embeds=embeds, attention_mask=mask,
                                     position_ids=position_ids, output_hidden_states=True)
    next_ids = labels[:, 1:]  # the state at a token predicts the next one
    logits = model.lm_head(out.last_hidden_state[:, :-1][next_ids != -100])
    # (tokens, 2): row and column of each image token, in raster order
    places = torch.cat([torch.ones(size).nonzero() for size in (grid[:, 1:] // MERGE).tolist()])
    place = heads["place"](out.hidden_states[2][is_image]).float().view(-1, 2, 4).transpose(1, 2)
    turns, at, words = zip(*((n, *end) for n, r in enumerate(rows) for end in r.ends))
    word = heads["summary"](out.last_hidden_state[turns, at]).float()
    has_word = torch.stack([F.one_hot(torch.tensor(part), word.shape[-1]).amax(0)
                            for part in words]).to(word)
    return dict(words=F.cross_entropy(logits.float(), next_ids[next_ids != -100]),
                place=0.2 * F.cross_entropy(place, places.to(model.device)),
                summary=summary * F.binary_cross_entropy_with_logits(word, has_word))


def train_language(model, tokenizer, pool, valid, steps: int, summary: float) -> None:
    """The language model learns the dialogues; summary: the weight of that loss."""
    parts = [part[n:n + 200] for part in (pool, valid) for n in range(0, len(part), 200)]
    with torch.no_grad():
        for part in parts:
            for picture, states in zip(part, features(model, part, 0.0)[0]):
                picture.features = states.to(torch.float16)
    heads = nn.ModuleDict(dict(place=nn.Linear(128, 8), summary=nn.Linear(
        128, model.lm_head.out_features))).to(model.device)
    talker, rng, same = Talker(tokenizer), random.Random(1), random.Random(0)

    def batches() -> Iterator[list[Dialogue]]:
        # four of 32 at a time, by length: dialogues of similar length need little padding
        while True:
            rows = sorted((talker.dialogue(rng, pool) for _ in range(128)),
                          key=lambda row: len(row.ids))
            yield from (rows[n:n + 32] for n in range(0, 128, 32))

    losses_of = partial(language_losses, model=model, heads=heads, summary=summary)
    fit("language", [model.model.language_model, heads], 1.5e-3, steps, batches(), losses_of,
        [talker.dialogue(same, valid) for _ in range(64)])


@dataclass
class Options:
    out: str = option("", "new folder for the checkpoint")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "any PyTorch device")
    seed: int = option(0, "of the scenes and the first weights")
    scenes: int = option(30000, "each gives itself and one tool output as a picture")
    vision_steps: int = option(5000, "of 64 pictures")
    language_steps: int = option(5000, "of 32 dialogues")
    summary: float = option(10.0, "weight of the end-of-turn loss; 0 leaves it out")


def main() -> None:
    args = parse(Options, None, __doc__)
    out, start = Path(args.out), time.time()
    if out.exists():
        sys.exit(f"--out {args.out} exists already or is not given: choose a new folder")
    out.mkdir(parents=True)
    torch.manual_seed(args.seed)
    # byte-level BPE with one token for a word of the world and for a number from 0 to 100
    tokenizer = transformers.AutoTokenizer.from_pretrained(HERE).train_new_from_iterator(
        tokenizer_texts(args.seed), 704, show_progress=False)
    model = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.AutoConfig.from_pretrained(HERE)).to(args.device)
    model.generation_config = transformers.GenerationConfig.from_pretrained(HERE)
    print(f"{model.num_parameters() / 1e6:.2f}M parameters, vocabulary {len(tokenizer)}")
    pool, valid = make_pool(args.scenes, args.seed), make_pool(300, args.seed + 10_000)
    print(f"{len(pool)} pictures drawn in {time.time() - start:.0f} s", flush=True)
    torch.manual_seed(args.seed)
    train_vision(model, pool, valid, args.vision_steps)
    torch.manual_seed(args.seed)
    train_language(model, tokenizer, pool, valid, args.language_steps, args.summary)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # as they are: save_pretrained would add how this tokenizer was loaded
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        (out / name).write_bytes((HERE / name).read_bytes())
    print(f"saved {out} after {(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
