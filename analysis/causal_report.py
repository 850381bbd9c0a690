"""What the causal tests found, as a table and in sentences (the tests: analysis/causal.py).

Of one seed an interval is over its questions, of several over the seeds (t), as in
analysis/tables.py. A sentence says what its numbers show and no more: an interval that holds 0 is
"not shown" and never "no effect".
"""

from typing import NamedTuple

from analysis.tables import mean_std, paired_difference
from support.tables import HELD_OUT, wilson
from world.scenes import NO_DOTS

RIGHT, SAME, FOLLOWS, STAYS = "right", "unchanged", "as the image", "as the question"
FED = "with latents"  # at least one was fed
BASE = "no fine-tuning"
NEAR = 2  # a question with fewer words changed is a near copy of a trained one


class Row(NamedTuple):
    """One test of one model: a mark for each question by its id, and what guessing gives."""

    part: str
    test: str
    measure: str
    marks: dict[str, bool]
    chance: float

    @property
    def key(self) -> tuple[str, str, str]:
        return self.part, self.test, self.measure


class System(NamedTuple):
    """An arm: its rows of each seed, in the same order."""

    name: str
    seeds: list[list[Row]]

    def shares(self, key: tuple) -> list[float]:
        """In %, of each seed that has the test."""
        return [100 * share(row) for rows in self.seeds for row in rows if row.key == key]

    def gap(self, one: tuple, other: "System", key: tuple) -> tuple[float, float] | None:
        """Mean difference in points and the half width of its 95% interval: over seeds by t; of one
        seed over the questions that both were asked. other's only seed goes with each of ours."""
        return self.gap_over([one], other, [key])

    def gap_over(self, ones: list[tuple], other: "System",
                 keys: list[tuple]) -> tuple[float, float] | None:
        """The same over the questions of several tests together."""
        gaps = []  # of each seed, one a question
        for n, rows in enumerate(self.seeds):
            mine, theirs = ({i: 100 * mark for row in found if row.key in wanted
                             for i, mark in row.marks.items()}
                            for found, wanted in ((rows, ones),
                                                  (other.seeds[n % len(other.seeds)], keys)))
            gaps.append([mine[i] - theirs[i] for i in mine if i in theirs])
        if not all(gaps):
            return None
        if len(gaps) == 1:
            return over_questions(gaps[0])
        return paired_difference([sum(seed) / len(seed) for seed in gaps], [0.0] * len(gaps))


