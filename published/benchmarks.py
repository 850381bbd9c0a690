"""V*, MMVP and BLINK in their published layouts, answered by the model's own `generate`.

    python published/benchmarks.py vstar vstar_bench --model MODEL_OR_RUN --out predictions.jsonl
    python published/benchmarks.py mmvp  MMVP        --model MODEL_OR_RUN --out predictions.jsonl
    python published/benchmarks.py blink BLINK --configs Counting Jigsaw --model ... --out ...

Decoding is greedy, at most four tokens. Answers are written batch by batch, and the same command
continues an interrupted run. The first line of --out says what made it; another model needs
another file. Strict score: the answer is the right letter. Lenient score: it names the right letter
and no other (see letters_in).
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
from typing import Iterator, NamedTuple

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
from data import View  # noqa: E402
from model import VLM  # noqa: E402
from published.common import digest, open_boxes, parquet_rows, text_file  # noqa: E402
from support.files import write_text  # noqa: E402
from support.images import Picture, open_image  # noqa: E402
from support.processes import run_program  # noqa: E402
from support.records import Example, checked  # noqa: E402

# name on the hub, files, and the fields of a row, its id first
LAYOUTS = dict(
    vstar=("craigwu/vstar_bench", "test_questions.jsonl",
           ("question_id", "image", "text", "label", "category")),
    mmvp=("MMVP/MMVP", "Questions.csv", ("Index", "Question", "Options", "Correct Answer")),
    blink=("BLINK-Benchmark/BLINK", "*/val-*.parquet", ("idx", "question", "choices", "answer")))
INSTRUCTION = "Answer with the option's letter from the given choices directly."
# items whose label is confirmed to be wrong (lmms-eval, issue 1018, which counts from 0)
MMVP_WRONG = {100, 280}
# an article is followed by a word, but not by one of these
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
    """Letter -> text of choices such as "(A) red (B) blue", on one line or on several."""
    choices = {}
    for letter, choice in re.findall(r"\(([A-Za-z])\)\s*(.*?)\s*(?=\([A-Za-z]\)|\n|$)", text):
        # in order: another letter in parentheses is a word
        if letter.upper() == LETTERS[len(choices):len(choices) + 1]:
            choices[letter.upper()] = choice
    return choices


def with_options(words: str, choices: dict[str, str]) -> str:
    options = "\n".join(f"{letter}. {choice}" for letter, choice in choices.items())
    return f"{words}\nOptions:\n{options}\n{INSTRUCTION}"


def make_item(where: str, name: str, group: str, images: list[Picture], prompt: str,
              choices: dict[str, str], label: str, wrong: bool = False) -> Item:
    """Raises ValueError for a label that is not the letter of a choice, such as "(b)"."""
    match = re.fullmatch(r"\(?([A-Za-z])\)?\.?", str(label).strip())
    if not match or match[1].upper() not in choices:
        raise ValueError(f"{where}: the label {label!r} is none of the choices "
                         f"{', '.join(choices)}")
    text = choices[match[1].upper()]
    right = "".join(letter for letter in choices if choices[letter] == text)
    # of two choices, the other one
    corrected = "".join(letter for letter in choices if letter not in right) if wrong else right
    return Item(where, str(name), group, images, prompt, choices, right, corrected)


def vstar_item(row: dict, where: str, file: Path) -> Item:
    # the text has options and instruction
    return make_item(where, row["question_id"], row["category"],
                     [checked(file.parent, row["image"], where)], row["text"],
                     choices_in(row["text"]), row["label"])


def mmvp_item(row: dict, where: str, file: Path) -> Item:
    if not row["Index"].strip().isdecimal():
        raise ValueError(f"{where}: Index must be a number")
    index, choices = int(row["Index"]), choices_in(row["Options"])
    # the hub has the name with a blank, and much code without
    folder = "MMVP Images" if (file.parent / "MMVP Images").is_dir() else "MMVP_Images"
    # items 1 and 2 are a pair
    return make_item(where, str(index), str((index - 1) // 2),
                     [checked(file.parent, f"{folder}/{index}.jpg", where)],
                     with_options(row["Question"], choices), choices, row["Correct Answer"],
                     index in MMVP_WRONG)


def blink_item(row: dict, where: str, file: Path) -> Item:
    choices = {letter: str(text).strip() for letter, text in zip(LETTERS, row["choices"])}
    # by number: image_10 is behind image_2
    names = sorted((key for key in row if re.fullmatch(r"image_\d+", key) and row[key]),
                   key=lambda key: int(key.removeprefix("image_")))
    if not names:
        raise ValueError(f"{where}: no image")
    images = [open_image(io.BytesIO(row[key]["bytes"]), where) for key in names]
    return make_item(where, row["idx"], file.parent.name, images,
                     with_options(row["question"], choices), choices, row["answer"])


def rows_of(file: Path) -> Iterator[dict]:
    if file.suffix == ".parquet":
        yield from parquet_rows([file], "BLINK")
        return
    with text_file(file) as lines:
        if file.suffix == ".csv":
            yield from csv.DictReader(lines)
            return
        for number, line in enumerate(lines, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number}: not valid JSON ({error})") from None


def read_items(kind: str, folder: Path, configs: list[str] = ()) -> list[Item]:
    """All items of a benchmark. Raises FileNotFoundError for another layout, and ValueError, naming
    file and item, for a row without a field, a wrong label or an id that is there twice."""
    (layout, pattern, fields), items = LAYOUTS[kind], {}
    make_row = dict(vstar=vstar_item, mmvp=mmvp_item, blink=blink_item)[kind]
    for config in configs or ["*"]:
        if not (files := sorted(folder.glob(pattern.replace("*", config, 1)))):
            raise FileNotFoundError(f"{folder} holds no {pattern.replace('*', config, 1)}; "
                                    f"expected the layout of {layout}")
        for file in files:
            for number, row in enumerate(rows_of(file), start=1):
                where = f"{file}, row {number}, item {row.get(fields[0])}"
                # a CSV row that is too short has None
                if missing := [name for name in fields if row.get(name) is None]:
                    raise ValueError(f"{where}: no field {missing[0]!r}; found {[*row]}")
                item = make_row(row, where, file)
                if (item.group, item.id) in items:
                    raise ValueError(f"{where}: an item with this id is there twice")
                items[item.group, item.id] = item
    return [*items.values()]


def letters_in(text: str, letters: str) -> tuple[str, str]:
    """(strict, lenient) answer letter; "" where there is none, or more than one.

    Strict: A, (A), A., "A. red", "Answer: A", "A is right". Lenient: also "It is A". None: "A man
    is", "I think" (the English words), "A and B".
    """
    text = re.sub(r"[*_`\"$\[\]{}]+", " ", open_boxes(text)[0]).strip()
    letter = rf"(?<!\w)(?<!\w['’-])([{letters}])(?!['’-]?\w)"
    # the article or the pronoun, unless "option" or the like is before it
    word = re.compile(rf"[AI][ \t]+(?!(?:{NO_NOUNS})\b)(?!{letter})[^\W\d_]")
    named = [m for m in re.finditer(letter, text)
             if not word.match(text, m.start())
             or re.search(r"(?i:option|choice|letter)\s+$", text[:m.start()])]
    if len({m[1] for m in named}) != 1:
        return "", ""
    alone = re.match(rf"(?:(?i:answer|option)\s*:?\s*)?\(?([{letters}])\)?(?![^\s.:,;)!?])", text)
    strict = alone is not None and alone.start(1) == named[0].start(1)
    return named[0][1] if strict else "", named[0][1]


def scores(kind: str, records: list[dict]) -> dict[str, list[float]]:
    """Rows of the table: name -> [n, strict %, lenient %]. A pair is right where both items are."""
    groups = defaultdict(list)
    for record in records:
        groups[record["group"]].append(record)
    items, pairs = [[record] for record in records], list(groups.values())
    table = {name: ([[r] for r in group], "label") for name, group in groups.items()}
    table["all"] = items, "label"
    if kind == "mmvp":
        table = {f"{unit}, labels {name}": (sets, label)
                 for label, name in (("label", "as published"), ("corrected", "corrected"))
                 for unit, sets in (("items", items), ("pairs", pairs))}
    return {name: [len(sets), *(100 / len(sets) * sum(
        all(r[how] and r[how] in r[label] for r in one) for one in sets)
        for how in ("strict", "lenient"))] for name, (sets, label) in table.items()}


class Questions(evaluate.Answerer):
    """Items as questions to one model. Raises ValueError, naming file and item, for a text with
    the model's special tokens and for a prompt that leaves no room for the answer."""

    def __init__(self, vlm: VLM, items: list[Item], tokens: int):
        # over all items, so that all are checked before the first is asked; a question's further
        # pictures take the place of a trajectory's (see `prompt`)
        super().__init__(vlm, [Example(item.source, item.group, item.images[0], item.prompt,
                                       list(item.choices), item.label[0], item.images[1:])
                               for item in items])
        for view, example in zip(self.prompts, self.examples):
            ids = view.ids + tokens * [self.serializer.end_id]
            self.serializer.check_length(view._replace(ids=ids), example)

    def prompt(self, example: Example, place, turns: int) -> View:
        # every picture is before the question, in the same turn
        return self.serializer.prompt([("user", [*example.images, example.question])], *place)


