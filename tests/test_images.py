"""Claims: the model sees a picture as a person does, in every format and orientation; bytes that
are no picture are refused; a picture that uses few of its values is noticed."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from support.images import few_values, open_image

CORNERS = np.kron([[250, 170], [90, 10]], np.ones((16, 24))).astype(np.uint8)  # 32 x 48, four greys
SHOWN = {1: CORNERS, 2: CORNERS[:, ::-1], 3: CORNERS[::-1, ::-1], 4: CORNERS[::-1], 5: CORNERS.T,
         6: np.rot90(CORNERS, -1), 7: CORNERS[::-1, ::-1].T, 8: np.rot90(CORNERS)}


def exif(value):
    """A block that holds the orientation alone."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, 0x112, 3, 1, value, 0, 0)


def save(file, block=b"", mode="RGB", **options):
    Image.fromarray(CORNERS).convert(mode).save(file, exif=block, **options)
    return file


def is_shown_as(file, grey):
    """Size, and the colour in the middle of each quarter, in steps that JPEG does not blur."""
    image, (height, width) = np.asarray(open_image(file, "here")), grey.shape
    one, other = (np.round(values[height // 4::height // 2, width // 4::width // 2] / 80)
                  for values in (image, np.dstack([grey] * 3)))
    return image.shape == (height, width, 3) and (one == other).all()


@pytest.mark.parametrize("name, mode", [("a.jpg", "RGB"), ("a.png", "RGB"), ("a.webp", "RGB"),
                                        ("a.mpo", "RGB"), ("a.tif", "RGB"), ("a.tif", "L")])
def test_an_orientation_turns_the_picture_once(tmp_path, name, mode):
    """Pillow turns TIFF files while reading; by name, it maps grey ones with sides swapped."""
    for value in (*range(10), 65535):
        assert is_shown_as(save(tmp_path / name, exif(value), mode), SHOWN.get(value, CORNERS))


def test_which_metadata_turn_the_picture(tmp_path):
    """Those behind the pixels and in XML; not those that cannot be read."""
    data = b"eXIf" + exif(6)[6:]
    chunk = struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))
    plain = save(tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(plain[:-12] + chunk + plain[-12:])  # before IEND
    assert is_shown_as(tmp_path / "a.png", SHOWN[6])
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF tiff:Orientation="8"/></x:xmpmeta>'
    assert is_shown_as(save(tmp_path / "a.jpg", xmp=xmp), SHOWN[8])
    foreign = b"Exif\0\0" + bytes(range(200))
    assert is_shown_as(save(tmp_path / "a.png", foreign), CORNERS)


def test_every_kind_of_picture_is_shown_as_a_person_sees_it(tmp_path):
    """Greys of 8 and 16 bits, palettes; in three the darkest quarter is clear, and so white."""
    grey, wide = Image.fromarray(CORNERS), Image.fromarray(CORNERS.astype(np.uint16) * 257)
    clear, turned = np.where(CORNERS == 10, 255, CORNERS), dict(exif=exif(6))
    alpha = Image.merge("LA", [grey, Image.fromarray(np.uint8(CORNERS != 10) * 255)])
    for name, picture, options, upright in (
            ("p.gif", grey.convert("P"), {}, CORNERS), ("la.png", alpha, {}, clear),
            ("cmyk.jpg", grey.convert("RGB").convert("CMYK"), {}, CORNERS),
            ("16.png", wide, {}, CORNERS), ("32.tif", wide.convert("I"), {}, CORNERS),
            ("p.png", grey.convert("P"), dict(transparency=10, **turned), np.rot90(clear, -1)),
            ("wide.png", wide, dict(transparency=2570, **turned), np.rot90(clear, -1))):
        picture.save(tmp_path / name, **options)
        assert is_shown_as(tmp_path / name, upright), name
    Image.fromarray(np.full((4, 4), 32768, np.uint16)).save(tmp_path / "half.png")
    assert open_image(tmp_path / "half.png", "here").getpixel((0, 0)) == (127, 127, 127)


def test_what_is_no_picture_names_record_file_and_fix(tmp_path):
    Image.new("RGB", (32, 32), "red").save(whole := io.BytesIO(), "BMP")
    Image.fromarray(np.ones((4, 4), np.float32)).save(real := io.BytesIO(), "TIFF")
    # a file of 3 kB that claims 144 million pixels
    bomb = whole.getvalue()[:18] + struct.pack("<ii", 12_000, 12_000) + whole.getvalue()[26:]
    for content, why in ((b"", ""), (whole.getvalue()[:60], ""), (bomb, "px are too many"),
                         (b"<svg/>", ""), (real.getvalue(), "save it with 8 or 16 bits")):
        (tmp_path / "b.png").write_bytes(content)
        with pytest.raises(ValueError, match=rf"here: image .*b.png cannot be read \(.*({why}).*"
                                             "; replace it or drop the record"):
            open_image(tmp_path / "b.png", "here")
    with pytest.raises(FileNotFoundError, match="^here: image .*c.png not found$"):
        open_image(tmp_path / "c.png", "here")


def test_pictures_that_use_few_of_their_values_are_noticed(tmp_path):
    ramp = np.tile(np.linspace(0, 1, 64), (64, 1))
    for few, values in (("0 to 15", 4095 * ramp), ("123 to 139", 31744 + 4096 * ramp),
                        ("0 to 20", 20 * ramp), ("", 65535 * ramp), ("", 100 + 20 * ramp),
                        ("", 40_000 + 0 * ramp)):
        values = values.astype(np.uint16 if values.max() > 255 else np.uint8)
        Image.fromarray(values).save(file := tmp_path / "a.png")
        assert few_values(file, open_image(file, "here")) == few, few
