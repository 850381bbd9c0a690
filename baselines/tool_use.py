"""Explicit tool use: the model writes its own calls, each is executed, its image is appended."""

import re
from copy import copy
from dataclasses import replace
from pathlib import Path

from support.chat import Chat
from support.images import load_images
from support.records import Example
from world.tools import CALL, TOOLS, call_tool

# An answer may hold brackets too, [3, 4] or [Path A]: only a tool's name with a number behind it is
# an attempt at a call
ATTEMPT = re.compile(rf"\[\s*(?:{'|'.join(TOOLS)})\s+[-\d]", re.IGNORECASE)
TURN_TOKENS = 56  # enough for any plan and call


def answer(evaluator, limit: int) -> list[dict]:
    """One dict per example (evaluate.Evaluator); `failed` says why an attempt has no text: a call
    that is malformed or does not fit its image, one call too many, or a conversation that has grown
    beyond the model's positions."""
    return [talk.result for talk in converse(evaluator, limit)]


def converse(evaluator, limit: int) -> list["Talk"]:
    """The finished conversation of each example. In each round every unfinished one gets a turn of
    the model, and the call in it is executed."""
    talks = [Talk(evaluator.chat, example) for example in evaluator.examples]
    evaluator = copy(evaluator)  # its pictures become those of the conversations
    for _ in range(limit + 1):
        evaluator.images = [talk.images for talk in talks]
        views = [None if "text" in talk.result else talk.view for talk in talks]
        for talk, reply in zip(talks, evaluator.generate(views, TURN_TOKENS)):
            if reply:
                talk.read(reply, limit)
    return talks


def show(evaluator, limit: int, stem: str) -> None:
    """Print one conversation, and save each tool's picture as STEM-tool-N.png, N the next free."""
    (talk,), number = converse(evaluator, limit), 0
    for step in talk.example.trajectory:
        if not isinstance(step, str):
            while (file := Path(f"{stem}-tool-{number}.png")).exists():
                number += 1
            step.save(file)
        print(step if isinstance(step, str) else f"-> {file}")
    print(talk.result["text"] or f"({talk.result['failed']})")


class Talk:
    """One example's conversation so far, as an example whose trajectory is the model's own. result:
    its cost, and at last its text or `failed`."""

    def __init__(self, chat: Chat, example: Example):
        self.chat, self.result = chat, dict(calls=0, tokens=0, images=0, passes=0)
        # another id, because the keys of images hold it, and the expert's images are others
        self.take(replace(example, id=f"{example.id}, own calls", trajectory=[]))

    def take(self, example: Example) -> None:
        """The conversation so far. It fails if the model has too few positions for a turn."""
        self.images = load_images(example, self.chat.family)
        self.view = self.chat.prompt(self.chat.turns(example), self.images)
        self.example = example
        if (room := self.chat.max_tokens - len(self.view.ids)) < TURN_TOKENS:
            self.result.update(text="", failed=f"{room} tokens left, a turn may need {TURN_TOKENS}")

    def read(self, reply: dict, limit: int) -> None:
        """Execute the call in a turn and append its image; a turn without one is the answer."""
        for cost in ("tokens", "images", "passes"):
            self.result[cost] += reply[cost]
        text = reply["text"]
        call = CALL.search(text)
        if not call and not ATTEMPT.search(text):
            self.result["text"] = text
            return
        try:
            if self.result["calls"] == limit:
                raise ValueError("one call too many")
            picture = call_tool(text, *(image.picture for image in self.images))
            steps = [*self.example.trajectory, text[:call.end()], picture]
            self.take(replace(self.example, trajectory=steps))
            self.result["calls"] += 1
        except ValueError as error:
            self.result.update(text="", failed=str(error))
