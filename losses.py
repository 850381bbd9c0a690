"""The losses of Pearl (arXiv:2604.08065, section 3) and the gauges that show a collapse. Imports torch only.

    L = L_VLM + lambda * (L_JEPA + L_NextLat)                                                             Eq. 4
    L_VLM      the expert's words, predicted token by token from <I0, Q> and everything before them       Eq. 3
    L_JEPA     the embedding of the trajectory R, predicted from <I0, Q> alone                            Eq. 1
    L_NextLat  the next latent state of the sequence, predicted from this one                             Eq. 2

Where gradient flows: L_VLM to every state of the full view; L_JEPA to the input view only, its target is a constant;
L_NextLat to the state it starts from and to the latent predictor, again towards a constant. Every stop-gradient of the
method is a `.detach()` in this file, on a line of its own.

Letters: B batch, T sequence, D hidden size, V vocabulary, n rows selected from B x T by a mask, d horizon.
Left out on purpose: where the states come from (model.py) and which token is which (data.py).
"""

from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

DISTANCES = ("cosine", "smoothl1", "mse", "l2")


def _exact(logits: Tensor) -> Tensor:
    """At least float32: the sum over a vocabulary loses too much in bfloat16."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def distance(prediction: Tensor, target: Tensor, kind: str) -> Tensor:
    """D(prediction, target) over the last dimension: (..., D), (..., D) -> (...).

    cosine    1 - cos; blind to length, so it cannot be lowered by shrinking the target
    smoothl1  mean over D of Huber's function with its corner at 1
    mse       mean over D of the squared difference
    l2        Euclidean norm of the difference
    """
    if kind == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1)
    if kind == "smoothl1":
        return F.smooth_l1_loss(prediction, target, reduction="none").mean(dim=-1)
    if kind == "mse":
        return (prediction - target).square().mean(dim=-1)
    if kind == "l2":
        return torch.linalg.vector_norm(prediction - target, dim=-1)
    raise ValueError(f"unknown distance {kind!r}: choose one of {', '.join(DISTANCES)}")


def jepa_loss(predicted: Tensor, target: Tensor, kind: str = "cosine", centre: Tensor | None = None) -> Tensor:
    """Eq. 1: L_JEPA = mean over the batch of D(h^_R, sg[h_R]).

    predicted (B, D): h^_R, the state of the last [PRED] token after <I0, Q>. target (B, D): h_R, the state of the
    trajectory's last token. Gradient: flows to `predicted`, stops at `target`; the target is trained by the other two
    losses only, so the model cannot make the prediction easy by moving both ends together.
    Deviation: the paper's text has D = SmoothL1, the authors' release 1 - cos. Ours is cosine; kind="smoothl1" is the text.
    centre (D), if given, is subtracted from both (not in the paper, off by default): the end-of-turn states of a language
    model share a large constant part, and with it gone the cosine has more to say. But it also lets h_R collapse onto a
    single direction, on which every cosine is 1 or -1: watch effective_rank.
    """
    target = target.detach()
    if centre is not None:
        predicted, target = predicted - centre, target - centre
    return distance(predicted, target, kind).mean()


def nextlat_loss(states: Tensor, rollout: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Eq. 2: L_NextLat = 1/d * sum over i = 1..d of the mean over t of SmoothL1(sg[h_{t+i}], h^_{t+i}).

    states (B, T, D). rollout: from predictor.LatentPredictor.rollout, for each i a triple (forecast (n, D), row (n),
    position (n)) with forecast = h^_{t+i} and position = t + i. Gradient: flows to the forecasts (so to h_t and to the
    latent predictor), stops at the states they are compared with.
    Deviation: the mean over t is taken for each i over the t that have an i-th successor; the paper writes one mean.
    """
    total = states.new_zeros(())
    for forecast, row, position in rollout:
        target = states[row, position].detach()
        if len(forecast):
            total = total + distance(forecast, target, "smoothl1").mean()
    return total / max(1, len(rollout))


