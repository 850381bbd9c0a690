"""Settings of each arm tried on validation questions, as many for one arm as for another.

    python analysis/search.py --out runs/search --jobs 2
    python analysis/search.py --out runs/search --arms "pearl EMA" -- --test_per_family 200

One run a setting, seed 0, `single`, train.py's steps, every learning rate the default; what follows
`--` goes to every train.py. OUT/search.md then holds, of each arm, what each setting answers
directly and with the expert's tool, the best one in bold. It is meant for cures of a collapsing
target (baselines/cures.py) and for answers beside trajectories: the settings so found are written
into analysis/study.py, whose runs ask test questions.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before any other `analysis`

from analysis.study import run_all
from support.files import read_json, write_text
from support.processes import run_program
from support.tables import summarise

LAMBDAS = ("--lambda_latent 0.2", "--lambda_latent 1", "--lambda_latent 5")
CURRENT = "--target_encoder current"
# arm -> (what all its runs have, its settings): three lambdas, and one more of the arm's own
GRIDS = {
    "pearl": ("", (*LAMBDAS, "--lambda_latent 10")),
    **{arm: (f"{CURRENT} {options}", (*LAMBDAS, "--lambda_latent 0.05")) for arm, options in {
        "pearl current target": "", "pearl current, bias head": "--pred_head bias",
        "pearl current, MLP head": "--pred_head mlp",
        "pearl current, InfoNCE": "--distance infonce"}.items()},
    "pearl current, VICReg": (CURRENT, (*(f"--vicreg 1 {one}" for one in LAMBDAS),
                                        "--vicreg 0.1 --lambda_latent 1")),
    "pearl current, SIGReg": (CURRENT, (*(f"--sigreg 0.05 {one}" for one in LAMBDAS),
                                        "--sigreg 0.5 --lambda_latent 1")),
    **{arm: (f"--target_encoder ema {options}", (*(f"--ema 0.99 {one}" for one in LAMBDAS),
                                                 "--ema 0.999 --lambda_latent 1"))
       for arm, options in {"pearl EMA": "", "pearl EMA, MLP head": "--pred_head mlp"}.items()},
    # as many bare answers a step as trajectories; which share of the questions has one
    # as many bare answers a step as trajectories; a tenth of the questions has one
    **{f"{arm} and 10% answers": (f"{options} --with_answers 0.1 --batch 64",
                                  (*LAMBDAS, "--lambda_latent 0.05"))
       for arm, options in {"pearl": "", "pearl, InfoNCE": "--distance infonce"}.items()},
}


class Try(NamedTuple):
    """One run: its folder, and what train.py is called with."""

    arm: str
    setting: str
    folder: Path
    options: list[str]


def plan(out: Path, arms: list[str], rest: list[str]) -> list[Try]:
    if unknown := set(arms) - GRIDS.keys():
        raise ValueError(f"unknown arm {sorted(unknown)[0]!r}: choose among {', '.join(GRIDS)}")
    jobs = []
    for arm in arms:
        common, settings = GRIDS[arm]
        for setting in settings:
            folder = out / f"{arm} {setting}".replace("--", "").replace(" ", "_")
            jobs.append(Try(arm, setting, folder, [
                "--method", "pearl", *common.split(), *setting.split(), "--regime", "single",
                "--seed", "0", "--test_split", "validation", "--out", str(folder), *rest]))
    return jobs


def table(results: dict[str, dict[str, list[dict]]]) -> str:
    """results: arm -> setting -> the answers of its run."""
    lines = ["| arm | settings: direct / with the expert's tool |", "|---|---|"]
    for arm, settings in results.items():
        said = {}
        for setting, answers in settings.items():
            row = summarise(answers)["all"]
            said[setting] = (row["direct"][0], f"{100 * row['direct'][0]:.1f} / "
                                               f"{100 * row['tool'][0]:.1f}")
        best = max(said, key=lambda setting: said[setting][0])  # of equals the first
        cells = [f"`{setting}` {f'**{text}**' if setting == best else text}"
                 for setting, (_, text) in said.items()]
        lines.append(f"| {arm} | {', '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="*", default=list(GRIDS), help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:cut])
    jobs = plan(args.out, args.arms, sys.argv[cut + 1:])
    failed = run_all([(job.folder, job.options) for job in jobs], args.jobs)
    results: dict[str, dict] = {}
    for job in jobs:
        if (file := job.folder / "results.json").is_file():
            results.setdefault(job.arm, {})[job.setting] = read_json(file)["answers"]
    write_text(args.out / "search.md", table(results) + "\n")
    print(table(results))
    if failed:
        sys.exit(f"{failed} runs failed; the same command repeats only them")


if __name__ == "__main__":
    run_program(main)
