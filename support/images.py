"""Pictures: how one is read (`open_image` states the rule)."""

import hashlib
import os
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

Picture = Image.Image | Path  # an image in memory, or its file, read when it is needed
# Pillow only warns of a picture that would fill the memory; open_image refuses it
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def opened(picture: Picture) -> Image.Image:
    return open_image(picture, "while training") if isinstance(picture, Path) else picture


def file_version(file: Path) -> tuple[str, int, int]:
    """(path, time in ns, bytes) of the file: another content under its name is another version."""
    status = os.stat(file)
    return str(file), status.st_mtime_ns, status.st_size


def picture_digest(picture: Picture) -> str:
    """32 hex digits, equal for equal pixels, whatever file they come from."""
    image = opened(picture).convert("RGB")
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32]


def open_image(file: Path | BinaryIO, where: str) -> Image.Image:
    """A picture as the model gets it: upright (as its metadata say), RGB with 8 bits, values of 16
    bits divided by 257, transparency on white. It is read wholly. Raises ValueError or
    FileNotFoundError, which name `where`, the file and the fix."""
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
        raise FileNotFoundError(f"{where}: image {file} not found; paths are relative to the "
                                "data folder") from None
    except Exception as error:  # a decoder may fail in any way on foreign bytes
        raise ValueError(f"{where}: image {file} cannot be read ({error}); replace it or drop the "
                         "record") from None


def few_values(file: Path, image: Image.Image) -> str:
    """"0 to 15" if a picture uses few of its type's values (12-bit data in a 16-bit file, numbers
    of classes as pixels), else "". image: the picture as the model gets it."""
    with Image.open(file) as header:
        deep = header.mode.startswith("I")
    lows, highs = zip(*image.getextrema())
    low, high = min(lows), max(highs)
    # nothing above a quarter of white, or 16-bit values within some quarter of their range
    return f"{low} to {high}" if high < 64 or (deep and 0 < high - low < 64) else ""


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB by the rule of `open_image`; ValueError for floating point, whose white is undefined."""
    if image.mode == "F":
        raise ValueError("floating-point pixels: save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # convert() would clip all above 255 to white
        values = np.asarray(image)
        grey = (values / 257).clip(0, 255).astype(np.uint8)
        clear = image.info.get("transparency", -1)  # the grey that is transparent
        image = Image.fromarray(np.where(values == clear, np.uint8(255), grey))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
