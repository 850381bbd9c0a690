"""The whole comparison by one command: systems, regimes, seeds, one result file a run, resumable.

    python analysis/study.py --out runs/study --seeds 0 1 2 --jobs 2    # then analysis/figures.py
    python analysis/study.py --out runs/study --arms sft pearl --regimes mixed -- --steps 100
    python analysis/study.py --out runs/study --base other=DIR --arms sft pearl    # a second base
    python analysis/study.py --out runs/record --record --regimes single --arms sft pearl \\
        --seeds 0 1 2 -- --steps 200 --call_limit 0    # what train.py sets beside its own

What follows `--` goes to every train.py (--steps is 300 without it). A run with results.json is
not repeated; the remains of one that was interrupted are renamed, never deleted. At the end
OUT/BASE/REGIME.md holds the table of systems, REGIME.json its numbers; --record writes
analysis/recorded.json besides.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before any other `analysis`

from analysis.tables import arms, compare, corrected, markdown
from support import recorded
from support.files import read_json, write_json, write_text
from support.processes import run_program
from support.tables import summarise
from world.scenes import REGIMES

RECON = "--method recon --latents 4 --decode_latents 4"
# No fine-tuning is measured by every run before it starts, explicit tool use by asking the sft runs
SYSTEMS = {
    "sft": "--method sft --call_limit 3",
    "direct": "--method direct",
    "recon": f"{RECON} --lambda_latent 1",
    "pearl": "--method pearl",
}
ABLATIONS = {
    "sft lr 3e-4": "--method sft --lr 3e-4",
    # as many trajectories a step as the others, and as many answers
    "sft and direct": "--method both --batch 64",
    # each method's best of six settings on validation (RESULTS.md)
    "sft searched": "--method sft --lr 1e-4 --lora_dropout 0.1",
    "direct searched": "--method direct --lr 3e-4",
    "recon searched": f"{RECON} --lr 3e-4 --lambda_latent 0.1",
    "pearl searched": "--lambda_latent 10",
    "pearl current target": "--target_encoder current --lambda_latent 1",
    "pearl as in the paper": "--recipe paper",
    # its own learning rate, 1e-5, is one for billions of parameters
    "pearl as released": "--recipe release --lr 1e-3",
    "pearl without NextLat": "--nextlat_view none",
    "pearl without JEPA": "--jepa false",
    **{f"pearl K={k}": f"--pred_tokens {k}" for k in (0, 1, 2, 8)},
    **{f"pearl {name}": f"--distance {name}" for name in ("smoothl1", "mse", "l2")},
    "pearl NextLat on R": "--nextlat_view trajectory",
    "pearl target with I0": "--target_view trajectory_with_image",
    "pearl shuffled targets": "--targets shuffled",
    "pearl random targets": "--targets random",
    "pearl family targets": "--targets family",
    "pearl answer targets": "--targets answer",
    "recon one latent a patch": "--method recon --decode_latents 16 --lambda_latent 1",
    "sft image first": "--method sft --order image_first",
    "pearl image first": "--order image_first",
    "recon image first": f"{RECON} --lambda_latent 1 --order image_first",
}
CURRENT = "--target_encoder current"
ABLATIONS |= {
    # cures for a collapsing target (baselines/cures.py) in `single`, 200 steps, each with the best
    # of four settings on validation (analysis/search.py; RESULTS.md)
    "pearl, frozen target": "--lambda_latent 1",
    "pearl, current target": f"{CURRENT} --lambda_latent 5",
    "pearl, bias head": f"{CURRENT} --lambda_latent 5 --pred_head bias",
    "pearl, MLP head": f"{CURRENT} --lambda_latent 1 --pred_head mlp",
    "pearl, InfoNCE": f"{CURRENT} --lambda_latent 5 --distance infonce",
    "pearl, VICReg": f"{CURRENT} --lambda_latent 1 --vicreg 1",
    "pearl, SIGReg": f"{CURRENT} --lambda_latent 1 --sigreg 0.05",
    "pearl, EMA": "--target_encoder ema --lambda_latent 1 --ema 0.999",
    "pearl, EMA, MLP head": "--target_encoder ema --lambda_latent 1 --ema 0.999 --pred_head mlp",
    # variants, with the setting of what they vary
    "pearl, InfoNCE with mates": f"{CURRENT} --lambda_latent 5 --distance infonce "
                                 "--infonce_masked false",
    "pearl, InfoNCE, frozen target": "--lambda_latent 5 --distance infonce",
    "pearl, InfoNCE with mates, frozen target": "--lambda_latent 5 --distance infonce "
                                                "--infonce_masked false",
    "pearl, std alone": f"{CURRENT} --lambda_latent 1 --vicreg 1 --vicreg_terms std",
    "pearl, EMA rising": "--target_encoder ema --lambda_latent 1 --ema 0.99 --ema_rises",
    # another state of R, by the frozen model; which, analysis/targets.py --layers recommends
    **{f"pearl target {place}": f"--target_position {place}" for place in
       ("word", "words", "image")},
    **{f"pearl target {place} of layer 2": f"--target_position {place} --target_layer 2"
       for place in ("end", "word", "words", "image")},
    # a share of the questions as bare answers too, as many a step as trajectories; lambda: the
    # best of four on validation, at a tenth of the questions (analysis/search.py)
    **{f"{name} and {share:.0%} answers": f"{options} --with_answers {share} --batch 64"
       for share in (0.01, 0.1, 1.0) for name, options in {
           "sft": "--method sft", "pearl": "--lambda_latent 0.2",
           "pearl, InfoNCE": "--lambda_latent 5 --distance infonce"}.items()},
}
ARMS = SYSTEMS | ABLATIONS
FIRST = "mixed"  # the regime in which the ablations run
STEPS = 300  # of every run, whatever train.py's default is: RESULTS.md's tables are of so many


def plan(args) -> list[tuple[Path, list[str]]]:
    """(run folder, arguments of train.py), the headline systems first. args: see main."""
    if unknown := set(args.arms or ()) - ARMS.keys():
        raise ValueError(f"unknown arm {sorted(unknown)[0]!r}: choose among {', '.join(ARMS)}")
    name, _, model = args.base.partition("=")
    jobs = []
    for arms, regimes in ((SYSTEMS, args.regimes), (ABLATIONS, args.regimes[:1])):
        for seed in args.seeds:
            for regime in regimes:
                for arm in (arm for arm in arms if not args.arms or arm in args.arms):
                    out = args.out / name / regime / f"{arm.replace(' ', '_')}-seed{seed}"
                    options = [*arms[arm].split(), "--regime", regime, "--seed", str(seed),
                               "--out", str(out), "--steps", str(STEPS)]
                    options += ["--model", model] if model else []
                    jobs.append((out, options + args.rest))
    return jobs


def run_one(out: Path, options: list[str], threads: int) -> str:
    if (out / "results.json").is_file():
        return "done before"
    if out.exists():
        n = 1
        while (kept := out.with_name(f"{out.name}.interrupted-{n}")).exists():
            n += 1
        out.rename(kept)
    out.parent.mkdir(parents=True, exist_ok=True)
    start = time.time()
    with open(out.with_name(out.name + ".txt"), "w", encoding="utf-8") as log:
        code = subprocess.run([sys.executable, str(ROOT / "train.py"), *options], stdout=log,
                              stderr=subprocess.STDOUT,
                              env={**os.environ, "OMP_NUM_THREADS": str(threads)}).returncode
    return f"{(time.time() - start) / 60:.1f} minutes" if code == 0 else f"FAILED: see {log.name}"


def run_all(jobs: list[tuple[Path, list[str]]], side_by_side: int) -> int:
    """Every (run folder, arguments of train.py) that is not done; how many failed."""
    threads, failed = max(1, (os.cpu_count() or 1) // side_by_side), 0
    with ThreadPoolExecutor(side_by_side) as pool:
        results = pool.map(lambda job: run_one(*job, threads), jobs)
        for n, ((out, _), result) in enumerate(zip(jobs, results), start=1):
            failed += result.startswith("FAILED")
            print(f"{n}/{len(jobs)} {out}: {result}", flush=True)
    return failed


def arm_of(run: str) -> str:
    """The arm of a run folder's name."""
    return run.rpartition("-seed")[0].replace("_", " ")


