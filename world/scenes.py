"""The small world: procedural scenes whose questions need a tool, drawn from a seed, with the
expert's trajectory.

It stands in for the paper's three data sets, small enough that every system of the comparison
trains in minutes. A family is three functions: sample a spec from a generator, draw it, tell its
trajectory. A spec is a dict of plain ints and strings; its hash decides the split, so no two splits
share a scene. `python data.py --out DIR` writes a folder of them to look at.
"""

import zlib
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from support.images import opened
from support.records import SPLITS, Example, write_folder
from support.tables import HELD_OUT
from world.tools import CALL, FRAME, HOLE, PIECES, RING, ROUTE_SHADE, call_tool

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
GLYPHS = [np.array([[int(bit) * 255 for bit in row] for row in g.split()], dtype=np.uint8)
          for g in GLYPHS]
Spec = dict
NO_DOTS = f"{HELD_OUT} without dots"


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
    mask = Image.fromarray(GLYPHS[digit]).resize((round(height * 5 / 7), height),
                                                 Image.Resampling.NEAREST)
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


def percent(pixels: float, size: int = SIZE) -> int:
    """A place in hundredths of `size` px, as calls have it."""
    return int(min(100, max(0, round(100 * pixels / size))))


def box(x: float, y: float, r: float, origin=(0, 0), size: int = SIZE) -> tuple[int, ...]:
    """Left, top, right, bottom of the square around (x, y), in hundredths of an image of `size` px
    whose corner is at `origin`."""
    x, y = x - origin[0], y - origin[1]
    return tuple(percent(v, size) for v in (x - r, y - r, x + r, y + r))


def _call(name: str, *numbers: int) -> str:
    return "[" + " ".join([name, *map(str, numbers)]) + "]"


def tell_steps(image: Image.Image, texts: list[str]) -> list[str | Image.Image]:
    """Texts, each followed by the output of the call that it holds, if it holds one; a call acts on
    the previous image."""
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
    return dict(family="crop", objects=objects, height=8,
                question=f"Which digit is on the {colour} {shape}?",
                answer=DIGITS[digit], options=_options(rng, DIGITS[digit], DIGITS))


