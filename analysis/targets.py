"""Does h_R depend on the answer? A check before training: what L_JEPA would teach on your data.

    python analysis/targets.py                               # the shipped model: half a minute
    python analysis/targets.py --model MODEL --data DIR      # yours; takes the options of train.py
    python analysis/targets.py --layers                      # every layer and position of R, and
                                 which one to predict (the rule: analysis/states.py); a minute
      --figure PNG               the same as a picture, in a new file
      --text_model smollm2       a language model reads R's words instead (analysis/text_model.py)
    python analysis/targets.py --runs RUN [RUN ...]          # after training: one line for each
                                 arm, from the validation trajectories and the run's best model

If h_R hardly depends on the answer, Pearl has nothing to teach; docs/RESULTS.md ("What h_R tells")
shows such a case. Tasks and answers must repeat in the data: if every record has its own answer,
there is nothing to average, and the share by chance comes close to the answer's.
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
from analysis import figures, text_model
from analysis.states import (State, above_chance, arm_of, measure, recommended, shares, states_of,
                             targets_of)
from model import VLM
from support import options
from support.files import read_json
from support.processes import run_program
from support.records import Example
from support.splits import load_splits


def training_examples(config: train.Config) -> Sequence[Example]:
    return load_splits(replace(config, test_per_task=1))[0][:config.train_examples]


def starting_method(config: train.Config) -> train.Pearl:
    vlm = VLM(config.model, getattr(torch, config.dtype), config.min_pixels, config.max_pixels)
    return train.find_method(config.method)(vlm, config)


def report(config: train.Config) -> str:
    examples = training_examples(config)
    targets = targets_of(starting_method(config), examples)
    parts, gauges = shares(targets, examples), losses.collapse_gauges(targets, targets)
    return (f"h_R of {config.model} on {len(examples)} trajectories of "
            f"{config.data or config.regime}, shares of its squared length:\n"
            f"  {parts['common']:.3f} is common to all\n"
            f"  {parts['task']:.3f} depends on the task\n"
            f"  {parts['answer']:.3f} depends on the answer within the task "
            f"({parts['answer_by_chance']:.3f} with shuffled answers)\n"
            f"  {parts['rest']:.3f} depends on something else\n"
            f"mean cosine of two h_R {gauges['mean_cosine']:.3f}, effective rank "
            f"{gauges['effective_rank']:.1f}")


# ---- every layer and position -------------------------------------------------------------------


def layers_report(config: train.Config, text_name: str, figure: Path | None) -> str:
    """The table of states and the recommended one. text_name: of a language model, or empty."""
    if figure:
        figures.refuse_existing(figure)
    examples = training_examples(config)
    if text_name:
        found, reader = text_model.states_of_words(text_name, examples, config.batch), text_name
    else:
        found, reader = states_of(starting_method(config), examples), config.model
    rows = measure(found, examples)
    if figure:
        figures.layers(rows, Path(reader).name).savefig(figure)
    best = recommended(rows)
    layer = -1 if best.layer == max(row.layer for row in rows) else best.layer
    return (f"States of R, read by {reader}, {len(examples)} trajectories of "
            f"{config.data or config.regime}: shares of their squared length\n\n{table(rows)}\n\n"
            f"recommended before any training: --method target_state --target_layer {layer} "
            f"--target_position {best.position} (its share that depends on the answer is "
            f"{above_chance(best.shares):.3f} above chance)")


def table(rows: list[State]) -> str:
    """Markdown; the recommended state in bold."""
    best, last = recommended(rows), max(row.layer for row in rows)
    head = ("layer", "position", "common", "task", "answer", "by chance", "mean cosine", "rank",
            "centred: task", "answer", "by chance")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        numbers = [row.shares[name] for name in ("common", "task", "answer", "answer_by_chance")]
        centred = [row.centred[name] for name in ("task", "answer", "answer_by_chance")]
        cells = [f"{row.layer} (-1)" if row.layer == last else f"{row.layer}", row.position,
                 *(f"{value:.3f}" for value in (*numbers, row.gauges["mean_cosine"])),
                 f"{row.gauges['effective_rank']:.1f}", *(f"{value:.3f}" for value in centred)]
        cells = [f"**{cell}**" for cell in cells] if row is best else cells
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- finished runs ------------------------------------------------------------------------------


def of_run(run: Path, device: str) -> dict[str, float]:
    """h_R of the validation trajectories by the run's best model: shares and gauges; ms per step,
    validations included."""
    vlm, config, _ = evaluate.load_run(run, device)
    config = train.config_class(config.method)(**vars(config) | dict(device=device, shard=False))
    examples = load_splits(replace(config, test_per_task=1))[1]
    # the new LoRA layers are zero, so the method's model is the trained one
    h = targets_of(train.find_method(config.method)(vlm, config), examples)
    ms = 1000 * read_json(run / "results.json")["train_seconds"] / config.steps
    return shares(h, examples) | losses.collapse_gauges(h, h) | dict(ms=ms)


def runs_report(runs: list[Path], device: str) -> str:
    """Mean +/- standard deviation over the seeds of each arm."""
    # the header and the digits of each column
    columns = dict(mean_cosine=("mean cosine", 3), effective_rank=("effective rank", 1),
                   common=("common", 3), task=("task", 3), answer=("answer", 3),
                   answer_by_chance=("by chance", 3), ms=("ms per step", 0))
    lines = ["| arm | seeds | " + " | ".join(title for title, _ in columns.values()) + " |",
             "|---" * (2 + len(columns)) + "|"]
    found: dict[str, list[dict]] = {}
    for run in runs:
        found.setdefault(arm_of(run), []).append(of_run(run, device))
    for arm, seeds in found.items():
        cells = [arm, str(len(seeds))]
        for name, (_, digits) in columns.items():
            values = [seed[name] for seed in seeds]
            spread = f" +/- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


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
    if own.runs:
        print(runs_report(own.runs, config.device))
    elif own.layers:
        print(layers_report(config, own.text_model, own.figure))
    else:
        print(report(config))


if __name__ == "__main__":
    run_program(main)
