"""Claims about data folders: a record is read when it is used; a bad one is refused with file, line
and fix, an unusual one counted; one picture is in one split, whatever its files are called."""

import json
import os
import pickle
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import train
from support import images, records
from support.images import opened
from support.records import FILE, SPLITS, Example, digest, read_record, write_folder
from support.splits import read_folder
from world import tools

RECORD = dict(id="1", image="a.png", question="q", options=["x", "y"], answer="x", split="train",
              trajectory=[{"text": "Answer: x"}])
NO_SPLIT = dict(RECORD, split=None)
WITH_TOOL = dict(RECORD, trajectory=[{"text": "call"}, {"image": "b.png"}, {"text": "Answer: x"}])


def folder_of(folder, *rows):
    """A data folder of these records, or lines, about a red and a blue picture."""
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        if not (folder / name).exists():
            Image.new("RGB", (32, 32), colour).save(folder / name)
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    (folder / FILE).write_bytes(b"\n".join(lines))
    return folder


def with_ids(*rows):
    return [dict(row, id=str(n)) for n, row in enumerate(rows)]


def read(tmp_path, *rows, **options):
    data = read_folder(folder_of(tmp_path, *rows), **options)
    return data, data.notes


@pytest.fixture
def work(monkeypatch):
    """Returns how many lines were parsed, and how many pictures opened, since it was last asked."""
    spies = Mock(wraps=records.parse), Mock(wraps=images.Image.open)
    monkeypatch.setattr(records, "parse", spies[0])
    monkeypatch.setattr(images.Image, "open", spies[1])

    def counts():
        data = tuple(spy.call_count for spy in spies)
        for spy in spies:
            spy.reset_mock()
        return data

    return counts


# ---- read when it is used ----


def test_lines_are_parsed_once_and_pictures_opened_when_they_are_used(tmp_path, work):
    rows = with_ids(*[dict(WITH_TOOL, split=SPLITS[n % 3], task="uvw"[n % 3]) for n in range(300)])
    data, _ = read(tmp_path, *rows)
    assert work() == (300, 0)
    assert len(data) == 300 and data.tasks[:4] == ["u", "v", "w", "u"] and len(data[2:9]) == 7
    tests = pickle.loads(pickle.dumps(data.split("test")))
    assert len(tests) == 100 and len(pickle.dumps(data)) < 300 * 60 and work() == (0, 0)
    example = tests[-1]
    assert (example.id, example.split, data.subset([5, 3])[1].id) == ("299", "test", "3")
    assert work() == (2, 0)
    assert [opened(picture).size for picture in example.images] == [(32, 32)] * 2
    assert work() == (0, 2) and [ex.id for ex in data] == [row["id"] for row in rows]


