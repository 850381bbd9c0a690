"""The whole comparison by one command: systems, regimes, seeds, one result file a run, resumable.

    python analysis/study.py --out runs/study --seeds 0 1 2 --jobs 2    # then analysis/figures.py
    python analysis/study.py --out runs/study --arms sft pearl --regimes mixed -- --steps 100
    python analysis/study.py --out runs/study --base other=DIR --arms sft pearl    # a second base

What follows `--` goes to every train.py (--steps is 300 without it). A finished run is not
repeated; the remains of one that was interrupted are renamed, never deleted. At the end
OUT/BASE/REGIME.md holds the table of systems and REGIME.json its numbers.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product, repeat
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before any other `analysis`

from analysis.tables import comparison, read_run
from support.files import write_json, write_text
from support.options import value_of
from support.processes import run_program
from train import Config
from world.scenes import REGIMES

RECON = "recon --latents 4 --decode_latents 4"
# arm -> --method, and the options of the run. Every run measures no fine-tuning before it starts.
SYSTEMS = {"sft": "sft", "direct": "direct", "recon": f"{RECON} --lambda_latent 1",
           "pearl": "pearl"}
ABLATIONS = {
    "sft lr 3e-4": "sft --lr 3e-4",
    # as many trajectories a step as the others, and as many answers
    "sft and direct": "both --batch 64",
    # each method's best of six settings on validation (RESULTS.md)
    "sft searched": "dropout+sft --lora_dropout 0.1 --lr 1e-4",
    "direct searched": "direct --lr 3e-4",
    "recon searched": f"{RECON} --lr 3e-4 --lambda_latent 0.1",
    "pearl searched": "pearl --lambda_latent 10",
    "pearl current target": "current --lambda_latent 1",
    # the release's own learning rate, 1e-5, is one for billions of parameters
    "pearl as in the paper": "paper", "pearl as released": "release --lr 1e-3",
    "pearl without NextLat": "no_nextlat", "pearl without JEPA": "no_jepa",
    **{f"pearl K={k}": f"pearl --pred_tokens {k}" for k in (0, 1, 2, 8)},
    **{f"pearl {name}": f"pearl --distance {name}" for name in ("smoothl1", "mse", "l2")},
    "pearl shuffled targets": "shuffled", "pearl random targets": "random",
    "pearl family targets": "task_mean", "pearl answer targets": "answer_mean",
    "recon one latent a patch": "recon --decode_latents 16 --lambda_latent 1",
    "sft image first": "image_first+sft", "pearl image first": "image_first",
    "recon image first": f"image_first+{RECON} --lambda_latent 1",
    # cures for a collapsing target (baselines/anti_collapse.py) in `single`, 200 steps, each with
    # the best of four settings on validation (analysis/search.py; RESULTS.md)
    "pearl, frozen target": "pearl --lambda_latent 1",
    "pearl, current target": "current --lambda_latent 5",
    "pearl, bias head": "bias_head+current --lambda_latent 5",
    "pearl, MLP head": "mlp_head+current --lambda_latent 1",
    "pearl, InfoNCE": "infonce+current --lambda_latent 5",
    "pearl, VICReg": "vicreg --vicreg 1 --lambda_latent 1",
    "pearl, SIGReg": "sigreg --sigreg 0.05 --lambda_latent 1",
    "pearl, EMA": "ema --ema 0.999 --lambda_latent 1",
    "pearl, EMA, MLP head": "mlp_head+ema --ema 0.999 --lambda_latent 1",
    # variants, with the setting of what they vary
    "pearl, InfoNCE with mates": "infonce+current --infonce_masked false --lambda_latent 5",
    "pearl, InfoNCE, frozen target": "infonce --lambda_latent 5",
    "pearl, InfoNCE with mates, frozen target": "infonce --infonce_masked false --lambda_latent 5",
    "pearl, std alone": "vicreg --vicreg 1 --vicreg_terms std --lambda_latent 1",
    "pearl, EMA rising": "ema --ema 0.99 --ema_rises true --lambda_latent 1",
    # another state of R, by the frozen model (analysis/targets.py --layers recommends one)
    **{f"pearl target {place}": f"target_state --target_position {place}"
       for place in ("word", "words", "image")},
    **{f"pearl target {place} of layer 2": f"target_state --target_position {place} "
       "--target_layer 2" for place in ("end", "word", "words", "image")},
    # a share of the questions as bare answers too, as many a step as trajectories; lambda: the
    # best of four on validation, at a tenth of the questions (analysis/search.py)
    **{f"{name} and {share:.0%} answers": f"with_answers+{options} --share {share} --batch 64"
       for share in (0.01, 0.1, 1.0) for name, options in {
           "sft": "sft", "pearl": "pearl --lambda_latent 0.2",
           "pearl, InfoNCE": "infonce --lambda_latent 5"}.items()},
}
ARMS = SYSTEMS | ABLATIONS
FIRST = "mixed"  # the regime in which the ablations run
STEPS = "300"  # of every run, whatever train.py's default is: RESULTS.md's tables are of so many
QUESTIONS = str(Config.test_per_task)  # of each task that a run is asked


# ---- runs side by side --------------------------------------------------------------------------


class Job(NamedTuple):
    """A run of train.py. ask: options of an evaluate.py that then writes the run's asked.json."""

    folder: Path
    options: list[str]
    ask: list[str]


