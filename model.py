"""The VLM: a transformers checkpoint in, final-layer states out; LoRA; plain decoding.

Enc(view) of sections 3.2 to 3.4 of arXiv:2604.08065 is the VLM's own forward pass; a view's
embedding is the final-layer state (after the last norm) at one known position. Inference (3.8) is
the model's own `generate`: no [PRED], no latent predictor, no tool.

Letters: B batch, T sequence, D hidden size, V vocabulary, P image tokens, r LoRA rank,
S 1 + deepstack levels (Qwen3-VL), A rows of positions (3 for Qwen: time, height, width; else 1).
Left out on purpose: what differs between model families and how a checkpoint is read
(support/families.py), adapters on disk (support/adapters.py), losses, all that knows of training.
"""

import math
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn

from data import Batch, View, collate
from support import adapters, families, packing
from support.images import EncodedImage, ImageStore

# ---- LoRA ---------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) * B A x, with W frozen; A (r, in), B (out, r)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base, self.scaling, self.active = base, alpha / rank, True
        self.dropout = nn.Dropout(dropout)
        # on W's device and not in its type: in bfloat16 small steps would be lost
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        # B is zero: training starts at W
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        # two thin products instead of one wide: B A itself is never made while it trains
        y = self.base(x)
        if not self.active:
            return y
        # A and B are cast and scaled, not x and y: they are small
        low = nn.functional.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., r)
        high = (self.scaling * self.lora_B).to(low.dtype)
        return y + nn.functional.linear(low, high).to(y.dtype)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules()
            if isinstance(module, LoRALinear)}


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, targets: list[str]) -> None:
    """Freeze `model`, then wrap each nn.Linear named in `targets`. Raises ValueError if none is."""
    # frozen first: what is wrapped below brings its own trained parameters
    model.requires_grad_(False)
    # by the last part of the name, as PEFT's target_modules
    found = {name: module for name, module in model.named_modules()
             if isinstance(module, nn.Linear)
             and ("all-linear" in targets or name.split(".")[-1] in targets)}
    if not found:
        raise ValueError(f"no linear layer is named {' or '.join(targets)}; set --lora_targets to "
                         "names of this model's layers")
    for name, layer in found.items():
        # in its parent's place: everything that calls the layer by its name now calls the sum
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRALinear(layer, rank, alpha, dropout))


# ---- the VLM ------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Enc of a batch of views."""

    states: Tensor  # (B, T, D) final-layer states
    inputs: Tensor  # (B, T, D) input embeddings
    embedding: Tensor  # (B, D) the state at each view's `embed_at`


