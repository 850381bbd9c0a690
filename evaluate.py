"""Evaluation: answer from <I0, Q> alone, by the model's ordinary `generate` (section 3.8 of arXiv:2604.08065), and compare.

    python evaluate.py RUN [RUN ...] [--json FILE]     # table of each run, then one over systems and seeds
    python evaluate.py RUN --again --call_limit 3      # every test question asked anew, explicit tool use too (a minute)
    python evaluate.py --model tiny-vlm                # an untrained checkpoint, on every family of the world

The ways to answer, each with its 95% interval (Wilson) per question family:
  direct  the answer prefix ("Answer:") is given and decoding is confined to the options' words: what the model knows
  free    nothing is given, at most --free_tokens tokens are decoded and must be the answer: what a user would get
  tool    the expert's calls and their images are given; the model reads them and answers in its own words
  call    explicit tool use: the model writes its own calls, each is run, its image is appended, up to --call_limit calls
  latent  the reconstruction baseline's own inference: latents in place of tool images (runs of --method recon only)
`direct` and `free` are Pearl's inference: no tool, no [PRED] token, no latent predictor (a run's predictor file is not
even opened). `tool` says how well the trajectories themselves were learned, so that methods can be compared at equal skill.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path

import torch

from data import LATENT_END, LATENT_START, Example, ImageStore, Serializer, View, opened, read_folder
from model import VLM, read_json, read_tensors
from predictor import LatentScale
from world.scenes import HELD_OUT, REGIMES, make_example
from world.tools import CALL, call_tool

TURN_TOKENS = 56  # enough for any plan and call
WAYS = ("direct", "free", "tool", "call", "latent")


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of a proportion."""
    centre, spread = right + z * z / 2, z * math.sqrt(right * (n - right) / n + z * z / 4)
    return (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)


def test_examples(folder: str, families: list[str], per_family: int, seed: int, split: str = "test",
                  outside: bool = False) -> list[Example]:
    """A split of a user's folder (outside: see read_folder), or of the world (then with the held-out family)."""
    if folder:
        examples = [ex for ex in read_folder(folder, outside) if ex.split == split]
        if not examples:
            raise ValueError(f"{folder} has no record in the {split} split; give some records \"split\": \"{split}\"")
        return examples
    return [make_example(family, split, i, seed) for family in [*families, HELD_OUT] for i in range(per_family)]


def parse_answer(text: str, prefix: str) -> str:
    """What follows the last answer prefix, or the whole text if there is none; without closing punctuation."""
    return (text.rpartition(prefix)[2] if prefix else text).strip().rstrip(".").strip()


# ---- ways to answer ---------------------------------------------------------------------------------------------------


