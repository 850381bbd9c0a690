"""Claims: an image's size, counted before training, is that of the pixels that are shown, for every
format and every orientation that a file may name, valid or not; it turns as EXIF defines."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

from support import images
from support.images import image_size, open_image, opened, picture_digest

CORNERS = np.kron([[250, 170], [90, 10]], np.ones((16, 24))).astype(np.uint8)  # 32 x 48, four greys
SHOWN = {1: CORNERS, 2: CORNERS[:, ::-1], 3: CORNERS[::-1, ::-1], 4: CORNERS[::-1], 5: CORNERS.T,
         6: np.rot90(CORNERS, -1), 7: CORNERS[::-1, ::-1].T, 8: np.rot90(CORNERS)}
HEAD = b"Exif\0\0II*\0\x08\0\0\0"
SHORT, LONG, BYTE, ASCII, RATIONAL, DOUBLE, UNDEFINED = 3, 4, 1, 2, 5, 12, 7


def exif(kind: int, count: int, value: bytes) -> bytes:
    """A block with one entry, the orientation; a value too long for the entry stands behind it."""
    entry = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack("<I", 26)
    rest = b"" if len(value) <= 4 else value
    head = HEAD + struct.pack("<HHHI", 1, 0x112, kind, count)
    return head + entry + bytes(4) + rest


WELL_FORMED = {n: exif(SHORT, 1, struct.pack("<H", n)) for n in (*range(10), 65535)}
ODD = {
    "long": exif(LONG, 1, struct.pack("<I", 6)), "byte": exif(BYTE, 1, b"\x06"),
    "two": exif(SHORT, 2, struct.pack("<HH", 6, 6)), "text": exif(ASCII, 2, b"6\0"),
    "ratio": exif(RATIONAL, 1, struct.pack("<II", 12, 2)), "0 / 0": exif(RATIONAL, 1, bytes(8)),
    "double": exif(DOUBLE, 1, struct.pack("<d", 6.5)), "bytes": exif(UNDEFINED, 4, b"\x06\0\0\0"),
    "nan": exif(DOUBLE, 1, struct.pack("<d", float("nan"))), "no such type": exif(99, 1, b"\x06\0"),
    "cut short": WELL_FORMED[6][:20], "noise": b"Exif\0\0" + bytes(range(200)),
    "empty": b"Exif\0\0"}
UNREADABLE = ("text", "0 / 0", "nan", "no such type", "cut short", "noise", "empty")
FORMATS = ("a.jpg", "a.png", "a.webp", "a.mpo")


def written(file: Path, block: bytes, picture: Image.Image | None = None) -> Path:
    (picture or Image.fromarray(CORNERS).convert("RGB")).save(file, exif=block, quality=95)
    return file


def corners(image: Image.Image) -> list:
    """The colour in the middle of each quarter, in steps of 80 and so the same after JPEG."""
    grey = np.asarray(image.convert("L")).astype(int)
    h, w = grey.shape
    return [round(grey[y, x] / 80) for y in (h // 4, 3 * h // 4) for x in (w // 4, 3 * w // 4)]


def is_shown_as(file: Path, value: int) -> bool:
    """The size before anything is decoded, then the picture, against the definition."""
    images.SIZES.clear()
    wanted = Image.fromarray(SHOWN.get(value, CORNERS))
    sizes = image_size(file), opened(file).size, wanted.size
    return len(set(sizes)) == 1 and corners(opened(file)) == corners(wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_an_orientation_turns_size_and_pixels_alike(tmp_path, name):
    for value, block in WELL_FORMED.items():
        assert is_shown_as(written(tmp_path / name, block), value), value


@pytest.mark.parametrize("name", FORMATS)
def test_odd_or_broken_metadata_never_part_size_and_pixels(tmp_path, name):
    for kind, block in ODD.items():
        try:
            file = written(tmp_path / name, block)
        except Exception:  # this format's writer takes no such block
            assert name == "a.webp", kind
            continue
        images.SIZES.clear()
        assert image_size(file) == opened(file).size, kind
        if kind in UNREADABLE:
            assert is_shown_as(file, 1), kind


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "I;16", "I"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiff_files_are_turned_once(tmp_path, mode, compression):
    """Pillow turns them while reading; by name, it maps uncompressed ones with sides swapped."""
    picture = Image.fromarray(CORNERS)
    if mode.startswith("I"):
        picture = Image.fromarray(CORNERS.astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    elif mode == "CMYK":
        picture = picture.convert("RGB").convert("CMYK")
    else:
        picture = picture.convert(mode, dither=Image.Dither.NONE)
    for value in (*range(1, 9), *(() if compression else (0, 9, "6", (6, 6), 6.0))):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        if not isinstance(value, (int, tuple)):
            tags.tagtype[0x112] = ASCII if isinstance(value, str) else DOUBLE
        tags[0x112] = value
        picture.save(tmp_path / "a.tif", tiffinfo=tags, compression=compression)
        images.SIZES.clear()
        assert image_size(tmp_path / "a.tif") == opened(tmp_path / "a.tif").size, value
        if isinstance(value, int) and mode != "1":
            assert is_shown_as(tmp_path / "a.tif", value), value


def test_palettes_and_sixteen_bits_turn_with_their_transparency(tmp_path):
    """What is clear is white after turning too, in a palette, a grey of 8 and one of 16 bits."""
    greys = dict(p=Image.fromarray(CORNERS).convert("P"), l=Image.fromarray(CORNERS),
                 i16=Image.fromarray(CORNERS.astype(np.uint16) * 257))
    for name, picture in greys.items():
        clear = 10 * 257 if name == "i16" else 10  # the darkest quarter
        picture.save(tmp_path / f"{name}.png", transparency=clear, exif=WELL_FORMED[6])
        shown = np.rot90(np.where(CORNERS == 10, 255, CORNERS), -1).astype(np.uint8)
        file = tmp_path / f"{name}.png"
        assert image_size(file) == (32, 48), name
        assert corners(opened(file)) == corners(Image.fromarray(shown)), name
    greys["p"].save(tmp_path / "p.gif", transparency=10)
    assert image_size(tmp_path / "p.gif") == opened(tmp_path / "p.gif").size == (48, 32)


def test_metadata_behind_the_pixels_and_in_another_language_count(tmp_path):
    file = written(tmp_path / "a.png", WELL_FORMED[6])
    content = file.read_bytes()
    start = content.index(b"eXIf") - 4
    length = 12 + struct.unpack(">I", content[start:start + 4])[0]
    chunk, rest = content[start:start + length], content[:start] + content[start + length:]
    (tmp_path / "late.png").write_bytes(rest[:-12] + chunk + rest[-12:])  # before IEND
    assert is_shown_as(tmp_path / "late.png", 6)
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF tiff:Orientation="8"/></x:xmpmeta>'
    words = PngImagePlugin.PngInfo()
    words.add_itxt("XML:com.adobe.xmp", xmp)
    picture = Image.fromarray(CORNERS).convert("RGB")
    picture.save(tmp_path / "xmp.png", pnginfo=words)
    picture.save(tmp_path / "xmp.jpg", xmp=xmp.encode(), quality=95)
    picture.save(tmp_path / "xmp.webp", xmp=xmp.encode(), lossless=True)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[700], tags[700] = BYTE, xmp.encode()
    picture.save(tmp_path / "xmp.tif", tiffinfo=tags)
    for name in ("xmp.png", "xmp.jpg", "xmp.webp", "xmp.tif"):
        assert is_shown_as(tmp_path / name, 8), name


def test_other_metadata_that_cannot_be_rewritten_do_not_stop_a_turn(tmp_path):
    """A date that is a number: the picture is turned, and nothing else is asked of its metadata."""
    block = (HEAD + struct.pack("<HHHIHH", 2, 0x112, SHORT, 1, 6, 0)
             + struct.pack("<HHIf", 0x132, 11, 1, 0.5) + bytes(4))
    assert is_shown_as(written(tmp_path / "a.jpg", block), 6)


def test_a_file_is_decoded_once_to_know_its_size_and_anew_when_it_changes(tmp_path, monkeypatch):
    file, decoded = written(tmp_path / "a.png", WELL_FORMED[6]), []
    decode = images._decoded

    def counted(content):
        decoded.append(1)
        return decode(content)

    monkeypatch.setattr(images, "_decoded", counted)
    open_image(file, "here")
    assert image_size(file) == (32, 48) and len(decoded) == 1
    Image.new("RGB", (5, 7)).save(file)
    assert image_size(file) == (5, 7) and len(decoded) == 2


class SizeFamily:
    """A family that counts on sizes: one letter a pixel."""

    def image_text(self, width, height):
        return "x" * (width * height), None

    def inputs(self, image):
        return image.size


def test_a_picture_that_changes_during_a_run_says_so(tmp_path):
    file = written(tmp_path / "a.png", WELL_FORMED[1])
    store = images.ImageStore(SizeFamily())
    assert len(store.image_texts[store.add_image(file, "here")]) == 32 * 48
    assert store.inputs(0) == (48, 32)
    written(file, WELL_FORMED[6])
    with pytest.raises(ValueError, match=r"had \(48, 32\) px at the start and has \(32, 48\)"):
        store.inputs(0)


def test_a_digest_is_of_the_bytes_or_the_pixels(tmp_path):
    file = written(tmp_path / "a.png", WELL_FORMED[1])
    first = picture_digest(file)
    os.utime(file, (0, 0))
    assert picture_digest(file) == first != picture_digest(written(file, WELL_FORMED[2]))
    one, other = Image.new("RGB", (2, 3)), Image.new("RGB", (3, 2))
    assert picture_digest(one) == picture_digest(one.copy()) != picture_digest(other)
