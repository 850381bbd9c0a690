"""Claims: records in the published layouts become our trajectories with the right crops and words; every record that cannot is
counted, named and given a reason; a mixture has the asked shares; what is written reads back and trains."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from world import tools

sys.path.insert(0, str(Path(data.__file__).parent / "published"))
import trajectories as published  # noqa: E402


@pytest.fixture
def pictures(tmp_path):
    """A folder with one 200 x 100 px picture, its left half red, and a crop."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    array = np.zeros((100, 200, 3), dtype=np.uint8)
    array[:, :100, 0] = 255
    Image.fromarray(array).save(folder / "a.png")
    Image.new("RGB", (40, 40), "blue").save(folder / "crop.png")
    (tmp_path / "outside.png").write_bytes((folder / "a.png").read_bytes())
    return folder


def a_lvr_record(**changed):
    return {**dict(dataset="flickr30k", question_id=3, image=["a.png"], bboxes=[[0.5, 0.0, 0.745, 0.5]], conversations=[
        {"from": "human", "value": "<image>\nWhat is there?"}, {"from": "gpt", "value": "<lvr>\n<answer> a dog </answer>"}]), **changed}


def test_lvr_boxes_become_calls_and_crops(pictures, tmp_path):
    (tmp_path / "lvr.json").write_text(json.dumps([a_lvr_record()]))
    [ex] = published.lvr(tmp_path / "lvr.json", pictures)
    call, crop, last = ex.trajectory
    assert ex.question == "What is there?" and ex.answer == "a dog" and last == "Answer: a dog" and ex.family == "flickr30k"
    assert call.endswith("[crop 50 0 75 50]") and crop.size == (50, 50) and crop.getpixel((0, 0)) == (0, 0, 0)
    assert crop.tobytes() == tools.call_tool(call, data.open_image(pictures / "a.png", "")).tobytes()


@pytest.mark.parametrize("changed, reason", [
    (dict(bboxes=[[0.5, 0, 0.5, 1]]), "box is empty"), (dict(bboxes=[[0.5, 0, 1.2, 1]]), "leaves the image"),
    (dict(bboxes=[]), "field missing"),
    (dict(bboxes=[[0, 0, 1]]), "not four numbers"), (dict(image=["b.png"]), "image not found"),
    (dict(image=["../outside.png"]), "leaves the data folder"),
    (dict(conversations=[{"from": "human", "value": "?"}]), "field missing"),
    (dict(conversations=[{"value": "x"}, {"value": "<answer></answer>"}]), "no answer")])
def test_what_cannot_be_used_is_named_with_its_reason(pictures, tmp_path, changed, reason, capsys):
    (tmp_path / "lvr.json").write_text(json.dumps([a_lvr_record(), a_lvr_record(question_id=9, **changed)]))
    found = list(published.lvr(tmp_path / "lvr.json", pictures))
    assert isinstance(found[0], data.Example) and found[1][0] == "lvr-flickr30k-9-1" and reason in found[1][1]
    published.write(iter(found), tmp_path / "out")
    said = capsys.readouterr().out
    assert "1 records kept, 1 left out" in said and "lvr-flickr30k-9-1" in said


def a_trace(*turns):
    roles = ["system", "user"] + ["assistant", "user"] * len(turns)
    contents = [[{"text": "tools"}], [{"image": "a.png"}, {"text": "Where?"}], *turns]
    return dict(qid="q1", message_list=[dict(role=role, content=content) for role, content in zip(roles, contents)])


CALL = 'Let me zoom. <tool_call>{"name": "crop_image_normalized", "arguments": {"bbox_2d": [0.1, 0.2, 0.3, 0.4], "target_image": 1}}</tool_call>'


