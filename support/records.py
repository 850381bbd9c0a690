"""Records: one question with its expert trajectory (`Example`), and a folder of them (`Records`).

A data folder holds trajectories.jsonl, one record a line, and the images that the records name
(docs/data.md). `read_folder` checks every line once and keeps only where it starts, so half a
million records take seconds and a few MB. A record's line is parsed, and its pictures are opened,
when the record is used.
"""

import hashlib
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from support.answers import (contains, default_form, form_of, has_prefix, normalise, option_index,
                             stated_answer)
from support.files import new_folder, on_disk
from support.images import Picture, file_version, open_image, opened
from support.splits import (SPLITS, give_splits, pixel_hashes, progress, shared_pictures,
                            short_hash)


@dataclass
class Example:
    """One question with its expert trajectory.

    `trajectory` is R = (T1, I1, ..., IN, TN): a list of str (assistant text) and pictures (tool
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
        return replace(self, trajectory=[(form or default_form(answer_prefix)).text(self.answer)])


FILE = "trajectories.jsonl"


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

# What is kept of a record. split: index in SPLITS, -1 if it has none yet; task: index in the names
# of tasks; digest: of its line and of its pictures' sizes and times; picture: a hash of its
# question's picture, of its pixels where they were read, else of its name.
ROW = np.dtype([("start", np.int64), ("line", np.int32), ("split", np.int8), ("task", np.int32),
                ("digest", np.uint64), ("picture", np.uint64)])


@dataclass(eq=False)
class Records(Sequence):
    """The records of a folder, or some of them: `records[row]` is an Example, a slice is Records.

    A line is parsed and checked when its record is used, and no picture is opened. Raises
    ValueError naming file and line if a record is not what it was when the folder was read.
    """

    folder: Path
    answer_prefix: str
    version: tuple[str, int, int]  # of the file of records
    table: np.ndarray  # (N,) of ROW
    task_names: list[str]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row):
        if isinstance(row, slice):
            return self.subset(range(len(self))[row])
        found = self.table[row]  # raises IndexError
        with open(self.folder / FILE, "rb") as file:
            # after a change a line may start elsewhere
            if file_version(self.folder / FILE) != self.version:
                raise ValueError(f"{self.folder / FILE} has changed since it was read; leave the "
                                 "data alone while they are in use")
            file.seek(found["start"])
            line = file.readline()
        with naming(self.where(row)):
            record, _ = checked_record(line, self.answer_prefix)
        steps = [value if kind == "text" else self.folder / on_disk(value)
                 for kind, value in record["trajectory"]]
        return Example(record["id"], record["task"], self.folder / on_disk(record["image"]),
                       record["question"], record["options"], record["answer"], steps,
                       (*SPLITS, "")[found["split"]])

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

    def digest(self) -> str:
        """Of all records. table["digest"] has each one's, to find the record that has changed."""
        return hashlib.sha256(self.table["digest"].tobytes()).hexdigest()[:16]


def read_folder(folder: str | Path, outside_images: bool = False, answer_prefix: str = "Answer:",
                cache: str | Path | None = None, notes: list[str] | None = None,
                problems: list[str] | None = None) -> Records:
    """Check every line of a folder in the format above, in one pass.

    Pictures must exist; they are opened here only if a record names no split, and then those of
    all questions (support/splits.py). cache: a file that keeps what was read of them.
    outside_images: image paths and links may leave the folder.
    notes: gets one sentence, with a count, for each kind of unusual record; None: warns instead.
    problems: gets every error, and those records are left out; None: the first one is raised, as
    ValueError or FileNotFoundError naming file, line and fix.
    """
    reader, rows = _Reader(Path(folder), outside_images, answer_prefix), []
    total = sum(1 for _ in read_lines(reader.path))
    for line, number, start in progress(read_lines(reader.path), total, "reading records"):
        try:
            rows.append(reader.row(line, number, start))
        except SameOptionTwice:
            reader.unusual[TWICE].append(number)
        except (ValueError, OSError) as error:
            if problems is None:
                raise
            problems.append(str(error))
    if not rows and not problems:
        raise ValueError(f"{reader.path} holds no record that can be used")
    records = Records(reader.folder, answer_prefix, reader.version, np.array(rows, ROW),
                      list(reader.tasks))
    table, found = records.table, reader.notes(total)
    if (table["split"] < 0).any():
        _, first, picture_of = np.unique(table["picture"], return_index=True, return_inverse=True)
        hashes = pixel_hashes(records, first.tolist(), cache and Path(cache), problems)
        table["picture"] = hashes[picture_of]
        table["split"] = give_splits(table["split"], table["picture"])
    for note in found + shared_pictures(reader.path, table["split"], table["picture"]):
        if notes is None:
            warnings.warn(note, stacklevel=2)
        else:
            notes.append(note)
    return records


