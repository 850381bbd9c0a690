"""Train a VLM with Pearl, or with plain SFT, on expert tool-use trajectories (section 3 of arXiv:2604.08065).

    python train.py                                    # Pearl on the shipped VLM, five tool families: minutes on two cores
    python train.py --method sft                       # the baseline: the same words, no latent terms, no second pass
    python train.py --method direct                    # the control: question and answer, no trajectory
    python train.py --method both --batch 64           # the plain alternative: trajectories and bare answers, half and half
    python train.py --method recon                     # reconstruction-based latent reasoning (LVR; --latents 4: Mirage)
    python train.py --recipe paper                     # the paper's literal text; --recipe release: the authors' code
    python train.py --model Qwen/Qwen2.5-VL-3B-Instruct --data DIR --dtype bfloat16 --lr 1e-5     # your model, your data

One step of Pearl encodes three views and goes back once:
  1. full view <I0, Q, R>    -> L_VLM (Eq. 3) on the expert's words, and states for L_NextLat (Eq. 2)
  2. input view <I0, Q> + K [PRED] -> h^_R, the state of the last [PRED]
  3. target view R           -> h_R, the state of its last token, without gradient   -> L_JEPA (Eq. 1)
The first two share <I0, Q> and one forward pass (data.pack); --packed false gives each its own, with the same numbers.
SFT is the first pass alone; the reconstruction baseline is one pass too, its tool images replaced by latents. A run folder
holds config.json, environment.json, before.json, log.jsonl, state.safetensors, best.json, checkpoint-STEP/ and results.json.

    python train.py --resume RUN                                    # goes on after an interruption, to the same end
    python train.py --merge RUN DIR                                 # the result as an ordinary transformers checkpoint
    torchrun --nproc-per-node=2 train.py --accumulate 2             # several processes share a step's passes
"""

import argparse
import dataclasses
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import get_cosine_schedule_with_warmup

import data
import evaluate
import losses
from analysis.tables import format_table, summarise
from model import VLM, read_json, read_tensors, write_tensors
from predictor import LatentScale, Predictor
from world import scenes

METHODS, NEXTLAT_VIEWS = ("pearl", "sft", "direct", "both", "recon"), ("full", "trajectory", "none")


@dataclass
class Config:
    """One run. Every field is a command-line option of the same name; defaults are the run that the README reports."""

    method: str = "pearl"  # pearl, sft (L_VLM alone), direct (SFT on the answer alone), both (of these), recon (latents)
    recipe: str = "ours"  # ours, paper or release: sets the fields listed in RECIPES; options given beside it win
    regime: str = "mixed"  # the world's trajectories: single, mixed, multi or all (world/scenes.py, REGIMES)
    model: str = str(Path(__file__).resolve().parent / "tiny-vlm")  # checkpoint folder or hub id
    data: str = ""  # a data folder in the README's format; empty: the procedural world
    outside_images: bool = False  # image paths and links may leave the data folder
    check_data: bool = False  # train nothing: read and serialise everything once, report what is wrong and what is there
    out: str = ""  # run folder; empty: runs/METHOD-REGIME-seedSEED
    seed: int = 0  # initial weights, data order, dropout
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # any PyTorch device
    dtype: str = "float32"  # of the frozen weights; on a GPU the arithmetic is bfloat16 either way (autocast)

    order: str = "text_first"  # of a trajectory: text_first (call, then image: the data's) or image_first (the paper's R)
    lambda_latent: float = 5.0  # Eq. 4; the paper has 0.2. Of method recon: the weight of the reconstruction loss
    pred_tokens: int = 4  # K; 0: h^_R is the state of the last prompt token
    distance: str = "cosine"  # D of Eq. 1: cosine, smoothl1, mse, l2
    jepa: bool = True  # false: L = L_VLM + lambda L_NextLat, an ablation
    targets: str = "own"  # of L_JEPA: own, or a control: shuffled, random, family, answer (control_targets, average_targets)
    target_encoder: str = "frozen"  # whose Enc gives h_R: current (the paper's), or the model of the start's, cached once
    center: bool = False  # subtract the running mean of h_R from both embeddings before D (losses.jepa_loss)
    target_view: str = "trajectory"  # what h_R sees: trajectory (R alone), trajectory_with_image (I0 too, no question)
    nextlat_view: str = "full"  # whose states Eq. 2 runs along: full, trajectory, none (no L_NextLat)
    nextlat_sees_next: bool = True  # the latent predictor is given the next token's embedding
    nextlat_token: bool = False  # add the released code's cross-entropy of the forecast states
    horizon: int = 1  # d of Eq. 2, in tokens
    packed: bool = True  # full and input view in one forward pass; false: one pass a view, the same numbers (the readable way)
    latents: int = 0  # of method recon, a tool image: 0: one for each of its image tokens (LVR); k: k chunk means (Mirage)
    decode_latents: int = 8  # of method recon: latents decoded at inference

    steps: int = 300  # optimiser steps
    batch: int = 32  # examples in one forward pass
    accumulate: int = 1  # forward passes in one optimiser step
    lr: float = 1e-3  # peak; linear warm-up, then cosine to zero
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.0  # of AdamW
    clip: float = 1.0  # gradient norm
    lora_rank: int = 64  # 0: train all weights of the language model
    lora_alpha: float = 128.0  # the low-rank product counts alpha / rank times
    lora_dropout: float = 0.0  # of what enters the low-rank product
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # comma-separated layer names
    train_vision: bool = False  # also train the vision tower; off: its features are computed once for the whole run
    workers: int = 2  # threads that prepare the images of the next pass while this one is computed
    feature_cache_gb: float = 2.0  # most memory for those features
    feature_cache: str = ""  # a folder to keep them in from run to run; empty: memory only
    shard: bool = False  # with several processes: each holds a share of the frozen layers (FSDP), for a model that does not fit
    gradient_checkpointing: bool = False  # recompute the layers' activations on the way back: less memory, a third more time

    train_examples: int = 1500  # of the world; of a folder, all
    valid_examples: int = 150  # of a folder, at most so many
    test_per_family: int = 120  # of a folder, at most so many
    test_split: str = "test"  # validation, when settings are being chosen
    call_limit: int = 0  # after training, also test explicit tool use with at most so many calls
    track: int = 0  # at each validation, also ask so many validation questions, directly and with the expert's tool
    world_seed: int = 0  # of the scenes; a data set of its own for every value
    eval_every: int = 50  # steps between validations; the checkpoint with the lowest validation loss is kept
    log_every: int = 10  # steps between log lines
    save_every: int = 50  # steps between states to --resume from
    max_tokens: int = 2048  # longest view
    answer_prefix: str = "Answer:"  # what a final text puts before the answer
    benchmark: bool = False  # train nothing, time steps instead: SFT, packed, plain, as released (analysis/benchmark.py)


