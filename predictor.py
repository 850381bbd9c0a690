"""What Pearl adds to the VLM while it trains and drops at inference: [PRED] rows, latent predictor.

The predictor of section 3.4 is the VLM itself ("tied weights", after LLM-JEPA): K learnable [PRED]
tokens follow <I0, Q>, and the final-layer state of the last one is h^_R. With K = 0 it is the
identity: h^_R is the state of the last token of <I0, Q>. The latent predictor of Eq. 2 forecasts
the next state of a sequence from this one. Neither is in the checkpoint that answers questions.

Letters: B batch, T sequence, D hidden size, K predictor tokens, n selected positions, d horizon.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LatentPredictor(nn.Module):
    """f(h_t, e_{t+1}) = h_t + MLP(LayerNorm([h_t ; e_{t+1}])): one step ahead, (n, D) -> (n, D).

    e_{t+1}: the next token's input embedding; sees_next=False: the step is made from h_t alone.
    """

    def __init__(self, dim: int, sees_next: bool = True):
        super().__init__()
        self.sees_next = sees_next
        width = 2 * dim if sees_next else dim
        # Deviation: the paper is silent on its shape. This is the release's: three layers.
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim), nn.GELU(),
                                 nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        # the last layer starts at zero: training starts from "the next state equals this one"
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, state: Tensor, next_embedding: Tensor) -> Tensor:
        # the step is added to the state: what has to be learned is the change
        parts = [state, next_embedding.to(state.dtype)] if self.sees_next else [state]
        return state + self.mlp(torch.cat(parts, dim=-1))

    def forecasts(self, states: Tensor, embeddings: Tensor, targets: Tensor,
                  horizon: int) -> list[tuple[Tensor, Tensor]]:
        """h^_{t+1} .. h^_{t+d} from every h_t, each step from the forecast before it.

        states, embeddings (B, T, D); targets (B, T), True where the state of a position may be
        forecast. Returns for i = 1..d the states (n, D) and the mask (B, T) of the positions t+i
        they stand for. Targets 0 0 1 1 0, d = 2: i = 1 stands at 2 and 3, i = 2 at 3 (from 1).
        Gradient: flows to states and through the steps; not to the token embeddings.
        """
        # which token comes next is an input here; the vocabulary is not to be bent to ease Eq. 2
        embeddings = embeddings.detach()
        # forecasts as rows, and where they stand: before the first step h_t itself, at every t
        latest, at = states.flatten(0, 1), torch.ones_like(targets)  # (B T, D), (B, T)
        steps = []
        for _ in range(horizon):
            # one position to the right, and dropped where that is no target (or behind the end)
            following = targets & F.pad(at[:, :-1], (1, 0))  # (B, T)
            # the same seen from where the rows stand now: which of them go on
            goes_on = F.pad(following[:, 1:], (0, 1))[at]  # (n)
            latest, at = self(latest[goes_on], embeddings[following]), following
            steps.append((latest, at))
        return steps


class Predictor(nn.Module):
    """All that training adds, in one file of the checkpoint: `pred_tokens` (K, D) and `latent`.

    start (D): the embedding of the end-of-turn token.
    """

    file_name = "predictor.safetensors"

    def __init__(self, dim: int, pred_tokens: int, start: Tensor, sees_next: bool = True):
        super().__init__()
        # Parameters of their own and not rows of the vocabulary: under LoRA the embedding matrix is
        # frozen, and rows added to it would keep their initial value (as they do in the release).
        # They start at the token whose state they must predict, with noise to tell them apart.
        # In float32, whatever the model's weights are: small steps would be lost in bfloat16.
        start = start.detach().float()
        # noise by the embedding's own scale, which differs from model to model
        size = start.square().mean().sqrt()
        noise = 0.1 * size * torch.randn(pred_tokens, dim, device=start.device)
        self.pred_tokens = nn.Parameter(start.repeat(pred_tokens, 1) + noise)  # (K, D)
        self.latent = LatentPredictor(dim, sees_next)  # Eq. 2 alone
        # empty, but for options against a collapse (baselines/cures.py)
        self.cures = nn.ModuleDict()
