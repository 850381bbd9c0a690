"""Variants of Pearl's target h_R and of its terms, and controls that show what a term does.
Letters: B batch, T sequence, D hidden size, N sample.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy
from operator import attrgetter
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import PaddedViews, Trajectories, TrainingExample, collate
from losses import at_least_float32
from model import VLM, Encoded
from support.images import EncodedImage
from support.options import option
from support.processes import progress
from train import Pearl

Examples = list[TrainingExample]
Images = dict[str, EncodedImage]


def read_all(method: Pearl, data: Trajectories, rows: Tensor) -> Iterator[tuple[Examples, Images]]:
    """These rows of a data set in batches, with their images, and a progress bar."""
    for part in progress(rows.split(method.config.batch), f"reading {data.split}"):
        (batch,) = data.micro_batches(part.tolist(), len(part))
        yield batch, method.encode_images([image for ex in batch for image in ex.images])


class Current(Pearl):
    """h_R by the current model, as in the paper's text. Its targets collapse here (README)."""

    # True where a subclass needs a gradient through h_R, or through the states of R
    target_needs_grad = False

    def target(self, batch: Examples, images: Images) -> Encoded:
        # Eq. 1 needs no gradient here, because its target is a constant
        with nullcontext() if self.target_needs_grad else torch.no_grad():
            return self.encode_target(self.vlm, batch, images)


class EMA(Current):
    """h_R by a teacher that follows the model slowly: w' <- m w' + (1 - m) w after every step.

    Sources: BYOL (2006.07733), I-JEPA (2301.08243), V-JEPA 2 (constant 0.99925). Under LoRA the
    factors A and B are averaged, not their product; the current tower encodes the images.
    """

    class Options:
        ema: float = option(0.996, "m: the teacher keeps this share of its weights in each step")

    def build_modules(self) -> None:
        if self.target_needs_grad:
            raise ValueError("vicreg, sigreg and paper need a gradient through R; ema has none")
        super().build_modules()
        self.weights = {name: p for name, p in self.vlm.named_parameters() if p.requires_grad}
        # their averages, in the same order; buffers, because the run's state has those too
        self.teacher = nn.Module()
        for name, p in self.weights.items():
            self.teacher.register_buffer(name.replace(".", "/"), p.detach().clone(), False)

    def target(self, batch: Examples, images: Images) -> Encoded:
        weights = dict(zip(self.weights, self.teacher.buffers()))
        teacher = copy(self.vlm)  # the model itself, but for the weights of its forward pass
        teacher.forward = lambda *inputs: torch.func.functional_call(self.vlm, weights, inputs)
        with torch.no_grad():
            return self.encode_target(teacher, batch, images)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        super().after_step(step)
        for average, weight in zip(self.teacher.buffers(), self.weights.values()):
            average.lerp_(weight, 1 - self.config.ema)


class TargetState(Pearl):
    """h_R is another state of R, or a mean of states (analysis/targets.py compares them)."""

    class Options:
        target_layer: int = option(-1, "h_R is a state that enters this layer; -1: behind the norm")
        target_position: Literal["end", "word", "words", "image"] = option(
            "end", "R's last token, its last word, the mean of its words, or of its image tokens")

    def encode_target(self, vlm: VLM, batch: Examples, images: Images) -> Encoded:
        with states_entering(vlm, self.config.target_layer) as states:
            encoded = super().encode_target(vlm, batch, images)
        where = positions(encoded.padded, vlm, self.config.target_position)
        for example, tokens in zip(batch, where.sum(dim=1).tolist()):
            if not tokens:
                split, number = example.index
                raise ValueError(f"record {number} of the {split} split has no tool image for "
                                 "--target_position image: choose another, or drop the record")
        states = encoded.states if self.config.target_layer == -1 else states[0]
        return encoded._replace(embedding=mean_at(states, where))


@contextmanager
def states_entering(vlm: VLM, layer: int) -> Iterator[list[Tensor]]:
    """A list that holds the states (B, T, D) that enter a layer, once it has run. transformers'
    decoders pass them as the first argument, not by name."""
    layers, states = vlm.lm.get_decoder().layers, []
    if layer >= len(layers):
        raise ValueError(f"--target_layer {layer}: the last layer is {len(layers) - 1}, and -1 the "
                         "state behind the norm")
    with layers[layer].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])):
        yield states


def mean_at(states: Tensor, where: Tensor) -> Tensor:
    """The mean of states (B, T, D) over the True positions of (B, T) -> (B, D); none: zeros."""
    return torch.einsum("bt,btd->bd", F.normalize(where.to(states.dtype), p=1, dim=1), states)


def positions(batch: PaddedViews, vlm: VLM, name: str) -> Tensor:
    """(B, T): the positions of target views whose states h_R averages; name: --target_position."""
    if name == "image":
        return (batch.ids == vlm.lm.config.image_token_id) & batch.mask
    if name == "end":
        return F.one_hot(batch.state_at, batch.ids.shape[1]).bool()
    # words: all that the assistant says, without the ends of turns; word: the last of them
    words = (batch.labels != -100) & (batch.labels != vlm.family.end_id)
    remaining = words.flip(1).cumsum(dim=1).flip(1)  # how many words from here on
    return words if name == "words" else words & (remaining == 1)


