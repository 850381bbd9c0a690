"""The run's folder: config.json, inputs.json, environment.json, log.jsonl, state.safetensors,
best.json, checkpoint-STEP/, results.json.

Written by the training loop, read by --resume and evaluate.py. Nothing in it is overwritten but the
state and the best checkpoint, each in one move. One process at a time has it; what a run began with
is noted, so that it never goes on with something else.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import cached_file

from support.files import Lock, read_json, read_tensors, write_json, write_tensors, write_text
from support.images import picture_digest
from support.records import Example

LOCK = "lock"  # there while a process has the folder
SPLITS = ("train", "validation", "test")
LEFTOVER = re.compile(r"(checkpoint-\d+|\w+\.(json|jsonl|safetensors))\.partial")
STATE_VERSION = "1"
PACKAGES = ("torch", "transformers", "safetensors", "pillow", "numpy")


# ---- whose it is ----


STOPPED = ("stopped; if the run folder holds config.json, python train.py --resume RUN goes on "
           "from its last state")


def absolute_paths(config):
    """The config with every path absolute, so that it means the same from any folder. A model that
    is no folder here stays: the name of one on the hub."""
    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute()) if path else path

    model = absolute(config.model) if Path(config.model).expanduser().exists() else config.model
    return dataclasses.replace(config, model=model, data=absolute(config.data),
                               out=absolute(config.out),
                               feature_cache=absolute(config.feature_cache))


def read_config(config_class, argv: list[str]):
    """The config of a run to resume: everything as it was, nothing may be changed but its place."""
    if len(argv) != 1:
        raise ValueError("--resume takes the run folder and nothing else: the run goes on with its "
                         "own config.json")
    file = Path(argv[0]) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: {argv[0]} is not a run folder")
    if (file.parent / "results.json").is_file():
        raise ValueError(f"{argv[0]} is finished: its results are in results.json")
    known, saved = {f.name for f in dataclasses.fields(config_class)}, read_json(file)
    if unknown := saved.keys() - known:
        raise ValueError(f"{file} has the unknown field {sorted(unknown)[0]!r}: it was written by "
                         "another version")
    return absolute_paths(config_class(**saved | dict(out=argv[0])))


def refuse_used_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose another --out, nothing is overwritten")
    if out.exists() and any(file.name != LOCK for file in out.iterdir()):
        raise FileExistsError(f"{out} already holds files, perhaps a run: choose another --out, "
                              "nothing is overwritten")


@contextmanager
def held(out: Path, resume: bool) -> Iterator[None]:
    """The run's folder, made if need be, for this process alone until the block ends.

    Raises FileExistsError for a used folder, ValueError for one that another process has or, with
    `resume`, whose run is finished. A block that writes nothing leaves nothing behind.
    """
    if not resume:
        refuse_used_folder(out)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    lock = Lock(out / LOCK, str(out))
    try:
        if not resume:
            refuse_used_folder(out)
        elif (out / "results.json").is_file():
            raise ValueError(f"{out} is finished: its results are in results.json")
        else:
            remove_leftovers(out)
        yield
    finally:
        lock.release()
        with suppress(OSError):  # not empty: there is a run in it
            for folder in made:
                folder.rmdir()


def remove_leftovers(out: Path) -> None:
    """What an interrupted write left: half files, and checkpoints that are not the best one."""
    left = [path for path in out.iterdir() if LEFTOVER.fullmatch(path.name)]
    if (out / "best.json").is_file():
        best = best_checkpoint(out)["checkpoint"]
        left += [path for path in out.iterdir()
                 if re.fullmatch(r"checkpoint-\d+", path.name) and path.name != best]
    for path in left:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def start_folder(config, splits: list[list[Example]]) -> None:
    """splits: the examples of each of SPLITS. config.json is last: where it is, the rest is."""
    out = Path(config.out)
    refuse_used_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "inputs.json", inputs_of(config, splits))
    write_json(out / "environment.json", environment())
    write_json(out / "config.json", dataclasses.asdict(config))


# ---- what a run began with ----


def inputs_of(config, splits: list[list[Example]]) -> dict:
    """Digests of the base's files and of every example that the run uses, by split and in order."""
    return dict(model=base_digests(config.model),
                data={name: [example_digest(ex) for ex in split]
                      for name, split in zip(SPLITS, splits, strict=True)})


def example_digest(example: Example) -> str:
    """Of its words and of its images' content; where the images lie does not matter."""
    steps = [step if isinstance(step, str) else dict(image=picture_digest(step))
             for step in (example.image, *example.trajectory)]
    words = (example.id, example.task, example.split, example.question, example.options,
             example.answer)
    return hashlib.sha256(json.dumps([words, steps]).encode()).hexdigest()[:16]


