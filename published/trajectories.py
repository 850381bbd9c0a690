"""Published trajectory data -> a folder in this repository's format (README, data format).

    python published/trajectories.py lvr lvr_sft.json --images IMAGES --out DIR
    python published/trajectories.py thinkmorph Jigsaw_Assembly Visual_Search --out DIR
    python published/trajectories.py pixelreasoner data.json --images UNZIPPED --out DIR
    python published/trajectories.py mix A=2 B=1 --count 6000 --out DIR  # weights of such folders

Nothing is dropped in silence: the report says how many records were kept, what was changed in them
(each such record says so itself, in "remarks"), how many were left out, why, and which came first.
Every picture is copied into DIR, named after its pixels: one that several questions share is there
once, and no file of yours is linked or written to. Layouts as published in 2025, after the data
sets' cards and the code that reads them; what of them is kept and why stands in README.md here.
"""

import argparse
import io
import json
import random
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

from PIL import Image, ImageChops, ImageStat

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from published.common import (GIVEN, alike, clean, digest, parquet_rows,  # noqa: E402
                              parse, read_text, split_answer)
from support import records  # noqa: E402
from support.images import Picture, open_image, opened  # noqa: E402
from support.processes import run_program  # noqa: E402
from support.records import Example  # noqa: E402
from world import tools  # noqa: E402

Skip = tuple[str, str]  # (id, reason)

PUBLISHED_PICTURE = ("a tool's picture is not what the call before it gives here; "
                     "kept as published")
NO_PICTURE = "a call that no picture follows; kept as words"
ERROR_REPLY = "a call answered by an error, taken out with its reply; the words before it kept"
ANNOUNCEMENT = "words beside a tool's picture (as a rule its size) left out"
AFTER_CALL = "words after a call, which nothing answers, left out"
TEXT_ONLY = "the second, text-only reasoning (full_text_only_thought) left out"
OTHER_ANSWER = "its last words give another answer than its answer field"


@dataclass
class Converted(Example):
    """An example, what was changed in it, and its question's picture's digest, which splits it."""

    remarks: list[str] = field(default_factory=list)
    picture: str = ""


# ---- what all sets share ---------------------------------------------------------------------


def checked_box(box: list[float]) -> list[float]:
    """Raises ValueError for a box (x0, y0, x1, y1) that is empty or leaves the image, [0, 1]^2."""
    numbers = isinstance(box, list) and all(isinstance(v, (int, float)) for v in box)
    if not numbers or len(box) != 4:
        raise ValueError("box is not four numbers")
    if not all(0 <= v <= 1 for v in box):
        raise ValueError("box leaves the image")
    if box[2] <= box[0] or box[3] <= box[1]:
        raise ValueError("box is empty")
    return box


