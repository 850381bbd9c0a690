"""Which state of R is worth predicting? Every layer and position, measured before any training.

    python analysis/targets.py --layers                                # shipped model: a minute
    python analysis/targets.py --layers --model MODEL --data DIR --figure targets-layers.png
    python analysis/targets.py --layers --text_model smollm2 --train_examples 200   # R's words

A state is a layer (as --target_layer counts: 0 what enters the first, -1 the last after the norm)
and a position (--target_position). Its shares are those of targets.py; `centred`: with the mean
over all trajectories taken off, which neither Pearl nor its cosine does: it may hide much.

The recommendation is a rule, set before any run was trained on what it says, and follows from what
L_JEPA can teach: of the states from the middle layer on that the hint of a collapse does not call
nearly all alike, the one with the largest share that tells the answer, less the share of answers
dealt anew; not centred, for the cosine sees what is common. If all are alike, of all of those; of
two equal to three digits the later layer, then the earlier in the order end, word, words, image.
Why from the middle on: before, a state is little more than its own word, and the last word is the
answer's, so that to predict it would be to learn the bare answer. Somewhat that holds later, too:
set --method both beside a recommended `word`. The rule does not know how well a state can be
predicted from <I0, Q>.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import losses
import train
from analysis.charts import Chart, beside
from baselines.cures import mean_at, places
from data import View, collate
from model import VLM
from support.records import Example
from support.run_folder import collapse_hint

POSITIONS = ("end", "word", "words", "image")


class State(NamedTuple):
    """A row of the table. shares and centred: see `shares`."""

    layer: int
    position: str
    shares: dict[str, float]
    centred: dict[str, float]
    # losses.collapse_gauges of all h_R with themselves
    gauges: dict[str, float]

    @property
    def excess(self) -> float:
        return excess(self.shares)


def excess(found: dict[str, float]) -> float:
    """What tells the answer, beyond what small groups explain of anything."""
    return found["answer"] - found["answer_by_chance"]


def shares(h: Tensor, world: list[Example]) -> dict[str, float]:
    """What h (n, D) is made of: of the squared length of rows brought to length 1, the share of the
    vector common to all, of what each family adds to it, of what each answer adds within its
    family, and of the rest. The four add up to 1.

    answer_by_chance: the third with the answers dealt anew within each family; small groups always
    explain a little.
    """
    h = F.normalize(h.double(), dim=1)
    families = [ex.task for ex in world]
    generator, dealt = torch.Generator().manual_seed(0), [""] * len(world)
    for family in dict.fromkeys(families):  # in the data's order: the same draw in every run
        rows = [i for i, f in enumerate(families) if f == family]
        for i, j in zip(rows, torch.randperm(len(rows), generator=generator).tolist()):
            dealt[i] = world[rows[j]].answer

    def left(groups: list) -> float:
        """Mean squared distance from the mean of one's group."""
        number = {group: n for n, group in enumerate(dict.fromkeys(groups))}
        member = F.one_hot(torch.tensor([number[group] for group in groups])).double()
        mean = member.T @ h / member.sum(0)[:, None]  # (groups, D)
        return float((h - member @ mean).square().sum(1).mean())

    common, family = left([0] * len(world)), left(families)
    answer = left([(ex.task, ex.answer) for ex in world])
    return dict(common=1 - common, family=common - family, answer=family - answer, rest=answer,
                answer_by_chance=family - left(list(zip(families, dealt))))


@torch.no_grad()
def states_of(vlm: VLM, views: list[View], hidden, batch_size: int,
              positions: tuple[str, ...]) -> dict[tuple[int, str], Tensor]:
    """h_R (n, D) for every (layer, position). hidden: function from a batch to the states (B, T, D)
    that enter each layer, and the last ones."""
    found: dict[tuple[int, str], list[Tensor]] = {}
    for start in range(0, len(views), batch_size):
        batch = collate(views[start:start + batch_size], vlm.pad_id).to(vlm.device)
        at = {position: places(batch, vlm, position) for position in positions}
        for layer, states in enumerate(hidden(batch)):
            for position in positions:
                chosen = mean_at(states.float(), at[position]).cpu()
                found.setdefault((layer, position), []).append(chosen)
    return {key: torch.cat(parts) for key, parts in found.items()}


