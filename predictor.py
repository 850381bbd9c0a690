"""What Pearl adds to the VLM while it trains, LoRA apart: [PRED] embeddings and latent predictor.

The JEPA predictor of section 3.4 is the VLM itself ("tied weights", after LLM-JEPA): K learnable
[PRED] tokens follow <I0, Q>, and the final-layer state of the last one is h^_R. With K = 0, h^_R is
the state of the last prompt token. The latent predictor of Eq. 2 predicts the next state.

Letters: B batch, T sequence, D hidden size, K [PRED] tokens, n selected positions, d horizon.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LatentPredictor(nn.Module):
    """f(h_t, e_{t+1}) = h_t + MLP(LayerNorm([h_t ; e_{t+1}])), one step ahead: (n, D) -> (n, D).

    e_{t+1} is the next token's input embedding; with sees_next=False the MLP reads h_t alone."""

    def __init__(self, dim: int, sees_next: bool = True):
        super().__init__()
        self.sees_next = sees_next
        width = 2 * dim if sees_next else dim
        # Deviation: the paper does not give its shape; these three layers are the release's
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim), nn.GELU(),
                                 nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        # a last layer of zeros: training starts from "the next state equals this one"
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, state: Tensor, next_embedding: Tensor) -> Tensor:
        parts = [state, next_embedding.to(state.dtype)] if self.sees_next else [state]
        # the MLP learns the change alone
        return state + self.mlp(torch.cat(parts, dim=-1))

    def forecasts(self, states: Tensor, embeddings: Tensor, allowed: Tensor,
                  horizon: int) -> list[tuple[Tensor, Tensor]]:
        """h^_{t+1} .. h^_{t+d} from every h_t; each step starts from the forecast before it.

        states, embeddings (B, T, D); allowed (B, T) is True where a state may be predicted.
        Returns for i = 1..d the states (n, D) and the mask (B, T) of their positions t + i. With
        allowed 0 0 1 1 0, i = 1 predicts h_2 (from h_1) and h_3 (from h_2), i = 2 h_3 (from h_1).
        Gradient: flows to states and through the steps; stops at `embeddings`.
        """
        # with --lora_rank 0 they train too, and Eq. 2 must not become easy by changing e_{t+1}
        embeddings = embeddings.detach()
        # the current states as rows, and the mask of their positions
        rows, where, steps = states.flatten(0, 1), torch.ones_like(allowed), []
        for _ in range(horizon):
            # one position to the right, if that position is allowed
            following = allowed & F.pad(where[:, :-1], (1, 0))  # (B, T)
            # the rows that have such a next position
            continues = F.pad(following[:, 1:], (0, 1))[where]  # (n)
            rows, where = self(rows[continues], embeddings[following]), following
            steps.append((rows, where))
        return steps


class Predictor(nn.Module):
    """[PRED] embeddings `pred_embeddings` (K, D) and the latent predictor `latent`, saved together.
    count: K. start (D): the embedding of the end-of-turn token."""

    file_name = "predictor.safetensors"

    def __init__(self, dim: int, count: int, start: Tensor, sees_next: bool = True):
        super().__init__()
        # Own parameters. The release adds rows to the vocabulary, which stay frozen under LoRA.
        # Ours start as the end-of-turn embedding, plus noise. They are float32, because bfloat16
        # would lose small updates.
        start = start.detach().float()
        size = start.square().mean().sqrt()
        noise = 0.1 * size * torch.randn(count, dim, device=start.device)
        self.pred_embeddings = nn.Parameter(start.repeat(count, 1) + noise)  # (K, D)
        self.latent = LatentPredictor(dim, sees_next)
