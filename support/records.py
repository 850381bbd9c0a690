"""Records: one question with its expert trajectory (`Example`), and a folder of them (`Records`).

A data folder holds trajectories.jsonl, one record a line, and the images that the records name
(docs/data.md). `scan` checks every line once and keeps only where it starts, so half a million
records take seconds and a few MB. A line is parsed again, and its pictures are opened, when the
record is used. Every fault is one sentence that names file, line and fix.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path

import numpy as np

from support import answers
from support.files import new_folder
from support.images import Picture, file_version, opened, picture_digest
from support.processes import progress

FILE = "trajectories.jsonl"
SPLITS = ("train", "validation", "test")
HELD_OUT = "tallest"  # the world's task that no trajectory covers; its bars have highlight's dots
TWICE = "have one option twice, or in two forms that count as one, and are left out"


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
    bare: bool = False  # True: the trajectory is the bare answer

    def __post_init__(self):
        # the texts of R; all images, I0 first, then the tool images I1..IN
        self.texts = [step for step in self.trajectory if isinstance(step, str)]
        self.images = [self.image] + [step for step in self.trajectory if not isinstance(step, str)]

    def image_first(self) -> "Example":
        """The paper's order R = (I1, T1, ..., IN, TN): a tool image before the text calling it."""
        steps = list(self.trajectory)
        for n in range(1, len(steps)):
            if isinstance(steps[n - 1], str) and not isinstance(steps[n], str):
                steps[n - 1:n + 1] = steps[n], steps[n - 1]
        joined = []
        # texts that now meet are one turn of the assistant
        for are_texts, run in groupby(steps, lambda step: isinstance(step, str)):
            run = list(run)
            joined += [" ".join(run)] if are_texts else run
        return replace(self, trajectory=joined)

    def answer_only(self, answer_prefix: str) -> "Example":
        """No trajectory: the answer straight after the question, as the last text writes it."""
        (form,) = answers.forms([self], answer_prefix)
        return replace(self, bare=True, trajectory=[form.text(self.answer)])


def write_folder(out: Path, examples: list[Example]) -> None:
    """Write `examples`, each with its own id, as trajectories.jsonl and images/*.png of `out`."""
    with new_folder(Path(out)) as folder:
        (folder / "images").mkdir()
        with open(folder / FILE, "w", encoding="utf-8") as file:
            for row, ex in enumerate(examples):
                # an id may hold what no file name can, or differ from another in case alone
                stem = ex.id if re.fullmatch(r"[a-z0-9_+-]{1,99}", ex.id) else f"record.{row}"
                names = [f"images/{stem}-{n}.png" for n in range(len(ex.images))]
                for name, image in zip(names, ex.images):
                    opened(image).save(folder / name)
                file.write(record_line(ex, names))


def record_line(ex: Example, names: list[str]) -> str:
    """One line of trajectories.jsonl; names: the files of ex.images, relative to the folder."""
    tool_names = iter(names[1:])
    steps = [{"text": s} if isinstance(s, str) else {"image": next(tool_names)}
             for s in ex.trajectory]
    record = dict(id=ex.id, split=ex.split, task=ex.task, image=names[0], question=ex.question,
                  options=ex.options, answer=ex.answer, trajectory=steps)
    return json.dumps(record, ensure_ascii=False) + "\n"


