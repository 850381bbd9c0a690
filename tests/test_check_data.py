"""Claims: check_data lists all faults of a folder at once, from one process or several; what it
passes trains, and what stops train.py it refuses."""

import json
import re

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
        for name, size in ((f"{n}.png", 64), (f"{n}-c.png", 32)):
            Image.new("RGB", (size, size), (n, 60, 90)).save(folder / name)
        row = dict(id=str(n), image=f"{n}.png", question="Which?", options=COLOURS,
                   split="train" if n < count * 2 // 3 else "test" if n % 2 else "validation",
                   answer=COLOURS[n % 3], trajectory=[
                       {"text": "Look."}, {"image": f"{n}-c.png"},
                       {"text": f"It is. {form.format(COLOURS[n % 3])}"}])
        change = changes.get(f"row{n}", {})
        lines.append(change if isinstance(change, str) else json.dumps(row | change))
    (folder / FILE).write_text("\n".join(lines), encoding="utf-8")
    return folder


def config_of(folder):
    return train.parse_config(["--data", str(folder), "--out", str(folder / "run"), "--device",
                               "cpu", "--steps", "1", "--batch", "4", "--lora_rank", "2"])


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
    with pytest.raises(ValueError) as error:
        check_data.check_data(config_of(tmp_path))
    first, *listed = str(error.value).splitlines()
    for fault in ("line 1: the last text says 'red'", "line 2: not valid JSON", "line 13: .*spec",
                  "line 3: .*c.png not found", "line 4: split 'dev'", "line 14: id '9' was used",
                  "line 5: .*broken.png cannot be read", "line 6: example 5: .*tokens",
                  "line 7: example 6: .*rejected"):
        assert sum(bool(re.search(fault, sentence)) for sentence in listed) == 1, fault
    assert first == "9 faults:" and len(listed) == 9 and sorted(tmp_path.iterdir()) == before
    output = capsys.readouterr().out
    for part in ("18 records are well-formed", "24 records (line 16 is the first) have one option "
                 "twice", "s for 1,000 records"):
        assert part in output, part


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
    folder_of(tmp_path, form="so \\boxed{{{}}}")
    (tmp_path / "10.png").write_bytes((tmp_path / "0.png").read_bytes())
    Image.new("I;16", (64, 64), 4095).save(tmp_path / "3.png")
    check_data.check_data(config_of(tmp_path))
    output = capsys.readouterr().out
    for part in ("12 records are well-formed; 8 train, 2 validation, 2 test", "12 questions",
                 "12 of 12 records (line 1 is the first) have no 'Answer:'",
                 "1 of 2 validation images are also in train", "3.png (15 to 15)"):
        assert part in output, part
    assert (train.train(config_of(tmp_path)) / "results.json").is_file()


def test_what_a_method_does_not_read_is_no_fault(tmp_path):
    steps = [{"text": LONG}, {"image": "0-c.png"}, {"text": "Answer: red"}]
    config = config_of(folder_of(tmp_path, row0=dict(trajectory=steps)))
    with pytest.raises(ValueError, match="example 0: .* tokens"):
        check_data.check_data(config)
    config.method = "direct"
    check_data.check_data(config)


def test_the_small_world_is_checked_too(capsys):
    check_data.check_data(train.parse_config(["--train_examples", "5", "--test_per_task", "1",
                                              "--regime", "mixed"]))
    assert "13 records are well-formed; 5 train, 2 validation, 6 test" in capsys.readouterr().out
