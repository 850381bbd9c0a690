"""A program's beginning and end, several processes (torchrun), shares of a model that does not fit,
and signals that end a run without losing a step."""

import os
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Callable, Iterator

import torch
import torch.distributed as dist


def run_program(main: Callable[[], None], stopped: str = "stopped") -> None:
    """What every script ends with: main(), with errors that a user can mend as one sentence, and
    signals as `on_signal` says; `stopped` is then said. Text that the terminal's encoding lacks is
    printed as \\u...."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        SIGNALS.number = SIGNALS.number or signal.SIGINT
    end_as_signalled()


# ---- several processes ----


def start_processes(config) -> tuple[int, int]:
    """(rank, number of processes); under torchrun also sets this process's device. Raises
    ValueError if they do not fit."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if config.shard and (world == 1 or not config.lora_rank):
        raise ValueError("--shard shares frozen weights between processes: start it with torchrun "
                         "and two or more, and with --lora_rank above 0")
    if world == 1:
        return 0, 1
    if config.accumulate % world:
        raise ValueError(f"--accumulate {config.accumulate} passes cannot be shared by {world} "
                         "processes: make it a multiple")
    if torch.device(config.device).type == "cuda":
        config.device = f"cuda:{local}"
        torch.cuda.set_device(local)
    cuda = torch.device(config.device) if config.device.startswith("cuda") else None
    # a day, not PyTorch's 10 or 30 minutes: the others wait while the first process validates and
    # answers the test questions
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1), device_id=cuda)
    return dist.get_rank(), world


def leave() -> None:
    """Ends every process but the first, whose work goes on, without Python's clean-up.

    A thread of gloo may still hold the last tensor that was exchanged, and is aborted if it lets go
    while Python ends (seen in 10 of 150 small runs). Destroying the group waits for that thread
    while keeping from it the lock that it needs, and can hang.
    """
    if dist.is_initialized() and dist.get_rank() > 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def own_passes(rows: list[int], batch: int, rank: int, world: int) -> list[list[int]]:
    """The forward passes of a step that fall to this process: every world-th, of `batch` examples
    each."""
    return [rows[start:start + batch] for start in range(0, len(rows), batch)][rank::world]


def shard_frozen(decoder: torch.nn.Module, device: str, processes: int) -> None:
    """Each process keeps its share of the layers' frozen weights (FSDP), and gathers a layer's
    others when it runs.

    What trains stays whole in every process: it is small (LoRA), and is exchanged, saved and
    resumed as without.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here: loading takes a second
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (processes,))
    for layer in decoder.layers:
        trained = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)


# ---- signals ----


@dataclass
class Signals:
    """What is known of SIGINT and SIGTERM."""

    number: int = 0  # the one that ends the program; 0: none came
    in_loop: bool = False  # a step is lost if the program ends now


SIGNALS = Signals()


def on_signal(number: int, frame) -> None:
    """In the training loop the first signal ends it after the step it is in, with its state saved;
    any other ends the program.

    With several processes a second one does not: torchrun sends its own after the terminal's, and
    ends by force who is still there after half a minute.
    """
    first, SIGNALS.number = not SIGNALS.number, SIGNALS.number or number
    if not SIGNALS.in_loop or not (first or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        raise KeyboardInterrupt
    if first:  # print() is not safe inside a handler
        os.write(1, b"saving after this step; a second signal ends at once\n")


@contextmanager
def finishing_steps() -> Iterator[None]:
    """While the context lasts a signal waits for asked_to_stop, since a step would be lost."""
    SIGNALS.in_loop = True
    try:
        yield
    finally:
        SIGNALS.in_loop = False


def asked_to_stop(world: int, device: str) -> bool:
    """Whether a signal came; with several processes, to any of them, so that all end after the same
    step."""
    if world > 1:
        told = torch.tensor(int(SIGNALS.number), device=device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        SIGNALS.number = int(told)
    return bool(SIGNALS.number)


def end_as_signalled() -> None:
    """If a signal ended the work, end by it as an ordinary program does, so that `a && b` and loops
    of a shell stop (its status is 130 for SIGINT, 143 for SIGTERM); else return."""
    if SIGNALS.number:
        with suppress(OSError):  # nobody reads them any more
            sys.stdout.flush()
            sys.stderr.flush()
        signal.signal(SIGNALS.number, signal.SIG_DFL)
        signal.raise_signal(SIGNALS.number)
