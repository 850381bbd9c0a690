"""V*, MMVP and BLINK in their published layouts, answered by the model's own `generate`.

    python published/benchmarks.py vstar vstar_bench --model MODEL_OR_RUN --out predictions.jsonl
    python published/benchmarks.py blink BLINK --configs Counting Jigsaw --model ... --out ...

Decoding is greedy. Strict score: the answer is the right letter; lenient: it names the right letter
and no other (published/README.md).
"""

import argparse
import csv
import io
import json
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Iterable

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate
from model import VLM
from published.common import open_boxes, parquet_rows, read_text
from support.files import write_text
from support.images import load_images, open_image
from support.processes import run_program
from support.records import Example

INSTRUCTION = "Answer with the option's letter from the given choices directly."
MMVP_WRONG = {100, 280}  # confirmed wrong labels (lmms-eval, issue 1018, which counts from 0)
# an article or a pronoun is followed by a word, but not by one of these
NO_NOUNS = "and|or|nor|not|but|is|because|since|vs"


@dataclass
class Item(Example):
    """Its `id` is file, row and item, for error messages; its `task` the category (V*), the number
    of the pair (MMVP) or the configuration (BLINK); its `options` are letters."""

    name: str = ""
    choices: dict[str, str] = field(default_factory=dict)  # letter -> text
    label: str = ""  # the letters that count as right: several where choices repeat the right text
    corrected: str = ""  # the same without the known label errors


def choices_in(text: str) -> dict[str, str]:
    """Letter -> text of "(A) red (B) blue", on one line or on several."""
    choices = {}
    for letter, choice in re.findall(r"\(([A-Za-z])\)\s*(.*?)\s*(?=\([A-Za-z]\)|\n|$)", text):
        # in order: another letter in parentheses is a word
        if letter.upper() == LETTERS[len(choices):len(choices) + 1]:
            choices[letter.upper()] = choice
    return choices


def make_item(where: str, name: str, group: str, images: list[Image.Image], words: str,
              choices: dict[str, str], label: str, wrong: bool = False) -> Item:
    match = re.fullmatch(r"\(?([A-Za-z])\)?\.?", str(label).strip())  # B, B. or (b)
    if not match or match[1].upper() not in choices:
        raise ValueError(f"{where}: the label {label!r} is none of the choices "
                         f"{', '.join(choices)}")
    text = choices[match[1].upper()]
    right = "".join(letter for letter in choices if choices[letter] == text)
    # of two choices, the other one is right where the label is wrong
    corrected = "".join(letter for letter in choices if (letter in right) != wrong)
    options = "\n".join(f"{letter}. {choice}" for letter, choice in choices.items())
    prompt = f"{words}\nOptions:\n{options}\n{INSTRUCTION}"
    return Item(where, group, images[0], prompt, [*choices], right[0], images[1:], name=str(name),
                choices=choices, label=right, corrected=corrected)


def vstar_item(row: dict, where: str, file: Path) -> Item:
    words = row["text"]
    item = make_item(where, row["question_id"], row["category"], [
        open_image(file.parent / row["image"], where)], words, choices_in(words), row["label"])
    return replace(item, question=words)  # as published, with options and instruction


