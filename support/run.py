"""A run: its folder, its log, its state, and the steps that are left.

    config.json       the options; environment.json, inputs.json: what the run depends on
    log.jsonl         one line per logged step and validation (docs/logged.md)
    state.safetensors all that --resume needs; checkpoint-STEP/ the best adapter, named in best.json
    results.json      at the end: every answer before and after

Nothing is overwritten but the state and the best checkpoint, each under a temporary name that is
then renamed. One process at a time has the folder.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import cached_file

from support import adapters, processes
from support.files import (new_folder, read_json, read_tensors, write_json, write_tensors,
                           write_text)
from support.records import digest

LOCK = "lock"
# what the screen shows of a line of the log
SCREEN = ("loss", "vlm", "jepa", "nextlat", "recon", "r2", "retrieval", "effective_rank",
          "mean_cosine", "lr", "grad_norm", "ms")
STOPPED = "stopped; python train.py --resume RUN continues from the last state, if there is one"


class Run:
    """One run of train.py; `with Run(config, resume) as run` holds its folder.

    Raises FileExistsError for a used folder, ValueError for one that another process holds.
    """

    def __init__(self, config, resume: bool):
        self.config, self.resume = absolute_paths(config), resume
        self.rank, self.world_size = processes.start_processes(self.config)
        self.out = Path(self.config.out)
        # one process writes; a sharded model answers no questions, because all processes must run
        self.writes = self.rank == 0
        self.asks_questions = self.writes and not config.shard
        own = f"-{self.rank}" if self.rank else ""
        self.state_file = self.out / f"state{own}.safetensors"
        # the last step that is done, and the last one whose update was made or skipped
        self.step = self.updated = self.bad = 0
        self.best, self.seconds, self.faults = math.inf, 0.0, set()
        self.looping = self.stopping = False

    def __enter__(self) -> "Run":
        if self.writes:
            if not self.resume and any(file.name != LOCK for file in self.out.glob("*")):
                raise FileExistsError(f"{self.out} already holds files, perhaps a run: choose "
                                      "another --out, nothing is overwritten")
            self.is_new = not self.out.exists()
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(self.out / LOCK, timeout=0)
            try:
                self.lock.acquire()
            except Timeout:
                raise ValueError(f"{self.out} is in use by another process: stop it") from None
        return self

    def __exit__(self, kind, error, trace) -> None:
        # a faulty record must not cost the steps since the last state; half a step is no state
        if self.looping and isinstance(error, (ValueError, OSError)) and self.updated == self.step:
            self.stopping = True
            with suppress(OSError):
                self.save(self.step)
        if self.writes:
            (self.out / LOCK).unlink(missing_ok=True)
            self.lock.release()
            # a run that failed before its first step leaves no empty folder of its own behind
            with suppress(OSError):
                if self.is_new:
                    self.out.rmdir()

    def start(self, method, optimizer, schedule, splits: tuple) -> torch.nn.Module:
        """Write config.json, or load the state. Returns the module to call: the method, or
        DistributedDataParallel around it. Raises ValueError if model or data of a resumed run are
        not those that it began with."""
        self.method, self.optimizer, self.schedule = method, optimizer, schedule
        inputs = base_digests(self.config.model) | {
            f"{name} records": digest(records)
            for name, records in zip(("training", "validation", "test"), splits)}
        if self.resume:
            file = self.out / "inputs.json"
            first = read_json(file) if file.is_file() else inputs
            if changed := [name for name in first | inputs if first.get(name) != inputs.get(name)]:
                raise ValueError(f"{self.out} began with other inputs than it finds now "
                                 f"({', '.join(changed)}): restore them, begin a new run with "
                                 f"another --out, or delete {file} to go on with these")
            self.load_state()
        elif self.writes:
            write_json(self.out / "inputs.json", inputs)
            write_json(self.out / "environment.json", environment())
            # last: a folder with config.json has the other two
            write_json(self.out / "config.json", dataclasses.asdict(self.config))
        if self.writes:
            truncate_log(self.out / "log.jsonl", self.step)
            trained = sum(p.numel() for p in optimizer.param_groups[0]["params"]) / 1e6
            several = f" x {self.world_size}" if self.world_size > 1 else ""
            print(f"{self.config.method} on {self.config.data or self.config.regime}: "
                  f"{len(splits[0])} records, {trained:.2f}M trained parameters, "
                  f"{self.config.device}{several}, run folder {self.out}")
            if self.config.device.startswith("cuda") and not autocast(self.config)._enabled:
                print("this GPU has no bfloat16 arithmetic: it runs in float32")
        if self.world_size == 1:
            return method
        # sharded weights differ between processes, so they must not be made equal
        return DistributedDataParallel(method, find_unused_parameters=True,
                                       init_sync=not self.config.shard)

    def once(self, name: str, make: Callable):
        """make(), kept in a file of the folder, so that a resumed run does not repeat it."""
        if not self.asks_questions:
            return []
        file = self.out / name
        if not file.is_file():
            write_json(file, make())
        return json.loads(file.read_text(encoding="utf-8"))

    def steps(self, ready: Iterator[list]) -> Iterator[tuple[int, list]]:
        """(number, micro-batches of this process) of each step left, until a signal comes."""
        config, self.start_time = self.config, time.time() - self.seconds
        # from here on a signal ends the loop after its step, and not in the middle
        processes.SIGNALS.in_loop = self.looping = True
        try:
            while self.step < config.steps and not self.stopping:
                self.step_began = time.time()
                micro_batches = next(ready)
                self.waited = time.time() - self.step_began
                yield self.step + 1, micro_batches
                self.step += 1
        finally:
            processes.SIGNALS.in_loop = False
        self.looping, self.seconds = False, time.time() - self.start_time
        if self.step < config.steps and self.writes:
            print(f"stopped after step {self.step}; python train.py --resume {self.out} continues")

    def exchange(self, module: torch.nn.Module, last: bool):
        """For one pass: with several processes, gradients are averaged after the last alone."""
        return nullcontext() if self.world_size == 1 or last else module.no_sync()

    def is_finite(self, norm: Tensor, step: int) -> bool:
        """Raises ValueError after the fifth step in a row without a finite gradient."""
        self.bad = 0 if norm.isfinite() else self.bad + 1
        if self.bad:
            print(f"step {step}: the gradient is not finite; step skipped ({self.bad} in a row)",
                  flush=True)
        if self.bad == 5:
            raise ValueError("five steps in a row without a finite gradient: lower --lr or "
                             f"--lambda_latent; {self.out} has the last good state")
        self.updated = step
        return not self.bad

    def logs(self, step: int) -> bool:
        """Whether this step gets a line: twenty in a run, and all of a short one."""
        # asked here, once a step: a signal to one process stops all after the same step
        self.stopping = processes.asked_to_stop(self.world_size, self.config.device)
        every = max(1, self.config.steps // 20)
        return self.writes and (step % every == 0 or step == self.config.steps)

    def log_step(self, step: int, metrics: dict[str, float], norm: Tensor, lr: float) -> None:
        """A line of the log and of the screen."""
        grad_norm, seconds = float(norm), time.time() - self.step_began
        metrics = metrics | dict(grad_norm=grad_norm, lr=lr, ms=1000 * seconds,
                                 waited=self.waited / max(1e-9, seconds))
        line = log(self.out, "train", dict(step=step, **metrics))
        left = int((self.config.steps - step) * seconds)
        print(f"{step:5d}/{self.config.steps} {line}, {left // 60}:{left % 60:02d} left",
              flush=True)

    def validates(self, step: int) -> bool:
        """Whether this process validates now. Of a sharded model all processes run their share."""
        due = step % self.config.eval_every == 0 or step == self.config.steps
        return due and (self.writes or self.config.shard)

    def keep_best(self, method, step: int, metrics: dict[str, float]) -> None:
        """Log a validation; keep the checkpoint if it has the lowest loss so far."""
        if not self.writes:
            return
        line = log(self.out, "valid", dict(step=step, **metrics))
        print(f"      validation: {line}", flush=True)
        if hint := collapse_hint(metrics, bool(method.targets.cache)):
            print(f"      {hint}", flush=True)
        if metrics["loss"] < self.best:
            self.best = metrics["loss"]
            save_best(self.out, method, step, metrics)

    def save(self, step: int, *datasets) -> None:
        """The state, where one is due: at each validation, at the end, and when a signal came.
        After every step, a line of the log for each record that was left out (--skip_bad)."""
        faults = {fault for dataset in datasets for fault in dataset.faults.values()}
        for fault in sorted(faults - self.faults) if self.writes else ():
            log(self.out, "left out", dict(step=step, fault=fault))
            print(f"      left out: {fault}", flush=True)
        self.faults |= faults
        if not (step % self.config.eval_every == 0 or step == self.config.steps or self.stopping):
            return
        # of each process its own: random numbers, and the h_R that it made
        state = dict(cpu=torch.get_rng_state(), targets=self.method.targets.state())
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        if self.writes:
            state |= dict(step=step, best=self.best, weights=trained_tensors(self.method),
                          seconds=time.time() - self.start_time,
                          optimizer=self.optimizer.state_dict(),
                          schedule=self.schedule.state_dict())
        write_state(self.state_file, state)

    def load_state(self) -> None:
        """Undo `save`. A run without a state starts anew."""
        file = self.out / "state.safetensors"
        if not file.is_file():
            return
        state = read_state(file)
        self.step = self.updated = state["step"]
        self.best, self.seconds = state["best"], state.get("seconds", 0.0)
        for name, tensor in trained_tensors(self.method).items():
            saved = state["weights"].get(name)
            if saved is None or saved.shape != tensor.shape:
                raise ValueError(f"{file} has no such {name}: was config.json changed?")
            tensor.data.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        # a process that the run did not have before has none of its own
        own = read_state(self.state_file) if self.rank and self.state_file.is_file() else state
        torch.set_rng_state(own["cpu"])
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])
        self.method.targets.load(own["targets"])


def trained_tensors(method: torch.nn.Module) -> dict[str, Tensor]:
    """All that training changes, by name: trained parameters, and the method's own buffers."""
    tensors = {name: p for name, p in method.named_parameters() if p.requires_grad}
    return tensors | {name: b for name, b in method.named_buffers() if not name.startswith("vlm.")}