def of_model(config: train.Config, world: list[Example]) -> dict[tuple[int, str], Tensor]:
    vlm = VLM(config.model, getattr(torch, config.dtype)).to(config.device).eval()
    examples = train.prepared(world, vlm, config)
    whole = all(len(example.images) > 1 for example in world)
    positions = POSITIONS if whole and config.target_view == "trajectory" else POSITIONS[:-1]

    def hidden(batch) -> tuple[Tensor, ...]:
        inputs = vlm.embed(batch, examples.store.encoded(batch.images))
        return vlm.family.states(**inputs, use_cache=False, output_hidden_states=True).hidden_states

    return states_of(vlm, [views.target for views in examples.views], hidden, config.batch,
                     positions)


def measured(states: dict[tuple[int, str], Tensor], world: list[Example]) -> list[State]:
    rows = []
    for (layer, position), h in states.items():
        unit = F.normalize(h, dim=1)
        gauges = losses.collapse_gauges(h, h)
        rows.append(State(layer, position, shares(h, world), shares(unit - unit.mean(0), world),
                          gauges))
    return rows


def recommended(rows: list[State]) -> State:
    """By the rule of this file's docstring."""
    middle = max(row.layer for row in rows) / 2
    late = [row for row in rows if row.layer >= middle]
    apart = [row for row in late if not collapse_hint(row.gauges, "frozen", 10)]
    return max(apart or late, key=lambda row: (round(row.excess, 3), row.layer,
                                               -POSITIONS.index(row.position)))


def table(rows: list[State]) -> str:
    """Markdown; the recommended state in bold."""
    best, last = recommended(rows), max(row.layer for row in rows)
    lines = ["| layer | position | common | family | answer | by chance | mean cosine | rank | "
             "centred: family | answer | by chance |", "|---" * 11 + "|"]
    for row in rows:
        layer = f"{row.layer} (-1)" if row.layer == last else f"{row.layer}"
        cells = [layer, row.position, *(f"{row.shares[name]:.3f}" for name in
                                        ("common", "family", "answer", "answer_by_chance")),
                 f"{row.gauges['mean_cosine']:.3f}", f"{row.gauges['effective_rank']:.1f}",
                 *(f"{row.centred[name]:.3f}" for name in ("family", "answer", "answer_by_chance"))]
        cells = [f"**{cell}**" for cell in cells] if row is best else cells
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def said(rows: list[State], what: str) -> str:
    best, last = recommended(rows), max(row.layer for row in rows)
    layer = -1 if best.layer == last else best.layer
    return (f"States of R, {what}: shares of their squared length\n\n{table(rows)}\n\n"
            f"recommended before any training: --target_layer {layer} --target_position "
            f"{best.position} (tells the answer: {best.excess:.3f} beyond chance)")


def picture(rows: list[State], what: str) -> Image.Image:
    """Beyond chance, what tells the answer: by layer, a line for a position; left as they are,
    right centred."""
    layers = sorted({row.layer for row in rows})
    charts = []
    for title, name in (("as L_JEPA sees it", "shares"), ("with the mean taken off", "centred")):
        most = math.ceil(10 * max(0.01, *(excess(getattr(row, name)) for row in rows))) / 10
        chart = Chart(f"{what}: {title}", "layer", "tells the answer, beyond chance",
                      (0, layers[-1]), (0, most), size=(640, 400), legend=100)
        chart.ticks({n: str(n) for n in layers if len(layers) < 12 or n % 5 == 0})
        for position in dict.fromkeys(row.position for row in rows):
            chart.line(position, [(row.layer, max(0.0, excess(getattr(row, name))))
                                  for row in rows if row.position == position])
        charts.append(chart.image)
    return beside(charts, 2)


def free_name(file: Path) -> None:
    """Raises FileExistsError before the work is done."""
    if file.exists():
        raise FileExistsError(f"{file} exists already: choose another name, nothing is overwritten")