class Asker:
    """Test questions put to one model. Each way returns one dict an example: text, and its cost in tokens, images, passes."""

    def __init__(self, vlm: VLM, examples: list[Example], answer_prefix: str = "Answer:", batch: int = 64):
        self.vlm, self.examples, self.prefix, self.batch = vlm, examples, answer_prefix, batch
        self.serializer = Serializer(vlm.tokenizer, vlm.placeholder_id, vlm.max_positions)
        self.store = ImageStore(vlm.family)
        self.placed = [self.store.add(ex) for ex in examples]  # (image indices, spans) of each example
        for ex in examples:
            self.serializer.check(ex)

    def decode(self, ids: list[int]) -> str:
        return self.vlm.tokenizer.decode(ids, skip_special_tokens=True)

    def _prompts(self, prefix: str = "") -> list[View]:
        return [self.serializer.prompt(ex, i[:1], n[:1], prefix) for ex, (i, n) in zip(self.examples, self.placed)]

    def _in_batches(self, views: list[View], decode) -> list:
        """decode(views, their numbers) over batches of similar length; results in the order of `views`."""
        out: list = [None] * len(views)
        order = sorted(range(len(views)), key=lambda i: len(views[i].ids))
        for start in range(0, len(order), self.batch):
            rows = order[start:start + self.batch]
            for row, result in zip(rows, decode([views[r] for r in rows], rows)):
                out[row] = result
        return out

    def _generate(self, views: list[View], tokens: int, paths: list[list[list[int]]] | None = None) -> list[dict]:
        """Greedy decoding. paths: for each view, the token sequences it is confined to."""
        def decode(part: list[View], rows: list[int]) -> list[dict]:
            def allowed(row: int, made: list[int]) -> list[int]:
                ways = paths[rows[row]]
                return [way[len(made)] for way in ways if len(way) > len(made) and way[:len(made)] == made] or [ways[0][-1]]

            made = self.vlm.generate(part, self.store, tokens, allowed if paths else None)
            made = [ids[:ids.index(self.serializer.end_id) + 1] if self.serializer.end_id in ids else ids for ids in made]
            return [dict(ids=ids, text=self.decode(ids), tokens=len(ids), images=len(v.images), passes=len(ids))
                    for ids, v in zip(made, part)]

        return self._in_batches(views, decode)

    def direct(self) -> list[dict]:
        space = " " if self.prefix else self.serializer.lead
        encode = lambda text: self.vlm.tokenizer(text, add_special_tokens=False).input_ids + [self.serializer.end_id]
        paths = [[encode(space + option) for option in ex.options] for ex in self.examples]
        out = self._generate(self._prompts(self.prefix), max(len(way) for ways in paths for way in ways), paths)
        for ex, ways, record in zip(self.examples, paths, out):
            record["text"] = next(option for option, way in zip(ex.options, ways) if record["ids"][:len(way)] == way)
        return out

    def free(self, tokens: int) -> list[dict]:
        return self._generate(self._prompts(), tokens)

    def tool(self) -> list[dict | None]:
        """None where the example has no tool image."""
        rows = [i for i, ex in enumerate(self.examples) if len(ex.images) > 1]
        longest = max((len(self.vlm.tokenizer(self.examples[i].texts[-1]).input_ids) for i in rows), default=0)
        out = self._generate([self.serializer.tool_prompt(self.examples[i], *self.placed[i]) for i in rows], longest + 8)
        found = dict(zip(rows, out))
        return [found.get(i) for i in range(len(self.examples))]

    def call(self, limit: int) -> list[dict]:
        """Explicit tool use, in rounds: everyone still talking writes one turn; calls in it are run on the last image.

        A call that is malformed or does not fit its image ends the attempt, as does one call too many: the record then
        says so in `failed` and has no text, and the question counts as answered by `direct`.
        """
        talks = [dict(turns=self.serializer.turns(ex)[:1], image=ex.image, indices=i[:1],
                      calls=0, tokens=0, images=0, passes=0)
                 for ex, (i, _) in zip(self.examples, self.placed)]
        active = talks
        for _ in range(limit + 1):
            views = [self.serializer.prompt_of(t["turns"], t["indices"], [self.store.spans[i] for i in t["indices"]])
                     for t in active]
            for talk, said in zip(active, self._generate(views, TURN_TOKENS) if views else []):
                for cost in ("tokens", "images", "passes"):
                    talk[cost] += said[cost]
                self._run_call(talk, said["text"], limit)
            active = [talk for talk in active if "text" not in talk]
        return [{k: t[k] for k in ("text", "failed", "calls", "tokens", "images", "passes") if k in t} for t in talks]

    def _run_call(self, talk: dict, text: str, limit: int) -> None:
        if "[" not in text:
            talk["text"] = text
        elif talk["calls"] == limit:
            talk.update(text="", failed="one call too many")
        else:
            try:
                talk["image"] = call_tool(text, opened(talk["image"]))
                talk["indices"] = talk["indices"] + [self.store.add_image(talk["image"], text)]
                talk["turns"] = talk["turns"] + [("assistant", [text[:CALL.search(text).end()]]), ("user", [talk["image"]])]
                talk["calls"] += 1
            except ValueError as error:
                talk.update(text="", failed=str(error))

    def latent(self, scale: LatentScale, latents: int) -> list[dict]:
        token = self.vlm.tokenizer.convert_tokens_to_ids
        markers = token(LATENT_START), token(LATENT_END)

        def decode(part: list[View], rows: list[int]) -> list[dict]:
            made = self.vlm.generate_latent(part, self.store, scale, latents, markers, self.serializer.end_id, 2 * TURN_TOKENS)
            return [dict(text=self.decode(ids), tokens=len(ids), latents=fed, images=1,
                         passes=len(ids) + fed + ids.count(markers[0])) for ids, fed in made]

        return self._in_batches(self._prompts(), decode)


