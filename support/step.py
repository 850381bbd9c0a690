"""What a training step has beside the method: hooks for other methods, and two savings that change
no number. Embeddings h_R are kept; and two views of an example, the full view and behind it the
rest of the input view, share a pass (`--method two_passes` gives each view a pass of its own).

Letters: B batch, T sequence, D hidden size, A rows of positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from support.options import optional_folder
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


def method_of(config) -> type[Method]:
    """The class of a run's method, for its questions alone."""
    # Pearl and SFT, which are in train.py, are asked as their base class is
    if config.method in ("pearl", "sft"):
        return Method
    return optional_folder("baselines", f"--method {config.method}").find(config.method)


def adapt_all(examples: Sequence[Example], config) -> list[Example]:
    """The examples with their trajectories as the run's training showed them."""
    adapt = method_of(config).adapt
    return [adapt(example, config) for example in examples]


class StoredTargets:
    """Embeddings h_R by row, on the CPU and in the model's own dtype: 450,000 of a 7B in bfloat16
    are 3.2 GB. Beyond `limit` bytes a row is not kept, and is computed at each use."""

    def __init__(self, limit: float):
        self.limit = limit
        self.cache: dict[tuple[str, int], Tensor] = {}

    def add_and_look_up(self, rows: list[tuple[str, int]],
                        new: dict[tuple[str, int], Tensor]) -> Tensor:
        """h_R (B, D) of these rows. new: those just computed, on the model's device."""
        device = next(iter(new.values())).device if new else None
        for row, h in new.items():
            if (len(self.cache) + 1) * h.nbytes <= self.limit:  # all have one size
                self.cache[row] = h.cpu()
        return torch.stack([new[row] if row in new else self.cache[row].to(device) for row in rows])

    def state(self) -> dict:
        """For a resumed run: in other batches, h_R would differ in the last digits."""
        values = list(self.cache.values())
        return dict(rows=list(self.cache), values=torch.stack(values) if values else [])

    def load(self, state: dict) -> None:
        for (split, row), h in zip(state["rows"], state["values"]):
            self.cache[split, row] = h


def add_branches(full_views, input_views, collate):
    """The full views as a batch, with the rest of each input view behind it.

        <I0, Q> and generation prompt | R | padding | [PRED] x K | padding
                     shared              full         branch

    The branch sees the shared tokens and itself; R never sees the branch. `branch_inputs` makes
    attention and positions, so the branch can stand at the end, where the full view's states are a
    slice. `state_at` points to h^_R (with K = 0 to the last shared token).
    """
    # how many first tokens the views share, [PRED] apart
    ends = [min(view.inject_at, default=len(view.ids)) for view in input_views]
    shared = [next((n for n in range(end) if full.ids[n] != view.ids[n]), end)
              for full, view, end in zip(full_views, input_views, ends)]
    batch = collate(full_views)
    rest = collate([view._replace(ids=view.ids[n:], labels=view.labels[n:], images=[],
                                  inject_at=[at - n for at in view.inject_at])
                    for view, n in zip(input_views, shared)])
    shared, state_at = torch.tensor(shared), torch.tensor([view.state_at for view in input_views])
    in_branch = state_at >= shared
    tensors = {name: torch.cat([getattr(batch, name), getattr(rest, name)], dim=1)
               for name in ("ids", "mask", "labels", "inject_at")}
    return replace(batch, **tensors, branch=rest.ids.shape[1], shared=shared,
                   state_at=state_at + in_branch * (batch.ids.shape[1] - shared))


def branch_inputs(batch, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions (A, B, T) and additive attention mask (B, 1, T, T) of a batch with branches.
    positions (A, B, T - branch): those of the full views alone."""
    device, width = positions.device, positions.shape[-1]
    rows = torch.arange(len(batch.ids), device=device)
    # the last shared token is a text token, so the branch counts on from it as text does
    last = positions[:, rows, batch.shared - 1]  # (A, B)
    steps = torch.arange(1, batch.branch + 1, device=device)
    positions = torch.cat([positions, last[..., None] + steps], dim=-1)
    index = torch.arange(batch.ids.shape[1], device=device)
    sees = (index[:, None] >= index) & batch.mask[:, None]  # (B, T, T) causal, no padding
    in_branch = index >= width
    foreign = in_branch[:, None] & ~in_branch & (index >= batch.shared[:, None, None])  # R
    # a large negative number and not -inf: a row of padding that sees nothing would become NaN
    mask = torch.zeros(sees.shape, dtype=dtype, device=device)
    return positions, mask.masked_fill(~(sees & ~foreign), torch.finfo(dtype).min)[:, None]


def encode_two_views(vlm, full_views, input_views, images, pred_embeddings: Tensor, collate):
    """The encoded full views, and the embedding h^_R (B, D) of the input views, in one pass.
    collate: that of data.py, which this folder does not import."""
    batch = add_branches(full_views, input_views, partial(collate, pad_id=vlm.pad_id))
    encoded = vlm(batch, images, pred_embeddings)
    views, width = encoded.padded, encoded.padded.ids.shape[1] - encoded.padded.branch
    full = encoded._replace(  # the branches stand behind the full views
        states=encoded.states[:, :width], input_embeddings=encoded.input_embeddings[:, :width],
        padded=replace(views, labels=views.labels[:, :width], mask=views.mask[:, :width]))
    return full, encoded.embedding
