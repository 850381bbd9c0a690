"""Claims: records in the published layouts become our trajectories with the right crops and words;
markup goes and words that look like it stay; what cannot be used is counted with a reason and never
ends a conversion; a written call gives the picture behind it, or the record says why not; questions
on one picture are on one side and share one file; no file of the user's is touched; a mixture has
the requested shares and shares no picture between its sides; files are read in bounded memory."""

import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from published import common
from published import trajectories as published
from support.images import opened
from support.records import FILE, Example, read_folder, write_folder
from world import tools


@pytest.fixture
def pictures(tmp_path):
    """A folder with a 200 x 100 px picture, its left half red, a crop and a textured scene."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    array = np.zeros((100, 200, 3), dtype=np.uint8)
    array[:, :100, 0] = 255
    Image.fromarray(array).save(folder / "a.png")
    Image.new("RGB", (40, 40), "blue").save(folder / "crop.png")
    scene(7).save(folder / "scene.jpg", quality=90)
    (tmp_path / "outside.png").write_bytes((folder / "a.png").read_bytes())
    return folder


def scene(seed, size=(600, 400)):
    """A picture of coloured patches, no two regions of which look alike."""
    patches = np.random.default_rng(seed).integers(0, 256, (12, 18, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.BICUBIC)


def an_lvr_record(**changed):
    talk = [{"value": "<image>\nWhat is there?"}, {"value": "<lvr>\n<answer> a dog </answer>"}]
    return dict(dataset="flickr30k", question_id=3, image=["a.png"], conversations=talk,
                bboxes=[[0.5, 0.0, 0.745, 0.5]]) | changed


def convert(kind, tmp_path, rows, pictures):
    file = tmp_path / "records.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return list(published.convert(kind, [file], pictures))


def check_calls(ex):
    """Our tool gives for each call of an example the picture that follows it."""
    shown = [opened(ex.image)]
    for step, following in zip(ex.trajectory, ex.trajectory[1:]):
        if isinstance(step, str):
            assert tools.call_tool(step, *shown).tobytes() == opened(following).tobytes()
            shown.append(opened(following))
    return len(shown) - 1


def test_lvr_boxes_become_calls_and_crops(pictures, tmp_path):
    [ex] = convert("lvr", tmp_path, [an_lvr_record()], pictures)
    call, crop, last = ex.trajectory
    assert ex.question == "What is there?" and ex.answer == "a dog" and last == "Answer: a dog"
    assert ex.task == "flickr30k" and ex.remarks == [] and check_calls(ex) == 1
    assert call.endswith("[crop 50 0 75 50]") and crop.size == (50, 50)
    assert crop.getpixel((0, 0)) == (0, 0, 0)
    assert published.hundredths([0.07, 0.29, 0.57, 0.58]) == [7, 29, 57, 58]  # exact ones stay


@pytest.mark.parametrize("changed, reason", [
    (dict(bboxes=[[0.5, 0, 0.5, 1]]), "box is empty"),
    (dict(bboxes=[[0.5, 0, 1.2, 1]]), "leaves the image"),
    (dict(bboxes=[[0.5, 0, float("nan"), 1]]), "leaves the image"), (dict(bboxes=[]), "no box"),
    (dict(bboxes=[0.1, 0.1, 0.5, 0.5]), "not four numbers"),
    (dict(bboxes=[[0, 0, 1]]), "not four numbers"), (dict(image=["b.png"]), "image not found"),
    (dict(image=["../outside.png"]), "image path leaves the data folder"),
    (dict(image=["a.png", "crop.png"]), "2 images beside the question"),
    (dict(image=["broken.jpg"]), "image cannot be read"),
    (dict(conversations=[{"value": "?"}]), "field missing"),
    (dict(conversations=[{"value": "half \ud83d"}, {"value": "x"}]), "half a character"),
    (dict(conversations=[{"value": "x"}, {"value": "<answer></answer>"}]), "no answer")])
def test_what_cannot_be_used_is_named_with_its_reason(pictures, tmp_path, changed, reason, capsys):
    (pictures / "broken.jpg").write_bytes((pictures / "scene.jpg").read_bytes()[:900])
    rows = [an_lvr_record(), an_lvr_record(question_id=9, **changed), ["no object"]]
    converted = convert("lvr", tmp_path, rows, pictures)
    assert isinstance(converted[0], Example) and converted[1][0] == "lvr-9-1"
    assert reason in converted[1][1] and "another type" in converted[2][1]
    published.write(iter(converted), tmp_path / "out")
    report = capsys.readouterr().out
    assert "1 records kept, 2 left out" in report and "lvr-9-1" in report


def test_every_box_and_turn_of_lvr_is_used_or_counted(pictures, tmp_path, capsys):
    boxes = [[0.1, 0.1, 0.5, 0.5], [0.5, 0.5, 0.9, 0.9], [0, 0, 1, 0.5]]
    talk = an_lvr_record()["conversations"]
    marked = [talk[0], {"value": "<lvr>\n<lvr>\n<answer>a dog</answer>"}]
    plain = [talk[0], {"value": "<answer>a dog</answer>"}]
    rows = [an_lvr_record(bboxes=boxes[:2]),
            an_lvr_record(bboxes=boxes[:2], conversations=plain + plain),
            # the marks say that the first turn has two boxes
            an_lvr_record(bboxes=boxes, conversations=marked + talk),
            an_lvr_record(bboxes=boxes, conversations=plain + plain)]
    converted = convert("lvr", tmp_path, rows, pictures)
    two, one, both = (ex for ex in converted if isinstance(ex, Example))
    assert [text.rpartition(" [")[2] for text in two.texts[:2]] == [
        "crop 10 10 50 50]", "crop 50 50 90 90 of 1]"]
    assert [check_calls(ex) for ex in (two, one, both)] == [2, 1, 2]
    turns = [ex[0] for ex in converted if isinstance(ex, tuple) and "a further turn" in ex[1]]
    assert [name[-6:] for name in turns] == ["-turn2"] * 3
    assert "which box belongs to which" in converted[-1][1]
    published.write(iter(converted), tmp_path / "out")
    report = capsys.readouterr().out
    assert "3 records kept, 4 left out" in report and "left out       3  a further turn" in report


def test_questions_on_one_picture_are_on_one_side_with_one_copy(pictures, tmp_path, capsys):
    rng, rows = random.Random(0), []
    for n in range(300):
        colour = tuple(rng.randrange(256) for _ in range(3))
        Image.new("RGB", (20, 10), colour).save(pictures / f"{n}.png")
        rows += [an_lvr_record(image=[f"{n}.png"]) for _ in range(2)]
    # the same picture under another name, and in another format
    (pictures / "copy.png").write_bytes((pictures / "0.png").read_bytes())
    Image.open(pictures / "0.png").save(pictures / "0.bmp")
    rows += [an_lvr_record(image=[name]) for name in ("copy.png", "0.bmp")]
    published.write(iter(convert("lvr", tmp_path, rows, pictures)), tmp_path / "out")
    sides, files = {}, set()
    for ex in read_folder(tmp_path / "out"):
        sides.setdefault(opened(ex.image).tobytes(), set()).add(ex.split)
        files.add(ex.image.name)
    assert len(sides) == 300 and all(len(splits) == 1 for splits in sides.values())
    assert set.union(*sides.values()) == {"train", "validation", "test"}
    assert len(files) == 301 and "split by picture" in capsys.readouterr().out


def test_a_long_list_is_read_in_bounded_memory(tmp_path, monkeypatch):
    values = [1, 23, {"a": [1, "],[\\\""]}, "x", None, -1.5, []] * 2
    file = tmp_path / "list.json"
    for chunk in (1, 7, common.CHUNK):
        monkeypatch.setattr(common, "CHUNK", chunk)
        for text in (json.dumps(values), json.dumps(values, indent=1), "[ ]"):
            file.write_text(text, encoding="utf-8")
            assert list(common.read_list(file)) == json.loads(text)
    for text, problem in (("{}", "must be a JSON list"), ("[1, 2", "record 2: not valid JSON"),
                          ("[1, {]", "record 2: not valid JSON")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=problem):
            list(common.read_list(file))
    monkeypatch.setattr(common, "CHUNK", 10000)
    file.write_text("[" + ",\n".join(["\"" + 999 * "x" + "\""] * 3000) + "]", encoding="utf-8")
    tracemalloc.start()
    assert sum(1 for _ in common.read_list(file)) == 3000
    assert tracemalloc.get_traced_memory()[1] < 500_000
    tracemalloc.stop()


# ---- PixelReasoner ----


def a_trace(*turns, image="a.png"):
    roles = ["system", "user"] + ["assistant", "user"] * len(turns)
    question = [{"image": image, "text": None, "video": None},
                {"text": "Where?", "image": None, "video": None}]
    contents = [[{"text": "tools"}], question, *turns]
    return dict(qid="q1", message_list=[dict(role=r, content=c) for r, c in zip(roles, contents)])


def a_call(box=(0.1, 0.2, 0.3, 0.4), target=1, words="Let me zoom."):
    call = dict(name="crop_image_normalized", arguments=dict(bbox_2d=list(box), target_image=target))
    return [{"text": f"{words} <tool_call>\n{json.dumps(call)}\n</tool_call>"}]


BLUE, END = [{"image": "crop.png"}], [{"text": "So \\boxed{\\text{C}}"}]
ERROR = [{"text": "\nExecution error:\nCropped image is too small: 12x9\n"}]
SIZE = [{"text": "\nHere is the cropped image (Image Size: 40x40):"}]


def test_pixelreasoner_crops_errors_and_unusual_turns(pictures, tmp_path, capsys):
    tail = a_call()
    tail[0]["text"] += " I will see."
    rows = [a_trace([{"text": "It is \\boxed{B}"}]), a_trace(a_call(), SIZE + BLUE, END),
            a_trace(a_call(), BLUE, a_call(), BLUE, END),
            a_trace(a_call(words="Too small."), ERROR, a_call(words="Wider."), BLUE, END),
            a_trace(tail, BLUE, END)]
    bad = {"video": dict(message_list=[dict(role="user", content=[{"video": ["1.png"]}])]),
           "no boxed answer": a_trace([{"text": "no idea"}]),
           "was not shown": a_trace(a_call(target=2), BLUE, END),
           "with no call": a_trace([{"text": "Hm."}], [{"text": "Go on."}], END),
           "2 images answer one call": a_trace(a_call(), BLUE + BLUE, END),
           "several calls": a_trace([{"text": a_call()[0]["text"] * 2}], BLUE, END),
           "field missing": a_trace([{"text": "<tool_call>{}</tool_call>"}], BLUE, END),
           "not JSON": a_trace([{"text": "<tool_call>{</tool_call>"}], BLUE, END),
           "in turn up to an answer": a_trace(a_call(), BLUE),
           "last turn calls a tool": a_trace(a_call(), BLUE, a_call()),
           "0 images beside the question": a_trace(END, image=None)}
    converted = convert("pixelreasoner", tmp_path, rows + list(bad.values()), pictures)
    none, one, again, retried, tailed, *rest = converted
    assert all(reason in left[1] for reason, left in zip(bad, rest, strict=True))
    assert none.trajectory == ["It is B Answer: B"] and none.question == "Where?"
    assert one.trajectory == ["Let me zoom. [crop 10 20 30 40]", pictures / "crop.png",
                              "So C Answer: C"] and one.answer == "C"
    assert set(one.remarks) == {published.PUBLISHED_PICTURE, published.ANNOUNCEMENT}
    assert again.texts[:2] == ["Let me zoom. [crop 10 20 30 40]",
                               "Let me zoom. [crop 10 20 30 40 of 1]"]
    assert retried.texts == ["Too small. Wider. [crop 10 20 30 40]", "So C Answer: C"]
    assert published.ERROR_REPLY in retried.remarks and published.AFTER_CALL in tailed.remarks
    published.write(iter(converted), tmp_path / "out")
    assert f"with remark       1  {published.ERROR_REPLY}; first: {retried.id}" in (
        capsys.readouterr().out)
    line = (tmp_path / "out" / FILE).read_text(encoding="utf-8").splitlines()[3]
    assert json.loads(line)["remarks"] == retried.remarks
    # remarks are in a mixture too
    read = read_folder(tmp_path / "out")
    published.write(published.mix({tmp_path / "out": 1.0}, sum(ex.split == "train" for ex in read),
                                  0), tmp_path / "mixed")
    lines = (tmp_path / "mixed" / FILE).read_text(encoding="utf-8").splitlines()
    assert sum(published.ERROR_REPLY in json.loads(line).get("remarks", []) for line in lines) == 1


@pytest.mark.parametrize("image_share, box_share", [(0.1, 0), (0, 0.1), (0, 0)])
def test_the_call_is_that_of_the_region_the_published_picture_shows(pictures, tmp_path,
                                                                    image_share, box_share):
    """The tool pads its boxes and resizes what it cut, and the picture was saved as JPEG."""
    box, whole = (0.3, 0.35, 0.6, 0.8), Image.open(pictures / "scene.jpg")
    x, y = (image_share + box_share * (box[n + 2] - box[n]) for n in (0, 1))
    region = (box[0] - x, box[1] - y, box[2] + x, box[3] + y)
    cut = whole.crop(tuple(round(v * whole.size[n % 2]) for n, v in enumerate(region)))
    cut.resize((cut.width * 2 // 28 * 28, cut.height * 2 // 28 * 28),
               Image.Resampling.BICUBIC).save(pictures / "cut.jpg")
    rows = [a_trace(a_call(box), SIZE + [{"image": "cut.jpg"}], END, image="scene.jpg")]
    [ex] = convert("pixelreasoner", tmp_path, rows, pictures)
    numbers = [int(v) for v in ex.texts[0].partition("[crop ")[2].rstrip("]").split()]
    assert numbers == [pytest.approx(100 * v, abs=1) for v in region]
    published.write(iter([ex]), tmp_path / "out")
    assert check_calls(read_folder(tmp_path / "out")[0]) == 1
    assert ex.remarks == [published.ANNOUNCEMENT]


def test_pixel_boxes_and_boxes_that_touch_the_edge(pictures, tmp_path):
    """Numbers up to 1 are shares, larger ones px of the image that the call names."""
    Image.open(pictures / "scene.jpg").crop((300, 200, 600, 400)).save(pictures / "right.png")
    rows = [a_trace(a_call(box), [{"image": "right.png"}], END, image="scene.jpg")
            for box in ((0.5, 0.5, 1, 1), (0.5, 0.5, 1.0, 0.999), (300, 200, 600, 400))]
    converted = convert("pixelreasoner", tmp_path, rows, pictures)
    assert [ex.texts[0] for ex in converted] == ["Let me zoom. [crop 50 50 100 100]"] * 3
    assert all(not ex.remarks for ex in converted)


# ---- ThinkMorph and markup ----


def a_row(pictures, **changed):
    problem, helper = ({"bytes": (pictures / name).read_bytes()} for name in ("a.png", "crop.png"))
    return dict(pid="7", question="<image>Which arrangement?", answer="A", problem_image_0=problem,
                reasoning_image_0=helper, folder="Jigsaw_Assembly",
                resoning_thought_0="<think>I will assemble it.</think><image_start>",
                resoning_thought_1="<image_end><think>It fits.</think>") | changed


def test_thinkmorph_rows_and_the_message_without_pyarrow(pictures, tmp_path, monkeypatch):
    helper = a_row(pictures)["reasoning_image_0"]
    rows = [a_row(pictures), a_row(pictures, reasoning_image_0=None),
            a_row(pictures, reasoning_image_1=helper, resoning_thought_2="Done.",
                  full_text_only_thought="long"),
            a_row(pictures, problem_image_1=helper),
            a_row(pictures, resoning_thought_0="<think></think>")]
    monkeypatch.setattr(published, "thinkmorph_rows", lambda folder: iter(rows))
    kept, left, longer, two, empty = published.convert("thinkmorph", [tmp_path], None)
    assert kept.texts == ["I will assemble it.", "It fits. Answer: A"]
    assert kept.task == "Jigsaw_Assembly" and kept.remarks == [] and kept.id == "thinkmorph-7-0"
    assert kept.images[1].size == (40, 40)
    assert "field missing" in left[1] and "2 images beside the question" in two[1]
    assert "empty" in empty[1]
    assert longer.texts == ["I will assemble it.", "It fits.", "Done. Answer: A"]
    assert longer.remarks == [published.TEXT_ONLY]
    monkeypatch.undo()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    for folder, error, message in ((tmp_path, ValueError, "pip install pyarrow"),
                                   (pictures, FileNotFoundError, "hf download")):
        with pytest.raises(error, match=message):
            list(published.convert("thinkmorph", [folder], None))


@pytest.mark.parametrize("thought, answer, text", [
    ("</image_start><think>It fits.</think><answer>A</answer>", "A", "It fits. Answer: A"),
    ("It is \\boxed{A}.", "A", "It is A. Answer: A"),
    ("So $\\boxed{\\text{(A)}}$", "\\boxed{A}", "So (A) Answer: A"),
    ("Half: \\boxed{\\frac{1}{2}}", "\\boxed{\\frac{1}{2}}",
     "Half: \\frac{1}{2} Answer: \\frac{1}{2}"),
    ("<IMAGE_END> < think >Fits</think ><answer>\\boxed{A}</answer>", "<answer>A</answer>",
     "Fits Answer: A"),
    ("It fits. Answer: A", "A", "It fits. Answer: A"),
    ("It fits.</think>Yes.<answer>A. red</answer>", "A", "It fits. Yes. Answer: A"),
    ("It fits.</think>Yes, \\boxed{A}", "A", "It fits. Yes, A Answer: A"),
    ("cut off \\boxed{A", "A", "cut off A Answer: A"),
    ("1 < 2 and a <b> c", "A", "1 < 2 and a <b> c Answer: A"),
    # words of the text, which are not at the place of markup
    ("The <image> tag shows one, <think> none.", "A",
     "The <image> tag shows one, <think> none. Answer: A")])
def test_no_tag_and_no_box_is_left_and_words_like_tags_stay(pictures, thought, answer, text):
    question = "Which tag shows a picture, <image> or <think> or \\boxed{}?"
    row = a_row(pictures, resoning_thought_1=thought, answer=answer, question="<image>\n" + question,
                resoning_thought_0="<think>Look at \\boxed{this}.</think><image_start>")
    [ex] = published.thinkmorph("x", row, None)
    assert ex.texts == ["Look at this.", text] and ex.question == question
    assert ex.answer in ("A", "\\frac{1}{2}")


def test_words_that_contradict_the_answer_field_are_left_out(pictures):
    for thought, answer in (("<answer>B</answer>", "A"), ("So \\boxed{B}", "A"), ("Answer: B", "A"),
                            ("Answer: B <answer>A</answer>", "A"), ("It is. Answer: 10", "1"),
                            ("<answer>know</answer>", "no")):
        with pytest.raises(ValueError, match="another answer than its answer field"):
            list(published.thinkmorph("x", a_row(pictures, resoning_thought_1=thought,
                                                 answer=answer), None))


def test_boxes_are_opened_whole():
    text, boxes = common.open_boxes("a \\boxed{x{y}{z}} b \\fbox {2} c")
    assert text == "a x{y}{z} b 2 c" and boxes == ["x{y}{z}", "2"]
    assert common.open_boxes("\\boxed{\\boxed{A}}") == ("A", ["A"])
    assert common.open_boxes("It costs $\\boxed{5}, {A}") == ("It costs $5, {A}", ["5"])
    assert common.split_answer("a <answer>1</answer> b <answer> 2") == ("a 1 b", "2")
    assert common.split_answer("It is red. Answer: red") == ("It is red.", "red")
    assert common.split_answer("It is red.") == ("It is red.", "")
    assert common.alike("(B) red", "B") and common.alike("No.", "no")
    assert not common.alike("know", "no")
    assert not common.alike("10", "1") and not common.alike("A", "B")


# ---- writing and mixing ----


def folder_of(tmp_path, name, ids, split="train", first=0):
    """A data folder whose record k shows picture number first + k."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write_folder(tmp_path / name, [
        Example(key, name, scene(n, (24, 20)), "What?", ["a", "b"], "a", ["Answer: a"], split)
        for n, key in enumerate(ids, start=first)])
    return tmp_path / name


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file()}