def nextlat_token_loss(rollout: list[tuple[Tensor, Tensor, Tensor]], labels: Tensor, head_weight: Tensor) -> Tensor:
    """The released code's extra NextLat term: the forecast state must decode to the token that its true state decodes to.

    Cross-entropy of head(h^_{t+i}) against token t+i+1, where that token is supervised. labels (B, T), -100 = not
    supervised; head_weight (V, D). Gradient: flows to the forecasts, stops at the head.
    Not in the paper's text, off by default.
    """
    head_weight = head_weight.detach()
    total = head_weight.new_zeros(())
    for forecast, row, position in rollout:
        following = F.pad(labels, (0, 1), value=-100)[row, position + 1]  # (n,) the token that comes after the forecast state
        keep = following != -100
        if keep.any():
            total = total + F.cross_entropy(_exact(F.linear(forecast[keep], head_weight)), following[keep])
    return total / max(1, len(rollout))


def vlm_loss(states: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Eq. 3: L_VLM = mean of -log p(token | <I0, Q>, everything before it) over the supervised tokens of the batch.

    states (B, T, D) of the full view; labels (B, T), the token itself where it is supervised and -100 elsewhere; head
    maps (n, D) to logits (n, V) and is applied to the n positions that precede a supervised token, no others.
    """
    follows = labels[:, 1:]  # (B, T-1) the token after each position
    keep = follows != -100
    return F.cross_entropy(_exact(head(states[:, :-1][keep])), follows[keep])


def pearl_loss(vlm: Tensor, jepa: Tensor, nextlat: Tensor, lambda_latent: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4: L_PEARL = L_VLM + lambda * (L_JEPA + L_NextLat). Returns the total and its detached parts for the log."""
    total = vlm + lambda_latent * (jepa + nextlat)
    parts = dict(loss=total, vlm=vlm, jepa=jepa, nextlat=nextlat)
    return total, {name: value.detach() for name, value in parts.items()}


def reconstruction_loss(predicted: Tensor, target: Tensor, kind: str = "mse") -> Tensor:
    """The reconstruction baseline (LVR, Mirage): mean over latents of D(state before latent j, sg[visual embedding j]).

    predicted, target (n, D), one row a latent. Gradient: flows to `predicted`, stops at `target`.
    """
    target = target.detach()
    return distance(predicted, target, kind).mean()


@torch.no_grad()
def collapse_gauges(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """What a low L_JEPA hides: does h^_R (predicted) say anything about which h_R (target) it belongs to?

    predicted, target (B, D), B >= 2. All but `rms` are computed on rows scaled to unit length, which the cosine loses
    nothing by; `rms_*` shows the shrinking that SmoothL1 permits.
      r2              1 - |h_R - h^_R|^2 / |h_R - mean h_R|^2; 1 perfect, 0 no better than the mean, negative worse
      spread_pred     std over the batch / RMS of h^_R; near 0: the prediction ignores its input
      spread_target   the same of h_R; near 0: all trajectories look alike, the target has collapsed
      effective_rank  exp(entropy of the normalised eigenvalues of h_R's covariance), 1 to min(B - 1, D)
      mean_cosine     mean cosine between two different h_R
      retrieval       how often the h_R nearest to h^_R (by cosine) is its own, beside retrieval_chance = 1 / B
    """
    batch = len(target)
    raw = [x.float() for x in (predicted, target)]
    pred, true = (F.normalize(x, dim=-1) for x in raw)
    centred = true - true.mean(dim=0)
    variance = centred.square().sum().clamp_min(1e-12)
    spread = [((x - x.mean(dim=0)).square().mean() / x.square().mean().clamp_min(1e-12)).sqrt() for x in (pred, true)]
    share = torch.linalg.svdvals(centred).square()
    share = share / share.sum().clamp_min(1e-12)
    cosines = true @ true.T  # (B, B)
    nearest = (pred @ true.T).argmax(dim=1)
    gauges = dict(
        r2=1 - (true - pred).square().sum() / variance,
        spread_pred=spread[0], spread_target=spread[1],
        effective_rank=torch.exp(-(share * share.clamp_min(1e-12).log()).sum()),
        mean_cosine=(cosines.sum() - cosines.trace()) / max(1, batch * (batch - 1)),
        retrieval=(nearest == torch.arange(batch, device=nearest.device)).float().mean(),
        rms_pred=raw[0].square().mean().sqrt(), rms_target=raw[1].square().mean().sqrt())
    return {name: float(value) for name, value in gauges.items()} | dict(retrieval_chance=1 / batch)
