"""Settings of each arm tried on validation questions, as many for one arm as for another.

    python analysis/search.py --out runs/search --jobs 2
    python analysis/search.py --out runs/search --arms "pearl EMA" -- --test_per_task 100

One run a setting, seed 0, `single`, every learning rate the default; what follows `--` goes to
every train.py, --test_per_task for validation questions. OUT/search.md then holds what each setting
answers directly and with the expert's tool, the best of an arm in bold. It is meant for cures of a
collapsing target (baselines/anti_collapse.py) and for answers beside trajectories: the settings it
finds are written into analysis/study.py, whose runs answer test questions.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`

from analysis.study import QUESTIONS, Job, method_options, run_all
from support.files import read_json, write_text
from support.options import value_of
from support.processes import run_program
from support.tables import overall, summarise

LAMBDAS = ("--lambda_latent 0.2", "--lambda_latent 1", "--lambda_latent 5")
ANSWERS = "--share 0.1 --batch 64"
# arm -> (what all its runs have, its settings): three lambdas, and one more of the arm's own
GRIDS = {
    "pearl": ("pearl", (*LAMBDAS, "--lambda_latent 10")),
    **{arm: (method, (*LAMBDAS, "--lambda_latent 0.05")) for arm, method in {
        "pearl current target": "current", "pearl current, bias head": "bias_head+current",
        "pearl current, MLP head": "mlp_head+current",
        "pearl current, InfoNCE": "infonce+current",
        # as many bare answers a step as trajectories; a tenth of the questions has one
        "pearl and 10% answers": f"with_answers {ANSWERS}",
        "pearl, InfoNCE and 10% answers": f"infonce+with_answers {ANSWERS}"}.items()},
    "pearl current, VICReg": ("vicreg", (*(f"--vicreg 1 {one}" for one in LAMBDAS),
                                         "--vicreg 0.1 --lambda_latent 1")),
    "pearl current, SIGReg": ("sigreg", (*(f"--sigreg 0.05 {one}" for one in LAMBDAS),
                                         "--sigreg 0.5 --lambda_latent 1")),
    **{arm: (method, (*(f"--ema 0.99 {one}" for one in LAMBDAS), "--ema 0.999 --lambda_latent 1"))
       for arm, method in {"pearl EMA": "ema", "pearl EMA, MLP head": "mlp_head+ema"}.items()},
}


def plan(out: Path, arms: list[str], rest: list[str]) -> dict[tuple[str, str], Job]:
    """(arm, setting) -> its run, and validation questions to ask of it."""
    if unknown := set(arms) - GRIDS.keys():
        raise ValueError(f"unknown arm {sorted(unknown)[0]!r}: choose among {', '.join(GRIDS)}")
    # test questions must choose nothing: the run asks one of each task, and its report is not read
    common = ["--regime", "single", "--seed", "0", *rest, "--test_per_task", "1"]
    ask = ["--split", "validation", "--per_task",
           value_of("test_per_task", rest, QUESTIONS)]
    return {(arm, setting): Job(out / f"{arm} {setting}".replace("--", "").replace(" ", "_"),
                                [*method_options(f"{GRIDS[arm][0]} {setting}"), *common], ask)
            for arm in arms for setting in GRIDS[arm][1]}


def table(found: dict[tuple[str, str], list[dict]]) -> str:
    """found: (arm, setting) -> the answers to validation questions."""
    tables = {key: summarise(answers) for key, answers in found.items()}
    rows = {key: table[overall(table)] for key, table in tables.items()}
    lines = ["| arm | settings: direct / with the expert's tool |", "|---|---|"]
    for arm in dict.fromkeys(arm for arm, _ in rows):
        own, cells = {setting: row for (other, setting), row in rows.items() if other == arm}, []
        # of equals the first
        best = max(own, key=lambda setting: own[setting]["direct"][0])
        for setting, row in own.items():
            text = f"{100 * row['direct'][0]:.1f} / {100 * row['tool'][0]:.1f}"
            cells.append(f"`{setting}` {f'**{text}**' if setting == best else text}")
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
    failed = run_all(list(jobs.values()), args.jobs)
    text = table({key: read_json(file)["answers"] for key, job in jobs.items()
                  if (file := job.folder / "asked.json").is_file()})
    write_text(args.out / "search.md", text + "\n")
    print(text)
    if failed:
        sys.exit(f"{failed} runs failed; the same command repeats only them")


if __name__ == "__main__":
    run_program(main)
