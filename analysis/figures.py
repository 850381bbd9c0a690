"""The paper's figures and what the embedding knows, from finished runs. Numbers are printed too.

    python analysis/figures.py runs/study/tiny-vlm/mixed [--out DIR]    # a regime of a study
    python analysis/figures.py RUN [RUN ...] --out DIR      # any runs, trained on the same data
    python analysis/figures.py --curves RUN [RUN ...] --out FILE.png    # all that they logged
    python analysis/figures.py --views FILE.png              # the README's picture of the views

Written to DIR, which must be new: latents-per-example.png (Fig. 2), latents-decoded.png (Fig. 3),
embeddings.png (Fig. 4), skill.png (direct accuracy against tool accuracy over training),
curves.png (validation), neighbours.png, and analyses.json with every number. A run that was
trained on a data folder is shown on that folder's records, any other on scenes of its own regime.
A few minutes on two cores.
"""

import argparse
import dataclasses
import json
import math
import random
import statistics
import sys
from collections import Counter
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import data
import evaluate
import losses
import train
from analysis.charts import Chart, beside, ink_of, views_picture
from analysis.probes import classes, pearson, probe, separation, tsne
from analysis.targets import shares
from baselines import reconstruction
from model import VLM
from predictor import Predictor
from support import answers, run_folder
from support.files import new_folder, read_json, read_tensors, write_json
from support.images import ImageStore
from support.processes import run_program
from support.records import Example, read_folder
from support.tables import summarise
from world import scenes, tools

BASE = "no fine-tuning"
LEAST = 6  # examples without which nothing can be fitted and tested
STUDIED = ("sft", "direct", "recon", "pearl")  # the arms of a study that are drawn


# ---- runs and their data ------------------------------------------------------------------------


def named_runs(folders: list[Path]) -> dict[str, Path]:
    """Run folders by name. A folder of a study gives its arms, of each the run of the lowest seed.
    Raises FileNotFoundError where no finished run is."""
    found: dict[str, Path] = {}
    for folder in folders:
        if (folder / "results.json").is_file():
            config = read_json(folder / "config.json")
            name = f"{config['method']} seed {config['seed']}"
            found[name if name not in found else str(folder)] = folder
            continue
        runs = [file.parent for file in folder.glob("*-seed*/results.json")
                if file.parent.name.rpartition("-seed")[2].isdigit()]
        if not runs:
            raise FileNotFoundError(f"{folder} holds no finished run (results.json, or "
                                    "ARM-seedN/results.json as analysis/study.py writes them)")
        for run in sorted(runs, key=lambda run: int(run.name.rpartition("-seed")[2])):
            found.setdefault(run.name.rpartition("-seed")[0].replace("_", " "), run)
    return found


def config_of(run: Path) -> train.Config:
    """As it was trained; a field that this version no longer has is left out."""
    known = {field.name for field in dataclasses.fields(train.Config)}
    saved = read_json(run / "config.json")
    config = train.Config(**{name: value for name, value in saved.items() if name in known})
    return dataclasses.replace(config, device="cuda" if torch.cuda.is_available() else "cpu")


@lru_cache(maxsize=1)
def folder_examples(folder: str, outside: bool) -> list[Example]:
    return [ex for ex in read_folder(folder, outside) if ex.texts]


def examples_of(config: train.Config, split: str, count: int) -> list[Example]:
    """At most `count` examples with a trajectory, of the data that this run was trained on."""
    if not config.data:
        return scenes.make_world(config.regime, split, count, config.world_seed)
    found = [ex for ex in folder_examples(config.data, config.outside_images) if ex.split == split]
    if len(found) < LEAST:
        raise ValueError(f"{config.data} has {len(found)} records with a trajectory in the {split} "
                         f"split, the figures need {LEAST}: give more records that split")
    return found if len(found) <= count else random.Random(config.world_seed).sample(found, count)


def data_name(config: train.Config) -> str:
    return Path(config.data).name if config.data else config.regime


# ---- embeddings of a run ------------------------------------------------------------------------


