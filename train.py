"""Train a VLM with Pearl, or with what it is compared with, on expert tool-use trajectories.

    python train.py                         # Pearl on tiny-vlm: about a minute on two cores
    python train.py --method sft            # the same text without the latent terms
    python train.py --method release        # as the authors' code; --method paper: as the text
    python train.py --method release --model Qwen/Qwen2.5-VL-3B-Instruct --data DIR --dtype bfloat16
    python train.py --resume RUN            # continues an interrupted run, to the same end
    python train.py --merge RUN DIR         # the result as an ordinary transformers checkpoint
    torchrun --nproc-per-node=2 train.py --accumulate 2    # processes share a step's micro-batches

Other methods are classes in baselines/ with options of their own (--method ema --help); a plus
combines them (--method mlp_head+vicreg).
Left out on purpose: the run's folder, processes and signals (support/run.py), rivals and variants
(baselines/), how questions are asked (evaluate.py).
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

import evaluate
import losses
from data import StepRows, Trajectories, TrainingExample, Views, collate, make_views
from losses import Losses
from model import VLM, Encoded
from predictor import Predictor
from support import processes, run, splits
from support.chat import Chat
from support.images import EncodedImage, ImageEncoder, LoadedImage
from support.options import option, optional_folder, parse, value_of, with_options
from support.processes import step_batches
from support.records import Example
from support.step import Method, StoredTargets, encode_two_views


@dataclass
class Config:
    """One run: the defaults are the run that the README reports."""

    method: str = option("pearl", "pearl, sft, or classes of baselines/ joined by +")
    model: str = option(str(Path(__file__).resolve().parent / "tiny-vlm"), "folder or hub id")
    data: str = option("", "data folder (docs/data.md); empty: scenes drawn by world/")
    regime: str = option("single", "the tasks that world/ draws (world/README.md)")
    answer_prefix: str = option("Answer:", "what the last text puts before the answer")
    skip_bad: bool = option(False, "replace faulty records, one in a hundred at most")
    out: str = option("", "run folder; empty: runs/METHOD-REGIME-seedSEED")
    seed: int = option(0, "first weights, order of the data, dropout")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "any PyTorch device")
    dtype: Literal["float32", "bfloat16"] = option("float32", "of the frozen weights")
    # the method
    lambda_latent: float = option(5.0, "lambda of Eq. 4 (the paper: 0.2)")
    pred_tokens: int = option(4, "K; 0: h^_R is the state of the last prompt token")
    distance: Literal["cosine", "smoothl1", "mse", "l2"] = option("cosine", "D of Eq. 1")
    horizon: int = option(1, "d of Eq. 2, in tokens")
    # the optimiser
    steps: int = option(200, "optimiser steps")
    batch: int = option(32, "examples in one micro-batch")
    accumulate: int = option(1, "micro-batches in one optimiser step")
    lr: float = option(1e-3, "peak learning rate; linear warm-up, then cosine to zero")
    lora_rank: int = option(64, "LoRA's rank; its alpha is twice that. 0: train all the decoder")
    train_vision: bool = option(False, "train the vision tower too; else images are encoded once")
    gradient_checkpointing: bool = option(False, "less memory, a third more time")
    shard: bool = option(False, "torchrun: each process holds a share of the frozen layers (FSDP)")
    workers: int = option(-1, "processes that prepare data; -1: one a core with --data, else none")
    min_pixels: int = option(0, "least size of an image, as its processor counts; 0: its own")
    max_pixels: int = option(0, "greatest size of an image; 0: its processor's own")
    train_examples: int = option(1500, "drawn by world/; a tenth as many for validation")
    test_per_task: int = option(120, "test questions of each task, at most")
    eval_every: int = option(50, "steps between validations; the result is that of lowest loss")


class Pearl(Method):
    """One training step of Pearl. Every other method is a subclass (baselines/)."""

    # Method (support/step.py) has the optimiser's constants, and hooks that change nothing here:
    # records, adapt, ways, prepare, after_step. sees_next: the latent predictor reads the next
    # token's embedding. one_pass: two views share a forward pass.
    sees_next, one_pass = True, True

    def __init__(self, vlm: VLM, config: Config, world_size: int = 1):
        super().__init__()
        self.vlm, self.config = vlm, config
        vlm.set_trainable(config, self.lora_dropout, world_size)
        # every image is encoded once in a step, and while the tower is frozen, once in a run
        self.encode_images = ImageEncoder(vlm.family, frozen=not config.train_vision)
        # limit: bytes. --shard stores none: all processes must run the target pass together
        self.targets = StoredTargets(limit=0 if config.shard else 8e9)
        self.build_modules()
        self.to(config.device)

    def build_modules(self) -> None:
        """What Pearl adds to the VLM while it trains."""
        end = self.vlm.lm.get_input_embeddings().weight[self.vlm.family.end_id]
        self.predictor = Predictor(self.vlm.dim, self.config.pred_tokens, end, self.sees_next)
        self.vlm.keep_starting_model()

    def forward(self, batch: list[TrainingExample]) -> Losses:
        """The training step of section 3."""
        images = self.encode_images([image for example in batch for image in example.images])
        # 1. Full view <I0, Q, R>: states (B, T, D). 2. Input view <I0, Q> [PRED]: h^_R (B, D)
        full, prediction = self.encode_views(batch, images)
        # 3. Target view R, encoded apart from <I0, Q>; target.embedding is h_R (B, D)
        target = self.target(batch, images)
        L_vlm = losses.vlm_loss(full.states, full.padded.labels, self.vlm.lm.lm_head)  # Eq. 3
        # the last argument of the next two is for subclasses alone
        L_jepa = self.jepa(prediction, target.embedding, batch)  # Eq. 1
        L_nextlat = self.nextlat(full, target)  # Eq. 2
        total = losses.pearl_loss(L_vlm, L_jepa, L_nextlat, self.config.lambda_latent)  # Eq. 4
        pair = prediction, target.embedding
        return Losses.of(total, pair, vlm=L_vlm, jepa=L_jepa, nextlat=L_nextlat)

    def encode_views(self, batch: list[TrainingExample],
                     images: dict[str, EncodedImage]) -> tuple[Encoded, Tensor]:
        """1. the full view, 2. h^_R of the input view."""
        full_views, input_views, _ = map(list, zip(*(example.views for example in batch)))
        pred_embeddings, pad_id = self.predictor.pred_embeddings, self.vlm.pad_id
        # Where the model's attention takes such a mask, one pass over <I0, Q> R [PRED] gives what
        # the two passes below give: [PRED] sees what is before R and never R, and R never [PRED].
        if self.one_pass and self.vlm.family.packs:
            return encode_two_views(self.vlm, full_views, input_views, images, pred_embeddings,
                                    collate)
        full = self.vlm(collate(full_views, pad_id), images)
        return full, self.vlm(collate(input_views, pad_id), images, pred_embeddings).embedding

    def encode_target(self, vlm: VLM, batch: list[TrainingExample],
                      images: dict[str, EncodedImage]) -> Encoded:
        """3. A forward pass of `vlm` over the target views; its `embedding` is h_R."""
        return vlm(collate([example.views.target for example in batch], vlm.pad_id), images)

    @torch.no_grad()
    def target(self, batch: list[TrainingExample], images: dict[str, EncodedImage]) -> Encoded:
        """h_R by the frozen starting model: computed at a record's first use, then looked up."""
        # Deviation: the paper encodes R with the current model, and its targets collapse here
        # (losses.jepa_loss says why; --method current). It also speaks of "cached trajectory
        # embeddings"; only fixed targets can be cached, and these cannot collapse.
        not_stored = [example for example in batch if example.index not in self.targets.cache]
        computed = {}
        if not_stored:
            with self.vlm.starting_model() as start:
                # a trained vision tower has changed the features: encode with the starting one
                if self.config.train_vision:
                    new_images = [image for example in not_stored for image in example.images]
                    images = ImageEncoder(start.family, frozen=False)(new_images)
                h_R = self.encode_target(start, not_stored, images).embedding
                computed = {example.index: h for example, h in zip(not_stored, h_R)}
        h_R = self.targets.add_and_look_up([example.index for example in batch], computed)  # (B, D)
        return Encoded(h_R.to(self.config.device))

    def jepa(self, prediction: Tensor, target: Tensor, batch: list[TrainingExample]) -> Tensor:
        return losses.jepa_loss(prediction, target, self.config.distance)

    def nextlat(self, full: Encoded, target: Encoded) -> Tensor:
        # Deviation: the paper (--method paper) runs Eq. 2 along R read alone; we, like the release,
        # along the supervised positions of the full view
        supervised = full.padded.labels != -100
        forecasts = self.predictor.latent.forecasts(full.states, full.input_embeddings, supervised,
                                                    self.config.horizon)
        return losses.nextlat_loss(full.states, forecasts)

    @classmethod
    def views(cls, config: Config, chat: Chat, example: Example,
              images: list[LoadedImage]) -> Views:
        return make_views(chat, cls.adapt(example, config), images, config.pred_tokens)


