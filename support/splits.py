"""Splits: which records train, which validate and which test, so that no picture is in two splits.

The records are those of a user's folder, or the small world's where no folder is given. A record
without "split" gets the split that other records give its question's picture, else one by the hash
of the picture's pixels (8 : 1 : 1). The pixels count and not the file: the same picture, compressed
otherwise or under another name, stays on its side.
"""

import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np

from support.files import whole
from support.images import file_version, open_image, picture_digest
from support.options import optional_folder
from support.processes import first_process_first, progress
from support.records import SPLITS, Example, Records, scan, short_hash


def load_splits(config) -> tuple[Sequence[Example], ...]:
    """Training, validation and test records. Raises ValueError for a split with too few."""
    if config.data:
        return limit(read_splits(config), config)
    world, count = optional_folder("world.loader", "a run without --data"), config.train_examples
    return (world.examples(config.regime, "train", count),
            world.examples(config.regime, "validation", max(2, count // 10)),
            world.questions(config.regime, config.test_per_task))


def limit(splits: dict[str, Sequence[Example]], config) -> tuple[Sequence[Example], ...]:
    """All training records of a folder, and as many others as the world would give."""
    train, valid, tests = (at_least(least, split, splits[split], config)
                           for split, least in zip(SPLITS, (2, 2, 1)))
    rng = random.Random(0)
    valid = at_most(valid, max(2, config.train_examples // 10), rng, [""] * len(valid))
    return train, valid, at_most(tests, config.test_per_task, rng, tests.table["task"].tolist())


def test_questions(config, per_task_count: int, split: str = "test") -> Sequence[Example]:
    """Questions of one split: of config.data, or of config.regime and the held-out task;
    regime "": every task of the world."""
    if config.data:
        return at_least(1, split, read_splits(config)[split], config)
    world = optional_folder("world.loader", "asking without --data")
    return world.questions(config.regime, per_task_count, split)


def read_splits(config) -> dict[str, Sequence[Example]]:
    # what is read of pictures to give them splits serves all runs that lie beside this one
    cache = Path(config.out).parent / "pictures.npy" if getattr(config, "out", "") else None
    with first_process_first():
        records = read_folder(config.data, config.answer_prefix, cache)
    if os.environ.get("RANK", "0") == "0":  # all processes read the folder, one prints
        for note in records.notes:
            print(f"note: {note}")
    return {split: records.split(split) for split in SPLITS}


def at_least(count: int, split: str, records: Sequence[Example], config) -> Sequence[Example]:
    if len(records) < count:
        raise ValueError(f"{config.data} has {len(records)} records in the {split} split, {count} "
                         f"or more are needed: add some, or set \"split\": \"{split}\" in others")
    return records


def at_most(records, count: int, rng: random.Random, groups: Sequence) -> Sequence[Example]:
    """Of each group of records at most `count`, drawn at random. groups: a name for each record."""
    rows = []
    for group in dict.fromkeys(groups):
        own = [row for row, other in enumerate(groups) if other == group]
        rows += own if len(own) <= count else rng.sample(own, count)
    return records[rows]


def read_folder(folder: str | Path, answer_prefix: str = "Answer:", cache: Path | None = None,
                problems: list[str] | None = None, by_pixels: bool = False) -> Records:
    """The records of a folder, every line checked, in one pass. The pictures of all questions are
    opened only if a record names no split, or with by_pixels, to find the same picture in two
    splits whatever its files are called. cache: see `pixel_hashes`. problems: gets every error, and
    those records are left out; None: the first one is raised, as ValueError or FileNotFoundError
    naming file, line and fix."""
    records = scan(Path(folder), answer_prefix, problems)
    if by_pixels or (records.table["split"] < 0).any():
        records.table["picture"] = pixel_hashes(records, cache, problems)
    give_splits(records)
    return records


def give_splits(records: Records) -> None:
    """Give a split to each record without one, and note which splits share pictures."""
    splits = records.table["split"]
    pictures, picture_of = np.unique(records.table["picture"], return_inverse=True)  # (P,), (N,)
    # (P, 3): whether a record of the picture is in the split. A record in none, -1, writes into a
    # last column, which is dropped
    members = np.zeros((len(pictures), len(SPLITS) + 1), bool)
    members[picture_of, splits] = True
    members = members[:, :-1]
    by_hash = np.select([pictures % 10 == 0, pictures % 10 == 1], [2, 1], 0)
    # pictures with one named split keep to it; with several there is no right one
    inherited = np.where(members.sum(axis=1) == 1, members.argmax(axis=1), by_hash)
    splits[:] = np.where(splits < 0, inherited[picture_of], splits)
    members[picture_of, splits] = True
    for (one, in_one), (other, in_other) in combinations(zip(SPLITS, members.T), 2):
        if shared := (in_one & in_other).sum():
            records.notes.append(
                f"{records.path}: {shared} of {in_other.sum()} {other} images are also in {one}; "
                "give all records of an image one split")


def pixel_hashes(records: Records, cache: Path | None, problems: list[str] | None) -> np.ndarray:
    """(N,) uint64, a hash of the pixels of each question's picture; 0 of one with a problem. Every
    file is read once. cache: a file that keeps the hashes; a picture of the same size and time is
    not read again, also after an interruption. One process at a time writes it."""
    try:
        known = dict(np.load(cache).tolist()) if cache and cache.is_file() else {}
    except (ValueError, EOFError):
        raise ValueError(f"{cache} is not a cache of pictures' hashes; delete it") from None

    def hash_of(row: int) -> int:
        try:
            file = records[row].image
            version = short_hash(repr(file_version(file)).encode())
            if version not in known:
                pixels = picture_digest(open_image(file, records.where(row)))
                known[version] = int(pixels[:16], 16)
            return known[version]
        except (ValueError, OSError) as error:
            if problems is None:
                raise
            problems.append(str(error))
            return 0

    before = len(known)
    # one row for each name
    _, first, name_of = np.unique(records.table["picture"], return_index=True, return_inverse=True)
    hashes = np.zeros(len(first), np.uint64)
    # in the order of the file, and not all at once: a waiting call takes more memory than a result
    parts = np.array_split(np.argsort(first), len(first) // 100 + 1)
    try:
        # threads are enough: Pillow decodes, and hashlib hashes, without Python's lock
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for part in progress(parts, "reading images, by the hundred"):
                hashes[part] = np.fromiter(pool.map(hash_of, first[part].tolist()), np.uint64)
    finally:
        if cache and len(known) > before:
            with whole(cache) as partial, open(partial, "wb") as file:
                np.save(file, np.array(list(known.items()), np.uint64))
    return hashes[name_of]