@torch.no_grad()
def answer_questions(vlm: VLM, examples: list[Example], answer_prefix: str = "Answer:", free_tokens: int = 4, call_limit: int = 0,
                     scale: LatentScale | None = None, latents: int = 8) -> list[dict]:
    """One record an example: id, family, answer, and for each way what was said, whether it was right and what it cost.

    `call` is asked where call_limit > 0, `latent` where a scale is given.
    """
    was_training = vlm.training
    vlm.eval()
    asker = Asker(vlm, examples, answer_prefix)
    said = dict(direct=asker.direct(), free=asker.free(free_tokens), tool=asker.tool())
    if call_limit:
        said["call"] = asker.call(call_limit)
    if scale is not None:
        said["latent"] = asker.latent(scale, latents)
    records = []
    for i, ex in enumerate(examples):
        record = dict(id=ex.id, family=ex.family, options=ex.options, answer=ex.answer, cost={})
        for way, answers in said.items():
            if answers[i] is None:
                continue
            text = answers[i]["text"]
            record[way] = text if not answers[i].get("failed") else f"({answers[i]['failed']})"
            given = record["direct"] if answers[i].get("failed") else parse_answer(text, "" if way == "direct" else answer_prefix)
            record[f"{way}_right"] = given == ex.answer
            record["cost"][way] = {k: v for k, v in answers[i].items() if k not in ("ids", "text")}
        records.append(record)
    vlm.train(was_training)
    return records


def milliseconds(vlm: VLM, examples: list[Example], way: str, **options) -> float:
    """Median wall-clock time of one answer, one question at a time (batch 1), after one to warm up."""
    times = []
    for ex in examples:
        asker = Asker(vlm, [ex], batch=1)
        start = time.perf_counter()
        getattr(asker, way)(**options)
        if vlm.device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times[1:])


# ---- tables -----------------------------------------------------------------------------------------------------------


def summarise(records: list[dict]) -> dict[str, dict]:
    """Accuracy per family, and over all but the held-out family ("all"). Each number is [share, low, high]."""
    groups = {family: [r for r in records if r["family"] == family] for family in dict.fromkeys(r["family"] for r in records)}
    if len(groups) > 1:
        groups["all"] = [r for r in records if r["family"] != HELD_OUT]
    table = {}
    for family, rows in groups.items():
        table[family] = dict(n=len(rows), chance=sum(1 / len(r["options"]) for r in rows) / len(rows))
        for way in WAYS:
            scored = [r[f"{way}_right"] for r in rows if f"{way}_right" in r]
            if scored:
                table[family][way] = [sum(scored) / len(scored), *wilson(sum(scored), len(scored))]
    return table


