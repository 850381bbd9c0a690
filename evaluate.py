"""Evaluation: answer from <I0, Q> alone, by the model's ordinary `generate` (section 3.8 of arXiv:2604.08065).

    python evaluate.py RUN [RUN ...] [--json FILE]     # test accuracy of trained runs (half a minute each on two cores)
    python evaluate.py --model tiny-vlm                # the same of an untrained checkpoint, on every family of the world

Three numbers per question family, each with its 95% interval (Wilson):
  direct  the answer prefix ("Answer:") is given and decoding is confined to the options' words: what the model knows
  free    nothing is given, at most --free_tokens tokens are decoded and must be the answer: what a user would get
  tool    the expert's calls and their images are given; the model reads them and answers in its own words
`direct` and `free` are Pearl's inference: no tool, no [PRED] token, no latent predictor (a run's predictor file is not
even opened). `tool` says how well the trajectories themselves were learned, so that methods can be compared at equal skill.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import torch

from data import HELD_OUT, REGIMES, Example, ImageStore, Serializer, View, make_example, read_folder
from model import VLM

READING_TOKENS = 24  # enough for any final text of the world


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of a proportion."""
    centre, spread = right + z * z / 2, z * math.sqrt(right * (n - right) / n + z * z / 4)
    return (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)


def test_examples(folder: str, families: list[str], per_family: int, seed: int) -> list[Example]:
    """The test split: of a user's folder, or of the world (then with the held-out family)."""
    if folder:
        examples = [ex for ex in read_folder(folder) if ex.split == "test"]
        if not examples:
            raise ValueError(f"{folder} has no record in the test split; give some records \"split\": \"test\"")
        return examples
    return [make_example(family, "test", i, seed) for family in [*families, HELD_OUT] for i in range(per_family)]


def parse_answer(text: str, prefix: str) -> str:
    """What follows the last answer prefix, or the whole text if there is none; without closing punctuation."""
    return (text.rpartition(prefix)[2] if prefix else text).strip().rstrip(".").strip()


def generate_all(vlm: VLM, views: list[View], store: ImageStore, tokens: int, paths: list[list[list[int]]] | None = None,
                 batch: int = 64) -> list[list[int]]:
    """Greedy decoding in batches of similar length. paths: for each view, the token sequences it is confined to."""
    out: list[list[int]] = [[] for _ in views]
    order = sorted(range(len(views)), key=lambda i: len(views[i].ids))
    for start in range(0, len(order), batch):
        rows = order[start:start + batch]

        def allowed(row: int, made: list[int]) -> list[int]:
            ways = paths[rows[row]]
            return [way[len(made)] for way in ways if len(way) > len(made) and way[:len(made)] == made] or [ways[0][-1]]

        for row, ids in zip(rows, vlm.generate([views[r] for r in rows], store, tokens, allowed if paths else None)):
            out[row] = ids
    return out


@torch.no_grad()
def answer_questions(vlm: VLM, examples: list[Example], answer_prefix: str = "Answer:", free_tokens: int = 4) -> list[dict]:
    """One record an example: id, family, answer, what was answered in each way, and whether it was right."""
    was_training = vlm.training
    vlm.eval()
    serializer = Serializer(vlm.tokenizer, vlm.image_token_id, vlm.max_positions)
    store = ImageStore(vlm.image_processor)
    placed = [store.add(ex) for ex in examples]
    for ex in examples:
        serializer.check(ex)
    prompt = lambda prefix: [serializer.prompt(ex, i[:1], n[:1], prefix) for ex, (i, n) in zip(examples, placed)]
    decode = lambda ids: vlm.tokenizer.decode(ids, skip_special_tokens=True)

    space = " " if answer_prefix else ""
    paths = [[vlm.tokenizer(space + option, add_special_tokens=False).input_ids + [serializer.end_id] for option in ex.options]
             for ex in examples]
    direct = generate_all(vlm, prompt(answer_prefix), store, max(len(way) for ways in paths for way in ways), paths)
    free = generate_all(vlm, prompt(""), store, free_tokens)
    with_tool = [i for i, ex in enumerate(examples) if len(ex.images) > 1]
    read = dict(zip(with_tool, generate_all(vlm, [serializer.tool_prompt(examples[i], *placed[i]) for i in with_tool], store,
                                            READING_TOKENS)))

    records = []
    for i, ex in enumerate(examples):
        chosen = next(option for option, way in zip(ex.options, paths[i]) if direct[i][:len(way)] == way)
        record = dict(id=ex.id, family=ex.family, options=ex.options, answer=ex.answer, direct=chosen, free=decode(free[i]))
        record["direct_right"] = chosen == ex.answer
        record["free_right"] = parse_answer(record["free"], answer_prefix) == ex.answer
        if i in read:
            record["tool"] = decode(read[i])
            record["tool_right"] = parse_answer(record["tool"], answer_prefix) == ex.answer
        records.append(record)
    vlm.train(was_training)
    return records


