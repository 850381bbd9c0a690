"""Records: one question with its expert trajectory (`Example`), and a folder of them, checked.

A data folder holds trajectories.jsonl, one record a line, and the images that the records name
(README, "Your own data").
"""

import itertools
import json
import re
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterator

from support.answers import (contains, default_form, form_of, has_prefix, normalise, option_index,
                             stated_answer)
from support.files import new_folder, on_disk
from support.images import Picture, open_image, opened, picture_digest


@dataclass
class Example:
    """One question with its expert trajectory.

    `trajectory` is R = (T1, I1, ..., IN, TN): a list of str (assistant text) and pictures (tool
    output), in order. Its first text holds the plan and the call, its last text the answer. It may
    be empty where nothing is trained (the held-out family). `options` are the candidate answers,
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
        return replace(self, bare=True, trajectory=[(form or default_form(answer_prefix)).text(self.answer)])


FILE = "trajectories.jsonl"
SPLITS = ("train", "validation", "test")


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


def read_folder(folder: str | Path, outside: bool = False, problems: list[str] | None = None,
                notes: list[str] | None = None, answer_prefix: str = "Answer:") -> list[Example]:
    """Read a folder in the format above. Every record and image is checked before any is used.

    Raises ValueError or FileNotFoundError naming file, line and mend; with a list for `problems` it
    collects them there and goes on. outside: image paths and links may leave the folder. What can
    be used and is odd is counted in `notes`, one sentence a kind; without a list it is warned of.

    A record without "split" gets the split that other records give its image, else one by the hash
    of the image's bytes (8 : 1 : 1): two questions on one image never fall on two sides.
    """
    reader, examples = _Reader(Path(folder), outside, answer_prefix), []
    for number, line in _lines(reader.folder):
        try:
            examples.append(reader.example(line, number))
        except (ValueError, FileNotFoundError) as error:
            if problems is None:
                raise
            problems.append(str(error))
    if not examples and not problems:
        raise ValueError(f"{reader.folder / FILE} holds no record")
    reader.assign_splits(examples)
    for note in reader.notes(examples):
        if notes is None:
            warnings.warn(note, stacklevel=2)
        else:
            notes.append(note)
    return examples


def read_record(folder: str | Path, row: int, outside: bool = False,
                answer_prefix: str = "Answer:") -> Example:
    """One record, by its number from 0, checked as `read_folder` does; no other image is read.

    Its split is "" where it names none. Raises ValueError also for a row that is not there.
    """
    reader, rows = _Reader(Path(folder), outside, answer_prefix), list(_lines(Path(folder)))
    if not 0 <= row < len(rows):
        raise ValueError(f"{reader.folder / FILE} has no row {row}: it has {len(rows)}, counted "
                         "from 0")
    number, line = rows[row]
    return reader.example(line, number)


def _lines(folder: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, with their numbers from 1."""
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: a data folder holds {FILE} and its images "
                                "(see README, data format)")
    with open(path, "rb") as file:  # a line ends at a line feed and nowhere else
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


