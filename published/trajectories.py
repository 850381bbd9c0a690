"""Published trajectory data -> a folder in this repository's format (README, "Your own trajectories").

    python published/trajectories.py lvr lvr_sft.json --images IMAGES --out DIR            # boxes become crop calls
    python published/trajectories.py thinkmorph Jigsaw_Assembly Visual_Search --out DIR    # parquet needs pyarrow
    python published/trajectories.py pixelreasoner data.json --images UNZIPPED --out DIR   # 0 to 3 crops; videos skipped
    python published/trajectories.py mix A=2 B=1 --count 6000 --out DIR                    # weights of folders so made

Nothing is dropped in silence: the report says how many records were kept, and for each reason why others were not, how many
and which came first. Original images are linked into DIR (copied where the file system cannot), crops are written there.
Layouts as published in 2025, after the dataset cards; the four ThinkMorph sets share the six columns used here.
"""

import argparse
import io
import json
import os
import random
import re
import shutil
import sys
import zlib
from pathlib import Path
from typing import Iterator

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from world import tools  # noqa: E402

Skip = tuple[str, str]  # (id, reason)
TAGS = re.compile(r"</?(?:answer|think|lvr)>|<image_start>|</?image_end>|<image>")


def clean(text: str) -> str:
    return TAGS.sub("", text).strip()


def hundredths(box: list[float]) -> list[int]:
    """A box in [0, 1] -> hundredths, outwards. Raises ValueError for one that is empty or leaves the image."""
    if len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
        raise ValueError("box is not four numbers")
    x0, y0, x1, y1 = box
    if min(box) < 0 or max(box) > 1:
        raise ValueError("box leaves the image")
    if x1 <= x0 or y1 <= y0:
        raise ValueError("box is empty")
    return [int(100 * x0), int(100 * y0), -int(-100 * x1 // 1), -int(-100 * y1 // 1)]


def example(name: str, family: str, image: Path | Image.Image, question: str, answer: str, steps: list) -> data.Example:
    """Open-ended data: the answer is its only option. The split goes by the hash of the id, 98 : 1 : 1."""
    bucket = zlib.crc32(name.encode()) % 100
    split = {0: "test", 1: "validation"}.get(bucket, "train")
    if not question or not answer:
        raise ValueError("no question" if not question else "no answer")
    return data.Example(name, family, image, question, [answer], answer, steps, split)


def final(thought: str, answer: str) -> str:
    return thought if thought.endswith(f"Answer: {answer}") else f"{thought} Answer: {answer}".strip()


def read_list(file: Path) -> list[dict]:
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} not found") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(records, list):
        raise ValueError(f"{file} must be a JSON list of records, found {type(records).__name__}")
    return records


def image_file(folder: Path, name: str) -> Path:
    path = data.inside(folder, name)
    if not path.is_file():
        raise ValueError("image not found")
    return path


def lvr(file: Path, images: Path) -> Iterator[data.Example | Skip]:
    """LVR: {dataset, question_id, image: [path], conversations: [{from, value}], bboxes: [[x0, y0, x1, y1]]}, boxes in [0, 1].

    The first box is cropped, as in the authors' release.
    """
    for n, record in enumerate(read_list(file)):
        name = f"lvr-{record.get('dataset', 'set')}-{record.get('question_id', n)}-{n}"
        try:
            paths = record["image"] if isinstance(record["image"], list) else [record["image"]]
            said = [turn["value"] for turn in record["conversations"]]
            box = hundredths(record["bboxes"][0])
            path = image_file(images, paths[0])
            answer = clean(said[1])
            crop = tools.crop(data.open_image(path, name), *box)
            call = "Look closer at the region that matters. " + "[crop " + " ".join(map(str, box)) + "]"
            yield example(name, str(record.get("dataset", "lvr")), path, clean(said[0]), answer, [call, crop, final("", answer)])
        except (KeyError, IndexError, TypeError) as error:
            yield name, f"field missing or of another type: {error!r}"
        except (ValueError, OSError) as error:
            yield name, str(error).split(":")[0]


def parquet_rows(folder: Path) -> Iterator[dict]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError("ThinkMorph is published as parquet, which needs one more package: pip install pyarrow") from None
    files = sorted(folder.glob("data/*.parquet")) or sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no data/train-*.parquet; download it with: huggingface-cli download "
                                f"--repo-type dataset ThinkMorph/{folder.name} --local-dir {folder}")
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(64):
            yield from batch.to_pylist()


