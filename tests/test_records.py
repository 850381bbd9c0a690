"""Claims: a record that says two answers is refused, one that says it in an unusual way is counted;
one image is on one side; what is odd in a file is said with its line, and nothing is dropped."""

import hashlib
import json
import shutil
import warnings

import pytest
from PIL import Image

from support import records
from support.records import Example, read_folder, write_folder

RECORD = dict(id="1", image="a.png", question="q", options=["x", "y"], answer="x",
              trajectory=[{"text": "Answer: x"}])


def folder_of(tmp_path, *rows):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        if not (tmp_path / name).exists():
            Image.new("RGB", (32, 32), colour).save(tmp_path / name)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / records.FILE).write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def answering(options, answer, text):
    return {**RECORD, "options": options, "answer": answer, "trajectory": [{"text": text}]}


def read(tmp_path, *rows, prefix="Answer:"):
    notes = []
    return read_folder(folder_of(tmp_path, *rows), notes=notes, answer_prefix=prefix), notes


# ---- the answer and the last text ----


@pytest.mark.parametrize("options, answer, text, prefix", [
    (["A", "B"], "A", "It is grey. Answer: B", "Answer:"),
    (["one", "none"], "one", "I count none. Answer: none", "Answer:"),
    (["1", "10"], "1", "Answer: 10", "Answer:"), (["1", "2"], "1", "Answer: 1.5", "Answer:"),
    (["no", "yes"], "no", "Answer: know", "Answer:"), (["no", "yes"], "no", "I know", "Answer:"),
    (["A", "B"], "A", "Answer: B. Answer: A? No. \\boxed{B}", "Answer:"),
    (["A", "B"], "A", "A it is. <answer>B</answer>", "Answer:"),
    (["A", "B"], "A", "Answer: A man is", "Answer:"), (["5"], "5", "Answer: -5", "Answer:"),
    (["red", "blue"], "red", "reddish", "Answer:"), (["5"], "5", "The Answer:", "Answer:"),
    (["red", "blue"], "red", "Answer: red or blue", "Answer:"),
    (["A. red", "B. blue"], "A. red", "Answer: B", "Answer:"),
    (["红", "蓝"], "红", "红还是？答案：蓝", "答案："), (["A", "B"], "A", "B", "")])
def test_a_last_text_with_another_answer_is_refused_with_its_line(tmp_path, options, answer, text,
                                                                  prefix):
    row = {**answering(options, answer, text), "id": "2"}
    with pytest.raises(ValueError, match="line 2: the last text (says .* but the field 'answer'|of "
                                         "the trajectory does not contain the answer)"):
        read(tmp_path, answering(["x"], "x", f"{prefix} x"), row, prefix=prefix)


@pytest.mark.parametrize("options, answer, text, prefix", [
    (["A", "B"], "A", "It is. Answer: A", "Answer:"), (["A", "B"], "A", "Answer: (A)", "Answer:"),
    (["A", "B"], "A", "Answer: A. red", "Answer:"), (["5."], "5.", "Answer: \\boxed{5}", "Answer:"),
    (["red", "blue"], "red", "Not blue. Answer: Red.", "Answer: "), (["x"], "x", "x", ""),
    (["A. red", "B. blue"], "B. blue", "Answer: B", "Answer:"),
    (["红", "蓝"], "红", "答案：红。", "答案："), (["x"], "x", "<answer>x</answer>", "<answer>")])
def test_the_same_answer_in_another_dress_is_taken_without_a_word(tmp_path, options, answer, text,
                                                                  prefix):
    found, notes = read(tmp_path, answering(options, answer, text), prefix=prefix)
    assert found[0].answer == answer and not notes


def test_texts_without_prefix_and_in_other_words_are_taken_and_counted(tmp_path):
    rows = [answering(["x", "y"], "x", text) for text in
            ("Answer: x", "It is x, not y", "<answer>x</answer>", "Answer: the x", "X")]
    found, notes = read(tmp_path, *[{**row, "id": str(n)} for n, row in enumerate(rows)])
    assert len(found) == 5 and len(notes) == 2
    assert "3 of 5 last texts (line 2 is the first) have no 'Answer:'" in notes[0]
    assert "--answer_prefix" in notes[0]
    assert "1 of 5 last texts (line 4 is the first) give the answer in other words" in notes[1]


