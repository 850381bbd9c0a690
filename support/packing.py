"""Two views of an example in one forward pass: the full view, and behind it the rest of the input
view. A saving, not part of the method: `--method two_passes` gives each view a pass of its own,
with the same numbers.
Letters: B batch, T sequence, A rows of positions.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor


def add_branches(full_views, input_views, collate):
    """The full views as a batch, with the rest of each input view behind it.

        <I0, Q> and generation prompt | R | padding | [PRED] x K | padding
                     shared              full         branch

    The branch sees the shared tokens and itself; R never sees the branch. `branch_inputs` makes
    attention and positions, so the branch can stand at the end, where the full view's states are a
    slice. `embed_at` points to h^_R (with K = 0 to the last shared token).
    """
    # how many first tokens the views share, [PRED] apart
    ends = [min(view.inject_at, default=len(view.ids)) for view in input_views]
    shared = [next((n for n in range(end) if full.ids[n] != view.ids[n]), end)
              for full, view, end in zip(full_views, input_views, ends)]
    batch = collate(full_views)
    rest = collate([view._replace(ids=view.ids[n:], labels=view.labels[n:], images=[],
                                  inject_at=[at - n for at in view.inject_at])
                    for view, n in zip(input_views, shared)])
    shared, embed_at = torch.tensor(shared), torch.tensor([view.embed_at for view in input_views])
    in_branch = embed_at >= shared
    tensors = {name: torch.cat([getattr(batch, name), getattr(rest, name)], dim=1)
               for name in ("ids", "mask", "labels", "inject_at")}
    return replace(batch, **tensors, branch=rest.ids.shape[1], shared=shared,
                   embed_at=embed_at + in_branch * (batch.ids.shape[1] - shared))


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


def encode_two_views(vlm, full_views, input_views, images, pred_tokens: Tensor, collate):
    """The encoded full views, and the embedding h^_R (B, D) of the input views, in one pass."""
    batch = add_branches(full_views, input_views, partial(collate, pad_id=vlm.pad_id))
    encoded = vlm(batch, images, pred_tokens)
    batch, width = encoded.batch, encoded.batch.ids.shape[1] - encoded.batch.branch
    # the branches stand behind the full views
    full = encoded._replace(
        states=encoded.states[:, :width], inputs=encoded.inputs[:, :width],
        batch=replace(batch, labels=batch.labels[:, :width], mask=batch.mask[:, :width]))
    return full, encoded.embedding
