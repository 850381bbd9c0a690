"""Records: one question with its expert trajectory (`Example`), and a folder of them (`Records`).

A data folder holds trajectories.jsonl, one record a line, and the images that the records name
(docs/data.md). `read_folder` checks every line once and keeps only where it starts, so half a
million records take seconds and a few MB. A line is parsed again, and its pictures are opened, when
the record is used.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from support.answers import default_form, form_of
from support.files import new_folder, on_disk
from support.images import Picture, file_version, opened, picture_digest
from support.picture_splits import (SPLITS, give_splits, pixel_hashes, shared_pictures,
                                    short_hash)
from support.processes import progress
from support.record_checks import TWICE, checked_record

FILE = "trajectories.jsonl"


@dataclass
class Example:
    """One question with its expert trajectory.

    `trajectory` is R = (T1, I1, ..., IN, TN+1): a list of str (assistant text) and pictures (tool
    output), in order. Its first text holds the plan and the call, its last text the answer. It may
    be empty where nothing is trained (the held-out task). `options` are the candidate answers,
    `answer` is one of them; open-ended data have one option.
    """

    id: str
    task: str
    image: Picture
    question: str
    options: list[str]
    answer: str
    trajectory: list[str | Picture] = field(default_factory=list)
    split: str = "train"
    # True: the trajectory is the bare answer
    bare: bool = False

    @property
    def texts(self) -> list[str]:
        return [step for step in self.trajectory if isinstance(step, str)]

    @property
    def images(self) -> list[Picture]:
        """I0 first, then the tool images I1..IN."""
        return [self.image] + [step for step in self.trajectory if not isinstance(step, str)]

    def image_first(self) -> "Example":
        """The paper's order R = (I1, T1, ..., IN, TN): a tool image before the text calling it."""
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
        """No trajectory: the answer straight after the question, as the last text writes it."""
        form = form_of(self.texts[-1], self.answer, answer_prefix) if self.texts else None
        text = (form or default_form(answer_prefix)).text(self.answer)
        return replace(self, bare=True, trajectory=[text])


def write_folder(out: Path, examples: list[Example]) -> None:
    """Write `examples` as out/trajectories.jsonl and out/images/*.png. `out` must not exist yet."""
    ids = [ex.id for ex in examples]
    if len(set(ids)) < len(ids):
        raise ValueError(f"two of the examples for {out} have one id; ids must be unique")
    with new_folder(Path(out)) as folder:
        (folder / "images").mkdir()
        with open(folder / FILE, "w", encoding="utf-8") as file:
            for row, ex in enumerate(examples):
                # an id may hold what no file name can, or differ from another in case alone
                stem = ex.id if re.fullmatch(r"[a-z0-9_+-]{1,99}", ex.id) else f"record.{row}"
                names = [f"images/{stem}-{n}.png" for n in range(len(ex.images))]
                for name, image in zip(names, ex.images):
                    opened(image).save(folder / on_disk(name))
                file.write(record_line(ex, names))


def record_line(ex: Example, names: list[str]) -> str:
    """One line of trajectories.jsonl; names: the files of ex.images, relative to the folder."""
    tool_names = iter(names[1:])
    steps = [{"text": s} if isinstance(s, str) else {"image": next(tool_names)}
             for s in ex.trajectory]
    record = dict(id=ex.id, split=ex.split, task=ex.task, image=names[0], question=ex.question,
                  options=ex.options, answer=ex.answer, trajectory=steps)
    return json.dumps(record, ensure_ascii=False) + "\n"


# ---- a folder, read lazily ----------------------------------------------------------------------

# what is kept of a record
ROW = np.dtype([
    # where its line starts, in bytes, and the line's number
    ("start", np.int64), ("line", np.int32),
    # index in SPLITS, -1 if it has none yet; index in the names of the tasks
    ("split", np.int8), ("task", np.int32),
    # hash of the line and of its pictures' sizes and times
    ("digest", np.uint64),
    # hash of the question's picture: of its pixels if they were read, else of its name
    ("picture", np.uint64)])


@dataclass(eq=False)
class Records(Sequence):
    """The records of a folder, or some of them: `records[row]` is an Example, a slice is Records.

    A line is parsed and checked when its record is used; no picture is opened. Raises ValueError
    naming file and line if a line no longer passes, or if the file has changed.
    """

    folder: Path
    answer_prefix: str
    # of the file of records
    version: tuple[str, int, int]
    table: np.ndarray  # (N,) of ROW
    task_names: list[str]
    # a sentence, with a count, for each kind of unusual record in the folder
    notes: list[str]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return self.subset(range(len(self))[row])
        # raises IndexError, which ends a loop
        kept = self.table[row]
        with open(self.folder / FILE, "rb") as file:
            # in another file the line may start elsewhere
            if file_version(self.folder / FILE) != self.version:
                raise ValueError(f"{self.folder / FILE} has changed since it was read; leave the "
                                 "data alone while they are in use")
            file.seek(kept["start"])
            line = file.readline()
        example = _example(line, self.folder, self.answer_prefix, self.where(row))
        return replace(example, split=(*SPLITS, "")[kept["split"]])

    def subset(self, rows: Iterable[int]) -> "Records":
        """The records of these rows, in this order."""
        return replace(self, table=self.table[np.asarray(rows, dtype=np.int64)])

    def split(self, name: str) -> "Records":
        return self.subset(np.flatnonzero(self.table["split"] == SPLITS.index(name)))

    @property
    def tasks(self) -> list[str]:
        """The task of each record; no line is read."""
        return [self.task_names[code] for code in self.table["task"]]

    def where(self, row: int) -> str:
        return f"{self.folder / FILE}, line {self.table[row]['line']}"