def format_table(columns: dict[str, dict[str, dict]]) -> str:
    """Families down, models across: direct [95% interval] and the other ways that were asked, all in %."""
    families = list(dict.fromkeys(family for table in columns.values() for family in table))
    ways = {name: [w for w in WAYS[1:] if any(w in row for row in table.values())] for name, table in columns.items()}
    width = {name: max(21 + 8 * len(ways[name]), len(name) + 2) for name in columns}
    lines = [f"{'family':18s}   n chance " + "".join(name.ljust(width[name]) for name in columns),
             " " * 30 + "".join(("direct [95%]".ljust(19) + "".join(w.rjust(8) for w in ways[name])).ljust(width[name])
                                for name in columns)]
    for family in families:
        first = next(table[family] for table in columns.values() if family in table)
        label = f"{family} (held out)" if family == HELD_OUT else family
        cells = []
        for name, table in columns.items():
            row = table.get(family, {})
            direct = "{:5.1f} [{:4.1f}-{:5.1f}]".format(*(100 * v for v in row["direct"])) if "direct" in row else ""
            rest = "".join(f"{100 * row[w][0]:8.1f}" if w in row else "       -" for w in ways[name])
            cells.append((direct.ljust(19) + rest).ljust(width[name]))
        lines.append(f"{label:18s}{first['n']:4d} {100 * first['chance']:5.0f}  " + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


# ---- comparison over runs and seeds -----------------------------------------------------------------------------------

T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # Student's t, two-sided 95%, by degrees of freedom


def mean_std(values: list[float]) -> str:
    spread = f" +/- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def paired_difference(ours: list[float], theirs: list[float]) -> tuple[float, float] | None:
    """Mean of the differences and the half width of its 95% interval (t over seeds); None below two pairs."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(gaps) < 2:
        return None
    t = T95[len(gaps) - 2] if len(gaps) - 2 < len(T95) else 1.96 + 2.4 / (len(gaps) - 1)
    return statistics.mean(gaps), t * statistics.stdev(gaps) / math.sqrt(len(gaps))


def arms(configs: dict[str, dict]) -> dict[str, str]:
    """Run -> the name of its arm: its method, and the settings in which the compared runs of that method differ."""
    ignored = {"seed", "out", "method", "device", "recipe"}
    names = {}
    for run, config in configs.items():
        peers = [c for c in configs.values() if c["method"] == config["method"]]
        differing = [k for k in config if k not in ignored and len({json.dumps(c.get(k)) for c in peers}) > 1]
        names[run] = " ".join([config["method"], *(f"{k}={config[k]}" for k in differing)])
    return names


def compare(runs: dict[str, dict], reference: str = "sft", names: dict[str, str] | None = None) -> list[dict]:
    """One row a system from runs {name: dict(config, answers, before)}: accuracies over seeds, paired differences, cost.

    `own` is the accuracy of the system's own inference: direct; latent for recon; call for explicit tool use, which is a
    row of its own beside the reference arm. Differences are to the reference arm, direct, paired by seed, in points.
    names: the arm of each run; default: see `arms`. A reconstruction arm within 10 points of guessing is not compared.
    """
    names = names or arms({run: r["config"] for run, r in runs.items()})
    groups: dict[str, dict[int, dict]] = {}
    for run, record in runs.items():
        groups.setdefault(names[run], {})[record["config"]["seed"]] = record
    first = next(iter(runs.values()))
    systems = [("no fine-tuning", "direct", {0: dict(answers=first["before"])})] if first.get("before") else []
    for name, seeds in groups.items():
        own = "latent" if name.split()[0] == "recon" else "direct"
        systems.append((name, own, seeds))
        if name == reference and any("call_right" in r for run in seeds.values() for r in run["answers"]):
            systems.append((f"{name} + tools", "call", seeds))
    rows = []
    for name, own, seeds in systems:
        tables = {seed: summarise(run["answers"]) for seed, run in seeds.items()}
        total = "all" if "all" in next(iter(tables.values())) else next(iter(next(iter(tables.values()))))
        pick = lambda family, way: [100 * t[family][way][0] for t in tables.values() if way in t.get(family, {})]
        row = dict(system=name, own_way=own, seeds=len(seeds), direct=pick(total, "direct"), tool=pick(total, "tool"),
                   own=pick(total, own), families={f: pick(f, own) for f in next(iter(tables.values())) if f != total})
        row["chance"] = 100 * next(iter(tables.values()))[total]["chance"]
        row["compared"] = own != "latent" or statistics.mean(row["own"]) > row["chance"] + 10  # who only guesses is no opponent
        both = sorted(seeds.keys() & groups.get(reference, {}).keys())
        if name in groups and name != reference and both and row["compared"]:
            against = [100 * summarise(groups[reference][s]["answers"])[total]["direct"][0] for s in both]
            row["difference"] = paired_difference([100 * tables[s][total][own][0] for s in both], against)
        costs = [r["cost"][own] for run in seeds.values() for r in run["answers"] if own in r["cost"]]
        row["cost"] = {k: statistics.mean(c[k] for c in costs) for k in ("tokens", "images", "passes")}
        row["cost"]["failed"] = sum("failed" in c for c in costs) / len(costs)
        row["cost"]["ms"] = [run["ms"][own] for run in seeds.values() if own in run.get("ms", {})]
        rows.append(row)
    return rows


def markdown(rows: list[dict], reference: str = "sft") -> str:
    families = list(dict.fromkeys(f for row in rows for f in row["families"]))
    head = ["system", "seeds", *(f"`{f}`" + (" (held out)" if f == HELD_OUT else "") for f in families), "all",
            f"all - {reference} [95%]", "with the expert's tool", "tokens", "images", "passes", "ms"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        gap = row.get("difference")
        cost = row["cost"]
        difference = "-" if row["compared"] else "guesses"
        if gap:
            difference = f"{gap[0]:+.1f} [{gap[0] - gap[1]:+.1f}, {gap[0] + gap[1]:+.1f}]"
        per_family = [mean_std(row["families"][f]) if row["families"].get(f) else "-" for f in families]
        cells = [row["system"], str(row["seeds"]), *per_family, mean_std(row["own"]), difference,
                 mean_std(row["tool"]) if row["tool"] else "-", *(f"{cost[k]:.1f}" for k in ("tokens", "images", "passes")),
                 f"{statistics.median(cost['ms']):.0f}" if cost["ms"] else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- runs on disk -----------------------------------------------------------------------------------------------------


def load_run(run: Path, device: str) -> tuple[VLM, dict, LatentScale | None]:
    """The best checkpoint of a run, merged, the run's config, and of a recon run its scale.

    Raises FileNotFoundError naming what is missing.
    """
    for name in ("config.json", "best.json"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run / name} not found: {run} is not a finished run of train.py")
    config = read_json(run / "config.json")
    if missing := {"model", "dtype", "method"} - config.keys():
        raise ValueError(f"{run / 'config.json'} has no {sorted(missing)[0]!r}: it was not written by train.py")
    vlm = VLM(config["model"], dtype=getattr(torch, config["dtype"])).to(device)
    checkpoint = run / best_checkpoint(run)["checkpoint"]
    vlm.load_adapter(checkpoint)
    scale = None
    if config["method"] == "recon":
        scale = LatentScale(torch.zeros(2, vlm.dim), torch.ones(vlm.dim))
        scale.load_state_dict(read_tensors(checkpoint / "latents.safetensors")[0])
        scale = scale.to(device)
    return vlm.eval(), config, scale


def best_checkpoint(run: Path) -> dict:
    """best.json: checkpoint (a folder of the run), step and validation. Raises ValueError if it points anywhere else."""
    best = read_json(run / "best.json")
    if not re.fullmatch(r"checkpoint-\d+", str(best.get("checkpoint"))):
        raise ValueError(f"{run / 'best.json'} names no checkpoint of this run: {best.get('checkpoint')!r}")
    return best


def write_text(file: Path, text: str) -> None:
    """Write to a temporary name, then rename: a reader never sees half a file."""
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        raise OSError(f"{file} cannot be written: {error}") from None


def write_json(file: Path, value) -> None:
    write_text(file, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_run(run: Path, args) -> dict:
    """config, answers, answers before training and times of a run: as training left them in results.json, or asked anew."""
    if not (args.again or args.data):
        if not (run / "results.json").is_file():
            raise FileNotFoundError(f"{run / 'results.json'} not found: {run} is not a finished run; "
                                    "--again asks its best checkpoint")
        return {"config": read_json(run / "config.json"), **read_json(run / "results.json")}
    vlm, config, scale = load_run(run, args.device)
    examples = test_examples(args.data or config["data"], REGIMES[config["regime"]], args.per_family, config["world_seed"],
                             outside=args.outside_images or config.get("outside_images", False))
    return dict(config=config, **ask(vlm, examples, config["answer_prefix"], args.free_tokens, args.call_limit, scale,
                                     config["decode_latents"] if args.latents is None else args.latents))


def ask(vlm: VLM, examples: list[Example], prefix: str, free_tokens: int = 4, call_limit: int = 0, scale: LatentScale | None = None,
        latents: int = 8, timed: int = 9) -> dict:
    """answers (see answer_questions), and the milliseconds of one answer in each way, measured on `timed` of the questions."""
    answers = answer_questions(vlm, examples, prefix, free_tokens, call_limit, scale, latents)
    some = examples[::max(1, len(examples) // timed)][:timed]
    ways = dict(direct={}, **dict(call=dict(limit=call_limit)) if call_limit else {},
                **dict(latent=dict(scale=scale, latents=latents)) if scale is not None else {})
    times = {way: milliseconds(vlm, some, way, **options) for way, options in ways.items()} if timed > 1 else {}
    return dict(answers=answers, ms=times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--model", default="", help="also evaluate this checkpoint folder or hub id, untrained")
    parser.add_argument("--data", default="", help="a data folder; default: the data of each run, or the world")
    parser.add_argument("--outside_images", action="store_true", help="image paths of --data may leave its folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write tables and every single answer there")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table over systems there")
    parser.add_argument("--again", action="store_true", help="ask the test questions anew instead of reading results.json")
    parser.add_argument("--per_family", type=int, default=200, help="with --again: test questions of each family of the world")
    parser.add_argument("--free_tokens", type=int, default=4)
    parser.add_argument("--call_limit", type=int, default=0, help="with --again: explicit tool use, at most so many calls")
    parser.add_argument("--latents", type=int, help="with --again: latents a recon run decodes; default: its --decode_latents")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if not args.runs and not args.model:
        parser.error("name at least one RUN folder, or --model")
    found = {str(run): read_run(run, args) for run in args.runs}
    columns = {name: summarise(run["answers"]) for name, run in found.items()}
    answers = {name: run["answers"] for name, run in found.items()}
    if args.model:
        every_family = list(dict.fromkeys(f for families in REGIMES.values() for f in families))
        examples = test_examples(args.data, every_family, args.per_family, 0, outside=args.outside_images)
        answers[args.model] = answer_questions(VLM(args.model).to(args.device), examples, free_tokens=args.free_tokens,
                                               call_limit=args.call_limit)
        columns = {args.model: summarise(answers[args.model]), **columns}
    print(format_table(columns))
    systems = compare(found) if found else []
    if len(found) > 1:
        print("\n" + markdown(systems))
    if args.json:
        tables = {name: dict(table=columns[name], answers=answers[name]) for name in columns}
        write_json(args.json, dict(tables, systems=systems) if systems else tables)
    if args.markdown:
        write_text(args.markdown, markdown(systems) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