def run_one(job: Job, threads: int) -> str:
    folder, asked, commands, start = job.folder, job.folder / "asked.json", [], time.time()
    if not (folder / "results.json").is_file():
        commands.append(["train.py", *job.options, "--out", str(folder)])
        if folder.exists():
            folder.rename(folder.with_name(f"{folder.name}.interrupted-{time.time_ns()}"))
    if job.ask and not asked.is_file():
        commands.append(["evaluate.py", str(folder), "--again", *job.ask, "--json", str(asked)])
    if not commands:
        return "done before"
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(folder.with_name(f"{folder.name}.txt"), "a", encoding="utf-8") as log:
        for program, *options in commands:
            command = [sys.executable, str(ROOT / program), *options]
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT,
                              env=environment).returncode:
                return f"FAILED: see {log.name}"
    return f"{(time.time() - start) / 60:.1f} minutes"


def run_all(jobs: list[Job], side_by_side: int) -> int:
    """Every job that is not done; how many failed."""
    threads, failed = max(1, (os.cpu_count() or 1) // side_by_side), 0
    with ThreadPoolExecutor(side_by_side) as pool:
        results = pool.map(run_one, jobs, repeat(threads))
        for n, (job, result) in enumerate(zip(jobs, results), start=1):
            failed += result.startswith("FAILED")
            print(f"{n}/{len(jobs)} {job.folder}: {result}", flush=True)
    return failed


# ---- what a study runs, and what it finds -------------------------------------------------------


def method_options(arm: str, track: int = 0) -> list[str]:
    """Options of train.py for an arm as it is written above. track: see --method tracked."""
    method, *options = f"tracked+{arm} --track {track}".split() if track else arm.split()
    return ["--method", method, *options]


def plan(args: argparse.Namespace) -> list[Job]:
    """The headline systems first. args: see parse_args."""
    if unknown := set(args.arms or ()) - ARMS.keys():
        raise ValueError(f"unknown arm {sorted(unknown)[0]!r}: choose among {', '.join(ARMS)}")
    (name, _, model), jobs = args.base.partition("="), []
    # sft is also asked to call its tools: the questions of the run again, three calls at most
    calls = ["--call_limit", "3", "--per_task", value_of("test_per_task", args.rest, QUESTIONS)]
    for own, regimes in ((SYSTEMS, args.regimes), (ABLATIONS, args.regimes[:1])):
        chosen = [arm for arm in own if not args.arms or arm in args.arms]
        for seed, regime, arm in product(args.seeds, regimes, chosen):
            options = [*method_options(own[arm], args.track), "--regime", regime,
                       "--seed", str(seed), "--steps", STEPS]
            options += ["--model", model] if model else []
            folder = args.out / name / regime / f"{arm.replace(' ', '_')}-seed{seed}"
            jobs.append(Job(folder, options + args.rest, calls if arm == "sft" else []))
    return jobs


def arm_of(run: str) -> str:
    """The arm of a run folder's name."""
    return run.rpartition("-seed")[0].replace("_", " ")


def finished_runs(folder: Path) -> dict[str, dict]:
    """The finished runs of one regime's folder by name (tables.read_run), in the arms' order."""
    place = {arm: n for n, arm in enumerate(ARMS)}
    runs = [file.parent for file in sorted(folder.glob("*-seed*/results.json"))]
    # an arm that is gone comes last
    runs.sort(key=lambda run: place.get(arm_of(run.name), len(place)))
    return {run.name: read_run(run) for run in runs}


def write_tables(folder: Path, against: str) -> None:
    """REGIME.md and REGIME.json of every regime below a base's folder, from all runs there, each
    arm compared with `against`."""
    for regime in sorted(p for p in folder.iterdir() if p.is_dir()):
        if runs := finished_runs(regime):
            rows, text = comparison(runs, against, {run: arm_of(run) for run in runs})
            write_json(folder / f"{regime.name}.json", rows)
            write_text(folder / f"{regime.name}.md", text + "\n")
            print(f"\n{folder.name}, {regime.name}\n{text}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options before `--`; `rest` is what follows it."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="tiny-vlm", metavar="NAME[=DIR]", help="or DIR's base")
    parser.add_argument("--arms", nargs="*", help="default: all")
    parser.add_argument("--regimes", nargs="*", choices=list(REGIMES),
                        default=[FIRST, *(name for name in REGIMES if name != FIRST)],
                        help="the systems run in all of these, the ablations in the first")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--against", default="sft", choices=list(ARMS), metavar="ARM",
                        help="the arm that the tables compare the others with")
    parser.add_argument("--track", type=int, default=0, help="as of train.py --method tracked")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.rest = argv[cut + 1:]
    return args


def main() -> None:
    args = parse_args(sys.argv[1:])
    failed = run_all(plan(args), args.jobs)
    write_tables(args.out / args.base.partition("=")[0], args.against)
    if failed:
        sys.exit(f"{failed} runs failed; the same command repeats only them")


if __name__ == "__main__":
    run_program(main)
