"""What does an answer depend on? Something is replaced, everything else stays, and the same
questions are asked again: what `python evaluate.py RUN ... --causal` prints and writes.

  latents    of a reconstruction run: zeros, noise, the first one repeated, another question's, the
             true ones (the tool image's visual embeddings) in their place, as many of them; or
             none, the markers alone
  image      of the question, for whoever answers from it alone: grey, or another question's
  tool image of another question, in the expert's trajectory: does the answer follow the image?
  untrained  nothing replaced: families that no trajectory covers, asked of the model before and
             after, each with its distance from what was trained

The controls are those of the critiques of latent visual reasoning (arXiv:2605.21642, 2605.18445,
2606.01287). Everything is drawn with fixed seeds, so a second call prints the same table.

Letters: B batch, D hidden size, n latents.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

import evaluate
from analysis.causal_report import (BASE, FED, FOLLOWS, RIGHT, SAME, STAYS, Row, System,
                                    as_text, findings, table)
from analysis.study import named
from analysis.tables import by_seed
from baselines import reconstruction, variants
from model import VLM
from support import answers
from support.files import write_json, write_text
from support.images import opened, picture_digest
from support.options import Config
from support.records import Example, read_folder
from support.run_folder import finished
from world.loader import test_examples
from world.scenes import (FAMILIES, NO_DOTS, REGIMES, make_example, make_world,
                          tallest_without_dots)

GREY = (128, 128, 128)


def row_of(part: str, test: str, measure: str, examples: list[Example], marks: list) -> Row:
    chance = sum(1 / len(ex.options) for ex in examples) / max(1, len(examples))
    return Row(part, test, measure, dict(zip((ex.id for ex in examples), marks)), chance)


def right(examples: list[Example], said: list[int | None]) -> list[bool]:
    """said: of each question the index of the option that was answered, None for none of them."""
    return [option is not None and ex.options[option] == ex.answer
            for ex, option in zip(examples, said)]


def same(said: list[int | None], before: list[int | None]) -> list[bool]:
    return [one is not None and one == other for one, other in zip(said, before)]


# ---- whose picture is put in its place ----------------------------------------------------------


def partners(examples: list[Example], fits: Callable[[Example, Example], bool]) -> list[int | None]:
    """Of each question another of its family that fits(question, other); None where none does.

    Drawn with a fixed seed, and, as far as they fit, no question twice before all were taken.
    """
    found: list[int | None] = [None] * len(examples)
    families = dict.fromkeys(ex.task for ex in examples)
    for family in families:
        order = [i for i, ex in enumerate(examples) if ex.task == family]
        random.Random(0).shuffle(order)
        for place, i in enumerate(order):
            others = order[place + 1:] + order[:place]
            found[i] = next((j for j in others if fits(examples[i], examples[j])), None)
    return found


def with_partners(examples: list[Example], fits) -> tuple[list[int], list[Example]]:
    """The rows that have a partner, and the partner of each of them."""
    found = partners(examples, fits)
    rows = [i for i, other in enumerate(found) if other is not None]
    return rows, [examples[found[i]] for i in rows]


def other_image(one: Example, other: Example) -> bool:
    return picture_digest(one.image) != picture_digest(other.image)


def as_many_tools(one: Example, other: Example) -> bool:
    return (len(one.images) == len(other.images) > 1
            and picture_digest(one.images[-1]) != picture_digest(other.images[-1]))


def same_answer(one: Example, other: Example) -> bool:
    return as_many_tools(one, other) and one.answer == other.answer


def other_answer(one: Example, other: Example) -> bool:
    """The other's answer must be on offer here, or nobody could give it."""
    return (as_many_tools(one, other) and one.answer != other.answer
            and other.answer in one.options)


def blanked(example: Example) -> Example:
    """The question's image grey, of the same size."""
    return replace(example, image=Image.new("RGB", opened(example.image).size, GREY))


def with_tool_images(example: Example, other: Example) -> Example:
    """The example's own words, calls included, with the other's tool images in their places."""
    images = iter(other.images[1:])
    return replace(example, trajectory=[step if isinstance(step, str) else next(images)
                                        for step in example.trajectory])


