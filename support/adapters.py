"""Adapters: LoRA weights on disk in PEFT's format, the base that they belong to, and the merged
result as a checkpoint of its own."""

import json
import re
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

def best_checkpoint(run):
    import json
    return json.loads((run / "best.json").read_text())


from support.files import new_folder, read_json, read_tensors, write_text, write_tensors

# ---- what a path given as --model stands for -----------------------------------------------------


def resolve(path: str) -> tuple[str, list[Path]]:
    """(checkpoint folder or hub id, adapters to put into it, the first one first).

    path: either of these two, a run folder, one of its checkpoints, or an adapter folder. Raises
    ValueError for a folder that is none of them.
    """
    adapters, seen = [], []
    while True:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            if path.startswith((".", "/", "~")):
                raise ValueError(f"{path} is no folder (seen from {Path.cwd()})")
            return path, adapters
        if folder.resolve() in seen:
            raise ValueError(f"{path} names itself as its base model; correct its config.json")
        seen.append(folder.resolve())
        step = _base_of(folder)
        if step is None:
            return str(folder), adapters
        path, adapter = step
        adapters.insert(0, adapter)


def _base_of(folder: Path) -> tuple[str, Path] | None:
    """(base, adapter) of a run or adapter folder; None for a checkpoint that stands by itself."""
    run = folder.parent if (folder.parent / "best.json").is_file() else folder
    if re.fullmatch(r"checkpoint-\d+", folder.name) and run != folder:
        return _named(run / "config.json", "model"), folder
    if (folder / "adapter_config.json").is_file():
        return _named(folder / "adapter_config.json", "base_model_name_or_path"), folder
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a checkpoint folder: it has no config.json")
    config = read_json(folder / "config.json")
    if "model_type" in config or not {"model", "method"} <= config.keys():
        return None
    if not (folder / "best.json").is_file():
        raise ValueError(f"{folder} is a run that has kept no checkpoint yet: train on, or give "
                         "the model that it began with")
    return _named(folder / "config.json", "model"), folder / best_checkpoint(folder)["checkpoint"]


def _named(file: Path, field: str) -> str:
    base = read_json(file).get(field)
    if not base or not isinstance(base, str):
        raise ValueError(f"{file} does not name its base model ({field}): add it")
    return base


# ---- LoRA on disk --------------------------------------------------------------------------------


