"""Train a VLM with Pearl, or with what it is compared with, on expert tool-use trajectories.

    python train.py                         # Pearl on the shipped VLM: a minute or two on two cores
    python train.py --method sft            # the same words, no latent terms; direct, both: answers
    python train.py --method recon          # reconstruction-based latent reasoning (LVR, Mirage)
    python train.py --recipe release        # the authors' code; --recipe paper: the paper's text
    python train.py --model Qwen/Qwen2.5-VL-3B-Instruct --data DIR --dtype bfloat16 --lr 1e-5
    python train.py --resume RUN            # goes on after an interruption, to the same end
    python train.py --merge RUN DIR         # the result as an ordinary transformers checkpoint
    torchrun --nproc-per-node=2 train.py --accumulate 2    # several processes share a step's passes

One step of Pearl (section 3 of arXiv:2604.08065) encodes three views and goes back once:
  1. full view <I0, Q, R>           -> L_VLM (Eq. 3), and states for L_NextLat (Eq. 2)
  2. input view <I0, Q>, K [PRED]   -> h^_R, the state of the last [PRED]
  3. target view R                  -> h_R, the state of its last token   -> L_JEPA (Eq. 1)
SFT is the first alone. `compute_losses` is that step, `train_step` what is done with it. Left out
on purpose: options, the run's folder, processes and signals (support/), the rival and the variants
(baselines/), how questions are asked (evaluate.py).
"""

import math
import sys
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import get_cosine_schedule_with_warmup

import data
import evaluate
import losses
from baselines import cures, reconstruction, release, variants
from losses import Losses, average
from model import VLM
from predictor import Predictor
from support import options, packing, processes, progress, run_folder
from support.options import Config
from support.records import Example
from world.loader import REGIMES, load_examples


def parse_config(argv: list[str] | None = None) -> Config:
    """Config from the command line (support/options.py has every option and its default)."""
    return options.parse_config(argv, __doc__, regime=tuple(REGIMES))


def prepared(examples: list[Example], vlm: VLM, config: Config) -> data.Examples:
    """A split as this run's method is to learn it: views made, images numbered."""
    taught = variants.as_taught(examples, config)
    found = data.Examples(examples, taught, vlm.family, vlm.max_positions, config)
    release.adapt_views(found, taught, config)
    if config.method == "recon":
        reconstruction.add_views(found, taught, config)
    return found


# ---- one step -----------------------------------------------------------------------------------