def over_questions(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% interval, by the normal distribution."""
    mean, n = sum(values) / len(values), len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, n - 1)
    return mean, 1.96 * (variance / n) ** 0.5


def share(row: Row) -> float:
    return sum(row.marks.values()) / max(1, len(row.marks))


def table(systems: list[System], apart: dict[str, int]) -> list[dict]:
    """One line a test: n questions, the share in % with its 95% interval (one seed: Wilson) or its
    standard deviation over seeds, and what guessing gives. apart: see `distances`."""
    lines = []
    for system in systems:
        for row in system.seeds[0]:
            values, n = system.shares(row.key), len(row.marks)
            interval = [100 * v for v in wilson(sum(row.marks.values()), n)] if n else None
            lines.append(dict(system=system.name, part=row.part, test=row.test,
                              measure=row.measure, n=n, seeds=len(values), values=values,
                              interval=interval if len(values) == 1 else None,
                              # what is no answer cannot be guessed
                              chance=None if row.measure == FED else 100 * row.chance,
                              apart=apart.get(row.test) if row.part == "untrained" else None))
    return lines


def as_text(lines: list[dict]) -> str:
    head = ["system", "replaced", "by", "answers", "n", "% [95%] or +/- std", "chance"]
    cells = [head]
    for line in lines:
        value = mean_std(line["values"]) if line["n"] else "no question fits"
        if line["interval"] and line["n"]:
            value += " [{:.1f}, {:.1f}]".format(*line["interval"])
        by = line["test"] if line["apart"] is None else f"{line['test']} ({line['apart']} apart)"
        cells.append([line["system"], line["part"], by, line["measure"], str(line["n"]), value,
                      "-" if line["chance"] is None else f"{line['chance']:.0f}"])
    rows = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([rows[0], "|" + "---|" * len(head), *rows[1:]])


def points(gap: tuple[float, float] | None) -> str:
    """"+1.2 [-0.3, +2.7]"; of a single question or seed there is no interval."""
    if gap is None:
        return "(not measured)"
    return f"{gap[0]:+.1f} [{gap[0] - gap[1]:+.1f}, {gap[0] + gap[1]:+.1f}]"


def differs(gap: tuple[float, float] | None) -> bool:
    return gap is not None and abs(gap[0]) > gap[1]


def findings(systems: list[System], apart: dict[str, int]) -> list[str]:
    """One sentence a system and part, from its numbers."""
    base = next((system for system in systems if system.name == BASE), None)
    told = []
    for system in systems:
        parts = dict.fromkeys(row.part for row in system.seeds[0])
        for part, tell in (("latents", of_latents), ("image", of_image), ("tool image", of_tool)):
            if part in parts:
                told.append(f"Finding, {system.name}: {tell(system)}.")
        if "untrained" in parts and base and system is not base:
            told.append(f"Finding, {system.name}: {of_untrained(system, base, apart)}.")
    return told


def of_latents(system: System) -> str:
    own = ("latents", "as they are", RIGHT)
    tests = [row.key for row in system.seeds[0] if row.part == "latents" and row.key != own
             and row.measure == RIGHT]
    gaps = {key[1]: system.gap(key, system, own) for key in tests}
    matter = [name for name, gap in gaps.items() if differs(gap)]
    told = ", ".join(f"{name} {points(gap)}" for name, gap in gaps.items())
    verdict = f"distinguishable from its own: {', '.join(matter)}" if matter else \
        "none distinguishable from its own: the answers do not show that the latents are used"
    fed = mean_std(system.shares(("latents", "as they are", FED)))
    return (f"it fed itself latents for {fed} in 100 questions and had "
            f"{mean_std(system.shares(own))} right; with other latents {told}; {verdict}")


def of_image(system: System) -> str:
    own, grey, other = (("image", test, RIGHT) for test in
                        ("as it is", "grey", "another question's"))
    gaps = [system.gap(own, system, key) for key in (grey, other)]
    kept = [mean_std(system.shares((*key[:2], SAME))) if system.shares((*key[:2], SAME)) else "-"
            for key in (grey, other)]
    verdict = "the answers depend on the image" if all(map(differs, gaps)) else \
        "that the answers depend on the image is not shown"
    return (f"the image is worth {points(gaps[0])} points over grey and {points(gaps[1])} over "
            f"another question's, with which {kept[0]} and {kept[1]} in 100 answers stay the "
            f"same: {verdict}")


def of_tool(system: System) -> str:
    follows, stays = (("tool image", "another's, other answer", m) for m in (FOLLOWS, STAYS))
    gap = system.gap(follows, system, stays)
    same_one = system.gap(("tool image", "another's, same answer", RIGHT), system,
                          ("tool image", "as it is", RIGHT))
    verdict = "neither clearly more" if not differs(gap) else \
        "the answer follows the tool image" if gap[0] > 0 else \
        "the answer follows the question and the calls"
    shares = [mean_std(system.shares(key)) for key in (follows, stays)]
    return (f"behind another question's tool image {shares[0]} in 100 answers are that "
            f"image's and {shares[1]} the question's own: {verdict}; another's image with the same "
            f"answer changes accuracy by {points(same_one)}")


def of_untrained(system: System, base: System, apart: dict[str, int]) -> str:
    keys = {row.test: row.key for row in system.seeds[0] if row.part == "untrained"}
    told = {name: system.gap(key, base, key) for name, key in keys.items()}
    far = [name for name in told if apart[name] >= NEAR or name == NO_DOTS]
    near = [name for name in told if name not in far]

    def listed(names: list[str]) -> str:
        return ", ".join(f"{name} {points(told[name])}" for name in names) or "none"

    whole = [keys[name] for name in far]
    text = (f"against {BASE}, questions with no near copy in training: all together "
            f"{points(system.gap_over(whole, base, whole))}, {listed(far)}; ")
    if NO_DOTS in told:
        change = points(by_dots(system, base, keys[HELD_OUT], keys[NO_DOTS]))
        text += f"the dots alone change it, on the same scenes, by {change}; "
    return text + f"near copies (fewer than {NEAR} words apart): {listed(near)}"


def by_dots(system: System, base: System, dots: tuple, plain: tuple) -> tuple[float, float] | None:
    """The change against the base with the dots, less the change without them: scene by scene, or,
    of several seeds, seed by seed."""
    with_dots, without = (system.shares(key) for key in (dots, plain))
    before = base.shares(dots)[0] - base.shares(plain)[0]
    if len(with_dots) > 1:
        mean, half = paired_difference(with_dots, without)
        return mean - before, half
    # both list the same scenes in the same order, under ids of their own
    marks = [[int(mark) for row in one.seeds[0] if row.key == key for mark in row.marks.values()]
             for one in (system, base) for key in (dots, plain)]
    return over_questions([100 * ((a - b) - (c - d)) for a, b, c, d in zip(*marks, strict=True)])