def test_a_run_opens_only_the_pictures_of_its_first_step(tmp_path, work, monkeypatch):
    splits = ["validation", "validation", "test", *["train"] * 1997]
    folder_of(tmp_path, *with_ids(*[dict(WITH_TOOL, split=split) for split in splits]))
    monkeypatch.setattr(train.Pearl, "forward", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.train(train.parse_config(f"--data {tmp_path} --out {tmp_path}/run --device cpu "
                                       "--workers 0 --batch 4 --test_per_task 1".split()))
    # every line once; then the batch, one record of each split to try the tokenizer, one question
    parsed, opened = work()
    assert 2004 <= parsed <= 2015 and 8 <= opened <= 25


def test_one_row_is_read_alone(tmp_path, work):
    folder = folder_of(tmp_path, b"{", b"", dict(NO_SPLIT, image="b.png"), dict(RECORD, id="2"))
    assert [read_record(folder, 1).split, read_record(folder, 2).id] == ["", "2"]
    assert work() == (2, 0)
    for row, message in ((3, "no row 3; they are counted from 0"), (-1, "no row -1"),
                         (0, "line 1: not valid JSON")):
        with pytest.raises(ValueError, match=message):
            read_record(folder, row)


def test_the_digest_of_records_changes_with_them_and_opens_no_picture(tmp_path, work):
    rows = with_ids(RECORD, dict(RECORD, image="b.png"), RECORD)
    seen = [digest(read(tmp_path, *rows)[0])]
    assert digest(read(tmp_path, *rows)[0]) == seen[0]
    os.utime(tmp_path / "b.png", (0, 0))
    seen.append(digest(read(tmp_path, *rows)[0]))
    rows[2]["question"] = "other"
    seen.append(digest(read(tmp_path, *rows)[0]))
    assert work()[1] == 0
    seen += [digest([Example("1", "t", Image.new("RGB", (4, 4), colour), "q", ["x"], "x", ["x"])])
             for colour in ("red", "blue")]
    assert len(set(seen)) == 5 and {len(one) for one in seen} == {16}


def test_what_changed_or_cannot_be_read_says_so_when_it_is_used(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    data, _ = read(tmp_path, dict(RECORD, image="broken.png"))
    message = r"image .*broken.png cannot be read .*; replace it or drop the record"
    with pytest.raises(ValueError, match=message):
        opened(data[0].image)
    with pytest.raises(ValueError, match=f"{FILE}, line 2: {message}"):
        read(tmp_path, *with_ids(RECORD, dict(NO_SPLIT, image="broken.png")))
    with pytest.raises(ValueError, match=f"{FILE} has changed since it was read"):
        data[0]


# ---- splits ----


def test_a_picture_is_in_one_split_whatever_its_files_are(tmp_path):
    """Ten files of one picture: other names, formats and compression, and one turned by EXIF."""
    turned, image = Image.Exif(), np.arange(600, dtype=np.uint8).reshape(10, 20, 3)
    turned[0x112] = 6
    for n in range(9):
        Image.fromarray(image).save(tmp_path / f"{n}", "BMP" if n == 8 else "PNG", compress_level=n)
    Image.fromarray(np.rot90(image)).save(tmp_path / "9", "PNG", exif=turned)
    rows = with_ids(*[dict(NO_SPLIT, image=f"{n}") for n in range(10)])
    assert len({ex.split for ex in read(tmp_path, *rows)[0]}) == 1
    for split in SPLITS:
        data, notes = read(tmp_path, *rows[:7], dict(rows[7], split=split), *rows[8:])
        assert {ex.split for ex in data} == {split} and not notes


def test_shares_of_the_splits_and_the_cache_of_what_was_read(tmp_path, work):
    for n in range(300):
        Image.new("RGB", (2, 2), (n % 256, n // 256, 0)).save(tmp_path / f"{n}.png")
    rows = with_ids(*[dict(NO_SPLIT, image=f"{n % 300}.png") for n in range(600)])
    cache, picture = tmp_path / "cache.npy", (tmp_path / "8.png").read_bytes()
    data, _ = read(tmp_path, *rows, cache=cache)
    shares = [len(data.split(split)) for split in SPLITS]
    assert 430 < shares[0] < 530 and min(shares) > 30 and work()[1] == 300
    assert (read(tmp_path, *rows, cache=str(cache))[0].table == data.table).all()
    assert work()[1] == 0
    os.utime(tmp_path / "7.png", (0, 0))
    (tmp_path / "8.png").write_bytes(b"")
    with pytest.raises(ValueError, match="line 9: image .*8.png cannot be read"):
        read(tmp_path, *rows, cache=cache)
    (tmp_path / "8.png").write_bytes(picture)
    assert work()[1] == 2 and len(read(tmp_path, *rows, cache=cache)[0]) == 600
    assert work()[1] == 1  # what was read before the error is not read again
    cache.write_bytes(b"something else")
    with pytest.raises(ValueError, match="cache.npy is not a cache of pictures' hashes; delete it"):
        read(tmp_path, *rows, cache=cache)
    assert cache.read_bytes() == b"something else"


def test_pictures_in_two_splits_are_counted(tmp_path):
    pairs = (("train", "a.png"), ("test", "a.png"), ("test", "b.png"), ("validation", "b.png"))
    rows = with_ids(*[dict(RECORD, split=split, image=image) for split, image in pairs])
    data, notes = read(tmp_path, *rows)
    assert [ex.split for ex in data] == [split for split, _ in pairs]
    assert [note.partition(": ")[2].partition(";")[0] for note in notes] == [
        "1 of 2 test images are also in train", "1 of 2 test images are also in validation"]
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes())
    rows[1]["image"] = "c.png"
    assert [len(read(tmp_path, *rows, by_pixels=by)[1]) for by in (False, True)] == [1, 2]


# ---- the records ----


@pytest.mark.parametrize("options, answer, text, prefix, right", [
    (["A", "B"], "A", "It is A. Answer: B", "Answer:", ""), (["A", "B"], "A", "B", "", ""),
    (["no", "yes"], "no", "I know", "Answer:", ""), (["x"], "x", "no idea", "Answer:", ""),
    (["red", "blue"], "red", "Answer: red or blue", "Answer:", ""),
    (["1", "10"], "1", "Answer: 10", "Answer:", ""), (["红", "蓝"], "红", "答案：蓝", "答案：", ""),
    (["A", "B"], "A", "Answer: (A)", "Answer:", "A"), (["x"], "x", "x", "", "x"),
    (["red", "blue"], "red.", "Not blue. Answer: Red.", "Answer: ", "red"),
    (["A. red", "B. blue"], "b", "Answer: B", "Answer:", "B. blue"),
    (["x", "X"], "X", "Answer: X", "Answer:", "X"), (["红"], "红", "答案：红", "答案：", "红")])
def test_the_last_text_must_say_the_answer(tmp_path, options, answer, text, prefix, right):
    row = dict(RECORD, options=options, answer=answer, trajectory=[{"text": text}])
    if right:
        data, notes = read(tmp_path, row, answer_prefix=prefix)
        assert data[0].answer == right and not notes
    else:
        with pytest.raises(ValueError, match="line 1: the last text says .* but the field"):
            read(tmp_path, row, answer_prefix=prefix)


def test_unusual_records_are_counted(tmp_path):
    texts = ("Answer: x", "It is x, not y", "<answer>x</answer>", "Answer: the x", "X",
             "NoAnswer: x")
    twice = [dict(RECORD, options=options) for options in (["x", "x"], ["x", "y", "y."])]
    rows = with_ids(*[dict(RECORD, trajectory=[{"text": text}]) for text in texts], *twice)
    data, notes = read(tmp_path, *rows)
    assert [ex.id for ex in data] == ["0", "1", "2", "3", "4", "5"]
    for count, note in zip(("4 of 8 records (line 2 is the first) have no 'Answer:' in the last",
                            "1 of 8 records (line 4 is the first) give the answer in other words",
                            "2 of 8 records (line 7 is the first) have one option twice"),
                           notes, strict=True):
        assert count in note
    with pytest.raises(ValueError, match="no record that can be used; .*have one option twice"):
        read(tmp_path, *twice)


BAD = [
    ({"question": None}, "'question' must be a non-empty"), ({"id": 7}, "string; found 7"),
    ({"answer": "z"}, "'z' is not among the options"), ({"options": []}, "'x' is not among the"),
    ({"options": ["x", 3]}, "every option must be .*; found 3"), ({"id": " "}, "'id' must be"),
    ({"question": "\ud800"}, "'question' .* not valid Unicode"), ({"split": "dev"}, "is none of"),
    ({"image": "\ud800.png"}, "'image' .* not valid U"), ({"image": "c.png"}, "c.png not foun"),
    ({"task": 3}, "'task' must be a non-empty"), ({"task": "all"}, "rename it"),
    (b"[" * 100_000, "not valid JSON"),
    *[({"image": name}, "not found") for name in ("a\0b.png", "n" * 999)],
    ({"image": "/a.png"}, "/a.png not found"), ({"trajectory": []}, "must end in"),
    ({"trajectory": [{"image": "../b.png"}, {"text": "x"}]}, "b.png not found"),
    ({"trajectory": [{"image": "a.png"}]}, "must end in a text"), ({"id": "0"}, "used on line 1"),
    ({"trajectory": [{"text": " "}]}, "step 0: text must be"), (b"[]", "expected a JSON object"),
    ({"trajectory": [{"sound": "a"}]}, "step 0 must be"), (b"NaN", "expected a JSON object"),
    (b"{", "not valid JSON"), (b'{"id": "1"} {"id": "2"}', "not valid JSON .*one object a line"),
    (b'{"id": "\xff"}', "not valid JSON in UTF-8"), ({"options": "x"}, "'options' must be a list")]


def test_bad_records_are_refused_with_line_and_fix_one_by_one_or_all_at_once(tmp_path):
    rows = [row if isinstance(row, bytes) else dict(RECORD, id=str(n)) | row
            for n, (row, _) in enumerate(BAD, start=2)]
    first, problems = dict(RECORD, id="0"), []
    for row, (_, message) in zip(rows, BAD):
        with pytest.raises((ValueError, OSError), match=f"{FILE}, line 2: .*({message})"):
            read(tmp_path, first, row)
    data, _ = read(tmp_path, first, *rows, dict(RECORD, id="last"), problems=problems)
    assert [ex.id for ex in data] == ["0", "last"] and len(problems) == len(BAD)
    assert all(f"line {n}: " in problem for n, problem in enumerate(problems, start=2))
    with pytest.raises(FileNotFoundError, match=f"{FILE} not found"):
        read_folder(tmp_path / "nowhere")


def test_images_may_lie_outside_of_the_folder(tmp_path):
    (folder := tmp_path / "set").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "other.png")
    os.symlink(tmp_path / "other.png", folder / "link.png")
    names = "link.png", "../other.png", str(tmp_path / "other.png")
    data, _ = read(folder, *with_ids(*[dict(RECORD, image=name) for name in names]))
    assert [opened(ex.image).size for ex in data] == [(9, 9)] * 3


def test_texts_of_all_scripts_and_separators_survive(tmp_path):
    """Line separators inside a text, right-to-left script, CRLF, a byte order mark, a long line."""
    texts = ["\u202eשלום x", "a\u2028b\u2029c\x85d\x0be x", "👩‍🚀 x", "x " * 2_000_000]
    rows = with_ids(*[dict(RECORD, question=text) for text in texts])
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\r" for row in rows]
    data, _ = read(tmp_path, b"\xef\xbb\xbf" + lines[0], b" ", *lines[1:])
    assert [ex.question for ex in data] == [text.strip() for text in texts]


def test_a_folder_survives_the_round_trip_whatever_its_ids_are(tmp_path, mixed):
    picture, out = Image.new("RGB", (8, 8), "red"), tmp_path / "set"
    examples = mixed + [Example(name, "t", picture, "q", ["x"], "x", ["Answer: x"], split="test")
                        for name in ("a/b", "../up", "A", "a", "é?*", "record-0", "." * 300)]
    write_folder(out, examples)
    for one, back in zip(examples, read_folder(out), strict=True):
        for name in ("id", "task", "question", "options", "answer", "texts", "split"):
            assert getattr(one, name) == getattr(back, name)
        assert [i.tobytes() for i in one.images] == [opened(i).tobytes() for i in back.images]
    with pytest.raises(OSError, match="nothing is overwritten"):
        write_folder(out, examples)
    with pytest.raises(ValueError, match="have one id"):
        write_folder(tmp_path / "other", examples + examples[:1])
    assert list(tmp_path.iterdir()) == [out]


def test_the_documents_record_is_read(tmp_path):
    page = Path(train.__file__).with_name("docs").joinpath("data.md").read_text(encoding="utf-8")
    record, _ = json.JSONDecoder().raw_decode(" ".join(page[page.index('{"id"'):].split()))
    for name in (record["image"], record["trajectory"][1]["image"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    example, = read(tmp_path, record)[0]
    assert (example.answer, example.task, len(example.images)) == ("seven", record["task"], 2)
    assert tools.CALL.search(example.texts[0])
