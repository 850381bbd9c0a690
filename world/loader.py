"""The small world's records: for programs (support/splits.py), or written as a data folder.

    python -m world.loader --out DIR --regime mixed --count 40 --seed 0
"""

import argparse
from pathlib import Path

from support.processes import run_program
from support.records import SPLITS, Example, write_folder
from world.scenes import HELD_OUT, REGIMES, TASKS, make_example
from world.scenes import make_world as examples  # trajectories of a regime (world/README.md)


def questions(regime: str, per_task: int, split: str = "test", seed: int = 0) -> list[Example]:
    """Of each task of the regime, then of the task that no trajectory covers; "": of every task."""
    tasks = dict.fromkeys([*REGIMES[regime], HELD_OUT]) if regime else TASKS
    return [make_example(task, split, i, seed) for task in tasks for i in range(per_task)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    parser.add_argument("--regime", choices=REGIMES, default="single")
    parser.add_argument("--count", type=int, default=40, help="training examples; others a quarter")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    args = parser.parse_args()
    records = [ex for split, share in zip(SPLITS, (1, 4, 4))
               for ex in examples(args.regime, split, max(1, args.count // share), args.seed)]
    write_folder(args.out, records)
    print(f"wrote {len(records)} examples to {args.out}")


if __name__ == "__main__":
    run_program(main)
