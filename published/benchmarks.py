"""V*, MMVP and BLINK in their published layouts, answered by the model's own `generate`.

    python published/benchmarks.py vstar vstar_bench --model MODEL_OR_RUN --out predictions.jsonl
    python published/benchmarks.py blink BLINK --configs Counting Jigsaw --model ... --out ...

Decoding is greedy, at most four tokens. The same command continues an interrupted run; another
model needs another --out, whose first line says what made it. Strict score: the answer is the right
letter. Lenient score: it names the right letter and no other (see letters_in).
"""

import argparse
import csv
import hashlib
import io
import json
import os
import re
import sys
from collections import defaultdict
from pathlib import Path
from string import ascii_uppercase as LETTERS
from typing import Iterable, NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
from model import VLM  # noqa: E402
from published.common import open_boxes, parquet_rows, text_file  # noqa: E402
from support.chat import Chat  # noqa: E402
from support.features import ImageEncoder, load_images, with_pixels  # noqa: E402
from support.files import write_text  # noqa: E402
from support.images import Picture, open_image, picture_digest  # noqa: E402
from support.processes import run_program  # noqa: E402
from support.records import Example  # noqa: E402

INSTRUCTION = "Answer with the option's letter from the given choices directly."
# items whose label is confirmed to be wrong (lmms-eval, issue 1018, which counts from 0)
MMVP_WRONG = {100, 280}
# an article or a pronoun is followed by a word, but not by one of these
NO_NOUNS = "and|or|nor|not|but|is|because|since|vs"


class Item(NamedTuple):
    # file and item, for error messages
    source: str
    id: str
    # category (V*), number of the pair (MMVP), configuration (BLINK)
    group: str
    images: list[Picture]
    prompt: str
    # letter -> text
    choices: dict[str, str]
    # the letters that count as right: several where choices repeat the right text
    label: str
    # the same without the known label errors
    corrected: str


def choices_in(text: str) -> dict[str, str]:
    """Letter -> text of "(A) red (B) blue", on one line or on several."""
    choices = {}
    for letter, choice in re.findall(r"\(([A-Za-z])\)\s*(.*?)\s*(?=\([A-Za-z]\)|\n|$)", text):
        # in order: another letter in parentheses is a word
        if letter.upper() == LETTERS[len(choices):len(choices) + 1]:
            choices[letter.upper()] = choice
    return choices


def make_item(where: str, name: str, group: str, images: list[Picture], words: str,
              choices: dict[str, str], label: str) -> Item:
    for image in images:
        if isinstance(image, Path):
            open_image(image, where)  # raises if it cannot be read
    # a label such as B, B. or (b)
    match = re.fullmatch(r"\(?([A-Za-z])\)?\.?", str(label).strip())
    if not match or match[1].upper() not in choices:
        raise ValueError(f"{where}: the label {label!r} is none of the choices "
                         f"{', '.join(choices)}")
    text = choices[match[1].upper()]
    right = "".join(letter for letter in choices if choices[letter] == text)
    options = "\n".join(f"{letter}. {choice}" for letter, choice in choices.items())
    prompt = f"{words}\nOptions:\n{options}\n{INSTRUCTION}"
    return Item(where, str(name), group, images, prompt, choices, right, right)


def vstar_item(row: dict, where: str, file: Path) -> Item:
    words = row["text"]
    # as published: the words have options and instruction
    return make_item(where, row["question_id"], row["category"], [file.parent / row["image"]],
                     words, choices_in(words), row["label"])._replace(prompt=words)


def mmvp_item(row: dict, where: str, file: Path) -> Item:
    if not row["Index"].strip().isdecimal():
        raise ValueError(f"{where}: Index must be a number")
    index = int(row["Index"])
    # the hub has the name with a blank, and much code without
    folder = "MMVP Images" if (file.parent / "MMVP Images").is_dir() else "MMVP_Images"
    image, pair = file.parent / folder / f"{index}.jpg", (index - 1) // 2  # items 1 and 2 are one
    item = make_item(where, str(index), str(pair), [image], row["Question"],
                     choices_in(row["Options"]), row["Correct Answer"])
    # of two choices, the other one is right
    others = "".join(letter for letter in item.choices if letter not in item.label)
    return item._replace(corrected=others) if index in MMVP_WRONG else item


def blink_item(row: dict, where: str, file: Path) -> Item:
    images = [open_image(io.BytesIO(row[f"image_{n}"]["bytes"]), where)
              for n in range(1, 100) if row.get(f"image_{n}")]
    if not images:
        raise ValueError(f"{where}: no image")
    choices = {letter: str(text).strip() for letter, text in zip(LETTERS, row["choices"])}
    return make_item(where, row["idx"], file.parent.name, images, row["question"], choices,
                     row["answer"])


