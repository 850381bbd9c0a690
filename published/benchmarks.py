"""V*, MMVP and BLINK from their published layouts on disk, answered by the model's `generate`.

    python published/benchmarks.py vstar vstar_bench --model MODEL_OR_RUN --out predictions.jsonl
    python published/benchmarks.py mmvp  MMVP        --model MODEL_OR_RUN --out predictions.jsonl
    python published/benchmarks.py blink BLINK --configs Counting Jigsaw --model ... --out ...

At most four tokens are decoded, greedily. One JSON line an item is written as soon as its batch is
answered; the same command goes on where it was interrupted. The file's first line says what made it
(weights, items, prompts, token limit, dtype), and predictions made by anything else are refused.

Two scores: strict (the answer is the letter, alone or in the usual dress: A, (A), A., Answer: A)
and lenient (exactly one of the item's letters stands anywhere by itself). An answer that names
several letters counts in neither, and the words "A" and "I" are no letters (see letters_in).
"""

import argparse
import csv
import hashlib
import io
import json
import os
import re
import string
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
from data import Serializer, View  # noqa: E402
from model import VLM  # noqa: E402
from published.common import clean, digest, parquet_rows, parse, read_text  # noqa: E402
from support.files import write_text  # noqa: E402
from support.images import ImageStore, Picture, open_image  # noqa: E402
from support.processes import run_program  # noqa: E402
from support.records import checked  # noqa: E402

INSTRUCTION = "Answer with the option's letter from the given choices directly."
BLINK_PAPER = ("Counting", "IQ_Test", "Jigsaw", "Relative_Reflectance", "Spatial_Relation")
MMVP_SWAPPED = {99, 100, 279, 280}  # items whose published labels are each other's (lmms-eval 1018)


class Item(NamedTuple):
    id: str
    group: str  # category (V*), pair number (MMVP), configuration (BLINK)
    images: list[Picture]
    prompt: str
    label: str  # A, B, ...
    letters: str  # the item's letters, e.g. ABCD
    other_label: str = ""  # MMVP: the corrected label


# ---- the published layouts -------------------------------------------------------------------


def fields(row: dict, where: str, *names: str) -> list:
    """The named fields of a row. Raises ValueError naming the one that is missing."""
    if missing := [name for name in names if row.get(name) is None]:
        raise ValueError(f"{where}: no field {missing[0]!r}; found {sorted(map(str, row))}")
    return [row[name] for name in names]


def the_letter(text: str, where: str, letters: str = string.ascii_uppercase) -> str:
    """A label such as "(b)", as B. Raises ValueError for what is none of the choices' letters."""
    match = re.fullmatch(r"\(?([A-Za-z])\)?\.?", str(text).strip())
    if not match:
        raise ValueError(f"{where}: {text!r} is no option letter")
    if match[1].upper() not in letters:
        raise ValueError(f"{where}: the label {text!r} is none of the choices {', '.join(letters)}")
    return match[1].upper()


def vstar(folder: Path) -> Iterator[Item]:
    """test_questions.jsonl: question_id, image, text (options, instruction), label, category."""
    file = folder / "test_questions.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; expected craigwu/vstar_bench: "
                                "test_questions.jsonl, direct_attributes/, relative_position/")
    for n, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        row = parse(line, f"{file}, line {n}")
        where = f"{file}, line {n}, item {row.get('question_id')}"
        name, image, text, label, category = fields(row, where, "question_id", "image", "text",
                                                    "label", "category")
        letters = choices_of(re.findall(r"\(([A-Z])\)", text)) or "ABCD"
        yield Item(str(name), category, [checked(folder, image, where)], text,
                   the_letter(label, where, letters), letters)


def choices_of(found: list[str]) -> str:
    """The letters from A on that were found, up to the first one missing."""
    missing = next((i for i, c in enumerate(string.ascii_uppercase) if c not in found), 26)
    return string.ascii_uppercase[:missing]


