"""Images on their way to the model: a picture, its tokens as text, its pixels, its features.

Letters: P image tokens, D hidden size, S 1 + deepstack levels (Qwen3-VL).
"""

import hashlib
import os
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

Picture = Image.Image | Path  # an image in memory, or its file, read when it is needed
Grid = tuple[int, int, int] | None  # patches (t, h, w), in families whose positions need them
# Pillow only warns of a picture that would fill the memory; open_image refuses it
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class LoadedImage(NamedTuple):
    """A picture of an example: its tokens as text, and at last the vision tower's inputs."""

    key: str  # the same key means the same picture, in one run
    text: str  # a run of image tokens
    grid: Grid
    picture: Picture | None  # until the pixels are made of it
    pixels: dict[str, Tensor] | None = None


class EncodedImage(NamedTuple):
    """What replaces the image's tokens."""

    features: Tensor  # (S, P, D); S > 1: further levels for the first layers
    grid: Grid


def load_images(example, family) -> list[LoadedImage]:
    """The images of an example (support/records.py), I0 first, each opened once."""
    loaded = []
    for n, picture in enumerate(example.images):
        key = str(picture) if isinstance(picture, Path) else f"{example.id}#{n}"
        picture = opened(picture)
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
    return [image if image.pixels else image._replace(
        picture=None, pixels=None if image.key in skip else family.inputs(opened(image.picture)))
        for image in images]


@dataclass
class ImageEncoder:
    """The vision tower with a memory: while the tower is frozen, each image is encoded once. Of a
    tower that trains nothing is kept."""

    family: Any
    frozen: bool = True
    room: float = 2e9  # bytes that `cache` may still take
    cache: dict[str, EncodedImage] = field(default_factory=dict)

    def __call__(self, images: list[LoadedImage]) -> dict[str, EncodedImage]:
        """Features by key; the images that have none yet are encoded in one call."""
        encoded = {image.key: self.cache[image.key] for image in images if image.key in self.cache}
        new = [*{image.key: image for image in images if image.key not in encoded}.values()]
        if new:
            pixels = [image.pixels for image in with_pixels(new, self.family)]
            # a frozen tower needs no gradient, so it keeps no activations
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                features = self.family.features(pixels)
            for image, tensor in zip(new, features):
                encoded[image.key] = EncodedImage(tensor, image.grid)
                if self.frozen and tensor.nbytes <= self.room:
                    self.cache[image.key] = encoded[image.key]
                    self.room -= tensor.nbytes
        return encoded


def opened(picture: Picture) -> Image.Image:
    return open_image(picture) if isinstance(picture, Path) else picture


def file_version(file: Path) -> tuple[str, int, int]:
    """(path, time in ns, bytes) of the file: another content under its name is another version."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):  # ValueError: no file can have this name
        raise FileNotFoundError(f"image {file} not found; paths are relative to the data "
                                "folder") from None
    return str(file), status.st_mtime_ns, status.st_size


def picture_digest(picture: Picture) -> str:
    """32 hex digits, equal for equal pixels, whatever file they come from."""
    image = opened(picture).convert("RGB")
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32]


def open_image(file: Path | BinaryIO, where: str = "") -> Image.Image:
    """A picture as the model gets it: upright (as its metadata say), RGB with 8 bits, values of 16
    bits divided by 257, transparency on white. It is read wholly. Raises ValueError or
    FileNotFoundError, which name `where`, the file and the fix."""
    name = f"{where}: image {file}".removeprefix(": ")
    try:
        # not by its name: Pillow then maps uncompressed TIFF files with their sides swapped
        with (open(file, "rb") if isinstance(file, Path) else nullcontext(file) as content,
              Image.open(content) as image):
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"{image.width} x {image.height} px are too many")
            image.load()  # some metadata stand behind the pixels; TIFF files are turned here
            # Foreign metadata cannot be read, and the picture stays as it is stored; or Pillow
            # cannot write them again, which it tries after it has turned the picture.
            with suppress(Exception):
                ImageOps.exif_transpose(image, in_place=True)
            return as_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} not found") from None
    except Exception as error:  # a decoder may fail in any way on foreign bytes
        raise ValueError(f"{name} cannot be read ({error}); replace it or drop the "
                         "record") from None


def few_values(file: Path, image: Image.Image) -> str:
    """"0 to 15" if a picture uses few of its type's values (12-bit data in a 16-bit file, numbers
    of classes as pixels), else "". image: the picture as the model gets it."""
    with Image.open(file) as header:
        deep = header.mode.startswith("I")
    extrema = image.getextrema()  # (lowest, highest) of each channel
    low, high = np.min(extrema), np.max(extrema)
    # nothing above a quarter of white, or 16-bit values within some quarter of their range
    return f"{low} to {high}" if high < 64 or (deep and 0 < high - low < 64) else ""


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB by the rule of `open_image`; ValueError for floating point, whose white is undefined."""
    if image.mode == "F":
        raise ValueError("floating-point pixels: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # convert() would clip all above 255 to white
        values, transparent = np.asarray(image), image.info.get("transparency", -1)
        grey = np.where(values == transparent, 255, (values / 257).clip(0, 255))
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
