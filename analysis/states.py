"""States of the trajectory R: how to get them for many records, and what they reveal.

Pearl predicts h_R, one state of R. The part of h_R that depends on the answer can teach answering;
the part that all trajectories share, or all of a task, cannot. `shares` measures both.
Letters: n records, B batch, T sequence, D hidden size.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import losses
import train
from baselines.variants import mean_at, positions, states_entering
from data import TrainingExample, Trajectories
from support.chat import Chat
from support.features import EncodedImage
from support.records import Example
from support.run import finished

POSITIONS = ("end", "word", "words", "image")
Place = tuple[int, str]  # a layer and a position


def config_of(run: Path, device: str) -> train.Config:
    """The options that a run was trained with, for one process on this device."""
    saved, _ = finished(run)
    kind = train.config_class(saved["method"])
    # options of an older version are left out
    known = {field.name: saved[field.name] for field in fields(kind) if field.name in saved}
    return kind(**known | dict(device=device, shard=False, gradient_checkpointing=False))


def passes(method: train.Pearl, records: Sequence[Example]
           ) -> Iterator[tuple[list[TrainingExample], dict[str, EncodedImage]]]:
    """The records in batches, in their order, with the features of their images."""
    method.eval()
    # not train.dataset: a method that learns bare answers has other records than these
    views = partial(type(method).views, method.config)
    chat = Chat(method.vlm.family, method.vlm.max_positions)
    dataset = Trajectories(records, "", views, chat, method.encode_images.cache)
    for rows in torch.arange(len(dataset)).split(method.config.batch):
        (batch,) = dataset.passes(rows.tolist(), len(rows))
        yield batch, method.encode_images([image for ex in batch for image in ex.images])


@torch.no_grad()
def targets_of(method: train.Pearl, records: Sequence[Example]) -> Tensor:
    """h_R (n, D) by the method's own model, as the method defines it."""
    return torch.cat([method.encode_target(method.vlm, batch, images).embedding.float().cpu()
                      for batch, images in passes(method, records)])


@torch.no_grad()
def states_of(method: train.Pearl, records: Sequence[Example]) -> dict[Place, Tensor]:
    """(n, D) for each layer and position. Layer 0 is what enters the first layer, the highest
    number the state behind the final norm. "image" is left out if a record has no tool image."""
    vlm, parts = method.vlm, defaultdict(list)
    for batch, images in passes(method, records):
        with ExitStack() as stack:
            entering = [stack.enter_context(states_entering(vlm, layer))
                        for layer in range(len(vlm.lm.get_decoder().layers))]
            encoded = method.encode_target(vlm, batch, images)
        for position in POSITIONS:
            where = positions(encoded.batch, vlm, position)
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
    above_chance: the answer's share minus that.
    """
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


def numbers_of(h: Tensor, records: Sequence) -> dict[str, float]:
    """`shares`, and the gauges of a collapse, of h_R (n, D)."""
    return shares(h, records) | losses.collapse_gauges(h, h)
