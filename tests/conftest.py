import copy
import os
import runpy
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach for the network
# here and in the runs that tests start: bit for bit holds for one number of threads, and several
# wait for each other longer than they compute on models as small as these
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402

from model import VLM  # noqa: E402
from support.options import TINY, Config  # noqa: E402
from world import scenes  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def loaded64():
    return VLM(TINY, dtype=torch.float64)


@pytest.fixture
def vlm64(loaded64):
    """The shipped model in float64, fresh for each test: to copy it takes less than to load it."""
    torch.manual_seed(0)
    return copy.deepcopy(loaded64)


@pytest.fixture(scope="session")
def shipped():
    """The shipped model as it comes, for tests that change nothing of it."""
    return VLM(TINY).eval()


@pytest.fixture(scope="session")
def mixed():
    """Ten training examples, two of each tool."""
    return scenes.make_world("mixed", "train", 10, seed=3)


@pytest.fixture
def config(tmp_path):
    """A run small enough for a test, with the paper's target: h_R of the current model."""
    return Config(regime="mixed", target_encoder="current", device="cpu", steps=4, batch=4,
                  out=str(tmp_path / "run"), train_examples=12, valid_examples=5,
                  test_per_family=2, eval_every=2, log_every=1, lora_rank=4, lora_alpha=8.0)


@pytest.fixture
def as_program(monkeypatch):
    """`python FILE ARGS` without a process of its own; SystemExit has what it ends with."""
    def run(file, *args):
        monkeypatch.setattr(sys, "argv", [str(file), *map(str, args)])
        runpy.run_path(str(file), run_name="__main__")

    handlers = {number: signal.getsignal(number) for number in (
        signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
