"""Claims: published records become our trajectories with the right crops and words; markup goes and
words that look like it stay; what cannot be used is counted with a reason; a call gives the picture
behind it, or a remark says why not; questions on one picture are on one side and share one file; no
file of the user's is touched."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from published import common
from published import trajectories as published
from support.images import opened
from support.records import FILE, Example
from support.splits import read_folder
from world import tools

# patches of colours, no two regions of which look alike
SCENE = Image.fromarray(np.random.default_rng(7).integers(
    0, 256, (12, 18, 3), dtype=np.uint8)).resize((600, 400), Image.Resampling.BICUBIC)
Image.new("RGB", (40, 40), "blue").save(file := io.BytesIO(), format="PNG")
BLUE_PNG = {"bytes": file.getvalue()}
BOX = (0.3, 0.35, 0.6, 0.8)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder with a scene and a blue crop; `convert` takes rows for files."""
    (folder := tmp_path / "pictures").mkdir()
    SCENE.save(folder / "a.jpg", quality=90)
    (folder / "crop.png").write_bytes(BLUE_PNG["bytes"])
    monkeypatch.setattr(published, "read_list", iter)
    monkeypatch.setattr(published, "thinkmorph_rows", iter)
    return folder


def convert_to_folder(kind, rows, images, out):
    published.write(published.convert(kind, [rows], images), out)
    return read_folder(out)


def check_calls(ex):
    """Our tool gives for each call, on the first picture, the picture behind it. Their number."""
    pairs = list(zip(ex.trajectory[0::2], ex.trajectory[1::2]))
    assert all(tools.call_tool(call, opened(ex.image)).tobytes() == opened(crop).tobytes()
               for call, crop in pairs)
    return len(pairs)