def hundredths(box: list[float]) -> list[int]:
    """A box in [0, 1] -> hundredths, outwards. Raises ValueError as checked_box does."""
    x0, y0, x1, y1 = (round(100 * v, 6) for v in checked_box(box))  # 100 * 0.07 is above 7
    return [int(x0), int(y0), -int(-x1 // 1), -int(-y1 // 1)]


def crop_text(words: str, box: list[int], of: int = 0) -> str:
    """The words and the call, `of` an earlier image than the last where that is not 0."""
    return f"{words} [crop {' '.join(map(str, box))}{f' of {of}' if of else ''}]".strip()


def final(words: str, answer: str) -> str:
    """The last text. Raises ValueError where the words already give another answer."""
    if said := GIVEN.search(words):
        if not alike(said[1], answer):
            raise ValueError(OTHER_ANSWER)
        words = words[:said.start()]
    return f"{words} Answer: {answer}".strip()


def side(picture: str) -> str:
    """The split of all questions on a picture, 98 : 1 : 1: the same in every set and mixture."""
    return {0: "test", 1: "validation"}.get(int(picture, 16) % 100, "train")


def example(ex: Example, seen: Image.Image, remarks: list[str] = ()) -> Converted:
    """The example with its split, and a remark for each call that does not give what follows it.

    seen: ex.image, read. Raises ValueError where a text is missing.
    """
    if not ex.question or not ex.answer:
        raise ValueError("no question" if not ex.question else "no answer")
    if not all(ex.texts):
        raise ValueError("a text of the trajectory is empty")
    "".join([ex.question, ex.answer, *ex.texts]).encode()  # raises where half a character stands
    picture = digest(seen)
    found = dict.fromkeys([*remarks, *differing(seen, ex.trajectory)])
    return Converted(**{**vars(ex), "split": side(picture)}, remarks=list(found), picture=picture)


def open_ended(name: str, family: str, image: Picture, question: str, answer: str,
               steps: list) -> Example:
    """No choices are published with these data: the answer is its only option."""
    return Example(name, family, image, question, [answer], answer, steps)


def differing(image: Image.Image, steps: list) -> Iterator[str]:
    """A remark for each call that our executor, on the pictures shown so far, answers otherwise."""
    shown = [image]
    for step, following in zip(steps, [*steps[1:], ""]):
        if not isinstance(step, str):
            shown.append(opened(step))
        elif tools.CALL.search(step) and isinstance(following, str):
            yield NO_PICTURE
        elif tools.CALL.search(step):
            try:
                given = digest(tools.call_tool(step, *shown))
            except ValueError:
                given = ""
            if given != digest(following):
                yield PUBLISHED_PICTURE


def converted(name: str, convert: Callable[..., Converted], *args) -> Converted | Skip:
    try:
        return convert(name, *args)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        return name, f"field missing or of another type: {error!r}"
    except UnicodeEncodeError:
        return name, "a text holds half a character (lone surrogate)"
    except (ValueError, OSError) as error:
        return name, str(error).split(":")[0]


def read_list(files: Path | list[Path]) -> Iterator[dict]:
    for file in [files] if isinstance(files, Path) else files:
        listed = parse(read_text(file), str(file))
        if not isinstance(listed, list):
            found = type(listed).__name__
            raise ValueError(f"{file} must be a JSON list of records, found {found}")
        yield from listed


def image_file(folder: Path, name: str) -> Path:
    try:
        path = records.inside(folder, name)
    except ValueError:
        raise ValueError("image path leaves the data folder") from None
    if not path.is_file():
        raise ValueError("image not found")
    return path


def read_image(file: Path | io.BytesIO) -> Image.Image:
    try:
        return open_image(file, "")
    except ValueError:
        raise ValueError("image cannot be read") from None


# ---- LVR -------------------------------------------------------------------------------------


def lvr(files: Path | list[Path], images: Path) -> Iterator[Converted | Skip]:
    """LVR: {dataset, question_id, image: [path], conversations: [{from, value}], bboxes: [[...]]}.

    Boxes are x0, y0, x1, y1 in [0, 1]. Every box of the first turn is cropped out of the question's
    picture (the authors' release takes the first). A later turn is left out: its question may lean
    on the one before it, and an example here begins with its question.
    """
    for n, record in enumerate(read_list(files)):
        known = record if isinstance(record, dict) else {}
        name = f"lvr-{known.get('dataset', 'set')}-{known.get('question_id', n)}-{n}"
        yield converted(name, lvr_example, record, images)
        turns = known.get("conversations")
        for turn in range(1, len(turns) // 2 if isinstance(turns, list) else 0):
            yield f"{name}-turn{turn + 1}", "a further turn: its question may lean on the first"


def lvr_example(name: str, record: dict, images: Path) -> Converted:
    paths = record["image"] if isinstance(record["image"], list) else [record["image"]]
    if len(paths) != 1:
        raise ValueError(f"{len(paths)} images beside the question, not one")
    path = image_file(images, paths[0])
    image = read_image(path)
    said = [turn["value"] for turn in record["conversations"]]
    words, answer = split_answer(said[1])
    steps = []
    for box in map(hundredths, first_boxes(said[1::2], record["bboxes"])):
        look = "Look closer at the region that matters." if not steps else "Look here, too."
        steps += [crop_text(look, box, of=1 if steps else 0), tools.crop(image, *box)]
    steps.append(final(words if answer else "", answer or words))
    family = str(record.get("dataset", "lvr"))
    return example(open_ended(name, family, path, clean(said[0]), answer or words, steps), image)


def first_boxes(answers: list[str], boxes: list) -> list:
    """The boxes of the first turn: one for each <lvr> of its answer; without these, each turn's."""
    marks = [answer.count("<lvr>") for answer in answers]
    if not isinstance(boxes[0], list):
        raise ValueError("box is not four numbers")
    if len(answers) == 1:
        return boxes
    if marks[0] and sum(marks) == len(boxes):
        return boxes[:marks[0]]
    if len(answers) == len(boxes):
        return boxes[:1]
    raise ValueError("several turns, and which box belongs to which is not said")


# ---- ThinkMorph ------------------------------------------------------------------------------


def parquet_files(folder: Path) -> list[Path]:
    files = sorted(folder.glob("data/*.parquet")) or sorted(folder.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no data/train-*.parquet; download it with: huggingface-cli download "
            f"--repo-type dataset ThinkMorph/{folder.name} --local-dir {folder}")
    return files


def thinkmorph_rows(folder: Path) -> Iterator[dict]:
    return parquet_rows(parquet_files(folder), "ThinkMorph")


def thinkmorph(folders: list[Path]) -> Iterator[Converted | Skip]:
    """ThinkMorph: pid, question, answer, problem_image_0, resoning_thought_0 (sic),
    reasoning_image_0, resoning_thought_1 (sic).

    Further pictures of the reasoning (reasoning_image_1, ...) are used where there are any.
    """
    for folder in folders:
        for n, row in enumerate(thinkmorph_rows(folder)):
            name = f"{folder.name}-{row.get('pid', n)}-{n}"
            yield converted(name, thinkmorph_example, row, folder.name)


def thinkmorph_example(name: str, row: dict, family: str) -> Converted:
    problems = [key for key in row if re.fullmatch(r"problem_image_\d+", key) and row[key]]
    if len(problems) > 1:
        raise ValueError(f"{len(problems)} images beside the question, not one")
    problem, steps, n = read_image(io.BytesIO(row["problem_image_0"]["bytes"])), [], 0
    while n == 0 or row.get(f"reasoning_image_{n}"):  # the first is needed
        helper = read_image(io.BytesIO(row[f"reasoning_image_{n}"]["bytes"]))
        steps += [clean(row[f"resoning_thought_{n}"]), helper]
        n += 1
    words, said = split_answer(row[f"resoning_thought_{n}"])
    answer = split_answer(str(row["answer"]))[1] or clean(str(row["answer"]))
    if said and not alike(said, answer):
        raise ValueError(OTHER_ANSWER)
    steps.append(final(words, answer))
    remarks = [TEXT_ONLY] if row.get("full_text_only_thought") else []
    ex = open_ended(name, family, problem, clean(row["question"]), answer, steps)
    return example(ex, problem, remarks)


# ---- PixelReasoner ---------------------------------------------------------------------------

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
LIKE = 6.0  # mean difference, in levels of 255, up to which a picture is another one resampled


def pixelreasoner(files: Path | list[Path], images: Path) -> Iterator[Converted | Skip]:
    """PixelReasoner: message_list of {role, content: [{text} or {image} or {video}]}.

    The turns are system, user, then assistant and user in turn. The assistant's JSON call becomes
    ours, and the picture what our call gives, if it shows what was published.
    """
    for n, record in enumerate(read_list(files)):
        qid = record.get("qid", n) if isinstance(record, dict) else n
        yield converted(f"pixelreasoner-{qid}-{n}", trace, record, images)


def contents(message: dict, kind: str) -> list:
    return [item[kind] for item in message["content"] if item.get(kind)]


def trace(name: str, record: dict, images: Path) -> Converted:
    first, *talk = [m for m in record["message_list"] if m["role"] != "system"]
    if any(contents(message, "video") for message in [first, *talk]):
        raise ValueError("video")
    if len(found := contents(first, "image")) != 1:
        raise ValueError(f"{len(found)} images beside the question, not one")
    roles = ["assistant", "user"] * (len(talk) // 2) + ["assistant"]
    if [message["role"] for message in talk] != roles:
        raise ValueError("assistant and tool do not speak in turn up to an answer")
    path = image_file(images, found[0])
    shown, steps, remarks, waiting = [read_image(path)], [], [], ""
    for said, reply in zip(talk[0::2], talk[1::2]):
        words, call, after = with_call(" ".join(contents(said, "text")))
        words = f"{waiting} {words}".strip()
        remarks += [AFTER_CALL] if after else []
        if not (pictures := contents(reply, "image")):
            waiting = words
            remarks.append(ERROR_REPLY)
            continue
        waiting = ""
        box, picture, target = answered(call, shown, images, pictures)
        steps += [crop_text(words, box, of=target if target < len(shown) else 0), picture]
        shown.append(opened(picture))
        remarks += [ANNOUNCEMENT] if "".join(contents(reply, "text")).strip() else []
    last = " ".join(contents(talk[-1], "text"))
    if "<tool_call>" in last:
        raise ValueError("its last turn calls a tool")
    words, answer = split_answer(f"{waiting} {last}")
    if not answer:
        raise ValueError("no boxed answer at the end")
    steps.append(final(words, answer))
    question = clean(" ".join(contents(first, "text")))
    return example(open_ended(name, "pixelreasoner", path, question, answer, steps), shown[0],
                   remarks)


def with_call(text: str) -> tuple[str, str, str]:
    """(words, the JSON of the call, what follows it) of a turn that calls a tool."""
    count = text.count("<tool_call>")
    if count != 1 or not CALL.search(text):
        raise ValueError("a turn with several calls or an unfinished one" if count
                         else "a user's turn that answers no call")
    before, call, after = CALL.split(text)
    return clean(before), call, clean(after)


def answered(call: str, shown: list[Image.Image], images: Path,
             pictures: list[str]) -> tuple[list[int], Picture, int]:
    """(the box in hundredths, the picture, the number of the image it is cut from) of one call."""
    if len(pictures) != 1:
        raise ValueError(f"{len(pictures)} images answer one call")
    box, target = arguments(call, shown)
    return *located(box, shown[target - 1], image_file(images, pictures[0])), target


def arguments(call: str, shown: list[Image.Image]) -> tuple[list[float], int]:
    """The box of a JSON call, in [0, 1], and the number of its image.

    Deviation: numbers up to 1 are shares of a side and larger ones pixels; the authors' own tool
    takes a box for pixels as soon as one number is 1, and so cuts a box that touches the right
    edge out of the top left corner.
    """
    try:
        call = json.loads(call)
    except json.JSONDecodeError:
        raise ValueError("a call that is not JSON") from None
    given = call["arguments"]
    box, target = given.get("bbox_2d") or given.get("bbox"), given.get("target_image")
    if not box:
        raise ValueError(f"a call to another tool than crop ({call.get('name')})")
    target = len(shown) if target is None else int(target)
    if not 1 <= target <= len(shown):
        raise ValueError("a call names an image that was not shown")
    if all(isinstance(v, (int, float)) for v in box) and max(box) > 1:
        box = [v / shown[target - 1].size[n % 2] for n, v in enumerate(box)]
    return checked_box(box), target


def padded(box: list[float], size: tuple[int, int]) -> Iterator[list[float]]:
    """What the tool may have cut out for a box, in [0, 1].

    As released, a tenth of the image's side more on every side, in one version 600 px at most;
    others pad by a tenth of the box, or not at all.
    """
    x0, y0, x1, y1 = box
    more = [(0.1, 0.1), (min(0.1, 600 / size[0]), min(0.1, 600 / size[1])),
            (0.1 * (x1 - x0), 0.1 * (y1 - y0)), (0, 0)]
    for dx, dy in dict.fromkeys(more):
        yield [max(0.0, x0 - dx), max(0.0, y0 - dy), min(1.0, x1 + dx), min(1.0, y1 + dy)]


def located(box: list[float], image: Image.Image, file: Path) -> tuple[list[int], Picture]:
    """The call's numbers and its picture: of the region that the published picture shows.

    The published picture was resized when it was saved, so both are compared at one small size, and
    the picture that is kept is our own tool's. If the published one shows nothing that the tool may
    have cut out for this box, it stays, and the box as well.
    """
    stored, found = read_image(file), []
    scale = min(1.0, 96 / max(stored.size))
    small = tuple(max(1, round(length * scale)) for length in stored.size)
    reference = stored.resize(small, Image.Resampling.BILINEAR)
    for region in padded(box, image.size):
        pixels = [v * image.size[n % 2] for n, v in enumerate(region)]
        width, height = pixels[2] - pixels[0], pixels[3] - pixels[1]
        cut = image.resize(small, Image.Resampling.BILINEAR, box=pixels)
        difference = sum(ImageStat.Stat(ImageChops.difference(cut, reference)).mean) / 3
        stretch = width / height * stored.size[1] / stored.size[0]
        if difference <= LIKE and 0.85 < stretch < 1 / 0.85:  # sides were rounded to 28 px
            resized = max(abs(width - stored.size[0]), abs(height - stored.size[1])) > 1
            found.append((resized, difference, region))
    if not found:
        return hundredths(box), file
    region = min(found)[2]
    nearest = [round(100 * v) for v in region]
    if nearest[2] <= nearest[0] or nearest[3] <= nearest[1]:  # less than a hundredth wide
        nearest = hundredths(region)
    return nearest, tools.crop(image, *nearest)


# ---- mixtures --------------------------------------------------------------------------------


def mix(sources: dict[Path, float], count: int, seed: int) -> Iterator[Converted | Skip]:
    """`count` training examples of folders in our format, by weight, none twice.

    The other splits are taken whole. A picture in the test split of one folder is in no other split
    of the mixture, and one in a validation split is not in training: such records are left out.
    """
    rng, total, pools, strictest = random.Random(seed), sum(sources.values()), {}, {}
    for folder in sources:
        name = different(folder.resolve().name, pools)
        pools[name] = of_folder(folder, name)
        for ex in pools[name]:
            rank = records.SPLITS.index(ex.split)
            strictest[ex.picture] = max(rank, strictest.get(ex.picture, 0))
    for pool, (folder, weight) in zip(pools.values(), sources.items()):
        train, others = [], []
        for ex in pool:
            split = records.SPLITS[strictest[ex.picture]]
            if split != ex.split:
                yield ex.id, f"{ex.split} record whose picture is in a {split} split"
            else:
                (train if split == "train" else others).append(ex)
        share = round(count * weight / total)
        if share > len(train):
            raise ValueError(f"{folder} has {len(train)} training records, its share of {count} "
                             f"is {share}: lower --count or its weight")
        rng.shuffle(train)
        yield from train[:share] + others
        yield from ((ex.id, "training record beyond its folder's share") for ex in train[share:])


def of_folder(folder: Path, name: str) -> list[Converted]:
    """The folder's examples, the name before their ids, with the remarks they were written with."""
    examples, remarks = records.read_folder(folder), {}
    for line in (folder / records.FILE).read_bytes().split(b"\n"):
        if line.strip():
            record = json.loads(line.decode("utf-8-sig"))
            remarks[record["id"].strip()] = record.get("remarks", [])
    return [Converted(**{**vars(ex), "id": f"{name}-{ex.id}"}, remarks=remarks[ex.id],
                      picture=digest(ex.image)) for ex in examples]


def different(name: str, taken) -> str:
    """The name, with a number behind it where it is taken; case does not tell two names apart."""
    taken = {other.casefold() for other in taken}
    numbered = (f"{name}-{n}" if n > 1 else name for n in range(1, len(taken) + 2))
    return next(free for free in numbered if free.casefold() not in taken)


# ---- writing ---------------------------------------------------------------------------------


class Kept(NamedTuple):
    """What the report needs of a record that was written."""

    id: str
    task: str
    split: str
    calls: int
    picture: str
    remarks: list[str]


def write(examples: Iterator[Converted | Skip], out: Path) -> None:
    """Write what is good, one at a time, and report on the rest. `out` appears when it is whole."""
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose a new folder, nothing is overwritten")
    kept, skipped, ids = [], {}, set()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", suffix=".partial",
                                     dir=out.parent) as partial:
        folder = Path(partial) / "data"
        (folder / "images").mkdir(parents=True)
        with open(folder / records.FILE, "x", encoding="utf-8", newline="\n") as file:
            for ex in examples:
                if isinstance(ex, tuple):
                    skipped.setdefault(ex[1], []).append(ex[0])
                    continue
                ex.id = unused(re.sub(r"[^\w.-]", "_", ex.id), ids)
                names = [save(ex.image, folder, ex.picture)]
                names += [save(picture, folder) for picture in ex.images[1:]]
                record = json.loads(records.record_line(ex, names))
                record |= dict(remarks=ex.remarks) if ex.remarks else {}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                kept.append(Kept(ex.id, ex.task, ex.split, len(names) - 1, ex.picture,
                                 ex.remarks))
        if not kept:
            raise ValueError("no record could be used: " + "; ".join(
                f"{len(names)} x {why} (first: {names[0]})" for why, names in skipped.items()))
        folder.rename(out)
    report(out, kept, skipped)


def unused(name: str, ids: set[str]) -> str:
    """The name, or the name and the next free number; ids: those given out, which it joins."""
    free, n = name, 1
    while free.casefold() in ids:
        n += 1
        free = f"{name}-{n}"
    ids.add(free.casefold())
    return free


def save(picture: Picture, folder: Path, shows: str = "") -> str:
    """Copy a picture to images/, named after its pixels (`shows`, their digest, where it is known).

    A name that is there already holds this very picture. A copy and no link: through a link a later
    change of the copy would reach the original.
    """
    suffix = picture.suffix.lower() if isinstance(picture, Path) else ".png"
    name = f"images/{shows or digest(picture)}{suffix}"
    if (folder / name).exists():
        return name
    with open(folder / name, "xb") as target:
        if isinstance(picture, Path):
            with open(picture, "rb") as source:
                shutil.copyfileobj(source, target)
        else:
            picture.save(target, format="PNG")
    return name


def report(out: Path, kept: list[Kept], skipped: dict[str, list[str]]) -> None:
    print(f"{out}: {len(kept)} records kept, {sum(map(len, skipped.values()))} left out")
    numbers, pictures, remarks = {}, {}, {}
    for record in kept:
        key = record.task, record.split, record.calls
        numbers[key] = numbers.get(key, 0) + 1
        pictures.setdefault(record.split, set()).add(record.picture)
        for remark in record.remarks:
            remarks.setdefault(remark, []).append(record.id)
    for (family, split, calls), count in sorted(numbers.items()):
        print(f"  kept {count:7d}  {family}, {split}, {calls} tool image{'s' * (calls != 1)}")
    print("  split by picture, all questions on one picture on one side: " + ", ".join(
        f"{len(pictures[split])} {split}" for split in records.SPLITS if split in pictures))
    for title, found in (("with remark", remarks), ("left out", skipped)):
        for reason, names in sorted(found.items(), key=lambda item: -len(item[1])):
            print(f"  {title} {len(names):7d}  {reason}; first: {', '.join(names[:3])}")


# ---- the command line ------------------------------------------------------------------------


def weights(parser: argparse.ArgumentParser, sources: list[str]) -> dict[Path, float]:
    pairs = [source.rpartition("=") for source in sources]
    if any(not name or not re.fullmatch(r"\d+(\.\d+)?", weight) for name, _, weight in pairs):
        parser.error("write a mixture as FOLDER=WEIGHT FOLDER=WEIGHT ...")
    if len({Path(name).resolve() for name, _, _ in pairs}) < len(pairs):
        parser.error("a folder is named twice in the mixture")
    if not sum(float(weight) for _, _, weight in pairs):
        parser.error("the weights of the mixture are all 0")
    return {Path(name): float(weight) for name, _, weight in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["lvr", "thinkmorph", "pixelreasoner", "mix"])
    parser.add_argument("sources", nargs="+",
                        help="JSON files; parquet folders; FOLDER=WEIGHT of a mixture")
    parser.add_argument("--images", type=Path, help="folder that the image paths are relative to")
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")
    parser.add_argument("--count", type=int, default=10000, help="training examples of a mixture")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    paths = [Path(source) for source in args.sources]
    if args.kind in ("lvr", "pixelreasoner"):
        if not args.images or not args.images.is_dir():
            parser.error("--images must name the folder that the image paths are relative to")
        write((lvr if args.kind == "lvr" else pixelreasoner)(paths, args.images), args.out)
    elif args.kind == "thinkmorph":
        write(thinkmorph(paths), args.out)
    else:
        write(mix(weights(parser, args.sources), args.count, args.seed), args.out)


if __name__ == "__main__":
    run_program(main)
