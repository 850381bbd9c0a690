"""Train a VLM with Pearl, or with plain SFT, on expert tool-use trajectories (section 3 of arXiv:2604.08065).

    python train.py                                    # Pearl on the shipped VLM, five tool families: minutes on two cores
    python train.py --method sft                       # the baseline: the same words, no latent terms, no second pass
    python train.py --recipe paper                     # the paper's literal text; --recipe release: the authors' code
    python train.py --model Qwen/Qwen2.5-VL-3B-Instruct --data DIR --dtype bfloat16 --lr 1e-5     # your model, your data

One step of Pearl is three forward passes and one backward:
  1. full view <I0, Q, R>    -> L_VLM (Eq. 3) on the expert's words, and states for L_NextLat (Eq. 2)
  2. input view <I0, Q> + K [PRED] -> h^_R, the state of the last [PRED]
  3. target view R           -> h_R, the state of its last token, without gradient   -> L_JEPA (Eq. 1)
SFT is the first pass alone. A run folder holds config.json, log.jsonl, best.json, checkpoint-STEP/ and results.json.
Left out on purpose: resuming, several GPUs, packing the passes into one.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

import data
import evaluate
import losses
from model import VLM
from predictor import Predictor

METHODS, NEXTLAT_VIEWS = ("pearl", "sft"), ("full", "trajectory", "none")


@dataclass
class Config:
    """One run. Every field is a command-line option of the same name; defaults are the run that the README reports."""

    method: str = "pearl"  # pearl, or sft (lambda = 0: L_VLM alone)
    recipe: str = "ours"  # ours, paper or release: sets the fields listed in RECIPES; options given beside it win
    regime: str = "mixed"  # the world's trajectories: single, mixed, multi or all (data.py, REGIMES)
    model: str = str(Path(__file__).resolve().parent / "tiny-vlm")  # checkpoint folder or hub id
    data: str = ""  # a data folder in the README's format; empty: the procedural world
    out: str = ""  # run folder; empty: runs/METHOD-REGIME-seedSEED
    seed: int = 0  # initial weights, data order, dropout
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: str = "float32"  # of the frozen weights; on a GPU the arithmetic is bfloat16 either way (autocast)

    lambda_latent: float = 1.0  # Eq. 4; the paper has 0.2
    pred_tokens: int = 4  # K; 0: h^_R is the state of the last prompt token
    distance: str = "cosine"  # D of Eq. 1: cosine, smoothl1, mse, l2
    center: bool = False  # subtract the running mean of h_R from both embeddings before D (losses.jepa_loss)
    target_view: str = "trajectory"  # what h_R sees: trajectory (R alone), trajectory_with_image (I0 too, no question)
    nextlat_view: str = "full"  # whose states Eq. 2 runs along: full, trajectory, none (no L_NextLat)
    nextlat_sees_next: bool = True  # the latent predictor is given the next token's embedding
    nextlat_token: bool = False  # add the released code's cross-entropy of the forecast states
    horizon: int = 1  # d of Eq. 2, in tokens

    steps: int = 300  # optimiser steps
    batch: int = 32  # examples in one forward pass
    accumulate: int = 1  # forward passes in one optimiser step
    lr: float = 1e-3  # peak; linear warm-up, then cosine to zero
    warmup: float = 0.05  # share of the steps
    weight_decay: float = 0.0
    clip: float = 1.0  # gradient norm
    lora_rank: int = 64  # 0: train all weights of the language model
    lora_alpha: float = 128.0
    lora_dropout: float = 0.0
    lora_targets: str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # comma-separated layer names
    train_vision: bool = False  # also train the vision tower; off: its features are computed once for the whole run
    feature_cache_gb: float = 2.0  # most memory for those features

    train_examples: int = 1500  # of the world
    valid_examples: int = 150
    test_per_family: int = 120
    world_seed: int = 0  # of the scenes; a data set of its own for every value
    eval_every: int = 50  # steps between validations; the checkpoint with the lowest validation loss is kept
    log_every: int = 10  # steps between log lines
    max_tokens: int = 2048  # longest view
    answer_prefix: str = "Answer:"  # what a final text puts before the answer


RECIPES = {
    "ours": {},
    "paper": dict(lambda_latent=0.2, distance="smoothl1", target_view="trajectory", nextlat_view="trajectory",
                  nextlat_sees_next=False),
    "release": dict(lambda_latent=0.2, distance="cosine", target_view="trajectory_with_image", nextlat_view="full",
                    nextlat_sees_next=True, nextlat_token=True, lora_dropout=0.1, weight_decay=0.1),
}
CHOICES = dict(method=METHODS, recipe=tuple(RECIPES), regime=tuple(data.REGIMES), distance=losses.DISTANCES,
               target_view=data.TARGET_VIEWS, nextlat_view=NEXTLAT_VIEWS, dtype=("float32", "bfloat16"))


def parse_config(argv: list[str] | None = None) -> Config:
    """Config from the command line: one option a field; unknown names and values stop with the list of known ones."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def boolean(text: str) -> bool:
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError("write true or false")
        return text.lower() == "true"

    for f in dataclasses.fields(Config):
        kind = boolean if f.type in (bool, "bool") else type(f.default)
        parser.add_argument(f"--{f.name}", type=kind, choices=CHOICES.get(f.name), default=argparse.SUPPRESS,
                            metavar=None if f.name in CHOICES else kind.__name__.upper(), help=f"default {f.default!r}")
    given = vars(parser.parse_args(argv))
    config = Config(**{**RECIPES[given.get("recipe", "ours")], **given})
    for name, least in dict(steps=1, batch=1, accumulate=1, pred_tokens=0, horizon=1, lora_rank=0, train_examples=1,
                            valid_examples=2, test_per_family=1, eval_every=1, log_every=1, lambda_latent=0, lr=0).items():
        if getattr(config, name) < least:
            parser.error(f"--{name} must be at least {least}, not {getattr(config, name)}")
    config.out = config.out or f"runs/{config.method}-{config.regime}-seed{config.seed}"
    return config


