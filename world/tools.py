"""The tools: real functions from image to image (crop, highlight, depth, jigsaw, path), and the
calls that name them.

A call is written [name a b c ...] in an assistant's text, [name a b c ... of 1] to have it work on
an earlier image than the last; coordinates are hundredths of width or height (0-100). The
trajectories of the small world hold such calls and what they return, and explicit tool use
(evaluate.py) runs what a model writes. Crop and highlight fit any image; depth, jigsaw and path
read scenes as world/scenes.py draws them.
"""

import re
from typing import Callable

import numpy as np
from PIL import Image, ImageFilter

ROUTE_SHADE, ROUTE_PAINT, RING = 200, (255, 90, 200), (255, 255, 255)
# px: side of a piece; corners of the four framed pieces
HOLE, PIECES = 36, ((86, 0), (86, 43), (0, 86), (43, 86))
FRAME = 3  # px around a piece


def crop(image: Image.Image, x0: int, y0: int, x1: int, y1: int) -> Image.Image:
    """Cut the box out of the image, at the image's own resolution (finer than what the model is
    shown)."""
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
    """Estimate depth from shading: grey level smoothed over texture, bright = near; coloured marks
    are kept on top."""
    pixels = np.asarray(image, dtype=np.int16)
    # (H, W) the marks are the only saturated pixels
    coloured = (pixels.max(-1) - pixels.min(-1)) > 90
    grey = image.convert("L").filter(ImageFilter.MedianFilter(9)).filter(ImageFilter.BoxBlur(2))
    level = np.clip((np.asarray(grey, dtype=np.float32) - 30) * 1.25, 0, 255).astype(np.uint8)
    out = np.repeat(level[..., None], 3, axis=-1)
    out[coloured] = pixels[coloured]
    return Image.fromarray(out)


def jigsaw(image: Image.Image) -> Image.Image:
    """Try the four framed pieces in the hole, keep the one whose edges fit best, return the picture
    in its frame's colour."""
    pixels = np.asarray(image, dtype=np.float32)
    picture = pixels[5:5 + 2 * HOLE, 5:5 + 2 * HOLE].copy()  # (72, 72, 3)
    corners = [(0, 0), (HOLE, 0), (0, HOLE), (HOLE, HOLE)]
    # the hole is the dark quarter
    hx, hy = min(corners, key=lambda c: picture[c[1] + 6:c[1] + 30, c[0] + 6:c[0] + 30].mean())
    best = None
    for x, y in PIECES:
        piece = pixels[y + FRAME:y + FRAME + HOLE, x + FRAME:x + FRAME + HOLE]
        # the seam's column, and its row, inside the piece and beside it
        inner_x, outer_x = (0, hx - 1) if hx else (HOLE - 1, HOLE)
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
    reached[max(0, y * h // 100 - 6):y * h // 100 + 7,
            max(0, x * w // 100 - 6):x * w // 100 + 7] = True
    reached &= route
    count = 0
    # grow by one pixel in each direction until nothing is added
    while count < (count := int(reached.sum())):
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        reached = grown & route
    pixels[reached] = ROUTE_PAINT
    return Image.fromarray(pixels)


TOOLS: dict[str, Callable[..., Image.Image]] = dict(crop=crop, highlight=highlight, depth=depth,
                                                    jigsaw=jigsaw, path=path)
CALL = re.compile(r"\[(" + "|".join(TOOLS) + r")((?: \d{1,3})*)(?: of (\d+))?\]")


def call_tool(text: str, *shown: Image.Image) -> Image.Image:
    """Run the call written in `text` on the last of the images shown so far, or on the one it names
    (of 1: the question's).

    Raises ValueError when there is no call or its numbers do not fit.
    """
    match = CALL.search(text)
    if not match:
        raise ValueError(f"no tool call such as [crop 10 20 30 40] in {text!r}")
    number = int(match[3] or len(shown))
    if not 1 <= number <= len(shown):
        raise ValueError(f"{match[0]} names an image that was not shown: there are {len(shown)}")
    try:
        return TOOLS[match[1]](shown[number - 1], *map(int, match[2].split()))
    except TypeError:
        raise ValueError(f"wrong number of arguments in {match[0]}") from None
