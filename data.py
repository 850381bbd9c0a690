"""Data: the trajectory format, the three views of an example, and its images.

Pearl learns from expert tool-use trajectories (section 3.1 of arXiv:2604.08065). This file has, in reading order,
  1. the format: `Example`, and a folder of `trajectories.jsonl` plus `images/`, read and checked,
  2. the views: full <I0, Q, R>, input <I0, Q>, target R, as token ids with labels known by construction,
  3. batches of views, two of them packed into one pass, and the store of images that they show.

    python data.py --out DIR --regime mixed --count 40     # writes such a folder and DIR/contact_sheet.png (seconds)
    python train.py --check_data --data DIR                # reads a folder of your own, reports what is wrong with it

Letters: B batch, T sequence (text and image tokens), N tool images, K predictor tokens, P image tokens.
Left out on purpose: the tools and the procedural scenes (world/), readers for published data sets (published/), caches.
Nothing here knows about training.
"""

import argparse
import json
import time
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

# ---- 1. The format ---------------------------------------------------------------------------------------------------


Picture = Image.Image | Path  # an image in memory, or its file, read when it is needed


def opened(picture: Picture) -> Image.Image:
    return open_image(picture, "while training") if isinstance(picture, Path) else picture


def image_size(picture: Picture) -> tuple[int, int]:
    """(width, height) in px as `opened` shows it, from the file's header alone."""
    if not isinstance(picture, Path):
        return picture.size
    with Image.open(picture) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5  # these four swap the sides
        return image.size[::-1] if turned else image.size


@dataclass
class Example:
    """One question with its expert trajectory.

    `trajectory` is R = (T1, I1, ..., IN, TN): a list of str (assistant text) and pictures (tool output), in order.
    Its first text holds the plan and the call, its last text the answer. It may be empty where nothing is trained
    (the held-out family). `options` are the candidate answers, `answer` is one of them.
    """

    id: str
    family: str
    image: Picture
    question: str
    options: list[str]
    answer: str
    trajectory: list[str | Picture] = field(default_factory=list)
    split: str = "train"

    @property
    def texts(self) -> list[str]:
        return [step for step in self.trajectory if isinstance(step, str)]

    @property
    def images(self) -> list[Picture]:
        """I0 first, then the tool images I1..IN."""
        return [self.image] + [step for step in self.trajectory if not isinstance(step, str)]

    def image_first(self) -> "Example":
        """The paper's order R = (I1, T1, ..., IN, TN): every tool image before the text that calls it."""
        steps = list(self.trajectory)
        for n in range(1, len(steps)):
            if isinstance(steps[n - 1], str) and not isinstance(steps[n], str):
                steps[n - 1:n + 1] = steps[n], steps[n - 1]
        joined = []
        for step in steps:  # texts that now meet are one turn of the assistant
            if joined and isinstance(step, str) and isinstance(joined[-1], str):
                joined[-1] += " " + step
            else:
                joined.append(step)
        return replace(self, trajectory=joined)

    def answer_only(self, answer_prefix: str) -> "Example":
        """No trajectory: the answer straight after the question."""
        return replace(self, trajectory=[f"{answer_prefix} {self.answer}".strip()])


FILE = "trajectories.jsonl"
SPLITS = ("train", "validation", "test")


def write_folder(out: Path, examples: list[Example]) -> None:
    """Write `examples` as out/trajectories.jsonl and out/images/*.png. `out` must not exist yet."""
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose a new folder, nothing is overwritten")
    partial = out.with_name(out.name + ".partial")
    (partial / "images").mkdir(parents=True)
    with open(partial / FILE, "w", encoding="utf-8") as file:
        for ex in examples:
            names = [f"images/{ex.id}-{n}.png" for n in range(len(ex.images))]
            for name, image in zip(names, ex.images):
                opened(image).save(partial / name)
            file.write(record_line(ex, names))
    partial.rename(out)


