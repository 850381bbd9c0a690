"""Evaluation: answer from <I0, Q> alone with the plain VLM (section 3.8 of arXiv:2604.08065).

    python evaluate.py RUN                          # the table of a finished run
    python evaluate.py RUN --again --call_limit 3   # ask every question again, with tools too
    python evaluate.py tiny-vlm                     # an untrained checkpoint, on the whole world
    python evaluate.py RUN --image FILE --question TEXT --options A B C    # ask one question

The ways to answer, each with a 95% interval (Wilson) per task:
  direct  the option with the largest log-probability behind "Answer:": what the model knows
  free    nothing is given, and the few decoded tokens must be the answer: what a user gets
  tool    the expert's calls and their images are given; the model reads them and answers
  call    explicit tool use: the model's own calls, really executed (baselines/tool_use.py)
  latent  the rival's inference: latents in place of tool images (baselines/reconstruction.py)
`direct` and `free` are Pearl's inference: no tool, no [PRED], no latent predictor. `tool` measures
how well the trajectories were learned, so that methods are compared at equal skill.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from data import View, collate, prompt_view
from losses import at_least_float32
from model import VLM
from support import adapters, answers, run, tables
from support.chat import Chat
from support.features import ImageEncoder, LoadedImage, load_images, with_pixels
from support.files import write_json
from support.options import room
from support.processes import run_program
from support.records import Example
from support.splits import test_questions


class Question(NamedTuple):
    """A test question as tokens."""

    prompt: View  # <I0, Q> and the generation prompt
    started: View  # the same, with the answer started: "Answer:"
    options: list[list[int]]  # the tokens of each option behind it
    # prompt for the last text of the trajectory, tool images given; None: it has no tool image
    tool: View | None


class Evaluator:
    """Test questions for one model. Every way to answer returns one dict per example: the text and
    its cost in tokens, images and forward passes.

    Raises ValueError, before anything is asked, for a question that the model cannot be asked.
    """

    def __init__(self, vlm: VLM, examples: Sequence[Example], prefix: str = "Answer:",
                 batch: int = 64):
        self.vlm, self.examples, self.prefix, self.batch = vlm, list(examples), prefix, batch
        self.chat = Chat(vlm.family, vlm.max_positions)
        self.encode_images = ImageEncoder(vlm.family)
        # how the data write an answer, for questions whose trajectory does not show it
        self.form = answers.common_form(self.examples, prefix)
        self.questions = [self.question(example) for example in self.examples]

    def question(self, example: Example) -> Question:
        self.chat.check_text(example)
        images = [image._replace(picture=None) for image in load_images(example, self.vlm.family)]
        turns = self.chat.turns(example)
        prompt = prompt_view(self.chat, turns[:1], images[:1])
        started, options = self.options(example, images[:1])
        longest, tool = len(started.ids) + max(map(len, options)), None
        # a family that shows single images differently from several can be asked directly alone
        if len(images) > 1 and not self.vlm.family.alone_only:
            whole = self.chat.conversation(turns, [image.text for image in images])
            longest = max(longest, len(whole.until_last_label().ids))
            # what follows the last tool image is asked for
            while turns[-1][0] == "assistant":
                turns.pop()
            tool = prompt_view(self.chat, turns, images)
        self.chat.check_length(longest, example)
        return Question(prompt, started, options, tool)

    def options(self, example: Example, images: list[LoadedImage]) -> tuple[View, list[list[int]]]:
        """<I0, Q> with the answer started, and the tokens of each option."""
        # started as this record's expert writes an answer, or else as most of them do
        last = example.texts[-1] if example.texts else ""
        form = answers.form_of(last, example.answer, self.prefix) or self.form
        # each option is tokenised as training would: as the whole answer
        whole, ends = [], []
        for option in example.options:
            turns = [*self.chat.turns(example)[:1], ("assistant", [form.text(option)])]
            made = self.chat.conversation(turns, [image.text for image in images])
            whole.append(made.until_last_label().ids)
            # the option's own tokens end here; its full stop and the end of the turn follow
            ends.append(made.first_after(made.speeches[0].words + len(form.prefix + form.gap)
                                         + len(option) - 1) + 1)
        # the prompt is what all options share, up to the end of the prefix
        start = made.first_after(made.speeches[0].words + len(form.prefix))
        # a tokenizer may join the prefix's last letters with an option's first ones
        while any(ids[:start] != whole[0][:start] for ids in whole):
            start -= 1
        own = [ids[start:end] for ids, end in zip(whole, ends)]
        # where one option begins another ("top", "top left"), the end of the turn decides
        if any(a != b and b[:len(a)] == a for a in own for b in own):
            own = [ids[start:] for ids in whole]
        keys = [image.key for image in images]
        return View(whole[0][:start], [-100] * start, keys, start - 1), own

    def images(self, numbers: list[int]) -> list[LoadedImage]:
        """The images of these examples, without pixels where features are kept already."""
        family, kept = self.vlm.family, self.encode_images.kept
        return [image for n in numbers
                for image in with_pixels(load_images(self.examples[n], family), family, kept)]

    def direct(self) -> list[dict]:
        """The option with the largest log-probability, as lm-evaluation-harness scores them."""
        return self.in_batches([q.started for q in self.questions], self.score_options)

    @torch.no_grad()
    def score_options(self, views: list[View], numbers: list[int]) -> list[dict]:
        """One forward pass over prompts and options, one row for each different input."""
        # an option's last token is predicted and not read: options of one token share their row
        rows = list(dict.fromkeys((n, tuple(option[:-1])) for n in numbers
                                  for option in self.questions[n].options))
        inputs = [views[numbers.index(n)] for n, _ in rows]
        inputs = [view._replace(ids=view.ids + list(more), labels=view.labels + [-100] * len(more))
                  for view, (_, more) in zip(inputs, rows)]
        features = self.encode_images(self.images([n for n in numbers]))
        states = self.vlm(collate(inputs, self.vlm.pad_id), features).states  # (rows, T, D)
        results = []
        for view, n in zip(views, numbers):
            scores = []
            for option in self.questions[n].options:
                row, first = rows.index((n, tuple(option[:-1]))), len(view.ids) - 1
                logits = self.vlm.logits(states[row, first:first + len(option)])
                log_probs = at_least_float32(logits).log_softmax(dim=-1)  # (option, V)
                scores.append(float(log_probs[range(len(option)), option].sum()))
            # a model that has broken down (NaN) chooses nothing
            best = scores.index(max(scores)) if all(s > -float("inf") for s in scores) else None
            text = "" if best is None else self.examples[n].options[best]
            results.append(dict(text=text, option=best, log_probs=scores, images=1, passes=1,
                                tokens=0))
        return results

    def free(self, tokens: int = 0) -> list[dict]:
        """tokens 0: as many as the longest answer needs, but at least the paper's four."""
        needed = [len(q.started.ids) + max(map(len, q.options)) + 1 - len(q.prompt.ids)
                  for q in self.questions]
        if cut := sum(count > tokens > 0 for count in needed):
            print(f"free: {cut} of {len(needed)} questions have options of more than "
                  f"--free_tokens {tokens}; 0 gives them as many as they need")
        return self.generate([q.prompt for q in self.questions], tokens or max(4, *needed))

    def tool(self) -> list[dict | None]:
        """None where the example has no tool image. Calls and images are the record's own."""
        views = [q.tool for q in self.questions]
        # room for the expert's last text and a few tokens more
        texts = [ex.texts[-1] for ex, view in zip(self.examples, views) if view]
        longest = max((len(self.vlm.tokenizer(text, add_special_tokens=False).input_ids)
                       for text in texts), default=0)
        return self.generate(views, longest + 8)

    def generate(self, views: list[View | None], tokens: int) -> list[dict | None]:
        """Greedy decoding of each view."""
        end = self.chat.end_id

        def decode(part: list[View], numbers: list[int]) -> list[dict]:
            # `generate` takes pixels and not features, so every image needs them
            family = self.vlm.family
            images = [image for n in numbers
                      for image in with_pixels(load_images(self.examples[n], family), family)]
            made = self.vlm.generate(part, images, self.encode_images, tokens)
            # a row that has ended is padded until the longest of its batch has ended
            made = [ids[:ids.index(end) + 1] if end in ids else ids for ids in made]
            return [dict(text=self.decode(ids), tokens=len(ids), images=len(view.images),
                         passes=len(ids)) for ids, view in zip(made, part)]

        return self.in_batches(views, decode)

    def decode(self, ids: list[int]) -> str:
        return self.vlm.tokenizer.decode(ids, skip_special_tokens=True)

    def in_batches(self, views: list[View | None], answer: Callable) -> list:
        """answer(views, numbers) over batches of similar length; results in the order given."""
        out: list = [None] * len(views)
        # sorted by length, because a short prompt beside a long one is mostly padding
        order = sorted((n for n, view in enumerate(views) if view), key=lambda n: len(views[n].ids))
        for start in range(0, len(order), self.batch):
            numbers = order[start:start + self.batch]
            for n, result in zip(numbers, answer([views[n] for n in numbers], numbers)):
                out[n] = result
        return out


