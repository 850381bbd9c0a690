"""What do a model's answers depend on? Replace one thing, keep the rest, ask the same questions.

    python analysis/causal.py RUN [RUN ...]             # means over the seeds of an arm; minutes
    python analysis/causal.py --model MODEL [--data DIR]    # a checkpoint that was not trained here

  latents     that a recon run feeds itself: zeros, noise, its first one, another question's, or the
              true ones (the tool image's visual embeddings) in their place; or markers alone
  image       of the question, for a model that answers from it alone: grey, or another question's
  tool image  in the expert's trajectory, of another question: does the answer follow the image?
  untrained   nothing is replaced: tasks without a trajectory, before and after training

The controls are those of the critiques of latent visual reasoning (arXiv:2605.21642, 2605.18445,
2606.01287). All draws have fixed seeds. Letters: B batch, D hidden size.
"""

import argparse
import difflib
import random
import statistics
import sys
from collections import defaultdict
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
from analysis.tables import arm_of, change_text, difference, mean_std, table_of
from baselines import reconstruction
from model import VLM
from support import answers, run
from support.files import write_json
from support.images import opened, picture_digest
from support.processes import run_program
from support.questions import in_batches
from support.records import Example
from support.splits import load_splits
from support.tables import wilson
from train import Config
from world import loader

# what a mark says of an answer
RIGHT, SAME, FOLLOWS, STAYS = "right", "unchanged", "as the image", "as the question"
BASE, ALL_FAR, GUESS = "no fine-tuning", "all but near copies", "guessing"
# a question with fewer words changed is a near copy of a trained one
NEAR = 2

# by the question's id: the text of the option that was answered (None: none of them); a mark
Choices = dict[str, str | None]
Marks = dict[str, float]
# by (part, test, measure); the first of a part has nothing replaced
Results = dict[tuple[str, str, str], Marks]


def matches(choices: Choices, expected: Choices) -> Marks:
    # none of the options, twice, is not the same answer
    return {i: int(text is not None and text == expected[i]) for i, text in choices.items()}


def choices_of(examples: Sequence[Example], replies: list[dict], prefix: str) -> Choices:
    """From the replies of a way to answer (evaluate.Evaluator)."""
    choices = {}
    for ex, reply in zip(examples, replies):
        option = (reply["option"] if "option" in reply
                  else answers.says(reply["text"], ex.options, prefix))
        choices[ex.id] = None if option is None else ex.options[option]
    return choices


class Subject(NamedTuple):
    """A model and the questions of its trained tasks."""

    vlm: VLM
    examples: list[Example]
    prefix: str

    def ask(self, examples: Sequence[Example], way: str = "direct") -> Choices:
        replies = getattr(evaluate.Evaluator(self.vlm, examples, self.prefix), way)()
        return choices_of(examples, replies, self.prefix)


def right(examples: Sequence[Example], choices: Choices) -> Marks:
    return matches(choices, {ex.id: ex.answer for ex in examples})


def chance(examples: Sequence[Example]) -> Marks:
    return {ex.id: 1 / len(ex.options) for ex in examples}


# ---- whose picture replaces a question's own ----------------------------------------------------


def partners(examples: list[Example], fits: Callable[[Example, Example], bool]) -> dict[int, int]:
    """For each question that has one, another question of its task with fits(question, other).

    Drawn with a fixed seed; as far as they fit, no question twice before all were used.
    """
    pairs = {}
    for task in dict.fromkeys(ex.task for ex in examples):
        order = [i for i, ex in enumerate(examples) if ex.task == task]
        random.Random(0).shuffle(order)
        for place, i in enumerate(order):
            others = order[place + 1:] + order[:place]
            pairs[i] = next((j for j in others if fits(examples[i], examples[j])), None)
    return {i: pairs[i] for i in sorted(pairs) if pairs[i] is not None}


def other_image(one: Example, other: Example) -> bool:
    return picture_digest(one.image) != picture_digest(other.image)


