"""What a step costs: SFT, Pearl packed, Pearl plain, Pearl as released. Run by `python train.py --benchmark`.

    python analysis/benchmark.py 3B DIR --image_tokens 1024      # a Qwen2.5-VL of that size with random weights, to time
    python train.py --benchmark --model DIR --dtype bfloat16 --batch 4 --gradient_checkpointing --steps 10 --train_examples 100

packed: full and input view in one pass, the target by the current model in another, without gradient. packed_cached: the
target from the cache, no pass for it (the default). packed_trajectory: NextLat on the target view, so with gradient there.
plain: one pass a view. release: three views padded to one length, gradient in all.

The variants take turns on the same batches of one model in one process, so that whatever else the machine does hits all of
them; a row of the table is the median over --steps rounds after two to warm up. Peak memory is that of a variant's own
warm-up steps, model and optimiser included: on a GPU what PyTorch had allocated, on a CPU the bytes of all tensors alive at
once, counted as operations make them (what one operation needs inside is not seen). The last line is one JSON object.
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

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer, PreTrainedConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import losses  # noqa: E402
import train  # noqa: E402
from model import VLM  # noqa: E402

SIZES = {  # of Qwen2.5-VL's language models; their vision towers are alike
    "3B": dict(hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008,
               vocab_size=151936),
    "7B": dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, intermediate_size=18944,
               vocab_size=152064),
}
WARMUP = 2  # rounds: in the first the optimiser gets its state and the images their features


def true_config(size: str, layers: int = 0) -> PreTrainedConfig:
    """Qwen2.5-VL's config at that size, with the token ids of the shipped model; layers: fewer than its own, if above 0."""
    config = AutoConfig.from_pretrained(ROOT / "tiny-vlm")
    config.tie_word_embeddings = size == "3B"
    layers = layers or SIZES[size]["num_hidden_layers"]
    rope = dict(rope_type="default", mrope_section=[16, 24, 24], rope_theta=1e6)
    text = dict(SIZES[size], num_hidden_layers=layers, max_position_embeddings=128000, tie_word_embeddings=size == "3B",
                rope_parameters=rope, layer_types=["full_attention"] * layers)
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=SIZES[size]["hidden_size"],
                  patch_size=14, temporal_patch_size=2, window_size=112, fullatt_block_indexes=[7, 15, 23, 31])
    for part, values in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in values.items():
            setattr(part, name, value)
    return config


def random_checkpoint(size: str, out: Path, image_tokens: int, layers: int = 0) -> None:
    """A Qwen2.5-VL of true size, bfloat16 and random, with the shipped model's tokenizer; every image takes about image_tokens."""
    train.refuse_used_folder(out)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(true_config(size, layers), dtype=torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(ROOT / "tiny-vlm").save_pretrained(out)
    pixels = image_tokens * 28 * 28
    AutoImageProcessor.from_pretrained(ROOT / "tiny-vlm", patch_size=14, temporal_patch_size=2,
                                       size=dict(shortest_edge=pixels, longest_edge=pixels + pixels // 10)).save_pretrained(out)


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of all tensors alive, each storage once, and the most there were at once, also in the way back."""

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


def release_losses(vlm: VLM, extra, examples, rows: list[int], config):
    """Pearl's terms with the passes the authors' release makes: three views padded to one length, gradient in all of them."""
    views = [examples.views[row] for row in rows]
    features = train.image_features(vlm, examples, [i for v in views for i in v.full.images], config)
    width = max(len(v.ids) for three in views for v in three)
    padded = lambda name: data.collate([getattr(v, name) for v in views], vlm.pad_id, width=width)
    encoded = [train.encode(vlm, examples, padded(name), features, slots)
               for name, slots in (("full", None), ("input", extra.pred_tokens), ("target", None))]
    (full, states, inputs, _), (_, _, _, predicted), (_, _, _, embedding) = encoded
    rollout = extra.latent.rollout(states, inputs, full.labels != -100, config.horizon)
    total, parts = losses.pearl_loss(losses.vlm_loss(states, full.labels, vlm.logits),
                                     1 - torch.cosine_similarity(predicted, embedding, dim=-1).mean(),
                                     losses.nextlat_loss(states, rollout), config.lambda_latent)
    return total, parts, None


def benchmark(config) -> dict:
    torch.manual_seed(config.seed)
    cached = dataclasses.replace(config, method="pearl", nextlat_view="full", target_encoder="frozen", lr=0.0, valid_examples=2,
                                 steps=WARMUP + config.steps, accumulate=1)
    vlm, extra, _, optimizer, _, examples, _, _ = train.build(cached, world=1)
    vlm.train()
    parameters, pearl = optimizer.param_groups[0]["params"], dataclasses.replace(cached, target_encoder="current")
    ours = lambda **settings: (train.compute_losses, extra, dataclasses.replace(pearl, **settings))
    variants = dict(sft=(train.compute_losses, None, pearl), packed=ours(), packed_cached=(train.compute_losses, extra, cached),
                    packed_trajectory=ours(nextlat_view="trajectory"), plain=ours(packed=False),
                    release=(release_losses, extra, pearl))
    order = train.batches(len(examples.views), config.batch, config.seed)
    cuda = vlm.device.type == "cuda"
    times, memory, tokens = {name: [] for name in variants}, {name: 0.0 for name in variants}, []
    for step in range(cached.steps):
        rows = next(order)
        names = list(variants)[step % len(variants):] + list(variants)[:step % len(variants)]
        for name in names:
            compute, added, settings = variants[name]
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            count = LiveTensors() if step < WARMUP and not cuda else contextlib.nullcontext()  # counting costs time
            start = time.perf_counter()
            with count:
                with train.autocast(settings):
                    loss = compute(vlm, added, examples, rows, settings)[0]
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, config.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize()
            if step < WARMUP:
                memory[name] = max(memory[name], (torch.cuda.max_memory_allocated() if cuda else count.peak) / 2 ** 30)
            else:
                times[name].append((time.perf_counter() - start) * 1000)
        tokens.append(sum(len(examples.views[row].full.ids) for row in rows))
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{config.device}, {torch.get_num_threads()} CPU threads, batch {config.batch}, medians of {config.steps} rounds")
    print("variant             ms/step   / SFT   full-view tokens/s   peak GiB")
    for name, ms in median.items():
        print(f"{name:18s}{ms:9.1f}{ms / median['sft']:8.2f}{1000 * statistics.mean(tokens) / ms:21.0f}{memory[name]:11.2f}")
    numbers = {f"{name}_ms": round(ms, 2) for name, ms in median.items()}
    numbers |= {f"{name}_over_sft": round(ms / median["sft"], 3) for name, ms in median.items() if name != "sft"}
    print(json.dumps(numbers | {f"{name}_gib": round(gib, 3) for name, gib in memory.items()}))
    return numbers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("out", type=Path)
    parser.add_argument("--image_tokens", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=0, help="decoder layers, if fewer than the size has")
    args = parser.parse_args()
    try:
        random_checkpoint(args.size, args.out, args.image_tokens, args.layers)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