def sample_zoom(rng: np.random.Generator) -> Spec:
    """Five objects in four panels; the smaller the mark, the more crops it takes (1 to 3)."""
    calls = int(rng.integers(1, 4))
    radius, height = {1: (16, 14), 2: (13, 11), 3: (12, 8)}[calls]
    objects = []
    for panel, colour in zip(_pick(rng, [0, 1, 2, 3], 4), _pick(rng, list(COLOURS), 4)):
        x, y = (int(v) for v in rng.integers(radius + 3, 61 - radius, 2))
        objects.append((x + 64 * (panel % 2), y + 64 * (panel // 2), radius,
                        SHAPES[int(rng.integers(4))], colour,
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
        _glyph(image, digit, x, y + (r // 4 if shape == "triangle" else 0), spec["height"],
               mark_ink(colour))
    return image


def mark_ink(colour: str) -> tuple[int, int, int]:
    return tuple(v * 3 // 10 for v in COLOURS[colour])


def panel_name(x: int, y: int) -> str:
    return PANELS[2 * (y >= 64) + (x >= 64)]


def _read(spec: Spec) -> str:
    return final(f"The digit is {spec['answer']}.", spec["answer"])


def tell_crop(spec: Spec, image: Image.Image) -> list:
    x, y, r, shape, colour, _ = spec["objects"][0]
    return tell_steps(image, [f"Zoom in on the {colour} {shape}. " + _call("crop", *box(x, y, r)),
                              _read(spec)])


def tell_zoom(spec: Spec, image: Image.Image) -> list:
    x, y, r, shape, colour, _ = spec["objects"][0]
    if spec["calls"] == 1:
        return tell_crop(spec, image)
    corner = (64 * (x >= 64), 64 * (y >= 64))
    texts = [f"Zoom in on the {panel_name(x, y)} panel. "
             + _call("crop", *box(corner[0] + 32, corner[1] + 32, 32)),
             f"Zoom in on the {colour} {shape}. " + _call("crop", *box(x, y, r, corner, 64))]
    if spec["calls"] == 3:
        lower = r // 4 if shape == "triangle" else 0
        texts.append("Zoom in on the mark. " + _call("crop", *box(r, r + lower, 7, size=2 * r)))
    return tell_steps(image, texts + [_read(spec)])


# highlight: which of the dotted bars is tallest; with +crop, the digit below it;
# tallest: of all bars (held out)


def sample_highlight(rng: np.random.Generator, digits: bool = False) -> Spec:
    colours = _pick(rng, list(COLOURS), 6)
    heights = [int(v) for v in 18 + 3 * rng.permutation(28)[:6]]  # px, no two alike
    dotted = sorted(int(i) for i in rng.permutation(6)[:int(rng.integers(2, 4))])
    bars = [(4 + 21 * i, heights[i], colours[i], i in dotted, int(rng.integers(10)))
            for i in range(6)]
    tallest = max((bar for bar in bars if bar[3]), key=lambda bar: bar[1])
    if digits:
        return dict(family="highlight+crop", bars=bars,
                    question="Which digit is under the tallest dotted bar?",
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


def draw_bars(spec: Spec, dots: bool = True) -> Image.Image:
    image, draw = _canvas(spec)
    for x, height, colour, dotted, digit in spec["bars"]:
        draw.rectangle((x, 110 - height, x + 14, 110), fill=COLOURS[colour])
        if dotted and dots:
            draw.ellipse((x + 4, 100, x + 10, 106), fill=(250, 250, 250))
        if spec["family"] == "highlight+crop":
            _glyph(image, digit, x + 7, 119, 12, (235, 235, 235))
    return image


def tell_highlight(spec: Spec, image: Image.Image) -> list:
    """The call boxes the dotted bars (their digits too); reading names the tallest, or crops its
    digit."""
    digits = spec["family"] == "highlight+crop"
    dotted = [bar for bar in spec["bars"] if bar[3]]
    numbers = [n for x, h, *_ in dotted
               for n in (percent(x - 1), percent(108 - h), percent(x + 16), 100 if digits else 87)]
    tallest = max(dotted, key=lambda bar: bar[1])
    texts = ["Highlight the dotted bars. " + _call("highlight", *numbers)]
    if digits:
        texts.append(f"The {tallest[2]} bar is the tallest. "
                     + _call("crop", *box(tallest[0] + 7, 118, 9)))
    texts.append(_read(spec) if digits else
                 final(f"The {spec['answer']} bar is the tallest.", spec["answer"]))
    return tell_steps(image, texts)


# depth: which of two marked balls is nearer (nearer is brighter; texture and overlap confuse)


def sample_depth(rng: np.random.Generator) -> Spec:
    while True:
        # 0 far .. 15 near, painted in this order
        nearness = sorted(int(v) for v in rng.permutation(16)[:6])
        balls = [tuple(int(v) for v in (*rng.integers(24, 105, 2), rng.integers(16, 24) + z // 3))
                 + (z,) for z in nearness]
        # the ball's centre, where the mark goes, is not covered
        visible = [i for i, (x, y, _, _) in enumerate(balls)
                   if all((x - a) ** 2 + (y - b) ** 2 > (r + 6) ** 2
                           for a, b, r, _ in balls[i + 1:])]
        marked = _pick(rng, visible, 2)
        if len(marked) == 2 and abs(balls[marked[0]][3] - balls[marked[1]][3]) >= 2:
            break
    names = _pick(rng, list(COLOURS), 2)
    nearer = names[0] if balls[marked[0]][3] > balls[marked[1]][3] else names[1]
    return dict(family="depth", balls=balls, marks=list(zip(marked, names)),
                question=f"Which mark is nearer, {names[0]} or {names[1]}?", answer=nearer,
                options=names)


def draw_balls(spec: Spec) -> Image.Image:
    image, draw = _canvas(spec, 20, 40)
    rng = np.random.default_rng(zlib.crc32(repr(spec).encode()) + 1)
    for x, y, r, z in spec["balls"]:
        level = 60 + 11 * z
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(level,) * 3, outline=(20, 20, 20))
        # dark and bright flecks that a direct look at one spot cannot tell from shading
        for _ in range(10):
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
    # content of each place: 0 the right piece, 1 it turned by 180, 2 and 3 foreign
    order = [int(v) for v in rng.permutation(4)]
    answer = frames[order.index(0)]
    return dict(family="jigsaw", pictures=[_sample_picture(rng) for _ in range(3)],
                hole=int(rng.integers(4)), order=order,
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
        draw.rectangle((x, y, x + HOLE + 2 * FRAME - 1, y + HOLE + 2 * FRAME - 1),
                       fill=COLOURS[frame])
        image.paste(contents[content], (x + FRAME, y + FRAME))
    return image


def tell_jigsaw(spec: Spec, image: Image.Image) -> list:
    return tell_steps(image, ["Try the pieces. " + _call("jigsaw"),
                              final(f"The {spec['answer']} piece fits.", spec["answer"])])


# path: where does the route from the ring end; with +crop, the digit at its end


def sample_path(rng: np.random.Generator, digits: bool = False) -> Spec:
    """Four node-disjoint walks on a 5 x 5 lattice; the first starts at the ring, each ends in a
    coloured disc."""
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
    spec = dict(family="path", walks=walks, colours=colours, digits=ends,
                question="Where does the route from the ring end?",
                answer=colours[0], options=_pick(rng, colours, 4))
    if digits:
        spec |= dict(family="path+crop",
                     question="Which digit is at the end of the route from the ring?",
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
        texts += [f"It ends at the {spec['colours'][0]} disc. " + _call("crop", *box(*end, 11)),
                  _read(spec)]
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
    "highlight+crop": Family(lambda rng: sample_highlight(rng, digits=True), draw_bars,
                             tell_highlight),
    "path+crop": Family(lambda rng: sample_path(rng, digits=True), draw_routes, tell_path),
    "tallest": Family(sample_tallest, draw_bars, lambda spec, image: []),
}
REGIMES: dict[str, list[str]] = {
    "single": ["crop"],  # one tool type, one call
    "mixed": ["crop", "highlight", "depth", "jigsaw", "path"],  # several types, one call
    "multi": ["zoom"],  # one type, one to three calls
    "all": ["highlight+crop", "path+crop", "zoom"],  # several types, several calls
}
# of 16, by hash
BUCKETS = dict(test=range(0, 2), validation=range(2, 4), train=range(4, 10),
               pretrain=range(10, 16))


def make_spec(family: str, split: str, index: int, seed: int) -> Spec:
    """The index-th scene of a family and split. Scenes of two splits never coincide: the scene's
    hash names its split."""
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), zlib.crc32(family.encode()),
                                 index])
    while True:
        spec = FAMILIES[family].sample(rng)
        if zlib.crc32(repr(spec).encode()) % 16 in BUCKETS[split]:
            return spec


def make_example(family: str, split: str, index: int, seed: int) -> Example:
    spec = make_spec(family, split, index, seed)
    image = FAMILIES[family].draw(spec)
    return Example(f"{family}-{split}-{index:05d}", family, image, spec["question"],
                   spec["options"], spec["answer"],
                   FAMILIES[family].tell(spec, image), split)


def tallest_without_dots(split: str, index: int, seed: int) -> Example:
    """`tallest`'s scene of that index, pixel for pixel but for its dots: nothing in it can be taken
    for `highlight`'s question. No family of its own, so that no scene, split or corpus changes by
    it."""
    spec = make_spec(HELD_OUT, split, index, seed)
    return Example(f"{NO_DOTS}-{split}-{index:05d}".replace(" ", "-"), NO_DOTS,
                   draw_bars(spec, dots=False), spec["question"], spec["options"], spec["answer"],
                   [], split)


def make_world(regime: str, split: str, count: int, seed: int = 0) -> list[Example]:
    """`count` examples, the regime's families in turn."""
    if regime not in REGIMES:
        raise ValueError(f"unknown regime {regime!r}: choose one of {', '.join(REGIMES)}")
    families = REGIMES[regime]
    return [make_example(families[i % len(families)], split, i // len(families), seed)
            for i in range(count)]


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
        asked = f"{ex.task}: {ex.question} Options: {', '.join(ex.options)}."
        for column, step in enumerate([
                opened(ex.image), asked,
                *(s if isinstance(s, str) else opened(s) for s in ex.trajectory)]):
            x = column * cell
            if isinstance(step, str):
                write(x, y, step)
            else:
                scale = min(side, cell - 6) / max(step.size)
                size = [max(1, round(length * scale)) for length in step.size]
                sheet.paste(step.resize(size, Image.Resampling.NEAREST), (x, y))
        draw.line((0, y + side + 5, width, y + side + 5), fill=(200, 200, 200))
    return sheet


def write_sample(out: Path, regime: str, count: int, seed: int) -> None:
    """A data folder to look at, and its contact sheet: `count` training examples, a quarter as many
    of the other splits."""
    examples = [ex for split, share in zip(SPLITS, (1, 4, 4))
                for ex in make_world(regime, split, max(1, count // share), seed)]
    write_folder(out, examples)
    contact_sheet(examples[:10]).save(out / "contact_sheet.png")
    print(f"wrote {len(examples)} examples and contact_sheet.png to {out}")