def test_pixelreasoner_crops_and_videos(pictures, tmp_path):
    rows = [a_trace([{"text": "It is \\boxed{B}"}]),
            a_trace([{"text": CALL}], [{"text": "the crop"}, {"image": "crop.png"}], [{"text": "So \\boxed{C}"}]),
            dict(qid="v", message_list=[dict(role="user", content=[{"video": ["1.png"]}, {"text": "?"}])]),
            a_trace([{"text": "no idea"}]),
            a_trace([{"text": CALL}], [{"image": "crop.png"}], [{"text": CALL}], [{"image": "crop.png"}], [{"text": "\\boxed{C}"}]),
            a_trace([{"text": CALL.replace('image": 1', 'image": 2')}], [{"image": "crop.png"}], [{"text": "\\boxed{C}"}])]
    (tmp_path / "pr.json").write_text(json.dumps(rows))
    none, one, video, open_end, again, unseen = published.pixelreasoner(tmp_path / "pr.json", pictures)
    assert again.texts[:2] == ["Let me zoom. [crop 10 20 30 40]", "Let me zoom. [crop 10 20 30 40 of 1]"]
    assert unseen[1] == "a call names an image that was not shown"
    assert none.trajectory == ["It is B Answer: B"] and none.question == "Where?" and len(none.images) == 1
    assert one.trajectory == ["Let me zoom. [crop 10 20 30 40]", pictures / "crop.png", "So C Answer: C"] and one.answer == "C"
    assert video[1] == "video" and "boxed" in open_end[1]


def test_written_folders_read_back_and_mix(pictures, tmp_path):
    for source in ("one", "two"):
        (tmp_path / f"{source}.json").write_text(json.dumps([a_lvr_record(question_id=n, dataset=source) for n in range(60)]))
        published.write(published.lvr(tmp_path / f"{source}.json", pictures), tmp_path / source)
        assert len(data.read_folder(tmp_path / source)) == 60
    published.write(published.mix({tmp_path / "one": 3.0, tmp_path / "two": 1.0}, 40, 0), tmp_path / "mixed")
    train = [ex for ex in data.read_folder(tmp_path / "mixed") if ex.split == "train"]
    assert sorted(sum(ex.family == f for ex in train) for f in ("one", "two")) == [10, 30] and len({ex.id for ex in train}) == 40
    with pytest.raises(ValueError, match="lower --count"):
        published.write(published.mix({tmp_path / "one": 1.0}, 4000, 0), tmp_path / "more")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        published.write(iter([]), tmp_path / "mixed")


def test_thinkmorph_rows_and_the_message_without_pyarrow(pictures, tmp_path, monkeypatch):
    raw = dict(bytes=(pictures / "a.png").read_bytes())
    row = dict(pid="7", question="<image>Which arrangement?", answer="A", problem_image_0=raw,
               reasoning_image_0=dict(bytes=(pictures / "crop.png").read_bytes()),
               resoning_thought_0="<think>I will assemble it.</think><image_start>", resoning_thought_1="<image_end><think>It fits.</think>")
    monkeypatch.setattr(published, "parquet_rows", lambda folder: iter([row, {**row, "reasoning_image_0": None}]))
    kept, left = published.thinkmorph([tmp_path / "Jigsaw_Assembly"])
    assert kept.texts == ["I will assemble it.", "It fits. Answer: A"] and kept.images[1].size == (40, 40)
    assert kept.family == "Jigsaw_Assembly"
    assert "field missing" in left[1]
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        list(published.thinkmorph([tmp_path]))


# ---- benchmarks ----

import benchmarks  # noqa: E402


@pytest.mark.parametrize("text, strict, lenient", [
    ("A", "A", "A"), ("(B)", "B", "B"), ("C.", "C", "C"), ("Answer: D", "D", "D"), ("<answer>A", "A", "A"),
    ("\\boxed{B}", "B", "B"), ("B. a dog", "B", "B"),
    ("It is B", "", "B"), ("A or B", "", ""), ("A B C D", "", ""), ("answer", "", ""), ("", "", ""), ("E", "", ""), ("I see A's cat", "", "")])
def test_letters(text, strict, lenient):
    assert benchmarks.letters_in(text, "ABCD") == (strict, lenient)


