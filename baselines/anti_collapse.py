"""What other methods use against the collapse of the current model's targets: nothing in Eq. 1
keeps two of them apart (losses.jepa_loss says why). One more is EMA in variants.py.
Letters: B batch (one pass, in one process), D hidden size, P width of a projection, S slices.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losses
from baselines.variants import Current, Examples, Images
from model import Encoded
from support.options import option
from train import Pearl

TEMPERATURE = 0.07  # of InfoNCE: CLIP's first value, and LLM-JEPA's
SLICES, PROJECTED = 256, 64  # S and P of SIGReg


class MLPHead(Pearl):
    """h^_R + W2 GELU(W1 LayerNorm(h^_R)), both D wide: the two layers of SimSiam and BYOL.

    Deviation: added to h^_R with W2 = 0 at the start, so that training starts from Pearl's own;
    theirs replaces its input. LayerNorm for batch norm: a row must not depend on its batch.
    """

    def build_modules(self) -> None:
        super().build_modules()
        dim = self.vlm.dim
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(),
                                  nn.Linear(dim, dim))
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    def encode_views(self, batch: Examples, images: Images) -> tuple[Encoded, Tensor]:
        full, prediction = super().encode_views(batch, images)
        return full, prediction + self.head(prediction)


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


class InfoNCE(Pearl):
    """Eq. 1 with InfoNCE as D: one's own target against the others of the pass (--batch).

    Mean over i of -log( exp(s_ii / tau) / sum over j of exp(s_ij / tau) ), with s_ij =
    cos(h^_R i, h_R j). j runs over i itself and over the rows of other groups: two rows with the
    same task and answer may well have the same h_R. Source: CPC (1807.03748).
    """

    class Options:
        infonce_masked: bool = option(True, "no negatives with the same task and answer")

    def jepa(self, prediction: Tensor, target: Tensor, batch: Examples) -> Tensor:
        if self.config.batch < 2:
            raise ValueError("--method infonce needs --batch 2 or more: other rows are negatives")
        scores = F.normalize(prediction, dim=-1) @ F.normalize(target.detach(), dim=-1).T  # (B, B)
        scores = losses.at_least_float32(scores) / TEMPERATURE
        if self.config.infonce_masked:
            groups = [(example.task, example.answer) for example in batch]
            same = torch.tensor([[one == other for other in groups] for one in groups])
            scores = scores.masked_fill(same.fill_diagonal_(False).to(scores.device), -torch.inf)
        return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))


class VICReg(Current):
    """VICReg's variance and covariance terms on h_R, beside L_JEPA and inside its lambda.

    v + c / 25 on x = sqrt(D) h_R / |h_R|, h_R (B, D):

        v = mean over D of max(0, 1 - sqrt(var(x_d) + 1e-4))
        c = 1/D * sum over d != e of cov(x)_de^2            var, cov: divided by B - 1

    Source: VICReg (2105.04906), 25 invariance + 25 v + 1 c: L_JEPA stands for the invariance.
    Deviation: rows of length sqrt(D). The final norm fixes their length anyway, and its weights
    would decide whether gamma = 1 is out of reach or asks for nothing. With B < D, c cannot be 0.
    """

    class Options:
        vicreg: float = option(1.0, "weight of VICReg's terms beside L_JEPA")

    target_needs_grad = True

    def jepa(self, prediction: Tensor, target: Tensor, batch: Examples) -> Tensor:
        if len(target) < 2:
            return super().jepa(prediction, target, batch)
        # Eq. 1 stops the gradient at the target; this term sends one through it
        x = F.normalize(losses.at_least_float32(target), dim=-1) * target.shape[1] ** 0.5
        covariance = torch.cov(x.T)  # (D, D)
        variance = covariance.diagonal()
        v = F.relu(1 - (variance + 1e-4).sqrt()).mean()
        c = (covariance.square().sum() - variance.square().sum()) / x.shape[1]
        return super().jepa(prediction, target, batch) + self.config.vicreg * (v + c / 25)


class SIGReg(Current):
    """SIGReg on a small projection of h_R, beside L_JEPA and inside its lambda.

    mean over S slices a of  B * integral from -3 to 3 of |phi_a(t) - g(t)|^2 g(t) dt

    phi_a(t) = mean over the batch of exp(i t a.z), the characteristic function along a;
    g(t) = exp(-t^2 / 2), that of a standard Gaussian (the test of Epps and Pulley); z (B, P) a
    projection of h_R; |a| = 1. Source: LeJEPA (2511.08544). The projection (two layers), because
    the final norm fixes h_R's scale; it can also spread what h_R hardly tells apart.
    """

    class Options:
        sigreg: float = option(0.05, "weight of SIGReg beside L_JEPA")

    target_needs_grad = True

    def build_modules(self) -> None:
        super().build_modules()
        dim = self.vlm.dim
        self.projection = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, PROJECTED))
        # slices depend on seed and step: the same in a resumed run and in every process
        self.register_buffer("step", torch.zeros((), dtype=torch.long), persistent=False)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.step.fill_(step)

    def jepa(self, prediction: Tensor, target: Tensor, batch: Examples) -> Tensor:
        jepa = super().jepa(prediction, target, batch)
        if len(target) < 2:
            return jepa
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + int(self.step))
        slices = F.normalize(torch.randn(PROJECTED, SLICES, generator=generator), dim=0)  # (P, S)
        # float32: these are cosines of small differences
        with torch.autocast(target.device.type, enabled=False):
            z = self.projection(target.to(self.projection[0].weight.dtype))  # (B, P)
            t = torch.linspace(0, 3, 17, dtype=z.dtype, device=z.device)  # 17 knots
            gauss = torch.exp(-t.square() / 2)
            angles = (z @ slices.to(z))[..., None] * t  # (B, S, knots)
            gap = (angles.cos().mean(dim=0) - gauss).square() + angles.sin().mean(dim=0).square()
            # the trapezoid rule; the integrand is even, so twice the half from 0 on
            integrals = 2 * torch.trapezoid(gap * gauss, t, dim=-1)  # (S)
            return jepa + self.config.sigreg * (len(z) * integrals).mean()
