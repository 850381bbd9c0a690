"""What a run knows when its fine-tuning is shrunk towards the start: W0 + alpha (W - W0).

    python analysis/shrink.py RUN [RUN ...] --figure PNG    # half a minute for each run

Every run is asked its test and validation questions at each alpha (WiSE-FT, arXiv:2109.01903); with
LoRA that scales B A. The answers stay in RUN/alphas.json, so a second call asks nothing. Runs whose
folders differ in the seed alone are one arm. Its alpha is the smallest that keeps 95% of its
accuracy with the tool on validation. The table has test accuracy at alpha 1 and at that alpha; the
last column compares the answers with the first arm's, both at their alpha.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`

import numpy as np

import evaluate
from analysis import figures
from analysis.tables import bootstrap, mean_std
from support.files import read_json, write_json
from support.processes import run_program
from support.splits import test_questions
from support.tables import HELD_OUT, WAYS

ALPHAS = (1.0, 0.75, 0.65, 0.5, 0.35)
# (split, task, way) -> 1 or 0 for each question
Marks = dict[tuple[str, str, str], list[int]]


def marks_of(run: Path, per_task: int, device: str) -> dict[float, Marks]:
    """By alpha, which answers of a run are right."""
    file = run / "alphas.json"
    stored = read_json(file) if file.is_file() else {}
    for alpha in ALPHAS:
        if str(alpha) not in stored:
            vlm, config, _ = evaluate.load_model(run, device, alpha=alpha)
            marks: dict[str, list[int]] = {}
            for split in ("validation", "test"):
                questions = test_questions(config, per_task, split)
                evaluator = evaluate.Evaluator(vlm, questions, config.answer_prefix)
                for record in evaluate.answer_questions(evaluator):
                    for way in (way for way in WAYS if f"{way}_right" in record):
                        key = f"{split}/{record['task']}/{way}"
                        marks.setdefault(key, []).append(int(record[f"{way}_right"]))
            stored[str(alpha)] = marks
            write_json(file, stored)
    return {alpha: {tuple(key.split("/")): row for key, row in stored[str(alpha)].items()}
            for alpha in ALPHAS}


class Arm:
    """The runs of one method by seed."""

    def __init__(self, name: str, runs: list[dict[float, Marks]]):
        self.name, self.runs = name, runs

    def marks(self, alpha: float, way: str, split: str = "test",
              held_out: bool = False) -> np.ndarray:
        """(runs, questions): of the trained tasks, or of the held-out one."""
        return np.array([sum((row for (one, task, other), row in run[alpha].items() if one == split
                              and other == way and (task == HELD_OUT) == held_out), [])
                         for run in self.runs], dtype=float)

    def accuracies(self, alpha: float, way: str, **which) -> list[float]:
        return (100 * self.marks(alpha, way, **which).mean(axis=1)).tolist()

    @property
    def alpha(self) -> float:
        """The smallest that keeps 95% of the accuracy with the tool on validation."""
        skill = {alpha: self.marks(alpha, "tool", "validation").mean() for alpha in ALPHAS}
        return min(alpha for alpha in ALPHAS if skill[alpha] >= 0.95 * skill[1.0])


def table(arms: list[Arm]) -> str:
    lines = ["| arm | runs | alpha | direct | with the tool | free | held out | direct - "
             f"{arms[0].name} [95%] |", "|" + "---|" * 8]
    for arm in arms:
        for alpha in dict.fromkeys((1.0, arm.alpha)):
            difference = "-"
            # the first arm is compared with nothing, and only arms of the same seeds are paired
            if arm is not arms[0] and alpha == arm.alpha and len(arm.runs) == len(arms[0].runs):
                ours, theirs = (one.marks(one.alpha, "direct") for one in (arm, arms[0]))
                difference = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*bootstrap(ours, theirs))
            cells = [mean_std(arm.accuracies(alpha, way)) for way in ("direct", "tool", "free")]
            cells.append(mean_std(arm.accuracies(alpha, "direct", held_out=True)))
            lines.append(f"| {arm.name} | {len(arm.runs)} | {alpha:g} | {' | '.join(cells)} | "
                         f"{difference} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--per_task", type=int, default=200, help="questions of each task")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--figure", type=Path, help="draw direct against held-out accuracy")
    options = parser.parse_args()
    if options.figure:
        figures.need_packages()
        figures.refuse_existing(options.figure)
    groups: dict[str, list] = {}
    for run in sorted(options.runs):
        name = re.sub(r"-seed\d+$", "", run.resolve().name).replace("_", " ")
        groups.setdefault(name, []).append(marks_of(run, options.per_task, options.device))
    arms = [Arm(name, runs) for name, runs in groups.items()]
    print(table(arms))
    if options.figure:
        figures.shrinking(arms, ALPHAS).savefig(options.figure)


if __name__ == "__main__":
    run_program(main)