def other_tool_image(one: Example, other: Example) -> bool:
    return (len(one.images) == len(other.images) > 1
            and picture_digest(one.images[-1]) != picture_digest(other.images[-1]))


def same_answer(one: Example, other: Example) -> bool:
    return one.answer == other.answer and other_tool_image(one, other)


def other_answer(one: Example, other: Example) -> bool:
    # an answer that is no option here could not be given
    return one.answer != other.answer in one.options and other_tool_image(one, other)


def blanked(example: Example) -> Example:
    return replace(example, image=Image.new("RGB", opened(example.image).size, (128, 128, 128)))


def with_tool_images(example: Example, other: Example) -> Example:
    """The example's own words, calls included, with the other's tool images."""
    images = iter(other.images[1:])
    return replace(example, trajectory=[step if isinstance(step, str) else next(images)
                                        for step in example.trajectory])


def image_tests(subject: Subject) -> Results:
    examples, before = subject.examples, subject.ask(subject.examples)
    results = {("image", "as it is", RIGHT): right(examples, before),
               ("image", GUESS, RIGHT): chance(examples)}
    swapped = [replace(examples[i], image=examples[j].image)
               for i, j in partners(examples, other_image).items()]
    for test, rows in (("grey", [*map(blanked, examples)]), ("another question's", swapped)):
        choices = subject.ask(rows)
        results["image", test, RIGHT] = right(rows, choices)
        results["image", test, SAME] = matches(choices, before)
    return results


def tool_tests(subject: Subject) -> Results:
    """Tool images replaced; plan and calls stay."""
    examples = [ex for ex in subject.examples if len(ex.images) > 1]
    # some families can be shown one image alone
    if subject.vlm.family.single_image_only or not examples:
        return {}
    results = {("tool image", "as it is", RIGHT): right(examples, subject.ask(examples, "tool")),
               ("tool image", GUESS, RIGHT): chance(examples)}
    for test, fits, measure in (("another's, same answer", same_answer, RIGHT),
                                ("another's, other answer", other_answer, STAYS)):
        pairs = [(examples[i], examples[j]) for i, j in partners(examples, fits).items()]
        rows = [with_tool_images(*pair) for pair in pairs]
        choices = subject.ask(rows, "tool")
        results["tool image", test, measure] = right(rows, choices)
        if measure == STAYS:
            theirs = {ex.id: other.answer for ex, other in pairs}
            results["tool image", test, FOLLOWS] = matches(choices, theirs)
    return results


# ---- latents ------------------------------------------------------------------------------------

# (latent, its number) -> the latent that is fed; None for a question that has none to feed
Source = Callable[[Tensor, int], Tensor] | None


def latent_choices(evaluator: evaluate.Evaluator, scale, latents: int,
                   source_of: Callable[[int], Source] = lambda question: None) -> Choices:
    """The answers of a recon run that feeds itself `latents` a time, from each question's source;
    without a source its own."""

    def decode(views: list, numbers: list[int]) -> list[dict]:
        sources = [source_of(number) for number in numbers]

        def instead(inputs: Tensor, fed: list[int], is_latent: Tensor) -> Tensor:
            return torch.stack([
                source(latent, k - 1).to(latent) if source and feeds else latent
                for source, latent, k, feeds in zip(sources, inputs, fed, is_latent)])  # (B, D)

        images = evaluator.encode_images(evaluator.images(numbers))
        rows = reconstruction.generate_latent(evaluator.vlm, views, images, scale, latents,
                                              evaluator.chat.end_id, 112, instead)
        return [dict(text=evaluator.decode(ids)) for ids, _ in rows]

    replies = in_batches([q.prompt for q in evaluator.questions], decode, evaluator.batch)
    return choices_of(evaluator.examples, replies, evaluator.prefix)


