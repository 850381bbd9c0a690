"""The checks of a data folder: what a line of trajectories.jsonl must hold, which pictures must
exist, and what is unusual and yet used.

Every fault is one sentence that names file, line and fix. No picture is opened, but by `checked`.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from support.answers import contains, has_prefix, normalise, option_index, stated_answer
from support.files import on_disk
from support.images import open_image
from support.picture_splits import SPLITS, short_hash

FILE = "trajectories.jsonl"
FIELDS = dict(id=str, image=str, question=str, options=list, answer=str, trajectory=list)
NOT_UNICODE = "is not valid Unicode text; save the file as UTF-8, without halves of characters"
# options in which more than punctuation may not count: markup, 3.0, 1,000
RICH, PUNCTUATION = re.compile(r"[<\\]|\d[.,]|[.,]\d"), re.compile("[^a-zA-Z0-9]+")
# kinds of unusual records, and what is said of them
TWICE = "have one option twice, or in two forms that count as one, and are left out"
NO_PREFIX = ("have no {prefix!r} in the last text, with which questions are asked and replies "
             "read: give --answer_prefix as these texts have it")
OTHER_WORDS = ("give the answer in other words than the option's; a reply in such words counts as "
               "wrong")


class SameOptionTwice(ValueError):
    """Leaves out one record, and does not end the reading of a folder."""


# ---- all lines of a folder ----------------------------------------------------------------------


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


class Checker:
    """One pass over the lines of a folder. It remembers numbers and hashes, but no text."""

    def __init__(self, folder: Path, outside: bool, answer_prefix: str):
        """outside: image paths and links may leave the folder."""
        self.folder, self.outside, self.prefix = folder, outside, answer_prefix
        # hash of an id -> number of its line
        self.ids: dict[int, int] = {}
        # name of a task -> its code
        self.tasks: dict[str, int] = {}
        # directory -> name of a file -> its stamp
        self.files: dict[str, dict[str, int]] = {}
        # kind -> numbers of lines
        self.unusual = {kind: [] for kind in (TWICE, NO_PREFIX, OTHER_WORDS)}

    def row(self, line: bytes, number: int, start: int) -> tuple:
        """A line as a ROW of support/records.py. Raises ValueError or OSError."""
        try:
            record, unusual = checked_record(line, self.prefix)
            key = hash(record["id"])
            if key in self.ids:
                raise ValueError(f"id {record['id']!r} was used on line {self.ids[key]}; ids must "
                                 "be unique")
            stamps = [self.stamp(name) for name in picture_names(record)]
        except (ValueError, OSError) as error:
            raise type(error)(f"{self.folder / FILE}, line {number}: {error}") from None
        # only now: an id of a refused record is still free
        self.ids[key] = number
        if unusual:
            self.unusual[unusual].append(number)
        split = record.get("split")
        return (start, number, SPLITS.index(split) if split else -1,
                self.tasks.setdefault(record["task"], len(self.tasks)),
                short_hash(line.strip() + repr(stamps).encode()),
                short_hash(record["image"].encode()))

    def stamp(self, name: str) -> int:
        """A hash of a picture's size and time. Raises FileNotFoundError if it does not exist,
        ValueError if it leaves the folder."""
        directory, slash, base = on_disk(name).rpartition("/")
        directory += slash
        if directory not in self.files:
            self.files[directory] = self.list_files(directory)
        if base in self.files[directory]:
            return self.files[directory][base]
        # a link, a spelling that this file system takes for another, or no file
        path = inside(self.folder, name, self.outside)
        if not path.is_file():
            raise FileNotFoundError(f"image {path} not found; paths are relative to the data "
                                    "folder")
        return stamp_of(path.stat())

    def list_files(self, directory: str) -> dict[str, int]:
        """The stamps of its files, without links, which may leave the folder."""
        # over a network one listing is much faster than a question for each name
        try:
            with os.scandir(inside(self.folder, directory, self.outside)) as entries:
                return {entry.name: stamp_of(entry.stat()) for entry in entries
                        if entry.is_file(follow_symlinks=False)}
        except (ValueError, OSError):
            # `stamp` says what is wrong with each name
            return {}

    def notes(self, total: int) -> list[str]:
        """One sentence for each kind of unusual record. total: the number of all records."""
        return [f"{self.folder / FILE}: {len(lines)} of {total} records (line {lines[0]} is the "
                f"first) {kind.format(prefix=self.prefix)}"
                for kind, lines in self.unusual.items() if lines]


def stamp_of(status: os.stat_result) -> int:
    # the hash of numbers is the same in all processes
    return hash((status.st_mtime_ns, status.st_size))


def inside(folder: Path, name: str, outside: bool = False) -> Path:
    """folder / name. Raises ValueError if that, links followed, leaves the folder and must not."""
    path = folder / on_disk(name)
    if not outside and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"image {name} leaves the data folder; copy it there, or allow it with "
                         "--outside_images")
    return path


def checked(folder: Path, name: str, where: str, outside: bool = False) -> Path:
    """The file of a picture that was read once. Raises ValueError or FileNotFoundError."""
    # some names are none that a file can have
    try:
        path = inside(folder, name, outside)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    open_image(path, where)
    return path


# ---- one line -----------------------------------------------------------------------------------


def checked_record(line: bytes, prefix: str) -> tuple[dict, str]:
    """(fields, kind of unusual record or ""): texts are stripped, steps are (kind, value).

    prefix: what last texts put before the answer. Raises ValueError, or SameOptionTwice.
    """
    record = _parse(line)
    for key, kind in FIELDS.items():
        if not isinstance(record.get(key), kind):
            raise ValueError(f"field {key!r} must be a {kind.__name__}; found "
                             f"{record.get(key)!r:.80}")
    # "family" is an older name of the field
    record["task"] = record.get("task", record.get("family", "questions"))
    for key in ("id", "question", "task", "image"):
        record[key] = _text(record[key], key)
    if record.get("split") not in (None, *SPLITS):
        raise ValueError(f"split {record['split']!r} is none of {', '.join(SPLITS)}")
    steps = [_step(step, n) for n, step in enumerate(record["trajectory"])]
    if not steps or steps[-1][0] != "text":
        raise ValueError("the trajectory must end in a text that gives the answer")
    options = [_text(option, "every option") for option in record["options"]]
    if _has_twins(options):
        raise SameOptionTwice("an option is there twice, or in two forms that count as one: "
                              f"{options!r:.200}")
    # most answers are an option to the letter, which takes no comparison of forms
    answer = record["answer"].strip()
    right = options.index(answer) if answer in options else option_index(answer, options)
    if right is None:
        raise ValueError(f"answer {answer!r:.80} is not among the options {options!r:.200}")
    record.update(trajectory=steps, options=options, answer=options[right])
    return record, _check_last_text(steps[-1][1], options, options[right], prefix)


def _has_twins(options: list[str]) -> bool:
    """Whether two options count as one."""
    # letters and digits tell most options apart, in a tenth of the time of a comparison
    text = "\n".join(options)
    if text.isascii() and not RICH.search(text):
        if len({PUNCTUATION.sub("", option) for option in options}) == len(options):
            return False
    return len(set(map(normalise, options))) < len(options)


def picture_names(record: dict) -> list[str]:
    """The pictures that a checked record names, the question's first."""
    return [record["image"], *(name for kind, name in record["trajectory"] if kind == "image")]