def write_state(file: Path, state: dict) -> None:
    """A nested dict with tensors as one safetensors file: nothing that is read is executed."""
    tensors: dict[str, Tensor] = {}

    def put(tensor: Tensor) -> dict:
        tensors[name := str(len(tensors))] = tensor.detach().cpu()
        return dict(tensor=name)

    # JSON for all but the tensors, of which it holds the names
    text = json.dumps(state, default=put)
    write_tensors(tensors, file, dict(state=text))


def read_state(file: Path) -> dict:
    """Undo write_state."""
    tensors, metadata = read_tensors(file)

    def join(value: dict):
        if value.keys() == {"tensor"}:
            return tensors[value["tensor"]]
        # JSON has texts as keys, an optimiser numbers
        return {int(key) if key.isdigit() else key: part for key, part in value.items()}

    if "state" not in metadata:
        raise ValueError(f"{file} was written by another version: resume it with that one")
    return json.loads(metadata["state"], object_hook=join)


def save_best(out: Path, method, step: int, metrics: dict[str, float]) -> None:
    """checkpoint-STEP/ under a temporary name, then renamed; best.json names it; others go."""
    folder = out / f"checkpoint-{step}"
    # there if the run was interrupted right here
    for half in (folder, out / f"{folder.name}.partial"):
        shutil.rmtree(half, ignore_errors=True)
    with new_folder(folder) as partial:
        method.vlm.save_adapter(partial)
        if method.predictor is not None:
            write_tensors(method.predictor.state_dict(), partial / method.predictor.file_name)
    write_json(out / "best.json", dict(checkpoint=folder.name, step=step, valid=metrics))
    for other in out.glob("checkpoint-[0-9]*"):
        if other != folder:
            shutil.rmtree(other)


