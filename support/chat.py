"""A conversation as token ids and labels, with the model's own chat template.

An example becomes turns: <I0, Q> is a user turn, each text of R an assistant turn, each tool image
a user turn (a tool's output comes from outside, so the model never learns to write one).

Labels are right by construction. Nothing searches for words in decoded text, where the first match
may be another one: the conversation is rendered with one more turn each time, so that the place of
each turn is known in characters, and the tokenizer says which characters each token covers.
"""

from typing import NamedTuple

from support.families import Turn
from support.features import LoadedImage
from support.records import Example


class View(NamedTuple):
    """One sequence."""

    ids: list[int]
    labels: list[int]  # the token itself where it is supervised, else -100
    images: list[str]  # keys of the images, in order of appearance
    embed_at: int  # the position whose final-layer state is the view's embedding
    # positions whose input embedding comes from outside: [PRED] rows, or the rival's latents
    inject_at: tuple[int, ...] = ()


class Speech(NamedTuple):
    """The place of an assistant's turn in the rendered text, in characters."""

    start: int  # the generation prompt ends here and the model's own tokens begin
    words: int  # the first character of the words; some templates put a blank before it
    end: int  # the end-of-turn token begins here


class Conversation(NamedTuple):
    """A rendered conversation, with each image expanded to its tokens."""

    text: str
    ids: list[int]
    labels: list[int]  # the token itself where the assistant speaks, else -100
    # per token: where it ends in the text; per turn: where it begins (both in characters)
    ends: list[int]
    turn_starts: list[int]
    speeches: list[Speech]

    def first_after(self, position: int) -> int:
        """The first token that reaches beyond a position of the text."""
        return next((n for n, end in enumerate(self.ends) if end > position), len(self.ends))

    def without_layout(self) -> "Conversation":
        """Without what the template writes after the last end-of-turn token (Qwen: a newline):
        h_R is the state of the end token."""
        stop = max(n for n, label in enumerate(self.labels) if label != -100) + 1
        return self._replace(ids=self.ids[:stop], labels=self.labels[:stop], ends=self.ends[:stop])


class Chat:
    """Renders conversations for one model. family: tokenizer, template, placeholder of images
    (support/families.py). Raises ValueError for a template that does not write an assistant's turn
    as generation prompt, text, end of turn."""

    def __init__(self, family, max_tokens: int):
        self.family, self.tokenizer, self.max_tokens = family, family.tokenizer, max_tokens
        self.end_id = family.end_id
        # a template is a program: we learn what it puts around words from words that we know
        prompt = [("user", ["Q"])]
        question = self.family.render(prompt)
        self.header = self.family.render(prompt, add_generation_prompt=True)[len(question):]
        turn = self.family.render([*prompt, ("assistant", ["Xyz"])])[len(question):]
        opening, _, self.ending = turn.partition("Xyz")
        # training turns must begin with the tokens that inference begins with, up to blanks
        if opening.strip() != self.header.strip() or not self.ending.strip():
            raise ValueError(
                "the model's chat template does not write an assistant's turn as generation "
                f"prompt, text, end of turn: {self.header!r} and {turn!r}; give the checkpoint "
                "another chat_template.jinja")

    @staticmethod
    def turns(example: Example) -> list[Turn]:
        steps = [("assistant" if isinstance(step, str) else "user", [step])
                 for step in example.trajectory]
        # the image comes first, as in the families' own examples
        return [("user", [example.image, example.question]), *steps]

    def prompt(self, turns: list[Turn], images: list[LoadedImage]) -> View:
        """A conversation and the generation prompt: of <I0, Q>, all that inference sees. Nothing is
        supervised."""
        ids = self.conversation(turns, images, prompt=True).ids
        return View(ids, [-100] * len(ids), [image.key for image in images], len(ids) - 1)

    def conversation(self, turns: list[Turn], images: list[LoadedImage],
                     prompt: bool = False) -> Conversation:
        """The turns as tokens, followed by the generation prompt if `prompt`. images: those of the
        turns, in order. Raises ValueError if the template rewrites earlier turns or changes the
        assistant's text."""
        # `rendered` has one placeholder per image; in `text` the placeholders are expanded
        rendered, text, starts, speeches, images = "", "", [], [], iter(images)
        for n, (role, parts) in enumerate(turns):
            whole = self.family.render(turns[:n + 1])
            if not whole.startswith(rendered):
                raise ValueError("the model's chat template rewrites earlier turns; give the "
                                 "checkpoint another chat_template.jinja")
            turn, rendered = whole[len(rendered):], whole
            starts.append(len(text))
            if role == "assistant":
                speeches.append(self._speech(turn, parts[0], len(text)))
            # an image becomes as many image tokens as its size asks for
            first, *rest = turn.split(self.family.placeholder)
            assert len(rest) == sum(not isinstance(part, str) for part in parts), turn
            text += first + "".join(next(images).text + piece for piece in rest)
        if prompt:
            text += self.family.render(turns, add_generation_prompt=True)[len(rendered):]
        # The whole text is tokenised at once. Many tokenizers treat a piece that stands alone
        # differently (a mark before its first word, merged newlines), and models saw whole texts.
        ids, spans = self.family.encode(text)
        # supervised: from the first word up to and with the end-of-turn token
        labels = [token if any(s.start < end and start <= s.end for s in speeches) else -100
                  for token, (start, end) in zip(ids, spans)]
        return Conversation(text, ids, labels, [end for _, end in spans], starts, speeches)

    def _speech(self, turn: str, words: str, start: int) -> Speech:
        """The place of the words in an assistant's turn that begins at `start`."""
        # from the end of the turn, because a template may pad its beginning
        opening = turn.removesuffix(words + self.ending)
        if opening == turn or opening.strip() != self.header.strip():
            raise ValueError(f"the model's chat template changes the assistant's text {words!r} "
                             f"to {turn!r}; give the checkpoint another chat_template.jinja")
        # a blank between header and words belongs to the words: the model has to write it
        header = self.header if opening.startswith(self.header) else opening
        # blanks behind the words too: the end-of-turn token begins after them
        blanks = len(self.ending) - len(self.ending.lstrip())
        first = start + len(opening)
        return Speech(start + len(header), first, first + len(words) + blanks)

    # ---- checks, each a ValueError with one sentence ----

    def check_text(self, example: Example) -> None:
        """No text may contain what the template uses as its own markup."""
        text = "\n".join([example.question, *example.options, *example.texts])
        for token in self.family.reserved:
            if token in text:
                raise ValueError(f"example {example.id}: the text contains the model's special "
                                 f"token {token!r}; remove it")

    def check_length(self, tokens: int, example: Example) -> None:
        # a view that is cut off loses its last token, which carries the embedding
        if tokens > self.max_tokens:
            raise ValueError(f"example {example.id}: {tokens} tokens, the model has "
                             f"{self.max_tokens} positions; shorten its texts or lower "
                             "--max_pixels")

    def check_ids(self, example: Example, images: list[LoadedImage]) -> None:
        """Our ids must be those of the family's own processor."""
        turns = self.turns(example)
        ids = self.family.own_ids(turns, [image.picture for image in images])
        if self.conversation(turns, images).ids != ids:
            raise ValueError(f"example {example.id}: the model's own processor makes other ids of "
                             "this conversation; this family or tokenizer is not supported")
