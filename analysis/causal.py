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
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`

import torch
from PIL import Image
from torch import Tensor

import evaluate
from analysis.states import arm_of
from analysis.tables import mean_std, paired_difference
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
from world import loader, scenes

# what a mark says of an answer
RIGHT, SAME, FOLLOWS, STAYS = "right", "unchanged", "as the image", "as the question"
# at least one latent was fed; right with the dots minus right without them, on the same scene
FED, EFFECT = "with latents", "effect of the dots"
BASE, ALL_FAR, GUESS = "no fine-tuning", "all but near copies", "guessing"
# a question with fewer words changed is a near copy of a trained one
NEAR = 2

# of each question the option that was answered; None: none of them
Choices = list[int | None]
# a mark for each question, by its id
Marks = dict[str, float]
# by (part, test, measure); the first of a part has nothing replaced
Results = dict[tuple[str, str, str], Marks]


def right(examples: Sequence[Example], chosen: Choices) -> Marks:
    return {ex.id: int(option is not None and ex.options[option] == ex.answer)
            for ex, option in zip(examples, chosen)}


def guessed(examples: Sequence[Example]) -> Marks:
    return {ex.id: 1 / len(ex.options) for ex in examples}


def same(examples: Sequence[Example], chosen: Choices, before: Choices) -> Marks:
    # none of the options, twice, is not the same answer
    return {ex.id: int(one is not None and one == other)
            for ex, one, other in zip(examples, chosen, before)}


# ---- whose picture replaces a question's own ----------------------------------------------------


def partners(examples: list[Example], fits: Callable[[Example, Example], bool]) -> dict[int, int]:
    """For each question that has one, another question of its task with fits(question, other).

    Drawn with a fixed seed; as far as they fit, no question twice before all were used.
    """
    found = {}
    for task in dict.fromkeys(ex.task for ex in examples):
        order = [i for i, ex in enumerate(examples) if ex.task == task]
        random.Random(0).shuffle(order)
        for place, i in enumerate(order):
            others = order[place + 1:] + order[:place]
            found[i] = next((j for j in others if fits(examples[i], examples[j])), None)
    return {i: found[i] for i in sorted(found) if found[i] is not None}


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


# ---- images and tool images ---------------------------------------------------------------------


class Subject(NamedTuple):
    vlm: VLM
    examples: list[Example]
    prefix: str

    def direct(self, examples: list[Example]) -> Choices:
        evaluator = evaluate.Evaluator(self.vlm, examples, self.prefix)
        return [reply["option"] for reply in evaluator.direct()]

    def tool(self, examples: list[Example]) -> Choices:
        """The options that follow the expert's calls and their images."""
        replies = evaluate.Evaluator(self.vlm, examples, self.prefix).tool()
        return [answers.says(reply["text"], ex.options, self.prefix)
                for ex, reply in zip(examples, replies)]


def image_tests(subject: Subject) -> Results:
    examples, own = subject.examples, subject.direct(subject.examples)
    found = {("image", "as it is", RIGHT): right(examples, own),
             ("image", GUESS, RIGHT): guessed(examples)}
    pairs = partners(examples, other_image)
    swapped = {i: replace(examples[i], image=examples[j].image) for i, j in pairs.items()}
    grey = {i: blanked(example) for i, example in enumerate(examples)}
    for test, shown in (("grey", grey), ("another question's", swapped)):
        kept, chosen = [examples[i] for i in shown], subject.direct([*shown.values()])
        found["image", test, RIGHT] = right(kept, chosen)
        found["image", test, SAME] = same(kept, chosen, [own[i] for i in shown])
    return found


def tool_tests(subject: Subject) -> Results:
    """Tool images replaced; plan and calls stay."""
    examples = [ex for ex in subject.examples if len(ex.images) > 1]
    # some families can be shown one image alone
    if subject.vlm.family.single_image_only or not examples:
        return {}
    found = {("tool image", "as it is", RIGHT): right(examples, subject.tool(examples)),
             ("tool image", GUESS, RIGHT): guessed(examples)}
    for test, fits in (("another's, same answer", same_answer),
                       ("another's, other answer", other_answer)):
        pairs = [(examples[i], examples[j]) for i, j in partners(examples, fits).items()]
        kept = [ex for ex, _ in pairs]
        chosen = subject.tool([with_tool_images(*pair) for pair in pairs])
        if fits is same_answer:
            found["tool image", test, RIGHT] = right(kept, chosen)
        else:
            theirs = [replace(ex, answer=other.answer) for ex, other in pairs]
            found["tool image", test, STAYS] = right(kept, chosen)
            found["tool image", test, FOLLOWS] = right(theirs, chosen)
    return found


# ---- latents ------------------------------------------------------------------------------------


class LatentReader:
    """A recon run that answers with other latents than its own.

    latents: how many between two markers (a run). kept: by question, the latents (D) that the model
    made itself, run after run.
    """

    def __init__(self, evaluator: evaluate.Evaluator, scale, latents: int):
        self.evaluator, self.scale, self.latents = evaluator, scale, latents
        self.kept: dict[int, list[Tensor]] = {}

    def keep(self, question: int) -> Callable[[Tensor, int], Tensor]:
        made = self.kept[question] = []

        def kept(latent: Tensor, number: int) -> Tensor:
            made.append(latent)
            return latent
        return kept

    def choices(self, source: Callable | None = None, latents: int | None = None) -> Choices:
        """source(question): None, or a function (latent, its number) -> the latent that is fed."""
        evaluator = self.evaluator
        latents = self.latents if latents is None else latents

        def decode(views: list, numbers: list[int]) -> list[list[int]]:
            sources = [source(number) if source else None for number in numbers]

            def instead(inputs: Tensor, fed: list[int], is_latent: Tensor) -> Tensor:
                return torch.stack([
                    sources[n](one, fed[n] - 1).to(one) if sources[n] and is_latent[n] else one
                    for n, one in enumerate(inputs)])  # (B, D)

            images = evaluator.encode_images(evaluator.images(numbers))
            made = reconstruction.generate_latent(evaluator.vlm, views, images, self.scale, latents,
                                                  evaluator.chat.end_id, 112, instead)
            return [words for words, _ in made]

        words = in_batches([q.prompt for q in evaluator.questions], decode, evaluator.batch)
        return [answers.says(evaluator.decode(ids), ex.options, evaluator.prefix)
                for ex, ids in zip(evaluator.examples, words)]

    def sources(self) -> dict[str, Callable]:
        """By test, the source of a question's latents; it is None for a question without any."""
        n, every = self.latents, torch.stack(sum(self.kept.values(), []))
        mean, std = every.mean(dim=0), every.std(dim=0, correction=0)  # (D)
        pairs, evaluator = partners(self.evaluator.examples, other_image), self.evaluator

        def in_turn(made: list[Tensor]) -> Callable | None:
            # a run beyond the last one gets the last one's latents again
            runs = len(made) // n
            return (lambda _, k: made[min(k // n, runs - 1) * n + k % n]) if runs else None

        def noise(question: int) -> Callable:
            draw = torch.Generator().manual_seed(question)
            return lambda latent, _: mean + std * torch.randn(len(mean), generator=draw).to(mean)

        def first(question: int) -> Callable:
            started: dict[int, Tensor] = {}  # each run's own first latent
            return lambda latent, k: started.setdefault(k // n, latent)

        def true(question: int) -> Callable | None:
            images = evaluator.images([question])[1:]
            features = [evaluator.encode_images(images)[image.key].features[0] for image in images]
            return in_turn([latent for one in features
                            for latent in reconstruction.latent_targets(one, n)])

        return {"zeros": lambda _: lambda latent, _: torch.zeros_like(latent), "noise": noise,
                "its first one repeated": first, "the true ones": true,
                "another question's": lambda question: in_turn(
                    self.kept[pairs[question]] if question in pairs else [])}


def latent_tests(subject: Subject, scale, latents: int) -> Results:
    """The latents that a recon run feeds itself replaced, as many as before."""
    examples = [ex for ex in subject.examples if len(ex.images) > 1]
    evaluator = evaluate.Evaluator(subject.vlm, examples, subject.prefix)
    reader = LatentReader(evaluator, scale, latents)
    own, direct = reader.choices(reader.keep), subject.direct(examples)
    fed = {ex.id: int(len(reader.kept[i]) > 0) for i, ex in enumerate(examples)}
    found = {("latents", "its own", RIGHT): right(examples, own),
             ("latents", "its own", FED): fed, ("latents", GUESS, RIGHT): guessed(examples),
             ("latents", "markers alone", RIGHT): right(examples, reader.choices(latents=0)),
             ("latents", "answered directly", RIGHT): right(examples, direct)}
    # a model that feeds itself no latents has none to replace
    for test, source in reader.sources().items() if any(fed.values()) else ():
        rows = [i for i in range(len(examples)) if source(i) is not None]
        chosen, kept = reader.choices(source), [examples[i] for i in rows]
        chosen = [chosen[i] for i in rows]
        found["latents", test, RIGHT] = right(kept, chosen)
        found["latents", test, SAME] = same(kept, chosen, [own[i] for i in rows])
    return found


class Questions(NamedTuple):
    trained: list[Example]
    # by task
    untrained: dict[str, list[Example]]
    # by untrained task: words between its questions and the nearest trained one, at least
    distances: dict[str, int]


def questions_of(config, per_task: int) -> Questions:
    options = vars(config) | dict(train_examples=200, test_per_task=per_task)
    learned, _, tests = load_splits(SimpleNamespace(**options))
    texts, tasks = {ex.question for ex in learned[:2000]}, {ex.task for ex in learned}
    # in the world, the held-out task also without the dots that a trained task asks about
    others = tests if config.data else [
        *loader.questions("", per_task),
        *(scenes.tallest_without_dots("test", i, 0) for i in range(per_task))]
    groups: dict[str, list[Example]] = {}
    for example in (ex for ex in others if ex.task not in tasks):
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
    found = {("untrained", task, RIGHT): right(rows, subject.direct(rows))
             for task, rows in questions.untrained.items()}
    far = [task for task, words in questions.distances.items() if words >= NEAR]
    if scenes.NO_DOTS in questions.untrained:
        # the dots suggest a trained question, so the held-out task counts without them
        far = [*(task for task in far if not task.startswith(scenes.HELD_OUT)), scenes.NO_DOTS]
        dots, plain = (found["untrained", task, RIGHT]
                       for task in (scenes.HELD_OUT, scenes.NO_DOTS))
        # both tasks have the same scenes in the same order
        found["untrained", scenes.HELD_OUT, EFFECT] = {
            scene: dots[scene] - mark for scene, mark in zip(dots, plain.values())}
    if far:
        found["untrained", ALL_FAR, RIGHT] = {
            i: mark for task in far for i, mark in found["untrained", task, RIGHT].items()}
    return found


# ---- the table ----------------------------------------------------------------------------------


def gap(ours: list[Marks], theirs: list[Marks]) -> tuple[float, float] | None:
    """Mean difference in points over the questions that both answered, and half the width of its
    95% interval: over seeds by Student's t; with one seed over questions.

    ours, theirs: the marks of each seed; a single seed of theirs is compared with each of ours.
    """
    theirs = theirs * (len(ours) if len(theirs) == 1 else 1)
    gaps = [[100 * (mark - other[i]) for i, mark in one.items() if i in other]
            for one, other in zip(ours, theirs)]
    if not all(gaps):
        return None
    if len(gaps) > 1:
        return paired_difference([statistics.mean(seed) for seed in gaps], [0.0] * len(gaps))
    (values,) = gaps
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.mean(values), 1.96 * spread / len(values) ** 0.5


def compared_with(key: tuple[str, str, str], seeds: list[Results],
                  base: list[Results]) -> list[Marks]:
    """The same question by the base, or with nothing replaced; nothing for the base itself."""
    part, test, measure = key
    if part == "untrained":
        return [found[key] for found in base if base is not seeds]
    own = next(other for other in seeds[0] if other[0] == part)
    if measure == FOLLOWS:
        own = part, test, STAYS
    return [found[own] for found in seeds if measure in (RIGHT, FOLLOWS) and key != own]


def table(systems: dict[str, list[Results]], distances: dict[str, int]) -> str:
    """Markdown: for each result its share in %, with the 95% interval (Wilson) of one seed or the
    standard deviation over seeds, and the difference to what it is compared with."""
    head = ("system", "part", "replaced by", "answers", "n", "% [95%] or +/- std", "- unreplaced; "
            "untrained: - before training; as the image: - as the question [95%]")
    lines, count = [head, ("---",) * len(head)], 0
    for name, seeds in systems.items():
        for key, marks in seeds[0].items():
            (part, test, measure), n, change = key, len(marks), ""
            shares = [100 * statistics.mean(found[key].values()) for found in seeds if n]
            value = mean_std(shares) if n else "no question fits"
            if len(shares) == 1 and measure != EFFECT and test != GUESS:
                low, high = wilson(sum(marks.values()), n)
                value += f" [{100 * low:.1f}, {100 * high:.1f}]"
            if part == "untrained" and test in distances:
                test += f" ({distances[test]} words apart)"
            other = compared_with(key, seeds, systems.get(BASE, []))
            if other and (found := gap([found[key] for found in seeds], other)):
                mean, half = found
                change, count = f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]", count + 1
            lines.append((name, part, test, measure, str(n), value, change))
    return "\n".join([*("| " + " | ".join(line) + " |" for line in lines), "",
                      f"{count} differences. An interval that holds 0 shows no difference; one in "
                      "twenty intervals of 95% misses the true value by chance."])


@torch.no_grad()
def tests_of(vlm: VLM, config, questions: Questions, scale=None, latents: int = 0) -> Results:
    shown = [evaluate.method_of(config).shown(ex, config) for ex in questions.trained]
    subject = Subject(vlm.eval(), shown, config.answer_prefix)
    if scale:
        found = latent_tests(subject, scale, latents)
    else:
        found = image_tests(subject) | tool_tests(subject)
    return found | untrained_tests(subject, questions)


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
        found = tests_of(vlm, config, questions, scale, latents)
        systems.setdefault(arm_of(path), []).append(found)
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