# ---- data -------------------------------------------------------------------------------------------------------------


class Examples:
    """Examples of one split, ready for the loop: their three views as token ids, their images as patches."""

    def __init__(self, examples: list[data.Example], vlm: VLM, config: Config):
        serializer = data.Serializer(vlm.tokenizer, vlm.image_token_id, min(config.max_tokens, vlm.max_positions))
        self.store = data.ImageStore(vlm.image_processor)
        self.views = [serializer.views(ex, *self.store.add(ex), config.pred_tokens, config.target_view) for ex in examples]
        self.features: dict[int, Tensor] = {}  # by image; filled by image_features when the vision tower is frozen
        self.feature_bytes = 0


def load_examples(config: Config) -> tuple[list[data.Example], list[data.Example]]:
    """Training and validation examples, from the user's folder or drawn from the world."""
    if not config.data:
        return tuple(data.make_world(config.regime, split, count, config.world_seed)
                     for split, count in (("train", config.train_examples), ("validation", config.valid_examples)))
    examples = data.read_folder(config.data)
    train, valid = ([ex for ex in examples if ex.split == split] for split in ("train", "validation"))
    for split, rows in (("train", train), ("validation", valid)):
        if len(rows) < 2:
            raise ValueError(f"{config.data} has {len(rows)} records in the {split} split; two or more are needed "
                             f"(set \"split\": \"{split}\" in some records, or add records)")
    return train, valid


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
    """Features of the images: each encoded once for all views, and once for the whole run when the tower is frozen."""
    wanted = sorted(set(indices) - examples.features.keys())
    new = {}
    if wanted:
        with nullcontext() if config.train_vision else torch.no_grad():
            pixels, grids = ([rows[i] for i in wanted] for rows in (examples.store.pixels, examples.store.grids))
            new = dict(zip(wanted, vlm.encode_images(pixels, grids)))
    if not config.train_vision and examples.feature_bytes < config.feature_cache_gb * 1e9:
        new = {i: f.clone() for i, f in new.items()}  # a slice would keep the whole batch's features alive
        examples.features |= new
        examples.feature_bytes += sum(f.nbytes for f in new.values())
    return {i: new[i] if i in new else examples.features[i] for i in set(indices)}


def encode(vlm: VLM, examples: Examples, views: list[data.View], features: dict[int, Tensor], pred_tokens: Tensor | None = None):
    """Enc of a list of views: (batch, states (B, T, D), input embeddings (B, T, D), the views' embeddings (B, D))."""
    batch = data.collate(views, vlm.pad_id).to(vlm.device)
    states, inputs = vlm(batch, [features[i] for i in batch.images], [examples.store.grids[i] for i in batch.images], pred_tokens)
    embedding = states[torch.arange(len(views), device=vlm.device), batch.embed_at]
    return batch, states, inputs, embedding


