"""Claims: check_data lists all faults of a folder at once, from one process or several; what it
passes trains, and what stops train.py it refuses."""

import json

import pytest
from PIL import Image

import train
from analysis import check_data
from support.records import FILE

COLOURS = ["red", "blue", "green"]
LONG = "blue one two " * 900


def folder_of(folder, count=12, form="Answer: {}", **changes):
    """Records with a tool image: two thirds train, the rest validation and test. changes: "row3":
    fields of that record, or its whole line."""
    lines = []
    for n in range(count):
        Image.new("RGB", (64, 64), (n, 60, 90)).save(folder / f"{n}.png")
        split = "train" if n < count * 2 // 3 else ("validation", "test")[n % 2]
        steps = [{"text": "Look."}, {"image": f"{n}.png"}, {"text": form.format(COLOURS[n % 3])}]
        row = dict(id=str(n), image=f"{n}.png", question="Which?", options=COLOURS, split=split,
                   answer=COLOURS[n % 3], trajectory=steps)
        change = changes.get(f"row{n}", {})
        lines.append(change if isinstance(change, str) else json.dumps(row | change))
    (folder / FILE).write_text("\n".join(lines), encoding="utf-8")
    return folder


def config_of(folder):
    return train.parse_config(f"--data {folder} --out {folder}/run --device cpu --steps 1 "
                              "--batch 4 --lora_rank 2".split())


@pytest.mark.parametrize("per_process", [200, 4])
def test_every_fault_is_listed_at_once(tmp_path, as_program, capsys, monkeypatch, per_process):
    Image.new("RGB", (3000, 2)).save(tmp_path / "thread.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    folder_of(tmp_path, 24, row0=dict(answer="blue"), row1="{", row2=dict(image="c.png"),
              row3=dict(split="dev"), row4=dict(image="broken.png"), row5=dict(question=LONG),
              row6=dict(image="thread.png"), row12=dict(question="<|im_end|>"), row13=dict(id="9"),
              row23=dict(image="broken.png"), row15=dict(options=["red", "red"], answer="red"))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(check_data, "PER_PROCESS", per_process)
    monkeypatch.setattr(check_data.os, "cpu_count", lambda: 2)
    faults = ("line 1: the last text says 'red'", "line 2: not valid JSON", "line 3: .*not found",
              "line 4: split 'dev'", "line 14: id '9' was used", "line 5: .*broken.png cannot be",
              "line 6: example 5: .*tokens", "line 7: example 6: .*rejected", "line 13: .*special")
    # each on a line of its own, and no other
    listed = "9 faults:" + "".join(rf"\n.*{fault}.*" for fault in faults) + "$"
    with pytest.raises(ValueError, match=listed):
        check_data.check_data(config_of(tmp_path))
    assert sorted(tmp_path.iterdir()) == before
    assert "18 records are well-formed" in capsys.readouterr().out


@pytest.mark.parametrize("row, change, why, count", [
    (8, dict(question=LONG), "example 8: .* tok", 2),  # and one validation record is left
    (9, dict(question="<|im_end|>"), "special", 1), (8, dict(split="train"), "1 records in the", 1),
    (9, dict(options=[*COLOURS, LONG]), "example 9", 1)])
def test_training_and_check_stop_at_the_same(tmp_path, as_program, row, change, why, count):
    config = config_of(folder_of(tmp_path, **{f"row{row}": change}))
    with pytest.raises(ValueError, match=why):
        train.train(config)
    with pytest.raises(SystemExit, match=f"(?s)error: {count} faults?:.*{why}"):  # no traceback
        as_program(check_data.__file__, "--data", tmp_path)


def test_what_passes_trains_and_what_is_unusual_is_said(tmp_path, capsys):
    # a text that the method does not read is no fault
    steps = [{"text": LONG}, {"text": "Answer: red"}]
    config = config_of(folder_of(tmp_path, form="so \\boxed{{{}}}", row0=dict(trajectory=steps)))
    config.method = "direct"
    (tmp_path / "10.png").write_bytes((tmp_path / "0.png").read_bytes())
    Image.new("I;16", (64, 64), 4095).save(tmp_path / "3.png")
    check_data.check_data(config)
    output = capsys.readouterr().out
    for part in ("12 records are well-formed; 8 train, 2 validation, 2 test", "12 questions",
                 "11 of 12 records (line 2 is the first) have no 'Answer:'",
                 "1 of 2 validation images are also in train", "3.png (15 to 15)"):
        assert part in output, part
    assert (train.train(config) / "results.json").is_file()
    # without a folder the small world
    check_data.check_data(train.parse_config("--train_examples 5 --test_per_task 1".split()))
    assert "records are well-formed; 5 train, 2 validation" in capsys.readouterr().out
