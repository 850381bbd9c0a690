"""Data: the small visual world and its tools, the trajectory format, and the three views of an example.

Pearl learns from expert tool-use trajectories (section 3.1 of arXiv:2604.08065). This file has, in reading order,
  1. the trajectory format: `Example`, and a folder of `trajectories.jsonl` plus `images/` (section "The format"),
  2. the tools: real functions from image to image (crop, highlight, depth, jigsaw, path),
  3. the world: procedural scenes whose questions need those tools, drawn from a seed,
  4. the views: full <I0, Q, R>, input <I0, Q>, target R, as token ids with labels known by construction.

    python data.py --out DIR --regime mixed --count 40     # writes such a folder and DIR/contact_sheet.png (seconds)
    python data.py --check DIR                             # reads a folder of your own, reports what is wrong with it

Letters: B batch, T sequence (text and image tokens), N tool images, K predictor tokens, P image tokens.
Left out on purpose: readers for published data sets, padding tricks and caches. Nothing here knows about training.
"""

import argparse
import json
import re
import time
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFilter, ImageFont, ImageOps

# ---------------------------------------------------------------------------------------------------------------------
# 1. The format
# ---------------------------------------------------------------------------------------------------------------------


Picture = Image.Image | Path  # an image in memory, or its file, read when it is needed


def opened(picture: Picture) -> Image.Image:
    return open_image(picture, "while training") if isinstance(picture, Path) else picture


def image_size(picture: Picture) -> tuple[int, int]:
    """(width, height) in px as `opened` shows it, from the file's header alone."""
    if not isinstance(picture, Path):
        return picture.size
    with Image.open(picture) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # these four swap the sides
        return image.size[::-1] if turned else image.size


@dataclass
class Example:
    """One question with its expert trajectory.

    `trajectory` is R = (T1, I1, ..., IN, TN): a list of str (assistant text) and pictures (tool output), in order.
    Its first text holds the plan and the call, its last text the answer. It may be empty where nothing is trained
    (the held-out family). `options` are the candidate answers, `answer` is one of them.
    """

    id: str
    family: str
    image: Picture
    question: str
    options: list[str]
    answer: str
    trajectory: list[str | Picture] = field(default_factory=list)
    split: str = "train"

    @property
    def texts(self) -> list[str]:
        return [step for step in self.trajectory if isinstance(step, str)]

    @property
    def images(self) -> list[Picture]:
        """I0 first, then the tool images I1..IN."""
        return [self.image] + [step for step in self.trajectory if not isinstance(step, str)]

    def image_first(self) -> "Example":
        """The paper's order R = (I1, T1, ..., IN, TN): every tool image before the text that calls it."""
        steps = list(self.trajectory)
        for n in range(1, len(steps)):
            if isinstance(steps[n - 1], str) and not isinstance(steps[n], str):
                steps[n - 1:n + 1] = steps[n], steps[n - 1]
        joined = []
        for step in steps:  # texts that now meet are one turn of the assistant
            if joined and isinstance(step, str) and isinstance(joined[-1], str):
                joined[-1] += " " + step
            else:
                joined.append(step)
        return replace(self, trajectory=joined)

    def answer_only(self, answer_prefix: str) -> "Example":
        """No trajectory: the answer straight after the question."""
        return replace(self, trajectory=[f"{answer_prefix} {self.answer}".strip()])


FILE = "trajectories.jsonl"
SPLITS = ("train", "validation", "test")


def write_folder(out: Path, examples: list[Example]) -> None:
    """Write `examples` as out/trajectories.jsonl and out/images/*.png. `out` must not exist yet."""
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose a new folder, nothing is overwritten")
    partial = out.with_name(out.name + ".partial")
    (partial / "images").mkdir(parents=True)
    with open(partial / FILE, "w", encoding="utf-8") as file:
        for ex in examples:
            names = [f"images/{ex.id}-{n}.png" for n in range(len(ex.images))]
            for name, image in zip(names, ex.images):
                opened(image).save(partial / name)
            file.write(record_line(ex, names))
    partial.rename(out)