def mmvp(folder: Path) -> Iterator[Item]:
    """Questions.csv: Index, Question, Options "(a) ... (b) ...", Correct Answer "(a)"; pictures
    "MMVP Images/INDEX.jpg"."""
    file = folder / "Questions.csv"
    names = [name for name in ("MMVP Images", "MMVP_Images") if (folder / name).is_dir()]
    if not file.is_file() or not names:
        raise FileNotFoundError(f"{folder} must hold Questions.csv and the folder \"MMVP Images\" "
                                "(or MMVP_Images) of MMVP/MMVP")
    for n, row in enumerate(csv.DictReader(io.StringIO(read_text(file), newline="")), start=2):
        where = f"{file}, row {n}, item {row.get('Index')}"
        index, question, choices, label = fields(row, where, "Index", "Question", "Options",
                                                 "Correct Answer")
        if not index.strip().isdecimal():
            raise ValueError(f"{where}: Index must be a number")
        number = int(index)
        letters = choices_of([c.upper() for c in re.findall(r"\(([a-z])\)", choices)])
        options = re.sub(r"\s*\(([a-z])\)", lambda m: f"\n{m[1].upper()}.", choices).strip()
        label = the_letter(label, where, letters)
        corrected = {"A": "B", "B": "A"}.get(label, label) if number in MMVP_SWAPPED else label
        picture = checked(folder / names[0], f"{number}.jpg", where)
        yield Item(str(number), str((number - 1) // 2), [picture],
                   f"{question}\nOptions:\n{options}\n{INSTRUCTION}", label, letters, corrected)


def blink(folder: Path, configs: list[str]) -> Iterator[Item]:
    """CONFIG/val-*.parquet: idx, question, image_1 .. image_4, choices, answer "(B)"."""
    known = sorted({file.parent.name for file in folder.glob("*/val-*.parquet")})
    if not known:
        raise FileNotFoundError(f"{folder} holds no CONFIG/val-*.parquet; expected the layout of "
                                "BLINK-Benchmark/BLINK")
    for config in configs or known:
        if config not in known:
            raise FileNotFoundError(f"{folder / config}/val-*.parquet not found; found {known}")
        for file in sorted((folder / config).glob("val-*.parquet")):
            for row in parquet_rows([file], "BLINK"):
                yield blink_item(row, config, str(file))


def blink_item(row: dict, config: str, where: str) -> Item:
    where = f"{where}, item {row.get('idx')}"
    name, question, choices, answer = fields(row, where, "idx", "question", "choices", "answer")
    if not 2 <= len(choices) <= len(string.ascii_uppercase):
        raise ValueError(f"{where}: {len(choices)} choices, expected 2 to 26")
    letters = string.ascii_uppercase[:len(choices)]
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, choices))
    shown = sorted((key for key in row if re.fullmatch(r"image_\d+", key) and row[key]),
                   key=lambda key: int(key[6:]))
    if not shown:
        raise ValueError(f"{where}: no image")
    images = [open_image(io.BytesIO(row[key]["bytes"]), where) for key in shown]
    return Item(str(name), config, images, f"{question}\nOptions:\n{options}\n{INSTRUCTION}",
                the_letter(answer, where, letters), letters)


def read_items(kind: str, folder: Path, configs: list[str]) -> list[Item]:
    items = list(blink(folder, configs) if kind == "blink" else
                 dict(vstar=vstar, mmvp=mmvp)[kind](folder))
    if not items:
        raise ValueError(f"{folder} holds no items")
    seen = set()
    for item in items:
        if (item.group, item.id) in seen:
            raise ValueError(f"{folder}: item {item.id} of {item.group} is there twice")
        seen.add((item.group, item.id))
    return items


# ---- answers ---------------------------------------------------------------------------------

# "A" and "I" are also English words: an article or a pronoun is followed by a word, and by none of
# these, nor by another option letter
GOES_ON = "and|or|nor|not|but|is|because|since|vs"


