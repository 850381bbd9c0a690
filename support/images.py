"""Images: how a picture is read (`open_image` states the rule), and the store of all images of a
data set, which encodes each once.

Letters: P image tokens, D hidden size, S 1 + deepstack levels (Qwen3-VL).
"""

import hashlib
import os
import time
import uuid
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from support.files import read_tensors, write_tensors

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


class EncodedImage(NamedTuple):
    features: Tensor  # (S, P, D) what the image's tokens are replaced by, then deepstack levels
    grid: tuple[int, int, int] | None  # patches (t, h, w), where the family's positions need them


class ImageStore:
    """Every image of a data set by number: what stands for it in the text, its pixels, features.

    `image_texts[i]` is what stands for image i in the text (a run of image tokens) and `grids[i]`
    its patches (t, h, w), where the family counts in three rows; both depend on its size alone, so
    none is decoded anew to know them. `inputs(i)` is what the vision tower takes, `encoded(...)`
    what it makes of it: once for all views of a step, and, while the tower is frozen, once for the
    whole run (as much as fits into `keep_gb`) or, with a folder, for all runs. Pixels take a
    hundred times an image file's room, so none are kept.
    """

    def __init__(self, family, workers: int = 0, keep_gb: float = 0.0, folder: str = "",
                 frozen: bool = True):
        """family: see support/families.py. workers: threads for `prefetch`. frozen: no gradient."""
        self.family, self.keep_bytes, self.frozen = family, keep_gb * 1e9, frozen
        self.pool = ThreadPoolExecutor(workers) if workers else None
        self.coming: dict[int, Future] = {}
        self.waited = 0.0  # seconds that `inputs` took, waiting included
        self.pictures: list[Picture] = []
        self.sizes: list[tuple[int, int]] = []  # (width, height) in px, which the texts count on
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
        self.sizes.append(size)
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
        picture = self.pictures[index]
        image = opened(picture)
        if image.size != self.sizes[index]:
            raise ValueError(f"image {picture} had {self.sizes[index]} px at the start and has "
                             f"{image.size} now: leave the data alone while they are in use")
        return self.family.inputs(image)

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
        """Named by the pixels and all else that features depend on, so no other image gets them."""
        image = opened(self.pictures[index])
        key = f"{self.fingerprint} {image.size}".encode() + image.tobytes()
        return self.folder / f"{hashlib.sha256(key).hexdigest()}.safetensors"

    def _write(self, index: int, features: Tensor) -> None:
        file = self._file(index)
        own = file.with_name(f"{uuid.uuid4().hex}-{file.name}")  # several runs may fill one folder
        write_tensors(dict(features=features.cpu()), own)
        os.replace(own, file)