class VLM(nn.Module):
    """A vision-language model with its tokenizer and images, from any local folder or hub id.

    Raises ValueError, one sentence, for what is no such checkpoint or cannot be served.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.float32,
                 min_pixels: int | None = None, max_pixels: int | None = None):
        super().__init__()
        self.path = str(path)
        # lm: all of transformers' model, vision tower and head included; family: what is special
        self.lm, self.family = families.load_checkpoint(self.path, dtype, min_pixels, max_pixels)
        self.tokenizer = self.family.tokenizer
        self.pad_id: int = self.lm.generation_config.pad_token_id
        self.dim: int = self.lm.config.text_config.hidden_size
        self.max_positions: int = self.lm.config.text_config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def set_trainable(self, rank: int, alpha: float, dropout: float, targets: list[str],
                      vision: bool) -> None:
        """LoRA on the language model (rank 0: all its weights), on the vision tower if asked."""
        # everything is frozen first; what is to learn is said below
        self.lm.requires_grad_(False)
        parts = [(self.lm.get_decoder(), targets)]
        # the tower's attention layers have names of their own in Qwen-VL
        if vision:
            parts.append((self.lm.get_encoder("image"), [*targets, "qkv", "proj"]))
        for part, names in parts:
            if rank:
                add_lora(part, rank, alpha, dropout, names)
            else:
                part.requires_grad_(True)

    @contextmanager
    def starting_model(self):
        """The model as it was before LoRA, for as long as the context lasts."""
        # LoRA is all that training changes here, so without it nothing has been changed
        layers = lora_layers(self.lm).values()
        # switched off and not taken out: nothing is copied
        for layer in layers:
            layer.active = False
        try:
            yield
        finally:
            for layer in layers:
                layer.active = True

    def recompute_activations(self) -> None:
        """Layers compute their activations again on the way back: less memory, more time."""
        # the newer name first
        enable = getattr(self.lm, "activation_checkpointing_enable",
                         self.lm.gradient_checkpointing_enable)
        enable(dict(use_reentrant=False))

    def embed(self, batch: Batch, images: dict[int, EncodedImage],
              injected: Tensor | None = None) -> dict:
        """The language model's inputs for a batch of views.

        images: those of batch.images, by number. injected (n, D): the input embeddings of all
        positions of batch.inject_at, row after row, or of one row, the same for every row.
        Returns embeddings (B, T, D), positions (A, B, T), mask (B, T) and what images add.
        """
        is_image = batch.ids == self.lm.config.image_token_id  # (B, T)
        # placeholders too get some word's embedding here; it is replaced below
        embeds = self.lm.get_input_embeddings()(batch.ids)  # (B, T, D)
        # features of lower layers of the tower (Qwen3-VL), (S - 1, all P, D): as yet none, (0, D)
        levels = embeds[:0, 0]
        if batch.images:
            features = torch.cat([images[i].features for i in batch.images], dim=1).to(embeds.dtype)
            assert int(is_image.sum()) == features.shape[1], "image tokens and features differ"
            # one image after the other, as the image tokens stand in the batch
            embeds, levels = embeds.masked_scatter(is_image[..., None], features[0]), features[1:]
        # [PRED] rows and latents are no words: their embeddings come from outside
        if injected is not None:
            # (K, D): the same [PRED] rows behind every question, so here (B K, D)
            if len(injected) < int(batch.inject_at.sum()):
                injected = injected.repeat(len(batch.ids), 1)
            assert int(batch.inject_at.sum()) == len(injected), "injected embeddings do not fit"
            embeds = embeds.masked_scatter(batch.inject_at[..., None], injected.to(embeds.dtype))

        # positions count the views themselves; branches, behind them, are given theirs by hand
        width = batch.ids.shape[1] - batch.branch
        grids = [images[i].grid for i in batch.images]
        positions = self.family.positions(batch.ids[:, :width], batch.mask[:, :width], grids)
        mask = batch.mask.long()
        if batch.shared is not None:
            positions, mask = packing.branch_inputs(batch, positions, self.lm.dtype)
        return dict(inputs_embeds=embeds, attention_mask=mask, position_ids=positions,
                    is_image=is_image, levels=levels)

    def forward(self, batch: Batch, images: dict[int, EncodedImage],
                injected: Tensor | None = None) -> Encoded:
        """Enc of a batch of views (see `embed`)."""
        # the decoder without its head, and no cache: nothing is decoded here
        inputs = self.embed(batch, images, injected)
        states = self.family.states(**inputs, use_cache=False).last_hidden_state  # (B, T, D)
        # one known position of each view is its embedding: by number, never by searching
        rows = torch.arange(len(states), device=states.device)
        return Encoded(states, inputs["inputs_embeds"], states[rows, batch.embed_at])

    def logits(self, states: Tensor) -> Tensor:
        """(n, D) -> (n, V)"""
        # apart from `forward`, so that only what is supervised becomes as wide as the vocabulary
        return self.lm.lm_head(states)

    @torch.no_grad()
    def generate(self, views: list[View], store: ImageStore, max_new_tokens: int,
                 allowed: Callable[[int, list[int]], list[int]] | None = None) -> list[list[int]]:
        """Greedy continuation of each view by the model's own `generate`.

        allowed: optional function (row, tokens generated so far) -> token ids that may come next.
        """
        # padded on the left, so that every row's next token stands in the same column
        batch = collate(views, self.pad_id, left=True).to(self.device)
        prompt = self.family.prompt(
            batch, [store.inputs(i) for i in batch.images],
            lambda: self.embed(batch, store.encoded(batch.images)))
        # a family that is given embeddings returns only what is new
        start = batch.ids.shape[1] if "input_ids" in prompt else 0
        constraint = None
        if allowed is not None:
            # transformers hands over the prompt too, where it was given as ids
            def constraint(row: int, ids: Tensor) -> list[int]:
                return allowed(row, ids[start:].tolist())
        # greedy, whatever the checkpoint's own generation_config says (families.greedy)
        out = self.lm.generate(**prompt, max_new_tokens=max_new_tokens,
                               prefix_allowed_tokens_fn=constraint)
        return out[:, start:].tolist()

    def save_adapter(self, folder: Path) -> None:
        # in PEFT's layout, so that others can load it
        adapters.save_adapter(self.lm, lora_layers(self.lm), self.path, folder)

    def load_adapter(self, folder: Path) -> None:
        """Put a saved adapter's A and B beside the weights, or all trained weights in their place.

        Not merged: beside bfloat16 weights the sum would lose small changes.
        """
        adapter = adapters.read_adapter(folder, self.lm, self.path)
        self.lm.load_state_dict(adapter.weights, strict=False)
        for name, (low, high) in adapter.pairs.items():
            rank = len(low)
            layer = LoRALinear(self.lm.get_submodule(name), rank, adapter.scaling * rank, 0.0)
            layer.lora_A.data.copy_(low)
            layer.lora_B.data.copy_(high)
            parent, _, last = name.rpartition(".")
            setattr(self.lm.get_submodule(parent), last, layer)
