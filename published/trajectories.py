"""Published trajectory data -> a folder in this repository's format (docs/data.md).

    python published/trajectories.py lvr lvr_sft.json --images IMAGES --out DIR
    python published/trajectories.py thinkmorph Jigsaw_Assembly Visual_Search --out DIR
    python published/trajectories.py pixelreasoner data.json --images UNZIPPED --out DIR

The report counts what was changed and left out, with reasons (published/README.md). After an
interruption the same command starts from the beginning.
"""

import argparse
import io
import json
import re
import shutil
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator

from PIL import Image, ImageChops, ImageStat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from published.common import GIVEN, alike, clean, open_boxes, parquet_rows, read_list, split_answer
from support import records
from support.files import new_folder
from support.images import Picture, open_image, picture_digest
from support.processes import progress, run_program
from world import tools

Skip = tuple[str, str]  # (id, reason) of a record that is left out
LIKE = 6.0  # mean difference, in levels of 255, up to which a picture is another one resampled
CALL = re.compile(r"(?s)<tool_call>(.*?)</tool_call>")
UNREADABLE = "image not found or not readable"
OTHER_ANSWER = "its last words give another answer than its answer field"


@dataclass
class Converted(records.Example):
    remarks: list[str] = field(default_factory=list)
    pixels: list[str] = field(default_factory=list)  # digests of `images`


def convert(kind: str, sources: list[Path], images: Path | None) -> Iterator[Converted | Skip]:
    # the records of a published set; images: the folder of the image paths
    rows, key, convert_row = dict(lvr=(read_list, "question_id", lvr),
                                  thinkmorph=(thinkmorph_rows, "pid", thinkmorph),
                                  pixelreasoner=(read_list, "qid", pixelreasoner))[kind]
    for n, row in enumerate(row for source in sources for row in rows(source)):
        name = f"{kind}-{row.get(key, n) if isinstance(row, dict) else n}-{n}"
        try:
            yield from convert_row(name, row, images)
        except json.JSONDecodeError:
            yield name, "a call that is not JSON"
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            yield name, f"field missing or of another type: {error!r}"
        except (ValueError, OSError) as error:
            yield name, str(error).split(":")[0]  # without the details, which differ


def example(name: str, task: str, picture: Picture, image: Image.Image, question: str, answer: str,
            words: str, steps: list[str | Picture], remarks: list[str] = ()) -> Converted:
    # image: the picture, read; words: of the last text, and they may give the answer already
    if match := GIVEN.search(words):
        if not alike(match[1], answer):
            raise ValueError(OTHER_ANSWER)
        words = words[:match.start()]
    question, steps = clean(question), [*steps, f"{words} Answer: {answer}".strip()]
    texts = [question, answer, *(step for step in steps if isinstance(step, str))]
    if not all(texts):
        raise ValueError("no question, no answer, or a text of the trajectory is empty")
    # JSON can write such a half, and UTF-8 cannot
    if re.search("[\ud800-\udfff]", "".join([name, task, *texts])):
        raise ValueError("a text holds half a character (lone surrogate)")
    pixels = [picture_digest(part) for part in [image, *steps] if not isinstance(part, str)]
    # by the picture, 98 : 1 : 1, so that all questions on it are on one side in every set
    split = {0: "test", 1: "validation"}.get(int(pixels[0], 16) % 100, "train")
    # no choices are published with these sets: the answer is the only one
    return Converted(name, task, picture, question, [answer], answer, steps, split,
                     remarks=list(dict.fromkeys(remarks)), pixels=pixels)


def read_image(folder: Path, names: list[str], what: str) -> tuple[Path, Image.Image]:
    if len(names) != 1:
        raise ValueError(f"{len(names)} images {what}, not one")
    path = folder / names[0]
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError("image path leaves the data folder")
    return path, open_image(path, UNREADABLE)


