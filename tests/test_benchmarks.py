"""Claims: the published layouts are read, and what does not fit them is named; letters are
distinguished from words; equal choices count alike; a question shows all of its pictures; what
training refuses is refused; no predictions are overwritten; scores are those counted by hand."""

import json

import pytest
from PIL import Image

from conftest import TINY
from published import benchmarks
from test_published import BLUE_PNG

# strict letter, lenient letter, all letters of the item: replies
LETTERS = {
    ("A", "A", "ABCD"): "A|<answer>A|<answer>A</answer>|A. red|A) red|(A) red|A: red|A, red|"
    "A - red|A\nred|**A**|Answer: A|answer: A|Answer: A.|Option A shows|A is right|A. A dog",
    ("B", "B", "ABCD"): "(B)|B. a dog|B red|\\boxed{B}|\\boxed{\\text{B}}",
    ("D", "D", "ABCD"): "Answer: D|D.", ("", "A", "ABCD"): "A dog, so A|I think A",
    ("", "B", "ABCD"): "It is B|A man in B",
    # words that look like a letter; several letters, another one, none
    ("", "", "ABCD"): "A man is|A person|A Person|Answer: A man|(A man)|answer|Äpfel|"
    "I see A's cat|A-frame|an A4 page|A or B|A and B|A B|A not B|A B C D|A/B|A, B|E|",
    ("I", "I", "ABCDEFGHIJ"): "I|(I)|I. nine|Answer: I", ("J", "J", "ABCDEFGHIJ"): "J",
    ("", "", "ABCDEFGHIJ"): "I think|I see a dog|I and J"}


@pytest.mark.parametrize("letters, reply", [
    (letters, reply) for letters, replies in LETTERS.items() for reply in replies.split("|")])
def test_letters(letters, reply):
    assert benchmarks.letters_in(reply, letters[2]) == letters[:2]


@pytest.fixture
def vstar(tmp_path):
    """Three items with the files and fields of craigwu/vstar_bench."""
    (folder := tmp_path / "vstar").mkdir()
    text = "What colour (a word)?\n(A) red\n(B) blue\nAnswer with the letter."
    lines = [json.dumps(dict(image=f"sa_{n}.jpg", question_id=n, label="A", text=text,
                             category="direct_attributes")) + "\n" for n in range(3)]
    for n in range(3):
        Image.new("RGB", (60, 40), (80 * n, 30, 60)).save(folder / f"sa_{n}.jpg")
    (folder / "test_questions.jsonl").write_bytes("".join(lines).encode())
    return folder


@pytest.fixture
def mmvp(tmp_path, request):
    """Four items with the files and fields of MMVP/MMVP; the parameter: question, options."""
    question, options = getattr(request, "param", ("Open, or closed?", "(a) Open (b) Closed"))
    (tmp_path / "mmvp" / "MMVP Images").mkdir(parents=True)
    table = "Index,Question,Options,Correct Answer\n"
    for n in (1, 2, 99, 100):
        picture = Image.new("RGB", (60, 40), (2 * n, 0, 0))
        picture.save(tmp_path / "mmvp" / "MMVP Images" / f"{n}.jpg")
        table += f'{n},"{question}",{options},({"ab"[n % 2]})\n'
    (tmp_path / "mmvp" / "Questions.csv").write_bytes(table.encode())
    return tmp_path / "mmvp"


def blink_item(tmp_path, **changed):
    """An item of a row with the fields of BLINK-Benchmark/BLINK."""
    row = dict(idx="val_Jigsaw_1", question="Which?", sub_task="Jigsaw", choices=["x", "y", "z"],
               answer="(C)", image_1=BLUE_PNG, image_2=BLUE_PNG, image_3=None) | changed
    return benchmarks.blink_item(row, "here", tmp_path / "Jigsaw" / "val-0.parquet")


def test_published_layouts_are_read(vstar, mmvp, tmp_path):
    item = benchmarks.read_items("vstar", vstar)[0]
    assert (item.label, item.choices) == ("A", dict(A="red", B="blue"))
    assert item.group == "direct_attributes" and item.prompt.endswith("\nAnswer with the letter.")
    items = benchmarks.read_items("mmvp", mmvp)
    assert items[0].prompt == ("Open, or closed?\nOptions:\nA. Open\nB. Closed\n"
                               "Answer with the option's letter from the given choices directly.")
    # of 99 and 100, which are a pair, only 100 is confirmed to be labelled wrongly
    assert [(item.id, item.group, item.label, item.corrected) for item in items] == [
        ("1", "0", "B", "B"), ("2", "0", "A", "A"), ("99", "49", "B", "B"), ("100", "49", "A", "B")]
    item = blink_item(tmp_path)
    assert (len(item.images), item.label, item.group) == (2, "C", "Jigsaw")
    assert blink_item(tmp_path, choices=["x", "y", "x"]).label == "AC"
    item = blink_item(tmp_path, choices=[*range(10)], answer="(I)")
    assert item.label == "I" and "\nJ. 9\n" in item.prompt and "".join(item.choices) == "ABCDEFGHIJ"
    # files of Windows read alike
    for kind, file in (("vstar", vstar / "test_questions.jsonl"), ("mmvp", mmvp / "Questions.csv")):
        items = benchmarks.read_items(kind, file.parent)
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
        assert benchmarks.read_items(kind, file.parent) == items


