"""The one door between the programs and their data: a user's folder, or the small world."""

import os
import random

from support.records import Example, read_folder
from world.scenes import HELD_OUT, REGIMES, make_example, make_world


def load_examples(config) -> list[list[Example]]:
    """Training, validation and test examples, from the user's folder or drawn from the world.

    What is odd in a folder and yet used is printed.
    """
    if not config.data:
        regime, seed = config.regime, config.world_seed
        return [make_world(regime, "train", config.train_examples, seed),
                make_world(regime, "validation", config.valid_examples, seed),
                test_examples("", regime, config.test_per_family, seed, config.test_split)]
    notes: list[str] = []
    examples = read_folder(config.data, config.outside_images, notes=notes,
                           answer_prefix=config.answer_prefix)
    # of several processes, which all read the folder, one says so
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"note: {note}")
    return drawn(examples, config)


def drawn(examples: list[Example], config) -> list[list[Example]]:
    """A folder's training examples, and as many others as the world would give.

    Raises ValueError where a split has too few.
    """
    found = []
    for split, least in (("train", 2), ("validation", 2), (config.test_split, 1)):
        found.append([ex for ex in examples if ex.split == split])
        if len(found[-1]) < least:
            raise ValueError(f"{config.data} has {len(found[-1])} records in the {split} split, "
                             f"{least} or more are needed: set \"split\": \"{split}\" in some "
                             "records, or add records")
    rng, (train_rows, valid_rows, test_rows) = random.Random(config.world_seed), found

    def at_most(rows: list[Example], count: int) -> list[Example]:
        return rows if len(rows) <= count else rng.sample(rows, count)

    tests = [ex for family in dict.fromkeys(ex.task for ex in test_rows)
             for ex in at_most([ex for ex in test_rows if ex.task == family],
                               config.test_per_family)]
    return [train_rows, at_most(valid_rows, config.valid_examples), tests]


def test_examples(folder: str, regime: str, per_family: int, seed: int, split: str = "test",
                  outside: bool = False, answer_prefix: str = "Answer:") -> list[Example]:
    """A split of a user's folder (outside: see read_folder), or of the world, then with the
    held-out family; regime "": every family of the world."""
    if folder:
        examples = [ex for ex in read_folder(folder, outside, answer_prefix=answer_prefix)
                    if ex.split == split]
        if not examples:
            raise ValueError(f"{folder} has no record in the {split} split; give some records "
                             f"\"split\": \"{split}\"")
        return examples
    regimes = [regime] if regime else REGIMES
    families = dict.fromkeys(family for name in regimes for family in REGIMES[name])
    return [make_example(family, split, i, seed)
            for family in [*families, HELD_OUT] for i in range(per_family)]
