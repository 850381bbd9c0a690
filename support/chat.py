"""A conversation as token ids and labels, with the model's own chat template.

An example becomes turns: <I0, Q> is a user turn, each text of R an assistant turn, each tool image
a user turn (a tool's output comes from outside, so the model never learns to write one).

Labels are right by construction. Nothing searches for words in decoded text, where the first match
may be another one: the conversation is rendered with one more turn each time, so that the place of
each turn is known in characters, and the tokenizer says which characters each token covers.
"""

from bisect import bisect
from typing import NamedTuple

from support.answers import AnswerForm
from support.families import Turn
from support.images import LoadedImage
from support.records import Example


class View(NamedTuple):
    """One sequence."""

    ids: list[int]
    labels: list[int]  # the token itself where it is supervised, else -100
    images: list[str]  # keys of the images, in order of appearance
    state_at: int  # the position whose final-layer state is the view's embedding
    # positions whose input embedding comes from outside: [PRED] rows, or the rival's latents
    inject_at: tuple[int, ...] = ()


class Question(NamedTuple):
    """A test question as tokens."""

    prompt: View  # <I0, Q> and the generation prompt
    started: View  # the same, with the answer started: "Answer:"
    options: list[list[int]]  # the tokens of each option behind it
    # the prompt for the last text of the trajectory, tool images given; None: it has no tool image
    tool: View | None


class Conversation(NamedTuple):
    """A rendered conversation, with each image expanded to its tokens."""

    text: str
    ids: list[int]
    labels: list[int]  # the token itself where the assistant speaks, else -100
    # per token: where it ends in the text, in rising order; per turn: where it begins. Both are in
    # characters: bisect(ends, position) is the first token that reaches beyond a position
    ends: list[int]
    turn_starts: list[int]