def compute_losses(vlm: VLM, predictor: Predictor | None, examples: data.Examples, rows: list[int],
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
    # By default there is none here: h_R is looked up, and Eq. 2 runs along the full view.
    along, along_inputs, labels, forecastable = states, inputs, full.labels, full.labels != -100
    if config.target_encoder != "frozen" or config.nextlat_view == "trajectory":
        alone = data.collate([v.target for v in views], vlm.pad_id).to(vlm.device)
        # Eq. 1 needs no gradient here, its target is a constant; Eq. 2 along R does
        with nullcontext() if cures.through_target(config) else torch.no_grad():
            told, told_inputs, target = cures.encode(vlm, alone, images, config, predictor)
        # every state of R, as in the paper's text, and not the full view's supervised ones
        if config.nextlat_view == "trajectory":
            along, along_inputs, labels, forecastable = told, told_inputs, alone.labels, alone.mask
    if config.target_encoder == "frozen":
        cache_targets(vlm, examples, rows, config)
        target = torch.stack([examples.targets[row] for row in rows]).to(vlm.device)  # (B, D) h_R
    jepa_term = nextlat_term = vlm_term.new_zeros(())
    # the same, unless an option puts a head behind h^_R; aim: h_R, or what a control puts there
    predicted, target, aim = cures.pairs(predictor, predicted, target, rows, examples, config)
    if config.jepa and len(aim):
        jepa_term = losses.jepa_loss(predicted, aim, cures.kind(examples, rows, config))  # Eq. 1
    if config.nextlat_view != "none":
        forecasts = predictor.latent.forecasts(along, along_inputs, forecastable, config.horizon)
        nextlat_term = losses.nextlat_loss(along, forecasts)  # Eq. 2
        # the same, unless an option wants the release's mean, or its token term besides
        nextlat_term = release.nextlat_term(nextlat_term, along, forecasts, labels, vlm, config)
    # Eq. 4
    total, parts = losses.pearl_loss(vlm_term, jepa_term, nextlat_term, config.lambda_latent)
    return cures.regularised(total, parts, predicted, target, predictor, config)


@torch.no_grad()
def cache_targets(vlm: VLM, examples: data.Examples, rows: list[int], config: Config) -> None:
    """h_R of these examples by the starting model: made once, then looked up."""
    # Deviation: the paper encodes R with the current model, and its targets collapse here (losses
    # says why, README what it costs). "Cached trajectory embeddings" are savings that it names:
    # fixed targets cannot collapse, and cost no pass after the first
    missing = [row for row in rows if row not in examples.targets]
    # the starting model is this one without its LoRA; trained in full, it is there only at first
    assert not missing or config.lora_rank or not examples.targets, "the starting model is gone"
    for start in range(0, len(missing), config.batch):
        part = missing[start:start + config.batch]
        views = [examples.views[row].target for row in part]
        images = examples.store.encoded([i for view in views for i in view.images])
        with vlm.starting_model():
            batch = data.collate(views, vlm.pad_id).to(vlm.device)
            examples.targets |= zip(part, cures.encode(vlm, batch, images, config).embedding.cpu())


class Step(torch.nn.Module):
    """A method's losses as a module, so that DistributedDataParallel can watch its gradients."""

    def __init__(self, vlm: VLM, predictor: torch.nn.Module | None, examples: data.Examples,
                 config: Config):
        super().__init__()
        self.vlm, self.predictor, self.examples, self.config = vlm, predictor, examples, config
        # the rival's step is another one; all other methods are this file's
        self.losses = reconstruction.compute_losses if config.method == "recon" else compute_losses

    def forward(self, rows: list[int], examples: data.Examples | None = None) -> Losses:
        device, config = torch.device(self.config.device).type, self.config
        # bfloat16 arithmetic on a GPU, and wherever the weights are bfloat16
        halved = device == "cuda" or config.dtype == "bfloat16"
        with torch.autocast(device, torch.bfloat16, enabled=halved):
            return self.losses(self.vlm, self.predictor, examples or self.examples, rows, config)


def train_step(module: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: list[int],
               config: Config, rank=0, world=1, upcoming: list[int] = ()) -> tuple[Losses, Tensor]:
    """Forward, loss, backward, clip, step, over passes of config.batch examples.

    upcoming: the next step's rows. Returns what to log, and the gradient's norm before clipping.
    """
    # each of `world` processes takes every world-th pass, with the result of one making all
    passes = processes.own_passes(rows, config.batch, rank, world)
    # what each pass reads ahead: the one after it, at last the next step's first
    coming = [*passes[1:], *processes.own_passes(upcoming, config.batch, rank, world)[:1], []]
    results = []
    optimizer.zero_grad(set_to_none=True)
    for n, part in enumerate(passes):
        # the next pass's images are read and cut into patches while this one is computed
        (module.module if world > 1 else module).examples.prefetch(coming[n])
        # several processes exchange their gradients once a step, after the last pass
        last = n == len(passes) - 1
        with nullcontext() if world == 1 or last else module.no_sync():
            result = module(part)
            # a pass counts with its share of the examples, so every example weighs the same (L_VLM
            # is a mean over tokens within a pass); DDP takes the mean over processes, hence `world`
            (result.total * len(part) * world / len(rows)).backward()
        results.append(result._replace(total=None))  # its graph is not needed any more
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.clip)
    if torch.isfinite(norm):  # one bad batch must not spoil the weights for good
        optimizer.step()
        cures.after_step(module, config)
    mine = sum(map(len, passes))
    return average(results, [len(part) / mine for part in passes]), norm


@torch.no_grad()
def validate(step: Step, examples: data.Examples, config: Config) -> dict[str, float]:
    """Mean loss parts over the validation examples, collapse gauges on all of them together."""
    step.vlm.eval()
    count, results, shares = len(examples.views), [], []
    for start in range(0, count, config.batch):
        rows = list(range(start, min(start + config.batch, count)))
        result = step(rows, examples)
        results.append(result._replace(parts={k: float(v) for k, v in result.parts.items()}))
        shares.append(len(rows) / count)
    _, found, pair = average(results, shares)
    found |= losses.collapse_gauges(*pair) if pair else {}
    if config.track:
        asked = examples.examples[:config.track]
        found |= evaluate.tracked(step.vlm, asked, config.answer_prefix)
    step.vlm.train()
    return found


# ---- the run ------------------------------------------------------------------------------------


class Run(NamedTuple):
    module: torch.nn.Module  # the Step, or DistributedDataParallel around it
    step: Step
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    valid_examples: data.Examples
    questions: evaluate.Answerer


def trainable(vlm: VLM, examples: data.Examples, config: Config, world: int = 1) -> Step:
    """The VLM with LoRA and what the method adds to it, on config.device."""
    config.packed &= vlm.family.packs  # a family with attention of its own gets a pass a view
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
        start = vlm.lm.get_input_embeddings().weight[examples.serializer.end_id]
        predictor = Predictor(vlm.dim, config.pred_tokens, start, config.nextlat_sees_next)
        release.leave_random(predictor, config)  # by an option alone, and so what cures add
        cures.equip(predictor, vlm, config)
    return Step(vlm, predictor, examples, config).to(config.device)


