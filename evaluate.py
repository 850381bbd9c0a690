"""Evaluation: answer from <I0, Q> alone, by the model's ordinary `generate` (section 3.8 of
arXiv:2604.08065), and compare.

    python evaluate.py RUN [RUN ...] [--json FILE]     # table of each run, one over all
    python evaluate.py RUN --again --call_limit 3      # every question asked anew, with tools too
    python evaluate.py --model tiny-vlm                # an untrained checkpoint, on the whole world

The ways to answer, each with its 95% interval (Wilson) per question family:
  direct  the answer prefix ("Answer:") is given and decoding is confined to the options' words:
          what the model knows
  free    nothing is given; the few tokens decoded must be the answer: what a user would get
  tool    the expert's calls and their images are given; the model reads them and answers
  call    explicit tool use: the model's own calls, really run (baselines/tool_use.py)
  latent  the rival's own inference: latents for tool images (baselines/reconstruction.py)
`direct` and `free` are Pearl's inference: no tool, no [PRED], no latent predictor. `tool` says how
well the trajectories themselves were learned, so that methods can be compared at equal skill.
"""

import argparse
import json
from functools import cached_property, partial
from pathlib import Path

import torch

from baselines import reconstruction, tool_use, variants
from data import Serializer, View
from model import VLM
from support import adapters, answers, progress, run_folder
from support.files import write_json
from support.images import ImageStore
from support.processes import run_program
from support.records import Example
from support.tables import format_table, summarise


