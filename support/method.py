"""What train.py and evaluate.py ask of a method beside its training step, with Pearl's answers."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from support.records import Example


class Method(nn.Module):
    """The base of Pearl. A class in baselines/ overrides what it does differently."""

    # largest gradient norm; share of the steps with a rising learning rate; AdamW's weight decay
    clip, warmup, weight_decay = 1.0, 0.05, 0.0
    lora_dropout = 0.0

    @classmethod
    def records(cls, records: Sequence[Example], config) -> Sequence[Example]:
        """The records of a split that this method learns from."""
        return records

    @classmethod
    def adapt(cls, example: Example, config) -> Example:
        """A record with its trajectory as this method shows it."""
        return example

    @classmethod
    def ways(cls, config, vlm, checkpoint: Path) -> dict[str, Callable]:
        """More ways to answer: name -> function of an Evaluator (evaluate.py)."""
        return {}

    def prepare(self, datasets: list) -> None:
        """Work on whole data sets before the first step."""

    def after_step(self, step: int) -> None:
        """Work after the optimiser has moved the weights."""
