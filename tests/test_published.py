"""Claims: records in the published layouts become our trajectories with the right crops and words;
what cannot be used is counted and given a reason; a call that is written gives the picture behind
it, or the record says why not; questions on one picture stand on one side; no file of the user's is
touched; a mixture has the asked shares and shares no picture between its sides."""

import json
import os
import random
import subprocess
import sys
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
    """A folder with one 200 x 100 px picture, its left half red, and a crop."""
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


def save_json(file, value):
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def a_lvr_record(**changed):
    talk = [{"from": "human", "value": "<image>\nWhat is there?"},
            {"from": "gpt", "value": "<lvr>\n<answer> a dog </answer>"}]
    return dict(dataset="flickr30k", question_id=3, image=["a.png"], conversations=talk,
                bboxes=[[0.5, 0.0, 0.745, 0.5]]) | changed


def converted(convert, tmp_path, records, pictures):
    return list(convert(save_json(tmp_path / "records.json", records), pictures))


def answers_of_calls(ex):
    """What our executor gives for each call of an example, and the picture that follows it."""
    shown, pairs = [opened(ex.image)], []
    for step, following in zip(ex.trajectory, ex.trajectory[1:]):
        if isinstance(step, str):
            pairs.append((tools.call_tool(step, *shown).tobytes(),
                          opened(following).tobytes()))
        else:
            shown.append(opened(step))
    return pairs


# ---- LVR ----


def test_lvr_boxes_become_calls_and_crops(pictures, tmp_path):
    [ex] = converted(published.lvr, tmp_path, [a_lvr_record()], pictures)
    call, crop, last = ex.trajectory
    assert ex.question == "What is there?" and ex.answer == "a dog" and last == "Answer: a dog"
    assert ex.task == "flickr30k" and ex.remarks == []
    assert call.endswith("[crop 50 0 75 50]") and crop.size == (50, 50)
    assert crop.getpixel((0, 0)) == (0, 0, 0)
    assert answers_of_calls(ex) == [(crop.tobytes(), crop.tobytes())]
    assert published.hundredths([0.07, 0.29, 0.57, 0.58]) == [7, 29, 57, 58]  # exact ones stay


@pytest.mark.parametrize("changed, reason", [
    (dict(bboxes=[[0.5, 0, 0.5, 1]]), "box is empty"),
    (dict(bboxes=[[0.5, 0, 1.2, 1]]), "leaves the image"),
    (dict(bboxes=[[0.5, 0, float("nan"), 1]]), "leaves the image"),
    (dict(bboxes=[]), "field missing"), (dict(bboxes=[0.1, 0.1, 0.5, 0.5]), "not four numbers"),
    (dict(bboxes=[[0, 0, 1]]), "not four numbers"), (dict(image=["b.png"]), "image not found"),
    (dict(image=["../outside.png"]), "image path leaves the data folder"),
    (dict(image=["a.png", "crop.png"]), "2 images beside the question"),
    (dict(image=["broken.jpg"]), "image cannot be read"),
    (dict(conversations=[{"from": "human", "value": "?"}]), "field missing"),
    (dict(conversations=[{"value": "half \ud83d"}, {"value": "x"}]), "half a character"),
    (dict(conversations=[{"value": "x"}, {"value": "<answer></answer>"}]), "no answer")])
def test_what_cannot_be_used_is_named_with_its_reason(pictures, tmp_path, changed, reason, capsys):
    (pictures / "broken.jpg").write_bytes((pictures / "scene.jpg").read_bytes()[:900])
    records = [a_lvr_record(), a_lvr_record(question_id=9, **changed)]
    found = converted(published.lvr, tmp_path, records, pictures)
    assert isinstance(found[0], Example) and found[1][0] == "lvr-flickr30k-9-1"
    assert reason in found[1][1]
    published.write(iter(found), tmp_path / "out")
    said = capsys.readouterr().out
    assert "1 records kept, 1 left out" in said and "lvr-flickr30k-9-1" in said


