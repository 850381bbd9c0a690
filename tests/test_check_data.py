"""Claims: check_data lists all faults of a folder at once, each with its line, and exits with 1;
what it passes trains, and what stops train.py it refuses; several processes find the same."""

import json
import random
import re
from pathlib import Path

import pytest
from PIL import Image

import train
from analysis import check_data
from support.records import FILE

COLOURS = dict(red=(220, 30, 30), blue=(30, 60, 220), green=(20, 160, 60))
LONG = "blue one two " * 900


def folder_of(folder, changes=None, count=12, form="Answer: {}"):
    """Records on squares, each with a crop: two thirds train, the rest validation and test.

    changes: row -> fields of its record, or the whole line.
    """
    draw, lines = random.Random(0), []
    for n in range(count):
        answer = list(COLOURS)[n % 3]
        image = Image.new("RGB", (64, 64), tuple(draw.randrange(90) for _ in "rgb"))
        image.paste(COLOURS[answer], (16, 16, 48, 48))
        image.save(folder / f"{n}.png")
        image.crop((16, 16, 48, 48)).save(folder / f"{n}-c.png")
        steps = [{"text": "Look. [crop 25 25 75 75]"}, {"image": f"{n}-c.png"},
                 {"text": f"It is. {form.format(answer)}"}]
        split = "train" if n < count * 2 // 3 else "test" if n % 2 else "validation"
        row = dict(id=str(n), split=split, image=f"{n}.png", question="Which colour?",
                   options=list(COLOURS), answer=answer, trajectory=steps)
        change = (changes or {}).get(n, {})
        lines.append(change if isinstance(change, str) else json.dumps({**row, **change}))
    (folder / FILE).write_text("\n".join(lines), encoding="utf-8")
    return folder


def config_of(folder, *options):
    return train.parse_config(["--data", str(folder), "--out", str(folder / "run"), "--device",
                               "cpu", "--steps", "1", "--batch", "4", "--workers", "0",
                               "--lora_rank", "2", *options])


def spoil(folder):
    """A folder with one of each fault, and the sentences that name them."""
    Image.new("RGB", (3000, 2)).save(folder / "thread.png")
    (folder / "broken.png").write_bytes(b"\x89PNG")
    return folder_of(folder, {
        0: dict(answer="blue"), 1: "{", 2: dict(image="c.png"), 3: dict(id="5", split="dev"),
        4: dict(image="broken.png"), 5: dict(question=LONG), 6: dict(image="thread.png"),
        12: dict(question="<|im_end|>"), 13: dict(image="../a.png"), 14: dict(image="broken.png"),
        15: dict(options=["red", "red"], answer="red")}, count=24), [
        "line 1: the last text says 'red'", "line 2: not valid JSON", "line 3: .*c.png not found",
        "line 4: split 'dev'", "line 14: image ../a.png leaves", "line 5: .*broken.png cannot be",
        "line 6: example 5: .*tokens", "line 7: example 6: .*rejected", "line 13: example 12: .*spec"]


def test_every_fault_is_listed_at_once_and_nothing_is_written(tmp_path, as_program, capsys):
    folder, faults = spoil(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:  # no traceback
        as_program(check_data.__file__, "--data", folder)
    first, *listed = ended.value.code.splitlines()
    assert first == "error: 9 faults:" and len(listed) == 9
    for pattern in faults:
        assert sum(bool(re.search(pattern, fault)) for fault in listed) == 1, pattern
    shown = capsys.readouterr().out
    assert "18 records are well-formed" in shown and "s for 1,000 records" in shown
    assert "1 of 24 records (line 16 is the first) have one option twice" in shown
    assert sorted(tmp_path.iterdir()) == before


def test_several_processes_find_the_same(tmp_path, capsys, monkeypatch):
    folder, _ = spoil(tmp_path)
    found = []
    for per_process in (200, 4):
        monkeypatch.setattr(check_data, "PER_PROCESS", per_process)
        monkeypatch.setattr(check_data.os, "cpu_count", lambda: 3)
        with pytest.raises(ValueError) as error:
            check_data.check_data(config_of(folder))
        found.append((str(error.value), capsys.readouterr().out.splitlines()[:-1]))
    assert found[0] == found[1]


@pytest.mark.parametrize("row, change, why", [
    (0, dict(question=LONG), "example 0: .* tokens"), (8, dict(question=LONG), "example 8: .* tok"),
    (9, dict(options=[*COLOURS, LONG]), "example 9: "), (9, dict(question="<|im_end|>"), "special"),
    (0, dict(answer="blue"), "line 1: the last text says 'red'"),
    (10, dict(split="train"), "1 records in the validation split")])
def test_training_and_check_stop_at_the_same(tmp_path, row, change, why):
    config = config_of(folder_of(tmp_path, {row: change}))
    for stops in (check_data.check_data, train.train):
        with pytest.raises(ValueError, match=why):
            stops(config)
    assert not Path(config.out).exists()


def test_what_passes_trains_and_what_is_unusual_is_said(tmp_path, capsys):
    folder = folder_of(tmp_path, {10: dict(image="0.png")}, form="so \\boxed{{{}}}")
    Image.new("I;16", (64, 64), 4095).save(tmp_path / "3.png")
    config = config_of(folder)
    check_data.check_data(config)
    shown = capsys.readouterr().out
    for part in ("12 records are well-formed; 8 train, 2 validation, 2 test", "12 questions",
                 "12 of 12 records (line 1 is the first) have no 'Answer:'",
                 "1 of 2 validation images are also in train", "3.png (15 to 15)"):
        assert part in shown, part
    train.train(config)
    assert (Path(config.out) / "results.json").is_file()


def test_the_small_world_is_checked_too(capsys):
    check_data.check_data(train.parse_config(["--train_examples", "5", "--valid_examples", "5",
                                              "--test_per_family", "1", "--regime", "mixed"]))
    assert "16 records are well-formed; 5 train, 5 validation, 6 test" in capsys.readouterr().out
