"""What does h_R tell? Before any training: what L_JEPA would teach, measured on the trajectories.

    python analysis/targets.py                               # shipped model: half a minute
    python analysis/targets.py --model MODEL --data DIR      # yours; takes the options of train.py

Pearl predicts h_R from image and question. What of it depends on the answer can teach answering;
what is common to all trajectories, or to all of a family, cannot. RESULTS.md ("What h_R tells")
shows what becomes of Pearl where h_R hardly tells the answer. Families and answers must repeat in
the data: with an answer of its own for every record there is nothing to average, and
answer_by_chance comes close to answer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`

import torch
import torch.nn.functional as F
from torch import Tensor

import losses
import train
from model import VLM
from support.processes import run_program
from support.records import Example
from world.loader import load_examples


def shares(h: Tensor, world: list[Example]) -> dict[str, float]:
    """What h (n, D) is made of: of the squared length of rows brought to length 1, the share of the
    vector common to all, of what each family adds to it, of what each answer adds within its
    family, and of the rest. The four add up to 1.

    answer_by_chance: the third with the answers dealt anew within each family; small groups always
    explain a little.
    """
    h = F.normalize(h.double(), dim=1)
    families = [ex.family for ex in world]
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
    answer = left([(ex.family, ex.answer) for ex in world])
    return dict(common=1 - common, family=common - family, answer=family - answer, rest=answer,
                answer_by_chance=family - left(list(zip(families, dealt))))


def report(config: train.Config) -> str:
    world = load_examples(config)[0][:config.train_examples]
    vlm = VLM(config.model, getattr(torch, config.dtype)).to(config.device).eval()
    examples, rows = train.prepared(world, vlm, config), list(range(len(world)))
    train.cache_targets(vlm, examples, rows, config)
    targets = torch.stack([examples.targets[row] for row in rows])
    found, gauges = shares(targets, world), losses.collapse_gauges(targets, targets)
    return (f"h_R of {config.model} on {len(world)} trajectories of "
            f"{config.data or config.regime}, shares of its squared length:\n"
            f"  {found['common']:.3f} is common to all\n"
            f"  {found['family']:.3f} tells the family\n"
            f"  {found['answer']:.3f} tells the answer within the family "
            f"({found['answer_by_chance']:.3f} with answers dealt anew)\n"
            f"  {found['rest']:.3f} tells something else\n"
            f"mean cosine of two h_R {gauges['mean_cosine']:.3f}, effective rank "
            f"{gauges['effective_rank']:.1f}")


def main() -> None:
    print(report(train.parse_config()))


if __name__ == "__main__":
    run_program(main)
