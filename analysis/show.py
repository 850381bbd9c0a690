"""What a run trains on: the views of one record, of any length, token by token. The most frequent
fault in fine-tuning VLMs is a wrong label mask, and people find it by looking.

    python analysis/show.py                                     # the world's first training example
    python analysis/show.py --row 7 --data DIR --model MODEL    # a record of yours, MODEL's tokens
    python analysis/show.py --method recon --latents 4          # and every other option of train.py

A line ends where what is done with its tokens changes. It begins with their numbers in the view,
and s where L_VLM (Eq. 3) supervises them. A blank that belongs to a token is shown as ·, layout as
\\n. Image tokens, [PRED] rows and latents are counted, with their first and last position ids
(Qwen: time / height / width). No weights are read.
"""

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import make_dataclass
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # before any other `analysis`
from baselines import Recon, SelfDistill, variants
from data import View, collate
from support.chat import Chat
from support import families, options, processes
from support.images import load_images
from support.records import Example, read_record
from train import SFT, Pearl, config_class, find_method


def lines(method: type[Pearl], config, family, example: Example) -> Iterator[str]:
    """The views of an example that a run of this method and config reads, as lines of text."""
    loaded = load_images(example, family)
    full, prompt, target = method.views(config, Chat(family, sys.maxsize), example, loaded)
    images = {image.key: image for image in loaded}
    # what is injected, and where h^_R and h_R stand; no loss reads the embedding of the full view
    views = [("full", full, "latent", {})]
    if issubclass(method, SelfDistill):
        views.append(("student's", prompt, "", {}))
    # SFT has no other views, a bare answer no R
    if not issubclass(method, (SFT, Recon)) and not example.bare:
        place = getattr(config, "target_position", "end")
        model = SimpleNamespace(lm=family.lm, family=family)
        h_R = variants.positions(collate([target], 0), model, place)[0].nonzero()[:, 0].tolist()
        # no loss reads the labels of the target view
        target = target._replace(labels=[-100] * len(target.ids))
        views += [("input", prompt, "[PRED]", {prompt.state_at: "  <- h^_R"}),
                  ("target", target, "", dict.fromkeys(h_R, "  <- h_R"))]
    for name, view, injected, marks in views:
        yield f"\n{name} view, {len(view.ids)} tokens"
        yield from tokens(family, images, view, injected, marks)


def tokens(family, images: dict, view: View, injected: str, marks: dict[int, str]) -> Iterator[str]:
    """Runs of tokens with which the same is done; image tokens and injected ones in a line. marks:
    by position, what is written behind its text."""
    image_id, batch = family.lm.config.image_token_id, collate([view], 0)
    grids = [images[key].grid for key in view.images]
    positions = family.positions(batch.ids, batch.mask, grids)[:, 0]
    # of each image token, what it belongs to
    owners = iter([
        f"{word(family, image_id)}, image {[*images].index(key)}"
        + (f", {grid[1]} x {grid[2]} patches" if grid else "")
        for key, grid in zip(view.images, grids)
        for _ in range(family.tokenizer(images[key].text, add_special_tokens=False)
                       .input_ids.count(image_id))])
    kinds = [(next(owners) if id == image_id else injected if n in view.inject_at else "",
              view.labels[n] != -100, marks.get(n, "")) for n, id in enumerate(view.ids)]
    for (counted, supervised, mark), group in groupby(range(len(kinds)), kinds.__getitem__):
        rows = [*group]
        first, texts = rows[0], [" ".join(word(family, view.ids[n]) for n in rows)]
        if counted:
            axes = [f"{axis[0]}-{axis[-1]}" for axis in positions[:, rows].tolist()]
            at = " / ".join(axes if len(set(axes)) > 1 else axes[:1])
            texts = [f"{len(rows)} x {counted}, positions {at}"]
        else:
            texts = textwrap.wrap(*texts, 85, break_long_words=False, break_on_hyphens=False)
        for text in texts:
            size = len(rows) if counted else len(text.split())
            place = f"{first}-{first + size - 1}" if size > 1 else f"{first}"
            yield f"{'s' if supervised else ' '} {place:>9}  {text}{mark}"
            first += size


def word(family, id: int) -> str:
    """A token as text without blanks; where it is no whole text, as the vocabulary has it."""
    tokenizer = family.tokenizer
    # a tokenizer may drop a blank that begins a text, so the token is decoded behind a letter
    letter = tokenizer("a", add_special_tokens=False).input_ids
    text = tokenizer.decode([*letter, id], clean_up_tokenization_spaces=False)
    text = text.removeprefix(tokenizer.decode(letter))
    if not text or "\ufffd" in text:
        text = tokenizer.convert_ids_to_tokens(id)
    return "".join("·" if c == " " else c if c.isprintable()
                   else c.encode("unicode_escape").decode() for c in text)


def main() -> None:
    row = ("row", int, options.option(0, "which record: its number, from 0"))
    config = options.parse(make_dataclass("Options", [row], bases=(config_class(
        options.value_of("method", None, "pearl")),)), None, __doc__)
    method = find_method(config.method)
    family = families.load_family(config.model, config.min_pixels, config.max_pixels)
    if config.data:
        example = read_record(config.data, config.row)
    else:
        world = options.optional_folder("world.loader", "a record without --data")
        example = world.examples(config.regime, "train", config.row + 1)[-1]
    print(f"{example.id}: {example.question!r} {example.answer!r}")
    # a method may learn from a record in two ways, or only from its answer
    for record in method.records([example], config):
        print(*lines(method, config, family, record), sep="\n")


if __name__ == "__main__":
    processes.run_program(main)
