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
import os
import re
import statistics
import sys
import time
from pathlib import Path

import torch

from analysis.tables import compare, format_table, markdown, summarise
from data import LATENT_END, LATENT_START, Example, ImageStore, Serializer, View, opened, read_folder
from model import VLM, read_json, read_tensors
from predictor import LatentScale
from world.scenes import HELD_OUT, REGIMES, make_example
from world.tools import CALL, call_tool

TURN_TOKENS = 56  # enough for any plan and call


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
            record["text"] = next((option for option, way in zip(ex.options, ways) if record["ids"][:len(way)] == way), "")
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
        """Explicit tool use, in rounds: everyone still talking writes one turn, and the call in it is run.

        A call that is malformed or does not fit its image ends the attempt, as does one call too many: the record then
        says so in `failed` and has no text, and the question counts as answered by `direct`.
        """
        talks = [dict(turns=self.serializer.turns(ex)[:1], shown=[ex.image], indices=i[:1],
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
                talk["shown"].append(call_tool(text, *map(opened, talk["shown"])))
                talk["indices"] = talk["indices"] + [self.store.add_image(talk["shown"][-1], text)]
                talk["turns"] = talk["turns"] + [("assistant", [text[:CALL.search(text).end()]]), ("user", talk["shown"][-1:])]
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