def record_line(ex: Example, names: list[str]) -> str:
    """One line of trajectories.jsonl; names: the files of ex.images, relative to the folder."""
    tool_names = iter(names[1:])
    steps = [{"text": s} if isinstance(s, str) else {"image": next(tool_names)} for s in ex.trajectory]
    record = dict(id=ex.id, split=ex.split, family=ex.family, image=names[0], question=ex.question,
                  options=ex.options, answer=ex.answer, trajectory=steps)
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_folder(folder: str | Path, outside: bool = False, problems: list[str] | None = None) -> list[Example]:
    """Read a folder in the format above. Every record and every image is checked before any is used.

    Raises ValueError or FileNotFoundError naming file, line and mend; with a list for `problems` it collects them there
    and goes on. outside: image paths and links may leave the folder. A record without "split" is assigned one by the hash
    of its image name (8 : 1 : 1), so that two questions about one image never fall on two sides.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: a data folder holds {FILE} and its images (see README, data format)")
    examples, seen = [], {}
    with open(path, "rb") as file:  # a line ends at a line feed and nowhere else: texts may hold other separators
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                example = _read_record(_parse(line, where), Path(folder), where, outside)
                if example.id in seen:
                    raise ValueError(f"{where}: id {example.id!r} was used on line {seen[example.id]}; ids must be unique")
            except (ValueError, FileNotFoundError) as error:
                if problems is None:
                    raise
                problems.append(str(error))
                continue
            seen[example.id] = number
            examples.append(example)
    if not examples and not problems:
        raise ValueError(f"{path} holds no record")
    return examples


def _parse(line: bytes, where: str) -> dict:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg} at column {error.colno}); write one object a line") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply; write the object that the README shows") from None


def _read_record(record: dict, folder: Path, where: str, outside: bool) -> Example:
    def need(right: bool, message: str) -> None:
        if not right:
            raise ValueError(f"{where}: {message}")

    def text(value, name: str) -> str:
        need(isinstance(value, str) and bool(value.strip()), f"{name} must be a non-empty string; found {value!r:.80}")
        need(not any("\ud800" <= c <= "\udfff" for c in value), f"{name} holds half a character (lone surrogate); repair it")
        return value.strip()

    need(isinstance(record, dict), f"expected a JSON object, found {type(record).__name__}")
    for key, kind in dict(id=str, image=str, question=str, options=list, answer=str, trajectory=list).items():
        need(isinstance(record.get(key), kind), f"field {key!r} must be a {kind.__name__}; found {record.get(key)!r:.80}")
    options = [text(option, "every option") for option in record["options"]]
    need(len(set(options)) == len(options), f"an option is there twice: {options}")
    answer = record["answer"].strip()
    need(answer in options, f"answer {answer!r} is not among the options {options}")
    steps = []
    for n, step in enumerate(record["trajectory"]):
        need(isinstance(step, dict) and len(step) == 1 and next(iter(step)) in ("text", "image"),
             f"trajectory step {n} must be {{'text': ...}} or {{'image': ...}}; found {step!r:.80}")
        kind, value = next(iter(step.items()))
        value = text(value, f"trajectory step {n}: {kind}")
        steps.append(value if kind == "text" else checked(folder, value, where, outside))
    need(bool(steps) and isinstance(steps[-1], str), "the trajectory must end in a text that gives the answer")
    need(answer in steps[-1], f"the last text of the trajectory does not contain the answer {answer!r}")
    image, split = text(record["image"], "image"), record.get("split")
    if split is None:
        split = {0: "test", 1: "validation"}.get(zlib.crc32(image.encode()) % 10, "train")
    need(split in SPLITS, f"split {split!r} is none of {', '.join(SPLITS)}")
    return Example(text(record["id"], "id"), text(record.get("family", "questions"), "family"),
                   checked(folder, image, where, outside), text(record["question"], "question"), options,
                   answer, steps, split)


def inside(folder: Path, name: str, outside: bool = False) -> Path:
    """folder / name. Raises ValueError if that, links followed, leaves the folder, unless `outside` allows it."""
    path = folder / name
    if not outside and not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"image {name} leaves the data folder; copy it there, or allow it with --outside_images")
    return path


def checked(folder: Path, name: str, where: str, outside: bool = False) -> Path:
    try:
        path = inside(folder, name, outside)
    except ValueError as error:  # also of names that no file can have
        raise ValueError(f"{where}: {error}") from None
    open_image(path, where)
    return path


def open_image(file, where: str) -> Image.Image:
    """Read an image (a path or an open file) as RGB, wholly, so that a truncated one fails here and not in the middle of a run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return as_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: image {file} not found; paths are relative to the folder of {FILE}") from None
    except Exception as error:  # a decoder may fail in any way on foreign bytes
        raise ValueError(f"{where}: image {file} cannot be read ({error}); replace it or drop the record") from None


