"""The data of a run: a user's folder, or the small world. Programs get examples only from here."""

import os
import random

from support.records import SPLITS, Example, read_folder
from world.scenes import HELD_OUT, REGIMES, TASKS, make_example, make_world


def load_splits(config) -> tuple[list[Example], list[Example], list[Example]]:
    """The training, validation and test examples of a run.

    World: train_examples of the regime, a tenth as many for validation, and test_per_task of each
    of its tasks and of the held-out task. Folder: see `limit_splits`.
    """
    if config.data:
        notes: list[str] = []
        records = read_folder(config.data, config.outside_images, notes=notes,
                              answer_prefix=config.answer_prefix)
        # with torchrun every process reads the folder: only the first one prints
        if os.environ.get("RANK", "0") == "0":
            print(*(f"note: {note}\n" for note in notes), sep="", end="")
        return limit_splits(records, config)
    return (make_world(config.regime, "train", config.train_examples),
            make_world(config.regime, "validation", max(2, config.train_examples // 10)),
            test_examples("", config.regime, config.test_per_task))


def limit_splits(records: list[Example], config
                 ) -> tuple[list[Example], list[Example], list[Example]]:
    """All of a folder's training records, and no more of the others than the world would give.

    Raises ValueError for a split with too few records.
    """
    # the gauges of a collapse compare records, so there must be two
    train, validation, test = (_split(records, config.data, name, minimum)
                               for name, minimum in zip(SPLITS, (2, 2, 1)))
    # the same choice in every run, so that runs answer the same questions
    rng = random.Random(0)

    def at_most(count: int, rows: list[Example]) -> list[Example]:
        return rows if len(rows) <= count else rng.sample(rows, count)

    tests = [ex for task in dict.fromkeys(ex.task for ex in test)
             for ex in at_most(config.test_per_task, [ex for ex in test if ex.task == task])]
    return train, at_most(max(2, config.train_examples // 10), validation), tests


def _split(records: list[Example], folder: str, name: str, minimum: int) -> list[Example]:
    rows = [ex for ex in records if ex.split == name]
    if len(rows) < minimum:
        raise ValueError(f"{folder} has {len(rows)} records in the {name} split, {minimum} or more "
                         f"are needed: add records, or set \"split\": \"{name}\" in some")
    return rows


def test_examples(folder: str, regime: str, per_task: int, seed: int = 0, split: str = "test",
                  outside: bool = False, answer_prefix: str = "Answer:") -> list[Example]:
    """All records of a split of a user's folder; without a folder, `per_task` scenes of each of
    the regime's tasks and of the held-out task, or of all tasks if `regime` is empty."""
    if folder:
        records = read_folder(folder, outside, answer_prefix=answer_prefix)
        return _split(records, folder, split, 1)
    tasks = [*REGIMES[regime], HELD_OUT] if regime else TASKS
    return [make_example(task, split, i, seed) for task in tasks for i in range(per_task)]
