"""The losses of Pearl (arXiv:2604.08065, section 3), and the gauges of a collapse. Torch only.

    Eq. 3  L_VLM      the expert's words, token by token, given <I0, Q> and everything before them
    Eq. 1  L_JEPA     the embedding of the trajectory R, predicted from <I0, Q> alone
    Eq. 2  L_NextLat  the next latent state of the sequence, forecast from this one
    Eq. 4  L = L_VLM + lambda * (L_JEPA + L_NextLat)

in the order in which a step computes them (train.py, compute_losses).

Letters: B batch, T sequence, D hidden size, V vocabulary, n rows chosen from B x T by a mask,
d horizon. h a final-layer state, h^ a prediction of one, sg stop-gradient.
Left out on purpose: where states come from (model.py) and which token is which (data.py).
"""

from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DISTANCES = ("cosine", "smoothl1", "mse", "l2")


def vlm_loss(states: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Eq. 3: L_VLM = mean of -log p(token | <I0, Q>, all before it) over the supervised tokens.

    states (B, T, D) of the full view; labels (B, T), the token itself where it is supervised, -100
    elsewhere; head maps states (n, D) to logits (n, V).
    Gradient: flows to every state that a supervised word was predicted from, and before it.
    """
    # a state says the next word: labels are read one position further on than the states
    following = labels[:, 1:]  # (B, T-1) the token after each position
    keep = following != -100  # (B, T-1) True: that token is supervised
    # the head is by far the widest layer: it is applied where a word is predicted, nowhere else
    return F.cross_entropy(at_least_float32(head(states[:, :-1][keep])), following[keep])


def at_least_float32(logits: Tensor) -> Tensor:
    """A sum over the vocabulary loses too much in bfloat16."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def distance(prediction: Tensor, target: Tensor, kind: str | Callable) -> Tensor:
    """D(prediction, target) over the last dimension: (..., D), (..., D) -> (...)."""
    # what needs the whole batch, (B, D), (B, D) -> (B), is handed in: InfoNCE, baselines/cures.py
    if callable(kind):
        return kind(prediction, target)
    # blind to length, so it cannot be lowered by shrinking the target
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1)
    # Huber's function, its corner at 1; means over D, so that they do not grow with the model
    if kind == "smoothl1":
        return F.smooth_l1_loss(prediction, target, reduction="none").mean(dim=-1)
    if kind == "mse":
        return (prediction - target).square().mean(dim=-1)
    # the Euclidean norm: no mean over D, so it does grow
    if kind == "l2":
        return torch.linalg.vector_norm(prediction - target, dim=-1)
    raise ValueError(f"unknown distance {kind!r}: choose one of {', '.join(DISTANCES)}")


def jepa_loss(predicted: Tensor, target: Tensor, kind: str | Callable = "cosine") -> Tensor:
    """Eq. 1: L_JEPA = mean over the batch of D(h^_R, sg[h_R]).

    predicted (B, D): h^_R, the state of the last [PRED] token after <I0, Q>. target (B, D): h_R,
    the state of the trajectory's last token. Gradient: flows to `predicted`, stops at `target`.
    """
    # Deviation: the paper's text has D = SmoothL1; its authors' release has, and says that the
    # reported numbers used, 1 - cos. Ours is the cosine; kind="smoothl1" is the text.
    # The stop keeps the gradient from pulling h_R towards h^_R. It does not keep h_R in place: the
    # same layers compute both, so every step that moves one moves the other, and nothing here holds
    # two targets apart. SimSiam, BYOL and I-JEPA put a predictor of its own between the two ends;
    # Pearl ties all weights, and with the current model's h_R the targets do collapse (README).
    # By default they come from the frozen starting model (train.py, cache_targets): there is then
    # nothing to stop, and this line only says so again.
    target = target.detach()
    # a mean and no sum, so that lambda means the same at every batch size
    return distance(predicted, target, kind).mean()