def parse(line: bytes, folder: Path = Path()) -> Example:
    """The record of a line, its answer as the option has it; split "" if it names none. Nothing
    that takes a comparison of words is checked (`check`). Raises ValueError."""
    try:
        record = json.loads(line.strip().decode("utf-8-sig"))  # without a byte order mark
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 ", "")
        raise ValueError(f"not valid JSON in UTF-8 ({reason}); write one object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    record = dict(task="questions", split=None) | record
    for key in ("options", "trajectory"):
        if not isinstance(record.get(key), list):
            raise ValueError(f"field {key!r} must be a list; found {record.get(key)!r:.80}")
    if record["split"] not in (None, *SPLITS):
        raise ValueError(f"split {record['split']!r} is none of {', '.join(SPLITS)}")
    if record["task"] in ("all", HELD_OUT):
        raise ValueError(f"the task {record['task']!r} has a meaning in tables: rename it")
    options, steps = [_text(text, "every option") for text in record["options"]], []
    for n, step in enumerate(record["trajectory"]):
        if not isinstance(step, dict) or len(step) != 1 or not step.keys() <= {"text", "image"}:
            raise ValueError(f"trajectory step {n} must be {{'text': ...}} or {{'image': ...}}; "
                             f"found {step!r:.80}")
        [(kind, value)] = step.items()
        value = _text(value, f"trajectory step {n}: {kind}")
        steps.append(value if kind == "text" else folder / value)
    name, task, image, question, answer = (_text(record.get(key), f"field {key!r}") for key in (
        "id", "task", "image", "question", "answer"))
    # most answers are an option to the letter, which takes no comparison of forms
    if answer not in options and (right := answers.option_index(answer, options)) is not None:
        answer = options[right]
    return Example(name, task, folder / image, question, options, answer, steps,
                   record["split"] or "")


def _text(value, name: str) -> str:
    """The value without blanks at its ends. Raises ValueError unless it is text, and not empty."""
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise ValueError(f"{name} must be a non-empty string; found {value!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write what UTF-8 cannot
        raise ValueError(f"{name} holds half of a character, which is not valid Unicode") from None
    return text


def check(example: Example, prefix: str) -> str:
    """What the notes say of a record like this one if it is unusual, else "". One that is TWICE
    cannot be used. prefix: what last texts put before the answer. A text that says none of the
    options literally must contain the answer's words, whole, and no other option's. Raises
    ValueError."""
    options, answer = example.options, example.answer
    if not example.trajectory or not isinstance(text := example.trajectory[-1], str):
        raise ValueError("the trajectory must end in a text that gives the answer")
    if len(set(map(answers.normalise, options))) < len(options):
        return TWICE
    if answer not in options:
        raise ValueError(f"answer {answer!r:.80} is not among the options {options!r:.200}")
    # most texts end in the prefix and the very answer, which takes no comparison of forms
    head, mark, end = text.rpartition(prefix.strip() or "\0")
    if mark and not head[-1:].isalnum() and end.strip(" .") == answer:
        return ""
    option, stated = answers.says(text, options, prefix), answers.stated_answers(text, prefix)
    words = stated[0] if stated else text
    right = option is not None and options[option] == answer
    if option is None:
        inside = [other for other in options if answers.contains(words, other)]
        alone = all(answers.contains(answer, other) for other in inside)
        right = answer in inside and (alone or not stated)
    if not right:
        raise ValueError(f"the last text says {words!r:.80} but the field 'answer' is "
                         f"{answer!r:.80}; correct one of them")
    if not answers.has_prefix(text, prefix):
        return (f"have no {prefix!r} in the last text, with which questions are asked and replies "
                "read: give --answer_prefix as these texts have it")
    return "" if option is not None else (
        "give the answer in other words than the option's; a reply in such words counts as wrong")


def short_hash(content: bytes) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


ROW = np.dtype([  # what is kept of a record
    ("start", np.int64), ("line", np.int32),  # where its line starts, in bytes, and its number
    ("split", np.int8),  # index in SPLITS, -1 if it has none yet
    ("task", np.int64),  # hash of its name, in this process alone
    ("digest", np.uint64),  # hash of the line and of its pictures' sizes and times
    # hash of the question's picture: of its pixels if they were read, else of its name
    ("picture", np.uint64)])


@dataclass(eq=False)
class Records(Sequence):
    """The records of a folder, or some of them: `records[row]` is an Example; of several rows (a
    slice, a list, a mask) it is Records. A line is parsed when its record is used; no picture is
    opened. Raises ValueError naming the file if it has changed."""

    path: Path  # of the file of records
    version: tuple[str, int, int]
    table: np.ndarray  # (N,) of ROW
    notes: list[str]  # a sentence, with a count, for each kind of unusual record in the folder

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row):
        kept = self.table[row]  # raises IndexError, which ends a loop
        if kept.ndim:
            return replace(self, table=kept)
        with open(self.path, "rb") as file:
            if file_version(self.path) != self.version:  # the line may start elsewhere
                raise ValueError(f"{self.path} has changed since it was read; leave the data alone "
                                 "while they are in use")
            file.seek(kept["start"])
            example = parse(file.readline(), self.path.parent)
        return replace(example, split=(*SPLITS, "")[kept["split"]])

    def split(self, name: str) -> "Records":
        return self[self.table["split"] == SPLITS.index(name)]

    def where(self, row: int) -> str:
        return f"{self.path}, line {self.table[row]['line']}"


def digest(records: Sequence[Example]) -> str:
    """16 hex digits that other records would not have: of a folder's lines and its pictures' sizes
    and times, so that no picture is opened; of texts and pixels of records in memory."""
    if isinstance(records, Records):
        content = records.table["digest"].tobytes()
    else:
        parts = [part for ex in records for part in (ex.id, ex.task, ex.question, *ex.options,
                                                     ex.answer, ex.image, *ex.trajectory)]
        content = repr([part if isinstance(part, str) else picture_digest(part)
                        for part in parts]).encode()
    return f"{short_hash(content):016x}"


def scan(folder: Path, answer_prefix: str, problems: list[str] | None) -> Records:
    """The records of all lines that can be used, with the splits that they name. Pictures must
    exist, and are not opened. problems: see support.splits.read_folder."""
    path, total = folder / FILE, sum(1 for _ in read_lines(folder / FILE))
    version, table, used = file_version(path), np.zeros(total, ROW), 0
    ids: dict[int, int] = {}  # hash of an id -> its line
    unusual: dict[str, list[int]] = defaultdict(list)  # what `check` says -> its lines
    for line, number, start in progress(read_lines(path), "reading records", total):
        try:
            example = parse(line, folder)
            kind = check(example, answer_prefix)
            if kind != TWICE and (first := ids.setdefault(hash(example.id), number)) != number:
                raise ValueError(f"id {example.id!r} was used on line {first}; ids must be unique")
            # sizes and times; a hash of numbers is the same in all processes
            stamps = [hash(file_version(file)[1:]) for file in example.images]
        except (ValueError, OSError) as error:
            problem = f"{path}, line {number}: {error}"
            if problems is None:
                raise type(error)(problem) from None
            problems.append(problem)
            continue
        if kind:
            unusual[kind].append(number)
        if kind != TWICE:
            split = SPLITS.index(example.split) if example.split else -1
            table[used] = (start, number, split, hash(example.task),
                           short_hash(line.strip() + repr(stamps).encode()),
                           short_hash(bytes(example.image)))
            used += 1
    notes = [f"{path}: {len(lines)} of {total} records (line {lines[0]} is the first) {kind}"
             for kind, lines in unusual.items()]
    if not used and not problems:
        raise ValueError("; ".join([f"{path} holds no record that can be used", *notes]))
    return Records(path, version, table[:used], notes)


def read_lines(path: Path) -> Iterator[tuple[bytes, int, int]]:
    """(line, its number from 1, its start in bytes) of each line that is not blank."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: a data folder holds {FILE} and its images "
                                "(docs/data.md)")
    start = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):  # a line ends at a line feed alone
            if not line.isspace():
                yield line, number, start
            start += len(line)


def read_record(folder: str | Path, row: int) -> Example:
    """The record in this row, from 0, for a look at it: no other line is parsed, and no answer is
    checked. Raises ValueError also if there is no such row."""
    path = Path(folder) / FILE
    for line, number, _ in islice(read_lines(path), max(row, 0), max(row + 1, 0)):
        try:
            return parse(line, path.parent)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    raise ValueError(f"{path} has no row {row}; they are counted from 0")
