"""What do a model's answers depend on? Replace one thing, keep the rest, ask the same questions.

    python analysis/causal.py RUN [RUN ...]             # means over the seeds of an arm; minutes
    python analysis/causal.py --model MODEL [--data DIR]    # a checkpoint that was not trained here

  latents     of a recon run: zeros, noise, another question's in their place, the markers alone
  image       of the question, for a model that answers from it alone: grey, or another question's
  tool image  in the expert's trajectory, of another question: does the answer follow the image?
  untrained   nothing is replaced: tasks without a trajectory, before and after training

The controls are those of the critiques of latent visual reasoning (arXiv:2605.21642, 2605.18445,
2606.01287). All draws have fixed seeds. D: hidden size.
"""

import difflib
import random
import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`
import torch
from PIL import Image
from torch import Tensor

import evaluate
from analysis.compare import BASE, arm_of, change_text, difference, mean_std, table_of
from baselines import reconstruction
from evaluate import Evaluator
from model import VLM
from support import answers, processes, run, splits, tables
from support.images import opened, picture_digest
from support.records import Example
from support.step import adapt_all
from train import Config
from world import loader

# what a mark says of an answer
RIGHT, SAME, FOLLOWS, STAYS = "right", "unchanged", "as the image", "as the question"
ALL_FAR, GUESS = "all but near copies", "guessing"
NEAR = 2  # a question with fewer words changed is a near copy of a trained one

# by the question's id: the text of the option that was answered (None: none of them); a mark
Choices = dict[str, str | None]
Marks = dict[str, float]
# by (part, test, measure); the first test of a part replaces nothing
Results = dict[tuple[str, str, str], Marks]


def ask(model: Evaluator, examples: Sequence[Example], way: str = "direct") -> Choices:
    """The model's answers to other questions than its own."""
    evaluator = Evaluator(model.vlm, examples, model.prefix)
    return choices_of(evaluator, getattr(evaluator, way)())


def choices_of(evaluator: Evaluator, replies: list[dict]) -> Choices:
    options = [reply["option"] if "option" in reply
               else answers.says(reply["text"], ex.options, evaluator.prefix)
               for ex, reply in zip(evaluator.examples, replies)]
    return {ex.id: None if option is None else ex.options[option]
            for ex, option in zip(evaluator.examples, options)}


def matches(rows: Sequence[Example], choices: Choices, expected: Choices) -> Marks:
    # none of the options, twice, is not the same answer
    return {ex.id: int(None is not choices[ex.id] == expected[ex.id]) for ex in rows}


def right(rows: Sequence[Example], choices: Choices) -> Marks:
    return matches(rows, choices, {ex.id: ex.answer for ex in rows})


def results_of(part: str, test: str, rows: Sequence[Example], choices: Choices,
               before: Choices | None = None) -> Results:
    """before: the answers with nothing replaced; None: these are they."""
    results = {(part, test, RIGHT): right(rows, choices)}
    if before is None:
        return results | {(part, GUESS, RIGHT): {ex.id: 1 / len(ex.options) for ex in rows}}
    return results | {(part, test, SAME): matches(rows, choices, before)}


def partners(examples: list[Example], place: int, fits: Callable = lambda one, other: True
             ) -> list[tuple[Example, Example]]:
    """Each question that has one, and another question of its task with fits(question, other) whose
    picture at this place is another. place: 0, the question's own; -1, its last tool image. As far
    as they fit, no question twice before all were used."""
    pixels, pairs = {ex.id: picture_digest(ex.images[place]) for ex in examples}, {}
    for task in dict.fromkeys(ex.task for ex in examples):
        rows = [ex for ex in examples if ex.task == task]
        random.Random(0).shuffle(rows)
        for n, one in enumerate(rows):
            pairs[one.id] = next((other for other in rows[n + 1:] + rows[:n] if fits(one, other)
                                  and pixels[one.id] != pixels[other.id]), None)
    return [(ex, pairs[ex.id]) for ex in examples if pairs[ex.id]]


def fits(one: Example, other: Example, same: bool) -> bool:
    """Whether the other's tool images can take the place of one's; same: they show its answer."""
    # an answer that is no option here could not be given
    answer = one.answer == other.answer if same else one.answer != other.answer in one.options
    return answer and len(one.images) == len(other.images)


def with_tool_images(example: Example, other: Example) -> Example:
    """The example's own words, calls included, with the other's tool images."""
    images = iter(other.images[1:])
    return replace(example, trajectory=[step if isinstance(step, str) else next(images)
                                        for step in example.trajectory])


def image_tests(model: Evaluator) -> Results:
    examples, before = model.examples, choices_of(model, model.direct())
    grey = [replace(ex, image=Image.new("RGB", opened(ex.image).size, (128, 128, 128)))
            for ex in examples]
    swapped = [replace(ex, image=other.image) for ex, other in partners(examples, 0)]
    return (results_of("image", "as it is", examples, before)
            | results_of("image", "grey", grey, ask(model, grey), before)
            | results_of("image", "another question's", swapped, ask(model, swapped), before))


def tool_tests(model: Evaluator) -> Results:
    """Tool images replaced; plan and calls stay."""
    examples = [ex for ex in model.examples if len(ex.images) > 1]
    # some families can be shown one image alone
    if model.vlm.family.single_image_only or not examples:
        return {}
    results = results_of("tool image", "as it is", examples, ask(model, examples, "tool"))
    for test, same in (("another's, same answer", True), ("another's, other answer", False)):
        pairs = partners(examples, -1, partial(fits, same=same))
        rows = [with_tool_images(*pair) for pair in pairs]
        choices = ask(model, rows, "tool")
        results["tool image", test, RIGHT if same else STAYS] = right(rows, choices)
        if not same:
            follows = matches(rows, choices, {ex.id: other.answer for ex, other in pairs})
            results["tool image", test, FOLLOWS] = follows
    return results


# by the question's id: latents, (k, D) or a list of (D), run after run
Latents = dict[str, Sequence[Tensor]]


def latent_choices(evaluator: Evaluator, scale, n: int, feed: Latents) -> tuple[Choices, Latents]:
    """The answers of a recon run that feeds itself n latents a time, and the latents it made.
    feed: in place of them; a run beyond the last one there gets the last one's again."""
    examples, originals = evaluator.examples, {ex.id: [] for ex in evaluator.examples}

    def instead(number: int, k: int, latent: Tensor) -> Tensor:
        i = examples[number].id
        originals[i].append(latent.clone())
        return feed[i][k if k < len(feed[i]) else k % n - n] if i in feed else latent

    return choices_of(evaluator, reconstruction.answer(evaluator, scale, n, instead)), originals


def replacements(examples: list[Example], originals: Latents, n: int) -> dict[str, Latents]:
    """By test, the latents to feed. originals: those that the model made itself, n a run."""
    std, mean = torch.std_mean(torch.stack(sum(originals.values(), [])), dim=0, correction=0)  # (D)
    noise = {}
    for seed, ex in enumerate(examples):
        size, draw = (max(n, len(originals[ex.id])), len(mean)), torch.Generator().manual_seed(seed)
        noise[ex.id] = mean + std * torch.randn(size, generator=draw).to(mean)
    return {"zeros": {ex.id: torch.zeros(n, len(mean)) for ex in examples}, "noise": noise,
            "another question's": {ex.id: originals[other.id] for ex, other in partners(examples, 0)
                                   if originals[other.id]}}


def latent_tests(model: Evaluator, scale, n: int) -> Results:
    """The latents that a recon run feeds itself replaced, as many as before."""
    examples = [ex for ex in model.examples if len(ex.images) > 1]
    evaluator = Evaluator(model.vlm, examples, model.prefix)
    before, originals = latent_choices(evaluator, scale, n, {})
    results = results_of("latents", "its own", examples, before)
    results["latents", "its own", "with latents"] = {
        i: int(bool(latents)) for i, latents in originals.items()}
    for test, choices in (("markers alone", latent_choices(evaluator, scale, 0, {})[0]),
                          ("answered directly", choices_of(evaluator, evaluator.direct()))):
        results["latents", test, RIGHT] = right(examples, choices)
    # a model that feeds itself no latents has none to replace
    feeds = replacements(examples, originals, n) if any(originals.values()) else {}
    for test, feed in feeds.items():
        rows = [ex for ex in examples if ex.id in feed]
        choices, _ = latent_choices(evaluator, scale, n, feed)
        results |= results_of("latents", test, rows, choices, before)
    return results


class Questions(NamedTuple):
    trained: list[Example]
    untrained: dict[str, list[Example]]  # by task
    distances: dict[str, int]  # of untrained tasks: the fewest words to a trained question


def questions_of(config, per_task: int) -> Questions:
    options = vars(config) | dict(train_examples=200, test_per_task=per_task)
    records, _, tests = splits.load_splits(SimpleNamespace(**options))
    texts, tasks = {ex.question for ex in records[:2000]}, {ex.task for ex in records}
    groups: dict[str, list[Example]] = {}
    for example in tests if config.data else loader.questions("", per_task):
        if example.task not in tasks:
            groups.setdefault(example.task, []).append(example)
    distances = {task: min(words_apart(question, text) for question in {ex.question for ex in rows}
                           for text in texts) for task, rows in groups.items()}
    return Questions([ex for ex in tests if ex.task in tasks], groups, distances)


def words_apart(one: str, other: str) -> int:
    """How many words must be inserted, deleted or changed to make one the other."""
    matcher = difflib.SequenceMatcher(None, one.split(), other.split(), autojunk=False)
    return sum(max(end - start, other_end - other_start)
               for kind, start, end, other_start, other_end in matcher.get_opcodes()
               if kind != "equal")


def untrained_tests(model: Evaluator, questions: Questions) -> Results:
    marks = {task: right(rows, ask(model, rows)) for task, rows in questions.untrained.items()}
    if far := [task for task in marks if questions.distances[task] >= NEAR]:
        marks[ALL_FAR] = {i: mark for task in far for i, mark in marks[task].items()}
    return {("untrained", task, RIGHT): own for task, own in marks.items()}


def reference(key: tuple[str, str, str], results: Results, before: Results) -> Marks | None:
    """What the table subtracts from a result. before: of the model before training."""
    part, test, measure = key
    if part == "untrained":  # from the model before training itself nothing
        return before[key] if results is not before else None
    if measure == FOLLOWS:
        return results[part, test, STAYS]
    first = next(other for other in results if other[0] == part)
    return results[first] if measure == RIGHT and key != first else None


def table(systems: dict[str, list[Results]], distances: dict[str, int]) -> str:
    """Markdown: for each result its share in %, with the 95% interval (Wilson) of one seed or the
    standard deviation over seeds, and a difference. systems: first the model before training."""
    head = ["system", "part", "replaced by", "answers", "n", "% [95%] or +/- std", "- unreplaced; "
            "untrained: - before training; as the image: - as the question [95%]"]
    lines, count = [], 0
    [before] = next(iter(systems.values()))
    for name, seeds in systems.items():
        for key in seeds[0]:
            part, test, measure = key
            marks = [results[key] for results in seeds]
            against = [reference(key, results, before) for results in seeds]
            n, value, change = len(marks[0]), "no question fits", ""
            if n:
                value = mean_std([100 * statistics.mean(one.values()) for one in marks])
            if n and len(seeds) == 1 and test != GUESS:
                low, high = tables.wilson(sum(marks[0].values()), n)
                value += f" [{100 * low:.1f}, {100 * high:.1f}]"
            if against[0] and (gap := difference(marks, against)):
                change, count = change_text(*gap), count + 1
            if part == "untrained" and test in distances:
                test += f" ({distances[test]} words apart)"
            lines.append([name, part, test, measure, str(n), value, change])
    return (f"{table_of(head, lines)}\n\n{count} differences. An interval that holds 0 shows no "
            "difference; one in twenty intervals of 95% misses the true value by chance.")


@torch.no_grad()
def tests_of(vlm: VLM, config, questions: Questions, checkpoint=None) -> Results:
    model = Evaluator(vlm.eval(), adapt_all(questions.trained, config), config.answer_prefix)
    if "recon" in config.method.split("+"):
        scale = reconstruction.load_scale(checkpoint, vlm)
        results = latent_tests(model, scale, config.decode_latents)
    else:
        results = image_tests(model) | tool_tests(model)
    return results | untrained_tests(model, questions)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--model", default="", help="without runs: a checkpoint or hub id")
    parser.add_argument("--data", default="", help="a data folder; default: the runs' own")
    parser.add_argument("--per_task", type=int, default=200, help="test questions of each task")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if bool(args.runs) == bool(args.model):
        parser.error("name RUN folders, or --model")
    runs = [run.config_and_checkpoint(path) for path in args.runs]
    if len({(Path(config.model).name, config.data or config.regime) for config, _ in runs}) > 1:
        raise ValueError(f"{', '.join(map(str, args.runs))} differ in base, data or regime: name "
                         "runs of one setting")
    first = runs[0][0] if runs else Config(model=args.model)
    base = SimpleNamespace(**vars(first) | dict(method="sft", data=args.data or first.data))
    questions = questions_of(base, args.per_task)
    if not questions.trained:
        raise ValueError("there is no test question of a trained task: name other --data")
    vlm = VLM(base.model, base.dtype).to(args.device)
    systems = {BASE: [tests_of(vlm, base, questions)]}
    for path, (config, checkpoint) in zip(args.runs, runs):
        vlm = evaluate.load_model(path, args.device)[0]
        results = tests_of(vlm, config, questions, checkpoint)
        systems.setdefault(arm_of(path.name), []).append(results)
    print(table(systems, questions.distances))


if __name__ == "__main__":
    processes.run_program(main)
