"""How many of our own functions does a reader meet on the way, and in how many files?

    python tests/counts.py

Counted once images and targets are encoded. A lambda belongs to the function that holds it.
"""

import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import train  # noqa: E402
from model import VLM  # noqa: E402
from support import records, splits  # noqa: E402
from world import loader  # noqa: E402


def report(title: str, work) -> None:
    """Print the functions of this repository that run in work(), by file."""
    functions = defaultdict(set)

    def note(frame, event, argument):
        file, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname
        name = name.partition(".<locals>.<")[0]
        if event == "call" and file.is_relative_to(ROOT) and file != Path(__file__):
            functions[file.relative_to(ROOT)].add(name)

    sys.setprofile(note)
    work()
    sys.setprofile(None)
    print(f"{title}: {sum(map(len, functions.values()))} functions in {len(functions)} files")
    for file, names in sorted(functions.items()):
        print(f"    {file}: {', '.join(sorted(names))}")


if __name__ == "__main__":
    folder, config = Path(tempfile.mkdtemp()) / "data", train.Config(device="cpu")
    records.write_folder(folder, loader.examples("single", "train", 2))
    examples, questions = splits.read_folder(folder), loader.questions("single", 1)
    evaluator = evaluate.Evaluator(VLM(config.model), questions)
    method = train.Pearl(VLM(config.model), config)

    def line():
        (batch,) = train.dataset(method, examples, "train").micro_batches([0, 1], 2)
        return batch, method(batch)

    def answer():
        again = evaluate.Evaluator(evaluator.vlm, questions)
        again.encode_images = evaluator.encode_images
        return again.direct()

    evaluator.direct()  # one run of each first: images and targets are then kept
    batch, _ = line()
    report("a training step (at most 26 in 9)", lambda: method(batch))
    report("a line to its loss (60 in 11)", line)
    report("a question to its answer (25 in 7)", answer)