def turns(question="<image>\nWhat is there?", answer="<lvr>\n<answer> a dog </answer>"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def lvr(**changed):
    return dict(dataset="flickr30k", question_id=3, image=["a.jpg"], conversations=turns(),
                bboxes=[[0.5, 0.0, 0.745, 0.5]]) | changed


def thinkmorph(**changed):
    return dict(pid="7", question="<image>Which?", answer="A", problem_image_0=BLUE_PNG,
                reasoning_image_0=BLUE_PNG, folder="Jigsaw_Assembly",
                resoning_thought_0="<think>I will \\boxed{assemble} it.</think><image_start>",
                resoning_thought_1="<image_end><think>It fits.</think>") | changed


def trace(*contents):
    roles = ["system", "user"] + ["assistant", "user"] * len(contents)
    first = [{"image": "a.jpg", "text": None, "video": None}, {"text": "Where?", "image": None}]
    return dict(qid="q1", message_list=[dict(role=role, content=content) for role, content in zip(
        roles, [[{"text": "tools"}], first, *contents])])


def a_call(box=(0.1, 0.2, 0.3, 0.4), target=1, words="Look.", after=""):
    call = json.dumps(dict(name="crop", arguments=dict(bbox_2d=list(box), target_image=target)))
    return [{"text": f"{words} <tool_call>\n{call}\n</tool_call>{after}"}]


BLUE, END = [{"image": "crop.png"}], [{"text": "So \\boxed{\\text{C}}"}]
ERROR, SIZE = [{"text": "\nCropped image is too small: 12x9\n"}], [{"text": "(Image Size: 40x40):"}]


@pytest.mark.parametrize("kind, row, reason", [
    ("lvr", ["no object"], "of another type"),
    *(("lvr", lvr(**changed), reason) for changed, reason in (
        (dict(bboxes=[[0.5, 0, 0.5, 1]]), "box is empty"), (dict(bboxes=[]), "no box"),
        (dict(bboxes=[[0, 0, 1]]), "not four numbers"), (dict(image=["b.png"]), "image not found"),
        (dict(bboxes=[[0.5, 0, float("nan"), 1]]), "leaves the image"),
        (dict(image=["../outside.png"]), "image path leaves the data folder"),
        (dict(image=["a.jpg", "crop.png"]), "2 images beside the question"),
        (dict(conversations=[]), "field missing"), (dict(conversations=turns("\ud83d")), "half"))),
    *(("thinkmorph", thinkmorph(**changed), reason) for changed, reason in (
        (dict(reasoning_image_0=None), "field missing"),
        (dict(problem_image_1=BLUE_PNG), "several images beside the question"),
        (dict(resoning_thought_0="<think></think>"), "is empty"),
        *[(dict(resoning_thought_1=words), "another answer") for words in (
            "<answer>B</answer>", "Answer: B <answer>A</answer>", "Answer: AB")])),
    *(("pixelreasoner", trace(*contents), reason) for contents, reason in (
        ([[{"video": ["1.png"]}]], "video"), ([[{"text": "no idea"}]], "no boxed answer"),
        ([a_call(target=2), BLUE, END], "was not shown"), ([a_call(), BLUE], "speak in turn"),
        ([[{"text": "Hm."}], [{"text": "Go on."}], END], "with no call"),
        ([a_call(), BLUE + BLUE, END], "2 images answer one call"),
        ([[{"text": a_call()[0]["text"] * 2}], BLUE, END], "several calls"),
        ([[{"text": "<tool_call>{</tool_call>"}], BLUE, END], "not JSON"),
        ([a_call(), BLUE, a_call()], "last turn calls a tool")))])
def test_what_cannot_be_used_is_counted(pictures, tmp_path, kind, row, reason, capsys):
    good = dict(lvr=lvr(), thinkmorph=thinkmorph(), pixelreasoner=trace(END))[kind]
    convert_to_folder(kind, [row, good], pictures, tmp_path / "out")
    first, *_, left = capsys.readouterr().out.splitlines()
    assert "1 records kept, 1 left out" in first and reason in left and f"; first: {kind}-" in left
    with pytest.raises(ValueError, match="no record could be used"):
        convert_to_folder(kind, [row], pictures, tmp_path / "nothing")


def test_lvr_boxes_become_calls_and_every_turn_is_counted(pictures, tmp_path, capsys):
    boxes = [[0.1, 0.1, 0.5, 0.5], [0.5, 0.5, 0.9, 0.9], [0.07, 0.29, 0.57, 0.58]]
    plain = turns(answer="a dog")
    rows = [lvr(), lvr(bboxes=boxes), lvr(bboxes=boxes[:2], conversations=plain + plain),
            # the marks say that the first turn has two boxes
            lvr(bboxes=boxes, conversations=turns(answer="<lvr>\n<lvr>\n<answer>No") + turns()),
            lvr(bboxes=boxes, conversations=plain + plain)]
    converted = list(published.convert("lvr", [rows], pictures))
    ex, three, one, two = (ex for ex in converted if isinstance(ex, Example))
    call, last = ex.texts
    assert (ex.question, ex.answer, last) == ("What is there?", "a dog", "Answer: a dog")
    assert ex.task == "flickr30k" and call.endswith("[crop 50 0 75 50]") and ex.remarks == []
    assert [*map(check_calls, (ex, three, one, two))] == [1, 3, 1, 2]
    assert three.texts[2].endswith("[crop 7 29 57 58 of 1]") and one.texts[-1] == last
    published.write(iter(converted), tmp_path / "out")
    report = capsys.readouterr().out
    assert "4 records kept, 4 left out" in report and "left out       3  a further turn" in report


def test_questions_on_one_picture_are_on_one_side_with_one_copy(pictures, tmp_path):
    # the same picture under another name, and in another format
    (pictures / "copy.png").write_bytes((pictures / "crop.png").read_bytes())
    Image.open(pictures / "crop.png").save(pictures / "crop.bmp")
    before = {file: file.read_bytes() for file in pictures.iterdir()}
    rows = [lvr(image=[name]) for name in ("crop.png", "crop.png", "copy.png", "crop.bmp")]
    examples = convert_to_folder("lvr", rows, pictures, tmp_path / "out")
    assert len({ex.split for ex in examples}) == 1
    bmp, png = sorted({ex.image for ex in examples}, key=lambda image: image.suffix)
    # it is written once, and a change of it changes no file of the user's
    for file in (bmp, png):
        file.write_bytes(b"changed")
    assert published.save(SCENE, png.stem, tmp_path / "out") and png.read_bytes() == b"changed"
    assert {file: file.read_bytes() for file in pictures.iterdir()} == before
    others = [Image.new("RGB", (10, 10), (n % 256, n // 256, 9)) for n in range(600)]
    splits = [published.example("x", "x", im, im, "q", "a", "", []).split for im in others]
    assert splits.count("train") > 570 and {*splits} == {"train", "validation", "test"}


def test_what_is_no_json_list_is_named(tmp_path):
    file = tmp_path / "list.json"
    for text, message in (("{}", "must be a"), ("[1, {]", "cut off .*column 6")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            common.read_list(file)


def test_pixelreasoner_crops_errors_and_remarks(pictures, tmp_path, capsys):
    rows = [trace(a_call(), SIZE + BLUE, END), trace(a_call(), BLUE, a_call(), BLUE, END),
            trace(a_call(words="Too small."), ERROR, a_call(words="Wider."), BLUE, END),
            trace(a_call(after=" I will see."), BLUE, END)]
    converted = list(published.convert("pixelreasoner", [rows], pictures))
    one, again, retried, tailed = converted
    assert (one.question, one.answer) == ("Where?", "C")
    assert one.trajectory == ["Look. [crop 10 20 30 40]", pictures / "crop.png", "So C Answer: C"]
    assert "as published" in one.remarks[0] and "beside" in one.remarks[1]
    assert again.texts[1] == "Look. [crop 10 20 30 40 of 1]"
    assert retried.texts == ["Too small. Wider. [crop 10 20 30 40]", "So C Answer: C"]
    assert "a call that failed" in retried.remarks[0] and "after a call" in tailed.remarks[0]
    published.write(iter(converted), tmp_path / "out")
    assert f"1  {retried.remarks[0]}; first: {retried.id}" in capsys.readouterr().out
    lines = (tmp_path / "out" / FILE).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["remarks"] for line in lines] == [ex.remarks for ex in converted]


@pytest.mark.parametrize("box, region", [
    # padded by a tenth of the image, of the box, not at all; at the edge; in px
    (BOX, (0.2, 0.25, 0.7, 0.9)), (BOX, (0.27, 0.305, 0.63, 0.845)), (BOX, BOX),
    ((0.5, 0.5, 1.0, 0.999), (0.5, 0.5, 1, 1)), ((300, 200, 600, 400), (0.5, 0.5, 1, 1))])
def test_the_call_is_that_of_the_region_in_the_published_picture(pictures, tmp_path, box, region):
    cut = SCENE.crop(tuple(round(v * (600, 400)[n % 2]) for n, v in enumerate(region)))
    # the authors' tool resizes what it cut, and the picture was saved as JPEG
    cut.resize((cut.width * 2 // 28 * 28, cut.height * 2 // 28 * 28)).save(pictures / "cut.jpg")
    rows = [trace(a_call(box), [{"image": "cut.jpg"}], END)]
    [ex] = convert_to_folder("pixelreasoner", rows, pictures, tmp_path / "out")
    numbers = [int(v) for v in ex.texts[0].partition("[crop ")[2].rstrip("]").split()]
    assert numbers == [pytest.approx(100 * v, abs=1) for v in region] and check_calls(ex) == 1


# a last thought, the answer field, the last text; the end is about words that are no markup
MARKUP = r"""
So $\boxed{\text{(A)}}$  #  \boxed{A}  #  So (A) Answer: A
$\boxed{\boxed{A}}$ at $\fbox {x{y}{z}}.  #  x{y}{z}  #  A at $x{y}{z}. Answer: x{y}{z}
At \boxed{\frac{1}{2}}  #  \boxed{\frac{1}{2}}  #  At \frac{1}{2} Answer: \frac{1}{2}
<IMAGE_END> < think >Fits</think ><answer>\boxed{A}  #  <answer>A  #  Fits Answer: A
It fits.</think>Yes. Answer: A<answer>A. red</answer>  #  A  #  It fits. Yes. Answer: A
No <answer>B</answer>, but <answer> A  #  A  #  No B , but Answer: A
So \boxed{A  #  A  #  So A Answer: A
It is 12,15. Answer: 12,15  #  12, 15  #  It is 12,15. Answer: 12, 15
1 < 2, <b> and <image> or <think>.  #  A  #  1 < 2, <b> and <image> or <think>. Answer: A"""


@pytest.mark.parametrize("case", MARKUP.strip().split("\n"))
def test_no_markup_is_left_in_thinkmorph_and_words_like_it_stay(pictures, case):
    thought, answer, text = case.split("  #  ")
    question = "Which tag shows a picture, <image> or <think> or \\boxed{}?"
    [ex] = published.convert("thinkmorph", [[thinkmorph(
        resoning_thought_1=thought, answer=answer, question="<image>\n" + question)]], None)
    assert ex.texts == ["I will assemble it.", text] and ex.question == question


def test_thinkmorph_with_further_pictures_and_without_files(pictures, monkeypatch):
    row = thinkmorph(reasoning_image_1=BLUE_PNG, resoning_thought_2="2", full_text_only_thought="x")
    [ex] = published.convert("thinkmorph", [[row]], None)
    assert ex.texts == ["I will assemble it.", "It fits.", "2 Answer: A"]
    assert ex.task == "Jigsaw_Assembly" and "text-only" in ex.remarks[0] and len(ex.images) == 3
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="hf download"):
        list(published.convert("thinkmorph", [pictures], None))


def test_the_program_overwrites_nothing_and_leaves_nothing_half(pictures, tmp_path, as_program):
    def interrupted():
        yield from published.convert("lvr", [[lvr()]], pictures)
        raise KeyboardInterrupt

    file, out = tmp_path / "a.json", tmp_path / "new" / "out"
    rows = json.dumps([lvr(conversations=turns("Was heißt 犬?"))], ensure_ascii=False, indent=1)
    file.write_text("\ufeff" + rows, encoding="utf-8", newline="\r\n")  # as Windows writes it
    command = published.__file__, "lvr", file, file, "--images", pictures, "--out", out
    as_program(*command)
    assert [(ex.id, ex.question) for ex in read_folder(out)] == [
        (f"lvr-3-{n}", "Was heißt 犬?") for n in range(2)]
    with pytest.raises(SystemExit, match="nothing is overwritten"):
        as_program(*command)
    with pytest.raises(KeyboardInterrupt):
        published.write(interrupted(), tmp_path / "half")
    assert {*tmp_path.iterdir()} == {pictures, file, out.parent}