def test_every_box_and_turn_of_lvr_is_used_or_counted(pictures, tmp_path, capsys):
    boxes = [[0.1, 0.1, 0.5, 0.5], [0.5, 0.5, 0.9, 0.9], [0, 0, 1, 0.5]]
    talk = a_lvr_record()["conversations"]
    marked = [talk[0], dict(talk[1], value="<lvr>\n<lvr>\n<answer>a dog</answer>")]
    plain = [talk[0], dict(talk[1], value="<answer>a dog</answer>")]
    records = [a_lvr_record(bboxes=boxes[:2]),
               a_lvr_record(bboxes=boxes[:2], conversations=plain + plain),
               a_lvr_record(bboxes=boxes, conversations=marked + talk),
               a_lvr_record(bboxes=boxes, conversations=plain + plain)]
    two, first, turn, both, later, unclear, last = converted(published.lvr, tmp_path, records,
                                                             pictures)
    calls = [text.rpartition(" [")[2] for text in two.texts[:2]]
    assert calls == ["crop 10 10 50 50]", "crop 50 50 90 90 of 1]"]
    assert all(given == kept for given, kept in answers_of_calls(two)) and len(two.images) == 3
    # the marks say that the first turn has two
    assert len(first.images) == 2 and len(both.images) == 3
    assert "which box belongs to which" in unclear[1]
    assert [t[0][-6:] for t in (turn, later, last)] == ["-turn2"] * 3
    assert "a further turn" in turn[1]
    published.write(iter([two, first, turn, both, later, unclear, last]), tmp_path / "out")
    said = capsys.readouterr().out
    assert "3 records kept, 4 left out" in said and "left out       3  a further turn" in said


def test_questions_on_one_picture_stand_on_one_side_with_one_copy(pictures, tmp_path, capsys):
    rng, records = random.Random(0), []
    for n in range(300):
        colour = tuple(rng.randrange(256) for _ in range(3))
        Image.new("RGB", (20, 10), colour).save(pictures / f"{n}.png")
        records += [a_lvr_record(question_id=f"{n}-{k}", image=[f"{n}.png"]) for k in range(2)]
    # another name, the same picture
    (pictures / "copy.png").write_bytes((pictures / "0.png").read_bytes())
    Image.open(pictures / "0.png").save(pictures / "0.bmp")  # and another format
    records += [a_lvr_record(question_id=name, image=[name]) for name in ("copy.png", "0.bmp")]
    published.write(iter(converted(published.lvr, tmp_path, records, pictures)), tmp_path / "out")
    sides, files = {}, set()
    for ex in read_folder(tmp_path / "out"):
        sides.setdefault(opened(ex.image).tobytes(), set()).add(ex.split)
        files.add(ex.image.name)
    assert len(sides) == 300 and all(len(found) == 1 for found in sides.values())
    assert {split for found in sides.values() for split in found} == {"train", "validation", "test"}
    assert len(files) == 301  # one more for the other format
    assert "split by picture" in capsys.readouterr().out


# ---- PixelReasoner ----


def a_trace(*turns, image="a.png"):
    roles = ["system", "user"] + ["assistant", "user"] * len(turns)
    question = [{"image": image, "text": None, "video": None},
                {"text": "Where?", "image": None, "video": None}]
    contents = [[{"text": "tools"}], question, *turns]
    return dict(qid="q1", message_list=[dict(role=r, content=c) for r, c in zip(roles, contents)])


def a_call(box=(0.1, 0.2, 0.3, 0.4), target=1, words="Let me zoom.", name="crop_image_normalized"):
    arguments = dict(bbox_2d=list(box), target_image=target)
    call = json.dumps(dict(name=name, arguments=arguments))
    return [{"text": f"{words} <tool_call>\n{call}\n</tool_call>"}]