def compute_losses(vlm: VLM, predictor: Predictor | None, examples: Examples, rows: list[int], config: Config):
    """All terms of Eq. 4 on the given examples: (total, detached parts, (h^_R, h_R) or None). SFT stops after L_VLM."""
    views = [examples.views[row] for row in rows]
    features = image_features(vlm, examples, [i for v in views for i in v.full.images], config)
    full, states, inputs, _ = encode(vlm, examples, [v.full for v in views], features)
    vlm_term = losses.vlm_loss(states, full.labels, vlm.logits)  # Eq. 3
    if predictor is None:
        return vlm_term, dict(loss=vlm_term.detach(), vlm=vlm_term.detach()), None

    _, _, _, predicted = encode(vlm, examples, [v.input for v in views], features, predictor.pred_tokens)
    needs_gradient = config.nextlat_view == "trajectory"
    with nullcontext() if needs_gradient else torch.no_grad():  # Eq. 1 never needs it: its target is a constant
        target, target_states, target_inputs, embedding = encode(vlm, examples, [v.target for v in views], features)
    if config.center and torch.is_grad_enabled():
        predictor.update_centre(embedding)
    jepa_term = losses.jepa_loss(predicted, embedding, config.distance, predictor.centre if config.center else None)  # Eq. 1

    nextlat_term = vlm_term.new_zeros(())
    if config.nextlat_view != "none":  # Eq. 2
        if config.nextlat_view == "full":  # states that precede or follow a supervised token, as in the released code
            batch, along, embeds, forecastable = full, states, inputs, full.labels != -100
        else:  # every state of the serialised trajectory, as in the paper's text
            batch, along, embeds, forecastable = target, target_states, target_inputs, target.mask
        rollout = predictor.latent.rollout(along, embeds, forecastable, config.horizon)
        nextlat_term = losses.nextlat_loss(along, rollout)
        if config.nextlat_token:
            nextlat_term = nextlat_term + losses.nextlat_token_loss(rollout, batch.labels, vlm.lm.lm_head.weight)
    total, parts = losses.pearl_loss(vlm_term, jepa_term, nextlat_term, config.lambda_latent)  # Eq. 4
    return total, parts, (predicted.detach(), embedding.detach())


def train_step(vlm: VLM, predictor: Predictor | None, examples: Examples, rows: list[int], config: Config):
    """Gradients of one optimiser step, accumulated over forward passes of at most config.batch examples.

    Each pass counts with its share of the examples, so every example weighs the same; L_VLM is a mean over tokens
    within a pass. Returns the mean parts and the step's (h^_R, h_R).
    """
    parts_sum, pairs = {}, []
    for start in range(0, len(rows), config.batch):
        part = rows[start:start + config.batch]
        share = len(part) / len(rows)
        with autocast(config):
            loss, parts, pair = compute_losses(vlm, predictor, examples, part, config)
        (share * loss).backward()
        for name, value in parts.items():
            parts_sum[name] = parts_sum.get(name, 0) + share * value
        pairs += [pair] if pair else []
    return parts_sum, tuple(torch.cat(side) for side in zip(*pairs)) if pairs else None


def autocast(config: Config):
    """bfloat16 arithmetic on a GPU, and wherever the weights are bfloat16; float32 on a CPU."""
    device = torch.device(config.device).type
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or config.dtype == "bfloat16")


@torch.no_grad()
def validate(vlm: VLM, predictor: Predictor | None, examples: Examples, config: Config) -> dict[str, float]:
    """Mean loss parts over the validation examples, and the collapse gauges on all of them together."""
    vlm.eval()
    sums, pairs = {}, []
    for start in range(0, len(examples.views), config.batch):
        rows = list(range(start, min(start + config.batch, len(examples.views))))
        with autocast(config):
            _, parts, pair = compute_losses(vlm, predictor, examples, rows, config)
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(rows) / len(examples.views)
        pairs += [pair] if pair else []
    vlm.train()
    gauges = losses.collapse_gauges(*(torch.cat(side) for side in zip(*pairs))) if pairs else {}
    return sums | gauges


# ---- the run's folder ---------------------------------------------------------------------------------------------------


def start_folder(config: Config) -> Path:
    out = Path(config.out)
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} already holds files, perhaps a run: choose another --out, nothing is overwritten")
    out.mkdir(parents=True, exist_ok=True)
    evaluate.write_json(out / "config.json", dataclasses.asdict(config))
    return out


def save_best(out: Path, vlm: VLM, predictor: Predictor | None, step: int, valid: dict[str, float]) -> None:
    """checkpoint-STEP/ under a temporary name, then renamed; then best.json names it; then the one before goes."""
    folder, partial = out / f"checkpoint-{step}", out / f"checkpoint-{step}.partial"
    partial.mkdir()
    vlm.save_adapter(partial)
    if predictor is not None:
        save_file({n: p.detach().contiguous() for n, p in predictor.state_dict().items()}, partial / "predictor.safetensors")
    partial.rename(folder)
    best = out / "best.json"
    before = json.loads(best.read_text())["checkpoint"] if best.exists() else None
    evaluate.write_json(best, dict(checkpoint=folder.name, step=step, valid=valid))
    if before and before != folder.name:
        for file in (out / before).iterdir():
            file.unlink()
        (out / before).rmdir()