def answer_questions(evaluator: Evaluator, free_tokens: int = 0,
                     ways: dict[str, Callable] | None = None) -> list[dict]:
    """One record per example: for each way the text, whether it is right, and what it cost.

    ways: more ways to answer, each from an Evaluator to one dict per example.
    """
    vlm = evaluator.vlm
    was_training = vlm.training
    vlm.eval()
    found = dict(direct=evaluator.direct(), free=evaluator.free(free_tokens), tool=evaluator.tool())
    found |= {name: way(evaluator) for name, way in (ways or {}).items()}
    vlm.train(was_training)
    return [answer_record(example, {way: all_of[n] for way, all_of in found.items() if all_of[n]},
                          evaluator.prefix) for n, example in enumerate(evaluator.examples)]


def answer_record(example: Example, given: dict[str, dict], prefix: str) -> dict:
    record = dict(id=example.id, task=example.task, options=example.options, answer=example.answer,
                  cost={})
    for way, answer in given.items():
        text, option = answer["text"], answer.get("option")
        # a tool call that fails gives no answer, and the direct one counts
        if answer.get("failed"):
            text, option = f"({answer['failed']})", given["direct"]["option"]
        elif "option" not in answer:
            option = answers.says(text, example.options, prefix)
        record[way], record[f"{way}_right"] = text, option == example.options.index(example.answer)
        record["cost"][way] = {name: value for name, value in answer.items()
                               if name not in ("text", "option", "log_probs")}
    return record


