"""V*, MMVP and BLINK from their published layouts on disk, answered by the model's plain `generate` with at most four tokens.

    python published/benchmarks.py vstar  vstar_bench --model MODEL_OR_RUN --out predictions.jsonl
    python published/benchmarks.py mmvp   MMVP        --model MODEL_OR_RUN --out predictions.jsonl
    python published/benchmarks.py blink  BLINK       --model MODEL_OR_RUN --out predictions.jsonl [--configs Counting Jigsaw]

One JSON line an item is written as soon as its batch is answered; the same command goes on where it was interrupted. Two
scores: strict (the answer is the letter, alone or in the usual dress: A, (A), A., Answer: A) and lenient (exactly one of the
item's letters stands anywhere by itself). An answer that names several letters counts in neither.
"""

import argparse
import csv
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
from model import VLM  # noqa: E402

INSTRUCTION = "Answer with the option's letter from the given choices directly."
BLINK_PAPER = ("Counting", "IQ_Test", "Jigsaw", "Relative_Reflectance", "Spatial_Relation")
MMVP_SWAPPED = {99, 100, 279, 280}  # items whose published labels are each other's (lmms-eval, issue 1018)


class Item(NamedTuple):
    id: str
    group: str  # category (V*), pair number (MMVP), configuration (BLINK)
    images: list[data.Picture]
    prompt: str
    label: str  # A, B, ...
    letters: str  # the item's letters, e.g. ABCD
    other_label: str = ""  # MMVP: the corrected label


def the_letter(text: str, where: str) -> str:
    match = re.fullmatch(r"\(?([A-Za-z])\)?\.?", str(text).strip())
    if not match:
        raise ValueError(f"{where}: {text!r} is no option letter")
    return match[1].upper()


def vstar(folder: Path) -> Iterator[Item]:
    """test_questions.jsonl: question_id, image, text (options and instruction included), label, category."""
    file = folder / "test_questions.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; expected craigwu/vstar_bench: test_questions.jsonl, direct_attributes/, "
                                "relative_position/")
    for n, line in enumerate(file.read_text(encoding="utf-8-sig").strip().split("\n"), start=1):
        row, where = json.loads(line), f"{file}, line {n}"
        letters = "".join(sorted(set(re.findall(r"\(([A-Z])\)", row["text"])))) or "ABCD"
        yield Item(str(row["question_id"]), row["category"], [data.checked(folder, row["image"], where)], row["text"],
                   the_letter(row["label"], where), letters)


