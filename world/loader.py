"""The small world's records: for programs (support/splits.py), or written as a data folder
with contact_sheet.png to look at.

    python -m world.loader --out DIR --regime mixed --count 40 --seed 0
"""

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from support.processes import run_program
from support.records import SPLITS, Example, write_folder
from world.scenes import HELD_OUT, REGIMES, TASKS, make_example, make_world

# trajectories of a regime (world/README.md)
examples = make_world


def questions(regime: str, per_task: int, split: str = "test", seed: int = 0) -> list[Example]:
    """Questions of each task of the regime, then of the task that no trajectory covers; regime "":
    of every task."""
    tasks = dict.fromkeys([*REGIMES[regime], HELD_OUT]) if regime else TASKS
    return [make_example(task, split, i, seed) for task in tasks for i in range(per_task)]


def contact_sheet(examples: list[Example], w: int = 160, h: int = 144) -> Image.Image:
    """A row of cells (w x h px) for each example: I0, question, then R's texts and images."""
    rows = [[ex.image, f"{ex.task}: {ex.question} Options: {', '.join(ex.options)}.",
             *ex.trajectory] for ex in examples]
    sheet = Image.new("RGB", (w * max(map(len, rows)), h * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, step in enumerate(row):
            if isinstance(step, str):
                # a letter of Pillow's font is 5 to 6 px wide
                text = textwrap.fill(step, w // 6 - 1)
                ImageDraw.Draw(sheet).multiline_text((w * x, h * y), text, fill="black")
            else:
                image = ImageOps.contain(step, (h - 8, h - 8), Image.NEAREST)
                sheet.paste(image, (w * x, h * y))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--regime", choices=REGIMES, default="single")
    parser.add_argument("--count", type=int, default=40, help="training examples; others a quarter")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    args = parser.parse_args()
    records = [ex for split, share in zip(SPLITS, (1, 4, 4))
               for ex in make_world(args.regime, split, max(1, args.count // share), args.seed)]
    write_folder(args.out, records)
    contact_sheet(records[:10]).save(args.out / "contact_sheet.png")
    print(f"wrote {len(records)} examples and contact_sheet.png to {args.out}")


if __name__ == "__main__":
    run_program(main)
