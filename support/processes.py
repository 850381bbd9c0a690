"""A program's beginning and end, several processes (torchrun), shares of a model that does not fit,
workers that prepare data, and signals that end a run without losing a step."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

# a bar on stderr from the third second on, in the first of all processes; a log file gets a line
# each half minute, a terminal sees the bar move
progress = partial(tqdm, delay=2, leave=False, mininterval=0.5 if sys.stderr.isatty() else 30,
                   disable=os.environ.get("RANK", "0") != "0")
# the signal that ends the program, 0: none came; in_loop: a step would be lost now
SIGNALS = SimpleNamespace(number=0, in_loop=False)


def run_program(main: Callable[[], None], stopped: str = "stopped") -> None:
    """main(), with a user's errors as one sentence and signals as `on_signal` says; `stopped` is
    then printed. Text that the terminal's encoding lacks is printed as \\u...."""
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
    if SIGNALS.number:
        # end as an ordinary program does, so that a shell's loop stops too
        with suppress(OSError):  # nobody may read the stream any more
            sys.stdout.flush()
        signal.signal(SIGNALS.number, signal.SIG_DFL)
        signal.raise_signal(SIGNALS.number)


def start_processes(config) -> tuple[int, int]:
    """(rank, number of processes); under torchrun also sets this process's device."""
    world_size, cuda = int(os.environ.get("WORLD_SIZE", 1)), None
    if config.shard and (world_size == 1 or not config.lora_rank):
        raise ValueError("--shard shares frozen weights between processes: start it with torchrun "
                         "and two or more, and with --lora_rank above 0")
    if world_size == 1:
        return 0, 1
    if config.accumulate % world_size:
        raise ValueError(f"--accumulate {config.accumulate} passes cannot be shared by "
                         f"{world_size} processes: make it a multiple")
    if torch.device(config.device).type == "cuda":
        config.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        cuda = torch.device(config.device)
        torch.cuda.set_device(cuda)
    # a day, because the others wait while the first process validates and answers questions
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1), device_id=cuda)
    return dist.get_rank(), world_size


def leave() -> None:
    """Ends every process but the first, whose work goes on, without Python's clean-up."""
    # a thread of gloo may still hold the last tensor that was exchanged, and aborts the program if
    # it lets go while Python ends (seen in 10 of 150 small runs); to destroy the group can hang
    if dist.is_initialized() and dist.get_rank() > 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def shard_frozen(decoder: torch.nn.Module, device: str, world_size: int) -> None:
    """Each process keeps its share of the layers' frozen weights (FSDP), and gathers a layer's
    others when it runs. LoRA's weights are small and stay whole in every process."""
    # imported here, because loading takes a second
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (world_size,))
    for layer in decoder.layers:
        trained = {p for p in layer.parameters() if p.requires_grad}
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=trained)


@contextmanager
def first_process_first() -> Iterator[None]:
    """Of several processes the first one leaves the context before the others enter it."""
    several = dist.is_initialized()
    if several and dist.get_rank() > 0:
        dist.barrier()
    yield
    if several and dist.get_rank() == 0:
        dist.barrier()


def step_batches(dataset, steps, batch: int, workers: int, rank: int = 0,
                 world_size: int = 1) -> Iterator[list[list]]:
    """The micro-batches of each step, prepared ahead by `workers` processes.

    dataset: data.Trajectories. steps: the rows of each step. Raises ValueError or OSError for a
    faulty record, and where --skip_bad would leave out more than 1% of the records.
    """
    def collate_step(rows: list[int]):
        try:
            result = dataset.micro_batches(rows, batch, rank, world_size)
        except (ValueError, OSError) as error:  # a faulty record: its sentence, and no traceback
            result = error
        return result, dataset.faults

    # the generator is the loader's own: it must not draw from the one that dropout uses
    loader = DataLoader(range(len(dataset)), batch_sampler=steps, collate_fn=collate_step,
                        num_workers=workers, pin_memory=torch.cuda.is_available(),
                        generator=torch.Generator(),
                        multiprocessing_context="fork" if workers else None)
    for result, faults in loader:
        dataset.faults |= faults  # each worker has its own
        if isinstance(result, Exception):
            raise result
        if len(dataset.faults) > len(dataset) / 100:
            raise ValueError(f"{len(dataset.faults)} of {len(dataset)} records are faulty, and "
                             f"--skip_bad leaves out 1%, the last one: {[*faults.values()][-1]}")
        yield result


def on_signal(number: int, frame) -> None:
    """In the training loop the first signal ends the loop after its step, with its state saved;
    any other ends the program. With several processes a second one does not, because torchrun sends
    its own after the terminal's."""
    first, SIGNALS.number = not SIGNALS.number, SIGNALS.number or number
    if not SIGNALS.in_loop or not (first or int(os.environ.get("WORLD_SIZE", 1)) > 1):
        raise KeyboardInterrupt
    if first:  # print() is not safe inside a handler
        os.write(1, b"saving after this step; a second signal ends at once\n")


def asked_to_stop(world_size: int, device: str) -> bool:
    """Whether a signal came to any of the processes, so that all end after the same step."""
    if world_size > 1:
        number = torch.tensor(SIGNALS.number, device=device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        SIGNALS.number = int(number)
    return bool(SIGNALS.number)