EXTRA_FILES = {Predictor: "predictor.safetensors", LatentScale: "latents.safetensors"}  # beside the adapter
RECIPES = {
    "ours": {},
    "paper": dict(lambda_latent=0.2, distance="smoothl1", target_encoder="current", target_view="trajectory",
                  nextlat_view="trajectory", nextlat_sees_next=False),
    "release": dict(lambda_latent=0.2, distance="cosine", target_encoder="current", target_view="trajectory_with_image",
                    nextlat_view="full", nextlat_sees_next=True, nextlat_token=True, lora_dropout=0.1, weight_decay=0.1),
}
CHOICES = dict(method=METHODS, recipe=tuple(RECIPES), regime=tuple(scenes.REGIMES), distance=losses.DISTANCES,
               target_encoder=("current", "frozen"), test_split=("test", "validation"), order=("text_first", "image_first"),
               targets=("own", "shuffled", "random", "family", "answer"), target_view=data.TARGET_VIEWS, nextlat_view=NEXTLAT_VIEWS,
               dtype=("float32", "bfloat16"))


def parse_config(argv: list[str] | None = None) -> Config:
    """Config from the command line: one option a field, with - or _; unknown names and values stop with the list of known ones."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def boolean(text: str) -> bool:
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError("write true or false")
        return text.lower() == "true"

    # the comments above are the help
    meaning = dict(re.findall(r"^    (\w+): .+?  # (.+)$", inspect.getsource(Config), re.MULTILINE))
    for f in dataclasses.fields(Config):
        kind = boolean if f.type in (bool, "bool") else type(f.default)
        switch = dict(nargs="?", const=True) if kind is boolean else {}  # --packed alone, or --packed false
        parser.add_argument(f"--{f.name}", type=kind, choices=CHOICES.get(f.name), default=argparse.SUPPRESS, **switch,
                            metavar=None if f.name in CHOICES else kind.__name__.upper(),
                            help=f"{meaning.get(f.name, '')} (default: {f.default!r})".replace("%", "%%"))
    underscored = lambda a: re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), a)
    given = vars(parser.parse_args([underscored(a) for a in (sys.argv[1:] if argv is None else argv)]))
    config = Config(**{**RECIPES[given.get("recipe", "ours")], **given})
    for name, least in dict(steps=1, batch=1, accumulate=1, pred_tokens=0, horizon=1, latents=0, decode_latents=0, lora_rank=0,
                            train_examples=1, valid_examples=2, workers=0, test_per_family=1, eval_every=1, log_every=1,
                            save_every=1, lambda_latent=0, lr=0).items():
        if getattr(config, name) < least:
            parser.error(f"--{name} must be at least {least}, not {getattr(config, name)}")
    if config.targets == "shuffled" and config.batch < 2:
        parser.error("--targets shuffled needs --batch 2 or more")
    if config.targets in ("family", "answer") and config.target_encoder != "frozen":
        parser.error(f"--targets {config.targets} is a mean over the data set, which only --target_encoder frozen has at hand")
    config.out = config.out or f"runs/{config.method}-{config.regime}-seed{config.seed}"
    return config


def read_config(argv: list[str]) -> Config:
    """The config of a run to resume: everything as it was, nothing may be changed."""
    if len(argv) != 1:
        raise ValueError("--resume takes the run folder and nothing else: the run goes on with its own config.json")
    file = Path(argv[0]) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: {argv[0]} is not a run folder")
    if (file.parent / "results.json").is_file():
        raise ValueError(f"{argv[0]} is finished: its results are in results.json")
    known, saved = {f.name for f in dataclasses.fields(Config)}, read_json(file)
    if unknown := saved.keys() - known:
        raise ValueError(f"{file} has the unknown field {sorted(unknown)[0]!r}: it was written by another version")
    return Config(**saved | dict(out=argv[0]))


# ---- data -------------------------------------------------------------------------------------------------------------


def variant(example: data.Example, config: Config) -> data.Example:
    """The example as this run's method is to learn it."""
    if config.method == "direct":
        return example.answer_only(config.answer_prefix)
    return example.image_first() if config.order == "image_first" else example


class Examples:
    """Examples of one split, ready for the loop: their three views as token ids, their images as patches."""

    def __init__(self, examples: list[data.Example], vlm: VLM, config: Config):
        serializer = data.Serializer(vlm.tokenizer, vlm.placeholder_id, min(config.max_tokens, vlm.max_positions))
        self.store = data.ImageStore(vlm.family, config.workers)
        self.given = examples
        examples = [variant(ex, config) for ex in examples]
        if config.method == "both":
            examples += [ex.answer_only(config.answer_prefix) for ex in self.given]
        placed = [self.store.add(ex) for ex in examples]
        self.views = [serializer.views(ex, *place, config.pred_tokens, config.target_view) for ex, place in zip(examples, placed)]
        if config.method == "recon":
            if missing := {data.LATENT_START, data.LATENT_END} - vlm.tokenizer.get_vocab().keys():
                raise ValueError(f"--method recon marks its latents with {sorted(missing)[0]}, which this model's vocabulary "
                                 "lacks: use a Qwen-VL model")
            self.latent_views = [serializer.latent_view(ex, *place, config.latents) for ex, place in zip(examples, placed)]
        self.targets: dict[int, Tensor] = {}  # by row (D): h_R of the model before training, if it was cached
        self.features: dict[int, Tensor] = {}  # by image; filled by image_features when the vision tower is frozen
        self.feature_bytes = 0
        if config.feature_cache:
            self.fingerprint = vlm.vision_fingerprint()
            Path(config.feature_cache).mkdir(parents=True, exist_ok=True)

    def prefetch(self, rows: list[int]) -> None:
        images = dict.fromkeys(i for row in rows for i in self.views[row].full.images)
        self.store.prefetch([i for i in images if i not in self.features])


