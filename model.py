"""The VLM: a transformers checkpoint in, final-layer states out; plain decoding.

Enc(view) of sections 3.2 to 3.4 of arXiv:2604.08065 is the VLM's own forward pass, and a view's
embedding is the final-layer state (after the last norm) at one known position. Inference (3.8) is
the plain VLM (`log_probs`, `generate`): no [PRED], no latent predictor, no tool.

Letters: B batch, T sequence, D hidden size, V vocabulary, P image tokens, A rows of positions (3
for Qwen: time, height, width; else 1), S levels of image features (Qwen3-VL: several; else 1).
Left out on purpose: what differs between model families and how a checkpoint is read
(support/families.py), LoRA and adapters on disk (support/adapters.py), training.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data import PaddedViews, collate
from support import adapters, families, processes, step
from support.adapters import add_lora, lora_layers
from support.chat import Chat, View
from support.images import EncodedImage, LoadedImage, with_pixels


class Encoded(NamedTuple):
    """Enc of a batch of views."""

    embedding: Tensor  # (B, D) the state at each view's state_at
    # None where the embedding alone is kept (train.Pearl.target)
    states: Tensor | None = None  # (B, T, D) final-layer states
    input_embeddings: Tensor | None = None  # (B, T, D)
    padded: PaddedViews | None = None  # on the model's device


class VLM(nn.Module):
    """A vision-language model with its tokenizer, from a local folder or a hub id.

    min_pixels, max_pixels: an image's size, as the family's processor counts it; 0, None: its own.
    Raises ValueError, one sentence, for a path that is no supported VLM checkpoint.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype | str = torch.float32,
                 min_pixels: int | None = None, max_pixels: int | None = None):
        super().__init__()
        self.path = str(path)
        # lm: the whole transformers model, with vision tower and head; family: what is special
        self.lm, self.family = families.load_checkpoint(self.path, dtype, min_pixels, max_pixels)
        self.tokenizer = self.family.tokenizer
        self.pad_id: int = self.lm.generation_config.pad_token_id
        self.dim: int = self.lm.config.text_config.hidden_size
        # conversations as tokens
        self.chat = Chat(self.family, self.lm.config.text_config.max_position_embeddings)

    def set_trainable(self, config, dropout: float = 0.0, world_size: int = 1) -> None:
        """Make the language model's decoder trainable: LoRA, or with config.lora_rank 0 all its
        weights; the vision tower too with config.train_vision."""
        # everything is frozen first
        self.lm.requires_grad_(False)
        parts = [self.lm.get_decoder()]
        if config.train_vision:
            parts.append(self.lm.get_encoder("image"))
        for part in parts:
            # LoRA's alpha is twice its rank, as in the paper (64, 128)
            if config.lora_rank:
                add_lora(part, config.lora_rank, 2.0 * config.lora_rank, dropout)
            else:
                part.requires_grad_(True)
        if config.shard:
            processes.shard_frozen(self.lm.get_decoder(), config.device, world_size)
        self.to(config.device)
        if config.gradient_checkpointing:
            # newer versions of transformers have the first name
            enable = getattr(self.lm, "activation_checkpointing_enable",
                             self.lm.gradient_checkpointing_enable)
            enable(dict(use_reentrant=False))

    def keep_starting_model(self) -> None:
        """Keep the current weights for `starting_model`: as a second copy, if there is no LoRA."""
        # not self.start = ...: nn.Module would register the copy, and train and save it
        self.__dict__["start"] = self if lora_layers(self.lm) else copy.deepcopy(self)

    @contextmanager
    def starting_model(self) -> Iterator["VLM"]:
        """The model before training, while the context lasts: if LoRA trains, this model with LoRA
        switched off; otherwise a deep copy."""
        start, training = self.__dict__["start"], self.training
        layers = lora_layers(start.lm).values()
        for layer in layers:
            layer.active = False
        try:
            yield start.eval()
        finally:
            self.train(training)
            for layer in layers:
                layer.active = True

    def lm_inputs(self, batch: PaddedViews, images: dict[str, EncodedImage],
                  injected: Tensor | None = None) -> dict:
        """The language model's inputs, on its device, for a batch of views on the CPU.

        images: those of batch.images, by key. injected: the input embeddings of the positions of
        batch.inject_at, row after row (n, D), or those of one row (K, D), the same for all rows.
        Returns embeddings (B, T, D), positions (A, B, T), mask (with batch.shared (B, 1, T, T),
        else (B, T)) and what images add."""
        # everything that is counted is counted on the CPU, where it does not wait for the GPU
        is_image = batch.ids == self.lm.config.image_token_id  # (B, T)
        image_tokens, injected_count = int(is_image.sum()), int(batch.inject_at.sum())
        # position ids, but not of [PRED] in the same row as a full view: those are made below
        width = batch.ids.shape[1] - batch.branch
        positions = self.family.positions(batch.ids[:, :width], batch.mask[:, :width],
                                          [images[key].grid for key in batch.images])
        batch, is_image, positions = (x.to(self.lm.device) for x in (batch, is_image, positions))

        # images and [PRED] get the embedding of some token here, which is replaced below
        embeds = self.lm.get_input_embeddings()(batch.ids)  # (B, T, D)
        levels = embeds[:0, 0]  # (0, D): none; Qwen3-VL adds further features in its first layers
        if batch.images:
            features = torch.cat([images[key].features for key in batch.images], dim=1)
            features = features.to(embeds.dtype)  # (S, all P, D)
            assert image_tokens == features.shape[1], "image tokens and features differ"
            # images follow one another in the order of their tokens in the batch
            embeds, levels = embeds.masked_scatter(is_image[..., None], features[0]), features[1:]
        if injected is not None:
            if len(injected) < injected_count:
                injected = injected.repeat(len(batch.ids), 1)  # (B K, D)
            assert injected_count == len(injected), "injected embeddings do not fit"
            embeds = embeds.masked_scatter(batch.inject_at[..., None], injected.to(embeds.dtype))

        mask = batch.mask.long()
        if batch.shared is not None:
            positions, mask = step.branch_inputs(batch, positions, self.lm.dtype)
        return dict(inputs_embeds=embeds, attention_mask=mask, position_ids=positions,
                    is_image=is_image, levels=levels)

    def forward(self, batch: PaddedViews, images: dict[str, EncodedImage],
                injected: Tensor | None = None) -> Encoded:
        """Enc of a batch of views (see `lm_inputs`)."""
        inputs = self.lm_inputs(batch, images, injected)
        # the decoder without its head, and no cache: nothing is decoded here
        states = self.family.states(**inputs, use_cache=False).last_hidden_state  # (B, T, D)
        batch = batch.to(self.lm.device)
        # one known position per view is its embedding
        rows = torch.arange(len(states), device=states.device)
        return Encoded(states[rows, batch.state_at], states, inputs["inputs_embeds"], batch)

    @torch.no_grad()
    def log_probs(self, prompts: list[View], options: list[list[list[int]]],
                  images: dict[str, EncodedImage]) -> list[list[float]]:
        """For each option the sum over its tokens of log p(token | prompt, tokens before it), in
        one forward pass."""
        # A row: a prompt's number, and the option's tokens that are read behind it. The last token
        # is predicted and not read, so options of one token share a row.
        rows = list(dict.fromkeys((n, *option[:-1]) for n, its_options in enumerate(options)
                                  for option in its_options))
        views = [prompts[n]._replace(ids=prompts[n].ids + read, labels=prompts[n].labels
                                     + [-100] * len(read)) for n, *read in rows]
        states, scores = self(collate(views, self.pad_id), images).states, []  # (rows, T, D)
        for n, its_options in enumerate(options):
            scores.append([])
            # the state at the prompt's last token predicts the first token of each option
            first = len(prompts[n].ids) - 1
            for option in its_options:
                state = states[rows.index((n, *option[:-1])), first:first + len(option)]
                log_p = self.lm.lm_head(state).log_softmax(-1, torch.float32)  # (tokens, V)
                scores[-1].append(float(log_p[range(len(option)), option].sum()))
        return scores

    @torch.no_grad()
    def generate(self, views: list[View], images: list[LoadedImage], encode,
                 max_new_tokens: int) -> list[list[int]]:
        """Greedy continuation of each view by the model's own `generate`: the new token ids, up to
        the end of the turn. encode: an ImageEncoder, for families that take embeddings here."""
        # padding on the left, so that the next token of every row stands in the same column
        batch = collate(views, self.pad_id, left=True)
        pixels = {image.key: image.pixels for image in with_pixels(images, self.family)}
        # ids and pixels where possible, so that transformers alone produces the answer
        prompt = self.family.prompt(batch.to(self.lm.device), [pixels[key] for key in batch.images],
                                    lambda: self.lm_inputs(batch, encode(images)))
        # with embeddings as the prompt, transformers returns the new tokens alone
        start = batch.ids.shape[1] if "input_ids" in prompt else 0
        # greedy, whatever the checkpoint's own generation_config says (families.load_checkpoint)
        rows = self.lm.generate(**prompt, max_new_tokens=max_new_tokens)[:, start:].tolist()
        # a row that has ended is padded until the longest one has ended
        end = self.family.end_id
        return [ids[:ids.index(end) + 1] if end in ids else ids for ids in rows]

    def save_adapter(self, folder: Path) -> None:
        """LoRA in PEFT's layout, or all trained weights."""
        adapters.save_adapter(self.lm, self.path, folder)

    def load_adapter(self, folder: Path, alpha: float = 1.0) -> None:
        """Load what `save_adapter` wrote, or LoRA by PEFT. alpha: the share of the change,
        W0 + alpha (W - W0) (WiSE-FT, 2109.01903)."""
        adapters.load_adapter(self.lm, self.path, folder, alpha)
