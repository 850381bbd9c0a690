"""The losses of Pearl (arXiv:2604.08065, section 3) and the gauges of a collapse. Only torch.

    Eq. 3  L_VLM      the expert's text, token by token, given <I0, Q> and all tokens before
    Eq. 1  L_JEPA     the embedding of the trajectory R, predicted from <I0, Q> alone
    Eq. 2  L_NextLat  the next state, predicted from the current one and the next token's embedding
    Eq. 4  L = L_VLM + lambda * (L_JEPA + L_NextLat)

The order is that of a training step (train.py, Pearl.forward).

Letters: B batch, T sequence, D hidden size (D(., .) a distance), V vocabulary, n rows that a mask
selects from B x T, d horizon. h is a final state, h^ a prediction of one, sg the stop-gradient.
Left out on purpose: where states come from (model.py), which token is which (data.py).
"""

from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def vlm_loss(states: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Eq. 3: L_VLM = mean of -log p(token | <I0, Q>, all before it) over the supervised tokens.

    states (B, T, D) of the full view; labels (B, T) hold the token where it is supervised, else
    -100; head maps states (n, D) to logits (n, V).
    Gradient: flows to each state that predicts a supervised token and, by attention, to all before.
    """
    # the state at position t predicts the token at t + 1
    next_labels = labels[:, 1:]  # (B, T-1)
    supervised = next_labels != -100  # (B, T-1) True: this token counts
    # the head is by far the widest layer, so it runs on the supervised positions only
    logits = at_least_float32(head(states[:, :-1][supervised]))  # (n, V)
    return F.cross_entropy(logits, next_labels[supervised])


def at_least_float32(logits: Tensor) -> Tensor:
    """A sum over the vocabulary loses too many digits in 16 bits."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def distance(prediction: Tensor, target: Tensor, name: str) -> Tensor:
    """The distance of prediction and target: (..., D), (..., D) -> (...)."""
    # ignores the norms, so shrinking the target does not lower the loss
    if name == "cosine":
        return 1 - F.cosine_similarity(prediction, target, dim=-1)
    # the Huber function with delta 1; a mean over D, so the value does not grow with the model
    if name == "smoothl1":
        return F.smooth_l1_loss(prediction, target, reduction="none").mean(dim=-1)
    if name == "mse":
        return (prediction - target).square().mean(dim=-1)
    # the Euclidean norm has no mean over D, so its value does grow with the model
    if name == "l2":
        return torch.linalg.vector_norm(prediction - target, dim=-1)
    raise ValueError(f"unknown distance {name!r}: choose cosine, smoothl1, mse or l2")


def jepa_loss(prediction: Tensor, target: Tensor, name: str = "cosine") -> Tensor:
    """Eq. 1: L_JEPA = mean over the batch of D(h^_R, sg[h_R]).

    prediction (B, D): h^_R, the state of the last [PRED] token behind <I0, Q>. target (B, D): h_R,
    the state of the trajectory's last end-of-turn token.
    Gradient: flows to `prediction`, stops at `target`.
    """
    # Deviation: the paper's text has D = SmoothL1 (--distance smoothl1). The authors' release has
    # 1 - cos and says that the reported numbers were made with it, so the cosine is our default.
    #
    # By default h_R comes from the frozen starting model, and detach() does nothing. With the
    # current model's h_R (the paper), detach() is not enough: a step that changes h^_R changes h_R
    # too, no term keeps the h_R of two examples apart, and they collapse (README). SimSiam, BYOL
    # and I-JEPA need a network between state and h^ to prevent this; here h^_R is a state itself.
    target = target.detach()
    return distance(prediction, target, name).mean()


def nextlat_loss(states: Tensor, forecasts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Eq. 2: L_NextLat = 1/d * sum over i = 1..d of mean over t of SmoothL1(sg[h_{t+i}], h^_{t+i}).

    states (B, T, D). forecasts: for each i the predicted states (n, D) and the mask (B, T) of the
    positions t + i that they belong to (predictor.LatentPredictor.forecasts).
    Gradient: flows to the forecasts (so to h_t and the latent predictor), stops at h_{t+i}.
    """
    total = states.new_zeros(())
    for forecast, where in forecasts:
        # without the stop-gradient, making the next state easy to predict would lower the loss
        target = states[where].detach()  # (n, D)
        # Deviation: the paper writes one mean; for d > 1 we take one for each i, over those t with
        # t+1 .. t+i all supervised. If no text has i tokens in a row, this i adds 0 to the sum.
        if len(forecast):
            total = total + distance(forecast, target, "smoothl1").mean()
    return total / max(1, len(forecasts))


def pearl_loss(L_vlm: Tensor, L_jepa: Tensor, L_nextlat: Tensor, lambda_latent: float) -> Tensor:
    """Eq. 4: L_PEARL = L_VLM + lambda * (L_JEPA + L_NextLat)."""
    return L_vlm + lambda_latent * (L_jepa + L_nextlat)


def reconstruction_loss(prediction: Tensor, target: Tensor, name: str = "mse") -> Tensor:
    """Not Pearl: the loss of LVR and Mirage (baselines/reconstruction.py), where some positions of
    the text ("latents") stand for the tool image, and the state before each predicts its embedding.

    prediction, target (n, D), one row per latent; target: visual embeddings of the tool image.
    Gradient: flows to `prediction`, stops at `target`.
    """
    return distance(prediction, target.detach(), name).mean()


class Losses(NamedTuple):
    """What a step returns."""

    total: Tensor | None  # with its graph, for backward()
    parts: dict[str, Tensor]  # detached, for the log
    # (h^_R, h_R), each (B, D) and detached, for the gauges; None: the method has no such pair
    pair: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, total: Tensor, pair: tuple | None, **terms: Tensor) -> "Losses":
        parts = {name: value.detach() for name, value in dict(loss=total, **terms).items()}
        return cls(total, parts, tuple(x.detach() for x in pair) if pair else None)


def average(results: list[Losses], sizes: list[int] | None = None) -> dict[str, float]:
    """The log's numbers of several micro-batches: the mean of each part, weighted by their sizes
    (None: all have one size), and the gauges on all pairs together."""
    sizes = sizes or [1] * len(results)
    shares = [size / sum(sizes) for size in sizes]
    metrics = {name: float(sum(share * result.parts[name]
                               for share, result in zip(shares, results)))
               for name in results[0].parts}
    # pairs are joined and not averaged: a gauge compares each prediction with all targets
    pairs = [result.pair for result in results if result.pair]
    return metrics | (collapse_gauges(*map(torch.cat, zip(*pairs))) if pairs else {})


@torch.no_grad()
def collapse_gauges(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """What a low L_JEPA hides: does h^_R tell which h_R it belongs to?

    prediction, target (B, D). Returns {} for a single row. docs/logged.md explains each name.
    """
    if (batch := len(target)) < 2:
        return {}
    rms = [x.float().square().mean().sqrt() for x in (prediction, target)]
    # unit length: this is what the cosine compares
    pred, true = (F.normalize(x.float(), dim=-1) for x in (prediction, target))
    centred = true - true.mean(dim=0)
    total_spread = centred.square().sum().clamp_min(1e-12)
    # standard deviation over the batch / root mean square
    spread = [((x - x.mean(dim=0)).square().mean() / x.square().mean().clamp_min(1e-12)).sqrt()
              for x in (pred, true)]
    # the eigenvalues of the covariance as shares of their sum, without the (D, D) matrix
    share = torch.linalg.svdvals(centred).square()
    share = share / share.sum().clamp_min(1e-12)
    cosines = true @ true.T  # (B, B)
    nearest = (pred @ true.T).argmax(dim=1)  # (B) the nearest target of each prediction
    own = torch.arange(batch, device=nearest.device)
    gauges = dict(
        # 1: perfect; 0: no better than always predicting the mean of all h_R
        r2=1 - (true - pred).square().sum() / total_spread,
        # near 0: the predictions, or the targets, are all alike; the latter is a collapse
        spread_pred=spread[0], spread_target=spread[1],
        # exp(entropy): how many directions the targets use, from 1 to min(B - 1, D)
        effective_rank=torch.exp(-(share * share.clamp_min(1e-12).log()).sum()),
        # over pairs of different rows, so without the diagonal
        mean_cosine=(cosines.sum() - cosines.trace()) / (batch * (batch - 1)),
        retrieval=(nearest == own).float().mean(), retrieval_chance=torch.tensor(1 / batch),
        # lengths as they are: they show the shrinking that SmoothL1 permits
        rms_pred=rms[0], rms_target=rms[1])
    return {name: float(value) for name, value in gauges.items()}