def thinkmorph(folders: list[Path]) -> Iterator[data.Example | Skip]:
    """ThinkMorph: pid, question, answer, problem_image_0, resoning_thought_0 (sic), reasoning_image_0, resoning_thought_1 (sic)."""
    for folder in folders:
        for n, row in enumerate(parquet_rows(folder)):
            name = f"{folder.name}-{row.get('pid', n)}-{n}"
            try:
                problem, helper = (data.open_image(io.BytesIO(row[key]["bytes"]), key)
                                   for key in ("problem_image_0", "reasoning_image_0"))
                answer = clean(str(row["answer"]))
                steps = [clean(row["resoning_thought_0"]), helper, final(clean(row["resoning_thought_1"]), answer)]
                yield example(name, folder.name, problem, clean(row["question"]), answer, steps)
            except (KeyError, TypeError) as error:
                yield name, f"field missing or of another type: {error!r}"
            except (ValueError, OSError) as error:
                yield name, str(error).split(":")[0]


CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
BOXED = re.compile(r"\\boxed\{([^{}]*)\}")


def pixelreasoner(file: Path, images: Path) -> Iterator[data.Example | Skip]:
    """PixelReasoner: message_list of {role, content: [{text} or {image} or {video}]}: system, user, then assistant, user in turn.

    The assistant's JSON call becomes ours; the crop is the stored image of the next user turn.
    """
    for n, record in enumerate(read_list(file)):
        name = f"pixelreasoner-{record.get('qid', n)}-{n}"
        try:
            messages = [m for m in record["message_list"] if m["role"] != "system"]
            items = [item for m in messages for item in m["content"]]
            if any(item.get("video") for item in items):
                yield name, "video"
                continue
            first = [item["image"] for item in messages[0]["content"] if item.get("image")]
            if len(first) != 1:
                yield name, f"{len(first)} images beside the question, not one"
                continue
            question, steps = " ".join(item["text"] for item in messages[0]["content"] if item.get("text")), []
            for message in messages[1:]:
                if message["role"] == "assistant":
                    shown = 1 + sum(not isinstance(step, str) for step in steps)
                    steps.append(with_our_call(" ".join(item["text"] for item in message["content"] if item.get("text")), shown))
                else:
                    steps += [image_file(images, item["image"]) for item in message["content"] if item.get("image")]
            boxed = BOXED.findall(steps[-1]) if isinstance(steps[-1], str) else []
            if not boxed:
                yield name, "no boxed answer at the end"
                continue
            steps[-1] = final(BOXED.sub(r"\1", steps[-1]), boxed[-1].strip())
            yield example(name, "pixelreasoner", image_file(images, first[0]), clean(question), boxed[-1].strip(), steps)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            yield name, f"field missing or of another type: {error!r}"
        except (ValueError, OSError) as error:
            yield name, str(error).split(":")[0]


def with_our_call(text: str, shown: int) -> str:
    """The reasoning up to the JSON call, and the call as [crop x0 y0 x1 y1], on another image than the last with its number."""
    match = CALL.search(text)
    if not match:
        return text.strip()
    arguments = json.loads(match[1])["arguments"]
    box = arguments.get("bbox_2d") or arguments.get("bbox")
    target = int(arguments.get("target_image") or shown)
    if not 1 <= target <= shown:
        raise ValueError("a call names an image that was not shown")
    of = "" if target == shown else f" of {target}"
    return f"{text[:match.start()].strip()} [crop {' '.join(map(str, hundredths(box)))}{of}]".strip()


