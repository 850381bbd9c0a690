"""Drawing, by Pillow alone: charts with axes, sheets of pictures, the README's picture."""

import math
import textwrap

from PIL import Image, ImageDraw, ImageFont

from support.images import opened
from support.records import Example

INKS = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189),
        (140, 86, 75), (227, 119, 194), (90, 90, 90), (188, 189, 34), (23, 190, 207)]


def ink_of(number: int) -> tuple[int, int, int]:
    return INKS[number % len(INKS)]


def evenly(low: float, high: float, count: int) -> dict[float, str]:
    """count + 1 values from low to high with their labels."""
    values = [low + (high - low) * i / count for i in range(count + 1)]
    return {value: f"{value:.3g}" for value in values}


def along(value: float, low: float, high: float) -> float:
    """Where a value lies between low (0) and high (1)."""
    return (value - low) / ((high - low) or 1)


class Chart:
    """One pair of axes: lines and points in data coordinates, a legend on the right."""

    def __init__(self, title: str, x: str, y: str, xs: tuple[float, float],
                 ys: tuple[float, float], size=(760, 420), legend=220):
        self.image = Image.new("RGB", size, "white")
        self.draw, self.font = ImageDraw.Draw(self.image), ImageFont.load_default(13)
        self.left, self.right, self.top, self.bottom = 62, size[0] - legend, 34, size[1] - 48
        self.xs, self.ys, self.names = xs, ys, 0
        self.draw.text((self.left, 8), title, fill="black", font=ImageFont.load_default(15))
        self.draw.text(((self.left + self.right) // 2, size[1] - 20), x, fill="black",
                       font=self.font, anchor="mm")
        turned = Image.new("RGB", (self.bottom - self.top, 16), "white")
        ImageDraw.Draw(turned).text((turned.width // 2, 8), y, fill="black", font=self.font,
                                    anchor="mm")
        self.image.paste(turned.rotate(90, expand=True), (2, self.top))
        self.draw.rectangle((self.left, self.top, self.right, self.bottom), outline=(120,) * 3)

    def ticks(self, xs: dict[float, str] | None = None, count: int = 5) -> "Chart":
        for value, label in (xs or evenly(*self.xs, count)).items():
            x, y = self.at(value, self.ys[0])
            self.draw.line((x, y, x, y + 4), fill="black")
            self.draw.text((x, y + 13), label, fill="black", font=self.font, anchor="mm")
        for value, label in evenly(*self.ys, count).items():
            x, y = self.at(self.xs[0], value)
            self.draw.line((x - 4, y, self.right, y), fill=(225, 225, 225))
            self.draw.text((x - 7, y), label, fill="black", font=self.font, anchor="rm")
        return self

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a point in data coordinates."""
        return (self.left + along(x, *self.xs) * (self.right - self.left),
                self.bottom - along(y, *self.ys) * (self.bottom - self.top))

    def line(self, name: str, points: list[tuple[float, float]], dots: bool = True) -> None:
        ink = ink_of(self.names)
        places = [self.at(*p) for p in points]
        self.draw.line(places, fill=ink, width=2)
        for x, y in places if dots else []:
            self.draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ink)
        self.label(name, ink)

    def label(self, name: str, ink, mark: str = "dot") -> None:
        y = self.top + 10 + 18 * self.names
        self.names += 1
        self.mark(self.right + 14, y, ink, mark)
        self.draw.text((self.right + 24, y), name, fill="black", font=self.font, anchor="lm")

    def mark(self, x: float, y: float, ink, mark: str) -> None:
        if mark == "dot":
            self.draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ink)
        else:
            self.draw.line((x - 4, y - 4, x + 4, y + 4), fill=ink, width=2)
            self.draw.line((x - 4, y + 4, x + 4, y - 4), fill=ink, width=2)


def beside(images: list[Image.Image], columns: int) -> Image.Image:
    w, h = max(i.width for i in images), max(i.height for i in images)
    size = (w * min(columns, len(images)), h * math.ceil(len(images) / columns))
    sheet = Image.new("RGB", size, "white")
    for n, image in enumerate(images):
        sheet.paste(image, (w * (n % columns), h * (n // columns)))
    return sheet


# ---- the three views and inference --------------------------------------------------------------

GREY, GREEN, VIOLET, BLUE = (236, 236, 236), (205, 238, 205), (226, 210, 245), (205, 225, 250)
ARROW = (40, 80, 200)
LEFTS = dict(I0=20, Q=130, T1=290, I1=560, T2=670, state=960)  # px: where each column begins
WIDTHS = dict(I0=96, Q=145, T1=255, I1=96, T2=255, state=210)


class ViewsPicture:
    """One trajectory as the three views and inference show it, with what each loss sees."""

    def __init__(self, example: Example):
        self.font, self.bold = ImageFont.load_default(15), ImageFont.load_default(19)
        self.sheet = Image.new("RGB", (1190, 745), "white")
        self.draw = ImageDraw.Draw(self.sheet)
        plan, call = example.texts[0].split(" [")
        reading, said = example.texts[-1].split(" Answer")
        self.shown = dict(
            I0=opened(example.image), I1=opened(example.images[1]),
            Q="\n".join(textwrap.wrap(example.question, 16)),
            T1=f"{plan}\n[{call}\n<|im_end|>", T2=f"{reading}\nAnswer{said}\n<|im_end|>")
        self.answer = example.answer

    def block(self, column: str, y: int, content, fill=GREY) -> None:
        x = LEFTS[column]
        if isinstance(content, Image.Image):
            self.sheet.paste(content.resize((96, 96), Image.Resampling.NEAREST), (x, y))
        else:
            self.box((x, y, x + WIDTHS[column], y + 96), fill)
            self.draw.multiline_text((x + 9, y + 12), content, fill="black", font=self.font,
                                     spacing=6)

    def box(self, place: tuple[int, int, int, int], fill) -> None:
        self.draw.rounded_rectangle(place, 8, fill=fill)

    def row(self, y: int, title: str, columns: str, fill, state: str) -> None:
        self.draw.text((20, y - 28), title, fill="black", font=self.bold)
        for column in columns.split():
            self.block(column, y, self.shown[column], fill if column[0] == "T" else GREY)
        self.block("state", y, state, BLUE)

    def draw_all(self) -> Image.Image:
        self.row(40, "full view <I0, Q, R>", "I0 Q T1 I1 T2", GREEN,
                 "green words: L_VLM (Eq. 3)\n\ntheir states, one to the\nnext: L_NextLat (Eq. 2)")
        self.row(220, "input view <I0, Q> + K x [PRED]: what inference sees, plus [PRED]", "I0 Q",
                 GREY, "h^_R: state of the\nlast [PRED]\n\n(gradient flows here)")
        for k in range(4):
            self.box((290 + 84 * k, 240, 366 + 84 * k, 296), VIOLET)
            self.draw.text((301 + 84 * k, 258), "[PRED]", fill="black", font=self.font)
        self.row(420, "target view R, on its own: read by the frozen starting model, once, "
                 "before training", "T1 I1 T2", GREY,
                 "h_R: state of the\nlast <|im_end|>\n\n(cached: no gradient)")
        self.draw.line((1060, 326, 1060, 410), fill=ARROW, width=4)
        self.draw.polygon([(1052, 404), (1068, 404), (1060, 418)], fill=ARROW)
        self.draw.text((900, 356), "L_JEPA (Eq. 1)", fill=ARROW, font=self.bold)
        self.draw.text((20, 545), "L = L_VLM + lambda (L_JEPA + L_NextLat)   (Eq. 4)",
                       fill="black", font=self.bold)
        self.row(630, "inference <I0, Q>: plain decoding; no tool, no [PRED], nothing but the VLM",
                 "I0 Q", GREY, f'the prefix "Answer:" is given,\n\nthen decoded: {self.answer}')
        return self.sheet


def views_picture(example: Example) -> Image.Image:
    """The README's picture, of a trajectory with one call."""
    return ViewsPicture(example).draw_all()