def log(out: Path, kind: str, record: dict) -> None:
    with open(out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(kind=kind, **record)) + "\n")


def progress_line(step: int, config: Config, parts: dict, gauges: dict, norm: float, lr: float, ms: float) -> str:
    terms = " ".join(f"{name} {value:.4f}" for name, value in parts.items())
    shown = f" | r2 {gauges['r2']:.2f} retrieval {gauges['retrieval']:.2f} rank {gauges['effective_rank']:.1f}" if gauges else ""
    left = (config.steps - step) * ms / 1000
    return (f"{step:5d}/{config.steps} {terms}{shown} | lr {lr:.1e} grad {norm:.2f} {ms:.0f} ms/step, "
            f"{int(left) // 60}:{int(left) % 60:02d} left")


def train(config: Config) -> Path:
    torch.manual_seed(config.seed)
    vlm = VLM(config.model, dtype=getattr(torch, config.dtype)).to(config.device)
    train_set, valid_set = load_examples(config)
    families = list(dict.fromkeys(ex.family for ex in train_set))
    tests = evaluate.test_examples(config.data, families, config.test_per_family, config.world_seed)
    examples, valid_examples = Examples(train_set, vlm, config), Examples(valid_set, vlm, config)
    out = start_folder(config)

    vlm.set_trainable(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_targets.split(","),
                      config.train_vision)
    predictor = None
    if config.method == "pearl" and config.lambda_latent > 0:
        end_row = vlm.lm.get_input_embeddings().weight[data.Serializer(vlm.tokenizer, vlm.image_token_id, 0).end_id]
        predictor = Predictor(vlm.dim, config.pred_tokens, end_row, config.nextlat_sees_next).to(config.device)
    parameters = [p for module in (vlm, predictor) if module is not None for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(config.warmup * config.steps), config.steps)
    trained = sum(p.numel() for p in parameters) / 1e6
    print(f"{config.method} on {config.data or config.regime}: {len(train_set)} examples, {trained:.2f}M trained parameters, "
          f"{config.device}, run folder {out}")

    before = evaluate.summarise(evaluate.answer_questions(vlm, tests, config.answer_prefix))
    vlm.train()
    order = batches(len(train_set), config.batch * config.accumulate, config.seed)
    best, start, last = math.inf, time.time(), time.time()
    for step in range(1, config.steps + 1):
        parts, pair = train_step(vlm, predictor, examples, next(order), config)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

        if step % config.log_every == 0 or step == config.steps:
            ms = (time.time() - last) * 1000 / (step % config.log_every or config.log_every)
            parts = {name: float(value) for name, value in parts.items()}
            gauges = losses.collapse_gauges(*pair) if pair and len(pair[0]) > 1 else {}
            log(out, "train", dict(step=step, **parts, **gauges, grad_norm=float(norm), lr=schedule.get_last_lr()[0], ms=ms))
            print(progress_line(step, config, parts, gauges, float(norm), schedule.get_last_lr()[0], ms), flush=True)
            last = time.time()
        if step % config.eval_every == 0 or step == config.steps:
            valid = validate(vlm, predictor, valid_examples, config)
            log(out, "valid", dict(step=step, **valid))
            print("      validation: " + " ".join(f"{name} {value:.3f}" for name, value in valid.items()), flush=True)
            if valid["loss"] < best:
                best = valid["loss"]
                save_best(out, vlm, predictor, step, valid)
            last = time.time()

    report(out, config, tests, before, time.time() - start)
    return out


def report(out: Path, config: Config, tests: list[data.Example], before: dict, seconds: float) -> None:
    """Load the best checkpoint as a user would, answer the test questions, print and write the table."""
    vlm, _ = evaluate.load_run(out, config.device)
    answers = evaluate.answer_questions(vlm, tests, config.answer_prefix)
    after = evaluate.summarise(answers)
    best = json.loads((out / "best.json").read_text())
    evaluate.write_json(out / "results.json", dict(before=before, after=after, best=best, train_seconds=seconds, answers=answers))
    print(f"\ntest accuracy in %, before and after {config.steps} steps ({seconds / 60:.1f} minutes); "
          f"best checkpoint: step {best['step']}")
    print(evaluate.format_table(dict(before=before, after=after)))
    gauges = {name: value for name, value in best["valid"].items() if name not in ("loss", "vlm", "jepa", "nextlat")}
    if gauges:
        print("collapse gauges on validation: " + ", ".join(f"{name} {value:.3f}" for name, value in gauges.items()))
    print(f"everything is in {out}")


def main() -> None:
    try:
        train(parse_config())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