# ---- the tests ----------------------------------------------------------------------------------


class Subject(NamedTuple):
    """A model and the questions put to it."""

    vlm: VLM
    examples: list[Example]
    prefix: str

    def direct(self, examples: list[Example]) -> list[int | None]:
        asker = evaluate.Answerer(self.vlm, examples, self.prefix)
        return [said["option"] for said in asker.direct()] if examples else []

    def tool(self, examples: list[Example]) -> list[int | None]:
        """The option that follows the expert's calls and images, by their last text's form."""
        said = evaluate.Answerer(self.vlm, examples, self.prefix).tool() if examples else []
        return [answers.says(answer["text"], ex.options, self.prefix)
                for ex, answer in zip(examples, said)]


def image_tests(subject: Subject) -> list[Row]:
    """The question's image, replaced."""
    examples = subject.examples
    own = subject.direct(examples)
    rows = [row_of("image", "as it is", RIGHT, examples, right(examples, own))]
    has, others = with_partners(examples, other_image)
    kept = [examples[i] for i in has]
    swapped = [replace(ex, image=other.image) for ex, other in zip(kept, others)]
    for test, asked, shown, before in (
            ("grey", examples, [blanked(ex) for ex in examples], own),
            ("another question's", kept, swapped, [own[i] for i in has])):
        said = subject.direct(shown)
        rows += [row_of("image", test, RIGHT, asked, right(asked, said)),
                 row_of("image", test, SAME, asked, same(said, before))]
    return rows


def tool_tests(subject: Subject) -> list[Row]:
    """The tool images, replaced: the plan and the calls stay as they are."""
    if subject.vlm.family.alone_only:
        return []
    examples = [ex for ex in subject.examples if len(ex.images) > 1]
    own = subject.tool(examples)
    rows = [row_of("tool image", "as it is", RIGHT, examples, right(examples, own))]
    for test, fits in (("another's, same answer", same_answer),
                       ("another's, other answer", other_answer)):
        has, others = with_partners(examples, fits)
        kept = [examples[i] for i in has]
        said = subject.tool([with_tool_images(ex, other) for ex, other in zip(kept, others)])
        stays = right(kept, said)
        if fits is same_answer:
            rows.append(row_of("tool image", test, RIGHT, kept, stays))
            continue
        follows = [option is not None and ex.options[option] == other.answer
                   for ex, other, option in zip(kept, others, said)]
        rows += [row_of("tool image", test, FOLLOWS, kept, follows),
                 row_of("tool image", test, STAYS, kept, stays)]
    return rows


def latent_tests(subject: Subject, scale, latents: int) -> list[Row]:
    """The latents that a reconstruction run feeds itself, replaced, count kept."""
    examples = [ex for ex in subject.examples if len(ex.images) > 1]
    asker = evaluate.Answerer(subject.vlm, examples, subject.prefix)
    own = Fed(latents, {})
    plain = asked_with(asker, scale, latents, own.keep)
    rows = [row_of("latents", "none, answered directly", RIGHT, examples,
                   right(examples, subject.direct(examples))),
            row_of("latents", "none, markers alone", RIGHT, examples,
                   right(examples, asked_with(asker, scale, 0))),
            row_of("latents", "as they are", RIGHT, examples, right(examples, plain)),
            row_of("latents", "as they are", FED, examples,
                   [bool(own.kept[i]) for i in range(len(examples))])]
    for test, source in sources(asker, own).items():
        has = [i for i in range(len(examples)) if source(i) is not None]
        kept = [examples[i] for i in has]
        said = asked_with(asker, scale, latents, source)
        said, before = [said[i] for i in has], [plain[i] for i in has]
        rows += [row_of("latents", test, RIGHT, kept, right(kept, said)),
                 row_of("latents", test, SAME, kept, same(said, before))]
    return rows


class Fed(NamedTuple):
    """What a model fed itself: by question its latents (D), one after another, n in a run."""

    latents: int
    kept: dict[int, list[Tensor]]

    def keep(self, question: int) -> Callable[[Tensor, int], Tensor]:
        made = self.kept[question] = []

        def kept(latent: Tensor, number: int) -> Tensor:
            made.append(latent)
            return latent
        return kept


