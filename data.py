"""Data: a record -> three views -> padded batches. Sections 3.1 to 3.4 of arXiv:2604.08065.

A record is a question with an expert's tool-use trajectory (`Example`, support/records.py):

    <I0, Q>   the image and "Which digit is on the red disc?"
    R         "Zoom in on the red disc. [crop 12 30 28 46]", the crop, "... Answer: seven"

This file writes it as token ids three times, with the model's own chat template: the full view
<I0, Q, R>, the input view <I0, Q> with [PRED], and the target view R. One view of several records
is a padded batch (`collate`); to save a forward pass, full and input view may share one, by code of
support/step.py. The steps of a run read records in an order that depends on the seed alone.

Letters: B batch, T sequence (text and image tokens), K [PRED] tokens.
Left out on purpose: the chat template (support/chat.py), reading files (support/records.py,
images.py), processes that prepare data (support/processes.py), the small world (world/).
"""

import dataclasses
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from support.chat import Chat, View
from support.images import LoadedImage, load_images, with_pixels
from support.records import Example


class Views(NamedTuple):
    # View (support/chat.py): ids, labels, keys of its images, state_at (the position of its
    # embedding; nobody reads the full view's) and inject_at (the positions of [PRED])
    full: View
    input: View
    target: View


def make_views(chat: Chat, example: Example, images: list[LoadedImage], pred_tokens: int) -> Views:
    """The three views of an example; images: its own, I0 first.

    Worked example: the shipped model, K = 2, I0 with 16 image tokens, a crop with 4.
    Marks: "-" not supervised, "s" supervised.

        full view (L_VLM, Eq. 3, and L_NextLat, Eq. 2)
          - <|im_start|>user\\n<|vision_start|>(16 x <|image_pad|>)<|vision_end|>
            Which digit is on the red disc?<|im_end|>\\n
          - <|im_start|>assistant\\n
          s Zoom in on the red disc. [crop 12 30 28 46]<|im_end|>
          - \\n<|im_start|>user\\n<|vision_start|>(4 x <|image_pad|>)<|vision_end|><|im_end|>\\n
          - <|im_start|>assistant\\n
          s The digit is seven. Answer: seven<|im_end|>
        input view (h^_R, Eq. 1: the state of the last [PRED])
          - <I0, Q> and the generation prompt as above, then [PRED][PRED]
        target view (h_R, Eq. 1: the state of the last <|im_end|>)
            the full view from its first "<|im_start|>assistant" on, so without I0 and Q; its marks
            count with --method paper alone

    Raises ValueError naming the example if it cannot be trained on.
    """
    if not example.texts:
        raise ValueError(f"example {example.id} has a trajectory without text: nothing to learn")
    turns, image_keys = chat.turns(example), [image.key for image in images]
    # Deviation: the paper's h_R is the state of R's last token, perhaps the answer's last word.
    # Ours is that of the last end-of-turn token, as in the release: the same token in every R.
    # `whole` ends with it, without the newline that the template may add.
    whole = chat.conversation(turns, images)
    full = View(whole.ids, whole.labels, image_keys, state_at=len(whole.ids) - 1)

    # Deviation: the paper appends [PRED] to <I0, Q>. Here they stand behind the generation prompt,
    # where decoding would start; the release puts them inside the user's turn (--method release).
    prompt = chat.prompt(turns[:1], images[:1])
    # end_id is a placeholder: model.py puts a [PRED] embedding at each position of inject_at
    ids = prompt.ids + [chat.end_id] * pred_tokens
    input_view = View(ids, [-100] * len(ids), image_keys[:1], state_at=len(ids) - 1,
                      inject_at=tuple(range(len(prompt.ids), len(ids))))

    # The target view has the same tokens from the first turn of R on: I0 and Q must not leak in.
    # ends[k] is the character at which token k ends, turn_starts[1] that at which R begins
    first, bos = bisect(whole.ends, whole.turn_starts[1]), chat.tokenizer.bos_token_id
    # where the tokenizer opens every text with BOS, the target view has one too, unsupervised
    opening = [bos] if whole.ids[0] == bos and whole.ids[first] != bos else []
    ids, labels = opening + whole.ids[first:], [-100] * len(opening) + whole.labels[first:]
    target = View(ids, labels, image_keys[1:], state_at=len(ids) - 1)
    for view in (full, input_view, target):
        chat.check_length(len(view.ids), example)
    return Views(full, input_view, target)


# ---- from records to the batches of a run -------------------------------------------------------


class TrainingExample(NamedTuple):
    """One record, ready for a step."""

    # its split and its number there
    index: tuple[str, int]
    task: str
    answer: str
    # True: the trajectory is the bare answer, so there is no R to predict (some of baselines/)
    bare: bool
    views: Views
    images: list[LoadedImage]