def read_record(folder: str | Path, row: int, outside_images: bool = False,
                answer_prefix: str = "Answer:") -> Example:
    """The record in this row, counted from 0, and its pictures, checked; no other is parsed.

    Its split is "" if it names none. Raises ValueError also if there is no such row.
    """
    reader = _Reader(Path(folder), outside_images, answer_prefix)
    lines = list(itertools.islice(read_lines(reader.path), max(row, 0), max(row, 0) + 1))
    if row < 0 or not lines:
        raise ValueError(f"{reader.path} has no row {row}; rows are counted from 0")
    table = np.array([reader.row(*lines[0])], ROW)
    records = Records(reader.folder, answer_prefix, reader.version, table, list(reader.tasks))
    for picture in records[0].images:
        open_image(picture, records.where(0))
    return records[0]


def read_lines(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """(line, its number from 1, its start in bytes) of each line that is not blank."""
    start = 0
    with open(path, "rb") as file:
        # a line ends at a line feed and nowhere else
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                yield line, number, start
            start += len(line)


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Errors inside begin with `where`."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise type(error)(f"{where}: {error}") from None


# kinds of unusual records, and what is said of them
TWICE = "have one option twice, or in two forms that count as one, and are left out"
NO_PREFIX = ("have no {prefix!r} in the last text, with which questions are asked and replies "
             "read: give --answer_prefix as these texts have it")
OTHER_WORDS = ("give the answer in other words than the option's; a reply in such words counts as "
               "wrong")


class SameOptionTwice(ValueError):
    """Leaves out a record, and not the whole folder."""


class _Reader:
    """One pass over the lines of a folder. It remembers numbers and hashes, and no text."""

    def __init__(self, folder: Path, outside: bool, answer_prefix: str):
        self.folder, self.outside, self.prefix = folder, outside, answer_prefix
        self.path = folder / FILE
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path} not found: a data folder holds {FILE} and its "
                                    "images (see README, data format)")
        self.version = file_version(self.path)
        self.ids: dict[int, int] = {}  # hash of an id -> number of its line
        self.tasks: dict[str, int] = {}  # name -> code
        self.listed: dict[str, dict[str, int]] = {}  # directory -> file -> stamp
        self.unusual = {kind: [] for kind in (TWICE, NO_PREFIX, OTHER_WORDS)}  # numbers of lines

    def row(self, line: bytes, number: int, start: int) -> tuple:
        """A line as a ROW. Raises ValueError or OSError naming file and line."""
        with naming(f"{self.path}, line {number}"):
            record, note = checked_record(line, self.prefix)
            key = hash(record["id"])
            if key in self.ids:
                raise ValueError(f"id {record['id']!r} was used on line {self.ids[key]}; ids must "
                                 "be unique")
            stamps = [self.stamp(name) for name in picture_names(record)]
        self.ids[key] = number
        if note:
            self.unusual[note].append(number)
        split = record.get("split")
        return (start, number, SPLITS.index(split) if split else -1,
                self.tasks.setdefault(record["task"], len(self.tasks)),
                short_hash(line.strip() + repr(stamps).encode()),
                short_hash(record["image"].encode()))

    def stamp(self, name: str) -> int:
        """A hash of the picture's size and time. Raises OSError or ValueError if it is not there or
        leaves the folder."""
        directory, base = os.path.split(on_disk(name))
        if directory not in self.listed:
            self.listed[directory] = self.list_files(directory)
        if base in self.listed[directory]:
            return self.listed[directory][base]
        # a link, a spelling that this file system takes for another, or nothing
        path = inside(self.folder, name, self.outside)
        if not path.is_file():
            raise FileNotFoundError(f"image {path} not found; paths are relative to the data folder")
        return _stamp(path.stat())

    def list_files(self, directory: str) -> dict[str, int]:
        """Its files, without links, which may leave the folder: one listing is faster than a look
        for each name, above all over a network."""
        try:
            with os.scandir(inside(self.folder, directory, self.outside)) as entries:
                return {entry.name: _stamp(entry.stat()) for entry in entries
                        if entry.is_file(follow_symlinks=False)}
        except (ValueError, OSError):  # `stamp` says what is wrong
            return {}

    def notes(self, total: int) -> list[str]:
        return [f"{self.path}: {len(lines)} of {total} records (line {lines[0]} is the first) "
                + kind.format(prefix=self.prefix) for kind, lines in self.unusual.items() if lines]


def _stamp(status: os.stat_result) -> int:
    return hash((status.st_mtime_ns, status.st_size))  # numbers hash alike in all processes


def inside(folder: Path, name: str, outside: bool = False) -> Path:
    """folder / name. Raises ValueError if that, links followed, leaves the folder and must not."""
    path = folder / on_disk(name)
    if not outside and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"image {name} leaves the data folder; copy it there, or allow it with "
                         "--outside_images")
    return path


