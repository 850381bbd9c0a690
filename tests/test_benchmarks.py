"""Claims: the published layouts are read, with each item's own letters, and what does not fit them
is named; letters are told from words; equal choices count alike; no item is asked that training
would refuse; a predictions file is continued by what made it and by nothing else; scores are those
counted by hand."""

import csv
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import TINY
from model import VLM
from published import benchmarks

LETTERS = {  # reply: (strict, lenient)
    **{reply: ("A", "A") for reply in (
        "A", "<answer>A", "<answer>A</answer>", "A. red", "A) red", "(A) red", "A: red", "A, red",
        "A - red", "A\nred", "**A**", "Answer: A", "answer: A", "Answer: A.", "Option A shows",
        "A is right", "A. A dog")},
    **{reply: ("B", "B") for reply in (
        "(B)", "B. a dog", "B red", "\\boxed{B}", "\\boxed{\\text{B}}")},
    "C.": ("C", "C"), "Answer: D": ("D", "D"),
    # a letter amid words, and words that look like one
    "It is B": ("", "B"), "A man in B": ("", "B"), "A dog, so A": ("", "A"), "I think A": ("", "A"),
    **{reply: ("", "") for reply in (
        "A man is", "A person", "A Person", "Answer: A man", "(A man)", "answer", "Äpfel",
        "I see A's cat", "A-frame", "an A4 page")},
    # several, another, none
    **{reply: ("", "") for reply in (
        "A or B", "A and B", "A B", "A not B", "A B C D", "A/B", "A, B", "E", "")}}


@pytest.mark.parametrize("reply", LETTERS)
def test_letters(reply):
    assert benchmarks.letters_in(reply, "ABCD") == LETTERS[reply]


@pytest.mark.parametrize("reply, letter", [
    ("I", "I"), ("(I)", "I"), ("I. nine", "I"), ("Answer: I", "I"), ("J", "J"),
    ("I think", ""), ("I see a dog", ""), ("I and J", "")])
def test_the_pronoun_is_no_letter_where_there_are_many_choices(reply, letter):
    assert benchmarks.letters_in(reply, "ABCDEFGHIJ") == (letter, letter)


# ---- the published layouts ----


@pytest.fixture
def vstar(tmp_path):
    """Three items with the files and fields of craigwu/vstar_bench."""
    folder, rows = tmp_path / "vstar", []
    (folder / "direct_attributes").mkdir(parents=True)
    for n in range(3):
        picture = Image.new("RGB", (60, 40), (80 * n, 30, 60))
        picture.save(folder / "direct_attributes" / f"sa_{n}.jpg")
        rows.append(dict(image=f"direct_attributes/sa_{n}.jpg", question_id=n, label="A",
                         text="What colour (a word)?\n(A) red\n(B) blue\nAnswer with the letter.",
                         category="direct_attributes"))
    (folder / "test_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows),
                                                 encoding="utf-8")
    return folder