class Trajectories(Dataset):
    """The records of one split. A record is read, and its views are made, when it is used."""

    def __init__(self, records: Sequence[Example], split: str, views: Callable, chat: Chat,
                 cache=(), skip: bool = False):
        # cache: keys of images whose features the model has kept, so that they need no pixels
        self.records, self.split, self.chat, self.cache = records, split, chat, cache
        # views: the method's function (train.Pearl.views): chat, example, images -> Views
        # skip: the next record takes the place of a faulty one; else a fault is raised
        self.views_of, self.skip = views, skip
        # by number of the record
        self.faults: dict[int, str] = {}
        self.ready: dict[int, TrainingExample] = {}
        # our token ids must be those of the model's own processor: one record is compared
        example = records[0]
        chat.check_ids(example, load_images(example, chat.family))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> TrainingExample:
        if row in self.ready:
            return self.ready[row]
        try:
            example = self.records[row]
            images = load_images(example, self.chat.family)
            views = self.views_of(self.chat, example, images)
        except (ValueError, OSError) as error:
            if not self.skip or len(self.faults) > len(self) / 100:
                raise
            self.faults[row] = str(error)
            return self[(row + 1) % len(self)]
        ready = TrainingExample((self.split, row), example.task, example.answer, example.bare,
                                views, images)
        # records that are in memory anyway keep their views; those of a folder are made anew
        if isinstance(self.records, list):
            self.ready[row] = ready
        return ready

    def micro_batches(self, rows: list[int], batch: int, rank: int = 0,
                      world_size: int = 1) -> list[list[TrainingExample]]:
        """A step's micro-batches of `batch` examples; with several processes, the share of this
        process."""
        examples = [self[row] for row in rows]
        # micro-batches of views of similar length need little padding
        if len(rows) > batch:
            examples.sort(key=lambda example: len(example.views.full.ids))
        parts = [examples[start:start + batch] for start in range(0, len(rows), batch)]
        # the pixels take the most work, so each process prepares its own micro-batches only
        return [[example._replace(images=with_pixels(example.images, self.chat.family, self.cache))
                 for example in part] for part in parts[rank::world_size]]


class StepRows(Sampler):
    """The record indices of each optimiser step, endless, without the first `start` steps."""

    def __init__(self, count: int, size: int, seed: int, start: int = 0):
        self.count, self.size, self.seed, self.start = count, size, seed, start

    def __iter__(self) -> Iterator[list[int]]:
        # a generator of its own: the order is the seed's alone, whatever else draws numbers
        generator, order, step = torch.Generator().manual_seed(self.seed), [], 0
        while True:
            # a step may end one epoch and begin the next, so that all steps have the same size
            while len(order) < self.size:
                order += torch.randperm(self.count, generator=generator).tolist()
            rows, order, step = order[:self.size], order[self.size:], step + 1
            # a resumed run skips the steps that are done
            if step > self.start:
                yield rows


@dataclass
class PaddedViews:
    """Views padded to a common length. All tensors are (B, T) unless noted."""

    ids: torch.Tensor
    # True: a token, False: padding
    mask: torch.Tensor
    labels: torch.Tensor
    # True: a [PRED] embedding takes this token's place
    inject_at: torch.Tensor
    # (B,) the position whose state is the view's embedding: h^_R or h_R
    state_at: torch.Tensor
    # keys in order of appearance, row after row
    images: list[str]
    # The next two are for full and input view in one row, <I0, Q> R [PRED], with R hidden from
    # [PRED] (support/step.py). (B,) the length of the prefix that both views have
    shared: torch.Tensor | None = None
    # how many columns at the end are the input view's alone
    branch: int = 0

    def to(self, device) -> "PaddedViews":
        return dataclasses.replace(self, **{
            name: value.to(device, non_blocking=True) for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)})


def collate(views: list[View], pad_id: int, left: bool = False) -> PaddedViews:
    """Pad the views to the longest: on the right to train, on the left to generate."""
    # a causal model never looks at padding on the right; on the left, all rows end together
    side, width = "left" if left else "right", max(len(view.ids) for view in views)
    shift = [width - len(view.ids) if left else 0 for view in views]
    lengths = [len(view.ids) for view in views]
    inject_at = [[n in view.inject_at for n in range(len(view.ids))] for view in views]
    ids, labels, mask, inject_at = (
        pad_sequence([torch.tensor(row, dtype=kind) for row in rows], True, value, side)
        for rows, value, kind in (
            ([view.ids for view in views], pad_id, torch.long),
            # -100 is the value that cross-entropy ignores
            ([view.labels for view in views], -100, torch.long),
            ([[True] * length for length in lengths], False, torch.bool),
            (inject_at, False, torch.bool)))
    state_at = torch.tensor([view.state_at + before for view, before in zip(views, shift)])
    images = [image for view in views for image in view.images]
    return PaddedViews(ids, mask, labels, inject_at, state_at, images)