# ---- runs on disk -------------------------------------------------------------------------------


def load_run(folder: Path, device: str) -> tuple[VLM, SimpleNamespace, dict[str, Callable]]:
    """A run's best checkpoint, its config, and its method's own ways to answer."""
    config, checkpoint = run.finished(folder)
    config = SimpleNamespace(**config)
    vlm = VLM(config.model, getattr(torch, config.dtype), config.min_pixels, config.max_pixels)
    # what answers is a plain VLM; a predictor's file is not even opened
    vlm.to(device).load_adapter(checkpoint)
    vlm.eval()
    return vlm, config, method_of(config).ways(config, vlm, checkpoint)


def method_of(config):
    """The class of a rival or variant; of Pearl and SFT, which have no ways of their own, none."""
    if config.method in ("pearl", "sft"):
        return SimpleNamespace(ways=lambda *_: {}, shown=lambda example, _: example)
    return room("baselines", f"--method {config.method}").find(config.method)


def merge(*arguments: str) -> None:
    """RUN DIR [DTYPE]: the run's best checkpoint as an ordinary folder without our code."""
    if len(arguments) not in (2, 3):
        raise ValueError("--merge takes two folders and perhaps a dtype: python train.py --merge "
                         "RUN DIR [float32]")
    config, checkpoint = run.finished(Path(arguments[0]))
    adapters.save_merged(config, checkpoint, Path(arguments[1]), *arguments[2:])