def an_mmvp(folder, question="Open, or closed?", options="(a) Open (b) Closed"):
    """Four items with the files and fields of MMVP/MMVP."""
    (folder / "MMVP Images").mkdir(parents=True)
    with open(folder / "Questions.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["Index", "Question", "Options", "Correct Answer"])
        for index in (1, 2, 99, 100):
            picture = Image.new("RGB", (60, 40), (2 * index, 0, 0))
            picture.save(folder / "MMVP Images" / f"{index}.jpg")
            table.writerow([index, question, options, f"({'ab'[index % 2]})"])
    return folder


@pytest.fixture
def mmvp(tmp_path):
    return an_mmvp(tmp_path / "mmvp")


def blink_item(tmp_path, **changed):
    """An item of a row with the fields of BLINK-Benchmark/BLINK."""
    Image.new("RGB", (60, 40), "blue").save(tmp_path / "blink.png")
    raw = dict(bytes=(tmp_path / "blink.png").read_bytes(), path=None)
    row = dict(idx="val_Jigsaw_1", question="Which?", sub_task="Jigsaw", choices=["x", "y", "z"],
               answer="(C)", prompt="Which? (A) x (B) y (C) z", image_1=raw, image_2=raw,
               image_3=None, image_4=None)
    return benchmarks.blink_item(row | changed, "here", tmp_path / "Jigsaw" / "val-0.parquet")


def test_published_layouts_are_read(vstar, mmvp, tmp_path):
    item = benchmarks.read_items("vstar", vstar)[0]
    assert (item.label, item.choices, item.group) == ("A", dict(A="red", B="blue"),
                                                      "direct_attributes")
    assert item.prompt.count("Answer with") == 1
    items = {item.id: item for item in benchmarks.read_items("mmvp", mmvp)}
    assert items["1"].prompt == ("Open, or closed?\nOptions:\nA. Open\nB. Closed\n"
                                 "Answer with the option's letter from the given choices directly.")
    # of 99 and 100, which are a pair, only 100 is confirmed to be labelled wrongly
    assert [(items[i].label, items[i].corrected) for i in ("1", "99", "100")] == [
        ("B", "B"), ("B", "B"), ("A", "B")]
    assert items["1"].group == items["2"].group != items["99"].group == items["100"].group
    item = blink_item(tmp_path)
    assert len(item.images) == 2 and item.label == "C" and item.group == "Jigsaw"
    assert item.choices == dict(A="x", B="y", C="z") and "C. z" in item.prompt
    item = blink_item(tmp_path, choices=[str(n) for n in range(10)], answer="(I)")
    assert item.label == "I" and "J. 9" in item.prompt
    # files of Windows read alike
    for kind, folder, name in (("vstar", vstar, "test_questions.jsonl"),
                               ("mmvp", mmvp, "Questions.csv")):
        items, file = benchmarks.read_items(kind, folder), folder / name
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
        assert benchmarks.read_items(kind, folder) == items


def test_what_is_not_the_published_layout_is_named(vstar, mmvp, tmp_path):
    for kind, folder, error, message in (
            ("vstar", mmvp, FileNotFoundError, "expected the layout of craigwu/vstar_bench"),
            ("mmvp", vstar, FileNotFoundError, "Questions.csv"),
            ("blink", vstar, FileNotFoundError, "BLINK-Benchmark")):
        with pytest.raises(error, match=message):
            benchmarks.read_items(kind, folder)
    for changed, message in ((dict(image_1=None, image_2=None), "here: no image"),
                             (dict(answer="(AB)"), r"here: the label '\(AB\)' is none of"),
                             (dict(answer="(D)"), r"the label '\(D\)' is none of .* A, B, C")):
        with pytest.raises(ValueError, match=message):
            blink_item(tmp_path, **changed)
    lines, table = ((folder / name).read_text(encoding="utf-8") for folder, name in (
        (vstar, "test_questions.jsonl"), (mmvp, "Questions.csv")))
    for kind, folder, name, text, message in (
            ("vstar", vstar, "test_questions.jsonl", lines + '{"text": "?"}\n',
             "jsonl, row 4, item None: no field 'question_id'"),
            ("vstar", vstar, "test_questions.jsonl", "{\n", "line 1: not valid JSON"),
            ("vstar", vstar, "test_questions.jsonl", "", "no items"),
            ("vstar", vstar, "test_questions.jsonl", lines.replace('"label": "A"', '"label": "C"'),
             "test_questions.jsonl, row 1, item 0: the label 'C' is none of"),
            ("mmvp", mmvp, "Questions.csv", table + "1,Open?,(a) Yes (b) No,(a)\n",
             "item 1: .* is there twice"),
            ("mmvp", mmvp, "Questions.csv", table.replace(",(a)\n", ",(c)\n"),
             r"Questions.csv, row 2, item 2: the label '\(c\)'"),
            ("mmvp", mmvp, "Questions.csv", "Index;Question\n1;\udce4", "Questions.csv: not UTF-8")):
        (folder / name).write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(ValueError, match=message):
            benchmarks.read_items(kind, folder)


# ---- predictions ----


def test_predictions_resume(vstar, tmp_path, monkeypatch):
    vlm, out = VLM(TINY), tmp_path / "p.jsonl"
    items = benchmarks.read_items("vstar", vstar)
    # a question on several pictures shows them all before its words
    items.append(blink_item(tmp_path))
    whole = benchmarks.predict(vlm, items, out, 4, 2)
    lines = out.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["made_by"]["tokens"] == 4 and len(whole) == 4 and len(lines) == 5
    counts, generate = [], vlm.generate

    def counted(views, *rest):
        counts.append([len(view.images) for view in views])
        return generate(views, *rest)

    monkeypatch.setattr(vlm, "generate", counted)
    # within the last item's line, before its line end, before it
    for cut in (lines[4][:9], lines[4], ""):
        out.write_text("\n".join(lines[:4]) + "\n" + cut, encoding="utf-8")
        assert benchmarks.predict(vlm, items, out, 4, 2) == whole
        assert out.read_text(encoding="utf-8").splitlines() == lines
    assert counts == [[2]] * 3
    assert benchmarks.predict(vlm, items, out, 4, 2) == whole and counts == [[2]] * 3
    replies = [json.loads(line) for line in lines[1:]]  # the letters are read anew from the replies
    replies[0]["reply"], replies[0]["strict"] = "B", "A"
    out.write_text("\n".join([lines[0], *map(json.dumps, replies)]) + "\n", encoding="utf-8")
    assert benchmarks.predict(vlm, items, out, 4, 2)[0]["strict"] == "B"


def test_predictions_that_something_else_made_are_refused(vstar, tmp_path, shipped):
    vlm, out = shipped, tmp_path / "p.jsonl"
    items = benchmarks.read_items("vstar", vstar)
    benchmarks.predict(vlm, items, out, 4, 2)
    before = out.read_bytes()

    def refused(what, vlm=vlm, items=items, tokens=4):
        with pytest.raises(ValueError, match=f"made with other {what} .*choose another --out"):
            benchmarks.predict(vlm, items, out, tokens, 2)
        assert out.read_bytes() == before

    refused("tokens", tokens=5)
    refused("items, prompts", items=items[:2])
    refused("items, prompts", items=[item._replace(prompt=item.prompt + "!") for item in items])
    refused("items", items=[item._replace(label="B") for item in items])
    turned = Image.open(items[0].images[0]).rotate(180)
    turned.putpixel((0, 0), (255, 255, 255))
    refused("items", items=[items[0]._replace(images=[turned]), *items[1:]])
    other = VLM(TINY)
    with torch.no_grad():
        next(other.lm.parameters()).view(-1)[0] += 1
    refused("weights", vlm=other)
    refused("dtype, weights", vlm=VLM(TINY, dtype=torch.bfloat16))
    shutil.copytree(TINY, tmp_path / "worded")  # the same weights under another chat template
    template = tmp_path / "worded" / "chat_template.jinja"
    template.write_text("{{ 'Look.' }}" + template.read_text(encoding="utf-8"), encoding="utf-8")
    refused("prompts", vlm=VLM(tmp_path / "worded"))
    for text in ("", '{"id": "0", "reply": "A"}\n', '[1]\n'):
        out.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="does not say what made its predictions"):
            benchmarks.predict(vlm, items, out, 4, 2)
        assert out.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("question, message", [
    ("What does <|im_end|> mean?", r"im_end"), ("What does <|image_pad|> mean?", "image_pad"),
    ("blue one two " * 1200, "tokens, the limit is")])