def reply(file, size="40x40"):
    return [{"text": f"\nHere is the cropped image (Image Size: {size}):"}, {"image": file}]


ERROR = [{"text": "\nExecution error:\nCropped image is too small: 12x9\n"}]


def test_pixelreasoner_crops_and_videos(pictures, tmp_path):
    blue = [{"image": "crop.png"}]
    rows = [a_trace([{"text": "It is \\boxed{B}"}]),
            a_trace(a_call(), reply("crop.png"), [{"text": "So \\boxed{\\text{C}}"}]),
            dict(qid="v",
                 message_list=[dict(role="user", content=[{"video": ["1.png"]}, {"text": "?"}])]),
            a_trace([{"text": "no idea"}]),
            a_trace(a_call(), blue, a_call(), blue, [{"text": "\\boxed{C}"}]),
            a_trace(a_call(target=2), blue, [{"text": "\\boxed{C}"}])]
    none, one, video, open_end, again, unseen = converted(published.pixelreasoner, tmp_path, rows,
                                                          pictures)
    assert again.texts[:2] == ["Let me zoom. [crop 10 20 30 40]",
                               "Let me zoom. [crop 10 20 30 40 of 1]"]
    assert unseen[1] == "a call names an image that was not shown"
    assert none.trajectory == ["It is B Answer: B"] and none.question == "Where?"
    assert len(none.images) == 1
    assert one.trajectory == ["Let me zoom. [crop 10 20 30 40]", pictures / "crop.png",
                              "So C Answer: C"]
    assert one.answer == "C"
    assert set(one.remarks) == {published.PUBLISHED_PICTURE, published.ANNOUNCEMENT}
    assert video[1] == "video" and "boxed" in open_end[1]


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
    rows = [a_trace(a_call(box), reply("cut.jpg"), [{"text": "\\boxed{C}"}], image="scene.jpg")]
    [ex] = converted(published.pixelreasoner, tmp_path, rows, pictures)
    numbers = [int(v) for v in ex.texts[0].partition("[crop ")[2].rstrip("]").split()]
    assert numbers == [pytest.approx(100 * v, abs=0.51) for v in region]
    published.write(iter([ex]), tmp_path / "out")
    [read] = read_folder(tmp_path / "out")
    assert len(pairs := answers_of_calls(read)) == 1 and all(given == kept for given, kept in pairs)
    assert ex.remarks == [published.ANNOUNCEMENT]


def test_pixel_boxes_and_boxes_that_touch_the_edge(pictures, tmp_path):
    """Numbers up to 1 are shares, larger ones px of the image that the call names."""
    whole = Image.open(pictures / "scene.jpg")
    whole.crop((300, 200, 600, 400)).save(pictures / "right.png")
    end = [{"text": "\\boxed{C}"}]
    rows = [a_trace(a_call(box), [{"image": "right.png"}], end, image="scene.jpg")
            for box in ((0.5, 0.5, 1, 1), (0.5, 0.5, 1.0, 0.999), (300, 200, 600, 400))]
    found = converted(published.pixelreasoner, tmp_path, rows, pictures)
    assert [ex.texts[0] for ex in found] == ["Let me zoom. [crop 50 50 100 100]"] * 3
    assert all(not ex.remarks for ex in found)


