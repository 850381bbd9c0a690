"""What Pearl adds to the VLM while it trains, and drops at inference: [PRED] tokens and a latent predictor.

The predictor of section 3.4 is the VLM itself ("tied weights", after LLM-JEPA): K learnable [PRED] tokens follow
<I0, Q>, and the final-layer state of the last one is h^_R. With K = 0 the predictor is the identity: h^_R is the state
of the last token of <I0, Q>. The latent predictor of Eq. 2 forecasts the next state of a sequence from this one.

Letters: B batch, T sequence, D hidden size, K predictor tokens, n selected positions, d horizon.
Neither part is in the checkpoint that answers questions: inference is plain decoding (section 3.8). The last class is
not Pearl's: it belongs to the reconstruction baseline, which does need it at inference.
"""

import torch
from torch import Tensor, nn


class LatentPredictor(nn.Module):
    """f(h_t, e_{t+1}) = h_t + MLP(LayerNorm([h_t ; e_{t+1}])): one step forward in latent space, (n, D) -> (n, D).

    e_{t+1} is the input embedding of the next token; with sees_next=False the step is made from h_t alone.
    Deviation: the paper is silent on its shape. This is the released code's: three linear layers of width D.
    The last layer starts at zero, so that training starts from "the next state equals this one".
    """

    def __init__(self, dim: int, sees_next: bool = True):
        super().__init__()
        self.sees_next = sees_next
        width = 2 * dim if sees_next else dim
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(),
                                 nn.Linear(dim, dim))
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, state: Tensor, next_embedding: Tensor) -> Tensor:
        seen = torch.cat([state, next_embedding.to(state.dtype)], dim=-1) if self.sees_next else state
        return state + self.mlp(seen)

    def rollout(self, states: Tensor, embeddings: Tensor, targets: Tensor, horizon: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Forecast h^_{t+1} .. h^_{t+d} from every h_t, each step from the forecast before it.

        states, embeddings (B, T, D); targets (B, T), True where the state of a position may be forecast. A rollout goes
        on while it stays on targets. Returns for i = 1..d a triple (forecast (n_i, D), row (n_i), position t+i (n_i)).
        Gradient: flows to states and through the steps; the token embeddings are inputs, not trained by this loss.
        """
        embeddings = embeddings.detach()
        row, position = torch.nonzero(targets[:, 1:], as_tuple=True)  # t, such that t+1 is a target
        forecast = states[row, position]
        steps = []
        for _ in range(horizon):
            position = position + 1
            forecast = self(forecast, embeddings[row, position])
            steps.append((forecast, row, position))
            last = position == targets.shape[1] - 1
            goes_on = ~last & targets[row, (position + 1).clamp_max(targets.shape[1] - 1)]
            forecast, row, position = forecast[goes_on], row[goes_on], position[goes_on]
        return steps


class Predictor(nn.Module):
    """All that training adds, in one module and so in one file of the checkpoint: `pred_tokens` (K, D) and `latent`.

    The [PRED] rows are parameters of their own and not rows of the vocabulary: under LoRA the embedding matrix is
    frozen, and rows added to it would stay at their initial value (as they do in the released code).
    They start at `start` (D), the embedding of the end-of-turn token, whose state is what they must predict, plus
    noise of a tenth of its size to tell them apart. `centre` (D) is the running mean of h_R for jepa_loss, where it is asked for.
    """

    def __init__(self, dim: int, pred_tokens: int, start: Tensor, sees_next: bool = True):
        super().__init__()
        start = start.detach().float()
        noise = 0.1 * start.square().mean().sqrt() * torch.randn(pred_tokens, dim, device=start.device)
        self.pred_tokens = nn.Parameter(start.repeat(pred_tokens, 1) + noise)  # (K, D)
        self.latent = LatentPredictor(dim, sees_next)
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("seen", torch.zeros(()))

    @torch.no_grad()
    def update_centre(self, target: Tensor, momentum: float = 0.9) -> None:
        """Move the running mean towards that of h_R (B, D); the first batch sets it."""
        keep = momentum * (self.seen > 0)
        self.centre.copy_(keep * self.centre + (1 - keep) * target.to(self.centre.dtype).mean(dim=0))
        self.seen += 1


class LatentScale(nn.Module):
    """What the reconstruction baseline adds: visual embeddings and final-layer states brought to one scale.

    Raw visual embeddings have another size in each dimension than any state behind the final norm. A latent is therefore
    regressed in standard units: target(v) = (v - mean) / std over the training set's tool images, predicted(h) = h / size
    with `size` the RMS of the final norm's gain. At inference a state h becomes the next input by input(h), their inverse.
    """

    def __init__(self, embeddings: Tensor, norm_weight: Tensor):
        """embeddings (n, D): visual embeddings of tool images; norm_weight (D)."""
        super().__init__()
        embeddings = embeddings.float()
        self.register_buffer("mean", embeddings.mean(dim=0))
        self.register_buffer("std", embeddings.std(dim=0).clamp_min(1e-6))
        self.register_buffer("size", norm_weight.detach().float().square().mean().sqrt())

    def target(self, embedding: Tensor) -> Tensor:
        return (embedding - self.mean) / self.std

    def predicted(self, state: Tensor) -> Tensor:
        return state / self.size

    def input(self, state: Tensor) -> Tensor:
        return self.predicted(state) * self.std + self.mean
