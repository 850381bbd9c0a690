"""What a step costs: SFT, Pearl packed, Pearl plain, Pearl as released.

    python analysis/benchmark.py steps --steps 20 --train_examples 640     # options of train.py
    python analysis/benchmark.py 3B DIR --image_tokens 1024    # a Qwen2.5-VL of true size, random
    python analysis/benchmark.py steps --model DIR --dtype bfloat16 --batch 4 --steps 10 \\
        --gradient_checkpointing --train_examples 100

packed: full and input view in one pass, the target by the current model in another, without
gradient. packed_cached: the target from the cache, no pass for it (the default). packed_trajectory:
NextLat on the target view, so with gradient there. plain: one pass a view. release: one batch of
three views padded to one length, with gradient in all; latent predictor at every position, the head
at every position of all three and once more on the forecasts, for the token term.

The variants take turns on the same batches of one model in one process, so that whatever else the
machine does hits all of them; a row of the table is the median over --steps rounds after two to
warm up. Peak memory is that of a variant's own warm-up steps, model and optimiser included: on a
GPU what PyTorch had allocated, on a CPU the bytes of all tensors alive at once, counted as
operations make them (what one operation needs inside is not seen). The last line is one JSON
object.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import sys
import time
import weakref
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (AutoConfig, AutoImageProcessor, AutoModelForImageTextToText,
                          AutoTokenizer, PreTrainedConfig)

import train
from baselines.release import padded_losses
from support.options import TINY
from support.processes import run_program
from support.run_folder import refuse_used_folder

SIZES = {  # of Qwen2.5-VL's language models; their vision towers are alike
    "3B": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16,
               num_key_value_heads=2, intermediate_size=11008, vocab_size=151936),
    "7B": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28,
               num_key_value_heads=4, intermediate_size=18944, vocab_size=152064),
}
WARMUP = 2  # rounds: in the first the optimiser gets its state and the images their features


# ---- models of true size ------------------------------------------------------------------------


def true_config(size: str, layers: int = 0) -> PreTrainedConfig:
    """Qwen2.5-VL's config at that size, with the token ids of the shipped model; layers: fewer
    than its own, if above 0."""
    config = AutoConfig.from_pretrained(TINY)
    config.tie_word_embeddings = size == "3B"
    layers = layers or SIZES[size]["num_hidden_layers"]
    rope = dict(rope_type="default", mrope_section=[16, 24, 24], rope_theta=1e6)
    text = dict(SIZES[size], num_hidden_layers=layers, max_position_embeddings=128000,
                tie_word_embeddings=size == "3B", rope_parameters=rope,
                layer_types=["full_attention"] * layers)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14,
                  out_hidden_size=SIZES[size]["hidden_size"], temporal_patch_size=2,
                  window_size=112, fullatt_block_indexes=[7, 15, 23, 31])
    for part, values in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in values.items():
            setattr(part, name, value)
    return config


def random_checkpoint(size: str, out: Path, image_tokens: int, layers: int = 0) -> None:
    """A Qwen2.5-VL of true size, bfloat16 and random, with the shipped model's tokenizer; every
    image takes about image_tokens."""
    refuse_used_folder(out)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(true_config(size, layers), dtype=torch.bfloat16)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(out)
    pixels = image_tokens * 28 * 28
    edges = dict(shortest_edge=pixels, longest_edge=pixels + pixels // 10)
    AutoImageProcessor.from_pretrained(TINY, patch_size=14, temporal_patch_size=2,
                                       size=edges).save_pretrained(out)


# ---- what is measured ---------------------------------------------------------------------------


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors alive, each storage once, and the most there were at once,
    also in the way back."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, torch.nn.Parameter):
                self.count(thing)

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.freed, storage._cdata)

    def freed(self, address: int) -> None:
        self.now -= self.sizes.pop(address)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return made


def variants(run: train.Run, cached: train.Config) -> dict[str, train.Step]:
    """Each variant's losses as a module, all of one model and on the same examples."""
    step, current = run.step, dataclasses.replace(cached, target_encoder="current")

    def variant(predictor, config: train.Config) -> train.Step:
        return train.Step(step.vlm, predictor, step.examples, config)

    trajectory = dataclasses.replace(current, nextlat_view="trajectory")
    plain = dataclasses.replace(current, packed=False)
    found = dict(sft=variant(None, current), packed=variant(step.predictor, current),
                 packed_cached=variant(step.predictor, cached),
                 packed_trajectory=variant(step.predictor, trajectory),
                 plain=variant(step.predictor, plain), release=variant(step.predictor, current))
    found["release"].losses = padded_losses
    return found