def test_error_replies_and_odd_turns_are_said(pictures, tmp_path, capsys):
    end, right = [{"text": "\\boxed{C}"}], [{"image": "crop.png"}]
    tail = a_call(words="First.")
    tail[0]["text"] += " I will see."
    rows = [a_trace(a_call(words="Too small."), ERROR, a_call(words="Wider."), right, end),
            a_trace(tail, right, end),
            a_trace([{"text": "Hm."}], [{"text": "Go on."}], end),
            a_trace(a_call(), right + right, end),
            a_trace([{"text": a_call()[0]["text"] * 2}], right, end),
            a_trace([{"text": "<tool_call>{}</tool_call>"}], right, end),
            a_trace([{"text": "<tool_call>{</tool_call>"}], right, end),
            a_trace(a_call(), right),
            a_trace(a_call(), right, a_call()),
            a_trace(end, image=None)]
    found = converted(published.pixelreasoner, tmp_path, rows, pictures)
    retried, tailed, *rest = found
    assert retried.texts == ["Too small. Wider. [crop 10 20 30 40]", "C Answer: C"]
    assert retried.remarks[0] == published.ERROR_REPLY and tailed.remarks[0] == published.AFTER_CALL
    reasons = ["answers no call", "2 images answer one call", "several calls", "field missing",
               "not JSON", "in turn up to an answer", "last turn calls a tool",
               "0 images beside the question"]
    assert len(rest) == len(reasons)
    assert all(reason in left[1] for reason, left in zip(reasons, rest))
    published.write(iter(found), tmp_path / "out")
    said = capsys.readouterr().out
    assert f"with remark       1  {published.ERROR_REPLY}; first: {retried.id}" in said
    line = (tmp_path / "out" / FILE).read_text(encoding="utf-8").splitlines()[0]
    assert json.loads(line)["remarks"] == retried.remarks
    assert published.PUBLISHED_PICTURE in retried.remarks


# ---- ThinkMorph and markup ----


def a_row(pictures, **changed):
    raw = dict(bytes=(pictures / "a.png").read_bytes(), path="a.png")
    helper = dict(bytes=(pictures / "crop.png").read_bytes(), path=None)
    return dict(pid="7", question="<image>Which arrangement?", answer="A", problem_image_0=raw,
                reasoning_image_0=helper,
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
    kept, left, longer, two, empty = published.thinkmorph([tmp_path / "Jigsaw_Assembly"])
    assert kept.texts == ["I will assemble it.", "It fits. Answer: A"]
    assert kept.images[1].size == (40, 40)
    assert kept.task == "Jigsaw_Assembly" and kept.remarks == []
    assert "field missing" in left[1] and "2 images beside the question" in two[1]
    assert "empty" in empty[1]
    assert longer.texts == ["I will assemble it.", "It fits.", "Done. Answer: A"]
    assert longer.remarks == [published.TEXT_ONLY]
    monkeypatch.undo()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        list(published.thinkmorph([tmp_path]))
    with pytest.raises(FileNotFoundError, match="huggingface-cli"):
        list(published.thinkmorph([pictures]))


@pytest.mark.parametrize("thought, answer, texts", [
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
    ("1 < 2 and a <b> c", "A", "1 < 2 and a <b> c Answer: A")])
def test_no_tag_and_no_box_is_left_in_thinkmorph_texts(pictures, thought, answer, texts):
    for family in ("Jigsaw_Assembly", "Spatial_Navigation", "Visual_Search", "Chart_Refocus"):
        row = a_row(pictures, resoning_thought_1=thought, answer=answer,
                    resoning_thought_0="<think>Look at \\boxed{this}.</think><image_start>",
                    question="<image>\nWhich?")
        ex = published.thinkmorph_example("x", row, family)
        assert ex.texts == ["Look at this.", texts] and ex.question == "Which?"
        assert ex.answer in ("A", "\\frac{1}{2}") and ex.task == family


def test_words_that_contradict_the_answer_field_are_left_out(pictures):
    for thought, answer in (("<answer>B</answer>", "A"), ("So \\boxed{B}", "A"), ("Answer: B", "A"),
                            ("Answer: B <answer>A</answer>", "A"), ("It is. Answer: 10", "1"),
                            ("<answer>know</answer>", "no")):
        row = a_row(pictures, resoning_thought_1=thought, answer=answer)
        with pytest.raises(ValueError, match="another answer than its answer field"):
            published.thinkmorph_example("x", row, "Visual_Search")


def test_boxes_are_found_whole():
    text, boxes = common.unboxed("a \\boxed{x{y}{z}} b \\fbox {2} c")
    assert text == "a x{y}{z} b 2 c" and boxes == ["x{y}{z}", "2"]
    assert common.unboxed("\\boxed{\\boxed{A}}") == ("A", ["A"])
    assert common.unboxed("plain {A}") == ("plain {A}", [])
    assert common.split_answer("a <answer>1</answer> b <answer> 2") == ("a 1 b", "2")
    assert common.split_answer("It is red. Answer: red") == ("It is red.", "red")
    assert common.split_answer("It is red.") == ("It is red.", "")
    assert common.alike("(B) red", "B") and common.alike("No.", "no")
    assert not common.alike("know", "no")
    assert not common.alike("10", "1") and not common.alike("A", "B")


# ---- writing and mixing ----


def folder_of(tmp_path, name, ids, split="train", pictures=None):
    """A data folder whose record k shows the picture of its own number, or pictures[k]."""
    examples = []
    for n, name_of in enumerate(ids):
        image = scene(n if pictures is None else pictures[n], (24, 20))
        examples.append(Example(name_of, "shape", image, "What?", ["a"], "a", ["Answer: a"],
                                     split))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write_folder(tmp_path / name, examples)
    return tmp_path / name


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file()}


