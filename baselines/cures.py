"""Cures for the collapse of the current target, and other states of R to predict; off by default.

With the current model's h_R nothing in Eq. 1 holds two targets apart (losses.jepa_loss says why).
What other methods have against that, each an option of its own:

    --pred_head bias|mlp     a predictor between the two ends           SimSiam, BYOL, I-JEPA
    --target_encoder ema     a teacher that follows slowly              BYOL, I-JEPA, data2vec
    --distance infonce       one's own target against the others        CPC, SimCLR, LLM-JEPA
    --vicreg W               every dimension spread, none twice         VICReg
    --sigreg W               a Gaussian along random directions         LeJEPA

and --target_layer, --target_position: which state of R is predicted (analysis/targets.py).
tests/test_cures.py has every formula a second time. Letters: B batch (one forward pass, in one
process), T sequence, D hidden size, P width of a projection, S slices.
"""

from contextlib import contextmanager
from functools import partial
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import losses
from baselines import variants
from data import Batch, Examples
from losses import Losses
from model import VLM, Encoded
from predictor import Predictor
from support.images import EncodedImage

TEMPERATURE = 0.07  # of InfoNCE: CLIP's start, LLM-JEPA's value
SLICES, KNOTS, FARTHEST = 256, 17, 3.0  # of SIGReg: directions, values of t, the largest of them
PROJECTED = 64  # P

# ---- what training adds -------------------------------------------------------------------------


def equip(predictor: Predictor, vlm: VLM, config) -> None:
    """Put into predictor.cures what the options need. Raises ValueError for a layer too far."""
    layers = len(vlm.lm.get_decoder().layers)
    if config.target_layer > layers:
        raise ValueError(f"--target_layer {config.target_layer}: {vlm.path} has {layers} layers; "
                         "-1 is the last one's state, after the norm")
    if config.pred_head != "none":
        predictor.cures["head"] = Bias(vlm.dim) if config.pred_head == "bias" else MLP(vlm.dim)
    if config.target_encoder == "ema":
        predictor.cures["teacher"] = Teacher(vlm)
    if config.sigreg:
        predictor.cures["sigreg"] = SIGReg(vlm.dim)


def after_step(module: nn.Module, config) -> None:
    """What goes on with the weights once they have moved. module: the Step, or DDP around it."""
    step = getattr(module, "module", module)
    cures = step.predictor.cures if isinstance(step.predictor, Predictor) else {}
    for name in ("teacher", "sigreg"):
        if name in cures:
            cures[name].follow(step.vlm, config)


# ---- a) a predictor of its own ------------------------------------------------------------------


class Bias(nn.Module):
    """h^_R + b, b (D) from zero: the least that can take a mean direction off the other end.

    Source: "How Does SimSiam Avoid Collapse" (ICLR 2022): what SimSiam's predictor has to do is to
    remove the vector common to all.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, predicted: Tensor) -> Tensor:
        return predicted + self.bias.to(predicted.dtype)


class MLP(nn.Module):
    """h^_R + W2 GELU(W1 LayerNorm(h^_R)), both D wide: SimSiam's, BYOL's predictor of two layers.

    Deviation: added to h^_R, and W2 starts at zero, so that training starts from Pearl's own;
    theirs replaces its input. LayerNorm for batch norm: a row must not depend on its batch.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(),
                                    nn.Linear(dim, dim))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, predicted: Tensor) -> Tensor:
        return predicted + self.layers(predicted)


def pairs(predictor: Predictor, predicted: Tensor, target: Tensor, rows: list[int],
          examples: Examples, config) -> tuple[Tensor, Tensor, Tensor]:
    """h^_R behind its head, h_R, and what L_JEPA takes for h_R; each (n, D), n the rows that have a
    trajectory: of bare answers beside them (--with_answers) there is none to predict."""
    told = variants.with_trajectory(examples, rows)
    if len(told) < len(rows):
        at = torch.tensor([row in told for row in rows], device=target.device)
        predicted, target = predicted[at], target[at]
    if "head" in predictor.cures:
        predicted = predictor.cures["head"](predicted)
    return predicted, target, variants.control_targets(target, told, config) if told else target


# ---- b) a teacher -------------------------------------------------------------------------------


