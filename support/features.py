"""Images on their way to the model: a picture, its tokens as text, its pixels, its features.

Letters: P image tokens, D hidden size, S 1 + deepstack levels (Qwen3-VL).
"""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from support.images import opened
from support.records import Example

Grid = tuple[int, int, int] | None  # patches (t, h, w), in families whose positions need them


class LoadedImage(NamedTuple):
    """A picture of an example: its tokens as text, and at last the vision tower's inputs."""

    key: str  # the same key means the same picture, in one run
    text: str  # a run of image tokens
    grid: Grid
    picture: Image.Image | None  # upright RGB, until the pixels are made of it
    pixels: dict[str, Tensor] | None = None


class EncodedImage(NamedTuple):
    """What replaces the image's tokens."""

    features: Tensor  # (S, P, D); S > 1: further levels for the first layers
    grid: Grid


def load_images(example: Example, family) -> list[LoadedImage]:
    """The images of an example, I0 first, each opened once."""
    loaded = []
    for n, image in enumerate(example.images):
        key, picture = str(image) if isinstance(image, Path) else f"{example.id}#{n}", opened(image)
        try:
            text, grid = family.image_text(*picture.size)
        except ValueError as error:
            raise ValueError(
                f"example {example.id}: image {n} ({picture.width} x {picture.height} px) is "
                f"rejected by the image processor: {error}; crop or drop it") from None
        loaded.append(LoadedImage(key, text, grid, picture))
    return loaded


def with_pixels(images: list[LoadedImage], family, skip=()) -> list[LoadedImage]:
    """The same images with their pixels, and without the pictures. skip: keys that need none."""
    return [image._replace(picture=None, pixels=None if image.key in skip
                           else family.inputs(image.picture)) for image in images]


class ImageEncoder:
    """The vision tower with a memory of `limit` bytes: while the tower is frozen, each image is
    encoded once. Of a tower that trains nothing is kept."""

    def __init__(self, family, frozen: bool = True, limit: float = 2e9):
        self.family, self.frozen, self.limit = family, frozen, limit if frozen else 0
        self.cache: dict[str, EncodedImage] = {}
        self.size = 0  # bytes in `cache`

    def __call__(self, images: list[LoadedImage]) -> dict[str, EncodedImage]:
        """Features by key; the images that have none yet are encoded in one call."""
        encoded = {image.key: self.cache[image.key] for image in images if image.key in self.cache}
        new = [*{image.key: image for image in images if image.key not in encoded}.values()]
        if new:
            # a frozen tower needs no gradient, so it keeps no activations
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                features = self.family.features([image.pixels for image in new])
            for image, tensor in zip(new, features):
                encoded[image.key] = EncodedImage(tensor, image.grid)
                if self.size + tensor.nbytes <= self.limit:
                    self.cache[image.key] = encoded[image.key]
                    self.size += tensor.nbytes
        return encoded


class StoredTargets:
    """Embeddings h_R by row, on the CPU and in the model's own dtype: 450,000 of a 7B in bfloat16
    are 3.2 GB. Beyond `limit` bytes a row is not kept, and is computed at each use."""

    def __init__(self, limit: float):
        self.limit = limit
        self.cache: dict[tuple[str, int], Tensor] = {}

    def look_up(self, rows: list[tuple[str, int]], new: dict[tuple[str, int], Tensor]) -> Tensor:
        """h_R (B, D) of these rows. new: those just computed, on the model's device."""
        device = next(iter(new.values())).device if new else None
        for row, h in new.items():
            # all have one size
            if (len(self.cache) + 1) * h.nbytes <= self.limit:
                self.cache[row] = h.cpu()
        return torch.stack([new[row] if row in new else self.cache[row].to(device) for row in rows])

    def state(self) -> dict:
        """For a resumed run: in other batches, h_R would differ in the last digits."""
        values = list(self.cache.values())
        return dict(rows=list(self.cache), values=torch.stack(values) if values else [])

    def load(self, state: dict) -> None:
        for (split, row), h in zip(state["rows"], state["values"]):
            self.cache[split, row] = h