def hundredths(box: list[float]) -> list[int]:
    # (x0, y0, x1, y1) in [0, 1] -> hundredths, outwards
    if not (isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box)):
        raise ValueError("box is not four numbers")
    if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError("box is empty or leaves the image")
    # rounded first: as a float, 100 * 0.07 is above 7
    x0, y0, x1, y1 = (round(100 * v, 6) for v in box)
    return [int(x0), int(y0), -int(-x1 // 1), -int(-y1 // 1)]


def crop_text(words: str, box: list[int], of: int = 0) -> str:
    # of: the number of the image, 0 for the last one
    return f"{words} [crop {' '.join(map(str, box))}{f' of {of}' if of else ''}]".strip()


def lvr(name: str, row: dict, images: Path) -> Iterator[Converted | Skip]:
    # {dataset, question_id, image: [path], conversations: [{from, value}], bboxes: [[...]]}; boxes
    # are x0, y0, x1, y1 in [0, 1]
    turns = [turn["value"] for turn in row["conversations"]]
    for n in range(2, len(turns), 2):
        yield f"{name}-turn{n // 2 + 1}", "a further turn: its question may depend on the first"
    names = row["image"] if isinstance(row["image"], list) else [row["image"]]
    path, image = read_image(images, names, "beside the question")
    # a turn has as many boxes as <lvr> marks, or one
    boxes, marks = row["bboxes"], [turn.count("<lvr>") or 1 for turn in turns[1::2]]
    if not boxes or len(marks) > 1 and sum(marks) != len(boxes):
        raise ValueError("no box, or several turns without saying which box belongs to which")
    words, answer = split_answer(turns[1])
    steps = []
    # the authors' release takes the first box alone
    for box in map(hundredths, boxes[:marks[0]] if len(marks) > 1 else boxes):
        look = "Look closer at the region that matters." if not steps else "Look here, too."
        # each crop is of the question's picture, not of the crop before
        steps += [crop_text(look, box, of=1 if steps else 0), tools.crop(image, *box)]
    yield example(name, str(row.get("dataset", "lvr")), path, image, turns[0],
                  answer or words, words if answer else "", steps)


def thinkmorph_rows(folder: Path) -> Iterator[dict]:
    files = sorted(folder.glob("data/*.parquet")) or sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no data/*.parquet; get it with: hf download --repo-type dataset "
            f"ThinkMorph/{folder.name} --local-dir {folder}")
    return (row | {"folder": folder.name} for row in parquet_rows(files))


def thinkmorph(name: str, row: dict, _: None) -> Iterator[Converted]:
    # pid, question, answer, problem_image_0, resoning_thought_0 (sic), reasoning_image_0,
    # resoning_thought_1, and further pictures and thoughts where there are any
    images = {key: open_image(io.BytesIO(row[key]["bytes"]), UNREADABLE) for key in row
              if re.fullmatch(r"(problem|reasoning)_image_\d+", key) and row[key]}
    if "problem_image_1" in images:
        raise ValueError("several images beside the question, not one")
    steps, n = [], 0
    while n == 0 or f"reasoning_image_{n}" in images:  # the first one is required
        steps += [open_boxes(row[f"resoning_thought_{n}"])[0], images[f"reasoning_image_{n}"]]
        n += 1
    words, stated = split_answer(row[f"resoning_thought_{n}"])
    # the field may have the markup of an answer, or be the answer alone
    answer = split_answer(str(row["answer"]))[1] or open_boxes(str(row["answer"]))[0]
    if stated and not alike(stated, answer):
        raise ValueError(OTHER_ANSWER)
    remarks = ["its text-only reasoning is left out"] if row.get("full_text_only_thought") else []
    image = images["problem_image_0"]
    yield example(name, row["folder"], image, image, row["question"], answer, words, steps, remarks)


def pixelreasoner(name: str, row: dict, images: Path) -> Iterator[Converted]:
    # message_list of {role, content: [{text} or {image} or {video}]}; the roles are system, user,
    # then assistant and user alternately
    def contents(message: dict, kind: str) -> list:
        return [item[kind] for item in message["content"] if item.get(kind)]
    first, *talk = [m for m in row["message_list"] if m["role"] != "system"]
    if any(contents(message, "video") for message in [first, *talk]):
        raise ValueError("video")
    path, image = read_image(images, contents(first, "image"), "beside the question")
    if [m["role"] for m in talk] != ["assistant", "user"] * (len(talk) // 2) + ["assistant"]:
        raise ValueError("assistant and tool do not speak in turn up to an answer")
    pictures, steps, remarks, pending = [image], [], [], ""
    for turn, reply in zip(talk[0::2], talk[1::2]):
        parts, names = CALL.split(" ".join(contents(turn, "text"))), contents(reply, "image")
        if len(parts) != 3 or "<tool_call>" in parts[0] + parts[2]:
            raise ValueError("a turn with no call, several calls or an unfinished one is answered")
        words = f"{pending} {open_boxes(parts[0])[0]}".strip()
        remarks += ["words after a call are left out"] if open_boxes(parts[2])[0] else []
        # an error comes without a picture: its call goes, and its words join the next turn's
        pending = "" if names else words
        if not names:
            remarks.append("a call that failed is left out with its reply, but not its words")
            continue
        file, published = read_image(images, names, "answer one call")
        box, target, crop = run_call(parts[1], pictures, published)
        remarks += [] if crop else ["box and picture as published: no region shows the picture"]
        remarks += ["words beside a tool's picture are left out"] if contents(reply, "text") else []
        steps += [crop_text(words, box, target if target < len(pictures) else 0), crop or file]
        pictures.append(crop or published)
    last = " ".join(contents(talk[-1], "text"))
    words, answer = split_answer(f"{pending} {last}")
    if "<tool_call>" in last or not answer:
        raise ValueError("its last turn calls a tool, or has no boxed answer at its end")
    yield example(name, "pixelreasoner", path, image, " ".join(contents(first, "text")),
                  answer, words, steps, remarks)


def run_call(call: str, pictures: list[Image.Image],
             published: Image.Image) -> tuple[list[int], int, Image.Image | None]:
    # our call's numbers, the number of its image and its crop, for the region that the published
    # picture shows; without such a region, the crop is None
    arguments = json.loads(call)["arguments"]
    box, target = arguments.get("bbox_2d") or arguments.get("bbox"), arguments.get("target_image")
    if not box:
        raise ValueError("a call to another tool than crop")
    target = len(pictures) if target is None else int(target)
    if not 1 <= target <= len(pictures):
        raise ValueError("a call names an image that was not shown")
    image = pictures[target - 1]
    # Deviation: numbers above 1 are pixels. The authors' tool takes a box with a single 1 for
    # pixels, and so cuts a box at the right edge out of the top left corner
    if max(box) > 1:
        box = [v / image.size[n % 2] for n, v in enumerate(box)]
    # the authors' tool pads by a tenth of the image, other versions by a tenth of the box, or not
    x0, y0, x1, y1 = box
    regions = [[max(0.0, x0 - dx), max(0.0, y0 - dy), min(1.0, x1 + dx), min(1.0, y1 + dy)]
               for dx, dy in ((0.1, 0.1), (0.1 * (x1 - x0), 0.1 * (y1 - y0)), (0, 0))]
    # the published picture was resized when it was saved, so both are compared at one small size
    small = published.copy()
    small.thumbnail((96, 96), Image.Resampling.BILINEAR)

    def difference(region: list[float]) -> float:
        pixels = [v * image.size[n % 2] for n, v in enumerate(region)]
        cut = image.resize(small.size, Image.Resampling.BILINEAR, box=pixels)
        return sum(ImageStat.Stat(ImageChops.difference(cut, small)).mean) / 3

    numbers, region = hundredths(box), min(regions, key=difference)
    if difference(region) >= LIKE:
        return numbers, target, None
    numbers = hundredths(region)
    return numbers, target, tools.crop(image, *numbers)


def write(examples: Iterator[Converted | Skip], out: Path) -> None:
    kinds, remarks, left_out = Counter(), defaultdict(list), defaultdict(list)
    with new_folder(out) as folder:
        (folder / "images").mkdir()
        with open(folder / records.FILE, "x", encoding="utf-8", newline="\n") as file:
            for ex in progress(examples, unit=" records"):
                if isinstance(ex, tuple):
                    name, reason = ex
                    left_out[reason].append(name)
                    continue
                names = [save(*each, folder) for each in zip(ex.images, ex.pixels)]
                record = json.loads(records.record_line(ex, names))
                record |= {"remarks": ex.remarks} if ex.remarks else {}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                kinds[f"{ex.task}, {ex.split}, tool images: {len(names) - 1}"] += 1
                for remark in ex.remarks:
                    remarks[remark].append(ex.id)
        if not kinds:
            raise ValueError(f"no record could be used for {out}: {'; '.join(left_out)}")
    print(f"{out}: {kinds.total()} records kept, {sum(map(len, left_out.values()))} left out")
    for kind, count in sorted(kinds.items()):
        print(f"  kept {count:7d}  {kind}")
    for title, reasons in (("with remark", remarks), ("left out", left_out)):
        for reason, ids in sorted(reasons.items(), key=lambda item: -len(item[1])):
            print(f"  {title} {len(ids):7d}  {reason}; first: {', '.join(ids[:3])}")


def save(picture: Picture, pixels: str, folder: Path) -> str:
    name = f"images/{pixels}{picture.suffix.lower() if isinstance(picture, Path) else '.png'}"
    if (folder / name).exists():
        pass  # this very picture, of another question
    elif isinstance(picture, Path):
        shutil.copyfile(picture, folder / name)  # a link's change would reach the original
    else:
        picture.save(folder / name)
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["lvr", "thinkmorph", "pixelreasoner"])
    parser.add_argument("sources", nargs="+", type=Path, help="JSON files; parquet folders")
    parser.add_argument("--images", type=Path, help="folder that the image paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")
    args = parser.parse_args()
    if args.kind != "thinkmorph" and not (args.images and args.images.is_dir()):
        parser.error("--images must name the folder that the image paths are relative to")
    write(convert(args.kind, args.sources, args.images), args.out)


if __name__ == "__main__":
    run_program(main, "stopped: nothing was written, the same command starts again")