def mix(sources: dict[Path, float], count: int, seed: int) -> Iterator[data.Example]:
    """`count` training examples of folders in our format, by weight and without repetition; their other splits whole."""
    rng, total = random.Random(seed), sum(sources.values())
    for folder, weight in sources.items():
        examples = data.read_folder(folder)
        train = [ex for ex in examples if ex.split == "train"]
        share = round(count * weight / total)
        if share > len(train):
            raise ValueError(f"{folder} has {len(train)} training records, its share of {count} is {share}: "
                             "lower --count or its weight")
        for ex in rng.sample(train, share) + [ex for ex in examples if ex.split != "train"]:
            yield data.replace(ex, id=f"{folder.name}-{ex.id}")


def write(examples: Iterator[data.Example | Skip], out: Path) -> None:
    """Write what is good, one record at a time, and report on the rest. `out` appears only when it is whole."""
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose a new folder, nothing is overwritten")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        raise FileExistsError(f"{partial} is left of an interrupted conversion: remove it")
    (partial / "images").mkdir(parents=True)
    kept, skipped = {}, {}
    with open(partial / data.FILE, "w", encoding="utf-8") as file:
        for ex in examples:
            if isinstance(ex, tuple):
                skipped.setdefault(ex[1], []).append(ex[0])
                continue
            ex.id = re.sub(r"[^\w.-]", "_", ex.id)
            names = [save(picture, partial, f"images/{ex.id}-{n}") for n, picture in enumerate(ex.images)]
            file.write(data.record_line(ex, names))
            key = (ex.family, ex.split, len(ex.images) - 1)
            kept[key] = kept.get(key, 0) + 1
    if not kept:
        raise ValueError("no record could be used: " + "; ".join(f"{len(v)} x {k} (first: {v[0]})" for k, v in skipped.items()))
    partial.rename(out)
    print(f"{out}: {sum(kept.values())} records kept, {sum(map(len, skipped.values()))} left out")
    for (family, split, calls), count in sorted(kept.items()):
        print(f"  kept {count:7d}  {family}, {split}, {calls} tool image{'s' * (calls != 1)}")
    for reason, names in sorted(skipped.items(), key=lambda item: -len(item[1])):
        print(f"  left out {len(names):7d}  {reason}; first: {', '.join(names[:3])}")


def save(picture: data.Picture, folder: Path, name: str) -> str:
    if isinstance(picture, Path):
        name += picture.suffix.lower()
        try:
            os.link(picture.resolve(), folder / name)
        except OSError:
            shutil.copyfile(picture, folder / name)
    else:
        name += ".png"
        picture.save(folder / name)
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["lvr", "thinkmorph", "pixelreasoner", "mix"])
    parser.add_argument("sources", nargs="+", help="the JSON file; the parquet folders; FOLDER=WEIGHT of a mixture")
    parser.add_argument("--images", type=Path, help="folder that the JSON's image paths are relative to")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=10000, help="training examples of a mixture")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.kind in ("lvr", "pixelreasoner"):
        if not args.images or not args.images.is_dir():
            parser.error("--images must name the folder that the image paths are relative to")
        write(dict(lvr=lvr, pixelreasoner=pixelreasoner)[args.kind](Path(args.sources[0]), args.images), args.out)
    elif args.kind == "thinkmorph":
        write(thinkmorph([Path(s) for s in args.sources]), args.out)
    else:
        pairs = [source.rpartition("=") for source in args.sources]
        if any(not name or not weight.replace(".", "", 1).isdigit() for name, _, weight in pairs):
            parser.error("write a mixture as FOLDER=WEIGHT FOLDER=WEIGHT ...")
        write(mix({Path(name): float(weight) for name, _, weight in pairs}, args.count, args.seed), args.out)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