# name on the hub, files, and the fields that a row must have, its id first
LAYOUTS = dict(
    vstar=(vstar_item, "craigwu/vstar_bench", "test_questions.jsonl",
           ("question_id", "image", "text", "label", "category")),
    mmvp=(mmvp_item, "MMVP/MMVP", "Questions.csv",
          ("Index", "Question", "Options", "Correct Answer")),
    blink=(blink_item, "BLINK-Benchmark/BLINK", "*/val-*.parquet",
           ("idx", "question", "choices", "answer")))


def rows_of(file: Path) -> Iterable[dict]:
    if file.suffix == ".parquet":
        return parquet_rows([file])
    with text_file(file) as lines:
        if file.suffix == ".csv":
            return [*csv.DictReader(lines)]
        try:
            return [json.loads(line) for line in lines if line.strip()]
        except json.JSONDecodeError as error:
            # the line itself
            raise ValueError(f"{file}: not valid JSON: {error.doc:.80}") from None


def read_items(kind: str, folder: Path, configs: list[str] = ()) -> list[Item]:
    """All items of a benchmark. FileNotFoundError for another layout; ValueError names the item."""
    (convert, layout, pattern, fields), items = LAYOUTS[kind], {}
    for config in configs or ["*"]:
        name = pattern.replace("*", config, 1)
        if not (files := sorted(folder.glob(name))):
            raise FileNotFoundError(f"{folder} holds no {name}; expected the layout of {layout}")
        for file in files:
            for number, row in enumerate(rows_of(file), start=1):
                where = f"{file}, row {number}, item {row.get(fields[0])}"
                # a CSV row that is too short has None
                if missing := [name for name in fields if row.get(name) is None]:
                    raise ValueError(f"{where}: no field {missing[0]!r}; found {[*row]}")
                item = convert(row, where, file)
                if (item.group, item.id) in items:
                    raise ValueError(f"{where}: an item with this id is there twice")
                items[item.group, item.id] = item
    if not items:
        raise ValueError(f"{folder} holds no items")
    return [*items.values()]


def letters_in(text: str, letters: str) -> tuple[str, str]:
    """(strict, lenient) answer letter; "" where there is none, or more than one."""
    # strict: A, (A), A., "A. red", "Answer: A", "A is right"; lenient: also "It is A"; none: "A man
    # is", "I think" (English words), "A and B"
    text = re.sub(r"[*_`\"$\[\]{}]+", " ", open_boxes(text)[0]).strip()
    letter = rf"(?<!\w)(?<!\w['’-])([{letters}])(?!['’-]?\w)"
    # the article or the pronoun, unless "option" or the like is before it
    word = re.compile(rf"[AI][ \t]+(?!(?:{NO_NOUNS})\b)(?!{letter})[^\W\d_]")
    mentions = [m for m in re.finditer(letter, text)
             if not word.match(text, m.start())
             or re.search(r"(?i:option|choice|letter)\s+$", text[:m.start()])]
    if len({m[1] for m in mentions}) != 1:
        return "", ""
    alone = re.match(rf"(?:(?i:answer|option)\s*:?\s*)?\(?([{letters}])\)?(?![^\s.:,;)!?])", text)
    strict = alone is not None and alone.start(1) == mentions[0].start(1)
    return mentions[0][1] if strict else "", mentions[0][1]


def scores(kind: str, records: list[dict]) -> dict[str, list[float]]:
    # rows of the table: name -> [n, strict %, lenient %]
    def row(sets: list[list[dict]], label: str = "label") -> list[float]:
        # a pair is right where both of its items are
        right = [[all(r[how] and r[how] in r[label] for r in one) for one in sets]
                 for how in ("strict", "lenient")]
        return [len(sets), *(100 * sum(sets) / len(sets) for sets in right)]

    groups, items = defaultdict(list), [[record] for record in records]
    for record in records:
        groups[record["group"]].append(record)
    if kind != "mmvp":
        return {name: row([[r] for r in group]) for name, group in groups.items()} | {
            "all": row(items)}
    return {f"{unit}, labels {name}": row(sets, label)
            for label, name in (("label", "as published"), ("corrected", "corrected"))
            for unit, sets in (("items", items), ("pairs", [*groups.values()]))}