@torch.no_grad()
def embeddings(run: Path | None, config: train.Config,
               world: list[Example]) -> tuple[Tensor, Tensor]:
    """(h^_R, h_R) of the examples, (n, D) each. Without [PRED] rows h^_R is the state of the last
    prompt token (K = 0). run: None for the model as it comes."""
    vlm = VLM(config.model, getattr(torch, config.dtype)).to(config.device).eval()
    injected, file = None, None
    if run:
        vlm = evaluate.load_run(run, config.device)[0]
        file = run / run_folder.best_checkpoint(run)["checkpoint"] / Predictor.file_name
    if file and file.is_file():
        injected = read_tensors(file, config.device)[0]["pred_tokens"]  # (K, D)
    # the views of the trajectories, whatever the run itself was taught
    config = dataclasses.replace(config, method="sft",
                                 pred_tokens=0 if injected is None else len(injected))
    examples, pairs = train.prepared(world, vlm, config), []
    for start in range(0, len(world), 64):
        views = examples.views[start:start + 64]
        images = examples.store.encoded([i for v in views for i in v.full.images])
        asked = data.collate([v.input for v in views], vlm.pad_id).to(vlm.device)
        alone = data.collate([v.target for v in views], vlm.pad_id).to(vlm.device)
        pairs.append((vlm(asked, images, injected).embedding.float().cpu(),
                      vlm(alone, images).embedding.float().cpu()))
    return tuple(torch.cat(side) for side in zip(*pairs))


def call_numbers(example: Example) -> tuple[str, list[int]] | None:
    """The tool and the numbers of a trajectory's first call."""
    call = tools.CALL.search(example.texts[0])
    return (call[1], [int(v) for v in call[2].split()]) if call else None


def alike(world: list[Example]) -> tuple[list[int], Tensor | None]:
    """Examples that one probe can be fitted on: those whose first calls have one tool and as many
    numbers (the commonest kind), with the numbers (n, numbers); where no call has numbers, those of
    the commonest family, without."""
    calls = [call_numbers(ex) for ex in world]
    kinds = Counter((call[0], len(call[1])) for call in calls if call and call[1])
    if not kinds:
        family = Counter(ex.task for ex in world).most_common(1)[0][0]
        return [i for i, ex in enumerate(world) if ex.task == family], None
    kind = max(kinds, key=kinds.get)  # of equals the first that the data have
    rows = [i for i, call in enumerate(calls) if call and (call[0], len(call[1])) == kind]
    return rows, torch.tensor([calls[i][1] for i in rows], dtype=torch.float32)


def groups_of(world: list[Example]) -> list[str]:
    """What clusters are looked for: families, or answers where there is one family; beyond the
    nine commonest "other"."""
    families = [ex.task for ex in world]
    names = families if len(set(families)) > 1 else [ex.answer for ex in world]
    kept = [name for name, _ in Counter(names).most_common(9 if len(set(names)) > 10 else 10)]
    return [name if name in kept else "other" for name in names]