def load_examples(config: Config) -> list[list[data.Example]]:
    """Training, validation and test examples, from the user's folder or drawn from the world.

    Of a folder with more, as many validation and test examples are drawn as the world would give.
    """
    if not config.data:
        seed, families = config.world_seed, scenes.REGIMES[config.regime]
        return [scenes.make_world(config.regime, "train", config.train_examples, seed),
                scenes.make_world(config.regime, "validation", config.valid_examples, seed),
                evaluate.test_examples("", families, config.test_per_family, seed, config.test_split)]
    examples = data.read_folder(config.data, config.outside_images)
    found = []
    for split, least in (("train", 2), ("validation", 2), (config.test_split, 1)):
        found.append([ex for ex in examples if ex.split == split])
        if len(found[-1]) < least:
            raise ValueError(f"{config.data} has {len(found[-1])} records in the {split} split, {least} or more are needed: "
                             f"set \"split\": \"{split}\" in some records, or add records")
    rng, (train_rows, valid_rows, test_rows) = random.Random(config.world_seed), found
    most = lambda rows, n: rows if len(rows) <= n else rng.sample(rows, n)
    families = dict.fromkeys(ex.family for ex in test_rows)
    tests = [ex for f in families for ex in most([ex for ex in test_rows if ex.family == f], config.test_per_family)]
    return [train_rows, most(valid_rows, config.valid_examples), tests]


def check_data(config: Config) -> None:
    """Read, place and serialise every example as a run would, and report. Raises ValueError if any cannot be used."""
    vlm, problems, lengths, sizes = VLM(config.model), [], [], []
    config = dataclasses.replace(config, feature_cache="", workers=0)
    examples = (data.read_folder(config.data, config.outside_images, problems) if config.data
                else [ex for part in load_examples(config)[:2] for ex in part])
    for ex in examples:
        try:
            lengths.append(max(len(view.ids) for view in Examples([ex], vlm, config).views[0]))
            sizes += [data.image_size(picture) for picture in ex.images]
        except ValueError as error:
            problems.append(str(error))
    splits = ", ".join(f"{sum(ex.split == split for ex in examples)} {split}" for split in data.SPLITS)
    print(f"{config.data or config.regime}: {len(examples)} records are well-formed; {splits}")
    for family in dict.fromkeys(ex.family for ex in examples):
        calls = [len(ex.images) - 1 for ex in examples if ex.family == family]
        print(f"  {family}: {len(calls)} records, {min(calls)} to {max(calls)} tool images")
    if lengths:
        mean = sum(lengths) / len(lengths)
        print(f"  tokens of the longest view: {mean:.0f} on average, at most {max(lengths)} (limit {config.max_tokens})")
        print(f"  images: {len(sizes)}, from {min(sizes)} to {max(sizes)} px")
    if problems:
        raise ValueError("\n  ".join([f"{len(problems)} records cannot be used:", *problems[:20], *["..."] * (len(problems) > 20)]))


def step_rows(examples: Examples, config: Config):
    """The examples of one optimiser step after another. Sorted by length, so that passes of one step need little padding."""
    for rows in batches(len(examples.views), config.batch * config.accumulate, config.seed):
        yield sorted(rows, key=lambda row: len(examples.views[row].full.ids)) if config.accumulate > 1 else rows


def batches(count: int, size: int, seed: int):
    """Indices of one batch after another, for ever: every example once an epoch, in an order given by the seed alone."""
    order, generator = [], torch.Generator().manual_seed(seed)
    while True:
        while len(order) < size:
            order += torch.randperm(count, generator=generator).tolist()
        yield order[:size]
        order = order[size:]


# ---- one step ---------------------------------------------------------------------------------------------------------


def image_features(vlm: VLM, examples: Examples, indices: list[int], config: Config) -> dict[int, Tensor]:
    """Features of the images: each encoded once for all views, and, when the vision tower is frozen, once for the whole run
    (as much as fits into memory) or, with --feature_cache, once for all runs."""
    store, wanted = examples.store, sorted(set(indices))
    if config.train_vision:
        return dict(zip(wanted, vlm.encode_images([store.inputs(i) for i in wanted])))
    found = {i: examples.features[i] for i in wanted if i in examples.features}
    new = {}
    for i in set(wanted) - found.keys() if config.feature_cache else ():
        if (file := feature_file(examples, i, config)).is_file():
            new[i] = read_tensors(file)[0]["features"].to(vlm.device)
    if missing := [i for i in wanted if i not in found and i not in new]:
        with torch.no_grad():
            made = vlm.encode_images([store.inputs(i) for i in missing])
        for i, features in zip(missing, made):
            new[i] = features.clone()  # a slice would keep the whole batch's features alive
            if config.feature_cache:
                file = feature_file(examples, i, config)
                own = file.with_name(f"{os.getpid()}-{file.name}")  # several runs may fill one cache
                write_tensors(dict(features=new[i].cpu()), own)
                os.replace(own, file)
    if examples.feature_bytes < config.feature_cache_gb * 1e9:
        examples.features |= new
        examples.feature_bytes += sum(f.nbytes for f in new.values())
    return found | new


def feature_file(examples: Examples, index: int, config: Config) -> Path:
    """Named by the image's pixels and by all else that its features depend on, so no other image or model is answered with them."""
    image = data.opened(examples.store.pictures[index])
    name = hashlib.sha256(f"{examples.fingerprint} {image.size}".encode() + image.tobytes()).hexdigest()
    return Path(config.feature_cache) / f"{name}.safetensors"


