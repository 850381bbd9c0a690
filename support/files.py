"""Files: JSON and safetensors, read with an error that names the file, written under a temporary name and then renamed.

Nothing that is read is ever executed, and a reader never sees half a file.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


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


def write_text(file: Path, text: str) -> None:
    """Write to a temporary name, then rename: a reader never sees half a file."""
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise OSError(f"{file} cannot be written: {error}") from None


def write_json(file: Path, value) -> None:
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