def build(config: Config, world: int = 1, loaded: list[list[Example]] | None = None) -> Run:
    """Model, data, what the method adds, optimiser: all that a run has before its first step."""
    vlm = VLM(config.model, dtype=getattr(torch, config.dtype))
    *splits, tests = loaded or load_examples(config)
    examples, valid_examples = (prepared(split, vlm, config) for split in splits)
    questions = evaluate.Answerer(vlm, tests, config.answer_prefix)
    tracked = evaluate.Answerer(vlm, splits[1][:config.track], config.answer_prefix)
    for asker in questions, tracked:  # what cannot be asked stops here, before training
        asker.check_lengths()
    step = module = trainable(vlm, examples, config, world)
    if isinstance(step.predictor, Predictor) and config.target_encoder == "frozen":
        # now, while the model is as it comes; of a large data set only what the steps will see
        seen = islice(examples.steps(config), config.steps)
        cache_targets(vlm, examples, sorted({row for rows in seen for row in rows}), config)
        cache_targets(vlm, valid_examples, list(range(len(valid_examples.views))), config)
        for part in (examples, valid_examples):
            variants.average_targets(part, config.targets)
    parameters = [p for p in step.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, math.ceil(config.warmup * config.steps), config.steps)
    # sharded weights differ between processes, so they are not made equal at first
    if world > 1:
        module = DistributedDataParallel(step, find_unused_parameters=True,
                                         init_sync=not config.shard)
    return Run(module, step, optimizer, schedule, valid_examples, questions)


def train(config: Config, resume: bool = False) -> Path:
    """The whole run. resume: go on from the last state in config.out, to the same end."""
    config = run_folder.absolute_paths(config)
    rank, world = processes.start_processes(config)
    out = Path(config.out)
    # before anything that takes time; until the end no other process can have the folder
    with run_folder.held(out, resume) if rank == 0 else nullcontext():
        torch.manual_seed(config.seed)
        # a function of its own, so that its model is gone when the checkpoint is tested
        trained = fit(config, resume, rank, world)
        if trained and rank == 0 and config.shard:
            print(f"everything is in {out}; where the whole model fits, python evaluate.py {out} "
                  "--again asks the test questions")
        elif trained and rank == 0:
            evaluate.report(out, config, *trained)
    return out


def fit(config: Config, resume: bool, rank: int, world: int) -> tuple | None:
    """The training loop. Returns (test examples, answers before, seconds); None: a signal came."""
    out, loaded = Path(config.out), load_examples(config)
    if resume:
        run_folder.refuse_other_inputs(config, loaded)
    run = build(config, world, loaded)
    examples, vlm = run.step.examples, run.step.vlm
    state = run.module, run.optimizer, run.schedule  # what is saved, and loaded to go on
    step, best = run_folder.load_state(out, *state) if resume else (0, math.inf)
    # one process alone writes
    if rank == 0:
        run_folder.forget_later(out, step) if resume else run_folder.start_folder(config, loaded)
        progress.announce(config, len(examples.views), run.optimizer, world)
    # shares of a model run in all processes or in none: they are not asked questions here
    alone = rank == 0 and not config.shard
    before = evaluate.answers_before(out, run.questions, config) if alone else []
    vlm.train()
    # the order is the seed's alone: what was learned from before is passed over
    order = islice(examples.steps(config), step, None)
    upcoming, stop, bad = next(order), False, 0
    start, clock = time.time(), progress.Clock(examples.store)
    # from here on a signal ends the loop after the step it is in, and not the program
    with processes.finishing_steps():
        while step < config.steps and not stop:
            step, rows, upcoming = step + 1, upcoming, next(order)
            result, norm = train_step(run.module, run.optimizer, rows, config, rank, world,
                                      upcoming)
            bad = progress.count_bad_steps(norm, step, bad, out)
            said = dict(grad_norm=float(norm), lr=run.schedule.get_last_lr()[0])
            run.schedule.step()
            stop = processes.asked_to_stop(world, config.device)
            best = after_step(run, config, step, result, said, best, clock, rank, stop)
    if stop and rank == 0:
        print(f"stopped after step {step}; python train.py --resume {out} goes on from there")
    return None if stop else (run.questions.examples, before, time.time() - start)


def after_step(run: Run, config: Config, step: int, result: Losses, said: dict[str, float],
               best: float, clock: progress.Clock, rank: int, stop: bool) -> float:
    """Log, validate, keep the best checkpoint, save the state: what is due. Returns the best."""
    last = step == config.steps
    if rank == 0 and (step % config.log_every == 0 or last):
        gauges = losses.collapse_gauges(*result.pair) if result.pair else {}
        progress.log_step(config, step, result.parts, gauges, said, clock)
    if (step % config.eval_every == 0 or last) and (rank == 0 or config.shard):
        valid = validate(run.step, run.valid_examples, config)
        # shares of a model run in all processes, but one alone writes
        if rank == 0:
            best = progress.keep_best(config, run.step, step, valid, best)
        clock.restart()
    if rank == 0 and (step % config.save_every == 0 or last or stop):
        run_folder.save_state(Path(config.out), run.module, run.optimizer, run.schedule, step, best)
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
    processes.run_program(main, stopped=run_folder.STOPPED)