def summarise(records: list[dict]) -> dict[str, dict]:
    """Accuracy per family, and over all but the held-out family ("all"). Each number is [share, low, high]."""
    groups = {family: [r for r in records if r["family"] == family] for family in dict.fromkeys(r["family"] for r in records)}
    if len(groups) > 1:
        groups["all"] = [r for r in records if r["family"] != HELD_OUT]
    table = {}
    for family, rows in groups.items():
        table[family] = dict(n=len(rows), chance=sum(1 / len(r["options"]) for r in rows) / len(rows))
        for name in ("direct", "free", "tool"):
            scored = [r[f"{name}_right"] for r in rows if f"{name}_right" in r]
            if scored:
                table[family][name] = [sum(scored) / len(scored), *wilson(sum(scored), len(scored))]
    return table


def format_table(columns: dict[str, dict[str, dict]]) -> str:
    """Families down, runs across: direct [95% interval], free, tool, all in %."""
    families = list(dict.fromkeys(family for table in columns.values() for family in table))
    wide = max(26, max(map(len, columns)) + 2)
    lines = ["family            n  chance  " + "".join(name.ljust(wide + 12) for name in columns),
             " " * 29 + "".join("direct [95%]    free  tool".ljust(wide + 12) for _ in columns)]
    for family in families:
        first = next(table[family] for table in columns.values() if family in table)
        label = f"{family} (held out)" if family == HELD_OUT else family
        cells = []
        for table in columns.values():
            row = table.get(family, {})
            direct = "{:5.1f} [{:4.1f}-{:5.1f}]".format(*(100 * v for v in row["direct"])) if "direct" in row else ""
            rest = "".join(f"{100 * row[k][0]:6.1f}" if k in row else "     -" for k in ("free", "tool"))
            cells.append((direct.ljust(19) + rest).ljust(wide + 12))
        lines.append(f"{label:18s}{first['n']:4d} {100 * first['chance']:5.0f}  " .rjust(29) + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def load_run(run: Path, device: str) -> tuple[VLM, dict]:
    """The best checkpoint of a run, merged, and the run's config. Raises FileNotFoundError naming what is missing."""
    for name in ("config.json", "best.json"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run / name} not found: {run} is not a finished run of train.py")
    config = json.loads((run / "config.json").read_text())
    vlm = VLM(config["model"]).to(device)
    vlm.load_adapter(run / json.loads((run / "best.json").read_text())["checkpoint"])
    return vlm.eval(), config


def write_json(file: Path, value) -> None:
    """Write to a temporary name, then rename: a reader never sees half a file."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--model", default="", help="also evaluate this checkpoint folder or hub id, untrained")
    parser.add_argument("--data", default="", help="a data folder; default: the data of each run, or the world")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write tables and every single answer there")
    parser.add_argument("--per_family", type=int, default=200, help="test questions of each family of the world")
    parser.add_argument("--free_tokens", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if not args.runs and not args.model:
        parser.error("name at least one RUN folder, or --model")
    columns, answers = {}, {}
    jobs = ([(args.model, None)] if args.model else []) + [(str(run), run) for run in args.runs]
    every_family = list(dict.fromkeys(f for families in REGIMES.values() for f in families))
    for name, run in jobs:
        vlm, config = load_run(run, args.device) if run else (VLM(args.model).to(args.device), {})
        families = REGIMES[config["regime"]] if config else every_family
        examples = test_examples(args.data or config.get("data", ""), families, args.per_family, config.get("world_seed", 0))
        answers[name] = answer_questions(vlm, examples, config.get("answer_prefix", "Answer:"), args.free_tokens)
        columns[name] = summarise(answers[name])
    print(format_table(columns))
    if args.json:
        write_json(args.json, {name: dict(table=columns[name], answers=answers[name]) for name in columns})


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
