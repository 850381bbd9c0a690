"""What is trained on: the views of one record, token by token. The most frequent fault in
fine-tuning VLMs is a wrong label mask, and people find it by looking.

    python data.py --show                                     # the world's first training example
    python data.py --show --row 7 --data DIR --model MODEL    # a record of yours, in MODEL's tokens
    python data.py --show --method recon --latents 4          # --recipe, --pred_tokens ... as well

A line ends where what is done with its tokens changes. In front stand their numbers in the view,
and s where L_VLM (Eq. 3) supervises them (green on a terminal, unless NO_COLOR is set). A blank
that belongs to a token is shown as ·, layout as \\n. Image tokens, [PRED] rows and latents are
counted, with their first and last position ids (Qwen: time / height / width). No weights are read:
the model is made from its config, without memory for them.
"""

import os
import sys
import textwrap
from argparse import ArgumentParser
from dataclasses import fields, replace
from itertools import groupby
from pathlib import Path
from typing import Iterator

from baselines import reconstruction, release, variants
from data import Examples, View, collate
from support.families import load_family
from support.options import RECIPES, Config, add_field, given_options
from support.records import read_record
from world.scenes import REGIMES, make_world, write_sample

# of a training run: what decides which tokens there are, and which loss reads them
OPTIONS = ("recipe", "method", "model", "data", "outside_images", "regime", "answer_prefix",
           "order", "pred_tokens", "jepa", "target_view", "nextlat_view", "latents", "max_tokens",
           "pred_position", "supervise_layout", "supervise_turns", "strip_calls", "nextlat_token")


def run(parser: ArgumentParser) -> None:
    """data.py's command line. Raises ValueError or OSError for what is not there."""
    parser.add_argument("--show", action="store_true", help="print the views of one record")
    parser.add_argument("--row", type=int, default=0, help="which: its number, from 0")
    parser.add_argument("--out", type=Path, help="new folder to write a sample of the world to")
    parser.add_argument("--count", type=int, default=40, help="training examples; others a quarter")
    parser.add_argument("--seed", type=int, default=0, help="of the world's scenes")
    for f in fields(Config):
        if f.name in OPTIONS:
            add_field(parser, f, tuple(REGIMES) if f.name == "regime" else ())
    args = given_options(parser, Config, sys.argv[1:])
    given = {name: value for name, value in args.items() if name in OPTIONS}
    config = Config(**RECIPES[given.get("recipe", "ours")] | given, world_seed=args["seed"])
    if args["show"]:
        show(config, args["row"])
    elif args["out"] and args["count"] > 0:
        write_sample(args["out"], config.regime, args["count"], config.world_seed)
    else:
        parser.error("name --show, or --out DIR with a --count of 1 or more")


def show(config: Config, row: int) -> None:
    if config.data:
        example = read_record(config.data, row, config.outside_images, config.answer_prefix)
    elif row >= 0:
        example = make_world(config.regime, "train", row + 1, config.world_seed)[-1]
    else:
        raise ValueError(f"--row {row} is not there: rows are counted from 0")
    taught = variants.as_taught([example], config)  # with --method both there are two
    found = Examples([example], taught, load_family(config.model), sys.maxsize,
                     replace(config, max_tokens=sys.maxsize))
    release.adapt_views(found, taught, config)
    if config.method == "recon":
        reconstruction.add_views(found, taught, config)
    sys.stdout.reconfigure(errors="backslashreplace")  # tokens may hold any character
    print(f"{example.id}: {example.question!r} {example.answer!r}")
    for n in range(len(taught)):
        print(*Printer(found, n, config).lines(), sep="\n")