def replacements(evaluator: evaluate.Evaluator, own_latents: dict[int, list[Tensor]],
                 n: int) -> dict[str, Callable[[int], Source]]:
    """By test, the source of each question's latents. own_latents: by question, the latents (D)
    that the model made itself, run after run, n a run."""
    every = torch.stack(sum(own_latents.values(), []))
    mean, std = every.mean(dim=0), every.std(dim=0, correction=0)  # (D)
    pairs = partners(evaluator.examples, other_image)

    def in_turn(latents: list[Tensor]) -> Source:
        # a run beyond the last one gets the last one's latents again
        runs = len(latents) // n
        return (lambda _, k: latents[min(k // n, runs - 1) * n + k % n]) if runs else None

    def noise(question: int) -> Source:
        draw = torch.Generator().manual_seed(question)
        return lambda latent, _: mean + std * torch.randn(len(mean), generator=draw).to(mean)

    def first(question: int) -> Source:
        started: dict[int, Tensor] = {}  # each run's own first latent
        return lambda latent, k: started.setdefault(k // n, latent)

    def true(question: int) -> Source:
        images = evaluator.images([question])[1:]
        features = [evaluator.encode_images(images)[image.key].features[0] for image in images]
        return in_turn([latent for one in features
                        for latent in reconstruction.latent_targets(one, n)])

    return {"zeros": lambda _: lambda latent, _: torch.zeros_like(latent), "noise": noise,
            "its first one repeated": first, "the true ones": true,
            "another question's": lambda question: in_turn(
                own_latents.get(pairs.get(question), []))}


def latent_tests(subject: Subject, scale, latents: int) -> Results:
    """The latents that a recon run feeds itself replaced, as many as before."""
    examples = [ex for ex in subject.examples if len(ex.images) > 1]
    evaluator = evaluate.Evaluator(subject.vlm, examples, subject.prefix)
    ask, own_latents = partial(latent_choices, evaluator, scale), defaultdict(list)
    before = ask(latents, lambda question: lambda latent, _: (
        own_latents[question].append(latent) or latent))
    results = {("latents", "its own", RIGHT): right(examples, before),
               # at least one latent was fed
               ("latents", "its own", "with latents"): {
                   ex.id: int(i in own_latents) for i, ex in enumerate(examples)},
               ("latents", GUESS, RIGHT): chance(examples),
               ("latents", "markers alone", RIGHT): right(examples, ask(0)),
               ("latents", "answered directly", RIGHT): right(examples, subject.ask(examples))}
    # a model that feeds itself no latents has none to replace
    sources = replacements(evaluator, own_latents, latents) if own_latents else {}
    for test, source_of in sources.items():
        choices = ask(latents, source_of)
        choices = {ex.id: choices[ex.id] for i, ex in enumerate(examples) if source_of(i)}
        results["latents", test, RIGHT] = right(examples, choices)
        results["latents", test, SAME] = matches(choices, before)
    return results


# ---- questions that no trajectory covers --------------------------------------------------------


class Questions(NamedTuple):
    trained: list[Example]
    untrained: dict[str, list[Example]]  # by task
    distances: dict[str, int]  # of untrained tasks: the fewest words to a trained question


def questions_of(config, per_task: int) -> Questions:
    options = vars(config) | dict(train_examples=200, test_per_task=per_task)
    records, _, tests = load_splits(SimpleNamespace(**options))
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


def untrained_tests(subject: Subject, questions: Questions) -> Results:
    results = {("untrained", task, RIGHT): right(rows, subject.ask(rows))
               for task, rows in questions.untrained.items()}
    far = {i: mark for (_, task, _), marks in results.items() for i, mark in marks.items()
           if questions.distances[task] >= NEAR}
    return results | ({("untrained", ALL_FAR, RIGHT): far} if far else {})


# ---- the table ----------------------------------------------------------------------------------


def compared_with(key: tuple[str, str, str], seeds: list[Results],
                  base: list[Results]) -> list[Marks]:
    """The same question by the base, or with nothing replaced; nothing for the base itself."""
    part, test, measure = key
    if part == "untrained":
        return [results[key] for results in base if base is not seeds]
    first = next(other for other in seeds[0] if other[0] == part)
    reference = {RIGHT: first, FOLLOWS: (part, test, STAYS)}.get(measure, key)
    return [results[reference] for results in seeds if reference != key]


def table(systems: dict[str, list[Results]], distances: dict[str, int]) -> str:
    """Markdown: for each result its share in %, with the 95% interval (Wilson) of one seed or the
    standard deviation over seeds, and the difference to what it is compared with."""
    head = ["system", "part", "replaced by", "answers", "n", "% [95%] or +/- std", "- unreplaced; "
            "untrained: - before training; as the image: - as the question [95%]"]
    lines, count = [], 0
    for name, seeds in systems.items():
        for key, marks in seeds[0].items():
            (part, test, measure), n, change = key, len(marks), ""
            shares = [100 * statistics.mean(results[key].values()) for results in seeds if n]
            value = mean_std(shares) if n else "no question fits"
            if len(shares) == 1 and test != GUESS:
                low, high = wilson(sum(marks.values()), n)
                value += f" [{100 * low:.1f}, {100 * high:.1f}]"
            if part == "untrained" and test in distances:
                test += f" ({distances[test]} words apart)"
            other = compared_with(key, seeds, systems.get(BASE, []))
            if other and (gap := difference([results[key] for results in seeds], other)):
                change, count = change_text(*gap), count + 1
            lines.append([name, part, test, measure, str(n), value, change])
    return (f"{table_of(head, lines)}\n\n{count} differences. An interval that holds 0 shows no "
            "difference; one in twenty intervals of 95% misses the true value by chance.")


@torch.no_grad()
def tests_of(vlm: VLM, config, questions: Questions, scale=None, latents: int = 0) -> Results:
    examples = [evaluate.method_of(config).adapt(ex, config) for ex in questions.trained]
    subject = Subject(vlm.eval(), examples, config.answer_prefix)
    results = (latent_tests(subject, scale, latents) if scale
               else image_tests(subject) | tool_tests(subject))
    return results | untrained_tests(subject, questions)


def measure_all(args) -> tuple[dict[str, list[Results]], dict[str, int]]:
    """All systems, the model before training first; and the distances of untrained tasks."""
    configs = {path: SimpleNamespace(**run.finished(path)[0]) for path in args.runs}
    if len({(Path(c.model).name, c.data or c.regime) for c in configs.values()}) > 1:
        raise ValueError(f"{', '.join(map(str, args.runs))} differ in base, data or regime: name "
                         "runs of one setting")
    first = next(iter(configs.values()), Config(model=args.model))
    base = SimpleNamespace(**vars(first) | dict(method="sft", data=args.data or first.data))
    questions = questions_of(base, args.per_task)
    if not questions.trained:
        raise ValueError("there is no test question of a trained task: name other --data")
    vlm = VLM(base.model, getattr(torch, base.dtype)).to(args.device)
    systems = {BASE: [tests_of(vlm, base, questions)]}
    for path, config in configs.items():
        vlm, scale, latents = evaluate.load_model(path, args.device)[0], None, 0
        if config.method.endswith("recon"):
            scale = reconstruction.load_scale(run.finished(path)[1], vlm)
            latents = args.latents or config.decode_latents
        results = tests_of(vlm, config, questions, scale, latents)
        systems.setdefault(arm_of(path.name), []).append(results)
    return systems, questions.distances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN")
    parser.add_argument("--model", default="", help="without runs: a checkpoint or hub id")
    parser.add_argument("--data", default="", help="a data folder; default: the runs' own")
    parser.add_argument("--per_task", type=int, default=200, help="test questions of each task")
    parser.add_argument("--latents", type=int, default=0, help="default: the run's decode_latents")
    parser.add_argument("--json", type=Path, help="write every mark to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if bool(args.runs) == bool(args.model):
        parser.error("name RUN folders, or --model")
    systems, distances = measure_all(args)
    print(table(systems, distances))
    if args.json:
        write_json(args.json, {name: [{"|".join(key): marks for key, marks in seed.items()}
                                      for seed in seeds] for name, seeds in systems.items()})


if __name__ == "__main__":
    run_program(main)
