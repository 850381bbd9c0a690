"""Train a VLM with Pearl, or with what it is compared with, on expert tool-use trajectories.

    python train.py                         # Pearl on the shipped VLM: a minute or two on two cores
    python train.py --method sft            # the same words, no latent terms, no second pass
    python train.py --method direct         # the control: question and answer, no trajectory
    python train.py --method both --batch 64    # trajectories and bare answers, half and half
    python train.py --method recon          # reconstruction-based latent reasoning (LVR, Mirage)
    python train.py --recipe release        # the authors' code; --recipe paper: the paper's text
    python train.py --model Qwen/Qwen2.5-VL-3B-Instruct --data DIR --dtype bfloat16 --lr 1e-5

One step of Pearl (section 3 of arXiv:2604.08065) encodes three views and goes back once:
  1. full view <I0, Q, R>           -> L_VLM (Eq. 3), and states for L_NextLat (Eq. 2)
  2. input view <I0, Q>, K [PRED]   -> h^_R, the state of the last [PRED]
  3. target view R                  -> h_R, the state of its last token   -> L_JEPA (Eq. 1)
SFT is the first alone. `compute_losses` is that step, `train_step` what is done with it.

    python train.py --resume RUN            # goes on after an interruption, to the same end
    python train.py --merge RUN DIR         # the result as an ordinary transformers checkpoint
    torchrun --nproc-per-node=2 train.py --accumulate 2    # several processes share a step's passes

Left out on purpose: the run's folder, processes and signals (support/), the rival and the variants
(baselines/), how questions are asked (evaluate.py).
"""

import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Iterator, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import get_cosine_schedule_with_warmup

import data
import evaluate
import losses
from baselines import reconstruction, variants
from model import VLM
from predictor import Predictor
from support import options, packing, processes, progress, run_folder
from support.images import ImageStore
from support.options import Config
from support.records import Example
from world.loader import REGIMES, load_examples


def parse_config(argv: list[str] | None = None) -> Config:
    """Config from the command line (support/options.py has every option and its default)."""
    return options.parse_config(argv, __doc__, regime=tuple(REGIMES))


# ---- the examples of one split, ready for the loop ----------------------------------------------


class Examples:
    """Three views of every example as token ids, and their images (data.py, support/images.py)."""

    def __init__(self, examples: list[Example], vlm: VLM, config: Config):
        serializer = data.Serializer(vlm.family, min(config.max_tokens, vlm.max_positions))
        self.store = ImageStore(vlm.family, config.workers, config.feature_cache_gb,
                                config.feature_cache, frozen=not config.train_vision)
        self.examples = examples
        taught = variants.as_taught(examples, config)
        placed = [self.store.add(example) for example in taught]
        self.views = [serializer.views(example, *place, config.pred_tokens, config.target_view)
                      for example, place in zip(taught, placed)]
        if config.method == "recon":
            self.latent_views = reconstruction.latent_views(serializer, taught, placed,
                                                            config.latents)
        self.targets: dict[int, Tensor] = {}  # by row (D): h_R, where it was cached
        self.end_id = serializer.end_id

    def prefetch(self, rows: list[int]) -> None:
        self.store.prefetch([i for row in rows for i in self.views[row].full.images])


def step_rows(examples: Examples, config: Config) -> Iterator[list[int]]:
    """The examples of one optimiser step after another, each once an epoch, for ever."""
    size, order = config.batch * config.accumulate, []
    generator = torch.Generator().manual_seed(config.seed)  # its own: the order is the seed's alone
    while True:
        while len(order) < size:
            order += torch.randperm(len(examples.views), generator=generator).tolist()
        rows, order = order[:size], order[size:]
        if config.accumulate > 1:  # passes of examples of similar length need little padding
            rows.sort(key=lambda row: len(examples.views[row].full.ids))
        yield rows


# ---- one step -----------------------------------------------------------------------------------


class Losses(NamedTuple):
    total: Tensor
    parts: dict[str, Tensor]  # detached, for the log
    pair: tuple[Tensor, Tensor] | None = None  # (h^_R, h_R), each (B, D), detached


