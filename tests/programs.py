"""train.py as a process of its own, forked from one that has everything imported: to start Python
and import PyTorch takes longer than any of the runs that the tests start.
"""

import multiprocessing
import os
import re
import runpy
import socket
import sys
import time
from pathlib import Path

import torch

import train
from support import processes

ROOT = Path(train.__file__).resolve().parent
# children of the process that preloads find this module, and the repository's, by this path
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["programs"])


class Program:
    """`python train.py ARGS`, begun at once; its output is in the file `log`. watched: check that
    each process holds half of what --shard shares."""

    def __init__(self, *args, log: Path, env=(), watched: bool = False):
        self.log, args = log, [*map(str, args)]
        self.process = CONTEXT.Process(target=_run, args=(args, str(log), dict(env), watched))
        self.process.start()

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        """Until the loop has printed it, or the program has ended."""
        until = time.time() + seconds
        while self.process.is_alive():
            if any(int(n) >= step for n in re.findall(r"^ *(\d+)/\d+ ", self.said(), re.MULTILINE)):
                return
            assert time.time() < until, self.said()
            time.sleep(0.002)

    def status(self, number: int = 0) -> int:
        """Sends a signal, and waits; the exit status, or minus the signal that ended it."""
        if number and self.process.is_alive():
            os.kill(self.process.pid, number)
        self.process.join()
        return self.process.exitcode


def together(*args, log: Path, watched: bool = False) -> None:
    """Two processes, as torchrun starts them, to their end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = [Program(*args, log=log.with_suffix(f".{rank}"), watched=watched, env=dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port, OMP_NUM_THREADS="1")) for rank in range(2)]
    assert [program.status() for program in both] == [0, 0], [program.said() for program in both]


def _run(args: list[str], log: str, env: dict[str, str], watched: bool) -> None:
    os.environ.update(env)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(file, descriptor)
        stream.reconfigure(line_buffering=True)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if watched:
        processes.shard_frozen = _watched_shard(processes.shard_frozen)
    sys.argv = [train.__file__, *args]
    runpy.run_path(train.__file__, run_name="__main__")


def _watched_shard(shard):
    def watched(decoder, device, world_size):
        whole = {name: p.numel() for name, p in decoder.layers.named_parameters()}
        shard(decoder, device, world_size)
        for name, p in decoder.layers.named_parameters():
            assert p.numel() == whole[name], name
            assert p.requires_grad or p.to_local().numel() == whole[name] // 2, name
        print("each process holds its share")
    return watched