@pytest.fixture
def published_folders(tmp_path, pictures):
    vstar = tmp_path / "vstar"
    (vstar / "direct_attributes").mkdir(parents=True)
    rows = []
    for n in range(3):
        (vstar / "direct_attributes" / f"{n}.jpg").write_bytes((pictures / "a.png").read_bytes())
        rows.append(dict(question_id=n, image=f"direct_attributes/{n}.jpg",
                         text="What colour?\n(A) red\n(B) blue\nAnswer with the option's letter from the given choices directly.",
                         label="A", category="direct_attributes"))
    (vstar / "test_questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mmvp = tmp_path / "mmvp"
    (mmvp / "MMVP Images").mkdir(parents=True)
    lines = ["Index,Question,Options,Correct Answer"]
    for index in (1, 2, 99, 100):
        (mmvp / "MMVP Images" / f"{index}.jpg").write_bytes((pictures / "a.png").read_bytes())
        lines.append(f'{index},"Open, or closed?",(a) Open (b) Closed,({"ab"[index % 2]})')
    (mmvp / "Questions.csv").write_text("\n".join(lines))
    return vstar, mmvp


def test_published_layouts_are_read(published_folders, pictures, tmp_path):
    vstar, mmvp = published_folders
    item = list(benchmarks.vstar(vstar))[0]
    assert (item.label, item.letters, item.group) == ("A", "AB", "direct_attributes") and item.prompt.count("Answer with") == 1
    items = {i.id: i for i in benchmarks.mmvp(mmvp)}
    assert items["1"].prompt == "Open, or closed?\nOptions:\nA. Open\nB. Closed\n" + benchmarks.INSTRUCTION
    assert (items["1"].label, items["1"].other_label) == ("B", "B") and (items["99"].label, items["99"].other_label) == ("B", "A")
    assert items["1"].group == items["2"].group != items["99"].group == items["100"].group
    raw = dict(bytes=(pictures / "a.png").read_bytes())
    item = benchmarks.blink_item(dict(idx="val_1", question="Which?", choices=["x", "y", "z"], answer="(C)", image_1=raw,
                                      image_2=raw, image_3=None), "Jigsaw", "here")
    assert len(item.images) == 2 and item.label == "C" and item.letters == "ABC" and "C. z" in item.prompt
    with pytest.raises(FileNotFoundError, match="expected craigwu/vstar_bench"):
        list(benchmarks.vstar(mmvp))
    with pytest.raises(FileNotFoundError, match="Questions.csv"):
        list(benchmarks.mmvp(vstar))
    with pytest.raises(ValueError, match="no option letter"):
        benchmarks.the_letter("(AB)", "x")


def test_predictions_resume_and_scores_by_hand(published_folders, tmp_path, monkeypatch):
    from conftest import TINY
    from model import VLM
    vlm, out = VLM(TINY), tmp_path / "p.jsonl"
    items = list(benchmarks.vstar(published_folders[0]))
    whole = benchmarks.predict(vlm, items, out, 4, 2)
    assert len(whole) == 3
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:2]) + "\n" + lines[2][:9])  # interrupted within the third line
    asked, generate = [], vlm.generate
    monkeypatch.setattr(vlm, "generate", lambda views, *rest: asked.append(len(views)) or generate(views, *rest))
    assert benchmarks.predict(vlm, items, out, 4, 2) == whole and asked == [1] and out.read_text().splitlines() == lines
    with pytest.raises(ValueError, match="predictions of other items"):
        benchmarks.predict(vlm, items[:2], out, 4, 2)
    rows = [dict(group=g, label=a, other_label=b, strict=s, lenient=s) for g, a, b,
            s in (("0", "A", "A", "A"), ("0", "B", "B", "B"), ("1", "A", "B", "A"), ("1", "B", "A", "A"))]
    table = benchmarks.scores("mmvp", rows)
    assert table["items, labels as published"] == [4, 75, 75] and table["pairs, labels as published"] == [2, 50, 50]
    assert table["items, labels corrected"] == [4, 75, 75] and table["pairs, labels corrected"] == [2, 50, 50]
    assert benchmarks.scores("vstar", rows)["1"] == [2, 50, 50]
