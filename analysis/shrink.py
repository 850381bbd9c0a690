"""What a run knows when its fine-tuning is shrunk towards the start: W0 + alpha (W - W0).

    python analysis/shrink.py RUN [RUN ...] --figure PNG    # a minute or two for each run

Every run is asked its test and validation questions at each alpha (WiSE-FT, arXiv:2109.01903); with
LoRA that scales B A. The answers stay in RUN/alphas.json: a second call asks nothing, whatever its
--per_task. Runs whose folders differ in the seed alone are one arm; name them in the order of the
seeds. An arm's alpha is the smallest that keeps 95% of its accuracy with the tool on validation.
The table has its test accuracy at alpha 1 and at that alpha, and the difference to the first arm at
the same alpha.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`

import evaluate
from analysis import figures
from analysis.compare import arm_of, change_text, difference, mean_std, table_of
from support.files import read_json, write_json
from support.processes import run_program
from support.splits import test_questions
from support.tables import HELD_OUT, overall, summarise

ALPHAS = (1.0, 0.75, 0.65, 0.5, 0.35)
# "split/task/way" -> 1 or 0 for each question
Marks = dict[str, list[int]]


def marks_of(run: Path, per_task: int, device: str) -> dict[float, Marks]:
    """By alpha, which answers of a run are right."""
    file = run / "alphas.json"
    stored = read_json(file) if file.is_file() else {}
    for alpha in ALPHAS:
        if str(alpha) not in stored:
            vlm, config, _ = evaluate.load_model(run, device, alpha=alpha)
            marks = stored[str(alpha)] = {}
            for split in ("validation", "test"):
                questions = test_questions(config, per_task, split)
                evaluator = evaluate.Evaluator(vlm, questions, config.answer_prefix)
                for record in evaluate.answer_questions(evaluator):
                    for way in record["cost"]:
                        key = f"{split}/{record['task']}/{way}"
                        marks.setdefault(key, []).append(int(record[f"{way}_right"]))
            write_json(file, stored)
    return {alpha: stored[str(alpha)] for alpha in ALPHAS}


class Arm:
    """The runs of one method, in the order of their seeds."""

    def __init__(self, name: str, runs: list[dict[float, Marks]]):
        self.name, self.runs = name, runs

    def marks(self, alpha: float, way: str, split="test", held_out=False) -> list[dict[int, int]]:
        """Of each run, question -> mark: of the trained tasks, or of the held-out one."""
        return [dict(enumerate(mark for key, row in run[alpha].items() for mark in row
                               if key.startswith(split) and key.endswith(f"/{way}")
                               and (f"/{HELD_OUT}/" in key) == held_out)) for run in self.runs]

    def accuracies(self, *which) -> list[float]:
        """In %, of each run. which: see `marks`."""
        return [100 * sum(marks.values()) / len(marks) for marks in self.marks(*which)]

    @property
    def alpha(self) -> float:
        """The smallest that keeps 95% of the accuracy with the tool on validation."""
        skill = {alpha: sum(self.accuracies(alpha, "tool", "validation")) for alpha in ALPHAS}
        return min(alpha for alpha in ALPHAS if skill[alpha] >= 0.95 * skill[1.0])


def table(arms: list[Arm]) -> str:
    head = ["arm", "runs", "alpha", "direct", "with the tool", "free", "held out",
            f"direct - {arms[0].name} [95%]"]
    lines = []
    for arm in arms:
        for alpha in dict.fromkeys((1.0, arm.alpha)):
            cells = [mean_std(arm.accuracies(alpha, *which)) for which in (
                ("direct",), ("tool",), ("free",), ("direct", "test", True))]
            ours, theirs = (one.marks(alpha, "direct")[:len(arm.runs)] for one in (arm, arms[0]))
            first = arm is arms[0] or len(ours) != len(theirs)
            change = "-" if first else change_text(*difference(ours, theirs))
            lines.append([arm.name, str(len(arm.runs)), f"{alpha:g}", *cells, change])
    return table_of(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--per_task", type=int, default=200, help="questions of each task")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--figure", type=Path, help="draw direct against held-out accuracy")
    options = parser.parse_args()
    if options.figure:
        figures.refuse(options.figure)
    arms: dict[str, Arm] = {}
    for run in options.runs:
        name = arm_of(run.resolve().name)
        arms.setdefault(name, Arm(name, [])).runs.append(
            marks_of(run, options.per_task, options.device))
    print(table(list(arms.values())))
    if options.figure:
        start = summarise(read_json(options.runs[0] / "results.json")["before"])
        before = [100 * start[task]["direct"][0] for task in (overall(start), HELD_OUT)]
        figures.shrinking(list(arms.values()), ALPHAS, before).savefig(options.figure)


if __name__ == "__main__":
    run_program(main)