def compute_losses(vlm: VLM, predictor: Predictor | None, examples: Examples, rows: list[int],
                   config: Config) -> Losses:
    """The step as the paper tells it. predictor: what Pearl adds to the VLM; None: SFT."""
    views = [examples.views[row] for row in rows]
    # every image is encoded once, however many views show it
    images = examples.store.encoded([i for v in views for i in v.full.images])

    # 1. Full view <I0, Q, R>: say what the expert said.
    full, injected = data.collate([v.full for v in views], vlm.pad_id), None
    if predictor is not None and config.packed:
        # The input view rides along behind it: one pass instead of two, the same numbers.
        full, injected = packing.add_branches(full, views), predictor.pred_tokens
    full = full.to(vlm.device)
    states, inputs, predicted = vlm(full, images, injected)  # (B, T, D), (B, T, D), (B, D)
    vlm_term = losses.vlm_loss(states, full.labels, vlm.logits)  # Eq. 3
    if predictor is None:
        return Losses(vlm_term, dict(loss=vlm_term.detach(), vlm=vlm_term.detach()))

    # 2. Input view <I0, Q> + K [PRED]: what inference will see, and what must predict R.
    if not config.packed:
        asked = data.collate([v.input for v in views], vlm.pad_id).to(vlm.device)
        predicted = vlm(asked, images, predictor.pred_tokens).embedding  # (B, D) h^_R

    # 3. Target view R, without <I0, Q>: in a pass of its own, so that nothing leaks.
    along, along_inputs, forecastable = states, inputs, full.labels != -100
    if config.target_encoder == "current" or config.nextlat_view == "trajectory":
        alone = data.collate([v.target for v in views], vlm.pad_id).to(vlm.device)
        # Eq. 1 needs no gradient here, its target is a constant; Eq. 2 along R does
        with nullcontext() if config.nextlat_view == "trajectory" else torch.no_grad():
            along_target, target_inputs, target = vlm(alone, images)
        if config.nextlat_view == "trajectory":  # every state of R, as in the paper's text
            along, along_inputs, forecastable = along_target, target_inputs, alone.mask
    if config.target_encoder == "frozen":
        cache_targets(vlm, examples, rows, config)  # of those that are not there yet
        target = torch.stack([examples.targets[row] for row in rows]).to(vlm.device)  # (B, D) h_R

    jepa_term = nextlat_term = vlm_term.new_zeros(())
    if config.jepa:
        aim = variants.control_targets(target, rows, config)  # h_R itself, unless a control
        jepa_term = losses.jepa_loss(predicted, aim, config.distance)  # Eq. 1
    if config.nextlat_view != "none":
        forecasts = predictor.latent.forecasts(along, along_inputs, forecastable, config.horizon)
        nextlat_term = losses.nextlat_loss(along, forecasts)  # Eq. 2
    total, parts = losses.pearl_loss(vlm_term, jepa_term, nextlat_term, config.lambda_latent)  # 4
    return Losses(total, parts, (predicted.detach(), target.detach()))


@torch.no_grad()
def cache_targets(vlm: VLM, examples: Examples, rows: list[int], config: Config) -> None:
    """h_R of these examples by the starting model: made once, then looked up.

    Deviation: the paper encodes R with the current model, and its targets collapse here (losses.py
    says why, README what it costs). Fixed targets cannot, and cost no pass after the first.
    "Cached trajectory embeddings" are among the savings that the paper names.
    """
    missing = [row for row in rows if row not in examples.targets]
    # the starting model is this one without its LoRA; trained in full, it is there only at first
    assert not missing or config.lora_rank or not examples.targets, "the starting model is gone"
    for start in range(0, len(missing), config.batch):
        part = missing[start:start + config.batch]
        views = [examples.views[row].target for row in part]
        images = examples.store.encoded([i for view in views for i in view.images])
        with vlm.starting_model():
            batch = data.collate(views, vlm.pad_id).to(vlm.device)
            examples.targets |= zip(part, vlm(batch, images).embedding.cpu())


class Step(torch.nn.Module):
    """A method's losses as a module, so that DistributedDataParallel can watch its gradients."""

    def __init__(self, vlm: VLM, predictor: torch.nn.Module | None, examples: Examples,
                 config: Config):
        super().__init__()
        self.vlm, self.predictor, self.examples, self.config = vlm, predictor, examples, config
        self.losses = reconstruction.compute_losses if config.method == "recon" else compute_losses

    def forward(self, rows: list[int], examples: Examples | None = None) -> Losses:
        device = torch.device(self.config.device).type
        # bfloat16 arithmetic on a GPU, and wherever the weights are bfloat16
        halved = device == "cuda" or self.config.dtype == "bfloat16"
        with torch.autocast(device, torch.bfloat16, enabled=halved):
            return self.losses(self.vlm, self.predictor, examples or self.examples, rows,
                               self.config)


