"""Claims: the published layouts are read, with each item's own letters, and what does not fit them
is named; letters are told from words; a predictions file is gone on with by what made it and by
nothing else; scores are those counted by hand."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import TINY
from model import VLM
from published import benchmarks

INSTRUCTION = "Answer with the option's letter from the given choices directly."


LETTERS = {  # what was said: (strict, lenient)
    **{said: ("A", "A") for said in (
        "A", "<answer>A", "<answer>A</answer>", "A. red", "A) red", "(A) red", "A: red", "A, red",
        "A - red", "A\nred", "**A**", "Answer: A", "answer: A", "Answer: A.", "Option A shows",
        "A is right", "A. A dog")},
    **{said: ("B", "B") for said in (
        "(B)", "B. a dog", "B red", "\\boxed{B}", "\\boxed{\\text{B}}")},
    "C.": ("C", "C"), "Answer: D": ("D", "D"),
    # a letter amid words, and words that look like one
    "It is B": ("", "B"), "A man in B": ("", "B"), "A dog, so A": ("", "A"), "I think A": ("", "A"),
    **{said: ("", "") for said in (
        "A man is", "A person", "A Person", "Answer: A man", "(A man)", "answer", "Äpfel",
        "I see A's cat", "A-frame", "an A4 page")},
    # several, another, none
    **{said: ("", "") for said in (
        "A or B", "A and B", "A B", "A not B", "A B C D", "A/B", "A, B", "E", "")}}


@pytest.mark.parametrize("said", LETTERS)
def test_letters(said):
    assert benchmarks.letters_in(said, "ABCD") == LETTERS[said]


@pytest.mark.parametrize("said, found", [
    ("I", "I"), ("(I)", "I"), ("I. nine", "I"), ("Answer: I", "I"), ("J", "J"),
    ("I think", ""), ("I see a dog", ""), ("I and J", "")])
def test_the_pronoun_is_no_letter_where_there_are_many_choices(said, found):
    assert benchmarks.letters_in(said, "ABCDEFGHIJ") == (found, found)


# ---- the published layouts ----


@pytest.fixture
def folders(tmp_path):
    """(V*, MMVP): with the folders, files and fields of craigwu/vstar_bench and of MMVP/MMVP."""
    vstar, mmvp, rows = tmp_path / "vstar", tmp_path / "mmvp", []
    (vstar / "direct_attributes").mkdir(parents=True)
    for n in range(3):
        picture = Image.new("RGB", (60, 40), (80 * n, 30, 60))
        picture.save(vstar / "direct_attributes" / f"sa_{n}.jpg")
        rows.append(dict(image=f"direct_attributes/sa_{n}.jpg", question_id=n, label="A",
                         text=f"What colour is it?\n(A) red\n(B) blue\n{INSTRUCTION}",
                         category="direct_attributes"))
    (vstar / "test_questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n",
                                                encoding="utf-8")
    (mmvp / "MMVP Images").mkdir(parents=True)
    lines = ["Index,Question,Options,Correct Answer"]
    for index in (1, 2, 99, 100):
        Image.new("RGB", (60, 40), (2 * index, 0, 0)).save(mmvp / "MMVP Images" / f"{index}.jpg")
        lines.append(f'{index},"Open, or closed?",(a) Open (b) Closed,({"ab"[index % 2]})')
    (mmvp / "Questions.csv").write_text("\n".join(lines), encoding="utf-8")
    return vstar, mmvp


def a_blink_row(tmp_path, **changed):
    Image.new("RGB", (60, 40), "blue").save(tmp_path / "blink.png")
    raw = dict(bytes=(tmp_path / "blink.png").read_bytes(), path=None)
    return dict(idx="val_Jigsaw_1", question="Which?", sub_task="Jigsaw", choices=["x", "y", "z"],
                answer="(C)",
                prompt="Which? (A) x (B) y (C) z", image_1=raw, image_2=raw, image_3=None,
                image_4=None) | changed


def test_published_layouts_are_read(folders, tmp_path):
    vstar, mmvp = folders
    item = benchmarks.read_items("vstar", vstar, [])[0]
    assert (item.label, item.letters, item.group) == ("A", "AB", "direct_attributes")
    assert item.prompt.count("Answer with") == 1
    items = {i.id: i for i in benchmarks.read_items("mmvp", mmvp, [])}
    assert items["1"].prompt == f"Open, or closed?\nOptions:\nA. Open\nB. Closed\n{INSTRUCTION}"
    assert (items["1"].label, items["1"].other_label) == ("B", "B")
    assert (items["99"].label, items["99"].other_label) == ("B", "A")
    assert items["1"].group == items["2"].group != items["99"].group == items["100"].group
    item = benchmarks.blink_item(a_blink_row(tmp_path), "Jigsaw", "here")
    assert len(item.images) == 2 and item.label == "C" and item.letters == "ABC"
    assert "C. z" in item.prompt
    many = a_blink_row(tmp_path, choices=[str(n) for n in range(10)], answer="(I)")
    item = benchmarks.blink_item(many | dict(image_5=many["image_1"]), "Jigsaw", "here")
    assert item.letters == "ABCDEFGHIJ" and item.label == "I" and "J. 9" in item.prompt
    assert len(item.images) == 3


def test_what_is_not_the_published_layout_is_named(folders, tmp_path):
    vstar, mmvp = folders
    with pytest.raises(FileNotFoundError, match="expected craigwu/vstar_bench"):
        list(benchmarks.vstar(mmvp))
    with pytest.raises(FileNotFoundError, match="Questions.csv"):
        list(benchmarks.mmvp(vstar))
    with pytest.raises(FileNotFoundError, match="BLINK-Benchmark"):
        list(benchmarks.blink(vstar, []))
    with pytest.raises(ValueError, match="no option letter"):
        benchmarks.the_letter("(AB)", "x")
    with pytest.raises(ValueError, match="here, item val_Jigsaw_1: no image"):
        benchmarks.blink_item(a_blink_row(tmp_path, image_1=None, image_2=None), "Jigsaw", "here")
    file = vstar / "test_questions.jsonl"
    file.write_text(file.read_text(encoding="utf-8") + '{"text": "?"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="jsonl, line 4, item None: no field 'question_id'"):
        list(benchmarks.vstar(vstar))
    file.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        list(benchmarks.vstar(vstar))
    file.write_text("\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no items"):
        benchmarks.read_items("vstar", vstar, [])
    table = mmvp / "Questions.csv"
    table.write_bytes(table.read_bytes() + b"\n1,Open?,(a) Yes (b) No,(a)")
    with pytest.raises(ValueError, match="item 1 of 0 is there twice"):
        benchmarks.read_items("mmvp", mmvp, [])
    table.write_bytes("Index;Question\n1;ä".encode("latin-1"))
    with pytest.raises(ValueError, match="Questions.csv: not UTF-8"):
        list(benchmarks.mmvp(mmvp))


def test_a_label_beyond_the_choices_is_refused_with_its_file_and_item(folders, tmp_path):
    vstar, mmvp = folders
    said = r"here, item val_Jigsaw_1: the label '\(D\)' is none of the choices A, B, C"
    with pytest.raises(ValueError, match=said):
        benchmarks.blink_item(a_blink_row(tmp_path, answer="(D)"), "Jigsaw", "here")
    file = vstar / "test_questions.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace('"label": "A"', '"label": "C"'),
                    encoding="utf-8")
    with pytest.raises(ValueError, match="test_questions.jsonl, line 1, item 0: the label 'C'"):
        list(benchmarks.vstar(vstar))
    table = mmvp / "Questions.csv"
    table.write_text(table.read_text(encoding="utf-8").replace(",(a)\n", ",(c)\n"),
                     encoding="utf-8")
    with pytest.raises(ValueError, match=r"Questions.csv, row 3, item 2: the label '\(c\)'"):
        list(benchmarks.mmvp(mmvp))


def test_files_of_windows_read_alike(folders):
    for kind, folder, name in (("vstar", folders[0], "test_questions.jsonl"),
                               ("mmvp", folders[1], "Questions.csv")):
        items = benchmarks.read_items(kind, folder, [])
        file = folder / name
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
        assert benchmarks.read_items(kind, folder, []) == items


# ---- predictions ----


def test_predictions_resume(folders, tmp_path, monkeypatch):
    vlm, out = VLM(TINY), tmp_path / "p.jsonl"
    items = benchmarks.read_items("vstar", folders[0], [])
    whole = benchmarks.predict(vlm, items, out, 4, 2)
    assert len(whole) == 3
    lines = out.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0])["made_by"]["tokens"] == 4 and len(lines) == 4
    asked, generate = [], vlm.generate

    def counted(views, *rest):
        asked.append(len(views))
        return generate(views, *rest)

    monkeypatch.setattr(vlm, "generate", counted)
    # within the third item's line, before its line end, before it
    for cut in (lines[3][:9], lines[3], ""):
        out.write_text("\n".join(lines[:3]) + "\n" + cut, encoding="utf-8")
        assert benchmarks.predict(vlm, items, out, 4, 2) == whole
        assert out.read_text(encoding="utf-8").splitlines() == lines
    assert asked == [1] * 3
    assert benchmarks.predict(vlm, items, out, 4, 2) == whole and asked == [1] * 3
    said = [json.loads(line) for line in lines[1:]]  # the letters are read anew from what was said
    said[0]["said"], said[0]["strict"] = "B", "A"
    out.write_text("\n".join([lines[0], *map(json.dumps, said)]) + "\n", encoding="utf-8")
    assert benchmarks.predict(vlm, items, out, 4, 2)[0]["strict"] == "B"


def test_predictions_that_something_else_made_are_refused(folders, tmp_path, monkeypatch):
    vlm, out = VLM(TINY), tmp_path / "p.jsonl"
    items = benchmarks.read_items("vstar", folders[0], [])
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
    # one picture of the benchmark changed
    refused("items", items=[items[0]._replace(images=[turned]), *items[1:]])
    other = VLM(TINY)
    with torch.no_grad():
        next(other.lm.parameters()).view(-1)[0] += 1
    refused("weights", vlm=other)
    refused("weights, dtype", vlm=VLM(TINY, dtype=torch.bfloat16))
    shutil.copytree(TINY, tmp_path / "worded")  # the same weights under another chat template
    template = tmp_path / "worded" / "chat_template.jinja"
    template.write_text("{{ 'Look.' }}" + template.read_text(encoding="utf-8"), encoding="utf-8")
    refused("prompts", vlm=VLM(tmp_path / "worded"))
    for text in ("", '{"id": "0", "said": "A"}\n', '[1]\n'):
        out.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match="does not say what made its predictions"):
            benchmarks.predict(vlm, items, out, 4, 2)
        assert out.read_text(encoding="utf-8") == text


def test_another_model_is_refused_on_the_command_line(folders, tmp_path, as_program, capsys):
    """And a token limit before the model is even loaded."""
    other, out = tmp_path / "other", tmp_path / "p.jsonl"
    shutil.copytree(TINY, other)
    weights = load_file(other / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, other / "model.safetensors",
              metadata=dict(format="pt"))

    def run(model, *more):
        as_program(benchmarks.__file__, "mmvp", folders[1], "--model", model, "--out", out,
                   "--device", "cpu", "--dtype", "float32", *more)
        return capsys.readouterr().out

    first = run(TINY)
    assert "pairs, labels corrected" in first
    made = out.read_bytes()
    with pytest.raises(SystemExit, match=r"^error: .*made with other weights \(by"):
        run(other)
    with pytest.raises(SystemExit) as refused:
        run("no_such_model", "--tokens", "5")
    assert refused.value.code.startswith(f"error: {out} holds predictions made with other tokens")
    capsys.readouterr()
    assert run(TINY) == first[first.index("  " * 8):]
    assert out.read_bytes() == made


def test_scores_by_hand():
    rows = [dict(group=g, label=a, other_label=b, strict=s, lenient=s) for g, a, b,
            s in (("0", "A", "A", "A"), ("0", "B", "B", "B"),
                  ("1", "A", "B", "A"), ("1", "B", "A", "A"))]
    table = benchmarks.scores("mmvp", rows)
    assert table["items, labels as published"] == [4, 75, 75]
    assert table["pairs, labels as published"] == [2, 50, 50]
    assert table["items, labels corrected"] == [4, 75, 75]
    assert table["pairs, labels corrected"] == [2, 50, 50]
    assert benchmarks.scores("vstar", rows)["1"] == [2, 50, 50]
    mixed = [r | dict(strict="") for r in rows]
    assert benchmarks.scores("mmvp", mixed)["pairs, labels as published"] == [2, 0, 50]
