"""Images: how a picture is read (as a person sees it), and the store of all images of a data set,
which encodes each once.

Letters: P image tokens, D hidden size, S 1 + deepstack levels (Qwen3-VL).
"""

import hashlib
import os
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from support.files import read_tensors, write_tensors

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

def open_image(file, where: str) -> Image.Image:
    """Read an image (a path or an open file) as RGB, wholly, so that a truncated one fails here and not in the middle of a run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                return as_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: image {file} not found; paths are relative to the data folder") from None
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



class EncodedImage(NamedTuple):
    features: Tensor  # (S, P, D) what the image's tokens are replaced by, then deepstack levels
    grid: tuple[int, int, int] | None  # patches (t, h, w), where the family's positions need them


class ImageStore:
    """Every image of a data set by number: what stands for it in the text, its pixels, its features.

    `image_texts[i]` is what stands for image i in the text (a run of image tokens) and `grids[i]`
    its patches (t, h, w), where the family counts in three rows; both depend on its size alone, so
    no pixel is read to know them. `inputs(i)` is what the vision tower takes, `encoded(...)` what it makes of it: once
    for all views of a step, and, while the tower is frozen, once for the whole run (as much as fits
    into `keep_gb`) or, with a folder, for all runs. Pixels take a hundred times an image file's
    room, so none are kept.
    """

    def __init__(self, family, workers: int = 0, keep_gb: float = 0.0, folder: str = "",
                 frozen: bool = True):
        """family: see support/families.py. workers: threads for `prefetch`. frozen: no gradient."""
        self.family, self.keep_bytes, self.frozen = family, keep_gb * 1e9, frozen
        self.pool = ThreadPoolExecutor(workers) if workers else None
        self.coming: dict[int, Future] = {}
        self.waited = 0.0  # seconds that `inputs` took, waiting included
        self.pictures: list[Picture] = []
        self.image_texts: list[str] = []
        self.grids: list[tuple[int, int, int] | None] = []
        self.by_size: dict[tuple[int, int], tuple] = {}
        self.kept: dict[int, Tensor] = {}
        self.folder = Path(folder) if folder and frozen else None
        if self.folder:
            self.fingerprint = family.fingerprint()
            self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, example) -> tuple[list[int], list[str]]:
        """Number the example's images (I0 first): (numbers, image texts). ValueError names it."""
        numbers = [self.add_image(image, f"example {example.id}: image {n}")
                   for n, image in enumerate(example.images)]
        return numbers, [self.image_texts[i] for i in numbers]

    def add_image(self, picture: Picture, where: str) -> int:
        """Keep the picture. What the family rejects stops here, before training."""
        size = image_size(picture)
        if size not in self.by_size:
            try:
                self.by_size[size] = self.family.image_text(*size)
            except ValueError as error:
                raise ValueError(f"{where} ({size[0]} x {size[1]} px) is rejected by the image "
                                 f"processor: {error}; crop or drop it") from None
        image_text, grid = self.by_size[size]
        self.pictures.append(picture)
        self.image_texts.append(image_text)
        self.grids.append(grid)
        return len(self.pictures) - 1

    def inputs(self, index: int) -> dict[str, Tensor]:
        """Pixels as the vision tower takes them."""
        start, coming = time.perf_counter(), self.coming.pop(index, None)
        found = coming.result() if coming else self._prepare(index)
        self.waited += time.perf_counter() - start
        return found

    def _prepare(self, index: int) -> dict[str, Tensor]:
        return self.family.inputs(opened(self.pictures[index]))

    def prefetch(self, indices: list[int]) -> None:
        """Prepare these in the background, and forget what was begun and never asked for."""
        if self.pool:
            wanted = [i for i in dict.fromkeys(indices) if i not in self.kept]
            self.coming = {i: self.coming.get(i) or self.pool.submit(self._prepare, i)
                           for i in wanted}

    def encoded(self, indices: list[int]) -> dict[int, EncodedImage]:
        """Features of these images, from memory, from the folder, or made now, in one call."""
        wanted = sorted(set(indices))
        found = {i: self.kept[i] for i in wanted if i in self.kept}
        stored = [i for i in wanted if i not in found and self.folder and self._file(i).is_file()]
        new = {i: read_tensors(self._file(i))[0]["features"].to(self.family.lm.device)
               for i in stored}
        if missing := [i for i in wanted if i not in found and i not in new]:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                made = self.family.features([self.inputs(i) for i in missing])
            # a slice would keep the whole batch's features alive
            made = [features.clone() for features in made] if self.frozen else made
            new |= zip(missing, made)
            if self.folder:
                for i in missing:
                    self._write(i, new[i])
        if self.frozen and sum(f.nbytes for f in self.kept.values()) < self.keep_bytes:
            self.kept |= new
        return {i: EncodedImage(features, self.grids[i]) for i, features in (found | new).items()}

    def _file(self, index: int) -> Path:
        """Named by pixels and all else that features depend on: no other image or model gets them."""
        image = opened(self.pictures[index])
        key = f"{self.fingerprint} {image.size}".encode() + image.tobytes()
        return self.folder / f"{hashlib.sha256(key).hexdigest()}.safetensors"

    def _write(self, index: int, features: Tensor) -> None:
        file = self._file(index)
        own = file.with_name(f"{os.getpid()}-{file.name}")  # several runs may fill one folder
        write_tensors(dict(features=features.cpu()), own)
        os.replace(own, file)