def letters_in(text: str, letters: str) -> tuple[str, str]:
    """(strict, lenient) answer letter; empty where there is none, or more than one.

    "A man is" names no letter; "A", "A. red", "(A) red", "Option A", "A is right" name A, and
    "A and B" names two.
    """
    text = re.sub(r"[*_`\"$\[\]{}]+", " ", clean(text)).strip()
    letter = rf"(?<!\w)(?<!\w['’-])([{letters}])(?!['’-]?\w)"
    word = re.compile(rf"[AI][ \t]+(?!(?:{GOES_ON})\b)(?!{letter})[^\W\d_]")
    named = [m for m in re.finditer(letter, text)
             if not word.match(text, m.start())
             or re.search(r"(?i:option|choice|letter)\s+$", text[:m.start()])]
    if len({m[1] for m in named}) != 1:
        return "", ""
    dressed = re.match(rf"(?:(?i:answer|option)\s*:?\s*)?\(?([{letters}])\)?(?![^\s.:,;)!?])", text)
    strict = dressed is not None and dressed.start(1) == named[0].start(1)
    return named[0][1] if strict else "", named[0][1]


def share(records: list[dict], label: str, how: str) -> float:
    """Percentage of records whose letter, read in the way `how`, is the label."""
    return 100 * sum(r[how] == r[label] for r in records) / len(records)


def row_of(records: list[dict], label: str = "label") -> list[float]:
    return [len(records), share(records, label, "strict"), share(records, label, "lenient")]


def scores(kind: str, records: list[dict]) -> dict[str, list[float]]:
    """Rows of the table: name -> [n, strict %, lenient %]."""
    groups = {}
    for r in records:
        groups.setdefault(r["group"], []).append(r)
    if kind != "mmvp":
        return {name: row_of(rows) for name, rows in groups.items()} | {"all": row_of(records)}
    table = {}
    for label, name in (("label", "labels as published"), ("other_label", "labels corrected")):
        table[f"items, {name}"] = row_of(records, label)
        whole = [[all(r[how] == r[label] for r in rows) for how in ("strict", "lenient")]
                 for rows in groups.values()]
        strict, lenient = (100 * sum(way) / len(whole) for way in zip(*whole))
        table[f"pairs, {name}"] = [len(whole), strict, lenient]
    return table


# ---- predictions -----------------------------------------------------------------------------


def digest_of(parts: Iterator) -> str:
    """Hash of a sequence of JSON values."""
    made = hashlib.sha256()
    for part in parts:
        made.update(json.dumps(part, ensure_ascii=False).encode() + b"\n")
    return made.hexdigest()[:32]


def of_items(items: list[Item], tokens: int) -> dict:
    """What made predictions, as far as it is known before the model is loaded."""
    whole = ([*item._replace(images=[*map(digest, item.images)])] for item in items)
    return dict(items=digest_of(whole), tokens=tokens)


def of_model(vlm: VLM, views: Iterator[View]) -> dict:
    """The rest: every weight, the image processor's settings, and each prompt's token ids, which
    hold the tokenizer, the chat template and what becomes of each image's size."""
    weights = hashlib.sha256()
    for name, p in sorted(vlm.lm.named_parameters()):
        weights.update(f"{name} {tuple(p.shape)}".encode())
        weights.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    processor = vlm.family.processor
    images = type(getattr(processor, "image_processor", processor)).__name__
    settings = json.dumps([images, processor.to_dict()], sort_keys=True, default=str)
    return dict(weights=weights.hexdigest()[:32], dtype=str(vlm.lm.dtype).removeprefix("torch."),
                image_processor=digest_of([settings]), prompts=digest_of(v.ids for v in views))


def earlier(out: Path, made_by: dict) -> list[str]:
    """The whole lines of a predictions file, the first of which says what made it.

    Raises ValueError where it says nothing, or something else than made_by (any part of it).
    """
    if not out.exists():
        return []
    lines = read_text(out).split("\n")[:-1]  # behind the last line end: nothing, or half a line
    try:
        header = dict(json.loads(lines[0])["made_by"])
    except (IndexError, KeyError, TypeError, ValueError):
        raise ValueError(f"{out} does not say what made its predictions (its first line has no "
                         "\"made_by\"): choose another --out") from None
    if differ := [key for key, value in made_by.items() if header.get(key) != value]:
        raise ValueError(f"{out} holds predictions made with other {', '.join(differ)} "
                         f"(by {header.get('model')}): choose another --out")
    return lines


