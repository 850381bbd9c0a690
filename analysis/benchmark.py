"""What training costs: time and memory of a step.

    python analysis/benchmark.py --steps 20 --train_examples 640    # takes the options of train.py

SFT; Pearl with the cached target (the default), with the current model's, with one pass a view too,
and with Eq. 2 along R, which needs a gradient there (the paper). The variants take turns on the
same batches, so that other work on the machine slows all of them. A row is the median over --steps
rounds after two to warm up. Peak GiB, model included: what PyTorch allocated on a GPU; 0 on a CPU.
The last line is one JSON object.
"""

import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`
import torch

import train
from data import StepRows
from model import VLM
from support import processes, run, splits

VARIANTS = dict(sft="sft", cached="pearl", current="current", two_passes="two_passes+current",
                paper="paper")
WARMUP = 2  # rounds: in the first the optimiser gets its state and the images their features


def now(device: str) -> float:
    """Seconds, when all work is done: a GPU lags behind Python."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def build(config: train.Config) -> dict[str, train.Pearl]:
    """The variants by name, all around one model."""
    vlm = VLM(config.model, config.dtype, config.min_pixels, config.max_pixels)
    methods = {}
    for name, method in VARIANTS.items():
        methods[name] = train.find_method(method)(vlm, config).train()
        # every picture is encoded once for all of them
        methods[name].encode_images = methods["sft"].encode_images
        # the first one has put LoRA around the layers, and they need it only once
        vlm.set_trainable = lambda *_: None
    return methods


def steps(config: train.Config) -> dict[str, float]:
    """Prints the table; returns its numbers. Writes nothing."""
    torch.manual_seed(config.seed)
    methods, examples = build(config), splits.load_splits(config)[0]
    sets = {name: train.dataset(method, examples, "train") for name, method in methods.items()}
    trained = {p for method in methods.values() for p in method.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained, lr=0.0)
    rounds, names = {name: [] for name in methods}, list(methods)  # (milliseconds, peak GiB)
    order = iter(StepRows(len(examples), config.batch, config.seed))
    for step in range(WARMUP + config.steps):
        rows, turn = next(order), step % len(names)
        for name in names[turn:] + names[:turn]:  # each round begins with another variant
            method, (batch,) = methods[name], sets[name].micro_batches(rows, config.batch)
            # pictures and cached targets cost nothing after the first epoch
            images = method.encode_images([image for example in batch for image in example.images])
            if name == "cached":
                method.target(batch, images)
            if config.device.startswith("cuda"):
                torch.cuda.reset_peak_memory_stats()
            start = now(config.device)
            with run.autocast(config):
                total = method(batch).total
            total.backward()
            torch.nn.utils.clip_grad_norm_(trained, method.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rounds[name].append((1000 * (now(config.device) - start),
                                 torch.cuda.max_memory_allocated() / 2 ** 30))
    print(f"{config.device}, {torch.get_num_threads()} CPU threads, batch {config.batch}, medians "
          f"of {config.steps} rounds\nvariant       ms/step   / SFT   peak GiB")
    numbers: dict[str, float] = {}
    for name, pairs in rounds.items():
        ms, gib = statistics.median(ms for ms, _ in pairs[WARMUP:]), max(gib for _, gib in pairs)
        ratio = ms / numbers.get("sft_ms", ms)
        print(f"{name:12s}{ms:9.1f}{ratio:8.2f}{gib:11.2f}")
        numbers |= {f"{name}_ms": ms, f"{name}_over_sft": ratio, f"{name}_gib": gib}
    return numbers


def main() -> None:
    numbers = steps(train.parse_config())
    print(json.dumps({name: round(n, 3) for name, n in numbers.items()}))


if __name__ == "__main__":
    processes.run_program(main)
