"""L_JEPA without what trajectories have in common.

About two fifths of the squared length of a frozen h_R are the same for all trajectories, so a
prediction of their mean alone gets most of the cosine. Letters: B batch, D hidden size, N sample.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.variants import EMA, Current, Examples, Images, read_all
from data import Trajectories, collate
from losses import at_least_float32
from model import VLM, Encoded
from support.options import option
from train import Pearl


class Centred(Pearl):
    """The target is h_R minus the mean h_R of the k training questions most like this one, so
    L_JEPA asks for what is particular to this trajectory among those of similar questions.

    Questions are alike by the cosine of their h^_R before training, minus the mean of all h^_R.
    The question itself is among its neighbours, if it is in the sample. No labels, no negatives.
    Before the first step every question of the sample is encoded, and its R.
    """

    @dataclass
    class Options:
        neighbours: int = option(64, "k of the mean that is subtracted from h_R; 0: all sampled")
        sample: int = option(2000, "training questions in which neighbours are searched, at most")

    def build_modules(self) -> None:
        super().build_modules()
        if isinstance(self, (Current, EMA)):
            raise ValueError("--method centred needs the frozen target; for the current model's "
                             "there is running_mean")
        # [PRED] rows before training
        self.first_rows = self.predictor.pred_tokens.detach().clone()

    @torch.no_grad()
    def prepare(self, datasets: list[Trajectories]) -> None:
        super().prepare(datasets)
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


class RunningMean(Current):
    """The current model's h_R minus a running mean of it, which keeps 0.9 of itself in each pass:
    DINO's centring (2104.14294)."""

    def build_modules(self) -> None:
        super().build_modules()
        # saved in the run's state, and in no checkpoint
        self.register_buffer("mean", torch.zeros(self.vlm.dim), persistent=False)

    def jepa(self, prediction: Tensor, target: Tensor, batch: Examples) -> Tensor:
        now = target.detach().mean(dim=0).to(self.mean)
        mean = self.mean.clone() if self.mean.any() else now
        if self.training:
            self.mean.copy_(mean.lerp(now, 0.1))
        return super().jepa(prediction, target - mean.to(target), batch)