def autocast(config) -> torch.autocast:
    """bfloat16 arithmetic on a GPU that has it, and wherever the weights are bfloat16."""
    kind = torch.device(config.device).type
    # T4 and V100 would only emulate it
    fast = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(kind, torch.bfloat16, enabled=fast or config.dtype == "bfloat16")


def workers(config) -> int:
    """How many processes prepare data: --workers, or for a folder one per core, eight at most."""
    automatic = min(8, os.cpu_count() or 1) if config.data else 0
    return automatic if config.workers < 0 else config.workers


def absolute_paths(config):
    """The config with absolute paths, so that it means the same from any folder. The name of a
    model on the hub stays."""
    paths = {name: Path(path).expanduser() for name in ("model", "data", "out")
             if (path := getattr(config, name))}
    return dataclasses.replace(config, **{
        name: str(path.absolute()) for name, path in paths.items()
        if name != "model" or path.exists()})


def read_config(config_class: Callable, argv: list[str]):
    """The config of a run to resume. config_class: from a method's name to its options."""
    if len(argv) != 1:
        raise ValueError("--resume takes the run folder alone: its config.json has the options")
    file = Path(argv[0]) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: {argv[0]} is not a run folder")
    if (file.parent / "results.json").is_file():
        raise ValueError(f"{argv[0]} is finished: its results are in results.json")
    saved = read_json(file)
    kind = config_class(saved.get("method"))
    if unknown := saved.keys() - {field.name for field in dataclasses.fields(kind)}:
        raise ValueError(f"{file} has the unknown field {min(unknown)!r}: of another version?")
    return absolute_paths(kind(**saved | dict(out=argv[0])))


