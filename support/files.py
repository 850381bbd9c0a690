"""Files: JSON and safetensors, read with an error that names the file, written under a temporary
name and then renamed; new folders likewise; and a lock that keeps a folder to one process.

Nothing that is read is ever executed, and a reader never sees half a file.
"""

import json
import os
import platform
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

try:
    import fcntl
except ImportError:  # a system without it: see Lock
    fcntl = None


def read_json(file: Path) -> dict:
    """A JSON object from disk. Raises ValueError naming the file if it is none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); restore it") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, not an object; restore it")
    return found


def read_tensors(file: Path, device: str | torch.device = "cpu"
                 ) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file. Raises ValueError for a file that is
    none, is cut short or holds NaN."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as saved:
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}
            metadata = saved.metadata() or {}
    except FileNotFoundError:
        raise
    except Exception as error:  # safetensors' own error, or the system's
        raise ValueError(f"{file} is not a whole safetensors file ({error}); restore it from a "
                         "copy") from None
    check_finite(tensors, str(file))
    return tensors, metadata


def check_finite(tensors: dict[str, Tensor], where: str) -> None:
    bad = next((name for name, t in tensors.items()
                if t.is_floating_point() and not torch.isfinite(t).all()), None)
    if bad:
        raise ValueError(f"{where}: {bad} holds values that are not finite; restore it from a copy")


def write_tensors(tensors: dict[str, Tensor], file: Path,
                  metadata: dict[str, str] | None = None) -> None:
    """A safetensors file: under a temporary name, synced, then renamed. Raises OSError naming it,
    for instance on a full disk."""
    with _whole(file) as partial:
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, partial,
                  metadata=metadata)
        with open(partial, "rb") as written:
            os.fsync(written.fileno())


def write_text(file: Path, text: str) -> None:
    """A UTF-8 file. Half characters, as in a path that is not UTF-8, become JSON's own \\udc80."""
    with _whole(file) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(file: Path, value) -> None:
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A temporary name to write to, renamed to `file` when it is whole, or deleted."""
    partial = file.with_name(file.name + ".partial")
    try:
        yield partial
        os.replace(partial, file)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{file} cannot be written: {error}") from None


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, out.partial, which is renamed to `out` when the block ends well and deleted
    when it does not. Raises FileExistsError if either is there: one process alone can make it."""
    partial = out.with_name(out.name + ".partial")
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose a new folder, nothing is overwritten")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError:
        raise FileExistsError(f"{partial} exists: another process is writing it, or one was "
                              "interrupted; then delete it") from None
    try:
        yield partial
        if out.exists():  # a rename would replace an empty folder
            raise FileExistsError(f"{out} has been made by another process meanwhile")
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial)
        raise


def on_disk(name: str) -> str:
    """A file's name as UTF-8 on the disk, also where the locale would have another encoding."""
    return os.fsdecode(name.encode("utf-8"))


class Lock:
    """A file, held by one process at a time, that says which: its computer and its number.

    The system's own lock on it goes when the process dies, whatever kills it, so the file alone
    means nothing. Where the system or the file system has no such locks, the file means a lock as
    long as its process lives; of another computer's that cannot be known.
    """

    def __init__(self, file: Path, what: str):
        """Raises ValueError with `what` if another process holds it."""
        self.file = file
        while True:
            try:
                made, self.handle = True, os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                try:
                    made, self.handle = False, os.open(file, os.O_RDWR)
                except FileNotFoundError:  # it was let go just now
                    continue
            owner = os.read(self.handle, 1000).decode("utf-8", "replace").split()
            locked = self._system_lock()
            if not (locked if locked is not None else made or self._is_gone(owner)):
                os.close(self.handle)
                by = "process {1} on {0}".format(*owner) if len(owner) == 2 else "another process"
                mend = ("wait for it or stop it" if locked is False else
                        f"if that is gone, delete {file}")
                raise ValueError(f"{what} is in use by {by}: {mend}")
            if file.exists() and os.path.samestat(os.fstat(self.handle), os.stat(file)):
                break
            os.close(self.handle)  # deleted by its holder while we waited for it
        os.truncate(self.handle, 0)
        os.lseek(self.handle, 0, os.SEEK_SET)
        os.write(self.handle, f"{platform.node() or '?'} {os.getpid()}\n".encode())

    def _system_lock(self) -> bool | None:
        """Whether the lock is ours now; None if there are no such locks."""
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except (AttributeError, OSError):  # no fcntl, or a file system without locks
            return None
        return True

    @staticmethod
    def _is_gone(owner: list[str]) -> bool:
        """Whether the process that made the file is known to be dead."""
        if len(owner) != 2 or owner[0] != platform.node() or os.name == "nt":
            return False  # on Windows, os.kill would end it
        try:
            os.kill(int(owner[1]), 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError):
            return False
        return False

    def release(self) -> None:
        """Delete the file while it is still ours, then let go."""
        if os.name == "nt":  # where no open file can be deleted
            os.close(self.handle)
            self.file.unlink(missing_ok=True)
        else:
            self.file.unlink(missing_ok=True)
            os.close(self.handle)