def one_step(module: train.Step, optimizer, rows: list[int], clip: float,
             count: LiveTensors | None) -> tuple[float, float]:
    """(milliseconds, peak GiB) of a forward and backward pass, clipping and the optimiser's step;
    on a CPU the peak needs a `count`, which takes time, and is 0 without."""
    cuda = module.vlm.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with count or contextlib.nullcontext():
        module(rows).total.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    if cuda:
        torch.cuda.synchronize()
    taken = (time.perf_counter() - start) * 1000
    peak = torch.cuda.max_memory_allocated() if cuda else count.peak if count else 0
    return taken, peak / 2 ** 30


def benchmark(config: train.Config) -> dict[str, float]:
    """Prints the table and the JSON line; returns its numbers. Writes nothing."""
    torch.manual_seed(config.seed)
    cached = dataclasses.replace(config, method="pearl", nextlat_view="full", accumulate=1, lr=0.0,
                                 target_encoder="frozen", targets="own", valid_examples=2,
                                 test_per_family=1, steps=WARMUP + config.steps)
    run = train.build(cached)
    run.step.vlm.train()
    modules, order = variants(run, cached), run.step.examples.steps(cached)
    times, memory, tokens = {name: [] for name in modules}, dict.fromkeys(modules, 0.0), []
    for step in range(cached.steps):
        rows, names = next(order), list(modules)
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:  # another one begins each round
            counted = step < WARMUP and run.step.vlm.device.type != "cuda"
            taken, peak = one_step(modules[name], run.optimizer, rows, config.clip,
                                   LiveTensors() if counted else None)
            if step < WARMUP:
                memory[name] = max(memory[name], peak)
            else:
                times[name].append(taken)
        tokens.append(sum(len(run.step.examples.views[row].full.ids) for row in rows))
    median = {name: statistics.median(values) for name, values in times.items()}
    print_table(config, median, memory, statistics.mean(tokens))
    numbers = {f"{name}_ms": round(ms, 2) for name, ms in median.items()}
    numbers |= {f"{name}_over_sft": round(ms / median["sft"], 3) for name, ms in median.items()
                if name != "sft"}
    numbers |= {f"{name}_gib": round(gib, 3) for name, gib in memory.items()}
    print(json.dumps(numbers))
    return numbers


def print_table(config: train.Config, median: dict[str, float], memory: dict[str, float],
                tokens: float) -> None:
    """tokens: of the full views of one step."""
    print(f"{config.device}, {torch.get_num_threads()} CPU threads, batch {config.batch}, medians "
          f"of {config.steps} rounds")
    print("variant             ms/step   / SFT   full-view tokens/s   peak GiB")
    for name, ms in median.items():
        print(f"{name:18s}{ms:9.1f}{ms / median['sft']:8.2f}{1000 * tokens / ms:21.0f}"
              f"{memory[name]:11.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("steps", help="time the variants' steps; takes the options of train.py")
    for size in SIZES:
        made = commands.add_parser(size, help=f"write a random Qwen2.5-VL-{size}, to time")
        made.add_argument("out", type=Path, metavar="DIR")
        made.add_argument("--image_tokens", type=int, default=1024)
        made.add_argument("--layers", type=int, default=0, help="decoder layers, if fewer than its")
    if sys.argv[1:2] == ["steps"]:  # these options are train.py's to read
        benchmark(train.parse_config(sys.argv[2:]))
        return
    args = parser.parse_args()
    random_checkpoint(args.command, args.out, args.image_tokens, args.layers)


if __name__ == "__main__":
    run_program(main)