def what_it_knows(pair: tuple[Tensor, Tensor], world: list[Example]) -> dict:
    """Probes on h^_R and h_R, retrieval, separation of groups; `chance` is the share of the
    commonest answer in the tested third. `answer` and `place_r2` are of the examples `alike`."""
    (rows, numbers), groups = alike(world), groups_of(world)
    said, families = [world[i].answer for i in rows], [ex.task for ex in world]
    known = {}
    for name, h in zip(("h^_R", "h_R"), pair):
        known[name] = dict(separation=separation(h, groups))
        if len(set(families)) > 1:
            known[name]["family"] = probe(h, classes(families))
        if len(rows) >= LEAST:
            known[name]["answer"] = probe(h[rows], classes(said))
        if len(rows) >= LEAST and numbers is not None:
            known[name]["place_r2"] = probe(h[rows], numbers)
    tested = said[2 * len(rows) // 3:]
    known["probed"] = dict(examples=len(rows), families=sorted({families[i] for i in rows}))
    known["chance"] = dict(answer=Counter(tested).most_common(1)[0][1] / len(tested))
    known["shares of h_R"] = shares(pair[1], world)
    gauges = losses.collapse_gauges(*pair)
    return known | {name: gauges[name] for name in (
        "retrieval", "retrieval_chance", "r2", "effective_rank", "mean_cosine")}


# ---- the figures --------------------------------------------------------------------------------


def figure_latents_per_example(config: train.Config, decoded: int) -> tuple[Image.Image, dict]:
    """Fig. 2: cumulative share of training examples with at most so many latents: of the run's
    data, or of every regime of the world."""
    vlm, numbers, counts = VLM(config.model), {}, {}
    sources = {data_name(config): config} if config.data else {
        regime: dataclasses.replace(config, regime=regime) for regime in scenes.REGIMES}
    image_token = vlm.lm.config.image_token_id
    for name, source in sources.items():
        store = ImageStore(vlm.family)
        texts = [store.add(ex)[1][1:] for ex in examples_of(source, "train", 200)]
        counts[name] = [vlm.tokenizer("".join(text), add_special_tokens=False).input_ids
                        .count(image_token) for text in texts]
        above = sum(count > decoded for count in counts[name]) / len(texts)
        numbers[name] = dict(median=statistics.median(counts[name]), share_above_decoded=above)
    top = max(64, *(max(found) for found in counts.values()))
    chart = Chart("Latents a training example would need (Fig. 2)", "tokens of its tool images",
                  "share of examples", (0, top), (0, 1)).ticks(count=4)
    for name, found in counts.items():
        steps = [n * top / 64 for n in range(65)]
        points = [(n, sum(count <= n for count in found) / len(found)) for n in steps]
        chart.line(name, points, dots=False)
    chart.line(f"decoded at inference: {decoded}", [(decoded, 0), (decoded, 1)], dots=False)
    return chart.image, numbers


def figure_latents_decoded(run: Path, pearl: float | None,
                           per_family: int) -> tuple[Image.Image, dict]:
    """Fig. 3: the reconstruction arm's accuracy against the number of latents decoded, with Pearson
    r and R^2 to log2. pearl: Pearl's accuracy in %."""
    config = config_of(run)
    vlm, _, scale = evaluate.load_run(run, config.device)
    families = len({ex.task for ex in examples_of(config, "test", 100)})
    tests = examples_of(config, "test", per_family * families)
    counts, accuracy = [0, 1, 2, 4, 8, 16, 32, 64], []
    asker, prefix = evaluate.Answerer(vlm, tests, config.answer_prefix), config.answer_prefix
    for n in counts:
        said = reconstruction.answer(asker, scale, n)
        right = [answers.says(reply["text"], ex.options, prefix) == ex.options.index(ex.answer)
                 for reply, ex in zip(said, tests)]
        accuracy.append(100 * sum(right) / len(tests))
    r = pearson([math.log2(n) for n in counts[1:]], accuracy[1:])
    chart = Chart("Accuracy against latents decoded (Fig. 3)", "latents decoded", "accuracy, %",
                  (-1, 6), (0, 100))
    places = [-1.0, *(math.log2(n) for n in counts[1:])]
    chart.ticks(dict(zip(places, map(str, counts))))
    chart.line(f"reconstruction, r {r:.2f}", list(zip(places, accuracy)))
    if pearl is not None:
        chart.line("Pearl, direct", [(-1, pearl), (6, pearl)], dots=False)
    guess = 100 * sum(1 / len(ex.options) for ex in tests) / len(tests)
    chart.line("guessing", [(-1, guess), (6, guess)], dots=False)
    return chart.image, dict(accuracy=dict(zip(counts, accuracy)), pearson_r=r, r_squared=r * r,
                             chance=guess, trained_with=config.latents)


def figure_embeddings(pairs: dict[str, tuple[Tensor, Tensor]], world: list[Example],
                      known: dict) -> Image.Image:
    """Fig. 4: both views' embeddings in two dimensions (t-SNE), coloured by group, h^_R a cross and
    h_R a dot."""
    charts, groups = [], groups_of(world)
    inks = {group: ink_of(n) for n, group in enumerate(dict.fromkeys(groups))}
    for name, pair in pairs.items():
        points = tsne(F.normalize(torch.cat(pair), dim=1))
        span, k = float(points.abs().max()) * 1.05, known[name]
        title = (f"{name}: separation h^_R {k['h^_R']['separation']:.2f}, h_R "
                 f"{k['h_R']['separation']:.2f}, retrieval {k['retrieval']:.2f} (chance "
                 f"{k['retrieval_chance']:.2f})")
        chart = Chart(title, "", "", (-span, span), (-span, span), (620, 470), 130)
        for n, (x, y) in enumerate(points.tolist()):
            mark = "cross" if n < len(world) else "dot"
            chart.mark(*chart.at(x, y), inks[groups[n % len(world)]], mark)
        for group, ink in inks.items():
            chart.label(group, ink)
        chart.label("h^_R", (0, 0, 0), "cross")
        chart.label("h_R", (0, 0, 0))
        charts.append(chart.image)
    return beside(charts, 2)


def logged(run: Path) -> dict[str, list[tuple[float, float]]]:
    """"KIND: NAME" -> [(step, value)] of every number in a run's log, but those not finite.
    Raises FileNotFoundError for a folder without a log."""
    file = run / "log.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: {run} is not a run folder")
    found: dict[str, list[tuple[float, float]]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name in record.keys() - {"kind", "step"}:
            if isinstance(record[name], (int, float)) and math.isfinite(record[name]):
                found.setdefault(f"{record['kind']}: {name}", []).append(
                    (record["step"], record[name]))
    return found


def figure_curves(runs: dict[str, Path],
                  kinds: tuple[str, ...] = ("valid", "train")) -> Image.Image:
    """One chart for every name that any of the runs logged, one line a run. kinds: of log lines."""
    logs, charts = {name: logged(run) for name, run in runs.items()}, []
    names = dict.fromkeys(name for log in logs.values() for name in log)
    for name in (name for kind in kinds for name in names if name.startswith(f"{kind}: ")):
        lines = {run: log[name] for run, log in logs.items() if name in log}
        steps, values = zip(*(point for points in lines.values() for point in points))
        low, high = min(0.0, *values), max(0.0, *values)
        chart = Chart(name, "step", "", (0, max(steps)), (low * 1.05, high * 1.05 or 1.0),
                      (680, 330), 260).ticks()
        for run, points in lines.items():
            chart.line(run, points, dots=len(points) < 30)
        charts.append(chart.image)
    return beside(charts, 2)


def overall(records: list[dict]) -> dict:
    """The row over all families that a system is judged by (analysis/tables.py)."""
    table = summarise(records)
    return table.get("all") or next(iter(table.values()))


def figure_skill(runs: dict[str, Path]) -> Image.Image | None:
    """Direct accuracy against accuracy with the expert's tool over training; None if no run was
    made with --track."""
    percent = (0, 100)
    chart = Chart("Direct against tool accuracy over training", "with the expert's tool, %",
                  "direct, %", percent, percent).ticks()
    for name, run in runs.items():
        log = logged(run)
        if not {"valid: direct", "valid: tool"} <= log.keys():
            continue
        start = overall(read_json(run / "results.json")["before"])
        points = [tuple(start.get(way, [0.0])[0] for way in ("tool", "direct"))]
        points += zip((value for _, value in log["valid: tool"]),
                      (value for _, value in log["valid: direct"]))
        chart.line(name, [(100 * x, 100 * y) for x, y in points])
    return chart.image if chart.names else None


def figure_neighbours(pair: tuple[Tensor, Tensor], world: list[Example], library: list[Example],
                      targets: Tensor, rows: int = 10) -> tuple[Image.Image, dict]:
    """Test questions beside the true tool output and the training trajectories whose h_R (targets)
    is nearest to h^_R."""
    near = (F.normalize(pair[0], dim=1) @ F.normalize(targets, dim=1).T)
    near = near.topk(min(4, len(library))).indices.tolist()
    numbers = {}
    for kind in ("family", "answer"):
        fields = ("task",) if kind == "family" else ("task", "answer")
        asked, known = ([tuple(getattr(ex, name) for name in fields) for ex in examples]
                        for examples in (world, library))
        shares_known, total = Counter(known), len(asked) * len(known)
        numbers[kind] = dict(
            nearest=sum(own == known[first] for own, (first, *_) in zip(asked, near)) / len(asked),
            chance=sum(shares_known[own] for own in asked) / total)
    sheet = []
    for n in list(range(0, len(world), len(world) // rows + 1))[:rows]:  # + 1: families in turn
        ex = world[n]
        steps = [f"answer: {ex.answer}. True tool output:", *ex.images[1:2], "nearest:"]
        for i in near[n]:
            steps += [*library[i].images[1:2], library[i].texts[-1]]
        sheet.append(dataclasses.replace(ex, trajectory=steps))
    return scenes.contact_sheet(sheet, 1600, 100), numbers


# ---- all of them --------------------------------------------------------------------------------


def embedding_figures(runs: dict[str, Path], count: int, out: Path) -> dict:
    """embeddings.png and neighbours.png, from the SFT and Pearl runs among these; their numbers."""
    configs = {name: config_of(run) for name, run in runs.items()}
    first = next(iter(configs.values()))
    world = examples_of(first, "test", count)
    pairs = {BASE: embeddings(None, first, world)}
    for name in (name for name in runs if configs[name].method in ("sft", "pearl")):
        pairs[name] = embeddings(runs[name], configs[name], world)
        if configs[name].method == "pearl" and configs[name].target_encoder == "frozen":
            pairs[name] = pairs[name][0], pairs[BASE][1]  # its targets are the starting model's
    known = {name: what_it_knows(pair, world) for name, pair in pairs.items()}
    few = min(len(world), 250)
    figure_embeddings({name: (guess[:few], true[:few]) for name, (guess, true) in pairs.items()},
                      world[:few], known).save(out / "embeddings.png")
    numbers = {"what the embedding knows": known}
    if pearl := next((name for name in pairs if name != BASE
                      and configs[name].method == "pearl"), None):
        library = examples_of(first, "train", count)
        frozen = configs[pearl].target_encoder == "frozen"
        _, targets = embeddings(None if frozen else runs[pearl], configs[pearl], library)
        image, numbers["nearest trajectories"] = figure_neighbours(pairs[pearl], world, library,
                                                                   targets)
        image.save(out / "neighbours.png")
    return numbers


def all_figures(runs: dict[str, Path], out: Path, per_family: int, count: int) -> None:
    """The folder `out` with everything above. Raises ValueError for runs of several data."""
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose another --out, nothing is overwritten")
    configs = {name: config_of(run) for name, run in runs.items()}
    if len({(config.data, config.data or config.regime) for config in configs.values()}) > 1:
        raise ValueError(f"{', '.join(map(str, runs.values()))} were trained on several data sets "
                         "or regimes: draw those of one at a time (--curves draws any)")
    first = {config.method: name for name, config in reversed(configs.items())}
    decoded = configs[first.get("recon", next(iter(runs)))].decode_latents
    numbers = {}
    with new_folder(out) as partial:
        image, numbers["latents per example"] = figure_latents_per_example(
            next(iter(configs.values())), decoded)
        image.save(partial / "latents-per-example.png")
        figure_curves(runs, ("valid",)).save(partial / "curves.png")
        if image := figure_skill(runs):
            image.save(partial / "skill.png")
        if "recon" in first:
            pearl = None
            if "pearl" in first:
                results = read_json(runs[first["pearl"]] / "results.json")
                pearl = 100 * overall(results["answers"])["direct"][0]
            image, numbers["latents decoded"] = figure_latents_decoded(runs[first["recon"]], pearl,
                                                                       per_family)
            image.save(partial / "latents-decoded.png")
        numbers |= embedding_figures(runs, count, partial)
        write_json(partial / "analyses.json", numbers)
    print(json.dumps(numbers, indent=1))
    print(f"pictures and analyses.json are in {out}")


def new_picture(image: Image.Image, file: Path) -> None:
    """Save a picture under a name that is not taken."""
    if file.exists():
        raise FileExistsError(f"{file} exists already: choose another name, nothing is overwritten")
    image.save(file)
    print(f"drew {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER",
                        help="OUT/BASE/REGIME of a study, or run folders")
    parser.add_argument("--out", type=Path, help="new folder; default: FOLDER/figures; with "
                                                 "--curves a new file; default: curves.png")
    parser.add_argument("--curves", nargs="+", type=Path, metavar="RUN",
                        help="draw every logged name of these runs")
    parser.add_argument("--views", type=Path, metavar="PNG", help="draw the picture of the views")
    parser.add_argument("--per_family", type=int, default=100, help="test questions for Fig. 3")
    parser.add_argument("--count", type=int, default=1200,
                        help="test examples for embeddings, probes and neighbours")
    args = parser.parse_args()
    if args.views:
        new_picture(views_picture(scenes.make_example("crop", "train", 1, 0)), args.views)
    elif args.curves:
        runs = {str(run): run for run in args.curves}
        new_picture(figure_curves(runs), args.out or Path("curves.png"))
    elif args.folders:
        runs = named_runs(args.folders)
        if not any((folder / "results.json").is_file() for folder in args.folders):  # a study's
            runs = {name: runs[name] for name in (*STUDIED, "pearl current target")
                    if name in runs} or runs
        all_figures(runs, args.out or args.folders[0] / "figures", args.per_family, args.count)
    else:
        parser.error("name a folder of runs, or --curves RUN, or --views PNG")


if __name__ == "__main__":
    run_program(main)
