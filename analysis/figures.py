"""Draw figures of finished runs: the paper's Fig. 2, 3 and 4, and what training logged.

    pip install matplotlib scikit-learn                  # optional packages, for figures alone
    python analysis/figures.py RUN [RUN ...] --out DIR   # runs on the same data; minutes
    python analysis/figures.py --curves RUN [RUN ...] --out FILE.png     # all that they logged

DIR must be new. It gets latents-per-example.png (Fig. 2), latents-decoded.png (Fig. 3; needs a
recon run), embeddings.png (Fig. 4; all runs but recon), curves.png, and analyses.json with every
number, linear probes of h^_R and h_R among them. The first run of a method is drawn.
Letters: n examples, D hidden size, K predictor tokens.
"""

import importlib.util
import json
import math
import random
import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`
import torch
from torch import Tensor, nn

import evaluate
import losses
import train
from analysis.compare import BASE
from analysis.targets import batches_of, config_of, load_method, targets_of
from baselines import reconstruction, variants
from data import collate
from predictor import Predictor
from support import families, files, processes, run, splits, tables
from support.images import load_images
from support.records import Example
from world import scenes, tools

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MINIMUM = 6  # examples: with fewer, nothing can be fitted and tested
COUNTS = [0, 1, 2, 4, 8, 16, 32, 64]  # of latents, in Fig. 3


def refuse(out: Path) -> None:
    """What would stop a figure, before any work: FileExistsError; ValueError: a missing package."""
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose another name, nothing is overwritten")
    if any(importlib.util.find_spec(name) is None for name in ("matplotlib", "sklearn")):
        raise ValueError("figures need optional packages: pip install matplotlib scikit-learn")


def canvas(titles: list[str], columns: int = 1, size: tuple[float, float] = (7.0, 4.4)):
    """A matplotlib figure, and axes for each title. size: of each axes, in inches."""
    from matplotlib.figure import Figure

    columns = min(columns, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure((size[0] * columns, size[1] * rows), dpi=110, layout="constrained")
    for n, title in enumerate(titles, start=1):
        axis = figure.add_subplot(rows, columns, n, title=title)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, figure.axes


def logged(folder: Path) -> dict[str, list[tuple[float, float]]]:
    """"KIND: NAME" -> [(step, value)] of each finite number in a run's log."""
    series, file = defaultdict(list), folder / "log.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: {folder} is not a run folder")
    for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        kind, step = record.pop("kind"), record.pop("step")
        for name, value in record.items():
            # a line of kind "left out" has a text
            if isinstance(value, (int, float)) and math.isfinite(value):
                series[f"{kind}: {name}"].append((step, value))
    return series


def curves(folders: list[Path], kinds: tuple[str, ...] = ("valid", "train")):
    """A chart for every name in any of the logs, with one line for each run."""
    logs = {str(folder): logged(folder) for folder in folders}
    every = sorted(set().union(*logs.values()))
    names = [name for kind in kinds for name in every if name.startswith(kind)]
    if not names:
        raise ValueError(f"nothing is logged yet in {', '.join(logs)}")
    figure, axes = canvas(names, columns=3, size=(4.6, 3.2))
    for name, axis in zip(names, axes):
        for log in logs.values():
            axis.plot(*zip(*log.get(name, [(math.nan, math.nan)])), marker=".")
        axis.set_xlabel("step")
    figure.legend(axes[0].lines, logs, loc="outside lower center", ncols=3)
    return figure


def latents_per_example(config: train.Config, decoded: int):
    """Fig. 2: how many latents training examples have, of the run's data or of every regime."""
    family, numbers = families.load_family(config.model), {}
    sources = {Path(config.data).name: config} if config.data else {
        regime: replace(config, regime=regime) for regime in scenes.REGIMES}
    figure, (axis,) = canvas(["Latents that a training example needs (Fig. 2)"])
    for name, source in sources.items():
        counts = []
        few = replace(source, train_examples=200, test_per_task=1)
        for example in splits.load_splits(few)[0][:200]:
            texts = "".join(image.text for image in load_images(example, family)[1:])
            ids = family.tokenizer(texts, add_special_tokens=False).input_ids
            counts.append(ids.count(family.lm.config.image_token_id))
        above = sum(one > decoded for one in counts) / len(counts)
        numbers[name] = dict(median=statistics.median(counts), share_above_decoded=above)
        axis.ecdf(counts, label=name, linewidth=2)
    axis.axvline(decoded, color="black", linestyle="--", label=f"decoded at inference: {decoded}")
    axis.set(xlabel="image tokens of the example's tool images", xlim=(0, None),
             ylabel="share of examples with at most as many")
    figure.legend(loc="outside lower center", ncols=3)
    return figure, numbers


def latents_decoded(folder: Path, pearl: Path | None, tests: list[Example]):
    """Fig. 3: accuracy of a recon run against the number of latents decoded, with Pearson's r to
    its logarithm. pearl: a run whose direct accuracy is drawn beside it."""
    vlm, config, _ = evaluate.load_model(folder, DEVICE)
    scale = reconstruction.load_scale(run.config_and_checkpoint(folder)[1], vlm)
    evaluator = evaluate.Evaluator(vlm, tests, config.answer_prefix)
    accuracy = []
    for count in COUNTS:
        replies = reconstruction.answer(evaluator, scale, count)
        right = [tables.answer_record(ex, dict(latent=reply), config.answer_prefix)["latent_right"]
                 for reply, ex in zip(replies, tests)]
        accuracy.append(100 * statistics.mean(right))
    pair = torch.tensor([[math.log2(count) for count in COUNTS[1:]], accuracy[1:]])
    r = float(torch.corrcoef(pair)[0, 1].nan_to_num())  # equal accuracies have no correlation: 0
    guessing = 100 * statistics.mean(1 / len(example.options) for example in tests)
    figure, (axis,) = canvas(["Accuracy against latents decoded (Fig. 3)"])
    axis.plot(accuracy, marker="o", label=f"reconstruction (r = {r:.2f})")
    if pearl:
        table = tables.summarise(files.read_json(pearl / "results.json")["answers"])
        axis.axhline(100 * table[tables.overall(table)]["direct"][0], color="tab:orange",
                     label="Pearl, direct")
    axis.axhline(guessing, color="grey", linestyle="--", label="guessing")
    axis.set_xticks(range(len(COUNTS)), [str(count) for count in COUNTS])
    axis.set(xlabel="latents decoded", ylabel="accuracy, %", ylim=(0, 100))
    axis.legend()
    return figure, dict(accuracy=dict(zip(COUNTS, accuracy)), pearson_r=r, r_squared=r * r,
                        chance=guessing, trained_with=config.latents)


@torch.no_grad()
def embeddings(folder: Path | None, config: train.Config,
               examples: list[Example]) -> tuple[Tensor, Tensor]:
    """(h^_R, h_R), (n, D) each, by a run; folder None: by the starting model of config. h_R is by
    the model that the run predicts: the starting model if its target is frozen. A run without
    [PRED] rows has K = 0: h^_R is the state of the last prompt token."""
    rows = None  # of [PRED], where the run has some
    file = folder and run.config_and_checkpoint(folder)[1] / Predictor.file_name
    if file and file.is_file():
        rows = files.read_tensors(file, config.device)[0]["pred_embeddings"]
    config = replace(config, pred_tokens=0 if rows is None else len(rows))  # rows (K, D)
    method, predictions = load_method(config, folder), []
    for batch, images in batches_of(method, examples):
        views = collate([example.views.input for example in batch], method.vlm.pad_id)
        predictions.append(method.vlm(views, images, rows).embedding.float().cpu())
    frozen = rows is not None and not isinstance(method, variants.Current)
    return torch.cat(predictions), targets_of(load_method(config) if frozen else method, examples)


def probe(h: Tensor, values: list[str] | Tensor) -> float:
    """Linear probe of h (n, D) on held-out thirds: accuracy for n names, R^2 for numbers (n, d)."""
    from sklearn.linear_model import Ridge, RidgeClassifier
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = Ridge if isinstance(values, Tensor) else RidgeClassifier
    model = make_pipeline(StandardScaler(), regression(alpha=10.0))
    folds = KFold(3, shuffle=True, random_state=0)
    return float(cross_val_score(model, h.numpy(), values, cv=folds).mean())


def separation(h: Tensor, groups: list[str]) -> float:
    """Mean silhouette by cosine distance: 1 for distant clusters, 0 for none, negative if mixed."""
    from sklearn.metrics import silhouette_score

    if not 1 < len(set(groups)) < len(groups):
        return 0.0
    return float(silhouette_score(h.numpy(), groups, metric="cosine"))


def groups_of(examples: list[Example]) -> list[str]:
    """The task of each example, or, if there is one task, the answer; the rarest are "other"."""
    tasks = [example.task for example in examples]
    names = tasks if len(set(tasks)) > 1 else [example.answer for example in examples]
    frequent = dict(Counter(names).most_common(9 if len(set(names)) > 10 else 10))
    return [name if name in frequent else "other" for name in names]


def knowledge(pair: tuple[Tensor, Tensor], examples: list[Example]) -> dict:
    """Probes, separation and retrieval of (h^_R, h_R). The answer, and the numbers in the first
    call (R^2), are probed on the most frequent task; `chance`: share of its commonest answer."""
    tasks, groups = [example.task for example in examples], groups_of(examples)
    (task, count), = Counter(tasks).most_common(1)
    rows = [n for n, other in enumerate(tasks) if other == task]
    answers = [examples[n].answer for n in rows]
    calls = [tools.CALL.search(examples[n].texts[0]) for n in rows]
    places = [[float(x) for x in call[2].split()] if call else [] for call in calls]
    probes = dict(task=(range(len(tasks)), tasks)) if len(set(tasks)) > 1 else {}
    if count >= MINIMUM and len(set(answers)) > 1:
        probes["answer"] = rows, answers
    # every call must have as many numbers as the others
    if count >= MINIMUM and len(set(map(len, places))) == 1 and places[0]:
        probes["place_r2"] = rows, torch.tensor(places)
    chance = Counter(answers).most_common(1)[0][1] / count
    numbers: dict[str, dict] = {}
    for name, h in zip(("h^_R", "h_R"), pair):
        numbers[name] = dict(separation=separation(h, groups)) | {
            value: probe(h[list(part)], values) for value, (part, values) in probes.items()}
    numbers["probed"] = dict(task=task, examples=count, chance=chance)
    return numbers | losses.collapse_gauges(*pair)


def embedding_maps(configs: dict[Path, train.Config], tests: list[Example]):
    """Fig. 4: h^_R (crosses) and h_R (dots) of each system in two dimensions, coloured by group;
    and what they encode. A recon run has no h^_R and is left out."""
    from sklearn.manifold import TSNE

    start = train.Config(model=next(iter(configs.values())).model, device=DEVICE)
    pairs = {BASE: embeddings(None, start, tests)}
    for folder, config in configs.items():
        if not issubclass(train.find_method(config.method), reconstruction.Recon):
            pairs[str(folder)] = embeddings(folder, config, tests)
    known = {name: knowledge(pair, tests) for name, pair in pairs.items()}
    groups = groups_of(tests[:250])
    count = len(groups)
    tsne = TSNE(perplexity=min(30.0, (2 * count - 1) / 3), init="pca", random_state=0)
    titles = [f"{name}\nright h_R is the nearest: {one['retrieval']:.1%} (chance "
              f"{one['retrieval_chance']:.1%})\nseparation of groups: h^_R "
              f"{one['h^_R']['separation']:.2f}, h_R {one['h_R']['separation']:.2f}"
              for name, one in known.items()]
    figure, axes = canvas(titles, columns=2, size=(6.4, 5.0))
    for axis, pair in zip(axes, pairs.values()):
        both = nn.functional.normalize(torch.cat([h[:count] for h in pair]), dim=1)
        points = tsne.fit_transform(both.numpy()).reshape(2, count, 2)
        for n, group in enumerate(dict.fromkeys(groups)):
            for view, marker in zip(points[:, [other == group for other in groups]], "x."):
                axis.scatter(*view.T.tolist(), marker=marker, s=34, color=f"C{n}",
                             label=group if marker == "." else None)
        axis.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
    for marker, name in (("x", "h^_R"), (".", "h_R")):
        axes[0].scatter([], [], marker=marker, color="black", label=name)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure, known


def all_figures(folders: list[Path], out: Path, per_task: int) -> None:
    """Fill the new folder `out`. Raises ValueError for runs of several data sets."""
    configs = {folder: config_of(folder, DEVICE) for folder in folders}
    if len({config.data or config.regime for config in configs.values()}) > 1:
        raise ValueError(f"{', '.join(map(str, folders))} were trained on different data: draw the "
                         "runs of one data set at a time (--curves draws any)")
    # reversed: the first run of a method is the one that stays
    first = {config.method: folder for folder, config in reversed(configs.items())}
    recon, config, numbers = first.get("recon"), configs[folders[0]], {}
    tests = [example for example in splits.load_splits(replace(config, test_per_task=per_task))[2]
             if len(example.images) > 1]
    if len(tests) < MINIMUM:
        raise ValueError(f"{len(tests)} test questions have a trajectory with images, the figures "
                         f"need {MINIMUM}: add records with \"split\": \"test\"")
    random.Random(0).shuffle(tests)  # in any order of tasks, so that the map shows all of them
    with files.new_folder(out) as partial:
        curves(folders, ("valid",)).savefig(partial / "curves.png")
        decoded = configs[recon].decode_latents if recon else 8
        figure, numbers["latents per example"] = latents_per_example(config, decoded)
        figure.savefig(partial / "latents-per-example.png")
        if recon:
            figure, numbers["latents decoded"] = latents_decoded(recon, first.get("pearl"), tests)
            figure.savefig(partial / "latents-decoded.png")
        figure, numbers["what the embedding knows"] = embedding_maps(configs, tests)
        figure.savefig(partial / "embeddings.png")
        files.write_json(partial / "analyses.json", numbers)
    print(f"{json.dumps(numbers, indent=1)}\npictures and analyses.json are in {out}")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, required=True, help="new folder; of --curves: new file")
    parser.add_argument("--curves", nargs="+", type=Path, metavar="RUN", help="draw their logs")
    parser.add_argument("--per_task", type=int, default=240, help="test questions of each task")
    args = parser.parse_args()
    if not (args.curves or args.runs):
        parser.error("name RUN folders, or --curves RUN")
    refuse(args.out)
    if args.curves:
        curves(args.curves).savefig(args.out)
    else:
        all_figures(args.runs, args.out, args.per_task)


if __name__ == "__main__":
    processes.run_program(main)
