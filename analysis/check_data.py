"""Read and serialise every record once, as a run would, and report: trains nothing.

    python analysis/check_data.py --data DIR --model MODEL      # takes the options of train.py

Every rule that stops train.py stops here too, because train.py's own code is what runs: records,
images and answers (support/records.py), splits with enough records (world/loader.py), views that
fit (train.prepared), and questions that fit, asked directly and with the expert's tool
(evaluate.Answerer). Where train.py stops at the first fault, this goes on and names them all.
"""

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import evaluate  # noqa: E402
import train  # noqa: E402
from model import VLM  # noqa: E402
from support.answers import common_form  # noqa: E402
from support.images import image_size  # noqa: E402
from support.records import SPLITS, Example, read_folder  # noqa: E402
from world.loader import drawn, load_examples  # noqa: E402

SHOWN = 20  # problems that are printed


class Sizes(NamedTuple):
    """What one record takes, in tokens; 0 where the run does not serialise it so."""

    view: int  # the longest of its views
    answer: int  # its longest option, with prefix and end of turn


def check_data(config: train.Config) -> None:
    """Print what is there. Raises ValueError naming what cannot be used."""
    config = dataclasses.replace(config, feature_cache="", workers=0)
    vlm, problems, notes = VLM(config.model), [], []
    if config.data:
        examples = read_folder(config.data, config.outside_images, problems, notes,
                               config.answer_prefix)
    else:
        examples = [example for part in load_examples(config) for example in part]
    common = common_form([ex for ex in examples if ex.split == config.test_split],
                         config.answer_prefix)
    usable, sizes = [], []
    for example in examples:
        try:
            sizes.append(serialised(example, vlm, config, common))
            usable.append(example)
        except ValueError as error:
            problems.append(str(error))
    report(examples, config, vlm, sizes)
    if cut := sum(size.answer > config.free_tokens > 0 for size in sizes):
        notes.append(f"{cut} questions have options that take more than --free_tokens "
                     f"{config.free_tokens}: their free answers would be cut")
    for note in notes:
        print(f"note: {note}")
    refuse(problems, usable, config)


def serialised(example: Example, vlm: VLM, config: train.Config, common) -> Sizes:
    """As the run will, by the record's split. Raises ValueError naming the record."""
    view = answer = 0
    if example.split in ("train", "validation"):
        views = train.prepared([example], vlm, config).views
        view = max(len(view.ids) for three in views for view in three)
    if example.split == config.test_split or (example.split == "validation" and config.track):
        asker = evaluate.Answerer(vlm, [example], config.answer_prefix)
        asker.common = common  # of all questions, not of this one alone
        asker.check_lengths()
        [answer] = asker.answer_tokens()
    return Sizes(view, answer)


def report(examples: list[Example], config: train.Config, vlm: VLM, sizes: list[Sizes]) -> None:
    counts = ", ".join(f"{sum(ex.split == split for ex in examples)} {split}" for split in SPLITS)
    print(f"{config.data or config.regime}: {len(examples)} records are well-formed; {counts}")
    for family in dict.fromkeys(ex.task for ex in examples):
        calls = [len(ex.images) - 1 for ex in examples if ex.task == family]
        print(f"  {family}: {len(calls)} records, {min(calls)} to {max(calls)} tool images")
    if views := [size.view for size in sizes if size.view]:
        limit = min(config.max_tokens, vlm.max_positions)
        print(f"  tokens of the longest view: {sum(views) / len(views):.0f} on average, at most "
              f"{max(views)} (limit {limit})")
    if answers := [size.answer for size in sizes if size.answer]:
        print(f"  tokens of the longest option, with prefix and end of turn: {max(answers)}")
    if pixels := [image_size(picture) for ex in examples for picture in ex.images]:
        print(f"  images: {len(pixels)}, from {min(pixels)} to {max(pixels)} px")


def refuse(problems: list[str], usable: list[Example], config: train.Config) -> None:
    """Raises ValueError, if there is a reason: records, or splits that are left too small."""
    said = []
    if problems := list(dict.fromkeys(problems)):
        said += [f"{len(problems)} records cannot be used:", *problems[:SHOWN]]
        said += [f"... and {len(problems) - SHOWN} more"] * (len(problems) > SHOWN)
    if config.data:
        try:
            drawn(usable, config)
        except ValueError as error:
            said.append(str(error))
    if said:
        raise ValueError("\n  ".join(said))


if __name__ == "__main__":
    try:
        check_data(train.parse_config())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