def _parse(line: bytes) -> dict:
    """The JSON object in a line; a byte order mark before it is no fault."""
    try:
        record = DECODER.decode(line.removeprefix(b"\xef\xbb\xbf").decode())
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
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} is there twice; keep one")
    return record


# made once: json.loads would make one for each line
DECODER = json.JSONDecoder(object_pairs_hook=_fields)


def _text(value, name: str) -> str:
    """The value without blanks at its ends. Raises ValueError unless it is text, and not empty."""
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise ValueError(f"{name} must be a non-empty string; found {value!r:.80}")
    # JSON can write what UTF-8 cannot
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} {NOT_UNICODE}") from None
    return text


def _step(step, n: int) -> tuple[str, str]:
    """("text", its words) or ("image", its file's name)"""
    if not isinstance(step, dict) or len(step) != 1 or not step.keys() <= {"text", "image"}:
        raise ValueError(f"trajectory step {n} must be {{'text': ...}} or {{'image': ...}}; found "
                         f"{step!r:.80}")
    [(kind, value)] = step.items()
    return kind, _text(value, f"trajectory step {n}: {kind}")


def _check_last_text(text: str, options: list[str], answer: str, prefix: str) -> str:
    """The kind of unusual record or "". Raises ValueError if the text says another answer.

    A text that says none of the options literally must contain the answer's words, whole, and no
    other option's.
    """
    # most texts end in the prefix and the very answer, which takes no comparison of forms
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
    if not right and stated is None and said is None:
        raise ValueError(f"the last text of the trajectory does not contain the answer "
                         f"{answer!r:.80}")
    if not right:
        raise ValueError(f"the last text says {given!r:.80} but the field 'answer' is "
                         f"{answer!r:.80}; correct one of them")
    if not has_prefix(text, prefix):
        return NO_PREFIX
    return OTHER_WORDS if said is None else ""