def encode(vlm: VLM, examples: Examples, batch: data.Batch, features: dict[int, Tensor], slots: Tensor | None = None):
    """Enc of a batch of views: (batch, states (B, T, D), input embeddings (B, T, D), the views' embeddings (B, D)).

    slots (n, D): the embeddings of all slots of the batch, or of one row of it, the same for every row ([PRED]).
    """
    batch = batch.to(vlm.device)
    if slots is not None and len(slots) < int(batch.slots.sum()):
        slots = slots.repeat(len(batch.ids), 1)
    states, inputs = vlm(batch, [features[i] for i in batch.images], [examples.store.grids[i] for i in batch.images], slots)
    embedding = states[torch.arange(len(states), device=vlm.device), batch.embed_at]
    return batch, states, inputs, embedding


def additions(vlm: VLM, examples: Examples, config: Config) -> Predictor | LatentScale | None:
    """What the method adds to the VLM while it trains: Pearl its predictor, reconstruction its scale, SFT nothing."""
    if config.method == "pearl" and config.lambda_latent > 0:
        end_id = data.Serializer(vlm.tokenizer, vlm.placeholder_id, 0).end_id
        start = vlm.lm.get_input_embeddings()(torch.tensor(end_id, device=vlm.device))  # (D)
        return Predictor(vlm.dim, config.pred_tokens, start, config.nextlat_sees_next).to(config.device)
    if config.method == "recon":
        tool_images = [i for v in examples.views for i in v.full.images[1:]]
        if not tool_images:
            raise ValueError("no trajectory has a tool image: there is nothing for --method recon to reconstruct")
        with torch.no_grad():
            parts = [image_features(vlm, examples, tool_images[n:n + 64], config) for n in range(0, len(tool_images), 64)]
        embeddings = torch.cat([latent_targets(f[0], config.latents) for part in parts for f in part.values()])
        return LatentScale(embeddings, vlm.lm.get_decoder().norm.weight).to(config.device)
    return None


def compute_losses(vlm: VLM, extra: Predictor | LatentScale | None, examples: Examples, rows: list[int], config: Config):
    """The loss of the given examples: (total, detached parts, (h^_R, h_R) or None). extra: what the method adds to the VLM."""
    views = [examples.views[row] for row in rows]
    features = image_features(vlm, examples, [i for v in views for i in v.full.images], config)
    if config.method == "recon":
        return recon_losses(vlm, extra, examples, rows, features, config)
    needs_gradient = config.nextlat_view == "trajectory"
    if extra is not None and (config.target_encoder == "current" or needs_gradient):  # first, while no graph takes up memory
        with nullcontext() if needs_gradient else torch.no_grad():  # Eq. 1 never needs it: its target is a constant
            target, target_states, target_inputs, embedding = encode(
                vlm, examples, data.collate([v.target for v in views], vlm.pad_id), features)
    if extra is None or not config.packed:
        full, states, inputs, _ = encode(vlm, examples, data.collate([v.full for v in views], vlm.pad_id), features)
    else:
        full, states, inputs, predicted = encode(vlm, examples, data.pack(views, vlm.pad_id), features, extra.pred_tokens)
    vlm_term = losses.vlm_loss(states, full.labels, vlm.logits)  # Eq. 3
    if extra is None:  # SFT
        return vlm_term, dict(loss=vlm_term.detach(), vlm=vlm_term.detach()), None

    if not config.packed:
        _, _, _, predicted = encode(vlm, examples, data.collate([v.input for v in views], vlm.pad_id), features, extra.pred_tokens)
    if config.target_encoder == "frozen":
        embedding = torch.stack([examples.targets[row] for row in rows]).to(vlm.device)
    if config.center and torch.is_grad_enabled():
        extra.update_centre(embedding)
    jepa_term = vlm_term.new_zeros(())
    if config.jepa:  # Eq. 1
        towards = control_targets(embedding, rows, config)
        jepa_term = losses.jepa_loss(predicted, towards, config.distance, extra.centre if config.center else None)

    nextlat_term = vlm_term.new_zeros(())
    if config.nextlat_view != "none":  # Eq. 2
        if config.nextlat_view == "full":  # states that precede or follow a supervised token, as in the released code
            batch, along, embeds, forecastable = full, states, inputs, full.labels != -100
        else:  # every state of the serialised trajectory, as in the paper's text
            batch, along, embeds, forecastable = target, target_states, target_inputs, target.mask
        rollout = extra.latent.rollout(along, embeds, forecastable, config.horizon)
        nextlat_term = losses.nextlat_loss(along, rollout)
        if config.nextlat_token:
            nextlat_term = nextlat_term + losses.nextlat_token_loss(rollout, batch.labels, vlm.lm.lm_head.weight)
    total, parts = losses.pearl_loss(vlm_term, jepa_term, nextlat_term, config.lambda_latent)  # Eq. 4
    return total, parts, (predicted.detach(), embedding.detach())


@torch.no_grad()
def cache_targets(vlm: VLM, examples: Examples, rows: list[int], config: Config) -> None:
    """h_R of the examples in `rows` by the model as it is before training; no further pass for the target.

    Deviation: the paper encodes R with the current model. Its stop-gradient does not stop the weights: what pulls h^_R
    towards the mean of the targets pulls the targets along, and nothing in the loss holds them apart (README, Results).
    "Cached trajectory embeddings" are named among the paper's possible savings. target_encoder="current" is its text.
    """
    for start in range(0, len(rows), config.batch):
        part = rows[start:start + config.batch]
        views = [examples.views[row].target for row in part]
        features = image_features(vlm, examples, [i for v in views for i in v.images], config)
        examples.targets |= zip(part, encode(vlm, examples, data.collate(views, vlm.pad_id), features)[3].cpu())
    if config.targets in ("family", "answer"):
        average_targets(examples, config.targets)