def checked(folder: Path, name: str, where: str, outside: bool = False) -> Path:
    """A picture that is inside the folder and was read once. ValueError, FileNotFoundError."""
    with naming(where):  # also names that no file can have
        path = inside(folder, name, outside)
    open_image(path, where)
    return path


# ---- one line -----------------------------------------------------------------------------------

FIELDS = dict(id=str, image=str, question=str, options=list, answer=str, trajectory=list)
NOT_UNICODE = "is not valid Unicode text; save the file as UTF-8, without halves of characters"


def checked_record(line: bytes, prefix: str) -> tuple[dict, str]:
    """(fields, kind of note or ""); texts without blanks at their ends, steps as (kind, value)."""
    record = parse(line)
    for key, kind in FIELDS.items():
        if not isinstance(record.get(key), kind):
            raise ValueError(f"field {key!r} must be a {kind.__name__}; found "
                             f"{record.get(key)!r:.80}")
    record["task"] = record.get("task", record.get("family", "questions"))
    for key in ("id", "question", "task", "image"):
        record[key] = _text(record[key], key)
    steps = [_step(step, n) for n, step in enumerate(record["trajectory"])]
    if not steps or steps[-1][0] != "text":
        raise ValueError("the trajectory must end in a text that gives the answer")
    if record.get("split") not in (None, *SPLITS):
        raise ValueError(f"split {record['split']!r} is none of {', '.join(SPLITS)}")
    options = [_text(option, "every option") for option in record["options"]]
    if len(set(map(normalise, options))) < len(options):
        raise SameOptionTwice("an option is there twice, or in two forms that count as one: "
                              f"{options!r:.200}")
    right = option_index(record["answer"], options)
    if right is None:
        raise ValueError(f"answer {record['answer']!r:.80} is not among the options "
                         f"{options!r:.200}")
    record |= dict(trajectory=steps, options=options, answer=options[right])
    return record, _check_last_text(steps[-1][1], options, options[right], prefix)


def parse(line: bytes) -> dict:
    """The JSON object of a line. Raises ValueError."""
    try:
        record = json.loads(line.removeprefix(b"\xef\xbb\xbf").decode(), object_pairs_hook=_fields)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno}); write one object "
                         "a line") from None
    except UnicodeDecodeError:
        raise ValueError(f"the line {NOT_UNICODE}") from None
    except RecursionError:
        raise ValueError("nested too deeply; write the object that the README shows") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    return record


def _fields(pairs: list[tuple]) -> dict:
    """Of a field that is there twice, json would keep the last and say nothing."""
    record, names = dict(pairs), [name for name, _ in pairs]
    if len(record) < len(pairs):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} is there twice; keep one")
    return record


def _text(value, name: str) -> str:
    """The value without blanks at its ends. Raises ValueError unless it is text, and not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a non-empty string; found {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write what UTF-8 cannot
        raise ValueError(f"{name} {NOT_UNICODE}") from None
    return value.strip()


def _step(step, n: int) -> tuple[str, str]:
    """("text" or "image", value)"""
    if not isinstance(step, dict) or len(step) != 1 or not step.keys() <= {"text", "image"}:
        raise ValueError(f"trajectory step {n} must be {{'text': ...}} or {{'image': ...}}; found "
                         f"{step!r:.80}")
    [(kind, value)] = step.items()
    return kind, _text(value, f"trajectory step {n}: {kind}")


def picture_names(record: dict) -> list[str]:
    """Of a checked record; the question's first."""
    return [record["image"], *(name for kind, name in record["trajectory"] if kind == "image")]


def _check_last_text(text: str, options: list[str], answer: str, prefix: str) -> str:
    """Raises ValueError if the last text says another answer than the field.

    Returns the kind of note that it needs, or "". If it says none of the options literally, it must
    contain the answer's words, whole, and no other option's.
    """
    # most texts end in the prefix and the very answer: no options have to be compared
    head, found, end = text.rpartition(prefix.strip() or "\0")
    if found and not head[-1:].isalnum() and end.strip(" .") == answer:
        return ""
    stated = stated_answer(text, prefix)
    given = text if stated is None else stated
    said = option_index(given, options)
    right = said is not None and options[said] == answer
    if said is None:
        others = [o for o in options if stated is not None and not contains(answer, o)]
        right = contains(given, answer) and not any(contains(given, o) for o in others)
    if not right and said is None and stated is None:
        raise ValueError(f"the last text of the trajectory does not contain the answer "
                         f"{answer!r:.80}")
    if not right:
        raise ValueError(f"the last text says {given!r:.80} but the field 'answer' is "
                         f"{answer!r:.80}; correct one of them")
    if not has_prefix(text, prefix):
        return NO_PREFIX
    return OTHER_WORDS if said is None else ""
