"""Tables over runs: a comparison over systems and seeds, of runs that can be compared."""

import json
import math
import statistics
from pathlib import Path

from support.tables import HELD_OUT, summarise

# Student's t, two-sided 95%, by degrees of freedom
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def mean_std(values: list[float]) -> str:
    spread = f" +/- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def paired_difference(ours: list[float], theirs: list[float]) -> tuple[float, float] | None:
    """Mean of the differences and the half width of its 95% interval (t over seeds); None below two
    pairs."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(gaps) < 2:
        return None
    t = T95[len(gaps) - 2] if len(gaps) - 2 < len(T95) else 1.96 + 2.4 / (len(gaps) - 1)
    return statistics.mean(gaps), t * statistics.stdev(gaps) / math.sqrt(len(gaps))


def p_value(ours: list[float], theirs: list[float]) -> float:
    """Two-sided, of the paired t-test that `paired_difference` is the interval of; 1 below two
    pairs, and for differences that are all 0."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    if len(gaps) < 2 or not any(gaps):
        return 1.0
    spread, df = statistics.stdev(gaps), len(gaps) - 1
    if spread == 0:
        return 0.0
    # Student's distribution in closed form for whole degrees of freedom (Abramowitz and Stegun,
    # 26.7.3 and 26.7.4): a sum of powers of cos, each a ratio times the one before
    angle = math.atan(abs(statistics.mean(gaps)) / spread * math.sqrt(len(gaps) / df))
    odd = df % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1)
    total = 0.0
    for k in range(1 + odd, df, 2):
        total, term = total + term, term * math.cos(angle) ** 2 * k / (k + 1)
    return 1 - (2 / math.pi * (angle + total) if odd else total)


def holm(values: dict[str, float]) -> dict[str, float]:
    """p-values of several comparisons, each enlarged for how many there are (Holm 1979): below 0.05
    for one of them, with a chance of 5% at most, where none of them differs."""
    enlarged, least = {}, 0.0
    for place, name in enumerate(sorted(values, key=values.get)):
        least = max(least, min(1.0, values[name] * (len(values) - place)))
        enlarged[name] = least
    return {name: enlarged[name] for name in values}


def arms(configs: dict[str, dict]) -> dict[str, str]:
    """Run -> the name of its arm: its method, and the settings in which the compared runs of that
    method differ."""
    ignored = {"seed", "out", "method", "device", "recipe", "model", "data", "workers",
               "feature_cache", "feature_cache_gb", "log_every", "save_every"}  # of no effect here
    names = {}
    for run, config in configs.items():
        peers = [c for c in configs.values() if c["method"] == config["method"]]
        differing = [k for k in config
                     if k not in ignored and len({json.dumps(c.get(k)) for c in peers}) > 1]
        names[run] = " ".join([config["method"], *(f"{k}={config[k]}" for k in differing)])
    return names


def setting(run: dict) -> dict:
    """What runs must share to be compared: base, training data and the questions answered."""
    config = run["config"]
    asked = sorted((r["id"], r["task"], r["options"], r.get("answer")) for r in run["answers"])
    data = config.get("data") or [config.get("regime"), config.get("world_seed")]
    # a base is known by its folder's name: a copy elsewhere is the same base
    return dict(base=Path(config.get("model", "")).name, data=data, questions=asked)


def comparable(runs: dict[str, dict]) -> list[dict[str, dict]]:
    """The runs in groups of one setting, each {name: run} as given."""
    groups: dict[str, dict[str, dict]] = {}
    for name, run in runs.items():
        groups.setdefault(json.dumps(setting(run)), {})[name] = run
    return list(groups.values())


def comparison(runs: dict[str, dict]) -> tuple[list[dict], str]:
    """Rows of `compare` and the tables as text: one table a setting, with a sentence about it."""
    groups = comparable(runs)
    rows = [compare(group) for group in groups]
    if len(groups) == 1:
        return rows[0], markdown(rows[0])
    first, *others = (setting(next(iter(group.values()))) for group in groups)
    unlike = [name for name in first if any(other[name] != first[name] for other in others)]
    texts = [f"{', '.join(group)}:\n\n{markdown(part)}" for group, part in zip(groups, rows)]
    said = (f"These runs differ in {' and '.join(unlike)}: only those within one table are "
            "compared with each other.")
    return sum(rows, []), "\n\n".join([said, *texts])


def by_seed(runs: dict[str, dict], names: dict[str, str]) -> dict[str, dict[int, dict]]:
    """Arm -> seed -> run. A second run of one arm and seed is no further seed: it is a row of its
    own, which names it."""
    groups: dict[str, dict[int, dict]] = {}
    for name, run in runs.items():
        seeds, seed = groups.setdefault(names[name], {}), run["config"]["seed"]
        if seed in seeds:
            groups[f"{names[name]} again ({name})"] = {seed: run}
        else:
            seeds[seed] = run
    return groups