def average_targets(examples: Examples, by: str) -> None:
    """The controls that leave of h_R what its family tells, or its family and answer: the mean over all that share them."""
    groups: dict[tuple[str, str], list[int]] = {}
    for row in examples.targets:
        given = examples.given[row]
        groups.setdefault((given.family, given.answer if by == "answer" else ""), []).append(row)
    for rows in groups.values():
        examples.targets |= dict.fromkeys(rows, torch.stack([examples.targets[row] for row in rows]).mean(dim=0))


def control_targets(embedding: Tensor, rows: list[int], config: Config) -> Tensor:
    """The targets of L_JEPA: h_R (B, D) itself, or what a control puts in its place.

    shuffled: the h_R of the next example of the batch, so that nothing about one's own is to be learned. random: a vector
    drawn once for each example. What Pearl still gains with either is regularisation, not prediction.
    """
    if config.targets == "shuffled":
        return embedding.roll(1, dims=0)
    if config.targets == "random":
        draw = lambda row: torch.randn(embedding.shape[1], generator=torch.Generator().manual_seed(1_000_003 * config.seed + row))
        return embedding.norm(dim=1, keepdim=True) * F.normalize(torch.stack([draw(row) for row in rows]), dim=1).to(embedding)
    return embedding


def recon_losses(vlm: VLM, scale: LatentScale, examples: Examples, rows: list[int], features: dict[int, Tensor], config: Config):
    """The reconstruction baseline (LVR, Mirage; the paper's Fig. 5): L_VLM + lambda * L_latent, teacher-forced.

    The state before each latent regresses the tool image's visual embedding that the latent stands for.
    """
    tool_images = [image for row in rows for image in examples.views[row].full.images[1:]]
    latents = torch.cat([latent_targets(features[image][0], config.latents) for image in tool_images])  # (n, D) visual embeddings
    views = [examples.latent_views[row] for row in rows]
    batch, states, _, _ = encode(vlm, examples, data.collate(views, vlm.pad_id), features, latents)
    vlm_term = losses.vlm_loss(states, batch.labels, vlm.logits)
    before = batch.slots.roll(-1, dims=1)  # (B, T) the position that precedes each latent
    recon_term = losses.reconstruction_loss(scale.predicted(states[before]), scale.target(latents))
    total = vlm_term + config.lambda_latent * recon_term
    return total, dict(loss=total.detach(), vlm=vlm_term.detach(), recon=recon_term.detach()), None


def latent_targets(features: Tensor, latents: int) -> Tensor:
    """(P, D) visual embeddings of a tool image -> the same (latents = 0), or (latents, D) means of as many chunks of them."""
    if not latents:
        return features
    edges = [n * len(features) // latents for n in range(latents + 1)]
    return torch.stack([features[a:max(b, a + 1)].mean(dim=0) for a, b in zip(edges, edges[1:])])


def own_passes(rows: list[int], config: Config, rank: int, world: int) -> list[list[int]]:
    """The forward passes of a step that fall to this process: every world-th, of config.batch examples each."""
    return [rows[start:start + config.batch] for start in range(0, len(rows), config.batch)][rank::world]


def train_step(module: torch.nn.Module, rows: list[int], config: Config, rank: int = 0, world: int = 1, upcoming: list[int] = ()):
    """Gradients of one optimiser step, accumulated over forward passes of at most config.batch examples.

    Each pass counts with its share of the examples, so every example weighs the same; L_VLM is a mean over tokens
    within a pass. With several processes, each takes every world-th pass; gradients are exchanged in the last one only,
    and the result is that of one process making all passes. upcoming: the next step's rows, whose images are then made
    ready. Returns this process's mean parts and its (h^_R, h_R).
    """
    parts_sum, pairs = {}, []
    passes = own_passes(rows, config, rank, world)
    mine, coming = sum(map(len, passes)), [*passes[1:], *own_passes(upcoming, config, rank, world)[:1], []]
    examples = (module.module if world > 1 else module).examples
    for n, part in enumerate(passes):
        examples.prefetch(coming[n])
        with nullcontext() if world == 1 or n == len(passes) - 1 else module.no_sync():
            with autocast(config):
                loss, parts, pair = module(part)
            (loss * len(part) * world / len(rows)).backward()  # DistributedDataParallel takes the mean over processes
        for name, value in parts.items():
            parts_sum[name] = parts_sum.get(name, 0) + len(part) / mine * value
        pairs += [pair] if pair else []
    return parts_sum, tuple(torch.cat(side) for side in zip(*pairs)) if pairs else None


def autocast(config: Config):
    """bfloat16 arithmetic on a GPU, and wherever the weights are bfloat16; float32 on a CPU."""
    device = torch.device(config.device).type
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or config.dtype == "bfloat16")


@torch.no_grad()
def validate(vlm: VLM, extra: Predictor | LatentScale | None, examples: Examples, config: Config) -> dict[str, float]:
    """Mean loss parts over the validation examples, and the collapse gauges on all of them together."""
    vlm.eval()
    sums, pairs = {}, []
    for start in range(0, len(examples.views), config.batch):
        rows = list(range(start, min(start + config.batch, len(examples.views))))
        with autocast(config):
            _, parts, pair = compute_losses(vlm, extra, examples, rows, config)
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(rows) / len(examples.views)
        pairs += [pair] if pair else []
    vlm.train()
    gauges = losses.collapse_gauges(*(torch.cat(side) for side in zip(*pairs))) if pairs else {}
    return sums | gauges


def tracked(vlm: VLM, examples: list[data.Example], config: Config) -> dict[str, float]:
    """Direct accuracy and accuracy with the expert's tool of the model as it is, for the picture of one against the other."""
    if not examples:
        return {}
    records = evaluate.answer_questions(vlm, examples, config.answer_prefix)
    share = lambda rights: sum(rights) / max(1, len(rights))
    return dict(direct=share([r["direct_right"] for r in records]),
                tool=share([r["tool_right"] for r in records if "tool_right" in r]))