def mmvp(folder: Path) -> Iterator[Item]:
    """Questions.csv: Index, Question, Options "(a) ... (b) ...", Correct Answer "(a)"; pictures "MMVP Images/INDEX.jpg"."""
    file = folder / "Questions.csv"
    pictures = next((folder / name for name in ("MMVP Images", "MMVP_Images") if (folder / name).is_dir()), None)
    if not file.is_file() or pictures is None:
        raise FileNotFoundError(f"{folder} must hold Questions.csv and the folder \"MMVP Images\" (or MMVP_Images) of MMVP/MMVP")
    with open(file, newline="", encoding="utf-8-sig") as rows:
        for row in csv.DictReader(rows):
            index, where = int(row["Index"]), f"{file}, item {row['Index']}"
            options = re.sub(r"\s*\(([a-z])\)", lambda m: f"\n{m[1].upper()}.", row["Options"]).strip()
            label = the_letter(row["Correct Answer"], where)
            corrected = {"A": "B", "B": "A"}[label] if index in MMVP_SWAPPED else label
            yield Item(str(index), str((index - 1) // 2), [data.checked(pictures, f"{index}.jpg", where)],
                       f"{row['Question']}\nOptions:\n{options}\n{INSTRUCTION}", label, "AB", corrected)


def blink(folder: Path, configs: list[str]) -> Iterator[Item]:
    """CONFIG/val-*.parquet: idx, question, image_1 .. image_4, choices, answer "(B)"; needs pyarrow."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError("BLINK is published as parquet, which needs one more package: pip install pyarrow") from None
    known = sorted(p.name for p in folder.iterdir() if p.is_dir() and list(p.glob("val-*.parquet"))) if folder.is_dir() else []
    for config in configs or known:
        if config not in known:
            raise FileNotFoundError(f"{folder / config}/val-*.parquet not found; expected the layout of BLINK-Benchmark/BLINK; "
                                    f"found {known}")
        for file in sorted((folder / config).glob("val-*.parquet")):
            for batch in parquet.ParquetFile(file).iter_batches(32):
                for row in batch.to_pylist():
                    yield blink_item(row, config, str(file))


def blink_item(row: dict, config: str, where: str) -> Item:
    letters = "ABCDEFGH"[:len(row["choices"])]
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"]))
    images = [data.open_image(io.BytesIO(row[f"image_{n}"]["bytes"]), where) for n in range(1, 5) if row.get(f"image_{n}")]
    asked = f"{row['question']}\nOptions:\n{options}\n{INSTRUCTION}"
    return Item(str(row["idx"]), config, images, asked, the_letter(row["answer"], where), letters)


def letters_in(text: str, letters: str) -> tuple[str, str]:
    """(strict, lenient) answer letter; empty where there is none, or more than one."""
    text = re.sub(r"</?answer>|\\boxed\{|\}", " ", text).strip()
    named = set(re.findall(rf"(?<![A-Za-z0-9'])([{letters}])(?![A-Za-z0-9'])", text))
    lenient = named.pop() if len(named) == 1 else ""
    strict = re.fullmatch(rf"(?:Answer:)?\s*\(?([{letters}])\)?[.:]?(?:\s.*)?", text, re.DOTALL)
    return (strict[1] if strict and strict[1] == lenient else ""), lenient


def predict(vlm: VLM, items: list[Item], out: Path, tokens: int, batch: int) -> list[dict]:
    """Predictions of all items, those already in `out` included."""
    lines = [line for line in out.read_text(encoding="utf-8").split("\n") if line.endswith("}")] if out.is_file() else []
    done = {(r["group"], r["id"]): r for r in map(json.loads, lines)}
    if strangers := done.keys() - {(item.group, item.id) for item in items}:
        raise ValueError(f"{out} has predictions of other items ({sorted(strangers)[0]}): choose another --out")
    serializer = data.Serializer(vlm.tokenizer, vlm.placeholder_id, vlm.max_positions)
    waiting = [item for item in items if (item.group, item.id) not in done]
    evaluate.write_text(out, "".join(line + "\n" for line in lines))  # without the half line of an interruption
    for start in range(0, len(waiting), batch):
        part, store, views = waiting[start:start + batch], data.ImageStore(vlm.family), []
        for item in part:
            indices = [store.add_image(image, f"{item.group} {item.id}") for image in item.images]
            turns = [("user", [*item.images, item.prompt])]
            views.append(serializer.prompt_of(turns, indices, [store.spans[i] for i in indices]))
        with open(out, "a", encoding="utf-8") as file:
            for item, ids in zip(part, vlm.generate(views, store, tokens)):
                text = vlm.tokenizer.decode(ids, skip_special_tokens=True)
                strict, lenient = letters_in(text, item.letters)
                record = dict(id=item.id, group=item.group, label=item.label, other_label=item.other_label, said=text,
                              strict=strict, lenient=lenient)
                done[item.group, item.id] = record
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{len(done)} of {len(items)}", flush=True)
    return [done[item.group, item.id] for item in items]


def scores(kind: str, records: list[dict]) -> dict[str, list[float]]:
    """Rows of the table: name -> [n, strict %, lenient %]."""
    right = lambda rows, label, how: 100 * sum(r[how] == r[label] for r in rows) / len(rows)
    share = lambda rows, label="label": [len(rows), right(rows, label, "strict"), right(rows, label, "lenient")]
    groups = {}
    for r in records:
        groups.setdefault(r["group"], []).append(r)
    if kind != "mmvp":
        return {name: share(rows) for name, rows in groups.items()} | {"all": share(records)}
    table = {}
    for label in ("label", "other_label"):
        name = "labels as published" if label == "label" else "labels corrected"
        table[f"items, {name}"] = share(records, label)
        pairs = [[all(r[how] == r[label] for r in rows) for how in ("strict", "lenient")] for rows in groups.values()]
        table[f"pairs, {name}"] = [len(pairs), *(100 * sum(p[n] for p in pairs) / len(pairs) for n in (0, 1))]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["vstar", "mmvp", "blink"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True, help="checkpoint folder, hub id, or run folder of train.py")
    parser.add_argument("--out", type=Path, required=True, help="predictions, one JSON line an item")
    parser.add_argument("--configs", nargs="*", default=[],
                        help=f"of BLINK; default: all with labels; the paper's: {' '.join(BLINK_PAPER)}")
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16" if torch.cuda.is_available() else "float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    items = list(blink(args.folder, args.configs) if args.kind == "blink" else dict(vstar=vstar, mmvp=mmvp)[args.kind](args.folder))
    if not items:
        raise ValueError(f"{args.folder} holds no items")
    is_run = (Path(args.model) / "best.json").is_file()
    vlm = (evaluate.load_run(Path(args.model), args.device)[0] if is_run
           else VLM(args.model, dtype=getattr(torch, args.dtype)).to(args.device).eval())
    print(f"{'':32s}    n  strict  lenient")
    for name, (n, strict, lenient) in scores(args.kind, predict(vlm, items, args.out, args.tokens, args.batch)).items():
        print(f"{name:32s}{n:5d}{strict:8.1f}{lenient:9.1f}")


if __name__ == "__main__":
    try:
        main()
    except KeyError as error:
        raise SystemExit(f"error: a record has no field {error}: is this the published layout?")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