class Teacher(nn.Module):
    """w' <- m w' + (1 - m) w after every step, over the weights w that train; w' makes h_R.

    m is --ema, or with --ema_rises  m + (1 - m) t / T  after step t of T (I-JEPA: 0.996 to 1).
    Sources: BYOL (2006.07733), I-JEPA (2301.08243), V-JEPA 2 (constant 0.99925). Under LoRA the
    factors A and B are averaged, not their product; images are encoded by the current tower.
    The averages are buffers: in the run's state, so that it can be resumed, in no checkpoint.
    """

    def __init__(self, vlm: VLM):
        super().__init__()
        self.places = {name.replace(".", "/"): name for name, p in vlm.named_parameters()
                       if p.requires_grad}
        for place, name in self.places.items():
            start = vlm.get_parameter(name).detach().clone()
            self.register_buffer(place, start, persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long), persistent=False)

    def weights(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(place) for place, name in self.places.items()}

    @torch.no_grad()
    def follow(self, vlm: VLM, config) -> None:
        self.steps += 1
        rise = int(self.steps) / config.steps if config.ema_rises else 0.0
        momentum = config.ema + (1 - config.ema) * rise
        for name, mean in self.weights().items():
            mean.lerp_(vlm.get_parameter(name), 1 - momentum)


# ---- c) InfoNCE ---------------------------------------------------------------------------------


def kind(examples: Examples, rows: list[int], config) -> str | Callable:
    """D of Eq. 1: a name that losses.py knows, or InfoNCE among these rows."""
    if config.distance != "infonce":
        return config.distance
    asked = [examples.examples[row] for row in variants.with_trajectory(examples, rows)]
    groups = [(ex.task, ex.answer) if config.infonce_masked else None for ex in asked]
    return partial(infonce, groups=groups)


def infonce(prediction: Tensor, target: Tensor, groups: list) -> Tensor:
    """-log( exp(s_ii / tau) / sum over j of exp(s_ij / tau) ), s_ij = cos(h^_R i, h_R j): (B).

    prediction, target (B, D). j runs over i itself and over the rows of other groups: two with the
    same family and answer may well have the same h_R. A row of group None has no mates.
    Source: CPC (1807.03748); tau 0.07. Negatives come from the pass alone: --batch is how many.
    Gradient: to every target too, unless the caller stops it (losses.jepa_loss does).
    """
    scores = F.normalize(prediction, dim=-1) @ F.normalize(target, dim=-1).T  # (B, B)
    scores = losses.at_least_float32(scores) / TEMPERATURE
    alike = [[i != j and one is not None and one == other for j, other in enumerate(groups)]
             for i, one in enumerate(groups)]
    scores = scores.masked_fill(torch.tensor(alike, device=scores.device), float("-inf"))
    own = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores, own, reduction="none")


# ---- d), e) terms that hold targets apart -------------------------------------------------------


def through_target(config) -> bool:
    """Whether R's pass carries gradient: Eq. 2 runs along it, or a term acts on h_R itself."""
    return config.nextlat_view == "trajectory" or bool(config.vicreg or config.sigreg)


def regularised(total: Tensor, parts: dict[str, Tensor], predicted: Tensor, target: Tensor,
                predictor: Predictor, config) -> Losses:
    """Eq. 4 with --vicreg and --sigreg beside L_JEPA, so inside its lambda.

    Gradient: through h_R into the pass that made it, which L_JEPA stops.
    """
    terms = {}
    if config.vicreg and len(target) > 1:
        terms["vicreg"] = config.vicreg * vicreg(target, config.vicreg_terms)
    if config.sigreg and len(target) > 1:
        terms["sigreg"] = config.sigreg * predictor.cures["sigreg"](target, config.seed)
    for name, term in terms.items():
        total = total + config.lambda_latent * term
        parts = parts | {name: term.detach(), "loss": total.detach()}
    return Losses(total, parts, (predicted.detach(), target.detach()))


def vicreg(h: Tensor, terms: str = "both") -> Tensor:
    """v + c / 25 on x = sqrt(D) h / |h|, h (B, D); terms="std": v alone.

        v = mean over D of max(0, 1 - sqrt(var(x_d) + 1e-4))
        c = 1/D * sum over d != e of cov(x)_de^2            var, cov: divided by B - 1

    Source: VICReg (2105.04906), 25 invariance + 25 v + 1 c: here L_JEPA in the invariance's place.
    Deviation: rows of length sqrt(D). The final norm fixes their length anyway, and its weights
    would decide whether gamma = 1 is out of reach or asks for nothing. So scaled, v is near 0 only
    where the mean is zero and no dimension is larger than another. With B < D, c cannot be 0.
    """
    x = losses.at_least_float32(h)
    x = F.normalize(x, dim=-1) * x.shape[1] ** 0.5
    x = x - x.mean(dim=0)
    covariance = x.T @ x / (len(x) - 1)  # (D, D)
    variance = covariance.diagonal()
    v = F.relu(1 - (variance + 1e-4).sqrt()).mean()
    c = (covariance.square().sum() - variance.square().sum()) / x.shape[1]
    return v if terms == "std" else v + c / 25