def compare(runs: dict[str, dict], reference: str = "sft",
            names: dict[str, str] | None = None) -> list[dict]:
    """One row a system from runs {name: dict(config, answers, before)}: accuracies over seeds,
    paired differences, cost.

    `own` is the accuracy of the system's own inference: direct; latent for recon; call for explicit
    tool use, which is a row of its own beside the reference arm. Differences are to the reference
    arm, direct, paired by seed, in points. names: the arm of each run; default: see `arms`. A
    reconstruction arm within 10 points of guessing is not compared. Raises ValueError for runs of
    several settings (see `comparable`).
    """
    if len(kinds := comparable(runs)) > 1:
        one, other = (next(iter(kind)) for kind in kinds[:2])
        raise ValueError(f"{one} and {other} differ in base, data or questions: no mean and no "
                         "difference can be taken over both")
    groups = by_seed(runs, names or arms({run: r["config"] for run, r in runs.items()}))
    first, rows = next(iter(runs.values())), []
    if first.get("before"):
        rows.append(row_of("no fine-tuning", "direct", {0: dict(answers=first["before"])}, {}))
    for name, seeds in groups.items():
        own = "latent" if name.split()[0] == "recon" else "direct"
        against = groups.get(reference, {}) if name != reference else {}
        rows.append(row_of(name, own, seeds, against))
        called = any("call_right" in r for run in seeds.values() for r in run["answers"])
        if name == reference and called:
            rows.append(row_of(f"{name} + tools", "call", seeds, {}))
    return rows


def row_of(name: str, own: str, seeds: dict[int, dict], against: dict[int, dict]) -> dict:
    """A system's row, from its runs by seed and those of the arm that it is compared with."""
    tables = {seed: summarise(run["answers"]) for seed, run in seeds.items()}
    one = next(iter(tables.values()))
    total = "all" if "all" in one else next(iter(one))

    def percent(family: str, way: str) -> list[float]:
        return [100 * t[family][way][0] for t in tables.values() if way in t.get(family, {})]

    row = dict(system=name, own_way=own, seeds=len(seeds), direct=percent(total, "direct"),
               tool=percent(total, "tool"), own=percent(total, own),
               chance=100 * one[total]["chance"],
               families={family: percent(family, own) for family in one if family != total})
    # who only guesses is no opponent
    row["compared"] = own != "latent" or statistics.mean(row["own"]) > row["chance"] + 10
    both = sorted(seeds.keys() & against.keys())
    if both and row["compared"]:
        theirs = [summarise(against[seed]["answers"])[total]["direct"][0] for seed in both]
        pairs = ([100 * tables[seed][total][own][0] for seed in both],
                 [100 * share for share in theirs])
        row["difference"], row["p"] = paired_difference(*pairs), p_value(*pairs)
    costs = [r["cost"][own] for run in seeds.values() for r in run["answers"] if own in r["cost"]]
    row["cost"] = {k: statistics.mean(c[k] for c in costs) for k in ("tokens", "images", "passes")}
    row["cost"]["failed"] = sum("failed" in c for c in costs) / len(costs)
    row["cost"]["ms"] = [run["ms"][own] for run in seeds.values() if own in run.get("ms", {})]
    return row


def corrected(rows: list[dict], reference: str = "sft") -> str:
    """One sentence: the p-values of all differences to the reference, for how many they are."""
    values = holm({row["system"]: row["p"] for row in rows if row.get("difference")})
    told = ", ".join(f"{name} {p:.3f}" for name, p in values.items())
    return (f"p of the differences to {reference} (paired t over seeds, enlarged for "
            f"{len(values)} comparisons by Holm's rule): {told or 'none to compare'}")


def markdown(rows: list[dict], reference: str = "sft") -> str:
    families = list(dict.fromkeys(f for row in rows for f in row["families"]))
    head = ["system", "seeds", *(f"`{f}`" + (" (held out)" if f == HELD_OUT else "")
                                 for f in families), "all", f"all - {reference} [95%]",
            "with the expert's tool", "tokens", "images", "passes", "ms"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        gap = row.get("difference")
        cost = row["cost"]
        difference = "-" if row["compared"] else "guesses"
        if gap:
            difference = f"{gap[0]:+.1f} [{gap[0] - gap[1]:+.1f}, {gap[0] + gap[1]:+.1f}]"
        per_family = [mean_std(row["families"][f]) if row["families"].get(f) else "-"
                      for f in families]
        cells = [row["system"], str(row["seeds"]), *per_family, mean_std(row["own"]), difference,
                 mean_std(row["tool"]) if row["tool"] else "-",
                 *(f"{cost[k]:.1f}" for k in ("tokens", "images", "passes")),
                 f"{statistics.median(cost['ms']):.0f}" if cost["ms"] else "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
