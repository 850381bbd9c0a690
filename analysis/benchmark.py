"""What a step costs: SFT, Pearl packed, Pearl plain, Pearl as released. Run by `python train.py --benchmark`.

packed: full and input view in one pass, the target by the current model in another, without gradient. packed_cached: the
target from the cache, no pass for it (the default). packed_trajectory: NextLat on the target view, so with gradient there.
plain: one pass a view. release: three views padded to one length, gradient in all.

The variants take turns on the same batches of one model in one process, so that whatever else the machine does hits all of
them; a row of the table is the median over --steps rounds after three to warm up. The last line is one JSON object.
"""

import dataclasses
import json
import resource
import statistics
import time

import torch

import data
import losses
import train
from model import VLM


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
    vlm = VLM(config.model, dtype=getattr(torch, config.dtype)).to(config.device)
    world = train.load_examples(dataclasses.replace(config, valid_examples=2))[0]
    vlm.set_trainable(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets.split(","), config.train_vision)
    pearl = dataclasses.replace(config, method="pearl", nextlat_view="full", target_encoder="current")
    examples = train.Examples(world, vlm, pearl)
    train.cache_targets(vlm, examples, pearl)
    extra = train.additions(vlm, examples, pearl)
    parameters = [p for module in (vlm, extra) for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    ours = lambda **settings: (train.compute_losses, extra, dataclasses.replace(pearl, **settings))
    variants = dict(sft=(train.compute_losses, None, pearl), packed=ours(), packed_cached=ours(target_encoder="frozen"),
                    packed_trajectory=ours(nextlat_view="trajectory"), plain=ours(packed=False),
                    release=(release_losses, extra, pearl))
    order = train.batches(len(world), config.batch, config.seed)
    cuda = vlm.device.type == "cuda"
    times, memory, tokens = {name: [] for name in variants}, {name: 0.0 for name in variants}, []
    for step in range(3 + config.steps):
        rows = next(order)
        names = list(variants)[step % len(variants):] + list(variants)[:step % len(variants)]
        for name in names:
            compute, added, settings = variants[name]
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            start = time.perf_counter()
            with train.autocast(settings):
                loss = compute(vlm, added, examples, rows, settings)[0]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize()
                memory[name] = max(memory[name], torch.cuda.max_memory_allocated() / 2 ** 30)
            if step >= 3:
                times[name].append((time.perf_counter() - start) * 1000)
        tokens.append(sum(len(examples.views[row].full.ids) for row in rows))
    median = {name: statistics.median(values) for name, values in times.items()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
    print(f"{config.device}, {torch.get_num_threads()} CPU threads, batch {config.batch}, medians of {config.steps} rounds"
          + ("" if cuda else f"; peak memory of the process {peak:.2f} GiB"))
    print("variant             ms/step   / SFT   full-view tokens/s" + ("   peak GiB" if cuda else ""))
    for name, ms in median.items():
        gib = f"{memory[name]:11.2f}" if cuda else ""
        print(f"{name:18s}{ms:9.1f}{ms / median['sft']:8.2f}{1000 * statistics.mean(tokens) / ms:21.0f}{gib}")
    numbers = {f"{name}_ms": round(ms, 2) for name, ms in median.items()}
    numbers |= {f"{name}_over_sft": round(ms / median["sft"], 3) for name, ms in median.items() if name != "sft"}
    print(json.dumps(numbers | ({f"{name}_gib": round(gib, 2) for name, gib in memory.items()} if cuda else {})))
    return numbers