def test_what_is_not_the_published_layout_is_named(vstar, mmvp, tmp_path):
    for kind, (_, name, *_) in benchmarks.LAYOUTS.items():
        with pytest.raises(FileNotFoundError, match=f"holds no .*; expected the layout of {name}"):
            benchmarks.read_items(kind, tmp_path)
    for changed, message in ((dict(image_1=None, image_2=None), "here: no image"),
                             (dict(answer="(AB)"), r"here: the label '\(AB\)' is none of"),
                             (dict(answer="(D)"), r"the label '\(D\)' is none of .* A, B, C")):
        with pytest.raises(ValueError, match=message):
            blink_item(tmp_path, **changed)
    lines, table = vstar / "test_questions.jsonl", mmvp / "Questions.csv"
    for file, text, message in (
            (lines, lambda text: text + '{"text": 1}', "row 4, item None: no field 'question_id'"),
            (lines, lambda text: text + "{\n", "test_questions.jsonl: not valid JSON: {"),
            (lines, lambda text: "\n", "no items"),
            (lines, lambda text: text.replace('l": "A"', 'l": "C"'), "row 1, item 0: the label"),
            (table, lambda text: text + "1,Open?,(a) Y (b) N,(a)\n", "item 1: .* is there twice"),
            (table, lambda text: text.replace(",(a)\n", ",(c)\n"), r"item 2: the label '\(c\)'"),
            (table, lambda text: text + "\udce4", "Questions.csv: not UTF-8")):
        before = file.read_bytes()
        file.write_text(text(before.decode()), encoding="utf-8", errors="surrogateescape")
        with pytest.raises(ValueError, match=message):
            benchmarks.read_items("vstar" if file == lines else "mmvp", file.parent)
        file.write_bytes(before)


def test_a_question_shows_all_of_its_pictures(vstar, tmp_path, shipped, monkeypatch):
    items = [*benchmarks.read_items("vstar", vstar), blink_item(tmp_path)]
    counts, generate = [], shipped.generate
    monkeypatch.setattr(shipped, "generate", lambda views, *rest: counts.extend(
        len(view.images) for view in views) or generate(views, *rest))
    replies = benchmarks.replies(shipped, items, 4, 2)
    assert sorted(counts) == [1, 1, 1, 2]
    # in the order of the items, whatever the batches
    assert benchmarks.replies(shipped, items[::-1], 4, 1) == replies[::-1]


@pytest.mark.parametrize("mmvp, message", [
    (("What is <|im_end|>?", "(a) x (b) y"), "im_end"),
    (("What?", "(a) x (b) <|image_pad|>"), "image_pad"),
    (("blue one two " * 1200, "(a) x (b) y"), "tokens, the")], indirect=["mmvp"])
def test_what_training_refuses_is_refused(mmvp, shipped, monkeypatch, message):
    monkeypatch.setattr(shipped, "generate", None)
    with pytest.raises(ValueError, match=f"Questions.csv, row 1, item 1: .*{message}"):
        benchmarks.replies(shipped, benchmarks.read_items("mmvp", mmvp), 4, 2)


@pytest.mark.parametrize("mmvp", [("How many?", "(a) two (b) two")], indirect=True)
def test_the_command_line(mmvp, tmp_path, as_program, capsys):
    """Equal choices are named, and an old file is refused before a model is loaded."""
    def run(model):
        as_program(benchmarks.__file__, "mmvp", mmvp, "--model", model, "--out", tmp_path / "p",
                   "--device", "cpu", "--dtype", "float32")

    run(TINY)
    out, lines = capsys.readouterr().out, (tmp_path / "p").read_text(encoding="utf-8")
    assert "pairs, labels corrected" in out
    assert "4 items have one choice twice" in out and "1 of 0, 2 of 0, 99 of 49" in out
    assert [json.loads(line)["id"] for line in lines.splitlines()] == ["1", "2", "99", "100"]
    with pytest.raises(SystemExit):
        run("no_such_model")
    assert "must be a new file" in capsys.readouterr().err
    assert (tmp_path / "p").read_text(encoding="utf-8") == lines


def test_scores_by_hand():
    rows = [dict(group=g, label=a, corrected=b, strict=s, lenient=s) for g, a, b, s in (
        ("0", "A", "A", "A"), ("0", "B", "B", "B"), ("1", "A", "B", "A"), ("1", "B", "A", "A"))]
    names = [f"{unit}, labels {how}" for how in ("as published", "corrected")
             for unit in ("items", "pairs")]
    assert benchmarks.scores("mmvp", rows) == dict(zip(names, [[4, 75, 75], [2, 50, 50]] * 2))
    assert benchmarks.scores("vstar", rows)["1"] == [2, 50, 50]
    mixed = [r | dict(strict="") for r in rows]
    assert benchmarks.scores("mmvp", mixed)["pairs, labels as published"] == [2, 0, 50]
    # both letters of the right text
    assert benchmarks.scores("vstar", [r | dict(label="AB") for r in rows])["all"] == [4, 100, 100]
