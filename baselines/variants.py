"""Variants of Pearl's target and terms, and the controls that show what a term does.

Whose h_R: the current model's (Current, the paper's text) or a moving average's (EMA); which state
of R (TargetState); something else in its place (Shuffled, RandomTarget, TaskMean, AnswerMean).
Letters: B batch, T sequence, D hidden size.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from data import Batch, Trajectories, TrainingExample
from model import VLM, Encoded
from support.features import EncodedImage
from support.options import option
from support.processes import progress
from train import Pearl

Examples = list[TrainingExample]
Images = dict[str, EncodedImage]


class Current(Pearl):
    """h_R by the current model, as in the paper's text. Its targets collapse here (README)."""

    # True where a subclass needs a gradient through h_R, or through the states of R
    target_needs_grad = False

    def target(self, batch: Examples, images: Images) -> Encoded:
        # Eq. 1 needs no gradient here, because its target is a constant
        with nullcontext() if self.target_needs_grad else torch.no_grad():
            return self.encode_target(self.vlm, batch, images)


class EMA(Pearl):
    """h_R by a teacher that follows the model slowly: w' <- m w' + (1 - m) w after every step.

    With --ema_rises m is  m + (1 - m) t / T  after step t of T (I-JEPA: 0.996 to 1).
    Sources: BYOL (2006.07733), I-JEPA (2301.08243), V-JEPA 2 (constant 0.99925). Under LoRA the
    factors A and B are averaged, not their product; the current tower encodes the images.
    """

    @dataclass
    class Options:
        ema: float = option(0.996, "m: the teacher keeps this share of its weights in each step")
        ema_rises: bool = option(False, "m rises to 1 at the last step in a straight line (I-JEPA)")

    def build_modules(self) -> None:
        super().build_modules()
        if self.config.ema > 1:
            raise ValueError(f"--ema is at most 1, not {self.config.ema}")
        self.names = {name.replace(".", "/"): name for name, p in self.vlm.named_parameters()
                      if p.requires_grad}
        # the averages of all weights that train; buffers, because the run's state has those too
        self.teacher = nn.Module()
        for buffer, name in self.names.items():
            start = self.vlm.get_parameter(name).detach().clone()
            self.teacher.register_buffer(buffer, start, persistent=False)

    def target(self, batch: Examples, images: Images) -> Encoded:
        weights = {name: self.teacher.get_buffer(buffer) for buffer, name in self.names.items()}

        def teacher(*inputs):
            return functional_call(self.vlm, weights, inputs)

        teacher.lm, teacher.family, teacher.pad_id = self.vlm.lm, self.vlm.family, self.vlm.pad_id
        with torch.no_grad():
            return self.encode_target(teacher, batch, images)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        super().after_step(step)
        rise = step / self.config.steps if self.config.ema_rises else 0.0
        momentum = self.config.ema + (1 - self.config.ema) * rise
        for buffer, name in self.names.items():
            self.teacher.get_buffer(buffer).lerp_(self.vlm.get_parameter(name), 1 - momentum)


# ---- which state of R ---------------------------------------------------------------------------


class TargetState(Pearl):
    """h_R is another state of R, or a mean of states (analysis/targets.py compares them)."""

    @dataclass
    class Options:
        target_layer: int = option(-1, "h_R is a state that enters this layer; -1: behind the norm")
        target_position: Literal["end", "word", "words", "image"] = option(
            "end", "R's last token, its last word, the mean of its words, or of its image tokens")

    def build_modules(self) -> None:
        super().build_modules()
        layer, count = self.config.target_layer, len(self.vlm.lm.get_decoder().layers)
        if layer > count:
            raise ValueError(f"--target_layer {layer}: {self.vlm.path} has {count} layers; -1 is "
                             "the last one's state, behind the norm")

    def encode_target(self, vlm: VLM, batch: Examples, images: Images) -> Encoded:
        position = self.config.target_position
        with states_entering(vlm, self.config.target_layer) as states:
            encoded = super().encode_target(vlm, batch, images)
        where = positions(encoded.batch, vlm, position)
        for example, tokens in zip(batch, where.sum(dim=1).tolist()):
            if not tokens:
                split, number = example.index
                raise ValueError(f"record {number} of the {split} split has no tool image for "
                                 "--target_position image: choose another, or drop the record")
        return encoded._replace(embedding=mean_at((states or [encoded.states])[0], where))


@contextmanager
def states_entering(vlm: VLM, layer: int) -> Iterator[list[Tensor]]:
    """A list that holds the states (B, T, D) that enter a layer, once it has run; an empty one for
    the last states, behind the norm (-1, or as many as there are layers)."""
    layers, states = vlm.lm.get_decoder().layers, []

    def keep(module: nn.Module, inputs: tuple, keywords: dict) -> None:
        states.append(inputs[0] if inputs else keywords["hidden_states"])

    last = layer in (-1, len(layers))
    with (nullcontext() if last else
          layers[layer].register_forward_pre_hook(keep, with_kwargs=True)):
        yield states


