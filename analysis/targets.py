"""Does h_R depend on the answer? A check before training: what L_JEPA would teach on your data.

    python analysis/targets.py [--model MODEL --data DIR]    # takes the options of train.py
    python analysis/targets.py --layers                      # every layer and position of R
    python analysis/targets.py --runs RUN [RUN ...]          # after training: a line for each arm

The table has shares of the squared length of h_R: common to all trajectories, dependent on the
task, on the answer within the task (and by chance, with shuffled answers), and the rest. If hardly
anything depends on the answer, Pearl has nothing to teach (RESULTS.md, "What h_R tells").
Tasks and answers must repeat in the data, or the share by chance comes close to the answer's.
Letters: n records, D hidden size.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`
import torch
import torch.nn.functional as F
from torch import Tensor

import evaluate
import losses
import train
from analysis.compare import arm_of, mean_std, table_of
from baselines.variants import Examples, Images, mean_at, positions, read_all, states_entering
from data import Trajectories
from model import VLM
from support import options, processes, splits
from support.records import Example
from support.run import config_and_checkpoint

COLUMNS = dict(common="common", task="task", answer="answer", answer_by_chance="by chance",
               rest="rest", mean_cosine="mean cosine", effective_rank="rank")
POSITIONS = ("end", "word", "words", "image")
Place = tuple[int, str]  # a layer and a position


def config_of(run: Path, device: str) -> train.Config:
    """The options that a run was trained with, for one process on this device."""
    saved = vars(config_and_checkpoint(run)[0])
    config = train.config_class(saved["method"])()
    # options of an older version do no harm here
    vars(config).update(saved, device=device, shard=False, gradient_checkpointing=False)
    return config


def load_method(config: train.Config, run: Path | None = None) -> train.Pearl:
    """The method around its starting model, or around the best model of a finished run."""
    if run:
        vlm = evaluate.load_model(run, config.device)[0].requires_grad_(False)
        # the model has the run's LoRA, and a second one does not fit around it
        vlm.set_trainable = lambda *_: None
    else:
        vlm = VLM(config.model, config.dtype, config.min_pixels, config.max_pixels)
    return train.find_method(config.method)(vlm, config)


def batches_of(method: train.Pearl, records: Sequence) -> Iterator[tuple[Examples, Images]]:
    """The records in batches, in their order, with the features of their images."""
    method.eval()
    # not train.dataset: a method that learns bare answers has other records than these
    views = partial(type(method).views, method.config)
    dataset = Trajectories(records, "data", views, method.vlm.chat, method.encode_images.cache)
    return read_all(method, dataset, torch.arange(len(dataset)))


@torch.no_grad()
def targets_of(method: train.Pearl, records: Sequence[Example]) -> Tensor:
    """h_R (n, D) by the method's own model, as the method defines it."""
    return torch.cat([method.encode_target(method.vlm, batch, images).embedding.float().cpu()
                      for batch, images in batches_of(method, records)])


@torch.no_grad()
def states_of(method: train.Pearl, records: Sequence[Example]) -> dict[Place, Tensor]:
    """(n, D) for each layer and position. Layer 0 is what enters the first layer, the highest
    number the state behind the final norm. "image" is left out if a record has no tool image."""
    vlm, parts = method.vlm, defaultdict(list)
    for batch, images in batches_of(method, records):
        with ExitStack() as stack:
            entering = [stack.enter_context(states_entering(vlm, layer))
                        for layer in range(len(vlm.lm.get_decoder().layers))]
            encoded = method.encode_target(vlm, batch, images)
        for position in POSITIONS:
            where = positions(encoded.padded, vlm, position)
            if where.any(dim=1).all():
                for layer, states in enumerate([*(kept[0] for kept in entering), encoded.states]):
                    parts[layer, position].append(mean_at(states.float(), where).cpu())
    return {place: torch.cat(means) for place, means in parts.items()
            if sum(map(len, means)) == len(records)}