def as_rgb(image: Image.Image) -> Image.Image:
    """As a person sees it: 16 bits scaled to 8, transparency on white. Raises ValueError where white is not defined."""
    if image.mode == "F":
        raise ValueError("floating-point pixels: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # convert() would clip all above 255 to white
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- 2. The views (sections 3.1 to 3.4) ------------------------------------------------------------------------------

TARGET_VIEWS = ("trajectory", "trajectory_with_image")
LATENT_START, LATENT_END = "<|vision_start|>", "<|vision_end|>"  # Deviation: the paper draws <lat> and </lat>; these two are in
# every Qwen-VL vocabulary and already mean "what comes next was seen", so no row has to be added under a frozen embedding


class View(NamedTuple):
    """One serialised sequence. `labels` repeats the token where it is supervised and is -100 elsewhere.

    `images` are indices into the data set's images, in order of appearance; `embed_at` is the position whose
    final-layer state is the view's embedding; `slots` are the positions whose input embedding is not a word's or an
    image's but given from outside: [PRED] tokens, or the latents of the reconstruction baseline.
    """

    ids: list[int]
    labels: list[int]
    images: list[int]
    embed_at: int
    slots: tuple[int, ...] = ()


class Views(NamedTuple):
    full: View
    input: View
    target: View


class Serializer:
    """Builds views from an example with the model's own chat template.

    The conversation is <I0, Q> as a user turn, each text of R as an assistant turn, each tool image as a user turn.
    It is rendered turn by turn; every turn is cut into pieces whose role is known when they are made, each piece is
    tokenised on its own, and the pieces are concatenated. Nothing is ever searched for in a decoded sequence.

    Worked example, shipped model, K = 2; I0 takes 16 image tokens, the crop 4. s supervised, - not:

        full view (L_VLM, Eq. 3, and L_NextLat, Eq. 2)
          - <|im_start|>user\\n<|vision_start|>(16 x <|image_pad|>)<|vision_end|>Which digit is on the red disc?<|im_end|>\\n
          - <|im_start|>assistant\\n
          s Zoom in on the red disc. [crop 12 30 28 46]<|im_end|>
          - \\n<|im_start|>user\\n<|vision_start|>(4 x <|image_pad|>)<|vision_end|><|im_end|>\\n
          - <|im_start|>assistant\\n
          s The digit is seven. Answer: seven<|im_end|>
        input view (h^_R, Eq. 1: state of the last [PRED])
          - the full view's first two lines, then [PRED][PRED]
        target view (h_R, Eq. 1: state of the last <|im_end|>)
          - the full view without its first line, so without I0 and Q

    Deviation: the paper embeds a view at its last token. We end every view at the token that ends the turn (the
    released code takes the same token) and put [PRED] after the generation prompt, where decoding would start; the
    released code puts them inside the user turn. target_view="trajectory_with_image" keeps I0, as the release does.
    """

    def __init__(self, tokenizer, placeholder_id: int, max_tokens: int):
        """placeholder_id: the token that the chat template writes where an image is."""
        self.tokenizer, self.placeholder_id, self.max_tokens = tokenizer, placeholder_id, max_tokens
        user = self._render([self._message("user", ["x"])])
        self.header = self._render([self._message("user", ["x"])], add_generation_prompt=True)[len(user):]
        turn = self._render([self._message("user", ["x"]), self._message("assistant", ["y"])])[len(user):]
        self.lead, found, self.ending = turn.removeprefix(self.header).partition("y")  # e.g. "" (or a space), "y", "<|im_end|>\n"
        if not turn.startswith(self.header) or self.lead.strip() or not found or not self.ending.strip():
            raise ValueError("this model's chat template does not write an assistant turn as generation prompt, text, end of turn: "
                             f"{self.header!r} and {turn!r}; give the checkpoint another chat_template.jinja")
        self.end_id = self._encode(self.ending)[0]
        self.header_ids = self._encode(self.header)
        self.reserved = set(tokenizer.all_special_tokens) | set(tokenizer.get_added_vocab())

    @staticmethod
    def _message(role: str, parts: list) -> dict:
        return dict(role=role, content=[dict(type="text", text=p) if isinstance(p, str) else dict(type="image") for p in parts])

    def _render(self, messages: list[dict], **kwargs) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
        except Exception as error:  # what the template itself raises, or a fault in it
            raise ValueError(f"the model's chat template refuses the conversation: {error}") from None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []

    def _pieces(self, turns: list[tuple[str, list]]) -> list[tuple[str, bool]]:
        """(text, supervised) pieces of a conversation of (role, parts) turns."""
        messages, before, pieces = [], "", []
        for role, parts in turns:
            messages.append(self._message(role, parts))
            whole = self._render(messages)
            if not whole.startswith(before):
                raise ValueError("the model's chat template rewrites earlier turns; give it another chat_template.jinja")
            turn, before = whole[len(before):], whole
            if role == "assistant":
                body = self.header + self.lead + parts[0] + self.ending
                if not turn.endswith(body):
                    raise ValueError(f"the model's chat template changed the assistant's text {parts[0]!r} to {turn!r}")
                pieces += [(turn[:len(turn) - len(body)] + self.header, False), (self.lead + parts[0], True), (self.ending, True)]
            else:
                pieces.append((turn, False))
        return pieces

    def _tokens(self, pieces: list[tuple[str | int, bool]], spans: list[list[int]]) -> tuple[list[int], list[int], tuple]:
        """ids, labels and slots of (text, supervised) pieces; a number in place of a text makes as many slots."""
        ids, labels, slots, waiting = [], [], (), iter(spans)
        for text, supervised in pieces:
            if isinstance(text, int):
                slots += tuple(range(len(ids), len(ids) + text))
                ids, labels = ids + [self.end_id] * text, labels + [-100] * text
                continue
            tokens = []
            for token in self._encode(text):
                tokens += next(waiting) if token == self.placeholder_id else [token]
            ids += tokens
            known = tokens if supervised else [-100] * len(tokens)
            if supervised and text == self.ending:
                known = tokens[:1] + [-100] * (len(tokens) - 1)  # the end-of-turn token; what follows it is layout
            labels += known
        assert next(waiting, None) is None, "more images than image tokens in the rendered conversation"
        return ids, labels, slots

    def _ended(self, pieces: list[tuple[str | int, bool]], images: list[int], spans: list[list[int]]) -> View:
        """Cut the layout after the last end-of-turn token; the view's embedding is taken there."""
        ids, labels, slots = self._tokens(pieces, spans)
        extra = len(self._encode(self.ending)) - 1
        ids, labels = ids[:len(ids) - extra], labels[:len(labels) - extra]
        assert ids[-1] == self.end_id, "the view does not end at the end-of-turn token"
        return View(ids, labels, images, len(ids) - 1, slots)

    def check(self, example: Example) -> None:
        for text in [example.question, *example.options, *example.texts]:
            for token in self.reserved:
                if token in text:
                    raise ValueError(f"example {example.id}: the text contains the model's special token {token!r}; remove it")

    @staticmethod
    def turns(example: Example) -> list[tuple[str, list]]:
        steps = [("assistant", [s]) if isinstance(s, str) else ("user", [s]) for s in example.trajectory]
        return [("user", [example.image, example.question])] + steps

    def views(self, example: Example, images: list[int], spans: list[list[int]], pred_tokens: int, target_view: str) -> Views:
        """The three views of an example whose images (I0 first) have the given indices and stand in the text as `spans`."""
        if not example.texts:
            raise ValueError(f"example {example.id} has a trajectory without text: nothing to learn from")
        self.check(example)
        turns = self.turns(example)
        pieces = self._pieces(turns)
        full = self._ended(pieces, images, spans)
        prompt = self.prompt(example, images[:1], spans[:1])
        assert prompt.ids[-len(self.header_ids):] == self.header_ids or not self.header_ids, "the generation prompt is not last"
        ids = prompt.ids + [self.end_id] * pred_tokens  # placeholders: model.py puts the [PRED] rows there
        input_view = View(ids, [-100] * len(ids), images[:1], len(ids) - 1, tuple(range(len(prompt.ids), len(ids))))
        if target_view == "trajectory":
            bos = self.tokenizer.bos_token_id
            opening = [(self.tokenizer.bos_token, False)] if bos is not None and full.ids[0] == bos else []
            target = self._ended(opening + pieces[1:], images[1:], spans[1:])  # the first piece is the turn of I0 and Q
        elif target_view == "trajectory_with_image":
            shown = [("user", [example.image])] + turns[1:]
            target = self._ended(self._pieces(shown), images, spans)
        else:
            raise ValueError(f"unknown target view {target_view!r}: choose one of {', '.join(TARGET_VIEWS)}")
        for view in (full, input_view, target):
            if len(view.ids) > self.max_tokens:
                raise ValueError(f"example {example.id}: {len(view.ids)} tokens, the limit is {self.max_tokens}; "
                                 "shorten its texts, shrink its images, or raise --max_tokens")
        return Views(full, input_view, target)

    def prompt(self, example: Example, images: list[int], spans: list[list[int]], answer_prefix: str = "") -> View:
        """<I0, Q> and the generation prompt (and what the answer is made to start with): all that inference sees."""
        return self.prompt_of(self.turns(example)[:1], images, spans, answer_prefix)

    def prompt_of(self, turns: list[tuple[str, list]], images: list[int], spans: list[list[int]], answer_prefix: str = "") -> View:
        """A conversation so far and the generation prompt."""
        pieces = self._pieces(turns) + [(self.header, False), (self.lead + answer_prefix if answer_prefix else "", False)]
        ids, _, _ = self._tokens(pieces, spans)
        return View(ids, [-100] * len(ids), images, len(ids) - 1)

    def tool_prompt(self, example: Example, images: list[int], spans: list[list[int]]) -> View:
        """Everything up to the last tool image, then the generation prompt: what is left is to read it and answer."""
        turns = self.turns(example)
        while turns[-1][0] == "assistant":
            turns.pop()
        return self.prompt_of(turns, images, spans)

    def latent_view(self, example: Example, images: list[int], spans: list[list[int]], latents: int) -> View:
        """The reconstruction baseline's view: one assistant turn in which each tool image is a run of latents between markers.

        Of a tool image with P tokens the run has P latents (LVR), or `latents` where that is positive (Mirage). The end
        marker is written for the model once the run is over, so it is not supervised.
        """
        self.check(example)
        sizes = iter(spans[1:])
        pieces = self._pieces(self.turns(example)[:1]) + [(self.header, False)]
        for step in example.trajectory:
            if isinstance(step, str):
                pieces.append((step, True))
            else:
                pieces += [(LATENT_START, True), (latents or len(next(sizes)), False), (LATENT_END, False)]
        return self._ended(pieces + [(self.ending, True)], images[:1], spans[:1])


# ---- 3. Batches of views, and the images they show -------------------------------------------------------------------


@dataclass
class Batch:
    """Views padded to a common length. All tensors are (B, T) unless said."""

    ids: torch.Tensor
    mask: torch.Tensor  # True: a token, False: padding
    labels: torch.Tensor
    slots: torch.Tensor  # True: an input embedding given from outside
    embed_at: torch.Tensor  # (B,)
    images: list[int]  # in order of appearance, row after row
    shared: torch.Tensor | None = None  # (B,) of packed batches: how many first tokens the branch sees
    branch: int = 0  # of packed batches: how many last positions are the branch

    def to(self, device) -> "Batch":
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in vars(self).items()}
        return Batch(**moved)


