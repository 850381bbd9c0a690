"""Several runs in one table, and a table over systems: means over seeds, paired differences.

    python analysis/compare.py RUN RUN ...                 # from what the runs wrote
    python analysis/compare.py RUN RUN tiny-vlm --again    # asks all anew; a checkpoint beside them
    python analysis/compare.py RUN RUN --json FILE         # the tables and every answer

Runs of one arm and several seeds are one row. Only runs of one base, training set and set of
questions can be averaged or subtracted. The other options are those of evaluate.py.
"""

import statistics
import sys
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`
import numpy as np

import evaluate
from support import files, options, processes
from support.tables import HELD_OUT, format_table, overall, summarise

BASE = "no fine-tuning"  # the name of the model before training in tables
DRAWS = 2000  # of a bootstrap


def mean_std(values: list[float], digits: int = 1) -> str:
    spread = f" +/- {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def change_text(mean: float, low: float, high: float) -> str:
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def table_of(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def difference(ours: list[dict[str, float]],
               theirs: list[dict[str, float]]) -> tuple[float, float, float] | None:
    """(mean, low, high) of ours - theirs in points, over the questions that all answered; None
    without any. The 95% interval is a bootstrap over seeds and questions together. ours, theirs:
    for each seed, question -> 1 if the answer is right; one seed of theirs serves all of ours."""
    theirs = theirs * (len(ours) if len(theirs) == 1 else 1)
    shared = [i for i in ours[0] if all(i in marks for marks in (*ours, *theirs))]
    if not shared:
        return None
    gaps = 100 * np.array([[one[i] - other[i] for i in shared]
                           for one, other in zip(ours, theirs, strict=True)])  # (seeds, questions)
    seeds, questions = gaps.shape
    draw = np.random.default_rng(0)
    means = [gaps[draw.integers(seeds, size=seeds)][:, draw.integers(questions, size=questions)]
             .mean() for _ in range(DRAWS)]
    return float(gaps.mean()), *np.quantile(means, (0.025, 0.975)).tolist()


def run_name(arm: str, seed: int) -> str:
    """The name of a run's folder: of "pearl --pred_tokens 8" pearl,pred_tokens=8-seed3."""
    return f"{arm.replace(' --', ',').replace(' ', '=')}-seed{seed}"


def arm_of(run: str) -> str:
    """The arm of a folder's name, which all its seeds share (see `run_name`)."""
    name, _, seed = run.rpartition("-seed")
    return (name if seed.isdigit() else run).replace(",", " --").replace("=", " ")


def read_run(folder: Path, split: str = "test") -> dict:
    """config, answers and answers before of a finished run. A study may have asked more questions
    (asked.json): those of another split stand alone, and explicit tool use beside the others."""
    config, file = files.read_json(folder / "config.json"), folder / "asked.json"
    more = files.read_json(file)["answers"] if file.is_file() else []
    if split != "test":
        return dict(config=config, answers=more)
    run = files.read_json(folder / "results.json")
    calls = {answer["id"]: answer for answer in more if "call_right" in answer}
    for answer in run["answers"]:
        if call := calls.get(answer["id"]):
            answer["call_right"] = call["call_right"]
            answer["cost"]["call"] = call["cost"]["call"]
    return dict(run, config=config)


def arm_among(config: dict, others: list[dict]) -> str:
    """The arm of a run: its method, and the settings in which runs of that method differ."""
    # base and data are compared by `setting`; the others do not change what is learned
    ignored = {"seed", "out", "method", "device", "model", "data", "workers"}
    peers = [other for other in others if other["method"] == config["method"]]
    differing = [f"{key}={value}" for key, value in config.items()
                 if key not in ignored and any(peer.get(key) != value for peer in peers)]
    return " ".join([config["method"], *differing])


def setting(run: dict) -> dict:
    """What runs must share to be compared: base, training data and the questions answered."""
    config = run["config"]
    questions = sorted((r["id"], r["task"], r["options"], r["answer"]) for r in run["answers"])
    # a base is known by its folder's name: a copy elsewhere is the same base
    return dict(base=Path(config["model"]).name, data=config["data"] or config["regime"],
                questions=questions)


def comparison(runs: dict[str, dict], reference: str = "sft",
               names: dict[str, str] | None = None) -> tuple[list[dict], str]:
    """Rows, one for each system, and the table as text. Raises ValueError for several settings.
    runs: name -> dict(config, answers, and perhaps before). Differences are to the direct answers
    of the arm `reference`, paired by seed, in points. names: run -> arm; default: `arm_among`."""
    first, *others = (setting(run) for run in runs.values())
    if unlike := [name for name in first if any(other[name] != first[name] for other in others)]:
        raise ValueError(f"{', '.join(runs)} differ in {' and '.join(unlike)}: compare runs of one "
                         "base, one training set and one set of questions")
    configs = [run["config"] for run in runs.values()]
    groups: dict[str, dict[int, dict]] = {}  # arm -> seed -> run
    for (name, run), config in zip(runs.items(), configs):
        arm, seed = names[name] if names else arm_among(config, configs), config["seed"]
        # a second run of one arm and seed is no further seed: it is a row that names it
        arm = f"{arm} again ({name})" if seed in groups.get(arm, {}) else arm
        groups.setdefault(arm, {})[seed] = run
    rows, before = [], next(iter(runs.values())).get("before")
    if before:
        rows.append(row_of(BASE, "direct", {0: dict(answers=before)}, {}))
    for name, seeds in groups.items():
        method = next(iter(seeds.values()))["config"]["method"]
        way = "latent" if "recon" in method.split("+") else "direct"
        against = {} if name == reference else groups.get(reference, {})
        rows.append(row_of(name, way, seeds, against))
        # explicit tool use is another system: the same model, asked in another way
        if any("call_right" in r for run in seeds.values() for r in run["answers"]):
            rows.append(row_of(f"{name} + tools", "call", seeds, {}))
    return rows, markdown(rows, reference)


def marks(run: dict, way: str) -> dict[str, float]:
    """Question -> 1 if its answer is right, of the trained tasks."""
    return {r["id"]: r[f"{way}_right"] for r in run["answers"]
            if r["task"] != HELD_OUT and f"{way}_right" in r}


def row_of(name: str, way: str, seeds: dict[int, dict], against: dict[int, dict]) -> dict:
    """A system's row, from its runs by seed and those of the arm that it is compared with. way: in
    which it answers: direct; latent for recon; call for explicit tool use. A reconstruction arm
    within 10 points of guessing is not compared."""
    tables = [summarise(run["answers"]) for run in seeds.values()]
    one, total = tables[0], overall(tables[0])

    def percent(task: str, way: str) -> list[float]:
        """Accuracies of the seeds that have some."""
        return [100 * table[task][way][0] for table in tables if way in table.get(task, {})]

    row = dict(system=name, way=way, seeds=len(seeds), total=total, own=percent(total, way),
               direct=percent(total, "direct"), tool=percent(total, "tool"),
               chance=100 * one[total]["chance"],
               tasks={task: percent(task, way) for task in one if task != total})
    row["compared"] = way != "latent" or statistics.mean(row["own"]) > row["chance"] + 10
    both = sorted(seeds.keys() & against.keys())
    if both and row["compared"]:
        row["difference"] = difference([marks(seeds[seed], way) for seed in both],
                                       [marks(against[seed], "direct") for seed in both])
    costs = [r["cost"][way] for run in seeds.values() for r in run["answers"] if way in r["cost"]]
    row["cost"] = {k: statistics.mean(c[k] for c in costs) for k in ("tokens", "images", "passes")}
    return row


def markdown(rows: list[dict], reference: str) -> str:
    """The table, and how many differences it takes."""
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks"]))
    total = rows[0]["total"] if rows[0]["total"] == "all" else f"`{rows[0]['total']}`"
    head = ["system", "seeds", *(f"`{task}`" + (" (held out)" if task == HELD_OUT else "")
                                 for task in tasks), total, f"{total} - {reference} [95%]",
            "with the expert's tool", "tokens", "images", "passes"]
    lines, count = [], 0
    for row in rows:
        change = "-" if row["compared"] else "guesses"
        if row.get("difference"):
            change, count = change_text(*row["difference"]), count + 1
        cells = [mean_std(values) if values else "-" for values in (
            *(row["tasks"].get(task) for task in tasks), row["own"], row["tool"])]
        lines.append([row["system"], str(row["seeds"]), *cells[:-1], change, cells[-1],
                      *(f"{row['cost'][k]:.1f}" for k in ("tokens", "images", "passes"))])
    note = (f"\n\nComparisons with {reference}: {count}. Each difference is paired by seed and "
            "question; its 95% interval is a bootstrap over both, and of twenty such intervals "
            "about one misses the true difference.")
    return table_of(head, lines) + (note if count else "")


def main() -> None:
    paths = list(takewhile(lambda argument: not argument.startswith("-"), sys.argv[1:]))
    rest = sys.argv[1 + len(paths):] if paths else ["--help"]
    settings = options.parse(evaluate.Options, rest, __doc__)
    models: dict[str, dict] = {}  # answers; of a run also its config
    for path, folder in zip(paths, map(Path, paths)):
        if (folder / "results.json").is_file() and not settings.ask_anew():
            models[path] = read_run(folder)
            continue
        models[path] = dict(answers=evaluate.ask(path, settings))
        if (folder / "best.json").is_file():  # a checkpoint has a config.json too, of another kind
            models[path]["config"] = files.read_json(folder / "config.json")
    columns = {path: summarise(model["answers"]) for path, model in models.items()}
    print(format_table(columns))
    runs = {path: model for path, model in models.items() if "config" in model}
    rows, text = comparison(runs) if runs else ([], "")
    if len(runs) > 1:
        print(f"\n{text}")
    if settings.json:
        tables = {path: dict(table=columns[path], answers=model["answers"])
                  for path, model in models.items()}
        files.write_json(Path(settings.json), dict(tables, systems=rows))


if __name__ == "__main__":
    processes.run_program(main)