def base_digests(path: str) -> dict[str, str]:
    """Of each file that a checkpoint folder is loaded from; of one from the hub, its revision."""
    if not Path(path).is_dir():
        if Path(path).is_absolute():
            raise FileNotFoundError(f"{path} not found: the run began with this model; restore it")
        return dict(revision=Path(cached_file(path, "config.json")).parent.name)
    kinds = (".json", ".jinja", ".safetensors", ".model", ".txt")
    return {file.name: _file_digest(file) for file in sorted(Path(path).iterdir())
            if file.suffix in kinds and file.is_file()}


def _file_digest(file: Path, pieces: int = 64, piece: int = 1 << 20) -> str:
    """Of the whole file, or, above 64 MB, of its size and as many pieces of 1 MB spread over it:
    weights that were trained further differ everywhere."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as content:
        for n in range(pieces):
            if size > pieces * piece:
                content.seek(n * (size - piece) // (pieces - 1))
            digest.update(content.read(piece))
    return digest.hexdigest()[:16]


def refuse_other_inputs(config, splits: list[list[Example]]) -> None:
    """Raises ValueError if model and data are not those that the run in config.out began with."""
    out, now = Path(config.out), inputs_of(config, splits)
    if not (out / "inputs.json").is_file():
        print(f"{out} does not say what it began with; it goes on with the model and data of now")
        return
    began = read_json(out / "inputs.json")
    model, data, found = began.get("model", {}), began.get("data", {}), ""
    changed = [name for name in sorted(model.keys() | now["model"].keys())
               if model.get(name) != now["model"].get(name)]
    if changed:
        found = f"{', '.join(changed)} of the model {config.model}"
    for name, split in zip(SPLITS, splits):
        before, digests = data.get(name, []), now["data"][name]
        if not found and len(before) != len(digests):
            found = f"the {name} split ({len(before)} records then, {len(digests)} now)"
        elif not found and before != digests:
            row = next(n for n in range(len(digests)) if before[n] != digests[n])
            found = f"record {split[row].id!r} of the {name} split"
    if found:
        raise ValueError(f"{out} began with something else than it finds now, {found}: restore it, "
                         "or begin a new run with another --out")


def environment() -> dict:
    """What a run depended on beside its config, for whoever wants to repeat it."""
    root = Path(__file__).resolve().parent

    def git(*args: str) -> str | None:
        try:
            return subprocess.run(["git", "-C", str(root), *args], capture_output=True, check=True,
                                  encoding="utf-8", errors="backslashreplace").stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or a copy without history
            return None

    return dict(command=sys.argv, commit=git("rev-parse", "HEAD"),
                changed_files=git("status", "--porcelain", "--untracked-files=no"),
                packages={name: importlib.metadata.version(name) for name in PACKAGES},
                python=platform.python_version(), system=platform.platform(),
                cpu=platform.processor() or platform.machine(), threads=torch.get_num_threads(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


# ---- what is kept while it trains ----


def save_best(out: Path, vlm, predictor: torch.nn.Module | None, step: int,
              valid: dict[str, float]) -> None:
    """checkpoint-STEP/ under a temporary name, then renamed; then best.json names it; then the one
    before goes."""
    folder, partial = out / f"checkpoint-{step}", out / f"checkpoint-{step}.partial"
    partial.mkdir(exist_ok=True)
    vlm.save_adapter(partial)
    if predictor is not None:
        write_tensors(predictor.state_dict(), partial / predictor.file_name)
    folder.mkdir(exist_ok=True)  # there if the run was interrupted right here, and the same
    for file in sorted(partial.iterdir()):
        os.replace(file, folder / file.name)
    partial.rmdir()
    best = out / "best.json"
    before = best_checkpoint(out)["checkpoint"] if best.exists() else None
    write_json(best, dict(checkpoint=folder.name, step=step, valid=valid))
    if before and before != folder.name:
        shutil.rmtree(out / before, ignore_errors=True)  # what is left of it, a resumed run removes


def trained_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Everything that training changes, by name: parameters with gradient, and the buffers of what
    the method adds."""
    step = module.module if isinstance(module, DistributedDataParallel) else module
    tensors = {name: p for name, p in step.named_parameters() if p.requires_grad}
    if step.predictor is not None:
        tensors |= {f"predictor.{name}": b for name, b in step.predictor.named_buffers()}
    return tensors