def origin(items: list[Item], tokens: int, questions: Questions | None = None) -> dict:
    """What makes predictions; without questions, what is known before the model is loaded."""
    # without the source: a folder may move
    parts = dict(items=[[*item._replace(source="", images=[*map(digest, item.images)])]
                        for item in items])
    if questions:
        lm, processor = questions.vlm.lm, questions.vlm.family.processor
        images = type(getattr(processor, "image_processor", processor)).__name__
        # the prompts' ids depend on tokenizer, chat template and image sizes
        parts |= dict(dtype=str(lm.dtype), image_processor=[images, processor.to_dict()],
                      prompts=[view.ids for view in questions.prompts], weights=[
                          (name, list(p.shape), hashlib.sha256(p.detach().cpu().contiguous()
                           .flatten().view(torch.uint8).numpy()).hexdigest())
                          for name, p in lm.named_parameters()])
    return dict(tokens=tokens) | {name: hashlib.sha256(json.dumps(
        part, sort_keys=True, default=str).encode()).hexdigest() for name, part in parts.items()}


def earlier_lines(out: Path, made_by: dict) -> list[str]:
    """The lines of a predictions file, the first of which says what made it. Raises ValueError
    where it does not, or differs from made_by."""
    if not out.exists():
        return []
    with text_file(out) as lines:
        # an interrupted run may end in half a line
        lines = [line[:-1] for line in lines if line.endswith("\n")]
    try:
        header = dict(json.loads(lines[0])["made_by"])
    except (IndexError, KeyError, TypeError, ValueError):
        raise ValueError(f"{out} does not say what made its predictions (its first line has no "
                         "\"made_by\"): choose another --out") from None
    if differences := [key for key, value in made_by.items() if header.get(key) != value]:
        raise ValueError(f"{out} holds predictions made with other {', '.join(differences)} "
                         f"(by {header.get('model')}): choose another --out")
    return lines