def collate(views: list[View], pad_id: int, left: bool = False, width: int = 0) -> Batch:
    """Pad on the right (training) or on the left (generation), to the longest view or to `width`."""
    width = width or max(len(v.ids) for v in views)

    def padded(rows: list[list], value) -> torch.Tensor:
        return torch.tensor([[value] * (width - len(r)) + r if left else r + [value] * (width - len(r)) for r in rows])

    shift = [width - len(v.ids) if left else 0 for v in views]
    return Batch(ids=padded([v.ids for v in views], pad_id), mask=padded([[True] * len(v.ids) for v in views], False),
                 labels=padded([v.labels for v in views], -100),
                 slots=padded([[i in v.slots for i in range(len(v.ids))] for v in views], False),
                 embed_at=torch.tensor([v.embed_at + s for v, s in zip(views, shift)]),
                 images=[i for v in views for i in v.images])


def pack(views: list[Views], pad_id: int) -> Batch:
    """Full views, each followed by the part of its input view that it does not share: the two in one forward pass.

        <I0, Q> and generation prompt | R | padding | [PRED] x K       the branch at the end sees what both views share,
                     shared              full         branch           and itself; R never sees the branch

    Since attention and positions are given explicitly (VLM.embed), where the branch stands does not matter: at the end,
    so that the full view's states are a slice. `embed_at` points to h^_R (with K = 0 the last shared token).
    """
    batch = collate([v.full for v in views], pad_id)
    shared = []
    for v in views:
        same = [a == b for a, b in zip(v.full.ids, v.input.ids[:len(v.input.ids) - len(v.input.slots)])]
        shared.append((same + [False]).index(False))
    tails = [v.input.ids[n:] for v, n in zip(views, shared)]
    width, branch = batch.ids.shape[1], len(tails[0])
    assert all(len(tail) == branch for tail in tails), "branches of one batch have one length"
    grown = lambda tensor, rows: torch.cat([tensor, torch.tensor(rows, dtype=tensor.dtype).view(len(views), branch)], dim=1)
    return replace(batch, ids=grown(batch.ids, tails), mask=grown(batch.mask, [[True] * branch] * len(views)),
                   labels=grown(batch.labels, [[-100] * branch] * len(views)),
                   slots=grown(batch.slots, [[n + i in v.input.slots for i in range(branch)] for v, n in zip(views, shared)]),
                   embed_at=torch.tensor([width + branch - 1 if branch else n - 1 for n in shared]),
                   shared=torch.tensor(shared), branch=branch)