def named(configs: dict[str, dict]) -> dict[str, str]:
    """Run -> its arm: the name under which a study made it, or else as tables.arms names it."""
    return {run: arm if (arm := arm_of(Path(run).name)) in ARMS else other
            for run, other in arms(configs).items()}


def finished_runs(folder: Path) -> dict[str, dict]:
    """The finished runs of one regime's folder by name, in the order of the arms: config, answers,
    answers before, times."""
    files = [file for file in sorted(folder.glob("*-seed*/results.json"))
             if ".interrupted-" not in file.parent.name]
    place = {arm: n for n, arm in enumerate(ARMS)}  # an arm that is gone comes last
    files.sort(key=lambda file: place.get(arm_of(file.parent.name), len(place)))
    return {file.parent.name: dict(config=read_json(file.parent / "config.json"), **read_json(file))
            for file in files}


def tables(folder: Path, against: str) -> None:
    """REGIME.md and REGIME.json of every regime below a base's folder, from all runs there, each
    arm compared with `against`."""
    for regime in sorted(p for p in folder.iterdir() if p.is_dir()):
        if runs := finished_runs(regime):
            rows = compare(runs, against, names={run: arm_of(run) for run in runs})
            text = f"{markdown(rows, against)}\n\n{corrected(rows, against)}"
            write_json(folder / f"{regime.name}.json", rows)
            write_text(folder / f"{regime.name}.md", text + "\n")
            print(f"\n{folder.name}, {regime.name}\n{text}")


