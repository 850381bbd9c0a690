"""Methods that differ in what they learn from: bare answers, other orders of a trajectory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset

from baselines.variants import Examples, Images
from model import Encoded
from support.options import option
from support.records import Example
from train import SFT, Config, Pearl
from world.tools import CALL


@dataclass
class Bare(Sequence):
    """The bare answers of these rows of a split, made when they are used."""

    records: Sequence[Example]
    rows: Sequence[int]
    prefix: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> Example:
        return self.records[self.rows[n]].answer_only(self.prefix)


class Direct(SFT):
    """SFT on bare answers: no trajectories."""

    @classmethod
    def records(cls, records: Sequence[Example], config: Config) -> Sequence[Example]:
        return Bare(records, range(len(records)), config.answer_prefix)


class Both(SFT):
    """SFT on the trajectories and on all bare answers."""

    @classmethod
    def records(cls, records: Sequence[Example], config: Config) -> Sequence[Example]:
        return ConcatDataset([records, Direct.records(records, config)])


class WithAnswers(Pearl):
    """Trajectories, and for a share of the questions bare answers too, drawn by the seed.

    They are repeated until they are as many as the trajectories, so that half of what is learned
    is answers. Validation has all of them: the best checkpoint must not depend on one or two. A
    bare answer has no trajectory to predict, so L_JEPA leaves its row out.
    """

    class Options:
        share: float = option(0.1, "share of the questions that are learned as bare answers too")

    @classmethod
    def records(cls, records: Sequence[Example], config: Config) -> Sequence[Example]:
        if config.share > 1:
            raise ValueError(f"--share is at most 1, not {config.share}")
        count, rows = math.ceil(config.share * len(records)), range(len(records))
        if records[0].split == "train":
            generator = torch.Generator().manual_seed(config.seed)
            rows = sorted(torch.randperm(len(records), generator=generator)[:count].tolist())
        rows = list(islice(cycle(rows), len(records))) if count else []
        return ConcatDataset([records, Bare(records, rows, config.answer_prefix)])

    def encode_views(self, batch: Examples, images: Images) -> tuple[Encoded, Tensor]:
        full, prediction = super().encode_views(batch, images)
        return full, prediction[[not example.bare for example in batch]]

    def target(self, batch: Examples, images: Images) -> Encoded:
        target = super().target(batch, images)
        return target._replace(embedding=target.embedding[[not ex.bare for ex in batch]])

    def jepa(self, prediction: Tensor, target: Tensor, batch: Examples) -> Tensor:
        # a pass of bare answers alone has nothing to predict, and the mean of nothing is NaN
        return super().jepa(prediction, target, batch) if len(target) else prediction.sum()


class ImageFirst(Pearl):
    """The paper's order R = (I1, T1, ..., IN, TN): a tool image before the text that calls it."""

    @classmethod
    def adapt(cls, example: Example, config: Config) -> Example:
        return super().adapt(example, config).image_first()


class StripCalls(Pearl):
    """The assistant's texts without the calls in them; what the tools gave stays (the release on
    PixelReasoner data)."""

    @classmethod
    def adapt(cls, example: Example, config: Config) -> Example:
        example = super().adapt(example, config)
        steps = [CALL.sub("", step).strip() if isinstance(step, str) else step
                 for step in example.trajectory]
        return replace(example, trajectory=steps)
