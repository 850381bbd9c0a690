"""Settings of each arm tried on validation questions, as many for one arm as for another.

    python analysis/search.py --out runs/search --jobs 2
    python analysis/search.py --out runs/search --arms "pearl EMA" --questions 100 -- --steps 100

One run a setting, seed 0, `single`, every learning rate the default; what follows `--` goes to
every train.py. OUT/search.md then holds, for each arm, what each setting answers directly and with
the expert's tool, the best one in bold. It is meant for cures of a collapsing target
(baselines/anti_collapse.py) and for answers beside trajectories: the settings it finds are written
into analysis/study.py, whose runs answer test questions.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`

from analysis.study import Job, method_options, run_all
from support.files import read_json, write_text
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


def plan(out: Path, arms: list[str], questions: int, rest: list[str]) -> dict[str, dict[str, Job]]:
    """Arm -> setting -> its run, asked validation questions."""
    if unknown := set(arms) - GRIDS.keys():
        raise ValueError(f"unknown arm {sorted(unknown)[0]!r}: choose among {', '.join(GRIDS)}")
    # the run's own report asks test questions, which must choose nothing: one of each task
    common = ["--regime", "single", "--seed", "0", "--test_per_task", "1", *rest]
    ask = ["--split", "validation", "--per_task", str(questions)]
    return {arm: {setting: Job(out / f"{arm} {setting}".replace("--", "").replace(" ", "_"),
                               [*method_options(GRIDS[arm][0]), *setting.split(), *common], ask)
                  for setting in GRIDS[arm][1]} for arm in arms}


def table(results: dict[str, dict[str, list[dict]]]) -> str:
    """results: arm -> setting -> the answers to validation questions."""
    lines = ["| arm | settings: direct / with the expert's tool |", "|---|---|"]
    for arm, settings in results.items():
        tables = {setting: summarise(answers) for setting, answers in settings.items()}
        rows = {setting: found[overall(found)] for setting, found in tables.items()}
        # of equals the first
        best, cells = max(rows, key=lambda setting: rows[setting]["direct"][0]), []
        for setting, row in rows.items():
            text = f"{100 * row['direct'][0]:.1f} / {100 * row['tool'][0]:.1f}"
            cells.append(f"`{setting}` {f'**{text}**' if setting == best else text}")
        lines.append(f"| {arm} | {', '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--arms", nargs="*", default=list(GRIDS), help="default: all")
    parser.add_argument("--questions", type=int, default=200, help="validation questions of a task")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:cut])
    jobs = plan(args.out, args.arms, args.questions, sys.argv[cut + 1:])
    failed = run_all([job for settings in jobs.values() for job in settings.values()], args.jobs)
    results: dict[str, dict] = {}
    for arm, settings in jobs.items():
        for setting, job in settings.items():
            if (file := job.folder / "asked.json").is_file():
                results.setdefault(arm, {})[setting] = read_json(file)["answers"]
    write_text(args.out / "search.md", table(results) + "\n")
    print(table(results))
    if failed:
        sys.exit(f"{failed} runs failed; the same command repeats only them")


if __name__ == "__main__":
    run_program(main)