def digest(records: Sequence[Example]) -> str:
    """16 hex digits that other records would not have.

    Of a folder: of lines, and of pictures' sizes and times, so that no picture is opened. Of
    records in memory: of texts and pixels.
    """
    if isinstance(records, Records):
        content = records.table["digest"].tobytes()
    else:
        parts = [part for ex in records for part in (ex.id, ex.task, ex.question, *ex.options,
                                                     ex.answer, ex.image, *ex.trajectory)]
        content = repr([part if isinstance(part, str) else picture_digest(part)
                        for part in parts]).encode()
    return f"{short_hash(content):016x}"


def read_folder(folder: str | Path, answer_prefix: str = "Answer:",
                cache: str | Path | None = None, problems: list[str] | None = None,
                by_pixels: bool = False) -> Records:
    """Check every line of a folder in the format above, in one pass.

    Pictures must exist. They are opened, those of all questions, only if a record names no split
    (support/picture_splits.py) or with by_pixels, to find the same picture in two splits whatever
    its files are called. cache: a file that keeps what was read of them.
    problems: gets every error, and those records are left out; None: the first one is raised, as
    ValueError or FileNotFoundError naming file, line and fix.
    """
    records = scan(Path(folder), answer_prefix, problems)
    table = records.table
    if by_pixels or (table["split"] < 0).any():
        table["picture"] = pixel_hashes(records, cache and Path(cache), problems)
        table["split"] = give_splits(table["split"], table["picture"])
    records.notes += shared_pictures(records.folder / FILE, table["split"], table["picture"])
    return records


def scan(folder: Path, answer_prefix: str, problems: list[str] | None) -> Records:
    """The records of all lines that can be used, with the splits that they name."""
    path, total = folder / FILE, sum(1 for _ in read_lines(folder / FILE))
    version, table, used = file_version(path), np.zeros(total, ROW), 0
    # hash of an id -> its line; task -> its code; kind of unusual record -> its lines
    ids: dict[int, int] = {}
    tasks: dict[str, int] = {}
    unusual: dict[str, list[int]] = {}
    for line, number, start in progress(read_lines(path), "reading records", total):
        try:
            record, kind = checked_record(line, answer_prefix)
            if kind == TWICE:
                unusual.setdefault(kind, []).append(number)
                continue
            if (first := ids.setdefault(hash(record["id"]), number)) != number:
                raise ValueError(f"id {record['id']!r} was used on line {first}; ids must be "
                                 "unique")
            stamps = [stamp(folder, name) for name in record["images"]]
        except (ValueError, OSError) as error:
            error = type(error)(f"{path}, line {number}: {error}")
            if problems is None:
                raise error from None
            problems.append(str(error))
            continue
        split, task = record.get("split"), tasks.setdefault(record["task"], len(tasks))
        table[used] = (start, number, SPLITS.index(split) if split else -1, task,
                       short_hash(line.strip() + repr(stamps).encode()),
                       short_hash(record["image"].encode()))
        used += 1
        if kind:
            unusual.setdefault(kind, []).append(number)
    notes = [f"{path}: {len(lines)} of {total} records (line {lines[0]} is the first) "
             f"{kind.format(prefix=answer_prefix)}" for kind, lines in unusual.items()]
    if not used and not problems:
        raise ValueError("; ".join([f"{path} holds no record that can be used", *notes]))
    return Records(folder, answer_prefix, version, table[:used], list(tasks), notes)


def read_lines(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """(line, its number from 1, its start in bytes) of each line that is not blank."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: a data folder holds {FILE} and its images (see "
                                "README, data format)")
    start = 0
    with open(path, "rb") as file:
        # a line ends at a line feed and nowhere else
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield line, number, start
            start += len(line)


def stamp(folder: Path, name: str) -> int:
    """A hash of a picture's time and size, the same in all processes."""
    file = os.path.join(folder, on_disk(name))
    try:
        return hash(file_version(file)[1:])
    except (OSError, ValueError):  # ValueError: no file can have this name
        raise FileNotFoundError(f"image {file} not found; paths are relative to the data "
                                "folder") from None


def read_record(folder: str | Path, row: int, answer_prefix: str = "Answer:") -> Example:
    """The record in this row, from 0; no other line is parsed. Its split is "" if it names none.
    Raises ValueError also if there is no such row."""
    folder, path = Path(folder), Path(folder) / FILE
    for count, (line, number, _) in enumerate(read_lines(path)):
        if count == row:
            return _example(line, folder, answer_prefix, f"{path}, line {number}")
    raise ValueError(f"{path} has no row {row}; they are counted from 0")


def _example(line: bytes, folder: Path, answer_prefix: str, where: str) -> Example:
    try:
        record, kind = checked_record(line, answer_prefix)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if kind == TWICE:
        raise ValueError(f"{where}: an option is there twice, or in two forms that count as one")
    steps = [value if kind == "text" else folder / on_disk(value)
             for kind, value in record["trajectory"]]
    return Example(record["id"], record["task"], folder / on_disk(record["image"]),
                   record["question"], record["options"], record["answer"], steps,
                   record.get("split") or "")
