"""Files, read with an error that names them, and written so that no half of one is ever seen."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def read_json(file: Path) -> dict:
    """A JSON object. Raises ValueError naming the file if it holds anything else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); restore it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object; restore it")
    return content


def read_tensors(file: Path, device="cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, finite ones, and the metadata of a file."""
    try:  # safetensors and never pickle: data that cannot run
        with safe_open(file, framework="pt", device=str(device)) as saved:
            tensors, metadata = {n: saved.get_tensor(n) for n in saved.keys()}, saved.metadata()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}); restore it") from None
    check_finite(tensors, str(file))
    return tensors, metadata or {}


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: {name} holds values that are not finite; restore it")


def write_tensors(tensors: dict, file: Path, metadata: dict[str, str] | None = None) -> None:
    with whole(file) as partial:
        save_file({n: t.detach().contiguous() for n, t in tensors.items()}, partial, metadata)
        # on the disk before it is renamed: a power failure must not leave an empty file
        with open(partial, "rb") as written:
            os.fsync(written.fileno())


def write_text(file: Path, text: str) -> None:
    with whole(file) as partial:
        # half characters, of a path that is not UTF-8, become \udc80 as in JSON
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(file: Path, value) -> None:
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def whole(file: Path):
    """The rename is one step, so that a reader sees the old file or the new one and never a half.
    Raises OSError naming the file, for instance on a full disk."""
    partial = file.with_name(file.name + ".partial")
    try:
        yield partial
        os.replace(partial, file)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{file} cannot be written: {error}") from None


@contextmanager
def new_folder(out: Path):
    """A folder to fill; named `out` at the end, deleted after an error. FileExistsError if used."""
    partial = out.with_name(out.name + ".partial")
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose a new folder, nothing is overwritten")
    # this fails if it exists, so that only one process can make the folder
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:  # after the rename it is gone
        shutil.rmtree(partial, ignore_errors=True)