class StepResult(NamedTuple):
    parts: dict[str, Tensor]  # means over this process's examples
    pair: tuple[Tensor, Tensor] | None  # its (h^_R, h_R)
    norm: Tensor  # of the gradient, before clipping


def train_step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: list[int],
               config: Config, rank=0, world=1, upcoming: list[int] = ()) -> StepResult:
    """Forward, loss, backward, clip, step, accumulated over passes of config.batch examples.

    Each pass counts with its share of the examples, so every example weighs the same; L_VLM is a
    mean over tokens within a pass. Each of `world` processes takes every world-th pass, with the
    result of one making all. upcoming: the next step's rows, whose images are made ready.
    """
    parts_sum, pairs = {}, []
    passes = processes.own_passes(rows, config.batch, rank, world)
    coming = [*passes[1:], *processes.own_passes(upcoming, config.batch, rank, world)[:1], []]
    mine = sum(map(len, passes))
    optimizer.zero_grad(set_to_none=True)
    for n, part in enumerate(passes):
        (module.module if world > 1 else module).examples.prefetch(coming[n])
        last = n == len(passes) - 1  # gradients are exchanged once a step
        with nullcontext() if world == 1 or last else module.no_sync():
            loss, parts, pair = module(part)
            (loss * len(part) * world / len(rows)).backward()  # DDP takes the mean over processes
        for name, value in parts.items():
            parts_sum[name] = parts_sum.get(name, 0) + len(part) / mine * value
        pairs += [pair] if pair else []
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.clip)
    if torch.isfinite(norm):  # one bad batch must not spoil the weights for good
        optimizer.step()
    pair = tuple(torch.cat(side) for side in zip(*pairs)) if pairs else None
    return StepResult(parts_sum, pair, norm)


@torch.no_grad()
def validate(module: Step, examples: Examples, config: Config) -> dict[str, float]:
    """Mean loss parts over the validation examples, collapse gauges on all of them together."""
    module.vlm.eval()
    sums, pairs, count = {}, [], len(examples.views)
    for start in range(0, count, config.batch):
        rows = list(range(start, min(start + config.batch, count)))
        _, parts, pair = module(rows, examples)
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(rows) / count
        pairs += [pair] if pair else []
    if pairs:
        sums |= losses.collapse_gauges(*(torch.cat(side) for side in zip(*pairs)))
    if config.track:
        sums |= evaluate.tracked(module.vlm, examples.examples[:config.track], config.answer_prefix)
    module.vlm.train()
    return sums


# ---- the run ------------------------------------------------------------------------------------


class Run(NamedTuple):
    module: torch.nn.Module  # a Step, or DistributedDataParallel around it
    step: Step
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    valid_examples: Examples
    questions: evaluate.Answerer


def build(config: Config, world: int = 1) -> Run:
    """Model, data, what the method adds, optimiser: all that a run has before its first step."""
    vlm = VLM(config.model, dtype=getattr(torch, config.dtype))
    # a family with attention of its own gets a pass a view
    config.packed = config.packed and vlm.family.packs
    *splits, tests = load_examples(config)
    examples, valid_examples = (Examples(split, vlm, config) for split in splits)
    questions = evaluate.Answerer(vlm, tests, config.answer_prefix)
    questions.check_lengths()  # what cannot be asked stops here, before training
    vlm.set_trainable(config.lora_rank, config.lora_alpha, config.lora_dropout,
                      config.lora_targets.split(","), config.train_vision)
    if config.shard:
        processes.shard_frozen(vlm.lm.get_decoder(), config.device, world)
    vlm.to(config.device)
    if config.gradient_checkpointing:
        vlm.recompute_activations()
    predictor = None
    if config.method == "recon":
        predictor = reconstruction.make_scale(vlm, examples, config.latents)
    elif config.method == "pearl" and config.lambda_latent > 0:
        start = vlm.lm.get_input_embeddings().weight[examples.end_id]
        predictor = Predictor(vlm.dim, config.pred_tokens, start, config.nextlat_sees_next)
    if config.method == "pearl" and predictor is not None and config.target_encoder == "frozen":
        # now, while the model is as it comes; of a large data set only what the steps will see
        order = step_rows(examples, config)
        visited = sorted({row for _ in range(config.steps) for row in next(order)})
        for part, rows in (examples, visited), (valid_examples, range(len(valid_examples.views))):
            cache_targets(vlm, part, list(rows), config)
            variants.average_targets(part, config.targets)
    step = module = Step(vlm, predictor, examples, config).to(config.device)
    parameters = [p for p in step.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, math.ceil(config.warmup * config.steps), config.steps)
    if world > 1:  # sharded weights differ between processes, so they are not made equal at first
        module = DistributedDataParallel(step, find_unused_parameters=True,
                                         init_sync=not config.shard)
    return Run(module, step, optimizer, schedule, valid_examples, questions)