class Answerer:
    """Test questions put to one model. Each way returns one dict an example: what was said (text),
    and its cost in tokens, images and forward passes."""

    def __init__(self, vlm: VLM, examples: list[Example], prefix: str = "Answer:", batch: int = 64):
        self.vlm, self.examples, self.prefix, self.batch = vlm, examples, prefix, batch
        self.serializer = Serializer(vlm.family, vlm.max_positions)
        self.store = ImageStore(vlm.family)
        # of each example (numbers of its images, what stands for them in the text)
        self.placed = [self.store.add(example) for example in examples]
        for example in examples:
            self.serializer.check(example)
        # how the data write an answer, for questions whose trajectory does not tell
        self.common = answers.common_form(examples, prefix)

    @cached_property
    def prompts(self) -> list[View]:
        return [self.prompt(*asked, 1) for asked in zip(self.examples, self.placed)]

    def prompt(self, example: Example, place, turns: int) -> View:
        """The first turns of the trajectory's conversation, and the generation prompt."""
        # one turn is <I0, Q>: all that Pearl's inference sees
        asked = self.serializer.turns(example)[:turns]
        shown = sum(not isinstance(part, str) for _, parts in asked for part in parts)
        return self.serializer.prompt(asked, place[0][:shown], place[1][:shown])

    @cached_property
    def begun(self) -> list[tuple[View, list[list[int]]]]:
        """Of each example the prompt with the answer begun, and each option's tokens."""
        found = []
        for example, place in zip(self.examples, self.placed):
            # begun as this record's expert words an answer, or else as most of them do
            last = example.texts[-1] if example.texts else ""
            form = answers.form_of(last, example.answer, self.prefix) or self.common
            found.append(self.serializer.answer_prompt(example, *place, form))
        return found

    def shown_with_tools(self, example: Example) -> bool:
        """Whether it has tool images, and the model may be shown more than one image."""
        return len(example.images) > 1 and not self.vlm.family.alone_only

    def check_lengths(self) -> None:
        """Raises ValueError for a question that leaves no room for its answer: before training."""
        for example, place, (prompt, options) in zip(self.examples, self.placed, self.begun):
            # directly: the longest answer has to fit, whichever the model will give
            asked = [prompt.ids + max(options, key=len)]
            if self.shown_with_tools(example):
                # and with the expert's tool, up to the end of its answer
                told = self.serializer.conversation(self.serializer.turns(example), place[1])
                asked.append(told.until_last_label().ids)
            for ids in asked:
                self.serializer.check_length(prompt._replace(ids=ids), example)

    def decode(self, ids: list[int]) -> str:
        return self.vlm.tokenizer.decode(ids, skip_special_tokens=True)

    def in_batches(self, views: list[View], decode) -> list:
        """decode(views, numbers) over batches of similar length; results in the order given."""
        # sorted, because a short prompt beside a long one is mostly padding
        out: list = [None] * len(views)
        order = sorted(range(len(views)), key=lambda i: len(views[i].ids))
        for start in range(0, len(order), self.batch):
            rows = order[start:start + self.batch]
            for row, result in zip(rows, decode([views[r] for r in rows], rows)):
                out[row] = result
        return out

    def generate(self, views: list[View], tokens: int,
                 option_tokens: list[list[list[int]]] | None = None) -> list[dict]:
        """Greedy decoding. option_tokens: for each view the sequences that it is confined to."""
        end = self.serializer.end_id

        def decode(part: list[View], rows: list[int]) -> list[dict]:
            def allowed(row: int, made: list[int]) -> list[int]:
                # the next token of every option that what was made so far begins
                options = option_tokens[rows[row]]
                goes_on = [o[len(made)] for o in options
                           if len(o) > len(made) and o[:len(made)] == made]
                # none: this row is done, others of the batch are not
                return goes_on or [end]

            made = self.vlm.generate(part, self.store, tokens, allowed if option_tokens else None)
            # a row that is done is padded until the longest of its batch is
            made = [ids[:ids.index(end) + 1] if end in ids else ids for ids in made]
            return [dict(ids=ids, text=self.decode(ids), tokens=len(ids), images=len(view.images),
                         passes=len(ids)) for ids, view in zip(made, part)]

        return self.in_batches(views, decode)

    def direct(self) -> list[dict]:
        # Confined, because a model that was taught trajectories begins with a plan: what it knows
        # would not be seen (that is `free`). The prefix is given for the same reason.
        prompts, option_tokens = [b[0] for b in self.begun], [b[1] for b in self.begun]
        longest = max(len(option) for options in option_tokens for option in options)
        out = self.generate(prompts, longest, option_tokens)
        # decoding was confined to the options, so what was made begins with just one of them
        for example, options, said in zip(self.examples, option_tokens, out):
            # None: a model that has broken down (NaN) writes outside what it is confined to
            said["option"] = next((n for n, option in enumerate(options)
                                   if said["ids"][:len(option)] == option), None)
            said["text"] = "" if said["option"] is None else example.options[said["option"]]
        return out

    def free(self, tokens: int = 0) -> list[dict]:
        """tokens 0: as many as the longest answer needs, four (the paper's) at least."""
        if cut := sum(needed > tokens > 0 for needed in self.answer_tokens()):
            print(f"free: {cut} of {len(self.examples)} questions have options that take more than "
                  f"--free_tokens {tokens}; 0 gives them as many as they need")
        return self.generate(self.prompts, tokens or max(4, *self.answer_tokens()))

    def answer_tokens(self) -> list[int]:
        """Of each question the tokens of its longest option, with prefix and end of turn."""
        return [len(begun.ids) + max(map(len, options)) - len(asked.ids)
                for asked, (begun, options) in zip(self.prompts, self.begun)]

    def tool(self) -> list[dict | None]:
        """None where the example has no tool image that can be shown."""
        # nothing is called here: calls and images are the record's own, so a miss is a misreading
        rows = [i for i, example in enumerate(self.examples) if self.shown_with_tools(example)]
        views, longest = [], 0
        for example, place in ((self.examples[i], self.placed[i]) for i in rows):
            turns = self.serializer.turns(example)
            # all that follows the last tool image is asked for
            while turns[-1][0] == "assistant":
                turns.pop()
            views.append(self.prompt(example, place, len(turns)))
            # room for the expert's last words, and a few more: the model may put it otherwise
            last = self.vlm.tokenizer(example.texts[-1], add_special_tokens=False).input_ids
            longest = max(longest, len(last))
        found = dict(zip(rows, self.generate(views, longest + 8)))
        return [found.get(i) for i in range(len(self.examples))]


@torch.no_grad()
def answer_questions(vlm: VLM, examples: list[Example], answer_prefix: str = "Answer:",
                     free_tokens: int = 0, call_limit: int = 0, scale=None, latents: int = 8,
                     asker: Answerer | None = None) -> list[dict]:
    """One record an example: of each way what was said, whether it was right and what it cost.

    asker: of these examples, if there is one already.
    """
    was_training = vlm.training
    # without dropout; what the model was doing it goes on with afterwards
    vlm.eval()
    asker = asker or Answerer(vlm, examples, answer_prefix)
    # every model is asked in these three ways, so that any two can be compared
    said = dict(direct=asker.direct(), free=asker.free(free_tokens), tool=asker.tool())
    # 0: nobody has asked for calls; and only the rival has a scale, whose latents need one
    if call_limit:
        said["call"] = tool_use.answer(asker, call_limit)
    if scale is not None:
        said["latent"] = reconstruction.answer(asker, scale, latents)
    records = []
    for i, example in enumerate(examples):
        right = example.options.index(example.answer)
        record = dict(id=example.id, task=example.task, options=example.options,
                      answer=example.answer, cost={})
        for way, answer in ((way, all_of[i]) for way, all_of in said.items() if all_of[i]):
            record[way] = answer["text"]
            option = answer.get("option")
            # who failed to call a tool has no answer: what counts is the direct one
            if answer.get("failed"):
                record[way], option = f"({answer['failed']})", said["direct"][i]["option"]
            # free words: one comparison for all that compares (support/answers.py)
            elif option is None:
                option = answers.says(answer["text"], example.options, answer_prefix)
            record[f"{way}_right"] = option == right
            record["cost"][way] = {name: value for name, value in answer.items()
                                   if name not in ("ids", "text", "option")}
        records.append(record)
    vlm.train(was_training)
    return records