def test_a_mixture_has_its_shares_and_nothing_half_done_is_left(tmp_path, capsys):
    sources = {folder_of(tmp_path, name, [f"q{n}" for n in range(50)], first=first): weight
               for name, first, weight in (("one", 0, 3.0), ("two", 50, 1.0))}
    published.write(published.mix(sources, 40, 0), tmp_path / "mixed")
    assert "training record beyond its folder's share" in capsys.readouterr().out
    mixed = read_folder(tmp_path / "mixed")
    assert sorted(sum(ex.task == name for ex in mixed) for name in ("one", "two")) == [10, 30]
    assert len({ex.id for ex in mixed}) == 40
    with pytest.raises(ValueError, match="lower --count"):
        published.write(published.mix({tmp_path / "one": 1.0}, 4000, 0), tmp_path / "more")
    with pytest.raises(ValueError, match="no record could be used: 1 x why"):
        published.write(iter([("x", "why")]), tmp_path / "more")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        published.write(iter([]), tmp_path / "mixed")
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / "more").exists()


def test_folders_of_one_name_mix_and_the_originals_stay_as_they_are(tmp_path):
    """Two folders a/x and b/x with the same ids, other pictures: every record keeps its own."""
    ids = [f"q {n}" for n in range(6)] + ["q_0"]
    one, two = folder_of(tmp_path, "a/x", ids), folder_of(tmp_path, "b/x", ids, first=10)
    before = everything(one), everything(two)
    published.write(published.mix({one: 1.0, two: 1.0}, 14, 0), tmp_path / "mixed")
    mixed = read_folder(tmp_path / "mixed")
    assert len({ex.id.casefold() for ex in mixed}) == 14
    assert sorted(opened(ex.image).tobytes() for ex in mixed) == sorted(
        opened(ex.image).tobytes() for folder in (one, two) for ex in read_folder(folder))
    # a later change of the mixture changes nothing else
    for file in (tmp_path / "mixed" / "images").iterdir():
        assert not file.is_symlink() and file.stat().st_nlink == 1
        file.write_bytes(b"changed")
    assert (everything(one), everything(two)) == before
    # a picture that is there is never written to
    name = f"images/{'0' * 32}.png"
    (tmp_path / "mixed" / name).write_bytes(b"first")
    assert published.save(scene(0), tmp_path / "mixed", "0" * 32) == name
    assert (tmp_path / "mixed" / name).read_bytes() == b"first"