def record_line(ex: Example, names: list[str]) -> str:
    """One line of trajectories.jsonl; names: the files of ex.images, relative to the folder."""
    tool_names = iter(names[1:])
    steps = [{"text": s} if isinstance(s, str) else {"image": next(tool_names)} for s in ex.trajectory]
    record = dict(id=ex.id, split=ex.split, family=ex.family, image=names[0], question=ex.question,
                  options=ex.options, answer=ex.answer, trajectory=steps)
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_folder(folder: str | Path, outside: bool = False, problems: list[str] | None = None) -> list[Example]:
    """Read a folder in the format above. Every record and every image is checked before any is used.

    Raises ValueError or FileNotFoundError naming file, line and mend; with a list for `problems` it collects them there
    and goes on. outside: image paths and links may leave the folder. A record without "split" is assigned one by the hash
    of its image name (8 : 1 : 1), so that two questions about one image never fall on two sides.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: a data folder holds {FILE} and its images (see README, data format)")
    examples, seen = [], {}
    with open(path, "rb") as file:  # a line ends at a line feed and nowhere else: texts may hold other separators
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                example = _read_record(_parse(line, where), Path(folder), where, outside)
                if example.id in seen:
                    raise ValueError(f"{where}: id {example.id!r} was used on line {seen[example.id]}; ids must be unique")
            except (ValueError, FileNotFoundError) as error:
                if problems is None:
                    raise
                problems.append(str(error))
                continue
            seen[example.id] = number
            examples.append(example)
    if not examples and not problems:
        raise ValueError(f"{path} holds no record")
    return examples


def _parse(line: bytes, where: str) -> dict:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); write one object a line") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply; write the object that the README shows") from None


def _read_record(record: dict, folder: Path, where: str, outside: bool) -> Example:
    def need(right: bool, message: str) -> None:
        if not right:
            raise ValueError(f"{where}: {message}")

    def text(value, name: str) -> str:
        need(isinstance(value, str) and bool(value.strip()), f"{name} must be a non-empty string; found {value!r:.80}")
        need(not any("\ud800" <= c <= "\udfff" for c in value), f"{name} holds half a character (lone surrogate); repair it")
        return value.strip()

    need(isinstance(record, dict), f"expected a JSON object, found {type(record).__name__}")
    for key, kind in dict(id=str, image=str, question=str, options=list, answer=str, trajectory=list).items():
        need(isinstance(record.get(key), kind), f"field {key!r} must be a {kind.__name__}; found {record.get(key)!r:.80}")
    options = [text(option, "every option") for option in record["options"]]
    need(len(set(options)) == len(options), f"an option is there twice: {options}")
    answer = record["answer"].strip()
    need(answer in options, f"answer {answer!r} is not among the options {options}")
    steps = []
    for n, step in enumerate(record["trajectory"]):
        need(isinstance(step, dict) and len(step) == 1 and next(iter(step)) in ("text", "image"),
             f"trajectory step {n} must be {{'text': ...}} or {{'image': ...}}; found {step!r:.80}")
        kind, value = next(iter(step.items()))
        value = text(value, f"trajectory step {n}: {kind}")
        steps.append(value if kind == "text" else checked(folder, value, where, outside))
    need(bool(steps) and isinstance(steps[-1], str), "the trajectory must end in a text that gives the answer")
    need(answer in steps[-1], f"the last text of the trajectory does not contain the answer {answer!r}")
    image, split = text(record["image"], "image"), record.get("split")
    if split is None:
        split = {0: "test", 1: "validation"}.get(zlib.crc32(image.encode()) % 10, "train")
    need(split in SPLITS, f"split {split!r} is none of {', '.join(SPLITS)}")
    return Example(text(record["id"], "id"), text(record.get("family", "questions"), "family"),
                   checked(folder, image, where, outside), text(record["question"], "question"), options,
                   answer, steps, split)


def inside(folder: Path, name: str, outside: bool = False) -> Path:
    """folder / name. Raises ValueError if that, links followed, leaves the folder, unless `outside` allows it."""
    path = folder / name
    if not outside and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"image {name} leaves the data folder; copy it there, or allow it with --outside_images")
    return path


def checked(folder: Path, name: str, where: str, outside: bool = False) -> Path:
    try:
        path = inside(folder, name, outside)
    except ValueError as error:  # also of names that no file can have
        raise ValueError(f"{where}: {error}") from None
    open_image(path, where)
    return path


def open_image(file, where: str) -> Image.Image:
    """Read an image (a path or an open file) as RGB, wholly, so that a truncated one fails here and not in the middle of a run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return as_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: image {file} not found; paths are relative to the folder of {FILE}") from None
    except Exception as error:  # a decoder may fail in any way on foreign bytes
        raise ValueError(f"{where}: image {file} cannot be read ({error}); replace it or drop the record") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """As a person sees it: 16 bits scaled to 8, transparency on white. Raises ValueError where white is not defined."""
    if image.mode == "F":
        raise ValueError("floating-point pixels: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # convert() would clip all above 255 to white
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---------------------------------------------------------------------------------------------------------------------
# 2. The tools. A call is written [name a b c ...] in the text; coordinates are hundredths of width or height (0-100).
# ---------------------------------------------------------------------------------------------------------------------

ROUTE_SHADE, ROUTE_PAINT, RING = 200, (255, 90, 200), (255, 255, 255)
HOLE, PIECES = 36, ((86, 0), (86, 43), (0, 86), (43, 86))  # px: side of a piece; corners of the four framed pieces
FRAME = 3  # px around a piece


def crop(image: Image.Image, x0: int, y0: int, x1: int, y1: int) -> Image.Image:
    """Cut the box out of the image, at the image's own resolution (finer than what the model is shown)."""
    w, h = image.size
    left, top = max(0, x0 * w // 100), max(0, y0 * h // 100)
    right, bottom = min(w, -(-x1 * w // 100)), min(h, -(-y1 * h // 100))
    if x1 <= x0 or y1 <= y0 or right <= left or bottom <= top:
        raise ValueError(f"crop box {x0} {y0} {x1} {y1} is empty")
    return image.crop((left, top, right, bottom))


def highlight(image: Image.Image, *boxes: int) -> Image.Image:
    """Dim everything outside the boxes (four numbers each)."""
    if not boxes or len(boxes) % 4:
        raise ValueError("highlight takes four numbers for each box")
    w, h = image.size
    out = Image.eval(image, lambda value: value // 4)
    for x0, y0, x1, y1 in zip(*[iter(boxes)] * 4):
        region = (x0 * w // 100, y0 * h // 100, -(-x1 * w // 100), -(-y1 * h // 100))
        out.paste(image.crop(region), region[:2])
    return out


def depth(image: Image.Image) -> Image.Image:
    """Estimate depth from shading: grey level smoothed over texture, bright = near; coloured marks are kept on top."""
    pixels = np.asarray(image, dtype=np.int16)
    coloured = (pixels.max(-1) - pixels.min(-1)) > 90  # (H, W) the marks are the only saturated pixels
    grey = image.convert("L").filter(ImageFilter.MedianFilter(9)).filter(ImageFilter.BoxBlur(2))
    level = np.clip((np.asarray(grey, dtype=np.float32) - 30) * 1.25, 0, 255).astype(np.uint8)
    out = np.repeat(level[..., None], 3, axis=-1)
    out[coloured] = pixels[coloured]
    return Image.fromarray(out)


def jigsaw(image: Image.Image) -> Image.Image:
    """Try the four framed pieces in the hole, keep the one whose edges fit best, return the picture in its frame's colour."""
    pixels = np.asarray(image, dtype=np.float32)
    picture = pixels[5:5 + 2 * HOLE, 5:5 + 2 * HOLE].copy()  # (72, 72, 3)
    corners = [(0, 0), (HOLE, 0), (0, HOLE), (HOLE, HOLE)]
    hx, hy = min(corners, key=lambda c: picture[c[1] + 6:c[1] + 30, c[0] + 6:c[0] + 30].mean())  # the hole is the dark quarter
    best = None
    for x, y in PIECES:
        piece = pixels[y + FRAME:y + FRAME + HOLE, x + FRAME:x + FRAME + HOLE]
        inner_x, outer_x = (0, hx - 1) if hx else (HOLE - 1, HOLE)  # the seam's column inside the piece and beside it
        inner_y, outer_y = (0, hy - 1) if hy else (HOLE - 1, HOLE)
        gap = np.abs(piece[:, inner_x] - picture[hy:hy + HOLE, outer_x]).mean() \
            + np.abs(piece[inner_y] - picture[outer_y, hx:hx + HOLE]).mean()
        if best is None or gap < best[0]:
            frame = np.median(pixels[y:y + FRAME, x:x + HOLE].reshape(-1, 3), axis=0)
            best = (gap, piece, tuple(int(v) for v in frame))
    picture[hy:hy + HOLE, hx:hx + HOLE] = best[1]
    out = Image.new("RGB", (64, 64), best[2])
    out.paste(Image.fromarray(picture.astype(np.uint8)).resize((52, 52)), (6, 6))
    return out


def path(image: Image.Image, x: int, y: int) -> Image.Image:
    """Follow the route that touches point (x, y) and paint it."""
    pixels = np.asarray(image).copy()
    h, w = pixels.shape[:2]
    route = pixels.min(-1) > ROUTE_SHADE - 45  # (H, W) routes and the ring are the only bright grey
    reached = np.zeros_like(route)
    reached[max(0, y * h // 100 - 6):y * h // 100 + 7, max(0, x * w // 100 - 6):x * w // 100 + 7] = True
    reached &= route
    count = 0
    while count < (count := int(reached.sum())):  # grow by one pixel in each direction until nothing is added
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        reached = grown & route
    pixels[reached] = ROUTE_PAINT
    return Image.fromarray(pixels)


TOOLS: dict[str, Callable[..., Image.Image]] = dict(crop=crop, highlight=highlight, depth=depth, jigsaw=jigsaw, path=path)
CALL = re.compile(r"\[(" + "|".join(TOOLS) + r")((?: \d{1,3})*)\]")


def call_tool(text: str, image: Image.Image) -> Image.Image:
    """Run the call written in `text` on `image`. Raises ValueError when there is no call or its numbers do not fit."""
    match = CALL.search(text)
    if not match:
        raise ValueError(f"no tool call such as [crop 10 20 30 40] in {text!r}")
    try:
        return TOOLS[match[1]](image, *map(int, match[2].split()))
    except TypeError:
        raise ValueError(f"wrong number of arguments in {match[0]}") from None


# ---------------------------------------------------------------------------------------------------------------------
# 3. The world. A family is three functions: sample a spec from a generator, draw it, tell its trajectory.
#    A spec is a dict of plain ints and strings; its hash decides the split, so no two splits share a scene.
# ---------------------------------------------------------------------------------------------------------------------

SIZE = 128  # px; the shipped model is shown 64 x 64, so that a crop has more to see than the whole
COLOURS = dict(red=(215, 45, 45), green=(40, 165, 65), blue=(60, 95, 225), yellow=(230, 215, 60),
               purple=(150, 55, 190), orange=(240, 140, 35))
SHAPES = ("disc", "square", "triangle", "diamond")
PANELS = ("top left", "top right", "bottom left", "bottom right")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GLYPHS = (  # 5 x 7 bitmaps, a row a group
    "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111", "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "01110 10000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00001 01110")
GLYPHS = [np.array([[int(bit) * 255 for bit in row] for row in g.split()], dtype=np.uint8) for g in GLYPHS]
Spec = dict


class Family(NamedTuple):
    sample: Callable[[np.random.Generator], Spec]
    draw: Callable[[Spec], Image.Image]
    tell: Callable[[Spec, Image.Image], list[str | Image.Image]]


def _pick(rng: np.random.Generator, items, count: int) -> list:
    return [items[int(i)] for i in rng.permutation(len(items))[:count]]


def _options(rng: np.random.Generator, answer: str, others) -> list[str]:
    """The answer and up to three distractors, in random order."""
    return _pick(rng, [answer] + _pick(rng, [o for o in others if o != answer], 3), 4)


def _canvas(spec: Spec, low: int = 20, high: int = 60) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A noisy dark background, the same for the same spec."""
    rng = np.random.default_rng(zlib.crc32(repr(spec).encode()))
    coarse = rng.integers(low, high, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.NEAREST)
    return image, ImageDraw.Draw(image)


def _glyph(image: Image.Image, digit: int, x: int, y: int, height: int, ink: tuple) -> None:
    mask = Image.fromarray(GLYPHS[digit]).resize((round(height * 5 / 7), height), Image.Resampling.NEAREST)
    image.paste(ink, (x - mask.width // 2, y - mask.height // 2), mask)


def _shape(draw: ImageDraw.ImageDraw, shape: str, x: int, y: int, r: int, colour: tuple) -> None:
    if shape == "disc":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif shape == "square":
        draw.rectangle((x - r + 2, y - r + 2, x + r - 2, y + r - 2), fill=colour)
    else:
        points = [(x, y - r), (x + r, y + r), (x - r, y + r)] if shape == "triangle" else \
            [(x, y - r), (x + r, y), (x, y + r), (x - r, y)]
        draw.polygon(points, fill=colour)


def box(x: float, y: float, r: float, origin=(0, 0), size: int = SIZE) -> tuple[int, int, int, int]:
    """Square around (x, y) in hundredths of an image of `size` px whose corner is at `origin`."""
    x, y = x - origin[0], y - origin[1]
    return tuple(int(min(100, max(0, round(100 * v / size)))) for v in (x - r, y - r, x + r, y + r))


def _call(name: str, *numbers: int) -> str:
    return "[" + " ".join([name, *map(str, numbers)]) + "]"


def tell_steps(image: Image.Image, texts: list[str]) -> list[str | Image.Image]:
    """Interleave texts with the outputs of the calls they hold; each call acts on the previous image."""
    steps = []
    for text in texts:
        steps.append(text)
        if CALL.search(text):
            image = call_tool(text, image)
            steps.append(image)
    return steps


def final(reading: str, answer: str) -> str:
    return f"{reading} Answer: {answer}"


# crop: read the digit on one of five objects; zoom: the same, smaller, in panels


def _sample_objects(rng: np.random.Generator, count: int, r: tuple[int, int]) -> list[tuple]:
    """(x, y, r, shape, colour, digit) on a jittered 3 x 3 grid; colours differ."""
    objects = []
    for cell, colour in zip(_pick(rng, range(9), count), _pick(rng, list(COLOURS), count)):
        radius = int(rng.integers(*r))
        jitter = [int(v) for v in rng.integers(radius - 20, 21 - radius, 2)]
        objects.append((21 + 43 * (cell % 3) + jitter[0], 21 + 43 * (cell // 3) + jitter[1], radius,
                        SHAPES[int(rng.integers(4))], colour, int(rng.integers(10))))
    return objects


def sample_crop(rng: np.random.Generator) -> Spec:
    objects = _sample_objects(rng, 5, (15, 19))
    _, _, _, shape, colour, digit = objects[0]
    return dict(family="crop", objects=objects, height=8, question=f"Which digit is on the {colour} {shape}?",
                answer=DIGITS[digit], options=_options(rng, DIGITS[digit], DIGITS))


def sample_zoom(rng: np.random.Generator) -> Spec:
    """Five objects in four panels; the smaller the mark, the more crops it takes (1 to 3)."""
    calls = int(rng.integers(1, 4))
    radius, height = {1: (16, 14), 2: (13, 11), 3: (12, 8)}[calls]
    objects = []
    for panel, colour in zip(_pick(rng, [0, 1, 2, 3], 4), _pick(rng, list(COLOURS), 4)):
        x, y = (int(v) for v in rng.integers(radius + 3, 61 - radius, 2))
        objects.append((x + 64 * (panel % 2), y + 64 * (panel // 2), radius, SHAPES[int(rng.integers(4))], colour,
                        int(rng.integers(10))))
    _, _, _, shape, colour, digit = objects[0]
    return dict(family="zoom", objects=objects, height=height, calls=calls,
                question=f"Which digit is on the {colour} {shape}?",
                answer=DIGITS[digit], options=_options(rng, DIGITS[digit], DIGITS))


def draw_objects(spec: Spec) -> Image.Image:
    image, draw = _canvas(spec)
    if "calls" in spec:
        draw.line((64, 0, 64, SIZE), fill=(120, 120, 120), width=2)
        draw.line((0, 64, SIZE, 64), fill=(120, 120, 120), width=2)
    for x, y, r, shape, colour, digit in spec["objects"]:
        _shape(draw, shape, x, y, r, COLOURS[colour])
        _glyph(image, digit, x, y + (r // 4 if shape == "triangle" else 0), spec["height"], mark_ink(colour))
    return image


def mark_ink(colour: str) -> tuple[int, int, int]:
    return tuple(v * 3 // 10 for v in COLOURS[colour])


def panel_name(x: int, y: int) -> str:
    return PANELS[2 * (y >= 64) + (x >= 64)]


def _read(spec: Spec) -> str:
    return final(f"The digit is {spec['answer']}.", spec["answer"])


def tell_crop(spec: Spec, image: Image.Image) -> list:
    x, y, r, shape, colour, _ = spec["objects"][0]
    return tell_steps(image, [f"Zoom in on the {colour} {shape}. " + _call("crop", *box(x, y, r)), _read(spec)])


def tell_zoom(spec: Spec, image: Image.Image) -> list:
    x, y, r, shape, colour, _ = spec["objects"][0]
    if spec["calls"] == 1:
        return tell_crop(spec, image)
    corner = (64 * (x >= 64), 64 * (y >= 64))
    texts = [f"Zoom in on the {panel_name(x, y)} panel. " + _call("crop", *box(corner[0] + 32, corner[1] + 32, 32)),
             f"Zoom in on the {colour} {shape}. " + _call("crop", *box(x, y, r, corner, 64))]
    if spec["calls"] == 3:
        lower = r // 4 if shape == "triangle" else 0
        texts.append("Zoom in on the mark. " + _call("crop", *box(r, r + lower, 7, size=2 * r)))
    return tell_steps(image, texts + [_read(spec)])


# highlight: which of the dotted bars is tallest; with +crop, the digit below it; tallest: of all bars (held out)


def sample_highlight(rng: np.random.Generator, digits: bool = False) -> Spec:
    colours = _pick(rng, list(COLOURS), 6)
    heights = [int(v) for v in 18 + 3 * rng.permutation(28)[:6]]  # px, no two alike
    dotted = sorted(int(i) for i in rng.permutation(6)[:int(rng.integers(2, 4))])
    bars = [(4 + 21 * i, heights[i], colours[i], i in dotted, int(rng.integers(10))) for i in range(6)]
    tallest = max((bar for bar in bars if bar[3]), key=lambda bar: bar[1])
    if digits:
        return dict(family="highlight+crop", bars=bars, question="Which digit is under the tallest dotted bar?",
                    answer=DIGITS[tallest[4]], options=_options(rng, DIGITS[tallest[4]], DIGITS))
    return dict(family="highlight", bars=bars, question="Which dotted bar is the tallest?",
                answer=tallest[2], options=_options(rng, tallest[2], colours))


def sample_tallest(rng: np.random.Generator) -> Spec:
    """Large, easy perception: no tool is needed, and no trajectory is about it."""
    spec = sample_highlight(rng)
    ranks = _pick(rng, range(8), 6)
    ranks = [10 if rank == max(ranks) else rank for rank in ranks]  # stands out by 24 px or more
    bars = [(x, 18 + 8 * rank, *rest) for (x, _, *rest), rank in zip(spec["bars"], ranks)]
    tallest = max(bars, key=lambda bar: bar[1])[2]
    return dict(family="tallest", bars=bars, question="Which bar is the tallest?", answer=tallest,
                options=_options(rng, tallest, [bar[2] for bar in bars]))


def draw_bars(spec: Spec) -> Image.Image:
    image, draw = _canvas(spec)
    for x, height, colour, dotted, digit in spec["bars"]:
        draw.rectangle((x, 110 - height, x + 14, 110), fill=COLOURS[colour])
        if dotted:
            draw.ellipse((x + 4, 100, x + 10, 106), fill=(250, 250, 250))
        if spec["family"] == "highlight+crop":
            _glyph(image, digit, x + 7, 119, 12, (235, 235, 235))
    return image


def tell_highlight(spec: Spec, image: Image.Image) -> list:
    """The call boxes the dotted bars (their digits too); reading names the tallest, or crops its digit."""
    percent = lambda v: int(min(100, round(100 * v / SIZE)))
    digits = spec["family"] == "highlight+crop"
    dotted = [bar for bar in spec["bars"] if bar[3]]
    numbers = [n for x, h, *_ in dotted for n in (percent(x - 1), percent(108 - h), percent(x + 16), 100 if digits else 87)]
    tallest = max(dotted, key=lambda bar: bar[1])
    texts = ["Highlight the dotted bars. " + _call("highlight", *numbers)]
    if digits:
        texts.append(f"The {tallest[2]} bar is the tallest. " + _call("crop", *box(tallest[0] + 7, 118, 9)))
    texts.append(_read(spec) if digits else final(f"The {spec['answer']} bar is the tallest.", spec["answer"]))
    return tell_steps(image, texts)


# depth: which of two marked balls is nearer (nearer is brighter; texture and overlap confuse)


def sample_depth(rng: np.random.Generator) -> Spec:
    while True:
        nearness = sorted(int(v) for v in rng.permutation(16)[:6])  # 0 far .. 15 near, painted in this order
        balls = [tuple(int(v) for v in (*rng.integers(24, 105, 2), rng.integers(16, 24) + z // 3)) + (z,) for z in nearness]
        visible = [i for i, (x, y, _, _) in enumerate(balls)  # the ball's centre, where the mark goes, is not covered
                   if all((x - a) ** 2 + (y - b) ** 2 > (r + 6) ** 2 for a, b, r, _ in balls[i + 1:])]
        marked = _pick(rng, visible, 2)
        if len(marked) == 2 and abs(balls[marked[0]][3] - balls[marked[1]][3]) >= 2:
            break
    names = _pick(rng, list(COLOURS), 2)
    nearer = names[0] if balls[marked[0]][3] > balls[marked[1]][3] else names[1]
    return dict(family="depth", balls=balls, marks=list(zip(marked, names)),
                question=f"Which mark is nearer, {names[0]} or {names[1]}?", answer=nearer, options=names)


def draw_balls(spec: Spec) -> Image.Image:
    image, draw = _canvas(spec, 20, 40)
    rng = np.random.default_rng(zlib.crc32(repr(spec).encode()) + 1)
    for x, y, r, z in spec["balls"]:
        level = 60 + 11 * z
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(level,) * 3, outline=(20, 20, 20))
        for _ in range(10):  # dark and bright flecks that a direct look at one spot cannot tell from shading
            a, b = rng.integers(-r * 2 // 3, r * 2 // 3, 2)
            shade = int(np.clip(level + rng.choice([-60, 60]), 0, 255))
            draw.rectangle((x + a - 2, y + b - 2, x + a + 2, y + b + 2), fill=(shade,) * 3)
    for i, name in spec["marks"]:
        x, y = spec["balls"][i][:2]
        draw.rectangle((x - 3, y - 3, x + 3, y + 3), fill=COLOURS[name])
    return image


def tell_depth(spec: Spec, image: Image.Image) -> list:
    return tell_steps(image, ["Look at the depth. " + _call("depth"),
                              final(f"The {spec['answer']} mark is brighter.", spec["answer"])])


# jigsaw: which framed piece completes the picture


def _sample_picture(rng: np.random.Generator) -> tuple:
    """Four corner colours, alike, and a stroke (x0, y0, x1, y1, grey) of a 72 x 72 picture."""
    base = rng.integers(60, 196, 3)
    corners = tuple(tuple(int(v) for v in base + rng.integers(-50, 51, 3)) for _ in range(4))
    strokes = (tuple(int(v) for v in (*rng.integers(0, 73, 4), rng.integers(0, 256))),)
    return corners, strokes


def sample_jigsaw(rng: np.random.Generator) -> Spec:
    frames = _pick(rng, list(COLOURS), 4)
    order = [int(v) for v in rng.permutation(4)]  # content of each place: 0 the right piece, 1 it turned by 180, 2 and 3 foreign
    answer = frames[order.index(0)]
    return dict(family="jigsaw", pictures=[_sample_picture(rng) for _ in range(3)], hole=int(rng.integers(4)), order=order,
                frames=frames, question="Which piece completes the picture?", answer=answer,
                options=_pick(rng, frames, 4))


def _picture(corners: tuple, strokes: tuple) -> Image.Image:
    small = np.array(corners, dtype=np.uint8).reshape(2, 2, 3)
    image = Image.fromarray(small).resize((2 * HOLE, 2 * HOLE), Image.Resampling.BILINEAR)
    draw = ImageDraw.Draw(image)
    for x0, y0, x1, y1, grey in strokes:
        draw.line((x0, y0, x1, y1), fill=(grey,) * 3, width=7)
    return image


def draw_jigsaw(spec: Spec) -> Image.Image:
    image, draw = _canvas(spec, 10, 30)
    pictures = [_picture(*p) for p in spec["pictures"]]
    hx, hy = HOLE * (spec["hole"] % 2), HOLE * (spec["hole"] // 2)
    cut = [p.crop((hx, hy, hx + HOLE, hy + HOLE)) for p in pictures]
    contents = [cut[0], cut[0].rotate(180), cut[1], cut[2]]
    image.paste(pictures[0], (5, 5))
    draw.rectangle((5 + hx, 5 + hy, 4 + hx + HOLE, 4 + hy + HOLE), fill=(0, 0, 0))
    for (x, y), frame, content in zip(PIECES, spec["frames"], spec["order"]):
        draw.rectangle((x, y, x + HOLE + 2 * FRAME - 1, y + HOLE + 2 * FRAME - 1), fill=COLOURS[frame])
        image.paste(contents[content], (x + FRAME, y + FRAME))
    return image


def tell_jigsaw(spec: Spec, image: Image.Image) -> list:
    return tell_steps(image, ["Try the pieces. " + _call("jigsaw"),
                              final(f"The {spec['answer']} piece fits.", spec["answer"])])


# path: where does the route from the ring end; with +crop, the digit at its end


def sample_path(rng: np.random.Generator, digits: bool = False) -> Spec:
    """Four node-disjoint walks on a 5 x 5 lattice; the first starts at the ring, each ends in a coloured disc."""
    while True:
        used, walks = set(), []
        for length in (int(rng.integers(3, 7)), *(int(v) for v in rng.integers(1, 5, 3))):
            node = (int(rng.integers(5)), int(rng.integers(5)))
            walk = []
            while node not in used and len(walk) <= length:
                walk.append(node)
                used.add(node)
                x, y = node
                free = [n for n in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1))
                        if n not in used and 0 <= n[0] < 5 and 0 <= n[1] < 5]
                if not free:
                    break
                node = free[int(rng.integers(len(free)))]
            walks.append(walk)
        if len(walks[0]) >= 4 and all(len(walk) >= 2 for walk in walks):
            break
    colours = _pick(rng, list(COLOURS), 4)
    ends = [int(v) for v in rng.integers(0, 10, 4)]
    spec = dict(family="path", walks=walks, colours=colours, digits=ends, question="Where does the route from the ring end?",
                answer=colours[0], options=_pick(rng, colours, 4))
    if digits:
        spec |= dict(family="path+crop", question="Which digit is at the end of the route from the ring?",
                     answer=DIGITS[ends[0]], options=_options(rng, DIGITS[ends[0]], DIGITS))
    return spec


def node_xy(node: tuple[int, int]) -> tuple[int, int]:
    return 14 + 25 * node[0], 14 + 25 * node[1]


def draw_routes(spec: Spec) -> Image.Image:
    image, draw = _canvas(spec)
    digits = spec["family"] == "path+crop"
    for n, (walk, colour, digit) in enumerate(zip(spec["walks"], spec["colours"], spec["digits"])):
        points = [node_xy(node) for node in walk]
        draw.line(points, fill=(ROUTE_SHADE,) * 3, width=4, joint="curve")
        x, y = points[-1]
        r = 10 if digits else 8
        draw.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
        if digits:
            _glyph(image, digit, x, y, 12, mark_ink(colour))
        if n == 0:
            x, y = points[0]
            draw.ellipse((x - 8, y - 8, x + 8, y + 8), outline=RING, width=4)
    return image


def tell_path(spec: Spec, image: Image.Image) -> list:
    start, end = (node_xy(spec["walks"][0][n]) for n in (0, -1))
    texts = ["Trace the route. " + _call("path", *(round(100 * v / SIZE) for v in start))]
    if spec["family"] == "path+crop":
        texts += [f"It ends at the {spec['colours'][0]} disc. " + _call("crop", *box(*end, 11)), _read(spec)]
    else:
        texts.append(final(f"It ends at the {spec['answer']} disc.", spec["answer"]))
    return tell_steps(image, texts)


FAMILIES: dict[str, Family] = {
    "crop": Family(sample_crop, draw_objects, tell_crop),
    "highlight": Family(sample_highlight, draw_bars, tell_highlight),
    "depth": Family(sample_depth, draw_balls, tell_depth),
    "jigsaw": Family(sample_jigsaw, draw_jigsaw, tell_jigsaw),
    "path": Family(sample_path, draw_routes, tell_path),
    "zoom": Family(sample_zoom, draw_objects, tell_zoom),
    "highlight+crop": Family(lambda rng: sample_highlight(rng, digits=True), draw_bars, tell_highlight),
    "path+crop": Family(lambda rng: sample_path(rng, digits=True), draw_routes, tell_path),
    "tallest": Family(sample_tallest, draw_bars, lambda spec, image: []),
}
REGIMES: dict[str, list[str]] = {
    "single": ["crop"],  # one tool type, one call
    "mixed": ["crop", "highlight", "depth", "jigsaw", "path"],  # several types, one call
    "multi": ["zoom"],  # one type, one to three calls
    "all": ["highlight+crop", "path+crop", "zoom"],  # several types, several calls
}
HELD_OUT = "tallest"  # no trajectory covers it: shows what fine-tuning forgets
BUCKETS = dict(test=range(0, 2), validation=range(2, 4), train=range(4, 10), pretrain=range(10, 16))  # of 16, by hash


def make_spec(family: str, split: str, index: int, seed: int) -> Spec:
    """The index-th scene of a family and split. Scenes of two splits never coincide: the scene's hash names its split."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), zlib.crc32(family.encode()), index])
    while True:
        spec = FAMILIES[family].sample(rng)
        if zlib.crc32(repr(spec).encode()) % 16 in BUCKETS[split]:
            return spec


def make_example(family: str, split: str, index: int, seed: int) -> Example:
    spec = make_spec(family, split, index, seed)
    image = FAMILIES[family].draw(spec)
    return Example(f"{family}-{split}-{index:05d}", family, image, spec["question"], spec["options"], spec["answer"],
                   FAMILIES[family].tell(spec, image), split)


def make_world(regime: str, split: str, count: int, seed: int = 0) -> list[Example]:
    """`count` examples, the regime's families in turn."""
    if regime not in REGIMES:
        raise ValueError(f"unknown regime {regime!r}: choose one of {', '.join(REGIMES)}")
    families = REGIMES[regime]
    return [make_example(families[i % len(families)], split, i // len(families), seed) for i in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# 4. The views (sections 3.1 to 3.4)
# ---------------------------------------------------------------------------------------------------------------------

TARGET_VIEWS = ("trajectory", "trajectory_with_image")
LATENT_START, LATENT_END = "<|vision_start|>", "<|vision_end|>"  # Deviation: the paper draws <lat> and </lat>; these two are in
# every Qwen-VL vocabulary and already mean "what comes next was seen", so no row has to be added under a frozen embedding


class View(NamedTuple):
    """One serialised sequence. `labels` repeats the token where it is supervised and is -100 elsewhere.

    `images` are indices into the data set's images, in order of appearance; `embed_at` is the position whose
    final-layer state is the view's embedding; `slots` are the positions whose input embedding is not a word's or an
    image's but given from outside: [PRED] tokens, or the latents of the reconstruction baseline.
    """

    ids: list[int]
    labels: list[int]
    images: list[int]
    embed_at: int
    slots: tuple[int, ...] = ()


class Views(NamedTuple):
    full: View
    input: View
    target: View


class Serializer:
    """Builds views from an example with the model's own chat template.

    The conversation is <I0, Q> as a user turn, each text of R as an assistant turn, each tool image as a user turn.
    It is rendered turn by turn; every turn is cut into pieces whose role is known when they are made, each piece is
    tokenised on its own, and the pieces are concatenated. Nothing is ever searched for in a decoded sequence.

    Worked example, shipped model, K = 2; I0 takes 16 image tokens, the crop 4. s supervised, - not:

        full view (L_VLM, Eq. 3, and L_NextLat, Eq. 2)
          - <|im_start|>user\\n<|vision_start|>(16 x <|image_pad|>)<|vision_end|>Which digit is on the red disc?<|im_end|>\\n
          - <|im_start|>assistant\\n
          s Zoom in on the red disc. [crop 12 30 28 46]<|im_end|>
          - \\n<|im_start|>user\\n<|vision_start|>(4 x <|image_pad|>)<|vision_end|><|im_end|>\\n
          - <|im_start|>assistant\\n
          s The digit is seven. Answer: seven<|im_end|>
        input view (h^_R, Eq. 1: state of the last [PRED])
          - the full view's first two lines, then [PRED][PRED]
        target view (h_R, Eq. 1: state of the last <|im_end|>)
          - the full view without its first line, so without I0 and Q

    Deviation: the paper embeds a view at its last token. We end every view at the token that ends the turn (the
    released code takes the same token) and put [PRED] after the generation prompt, where decoding would start; the
    released code puts them inside the user turn. target_view="trajectory_with_image" keeps I0, as the release does.
    """

    def __init__(self, tokenizer, placeholder_id: int, max_tokens: int):
        """placeholder_id: the token that the chat template writes where an image is."""
        self.tokenizer, self.placeholder_id, self.max_tokens = tokenizer, placeholder_id, max_tokens
        user = self._render([self._message("user", ["x"])])
        self.header = self._render([self._message("user", ["x"])], add_generation_prompt=True)[len(user):]
        turn = self._render([self._message("user", ["x"]), self._message("assistant", ["y"])])[len(user):]
        self.lead, found, self.ending = turn.removeprefix(self.header).partition("y")  # e.g. "" (or a space), "y", "<|im_end|>\n"
        if not turn.startswith(self.header) or self.lead.strip() or not found or not self.ending.strip():
            raise ValueError("this model's chat template does not write an assistant turn as generation prompt, text, end of turn: "
                             f"{self.header!r} and {turn!r}; give the checkpoint another chat_template.jinja")
        self.end_id = self._encode(self.ending)[0]
        self.header_ids = self._encode(self.header)
        self.reserved = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())

    @staticmethod
    def _message(role: str, parts: list) -> dict:
        return dict(role=role, content=[dict(type="text", text=p) if isinstance(p, str) else dict(type="image") for p in parts])

    def _render(self, messages: list[dict], **kwargs) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        except Exception as error:  # what the template itself raises, or a fault in it
            raise ValueError(f"the model's chat template refuses the conversation: {error}") from None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def _pieces(self, turns: list[tuple[str, list]]) -> list[tuple[str, bool]]:
        """(text, supervised) pieces of a conversation of (role, parts) turns."""
        messages, before, pieces = [], "", []
        for role, parts in turns:
            messages.append(self._message(role, parts))
            whole = self._render(messages)
            if not whole.startswith(before):
                raise ValueError("the model's chat template rewrites earlier turns; give it another chat_template.jinja")
            turn, before = whole[len(before):], whole
            if role == "assistant":
                body = self.header + self.lead + parts[0] + self.ending
                if not turn.endswith(body):
                    raise ValueError(f"the model's chat template changed the assistant's text {parts[0]!r} to {turn!r}")
                pieces += [(turn[:len(turn) - len(body)] + self.header, False), (self.lead + parts[0], True), (self.ending, True)]
            else:
                pieces.append((turn, False))
        return pieces

    def _tokens(self, pieces: list[tuple[str | int, bool]], spans: list[list[int]]) -> tuple[list[int], list[int], tuple]:
        """ids, labels and slots of (text, supervised) pieces; a number in place of a text makes as many slots."""
        ids, labels, slots, waiting = [], [], (), iter(spans)
        for text, supervised in pieces:
            if isinstance(text, int):
                slots += tuple(range(len(ids), len(ids) + text))
                ids, labels = ids + [self.end_id] * text, labels + [-100] * text
                continue
            tokens = []
            for token in self._encode(text):
                tokens += next(waiting) if token == self.placeholder_id else [token]
            ids += tokens
            known = tokens if supervised else [-100] * len(tokens)
            if supervised and text == self.ending:
                known = tokens[:1] + [-100] * (len(tokens) - 1)  # the end-of-turn token; what follows it is layout
            labels += known
        assert next(waiting, None) is None, "more images than image tokens in the rendered conversation"
        return ids, labels, slots

    def _ended(self, pieces: list[tuple[str | int, bool]], images: list[int], spans: list[list[int]]) -> View:
        """Cut the layout after the last end-of-turn token; the view's embedding is taken there."""
        ids, labels, slots = self._tokens(pieces, spans)
        extra = len(self._encode(self.ending)) - 1
        ids, labels = ids[:len(ids) - extra], labels[:len(labels) - extra]
        assert ids[-1] == self.end_id, "the view does not end at the end-of-turn token"
        return View(ids, labels, images, len(ids) - 1, slots)

    def check(self, example: Example) -> None:
        for text in [example.question, *example.options, *example.texts]:
            for token in self.reserved:
                if token in text:
                    raise ValueError(f"example {example.id}: the text contains the model's special token {token!r}; remove it")

    @staticmethod
    def turns(example: Example) -> list[tuple[str, list]]:
        steps = [("assistant", [s]) if isinstance(s, str) else ("user", [s]) for s in example.trajectory]
        return [("user", [example.image, example.question])] + steps

    def views(self, example: Example, images: list[int], spans: list[list[int]], pred_tokens: int, target_view: str) -> Views:
        """The three views of an example whose images (I0 first) have the given indices and stand in the text as `spans`."""
        if not example.texts:
            raise ValueError(f"example {example.id} has a trajectory without text: nothing to learn from")
        self.check(example)
        turns = self.turns(example)
        pieces = self._pieces(turns)
        full = self._ended(pieces, images, spans)
        prompt = self.prompt(example, images[:1], spans[:1])
        assert prompt.ids[-len(self.header_ids):] == self.header_ids or not self.header_ids, "the generation prompt is not last"
        ids = prompt.ids + [self.end_id] * pred_tokens  # placeholders: model.py puts the [PRED] rows there
        input_view = View(ids, [-100] * len(ids), images[:1], len(ids) - 1, tuple(range(len(prompt.ids), len(ids))))
        if target_view == "trajectory":
            bos = self.tokenizer.bos_token_id
            opening = [(self.tokenizer.bos_token, False)] if bos is not None and full.ids[0] == bos else []
            target = self._ended(opening + pieces[1:], images[1:], spans[1:])  # the first piece is the turn of I0 and Q
        elif target_view == "trajectory_with_image":
            shown = [("user", [example.image])] + turns[1:]
            target = self._ended(self._pieces(shown), images, spans)
        else:
            raise ValueError(f"unknown target view {target_view!r}: choose one of {', '.join(TARGET_VIEWS)}")
        for view in (full, input_view, target):
            if len(view.ids) > self.max_tokens:
                raise ValueError(f"example {example.id}: {len(view.ids)} tokens, the limit is {self.max_tokens}; "
                                 "shorten its texts, shrink its images, or raise --max_tokens")
        return Views(full, input_view, target)

    def prompt(self, example: Example, images: list[int], spans: list[list[int]], answer_prefix: str = "") -> View:
        """<I0, Q> and the generation prompt (and what the answer is made to start with): all that inference sees."""
        return self.prompt_of(self.turns(example)[:1], images, spans, answer_prefix)

    def prompt_of(self, turns: list[tuple[str, list]], images: list[int], spans: list[list[int]], answer_prefix: str = "") -> View:
        """A conversation so far and the generation prompt."""
        pieces = self._pieces(turns) + [(self.header, False), (self.lead + answer_prefix if answer_prefix else "", False)]
        ids, _, _ = self._tokens(pieces, spans)
        return View(ids, [-100] * len(ids), images, len(ids) - 1)

    def tool_prompt(self, example: Example, images: list[int], spans: list[list[int]]) -> View:
        """Everything up to the last tool image, then the generation prompt: what is left is to read it and answer."""
        turns = self.turns(example)
        while turns[-1][0] == "assistant":
            turns.pop()
        return self.prompt_of(turns, images, spans)

    def latent_view(self, example: Example, images: list[int], spans: list[list[int]], latents: int) -> View:
        """The reconstruction baseline's view: one assistant turn in which each tool image is a run of latents between markers.

        Of a tool image with P tokens the run has P latents (LVR), or `latents` where that is positive (Mirage). The end
        marker is written for the model once the run is over, so it is not supervised.
        """
        self.check(example)
        sizes = iter(spans[1:])
        pieces = self._pieces(self.turns(example)[:1]) + [(self.header, False)]
        for step in example.trajectory:
            if isinstance(step, str):
                pieces.append((step, True))
            else:
                pieces += [(LATENT_START, True), (latents or len(next(sizes)), False), (LATENT_END, False)]
        return self._ended(pieces + [(self.ending, True)], images[:1], spans[:1])


@dataclass
class Batch:
    """Views padded to a common length. All tensors are (B, T) unless said."""

    ids: torch.Tensor
    mask: torch.Tensor  # True: a token, False: padding
    labels: torch.Tensor
    slots: torch.Tensor  # True: an input embedding given from outside
    embed_at: torch.Tensor  # (B,)
    images: list[int]  # in order of appearance, row after row
    shared: torch.Tensor | None = None  # (B,) of packed batches: how many first tokens the branch sees
    branch: int = 0  # of packed batches: how many last positions are the branch

    def to(self, device) -> "Batch":
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()}
        return Batch(**moved)


def collate(views: list[View], pad_id: int, left: bool = False, width: int = 0) -> Batch:
    """Pad on the right (training) or on the left (generation), to the longest view or to `width`."""
    width = width or max(len(v.ids) for v in views)

    def padded(rows: list[list], value) -> torch.Tensor:
        return torch.tensor([[value] * (width - len(r)) + r if left else r + [value] * (width - len(r)) for r in rows])

    shift = [width - len(v.ids) if left else 0 for v in views]
    return Batch(ids=padded([v.ids for v in views], pad_id), mask=padded([[True] * len(v.ids) for v in views], False),
                 labels=padded([v.labels for v in views], -100),
                 slots=padded([[i in v.slots for i in range(len(v.ids))] for v in views], False),
                 embed_at=torch.tensor([v.embed_at + s for v, s in zip(views, shift)]),
                 images=[i for v in views for i in v.images])


def pack(views: list[Views], pad_id: int) -> Batch:
    """Full views, each followed by the part of its input view that it does not share: the two in one forward pass.

        <I0, Q> and generation prompt | R | padding | [PRED] x K       the branch at the end sees what both views share,
                     shared              full         branch           and itself; R never sees the branch

    Since attention and positions are given explicitly (VLM.embed), where the branch stands does not matter: at the end,
    so that the full view's states are a slice. `embed_at` points to h^_R (with K = 0 the last shared token).
    """
    batch = collate([v.full for v in views], pad_id)
    shared = []
    for v in views:
        same = [a == b for a, b in zip(v.full.ids, v.input.ids[:len(v.input.ids) - len(v.input.slots)])]
        shared.append((same + [False]).index(False))
    tails = [v.input.ids[n:] for v, n in zip(views, shared)]
    width, branch = batch.ids.shape[1], len(tails[0])
    assert all(len(tail) == branch for tail in tails), "branches of one batch have one length"
    grown = lambda tensor, rows: torch.cat([tensor, torch.tensor(rows, dtype=tensor.dtype).view(len(views), branch)], dim=1)
    return replace(batch, ids=grown(batch.ids, tails), mask=grown(batch.mask, [[True] * branch] * len(views)),
                   labels=grown(batch.labels, [[-100] * branch] * len(views)),
                   slots=grown(batch.slots, [[n + i in v.input.slots for i in range(branch)] for v, n in zip(views, shared)]),
                   embed_at=torch.tensor([width + branch - 1 if branch else n - 1 for n in shared]),
                   shared=torch.tensor(shared), branch=branch)


class ImageStore:
    """Every image of a data set by number: `spans[i]`, the token ids that stand for it in the text, `grids[i]`, its patches
    (t, h, w) where the family counts in three rows, and `inputs(i)`, what the vision tower takes, made when asked for.

    Pixels take a hundred times an image file's room, so none are kept; what is kept are the features made of them
    (train.image_features, bounded). Span and grid depend on an image's size alone, so none is decoded to know them.
    """

    def __init__(self, family, workers: int = 0):
        """family: model.QwenFamily or model.ProcessorFamily. workers: threads for `prefetch`."""
        self.family = family
        self.pool = ThreadPoolExecutor(workers) if workers else None
        self.coming: dict[int, Future] = {}
        self.waited = 0.0  # seconds that `inputs` took, waiting included
        self.pictures: list[Picture] = []
        self.spans: list[list[int]] = []
        self.grids: list[tuple[int, int, int] | None] = []
        self.placed: dict[tuple[int, int], tuple] = {}  # by size

    def inputs(self, index: int) -> dict[str, torch.Tensor]:
        start, coming = time.perf_counter(), self.coming.pop(index, None)
        found = coming.result() if coming else self._prepare(index)
        self.waited += time.perf_counter() - start
        return found

    def _prepare(self, index: int) -> dict[str, torch.Tensor]:
        return self.family.inputs(opened(self.pictures[index]))

    def prefetch(self, indices: list[int]) -> None:
        """Begin to prepare these images in the background, and forget what was begun and never asked for."""
        if self.pool:
            self.coming = {i: self.coming.get(i) or self.pool.submit(self._prepare, i) for i in indices}

    def add(self, example: Example) -> tuple[list[int], list[list[int]]]:
        """Place the example's images; return their indices and spans. Raises ValueError naming the example."""
        indices = [self.add_image(image, f"example {example.id}: image {n}") for n, image in enumerate(example.images)]
        return indices, [self.spans[i] for i in indices]

    def add_image(self, picture: Picture, where: str) -> int:
        """Keep the picture, its span and its grid. What the family rejects stops here, before training."""
        size = image_size(picture)
        if size not in self.placed:
            try:
                self.placed[size] = self.family.place(*size)
            except ValueError as error:
                raise ValueError(f"{where} ({size[0]} x {size[1]} px) is rejected by the image processor: {error}; "
                                 "crop or drop it") from None
        span, grid = self.placed[size]
        self.pictures.append(picture)
        self.spans.append(span)
        self.grids.append(grid)
        return len(self.pictures) - 1


# ---------------------------------------------------------------------------------------------------------------------
# A look at the data, and the command line
# ---------------------------------------------------------------------------------------------------------------------


def contact_sheet(examples: list[Example], width: int = 1500, side: int = 132) -> Image.Image:
    """One row an example: I0, the question, then texts and tool images in order."""
    font = ImageFont.load_default()
    columns = 2 + max(len(ex.trajectory) for ex in examples)
    cell = width // columns
    sheet = Image.new("RGB", (width, (side + 12) * len(examples)), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, text: str) -> None:
        line, lines = "", []
        for word in text.split():
            if draw.textlength(f"{line} {word}", font=font) > cell - 14 and line:
                lines, line = lines + [line], word
            else:
                line = f"{line} {word}".strip()
        draw.multiline_text((x + 4, y + 4), "\n".join(lines + [line]), fill="black", font=font)

    for row, ex in enumerate(examples):
        y = row * (side + 12)
        asked = f"{ex.family}: {ex.question} Options: {', '.join(ex.options)}."
        for column, step in enumerate([opened(ex.image), asked, *(s if isinstance(s, str) else opened(s) for s in ex.trajectory)]):
            x = column * cell
            if isinstance(step, str):
                write(x, y, step)
            else:
                scale = min(side, cell - 6) / max(step.size)
                size = [max(1, round(length * scale)) for length in step.size]
                sheet.paste(step.resize(size, Image.Resampling.NEAREST), (x, y))
        draw.line((0, y + side + 5, width, y + side + 5), fill=(200, 200, 200))
    return sheet


def refuse(problems: list[str]) -> None:
    """Raise ValueError with the first twenty of them, if there are any."""
    if problems:
        raise ValueError("\n  ".join([f"{len(problems)} records cannot be used:", *problems[:20], *["..."] * (len(problems) > 20)]))


def count_splits(examples: list[Example]) -> str:
    counts = {split: sum(ex.split == split for ex in examples) for split in SPLITS}
    return f"{len(examples)} records are well-formed; " + ", ".join(f"{n} {split}" for split, n in counts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="new folder to write")
    parser.add_argument("--regime", choices=list(REGIMES), default="mixed")
    parser.add_argument("--count", type=int, default=40, help="training examples; a quarter as many for validation and for test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=Path, metavar="DIR", help="read a data folder wholly, report every problem")
    parser.add_argument("--outside_images", action="store_true", help="with --check: image paths may leave the folder")
    args = parser.parse_args()
    if args.check:
        problems: list[str] = []
        examples = read_folder(args.check, args.outside_images, problems)
        print(f"{args.check}: {count_splits(examples)}")
        refuse(problems)
    elif args.out:
        if args.count < 1:
            parser.error("--count must be at least 1")
        examples = [ex for split, share in zip(SPLITS, (1, 4, 4))
                    for ex in make_world(args.regime, split, max(1, args.count // share), args.seed)]
        write_folder(args.out, examples)
        contact_sheet(examples[:10]).save(args.out / "contact_sheet.png")
        print(f"wrote {len(examples)} examples and contact_sheet.png to {args.out}")
    else:
        parser.error("give --out DIR to write a data folder or --check DIR to read one")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
