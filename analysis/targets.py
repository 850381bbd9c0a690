"""Does h_R depend on the answer? A check before training: what L_JEPA would teach on your data.

    python analysis/targets.py                               # the shipped model: half a minute
    python analysis/targets.py --model MODEL --data DIR      # yours; takes the options of train.py
    python analysis/targets.py --layers                      # every layer and position of R, and
                                 which one to predict (the rule: analysis/states.py); a minute
      --figure PNG               the same as a picture, in a new file
      --text_model smollm2       a language model reads R's words instead (analysis/text_model.py)
    python analysis/targets.py --runs RUN [RUN ...]          # after training: a line for each arm,
                                 from its validation trajectories and its best model

The table has shares of the squared length of h_R: common to all trajectories, dependent on the
task, on the answer within the task (and by chance, with shuffled answers), and the rest. If hardly
anything depends on the answer, Pearl has nothing to teach (RESULTS.md, "What h_R tells").
Tasks and answers must repeat in the data: if every record has its own answer, there is nothing to
average, and the share by chance comes close to the answer's.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`

import torch

import evaluate
import losses
import train
from analysis import figures, states, text_model
from analysis.tables import arm_of
from model import VLM
from support import options
from support.files import read_json
from support.processes import run_program
from support.records import Example
from support.splits import load_splits

# the header and the digits of each column
COLUMNS = dict(common=("common", 3), task=("task", 3), answer=("answer", 3),
               answer_by_chance=("by chance", 3), rest=("rest", 3), mean_cosine=("mean cosine", 3),
               effective_rank=("rank", 1), centred=("above chance, centred", 3),
               ms=("ms per step", 0))


def table(rows: dict[str, list[dict[str, float]]], bold: str = "") -> str:
    """Markdown: one line for each name, with mean +/- standard deviation over its measurements."""
    names = [name for name in COLUMNS if name in next(iter(rows.values()))[0]]
    lines = ["| | " + " | ".join(COLUMNS[name][0] for name in names) + " |",
             "|---" * (len(names) + 1) + "|"]
    for title, measurements in rows.items():
        cells = [title]
        for name in names:
            values, digits = [numbers[name] for numbers in measurements], COLUMNS[name][1]
            spread = f" +/- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        cells = [f"**{cell}**" for cell in cells] if title == bold else cells
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def numbers_of(method: train.Pearl, examples: Sequence[Example]) -> dict[str, float]:
    h = states.targets_of(method, examples)
    return states.shares(h, examples) | losses.collapse_gauges(h, h)


def starting_method(config: train.Config) -> train.Pearl:
    vlm = VLM(config.model, getattr(torch, config.dtype), config.min_pixels, config.max_pixels)
    return train.find_method(config.method)(vlm, config)


def report(config: train.Config, all_layers: bool, text_name: str, figure: Path | None) -> str:
    """h_R before training, or all states. text_name: the name of a language model, or empty."""
    examples = list(load_splits(replace(config, test_per_task=1))[0][:config.train_examples])
    read_by = f"read by {text_name or config.model}, {len(examples)} trajectories of "
    read_by += f"{config.data or config.regime}"
    if not all_layers:
        return f"h_R {read_by}\n\n{table({'h_R': [numbers_of(starting_method(config), examples)]})}"
    if text_name:
        found = text_model.states_of_words(text_name, examples, config.batch)
    else:
        found = states.states_of(starting_method(config), examples)
    rows = states.measure(found, examples)
    if figure:
        figures.layers(rows, Path(text_name or config.model).name).savefig(figure)
    return f"States of R {read_by}\n\n{layers_report(rows)}"


def layers_report(rows: list[states.State]) -> str:
    last, best = max(row.layer for row in rows), states.recommended(rows)

    def title(row: states.State) -> str:
        return f"layer {row.layer}{' (-1)' if row.layer == last else ''}, {row.position}"

    lines = {title(row): [row.numbers | dict(centred=row.centred)] for row in rows}
    layer = -1 if best.layer == last else best.layer
    return (f"{table(lines, title(best))}\n\nrecommended before any training: --method "
            f"target_state --target_layer {layer} --target_position {best.position} (its share "
            f"that depends on the answer is {best.above_chance:.3f} above chance)")


def runs_report(runs: list[Path], device: str) -> str:
    """h_R of the validation trajectories, read by each run's best model."""
    arms: dict[str, list[dict]] = {}
    for run in runs:
        config, vlm = states.config_of(run, device), evaluate.load_model(run, device)[0]
        examples = list(load_splits(replace(config, test_per_task=1))[1])
        # the new LoRA layers are zero, so the method's model is the trained one
        numbers = numbers_of(train.find_method(config.method)(vlm, config), examples)
        # validations included
        ms = 1000 * read_json(run / "results.json")["train_seconds"] / config.steps
        arms.setdefault(arm_of(run.name), []).append(numbers | dict(ms=ms))
    return table(arms)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--text_model", default="")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--runs", type=Path, nargs="+")
    own, rest = parser.parse_known_args()
    kind = train.config_class(options.value_of("method", rest, "pearl"))
    config = options.parse(kind, rest, __doc__)
    if not own.layers and (own.text_model or own.figure):
        raise ValueError("--text_model and --figure need --layers: add it")
    if own.figure:
        figures.need_packages()
        figures.refuse_existing(own.figure)
    print(runs_report(own.runs, config.device) if own.runs
          else report(config, own.layers, own.text_model, own.figure))


if __name__ == "__main__":
    run_program(main)
