"""Claims about data folders: a record is read when it is used; a bad one is refused with file, line
and fix, an unusual one counted; one picture is in one split, whatever its files are called."""

import json
import os
import pickle
import re
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import train
from support import images, records
from support.records import FILE, SPLITS, Example, digest, read_record, write_folder
from support.splits import read_folder

RECORD = dict(image="a.png", question="q", options=["x", "y"], answer="x", split="train",
              trajectory=[{"text": "Answer: x"}])
WITH_TOOL = dict(trajectory=[{"text": "call"}, {"image": "b.png"}, {"text": "Answer: x"}])


def folder_of(folder, *rows):
    """A data folder of RECORD with these changes, and numbers as ids, or of these whole lines."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        if not (folder / name).exists():
            Image.new("RGB", (32, 32), colour).save(folder / name)
    lines = [row if isinstance(row, bytes) else json.dumps(dict(RECORD, id=str(n)) | row).encode()
             for n, row in enumerate(rows)]
    (folder / FILE).write_bytes(b"\n".join(lines))
    return folder


def read(folder, *rows, **options):
    return read_folder(folder_of(folder, *rows), **options)


@pytest.fixture
def work(monkeypatch):
    """Returns how many lines were parsed, and how many pictures opened, since it was last asked."""
    calls, parse, open_file = [], records.parse, Image.open
    monkeypatch.setattr(records, "parse", lambda *args: calls.append("parse") or parse(*args))
    monkeypatch.setattr(Image, "open", lambda file: calls.append("open") or open_file(file))

    def counts():
        data = calls.count("parse"), calls.count("open")
        calls.clear()
        return data
    return counts


def test_lines_are_parsed_once_and_pictures_opened_when_they_are_used(tmp_path, work):
    rows = [dict(WITH_TOOL, split=SPLITS[n % 3], task="uvw"[n % 3]) for n in range(300)]
    data = read(tmp_path, *rows)
    assert (len(data), len(data[2:9]), work()) == (300, 7, (300, 0))
    tests = pickle.loads(pickle.dumps(data.split("test")))
    assert len(tests) == 100 and len(pickle.dumps(data)) < 300 * 60 and work() == (0, 0)
    example = tests[-1]
    assert (example.id, example.split, data[[5, 3]][1].id, work()) == ("299", "test", "3", (2, 0))
    assert [images.opened(picture).size for picture in example.images] == [(32, 32)] * 2
    assert work() == (0, 2) and [ex.id for ex in data] == [str(n) for n in range(300)]
    assert (work(), read_record(tmp_path, 7).id, work()) == ((300, 0), "7", (1, 0))
    folder_of(tmp_path, *rows[1:])
    with pytest.raises(ValueError, match=f"{FILE} has changed since it was read"):
        data[0]


def test_a_run_opens_only_the_pictures_of_its_first_step(tmp_path, work, monkeypatch):
    folder_of(tmp_path, *[dict(WITH_TOOL, split=split) for split in 667 * SPLITS])
    monkeypatch.setattr(train.Pearl, "forward", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.train(train.parse_config(f"--data {tmp_path} --out {tmp_path}/run --device cpu "
                                       "--workers 0 --batch 4 --test_per_task 1".split()))
    # every line once; then the batch, one record of each split to try the tokenizer, one question
    parsed, opened = work()
    assert 2005 <= parsed <= 2016 and 8 <= opened <= 25


def test_the_digest_of_records_changes_with_them_and_opens_no_picture(tmp_path, work):
    rows = [{}, dict(image="b.png")]
    first, again = (digest(read(tmp_path, *rows)) for _ in range(2))
    os.utime(tmp_path / "b.png", (0, 0))
    touched = digest(read(tmp_path, *rows))
    other = digest(read(tmp_path, dict(question="other"), rows[1]))
    assert first == again and work()[1] == 0
    red, blue = (digest([Example("1", "t", Image.new("RGB", (4, 4), colour), "q", ["x"], "x")])
                 for colour in ("red", "blue"))
    assert len({first, touched, other, red, blue}) == 5


def test_a_picture_is_in_one_split_whatever_its_files_are(tmp_path):
    """Ten files of one picture, with absolute paths: other formats, one turned by EXIF."""
    turned, image = Image.Exif(), np.arange(600, dtype=np.uint8).reshape(10, 20, 3)
    turned[0x112] = 6
    for n in range(9):
        Image.fromarray(image).save(tmp_path / f"{n}", "BMP" if n == 8 else "PNG", compress_level=n)
    Image.fromarray(np.rot90(image)).save(tmp_path / "9", "PNG", exif=turned)
    rows = [dict(split=None, image=f"{tmp_path}/{n}") for n in range(10)]
    assert len({ex.split for ex in read(tmp_path, *rows)}) == 1
    for split in SPLITS:
        data = read(tmp_path, *rows[:7], dict(rows[7], split=split), *rows[8:])
        assert {ex.split for ex in data} == {split} and not data.notes
    # records that name splits keep them, with a note for each two that share a picture
    data = read(tmp_path, *[dict(split=split) for split in SPLITS])
    assert [ex.split for ex in data] == [*SPLITS] and len(data.notes) == 3
    assert "1 of 1 test images are also in train; give all" in data.notes[1]
    # of several there is no right one for a record that names none
    alone = read(tmp_path, dict(split=None))[0].split
    others = [dict(split=split) for split in SPLITS if split != alone]
    data = read(tmp_path, *others, dict(split=None))
    assert data[2].split == alone and len(data.notes) == 3


def test_shares_of_the_splits_and_the_cache_of_what_was_read(tmp_path, work):
    for n in range(300):
        Image.new("RGB", (2, 2), (n % 256, n // 256, 0)).save(tmp_path / f"{n}.png")
    rows = [dict(split=None, image=f"{n % 300}.png") for n in range(600)]
    cache, picture = tmp_path / "cache.npy", (tmp_path / "8.png").read_bytes()
    data = read(tmp_path, *rows, cache=cache)
    shares = [len(data.split(split)) for split in SPLITS]
    assert 430 < shares[0] < 530 and min(shares) > 30 and work()[1] == 300
    assert (read(tmp_path, *rows, cache=cache).table == data.table).all() and work()[1] == 0
    os.utime(tmp_path / "7.png", (0, 0))
    (tmp_path / "8.png").write_bytes(b"")
    with pytest.raises(ValueError, match="line 9: image .*8.png cannot be read"):
        read(tmp_path, *rows, cache=cache)
    (tmp_path / "8.png").write_bytes(picture)
    assert len(read(tmp_path, *rows, cache=cache)) == 600
    assert work()[1] == 3  # what was read before the error is not read again
    cache.write_bytes(b"something else")
    with pytest.raises(ValueError, match="cache.npy is not a cache of pictures' hashes; delete it"):
        read(tmp_path, *rows, cache=cache)
    assert cache.read_bytes() == b"something else"


def test_the_answer_is_an_option_and_the_last_text_says_it(tmp_path):
    row = dict(options=["A. 红", "B. 蓝"], answer="b", trajectory=[{"text": "答案：B。"}])
    data = read(tmp_path, row, answer_prefix="答案： ")
    assert data[0].answer == "B. 蓝" and not data.notes
    for answer, prefix, text in (("a", "答案：", "B。"), ("a", "", "答案：B。")):
        with pytest.raises(ValueError, match=f"the last text says '{text}' but the field 'answer'"):
            read(tmp_path, dict(row, answer=answer), answer_prefix=prefix)


def test_unusual_records_are_counted(tmp_path):
    texts = "Answer: x", "It is x, not y", "<answer>x</answer>", "Answer: the x", "NoAnswer: x"
    twice = [dict(options=options) for options in (["x", "x"], ["x", "y", "y."])]
    data = read(tmp_path, *[dict(trajectory=[{"text": text}]) for text in texts], *twice)
    assert [ex.id for ex in data] == ["0", "1", "2", "3", "4"]
    counted = r"(\d) of 7 records \(line (\d) .* (no 'Answer:'|other words|option twice)"
    assert [re.search(counted, note).groups() for note in data.notes] == [
        ("3", "2", "no 'Answer:'"), ("1", "4", "other words"), ("2", "6", "option twice")]
    with pytest.raises(ValueError, match="no record that can be used; .*have one option twice"):
        read(tmp_path, *twice)


BAD = [
    ({"question": None}, "'question' must be a non-empty"), ({"id": " "}, "'id' must be"),
    ({"options": "x"}, "'options' must be a list"), ({"options": ["x", 3]}, "every option must be"),
    ({"options": []}, "'x' is not among the options"), ({"split": "dev"}, "'dev' is none of"),
    ({"question": "\ud800"}, "'question' .* not valid Unicode"), ({"task": "all"}, "rename it"),
    ({"image": "c.png"}, "c.png not found"), ({"image": "a\0b.png"}, "not found"),
    ({"trajectory": [{"image": "../b.png"}, {"text": "x"}]}, "b.png not found"),
    ({"trajectory": []}, "must end in a text"), ({"trajectory": [{"image": "a.png"}]}, "must end"),
    ({"trajectory": [{"text": " "}]}, "step 0: text must be"), ({"id": "0"}, "used on line 1"),
    ({"trajectory": [{"sound": "a"}]}, "step 0 must be"), (b"NaN", "expected a JSON object"),
    *[({"trajectory": [{"text": text}]}, "text says .*; correct one of them") for text in (
        "It is x. Answer: y", "Answer: x or y", "Answer: no idea", "no idea", "Answer: xx")],
    (b'{"id": "1"} {"id": "2"}', "not valid JSON .*one object a line"),
    (b'{"id": "\xff"}', "not valid JSON in UTF-8"), (b"[" * 100_000, "not valid JSON")]


def test_bad_records_are_refused_with_line_and_fix_one_by_one_or_all_at_once(tmp_path):
    for row, message in BAD:
        with pytest.raises((ValueError, OSError), match=f"{FILE}, line 2: .*({message})"):
            read(tmp_path, {}, row)
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        read_record(tmp_path, 1)
    data = read(tmp_path, {}, *(row for row, _ in BAD), {}, problems=(problems := []))
    assert [ex.id for ex in data] == ["0", str(len(BAD) + 1)] and len(problems) == len(BAD)
    assert all(f"line {n}: " in problem for n, problem in enumerate(problems, start=2))
    with pytest.raises(FileNotFoundError, match=f"{FILE} not found"):
        read_folder(tmp_path / "nowhere")


def test_a_folder_survives_the_round_trip_whatever_its_ids_and_texts_are(tmp_path, mixed):
    # line separators, right-to-left script, a long line
    questions = {"a/b": "\u202eשלום x", "../up": "a\u2028b\u2029c\x85d\x0be x", "A": "👩‍🚀",
                 "a": "x " * 2_000_000 + "x", "é?*": "q", "record-0": "q", "." * 300: "q"}
    red, out = Image.new("RGB", (8, 8), "red"), tmp_path / "set"
    examples = mixed + [Example(name, "t", red, text, ["x"], "x", ["Answer: x"], split="test")
                        for name, text in questions.items()]
    write_folder(out, examples)
    lines = (out / FILE).read_bytes()
    # as written, and as Windows has it: with a byte order mark and other line ends
    for content in (lines, b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n \r\n")):
        (out / FILE).write_bytes(content)
        for one, back in zip(examples, read_folder(out), strict=True):
            for name in ("id", "task", "question", "options", "answer", "texts", "split"):
                assert getattr(one, name) == getattr(back, name)
            assert one.images == [images.opened(picture) for picture in back.images]
    assert list(tmp_path.iterdir()) == [out]


def test_the_documents_record_is_read(tmp_path):
    page = Path(train.__file__).with_name("docs").joinpath("data.md").read_text(encoding="utf-8")
    record, _ = json.JSONDecoder().raw_decode(page[page.index('{"id"'):])
    record["image"], record["trajectory"][1]["image"] = "a.png", "b.png"
    assert len(read(tmp_path, record)[0].images) == 2
