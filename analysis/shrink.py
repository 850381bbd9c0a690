"""What a run knows when its fine-tuning is shrunk towards the start: W0 + alpha (W - W0).

    python analysis/shrink.py RUN [RUN ...] --figure PNG    # a minute or two for each run

Every run is asked its test and validation questions at each alpha (WiSE-FT, arXiv:2109.01903); with
LoRA that scales B A. The answers stay in RUN/alphas.json: a second call asks nothing, whatever its
--per_task. Runs whose folders differ in the seed alone are one arm; name them in the order of the
seeds. An arm's alpha is the smallest that keeps 95% of its accuracy with the tool on validation.
The table has its test accuracy at alpha 1 and at that alpha, and the difference to the first arm at
the same alpha.
"""

import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`
import evaluate
from analysis import figures
from analysis.compare import arm_of, change_text, difference, mean_std, table_of
from support import files, processes, splits, step
from support.tables import HELD_OUT, overall, summarise

ALPHAS = (1.0, 0.75, 0.65, 0.5, 0.35)
# of a run: alpha -> "split/task/way" -> 1 or 0 for each question
Run = dict[float, dict[str, list[int]]]
# the columns of the table: way, split, held out or not (see `marks`)
COLUMNS = [("direct",), ("tool",), ("free",), ("direct", "test", True)]


def answers_of(run: Path, per_task: int, device: str) -> Run:
    file = run / "alphas.json"
    stored = files.read_json(file) if file.is_file() else {}
    for alpha in ALPHAS:
        if str(alpha) not in stored:
            vlm, config, _ = evaluate.load_model(run, device, alpha=alpha)
            rights = stored[str(alpha)] = {}
            for split in ("validation", "test"):
                questions = step.adapt_all(splits.test_questions(config, per_task, split), config)
                evaluator = evaluate.Evaluator(vlm, questions, config.answer_prefix)
                for record in evaluate.answer_questions(evaluator):
                    for way in record["cost"]:
                        key = f"{split}/{record['task']}/{way}"
                        rights.setdefault(key, []).append(int(record[f"{way}_right"]))
            files.write_json(file, stored)
    return {alpha: stored[str(alpha)] for alpha in ALPHAS}


def marks(runs: list[Run], alpha: float, way: str, split: str = "test",
          held_out: bool = False) -> list[dict[int, int]]:
    """Of each run, question -> mark: of the trained tasks, or of the held-out one."""
    return [dict(enumerate(mark for key, row in run[alpha].items() for mark in row
                           if key.startswith(split) and key.endswith(f"/{way}")
                           and (f"/{HELD_OUT}/" in key) == held_out)) for run in runs]


def accuracies(runs: list[Run], alpha: float, *which) -> list[float]:
    """In %, of each run that was asked such questions. which: see `marks`."""
    return [100 * sum(own.values()) / len(own) for own in marks(runs, alpha, *which) if own]


def smallest_alpha(runs: list[Run]) -> float:
    """The smallest that keeps 95% of the accuracy with the tool on validation."""
    skill = {alpha: sum(accuracies(runs, alpha, "tool", "validation")) for alpha in ALPHAS}
    return min(alpha for alpha in ALPHAS if skill[alpha] >= 0.95 * skill[1.0])


def table(arms: dict[str, list[Run]]) -> str:
    """arms: the runs of each, in the order of their seeds."""
    reference, *_ = arms
    head = ["arm", "runs", "alpha", "direct", "with the tool", "free", "held out",
            f"direct - {reference} [95%]"]
    lines = []
    for name, runs in arms.items():
        for alpha in dict.fromkeys((1.0, smallest_alpha(runs))):
            shares = [accuracies(runs, alpha, *which) for which in COLUMNS]
            cells = [mean_std(values) if values else "-" for values in shares]
            change, others = "-", arms[reference][:len(runs)]
            if name != reference and len(others) == len(runs):
                pair = (marks(side, alpha, "direct") for side in (runs, others))
                change = change_text(*difference(*pair))
            lines.append([name, str(len(runs)), f"{alpha:g}", *cells, change])
    return table_of(head, lines)


def figure(arms: dict[str, list[Run]], before: dict[str, dict]):
    """Direct against held-out accuracy, a curve over alpha for each arm. before: by `summarise`."""
    drawing, (axis,) = figures.canvas(
        ["Accuracy after shrinking the fine-tuning: W0 + alpha (W - W0)\n(the large marker is "
         "alpha 1; hollow: less than 95% of the arm's accuracy with the tool)"], size=(8.4, 5.6))
    start = (100 * before[task]["direct"][0] for task in (HELD_OUT, overall(before)))
    axis.plot(*start, "*", color="black", markersize=14, linestyle="none", label="before training")
    for n, (name, runs) in enumerate(arms.items()):
        direct, tool, _, held = ([statistics.mean(accuracies(runs, alpha, *which))
                                  for alpha in ALPHAS] for which in COLUMNS)
        count = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
        axis.plot(held, direct, color=f"C{n}", label=f"{name} ({count})")
        for alpha, x, y, skill in zip(ALPHAS, held, direct, tool):
            axis.plot(x, y, "o", color=f"C{n}", markersize=10 if alpha == 1 else 6,
                      markerfacecolor=f"C{n}" if skill >= 0.95 * tool[0] else "white")
    axis.set(xlabel=f"accuracy on the held-out task ({HELD_OUT}), %",
             ylabel="direct accuracy on the trained tasks, %")
    axis.legend()
    return drawing


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--per_task", type=int, default=200, help="questions of each task")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--figure", type=Path, help="draw direct against held-out accuracy")
    options = parser.parse_args()
    if options.figure:
        figures.refuse(options.figure)
        before = summarise(files.read_json(options.runs[0] / "results.json")["before"])
        if HELD_OUT not in before:
            raise ValueError(f"--figure needs runs that were asked {HELD_OUT}, as the world's are")
    arms: dict[str, list[Run]] = {}
    for run in options.runs:
        own = answers_of(run, options.per_task, options.device)
        arms.setdefault(arm_of(run.resolve().name), []).append(own)
    print(table(arms))
    if options.figure:
        figure(arms, before).savefig(options.figure)


if __name__ == "__main__":
    processes.run_program(main)
