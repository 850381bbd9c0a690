"""Two views of an example in one forward pass: the full view, and behind it what the input view
does not share with it.

A saving, not part of the method: `--method two_passes` gives each view a pass of its own, with the
same numbers.
Letters: B batch, T sequence, A rows of positions.
"""

from dataclasses import replace

import torch
from torch import Tensor


def shared_tokens(full_ids: list[int], input_ids: list[int], inject_at: tuple[int, ...]) -> int:
    """How many first tokens of the input view, before any injected one, are the full view's."""
    end = min(inject_at, default=len(input_ids))
    same = [a == b for a, b in zip(full_ids, input_ids[:end])]
    return (same + [False]).index(False)


def add_branches(batch, full_views, input_views):
    """A collated batch of full views -> the same with the rest of each input view behind it.

        <I0, Q> and generation prompt | R | padding | [PRED] x K | padding
                     shared              full         branch

    The branch sees what both views share, and itself; R never sees the branch. Since attention and
    positions are given explicitly (`branch_inputs`), where the branch stands does not matter: at
    the end, so that the full view's states are a slice. `embed_at` then points to h^_R (with K = 0
    to the last shared token).
    """
    width = batch.ids.shape[1]
    shared = [shared_tokens(full.ids, view.ids, view.inject_at)
              for full, view in zip(full_views, input_views)]
    tails = [view.ids[n:] for view, n in zip(input_views, shared)]
    branch = max(map(len, tails))

    def grown(tensor: Tensor, rows: list[list], value) -> Tensor:
        rows = [row + [value] * (branch - len(row)) for row in rows]
        extra = torch.tensor(rows, dtype=tensor.dtype).view(len(rows), branch)
        return torch.cat([tensor, extra], dim=1)

    injected = [[n + i in view.inject_at for i in range(len(tail))]
                for view, n, tail in zip(input_views, shared, tails)]
    return replace(
        batch, ids=grown(batch.ids, tails, 0),
        mask=grown(batch.mask, [[True] * len(tail) for tail in tails], False),
        labels=grown(batch.labels, [[-100] * len(tail) for tail in tails], -100),
        inject_at=grown(batch.inject_at, injected, False),
        embed_at=torch.tensor([view.embed_at if view.embed_at < n else width + view.embed_at - n
                               for view, n in zip(input_views, shared)]),
        shared=torch.tensor(shared), branch=branch)


def branch_inputs(batch, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions (A, B, T) and additive attention mask (B, 1, T, T) of a batch with branches.

    positions (A, B, T - branch): those of the full views alone.
    """
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
    batch = add_branches(collate(full_views, vlm.pad_id), full_views, input_views)
    encoded = vlm(batch, images, pred_tokens)
    batch, width = encoded.batch, encoded.batch.ids.shape[1] - encoded.batch.branch
    # the branches stand behind the full views
    full = encoded._replace(
        states=encoded.states[:, :width], inputs=encoded.inputs[:, :width],
        batch=replace(batch, labels=batch.labels[:, :width], mask=batch.mask[:, :width]))
    return full, encoded.embedding