def report(out: Path, config, tests: Sequence[Example], before: list[dict],
           seconds: float) -> None:
    """Load the best checkpoint as a user would, answer the test questions, print and keep them."""
    vlm, config, ways = load_run(out, config.device)
    # the tool's answer is asked for in the way it was learned
    tests = [method_of(config).shown(example, config) for example in tests]
    after = answer_questions(Evaluator(vlm, tests, config.answer_prefix), ways=ways)
    best = run.best_checkpoint(out)
    write_json(out / "results.json", dict(best=best, train_seconds=seconds, answers=after,
                                          before=before))
    print(f"\ntest accuracy in %, before and after {config.steps} steps ({seconds / 60:.1f} "
          f"minutes); best checkpoint: step {best['step']}")
    columns = dict(before=tables.summarise(before), after=tables.summarise(after))
    print(f"{tables.format_table(columns)}\n{tables.conclusion(config.method, **columns)}")
    print(f"everything is in {out}")


# ---- the program --------------------------------------------------------------------------------


def ask_again(path: Path, args: argparse.Namespace) -> list[dict]:
    """Answers of a run's best checkpoint, or of a checkpoint that was not trained here."""
    if (path / "best.json").is_file():
        vlm, config, ways = load_run(path, args.device)
    else:
        vlm = VLM(str(path), min_pixels=args.min_pixels, max_pixels=args.max_pixels)
        config, ways = SimpleNamespace(data="", regime="", outside_images=False,
                                       answer_prefix=args.answer_prefix), {}
        vlm.to(args.device).eval()
    config.data = args.data or config.data
    config.outside_images |= args.outside_images
    if args.call_limit:
        tool_use = room("baselines.tool_use", "--call_limit")
        ways["call"] = lambda evaluator: tool_use.answer(evaluator, args.call_limit)
    questions = test_questions(config, args.per_task, args.split)
    evaluator = Evaluator(vlm, questions, config.answer_prefix)
    return answer_questions(evaluator, args.free_tokens, ways)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="RUN_OR_MODEL")
    for name, default, help in (
            ("data", "", "a data folder; default: the run's own"),
            ("split", "test", "test or validation"),
            ("answer_prefix", "Answer:", "what starts the answers of a checkpoint"),
            ("per_task", 200, "test questions of each task of the world"),
            ("free_tokens", 0, "tokens of a free answer; 0: what the longest option needs"),
            ("call_limit", 0, "also explicit tool use, with at most so many calls"),
            ("min_pixels", 0, "of a checkpoint's images"), ("max_pixels", 0, "the same"),
            ("json", "", "write the table and every answer to this file"),
            ("device", "cuda" if torch.cuda.is_available() else "cpu", "any PyTorch device")):
        parser.add_argument(f"--{name}", type=type(default), default=default, help=help)
    parser.add_argument("--again", action="store_true", help="ask again, not from results.json")
    parser.add_argument("--outside_images", action="store_true", help="paths may leave the folder")
    args = parser.parse_args()
    results = args.path / "results.json"
    if results.is_file() and not (args.again or args.data):
        found = json.loads(results.read_text(encoding="utf-8"))["answers"]
    else:
        found = ask_again(args.path, args)
    columns = {str(args.path): tables.summarise(found)}
    print(tables.format_table(columns))
    if args.json:
        write_json(Path(args.json), dict(table=columns, answers=found))


if __name__ == "__main__":
    run_program(main)