# ---- the run's folder ---------------------------------------------------------------------------------------------------


def refuse_used_folder(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} already holds files, perhaps a run: choose another --out, nothing is overwritten")


def start_folder(config: Config) -> None:
    out = Path(config.out)
    refuse_used_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    evaluate.write_json(out / "config.json", dataclasses.asdict(config))
    evaluate.write_json(out / "environment.json", environment())


PACKAGES = ("torch", "transformers", "safetensors", "pillow", "numpy")


def environment() -> dict:
    """What a run depended on beside its config, for whoever wants to repeat it."""
    root = Path(__file__).resolve().parent

    def git(*args: str) -> str | None:
        try:
            return subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):  # no git, or a copy without history
            return None

    return dict(command=sys.argv, commit=git("rev-parse", "HEAD"),
                changed_files=git("status", "--porcelain", "--untracked-files=no"),
                packages={name: importlib.metadata.version(name) for name in PACKAGES}, python=platform.python_version(),
                system=platform.platform(), cpu=platform.processor() or platform.machine(), threads=torch.get_num_threads(),
                gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None)


def save_best(out: Path, vlm: VLM, extra: Predictor | LatentScale | None, step: int, valid: dict[str, float]) -> None:
    """checkpoint-STEP/ under a temporary name, then renamed; then best.json names it; then the one before goes."""
    folder, partial = out / f"checkpoint-{step}", out / f"checkpoint-{step}.partial"
    partial.mkdir(exist_ok=True)
    vlm.save_adapter(partial)
    if extra is not None:
        write_tensors(extra.state_dict(), partial / EXTRA_FILES[type(extra)])
    folder.mkdir(exist_ok=True)  # there already if the run was interrupted right here: then with the same content
    for file in sorted(partial.iterdir()):
        os.replace(file, folder / file.name)
    partial.rmdir()
    best = out / "best.json"
    before = evaluate.best_checkpoint(out)["checkpoint"] if best.exists() else None
    evaluate.write_json(best, dict(checkpoint=folder.name, step=step, valid=valid))
    if before and before != folder.name:
        for file in (out / before).iterdir():
            file.unlink()
        (out / before).rmdir()


def trained_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Everything that training changes, by name: parameters with gradient, and the buffers of what the method adds."""
    step = module.module if isinstance(module, DistributedDataParallel) else module
    tensors = {name: p for name, p in step.named_parameters() if p.requires_grad}
    return tensors | ({f"extra.{name}": b for name, b in step.extra.named_buffers()} if step.extra is not None else {})


STATE_VERSION = "1"


def save_state(out: Path, module: torch.nn.Module, optimizer, schedule, step: int, best: float) -> None:
    """out/state.safetensors: weights, moments, random state, schedule, step and best score, replaced in one move."""
    tensors = {f"weight/{name}": t.detach() for name, t in trained_tensors(module).items()}
    for n, p in enumerate(optimizer.param_groups[0]["params"]):
        tensors |= {f"adam/{n}/{key}": value for key, value in optimizer.state.get(p, {}).items()}
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random/cuda"] = torch.cuda.get_rng_state()
    write_tensors({name: t.cpu() for name, t in tensors.items()}, out / "state.safetensors",
                  dict(version=STATE_VERSION, step=str(step), best=repr(best), schedule=json.dumps(schedule.state_dict())))


def load_state(out: Path, module: torch.nn.Module, optimizer, schedule) -> tuple[int, float]:
    """Undo save_state; returns (step, best score). A run without a state starts anew."""
    file = out / "state.safetensors"
    done, best = 0, math.inf
    if file.is_file():
        tensors, meta = read_tensors(file)
        if meta.get("version") != STATE_VERSION:
            raise ValueError(f"{file} has format {meta.get('version')!r}, this program writes and reads {STATE_VERSION!r}: "
                             "resume it with the version that wrote it")
        done, best = int(meta["step"]), float(meta["best"])
        with torch.no_grad():
            for name, t in trained_tensors(module).items():
                if tensors.get(f"weight/{name}", t).shape != t.shape or f"weight/{name}" not in tensors:
                    raise ValueError(f"{file} does not fit this run: {name} is missing or has another shape; "
                                     "was config.json changed?")
                t.copy_(tensors[f"weight/{name}"])
        for n, p in enumerate(optimizer.param_groups[0]["params"]):
            moments = {key: tensors[f"adam/{n}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"adam/{n}/{key}" in tensors}
            if any(value.shape != p.shape for key, value in moments.items() if key != "step"):
                raise ValueError(f"{file} does not fit this run: moments of another shape; was config.json changed?")
            if moments:
                optimizer.state[p] = {key: value if key == "step" else value.to(p.device) for key, value in moments.items()}
        schedule.load_state_dict(json.loads(meta["schedule"]))
        optimizer.param_groups[0]["lr"] = schedule.get_last_lr()[0]
        torch.set_rng_state(tensors["random/cpu"])
        if "random/cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random/cuda"])
    return done, best


def forget_later(out: Path, done: int) -> None:
    """The log of a run that is resumed forgets what came after its state."""
    if (out / "log.jsonl").is_file():
        lines = [line for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        evaluate.write_text(out / "log.jsonl", "".join(line + "\n" for line in lines if json.loads(line)["step"] <= done))


def log(out: Path, kind: str, record: dict) -> None:
    with open(out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(kind=kind, **record)) + "\n")


def progress_line(step: int, config: Config, parts: dict, gauges: dict, norm: float, lr: float, ms: float) -> str:
    terms = " ".join(f"{name} {value:.4f}" for name, value in parts.items())
    shown = f" | r2 {gauges['r2']:.2f} retrieval {gauges['retrieval']:.2f} rank {gauges['effective_rank']:.1f}" if gauges else ""
    left = (config.steps - step) * ms / 1000
    return (f"{step:5d}/{config.steps} {terms}{shown} | lr {lr:.1e} grad {norm:.2f} {ms:.0f} ms/step, "
            f"{int(left) // 60}:{int(left) % 60:02d} left")


class Step(torch.nn.Module):
    """compute_losses as a module, so that DistributedDataParallel can watch its gradients."""

    def __init__(self, vlm: VLM, extra: Predictor | LatentScale | None, examples: Examples, config: Config):
        super().__init__()
        self.vlm, self.extra, self.examples, self.config = vlm, extra, examples, config

    def forward(self, rows: list[int]):
        return compute_losses(self.vlm, self.extra, self.examples, rows, self.config)


def start_processes(config: Config) -> tuple[int, int]:
    """(rank, number of processes); under torchrun also sets this process's device. Raises ValueError if they do not fit."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if config.shard and (world == 1 or not config.lora_rank):
        raise ValueError("--shard shares frozen weights between processes: start it with torchrun and two or more, and with "
                         "--lora_rank above 0")
    if world == 1:
        return 0, 1
    if config.accumulate % world:
        raise ValueError(f"--accumulate {config.accumulate} passes cannot be shared by {world} processes: make it a multiple")
    if torch.device(config.device).type == "cuda":
        config.device = f"cuda:{local}"
        torch.cuda.set_device(local)
    cuda = torch.device(config.device) if config.device.startswith("cuda") else None
    # a day, not PyTorch's 10 or 30 minutes: the others wait while the first process validates and answers the test questions
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1), device_id=cuda)
    return dist.get_rank(), world


