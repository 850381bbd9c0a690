"""Data: one record -> three views -> one batch. Sections 3.1 to 3.4 of arXiv:2604.08065.

A record is a question with an expert's tool-use trajectory (`Example`, support/records.py):

    <I0, Q>   the image and "Which digit is on the red disc?"
    R         "Zoom in on the red disc. [crop 12 30 28 46]", the crop, "... Answer: seven"

This file writes it as token ids three times, with the model's own chat template: the full view
<I0, Q, R>, the input view <I0, Q> and the target view R; and puts views of several records into
one batch.

    python data.py --show [--data DIR] [--model MODEL]     # the views of a record, token by token
    python data.py --out DIR --regime mixed --count 40     # a data folder of the small world

Letters: B batch, T sequence (text and image tokens), K predictor tokens.
Left out on purpose: reading folders and images (support/), the world's scenes and tools (world/).
"""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Iterator, NamedTuple

import torch

from support.answers import AnswerForm
from support.images import ImageStore, opened
from support.options import Config
from support.processes import run_program
from support.records import Example

TARGET_VIEWS = ("trajectory", "trajectory_with_image")


class View(NamedTuple):
    """One serialised sequence."""

    ids: list[int]
    # the token itself where it is supervised, -100 elsewhere
    labels: list[int]
    # numbers of the data set's images, in order of appearance
    images: list[int]
    # the position whose final-layer state is the view's embedding
    embed_at: int
    # positions whose input embedding is given from outside: [PRED] rows, or the rival's latents
    inject_at: tuple[int, ...] = ()


class Views(NamedTuple):
    full: View
    input: View
    target: View


class Said(NamedTuple):
    """Where an assistant's turn stands in the rendered text, in characters."""

    # behind the generation prompt: from here on the model speaks
    start: int
    # its first word; a template may put a blank before it
    text: int
    # here the end-of-turn token begins
    end: int


class Conversation(NamedTuple):
    """A rendered conversation, each image as the text that stands for it, and its tokens."""

    text: str
    ids: list[int]
    labels: list[int]
    # of each token, where it ends in the text, in characters; of each turn, where it begins
    ends: list[int]
    turns: list[int]
    said: list[Said]

    def first_behind(self, position: int) -> int:
        """The first token that reaches beyond a position of the text."""
        return next((n for n, end in enumerate(self.ends) if end > position), len(self.ends))

    def until_last_label(self) -> "Conversation":
        """Without the layout that a template writes after the last end-of-turn token."""
        # a turn's line break is the template's, not the model's; and h_R stands at the end token
        stop = max(n for n, label in enumerate(self.labels) if label != -100) + 1
        return self._replace(ids=self.ids[:stop], labels=self.labels[:stop], ends=self.ends[:stop])