def test_without_a_list_for_notes_they_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="have no 'Answer:'"):
        read_folder(folder_of(tmp_path, answering(["x"], "x", "x")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_folder(folder_of(tmp_path, RECORD))


def test_the_answer_is_the_option_that_it_means(tmp_path):
    for options, answer, right in ((["Red", "x"], "red.", "Red"), (["A. x", "B. y"], "b", "B. y"),
                                   (["\u00e9"], "e\u0301", "\u00e9")):
        [ex], _ = read(tmp_path, answering(options, answer, f"Answer: {answer}"))
        assert ex.answer == right and ex.answer in ex.options


@pytest.mark.parametrize("options", [["x", "x."], ["x", "x "], ["x", "<b>x</b>"], ["x", '"x"'],
                                     ["\u00e9", "e\u0301", "x"]])
def test_options_that_would_count_as_one_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="line 1: an option is there twice, or in two forms"):
        read(tmp_path, answering(options, options[0], f"Answer: {options[0]}"))
    assert read(tmp_path, answering(["x", "X"], "X", "Answer: X"))[0][0].answer == "X"


# ---- splits ----


def test_one_image_is_on_one_side_whatever_it_is_called(tmp_path):
    """Copies under twenty names; hashes of the names would fall on all three sides."""
    folder_of(tmp_path)
    names = [f"copy-{n}.png" for n in range(20)]
    for name in names:
        shutil.copy(tmp_path / "a.png", tmp_path / name)
    found, notes = read(tmp_path, *[{**RECORD, "id": n, "image": n} for n in names])
    assert len({ex.split for ex in found}) == 1 and not notes
    digest = hashlib.sha256((tmp_path / "a.png").read_bytes()).digest()
    by_hash = {0: "test", 1: "validation"}.get(int.from_bytes(digest[:4]) % 10, "train")
    assert found[0].split == by_hash


def test_a_record_without_split_goes_where_its_image_is(tmp_path):
    for split in records.SPLITS:
        rows = [{**RECORD, "id": "1"}, {**RECORD, "id": "2", "split": split}, {**RECORD, "id": "3"}]
        found, notes = read(tmp_path, *rows)
        assert [ex.split for ex in found] == [split] * 3 and not notes


def test_shares_of_the_splits(tmp_path):
    rows = []
    for n in range(300):
        Image.new("RGB", (2, 2), (n % 256, n // 256, 0)).save(tmp_path / f"{n}.png")
        rows.append({**RECORD, "id": str(n), "image": f"{n}.png"})
    found, _ = read(tmp_path, *rows)
    count = {split: sum(ex.split == split for ex in found) for split in records.SPLITS}
    assert 215 < count["train"] < 265 and all(15 < count[s] < 50 for s in ("validation", "test"))


def test_images_on_two_sides_are_counted(tmp_path):
    rows = [{**RECORD, "id": str(n), "split": split, "image": image} for n, (split, image) in
            enumerate([("train", "a.png"), ("test", "a.png"), ("test", "b.png"), ("train", "a.png"),
                       ("validation", "b.png")])]
    found, notes = read(tmp_path, *rows)
    assert [ex.split for ex in found] == [row["split"] for row in rows]
    assert [note.partition(": ")[2].partition(";")[0] for note in notes] == [
        "1 of 2 test images are also in train", "1 of 2 test images are also in validation"]


def test_each_image_is_read_once(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(records, "open_image", lambda file, where: opened.append(file))
    steps = [{"text": "call"}, {"image": "b.png"}, {"text": "Answer: x"}]
    read(tmp_path, *[{**RECORD, "id": str(n), "trajectory": steps} for n in range(5)])
    assert len(opened) == 2


# ---- the file ----


@pytest.mark.parametrize("line", ['{"id": "1", "id": "2"}', '{"a": {"b": 1, "b": 2}}'])
def test_a_field_that_is_there_twice_is_refused(tmp_path, line):
    with pytest.raises(ValueError, match="line 2: field '.*' is there twice; keep one"):
        read(tmp_path, RECORD, line)


@pytest.mark.parametrize("field", ["id", "image", "question", "family", "answer"])
def test_broken_unicode_is_one_sentence_with_line_and_field(tmp_path, field):
    row = {**RECORD, field: "x \ud800"}
    with pytest.raises(ValueError, match=f"line 1: .*{field}.*(not valid Unicode|not among)"):
        read(tmp_path, row)
    (tmp_path / records.FILE).write_bytes(b'{"id": "\xff"}')
    with pytest.raises(ValueError, match="line 1: the line is not valid Unicode text"):
        read_folder(tmp_path)


def test_problems_are_collected_and_the_rest_is_read(tmp_path):
    rows = [RECORD, {**answering(["x", "y"], "x", "Answer: y"), "id": "2"}, RECORD,
            {**RECORD, "id": "4"}]
    problems = []
    found = read_folder(folder_of(tmp_path, *rows), problems=problems)
    assert [ex.id for ex in found] == ["1", "4"] and len(problems) == 2
    assert "line 2: the last text says 'y'" in problems[0] and "used on line 1" in problems[1]


def test_ids_that_are_no_file_names_are_written_and_read_back(tmp_path):
    picture = Image.new("RGB", (8, 8), "red")
    given = [Example(name, "f", picture, "q", ["x"], "x", ["Answer: x"], split="train")
             for name in ("a/b", "../up", "A", "a", "é?*", "record-0", "." * 300)]
    write_folder(tmp_path / "set", given)
    back = read_folder(tmp_path / "set")
    assert [ex.id for ex in back] == [ex.id for ex in given]
    assert len({ex.image for ex in back}) == len(given)
    with pytest.raises(ValueError, match="two of the examples .* have one id"):
        write_folder(tmp_path / "other", given + given[:1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set"]