def tracked(vlm: VLM, examples: list[Example], prefix: str) -> dict[str, float]:
    """Direct accuracy, and accuracy with the expert's tool, of the model as it is."""
    # the two that matter together: `direct` that falls is forgetting only where `tool` has risen
    records = answer_questions(vlm, examples, prefix)
    rights = {way: [r[f"{way}_right"] for r in records if f"{way}_right" in r]
              for way in ("direct", "tool")}
    return {way: sum(right) / max(1, len(right)) for way, right in rights.items()}


def ask(vlm: VLM, examples: list[Example], prefix: str, call_limit: int = 0, scale=None,
        latents: int = 8, free_tokens: int = 0, timed: int = 9) -> dict:
    """answers, and for each way the median milliseconds of one answer, one question at a time."""
    found = answer_questions(vlm, examples, prefix, free_tokens, call_limit, scale, latents)
    # free and tool take as long as direct, word for word; these two do something else
    ways = dict(direct=Answerer.direct)
    if call_limit:
        ways["call"] = partial(tool_use.answer, limit=call_limit)
    if scale is not None:
        ways["latent"] = partial(reconstruction.answer, scale=scale, latents=latents)
    # from all over the list, so of every family
    chosen = examples[::max(1, len(examples) // timed)][:timed] if timed > 1 else []
    ms = {}
    for way, answer in ways.items() if len(chosen) > 1 else ():
        # each way with askers of its own: what one has encoded, the next would find done
        askers = (Answerer(vlm, [example], prefix, batch=1) for example in chosen)
        ms[way] = progress.milliseconds(answer, askers, vlm.device)
    return dict(answers=found, ms=ms)


# ---- runs on disk -------------------------------------------------------------------------------


def load_run(run: Path, device: str) -> tuple[VLM, dict, torch.nn.Module | None]:
    """A run's best checkpoint, merged, its config, and of a recon run its scale."""
    config, checkpoint = run_folder.finished(run)
    vlm = VLM(config["model"], dtype=getattr(torch, config["dtype"])).to(device)
    # merged into the weights: what answers is a plain model; a predictor's file is not even opened
    vlm.load_adapter(checkpoint)
    scale = reconstruction.load_scale(checkpoint, vlm) if config["method"] == "recon" else None
    return vlm.eval(), config, scale


def merge(*folders: str) -> None:
    """RUN DIR: the run's best checkpoint as an ordinary folder, which needs none of our code."""
    if len(folders) != 2:
        raise ValueError("--merge takes two: python train.py --merge RUN DIR")
    adapters.save_merged(load_run(Path(folders[0]), "cpu")[0], Path(folders[1]))


def answers_before(out: Path, asker: Answerer, config) -> list[dict]:
    """Answers of the model as it comes, from before.json if an interrupted run left it."""
    file = out / "before.json"
    if not file.is_file():
        write_json(file, answer_questions(asker.vlm, asker.examples, config.answer_prefix,
                                          config.free_tokens, asker=asker))
    return json.loads(file.read_text(encoding="utf-8"))


def report(out: Path, config, tests: list[Example], before: list[dict], seconds: float) -> None:
    """Load the best checkpoint as a user would, answer the test questions, show and keep it."""
    # from disk, and not the model in memory: what is reported is what a user gets
    vlm, _, scale = load_run(out, config.device)
    # the tool's answer is asked for as it was taught
    tests = variants.as_shown(tests, config)
    asked = ask(vlm, tests, config.answer_prefix, config.call_limit, scale, config.decode_latents,
                config.free_tokens)
    best = run_folder.best_checkpoint(out)
    write_json(out / "results.json", dict(best=best, train_seconds=seconds, **asked, before=before))
    print(f"\ntest accuracy in %, before and after {config.steps} steps ({seconds / 60:.1f} "
          f"minutes); best checkpoint: step {best['step']}")
    tables = dict(before=summarise(before), after=summarise(asked["answers"]))
    print(f"{format_table(tables)}\n{progress.conclusion(config, **tables)}")
    print(f"everything is in {out}")


def main() -> None:
    from analysis import compare_runs  # here, and not above: it compares what this file asks

    compare_runs.run(argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))


if __name__ == "__main__":
    run_program(main)
