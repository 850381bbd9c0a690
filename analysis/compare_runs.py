"""Runs on disk beside one another: what `python evaluate.py RUN ...` prints and writes."""

import argparse
from pathlib import Path

import torch

import evaluate
from analysis.tables import comparison
from model import VLM
from support.files import read_json, write_json, write_text
from support.tables import format_table, summarise
from world.loader import test_examples


def read_run(run: Path, args) -> dict:
    """config, answers, answers before and times of a run: from results.json, or asked anew."""
    if not (args.again or args.data):
        if not (run / "results.json").is_file():
            raise FileNotFoundError(f"{run / 'results.json'} not found: {run} is not a finished "
                                    "run; --again asks its best checkpoint")
        return {"config": read_json(run / "config.json"), **read_json(run / "results.json")}
    vlm, config, scale = evaluate.load_run(run, args.device)
    outside = args.outside_images or config.get("outside_images", False)
    examples = test_examples(args.data or config["data"], config["regime"], args.per_family,
                             config["world_seed"], outside=outside,
                             answer_prefix=config["answer_prefix"])
    latents = config["decode_latents"] if args.latents is None else args.latents
    return dict(config=config, **evaluate.ask(vlm, examples, config["answer_prefix"],
                                              args.call_limit, scale, latents, args.free_tokens))


def run(parser: argparse.ArgumentParser) -> None:
    """`python evaluate.py`: tables of runs and of an untrained checkpoint."""
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    for name, kind, default, meaning in (
            ("model", str, "", "also this checkpoint or hub id, untrained"),
            ("data", str, "", "a data folder; default: each run's own"),
            ("answer_prefix", str, "Answer:", "with --model: what its answers begin with"),
            ("json", Path, None, "write tables and every answer there"),
            ("markdown", Path, None, "write the table over systems there"),
            ("per_family", int, 200, "with --again: test questions of each family of the world"),
            ("free_tokens", int, 0, "with --again: of a free answer; 0: what the longest needs"),
            ("call_limit", int, 0, "with --again: explicit tool use, at most so many calls"),
            ("latents", int, None, "with --again: decoded by recon; default: --decode_latents"),
            ("device", str, "cuda" if torch.cuda.is_available() else "cpu", "any of PyTorch's")):
        parser.add_argument(f"--{name}", type=kind, default=default, help=meaning)
    parser.add_argument("--outside_images", action="store_true", help="--data may lead elsewhere")
    parser.add_argument("--again", action="store_true", help="ask anew, not from results.json")
    parser.add_argument("--causal", action="store_true",
                        help="what do answers depend on? Replace latents, images, tool images")
    args = parser.parse_args()
    if not args.runs and not args.model:
        parser.error("name at least one RUN folder, or --model")
    if args.causal:
        from analysis import causal  # here, and not above: it asks in ways of its own

        causal.run(args)
        return
    found = {str(run): read_run(run, args) for run in args.runs}
    columns = {name: summarise(run["answers"]) for name, run in found.items()}
    said = {name: run["answers"] for name, run in found.items()}
    if args.model:
        examples = test_examples(args.data, "", args.per_family, 0, outside=args.outside_images,
                                 answer_prefix=args.answer_prefix)
        vlm = VLM(args.model).to(args.device)
        said[args.model] = evaluate.answer_questions(
            vlm, examples, args.answer_prefix, args.free_tokens, args.call_limit)
        columns = {args.model: summarise(said[args.model]), **columns}
    print(format_table(columns))
    systems, table = comparison(found) if found else ([], "")
    if len(found) > 1:
        print("\n" + table)
    if args.json:
        tables = {name: dict(table=columns[name], answers=said[name]) for name in columns}
        write_json(args.json, dict(tables, systems=systems) if systems else tables)
    if args.markdown:
        write_text(args.markdown, table + "\n")
