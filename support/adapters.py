"""LoRA weights on disk, in PEFT's format: adapter_model.safetensors and adapter_config.json."""

import json
from pathlib import Path

import torch

from support.files import read_json, read_tensors, write_text, write_tensors


def save_adapter(lm: torch.nn.Module, layers: dict[str, torch.nn.Module], path: str, folder: Path) -> None:
    """The LoRA layers of a model that was loaded from `path`; without any, all trained weights in model.safetensors."""
    if not layers:
        trained = {n: p for n, p in lm.named_parameters() if p.requires_grad}
        write_tensors(trained, folder / "model.safetensors", dict(format="pt"))
        return
    weights = {}
    for name, layer in layers.items():
        weights[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A
        weights[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B
    write_tensors(weights, folder / "adapter_model.safetensors", dict(format="pt"))
    first = next(iter(layers.values()))
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=path, r=len(first.lora_A),
                  lora_alpha=first.scaling * len(first.lora_A), lora_dropout=first.dropout.p, bias="none",
                  target_modules=sorted(layers), inference_mode=True)
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def load_adapter(lm: torch.nn.Module, path: str, folder: Path) -> None:
    """Put a saved adapter into the weights of the model that was loaded from `path`: afterwards it is a plain model."""
    own, device = dict(lm.named_parameters()), lm.device
    if (folder / "model.safetensors").is_file():
        weights, _ = read_tensors(folder / "model.safetensors", device)
        for name, weight in weights.items():
            if name not in own or own[name].shape != weight.shape:
                raise ValueError(f"{folder / 'model.safetensors'} belongs to another model: {path} has no such {name}")
            own[name].copy_(weight)
        return
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: {folder} is not a trained checkpoint")
    config, (weights, _) = read_json(folder / "adapter_config.json"), read_tensors(file, device)
    try:
        scaling, names = config["lora_alpha"] / config["r"], list(config["target_modules"])
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{folder / 'adapter_config.json'} is not PEFT's description of a LoRA ({error!r})") from None
    for name in names:
        low, high = (weights.get(f"base_model.model.{name}.lora_{part}.weight") for part in "AB")
        layer = own.get(f"{name}.weight")
        if layer is None or low is None or high is None or layer.shape != (high.shape[0], low.shape[1]):
            raise ValueError(f"{file} and {path} do not agree on {name}; it was trained on another model")
        layer += (scaling * high @ low).to(layer.dtype)


def save_merged(vlm, out: Path) -> None:
    """A model whose adapter was merged, with its tokenizer and processor, as an ordinary checkpoint folder."""
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose a new folder, nothing is overwritten")
    partial = out.with_name(out.name + ".partial")
    for part in (vlm.lm, *vlm.family.saved_with):
        part.save_pretrained(partial)
    partial.rename(out)
    print(f"{out} loads with transformers' AutoModelForImageTextToText.from_pretrained")
