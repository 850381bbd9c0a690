"""How many of our own functions does a reader meet on the way, and in how many files?

    python tests/counts.py

Named functions of this repository that run in (a) a default training step, (b) the way from a line
of a data folder to its loss, (c) the way from a question to its direct answer. Images and targets
are known already. A lambda or a comprehension belongs to the function that holds it.
"""

import collections
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import train  # noqa: E402
from model import VLM  # noqa: E402
from support import records, splits  # noqa: E402
from world import loader  # noqa: E402

TARGETS = {"a step": (26, 9), "a line to its loss": (60, 11), "a question to its answer": (25, 7)}


def functions_in(work) -> dict[str, set[str]]:
    """The functions that run in work(), by file."""
    found = collections.defaultdict(set)

    def note(frame, event, argument):
        file, name = Path(frame.f_code.co_filename), frame.f_code.co_qualname
        name = name.partition(".<locals>.<")[0]
        if event == "call" and file.is_relative_to(ROOT) and "<" not in name.replace("<locals>", ""):
            found[str(file.relative_to(ROOT))].add(name)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    found.pop("tests/counts.py")
    return found


def main() -> None:
    folder, questions = Path(tempfile.mkdtemp()) / "data", loader.questions("single", 1)[:1]
    records.write_folder(folder, [record for split in ("train", "validation", "test")
                                  for record in loader.examples("single", split, 2)])
    config, known = train.Config(device="cpu", data=str(folder)), {}

    def question():
        evaluator = evaluate.Evaluator(plain, questions)
        evaluator.encode_images.kept = known
        evaluator.direct()

    def line(examples=None):
        examples = examples or splits.read_splits(config)["train"]
        (batch,) = train.dataset(method, examples, "train").passes([0, 1], 2)
        method(batch).total.backward()
        return examples, batch

    plain = VLM(config.model)
    question()
    method = train.Pearl(VLM(config.model), config)
    examples, batch = line()
    works = {"a step": lambda: method(batch), "a line to its loss": line,
             "the same, folder checked before": lambda: line(examples),
             "a question to its answer": question}
    for name, work in works.items():
        found, limits = functions_in(work), TARGETS.get(name, ("-", "-"))
        print(f"{name}: {sum(map(len, found.values()))} functions in {len(found)} files, "
              "at most {} in {}".format(*limits))
        for file, names in sorted(found.items()):
            print(f"    {file}: {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
