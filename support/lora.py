"""LoRA: a low-rank update beside each frozen linear layer. r is the rank."""

import math

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) * B A x, with W frozen; A (r, in), B (out, r)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__()
        self.base, self.scaling, self.active = base, alpha / rank, True
        self.dropout = nn.Dropout(dropout)
        # float32 even beside bfloat16 weights, which would lose small updates
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        # B is zero, so training starts from W
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.active:
            return y
        # two thin products; the wide B A is never built. A and B are cast, because they are small.
        low = nn.functional.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., r)
        high = (self.scaling * self.lora_B).to(low.dtype)
        return y + nn.functional.linear(low, high).to(y.dtype)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules()
            if isinstance(module, LoRALinear)}


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    """Freeze `model`, then put a LoRALinear around each of its nn.Linear layers."""
    # frozen first, because the new layers bring trainable parameters
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            replace_layer(model, name, LoRALinear(module, rank, alpha, dropout))


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
