"""Self-distillation from the trajectory: a rival that aligns next-token distributions, not states.

The student reads <I0, Q> and the answer, the teacher <I0, Q, R>, whose last words are the answer.
Sources: TRL's SDFTTrainer, S2VOPD (2608.14144); there the student writes the answer itself, here it
reads the expert's. Letters: D hidden size, V vocabulary, n tokens of a batch's answers.
"""

from itertools import takewhile
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import losses
from baselines.variants import Examples
from data import Views, collate, make_views
from losses import Losses, at_least_float32
from model import Encoded
from support.chat import Chat, View
from support.features import ImageEncoder, LoadedImage
from support.options import option
from support.records import Example
from train import SFT, Config


class SelfDistill(SFT):
    """L = L_VLM + lambda * mean over the answer's tokens of KL(teacher || student).

    The tokens are those with which both texts end: the bare answer and the trajectory's last text.
    Gradient: flows to the student, stops at the teacher.
    """

    class Options:
        teacher: Literal["current", "start"] = option("current", "model now, or before training")

    def build_modules(self) -> None:
        super().build_modules()
        if self.config.teacher == "start":
            self.vlm.keep_start()

    @classmethod
    def views(cls, config: Config, chat: Chat, example: Example,
              images: list[LoadedImage]) -> Views:
        # the student's view, in the place of Pearl's input view
        bare = make_views(chat, example.answer_only(config.answer_prefix), images[:1], 0)
        return super().views(config, chat, example, images)._replace(input=bare.full)

    def forward(self, batch: Examples) -> Losses:
        pictures = [image for example in batch for image in example.images]
        images = self.encode_images(pictures)
        full, answer = ([example.views[n] for example in batch] for n in range(2))
        full_batch, head = collate(full, self.vlm.pad_id), self.vlm.lm.lm_head
        encoded = self.vlm(full_batch, images)
        vlm = losses.vlm_loss(encoded.states, encoded.batch.labels, head)
        student = self.vlm(collate(answer, self.vlm.pad_id), images)
        counts = [common_end(one, other) for one, other in zip(full, answer)]
        teacher = head(before_end(encoded, counts))  # (n, V)
        if self.config.teacher == "start":
            with torch.no_grad(), self.vlm.starting_model() as start:
                # a trained vision tower has changed the features, so encode with the first one
                if self.config.train_vision:
                    images = ImageEncoder(start.family, frozen=False)(pictures)
                # where all weights train, the starting model has a head of its own
                teacher = start.lm.lm_head(before_end(start(full_batch, images), counts))
        kl = kl_divergence(teacher, head(before_end(student, counts)))
        return Losses.of(vlm + self.config.lambda_latent * kl, None, vlm=vlm, kl=kl)


def common_end(full: View, answer: View) -> int:
    """How many last tokens of the answer's text are the full view's last ones too."""
    pairs = zip(reversed(full.ids), reversed(answer.ids), reversed(answer.labels))
    return len(list(takewhile(lambda pair: pair[0] == pair[1] == pair[2], pairs)))


def before_end(encoded: Encoded, counts: list[int]) -> Tensor:
    """The states that predict the last tokens of each view, (n, D)."""
    # a view ends at embed_at, and a state predicts the token behind it
    return torch.cat([states[end - count:end] for states, end, count
                      in zip(encoded.states, encoded.batch.embed_at.tolist(), counts)])


def kl_divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """Mean over tokens of KL(teacher || student), from logits (n, V)."""
    teacher, student = (at_least_float32(logits).log_softmax(dim=-1)
                        for logits in (teacher.detach(), student))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)
