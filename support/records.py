"""Records: one question with its expert trajectory (`Example`), and a folder of them on disk, read and checked.

A data folder holds trajectories.jsonl, one record a line, and the images that the records name (README, "Your own data").
"""

import json
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from support.images import Picture, open_image, opened


@dataclass
class Example:
    """One question with its expert trajectory.

    `trajectory` is R = (T1, I1, ..., IN, TN): a list of str (assistant text) and pictures (tool output), in order.
    Its first text holds the plan and the call, its last text the answer. It may be empty where nothing is trained
    (the held-out family). `options` are the candidate answers, `answer` is one of them.
    """

    id: str
    family: str
    image: Picture
    question: str
    options: list[str]
    answer: str
    trajectory: list[str | Picture] = field(default_factory=list)
    split: str = "train"

    @property
    def texts(self) -> list[str]:
        return [step for step in self.trajectory if isinstance(step, str)]

    @property
    def images(self) -> list[Picture]:
        """I0 first, then the tool images I1..IN."""
        return [self.image] + [step for step in self.trajectory if not isinstance(step, str)]

    def image_first(self) -> "Example":
        """The paper's order R = (I1, T1, ..., IN, TN): every tool image before the text that calls it."""
        steps = list(self.trajectory)
        for n in range(1, len(steps)):
            if isinstance(steps[n - 1], str) and not isinstance(steps[n], str):
                steps[n - 1:n + 1] = steps[n], steps[n - 1]
        joined = []
        for step in steps:  # texts that now meet are one turn of the assistant
            if joined and isinstance(step, str) and isinstance(joined[-1], str):
                joined[-1] += " " + step
            else:
                joined.append(step)
        return replace(self, trajectory=joined)

    def answer_only(self, answer_prefix: str) -> "Example":
        """No trajectory: the answer straight after the question."""
        return replace(self, trajectory=[f"{answer_prefix} {self.answer}".strip()])


FILE = "trajectories.jsonl"
SPLITS = ("train", "validation", "test")


def write_folder(out: Path, examples: list[Example]) -> None:
    """Write `examples` as out/trajectories.jsonl and out/images/*.png. `out` must not exist yet."""
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose a new folder, nothing is overwritten")
    partial = out.with_name(out.name + ".partial")
    (partial / "images").mkdir(parents=True)
    with open(partial / FILE, "w", encoding="utf-8") as file:
        for ex in examples:
            names = [f"images/{ex.id}-{n}.png" for n in range(len(ex.images))]
            for name, image in zip(names, ex.images):
                opened(image).save(partial / name)
            file.write(record_line(ex, names))
    partial.rename(out)


def record_line(ex: Example, names: list[str]) -> str:
    """One line of trajectories.jsonl; names: the files of ex.images, relative to the folder."""
    tool_names = iter(names[1:])
    steps = [{"text": s} if isinstance(s, str) else {"image": next(tool_names)} for s in ex.trajectory]
    record = dict(id=ex.id, split=ex.split, family=ex.family, image=names[0], question=ex.question,
                  options=ex.options, answer=ex.answer, trajectory=steps)
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_folder(folder: str | Path, outside: bool = False, problems: list[str] | None = None) -> list[Example]:
    """Read a folder in the format above. Every record and every image is checked before any is used.

    Raises ValueError or FileNotFoundError naming file, line and mend; with a list for `problems` it collects them there
    and goes on. outside: image paths and links may leave the folder. A record without "split" is assigned one by the hash
    of its image name (8 : 1 : 1), so that two questions about one image never fall on two sides.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: a data folder holds {FILE} and its images (see README, data format)")
    examples, seen = [], {}
    with open(path, "rb") as file:  # a line ends at a line feed and nowhere else: texts may hold other separators
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                example = _read_record(_parse(line, where), Path(folder), where, outside)
                if example.id in seen:
                    raise ValueError(f"{where}: id {example.id!r} was used on line {seen[example.id]}; ids must be unique")
            except (ValueError, FileNotFoundError) as error:
                if problems is None:
                    raise
                problems.append(str(error))
                continue
            seen[example.id] = number
            examples.append(example)
    if not examples and not problems:
        raise ValueError(f"{path} holds no record")
    return examples


def _parse(line: bytes, where: str) -> dict:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); write one object a line") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply; write the object that the README shows") from None


def _read_record(record: dict, folder: Path, where: str, outside: bool) -> Example:
    def need(right: bool, message: str) -> None:
        if not right:
            raise ValueError(f"{where}: {message}")

    def text(value, name: str) -> str:
        need(isinstance(value, str) and bool(value.strip()), f"{name} must be a non-empty string; found {value!r:.80}")
        need(not any("\ud800" <= c <= "\udfff" for c in value), f"{name} holds half a character (lone surrogate); repair it")
        return value.strip()

    need(isinstance(record, dict), f"expected a JSON object, found {type(record).__name__}")
    for key, kind in dict(id=str, image=str, question=str, options=list, answer=str, trajectory=list).items():
        need(isinstance(record.get(key), kind), f"field {key!r} must be a {kind.__name__}; found {record.get(key)!r:.80}")
    options = [text(option, "every option") for option in record["options"]]
    need(len(set(options)) == len(options), f"an option is there twice: {options}")
    answer = record["answer"].strip()
    need(answer in options, f"answer {answer!r} is not among the options {options}")
    steps = []
    for n, step in enumerate(record["trajectory"]):
        need(isinstance(step, dict) and len(step) == 1 and next(iter(step)) in ("text", "image"),
             f"trajectory step {n} must be {{'text': ...}} or {{'image': ...}}; found {step!r:.80}")
        kind, value = next(iter(step.items()))
        value = text(value, f"trajectory step {n}: {kind}")
        steps.append(value if kind == "text" else checked(folder, value, where, outside))
    need(bool(steps) and isinstance(steps[-1], str), "the trajectory must end in a text that gives the answer")
    need(answer in steps[-1], f"the last text of the trajectory does not contain the answer {answer!r}")
    image, split = text(record["image"], "image"), record.get("split")
    if split is None:
        split = {0: "test", 1: "validation"}.get(zlib.crc32(image.encode()) % 10, "train")
    need(split in SPLITS, f"split {split!r} is none of {', '.join(SPLITS)}")
    return Example(text(record["id"], "id"), text(record.get("family", "questions"), "family"),
                   checked(folder, image, where, outside), text(record["question"], "question"), options,
                   answer, steps, split)


def inside(folder: Path, name: str, outside: bool = False) -> Path:
    """folder / name. Raises ValueError if that, links followed, leaves the folder, unless `outside` allows it."""
    path = folder / name
    if not outside and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"image {name} leaves the data folder; copy it there, or allow it with --outside_images")
    return path


def checked(folder: Path, name: str, where: str, outside: bool = False) -> Path:
    try:
        path = inside(folder, name, outside)
    except ValueError as error:  # also of names that no file can have
        raise ValueError(f"{where}: {error}") from None
    open_image(path, where)
    return path

