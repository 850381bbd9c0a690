"""Methods that differ in what they learn from: bare answers, other orders of a trajectory, the
model's own next-token distributions behind a trajectory.
Letters: D hidden size, V vocabulary, n tokens of a batch's answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice, takewhile
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset

import losses
from baselines.variants import Examples, Images
from data import Views, collate, make_views
from model import VLM, Encoded
from support.chat import Chat, View
from support.images import ImageEncoder, LoadedImage
from support.options import option
from support.records import Example
from train import SFT, Pearl
from world.tools import CALL


@dataclass
class Bare(Sequence):
    """The bare answers of a split, made when they are used."""

    records: Sequence[Example]
    prefix: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, n: int) -> Example:
        return self.records[n].answer_only(self.prefix)


class Direct(SFT):
    """SFT on bare answers: no trajectories."""

    @classmethod
    def records(cls, records: Sequence[Example], config) -> Sequence[Example]:
        return Bare(records, config.answer_prefix)


class Both(SFT):
    """SFT on the trajectories and on all bare answers."""

    @classmethod
    def records(cls, records: Sequence[Example], config) -> Sequence[Example]:
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
    def records(cls, records: Sequence[Example], config) -> Sequence[Example]:
        if config.share > 1:
            raise ValueError(f"--share is at most 1, not {config.share}")
        count, rows = math.ceil(config.share * len(records)), range(len(records))
        if records[0].split == "train":
            generator = torch.Generator().manual_seed(config.seed)
            rows = sorted(torch.randperm(len(records), generator=generator)[:count].tolist())
        rows = list(islice(cycle(rows), len(records))) if count else []
        return ConcatDataset([records, Subset(Bare(records, config.answer_prefix), rows)])

    def encode_views(self, batch: Examples, images: Images) -> tuple[Encoded, Tensor]:
        full, prediction = super().encode_views(batch, images)
        return full, prediction[[not example.bare for example in batch]]

    def target(self, batch: Examples, images: Images) -> Encoded:
        target = super().target(batch, images)
        return target._replace(embedding=target.embedding[[not ex.bare for ex in batch]])

    def jepa(self, prediction: Tensor, target: Tensor, batch: Examples) -> Tensor:
        # a pass of bare answers alone has nothing to predict, and the mean of nothing is NaN
        batch = [example for example in batch if not example.bare]
        return super().jepa(prediction, target, batch) if batch else prediction.sum()


class ImageFirst(Pearl):
    """The paper's order R = (I1, T1, ..., IN, TN): a tool image before the text that calls it."""

    @classmethod
    def adapt(cls, example: Example, config) -> Example:
        return super().adapt(example, config).image_first()


class StripCalls(Pearl):
    """The assistant's texts without the calls in them; what the tools gave stays (the release on
    PixelReasoner data)."""

    @classmethod
    def adapt(cls, example: Example, config) -> Example:
        example = super().adapt(example, config)
        steps = [CALL.sub("", step).strip() if isinstance(step, str) else step
                 for step in example.trajectory]
        return replace(example, trajectory=steps)


class SelfDistill(SFT):
    """L = L_VLM + lambda * mean over the answer's tokens of KL(teacher || student).

    A rival that aligns next-token distributions, not states. The student reads <I0, Q> and the
    answer, the teacher <I0, Q, R>; the tokens are those with which both texts end.
    Gradient: flows to the student, stops at the teacher. Sources: TRL's SDFTTrainer, S2VOPD
    (2608.14144); there the student writes the answer itself, here it reads the expert's.
    """

    class Options:
        teacher: Literal["current", "start"] = option("current", "model now, or before training")

    def build_modules(self) -> None:
        super().build_modules()
        if self.config.teacher == "start":
            self.vlm.keep_starting_model()

    @classmethod
    def views(cls, config, chat: Chat, example: Example, images: list[LoadedImage]) -> Views:
        # the student's view, in the place of Pearl's input view
        bare = make_views(chat, example.answer_only(config.answer_prefix), images[:1], 0)
        return super().views(config, chat, example, images)._replace(input=bare.full)

    def forward(self, batch: Examples) -> losses.Losses:
        pictures = [image for example in batch for image in example.images]
        images = self.encode_images(pictures)
        counts = [common_end(example.views.full, example.views.input) for example in batch]
        full, answer = (collate([getattr(example.views, name) for example in batch],
                                self.vlm.pad_id) for name in ("full", "input"))
        teacher = self.vlm(full, images)
        L_vlm = losses.vlm_loss(teacher.states, teacher.padded.labels, self.vlm.lm.lm_head)
        log_q = log_probs(self.vlm, self.vlm(answer, images), counts)  # (n, V)
        log_p = log_probs(self.vlm, teacher, counts).detach()  # (n, V)
        if self.config.teacher == "start":
            with torch.no_grad(), self.vlm.starting_model() as start:
                # a trained vision tower has changed the features, so encode with the first one
                if self.config.train_vision:
                    images = ImageEncoder(start.family, frozen=False)(pictures)
                log_p = log_probs(start, start(full, images), counts)
        kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)  # a mean over tokens
        return losses.Losses.of(L_vlm + self.config.lambda_latent * kl, None, vlm=L_vlm, kl=kl)


def common_end(full: View, answer: View) -> int:
    """How many last tokens of the answer's text are the full view's last ones too."""
    pairs = zip(reversed(full.ids), reversed(answer.ids), reversed(answer.labels))
    return len(list(takewhile(lambda pair: pair[0] == pair[1] == pair[2], pairs)))


def log_probs(vlm: VLM, encoded: Encoded, counts: list[int]) -> Tensor:
    """The model's log-probabilities (n, V) at the last tokens of each view."""
    # a view ends at state_at, and a state predicts the token behind it
    states = torch.cat([states[end - count:end] for states, end, count
                        in zip(encoded.states, encoded.padded.state_at.tolist(), counts)])  # (n, D)
    return losses.at_least_float32(vlm.lm.lm_head(states)).log_softmax(dim=-1)