def train(config: Config, resume: bool = False) -> Path:
    """The whole run. resume: go on from the last state in config.out, to the same end."""
    rank, world = processes.start_processes(config)
    out = Path(config.out)
    if rank == 0 and not resume:
        run_folder.refuse_used_folder(out)  # before anything that takes time
    torch.manual_seed(config.seed)
    # a function of its own, so that its model is gone when the checkpoint is loaded to be tested
    trained = fit(config, resume, rank, world)
    if trained and rank == 0 and config.shard:
        print(f"everything is in {out}; where the whole model fits, python evaluate.py {out} "
              "--again asks the test questions")
    elif trained and rank == 0:
        evaluate.report(out, config, *trained)
    return out


def fit(config: Config, resume: bool, rank: int, world: int) -> tuple | None:
    """The training loop. Returns (test examples, answers before, seconds); None: a signal came."""
    run, out = build(config, world), Path(config.out)
    examples, vlm = run.step.examples, run.step.vlm
    state = run.module, run.optimizer, run.schedule  # what is saved, and loaded to go on
    step, best = run_folder.load_state(out, *state) if resume else (0, math.inf)
    if rank == 0:  # one process alone writes
        run_folder.forget_later(out, step) if resume else run_folder.start_folder(config)
        progress.announce(config, len(examples.views), run.optimizer, world)
    # shares of a model run in all processes or in none: they are not asked questions here
    alone = rank == 0 and not config.shard
    before = evaluate.answers_before(out, run.questions, config) if alone else []
    vlm.train()
    order = step_rows(examples, config)
    for _ in range(step):
        next(order)
    upcoming, stop, bad = next(order), False, 0
    start, clock = time.time(), progress.Clock(examples.store)
    with processes.finishing_steps():  # a signal now ends the loop, not the program
        while step < config.steps and not stop:
            step, rows, upcoming = step + 1, upcoming, next(order)
            result = train_step(run.module, run.optimizer, rows, config, rank, world, upcoming)
            lr = run.schedule.get_last_lr()[0]
            run.schedule.step()
            bad = progress.count_bad_steps(result.norm, step, bad, out)
            stop = processes.asked_to_stop(world, config.device)
            best = after_step(run, config, step, result, lr, best, clock, rank, stop)
    if stop and rank == 0:
        print(f"stopped after step {step}; python train.py --resume {out} goes on from there")
    return None if stop else (run.questions.examples, before, time.time() - start)


def after_step(run: Run, config: Config, step: int, result: StepResult, lr: float, best: float,
               clock, rank: int, stop: bool) -> float:
    """Log, validate, keep the best checkpoint, save the state: what is due. Returns the best."""
    out, last = Path(config.out), step == config.steps
    if rank == 0 and (step % config.log_every == 0 or last):
        gauges = {}
        if result.pair and len(result.pair[0]) > 1:
            gauges = losses.collapse_gauges(*result.pair)
        progress.log_step(config, step, result.parts, gauges, float(result.norm), lr, clock)
    if (step % config.eval_every == 0 or last) and (rank == 0 or config.shard):
        valid = validate(run.step, run.valid_examples, config)
        if rank == 0:  # one process alone writes
            best = progress.keep_best(config, run.step, step, valid, best,
                                        len(run.valid_examples.views))
        clock.restart()
    if rank == 0 and (step % config.save_every == 0 or last or stop):
        run_folder.save_state(out, run.module, run.optimizer, run.schedule, step, best)
    return best


def main() -> None:
    if sys.argv[1:2] == ["--merge"]:
        evaluate.merge(*sys.argv[2:])
    elif sys.argv[1:2] == ["--resume"]:
        train(run_folder.read_config(Config, sys.argv[2:]), resume=True)
    else:
        train(parse_config())
    processes.leave()


if __name__ == "__main__":
    processes.run_program(main)
