"""The small world's records, in place of a data folder (support/splits.py)."""

from support.records import Example
from world.scenes import HELD_OUT, REGIMES, TASKS, make_example, make_world


# trajectories of a regime (world/README.md)
examples = make_world


def questions(regime: str, per_task: int, split: str = "test", seed: int = 0) -> list[Example]:
    """Questions of each task of the regime, then of the task that no trajectory covers; regime "":
    of every task."""
    tasks = dict.fromkeys([*REGIMES[regime], HELD_OUT]) if regime else TASKS
    return [make_example(task, split, i, seed) for task in tasks for i in range(per_task)]
