"""Evaluation: answer from <I0, Q> alone with the plain VLM (section 3.8 of arXiv:2604.08065).

    python evaluate.py RUN                          # the table of a finished run
    python evaluate.py RUN --again --call_limit 3   # ask anew, 200 a task, with tools too
    python evaluate.py tiny-vlm                     # a checkpoint that was not fine-tuned
    python evaluate.py RUN --image FILE --question TEXT --options A,B,C    # ask one question;
                                    # --call_limit 3 in place of --options: it calls its tools

The ways to answer (the table has 95% intervals, by Wilson, for `direct`):
  direct  the option with the largest log-probability after the prefix "Answer:"
  free    greedy decoding after the generation prompt: the first tokens must be the answer
  tool    the prompt holds the expert's calls and tool images too; the model writes the answer
  call    explicit tool use: the program executes the model's own calls (baselines/tool_use.py)
  latent  as LVR and Mirage answer: latents, no tool images (baselines/reconstruction.py)
`direct` and `free` are Pearl's inference: no tool, no [PRED], no latent predictor. But a model that
has learned to call tools begins `free` with a call. `tool` tests R's end, not the model's calls.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch

from model import VLM
from support import answers, run, tables
from support.chat import View
from support.files import read_json, write_json
from support.images import ImageEncoder, load_images
from support.options import option, optional_folder, parse
from support.processes import progress, run_program
from support.records import Example
from support.splits import test_questions
from support.step import adapt_all, method_of


class Evaluator:
    """Test questions for one model. Every way to answer returns one dict per example: the text and
    its cost in tokens, images and forward passes. Raises ValueError, before any answer is
    computed, for a question that does not fit the model."""

    def __init__(self, vlm: VLM, examples: Sequence[Example], prefix: str = "Answer:",
                 batch: int = 64):
        self.vlm, self.examples, self.prefix, self.batch = vlm, list(examples), prefix, batch
        self.chat, self.encode_images = vlm.chat, ImageEncoder(vlm.family)
        # Question (support/chat.py): views `prompt`, `started`, `tool`, and options as token ids
        self.questions, self.images = [], []
        # form: what stands around an answer in the data; `started` ends where the answer begins
        for example, form in zip(self.examples, answers.forms(self.examples, prefix)):
            images = load_images(example, vlm.family)
            self.questions.append(self.chat.question(example, images, form))
            # the file in place of the opened picture, so that not all pictures stay in memory
            self.images.append([image._replace(picture=picture)
                                for image, picture in zip(images, example.images)])

    def batches(self, views: Sequence[View | None]) -> Iterator[list[int]]:
        """The numbers of the views that are there, in batches."""
        # sorted by length, because a short prompt beside a long one is mostly padding
        order = sorted((n for n, view in enumerate(views) if view), key=lambda n: len(views[n].ids))
        for start in progress(range(0, len(order), self.batch), "answers"):
            yield order[start:start + self.batch]

    def direct(self) -> list[dict]:
        """The option with the largest log-probability, as lm-evaluation-harness scores them."""
        # q.prompt is <I0, Q> and the generation prompt, q.started the same with "Answer:" behind it
        views, rows = [q.started for q in self.questions], [{}] * len(self.questions)
        for numbers in self.batches(views):
            features = self.encode_images([self.images[n][0] for n in numbers])
            options = [self.questions[n].options for n in numbers]
            log_probs = self.vlm.log_probs([views[n] for n in numbers], options, features)
            for n, scores in zip(numbers, log_probs):
                best = max(range(len(scores)), key=scores.__getitem__)
                # a model that has broken down (NaN) chooses nothing
                best = None if any(map(math.isnan, scores)) else best
                text = "" if best is None else self.examples[n].options[best]
                rows[n] = dict(text=text, option=best, log_probs=scores, tokens=0, images=1,
                               passes=1)
        return rows

    def free(self, tokens: int = 0) -> list[dict]:
        """tokens 0: as many as the longest answer needs, but at least the paper's four."""
        # the prefix too, which the model may write; + 1: a full stop or the end of the turn
        needed = [len(q.started.ids) + max(map(len, q.options)) + 1 - len(q.prompt.ids)
                  for q in self.questions]
        if cut := sum(count > tokens > 0 for count in needed):
            print(f"free: {cut} of {len(needed)} questions may need more tokens than "
                  f"--free_tokens {tokens}; 0 gives them as many as they need")
        return self.generate([q.prompt for q in self.questions], tokens or max(4, *needed))

    def tool(self) -> list[dict | None]:
        """None where the example has no tool image. Calls and images are the record's own."""
        views = [q.tool for q in self.questions]
        # room for the longest of the experts' last texts and a few tokens more
        lengths = [len(self.vlm.tokenizer(example.texts[-1]).input_ids)
                   for example, view in zip(self.examples, views) if view]
        return self.generate(views, max(lengths, default=0) + 8)

    def generate(self, views: list[View | None], tokens: int) -> list[dict | None]:
        """Greedy decoding of each view."""
        results: list = [None] * len(views)
        for numbers in self.batches(views):
            part = [views[n] for n in numbers]
            # the images that each view shows
            images = [image for n in numbers for image in self.images[n][:len(views[n].images)]]
            rows = self.vlm.generate(part, images, self.encode_images, tokens)
            for n, ids in zip(numbers, rows):
                results[n] = dict(text=self.decode(ids), tokens=len(ids),
                                  images=len(views[n].images), passes=len(ids))
        return results

    def decode(self, ids: list[int]) -> str:
        return self.vlm.tokenizer.decode(ids, skip_special_tokens=True)