def mmvp_item(row: dict, where: str, file: Path) -> Item:
    if not row["Index"].strip().isdecimal():
        raise ValueError(f"{where}: Index must be a number")
    index = int(row["Index"])
    # the hub has the name with a blank, and much code without
    folder = "MMVP Images" if (file.parent / "MMVP Images").is_dir() else "MMVP_Images"
    image = open_image(file.parent / folder / f"{index}.jpg", where)
    # items 1 and 2 are a pair
    return make_item(where, str(index), str((index - 1) // 2), [image], row["Question"],
                     choices_in(row["Options"]), row["Correct Answer"], index in MMVP_WRONG)


def blink_item(row: dict, where: str, file: Path) -> Item:
    images = [open_image(io.BytesIO(row[f"image_{n}"]["bytes"]), where)
              for n in range(1, 100) if row.get(f"image_{n}")]
    if not images:
        raise ValueError(f"{where}: no image")
    choices = {letter: str(text).strip() for letter, text in zip(LETTERS, row["choices"])}
    return make_item(where, row["idx"], file.parent.name, images, row["question"], choices,
                     row["answer"])


# name on the hub, files, and the field that is a row's id
LAYOUTS = dict(vstar=(vstar_item, "craigwu/vstar_bench", "test_questions.jsonl", "question_id"),
               mmvp=(mmvp_item, "MMVP/MMVP", "Questions.csv", "Index"),
               blink=(blink_item, "BLINK-Benchmark/BLINK", "*/val-*.parquet", "idx"))


def rows_of(file: Path) -> Iterable[dict]:
    if file.suffix == ".parquet":
        return parquet_rows([file])
    lines = io.StringIO(read_text(file))
    if file.suffix == ".csv":
        return csv.DictReader(lines)
    try:
        return [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:  # its doc is the line
        raise ValueError(f"{file}: not valid JSON: {error.doc:.80}") from None


def read_items(kind: str, folder: Path, configs: list[str] = ()) -> list[Item]:
    """All items of a benchmark. FileNotFoundError for another layout; ValueError names the item."""
    (convert, layout, pattern, key), items = LAYOUTS[kind], {}
    for config in configs or ["*"]:
        name = pattern.replace("*", config, 1)
        if not (files := sorted(folder.glob(name))):
            raise FileNotFoundError(f"{folder} holds no {name}; expected the layout of {layout}")
        for file in files:
            for number, row in enumerate(rows_of(file), start=1):
                where = f"{file}, row {number}, item {row.get(key)}"
                # a CSV row that is too short has None
                row = {name: value for name, value in row.items() if value is not None}
                try:
                    item = convert(row, where, file)
                except KeyError as error:
                    raise ValueError(f"{where}: no field {error}; found {[*row]}") from None
                if (item.task, item.name) in items:
                    raise ValueError(f"{where}: an item with this id is there twice")
                items[item.task, item.name] = item
    if not items:
        raise ValueError(f"{folder} holds no items")
    return [*items.values()]


def letters_in(text: str, letters: str) -> tuple[str, str]:
    """(strict, lenient) answer letter; "" where there is none, or more than one."""
    # strict: A, (A), "A. red", "Answer: A", "A is right"; lenient: also "It is A"; none: "A man is"
    text = re.sub(r"[*_`\"$\[\]{}]+", " ", open_boxes(text)[0]).strip()
    letter = rf"(?<!\w)(?<!\w['’-])([{letters}])(?!['’-]?\w)"
    # the article or the pronoun, unless "option" or the like is before it
    word = re.compile(rf"[AI][ \t]+(?!(?:{NO_NOUNS})\b)(?!{letter})[^\W\d_]")
    mentions = [m for m in re.finditer(letter, text) if not word.match(text, m.start())
                or re.search(r"(?i:option|choice|letter)\s+$", text[:m.start()])]
    if len({m[1] for m in mentions}) != 1:
        return "", ""
    alone = re.match(rf"(?:(?i:answer|option)\s*:?\s*)?\(?([{letters}])\)?(?![^\s.:,;)!?])", text)
    strict = alone is not None and alone.start(1) == mentions[0].start(1)
    return mentions[0][1] if strict else "", mentions[0][1]


def scores(kind: str, records: list[dict]) -> dict[str, list[float]]:
    """Rows of the table: name -> [n, strict %, lenient %]."""
    def row(sets: list[list[dict]], label: str = "label") -> list[float]:
        # a pair is right where both of its items are
        right = [[all(r[how] and r[how] in r[label] for r in one) for one in sets]
                 for how in ("strict", "lenient")]
        return [len(sets), *(100 * sum(sets) / len(sets) for sets in right)]

    groups, items = defaultdict(list), [[record] for record in records]
    for record in records:
        groups[record["group"]].append(record)
    if kind == "mmvp":
        return {f"{unit}, labels {name}": row(sets, label)
                for label, name in (("label", "as published"), ("corrected", "corrected"))
                for unit, sets in (("items", items), ("pairs", [*groups.values()]))}
    groups["all"] = records
    return {name: row([[record] for record in group]) for name, group in groups.items()}


def replies(vlm: VLM, items: list[Item], tokens: int, batch: int) -> list[str]:
    """Greedy answers. Raises ValueError naming the file and the item, before the first is asked."""
    evaluator, prompts = evaluate.Evaluator(vlm, [], batch=batch), []
    for item in items:
        # no special token of the model in the texts, and room for the answer
        vlm.chat.turns(item)
        evaluator.images.append(load_images(item, vlm.family))
        # every picture stands before the question, in the same turn
        turn = ("user", [*item.images, item.question])
        prompts.append(vlm.chat.prompt([turn], evaluator.images[-1]))
        vlm.chat.check_length(len(prompts[-1].ids) + tokens, item)
    return [answer["text"] for answer in evaluator.generate(prompts, tokens)]


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*LAYOUTS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True, help="checkpoint, hub id, or run of train.py")
    parser.add_argument("--out", type=Path, required=True, help="predictions, one line an item")
    parser.add_argument("--configs", nargs="*", default=[], help="of BLINK; default: all; the "
                        "paper's: Counting IQ_Test Jigsaw Relative_Reflectance Spatial_Relation")
    parser.add_argument("--tokens", type=int, default=4, help="maximum number of decoded tokens")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"],
                        default="bfloat16" if on_gpu else "float32", help="not of a run folder")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    args = parser.parse_args()
    if args.tokens < 1 or args.batch < 1:
        parser.error("--tokens and --batch must be at least 1")
    # before the model answers, which takes minutes
    if args.out.exists() or not args.out.parent.is_dir():
        parser.error(f"--out {args.out} must be a new file in a folder that exists")
    items = read_items(args.kind, args.folder, args.configs)
    if (Path(args.model) / "best.json").is_file():
        vlm = evaluate.load_model(args.model, args.device)[0]
    else:
        vlm = VLM(args.model, args.dtype).to(args.device).eval()
    records = []
    for item, reply in zip(items, replies(vlm, items, args.tokens, args.batch)):
        strict, lenient = letters_in(reply, "".join(item.choices))
        records.append(dict(id=item.name, group=item.task, label=item.label,
                            corrected=item.corrected, reply=reply, strict=strict, lenient=lenient))
    write_text(args.out, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    print(f"{'':32s}    n  strict  lenient")
    for name, (n, strict, lenient) in scores(args.kind, records).items():
        print(f"{name:32s}{n:5d}{strict:8.1f}{lenient:9.1f}")
    if names := [f"{item.name} of {item.task}" for item in items
                 if len(set(item.choices.values())) < len(item.choices)]:
        print(f"{len(names)} items have one choice twice, both letters count: {', '.join(names)}")


if __name__ == "__main__":
    run_program(main)