def save_adapter(lm: torch.nn.Module, layers: dict[str, torch.nn.Module], path: str,
                 folder: Path) -> None:
    """The LoRA layers of a model that was loaded from `path`; without any, all trained weights in
    model.safetensors."""
    if not layers:
        trained = {n: p for n, p in lm.named_parameters() if p.requires_grad}
        write_tensors(trained, folder / "model.safetensors", dict(format="pt"))
        return
    weights = {}
    for name, layer in layers.items():
        weights[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A
        weights[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B
    write_tensors(weights, folder / "adapter_model.safetensors", dict(format="pt"))
    first, base = next(iter(layers.values())), Path(path).expanduser()
    path = str(base.resolve()) if base.is_dir() else path  # to be found from anywhere
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=path,
                  r=len(first.lora_A), lora_alpha=first.scaling * len(first.lora_A),
                  lora_dropout=first.dropout.p, bias="none", target_modules=sorted(layers),
                  inference_mode=True)
    write_text(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def load_adapter(lm: torch.nn.Module, path: str, folder: Path) -> None:
    """Put a saved adapter into the weights of the model that was loaded from `path`: afterwards it
    is a plain model. Ours, or PEFT's own: which layers it is for is read from its tensors, whose
    names may be those of an older transformers."""
    own = dict(lm.named_parameters())
    if (folder / "model.safetensors").is_file():
        file = folder / "model.safetensors"
        weights, _ = read_tensors(file, lm.device)
        for name, weight in weights.items():
            if name not in own or own[name].shape != weight.shape:
                raise ValueError(f"{file} belongs to another model: {path} has no such {name}")
            own[name].copy_(weight)
        return
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: {folder} is not a trained checkpoint")
    scaling, rank = _scaling(folder / "adapter_config.json")
    pairs = _names_of_today(lm, _pairs(file, lm.device))
    for name, (low, high) in pairs.items():
        layer = own.get(f"{name}.weight")
        if layer is None or layer.shape != (high.shape[0], low.shape[1]):
            raise ValueError(f"{file} and {path} do not agree on {name}; it was trained on another "
                             "model")
        if len(low) != rank or high.shape[1] != rank:
            raise ValueError(f"{file}: {name} has rank {len(low)}, adapter_config.json says {rank}")
    for name, (low, high) in pairs.items():  # once all are known to fit
        layer = own[f"{name}.weight"]
        layer += (scaling * high @ low).to(layer.dtype)


def _pairs(file: Path, device) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, in) and B (out, r) by the name of the layer that they change."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(file, device)[0].items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if not match or tensor.dim() != 2:
            raise ValueError(f"{file} holds {key}, which is no low-rank pair of a linear layer: "
                             "merge that adapter with PEFT's merge_and_unload, and give the result")
        found.setdefault(match[1], {})[match[2]] = tensor
    for name, pair in found.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{file} holds half of the pair for {name}; restore it from a copy")
    if not found:
        raise ValueError(f"{file} holds no LoRA weights")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _names_of_today(lm: torch.nn.Module, pairs: dict) -> dict:
    """The same by the names that the layers have now, as transformers renames a checkpoint's."""
    known = lm.state_dict()
    renamings = [step for step in get_model_conversion_mapping(lm)
                 if isinstance(step, WeightRenaming)]
    found = {}
    for name, pair in pairs.items():
        if f"{name}.weight" not in known:
            today, _ = rename_source_key(f"{name}.weight", renamings, [], lm.base_model_prefix,
                                         known)
            name = today.removesuffix(".weight") if today in known else name
        found[name] = pair
    return found


UNSUPPORTED = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out",
               "modules_to_save", "lora_bias", "layer_replication", "megatron_config",
               "trainable_token_indices", "target_parameters")  # each changes what the tensors mean


def _scaling(file: Path) -> tuple[float, int]:
    """(alpha / r, r). Raises ValueError for a kind of adapter that is more than low-rank pairs."""
    config = read_json(file)
    if config.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{file} describes a {config['peft_type']} adapter; only LoRA is loaded")
    rewritten = config.get("init_lora_weights") not in (None, True, False, "gaussian")
    for field in [f for f in UNSUPPORTED if config.get(f)] + ["init_lora_weights"] * rewritten:
        raise ValueError(f"{file} sets {field}, which is not read here: merge that adapter with "
                         "PEFT's merge_and_unload, and give the result")
    try:
        return config["lora_alpha"] / config["r"], config["r"]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{file} is not PEFT's description of a LoRA ({error!r})") from None


# ---- the merged result ---------------------------------------------------------------------------

BESIDE = ("*.json", "*.jinja", "chat_templates/*", "*.txt", "*.model")  # all but weights and texts
OWN = ("config.json", "*.index.json", "adapter_config.json")  # written anew, or of other weights


def save_merged(vlm, out: Path) -> None:
    """A model whose adapter was merged, as an ordinary checkpoint folder, which needs none of our
    code: its weights, and beside them every file of its base that is not weights, as it is there.

    Raises FileExistsError: `out` must not exist.
    """
    lm, base = vlm.lm, vlm.family.path
    with new_folder(out) as partial:
        lm.save_pretrained(partial)
        (partial / "generation_config.json").unlink(missing_ok=True)  # how we ask; theirs is copied
        source = Path(base)
        if not source.is_dir():
            source = Path(snapshot_download(base, allow_patterns=list(BESIDE)))
        for file in sorted({file for pattern in BESIDE for file in source.glob(pattern)}):
            if file.is_file() and not any(file.match(pattern) for pattern in OWN):
                copy = partial / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
    said = f"{out} loads with transformers' AutoModelForImageTextToText and AutoProcessor"
    if lm.config.model_type.startswith("qwen"):
        said += ("; whoever prepares inputs without AutoProcessor must pass mm_token_type_ids too "
                 "(1 at image tokens, else 0), or answers differ silently")
    print(said)