class SIGReg(nn.Module):
    """mean over S slices a of  B * integral from -3 to 3 of |phi_a(t) - g(t)|^2 g(t) dt

    phi_a(t) = mean over the batch of exp(i t a.z), the characteristic function of what is seen
    along a; g(t) = exp(-t^2 / 2) that of a standard Gaussian (the test of Epps and Pulley);
    z (B, P) a small projection of h_R; a of length 1. Trapezoid rule: 17 knots of [0, 3], doubled.
    Source: LeJEPA (2511.08544). The projection (two layers) because the final norm fixes h_R's
    scale; it can also spread what h_R hardly tells apart, so look at the gauges of h_R itself.
    Slices are drawn from seed and step: resumed, or in several processes, they are the same.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, PROJECTED))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long), persistent=False)

    def follow(self, vlm: VLM, config) -> None:
        self.steps += 1

    def forward(self, h: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * seed + int(self.steps))
        slices = F.normalize(torch.randn(PROJECTED, SLICES, generator=generator), dim=0)
        with torch.autocast(h.device.type, enabled=False):  # cosines of small differences
            z = self.projection(h.to(self.projection[0].weight.dtype))  # (B, P)
            return epps_pulley(z @ slices.to(z)).mean()


def epps_pulley(x: Tensor) -> Tensor:
    """The statistic of SIGReg for each column of x (B, S) -> (S)."""
    t = torch.linspace(0, FARTHEST, KNOTS, dtype=x.dtype, device=x.device)
    gauss = torch.exp(-t.square() / 2)
    angles = x[..., None] * t  # (B, S, knots)
    gap = (angles.cos().mean(dim=0) - gauss).square() + angles.sin().mean(dim=0).square()
    return len(x) * 2 * torch.trapezoid(gap * gauss, t, dim=-1)


# ---- which state of R ---------------------------------------------------------------------------


def encode(vlm: VLM, batch: Batch, images: dict[int, EncodedImage], config,
           predictor: Predictor | None = None) -> Encoded:
    """Enc of target views: by the teacher's weights, if predictor has one, with the embedding that
    --target_layer and --target_position choose. By default vlm(batch, images)."""
    with entering(vlm, config.target_layer) as kept:
        if predictor is not None and "teacher" in predictor.cures:
            weights = predictor.cures["teacher"].weights()
            encoded = functional_call(vlm, weights, (batch, images))
        else:
            encoded = vlm(batch, images)
    if not kept and config.target_position == "end":
        return encoded
    states = kept[0] if kept else encoded.states
    return encoded._replace(embedding=mean_at(states, places(batch, vlm, config.target_position)))


@contextmanager
def entering(vlm: VLM, layer: int) -> Iterator[list[Tensor]]:
    """The states (B, T, D) that enter a layer, counted from 0, as a list of one once it has run;
    none for the last states, after the norm (-1, or as many as there are layers)."""
    layers, kept = vlm.lm.get_decoder().layers, []
    if layer in (-1, len(layers)):
        yield kept
        return

    def keep(module: nn.Module, inputs: tuple, named: dict) -> None:
        kept.append(inputs[0] if inputs else named["hidden_states"])

    hook = layers[layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield kept
    finally:
        hook.remove()


def mean_at(states: Tensor, at: Tensor) -> Tensor:
    """The mean of states (B, T, D) where `at` (B, T) is True -> (B, D); of none: zeros."""
    weight = at.to(states.dtype)
    weight = weight / weight.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.einsum("bt,btd->bd", weight, states)


def places(batch: Batch, vlm: VLM, position: str) -> Tensor:
    """Where target views have the states to average, True, (B, T).

    end: the token that ends the last turn. word: the last one before it; words: all that the
    assistant says, ends of turns not. image: all tokens of tool images.
    """
    if position == "image":
        return (batch.ids == vlm.lm.config.image_token_id) & batch.mask
    if position == "end":
        return F.one_hot(batch.embed_at, batch.ids.shape[1]).bool()
    words = (batch.labels != -100) & (batch.labels != vlm.family.end_id)
    if position == "words":
        return words
    behind = words.flip(1).cumsum(dim=1).flip(1)  # how many words from here on
    return words & (behind == 1)