def predict(vlm: VLM, items: list[Item], out: Path, tokens: int, batch: int,
            model: str = "") -> list[dict]:
    """Predictions of all items; those already in `out` are kept. model: a name for its header."""
    questions = Questions(vlm, items, tokens)
    made_by = origin(items, tokens, questions)
    lines = earlier_lines(out, made_by) or [
        json.dumps(dict(made_by=dict(model=model or vlm.path) | made_by), ensure_ascii=False)]
    write_text(out, "".join(line + "\n" for line in lines))
    records = map(json.loads, lines[1:])
    replies = {(record["group"], record["id"]): record["reply"] for record in records}
    rows = [n for n, item in enumerate(items) if (item.group, item.id) not in replies]
    for start in tqdm(range(0, len(rows), batch), unit=" batches"):
        part = rows[start:start + batch]
        answers = questions.generate([questions.prompts[row] for row in part], tokens)
        with open(out, "a", encoding="utf-8", newline="\n") as file:
            for item, answer in zip((items[row] for row in part), answers):
                replies[item.group, item.id] = answer["text"]
                file.write(json.dumps(record_of(item, answer["text"]), ensure_ascii=False) + "\n")
            # on the disk before the next batch: a crash loses one batch at most
            file.flush()
            os.fsync(file.fileno())
    # letters are read from all replies anew, so that scores follow the present rules
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
    parser.add_argument("--model", required=True,
                        help="checkpoint folder, hub id, or run folder of train.py")
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
    # before the model is loaded, which takes minutes
    earlier_lines(args.out, origin(items, args.tokens))
    if (Path(args.model) / "best.json").is_file():
        vlm = evaluate.load_run(Path(args.model), args.device)[0]
    else:
        vlm = VLM(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    records = predict(vlm, items, args.out, args.tokens, args.batch, args.model)
    print(f"{'':32s}    n  strict  lenient")
    for name, (n, strict, lenient) in scores(args.kind, records).items():
        print(f"{name:32s}{n:5d}{strict:8.1f}{lenient:9.1f}")
    if names := [f"{item.id} of {item.group}" for item in items
                 if len(set(item.choices.values())) < len(item.choices)]:
        print(f"{len(names)} items have the same choice twice, and each letter of the right text "
              f"counts: {', '.join(names)}")


if __name__ == "__main__":
    run_program(main)
