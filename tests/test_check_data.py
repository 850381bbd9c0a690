"""Claims: what train.py refuses check_data.py refuses, and the other way round, every fault at
once and before anything is trained; what is odd is said; free answers get the tokens they need."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image

import evaluate
import train
from analysis import check_data
from model import VLM
from support import records
from world.loader import load_examples

from conftest import TINY

COLOURS = dict(red=(220, 30, 30), blue=(30, 60, 220), green=(20, 160, 60))


def rows(count=12, form="Answer: {}", words="{}"):
    """Records on squares, each with a crop: two thirds train, the rest validation and test."""
    found = []
    for n in range(count):
        split = "train" if n < count * 2 // 3 else "test" if n % 2 else "validation"
        answer, options = words.format(list(COLOURS)[n % 3]), [words.format(c) for c in COLOURS]
        steps = [{"text": "Look. [crop 25 25 75 75]"}, {"image": f"{n}-c.png"},
                 {"text": f"It is. {form.format(answer)}"}]
        found.append(dict(id=str(n), split=split, image=f"{n}.png", question="Which colour?",
                          options=options, answer=answer, trajectory=steps))
    return found


def folder_of(tmp_path, found):
    draw = random.Random(0)
    for n in (int(row["id"]) for row in found):
        image = Image.new("RGB", (64, 64), tuple(draw.randrange(90) for _ in "rgb"))
        image.paste(list(COLOURS.values())[n % 3], (16, 16, 48, 48))
        image.save(tmp_path / f"{n}.png")
        image.crop((16, 16, 48, 48)).save(tmp_path / f"{n}-c.png")
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in found)
    (tmp_path / records.FILE).write_text(text, encoding="utf-8")
    return tmp_path


def config_of(folder, *options):
    return train.parse_config(["--data", str(folder), "--out", str(folder / "run"), "--device",
                               "cpu", "--steps", "1", "--batch", "4", "--workers", "0", *options])


def spoilt(split, n=0, **fields):
    found = rows()
    chosen = [row for row in found if row["split"] == split][n]
    chosen.update(fields)
    return found


LONG = "blue one two " * 900
WITHOUT_TEST = [row for row in rows() if row["split"] != "test"]
CALLS = [{"text": "Look. " + LONG}, {"image": "0-c.png"}, {"text": "Answer: red"}]
FAULTS = {
    "a long training question": (spoilt("train", question=LONG), (), "example 0: .* tokens"),
    "a long validation question": (spoilt("validation", question=LONG), (), "example 8: .* tok"),
    "a long test question": (spoilt("test", question=LONG), (), "example 9: .* the limit is 2048"),
    "a long test trajectory": (spoilt("test", trajectory=CALLS, answer="red"), (), "example 9: "),
    "a long option in test": (spoilt("test", options=[*COLOURS, LONG]), (), "example 9: "),
    "a long view": (rows(), ("--max_tokens", "40"), "example 0: .* the limit is 40"),
    "a special token in test": (spoilt("test", question="<|im_end|>"), (), "example 9: .*special"),
    "another answer": (spoilt("train", answer="blue"), (), "line 1: the last text says 'red'"),
    "another prefix": (rows(form="<answer>blue</answer>"), ("--answer_prefix", "<answer>"),
                       "line 1: the last text says"),
    "no test record": (WITHOUT_TEST, (), "0 records in the test split"),
    "one validation record": ([row for row in rows() if row["id"] != "8"], (),
                              "1 records in the validation split"),
    "a long tracked tool": (spoilt("validation", trajectory=CALLS, answer="red"),
                            ("--track", "2", "--method", "direct"), "example 8: .* tokens"),
    "an image of a thread": (rows(), (), "example 9: image 0 .*rejected")}


@pytest.mark.parametrize("name", FAULTS)
def test_training_and_check_stop_at_the_same(tmp_path, name):
    found, options, why = FAULTS[name]
    config = config_of(folder_of(tmp_path, found), *options)
    if "thread" in name:
        Image.new("RGB", (3000, 2)).save(tmp_path / "9.png")
    for stops in (check_data.check_data, train.train):
        with pytest.raises(ValueError, match=why):
            stops(config)
    assert not Path(config.out).exists()


GOOD = {
    "tags": (rows(form="<answer>{}</answer>"), ("--answer_prefix", "<answer>")),
    "boxed": (rows(form="So \\boxed{{{}}}."), ()),
    "one test record": ([*WITHOUT_TEST, rows()[9]], ()),
    "another script, tracked": (rows(form="答案：{}", words="the {} square."),
                                ("--answer_prefix", "答案：", "--track", "2", "--method", "direct"))}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_checked_is_trained_and_answered(tmp_path, capsys, name):
    found, options = GOOD[name]
    config = config_of(folder_of(tmp_path, found), "--lora_rank", "2", *options)
    check_data.check_data(config)
    said = capsys.readouterr().out
    assert f"{len(found)} records are well-formed; 8 train" in said
    assert ("note: " in said) == (name == "boxed")  # asked with another prefix than the texts have
    train.train(config)
    results = json.loads((Path(config.out) / "results.json").read_text(encoding="utf-8"))
    assert len(results["answers"]) == sum(row["split"] == "test" for row in found)
    for answer in results["answers"]:
        assert answer["direct_right"] == (answer["direct"] == answer["answer"])


def test_of_several_processes_one_process_says_what_is_odd(tmp_path, capsys, monkeypatch):
    found, options = GOOD["boxed"]
    config = config_of(folder_of(tmp_path, found), *options)
    for rank, times in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        load_examples(config)
        assert capsys.readouterr().out.count("note: ") == times


def test_every_fault_is_named_at_once_and_nothing_is_written(tmp_path, as_program, capsys):
    found = rows()
    found[0]["answer"], found[1]["question"], found[9]["question"] = "blue", LONG, "<|im_end|>"
    folder = folder_of(tmp_path, found)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as ended:  # no traceback
        as_program(check_data.__file__, "--data", folder)
    for message in ("error: 3 records cannot be used", "line 1: the last text", "example 1: ",
                    "example 9: the text contains"):
        assert message in ended.value.code
    said = capsys.readouterr().out
    assert "11 records are well-formed; 7 train, 2 validation, 2 test" in said
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_there_is_counted(tmp_path, capsys):
    found = rows()
    found[0]["trajectory"][-1]["text"] = "It is red"
    found[10]["image"] = "0.png"
    check_data.check_data(config_of(folder_of(tmp_path, found), "--free_tokens", "3"))
    said = capsys.readouterr().out
    for part in ("questions: 12 records, 1 to 1 tool images", "(limit 2048)",
                 "images: 24, from (32, 32) to (64, 64) px",
                 "tokens of the longest option, with prefix and end of turn: 4",
                 "1 of 12 last texts (line 1 is the first) have no 'Answer:'",
                 "1 of 2 validation images are also in train",
                 "2 questions have options that take"):
        assert part in said, part


def test_the_small_world_is_checked_too(capsys):
    check_data.check_data(train.parse_config(["--train_examples", "5", "--valid_examples", "5",
                                              "--test_per_family", "1", "--regime", "mixed"]))
    assert "16 records are well-formed; 5 train, 5 validation, 6 test" in capsys.readouterr().out


def test_free_answers_get_the_tokens_of_the_longest_option(tmp_path, capsys):
    """The model is made to say the longest option: it must come out whole, or be said to be cut."""
    folder = folder_of(tmp_path, rows(words="the {} square in the middle of it"))
    tests = [ex for ex in records.read_folder(folder) if ex.split == "test"]
    asker = evaluate.Answerer(VLM(TINY), tests)
    needed = asker.answer_tokens()
    for example, count in zip(tests, needed):
        whole = [f"Answer: {option}" for option in example.options]
        assert count == 1 + max(len(asker.vlm.tokenizer(text).input_ids) for text in whole)
    given = []
    asker.generate = lambda views, tokens, options=None: given.append(tokens) or []
    asker.free()
    assert given == [max(needed)] and min(needed) > 4 and not capsys.readouterr().out
    asker.free(max(needed) - 1)
    assert given[1:] == [max(needed) - 1]
    cut = sum(count == max(needed) for count in needed)
    assert f"free: {cut} of {len(tests)} questions have options" in capsys.readouterr().out