def view_of(vlm: VLM, item: Item, store: ImageStore,
            serializer: Serializer) -> View:
    indices = [store.add_image(image, f"{item.group} {item.id}") for image in item.images]
    turns = [("user", [*item.images, item.prompt])]
    return serializer.prompt(turns, indices, [store.image_texts[i] for i in indices])


def predict(vlm: VLM, items: list[Item], out: Path, tokens: int, batch: int,
            model: str = "") -> list[dict]:
    """Predictions of all items, those already in `out` included if the same made them.

    model: a name for the file's first line. Letters are read anew from what was said, so that
    the scores of a file are always those of the present rules.
    """
    serializer = Serializer(vlm.family, vlm.max_positions)
    views = (view_of(vlm, item, ImageStore(vlm.family), serializer) for item in items)
    made_by = of_items(items, tokens) | of_model(vlm, views)
    lines = earlier(out, made_by)
    if not lines:
        lines = [json.dumps(dict(made_by=dict(model=model or vlm.path) | made_by),
                            ensure_ascii=False)]
    write_text(out, "".join(line + "\n" for line in lines))  # without a half line
    said = {}
    for n, line in enumerate(lines[1:], start=2):
        where = f"{out}, line {n}"
        group, name, text = fields(parse(line, where), where, "group", "id", "said")
        said[group, name] = text
    waiting = [item for item in items if (item.group, item.id) not in said]
    for start in range(0, len(waiting), batch):
        part, store = waiting[start:start + batch], ImageStore(vlm.family)
        made = vlm.generate([view_of(vlm, item, store, serializer) for item in part], store, tokens)
        with open(out, "a", encoding="utf-8", newline="\n") as file:
            for item, ids in zip(part, made):
                text = vlm.tokenizer.decode(ids, skip_special_tokens=True)
                said[item.group, item.id] = text
                file.write(json.dumps(record_of(item, text), ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{len(said)} of {len(items)}", flush=True)
    return [record_of(item, said[item.group, item.id]) for item in items]


def record_of(item: Item, said: str) -> dict:
    strict, lenient = letters_in(said, item.letters)
    return dict(id=item.id, group=item.group, label=item.label, other_label=item.other_label,
                said=said, strict=strict, lenient=lenient)


# ---- the command line ------------------------------------------------------------------------


def options() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["vstar", "mmvp", "blink"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True,
                        help="checkpoint folder, hub id, or run folder of train.py")
    parser.add_argument("--out", type=Path, required=True, help="predictions, one line an item")
    parser.add_argument("--configs", nargs="*", default=[],
                        help=f"of BLINK; default: all; the paper's: {' '.join(BLINK_PAPER)}")
    parser.add_argument("--tokens", type=int, default=4, help="at most so many are decoded")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        default="bfloat16" if on_gpu else "float32", help="not of a run folder")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    args = parser.parse_args()
    if args.tokens < 1 or args.batch < 1:
        parser.error("--tokens and --batch must be at least 1")
    return args


def main() -> None:
    args = options()
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"{args.out.parent} not found: --out is written there")
    items = read_items(args.kind, args.folder, args.configs)
    earlier(args.out, of_items(items, args.tokens))  # refused before the model is loaded
    if (Path(args.model) / "best.json").is_file():
        vlm = evaluate.load_run(Path(args.model), args.device)[0]
    else:
        vlm = VLM(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    records = predict(vlm, items, args.out, args.tokens, args.batch, args.model)
    print(f"{'':32s}    n  strict  lenient")
    for name, (n, strict, lenient) in scores(args.kind, records).items():
        print(f"{name:32s}{n:5d}{strict:8.1f}{lenient:9.1f}")


if __name__ == "__main__":
    run_program(main)
