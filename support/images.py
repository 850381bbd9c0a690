"""Pictures: how one is read (`open_image` states the rule)."""

import hashlib
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image

Picture = Image.Image | Path  # an image in memory, or its file, read when it is needed
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # by EXIF orientation, so that the first pixel is top left
# Pillow only warns of a picture that would fill the memory; _decoded refuses it
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def opened(picture: Picture) -> Image.Image:
    return open_image(picture, "while training") if isinstance(picture, Path) else picture


def image_size(picture: Picture) -> tuple[int, int]:
    """(width, height) in px of the picture as `opened` shows it. A header is not enough: whether it
    counts sides before or after turning, and how it treats an orientation that no standard knows,
    depends on the format."""
    return opened(picture).size


def file_version(file: Path) -> tuple[str, int, int]:
    """(path, time in ns, bytes) of the file: another content under its name is another version."""
    status = os.stat(file)
    return str(file), status.st_mtime_ns, status.st_size


def picture_digest(picture: Picture) -> str:
    """32 hex digits, equal for equal pixels, whatever file they come from."""
    image = opened(picture).convert("RGB")
    digest = hashlib.sha256(f"{image.size}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()[:32]


def open_image(file: Path | BinaryIO, where: str) -> Image.Image:
    """A picture as the model is shown it: upright (as its metadata say), RGB with 8 bits, values of
    16 bits divided by 257, transparency on white. It is read wholly.

    Raises ValueError or FileNotFoundError, which name `where`, the file and the fix.
    """
    try:
        if not isinstance(file, Path):
            return _decoded(file)
        # not by its name: Pillow then maps uncompressed TIFF files with their sides swapped
        with open(file, "rb") as content:
            return _decoded(content)
    except FileNotFoundError:
        raise FileNotFoundError(f"{where}: image {file} not found; paths are relative to the "
                                "data folder") from None
    except Exception as error:  # a decoder may fail in any way on foreign bytes
        raise ValueError(f"{where}: image {file} cannot be read ({error}); replace it or drop the "
                         "record") from None


def _decoded(content: BinaryIO) -> Image.Image:
    with Image.open(content) as image:
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{image.width} x {image.height} px are too many")
        return as_rgb(upright(image))


def few_values(file: Path, shown: Image.Image) -> str:
    """"0 to 15" if a picture uses few of its type's values, else "": if the model is shown nothing
    above a quarter of white, or 16-bit values that all lie within some quarter of their range.

    Such are 12-bit data in 16-bit files, and numbers of classes as pixels.
    """
    with Image.open(file) as header:
        deep = header.mode.startswith("I")
    extremes = shown.getextrema()
    low, high = min(lo for lo, _ in extremes), max(hi for _, hi in extremes)
    return f"{low} to {high}" if high < 64 or (deep and 0 < high - low < 64) else ""


def upright(image: Image.Image) -> Image.Image:
    """Turned as its metadata say; not turned if they cannot be read or hold no known value.

    Not by Pillow's exif_transpose, which also rewrites the metadata and fails where it cannot.
    """
    image.load()  # some metadata stand behind the pixels, and TIFF files are turned here already
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # foreign bytes: viewers show such a picture as it is stored
        turn = None
    return image if turn is None else image.transpose(turn)


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB by the rule of `open_image`; ValueError for floating point, whose white is undefined."""
    if image.mode == "F":
        raise ValueError("floating-point pixels: save it with 8 or 16 bits")
    # convert() would clip all above 255 to white
    if image.mode.startswith("I"):
        values, clear = np.asarray(image), image.info.get("transparency")  # the grey that is clear
        grey = (values / 257).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(grey if clear is None else np.where(values == clear, 255, grey))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
