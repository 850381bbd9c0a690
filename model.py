"""The VLM: a transformers checkpoint, its final-layer states, and LoRA. Sections 3.2 and 3.8 of arXiv:2604.08065.

Enc(view) is the VLM's own forward pass; the embedding of a view is the final-layer hidden state (after the last norm)
at one known position. An image is encoded once, however many views show it: `encode_images` gives its features,
`forward` places them. `VLM.save_adapter` writes LoRA weights in PEFT's format; `merge_lora` folds them into the base
weights for inference, after which the model is an ordinary transformers model again.

Letters: B batch, T sequence, D hidden size, V vocabulary, P image tokens, r LoRA rank, S 1 + deepstack levels (Qwen3-VL),
A rows of positions (3 for Qwen's time, height and width, else 1).
Left out on purpose: losses and anything that knows about training.
"""

import hashlib
import inspect
import json
import math
import os
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, DynamicCache,
                          PreTrainedModel)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from data import Batch, ImageStore, View, collate


# ---- files: data, never code -----------------------------------------------------------------------------------------


def read_json(file: Path) -> dict:
    """A JSON object from disk. Raises ValueError naming the file if it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); restore it") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, not an object; restore it")
    return found


def read_tensors(file: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file. Raises ValueError for a file that is none, is cut short or holds NaN."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as saved:
            tensors, metadata = {name: saved.get_tensor(name) for name in saved.keys()}, saved.metadata() or {}
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors' own error, or the system's
        raise ValueError(f"{file} is not a whole safetensors file ({error}); restore it from a copy") from None
    check_finite(tensors, str(file))
    return tensors, metadata


def write_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file: under a temporary name, synced, then renamed. Raises OSError naming it, for instance on a full disk."""
    partial = file.with_name(file.name + ".partial")
    try:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial, metadata=metadata)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())
    except (SafetensorError, OSError) as error:
        raise OSError(f"{file} cannot be written: {error}") from None
    os.replace(partial, file)


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    bad = next((name for name, t in tensors.items() if t.is_floating_point() and not torch.isfinite(t).all()), None)
    if bad:
        raise ValueError(f"{where}: {bad} holds values that are not finite; restore it from a copy")


# ---- LoRA -------------------------------------------------------------------------------------------------------------


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) * B A x with W frozen; A (r, in) random, B (out, r) zero, so training starts at W."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        low = nn.functional.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., r); A and B are cast and scaled, being small
        return y + nn.functional.linear(low, (self.scaling * self.lora_B).to(low.dtype)).to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.base.weight += (self.scaling * self.lora_B @ self.lora_A).to(self.base.weight.dtype)
        return self.base


def _lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float, targets: list[str]) -> None:
    """Freeze `model`, then wrap every nn.Linear whose last name is in `targets`. Raises ValueError if none is."""
    model.requires_grad_(False)
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.split(".")[-1] in targets]
    if not found:
        raise ValueError(f"no linear layer is named {' or '.join(targets)}; set --lora_targets to names of this model's layers")
    for name in found:
        parent, _, last = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, last, LoRALinear(getattr(parent, last), rank, alpha, dropout))


def merge_lora(model: nn.Module) -> None:
    """Fold every LoRA layer into its base weight and put the plain layer back."""
    for name, layer in _lora_layers(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.merged())


# ---- model families: the one place that knows them ------------------------------------------------------------------
#
# Families differ in how an image stands in the text, how it becomes features, and in positions and attention. The rest of
# the project sees only the methods below; a family that needs something else is one more class here.