def mean_at(states: Tensor, where: Tensor) -> Tensor:
    """The mean of states (B, T, D) over the True positions of (B, T) -> (B, D); none: zeros."""
    weight = where.to(states.dtype)
    weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.einsum("bt,btd->bd", weight, states)


def positions(batch: Batch, vlm: VLM, name: str) -> Tensor:
    """The positions of target views to average, (B, T).

    end: the token that ends the last turn. word: the last one before it; words: all that the
    assistant says, without the ends of turns. image: all tokens of tool images.
    """
    if name == "image":
        return (batch.ids == vlm.lm.config.image_token_id) & batch.mask
    if name == "end":
        return F.one_hot(batch.embed_at, batch.ids.shape[1]).bool()
    words = (batch.labels != -100) & (batch.labels != vlm.family.end_id)
    if name == "words":
        return words
    remaining = words.flip(1).cumsum(dim=1).flip(1)  # how many words from here on
    return words & (remaining == 1)


# ---- controls -----------------------------------------------------------------------------------


class Shuffled(Pearl):
    """The control: each row gets the h_R of the next row of the batch, so that nothing about its
    own trajectory can be learned. What Pearl still gains is regularisation, not prediction."""

    def jepa(self, prediction: Tensor, target: Tensor, batch: Examples) -> Tensor:
        if self.config.batch < 2:
            raise ValueError("--method shuffled needs --batch 2 or more")
        return super().jepa(prediction, target.roll(1, dims=0), batch)


class RandomTarget(Pearl):
    """The control: a vector drawn once for each row, as long as its h_R."""

    def jepa(self, prediction: Tensor, target: Tensor, batch: Examples) -> Tensor:
        seeds = [1_000_003 * self.config.seed + ex.index[1] for ex in batch if not ex.bare]
        noise = [torch.randn(target.shape[1], generator=torch.Generator().manual_seed(seed))
                 for seed in seeds]
        noise = F.normalize(torch.stack(noise), dim=1).to(target)
        return super().jepa(prediction, target.norm(dim=1, keepdim=True) * noise, batch)


def read_all(method: Pearl, dataset: Trajectories, rows: Tensor
             ) -> Iterator[tuple[Examples, Images]]:
    """These rows of a data set in batches, with their images, and a progress bar."""
    size = method.config.batch
    for part in progress(rows.split(size), f"reading {dataset.split}"):
        batch = dataset.passes(part.tolist(), size)[0]
        yield batch, method.encode_images([image for ex in batch for image in ex.images])


class TaskMean(Pearl):
    """The control: the mean h_R of all records of the task, so the trajectory's own part is gone.

    It reads the whole training set once before the first step.
    """

    def group(self, example: TrainingExample) -> tuple[str, ...]:
        return (example.task,)

    @torch.no_grad()
    def prepare(self, datasets: list[Trajectories]) -> None:
        super().prepare(datasets)
        for dataset in datasets:
            groups = defaultdict(list)
            for batch, images in read_all(self, dataset, torch.arange(len(dataset))):
                self.target(batch, images)
                if any(example.index not in self.targets.cache for example in batch):
                    raise ValueError("--method task_mean and answer_mean need every frozen h_R in "
                                     "memory: fewer records, and no --shard")
                for example in batch:
                    if not example.bare:
                        groups[self.group(example)].append(example.index)
            for group in groups.values():
                mean = torch.stack([self.targets.cache[row] for row in group]).mean(dim=0)
                self.targets.cache |= dict.fromkeys(group, mean)


class AnswerMean(TaskMean):
    """The control: the mean h_R of all records of the task with the same answer."""

    def group(self, example: TrainingExample) -> tuple[str, ...]:
        return example.task, example.answer


# ---- ablations ----------------------------------------------------------------------------------


class NoJEPA(Pearl):
    """L = L_VLM + lambda L_NextLat."""

    def jepa(self, prediction: Tensor, target: Tensor, batch: Examples) -> Tensor:
        return prediction.new_zeros(())


class NoNextLat(Pearl):
    """L = L_VLM + lambda L_JEPA."""

    def nextlat(self, full: Encoded, target: Encoded) -> Tensor:
        return full.states.new_zeros(())


class NextLatFactor(Pearl):
    """Eq. 4 has one lambda for two terms; this gives L_NextLat a factor of its own."""

    @dataclass
    class Options:
        nextlat_factor: float = option(1.0, "L = L_VLM + lambda (L_JEPA + factor * L_NextLat)")

    def nextlat(self, full: Encoded, target: Encoded) -> Tensor:
        return self.config.nextlat_factor * super().nextlat(full, target)


class TwoPasses(Pearl):
    """Full and input view in one pass each: the same numbers as one pass for both, but slower."""

    one_pass = False


class Dropout(Pearl):
    """Dropout in LoRA."""

    @dataclass
    class Options:
        lora_dropout: float = option(0.1, "dropout of what enters the low-rank product")

    lora_dropout = property(lambda self: self.config.lora_dropout)