def answer_questions(evaluator: Evaluator, free_tokens: int = 0,
                     ways: dict[str, Callable] | None = None) -> list[dict]:
    """One answer record per example: text, correctness and cost of each way to answer."""
    evaluator.vlm.eval()
    # ways: more ways, each from an Evaluator to one dict per example
    results = dict(direct=evaluator.direct(), free=evaluator.free(free_tokens),
                   tool=evaluator.tool(), **{way: f(evaluator) for way, f in (ways or {}).items()})
    return [tables.answer_record(
        example, {way: rows[n] for way, rows in results.items() if rows[n]}, evaluator.prefix)
        for n, example in enumerate(evaluator.examples)]


def load_model(path: str | Path, device: str, max_pixels: int = 0, alpha: float = 1.0) -> tuple:
    """(VLM, config, ways to answer) of a run, or of another checkpoint. alpha: VLM.load_adapter."""
    if not (Path(path) / "best.json").is_file():
        if alpha != 1:
            raise ValueError(f"--alpha is for a run, and {path} has no best.json")
        config = SimpleNamespace(method="sft", data="", regime="", answer_prefix="Answer:")
        return VLM(path, max_pixels=max_pixels).to(device).eval(), config, {}
    config, checkpoint = run.config_and_checkpoint(Path(path))
    vlm = VLM(config.model, config.dtype, config.min_pixels, max_pixels or config.max_pixels)
    # what answers is a plain VLM: the file of [PRED] and latent predictor is not even opened
    vlm.to(device).load_adapter(checkpoint, alpha)
    return vlm.eval(), config, method_of(config).ways(config, vlm, checkpoint)


def report(out: Path, config, tests: Sequence[Example], before: list, seconds: float) -> None:
    """Ask the best checkpoint, loaded as a user would; keep its answers and print a table."""
    vlm, config, ways = load_model(out, config.device)
    # `tool` shows trajectories as training did
    evaluator = Evaluator(vlm, adapt_all(tests, config), config.answer_prefix)
    after = answer_questions(evaluator, ways=ways)
    best = read_json(out / "best.json")
    write_json(out / "results.json",
               dict(best=best, train_seconds=seconds, answers=after, before=before))
    columns = dict(before=tables.summarise(before), after=tables.summarise(after))
    print(f"\ntest accuracy in %, before and after {config.steps} steps ({seconds / 60:.1f} "
          f"minutes); best checkpoint: step {best['step']}\n{tables.format_table(columns)}\n"
          f"{tables.conclusion(**columns)}\neverything is in {out}")


@dataclass
class Options:
    image: str = option("", "ask one question about this picture")
    question: str = option("", "with --image: the question")
    options: str = option("", "with --image: possible answers, parted by commas")
    again: bool = option(False, "ask --per_task questions anew, not from results.json")
    data: str = option("", "a data folder; default: the run's own, or the world")
    answer_prefix: str = option("", "what starts an answer; default: the run's own, or Answer:")
    alpha: float = option(1.0, "shrink a run's change: W0 + alpha (W - W0)")
    split: Literal["test", "validation"] = option("test", "whose questions")
    per_task: int = option(200, "test questions of each task drawn by world/")
    free_tokens: int = option(0, "tokens of a free answer; 0: what the longest option needs")
    call_limit: int = option(0, "explicit tool use too, with at most so many calls")
    max_pixels: int = option(0, "greatest size of a checkpoint's images; 0: its processor's own")
    json: str = option("", "write the table and every answer to this file")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "any PyTorch device")

    def ask_anew(self) -> bool:
        """Whether an option changes what is asked, so that a run's stored answers do not serve."""
        return replace(self, json="", device=Options.device) != Options()


def ask(path: str, options: Options) -> list[dict]:
    """The test questions of a run, or one question about one picture."""
    if bool(options.image) != bool(options.question) or options.image and options.json:
        raise ValueError("--image and --question need each other, and --json takes neither")
    vlm, config, ways = load_model(path, options.device, options.max_pixels, options.alpha)
    config.data = options.data or config.data
    config.answer_prefix = prefix = options.answer_prefix or config.answer_prefix
    # explicit tool use is a rival, so it lives in baselines/
    if options.call_limit:
        tool_use = optional_folder("baselines.tool_use", "--call_limit")
        ways["call"] = partial(tool_use.answer, limit=options.call_limit)
    if not options.image:
        questions = test_questions(config, options.per_task, options.split)
        questions = adapt_all(questions, config)
        return answer_questions(Evaluator(vlm, questions, prefix), options.free_tokens, ways)
    # the right answer is unknown: the first choice fills its place and is not used
    choices = [*filter(None, map(str.strip, options.options.split(",")))] or [""]
    example = Example("1", "question", Path(options.image), options.question, choices, choices[0])
    evaluator = Evaluator(vlm, [example], prefix)
    if options.call_limit:
        tool_use.show(evaluator, options.call_limit, Path(options.image).stem)
    # without options: the words that it writes after the prefix (else it would begin with a call)
    elif choices == [""]:
        print(evaluator.generate([evaluator.questions[0].started], 64)[0]["text"])
    else:
        scores = evaluator.direct()[0]["log_probs"]
        for score, choice in sorted(zip(scores, choices), reverse=True):
            print(f"{score:8.2f}  {choice}")
    return []


def main() -> None:
    path, rest = sys.argv[1] if len(sys.argv) > 1 else "--help", sys.argv[2:]
    options = parse(Options, ["--help"] if path.startswith("-") else rest, __doc__)
    file = Path(path) / "results.json"
    anew = options.ask_anew() or not file.is_file()
    records = ask(path, options) if anew else read_json(file)["answers"]
    if records:
        columns = {path: tables.summarise(records)}
        print(tables.format_table(columns))
        if options.json:
            write_json(Path(options.json), dict(table=columns, answers=records))


if __name__ == "__main__":
    run_program(main)
