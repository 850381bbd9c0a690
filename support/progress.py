"""What a run says while it trains: log.jsonl and the lines on the screen."""

import dataclasses
import math
import statistics
import time
from pathlib import Path

import torch

from support import recorded, run_folder


class Clock:
    """Milliseconds a step since it was last asked, and the share spent waiting for images."""

    def __init__(self, store):
        self.store = store
        self.restart()

    def restart(self) -> None:
        self.start, self.store.waited = time.time(), 0.0

    def read(self, steps: int) -> dict[str, float]:
        seconds = time.time() - self.start
        found = dict(ms=1000 * seconds / steps, waited=self.store.waited / max(1e-9, seconds))
        self.restart()
        return found


def milliseconds(answer, askers, device) -> float:
    """Of one answer: the median over two or more askers of one question each."""
    taken = []
    for asker in askers:
        start = time.perf_counter()
        answer(asker)
        # a GPU answers later than Python goes on
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(1000 * (time.perf_counter() - start))
    # the first one warms up
    return statistics.median(taken[1:])


def announce(config, examples: int, optimizer, world: int) -> None:
    trained = sum(p.numel() for p in optimizer.param_groups[0]["params"]) / 1e6
    several = f" x {world}" if world > 1 else ""
    print(f"{config.method} on {config.data or config.regime}: {examples} examples, {trained:.2f}M "
          f"trained parameters, {config.device}{several}, run folder {config.out}")


def log_step(config, step: int, parts: dict, gauges: dict[str, float], said: dict[str, float],
             clock: Clock) -> None:
    """A line of the log and of the screen."""
    parts = {name: float(value) for name, value in parts.items()}
    timing = clock.read(step % config.log_every or config.log_every)
    run_folder.log(Path(config.out), "train",
                   dict(step=step, **parts, **gauges, **said, **timing))
    shown = ""
    if gauges:
        shown = (f" | r2 {gauges['r2']:.2f} retrieval {gauges['retrieval']:.2f} "
                 f"rank {gauges['effective_rank']:.1f}")
    terms = " ".join(f"{name} {value:.4f}" for name, value in parts.items())
    left = int((config.steps - step) * timing["ms"] / 1000)
    print(f"{step:5d}/{config.steps} {terms}{shown} | "
          f"lr {said['lr']:.1e} grad {said['grad_norm']:.2f} "
          f"{timing['ms']:.0f} ms/step, {left // 60}:{left % 60:02d} left", flush=True)


SHOWN = ("loss", "r2", "effective_rank", "mean_cosine", "direct", "tool")  # the rest is in the log


def keep_best(config, module, step: int, valid: dict[str, float], best: float) -> float:
    """Log a validation, keep the checkpoint if it is the best so far; returns the best loss."""
    out = Path(config.out)
    run_folder.log(out, "valid", dict(step=step, **valid))
    shown = " ".join(f"{name} {valid[name]:.3f}" for name in SHOWN if name in valid)
    print(f"      validation: {shown}", flush=True)
    count = round(1 / valid.get("retrieval_chance", 1))  # examples that the gauges are over
    if hint := run_folder.collapse_hint(valid, config.target_encoder, count, config.targets):
        print(f"      {hint}", flush=True)
    if valid["loss"] < best:
        run_folder.save_best(out, module.vlm, module.predictor, step, valid)
    return min(best, valid["loss"])


def count_bad_steps(norm, step: int, bad: int, out: Path) -> int:
    """How many steps in a row had no finite gradient; the fifth ends the run."""
    if math.isfinite(float(norm)):
        return 0
    print(f"step {step}: the gradient is not finite; step skipped ({bad + 1} in a row)", flush=True)
    if bad + 1 == 5:
        raise ValueError("five steps in a row without a finite gradient: lower --lr or "
                         f"--lambda_latent; {out} has the last good state")
    return bad + 1


def conclusion(config, before: dict, after: dict) -> str:
    """What the last table shows, in words, and what to run next (tables: see support/tables.py)."""
    total = "all" if "all" in after else next(iter(after))
    was, now = (100 * table[total]["direct"][0] for table in (before, after))
    lines = [f"In words: from image and question alone (direct) {was:.1f}% were right before and "
             f"{now:.1f}% are now."]
    if "tool" in after[total]:
        skill = 100 * after[total]["tool"][0]
        lines.append(f"Given the expert's tool (tool) {skill:.1f}%: how well the trajectories were "
                     "learned. \"free\" is low where the model begins with a plan.")
    record = recorded.recorded(config) if config.method != "sft" else None
    if record:
        lines.append("Beside it, recorded: " + recorded.as_text(record))
        lines.append("Trajectories alone teach the tool and cost direct answering; compare what "
                     "each method keeps of it, at the same tool skill.")
    other = "sft" if config.method != "sft" else "pearl"
    lines.append(f"Next: the same with --method {other}, then python evaluate.py RUN RUN; "
                 "python data.py --show; docs/walkthrough.md")
    return "\n".join(lines)
