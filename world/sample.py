"""A sample of the small world: a data folder, and contact_sheet.png to look at.

    python -m world.sample --out DIR --regime mixed --count 40 --seed 0
"""

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from support.images import opened
from support.processes import run_program
from support.records import SPLITS, Example, write_folder
from world.scenes import REGIMES, make_world


def contact_sheet(examples: list[Example], width: int = 1500, side: int = 132) -> Image.Image:
    """One row for each example: I0, the question, then R's texts and images in order."""
    columns = 2 + max(len(ex.trajectory) for ex in examples)
    cell = width // columns
    sheet = Image.new("RGB", (width, (side + 12) * len(examples)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, ex in enumerate(examples):
        y = row * (side + 12)
        question = f"{ex.task}: {ex.question} Options: {', '.join(ex.options)}."
        for column, step in enumerate([ex.image, question, *ex.trajectory]):
            if isinstance(step, str):
                # a letter of Pillow's font is 5 to 6 px wide
                text = textwrap.fill(step, (cell - 8) // 6)
                draw.multiline_text((column * cell + 4, y + 4), text, fill="black")
            else:
                size = (min(side, cell - 6), side)
                image = ImageOps.contain(opened(step), size, Image.NEAREST)
                sheet.paste(image, (column * cell, y))
        draw.line((0, y + side + 5, width, y + side + 5), fill=(200, 200, 200))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--regime", choices=REGIMES, default="single")
    parser.add_argument("--count", type=int, default=40, help="training examples; others a quarter")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    args = parser.parse_args()
    examples = [ex for split, share in zip(SPLITS, (1, 4, 4))
                for ex in make_world(args.regime, split, max(1, args.count // share), args.seed)]
    write_folder(args.out, examples)
    contact_sheet(examples[:10]).save(args.out / "contact_sheet.png")
    print(f"wrote {len(examples)} examples and contact_sheet.png to {args.out}")


if __name__ == "__main__":
    run_program(main)