def test_what_training_refuses_is_not_asked(tmp_path, shipped, monkeypatch, question, message):
    items = benchmarks.read_items("mmvp", an_mmvp(tmp_path / "mmvp", question))
    monkeypatch.setattr(shipped, "generate", None)
    with pytest.raises(ValueError, match=f"Questions.csv, row 1, item 1: .*{message}"):
        benchmarks.predict(shipped, items, tmp_path / "p.jsonl", 4, 2)
    assert not (tmp_path / "p.jsonl").exists()


def test_the_command_line(tmp_path, as_program, capsys):
    """Equal choices are named; another model is refused, and a token limit before loading one."""
    folder = an_mmvp(tmp_path / "mmvp", options="(a) two (b) two")
    other, out = tmp_path / "other", tmp_path / "p.jsonl"
    shutil.copytree(TINY, other)
    weights = load_file(other / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, other / "model.safetensors",
              metadata=dict(format="pt"))

    def run(model, *more):
        as_program(benchmarks.__file__, "mmvp", folder, "--model", model, "--out", out,
                   "--device", "cpu", "--dtype", "float32", *more)
        return capsys.readouterr().out

    first = run(TINY)
    assert "pairs, labels corrected" in first
    assert "4 items have the same choice twice" in first and "1 of 0, 2 of 0, 99 of 49" in first
    made = out.read_bytes()
    for args, message in (((other,), f"error: {out} holds predictions made with other weights (by"),
                          (("no_such_model", "--tokens", "5"),
                           f"error: {out} holds predictions made with other tokens")):
        with pytest.raises(SystemExit) as ended:
            run(*args)
        assert ended.value.code.startswith(message)
    capsys.readouterr()
    assert run(TINY) == first and out.read_bytes() == made


def test_scores_by_hand():
    rows = [dict(group=g, label=a, corrected=b, strict=s, lenient=s) for g, a, b, s in (
        ("0", "A", "A", "A"), ("0", "B", "B", "B"), ("1", "A", "B", "A"), ("1", "B", "A", "A"))]
    table = benchmarks.scores("mmvp", rows)
    assert table["items, labels as published"] == [4, 75, 75]
    assert table["pairs, labels as published"] == [2, 50, 50]
    assert table["items, labels corrected"] == [4, 75, 75]
    assert table["pairs, labels corrected"] == [2, 50, 50]
    assert benchmarks.scores("vstar", rows)["1"] == [2, 50, 50]
    mixed = [r | dict(strict="") for r in rows]
    assert benchmarks.scores("mmvp", mixed)["pairs, labels as published"] == [2, 0, 50]
    # both letters of the right text
    assert benchmarks.scores("vstar", [r | dict(label="AB") for r in rows])["all"] == [4, 100, 100]