class _Reader:
    """The records of one folder, checked one after another, and what is remembered of them."""

    def __init__(self, folder: Path, outside: bool, answer_prefix: str):
        self.folder, self.outside, self.prefix = folder, outside, answer_prefix
        self.lines: dict[str, int] = {}  # by id
        self.sound: dict[str, Path] = {}  # by name: images that were read, each once
        self.digests: dict[Path, str] = {}  # of the files of the questions' images
        self.without_prefix: list[int] = []  # lines
        self.other_words: list[int] = []  # lines

    def example(self, line: bytes, number: int) -> Example:
        """One line as an Example, whose split is "" where it names none."""
        where = f"{self.folder / FILE}, line {number}"
        record = _parse(line, where)
        for key, kind in dict(id=str, image=str, question=str, options=list, answer=str,
                              trajectory=list).items():
            _need(isinstance(record.get(key), kind), where,
                  f"field {key!r} must be a {kind.__name__}; found {record.get(key)!r:.80}")
        name, question = (_text(record[key], key, where) for key in ("id", "question"))
        task = _text(record.get("task", record.get("family", "questions")), "task", where)
        options, answer = _options(record, where)
        steps = [self._step(step, n, where) for n, step in enumerate(record["trajectory"])]
        _need(bool(steps) and isinstance(steps[-1], str), where,
              "the trajectory must end in a text that gives the answer")
        image = self._image(_text(record["image"], "image", where), where)
        split = record.get("split")
        _need(split is None or split in SPLITS, where,
              f"split {split!r} is none of {', '.join(SPLITS)}")
        _need(name not in self.lines, where,
              f"id {name!r} was used on line {self.lines.get(name)}; ids must be unique")
        self._check_last_text(steps[-1], options, answer, number, where)
        self.lines[name] = number
        if image not in self.digests:
            self.digests[image] = picture_digest(image)
        return Example(name, task, image, question, options, answer, steps, split or "")

    def _image(self, name: str, where: str) -> Path:
        if name not in self.sound:
            self.sound[name] = checked(self.folder, name, where, self.outside)
        return self.sound[name]

    def _step(self, step, n: int, where: str) -> str | Path:
        _need(isinstance(step, dict) and len(step) == 1 and next(iter(step)) in ("text", "image"),
              where, f"trajectory step {n} must be {{'text': ...}} or {{'image': ...}}; "
                     f"found {step!r:.80}")
        kind, value = next(iter(step.items()))
        value = _text(value, f"trajectory step {n}: {kind}", where)
        return value if kind == "text" else self._image(value, where)

    def _check_last_text(self, text: str, options: list[str], answer: str, number: int,
                         where: str) -> None:
        """Raises ValueError where the last text says another answer than the field.

        Where it says none of the options in so many words, the answer's own words, whole, and no
        other option's will do; such a record is noted, and so is one without the prefix.
        """
        stated = stated_answer(text, self.prefix)
        given = text if stated is None else stated
        said = option_index(given, options)
        others = [o for o in options if stated is not None and not contains(answer, o)]
        clear = contains(given, answer) and not any(contains(given, o) for o in others)
        if stated is None and said is None:
            _need(clear, where,
                  f"the last text of the trajectory does not contain the answer {answer!r:.80}")
        else:
            _need(clear if said is None else options[said] == answer, where,
                  f"the last text says {given!r:.80} but the field 'answer' is {answer!r:.80}; "
                  "correct one of them")
        if not has_prefix(text, self.prefix):
            self.without_prefix.append(number)
        elif said is None:
            self.other_words.append(number)

    def assign_splits(self, examples: list[Example]) -> None:
        """In place, by the digest of the image, where a record names none."""
        named: dict[str, set[str]] = {}
        for ex in examples:
            if ex.split:
                named.setdefault(self.digests[ex.image], set()).add(ex.split)
        for ex in examples:
            digest = self.digests[ex.image]
            by_hash = {0: "test", 1: "validation"}.get(int(digest[:8], 16) % 10, "train")
            splits = named.get(digest, set())
            ex.split = ex.split or (next(iter(splits)) if len(splits) == 1 else by_hash)

    def notes(self, examples: list[Example]) -> list[str]:
        """One sentence for each kind of oddity, with its count."""
        path, found = self.folder / FILE, []
        if lines := self.without_prefix:
            found.append(f"{path}: {len(lines)} of {len(examples)} last texts (line {lines[0]} is "
                         f"the first) have no {self.prefix!r}, with which questions are "
                         "asked and replies read: give --answer_prefix as these texts have it")
        if lines := self.other_words:
            found.append(f"{path}: {len(lines)} of {len(examples)} last texts (line {lines[0]} is "
                         "the first) give the answer in other words than the option's; a reply in "
                         "such words counts as wrong")
        shown = {split: {self.digests[ex.image] for ex in examples if ex.split == split}
                 for split in SPLITS}
        for one, other in itertools.combinations(SPLITS, 2):
            if shared := len(shown[one] & shown[other]):
                found.append(f"{path}: {shared} of {len(shown[other])} {other} images are also in "
                             f"{one}; give all records of an image one split")
        return found


NOT_UNICODE = "is not valid Unicode text; save the file as UTF-8, without halves of characters"


def _need(right: bool, where: str, message: str) -> None:
    if not right:
        raise ValueError(f"{where}: {message}")


def _text(value, name: str, where: str) -> str:
    """The value without blanks at its ends. Raises ValueError unless it is text, and not empty."""
    _need(isinstance(value, str) and bool(value.strip()), where,
          f"{name} must be a non-empty string; found {value!r:.80}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can write what UTF-8 cannot
        raise ValueError(f"{where}: {name} {NOT_UNICODE}") from None
    return value.strip()


def _options(record: dict, where: str) -> tuple[list[str], str]:
    """The options, and the one of them that the answer is."""
    options = [_text(option, "every option", where) for option in record["options"]]
    normal = [normalise(option) for option in options]
    for n, option in enumerate(normal):
        _need(option not in normal[:n], where,
              f"an option is there twice, or in two forms that count as one: {options!r:.200}")
    answer = record["answer"].strip()
    right = option_index(answer, options)
    _need(right is not None, where, f"answer {answer!r:.80} is not among the options "
                                    f"{options!r:.200}")
    return options, options[right]


def _parse(line: bytes, where: str) -> dict:
    try:
        record = json.loads(line.decode("utf-8-sig"), object_pairs_hook=_fields)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); "
                         "write one object a line") from None
    except UnicodeDecodeError:
        raise ValueError(f"{where}: the line {NOT_UNICODE}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply; write the object that the README shows"
                         ) from None
    _need(isinstance(record, dict), where, f"expected a JSON object, found {type(record).__name__}")
    return record


def _fields(pairs: list[tuple]) -> dict:
    """Of a field that is there twice, json would keep the last and say nothing."""
    names = [name for name, _ in pairs]
    if twice := next((name for n, name in enumerate(names) if name in names[:n]), None):
        raise ValueError(f"field {twice!r} is there twice; keep one")
    return dict(pairs)


def inside(folder: Path, name: str, outside: bool = False) -> Path:
    """folder / name. Raises ValueError if that, links followed, leaves the folder and must not."""
    path = folder / on_disk(name)
    if not outside and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"image {name} leaves the data folder; copy it there, or allow it with "
                         "--outside_images")
    return path


def checked(folder: Path, name: str, where: str, outside: bool = False) -> Path:
    try:
        path = inside(folder, name, outside)
    except ValueError as error:  # also of names that no file can have
        raise ValueError(f"{where}: {error}") from None
    open_image(path, where)
    return path



def digests(records):
    return "x"
