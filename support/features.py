"""Images on their way to the model: a picture, its tokens as text, its pixels, its features.

Letters: P image tokens, D hidden size, S 1 + deepstack levels (Qwen3-VL).
"""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from support.images import Picture, opened
from support.records import Example

Grid = tuple[int, int, int] | None  # patches (t, h, w), in families whose positions need them


class LoadedImage(NamedTuple):
    """A picture of an example: what it is in the text, and at last the vision tower's inputs."""

    # the same key means the same picture, in one run
    key: str
    # what stands for it in a conversation: a run of image tokens
    text: str
    grid: Grid
    # upright RGB, until the pixels are made of it
    picture: Image.Image | None
    pixels: dict[str, Tensor] | None = None


class EncodedImage(NamedTuple):
    """What replaces the image's tokens."""

    features: Tensor  # (S, P, D); S > 1: further levels for the first layers
    grid: Grid


def load_images(example: Example, family) -> list[LoadedImage]:
    """The images of an example, I0 first, each opened once. Raises ValueError naming the example
    for a picture that the family's processor rejects."""
    return [load_image(image, str(image) if isinstance(image, Path) else f"{example.id}#{n}",
                       family, f"example {example.id}: image {n}")
            for n, image in enumerate(example.images)]


def load_image(image: Picture, key: str, family, where: str) -> LoadedImage:
    picture = opened(image)
    try:
        text, grid = family.image_text(*picture.size)
    except ValueError as error:
        raise ValueError(f"{where} ({picture.width} x {picture.height} px) is rejected by the "
                         f"image processor: {error}; crop or drop it") from None
    return LoadedImage(key, text, grid, picture)


def with_pixels(images: list[LoadedImage], family, skip=()) -> list[LoadedImage]:
    """The same images with their pixels, and without the pictures. skip: keys that need none."""
    return [image._replace(picture=None, pixels=None if image.key in skip
                           else family.inputs(image.picture)) for image in images]


class ImageEncoder:
    """The vision tower with a memory: while the tower is frozen, each image is encoded once.

    limit: bytes of features to keep. With a trained tower nothing is kept.
    """

    def __init__(self, family, frozen: bool = True, limit: float = 2e9):
        self.family, self.frozen, self.limit = family, frozen, limit
        self.kept: dict[str, EncodedImage] = {}
        self.size = 0  # bytes in `kept`

    def __call__(self, images: list[LoadedImage]) -> dict[str, EncodedImage]:
        """Features by key; every image that has none yet is encoded in one call."""
        images = {image.key: image for image in images}
        new = [image for key, image in images.items() if key not in self.kept]
        found = {key: self.kept[key] for key in images if key in self.kept}
        if new:
            # a frozen tower needs no gradient, so it keeps no activations
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                features = self.family.features([image.pixels for image in new])
            for image, own in zip(new, features):
                # a slice would keep the features of the whole call in memory
                own = own.clone() if self.frozen else own
                found[image.key] = EncodedImage(own, image.grid)
                if self.frozen and self.size + own.nbytes <= self.limit:
                    self.kept[image.key] = found[image.key]
                    self.size += own.nbytes
        return found


class StoredTargets:
    """Embeddings h_R by row, on the CPU and in the model's own dtype: 450,000 of a 7B in bfloat16
    are 3.2 GB. Beyond `limit` bytes a row is not kept, and is made again when it is used."""

    def __init__(self, limit: float):
        self.limit, self.size = limit, 0
        self.kept: dict[tuple[str, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self.kept)

    def look_up(self, rows: list[tuple[str, int]], new: dict[tuple[str, int], Tensor]) -> Tensor:
        """h_R (B, D) of these rows. new: those that were just made, on the model's device."""
        device = next(iter(new.values())).device if new else None
        for row, h in new.items():
            if self.size + h.nbytes <= self.limit:
                self.kept[row], self.size = h.cpu(), self.size + h.nbytes
        return torch.stack([new[row] if row in new else self.kept[row].to(device) for row in rows])

    def state(self) -> dict:
        """For a resumed run: made again in other batches, they would differ in the last digits."""
        values = list(self.kept.values())
        return dict(rows=[list(row) for row in self.kept],
                    values=torch.stack(values) if values else None)

    def load(self, state: dict) -> None:
        for (split, row), h in zip(state["rows"], state["values"] if state["rows"] else ()):
            self.kept[split, row], self.size = h, self.size + h.nbytes
