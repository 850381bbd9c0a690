"""The README's picture: a trajectory in its three views and at inference (figures.py --views).

Pillow draws it, so that it needs no optional package.
"""

import textwrap

from PIL import Image, ImageDraw, ImageFont

from support.images import opened
from support.records import Example

GREY, GREEN, VIOLET, BLUE = (238, 238, 238), (205, 238, 205), (226, 210, 245), (207, 226, 250)
ARROW = (30, 70, 190)
# px: left edge and width of each column, height of each block
COLUMNS = dict(I0=(20, 106), Q=(136, 134), T1=(280, 230), I1=(520, 106), T2=(636, 176),
               note=(826, 254))
HEIGHT = 106


class ViewsPicture:
    """example: a trajectory with one call."""

    def __init__(self, example: Example):
        self.font, self.bold = ImageFont.load_default(17), ImageFont.load_default(20)
        self.sheet = Image.new("RGB", (1100, 764), "white")
        self.draw = ImageDraw.Draw(self.sheet)
        plan, call = example.texts[0].split(" [")
        reading, answer = example.texts[-1].split(" Answer")
        self.answer, self.contents = example.answer, dict(
            I0=opened(example.image), Q="\n".join(textwrap.wrap(example.question, 14)),
            T1=f"{plan}\n[{call}\n<|im_end|>", I1=opened(example.images[1]),
            T2=f"{reading}\nAnswer{answer}\n<|im_end|>")

    def box(self, left: int, top: int, width: int, height: int, fill, text: str) -> None:
        self.draw.rounded_rectangle((left, top, left + width, top + height), 8, fill=fill)
        self.draw.multiline_text((left + 10, top + height // 2), text, fill="black", anchor="lm",
                                 font=self.font, spacing=6)

    def row(self, top: int, title: str, columns: str, note: str, fill=GREY) -> None:
        """A view: its title, its parts, and on the right what becomes of it."""
        self.draw.text((20, top - 32), title, fill="black", font=self.bold)
        for column in columns.split():
            (left, width), content = COLUMNS[column], self.contents[column]
            if isinstance(content, Image.Image):
                content = content.resize((width, HEIGHT), Image.Resampling.NEAREST)
                self.sheet.paste(content, (left, top))
            else:
                self.box(left, top, width, HEIGHT, fill if column[0] == "T" else GREY, content)
        left, width = COLUMNS["note"]
        self.box(left, top, width, HEIGHT, BLUE, note)

    def paint(self) -> Image.Image:
        self.row(44, "Full view <I0, Q, R>: the expert's trajectory", "I0 Q T1 I1 T2",
                 "green words: L_VLM (Eq. 3)\n\neach word's state from the\none before: L_NextLat "
                 "(Eq. 2)", GREEN)
        self.row(226, "Input view <I0, Q> and [PRED]: what inference sees, and four learned tokens",
                 "I0 Q", "h^_R: the state of\nthe last [PRED]\n\n(gradient flows here)")
        for k in range(4):
            self.box(280 + 90 * k, 251, 82, 56, VIOLET, "[PRED]")
        self.row(442, "Target view R, read alone by the frozen starting model", "T1 I1 T2",
                 "h_R: the state of\nthe last <|im_end|>\n\n(stored; no gradient)")
        self.draw.line((953, 338, 953, 424), fill=ARROW, width=4)
        self.draw.polygon([(944, 422), (962, 422), (953, 438)], fill=ARROW)
        self.draw.text((935, 388), "L_JEPA (Eq. 1)", fill=ARROW, font=self.bold, anchor="rm")
        self.draw.text((20, 566), "L = L_VLM + lambda (L_JEPA + L_NextLat)   (Eq. 4)", fill="black",
                       font=self.bold)
        self.row(644, "Inference <I0, Q>: the plain VLM; no tool, no [PRED]", "I0 Q",
                 f'behind "Answer:" the\nlikeliest option: {self.answer}')
        return self.sheet