class QwenFamily:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions of three rows, images as lists of patches, several encoded at once.

    Tokenizer and image processor are loaded by themselves: the combined processor would need torchvision for videos.
    """

    KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    packs = True  # its attention is causal and may be given as a mask, so two views can share a pass

    def __init__(self, path: str, lm: PreTrainedModel):
        self.lm, self.processor = lm, AutoImageProcessor.from_pretrained(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.saved_with = [self.tokenizer, self.processor]
        self.placeholder_id = lm.config.image_token_id  # what the chat template writes for an image

    def place(self, width: int, height: int) -> tuple[list[int], tuple[int, int, int]]:
        """(token ids that stand for an image of that size in px, its grid of patches (t, h, w)); ValueError if it is too thin."""
        patch, merge, size = self.processor.patch_size, self.processor.merge_size, self.processor.size
        h, w = smart_resize(height, width, patch * merge, size["shortest_edge"], size["longest_edge"])
        grid = (1, h // patch, w // patch)
        return [self.lm.config.image_token_id] * (math.prod(grid) // merge ** 2), grid

    def inputs(self, image: Image.Image) -> dict[str, Tensor]:
        return dict(self.processor(images=[image], return_tensors="pt"))

    def features(self, images: list[dict[str, Tensor]]) -> list[Tensor]:
        joined = self._joined(images)
        pixels, grid = joined["pixel_values"], joined["image_grid_thw"]
        out = self.lm.model.get_image_features(pixels, grid, return_dict=True)
        levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        levels = [torch.cat(list(level)) if isinstance(level, (list, tuple)) else level for level in levels]
        return list(torch.stack(levels).split((grid.prod(dim=1) // self.processor.merge_size ** 2).tolist(), dim=1))

    def positions(self, ids: Tensor, mask: Tensor, grids: list) -> Tensor:
        """(3, B, T). Always passed: without mm_token_type_ids the model would fall back to one row of them, silently.

        Counted on the CPU: hundreds of small steps a batch, each of which would be a kernel of its own on a GPU.
        """
        device, ids, grid = ids.device, ids.cpu(), torch.tensor(grids) if grids else None
        is_image = (ids == self.lm.config.image_token_id).int()
        return self.lm.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=grid,
                                            attention_mask=mask.cpu().long())[0].to(device)

    def states(self, inputs_embeds: Tensor, position_ids: Tensor, is_image: Tensor, levels: Tensor, **rest):
        """The language model's output on given inputs; levels (S - 1, all P, D) are what Qwen3-VL adds inside its first layers."""
        deep = dict(visual_pos_masks=is_image, deepstack_visual_embeds=list(levels)) if len(levels) else {}
        return self.lm.get_decoder()(inputs_embeds=inputs_embeds, position_ids=position_ids, **deep, **rest)

    def prompt(self, batch: Batch, store: ImageStore, embed) -> dict:
        """What `generate` is given: ids and pixels, as anyone would."""
        is_image = (batch.ids == self.lm.config.image_token_id).int()
        return dict(input_ids=batch.ids, attention_mask=batch.mask.long(), mm_token_type_ids=is_image,
                    **self._joined([store.inputs(i) for i in batch.images]))

    def _joined(self, images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """All patches one after another (patches, values), and the grids (images, 3)."""
        return {key: torch.cat([image[key] for image in images]).to(self.lm.device) for key in ("pixel_values", "image_grid_thw")}


class ProcessorFamily:
    """Any other family whose processor transformers can build. Tried: Idefics3 (SmolVLM), Gemma 3, LLaVA, LLaVA-NeXT, and, where
    torchvision is installed, which their processors need, LLaVA-OneVision, InternVL and Mistral 3.

    The tokens of an image are what the processor writes for it alone, positions count 0, 1, 2, ..., and the whole model runs on
    given input embeddings, so that what it does around its language model (Gemma lets the tokens of one image see each
    other) it goes on doing. Raises ValueError, one sentence, where the family cannot be served.
    """

    def __init__(self, path: str, lm: PreTrainedModel):
        kind = lm.config.model_type
        try:
            self.processor = AutoProcessor.from_pretrained(path)
        except ImportError as error:
            needed = "torchvision" if "torchvision" in str(error).lower() else str(error).strip().splitlines()[0]
            raise ValueError(f"the processor of a {kind} model needs a package that is not installed: {needed}") from None
        self.lm, self.tokenizer, self.saved_with = lm, getattr(self.processor, "tokenizer", None), [self.processor]
        placeholder = getattr(self.processor, "image_token", None)
        if self.tokenizer is None or placeholder is None or not hasattr(lm.model, "get_image_features"):
            raise ValueError(f"{path} is a {kind} model, which does not put its images among the words: not supported")
        self.tokenizer.chat_template = self.processor.chat_template or self.tokenizer.chat_template
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{path} has no chat template: choose a checkpoint that was tuned to follow instructions")
        self.placeholder, self.placeholder_id = placeholder, self.tokenizer.convert_tokens_to_ids(placeholder)
        known = inspect.signature(lm.model.forward).parameters
        self.bidirectional = "token_type_ids" in known
        layers = set(getattr(lm.config.text_config, "layer_types", None) or ["full_attention"])
        self.packs = not self.bidirectional and layers == {"full_attention"}

    def place(self, width: int, height: int) -> tuple[list[int], None]:
        out = self.processor(text=[self.placeholder], images=[Image.new("RGB", (width, height))], add_special_tokens=False)
        return list(out["input_ids"][0]), None

    def inputs(self, image: Image.Image) -> dict[str, Tensor]:
        wanted = inspect.signature(self.lm.model.get_image_features).parameters
        out = self.processor(text=[self.placeholder], images=[image], return_tensors="pt")
        return {key: value for key, value in out.items() if key in wanted}

    def features(self, images: list[dict[str, Tensor]]) -> list[Tensor]:
        """One image at a time: sizes and numbers of tiles differ."""
        found = []
        for image in images:
            image = {k: v.to(self.lm.device, self.lm.dtype if v.is_floating_point() else None) for k, v in image.items()}
            out = self.lm.model.get_image_features(**image, return_dict=True).pooler_output
            out = torch.cat(list(out)) if isinstance(out, (list, tuple)) else out
            found.append(out.reshape(1, -1, out.shape[-1]))
        return found

    def positions(self, ids: Tensor, mask: Tensor, grids: list) -> Tensor:
        return (mask.long().cumsum(dim=1) - 1).clamp_min(0)[None]  # (1, B, T)

    def states(self, inputs_embeds: Tensor, position_ids: Tensor, is_image: Tensor, levels: Tensor, **rest):
        seen = dict(token_type_ids=is_image.long()) if self.bidirectional else {}
        return self.lm.model(inputs_embeds=inputs_embeds, position_ids=position_ids[0], **seen, **rest)

    def prompt(self, batch: Batch, store: ImageStore, embed) -> dict:
        """What `generate` is given: embeddings, because families differ in how they want the pixels of several images.

        Gemma's takes no embeddings, but its images are all of one shape: ids and pixels.
        """
        images = [store.inputs(i) for i in batch.images]
        seen = dict(token_type_ids=(batch.ids == self.lm.config.image_token_id).long()) if self.bidirectional else {}
        if "inputs_embeds" in inspect.signature(self.lm.prepare_inputs_for_generation).parameters:
            inputs = embed(batch, self.features(images), [])
            return dict(inputs_embeds=inputs["inputs_embeds"], attention_mask=inputs["attention_mask"], **seen)
        pixels = {key: torch.cat([image[key] for image in images]).to(self.lm.device, self.lm.dtype) for key in images[0]}
        return dict(input_ids=batch.ids, attention_mask=batch.mask.long(), **pixels, **seen)


class VLM(nn.Module):
    """A vision-language model with its tokenizer and image processing, from any local folder or hub id.

    Raises ValueError, one sentence, for what is not such a checkpoint or is of a family that cannot be served.
    """

    def __init__(self, path: str | Path, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.path = str(path)
        looks_local = self.path.startswith((".", "/", "~")) or Path(self.path).exists()
        if looks_local and not (Path(self.path) / "config.json").is_file():
            raise ValueError(f"{self.path} is not a checkpoint folder: it has no config.json")
        kind = AutoConfig.from_pretrained(self.path, trust_remote_code=False).model_type
        if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            raise ValueError(f"{self.path} is a {kind} model, none that transformers offers for images and text (as Qwen2.5-VL is)")
        try:  # safetensors only, and no code from the checkpoint: what is downloaded is data
            self.lm = AutoModelForImageTextToText.from_pretrained(self.path, dtype=dtype, use_safetensors=True,
                                                                  trust_remote_code=False)
        except (OSError, ValueError):
            raise
        except Exception as error:  # a file cut short, tensors of other shapes
            raise ValueError(f"the weights in {self.path} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
        check_finite(dict(self.lm.named_parameters()), self.path)
        self.family = (QwenFamily if kind in QwenFamily.KINDS else ProcessorFamily)(self.path, self.lm)
        self.tokenizer = self.family.tokenizer
        self.image_token_id: int = self.lm.config.image_token_id
        self.placeholder_id: int = self.family.placeholder_id
        self.pad_id: int = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        self.dim: int = self.lm.config.text_config.hidden_size
        self.max_positions: int = self.lm.config.text_config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def set_trainable(self, rank: int, alpha: float, dropout: float, targets: list[str], vision: bool) -> None:
        """LoRA of the given rank on the language model (rank 0: all its weights), and on the vision tower if `vision`."""
        self.lm.requires_grad_(False)
        tower = self.lm.get_encoder("image")
        for part in [self.lm.get_decoder()] + ([tower] if vision else []):
            if rank:
                add_lora(part, rank, alpha, dropout, targets + (["qkv", "proj"] if part is tower else []))
            else:
                part.requires_grad_(True)

    def shard_frozen(self, device: str, processes: int) -> None:
        """Each process keeps its share of the layers' frozen weights (FSDP), and gathers a layer's others when it runs.

        What trains stays whole in every process: it is small (LoRA), and is exchanged, saved and resumed as without.
        """
        from torch.distributed.device_mesh import init_device_mesh  # here, because loading them takes most of a second
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(torch.device(device).type, (processes,))
        for layer in self.lm.get_decoder().layers:
            trained = {p for p in layer.parameters() if p.requires_grad}
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)

    def encode_images(self, images: list[dict[str, Tensor]]) -> list[Tensor]:
        """Features of each image (ImageStore.inputs), (S, P, D): what its image tokens are replaced by, then deepstack levels."""
        return self.family.features(images)

    def vision_fingerprint(self) -> str:
        """Hash of what features depend on beside the image: processor settings, and every weight outside the language model."""
        settings = json.dumps(self.family.processor.to_dict(), sort_keys=True, default=str)
        digest, inner = hashlib.sha256(settings.encode()), {id(p) for p in self.lm.get_decoder().parameters()}
        for name, p in self.lm.named_parameters():
            if id(p) not in inner and not name.startswith("lm_head"):
                digest.update(f"{name} {p.dtype}".encode() + p.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def embed(self, batch: Batch, features: list[Tensor], grids: list, slots: Tensor | None = None) -> dict:
        """The language model's inputs for a batch of views: embeddings (B, T, D), positions (A, B, T), mask (B, T).

        features and grids: those of batch.images, in that order. slots (n, D): the input embeddings of the batch's slots,
        row after row ([PRED] tokens, latents).
        """
        is_image = batch.ids == self.image_token_id  # (B, T)
        embeds = self.lm.get_input_embeddings()(batch.ids)  # (B, T, D)
        levels = embeds[:0, 0]
        if features:
            stacked = torch.cat(features, dim=1).to(embeds.dtype)  # (S, all P, D)
            assert int(is_image.sum()) == stacked.shape[1], "image tokens and image features do not match"
            embeds, levels = embeds.masked_scatter(is_image[..., None], stacked[0]), stacked[1:]
        if slots is not None:
            assert int(batch.slots.sum()) == len(slots), "slots and their embeddings do not match"
            embeds = embeds.masked_scatter(batch.slots[..., None], slots.to(embeds.dtype))
        width = batch.ids.shape[1] - batch.branch  # of the views themselves, without a packed batch's branch
        positions, mask = self.family.positions(batch.ids[:, :width], batch.mask[:, :width], grids), batch.mask.long()
        if batch.shared is not None:
            positions, mask = self._branch(batch, positions, width)
        return dict(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, is_image=is_image, levels=levels)

    def _branch(self, batch: Batch, positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Positions (A, B, T) and additive attention mask (B, 1, T, T) of a packed batch (data.pack)."""
        rows = torch.arange(len(batch.ids), device=self.device)
        last = positions[:, rows, batch.shared - 1]  # (A, B) a text token's, so the branch counts on from it as text does
        steps = torch.arange(1, batch.branch + 1, device=self.device)
        positions = torch.cat([positions, last[..., None] + steps], dim=-1)
        index = torch.arange(batch.ids.shape[1], device=self.device)
        sees = (index[:, None] >= index) & batch.mask[:, None]  # (B, T, T) query, key: causal, no padding
        in_branch = index >= width
        hidden = in_branch[:, None] & ~in_branch & (index >= batch.shared[:, None, None])  # the branch does not see R
        mask = torch.zeros(sees.shape, dtype=self.lm.dtype, device=self.device)
        return positions, mask.masked_fill(~(sees & ~hidden), torch.finfo(mask.dtype).min)[:, None]

    def forward(self, batch: Batch, features: list[Tensor], grids: list, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Final-layer states and input embeddings of a batch of views (see `embed`), both (B, T, D)."""
        inputs = self.embed(batch, features, grids, slots)
        return self.family.states(**inputs, use_cache=False).last_hidden_state, inputs["inputs_embeds"]

    def logits(self, states: Tensor) -> Tensor:
        """(n, D) -> (n, V)"""
        return self.lm.lm_head(states)

    @torch.no_grad()
    def generate(self, views: list[View], store: ImageStore, max_new_tokens: int, allowed=None) -> list[list[int]]:
        """Greedy continuation of each view by the model's own `generate`: no [PRED], no latent predictor, no tool.

        allowed: optional function (row, tokens generated so far) -> token ids that may come next.
        """
        batch = collate(views, self.pad_id, left=True).to(self.device)
        prompt = self.family.prompt(batch, store, self.embed)
        start = batch.ids.shape[1] if "input_ids" in prompt else 0  # embeddings given: only what is new comes back
        constraint = None if allowed is None else (lambda row, ids: allowed(row, ids[start:].tolist()))
        out = self.lm.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False, prefix_allowed_tokens_fn=constraint,
                               pad_token_id=self.pad_id)
        return out[:, start:].tolist()

    @torch.no_grad()
    def generate_latent(self, views: list[View], store: ImageStore, scale, latents: int, markers: tuple[int, int], end_id: int,
                        max_new_tokens: int) -> list[tuple[list[int], int]]:
        """The reconstruction baseline's decoding: greedy words, and after each start marker `latents` latents.

        A latent is the last state, brought to the scale of an input (predictor.LatentScale) and fed back in place of a
        word; after the last one the end marker is written. Returns for each view (words, number of latents fed). Every
        row is fed one position a step, a word or a latent, so rows in and out of a run share one batch and one KV cache.
        """
        batch = collate(views, self.pad_id, left=True).to(self.device)
        grids = [store.grids[i] for i in batch.images]
        inputs = self.embed(batch, self.encode_images([store.inputs(i) for i in batch.images]), grids)
        position, mask = inputs["position_ids"].amax(dim=(0, 2)) + 1, inputs["attention_mask"]  # (B), (B, T)
        cache = DynamicCache()
        words: list[list[int]] = [[] for _ in views]
        fed, left = [0] * len(views), [-1] * len(views)  # left: latents to feed; 0: the end marker is due; -1: words
        while True:
            state = self.family.states(**inputs, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]  # (B, D)
            token = self.logits(state).argmax(dim=-1).tolist()
            latent = torch.tensor([n > 0 for n in left], device=self.device)
            for row, n in enumerate(left):
                ended = bool(words[row]) and words[row][-1] == end_id
                if n < 0 and not ended and len(words[row]) < max_new_tokens:
                    words[row].append(token[row])
                    left[row] = latents if token[row] == markers[0] else -1
                elif n == 0:
                    token[row] = markers[1]
                fed[row] += n > 0
                left[row] = n - 1 if n >= 0 else left[row]
            if all(n < 0 and (w[-1] == end_id or len(w) == max_new_tokens) for n, w in zip(left, words)):
                return list(zip(words, fed))
            embeds = self.lm.get_input_embeddings()(torch.tensor(token, device=self.device))  # (B, D)
            embeds = torch.where(latent[:, None], scale.input(state).to(embeds.dtype), embeds)
            mask = torch.cat([mask, mask.new_ones(len(views), 1)], dim=1)
            inputs |= dict(inputs_embeds=embeds[:, None], attention_mask=mask, is_image=torch.zeros_like(mask[:, :1]) > 0,
                           position_ids=position.expand(len(inputs["position_ids"]), -1)[..., None], levels=inputs["levels"][:0])
            position = position + 1

    # ---- LoRA on disk, in PEFT's format -----------------------------------------------------------------------------

    def save_adapter(self, folder: Path) -> None:
        """adapter_model.safetensors and adapter_config.json; without LoRA, all trained weights in model.safetensors."""
        layers = _lora_layers(self.lm)
        if not layers:
            trained = {n: p for n, p in self.lm.named_parameters() if p.requires_grad}
            write_tensors(trained, folder / "model.safetensors", dict(format="pt"))
            return
        weights = {}
        for name, layer in layers.items():
            weights[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A
            weights[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B
        write_tensors(weights, folder / "adapter_model.safetensors", dict(format="pt"))
        first = next(iter(layers.values()))
        config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=self.path, r=len(first.lora_A),
                      lora_alpha=first.scaling * len(first.lora_A), lora_dropout=first.dropout.p, bias="none",
                      target_modules=sorted(layers), inference_mode=True)
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")

    @torch.no_grad()
    def load_adapter(self, folder: Path) -> None:
        """Put a saved adapter into the base weights, merged: afterwards this is a plain model, ready to answer."""
        own = dict(self.lm.named_parameters())
        if (folder / "model.safetensors").is_file():
            weights, _ = read_tensors(folder / "model.safetensors", self.device)
            for name, weight in weights.items():
                if name not in own or own[name].shape != weight.shape:
                    raise ValueError(f"{folder / 'model.safetensors'} belongs to another model: {self.path} has no such {name}")
                own[name].copy_(weight)
            return
        file = folder / "adapter_model.safetensors"
        if not file.is_file():
            raise FileNotFoundError(f"{file} not found: {folder} is not a trained checkpoint")
        config, (weights, _) = read_json(folder / "adapter_config.json"), read_tensors(file, self.device)
        try:
            scaling, names = config["lora_alpha"] / config["r"], list(config["target_modules"])
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ValueError(f"{folder / 'adapter_config.json'} is not PEFT's description of a LoRA ({error!r})") from None
        for name in names:
            low, high = (weights.get(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
            layer = own.get(f"{name}.weight")
            if layer is None or low is None or high is None or layer.shape != (high.shape[0], low.shape[1]):
                raise ValueError(f"{file} and {self.path} do not agree on {name}; it was trained on another model")
            layer += (scaling * high @ low).to(layer.dtype)