def leave() -> None:
    """Ends every process but the first, whose work goes on, without Python's clean-up: a thread of gloo may still hold the last
    tensor that was exchanged, and is aborted if it lets go while Python ends (seen in 10 of 150 small runs). Destroying the
    group waits for that thread while keeping from it the lock that it needs, and can hang."""
    if dist.is_initialized() and dist.get_rank() > 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def build(config: Config, world: int):
    """VLM, what the method adds, the module whose gradients are taken, optimiser, schedule; training, validation, test examples."""
    vlm = VLM(config.model, dtype=getattr(torch, config.dtype))
    config.packed = config.packed and vlm.family.packs  # a family with attention of its own gets a pass a view
    *given, tests = load_examples(config)
    examples, valid_examples = (Examples(rows, vlm, config) for rows in given)
    vlm.set_trainable(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets.split(","),
                      config.train_vision)
    if config.shard:
        vlm.shard_frozen(config.device, world)
    vlm.to(config.device)
    if config.gradient_checkpointing:
        enable = getattr(vlm.lm, "activation_checkpointing_enable", vlm.lm.gradient_checkpointing_enable)  # the newer name first
        enable(dict(use_reentrant=False))
    extra = additions(vlm, examples, config)
    if isinstance(extra, Predictor) and config.target_encoder == "frozen":
        order = step_rows(examples, config)
        visited = {row for _ in range(config.steps) for row in next(order)}  # a large data set may have more than the steps see
        cache_targets(vlm, examples, sorted(visited), config)
        cache_targets(vlm, valid_examples, list(range(len(valid_examples.views))), config)
    module = Step(vlm, extra, examples, config)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(config.warmup * config.steps), config.steps)
    if world > 1:
        module = DistributedDataParallel(module, find_unused_parameters=True, init_sync=not config.shard)  # shares differ
    return vlm, extra, module, optimizer, schedule, examples, valid_examples, tests


def train(config: Config, resume: bool = False) -> Path:
    """The whole run. resume: go on from the last state in config.out, to the same end as without the interruption."""
    rank, world = start_processes(config)
    out = Path(config.out)
    if rank == 0 and not resume:
        refuse_used_folder(out)  # before anything that takes time
    torch.manual_seed(config.seed)
    trained = fit(config, resume, rank, world)  # a function of its own, so that its model is gone when report loads another
    if trained and rank == 0 and config.shard:
        print(f"everything is in {out}; where the whole model fits, python evaluate.py {out} --again asks the test questions")
    elif trained and rank == 0:
        report(out, config, *trained)
    return out


def fit(config: Config, resume: bool, rank: int, world: int) -> tuple[list[data.Example], list[dict], float] | None:
    """The training loop. Returns the test examples, the answers to them before, and seconds; None if a signal ended it."""
    vlm, extra, module, optimizer, schedule, examples, valid_examples, tests = build(config, world)
    out, parameters = Path(config.out), optimizer.param_groups[0]["params"]
    if rank == 0:
        if not resume:
            start_folder(config)
        print(f"{config.method} on {config.data or config.regime}: {len(examples.views)} examples, "
              f"{sum(p.numel() for p in parameters) / 1e6:.2f}M trained parameters, {config.device}"
              f"{f' x {world}' if world > 1 else ''}, run folder {out}")
    alone = rank == 0 and not config.shard  # shares of a model run in all processes or in none: they are not asked questions here
    before = answers_before(out, vlm, tests, config) if alone else []
    vlm.train()
    first, best = load_state(out, module, optimizer, schedule) if resume else (0, math.inf)
    if rank == 0 and resume:  # one process alone writes
        forget_later(out, first)
    order = step_rows(examples, config)
    for _ in range(first):
        next(order)
    step, upcoming, stop = first, next(order), False
    start, last, skipped, examples.store.waited = time.time(), time.time(), 0, 0.0
    LOOP["running"] = True
    while step < config.steps and not stop:
        step, rows, upcoming = step + 1, upcoming, next(order)
        parts, pair = train_step(module, rows, config, rank, world, upcoming)
        lr = schedule.get_last_lr()[0]
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        if torch.isfinite(norm):
            optimizer.step()
            skipped = 0
        else:
            skipped += 1
            print(f"step {step}: the gradient is not finite; step skipped ({skipped} in a row)", flush=True)
            if skipped == 5:
                raise ValueError("five steps in a row without a finite gradient: lower --lr or --lambda_latent; "
                                 f"{out} has the last good state")
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

        stop, due = asked_to_stop(world, config.device), lambda every: step % every == 0 or step == config.steps
        if rank == 0 and due(config.log_every):
            log_step(out, config, step, parts, pair, float(norm), lr, time.time() - last, examples.store)
            last, examples.store.waited = time.time(), 0.0
        if due(config.eval_every) and (rank == 0 or config.shard):
            best = validate_and_keep(out, vlm, extra, valid_examples, config, step, best, writes=rank == 0)
            last, examples.store.waited = time.time(), 0.0
        if rank == 0 and (due(config.save_every) or stop):
            save_state(out, module, optimizer, schedule, step, best)
    LOOP["running"] = False
    if stop and rank == 0:
        print(f"stopped after step {step}; python train.py --resume {out} goes on from there")
    return None if stop else (tests, before, time.time() - start)


