"""Read every record and every image of a data folder, as a run would, and list all faults.

    python analysis/check_data.py --data DIR --model MODEL      # takes the options of train.py

The code of a run makes the views and questions (`check_of`), so a fault that would stop train.py
at some step is found here, but not what a variant alone needs of R. The exit status is 1 if there
is one. Without --data the small world is checked.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`
import train
from support import answers, families, processes, splits
from support.chat import Chat
from support.images import few_values, load_images, open_image
from support.records import SPLITS, Example, Records

PER_PROCESS = 200  # records for which a further process pays


def check_of(examples: list[Example] | Records, chat: Chat, config: train.Config) -> Callable:
    """The check of one row, in any process."""
    tests = [example for example in examples if example.split == "test"]
    forms = {example.id: form
             for example, form in zip(tests, answers.forms(tests, config.answer_prefix))}
    method, seen = train.find_method(config.method), {}

    def check(row: int) -> tuple[str, str, int, dict[str, tuple[str, str]]]:
        """(task, split, tokens of the longest text that the run makes of it, and of each image, and
        of a faulty record, the fault and the values if they are few)"""
        example, tokens = examples[row], 0
        where = examples.where(row) if config.data else f"record {example.id}"
        results = {str(image): look(image, where) for image in example.images
                   if isinstance(image, Path)}
        # the code of a run would stop at a faulty image, which is listed already
        if not any(fault for fault, _ in results.values()):
            try:
                tokens = token_count(example)
            except ValueError as error:
                results[where] = f"{where}: {error}", ""
        return example.task, example.split, tokens, results

    def look(file: Path, where: str) -> tuple[str, str]:
        if file not in seen:  # many records may name an image; a process opens it once
            try:
                seen[file] = "", few_values(file, open_image(file, where))
            except (ValueError, OSError) as error:
                seen[file] = str(error), ""
        return seen[file]

    def token_count(example: Example) -> int:
        if example.split == "test":
            images = load_images(example, chat.family)
            return len(chat.question(example, images, forms[example.id]).started.ids)
        # a method may learn from a record in two ways, or only from its answer
        views = [method.views(config, chat, record, load_images(record, chat.family))
                 for record in method.records([example], config)]
        return max(len(view.ids) for part in views for view in part)

    return check


def check_data(config: train.Config) -> None:
    """Print what the data hold. Raises ValueError listing all faults."""
    faults: list[str] = []
    family = families.load_family(config.model, config.min_pixels, config.max_pixels)
    chat = Chat(family, family.lm.config.text_config.max_position_embeddings)
    examples = list(chain(*splits.load_splits(config))) if not config.data else splits.read_folder(
        config.data, config.answer_prefix, problems=faults, by_pixels=True)
    check, count = check_of(examples, chat, config), len(examples)
    workers = min(os.cpu_count(), count // PER_PROCESS)
    # the results come in the order of the rows, whichever process has them
    loader = DataLoader(range(count), 16, collate_fn=lambda rows: list(map(check, rows)),
                        num_workers=workers, multiprocessing_context="fork" if workers else None)
    checked = list(processes.progress(chain.from_iterable(loader), "checking records", count))
    results: dict[str, tuple[str, str]] = {}
    for *_, own in checked:
        # the first record that names an image counts
        results |= {name: result for name, result in own.items() if name not in results}
    faults += [fault for fault, _ in results.values() if fault]
    notes = [*examples.notes] if config.data else []
    if few := [f"{file} ({values})" for file, (_, values) in results.items() if values]:
        notes.append(f"{len(few)} images use few of their values, so that the model sees little in "
                     f"them; stretch the values to the range: {', '.join(few)}")
    if config.data:
        usable = examples[[row for row, (*_, own) in enumerate(checked)
                           if not any(fault for fault, _ in own.values())]]
        try:
            splits.limit({split: usable.split(split) for split in SPLITS}, config)
        except ValueError as error:
            faults.append(str(error))
    tasks, sides = (Counter(record[n] for record in checked) for n in (0, 1))
    print(f"{config.data or config.regime}: {len(checked)} records are well-formed; "
          + ", ".join(f"{sides[split]} {split}" for split in SPLITS))
    print("  tasks: " + ", ".join(f"{count} {task}" for task, count in tasks.items()))
    print(f"  the longest text has {max((tokens for *_, tokens, _ in checked), default=0)} tokens")
    for note in notes:
        print(f"note: {note}")
    # an image may have been opened twice: to find its split, and to check it
    if lines := [f"\n  {fault}" for fault in dict.fromkeys(faults)]:
        raise ValueError(f"{len(lines)} fault{'s' * (len(lines) > 1)}:{''.join(lines)}")


if __name__ == "__main__":
    processes.run_program(lambda: check_data(train.parse_config()))