def test_written_folders_read_back_and_mix(pictures, tmp_path, capsys):
    for seed, source in ((100, "one"), (200, "two")):
        records = []
        for n in range(60):
            scene(seed + n, (24, 20)).save(pictures / f"{source}{n}.png")
            records.append(a_lvr_record(question_id=n, dataset=source, image=[f"{source}{n}.png"]))
        published.write(iter(converted(published.lvr, tmp_path, records, pictures)),
                        tmp_path / source)
        assert len(read_folder(tmp_path / source)) == 60
    sources = {tmp_path / "one": 3.0, tmp_path / "two": 1.0}
    published.write(published.mix(sources, 40, 0), tmp_path / "mixed")
    assert "training record beyond its folder's share" in capsys.readouterr().out
    train = [ex for ex in read_folder(tmp_path / "mixed") if ex.split == "train"]
    assert sorted(sum(ex.task == f for ex in train) for f in ("one", "two")) == [10, 30]
    assert len({ex.id for ex in train}) == 40
    with pytest.raises(ValueError, match="lower --count"):
        published.write(published.mix({tmp_path / "one": 1.0}, 4000, 0), tmp_path / "more")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        published.write(iter([]), tmp_path / "mixed")
    # nothing half done is left, not even of what failed
    assert not list(tmp_path.glob("*.partial"))


def test_folders_of_one_name_mix_and_the_originals_stay_as_they_are(tmp_path):
    """Two folders a/x and b/x with the same ids, other pictures: every record keeps its own."""
    ids = [f"q {n}" for n in range(6)] + ["q_0"]
    one = folder_of(tmp_path, "a/x", ids, pictures=range(7))
    two = folder_of(tmp_path, "b/x", ids, pictures=range(10, 17))
    before = everything(one), everything(two)
    published.write(published.mix({one: 1.0, two: 1.0}, 14, 0), tmp_path / "mixed")
    assert (everything(one), everything(two)) == before
    mixed = read_folder(tmp_path / "mixed")
    assert len({ex.id.casefold() for ex in mixed}) == 14
    shown = sorted(opened(ex.image).tobytes() for ex in mixed)
    assert shown == sorted(opened(ex.image).tobytes() for f in (one, two)
                           for ex in read_folder(f))
    # a later change of the mixture changes nothing else
    for file in (tmp_path / "mixed" / "images").iterdir():
        assert not file.is_symlink() and file.stat().st_nlink == 1
        with open(file, "ab") as changed:
            changed.write(b"changed")
    assert (everything(one), everything(two)) == before