def test_a_picture_of_two_folders_is_on_one_side_of_the_mixture(tmp_path, capsys):
    """And a record that the reader refuses, here with the same option twice, is left out."""
    train = folder_of(tmp_path, "train", [f"t{n}" for n in range(9)])
    lines = (train / FILE).read_text(encoding="utf-8")
    (train / FILE).write_text(lines[:lines.rindex('"b"')] + '"a"' + lines[lines.rindex('"b"') + 3:],
                              encoding="utf-8")
    tested = folder_of(tmp_path, "tested", ["a", "b"], "test")
    valid = folder_of(tmp_path, "valid", ["c", "d"], "validation", first=1)
    published.write(published.mix({train: 1.0, tested: 0.0, valid: 0.0}, 5, 0), tmp_path / "mixed")
    sides = {}
    for ex in read_folder(tmp_path / "mixed"):
        sides.setdefault(opened(ex.image).tobytes(), []).append(ex.split)
    assert sorted(map(tuple, sides.values())) == (
        [("test",)] * 2 + [("train",)] * 5 + [("validation",)])
    report, left = capsys.readouterr().out, "record whose picture is in a"
    assert f"left out       2  train {left} test split" in report
    assert f"left out       1  train {left} validation split; first: 1-train/t2" in report
    assert f"left out       1  validation {left} test split; first: 3-valid/c" in report
    assert "left out       1  an option is there twice" in report and "line 9" in report


