"""What a run trains on: the views of one record, token by token. The most frequent fault in
fine-tuning VLMs is a wrong label mask, and people find it by looking.

    python analysis/show.py                                     # the world's first training example
    python analysis/show.py --row 7 --data DIR --model MODEL    # a record of yours, MODEL's tokens
    python analysis/show.py --method recon --latents 4          # and every other option of train.py

A line ends where what is done with its tokens changes. It begins with their numbers in the view,
and s where L_VLM (Eq. 3) supervises them (green on a terminal, unless NO_COLOR is set). A blank
that belongs to a token is shown as ·, layout as \\n. Image tokens, [PRED] rows and latents are
counted, with their first and last position ids (Qwen: time / height / width). No weights are read:
the model is made from its config, without memory for them.
"""

import os
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import make_dataclass
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`

from baselines import Recon, variants
from data import View, collate
from support.chat import Chat
from support.families import load_family
from support.features import load_images
from support.options import option, parse, room, value_of
from support.processes import run_program
from support.records import Example, read_record
from train import SFT, Pearl, config_class, find_method


class Printer:
    """The views of an example that a run of this method and config reads, as lines of text."""

    def __init__(self, method: type[Pearl], config, family, example: Example):
        self.method, self.config, self.family = method, config, family
        self.tokenizer, self.image_id = family.tokenizer, family.lm.config.image_token_id
        images = load_images(example, family)
        self.images = {image.key: image for image in images}
        full, prompt, target = method.views(config, Chat(family, sys.maxsize), example, images)
        # where h^_R and h_R stand; no loss reads the embedding of the full view
        self.views, self.marks = dict(full=full), dict(full=[])
        # SFT has no other views, a bare answer no R
        if not issubclass(method, (SFT, Recon)) and not example.bare:
            place = getattr(config, "target_position", "end")
            model = SimpleNamespace(lm=family.lm, family=family)
            h_R = variants.positions(collate([target], 0), model, place)[0].nonzero()[:, 0]
            # no loss reads the labels of the target view
            target = target._replace(labels=[-100] * len(target.ids))
            self.views |= dict(input=prompt, target=target)
            self.marks |= dict(input=[prompt.embed_at], target=h_R.tolist())
        # a tokenizer may drop a blank that begins a text, so each token is decoded behind a letter
        self.letter = self.tokenizer("a", add_special_tokens=False).input_ids
        self.green = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def lines(self) -> Iterator[str]:
        for name, view in self.views.items():
            yield f"\n{name} view, {len(view.ids)} tokens"
            yield from self.tokens(name, view)
        yield from ("", *self.readings())
        longest = max(len(view.ids) for view in self.views.values())
        limit = self.family.lm.config.text_config.max_position_embeddings
        if longest > limit:
            yield f"too long to train on: {longest} tokens, the model has {limit} positions"

    def tokens(self, name: str, view: View) -> Iterator[str]:
        """Runs of tokens with which the same is done; image tokens and injected ones in a line."""
        texts = [self.tokenizer(self.images[key].text, add_special_tokens=False).input_ids
                 for key in view.images]
        keys = iter([key for key, ids in zip(view.images, texts)
                     for _ in range(ids.count(self.image_id))])
        kinds = [(next(keys) if id == self.image_id else None, n in view.inject_at,
                  view.labels[n] != -100, n in self.marks[name]) for n, id in enumerate(view.ids)]
        for kind, group in groupby(range(len(kinds)), kinds.__getitem__):
            rows, (image, injected, supervised, embedding) = [*group], kind
            words = " ".join(self.word(view.ids[n]) for n in rows)
            lines = textwrap.wrap(words, 85, break_long_words=False, break_on_hyphens=False)
            sizes, first = [len(line.split()) for line in lines], rows[0]
            if injected or image is not None:
                lines, sizes = [self.counted(view, image, rows)], [len(rows)]
            for size, line in zip(sizes, lines):
                place = f"{first}-{first + size - 1}" if size > 1 else f"{first}"
                line = f"{'s' if supervised else ' '} {place:>9}  {line}"
                line += {"input": "  <- h^_R", "target": "  <- h_R"}[name] if embedding else ""
                yield f"\033[32m{line}\033[0m" if self.green and supervised else line
                first += size

    def counted(self, view: View, image: str | None, rows: list[int]) -> str:
        """Tokens of an image, or injected ones, in place of their words."""
        text = "[PRED]" if "input" in self.views else "latent"
        if image is not None:
            grid = self.images[image].grid
            text = f"{self.word(self.image_id)}, image {list(self.images).index(image)}"
            text += f", {grid[1]} x {grid[2]} patches" if grid else ""
        batch, grids = collate([view], 0), [self.images[key].grid for key in view.images]
        positions = self.family.positions(batch.ids, batch.mask, grids)[:, 0, rows]
        axes = [f"{axis[0]}-{axis[-1]}" for axis in positions.tolist()]
        axes = axes if len(set(axes)) > 1 else axes[:1]
        return f"{len(rows)} x {text}, positions {' / '.join(axes)}"

    def word(self, id: int) -> str:
        """A token as text without blanks; where it is no whole text, as the vocabulary has it."""
        text = self.tokenizer.decode([*self.letter, id], clean_up_tokenization_spaces=False)
        text = text.removeprefix(self.tokenizer.decode(self.letter))
        if not text or "\ufffd" in text:
            text = self.tokenizer.convert_ids_to_tokens(id)
        return "".join("·" if c == " " else c if c.isprintable()
                       else c.encode("unicode_escape").decode() for c in text)

    def readings(self) -> Iterator[str]:
        """What each loss of this run reads."""
        supervised = f"{sum(label != -100 for label in self.views['full'].labels)} tokens marked s"
        yield f"L_VLM (Eq. 3): the {supervised}, each from the state before it"
        if issubclass(self.method, Recon):
            yield "L_latent: of each latent the visual embedding, from the state before it"
        if "input" in self.views and not issubclass(self.method, variants.NoJEPA):
            marks, layer = self.marks["target"], getattr(self.config, "target_layer", -1)
            state = f"state {marks[0]}" if len(marks) == 1 else f"the mean of {len(marks)} states"
            state += " of the target view" + (f", entering layer {layer}" if layer >= 0 else "")
            yield (f"L_JEPA (Eq. 1): h^_R, state {self.marks['input'][0]} of the input view, and "
                   f"h_R, {state}")
        if issubclass(self.method, (SFT, Recon, variants.NoNextLat)):
            return
        on_R = issubclass(self.method, variants.NextLatOnR)
        yield (f"L_NextLat (Eq. 2): the states of the {'target view' if on_R else supervised}, "
               "each from the one before it")
        if (token := getattr(self.config, "nextlat_token", "none")) != "none":
            which = dict(fed="itself", next="behind it")[token]
            yield f"L_NextLat, token term: of each such state the token {which}, if marked s"


def main() -> None:
    row = ("row", int, option(0, "which record: its number, from 0"))
    config = parse(make_dataclass("Options", [row], bases=(config_class(
        value_of("method", None, "pearl")),)), None, __doc__)
    method = find_method(config.method)
    family = load_family(config.model, config.min_pixels, config.max_pixels)
    if config.data:
        example = read_record(config.data, config.row, config.answer_prefix)
    else:
        world = room("world.loader", "a record without --data")
        example = world.examples(config.regime, "train", config.row + 1)[-1]
    print(f"{example.id}: {example.question!r} {example.answer!r}")
    # a method may learn from a record in two ways, or only from its answer
    for record in method.records([example], config):
        print(*Printer(method, config, family, record).lines(), sep="\n")


if __name__ == "__main__":
    run_program(main)
