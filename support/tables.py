"""What is kept of single answers, and their accuracies, with intervals, as a table."""

import math
from collections import ChainMap

from support.answers import says
from support.records import HELD_OUT, Example

WAYS = ("direct", "free", "tool", "call", "latent")  # evaluate.py explains them


def answer_record(example: Example, answers_by_way: dict[str, dict], prefix: str) -> dict:
    """What a run keeps of an example's answers: each way's text, whether it is right, its cost."""
    record = dict(id=example.id, task=example.task, options=example.options, answer=example.answer,
                  cost={})
    for way, answer in answers_by_way.items():
        text = answer["text"]
        option = answer["option"] if "option" in answer else says(text, example.options, prefix)
        # a tool call that fails gives no answer, and the direct one counts
        if answer.get("failed"):
            text, option = f"({answer['failed']})", answers_by_way["direct"]["option"]
        record[way], record[f"{way}_right"] = text, option == example.options.index(example.answer)
        record["cost"][way] = {name: value for name, value in answer.items()
                               if name not in ("text", "option", "log_probs")}
    return record


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95% confidence interval of a proportion."""
    centre, spread = right + z * z / 2, z * math.sqrt(right * (n - right) / n + z * z / 4)
    return (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)


def summarise(records: list[dict]) -> dict[str, dict]:
    """Accuracy by task, each [share, low, high]; "all": of several tasks but the held-out one."""
    groups = {task: [r for r in records if r["task"] == task]
              for task in dict.fromkeys(r["task"] for r in records)}
    if len(groups.keys() - {HELD_OUT}) > 1:
        groups["all"] = [r for r in records if r["task"] != HELD_OUT]
    table = {}
    for task, rows in groups.items():
        table[task] = dict(n=len(rows), chance=sum(1 / len(r["options"]) for r in rows) / len(rows))
        for way in WAYS:
            if scored := [r[f"{way}_right"] for r in rows if f"{way}_right" in r]:
                table[task][way] = [sum(scored) / len(scored), *wilson(sum(scored), len(scored))]
    return table


def overall(table: dict[str, dict]) -> str:
    """The row that stands for a whole table of `summarise`: "all", or its only trained task."""
    return "all" if "all" in table else next((t for t in table if t != HELD_OUT), HELD_OUT)


def format_table(columns: dict[str, dict[str, dict]]) -> str:
    """Tasks down, models across: direct [95% interval] and the other ways, all in %."""
    tasks = dict(ChainMap(*columns.values()))
    lines = [f"{'task':18s}   n chance ", " " * 30]
    for task, row in tasks.items():
        label = f"{task} (held out)" if task == HELD_OUT else task
        lines.append(f"{label:18s}{row['n']:4d} {100 * row['chance']:5.0f}  ")
    for name, table in columns.items():
        ways = [way for way in WAYS[1:] if any(way in row for row in table.values())]
        cells = [name, "direct [95%]".ljust(19) + "".join(way.rjust(8) for way in ways)]
        for task in tasks:
            row, direct = table.get(task, {}), ""
            if "direct" in row:
                direct = "{:5.1f} [{:4.1f}-{:5.1f}]".format(*(100 * v for v in row["direct"]))
            rest = [f"{100 * row[way][0]:8.1f}" if way in row else "       -" for way in ways]
            cells.append(direct.ljust(19) + "".join(rest))
        width = max(21 + 8 * len(ways), len(name) + 2)
        lines = [line + cell.ljust(width) for line, cell in zip(lines, cells)]
    return "\n".join(line.rstrip() for line in lines)


def conclusion(before: dict, after: dict) -> str:
    """The last table in words. before, after: see `summarise`."""
    total = overall(after)
    was, now = (table[total]["direct"][0] for table in (before, after))
    text = (f"In words: from image and question alone (direct) {was:.1%} were right before and "
            f"{now:.1%} are now.")
    if "tool" in after[total]:
        text += (f"\nWith the expert's tool (tool) {after[total]['tool'][0]:.1%}: how well the "
                 "trajectories were learned. \"free\" is low where the model begins with its plan.")
    return text