def asked_with(asker, scale, latents: int, source=None) -> list[int | None]:
    """The options answered. source(question): None, or (its latent, its number) -> what is fed."""
    def decode(views: list, rows: list[int]) -> list[list[int]]:
        put = [source(row) if source else None for row in rows]

        def instead(inputs: Tensor, fed: list[int], latent: Tensor) -> Tensor:
            return torch.stack([
                put[n](one, fed[n] - 1).to(one) if put[n] and latent[n] else one
                for n, one in enumerate(inputs)])  # (B, D)

        made = reconstruction.generate_latent(asker.vlm, views, asker.store, scale, latents,
                                              asker.serializer.end_id, 112, instead)
        return [words for words, _ in made]

    said = asker.in_batches(asker.prompts, decode)
    return [answers.says(asker.decode(words), ex.options, asker.prefix)
            for ex, words in zip(asker.examples, said)]


def sources(asker, own: Fed) -> dict[str, Callable]:
    """By test what replaces a question's latents; None for a question that it cannot be done for.

    A run of latents more than there is a replacement for gets the last run's again.
    """
    n, every = own.latents, [latent for made in own.kept.values() for latent in made]
    flat = torch.stack(every) if every else torch.zeros(1, asker.vlm.dim)
    mean, std = flat.mean(dim=0), flat.std(dim=0, correction=0)  # (D)
    fits = partners(asker.examples, other_image)

    def in_turn(made: list[Tensor]) -> Callable | None:
        runs = len(made) // n if n else 0
        return (lambda _, k: made[min(k // n, runs - 1) * n + k % n]) if runs else None

    def noise(question: int) -> Callable:
        draw = torch.Generator().manual_seed(question)
        return lambda latent, _: mean + std * torch.randn(len(mean), generator=draw).to(mean)

    def first(question: int) -> Callable:
        began: dict[int, Tensor] = {}  # by run; the first of a run is its own
        return lambda latent, k: began.setdefault(k // n, latent)

    def others(question: int) -> Callable | None:
        return None if fits[question] is None else in_turn(own.kept[fits[question]])

    def true(question: int) -> Callable:
        images = asker.placed[question][0][1:]
        features = asker.store.encoded(images)
        return in_turn([latent for i in images for latent in
                        reconstruction.latent_targets(features[i].features[0], n)])

    return {"zeros": lambda question: lambda latent, _: torch.zeros_like(latent), "noise": noise,
            "the first one repeated": first, "another question's": others, "the true ones": true}


# ---- questions that were not trained ------------------------------------------------------------


def untrained(config: dict, per_family: int) -> dict[str, list[Example]]:
    """Test questions of families that this run's trajectories do not cover; the world's held-out
    family also on the same scenes without their dots (world/scenes.py)."""
    seed = config["world_seed"]
    if config["data"]:
        examples = read_folder(config["data"], config.get("outside_images", False),
                               answer_prefix=config["answer_prefix"])
        trained = {ex.task for ex in examples if ex.split == "train"}
        tests = [ex for ex in examples if ex.split == "test" and ex.task not in trained]
        return {name: [ex for ex in tests if ex.task == name][:per_family]
                for name in dict.fromkeys(ex.task for ex in tests)}
    found = {family: [make_example(family, "test", i, seed) for i in range(per_family)]
             for family in FAMILIES if family not in REGIMES[config["regime"]]}
    found[NO_DOTS] = [tallest_without_dots("test", i, seed) for i in range(per_family)]
    return found


def trained_questions(config: dict) -> set[str]:
    if config["data"]:
        examples = read_folder(config["data"], config.get("outside_images", False),
                               answer_prefix=config["answer_prefix"])
        return {ex.question for ex in examples if ex.split == "train"}
    world = make_world(config["regime"], "train", 400, config["world_seed"])
    return {ex.question for ex in world}


def words_apart(one: str, other: str) -> int:
    """The least number of words to put in, leave out or change that makes one the other."""
    one, other = one.split(), other.split()
    costs = list(range(len(other) + 1))
    for i, word in enumerate(one, start=1):
        last, costs = costs, [i]
        for j, theirs in enumerate(other, start=1):
            costs.append(min(last[j] + 1, costs[-1] + 1, last[j - 1] + (word != theirs)))
    return costs[-1]


def distances(questions: dict[str, list[Example]], trained: set[str]) -> dict[str, int]:
    """Of each family the words between its questions and the nearest trained one, at the least."""
    return {family: min(words_apart(question, other) for question in {ex.question for ex in rows}
                        for other in trained) for family, rows in questions.items() if rows}


def untrained_tests(subject: Subject, questions: dict[str, list[Example]]) -> list[Row]:
    return [row_of("untrained", family, RIGHT, examples, right(examples, subject.direct(examples)))
            for family, examples in questions.items()]


# ---- the program --------------------------------------------------------------------------------


@torch.no_grad()
def tests_of(vlm: VLM, config: dict, args, questions: dict, scale=None) -> list[Row]:
    """Every test of one model; config: the run's, or the one that a base is compared with."""
    examples = test_examples(args.data or config["data"], config["regime"], args.per_family,
                             config["world_seed"],
                             outside=args.outside_images or config.get("outside_images", False),
                             answer_prefix=config["answer_prefix"])
    shown = Config(strip_calls=config.get("strip_calls", False), order=config["order"])
    examples = variants.as_shown([ex for ex in examples if ex.task not in questions], shown)
    if not examples:
        raise ValueError("there is no test question of a trained family: name other --data")
    subject = Subject(vlm.eval(), examples, config["answer_prefix"])
    if scale is not None:
        latents = config["decode_latents"] if args.latents is None else args.latents
        if latents < 1:
            raise ValueError(f"--latents {latents}: there is nothing to replace; give 1 or more")
        rows = latent_tests(subject, scale, latents)
    else:
        rows = image_tests(subject) + tool_tests(subject)
    return rows + untrained_tests(subject, questions)


def one_setting(configs: dict[str, dict]) -> None:
    """Raises ValueError where runs differ in base, data or regime."""
    def setting(config: dict) -> tuple:
        return (Path(config["model"]).name,
                config["data"] or (config["regime"], config["world_seed"]))

    for first, other in zip(configs, list(configs)[1:]):
        if setting(configs[other]) != setting(configs[first]):
            raise ValueError(f"{first} and {other} differ in base, data or regime: --causal takes "
                             "runs of one setting at a time")


def measured(args) -> tuple[list[System], dict[str, int]]:
    """Every run's tests by arm and seed, and those of the model before."""
    runs = list(map(str, args.runs))
    configs = {run: finished(Path(run))[0] for run in runs}
    one_setting(configs)
    config = configs[runs[0]] if runs else dict(
        Config().__dict__, answer_prefix=args.answer_prefix, data=args.data or "")
    questions = untrained(config, args.per_family)
    apart = distances(questions, trained_questions(config))
    ask, systems = partial(tests_of, args=args, questions=questions), []
    # a base has been taught no order of its own
    plain, dtype = config | dict(order="text_first", strip_calls=False), config["dtype"]
    for name, model in {**({BASE: config["model"]} if runs else {}),
                        **({args.model: args.model} if args.model else {})}.items():
        vlm = VLM(model, dtype=getattr(torch, dtype)).to(args.device)
        systems.append(System(name, [ask(vlm, plain)]))
    for name, seeds in by_seed({run: dict(config=configs[run], run=run) for run in runs},
                               named(configs)).items():
        rows = []
        for one in seeds.values():
            vlm, own, scale = evaluate.load_run(Path(one["run"]), args.device)
            rows.append(ask(vlm, own, scale=scale))
        systems.append(System(name, rows))
    return systems, apart


def run(args) -> None:
    """`python evaluate.py RUN ... --causal`; args: the options of evaluate.py."""
    systems, apart = measured(args)
    lines, told = table(systems, apart), findings(systems, apart)
    print("\n".join([as_text(lines), "", *told]))
    if args.markdown:
        write_text(args.markdown, "\n".join([as_text(lines), "", *told]) + "\n")
    if args.json:
        marks = {system.name: [{"|".join(row.key): row.marks for row in rows}
                               for rows in system.seeds] for system in systems}
        write_json(args.json, dict(table=lines, findings=told, marks=marks))
