"""The small world: scenes from a seed, questions that need a tool, and the expert's trajectories.

world/README.md says what a task and a spec are. The hash of a spec's repr decides its split, so a
change to a key or to the order of keys would change the scenes. "family" is the task's name.
"""

import zlib
from collections import namedtuple
from collections.abc import Iterator
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

from support.records import Example
from support.tables import HELD_OUT
from world.tools import FRAME, HOLE, PIECES, RING, ROUTE_SHADE, call_tool

SIZE = 128  # px; the shipped model reads 64 x 64, so a crop shows it more than the image does
COLOURS = dict(red=(215, 45, 45), green=(40, 165, 65), blue=(60, 95, 225), yellow=(230, 215, 60),
               purple=(150, 55, 190), orange=(240, 140, 35))
DARK = {name: tuple(v * 3 // 10 for v in colour) for name, colour in COLOURS.items()}
SHAPES = ("disc", "square", "triangle", "diamond")
# of a shape of radius 1 around (0, 0)
CORNERS = dict(square=((-1, -1), (1, -1), (1, 1), (-1, 1)), triangle=((0, -1), (1, 1), (-1, 1)),
               diamond=((0, -1), (1, 0), (0, 1), (-1, 0)))
PANELS = ("top left", "top right", "bottom left", "bottom right")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# One 5 x 7 bitmap for each digit, one group for each row. Fonts would differ between machines
BITMAPS = (
    "01110 10001 10011 10101 11001 10001 01110", "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111", "11110 00001 00001 01110 00001 00001 11110",
    "00010 00110 01010 10010 11111 00010 00010", "11111 10000 11110 00001 00001 10001 01110",
    "01110 10000 10000 11110 10001 10001 01110", "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110", "01110 10001 10001 01111 00001 00001 01110")
GLYPHS = [np.array([[int(bit) * 255 for bit in row] for row in bitmap.split()], dtype=np.uint8)
          for bitmap in BITMAPS]


def _choose(rng: np.random.Generator, items, count: int) -> list:
    return [items[int(i)] for i in rng.permutation(len(items))[:count]]


def _question(rng: np.random.Generator, question: str, answer: str, candidates=DIGITS) -> dict:
    """The end of a spec. The options are the answer and up to three other candidates, shuffled."""
    others = _choose(rng, [c for c in candidates if c != answer], 3)
    return dict(question=question, answer=answer, options=_choose(rng, [answer, *others], 4))


def _canvas(spec: dict, low: int = 20, high: int = 60) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A dark background with noise, the same for the same spec, and a pen for it."""
    rng = np.random.default_rng(zlib.crc32(repr(spec).encode()))
    noise = Image.fromarray(rng.integers(low, high, (32, 32, 3), dtype=np.uint8))
    image = noise.resize((SIZE, SIZE), Image.NEAREST)
    return image, ImageDraw.Draw(image)


def _draw_digit(image: Image.Image, digit: int, x: int, y: int, height: int, ink: tuple) -> None:
    mask = Image.fromarray(GLYPHS[digit]).resize((round(height * 5 / 7), height), Image.NEAREST)
    image.paste(ink, (x - mask.width // 2, y - mask.height // 2), mask)


def percent(pixels: float, size: int = SIZE) -> int:
    """A place in hundredths of `size` px, as calls have it."""
    return int(min(100, max(0, round(100 * pixels / size))))


def box(x: float, y: float, r: float, origin=(0, 0), size: int = SIZE) -> tuple[int, ...]:
    """Left, top, right, bottom of the square around (x, y), in hundredths of an image of `size` px
    whose corner is at `origin`."""
    x, y = x - origin[0], y - origin[1]
    return tuple(percent(v, size) for v in (x - r, y - r, x + r, y + r))


def _call(plan: str, tool: str, *numbers: int) -> str:
    return f"{plan} [{' '.join([tool, *map(str, numbers)])}]"


# ---- crop: read the digit on one of five objects; zoom: smaller digits, in four panels ----
def sample_objects(rng: np.random.Generator, zoom: bool = False) -> dict:
    """Five objects (x, y, radius, shape, colour, digit) on a 3 x 3 grid. zoom: one in each panel;
    the smaller their digits, the more crops it takes to read one (1 to 3)."""
    # cells in a row; px of a cell's side, and those that stay free at its edge
    spec, radius, cells, side, margin = dict(objects=[], height=8), None, 3, 43, 1
    if zoom:
        calls, cells, side, margin = int(rng.integers(1, 4)), 2, 64, 3
        radius, height = {1: (16, 14), 2: (13, 11), 3: (12, 8)}[calls]
        spec = dict(objects=[], height=height, calls=calls)
    # a cell of its own keeps objects apart (zoom has four), a colour of its own makes "the" unique
    for cell, colour in zip(_choose(rng, range(cells ** 2), 5), _choose(rng, list(COLOURS), 5)):
        r = radius or int(rng.integers(15, 19))
        x, y = rng.integers(r + margin, side - margin - r, 2).tolist()
        spec["objects"].append((x + side * (cell % cells), y + side * (cell // cells), r,
                                SHAPES[int(rng.integers(4))], colour, int(rng.integers(10))))
    *_, shape, colour, digit = spec["objects"][0]
    return spec | _question(rng, f"Which digit is on the {colour} {shape}?", DIGITS[digit])


def panel_of(x: int, y: int) -> str:
    return PANELS[2 * (y >= 64) + (x >= 64)]


def digit_offset(r: int, shape: str) -> int:
    """How far below an object's centre its digit is: a triangle is wider there."""
    return r // 4 if shape == "triangle" else 0


def draw_objects(spec: dict) -> Image.Image:
    image, draw = _canvas(spec)
    # only zoom has panels, and lines between them
    for line in ((64, 0, 64, SIZE), (0, 64, SIZE, 64)) if "calls" in spec else ():
        draw.line(line, fill=(120, 120, 120), width=2)
    for x, y, r, shape, colour, digit in spec["objects"]:
        if shape == "disc":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
        else:
            side = r - 2 if shape == "square" else r
            corners = [(x + side * a, y + side * b) for a, b in CORNERS[shape]]
            draw.polygon(corners, fill=COLOURS[colour])
        _draw_digit(image, digit, x, y + digit_offset(r, shape), spec["height"], DARK[colour])
    return image


def solve_objects(spec: dict) -> Iterator[str]:
    x, y, r, shape, colour, _ = spec["objects"][0]
    count, corner, size = spec.get("calls", 1), (0, 0), SIZE
    if count > 1:  # each call acts on the previous crop, so its box counts from that crop's corner
        corner, size = (64 * (x >= 64), 64 * (y >= 64)), 64
        panel = box(corner[0] + 32, corner[1] + 32, 32)
        yield _call(f"Zoom in on the {panel_of(x, y)} panel.", "crop", *panel)
    yield _call(f"Zoom in on the {colour} {shape}.", "crop", *box(x, y, r, corner, size))
    if count == 3:
        mark = box(r, r + digit_offset(r, shape), 7, size=2 * r)
        yield _call("Zoom in on the mark.", "crop", *mark)


# ---- highlight: the tallest dotted bar; with +crop: the digit below it; tallest: of all bars ----
def tallest(bars: list[tuple]) -> tuple:
    return max(bars, key=lambda bar: bar[1])


def dotted(bars: list[tuple]) -> list[tuple]:
    return [bar for bar in bars if bar[3]]


def sample_highlight(rng: np.random.Generator, digits: bool = False) -> dict:
    """Six bars (left, height, colour, whether it has a dot, digit)."""
    colours = _choose(rng, list(COLOURS), 6)
    heights = _choose(rng, range(18, 102, 3), 6)  # no two bars have the same height
    dots = rng.permutation(6)[:int(rng.integers(2, 4))]
    bars = [(4 + 21 * i, heights[i], colours[i], i in dots, int(rng.integers(10)))
            for i in range(6)]
    _, _, colour, _, digit = tallest(dotted(bars))
    question = ("Which dotted bar is the tallest?", colour, colours)
    if digits:
        question = ("Which digit is under the tallest dotted bar?", DIGITS[digit])
    return dict(bars=bars, **_question(rng, *question))


def sample_tallest(rng: np.random.Generator) -> dict:
    """Large bars that need no tool. No trajectory is about this question."""
    bars = sample_highlight(rng)["bars"]
    ranks = _choose(rng, range(8), 6)
    # the tallest bar is at least 24 px taller than any other
    ranks = [10 if rank == max(ranks) else rank for rank in ranks]
    bars = [(x, 18 + 8 * rank, *rest) for (x, _, *rest), rank in zip(bars, ranks)]
    return dict(bars=bars, **_question(
        rng, "Which bar is the tallest?", tallest(bars)[2], [bar[2] for bar in bars]))


def draw_bars(spec: dict) -> Image.Image:
    image, draw = _canvas(spec)
    for x, height, colour, has_dot, digit in spec["bars"]:
        draw.rectangle((x, 110 - height, x + 14, 110), fill=COLOURS[colour])
        if has_dot:
            draw.ellipse((x + 4, 100, x + 10, 106), fill=(250, 250, 250))
        if spec["family"] == "highlight+crop":
            _draw_digit(image, digit, x + 7, 119, 12, (235, 235, 235))
    return image


def solve_highlight(spec: dict) -> Iterator[str]:
    digits = spec["family"] == "highlight+crop"
    # one box for each dotted bar, down to its foot or to the digit below it
    boxes = [(percent(x - 1), percent(108 - height), percent(x + 16), 100 if digits else 87)
             for x, height, *_ in dotted(spec["bars"])]
    yield _call("Highlight the dotted bars.", "highlight", *(v for b in boxes for v in b))
    if digits:
        x, _, colour, *_ = tallest(dotted(spec["bars"]))
        yield _call(f"The {colour} bar is the tallest.", "crop", *box(x + 7, 118, 9))


# ---- depth: which of two marked balls is nearer ----
def sample_depth(rng: np.random.Generator) -> dict:
    """Six balls (x, y, radius, nearness), of which two bear a mark."""
    while True:
        nearness = sorted(_choose(rng, range(16), 6))  # 15 is near: it covers what is farther
        balls = [(*rng.integers(24, 105, 2).tolist(), int(rng.integers(16, 24)) + z // 3, z)
                 for z in nearness]
        # the mark is at the centre, which no nearer ball may cover
        visible = [i for i, (x, y, _, _) in enumerate(balls)
                   if all((x - a) ** 2 + (y - b) ** 2 > (r + 6) ** 2
                          for a, b, r, _ in balls[i + 1:])]
        marks = _choose(rng, visible, 2)
        if len(marks) == 2 and abs(balls[marks[0]][3] - balls[marks[1]][3]) >= 2:
            names = _choose(rng, list(COLOURS), 2)
            # balls are in the order of nearness
            return dict(balls=balls, marks=list(zip(marks, names)),
                        question=f"Which mark is nearer, {names[0]} or {names[1]}?",
                        answer=names[marks.index(max(marks))], options=names)


def draw_balls(spec: dict) -> Image.Image:
    image, draw = _canvas(spec, 20, 40)
    rng = np.random.default_rng(zlib.crc32(repr(spec).encode()) + 1)
    for x, y, r, z in spec["balls"]:
        level = 60 + 11 * z  # near is bright
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(level,) * 3, outline=(20, 20, 20))
        # dark and bright flecks: one spot alone does not show how bright the ball is
        for _ in range(10):
            a, b = rng.integers(-r * 2 // 3, r * 2 // 3, 2)
            shade = int(np.clip(level + rng.choice([-60, 60]), 0, 255))
            draw.rectangle((x + a - 2, y + b - 2, x + a + 2, y + b + 2), fill=(shade,) * 3)
    for i, name in spec["marks"]:
        x, y = spec["balls"][i][:2]
        draw.rectangle((x - 3, y - 3, x + 3, y + 3), fill=COLOURS[name])
    return image


# ---- jigsaw: which framed piece completes the picture ----
def sample_jigsaw(rng: np.random.Generator) -> dict:
    """Pictures of 72 x 72 px: four similar corner colours, and a stroke (x0, y0, x1, y1, grey)."""
    frames = _choose(rng, list(COLOURS), 4)
    # the content of each frame: 0 the right piece, 1 the same upside down, 2 and 3 other pictures'
    order, pictures = _choose(rng, range(4), 4), []
    for _ in range(3):
        base = rng.integers(60, 196, 3)
        corners = tuple(tuple(int(v) for v in base + rng.integers(-50, 51, 3)) for _ in range(4))
        stroke = tuple(int(v) for v in (*rng.integers(0, 73, 4), rng.integers(0, 256)))
        pictures.append((corners, (stroke,)))
    return dict(pictures=pictures, hole=int(rng.integers(4)), order=order, frames=frames,
                question="Which piece completes the picture?", answer=frames[order.index(0)],
                options=_choose(rng, frames, 4))


def draw_jigsaw(spec: dict) -> Image.Image:
    image, draw = _canvas(spec, 10, 30)
    left, top, pictures = HOLE * (spec["hole"] % 2), HOLE * (spec["hole"] // 2), []
    for corners, ((*line, grey),) in spec["pictures"]:
        small = Image.fromarray(np.array(corners, dtype=np.uint8).reshape(2, 2, 3))
        pictures.append(small.resize((2 * HOLE, 2 * HOLE), Image.BILINEAR))
        ImageDraw.Draw(pictures[-1]).line(line, fill=(grey,) * 3, width=7)
    right, *others = (p.crop((left, top, left + HOLE, top + HOLE)) for p in pictures)
    contents = [right, right.rotate(180), *others]
    image.paste(pictures[0], (5, 5))
    draw.rectangle((5 + left, 5 + top, 4 + left + HOLE, 4 + top + HOLE), fill=(0, 0, 0))
    for (x, y), frame, content in zip(PIECES, spec["frames"], spec["order"]):
        side = HOLE + 2 * FRAME - 1
        draw.rectangle((x, y, x + side, y + side), fill=COLOURS[frame])
        image.paste(contents[content], (x + FRAME, y + FRAME))
    return image


# ---- path: where does the route from the ring end; path+crop: the digit at its end ----
def _sample_walk(rng: np.random.Generator, length: int, occupied: set) -> list:
    """A walk of at most length + 1 free nodes of a 5 x 5 lattice, which it adds to `occupied`."""
    (x, y), walk = map(int, rng.integers(0, 5, 2)), []
    while (x, y) not in occupied and len(walk) <= length:
        walk.append((x, y))
        occupied.add((x, y))
        free = [(a, b) for a, b in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1))
                if (a, b) not in occupied and 0 <= a < 5 and 0 <= b < 5]
        if free:  # else the walk ends here
            x, y = free[int(rng.integers(len(free)))]
    return walk


def sample_path(rng: np.random.Generator, digits: bool = False) -> dict:
    """Four walks without a common node. The first starts at the ring; each ends in a disc."""
    while True:
        lengths, occupied = [int(rng.integers(3, 7)), *map(int, rng.integers(1, 5, 3))], set()
        walks = [_sample_walk(rng, length, occupied) for length in lengths]
        if len(walks[0]) >= 4 and all(len(walk) >= 2 for walk in walks):
            break
    colours = _choose(rng, list(COLOURS), 4)
    ends = rng.integers(0, 10, 4).tolist()
    spec = dict(walks=walks, colours=colours, digits=ends,
                question="Where does the route from the ring end?",
                answer=colours[0], options=_choose(rng, colours, 4))
    question = "Which digit is at the end of the route from the ring?"
    return spec | _question(rng, question, DIGITS[ends[0]]) if digits else spec


def node_xy(node: tuple[int, int]) -> tuple[int, int]:
    return 14 + 25 * node[0], 14 + 25 * node[1]


def draw_routes(spec: dict) -> Image.Image:
    image, draw = _canvas(spec)
    digits = spec["family"] == "path+crop"
    r = 10 if digits else 8
    for walk, colour, digit in zip(spec["walks"], spec["colours"], spec["digits"]):
        points = [node_xy(node) for node in walk]
        draw.line(points, fill=(ROUTE_SHADE,) * 3, width=4, joint="curve")
        x, y = points[-1]
        draw.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[colour])
        if digits:
            _draw_digit(image, digit, x, y, 12, DARK[colour])
    x, y = node_xy(spec["walks"][0][0])
    draw.ellipse((x - 8, y - 8, x + 8, y + 8), outline=RING, width=4)
    return image


def solve_path(spec: dict) -> Iterator[str]:
    start, end = (node_xy(spec["walks"][0][n]) for n in (0, -1))
    yield _call("Trace the route.", "path", *map(percent, start))
    if spec["family"] == "path+crop":
        yield _call(f"It ends at the {spec['colours'][0]} disc.", "crop", *box(*end, 11))


# ---- tasks, regimes, splits ----
# conclusion: what the expert says of the last tool output
Task = namedtuple("Task", "sample draw solve conclusion", defaults=["The digit is {answer}."])
TASKS: dict[str, Task] = {
    "crop": Task(sample_objects, draw_objects, solve_objects),
    "highlight": Task(sample_highlight, draw_bars, solve_highlight,
                      "The {answer} bar is the tallest."),
    "depth": Task(sample_depth, draw_balls, lambda spec: [_call("Look at the depth.", "depth")],
                  "The {answer} mark is brighter."),
    "jigsaw": Task(sample_jigsaw, draw_jigsaw, lambda spec: [_call("Try the pieces.", "jigsaw")],
                   "The {answer} piece fits."),
    "path": Task(sample_path, draw_routes, solve_path, "It ends at the {answer} disc."),
    "zoom": Task(partial(sample_objects, zoom=True), draw_objects, solve_objects),
    "highlight+crop": Task(partial(sample_highlight, digits=True), draw_bars, solve_highlight),
    "path+crop": Task(partial(sample_path, digits=True), draw_routes, solve_path),
    HELD_OUT: Task(sample_tallest, draw_bars, lambda spec: [])}
REGIMES = dict(single=["crop"], mixed=["crop", "highlight", "depth", "jigsaw", "path"],
               multi=["zoom"], all=["highlight+crop", "path+crop", "zoom"])
# a spec's hash modulo 16 names its split
BUCKETS = dict(test=range(2), validation=range(2, 4), train=range(4, 10), pretrain=range(10, 16))


def make_spec(task: str, split: str, index: int, seed: int) -> dict:
    """The index-th scene of a task and split."""
    words = (zlib.crc32(word.encode()) for word in (split, task))
    rng = np.random.default_rng([seed, *words, index])
    while True:
        spec = dict(family=task) | TASKS[task].sample(rng)
        if zlib.crc32(repr(spec).encode()) % 16 in BUCKETS[split]:
            return spec


def make_example(task: str, split: str, index: int, seed: int) -> Example:
    """R is each call of the expert with its output, then the conclusion and the answer."""
    _, draw, solve, conclusion = TASKS[task]
    spec = make_spec(task, split, index, seed)
    steps = [draw(spec)]  # I0, then R
    for call in solve(spec):
        steps += [call, call_tool(call, steps[-1])]  # it acts on the previous image
    if steps[1:]:
        steps.append((conclusion + " Answer: {answer}").format(answer=spec["answer"]))
    return Example(f"{task}-{split}-{index:05d}", task, steps[0], spec["question"],
                   spec["options"], spec["answer"], steps[1:], split)


def make_world(regime: str, split: str, count: int, seed: int = 0) -> list[Example]:
    """`count` examples of the regime's tasks in turn. Raises ValueError for an unknown regime."""
    if regime not in REGIMES:
        raise ValueError(f"unknown regime {regime!r}: choose one of {', '.join(REGIMES)}")
    tasks = REGIMES[regime]
    return [make_example(tasks[i % len(tasks)], split, i // len(tasks), seed)
            for i in range(count)]
