"""A comparison by one command: arms, regimes, seeds, one result file a run, resumable.

    python analysis/study.py --out runs/study --seeds 0 1 2 --jobs 2    # then analysis/figures.py
    python analysis/study.py --out runs/study --arms sft "pearl --lambda_latent 10" -- --steps 100
    python analysis/study.py --out runs/study --base other=DIR --arms sft pearl    # a second base
    python analysis/study.py --out runs/search --split validation --regimes single --seeds 0 \
        --arms "ema --ema 0.99" "ema --ema 0.999"    # to choose a setting: validation questions

An arm is what follows --method on the command line of train.py. What follows `--` goes to every
train.py (--steps is 300 without it). A finished run is not repeated; the remains of one that was
interrupted are renamed, never deleted. At the end OUT/BASE/REGIME.md holds the table of all runs
that are there and REGIME.json its numbers. Use another --out for other questions.
"""

import os
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor
from itertools import product, repeat
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before any other `analysis`
from analysis.compare import arm_of, comparison, read_run, run_name
from support import files, processes
from support.options import value_of
from train import Config, parse_config
from world.scenes import REGIMES

# every run measures the model before it starts, so no arm is "no fine-tuning"
SYSTEMS = ["sft", "direct", "recon --latents 4 --decode_latents 4 --lambda_latent 1", "pearl"]
STEPS = "300"  # of every run, whatever train.py's default is: RESULTS.md's tables are of so many


def run_one(folder: Path, commands: dict[str, list[str]], threads: int) -> str:
    """commands: by the file in the run's folder that each of them writes last."""
    start = time.time()
    if folder.exists() and not (folder / "results.json").is_file():
        folder.rename(folder.with_name(f"{folder.name}.interrupted-{time.time_ns()}"))
    left = [command for file, command in commands.items() if not (folder / file).is_file()]
    if not left:
        return "done before"
    folder.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(folder.with_name(f"{folder.name}.txt"), "a", encoding="utf-8") as log:
        for program, *options in left:
            command = [sys.executable, str(ROOT / program), *options]
            if subprocess.run(command, stdout=log, stderr=subprocess.STDOUT,
                              env=environment).returncode:
                return f"FAILED: see {log.name}"
    return f"{(time.time() - start) / 60:.1f} minutes"


def plan(args: Namespace) -> dict[Path, dict[str, list[str]]]:
    """All runs, seed by seed: folder -> `commands` (see run_one). An unknown method, option or
    value ends the program here, before any run."""
    name, _, model = args.base.partition("=")
    common = ["--steps", STEPS, *(["--model", model] if model else []), *args.rest]
    count = ["--per_task", value_of("test_per_task", args.rest, str(Config.test_per_task))]
    # sft is also asked to call its tools: the questions of the run again, three calls at most
    asks = {"sft": ["--call_limit", "3", *count]}
    if args.split == "validation":
        # test questions must choose nothing: the run asks one of each task, and nobody reads it
        common += ["--test_per_task", "1"]
        asks = dict.fromkeys(args.arms, ["--split", "validation", *count])
    jobs: dict[Path, dict[str, list[str]]] = {}
    for seed, regime, arm in product(args.seeds, args.regimes, args.arms):
        options = ["--method", *arm.split(), "--regime", regime, "--seed", str(seed), *common]
        parse_config(options)
        folder = args.out / name / regime / run_name(arm, seed)
        jobs[folder] = {"results.json": ["train.py", *options, "--out", str(folder)]}
        if arm in asks:
            jobs[folder]["asked.json"] = ["evaluate.py", str(folder), "--again", *asks[arm],
                                          "--json", str(folder / "asked.json")]
    return jobs


def write_tables(args: Namespace) -> None:
    """REGIME.md and REGIME.json of every regime below the base's folder, from all runs there:
    args.arms first, each compared with args.against."""
    base = args.out / args.base.partition("=")[0]
    order = {arm: n for n, arm in enumerate(args.arms)}
    last_file = "results.json" if args.split == "test" else "asked.json"
    for regime in sorted(p for p in base.iterdir() if p.is_dir()):
        folders = sorted(file.parent for file in regime.glob(f"*-seed*/{last_file}"))
        folders.sort(key=lambda folder: order.get(arm_of(folder.name), len(order)))
        if runs := {folder.name: read_run(folder, args.split) for folder in folders}:
            rows, text = comparison(runs, args.against, {run: arm_of(run) for run in runs})
            files.write_json(base / f"{regime.name}.json", rows)
            files.write_text(base / f"{regime.name}.md", text + "\n")
            print(f"\n{base.name}, {regime.name}\n{text}")


def parse_args(argv: list[str]) -> Namespace:
    """The options before `--`; `rest` is what follows it."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="tiny-vlm", metavar="NAME[=DIR]", help="or DIR's base")
    parser.add_argument("--arms", nargs="*", default=SYSTEMS, metavar="ARM",
                        help=f"as --method of train.py; default: {', '.join(SYSTEMS)}")
    parser.add_argument("--regimes", nargs="*", choices=list(REGIMES), default=list(REGIMES))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--split", choices=["test", "validation"], default="test",
                        help="whose questions the table is made of")
    parser.add_argument("--against", default="sft", metavar="ARM", help="what tables compare with")
    parser.add_argument("--jobs", type=int, default=2, choices=range(1, 65), metavar="N",
                        help="runs side by side")
    cut = argv.index("--") if "--" in argv else len(argv)
    return parser.parse_args(argv[:cut], Namespace(rest=argv[cut + 1:]))


def main() -> None:
    args = parse_args(sys.argv[1:])
    jobs, failed, threads = plan(args), 0, max(1, (os.cpu_count() or 1) // args.jobs)
    with ThreadPoolExecutor(args.jobs) as pool:
        results = pool.map(run_one, jobs, jobs.values(), repeat(threads))
        for n, (folder, result) in enumerate(zip(jobs, results), start=1):
            failed += result.startswith("FAILED")
            print(f"{n}/{len(jobs)} {folder}: {result}", flush=True)
    write_tables(args)
    if failed:
        sys.exit(f"{failed} runs failed; the same command repeats only them")


if __name__ == "__main__":
    processes.run_program(main)
