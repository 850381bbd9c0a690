"""Claims: the model sees a picture as a person does, in every format and orientation; bytes that
are no picture are refused; a picture that uses few of its values is noticed."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from support.images import few_values, open_image

CORNERS = np.kron([[250, 170], [90, 10]], np.ones((16, 24))).astype(np.uint8)  # 32 x 48, four greys
WIDE = CORNERS.astype(np.uint16) * 257
SHOWN = {1: CORNERS, 2: CORNERS[:, ::-1], 3: CORNERS[::-1, ::-1], 4: CORNERS[::-1], 5: CORNERS.T,
         6: np.rot90(CORNERS, -1), 7: CORNERS[::-1, ::-1].T, 8: np.rot90(CORNERS)}
HEAD = b"Exif\0\0II*\0\x08\0\0\0"


def exif(value):
    """A block that holds the orientation alone."""
    return HEAD + struct.pack("<HHHIHHI", 1, 0x112, 3, 1, value, 0, 0)


UNREADABLE = (exif(6)[:20], b"Exif\0\0" + bytes(range(200)), b"Exif\0\0",
              HEAD + struct.pack("<HHHI4sI", 1, 0x112, 2, 2, b"6", 0))  # a text
# the orientation 6, and a date that is a number, which Pillow cannot write again
WITH_DATE = HEAD + struct.pack("<HHHIHHHHIfI", 2, 0x112, 3, 1, 6, 0, 0x132, 11, 1, 0.5, 0)


def save(file, block=b"", **options):
    Image.fromarray(CORNERS).convert("RGB").save(file, exif=block, quality=95, **options)
    return file


def is_shown_as(file, grey):
    """Size, and the colour in the middle of each quarter, in steps that JPEG does not blur."""
    image = np.asarray(open_image(file, "here").convert("L"))
    height, width = grey.shape
    one, other = (np.round(values[height // 4::height // 2, width // 4::width // 2] / 80)
                  for values in (image, grey))
    return image.shape == grey.shape and (one == other).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.mpo"])
def test_an_orientation_turns_the_picture_and_unreadable_metadata_do_not(tmp_path, name):
    for value in (*range(10), 65535):
        assert is_shown_as(save(tmp_path / name, exif(value)), SHOWN.get(value, CORNERS)), value
    if name != "a.webp":  # its writer takes no such block
        assert is_shown_as(save(tmp_path / name, WITH_DATE), SHOWN[6])
        for block in UNREADABLE:
            assert is_shown_as(save(tmp_path / name, block), CORNERS), block


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_tiff_files_are_turned_once(tmp_path, compression):
    """Pillow turns them while reading; by name, it maps uncompressed ones with sides swapped."""
    grey = Image.fromarray(CORNERS).convert("RGB")
    for picture in (Image.fromarray(WIDE), *map(grey.convert, ("RGB", "L", "RGBA", "CMYK"))):
        for value, upright in SHOWN.items():
            picture.save(tmp_path / "a.tif", tiffinfo={0x112: value}, compression=compression)
            assert is_shown_as(tmp_path / "a.tif", upright), (picture.mode, value)


def test_metadata_behind_the_pixels_and_in_xml_count(tmp_path):
    content = save(tmp_path / "a.png", exif(6)).read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", content[start:start + 4])[0]
    (tmp_path / "a.png").write_bytes(content[:start] + content[end:-12] + content[start:end]
                                     + content[-12:])  # before IEND
    assert is_shown_as(tmp_path / "a.png", SHOWN[6])
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF tiff:Orientation="8"/></x:xmpmeta>'
    (texts := PngImagePlugin.PngInfo()).add_itxt("XML:com.adobe.xmp", xmp)
    for name, options in (("a.png", dict(pnginfo=texts)), ("a.jpg", dict(xmp=xmp.encode()))):
        assert is_shown_as(save(tmp_path / name, **options), SHOWN[8]), name


def test_every_kind_of_picture_is_shown_as_a_person_sees_it(tmp_path):
    """Greys of 8 and 16 bits, palettes; the darkest quarter clear, and so white, also when turned;
    values between the steps."""
    grey, wide = Image.fromarray(CORNERS), Image.fromarray(WIDE)
    clear, turned = np.where(CORNERS == 10, 255, CORNERS), dict(exif=exif(6))
    alpha = Image.merge("LA", [grey, Image.fromarray(np.uint8(CORNERS != 10) * 255)])
    for name, picture, options, upright in (
            ("a.bmp", grey, {}, CORNERS), ("p.gif", grey.convert("P"), {}, CORNERS),
            ("cmyk.jpg", grey.convert("RGB").convert("CMYK"), {}, CORNERS),
            ("16.png", wide, {}, CORNERS), ("32.tif", wide.convert("I"), {}, CORNERS),
            ("la.png", alpha, {}, clear), ("rgba.webp", alpha.convert("RGBA"), {}, clear),
            ("l.png", grey, dict(transparency=10, **turned), np.rot90(clear, -1)),
            ("p.png", grey.convert("P"), dict(transparency=10, **turned), np.rot90(clear, -1)),
            ("wide.png", wide, dict(transparency=2570, **turned), np.rot90(clear, -1))):
        picture.save(tmp_path / name, **options)
        assert is_shown_as(tmp_path / name, upright), name
        assert open_image(tmp_path / name, "here").mode == "RGB"
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
    for where, message in (("here", "^here: image .*c.png not found$"), ("", "^image .*not found")):
        with pytest.raises(FileNotFoundError, match=message):
            open_image(tmp_path / "c.png", where)


def test_pictures_that_use_few_of_their_values_are_noticed(tmp_path):
    ramp = np.tile(np.linspace(0, 1, 64), (64, 1))
    for few, values in (("0 to 15", 4095 * ramp), ("123 to 139", 31744 + 4096 * ramp),
                        ("0 to 20", 20 * ramp), ("", 65535 * ramp), ("", 255 * ramp),
                        ("", 200 + 0 * ramp), ("", 100 + 20 * ramp), ("", 40_000 + 0 * ramp)):
        values = values.astype(np.uint16 if values.max() > 255 else np.uint8)
        Image.fromarray(values).save(file := tmp_path / "a.png")
        assert few_values(file, open_image(file, "here")) == few, few