class SFT(Pearl):
    """Supervised fine-tuning: Eq. 3 alone. Nothing but LoRA is added to the VLM."""

    def build_modules(self) -> None:
        self.predictor = None

    def forward(self, batch: list[TrainingExample]) -> Losses:
        images = self.encode_images([image for example in batch for image in example.images])
        full = self.vlm(collate([example.views.full for example in batch], self.vlm.pad_id), images)
        L_vlm = losses.vlm_loss(full.states, full.padded.labels, self.vlm.lm.lm_head)
        return Losses.of(L_vlm, None, vlm=L_vlm)


def find_method(name: str) -> type[Pearl]:
    """The class for --method. Raises ValueError naming the methods that there are."""
    core = dict(pearl=Pearl, sft=SFT)
    return core.get(name) or optional_folder("baselines", f"--method {name}").find(name)


def dataset(method: Pearl, examples: Sequence[Example], split: str) -> Trajectories:
    """A split as the method learns it."""
    kind, config, vlm = type(method), method.config, method.vlm
    return Trajectories(kind.records(examples, config), split, partial(kind.views, config),
                        vlm.chat, method.encode_images.cache, config.skip_bad)


def fit(config: Config, this_run: run.Run) -> tuple | None:
    """The training loop. this_run: folder, state and signals of the run (support/run.py). Returns
    (test examples, answers before, seconds), or None if a signal ended it."""
    torch.manual_seed(config.seed)
    vlm = VLM(config.model, config.dtype, config.min_pixels, config.max_pixels)
    examples = train_examples, valid_examples, tests = splits.load_splits(config)
    # a question that cannot be asked stops the run here, before training
    evaluator = evaluate.Evaluator(vlm, tests, config.answer_prefix)
    method = find_method(config.method)(vlm, config, this_run.world_size)
    train_set = dataset(method, train_examples, "train")
    valid_set = dataset(method, valid_examples, "validation")
    method.prepare([train_set, valid_set])

    parameters = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=method.weight_decay)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, math.ceil(method.warmup * config.steps), config.steps)
    parallel_method = this_run.start(method, optimizer, schedule, examples)
    before = this_run.once("before.json", lambda: evaluate.answer_questions(evaluator))
    method.train()
    rows = StepRows(len(train_set), config.batch * config.accumulate, config.seed, this_run.step)
    ready = step_batches(train_set, rows, config.batch, run.workers(config), this_run.rank,
                         this_run.world_size)
    # the loop ends at config.steps, or after the step in which a signal came
    for step, micro_batches in this_run.steps(ready):
        optimizer.zero_grad(set_to_none=True)
        results = []
        for batch in micro_batches:
            # several processes exchange their gradients once a step, after the last micro-batch
            with this_run.exchange(parallel_method, last=batch is micro_batches[-1]):
                with run.autocast(config):
                    result = parallel_method(batch)
                # every micro-batch weighs the same; DDP takes the mean over processes
                (result.total * (this_run.world_size / config.accumulate)).backward()
            # without the total, which holds the graph in memory
            results.append(result._replace(total=None))
        norm = torch.nn.utils.clip_grad_norm_(parameters, method.clip)
        # one bad batch must not ruin the weights
        if this_run.is_finite(norm, step):
            optimizer.step()
            method.after_step(step)
        if this_run.logs(step):
            this_run.log_step(step, losses.average(results), norm, schedule.get_last_lr()[0])
        schedule.step()
        if this_run.validates(step):
            this_run.keep_best(method, step, validate(method, valid_set))
        this_run.save(step, train_set, valid_set)
    return (tests, before, this_run.seconds) if this_run.step == config.steps else None