def config_and_checkpoint(run: Path) -> tuple[SimpleNamespace, Path]:
    """Config and best checkpoint of a run. Raises FileNotFoundError naming what is missing."""
    for name in ("config.json", "best.json"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run / name} not found: {run} is not a finished run")
    # only the last part of the name, so that it cannot lead out of the run
    name = Path(read_json(run / "best.json")["checkpoint"]).name
    # the folder may have been moved
    return SimpleNamespace(**read_json(run / "config.json") | dict(out=str(run))), run / name


def merge(model_class: Callable, *arguments: str) -> None:
    """RUN DIR [DTYPE]: the run's best checkpoint as an ordinary folder without our code."""
    if len(arguments) not in (2, 3) or arguments[2:] not in ((), ("float32",), ("bfloat16",)):
        raise ValueError("write python train.py --merge RUN DIR, or ... DIR float32, or bfloat16")
    config, checkpoint = config_and_checkpoint(Path(arguments[0]))
    vlm = model_class(config.model, config.dtype, config.min_pixels, config.max_pixels)
    adapters.save_merged(vlm, checkpoint, Path(arguments[1]), *arguments[2:])


def log(out: Path, kind: str, record: dict) -> str:
    """A line of the log; returns what the screen shows of it."""
    with open(out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(kind=kind, **record)) + "\n")
    return " ".join(f"{name} {record[name]:.4g}" for name in SCREEN if name in record)


def truncate_log(file: Path, step: int) -> None:
    """Drop the lines after the step that the run continues from."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    # the last may be half a line
    write_text(file, "".join(f"{line}\n" for line in lines
                             if line.endswith("}") and json.loads(line)["step"] <= step))


def collapse_hint(metrics: dict[str, float], frozen: bool) -> str:
    """One sentence if the h_R are nearly all alike, so that a low L_JEPA means nothing; else ""."""
    # fewer than ten examples have a small rank by themselves
    few = metrics.get("retrieval_chance", 1) > 0.1
    if few or (metrics["effective_rank"] >= 3 and metrics["mean_cosine"] <= 0.97):
        return ""
    # targets that never move cannot have collapsed in training
    why = ("the starting model does not tell these trajectories apart; try another --model"
           if frozen else "they have collapsed; try the frozen target (--method pearl)")
    return f"the targets h_R are nearly all alike, and a low L_JEPA means nothing: {why}"


def base_digests(path: str) -> dict[str, str]:
    """A digest per file of a checkpoint folder; for a model on the hub its revision."""
    if not Path(path).is_dir():
        return {"revision of the model": Path(cached_file(path, "config.json")).parent.name}
    kinds = (".json", ".jinja", ".safetensors", ".model", ".txt")
    return {f"{file.name} of the model": file_digest(file) for file in sorted(Path(path).iterdir())
            if file.suffix in kinds and file.is_file()}


def file_digest(file: Path) -> str:
    """Of the file's size, and of pieces of 1 MB: all, or about 64 that are spread over it. Weights
    that were trained further differ everywhere."""
    size, piece = file.stat().st_size, 1 << 20
    digest = hashlib.sha256(str(size).encode())
    with open(file, "rb") as content:
        for start in range(0, size, max(piece, size // 64)):
            content.seek(start)
            digest.update(content.read(piece))
    return digest.hexdigest()[:16]


def environment() -> dict:
    """What a run depends on beside its config, for whoever wants to repeat it."""
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"],
                         cwd=Path(__file__).parent, capture_output=True, encoding="utf-8")
    packages = ("torch", "transformers", "safetensors", "pillow", "numpy")
    return dict(command=sys.argv, commit=git.stdout.strip(), python=platform.python_version(),
                packages={name: importlib.metadata.version(name) for name in packages},
                system=platform.platform(), threads=torch.get_num_threads(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)
