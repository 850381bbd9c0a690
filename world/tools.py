"""The tools, which are functions from image to image, and the calls that name them in a text.

A call is [name a b c ...], on the last image, or [name a b c ... of 1] on the image with that
number; coordinates are hundredths of width or height. The expert's trajectories hold calls and
their outputs; explicit tool use (evaluate.py) runs those that a model writes.
"""

import re

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

ROUTE_SHADE, ROUTE_PAINT, RING = 200, (255, 90, 200), (255, 255, 255)
# px: side of a piece, width of its frame, left and top of the four framed pieces
HOLE, FRAME, PIECES = 36, 3, ((86, 0), (86, 43), (0, 86), (43, 86))


def crop(image: Image.Image, x0: int, y0: int, x1: int, y1: int) -> Image.Image:
    """Cut the box out at the file's resolution, which is finer than the one that the model sees."""
    w, h = image.size
    # rounded outwards, so that a box never loses its edge
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
    """Estimate depth from shading: grey without texture, bright is near. Marks stay visible."""
    pixels = np.asarray(image, dtype=np.int16)
    marks = (pixels.max(-1) - pixels.min(-1)) > 90  # (H, W): only the marks have a colour
    # the median removes the flecks
    grey = image.convert("L").filter(ImageFilter.MedianFilter(9)).filter(ImageFilter.BoxBlur(2))
    level = np.clip((np.asarray(grey, dtype=np.float32) - 30) * 1.25, 0, 255).astype(np.uint8)
    out = np.repeat(level[..., None], 3, axis=-1)
    out[marks] = pixels[marks]
    return Image.fromarray(out)


def jigsaw(image: Image.Image) -> Image.Image:
    """Put the piece that fits best into the hole; return the picture in that piece's frame."""
    if min(image.size) < 128:
        raise ValueError("jigsaw fits scenes of the small world only, 128 x 128 px")
    pixels = np.asarray(image, dtype=np.float32)
    picture = pixels[5:5 + 2 * HOLE, 5:5 + 2 * HOLE].copy()  # (72, 72, 3)
    # the hole is the darkest quarter
    hole = min((picture[y:y + HOLE, x:x + HOLE] for y in (0, HOLE) for x in (0, HOLE)),
               key=lambda quarter: quarter[6:30, 6:30].mean())

    trials = []
    for x, y in PIECES:
        hole[:] = pixels[y + FRAME:y + FRAME + HOLE, x + FRAME:x + FRAME + HOLE]
        # the change of colour across the picture's two seams
        columns, rows = picture[:, HOLE] - picture[:, HOLE - 1], picture[HOLE] - picture[HOLE - 1]
        trials.append((np.abs(columns).sum() + np.abs(rows).sum(), x, y, picture.copy()))
    _, x, y, picture = min(trials, key=lambda trial: trial[0])
    frame = np.median(pixels[y:y + FRAME, x:x + HOLE].reshape(-1, 3), axis=0)
    out = Image.new("RGB", (64, 64), tuple(int(v) for v in frame))
    out.paste(Image.fromarray(picture.astype(np.uint8)).resize((52, 52)), (6, 6))
    return out


def path(image: Image.Image, x: int, y: int) -> Image.Image:
    """Paint the route that touches the point (x, y)."""
    pixels = np.asarray(image).copy()
    h, w = pixels.shape[:2]
    row, column = y * h // 100, x * w // 100
    top, left = max(0, row - 6), max(0, column - 6)
    route = pixels.min(-1) > ROUTE_SHADE - 45  # (H, W): nothing else is bright grey but the ring
    region = Image.fromarray(route.astype(np.uint8)).copy()  # a copy may be painted
    for dy, dx in np.argwhere(route[top:row + 7, left:column + 7]).tolist():
        ImageDraw.floodfill(region, (left + dx, top + dy), 2)  # nothing where it is painted
    pixels[np.asarray(region) == 2] = ROUTE_PAINT
    return Image.fromarray(pixels)


TOOLS = dict(crop=crop, highlight=highlight, depth=depth, jigsaw=jigsaw, path=path)
CALL = re.compile(r"\[(" + "|".join(TOOLS) + r")((?: \d{1,3})*)(?: of (\d+))?\]")


def call_tool(text: str, *images: Image.Image) -> Image.Image:
    """Run the call in `text` on the last image, or on the one whose number (from 1) it names.

    Raises ValueError when there is no call or its numbers do not fit.
    """
    match = CALL.search(text)
    if not match:
        raise ValueError(f"no tool call such as [crop 10 20 30 40] in {text!r}")
    number = int(match[3] or len(images))
    if not 1 <= number <= len(images):
        raise ValueError(f"{match[0]} names an image that does not exist: there are {len(images)}")
    try:
        return TOOLS[match[1]](images[number - 1], *map(int, match[2].split()))
    except TypeError:
        raise ValueError(f"wrong number of arguments in {match[0]}") from None