@torch.no_grad()
def validate(method: Pearl, dataset: Trajectories) -> dict[str, float]:
    """Mean loss parts, and the gauges, over the validation examples."""
    method.eval()
    config, results, sizes = method.config, [], []
    rows = [part.tolist() for part in torch.arange(len(dataset)).split(config.batch)]
    for (batch,) in step_batches(dataset, rows, config.batch, run.workers(config)):
        with run.autocast(config):
            results.append(method(batch))
        # the last one may be smaller
        sizes.append(len(batch))
    method.train()
    return losses.average(results, sizes)


def train(config: Config, resume: bool = False) -> Path:
    """The whole run. resume: continue from the last state in config.out, to the same end."""
    with run.Run(config, resume) as this_run:
        # `fit` is a function so that its model is freed before the report loads one
        trained = fit(this_run.config, this_run)
        if trained and this_run.asks_questions:
            evaluate.report(this_run.out, this_run.config, *trained)
    return this_run.out


def config_class(method: str) -> type[Config]:
    """Config with the method's own options: a class may name some in `Options`."""
    return with_options(Config, find_method(method).__mro__)


def parse_config(argv: list[str] | None = None) -> Config:
    config = parse(config_class(value_of("method", argv, "pearl")), argv, __doc__)
    config.out = config.out or f"runs/{config.method}-{config.regime}-seed{config.seed}"
    return config


def main() -> None:
    if sys.argv[1:2] == ["--merge"]:
        run.merge(VLM, *sys.argv[2:])
    elif sys.argv[1:2] == ["--resume"]:
        train(run.read_config(config_class, sys.argv[2:]), resume=True)
    else:
        train(parse_config())
    processes.leave()


if __name__ == "__main__":
    # under its own name, so that baselines/ and this program share one class Pearl
    import train as this_module

    processes.run_program(this_module.main, stopped=run.STOPPED)