def asked_to_stop(world: int, device: str) -> bool:
    """Whether a signal came; with several processes, to any of them, so that all end after the same step."""
    if world == 1:
        return bool(LOOP["signals"])
    told = torch.tensor(LOOP["signals"], device=device)
    dist.all_reduce(told)
    return bool(told)


def log_step(out: Path, config: Config, step: int, parts: dict, pair, norm: float, lr: float, seconds: float, store) -> None:
    """A line of the log and of the screen. seconds: since the line before; store: counts those that images were waited for."""
    parts = {name: float(value) for name, value in parts.items()}
    gauges = losses.collapse_gauges(*pair) if pair and len(pair[0]) > 1 else {}
    ms = 1000 * seconds / (step % config.log_every or config.log_every)
    log(out, "train", dict(step=step, **parts, **gauges, grad_norm=norm, lr=lr, ms=ms, waited=store.waited / max(1e-9, seconds)))
    print(progress_line(step, config, parts, gauges, norm, lr, ms), flush=True)


def validate_and_keep(out: Path, vlm: VLM, extra, examples: Examples, config: Config, step: int, best: float,
                      writes: bool = True) -> float:
    """Validate, log, keep the checkpoint if it is the best so far; returns the best loss. Says a collapse in words.

    writes: false in a process that only takes part in the passes of a sharded model.
    """
    valid = validate(vlm, extra, examples, config) | tracked(vlm, examples.given[:config.track], config)
    if not writes:
        return best
    log(out, "valid", dict(step=step, **valid))
    print("      validation: " + " ".join(f"{name} {value:.3f}" for name, value in valid.items()), flush=True)
    if len(examples.views) > 9 and (valid.get("effective_rank", 9.0) < 3 or valid.get("mean_cosine", 0.0) > 0.97):
        print("      the targets h_R have collapsed: they are nearly all alike, and a low L_JEPA says nothing; "
              "try --target_encoder frozen, or a smaller --lambda_latent or --lr", flush=True)
    if valid["loss"] < best:
        save_best(out, vlm, extra, step, valid)
    return min(best, valid["loss"])


def answers_before(out: Path, vlm: VLM, tests: list[data.Example], config: Config) -> list[dict]:
    """Answers of the model as it comes, from before.json if an interrupted run left it."""
    file = out / "before.json"
    if not file.is_file():
        evaluate.write_json(file, evaluate.answer_questions(vlm, tests, config.answer_prefix))
    return json.loads(file.read_text())


def report(out: Path, config: Config, tests: list[data.Example], before: list[dict], seconds: float) -> None:
    """Load the best checkpoint as a user would, answer the test questions, print and write the table."""
    vlm, _, scale = evaluate.load_run(out, config.device)
    tests = [variant(ex, config) if ex.trajectory and config.order == "image_first" else ex for ex in tests]
    asked = evaluate.ask(vlm, tests, config.answer_prefix, call_limit=config.call_limit, scale=scale, latents=config.decode_latents)
    best = evaluate.best_checkpoint(out)
    evaluate.write_json(out / "results.json", dict(best=best, train_seconds=seconds, **asked, before=before))
    print(f"\ntest accuracy in %, before and after {config.steps} steps ({seconds / 60:.1f} minutes); "
          f"best checkpoint: step {best['step']}")
    print(format_table(dict(before=summarise(before), after=summarise(asked["answers"]))))
    gauges = {name: value for name, value in best["valid"].items() if name not in ("loss", "vlm", "jepa", "nextlat", "recon")}
    if gauges:
        print("on validation: " + ", ".join(f"{name} {value:.3f}" for name, value in gauges.items()))
    print(f"everything is in {out}")


def merge(*folders: str) -> None:
    """RUN DIR: the run's best checkpoint as an ordinary checkpoint folder, which needs none of our code."""
    if len(folders) != 2:
        raise ValueError("--merge takes the run folder and a new folder: python train.py --merge RUN DIR")
    run, out = map(Path, folders)
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose a new folder, nothing is overwritten")
    vlm, _, _ = evaluate.load_run(run, "cpu")
    partial = out.with_name(out.name + ".partial")
    for part in (vlm.lm, *vlm.family.saved_with):
        part.save_pretrained(partial)
    partial.rename(out)
    print(f"{out} loads with transformers' AutoModelForImageTextToText.from_pretrained")


LOOP = dict(running=False, signals=0)  # whether a step is lost if the program ends now; signals received


def heed(number: int, frame) -> None:
    """In the training loop the first signal ends it after the step it is in, with its state saved; any other ends the program."""
    LOOP["signals"] += 1
    if LOOP["signals"] > 1 or not LOOP["running"]:
        raise KeyboardInterrupt
    os.write(1, b"saving after this step; a second signal ends at once\n")  # print() is not safe inside a handler


def main() -> None:
    try:
        if sys.argv[1:2] == ["--merge"]:
            merge(*sys.argv[2:])
            return
        resume = sys.argv[1:2] == ["--resume"]
        config = read_config(sys.argv[2:]) if resume else parse_config()
        if config.check_data:
            check_data(config)
        elif config.benchmark:
            from analysis.benchmark import benchmark
            benchmark(config)
        else:
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, heed)
            train(config, resume)
            leave()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; if the run folder holds config.json, python train.py --resume RUN goes on from its last state")


if __name__ == "__main__":
    main()
