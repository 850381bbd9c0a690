"""Explicit tool use: the model writes its own calls, each is really run, its image is appended."""

import re

from support.images import opened
from world.tools import CALL, TOOLS, call_tool

# an answer may hold brackets: [3, 4, 10, 12]; only a tool's own name makes them a call
CALL_BEGUN = re.compile(rf"\[\s*(?:{'|'.join(TOOLS)})\b", re.IGNORECASE)
TURN_TOKENS = 56  # enough for any plan and call


def answer(asker, limit: int) -> list[dict]:
    """One record an example (asker: evaluate.Answerer), in rounds: everyone still talking writes
    one turn, and the call in it is run.

    A call that is malformed or does not fit its image ends the attempt, as does one call too many,
    or a conversation that has grown beyond the model's positions: the record then says so in
    `failed` and has no text.
    """
    talks = [dict(turns=asker.serializer.turns(example)[:1], shown=[example.image],
                  indices=numbers[:1], calls=0, tokens=0, images=0, passes=0)
             for example, (numbers, _) in zip(asker.examples, asker.placed)]
    active = talks
    for _ in range(limit + 1):
        for talk in active:
            talk["view"] = view = asker.serializer.prompt(
                talk["turns"], talk["indices"],
                [asker.store.image_texts[i] for i in talk["indices"]])
            room = asker.serializer.max_tokens - len(view.ids)
            # behind its last position a model goes on, and writes nonsense
            if room < TURN_TOKENS:
                talk.update(text="", failed=f"{room} tokens left, a turn may need {TURN_TOKENS}")
        active = [talk for talk in active if "text" not in talk]
        views = [talk["view"] for talk in active]
        for talk, said in zip(active, asker.generate(views, TURN_TOKENS) if views else []):
            for cost in ("tokens", "images", "passes"):
                talk[cost] += said[cost]
            run_call(asker, talk, said["text"], limit)
        active = [talk for talk in active if "text" not in talk]
    kept = ("text", "failed", "calls", "tokens", "images", "passes")
    return [{name: talk[name] for name in kept if name in talk} for talk in talks]


def run_call(asker, talk: dict, text: str, limit: int) -> None:
    """Run the call in `text` and append its image; a text without one is the answer."""
    if not CALL_BEGUN.search(text):
        talk["text"] = text
    elif talk["calls"] == limit:
        talk.update(text="", failed="one call too many")
    else:
        try:
            talk["shown"].append(call_tool(text, *map(opened, talk["shown"])))
            talk["indices"] = talk["indices"] + [asker.store.add_image(talk["shown"][-1], text)]
            said = text[:CALL.search(text).end()]
            talk["turns"] = [*talk["turns"], ("assistant", [said]), ("user", talk["shown"][-1:])]
            talk["calls"] += 1
        except ValueError as error:
            talk.update(text="", failed=str(error))
