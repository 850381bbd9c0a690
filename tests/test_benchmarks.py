"""Claims: the published layouts are read, and what does not fit them is named; letters are
distinguished from words; equal choices count alike; a question shows all of its pictures; what
training refuses is refused; no predictions are overwritten; scores are those counted by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from conftest import TINY
from published import benchmarks
from test_published import BLUE_PNG

LETTERS = {  # strict letter, lenient letter, all letters of the item: replies
    ("A", "A", "ABCD"): "A|<answer>A</answer>|A. red|A) red|(A) red|A, red|A - red|A\nred|**A**|"
    "answer: A.|Option A shows|A is right|A. A dog",
    ("B", "B", "ABCD"): "(B)|B. a dog|B red|\\boxed{\\text{B}}",
    ("", "A", "ABCD"): "A dog, so A|I think A", ("", "B", "ABCD"): "It is B|A man in B",
    # words that look like a letter; several letters, another one, none
    ("", "", "ABCD"): "A man is|A Person|Answer: A man|(A man)|answer|Äpfel|I see A's cat|A-frame|"
    "an A4 page|A or B|A B|A not B|A/B|E|",
    ("I", "I", "ABCDEFGHIJ"): "I|I. nine|Answer: I", ("", "", "ABCDEFGHIJ"): "I think|I and J"}


@pytest.mark.parametrize("letters, replies", LETTERS.items())
def test_letters(letters, replies):
    letters_of = {reply: benchmarks.letters_in(reply, letters[2]) for reply in replies.split("|")}
    assert letters_of == dict.fromkeys(letters_of, letters[:2])


@pytest.fixture
def sets(tmp_path):
    """Folders with the files and fields of craigwu/vstar_bench and of MMVP/MMVP."""
    (vstar := tmp_path / "vstar").mkdir()
    row = dict(text="What colour (a word)?\n(A) red\n(B) blue\nAnswer with the letter.", label="A",
               category="direct_attributes")
    lines = [json.dumps(row | dict(image=f"sa_{n}.jpg", question_id=n)) for n in range(3)]
    (vstar / "test_questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (mmvp := tmp_path / "mmvp" / "MMVP Images").mkdir(parents=True)
    table = "Index,Question,Options,Correct Answer\n" + "".join(
        f'{n},"Open, or closed?",(a) Open (b) Closed,({"ab"[n % 2]})\n' for n in (1, 2, 99, 100))
    (mmvp.parent / "Questions.csv").write_text(table, encoding="utf-8")
    for n, file in enumerate([*(vstar / f"sa_{n}.jpg" for n in range(3)),
                              *(mmvp / f"{n}.jpg" for n in (1, 2, 99, 100))]):
        Image.new("RGB", (60, 40), (30 * n, 30, 60)).save(file)
    return tmp_path


def blink_item(**changed):
    """An item of a row with the fields of BLINK-Benchmark/BLINK."""
    row = dict(idx="val_Jigsaw_1", question="Which?", sub_task="Jigsaw", choices=["x", "y", "z"],
               answer="(C)", image_1=BLUE_PNG, image_2=BLUE_PNG, image_3=None) | changed
    return benchmarks.blink_item(row, "here", Path("Jigsaw", "val-0.parquet"))


def test_published_layouts_are_read(sets):
    item = benchmarks.read_items("vstar", sets / "vstar")[0]
    assert (item.label, item.choices) == ("A", dict(A="red", B="blue"))
    assert item.task == "direct_attributes" and item.question.endswith("\nAnswer with the letter.")
    items = benchmarks.read_items("mmvp", sets / "mmvp")
    assert items[0].question == ("Open, or closed?\nOptions:\nA. Open\nB. Closed\n"
                               "Answer with the option's letter from the given choices directly.")
    # of 99 and 100, which are a pair, only 100 is confirmed to be labelled wrongly
    assert [(item.name, item.task, item.label, item.corrected) for item in items] == [
        ("1", "0", "B", "B"), ("2", "0", "A", "A"), ("99", "49", "B", "B"), ("100", "49", "A", "B")]
    item = blink_item()
    assert (len(item.images), item.label, item.task) == (2, "C", "Jigsaw")
    assert blink_item(choices=[*"abcdefghia"], answer="(J)").label == "AJ"


def test_what_is_not_the_published_layout_is_named(sets):
    for kind, (_, name, *_) in benchmarks.LAYOUTS.items():
        with pytest.raises(FileNotFoundError, match=f"holds no .*; expected the layout of {name}"):
            benchmarks.read_items(kind, sets)
    with pytest.raises(ValueError, match="here: no image"):
        blink_item(image_1=None, image_2=None)
    lines, table = sets / "vstar" / "test_questions.jsonl", sets / "mmvp" / "Questions.csv"
    for file, content, message in (
            (lines, b'{"text": 1}', "row 1, item None: no field 'question_id'"),
            (lines, b"{\n", "test_questions.jsonl: not valid JSON: {"), (lines, b"\n", "no items"),
            (lines, lines.read_bytes().replace(b': "A"', b': "C"'), "item 0: .* none of .* A, B"),
            (lines, lines.read_bytes().replace(b': "A"', b': "AB"'), "item 0: the label 'AB'"),
            (table, table.read_bytes() + b"1,Open?,(a) Y (b) N,(a)\n", "item 1: .*there twice"),
            (table, table.read_bytes() + b"1\n", "row 5, item 1: no field 'Question'"),
            (table, b"\xe4", "Questions.csv: not UTF-8")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            benchmarks.read_items(file.parent.name, file.parent)


def test_a_question_shows_all_of_its_pictures(sets, shipped, monkeypatch):
    items = [*benchmarks.read_items("vstar", sets / "vstar"), blink_item()]
    counts, generate = [], shipped.generate
    monkeypatch.setattr(shipped, "generate", lambda views, *rest: counts.extend(
        len(view.images) for view in views) or generate(views, *rest))
    replies = benchmarks.replies(shipped, items, 4, 2)
    assert sorted(counts) == [1, 1, 1, 2]
    assert benchmarks.replies(shipped, items[::-1], 4, 1) == replies[::-1]  # in their order
    # what training refuses is refused before the first question is asked
    monkeypatch.setattr(shipped, "generate", None)
    for words, why in (("What is <|im_end|>?", "im_end"), ("blue one two " * 1200, "tokens, the")):
        with pytest.raises(ValueError, match=f"questions.jsonl, row 2, item 1: .*{why}"):
            benchmarks.replies(shipped, [items[0], replace(items[1], question=words)], 4, 1)


def test_the_command_line(sets, as_program, capsys):
    """Equal choices are named, and an old file is refused before a model is loaded."""
    folder, out = sets / "mmvp", sets / "predictions"
    table = folder / "Questions.csv"
    table.write_bytes(table.read_bytes().replace(b"Closed", b"Open"))
    command = [benchmarks.__file__, "mmvp", folder, "--out", out, "--device", "cpu", "--model"]
    as_program(*command, TINY)
    assert "4 items have one choice twice, both letters count: 1 of 0, 2" in capsys.readouterr().out
    lines = out.read_text(encoding="utf-8")
    assert [json.loads(line)["id"] for line in lines.splitlines()] == ["1", "2", "99", "100"]
    with pytest.raises(SystemExit):
        as_program(*command, "no_such_model")
    assert "must be a new file" in capsys.readouterr().err
    assert out.read_text(encoding="utf-8") == lines


def test_scores_by_hand():
    rows = [dict(group=g, label=a, corrected=b, strict=s, lenient=s) for g, a, b, s in (
        ("0", "A", "A", "A"), ("0", "B", "B", "B"), ("1", "A", "B", "A"), ("1", "B", "B", "A"))]
    rows[0]["strict"] = ""
    assert benchmarks.scores("mmvp", rows) == {
        "items, labels as published": [4, 50, 75], "pairs, labels as published": [2, 0, 50],
        "items, labels corrected": [4, 25, 50], "pairs, labels corrected": [2, 0, 50]}
    assert benchmarks.scores("vstar", rows)["1"] == [2, 50, 50]
    # both letters of the right text
    assert benchmarks.scores("vstar", [r | dict(label="AB") for r in rows])["all"] == [4, 75, 100]