class Serializer:
    """Builds views from an example with the model's own chat template.

    The conversation is <I0, Q> as a user turn, each text of R as an assistant turn, each tool image
    as a user turn.

    Worked example, shipped model, K = 2; I0 takes 16 image tokens, the crop 4. s supervised:

        full view (L_VLM, Eq. 3, and L_NextLat, Eq. 2)
          - <|im_start|>user\\n<|vision_start|>(16 x <|image_pad|>)<|vision_end|>
            Which digit is on the red disc?<|im_end|>\\n
          - <|im_start|>assistant\\n
          s Zoom in on the red disc. [crop 12 30 28 46]<|im_end|>
          - \\n<|im_start|>user\\n<|vision_start|>(4 x <|image_pad|>)<|vision_end|><|im_end|>\\n
          - <|im_start|>assistant\\n
          s The digit is seven. Answer: seven<|im_end|>
        input view (h^_R, Eq. 1: state of the last [PRED])
          - <I0, Q> and the generation prompt as above, then [PRED][PRED]
        target view (h_R, Eq. 1: state of the last <|im_end|>)
          - the full view from its first "<|im_start|>assistant" on, so without I0 and Q

    """

    def __init__(self, family, max_tokens: int):
        """family: tokenizer, template and placeholder of a model (support/families.py)."""
        self.family, self.tokenizer, self.max_tokens = family, family.tokenizer, max_tokens
        # a template is a program: what it puts around words is seen by giving it words that we know
        asked = [("user", ["Q"])]
        question = self._render(asked)
        self.header = self._render(asked, add_generation_prompt=True)[len(question):]
        turn = self._render([*asked, ("assistant", ["Xyz"])])[len(question):]
        opening, found, self.ending = turn.partition("Xyz")
        # what the model is prompted with must be what its turns begin with, up to blanks
        if not found or opening.strip() != self.header.strip() or not self.ending.strip():
            raise ValueError(
                "the model's chat template does not write an assistant's turn as generation "
                f"prompt, text, end of turn: {self.header!r} and {turn!r}; give the checkpoint "
                "another chat_template.jinja")
        self.end_id = family.end_id

    @staticmethod
    def messages(turns: list[tuple[str, list]]) -> list[dict]:
        """(role, parts) turns as chat templates take them."""
        return [dict(role=role, content=[
            dict(type="text", text=part) if isinstance(part, str) else dict(type="image")
            for part in parts]) for role, parts in turns]

    def _render(self, turns: list[tuple[str, list]], **kwargs) -> str:
        return self.family.render(self.messages(turns), **kwargs)

    def conversation(self, turns: list[tuple[str, list]], image_texts: list[str],
                     prompt: bool = False) -> Conversation:
        """(role, parts) turns, with the generation prompt behind them if `prompt`, as tokens."""
        # `rendered` is the template's text, with one placeholder an image; `text` has them expanded
        rendered, text, starts, said, waiting = "", "", [], [], iter(image_texts)
        # Labels must be right by construction, not by searching for words in decoded text, where
        # the first match may be another. So the conversation is rendered with one turn more each
        # time: what is new is this turn, and its place is known.
        for n, (role, parts) in enumerate(turns):
            whole = self._render(turns[:n + 1])
            if not whole.startswith(rendered):
                raise ValueError("the model's chat template rewrites earlier turns; give it "
                                 "another chat_template.jinja")
            turn, rendered = whole[len(rendered):], whole
            starts.append(len(text))
            if role == "assistant":
                said.append(self._said(turn, parts[0], len(text)))
            # an image is a run of image tokens, as many as its size asks for
            first, *rest = turn.split(self.family.placeholder)
            assert len(rest) == sum(not isinstance(part, str) for part in parts), turn
            text += first + "".join(next(waiting) + piece for piece in rest)
        if prompt:
            text += self._render(turns, add_generation_prompt=True)[len(rendered):]
        return self._tokenise(text, starts, said)

    def _said(self, turn: str, words: str, start: int) -> Said:
        """Where an assistant's turn, which begins at `start`, has its words and its end."""
        # counted from the end, which is always the same; a template may pad the beginning
        first = len(turn) - len(self.ending) - len(words)
        opening = turn[:max(0, first)]
        if opening + words + self.ending != turn or opening.strip() != self.header.strip():
            raise ValueError(f"the model's chat template changed the assistant's text {words!r} "
                             f"to {turn!r}")
        # a blank before the first word belongs to the words: the model has to write it
        begins = len(self.header) if opening.startswith(self.header) else first
        # and so does one behind the last word: the end-of-turn token begins after it
        blanks = len(self.ending) - len(self.ending.lstrip())
        return Said(start + begins, start + first, start + first + len(words) + blanks)

    def _tokenise(self, text: str, starts: list[int], said: list[Said]) -> Conversation:
        # Once and as a whole: many tokenizers treat a piece that stands alone differently (a word
        # mark in front of it, line breaks that merge), and a model has seen wholes only
        ids, places = self.family.encode(text)
        # from an answer's first word on, up to the end-of-turn token, which is learned too
        labels = [token if any(s.start < end and start <= s.end for s in said) else -100
                  for token, (start, end) in zip(ids, places)]
        return Conversation(text, ids, labels, [end for _, end in places], starts, said)

    def check(self, example: Example) -> None:
        """Raises ValueError for a text that would be read as a token of the template's own."""
        for text in [example.question, *example.options, *example.texts]:
            for token in self.family.reserved:
                if token in text:
                    raise ValueError(f"example {example.id}: the text contains the model's "
                                     f"special token {token!r}; remove it")

    @staticmethod
    def turns(example: Example) -> list[tuple[str, list]]:
        # a tool's output comes from outside, like a question: the model never learns to write one
        steps = [("assistant" if isinstance(step, str) else "user", [step])
                 for step in example.trajectory]
        # the image first, as in the families' own examples
        return [("user", [example.image, example.question]), *steps]

    def views(self, example: Example, images: list[int], image_texts: list[str],
              pred_tokens: int, target_view: str) -> Views:
        """The three views of an example whose images (I0 first) have these numbers and texts."""
        if not example.texts:
            raise ValueError(f"example {example.id} has a trajectory without text: nothing to "
                             "learn from")
        self.check(example)
        turns = self.turns(example)
        # Deviation: the paper embeds a view at its last token. Full and target view end at the
        # token that ends the turn, as in the release: its state can sum up what was said
        told = self.conversation(turns, image_texts).until_last_label()
        full = View(told.ids, told.labels, images, len(told.ids) - 1)

        # Deviation: the paper appends [PRED] to <I0, Q>. Here they stand after the generation
        # prompt, where decoding would start; the release puts them inside the user's turn
        asked = self.prompt(turns[:1], images[:1], image_texts[:1])
        # [PRED] have no ids of their own: model.py puts their rows where `inject_at` says
        ids = asked.ids + [self.end_id] * pred_tokens
        input_view = View(ids, [-100] * len(ids), images[:1], len(ids) - 1,
                          tuple(range(len(asked.ids), len(ids))))

        if target_view == "trajectory":
            # the same tokens from the first turn of R on: no leakage of I0 and Q into the target
            first, bos = told.first_behind(told.turns[1]), self.tokenizer.bos_token_id
            # texts that all open with bos do so here too; its label: the -100 of what it replaces
            opening = [bos] if told.ids[0] == bos and told.ids[first] != bos else []
            ids, labels = opening + told.ids[first:], told.labels[first - len(opening):]
            target = View(ids, labels, images[1:], len(ids) - 1)
        # the release: I0 as well, in a turn of its own without Q
        elif target_view == "trajectory_with_image":
            shown = self.conversation([("user", [example.image]), *turns[1:]], image_texts)
            shown = shown.until_last_label()
            target = View(shown.ids, shown.labels, images, len(shown.ids) - 1)
        else:
            raise ValueError(f"unknown target view {target_view!r}: choose one of "
                             f"{', '.join(TARGET_VIEWS)}")
        for view in (full, input_view, target):
            self.check_length(view, example)
        return Views(full, input_view, target)

    def check_ids(self, example: Example, image_texts: list[str]) -> None:
        """Raises ValueError where the family's own processor makes other ids of a conversation."""
        # the reference that everybody else's code uses, and none of it made by ours
        turns = self.turns(example)
        theirs = self.family.own_ids(self.messages(turns), [opened(i) for i in example.images])
        if self.conversation(turns, image_texts).ids != theirs:
            raise ValueError(f"example {example.id}: the ids of its conversation are not those "
                             "that the model's own processor makes of it; this family or "
                             "tokenizer is not served")

    def check_length(self, view: View, example: Example) -> None:
        # cut off, a view would lose its last token, which is the one that counts
        if len(view.ids) > self.max_tokens:
            raise ValueError(f"example {example.id}: {len(view.ids)} tokens, the limit is "
                             f"{self.max_tokens} (--max_tokens, or the model's positions); shorten "
                             "its texts or shrink its images")

    def prompt(self, turns: list[tuple[str, list]], images: list[int],
               image_texts: list[str]) -> View:
        """A conversation so far and the generation prompt: of <I0, Q>, all that inference sees."""
        # here the model would begin to speak, so nothing is supervised
        ids = self.conversation(turns, image_texts, prompt=True).ids
        return View(ids, [-100] * len(ids), images, len(ids) - 1)

    def answer_prompt(self, example: Example, images: list[int], image_texts: list[str],
                      form: AnswerForm) -> tuple[View, list[list[int]]]:
        """<I0, Q> with the answer begun, and of each option the tokens that complete it."""
        # every option is serialised as an answer in full: what is scored are the tokens that
        # training on it would have
        answers = []
        for option in example.options:
            turns = [*self.turns(example)[:1], ("assistant", [form.text(option)])]
            answers.append(self.conversation(turns, image_texts[:1]).until_last_label())
        # the prompt is what all options share, up to the end of the prefix
        first = answers[0]
        begun = first.first_behind(first.said[0].text + len(form.prefix))
        # a tokenizer may join the prefix's last letters with an option's first ones
        while any(answer.ids[:begun] != first.ids[:begun] for answer in answers):
            begun -= 1
        prompt = View(first.ids[:begun], [-100] * begun, images[:1], begun - 1)
        return prompt, [answer.ids[begun:] for answer in answers]