class Printer:
    """The views of a row of examples that a run of this config reads, as lines of text."""

    def __init__(self, examples: Examples, row: int, config: Config):
        self.store, self.config, self.family = examples.store, config, examples.serializer.family
        self.tokenizer, self.image_id = self.family.tokenizer, self.family.lm.config.image_token_id
        full, asked, target = examples.views[row]
        if config.method == "recon":
            full = examples.latent_views[row]
        self.views = dict(full=full._replace(embed_at=-1))  # no loss reads that state
        if config.method == "pearl":  # nor the labels of the target view
            self.views |= dict(input=asked, target=target._replace(labels=[-100] * len(target.ids)))
        # a tokenizer may drop a blank that begins a text, so each token is decoded behind a letter
        self.letter = self.tokenizer("a", add_special_tokens=False).input_ids
        self.green = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def lines(self) -> Iterator[str]:
        for name, view in self.views.items():
            yield f"\n{name} view, {len(view.ids)} tokens"
            yield from self.tokens(name, view)
        yield from ("", *self.readings())
        if (longest := max(len(view.ids) for view in self.views.values())) > self.config.max_tokens:
            yield f"too long to train on: {longest} tokens, --max_tokens {self.config.max_tokens}"

    def tokens(self, name: str, view: View) -> Iterator[str]:
        """Runs of tokens with which the same is done: image tokens and injected ones in a line."""
        texts = [self.tokenizer(self.store.image_texts[i], add_special_tokens=False).input_ids
                 for i in view.images]
        shown = iter([i for i, ids in zip(view.images, texts) for id in ids if id == self.image_id])
        kinds = [(next(shown) if id == self.image_id else None, n in view.inject_at,
                  view.labels[n] != -100, n == view.embed_at) for n, id in enumerate(view.ids)]
        for kind, run in groupby(range(len(kinds)), kinds.__getitem__):
            first, (image, given, supervised, embedding) = next(run), kind
            words = " ".join(self.word(view.ids[n]) for n in (first, *run))
            lines = textwrap.wrap(words, 85, break_long_words=False, break_on_hyphens=False)
            if given or image is not None:
                lines = [self.folded(view, image, first, len(words.split()))]
            for line in lines:
                size = len((line if len(lines) > 1 else words).split())
                place = f"{first}-{first + size - 1}" if size > 1 else f"{first}"
                line = f"{'s' if supervised else ' '} {place:>9}  {line}"
                line += {"input": "  <- h^_R", "target": "  <- h_R"}[name] if embedding else ""
                yield f"\033[32m{line}\033[0m" if self.green and supervised else line
                first += size

    def folded(self, view: View, image: int | None, first: int, count: int) -> str:
        what = "[PRED]" if "input" in self.views else "latent"
        if image is not None:
            what, grid = self.word(self.image_id), self.store.grids[image]
            what += f", image {image - self.views['full'].images[0]}"
            what += f", {grid[1]} x {grid[2]} patches" if grid else ""
        batch, grids = collate([view], 0), [self.store.grids[i] for i in view.images]
        positions = self.family.positions(batch.ids, batch.mask, grids)[:, 0, first:first + count]
        rows = [f"{row[0]}-{row[-1]}" for row in positions.tolist()]  # A of them
        return f"{count} x {what}, positions {' / '.join(rows if len(set(rows)) > 1 else rows[:1])}"

    def word(self, id: int) -> str:
        """A token as text without blanks; where it is no whole text, as the vocabulary has it."""
        text = self.tokenizer.decode([*self.letter, id], clean_up_tokenization_spaces=False)
        text = text.removeprefix(self.tokenizer.decode(self.letter))
        if not text or "\ufffd" in text:
            text = self.tokenizer.convert_ids_to_tokens(id)
        return "".join("·" if c == " " else c if c.isprintable()
                       else c.encode("unicode_escape").decode() for c in text)

    def readings(self) -> Iterator[str]:
        """What each loss of this run reads (train.compute_losses)."""
        words = f"{sum(label != -100 for label in self.views['full'].labels)} tokens marked s"
        yield f"L_VLM (Eq. 3): the {words}, each from the state before it"
        if self.config.method == "recon":
            yield "L_latent: of each latent the visual embedding, from the state before it"
        if "input" in self.views and self.config.jepa:
            yield (f"L_JEPA (Eq. 1): h^_R, state {self.views['input'].embed_at} of the input view, "
                   f"and h_R, state {self.views['target'].embed_at} of the target view")
        if "input" in self.views and self.config.nextlat_view != "none":
            along = f"the {words}" if self.config.nextlat_view == "full" else "the target view"
            yield f"L_NextLat (Eq. 2): the states of {along}, each from the one before it"
            if self.config.nextlat_token != "none":
                which = dict(fed="itself", next="behind it")[self.config.nextlat_token]
                yield f"L_NextLat, token term: of each such state the token {which}, if marked s"