class Questions:
    """Items as questions to one model. Raises ValueError naming the file and the item."""

    def __init__(self, vlm: VLM, items: list[Item], tokens: int):
        self.vlm, self.tokens, self.prompts = vlm, tokens, []
        self.chat = Chat(vlm.family, vlm.max_positions)
        self.encode_images = ImageEncoder(vlm.family)
        self.examples = [Example(item.source, item.group, item.images[0], item.prompt,
                                 list(item.choices), item.label[0], item.images[1:])
                         for item in items]
        # all items are checked before the first is asked: their texts must be free of the model's
        # special tokens, and leave room for the answer
        for example in self.examples:
            self.chat.check_text(example)
            images = [image._replace(picture=None) for image in load_images(example, vlm.family)]
            # every picture stands before the question, in the same turn
            turn = ("user", [*example.images, example.question])
            self.prompts.append(self.chat.prompt([turn], images))
            self.chat.check_length(len(self.prompts[-1].ids) + tokens, example)

    def replies(self, numbers: list[int]) -> list[str]:
        """Greedy answers to these items."""
        family = self.vlm.family
        images = [image for n in numbers
                  for image in with_pixels(load_images(self.examples[n], family), family)]
        rows = self.vlm.generate([self.prompts[n] for n in numbers], images, self.encode_images,
                                 self.tokens)
        return [self.chat.tokenizer.decode([token for token in ids if token != self.chat.end_id],
                                           skip_special_tokens=True) for ids in rows]


def digest_of(questions: Questions, items: list[Item]) -> str:
    # of what makes predictions: token ids depend on tokenizer, chat template and image sizes, and
    # a folder may move
    lm, family = questions.vlm.lm, questions.vlm.family
    parts = [questions.tokens, str(lm.dtype), family.processor.to_dict(),
             [view.ids for view in questions.prompts],
             [item._replace(source="", images=[*map(picture_digest, item.images)])
              for item in items]]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    for p in lm.parameters():
        digest.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def predict(vlm: VLM, items: list[Item], out: Path, tokens: int, batch: int,
            model: str = "") -> list[dict]:
    """Predictions of all items; those already in `out` are kept. model: a name for its header."""
    questions = Questions(vlm, items, tokens)
    digest = digest_of(questions, items)
    lines = [json.dumps(dict(made_by=digest, model=model or vlm.path), ensure_ascii=False) + "\n"]
    if out.exists():
        with text_file(out) as text:
            # an interrupted run may end in half a line
            lines = [line for line in text if line.endswith("\n")]
        if digest not in "".join(lines[:1]):
            raise ValueError(f"{out} does not say that the same weights, items, prompts, image "
                             "processor, dtype and --tokens made its predictions: choose another "
                             "--out")
    write_text(out, "".join(lines))
    replies = {(r["group"], r["id"]): r["reply"] for r in map(json.loads, lines[1:])}
    waiting = [n for n, item in enumerate(items) if (item.group, item.id) not in replies]
    for start in tqdm(range(0, len(waiting), batch), unit=" batches"):
        numbers = waiting[start:start + batch]
        texts = questions.replies(numbers)
        with open(out, "a", encoding="utf-8", newline="\n") as file:
            for item, text in zip((items[n] for n in numbers), texts):
                replies[item.group, item.id] = text
                file.write(json.dumps(record_of(item, text), ensure_ascii=False) + "\n")
            # on the disk before the next batch: a crash loses one batch at most
            file.flush()
            os.fsync(file.fileno())
    # letters are read again from all replies, so that scores follow the present rules
    return [record_of(item, replies[item.group, item.id]) for item in items]


def record_of(item: Item, reply: str) -> dict:
    strict, lenient = letters_in(reply, "".join(item.choices))
    return dict(id=item.id, group=item.group, label=item.label, corrected=item.corrected,
                reply=reply, strict=strict, lenient=lenient)


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
    if not args.out.parent.is_dir():
        raise FileNotFoundError(f"{args.out.parent} not found: --out is written there")
    items = read_items(args.kind, args.folder, args.configs)
    if (Path(args.model) / "best.json").is_file():
        vlm = evaluate.load_model(args.model, args.device)[0]
    else:
        vlm = VLM(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    records = predict(vlm, items, args.out, args.tokens, args.batch, args.model)
    print(f"{'':32s}    n  strict  lenient")
    for name, (n, strict, lenient) in scores(args.kind, records).items():
        print(f"{name:32s}{n:5d}{strict:8.1f}{lenient:9.1f}")
    if names := [f"{item.id} of {item.group}" for item in items
                 if len(set(item.choices.values())) < len(item.choices)]:
        print(f"{len(names)} items have one choice twice, both letters count: {', '.join(names)}")


if __name__ == "__main__":
    run_program(main)