class Examples:
    """The examples of one split, ready for the loop: three views of each, and their images."""

    def __init__(self, examples: list[Example], taught: list[Example], family, max_positions: int,
                 config: Config):
        """taught: what is made of `examples` for the run's method (baselines/variants.py)."""
        self.examples = examples
        self.serializer = Serializer(family, min(config.max_tokens, max_positions))
        self.store = ImageStore(family, config.workers, config.feature_cache_gb,
                                config.feature_cache, frozen=not config.train_vision)
        # of each example the numbers of its images (I0 first), and what stands for them in the text
        self.placed = [self.store.add(example) for example in taught]
        # made once and kept, ids only: pixels are read when a step needs them
        self.views = [self.serializer.views(example, *place, config.pred_tokens, config.target_view)
                      for example, place in zip(taught, self.placed)]
        # one record is enough to see a template or tokenizer that we read in another way
        if taught:
            self.serializer.check_ids(taught[0], self.placed[0][1])
        # by row (D): h_R, where it was cached (train.py, cache_targets)
        self.targets: dict[int, torch.Tensor] = {}

    def steps(self, config: Config) -> Iterator[list[int]]:
        """The rows of one optimiser step after another, each once an epoch, for ever."""
        size, order = config.batch * config.accumulate, []
        # a generator of its own: the order is the seed's alone, whatever else draws numbers
        generator = torch.Generator().manual_seed(config.seed)
        while True:
            # a step may end one epoch and begin the next: none is smaller than the others
            while len(order) < size:
                order += torch.randperm(len(self.views), generator=generator).tolist()
            rows, order = order[:size], order[size:]
            # passes of views of similar length need little padding
            if config.accumulate > 1:
                rows.sort(key=lambda row: len(self.views[row].full.ids))
            yield rows

    def prefetch(self, rows: list[int]) -> None:
        """Begin to read these examples' images in the background."""
        self.store.prefetch([i for row in rows for i in self.views[row].full.images])


