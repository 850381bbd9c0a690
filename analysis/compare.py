"""Several runs in one table, and a table over systems: means over seeds, paired differences.

    python analysis/compare.py RUN RUN ...                 # from what the runs wrote
    python analysis/compare.py RUN RUN tiny-vlm --again    # asks all anew; a checkpoint beside them
    python analysis/compare.py RUN RUN --json FILE         # the tables and every answer

Runs of one arm and several seeds are one row. Only runs of one base, training set and set of
questions are averaged or subtracted. The other options are those of evaluate.py.
"""

import sys
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`

import evaluate
from analysis.tables import comparison, read_run
from support.files import read_json, write_json
from support.options import parse
from support.processes import run_program
from support.tables import format_table, summarise


def answers_of(path: Path, options: evaluate.Options) -> dict:
    """The answers of a run or checkpoint, stored or asked for; of a run also its config."""
    if (path / "results.json").is_file() and not (options.again or options.data):
        return read_run(path)
    run = dict(answers=evaluate.ask(str(path), options))
    # a checkpoint has a config.json too, of another kind
    if (path / "best.json").is_file():
        run["config"] = read_json(path / "config.json")
    return run


def main() -> None:
    paths = list(takewhile(lambda argument: not argument.startswith("-"), sys.argv[1:]))
    rest = sys.argv[1 + len(paths):] if paths else ["--help"]
    options = parse(evaluate.Options, rest, __doc__)
    models = {path: answers_of(Path(path), options) for path in paths}
    columns = {path: summarise(model["answers"]) for path, model in models.items()}
    print(format_table(columns))
    runs = {path: model for path, model in models.items() if "config" in model}
    rows, text = comparison(runs) if runs else ([], "")
    if len(runs) > 1:
        print(f"\n{text}")
    if options.json:
        tables = {path: dict(table=columns[path], answers=models[path]["answers"])
                  for path in paths}
        write_json(Path(options.json), dict(tables, systems=rows))


if __name__ == "__main__":
    run_program(main)
