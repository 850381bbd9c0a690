"""Variants of Pearl that are no part of it: orders of a trajectory, controls of the target."""

import math
from dataclasses import replace
from itertools import cycle, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from support.records import Example
from world.tools import CALL


def as_taught(examples: list[Example], config) -> list[Example]:
    """The examples as this run's method is to learn them."""
    bare = [example.answer_only(config.answer_prefix) for example in examples
            if config.method in ("direct", "both")]
    if config.method == "direct":
        return bare
    if config.target_position == "image":
        refuse_without_image(examples)
    return [*as_shown(examples, config), *bare, *some_answers(examples, config)]


def some_answers(examples: list[Example], config) -> list[Example]:
    """--with_answers SHARE: that share of the questions, drawn by the seed, as bare answers too.

    Repeated until they are as many as the trajectories, so that half of what is learned is answers,
    however few there are; with SHARE 1 this is --method both. Validation has all of them: the best
    checkpoint must not hang on one or two.
    """
    count = math.ceil(config.with_answers * len(examples))
    if not count:
        return []
    if any(example.split == "train" for example in examples):
        generator = torch.Generator().manual_seed(config.seed)
        drawn = sorted(torch.randperm(len(examples), generator=generator)[:count].tolist())
    else:
        drawn = range(len(examples))
    bare = [examples[n].answer_only(config.answer_prefix) for n in drawn]
    return list(islice(cycle(bare), len(examples)))


def as_shown(examples: list[Example], config) -> list[Example]:
    """The examples with their trajectories as --order and --strip_calls want them."""
    if config.strip_calls:
        examples = [without_calls(example) for example in examples]
    if config.order == "image_first":
        examples = [example.image_first() for example in examples]
    return examples


def with_trajectory(examples, rows: list[int]) -> list[int]:
    """Those of the rows that are a trajectory: bare answers stand behind all of them."""
    return [row for row in rows if row < len(examples.examples)]


def refuse_without_image(examples: list[Example]) -> None:
    for example in examples:
        if len(example.images) < 2:
            raise ValueError(f"example {example.id} has no tool image, whose states "
                             "--target_position image would predict: choose another, or leave the "
                             "example out")


def without_calls(example: Example) -> Example:
    """The assistant's words without the calls in them; what the tools gave stays."""
    steps = [CALL.sub("", step).strip() if isinstance(step, str) else step
             for step in example.trajectory]
    return replace(example, trajectory=steps)


def control_targets(target: Tensor, rows: list[int], config) -> Tensor:
    """The targets of L_JEPA: h_R (B, D) itself, or what a control puts in its place.

    shuffled: the h_R of the next example of the batch, so that nothing about one's own is to be
    learned. random: a vector drawn once for each example. What Pearl still gains with either is
    regularisation, not prediction.
    """
    if config.targets == "shuffled":
        return target.roll(1, dims=0)
    if config.targets == "random":
        drawn = []
        for row in rows:
            generator = torch.Generator().manual_seed(1_000_003 * config.seed + row)
            drawn.append(torch.randn(target.shape[1], generator=generator))
        return target.norm(dim=1, keepdim=True) * F.normalize(torch.stack(drawn), dim=1).to(target)
    return target


def average_targets(examples, by: str) -> None:
    """The controls that leave of cached h_R what its family tells (by="family"), or its family and
    answer ("answer"): the mean over all that share them. examples: train.Examples."""
    if by not in ("family", "answer"):
        return
    groups: dict[tuple[str, str], list[int]] = {}
    for row in with_trajectory(examples, list(examples.targets)):
        example = examples.examples[row]
        key = (example.task, example.answer if by == "answer" else "")
        groups.setdefault(key, []).append(row)
    for rows in groups.values():
        mean = torch.stack([examples.targets[row] for row in rows]).mean(dim=0)
        examples.targets |= dict.fromkeys(rows, mean)
