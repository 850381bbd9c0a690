"""What all tests share: the shipped model, a few records, and a method built on both. Models are
float64; the norms of transformers compute in float32, so states agree to about seven digits."""

import copy
import functools
import itertools
import json
import os
import runpy
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing in the tests may reach for the network
# bit for bit holds for one number of threads; several only wait on a model as small as this
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402

import checkpoints  # noqa: E402
import losses  # noqa: E402
import train  # noqa: E402
from data import collate  # noqa: E402
from model import VLM, lora_layers  # noqa: E402
from support import processes  # noqa: E402
from support.families import load_checkpoint  # noqa: E402
from world import loader  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
TINY = train.Config().model


@pytest.fixture(scope="session")
def shipped():
    """The shipped model as it comes; not to be changed."""
    return VLM(TINY).eval()


@pytest.fixture(scope="session")
def loaded64():
    return VLM(TINY, torch.float64).eval()


@pytest.fixture
def vlm64(loaded64):
    """The same in float64, fresh for each test: a copy takes less time than loading."""
    torch.manual_seed(0)
    return copy.deepcopy(loaded64)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """name -> folder of that checkpoint, built at its first use; not to be changed."""
    @functools.cache
    def folder(name):
        if name in checkpoints.TORCHVISION:
            pytest.importorskip("torchvision")
        built = tmp_path_factory.mktemp(name)
        return Path(TINY) if name == "tiny" else checkpoints.build(name, built)

    return folder


@pytest.fixture(scope="session")
def mixed():
    """Ten training records with one tool image each, of all four tools."""
    return loader.examples("mixed", "train", 10, seed=3)


def build(vlm, name, examples, **options):
    """--method `name` on these records in float64, away from its zero starts, and their batch."""
    torch.manual_seed(0)
    config = train.config_class(name)(**dict(method=name, device="cpu", lora_rank=4) | options)
    method = stir(train.find_method(name)(vlm, config).double())
    dataset = train.dataset(method, examples, "train")
    method.prepare([dataset])
    return method, dataset.micro_batches(list(range(len(dataset))), len(dataset))[0]


def images_of(method, batch):
    return method.encode_images([image for example in batch for image in example.images])


def pair_of(method, batch):
    """h^_R and h_R of the current model, each view in a pass of its own."""
    images, rows = images_of(method, batch), method.predictor.pred_embeddings
    return [torch.cat([embed(method.vlm, example.views[n], images, injected).embedding
                       for example in batch]) for n, injected in ((1, rows), (2, None))]


def terms_of(method, batch):
    """The terms of a step with their graphs, by name."""
    terms, real = {}, losses.Losses.of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses.Losses, "of", lambda total, pair, **parts: terms.update(
            parts, loss=total) or real(total, pair, **parts))
        method(batch)
    return terms


def stir(module, std=0.05):
    """Trained weights that start from zero (LoRA's B) would hide half of all gradients."""
    torch.manual_seed(1)
    for p in module.parameters():
        if p.requires_grad and not p.any():
            torch.nn.init.normal_(p, std=std)
    return module


def move(module, size=0.02):
    """All that trains, away from where it was."""
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p += size * torch.randn_like(p)
    return module


def gradients(loss, module):
    """The gradient of each trained weight, by name; zeros where none arrives."""
    names, weights = zip(*((n, p) for n, p in module.named_parameters()
                           if p.requires_grad and p.numel()))
    grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, weights, grads)}


def assert_close(one, other, digits=5):
    """Dicts of tensors are equal, to so many digits of the largest entry of each."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        size = float(other[name].abs().max())
        torch.testing.assert_close(value, other[name], rtol=0, atol=size * 10.0 ** -digits + 1e-12,
                                   msg=lambda text, name=name: f"{name}: {text}")


def assert_same(value, naive, module, rtol=1e-5, atol=1e-7, digits=4):
    """Equal values, and equal gradients of all that trains."""
    torch.testing.assert_close(value, naive, rtol=rtol, atol=atol)
    assert_close(gradients(value, module), gradients(naive, module), digits)


def merged_weights(vlm):
    """Every weight by its name in the plain model, W + (alpha / r) B A in the places of LoRA."""
    weights = {name.replace(".base.", "."): weight for name, weight in vlm.lm.state_dict().items()
               if "lora_" not in name}
    for name, layer in lora_layers(vlm.lm).items():
        weights[f"{name}.weight"] = layer.base.weight + layer.scaling * layer.lora_B @ layer.lora_A
    return weights


def train_until(config, step):
    """A run that is asked to stop during that step."""
    steps = itertools.count(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "asked_to_stop", lambda *_: next(steps) == step)
        return train.train(config)


def log_of(out):
    """The lines of a run's log without their times."""
    lines = (Path(out) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items()
             if name not in ("ms", "waited")} for line in lines]


def refuses(path, message):
    """As --model, in one sentence."""
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(str(path), torch.float32)
    assert "\n" not in str(error.value)


def embed(vlm, view, images, rows=None):
    """One view in a pass of its own."""
    return vlm(collate([view], vlm.pad_id), images, rows)


@pytest.fixture
def as_program(monkeypatch):
    """`python FILE ARGS` without a process of its own; SystemExit has its exit status."""
    def run(file, *args):
        monkeypatch.setattr(sys, "argv", [str(file), *map(str, args)])
        runpy.run_path(str(file), run_name="__main__")

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
