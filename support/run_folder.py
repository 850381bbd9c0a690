"""The run's folder: config.json, environment.json, log.jsonl, state.safetensors, best.json, checkpoint-STEP/, results.json.

Written by the training loop, read by --resume and evaluate.py. Nothing in it is overwritten but the state and the best
checkpoint, each in one move.
"""

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from support.files import read_json, read_tensors, write_json, write_tensors, write_text


def refuse_used_folder(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} already holds files, perhaps a run: choose another --out, nothing is overwritten")


def start_folder(config) -> None:
    out = Path(config.out)
    refuse_used_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", dataclasses.asdict(config))
    write_json(out / "environment.json", environment())


PACKAGES = ("torch", "transformers", "safetensors", "pillow", "numpy")


def environment() -> dict:
    """What a run depended on beside its config, for whoever wants to repeat it."""
    root = Path(__file__).resolve().parent

    def git(*args: str) -> str | None:
        try:
            return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or a copy without history
            return None

    return dict(command=sys.argv, commit=git("rev-parse", "HEAD"),
                changed_files=git("status", "--porcelain", "--untracked-files=no"),
                packages={name: importlib.metadata.version(name) for name in PACKAGES}, python=platform.python_version(),
                system=platform.platform(), cpu=platform.processor() or platform.machine(), threads=torch.get_num_threads(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def save_best(out: Path, vlm, predictor: torch.nn.Module | None, step: int, valid: dict[str, float]) -> None:
    """checkpoint-STEP/ under a temporary name, then renamed; then best.json names it; then the one before goes."""
    folder, partial = out / f"checkpoint-{step}", out / f"checkpoint-{step}.partial"
    partial.mkdir(exist_ok=True)
    vlm.save_adapter(partial)
    if predictor is not None:
        write_tensors(predictor.state_dict(), partial / predictor.file_name)
    folder.mkdir(exist_ok=True)  # there already if the run was interrupted right here: then with the same content
    for file in sorted(partial.iterdir()):
        os.replace(file, folder / file.name)
    partial.rmdir()
    best = out / "best.json"
    before = best_checkpoint(out)["checkpoint"] if best.exists() else None
    write_json(best, dict(checkpoint=folder.name, step=step, valid=valid))
    if before and before != folder.name:
        for file in (out / before).iterdir():
            file.unlink()
        (out / before).rmdir()


def trained_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Everything that training changes, by name: parameters with gradient, and the buffers of what the method adds."""
    step = module.module if isinstance(module, DistributedDataParallel) else module
    tensors = {name: p for name, p in step.named_parameters() if p.requires_grad}
    return tensors | ({f"predictor.{name}": b for name, b in step.predictor.named_buffers()} if step.predictor is not None else {})


STATE_VERSION = "1"


def save_state(out: Path, module: torch.nn.Module, optimizer, schedule, step: int, best: float) -> None:
    """out/state.safetensors: weights, moments, random state, schedule, step and best score, replaced in one move."""
    tensors = {f"weight/{name}": t.detach() for name, t in trained_tensors(module).items()}
    for n, p in enumerate(optimizer.param_groups[0]["params"]):
        tensors |= {f"adam/{n}/{key}": value for key, value in optimizer.state.get(p, {}).items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    write_tensors({name: t.cpu() for name, t in tensors.items()}, out / "state.safetensors",
                  dict(version=STATE_VERSION, step=str(step), best=repr(best), schedule=json.dumps(schedule.state_dict())))


def load_state(out: Path, module: torch.nn.Module, optimizer, schedule) -> tuple[int, float]:
    """Undo save_state; returns (step, best score). A run without a state starts anew."""
    file = out / "state.safetensors"
    done, best = 0, math.inf
    if file.is_file():
        tensors, meta = read_tensors(file)
        if meta.get("version") != STATE_VERSION:
            raise ValueError(f"{file} has format {meta.get('version')!r}, this program writes and reads {STATE_VERSION!r}: "
                             "resume it with the version that wrote it")
        done, best = int(meta["step"]), float(meta["best"])
        with torch.no_grad():
            for name, t in trained_tensors(module).items():
                if tensors.get(f"weight/{name}", t).shape != t.shape or f"weight/{name}" not in tensors:
                    raise ValueError(f"{file} does not fit this run: {name} is missing or has another shape; "
                                     "was config.json changed?")
                t.copy_(tensors[f"weight/{name}"])
        for n, p in enumerate(optimizer.param_groups[0]["params"]):
            moments = {key: tensors[f"adam/{n}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"adam/{n}/{key}" in tensors}
            if any(value.shape != p.shape for key, value in moments.items() if key != "step"):
                raise ValueError(f"{file} does not fit this run: moments of another shape; was config.json changed?")
            if moments:
                optimizer.state[p] = {key: value if key == "step" else value.to(p.device) for key, value in moments.items()}
        schedule.load_state_dict(json.loads(meta["schedule"]))
        optimizer.param_groups[0]["lr"] = schedule.get_last_lr()[0]
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random/cuda"])
    return done, best


def forget_later(out: Path, done: int) -> None:
    """The log of a run that is resumed forgets what came after its state."""
    if (out / "log.jsonl").is_file():
        lines = [line for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        write_text(out / "log.jsonl", "".join(line + "\n" for line in lines if json.loads(line)["step"] <= done))


def log(out: Path, kind: str, record: dict) -> None:
    with open(out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(kind=kind, **record)) + "\n")



def best_checkpoint(run: Path) -> dict:
    """best.json: checkpoint (a folder of the run), step and validation. Raises ValueError if it points anywhere else."""
    best = read_json(run / "best.json")
    if not re.fullmatch(r"checkpoint-\d+", str(best.get("checkpoint"))):
        raise ValueError(f"{run / 'best.json'} names no checkpoint of this run: {best.get('checkpoint')!r}")
    return best


def read_config(config_class, argv: list[str]):
    """The config of a run to resume: everything as it was, nothing may be changed."""
    if len(argv) != 1:
        raise ValueError("--resume takes the run folder and nothing else: the run goes on with its own config.json")
    file = Path(argv[0]) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: {argv[0]} is not a run folder")
    if (file.parent / "results.json").is_file():
        raise ValueError(f"{argv[0]} is finished: its results are in results.json")
    known, saved = {f.name for f in dataclasses.fields(config_class)}, read_json(file)
    if unknown := saved.keys() - known:
        raise ValueError(f"{file} has the unknown field {sorted(unknown)[0]!r}: it was written by another version")
    return config_class(**saved | dict(out=argv[0]))


def collapse_hint(gauges: dict[str, float], target_encoder: str, count: int) -> str:
    """What to do about targets that are all alike; empty where there is nothing to say."""
    if count > 9 and (gauges.get("effective_rank", 9.0) < 3 or gauges.get("mean_cosine", 0.0) > 0.97):
        return ("the targets h_R have collapsed: they are nearly all alike, and a low L_JEPA says nothing; "
                "try --target_encoder frozen, or a smaller --lambda_latent or --lr")
    return ""


def finished(run: Path) -> tuple[dict, Path]:
    """Config and best checkpoint of a run. Raises FileNotFoundError naming what is missing."""
    for name in ("config.json", "best.json"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run / name} not found: {run} is not a finished run of train.py")
    config = read_json(run / "config.json")
    if missing := {"model", "dtype", "method"} - config.keys():
        raise ValueError(f"{run / 'config.json'} has no {sorted(missing)[0]!r}: it was not written by train.py")
    return config, run / best_checkpoint(run)["checkpoint"]
