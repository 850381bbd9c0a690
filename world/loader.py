"""The small world's examples."""

from world.scenes import HELD_OUT, REGIMES, make_example, make_world


def examples(regime, split, count):
    return make_world(regime, split, count, 0)


def questions(regime, per_task, split="test", seed=0):
    regimes = [regime] if regime else REGIMES
    tasks = dict.fromkeys(task for name in regimes for task in REGIMES[name])
    return [make_example(task, split, i, seed) for task in [*tasks, HELD_OUT]
            for i in range(per_task)]