def nextlat_loss(states: Tensor, forecasts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Eq. 2: L_NextLat = 1/d * sum over i = 1..d of mean over t of SmoothL1(sg[h_{t+i}], h^_{t+i}).

    states (B, T, D). forecasts: for each i the forecast states (n, D), row after row, and the mask
    (B, T) of the positions t+i they stand for (predictor.LatentPredictor.forecasts).
    Gradient: flows to the forecasts (so to h_t and to the latent predictor), stops at h_{t+i}.
    """
    total = states.new_zeros(())
    for forecast, at in forecasts:
        # the next state must be foreseen, not made easy to foresee
        target = states[at].detach()
        # Deviation: the paper writes one mean. Here it is taken for each i, over the t from which
        # all of t+1..t+i may be forecast; at d > 1 others average otherwise (docs/differences.md)
        # a text shorter than i has no such t, and a mean of nothing would be NaN
        if len(forecast):
            total = total + distance(forecast, target, "smoothl1").mean()
    return total / max(1, len(forecasts))


def pearl_loss(vlm: Tensor, jepa: Tensor, nextlat: Tensor,
               lambda_latent: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4: L_PEARL = L_VLM + lambda * (L_JEPA + L_NextLat), and for the log detached parts."""
    # one lambda for both latent terms
    total = vlm + lambda_latent * (jepa + nextlat)
    # tensors, and not numbers yet: .item() would make every step wait for the GPU
    parts = dict(loss=total, vlm=vlm, jepa=jepa, nextlat=nextlat)
    return total, {name: value.detach() for name, value in parts.items()}


def reconstruction_loss(predicted: Tensor, target: Tensor, kind: str = "mse") -> Tensor:
    """The rival (LVR, Mirage): mean over latents of D(state before latent j, sg[embedding j]).

    predicted, target (n, D), one row a latent; target: visual embeddings of the tool image.
    Gradient: flows to `predicted`, stops at `target`.
    """
    # Eq. 1's line, kept apart from it: the rival may change without Pearl
    return distance(predicted, target.detach(), kind).mean()


class Losses(NamedTuple):
    # with its graph, for backward(); None once that is done
    total: Tensor | None
    # detached, for the log
    parts: dict[str, Tensor]
    # (h^_R, h_R), each (B, D), detached, for the gauges
    pair: tuple[Tensor, Tensor] | None = None


def average(results: list[Losses], shares: list[float]) -> Losses:
    """Of several passes: weighted mean parts, and all pairs one after another; no total."""
    # pairs are joined, not averaged: whether a prediction finds its own target needs all the others
    parts = {name: sum(share * result.parts[name] for result, share in zip(results, shares))
             for name in results[0].parts}
    pairs = [result.pair for result in results if result.pair]
    return Losses(None, parts, tuple(map(torch.cat, zip(*pairs))) if pairs else None)


@torch.no_grad()
def collapse_gauges(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """What a low L_JEPA hides: does h^_R (predicted) tell which h_R (target) it belongs to?

    predicted, target (B, D); {} for one row alone. docs/logged.md has the names as a table.
    """
    # a low L_JEPA alone is also reached by making all targets alike, and of one row all are alike
    if (batch := len(target)) < 2:
        return {}
    raw = [x.float() for x in (predicted, target)]
    # rows of unit length, which is what the cosine sees
    pred, true = (F.normalize(x, dim=-1) for x in raw)
    centred = true - true.mean(dim=0)
    # targets that are all alike have none, and nothing may be divided by it
    variance = centred.square().sum().clamp_min(1e-12)
    # standard deviation over the batch / root mean square
    spread = [((x - x.mean(dim=0)).square().mean() / x.square().mean().clamp_min(1e-12)).sqrt()
              for x in (pred, true)]
    # the covariance's eigenvalues, without making that (D, D) matrix; as shares of their sum
    share = torch.linalg.svdvals(centred).square()
    share = share / share.sum().clamp_min(1e-12)
    cosines = true @ true.T  # (B, B)
    # of all targets of the batch, is one's own the nearest?
    nearest = (pred @ true.T).argmax(dim=1)
    own = torch.arange(batch, device=nearest.device)
    gauges = dict(
        # 1: perfect; 0: no better than to say the mean of all h_R each time
        r2=1 - (true - pred).square().sum() / variance,
        # near 0: the prediction ignores its input; all trajectories look alike, a collapse
        spread_pred=spread[0], spread_target=spread[1],
        # exp(entropy): how many directions the targets use, from 1 to min(B - 1, D)
        effective_rank=torch.exp(-(share * share.clamp_min(1e-12).log()).sum()),
        # of two different h_R, so without the diagonal
        mean_cosine=(cosines.sum() - cosines.trace()) / max(1, batch * (batch - 1)),
        retrieval=(nearest == own).float().mean(),
        # lengths as they are: the shrinking that SmoothL1 permits
        rms_pred=raw[0].square().mean().sqrt(), rms_target=raw[1].square().mean().sqrt())
    return {name: float(value) for name, value in gauges.items()} | dict(retrieval_chance=1 / batch)