def test_the_script_reads_files_of_windows_in_any_locale(pictures, tmp_path, as_program, capsys):
    """With a byte order mark, Windows line ends, words that are not ASCII, and several files."""
    talk = [{"value": "<image>\r\nWas heißt 犬?"}, {"value": "<answer>Hündin</answer>"}]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        text = json.dumps([an_lvr_record(conversations=talk)], indent=1, ensure_ascii=False)
        file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    done = subprocess.run(
        [sys.executable, published.__file__, "lvr", *files, "--images", pictures, "--out",
         tmp_path / "new" / "out"], capture_output=True, encoding="utf-8",
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and "2 records kept, 0 left out" in done.stdout
    assert "2 records" in done.stderr  # the progress bar
    one, two = read_folder(tmp_path / "new" / "out")
    assert one.answer == two.answer == "Hündin" and one.question == "Was heißt 犬?"
    assert one.id != two.id and b"\r" not in (tmp_path / "new" / "out" / FILE).read_bytes()
    files[0].write_bytes("[ä]".encode("latin-1"))
    for args, message in (
            (["lvr", files[0], "--images", pictures], f"error: {files[0]}: not UTF-8"),
            (["mix", f"{tmp_path}=1", f"{tmp_path}/../{tmp_path.name}=2"], "named twice")):
        with pytest.raises(SystemExit) as ended:
            as_program(published.__file__, *args, "--out", tmp_path / "again")
        assert message in str(ended.value.code) + capsys.readouterr().err


def test_an_interruption_leaves_nothing_and_says_so(pictures, tmp_path, monkeypatch):
    def interrupted(examples):
        yield from examples
        raise KeyboardInterrupt

    examples = convert("lvr", tmp_path, [an_lvr_record()], pictures)
    with pytest.raises(KeyboardInterrupt):
        published.write(interrupted(examples), tmp_path / "out")
    assert not list((tmp_path / "out").parent.glob("out.*"))
    assert "starts anew" in Path(published.__file__).read_text(encoding="utf-8").splitlines()[-1]
