"""Draw figures of finished runs: the paper's Fig. 2, 3 and 4, and how skill changes in training.

    pip install matplotlib scikit-learn                  # optional packages, for figures alone
    python analysis/figures.py RUN [RUN ...] --out DIR   # runs on the same data; minutes
    python analysis/figures.py --curves RUN [RUN ...] --out FILE.png     # all that they logged
    python analysis/figures.py --views FILE.png          # the README's picture, by Pillow alone

DIR must be new. It gets latents-per-example.png (Fig. 2), latents-decoded.png (Fig. 3; needs a
recon run), embeddings.png (Fig. 4), neighbours.png (needs a Pearl run), skill.png (needs runs with
--method tracked+NAME), curves.png, and analyses.json with every number. The first run of a method
is drawn.
"""

import argparse
import importlib.util
import json
import math
import random
import statistics
import sys
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`

import torch
import torch.nn.functional as F

import evaluate
import train
from analysis import probes
from analysis.states import Place, config_of
from analysis.views_picture import ViewsPicture
from baselines import reconstruction
from model import VLM
from support import answers, run
from support.features import load_images
from support.files import new_folder, read_json, write_json
from support.images import opened
from support.processes import run_program
from support.records import Example
from support.splits import load_splits
from support.tables import HELD_OUT, overall, summarise
from world import scenes

BASE = "no fine-tuning"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTS = [0, 1, 2, 4, 8, 16, 32, 64]  # of latents, in Fig. 3


def need_packages() -> None:
    """Raises ValueError with the command that installs what is missing."""
    if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "sklearn")):
        raise ValueError("the figures need two optional packages: pip install matplotlib "
                         "scikit-learn")


def refuse_existing(file: Path) -> None:
    if file.exists():
        raise FileExistsError(f"{file} exists already: choose another name, nothing is overwritten")


def canvas(titles: list[str], columns: int = 1, size: tuple[float, float] = (7.0, 4.4)):
    """A matplotlib figure, and axes for each title. size: of each axes, in inches."""
    from matplotlib.figure import Figure

    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure((size[0] * columns, size[1] * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axis, title in zip(axes, titles):
        axis.set_title(title, fontsize=12)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for unused in axes[len(titles):]:
        unused.set_visible(False)
    return figure, axes[:len(titles)]


# ---- what training logged -----------------------------------------------------------------------


def logged(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """"KIND: NAME" -> [(step, value)] of each finite number in a run's log."""
    file = folder / "log.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: {folder} is not a run folder")
    series = defaultdict(list)
    for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        kind, step = record.pop("kind"), record.pop("step")
        for name, value in record.items():
            # a line of kind "left out" has a text
            if isinstance(value, (int, float)) and math.isfinite(value):
                series[f"{kind}: {name}"].append((step, value))
    return series


def curves(runs: dict[str, Path], kinds: tuple[str, ...] = ("valid", "train")):
    """A chart for every name in any of the logs, with one line for each run."""
    logs = {name: logged(folder) for name, folder in runs.items()}
    every = {name for log in logs.values() for name in log}
    names = [name for kind in kinds for name in sorted(every) if name.startswith(kind)]
    if not names:
        raise ValueError(f"nothing is logged yet in {', '.join(map(str, runs.values()))}")
    figure, axes = canvas(names, columns=3, size=(4.6, 3.2))
    for name, axis in zip(names, axes):
        for log in logs.values():
            axis.plot(*zip(*log.get(name, [(math.nan, math.nan)])), marker=".")
        axis.set_xlabel("step")
    figure.legend(axes[0].lines, logs, loc="outside lower center", ncols=3)
    return figure


def shrinking(arms: list, alphas: Sequence[float], before: tuple[float, float]):
    """Direct against held-out accuracy, a curve over alpha for each arm (analysis/shrink.py).
    before: both accuracies of the model before training, in %."""
    figure, (axis,) = canvas(["Accuracy after shrinking the fine-tuning: W0 + alpha (W - W0)\n"
                              "(the large marker is alpha 1; hollow: less than 95% of the arm's "
                              "accuracy with the tool)"], size=(8.4, 5.6))
    axis.plot(before[1], before[0], "*", color="black", markersize=14, linestyle="none",
              label="before training")
    for n, arm in enumerate(arms):
        seeds = f"{len(arm.runs)} seed{'s' * (len(arm.runs) > 1)}"
        ways = dict(held=("direct", True), direct=("direct", False), tool=("tool", False))
        points = [{name: statistics.mean(arm.accuracies(alpha, way, held_out=held_out))
                   for name, (way, held_out) in ways.items()} for alpha in alphas]
        colour = f"C{n}"
        axis.plot([p["held"] for p in points], [p["direct"] for p in points], color=colour,
                  label=f"{arm.name} ({seeds})")
        for alpha, point in zip(alphas, points):
            skilled = point["tool"] >= 0.95 * points[0]["tool"]
            axis.plot(point["held"], point["direct"], "o", color=colour,
                      markersize=10 if alpha == 1 else 6,
                      markerfacecolor=colour if skilled else "white")
    axis.set_xlabel(f"accuracy on the held-out task ({HELD_OUT}), %")
    axis.set_ylabel("direct accuracy on the trained tasks, %")
    axis.legend()
    return figure


def skill(runs: dict[str, Path]):
    """Direct accuracy against accuracy with the expert's tool, an arrow from each validation to the
    next; None if no run logged both."""
    tracked = {name: log for name, folder in runs.items()
               if {"valid: direct", "valid: tool"} <= (log := logged(folder)).keys()}
    if not tracked:
        return None
    title = ("Direct accuracy against tool accuracy over training\n(arrows lead from one "
             "validation to the next; the last has its step)")
    figure, (axis,) = canvas([title], size=(8.4, 5.6))
    for n, (name, log) in enumerate(tracked.items()):
        table = summarise(read_json(runs[name] / "results.json")["before"])
        before = [table[overall(table)].get(way, [0.0])[0] for way in ("tool", "direct")]
        points = [before, *([tool, direct] for (_, tool), (_, direct)
                            in zip(log["valid: tool"], log["valid: direct"]))]
        points = [(100 * tool, 100 * direct) for tool, direct in points]
        axis.plot(*points[0], marker="*", markersize=18, color="black", linestyle="", zorder=3,
                  label="" if n else "before training")
        axis.plot(*zip(*points), marker="o", linestyle="", color=f"C{n}", label=name)
        arrow = dict(arrowstyle="-|>", color=f"C{n}", linewidth=1.8, mutation_scale=16)
        for start, end in zip(points, points[1:]):
            axis.annotate("", end, start, arrowprops=arrow)
        axis.annotate(f"{log['valid: direct'][-1][0]}", points[-1], (8, 4), color=f"C{n}",
                      textcoords="offset points")
    axis.set(xlabel="accuracy with the expert's tool, %", ylabel="direct accuracy, %")
    axis.margins(0.12)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


# ---- latents ------------------------------------------------------------------------------------


def latents_per_example(config: train.Config, decoded: int):
    """Fig. 2: how many latents training examples have, of the run's data or of every regime."""
    vlm, numbers = VLM(config.model), {}
    sources = {Path(config.data).name: config} if config.data else {
        regime: replace(config, regime=regime) for regime in scenes.REGIMES}
    figure, (axis,) = canvas(["Latents that a training example needs (Fig. 2)"])
    for name, source in sources.items():
        counts = []
        for example in load_splits(replace(source, train_examples=200, test_per_task=1))[0][:200]:
            texts = "".join(image.text for image in load_images(example, vlm.family)[1:])
            ids = vlm.tokenizer(texts, add_special_tokens=False).input_ids
            counts.append(ids.count(vlm.lm.config.image_token_id))
        above = sum(one > decoded for one in counts) / len(counts)
        numbers[name] = dict(median=statistics.median(counts), share_above_decoded=above)
        axis.ecdf(counts, label=name, linewidth=2)
    axis.axvline(decoded, color="black", linestyle="--", label=f"decoded at inference: {decoded}")
    axis.set(xlabel="image tokens of the example's tool images", xlim=(0, None),
             ylabel="share of examples with at most as many")
    figure.legend(loc="outside lower center", ncols=3)
    return figure, numbers


def latents_decoded(folder: Path, pearl: float | None, tests: list[Example]):
    """Fig. 3: accuracy of a recon run against the number of latents decoded, with Pearson's r to
    its logarithm. pearl: Pearl's direct accuracy in %."""
    config, vlm = config_of(folder, DEVICE), evaluate.load_model(folder, DEVICE)[0]
    scale = reconstruction.load_scale(run.finished(folder)[1], vlm)
    evaluator = evaluate.Evaluator(vlm, tests, config.answer_prefix)
    accuracy = []
    for count in COUNTS:
        replies = reconstruction.answer(evaluator, scale, count)
        right = [answers.says(reply["text"], ex.options, config.answer_prefix)
                 == ex.options.index(ex.answer) for reply, ex in zip(replies, tests)]
        accuracy.append(100 * sum(right) / len(tests))
    pair = torch.tensor([[math.log2(count) for count in COUNTS[1:]], accuracy[1:]])
    # equal accuracies have no correlation: 0
    r = float(torch.corrcoef(pair)[0, 1].nan_to_num())
    guessing = 100 * statistics.mean(1 / len(example.options) for example in tests)
    figure, (axis,) = canvas(["Accuracy against latents decoded (Fig. 3)"])
    axis.plot(accuracy, marker="o", label=f"reconstruction (r = {r:.2f})")
    if pearl is not None:
        axis.axhline(pearl, color="tab:orange", label="Pearl, direct")
    axis.axhline(guessing, color="grey", linestyle="--", label="guessing")
    axis.set_xticks(range(len(COUNTS)), [str(count) for count in COUNTS])
    axis.set(xlabel="latents decoded", ylabel="accuracy, %", ylim=(0, 100))
    axis.legend()
    return figure, dict(accuracy=dict(zip(COUNTS, accuracy)), pearson_r=r, r_squared=r * r,
                        chance=guessing, trained_with=config.latents)


# ---- embeddings ---------------------------------------------------------------------------------


def embedding_maps(pairs: dict, examples: Sequence[Example], known: dict):
    """Fig. 4: h^_R (crosses) and h_R (dots) of each system in two dimensions, coloured by group.

    pairs: name -> (h^_R, h_R) of these examples; known: name -> probes.knowledge.
    """
    from sklearn.manifold import TSNE

    groups, count = probes.groups_of(examples), len(examples)
    tsne = TSNE(perplexity=min(30.0, (2 * count - 1) / 3), init="pca", random_state=0)
    titles = [f"{name}\nright h_R is the nearest: {known[name]['retrieval']:.1%} (chance "
              f"{known[name]['retrieval_chance']:.1%})\nseparation of groups: h^_R "
              f"{known[name]['h^_R']['separation']:.2f}, h_R {known[name]['h_R']['separation']:.2f}"
              for name in pairs]
    figure, axes = canvas(titles, columns=2, size=(6.4, 5.0))
    for axis, pair in zip(axes, pairs.values()):
        points = tsne.fit_transform(F.normalize(torch.cat(pair), dim=1).numpy())
        for n, group in enumerate(dict.fromkeys(groups)):
            rows = [i for i, other in enumerate(groups) if other == group]
            for view, marker in zip(points.reshape(2, count, 2)[:, rows], "x."):
                axis.scatter(*view.T.tolist(), marker=marker, s=34, color=f"C{n}",
                             label=group if marker == "." else None)
        axis.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    for marker, name in (("x", "h^_R"), (".", "h_R")):
        axes[0].scatter([], [], marker=marker, color="black", label=name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def neighbours(nearest: list[list[int]], examples: Sequence[Example], library: Sequence[Example]):
    """Ten questions, their true tool outputs, and the training trajectories nearest to h^_R. A
    caption is green where the answer is the question's own, else red."""
    columns, cells = 2 + len(nearest[0]), []
    for example, rows in list(zip(examples, nearest))[:10]:
        cells += [(example.image, f"{example.task}: {example.question}", "black"),
                  (example.images[-1], f"true tool output; answer: {example.answer}", "black")]
        for rank, other in enumerate((library[i] for i in rows), start=1):
            color = "tab:green" if other.answer == example.answer else "tab:red"
            cells.append((other.images[-1], f"nearest {rank}: {other.texts[-1]}", color))
    figure, axes = canvas([""] * len(cells), columns, size=(2.0, 2.3))
    for axis, (picture, caption, color) in zip(axes, cells):
        axis.imshow(opened(picture), interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(textwrap.fill(caption, 26, max_lines=3), fontsize=9, color=color)
    return figure


def layers(rows: dict[Place, dict[str, float]], name: str):
    """The answer's share above chance at each layer, one line for each position."""
    figure, axes = canvas([f"{name}: states of R as the cosine sees them",
                           f"{name}: with the mean of all states subtracted"], columns=2)
    for axis, field in zip(axes, ("above_chance", "centred")):
        for position in dict.fromkeys(position for _, position in rows):
            line = [(layer, numbers[field]) for (layer, other), numbers in rows.items()
                    if other == position]
            axis.plot(*zip(*line), marker="o", label=position)
        axis.set(xlabel="layer (0: input of the first; last: behind the final norm)",
                 ylabel="share that depends on the answer,\nabove chance")
        axis.locator_params(axis="x", integer=True)
        axis.legend(title="position")
    return figure


# ---- all of them --------------------------------------------------------------------------------


def embedding_figures(runs: dict[str, Path], configs: dict, tests: list[Example],
                      library: Sequence[Example], out: Path) -> dict:
    """embeddings.png of all runs but recon, neighbours.png of the first with [PRED]; numbers."""
    start = train.parse_config(["--model", next(iter(configs.values())).model, "--device", DEVICE])
    pairs, pearl = {BASE: probes.embeddings(None, start, tests)}, None
    for name, config in configs.items():
        kind = train.find_method(config.method)
        if not issubclass(kind, reconstruction.Recon):
            pairs[name] = probes.embeddings(runs[name], config, tests)
            pearl = pearl or (None if issubclass(kind, train.SFT) else name)
    known = {name: probes.knowledge(pair, tests) for name, pair in pairs.items()}
    few = {name: (pair[0][:250], pair[1][:250]) for name, pair in pairs.items()}
    embedding_maps(few, tests[:250], known).savefig(out / "embeddings.png")
    if not pearl:
        return {"what the embedding knows": known}
    _, targets = probes.embeddings(runs[pearl], configs[pearl], library)
    nearest, numbers = probes.neighbours(pairs[pearl][0], targets, tests, library)
    neighbours(nearest, tests, library).savefig(out / "neighbours.png")
    return {"what the embedding knows": known, "nearest trajectories": numbers}


def all_figures(folders: list[Path], out: Path, per_task: int) -> None:
    """Fill the new folder `out`. Raises ValueError for runs of several data sets."""
    names = [folder.name for folder in folders]
    runs = dict(zip(names if len(set(names)) == len(names) else map(str, folders), folders))
    configs = {name: config_of(folder, DEVICE) for name, folder in runs.items()}
    if len({config.data or config.regime for config in configs.values()}) > 1:
        raise ValueError(f"{', '.join(runs)} were trained on different data: draw the runs of one "
                         "data set at a time (--curves draws any)")
    first, config = {}, next(iter(configs.values()))
    for name, other in configs.items():
        first.setdefault(other.method.removeprefix("tracked+"), name)
    records, _, tests = load_splits(replace(config, test_per_task=per_task))
    tests = [example for example in tests if len(example.images) > 1]
    if len(tests) < probes.MINIMUM:
        raise ValueError(f"{len(tests)} test questions have a trajectory with images, the figures "
                         f"need {probes.MINIMUM}: add records with \"split\": \"test\"")
    # in any order of tasks, so that every picture shows all of them
    random.Random(0).shuffle(tests)
    library, recon, pearl = list(records[:1500]), first.get("recon"), None
    if "pearl" in first:
        table = summarise(read_json(runs[first["pearl"]] / "results.json")["answers"])
        pearl = 100 * table[overall(table)]["direct"][0]
    numbers = {}
    with new_folder(out) as partial:
        decoded = configs[recon].decode_latents if recon else 8
        figures = {"latents per example": latents_per_example(config, decoded)}
        if recon:
            figures["latents decoded"] = latents_decoded(runs[recon], pearl, tests)
        for name, (figure, numbers[name]) in figures.items():
            figure.savefig(partial / f"{name.replace(' ', '-')}.png")
        curves(runs, ("valid",)).savefig(partial / "curves.png")
        if figure := skill(runs):
            figure.savefig(partial / "skill.png")
        numbers |= embedding_figures(runs, configs, tests, library, partial)
        write_json(partial / "analyses.json", numbers)
    print(f"{json.dumps(numbers, indent=1)}\npictures and analyses.json are in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, help="new folder, or with --curves a new file")
    parser.add_argument("--curves", nargs="+", type=Path, metavar="RUN", help="draw their logs")
    parser.add_argument("--views", type=Path, metavar="PNG", help="draw the picture of the views")
    parser.add_argument("--per_task", type=int, default=240, help="test questions of each task")
    args = parser.parse_args()
    out = args.views or args.out
    if not (args.views or args.curves or args.runs) or out is None:
        parser.error("name RUN folders and --out, or --curves RUN and --out, or --views PNG")
    refuse_existing(out)
    if args.views:
        ViewsPicture(scenes.make_example("crop", "train", 1, 0)).paint().save(out)
        return
    need_packages()
    if args.curves:
        curves({str(folder): folder for folder in args.curves}).savefig(out)
    else:
        all_figures(args.runs, out, args.per_task)


if __name__ == "__main__":
    run_program(main)
