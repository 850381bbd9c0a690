"""LoRA: a low-rank update beside each frozen linear layer. r is its rank. Adapters: the base that
they belong to, LoRA on disk in PEFT's format, merged checkpoints."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from support.files import new_folder, read_json, read_tensors, write_json, write_tensors, write_text

# the files of a checkpoint but weights and texts
COPIED = ("*.json", "*.jinja", "chat_templates/*", "*.txt", "*.model")
# PEFT's settings that change what the tensors mean, with the values that change nothing
PLAIN = dict(peft_type=["LORA"], init_lora_weights=[True, "gaussian"], use_rslora=[], use_dora=[],
             rank_pattern=[], alpha_pattern=[], modules_to_save=[], fan_in_fan_out=[])


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
        nn.init.kaiming_uniform_(self.lora_A, a=5 ** 0.5)
        # The sum W + (alpha / r) B A takes less work than A and B apart if the rank is this large.
        # In 16 bits it would lose small changes.
        large = 2 * rank >= min(base.weight.shape) and not dropout
        self.adds_up = large and base.weight.dtype.itemsize > 2

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.base(x)
        if self.adds_up and not torch.is_autocast_enabled(x.device.type):
            A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
            weight = torch.addmm(self.base.weight, B, A, alpha=self.scaling)
            return nn.functional.linear(x, weight, self.base.bias)
        # two thin products; the wide B A is not built. A and B are cast, because they are small.
        low = nn.functional.linear(self.dropout(x), self.lora_A.to(x.dtype))  # (..., r)
        high = (self.scaling * self.lora_B).to(low.dtype)
        y = self.base(x)
        return y + nn.functional.linear(low, high).to(y.dtype)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules()
            if isinstance(module, LoRALinear)}


def add_lora(model: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    """Freeze `model`, then put a LoRALinear around each of its nn.Linear layers."""
    model.requires_grad_(False)  # first, because the new layers train
    for name, module in list(model.named_modules()):
        # not the last layer of torch's own attention, whose weight is read without a call of it
        if type(module) is nn.Linear:
            model.set_submodule(name, LoRALinear(module, rank, alpha, dropout))


def resolve(path: str) -> tuple[str, list[Path]]:
    """(checkpoint folder or hub id, adapters to merge into it, in this order). path: either of
    these two, a run folder, or an adapter folder as we or PEFT write it."""
    adapters: list[Path] = []
    while (folder := Path(path).expanduser()).is_dir():
        if (folder / "best.json").is_file():
            # only the last part of the name, so that it cannot lead out of the run
            folder /= Path(str(read_json(folder / "best.json").get("checkpoint"))).name
        file = folder / "adapter_config.json"
        if not file.is_file():
            return str(folder), adapters
        path = read_json(file).get("base_model_name_or_path")
        if not path or not isinstance(path, str) or folder in adapters:
            raise ValueError(f"{file} names {path!r} as its base model; correct it")
        adapters.insert(0, folder)
    return path, adapters


def save_adapter(lm: nn.Module, path: str, folder: Path) -> None:
    """The LoRA layers of the model from `path`, or all trained weights if there are none."""
    # absolute, so that the base is found from any folder
    base, layers = Path(path).expanduser(), lora_layers(lm)
    config = dict(base_model_name_or_path=str(base.resolve()) if base.is_dir() else path)
    # all that trains, LoRA's by PEFT's names
    tensors = {re.sub(r"(.+\.lora_[AB])", r"base_model.model.\1.weight", name): p
               for name, p in lm.named_parameters() if p.requires_grad}
    if layers:
        first = next(iter(layers.values()))
        rank = len(first.lora_A)
        config |= dict(peft_type="LORA", task_type="CAUSAL_LM", r=rank, bias="none",
                       lora_alpha=first.scaling * rank, lora_dropout=first.dropout.p,
                       target_modules=sorted(layers), inference_mode=True)
    file = folder / ("adapter_model.safetensors" if layers else "model.safetensors")
    write_tensors(tensors, file, dict(format="pt"))
    write_json(folder / "adapter_config.json", config)


def read_adapter(folder: Path, lm: nn.Module, path: str) -> tuple[float, dict[str, Any]]:
    """An adapter of ours or PEFT's for the model from `path`: alpha / r, and by parameter A (r, in)
    and B (out, r) in a dict, or after full fine-tuning W. ValueError if it does not fit."""
    shapes = {name: tuple(p.shape) for name, p in lm.named_parameters()}
    file = folder / "model.safetensors"
    if file.is_file():
        weights, _ = read_tensors(file, lm.device)
        if foreign := [name for name in weights if shapes.get(name) != weights[name].shape]:
            raise ValueError(f"{file} belongs to another model: {path} has no such {foreign[0]}")
        return 1.0, weights
    file = folder / "adapter_config.json"
    config = read_json(file)
    for field, plain in PLAIN.items():
        if config.get(field) and config[field] not in plain:
            raise ValueError(f"{file} sets {field} to {config[field]}, which is not supported: "
                             "merge that adapter with PEFT's merge_and_unload")
    if not isinstance(config.get("lora_alpha"), int | float):
        raise ValueError(f"{file} describes no LoRA of PEFT: it has no lora_alpha")
    file, pairs = folder / "adapter_model.safetensors", {}
    # an adapter may have the names of an older transformers, which renames them in checkpoints too
    rules = [r for r in get_model_conversion_mapping(lm) if isinstance(r, WeightRenaming)]
    # the tensors say which layers have a pair: target_modules may be a pattern
    for key, tensor in read_tensors(file, lm.device)[0].items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if not match:
            raise ValueError(f"{file} holds {key}, which is no low-rank pair of a linear layer: "
                             "merge that adapter with PEFT's merge_and_unload")
        name, _ = rename_source_key(f"{match[1]}.weight", rules, [], lm.base_model_prefix, shapes)
        pairs.setdefault(name, {})[match[2]] = tensor
    for name, pair in pairs.items():
        sizes = {part: tuple(tensor.shape) for part, tensor in pair.items()}
        rank, (out, width) = config.get("r"), shapes.get(name, (0, 0))
        if sizes != dict(A=(rank, width), B=(out, rank)):
            raise ValueError(f"{file} has {sizes} for {name}, of r = {rank} in adapter_config.json "
                             f"and ({out}, {width}) in {path}: it is for another model")
    return config["lora_alpha"] / config["r"], pairs


def load_adapter(lm: nn.Module, path: str, folder: Path, alpha: float) -> None:
    """Put a saved A and B beside the weights, or all trained weights in their place. A and B are
    not added: a sum in bfloat16 would lose small changes. alpha: the share of the change."""
    (scaling, changes), weights = read_adapter(folder, lm, path), lm.state_dict()
    for name, change in changes.items():
        if isinstance(change, Tensor):
            weights[name].lerp_(change.to(weights[name]), alpha)
        else:
            layer_name, rank = name.removesuffix(".weight"), len(change["A"])
            layer = LoRALinear(lm.get_submodule(layer_name), rank, alpha * scaling * rank)
            layer.lora_A.data.copy_(change["A"])
            layer.lora_B.data.copy_(change["B"])
            lm.set_submodule(layer_name, layer)


@torch.no_grad()
def merge(lm: nn.Module, scaling: float, changes: dict[str, Any],
          dtype: torch.dtype | None = None) -> float:
    """Put an adapter into the weights, and all weights into dtype (None: their own). Returns the
    share of the change that survives: 1 - |rounding error| / |change|, at least 0."""
    change = error = 0.0
    for name, weight in lm.named_parameters():
        old = weight.detach()
        new = changes.get(name, old)
        # added in float32 (or float64) and rounded once: small changes vanish in bfloat16
        if isinstance(new, dict):
            wide = torch.promote_types(old.dtype, torch.float32)
            new = old.to(wide) + scaling * new["B"].to(wide) @ new["A"].to(wide)
        weight.data = new.to(dtype or old.dtype)
        if new is not old:
            change += (new.float() - old.float()).square().sum().item()
            error += (weight.float() - new.float()).square().sum().item()
    return max(0.0, 1 - (error / change) ** 0.5) if change else 1.0


def save_merged(vlm, checkpoint: Path, out: Path, dtype: str = "") -> float:
    """Write the model with an adapter (`checkpoint`) merged into it as an ordinary checkpoint: new
    weights, and all other files of the base to the byte. dtype: name of the weights' type; "": the
    one in the base's config.json. Returns what `merge` does. Raises FileExistsError."""
    lm, source = vlm.lm, Path(vlm.family.path)
    if not source.is_dir():
        source = Path(snapshot_download(vlm.family.path, allow_patterns=list(COPIED)))
    config = read_json(source / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype") or ""
    dtype = dtype or str(getattr(torch, stored, lm.dtype)).removeprefix("torch.")
    with new_folder(out) as partial:
        share = merge(lm, *read_adapter(checkpoint, lm, vlm.path), getattr(torch, dtype))
        lm.save_pretrained(partial)
        # lm's is our greedy one; the base's own is copied below
        (partial / "generation_config.json").unlink(missing_ok=True)
        for file in (file for pattern in COPIED for file in source.glob(pattern)):
            if file.is_file() and not file.match("*.index.json"):
                copy = partial / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
        # transformers would load the weights in the type that the base had
        if stored and stored != dtype:
            text = (source / "config.json").read_text(encoding="utf-8")
            write_text(partial / "config.json", text.replace(f'"{stored}"', f'"{dtype}"'))
        # older checkpoints have the images' size in the first file, newer ones nested in the second
        for file in (partial / "preprocessor_config.json", partial / "processor_config.json"):
            settings = read_json(file) if vlm.family.pixels and file.is_file() else {}
            images = settings if file.name.startswith("pre") else settings.get("image_processor")
            if images:
                images.update(vlm.family.pixels)
                write_json(file, settings)
    print(f"{out} loads with transformers' AutoModelForImageTextToText and AutoProcessor (Qwen: "
          "inputs made without AutoProcessor need mm_token_type_ids, or answers differ silently); "
          f"{share:.0%} of what training changed survives in {dtype}")
    return share