def shares(h: Tensor, records: Sequence) -> dict[str, float]:
    """The parts of h (n, D), as shares of the squared length of rows of length 1. They add up to 1.
    common: the mean of all rows. task: what the mean of each task adds. answer: what the mean of
    each answer adds within its task. rest: what is left. Beside them answer_by_chance: the answer's
    share with shuffled answers in each task, because small groups always explain a little, and
    above_chance: the answer's share minus that."""
    h = F.normalize(h.double(), dim=1)
    tasks = [record.task for record in records]
    shuffled, generator = [""] * len(records), torch.Generator().manual_seed(0)
    # in the order of the data, so that every run shuffles in the same way
    for task in dict.fromkeys(tasks):
        rows = [i for i, other in enumerate(tasks) if other == task]
        for i, j in zip(rows, torch.randperm(len(rows), generator=generator).tolist()):
            shuffled[i] = records[rows[j]].answer

    def unexplained(groups: list) -> float:
        """Mean squared distance of a row from the mean of its group."""
        number = {group: n for n, group in enumerate(dict.fromkeys(groups))}
        member = F.one_hot(torch.tensor([number[group] for group in groups])).double()
        mean = member.T @ h / member.sum(0)[:, None]  # (groups, D)
        return float((h - member @ mean).square().sum(1).mean())

    common, task = unexplained([0] * len(records)), unexplained(tasks)
    answer = unexplained([(record.task, record.answer) for record in records])
    chance = unexplained(list(zip(tasks, shuffled)))
    return dict(common=1 - common, task=common - task, answer=task - answer, rest=answer,
                answer_by_chance=task - chance, above_chance=chance - answer)


def numbers_of(method: train.Pearl, records: Sequence[Example]) -> dict[str, float]:
    """`shares`, and the gauges of a collapse, of h_R."""
    h = targets_of(method, records)
    return shares(h, records) | losses.collapse_gauges(h, h)


def table(rows: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: one line for each name, with mean +/- standard deviation over its measurements."""
    return table_of(["", *COLUMNS.values()], [
        [title, *(mean_std([numbers[name] for numbers in measurements],
                           digits=1 if name == "effective_rank" else 3) for name in COLUMNS)]
        for title, measurements in rows.items()])


def layers_table(h_of: dict[Place, Tensor], records: list) -> str:
    """Markdown: how much depends on the answer, above chance, in all states (see states_of): as
    the cosine sees them, and with their mean subtracted (centred; the largest is bold)."""
    rows = []
    for (layer, position), h in h_of.items():
        unit = F.normalize(h, dim=1)
        above, centred = (shares(part, records)["above_chance"]
                          for part in (unit, unit - unit.mean(0)))
        rows.append((centred, [f"layer {layer}, {position}", f"{above:.3f}", f"{centred:.3f}"]))
    best, _ = max(rows)
    return table_of(["", "above_chance", "centred"], [
        [f"**{cell}**" for cell in cells] if centred == best else cells for centred, cells in rows])


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--runs", type=Path, nargs="+", default=[])
    args, rest = parser.parse_known_args()
    kind = train.config_class(options.value_of("method", rest, "pearl"))
    config = options.parse(kind, rest, __doc__)
    arms: dict[str, list[dict]] = {}
    for run in args.runs:
        own = config_of(run, config.device)
        examples = list(splits.load_splits(replace(own, test_per_task=1))[1])
        numbers = numbers_of(load_method(own, run), examples)
        arms.setdefault(arm_of(run.name), []).append(numbers)
    if arms:
        print(table(arms))
        return
    examples = list(splits.load_splits(replace(config, test_per_task=1))[0][:config.train_examples])
    method, data = load_method(config), config.data or config.regime
    read_by = f"read by {config.model}, {len(examples)} trajectories of {data}"
    if args.layers:
        print(f"States of R {read_by}; the highest layer is the state behind the final norm\n\n"
              f"{layers_table(states_of(method, examples), examples)}")
    else:
        print(f"h_R {read_by}\n\n{table({'h_R': [numbers_of(method, examples)]})}")


if __name__ == "__main__":
    processes.run_program(main)
