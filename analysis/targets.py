"""Does h_R depend on the answer? A check before training: what L_JEPA would teach on your data.

    python analysis/targets.py                               # the shipped model: half a minute
    python analysis/targets.py --model MODEL --data DIR      # yours; takes the options of train.py
    python analysis/targets.py --layers                      # every layer and position of R; early
                                 layers of `word` hold the answer's own word; a minute
    python analysis/targets.py --runs RUN [RUN ...]          # after training: a line for each arm,
                                 from its validation trajectories and its best model

The table has shares of the squared length of h_R: common to all trajectories, dependent on the
task, on the answer within the task (and by chance, with shuffled answers), and the rest. If hardly
anything depends on the answer, Pearl has nothing to teach (RESULTS.md, "What h_R tells").
Tasks and answers must repeat in the data: if every record has its own answer, there is nothing to
average, and the share by chance comes close to the answer's.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`

import torch
import torch.nn.functional as F

import evaluate
import train
from analysis import states
from analysis.tables import arm_of, mean_std, table_of
from model import VLM
from support import options
from support.files import read_json
from support.processes import run_program
from support.splits import load_splits

# the header and the digits of each column
COLUMNS = dict(common=("common", 3), task=("task", 3), answer=("answer", 3),
               answer_by_chance=("by chance", 3), rest=("rest", 3), mean_cosine=("mean cosine", 3),
               effective_rank=("rank", 1), ms=("ms per step", 0))


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: one line for each name, with mean +/- standard deviation over its measurements."""
    names = [name for name in COLUMNS if name in next(iter(rows.values()))[0]]
    return table_of(["", *(COLUMNS[name][0] for name in names)], [
        [title, *(mean_std([numbers[name] for numbers in measurements], COLUMNS[name][1])
                  for name in names)] for title, measurements in rows.items()])


def layers_table(h_of: dict[states.Place, torch.Tensor], records: list) -> str:
    """Markdown: how much depends on the answer, above chance, in all states (states.states_of): as
    the cosine sees them, and with their mean subtracted (centred; the largest is bold)."""
    rows = []
    for (layer, position), h in h_of.items():
        unit = F.normalize(h, dim=1)
        above, centred = (states.shares(part, records)["above_chance"]
                          for part in (unit, unit - unit.mean(0)))
        rows.append((centred, [f"layer {layer}, {position}", f"{above:.3f}", f"{centred:.3f}"]))
    best, _ = max(rows)
    return table_of(["", "above_chance", "centred"], [
        [f"**{cell}**" for cell in cells] if centred == best else cells for centred, cells in rows])


def starting_method(config: train.Config) -> train.Pearl:
    vlm = VLM(config.model, getattr(torch, config.dtype), config.min_pixels, config.max_pixels)
    return train.find_method(config.method)(vlm, config)


def report(config: train.Config, all_layers: bool) -> str:
    """h_R before training, or all states."""
    examples = list(load_splits(replace(config, test_per_task=1))[0][:config.train_examples])
    read_by = (f"read by {config.model}, {len(examples)} trajectories of "
               f"{config.data or config.regime}")
    method = starting_method(config)
    if all_layers:
        return (f"States of R {read_by}; the highest layer is the state behind the final norm\n\n"
                f"{layers_table(states.states_of(method, examples), examples)}")
    numbers = states.numbers_of(states.targets_of(method, examples), examples)
    return f"h_R {read_by}\n\n{table({'h_R': [numbers]})}"


def runs_report(runs: list[Path], device: str) -> str:
    """h_R of the validation trajectories, read by each run's best model."""
    arms: dict[str, list[dict]] = {}
    for run in runs:
        config, vlm = states.config_of(run, device), evaluate.load_model(run, device)[0]
        examples = list(load_splits(replace(config, test_per_task=1))[1])
        # the new LoRA layers are zero, so the method's model is the trained one
        h = states.targets_of(train.find_method(config.method)(vlm, config), examples)
        # validations included
        ms = 1000 * read_json(run / "results.json")["train_seconds"] / config.steps
        arms.setdefault(arm_of(run.name), []).append(states.numbers_of(h, examples) | dict(ms=ms))
    return table(arms)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--runs", type=Path, nargs="+")
    args, rest = parser.parse_known_args()
    kind = train.config_class(options.value_of("method", rest, "pearl"))
    config = options.parse(kind, rest, __doc__)
    print(runs_report(args.runs, config.device) if args.runs else report(config, args.layers))


if __name__ == "__main__":
    run_program(main)