# ---- numbers that train.py sets beside its own --------------------------------------------------


def percentages(tables: list[dict]) -> dict[str, dict]:
    """Tables of several seeds (analysis/tables.py) as one: of each family n, chance, and of each
    way to answer one accuracy in % a seed."""
    first = tables[0]
    return {family: dict(n=row["n"], chance=100 * row["chance"],
                         **{way: [round(100 * table[family][way][0], 2) for table in tables]
                            for way in ("direct", "free", "tool") if way in row})
            for family, row in first.items()}


def record_of(runs: dict[str, Path], command: str) -> dict:
    """One arm's runs of several seeds as a record (support/recorded.py). ValueError unless all were
    made with one set of settings, by one commit and nothing beside it."""
    configs = [read_json(run / "config.json") for run in runs.values()]
    made_by = [read_json(run / "environment.json") for run in runs.values()]
    settings = [recorded.settings_of(config) for config in configs]
    names = ", ".join(map(str, runs.values()))
    if any(other != settings[0] for other in settings):
        raise ValueError(f"{names} have different settings: record them apart")
    commits = {environment["commit"] for environment in made_by}
    if len(commits) > 1 or None in commits or any(e["changed_files"] for e in made_by):
        raise ValueError(f"{names} were not all made by one commit without changes: run them anew "
                         "from a clean checkout, so that the record can name it")
    results = [read_json(run / "results.json") for run in runs.values()]
    return dict(method=configs[0]["method"], seeds=[config["seed"] for config in configs],
                command=command, commit=commits.pop(), settings=settings[0],
                before=percentages([summarise(results[0]["before"])]),
                table=percentages([summarise(result["answers"]) for result in results]))


def record(folders: list[Path], command: str) -> None:
    """analysis/recorded.json with the sft and pearl runs below these regimes' folders; records of
    other settings that are in it stay."""
    file = recorded.FILE
    kept = read_json(file)["records"] if file.is_file() else []
    for folder in folders:
        for arm in ("sft", "pearl"):
            runs = {run: folder / run for run in finished_runs(folder) if arm_of(run) == arm}
            if runs:
                new = record_of(runs, command)
                kept = [old for old in kept if (old["method"], old["settings"])
                        != (new["method"], new["settings"])] + [new]
    write_json(file, dict(written_by="analysis/study.py --record", records=kept))
    print(f"recorded in {file}")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options before `--`; `rest` is what follows it."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--base", default="tiny-vlm", metavar="NAME[=DIR]",
                        help="the base's name, and its folder if it is another")
    parser.add_argument("--arms", nargs="*", help="default: all")
    parser.add_argument("--regimes", nargs="*", choices=list(REGIMES),
                        default=[FIRST, *(name for name in REGIMES if name != FIRST)],
                        help="the systems run in all of these, the ablations in the first")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--against", default="sft", choices=list(ARMS), metavar="ARM",
                        help="the arm that the tables compare the others with")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--record", action="store_true",
                        help="write analysis/recorded.json from the sft and pearl runs")
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.rest = argv[cut + 1:]
    return args


def main() -> None:
    args = parse_args(sys.argv[1:])
    failed = run_all(plan(args), args.jobs)
    folder = args.out / args.base.partition("=")[0]
    tables(folder, args.against)
    if failed:
        sys.exit(f"{failed} runs failed; the same command repeats only them")
    if args.record:
        command = shlex.join(["python", "analysis/study.py", *sys.argv[1:]])
        record([folder / regime for regime in args.regimes], command)


if __name__ == "__main__":
    run_program(main)
