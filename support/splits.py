"""The records of a run: a user's folder, or the small world where no folder is given."""

import os
import random
from collections.abc import Sequence
from pathlib import Path

from support.options import optional_folder
from support.picture_splits import SPLITS
from support.processes import first_process_first
from support.records import Example, read_folder


def load_splits(config) -> tuple[Sequence[Example], ...]:
    """Training, validation and test records. Raises ValueError for a split with too few."""
    count, tests = config.train_examples, config.test_per_task
    if not config.data:
        world = optional_folder("world.loader", "a run without --data")
        return (world.examples(config.regime, "train", count),
                world.examples(config.regime, "validation", max(2, count // 10)),
                world.questions(config.regime, tests))
    return limit(read_splits(config), config)


def limit(splits: dict[str, Sequence[Example]], config) -> tuple[Sequence[Example], ...]:
    """All training records of a folder, and as many others as the world would give."""
    train, valid, tests = (at_least(least, split, splits[split], config)
                           for split, least in zip(SPLITS, (2, 2, 1)))
    rng = random.Random(0)
    valid = at_most(valid, max(2, config.train_examples // 10), rng, [""] * len(valid))
    return train, valid, at_most(tests, config.test_per_task, rng, tests.tasks)


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
    # of several processes, which all read the folder, one prints
    if os.environ.get("RANK", "0") == "0":
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
    return records.subset(rows)