class Chat:
    """Renders conversations for one model, of a Family. Raises ValueError for a template that does
    not write an assistant's turn as generation prompt, text, end of turn."""

    def __init__(self, family, max_tokens: int):
        self.family, self.tokenizer, self.max_tokens = family, family.tokenizer, max_tokens
        self.end_id = family.end_id
        # a template is a program: we learn what it puts around words from words that we know
        prompt = [("user", ["Q"])]
        question = self.family.render(prompt)
        self.header = self.family.render(prompt, prompt=True)[len(question):]
        turn = self.family.render([*prompt, ("assistant", ["Xyz"])])[len(question):]
        opening, _, self.ending = turn.partition("Xyz")
        # training turns must begin with the tokens that inference begins with, up to blanks
        if opening.strip() != self.header.strip() or not self.ending.strip():
            raise ValueError("the model's chat template does not write an assistant's turn as "
                             f"generation prompt, text, end of turn: {self.header!r} and {turn!r}; "
                             "give the checkpoint another chat_template.jinja")

    def turns(self, example: Example) -> list[Turn]:
        """Raises ValueError if a text holds what the template uses as its own markup."""
        text = "\n".join([example.question, *example.options, *example.texts])
        for token in self.family.reserved:
            if token in text:
                raise ValueError(f"example {example.id}: the text contains the model's special "
                                 f"token {token!r}; remove it")
        steps = [("assistant" if isinstance(step, str) else "user", [step])
                 for step in example.trajectory]
        # the image comes first, as in the families' own examples
        return [("user", [example.image, example.question]), *steps]

    def prompt(self, turns: list[Turn], images: list[LoadedImage]) -> View:
        """A conversation and the generation prompt, as inference sees it; nothing is supervised."""
        ids = self.conversation(turns, images, prompt=True).ids
        return View(ids, [-100] * len(ids), [image.key for image in images], len(ids) - 1)

    def conversation(self, turns: list[Turn], images: list[LoadedImage],
                     prompt: bool = False, layout: bool = False) -> Conversation:
        """The turns as tokens. images: those of the turns, in order. prompt: the generation prompt
        follows. layout: with what the template writes after the last end-of-turn token (Qwen: a
        newline). Raises ValueError if the template rewrites earlier turns or the texts."""
        # `rendered` has one placeholder per image; in `text` the placeholders are expanded;
        # speeches: where in `text` the assistant's own tokens begin, and its end-of-turn token
        rendered, text, starts, speeches, images = "", "", [], [], iter(images)
        for n, (role, parts) in enumerate(turns):
            whole = self.family.render(turns[:n + 1])
            if not whole.startswith(rendered):
                raise ValueError("the model's chat template rewrites earlier turns; give the "
                                 "checkpoint another chat_template.jinja")
            turn, rendered = whole[len(rendered):], whole
            starts.append(len(text))
            if role == "assistant":
                # from the end of the turn, because a template may pad its beginning
                opening = turn.removesuffix(parts[0] + self.ending)
                if opening == turn or opening.strip() != self.header.strip():
                    raise ValueError("the model's chat template changes the assistant's text "
                                     f"{parts[0]!r} to {turn!r}; give the checkpoint another "
                                     "chat_template.jinja")
                # a blank between header and words belongs to the words: the model has to write it
                header = self.header if opening.startswith(self.header) else opening
                # blanks behind the words too: the end-of-turn token begins after them
                end = len(text) + len(turn) - len(self.ending.lstrip())
                speeches.append((len(text) + len(header), end))
            # an image becomes as many image tokens as its size asks for
            first, *rest = turn.split(self.family.placeholder)
            assert len(rest) == sum(not isinstance(part, str) for part in parts), turn
            text += first + "".join(next(images).text + piece for piece in rest)
        if prompt:
            text += self.family.render(turns, prompt=True)[len(rendered):]
        # The whole text is tokenised at once. Many tokenizers treat a piece that stands alone
        # differently (a mark before its first word, merged newlines), and models saw whole texts.
        ids, spans = self.family.encode(text)
        # supervised: from the first word up to and with the end-of-turn token
        labels = [token if any(first < end and start <= last for first, last in speeches) else -100
                  for token, (start, end) in zip(ids, spans)]
        ends, stop = [end for _, end in spans], len(ids)
        # h_R is the state of the end-of-turn token, so nothing may follow it
        while not prompt and not layout and labels[stop - 1] == -100:
            stop -= 1
        return Conversation(text, ids[:stop], labels[:stop], ends[:stop], starts)

    def question(self, example: Example, images: list[LoadedImage], form: AnswerForm) -> Question:
        """A test question. form: how its answer is written. Raises ValueError."""
        turns, whole, ends = self.turns(example), [], []
        # each option is tokenised as training would: inside the whole answer
        for option in example.options:
            answer = self.conversation([turns[0], ("assistant", [form.text(option)])], images[:1])
            whole.append(answer.ids)
            # the option's own tokens end here; its full stop and the end of the turn follow
            end = len(answer.text) - len(form.closing + self.ending)
            ends.append(bisect(answer.ends, end - 1) + 1)
        # the prompt is what all options share, up to the end of the prefix (here the last option's)
        start = bisect(answer.ends, end - len(form.gap + option))
        # a tokenizer may join the prefix's last letters with an option's first ones
        while any(ids[:start] != whole[0][:start] for ids in whole):
            start -= 1
        options = [ids[start:end] for ids, end in zip(whole, ends)]
        # where one option begins another ("top", "top left"), the end of the turn decides
        if any(a is not b and b[:len(a)] == a for a in options for b in options):
            options = [ids[start:] for ids in whole]
        started = View(whole[0][:start], [-100] * start, [images[0].key], start - 1)
        longest, tool = start + max(map(len, options)), None
        # a family that shows a single image differently from several can only be asked directly
        if len(images) > 1 and not self.family.single_image_only:
            longest = max(longest, len(self.conversation(turns, images).ids))
            last = max(n for n, (role, _) in enumerate(turns) if role == "user")
            tool = self.prompt(turns[:last + 1], images)
        self.check_length(longest, example)
        return Question(self.prompt(turns[:1], images[:1]), started, options, tool)

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
        if self.conversation(turns, images, layout=True).ids != ids:
            raise ValueError(f"example {example.id}: the model's own processor makes other ids of "
                             "this conversation; this family or tokenizer is not supported")