class Centred(Pearl):
    """The target is h_R minus the mean h_R of the k training questions most like this one, so
    L_JEPA asks for what is particular to this trajectory. About two fifths of the squared length of
    a frozen h_R are the same for all, and their mean alone gets most of the cosine.

    Questions are alike by the cosine of their h^_R before training, minus the mean of all h^_R; a
    sampled question is its own neighbour too. No labels, no negatives.
    """

    class Options:
        neighbours: int = option(64, "k of the mean that is subtracted from h_R; 0: all sampled")
        sample: int = option(2000, "training questions in which neighbours are searched, at most")

    @torch.no_grad()
    def prepare(self, datasets: list[Trajectories]) -> None:
        """Encode every question of the sample, and its R, with the starting model."""
        if isinstance(self, Current):
            raise ValueError("--method centred needs the frozen target; for the current model's "
                             "there is running_mean")
        super().prepare(datasets)
        self.first_rows = self.predictor.pred_embeddings.clone()  # [PRED] before training
        generator = torch.Generator().manual_seed(self.config.seed)
        rows = torch.randperm(len(datasets[0]), generator=generator)[:self.config.sample]
        keys, targets = [], []
        with self.vlm.starting_model() as start:
            for batch, images in read_all(self, datasets[0], rows):
                if batch := [example for example in batch if not example.bare]:
                    keys.append(self.key(start, batch, images))
                    targets.append(super().encode_target(start, batch, images).embedding)
        keys = torch.cat(keys)
        self.mean_key = keys.mean(dim=0)
        self.keys = F.normalize(keys - self.mean_key, dim=1)  # (N, D)
        self.sampled = at_least_float32(torch.cat(targets))  # (N, D)

    def key(self, start: VLM, batch: Examples, images: Images) -> Tensor:
        """h^_R before training, (B, D)."""
        views = collate([example.views.input for example in batch], start.pad_id)
        return at_least_float32(start(views, images, self.first_rows).embedding)

    def encode_target(self, vlm: VLM, batch: Examples, images: Images) -> Encoded:
        encoded = super().encode_target(vlm, batch, images)
        keys = F.normalize(self.key(vlm, batch, images) - self.mean_key, dim=1)  # (B, D)
        count = min(self.config.neighbours or len(self.keys), len(self.keys))
        # bfloat16 would not tell cosines as close as these apart
        with torch.autocast(keys.device.type, enabled=False):
            nearest = (keys @ self.keys.T).topk(count).indices  # (B, k)
        mean = torch.stack([self.sampled[row].mean(dim=0) for row in nearest])  # (B, D)
        return encoded._replace(embedding=encoded.embedding - mean.to(encoded.embedding.dtype))


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
        seeds = [1_000_003 * self.config.seed + example.index[1] for example in batch]
        noise = [torch.randn(target.shape[1], generator=torch.Generator().manual_seed(seed))
                 for seed in seeds]
        noise = F.normalize(torch.stack(noise), dim=1).to(target)
        return super().jepa(prediction, target.norm(dim=1, keepdim=True) * noise, batch)


class TaskMean(Pearl):
    """The control: the mean h_R of all records of the task, so the trajectory's own part is gone.
    It reads the whole training set once before the first step."""

    group = attrgetter("task")

    @torch.no_grad()
    def prepare(self, datasets: list[Trajectories]) -> None:
        super().prepare(datasets)
        for dataset in datasets:
            groups = defaultdict(list)
            for batch, images in read_all(self, dataset, torch.arange(len(dataset))):
                self.target(batch, images)
                for example in batch:
                    if example.index not in self.targets.cache:
                        raise ValueError("--method task_mean and answer_mean need every frozen h_R "
                                         "in memory: fewer records, and no --shard")
                    if not example.bare:
                        groups[self.group(example)].append(example.index)
            for group in groups.values():
                mean = torch.stack([self.targets.cache[row] for row in group]).mean(dim=0)
                self.targets.cache |= dict.fromkeys(group, mean)


class AnswerMean(TaskMean):
    """The control: the mean h_R of all records of the task with the same answer."""

    group = attrgetter("task", "answer")


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

    class Options:
        nextlat_factor: float = option(1.0, "L = L_VLM + lambda (L_JEPA + factor * L_NextLat)")

    def nextlat(self, full: Encoded, target: Encoded) -> Tensor:
        return self.config.nextlat_factor * super().nextlat(full, target)


class TwoPasses(Pearl):
    """Full and input view in one pass each: the same numbers as one pass for both, but slower."""

    one_pass = False


class Dropout(Pearl):
    """Dropout in LoRA."""

    class Options:
        lora_dropout: float = option(0.1, "dropout of what enters the low-rank product")

    lora_dropout = property(lambda self: self.config.lora_dropout)