def test_a_picture_never_opens_an_existing_file(pictures, tmp_path, monkeypatch):
    """Names come from pixels; were two to meet, the second may still not write over the first."""
    (tmp_path / "images").mkdir()
    name = published.save(pictures / "a.png", tmp_path)
    assert published.save(Image.open(pictures / "a.png"), tmp_path) == name
    kept = (tmp_path / name).read_bytes()
    monkeypatch.setattr(Path, "exists", lambda self: False)
    with pytest.raises(FileExistsError):
        published.save(pictures / "a.png", tmp_path)
    assert (tmp_path / name).read_bytes() == kept


def test_a_picture_of_two_folders_stands_on_one_side_of_the_mixture(tmp_path, capsys):
    train = folder_of(tmp_path, "train", [f"t{n}" for n in range(8)], pictures=range(8))
    tested = folder_of(tmp_path, "tested", ["a", "b"], "test", pictures=[0, 1])
    valid = folder_of(tmp_path, "valid", ["c", "d"], "validation", pictures=[1, 2])
    published.write(published.mix({train: 1.0, tested: 0.0, valid: 0.0}, 5, 0), tmp_path / "mixed")
    sides = {}
    for ex in read_folder(tmp_path / "mixed"):
        sides.setdefault(opened(ex.image).tobytes(), []).append(ex.split)
    found = sorted(map(tuple, sides.values()))
    assert found == [("test",)] * 2 + [("train",)] * 5 + [("validation",)]
    said = capsys.readouterr().out
    assert "left out       2  train record whose picture is in a test split" in said
    left = "record whose picture is in a"
    assert f"left out       1  train {left} validation split; first: train-t2" in said
    assert f"left out       1  validation {left} test split; first: valid-c" in said


def test_remarks_outlive_a_mixture(pictures, tmp_path):
    rows = [a_trace(a_call(), reply("crop.png"), [{"text": "\\boxed{C}"}])]
    published.write(iter(converted(published.pixelreasoner, tmp_path, rows, pictures)),
                    tmp_path / "one")
    side = read_folder(tmp_path / "one")[0].split
    published.write(published.mix({tmp_path / "one": 1.0}, int(side == "train"), 0),
                    tmp_path / "mixed")
    [line] = (tmp_path / "mixed" / FILE).read_text(encoding="utf-8").splitlines()
    assert published.PUBLISHED_PICTURE in json.loads(line)["remarks"]


def test_the_script_reads_files_of_windows_in_any_locale(pictures, tmp_path, as_program, capsys):
    """With a byte order mark, Windows line ends, words that are not ASCII, and several files."""
    talk = [{"value": "<image>\r\nWas heißt 犬?"}, {"value": "<answer>Hündin</answer>"}]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        text = json.dumps([a_lvr_record(conversations=talk)], indent=1, ensure_ascii=False)
        file.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    done = subprocess.run(
        [sys.executable, published.__file__, "lvr", *files, "--images", pictures, "--out",
         tmp_path / "new" / "out"], capture_output=True, encoding="utf-8",
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"})
    assert done.returncode == 0 and "2 records kept, 0 left out" in done.stdout
    one, two = read_folder(tmp_path / "new" / "out")
    assert one.answer == two.answer == "Hündin" and one.question == "Was heißt 犬?"
    assert one.id != two.id
    assert b"\r" not in (tmp_path / "new" / "out" / FILE).read_bytes()
    files[0].write_bytes("[ä]".encode("latin-1"))
    with pytest.raises(SystemExit) as ended:
        as_program(published.__file__, "lvr", files[0], "--images", pictures, "--out",
                   tmp_path / "again")
    assert ended.value.code.startswith(f"error: {files[0]}: not UTF-8")
    with pytest.raises(SystemExit) as ended:
        as_program(published.__file__, "mix", f"{tmp_path}=1", f"{tmp_path}/../{tmp_path.name}=2",
                   "--out", tmp_path / "again")
    assert ended.value.code == 2 and "named twice" in capsys.readouterr().err