@dataclass
class Batch:
    """Views padded to a common length. All tensors are (B, T) unless said."""

    ids: torch.Tensor
    # True: a token, False: padding
    mask: torch.Tensor
    labels: torch.Tensor
    # True: the input embedding is given from outside
    inject_at: torch.Tensor
    embed_at: torch.Tensor  # (B,)
    # in order of appearance, row after row
    images: list[int]
    # with branches (support/packing.py): how many first tokens a branch sees, (B,), and how many
    # last positions branches take
    shared: torch.Tensor | None = None
    branch: int = 0

    def to(self, device) -> "Batch":
        return dataclasses.replace(self, **{
            name: value.to(device, non_blocking=True) for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)})


def collate(views: list[View], pad_id: int, left: bool = False) -> Batch:
    """Pad on the right (training) or on the left (generation), to the longest view."""
    # on the right a causal model never sees it; on the left all rows end, and go on, together
    width = max(len(view.ids) for view in views)
    shift = [width - len(view.ids) if left else 0 for view in views]

    def padded(rows: list[list], value) -> torch.Tensor:
        rows = [[value] * before + row for before, row in zip(shift, rows)]
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])

    return Batch(
        ids=padded([view.ids for view in views], pad_id),
        mask=padded([[True] * len(view.ids) for view in views], False),
        # -100: cross-entropy's own mark for what does not count
        labels=padded([view.labels for view in views], -100),
        inject_at=padded([[n in view.inject_at for n in range(len(view.ids))] for view in views],
                         False),
        embed_at=torch.tensor([view.embed_at + before for view, before in zip(views, shift)]),
        images=[image for view in views for image in view.images])


def main() -> None:
    from analysis import token_view  # here, and not above: it is made of this file's views

    token_view.run(argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))


if __name__ == "__main__":
    run_program(main)
