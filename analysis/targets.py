"""What does h_R tell? Before any training: what L_JEPA would teach, measured on the trajectories.

    python analysis/targets.py                               # shipped model: half a minute
    python analysis/targets.py --model MODEL --data DIR      # yours; takes the options of train.py
    python analysis/targets.py --layers                      # every layer and position of R, as a
                                 table, and which to predict: the rule is in analysis/states.py
      --figure PNG               the same as a picture, in a new file
      --text_model smollm2       R's words read by a real language model (analysis/text_model.py)
    python analysis/targets.py --runs RUN [RUN ...]          # what training has made of it, an arm
                                 a line: of the validation trajectories, by the model that was kept

Pearl predicts h_R from image and question. What of it depends on the answer can teach answering;
what is common to all trajectories, or to all of a family, cannot. RESULTS.md ("What h_R tells")
shows what becomes of Pearl where h_R hardly tells the answer. Families and answers must repeat in
the data: with an answer of its own for every record there is nothing to average, and
answer_by_chance comes close to answer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`

import argparse
import statistics
from dataclasses import replace

import torch

import evaluate
import losses
import train
from analysis import states, text_model
from analysis.states import shares
from analysis.study import named
from model import VLM
from support import options, run_folder
from support.files import read_json
from support.processes import run_program
from support.records import Example
from world.loader import REGIMES, load_examples


def training(config: train.Config) -> list[Example]:
    """The training examples; hardly a test question is drawn for them."""
    return load_examples(replace(config, test_per_family=1))[0][:config.train_examples]


def report(config: train.Config) -> str:
    world = training(config)
    vlm = VLM(config.model, getattr(torch, config.dtype)).to(config.device).eval()
    examples, rows = train.prepared(world, vlm, config), list(range(len(world)))
    train.cache_targets(vlm, examples, rows, config)
    targets = torch.stack([examples.targets[row] for row in rows])
    found, gauges = shares(targets, world), losses.collapse_gauges(targets, targets)
    return (f"h_R of {config.model} on {len(world)} trajectories of "
            f"{config.data or config.regime}, shares of its squared length:\n"
            f"  {found['common']:.3f} is common to all\n"
            f"  {found['family']:.3f} tells the family\n"
            f"  {found['answer']:.3f} tells the answer within the family "
            f"({found['answer_by_chance']:.3f} with answers dealt anew)\n"
            f"  {found['rest']:.3f} tells something else\n"
            f"mean cosine of two h_R {gauges['mean_cosine']:.3f}, effective rank "
            f"{gauges['effective_rank']:.1f}")


def layers_report(config: train.Config, name: str, figure: Path | None) -> str:
    """The table of states and what is recommended. name: a language model's, or empty."""
    if figure:
        states.free_name(figure)
    world = training(config)
    found = (text_model.of_words(name, world, config.batch) if name
             else states.of_model(config, world))
    rows = states.measured(found, world)
    who = f"the words read by {name}" if name else f"of {config.model}"
    if figure:
        states.picture(rows, Path(name or config.model).name).save(figure)
    return states.said(rows, f"{who}, {len(world)} trajectories of {config.data or config.regime}")


@torch.no_grad()
def of_run(run: Path, device: str) -> dict[str, float]:
    """h_R by a finished run's own model: shares, gauges, and the ms of a step with all it waits
    for."""
    vlm, settings, _ = evaluate.load_run(run, device)
    config = train.Config(**settings)
    world = load_examples(config)[1]
    # LoRA is merged into the weights, so what was the starting model is now the trained one
    examples = train.prepared(world, vlm, config)
    train.cache_targets(vlm, examples, list(range(len(world))), config)
    h = torch.stack([examples.targets[row] for row in range(len(world))])
    ms = 1000 * read_json(run / "results.json")["train_seconds"] / config.steps
    return shares(h, world) | losses.collapse_gauges(h, h) | dict(ms=ms)


def runs_report(runs: list[Path], device: str) -> str:
    """Mean +/- std over the seeds of each arm. A study's folder names its arms."""
    configs = {str(run): run_folder.finished(run)[0] for run in runs}
    arm_of = named(configs)
    columns = dict(mean_cosine="mean cosine", effective_rank="effective rank", common="common",
                   family="family", answer="answer", answer_by_chance="by chance", ms="ms a step")
    lines = [f"| arm | seeds | {' | '.join(columns.values())} |", "|---" * 9 + "|"]
    found: dict[str, list[dict]] = {}
    for run in configs:
        found.setdefault(arm_of[run], []).append(of_run(Path(run), device))
    for arm, seeds in found.items():
        cells = []
        for name in columns:
            values = [seed[name] for seed in seeds]
            digits = 0 if name == "ms" else 1 if name == "effective_rank" else 3
            spread = f" +/- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
        lines.append(f"| {arm} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--layers", action="store_true")
    parser.add_argument("--text_model", default="")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--runs", type=Path, nargs="+")
    own, rest = parser.parse_known_args([options.underscored(word) for word in sys.argv[1:]])
    config = options.parse_config(rest, __doc__, regime=tuple(REGIMES))
    if not own.layers and (own.text_model or own.figure):
        raise ValueError("--text_model and --figure belong to --layers: write --layers too")
    if own.runs:
        print(runs_report(own.runs, config.device))
        return
    print(layers_report(config, own.text_model, own.figure) if own.layers else report(config))


if __name__ == "__main__":
    run_program(main)