class ImageStore:
    """Every image of a data set by number: `spans[i]`, the token ids that stand for it in the text, `grids[i]`, its patches
    (t, h, w) where the family counts in three rows, and `inputs(i)`, what the vision tower takes, made when asked for.

    Pixels take a hundred times an image file's room, so none are kept; what is kept are the features made of them
    (train.image_features, bounded). Span and grid depend on an image's size alone, so none is decoded to know them.
    """

    def __init__(self, family, workers: int = 0):
        """family: model.QwenFamily or model.ProcessorFamily. workers: threads for `prefetch`."""
        self.family = family
        self.pool = ThreadPoolExecutor(workers) if workers else None
        self.coming: dict[int, Future] = {}
        self.waited = 0.0  # seconds that `inputs` took, waiting included
        self.pictures: list[Picture] = []
        self.spans: list[list[int]] = []
        self.grids: list[tuple[int, int, int] | None] = []
        self.placed: dict[tuple[int, int], tuple] = {}  # by size

    def inputs(self, index: int) -> dict[str, torch.Tensor]:
        start, coming = time.perf_counter(), self.coming.pop(index, None)
        found = coming.result() if coming else self._prepare(index)
        self.waited += time.perf_counter() - start
        return found

    def _prepare(self, index: int) -> dict[str, torch.Tensor]:
        return self.family.inputs(opened(self.pictures[index]))

    def prefetch(self, indices: list[int]) -> None:
        """Begin to prepare these images in the background, and forget what was begun and never asked for."""
        if self.pool:
            self.coming = {i: self.coming.get(i) or self.pool.submit(self._prepare, i) for i in indices}

    def add(self, example: Example) -> tuple[list[int], list[list[int]]]:
        """Place the example's images; return their indices and spans. Raises ValueError naming the example."""
        indices = [self.add_image(image, f"example {example.id}: image {n}") for n, image in enumerate(example.images)]
        return indices, [self.spans[i] for i in indices]

    def add_image(self, picture: Picture, where: str) -> int:
        """Keep the picture, its span and its grid. What the family rejects stops here, before training."""
        size = image_size(picture)
        if size not in self.placed:
            try:
                self.placed[size] = self.family.place(*size)
            except ValueError as error:
                raise ValueError(f"{where} ({size[0]} x {size[1]} px) is rejected by the image processor: {error}; "
                                 "crop or drop it") from None
        span, grid = self.placed[size]
        self.pictures.append(picture)
        self.spans.append(span)
        self.grids.append(grid)
        return len(self.pictures) - 1


# ---- the command line --------------------------------------------------------------------------------------------------


def main() -> None:
    from world.scenes import REGIMES, contact_sheet, make_world  # here, because the world is made of this file's Examples

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="new folder to write")
    parser.add_argument("--regime", choices=list(REGIMES), default="mixed")
    parser.add_argument("--count", type=int, default=40, help="training examples; a quarter as many for validation and for test")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.count < 1:
        parser.error("--count must be at least 1")
    examples = [ex for split, share in zip(SPLITS, (1, 4, 4))
                for ex in make_world(args.regime, split, max(1, args.count // share), args.seed)]
    write_folder(args.out, examples)
    contact_sheet(examples[:10]).save(args.out / "contact_sheet.png")
    print(f"wrote {len(examples)} examples and contact_sheet.png to {args.out}")


if __name__ == "__main__":
    import data  # this file under its own name, so that there is one Example and not two

    try:
        data.main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}")