def save_state(out: Path, module: torch.nn.Module, optimizer, schedule, step: int,
               best: float) -> None:
    """out/state.safetensors: weights, moments, random state, schedule, step and best score,
    replaced in one move."""
    tensors = {f"weight/{name}": t.detach() for name, t in trained_tensors(module).items()}
    for n, p in enumerate(optimizer.param_groups[0]["params"]):
        moments = optimizer.state.get(p, {})
        tensors |= {f"adam/{n}/{key}": value for key, value in moments.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    write_tensors({name: t.cpu() for name, t in tensors.items()}, out / "state.safetensors",
                  dict(version=STATE_VERSION, step=str(step), best=repr(best),
                       schedule=json.dumps(schedule.state_dict())))


def load_state(out: Path, module: torch.nn.Module, optimizer, schedule) -> tuple[int, float]:
    """Undo save_state; returns (step, best score). A run without a state starts anew."""
    file = out / "state.safetensors"
    if not file.is_file():
        return 0, math.inf
    tensors, meta = read_tensors(file)
    if meta.get("version") != STATE_VERSION:
        raise ValueError(f"{file} has format {meta.get('version')!r}, this program writes and "
                         f"reads {STATE_VERSION!r}: resume it with the version that wrote it")
    with torch.no_grad():
        for name, t in trained_tensors(module).items():
            saved = tensors.get(f"weight/{name}")
            if saved is None or saved.shape != t.shape:
                raise ValueError(f"{file} does not fit this run: {name} is missing or has another "
                                 "shape; was config.json changed?")
            t.copy_(saved)
    for n, p in enumerate(optimizer.param_groups[0]["params"]):
        moments = {key: tensors[f"adam/{n}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq")
                   if f"adam/{n}/{key}" in tensors}
        if any(value.shape != p.shape for key, value in moments.items() if key != "step"):
            raise ValueError(f"{file} does not fit this run: moments of another shape; was "
                             "config.json changed?")
        if moments:
            optimizer.state[p] = {key: value if key == "step" else value.to(p.device)
                                  for key, value in moments.items()}
    schedule.load_state_dict(json.loads(meta["schedule"]))
    optimizer.param_groups[0]["lr"] = schedule.get_last_lr()[0]
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])
    return int(meta["step"]), float(meta["best"])


def forget_later(out: Path, done: int) -> None:
    """The log of a run that is resumed forgets what came after its state."""
    file = out / "log.jsonl"
    if file.is_file():
        lines = file.read_text(encoding="utf-8").splitlines()
        records = [line for line in lines if line.endswith("}")]  # the last may be half a line
        write_text(file, "".join(line + "\n" for line in records
                                 if json.loads(line)["step"] <= done))


def log(out: Path, kind: str, record: dict) -> None:
    with open(out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(kind=kind, **record)) + "\n")


def collapse_hint(gauges: dict[str, float], target_encoder: str, count: int,
                  targets: str = "own") -> str:
    """One sentence if the targets h_R are nearly all alike, so that a low L_JEPA says nothing; else
    empty. gauges: losses.collapse_gauges over `count` examples; targets: own, or which control.

    Below ten examples the effective rank is small by itself, and a mean over a family or an answer
    makes targets alike on purpose: no hint.
    """
    if count < 10 or targets in ("family", "answer") or "effective_rank" not in gauges:
        return ""
    if gauges["effective_rank"] >= 3 and gauges["mean_cosine"] <= 0.97:
        return ""
    said = "the targets h_R are nearly all alike, and a low L_JEPA says nothing"
    if target_encoder == "frozen":  # what never moves cannot have collapsed in training
        return (f"{said}: the base tells these trajectories apart no better; look whether they "
                "differ, or try another --target_view or --model")
    return (f"{said}: they have collapsed; try --target_encoder frozen, or a smaller "
            "--lambda_latent or --lr")


def best_checkpoint(run: Path) -> dict:
    """best.json: checkpoint (a folder of the run), step and validation. Raises ValueError if it
    points anywhere else."""
    best = read_json(run / "best.json")
    if not re.fullmatch(r"checkpoint-\d+", str(best.get("checkpoint"))):
        raise ValueError(f"{run / 'best.json'} names no checkpoint of this run: "
                         f"{best.get('checkpoint')!r}")
    return best


def finished(run: Path) -> tuple[dict, Path]:
    """Config and best checkpoint of a run. Raises FileNotFoundError naming what is missing."""
    for name in ("config.json", "best.json"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run / name} not found: {run} is not a finished run of "
                                    "train.py")
    config = read_json(run / "config.json")
    if missing := {"model", "dtype", "method"} - config.keys():
        raise ValueError(f"{run / 'config.json'} has no {sorted(missing)[0]!r}: it was not written "
                         "by train.py")
    return config, run / best_checkpoint(run)["checkpoint"]
