"""Claims: `python data.py --show` prints data.Serializer's worked example to the token; what it
prints of a data folder, of the world, of other model families and of other methods is what their
runs read; weights are not needed; colour is for terminals; what is not there is one sentence."""

import io
import re
import shutil
import sys

import pytest
import torch
from PIL import Image

import data
from checkpoints import build
from support.families import load_checkpoint
from support.images import ImageStore
from support.records import Example, read_folder, write_folder
from world.scenes import make_example

WORKED = """\
0001: 'Which digit is on the red disc?' 'seven'

full view, 73 tokens
        0-3  <|im_start|> user \\n <|vision_start|>
       4-19  16 x <|image_pad|>, image 0, 8 x 8 patches, positions 4-4 / 4-7 / 4-7
      20-31  <|vision_end|> Which ·digit ·is ·on ·the ·red ·disc ? <|im_end|> \\n <|im_start|>
      32-33  assistant \\n
s     34-48  Zoom ·in ·on ·the ·red ·disc . ·[ crop ·12 ·30 ·28 ·46 ] <|im_end|>
      49-53  \\n <|im_start|> user \\n <|vision_start|>
      54-57  4 x <|image_pad|>, image 1, 4 x 4 patches, positions 42-42 / 42-43 / 42-43
      58-63  <|vision_end|> <|im_end|> \\n <|im_start|> assistant \\n
s     64-72  The ·digit ·is ·seven . ·Answer : ·seven <|im_end|>

input view, 36 tokens
        0-3  <|im_start|> user \\n <|vision_start|>
       4-19  16 x <|image_pad|>, image 0, 8 x 8 patches, positions 4-4 / 4-7 / 4-7
      20-31  <|vision_end|> Which ·digit ·is ·on ·the ·red ·disc ? <|im_end|> \\n <|im_start|>
      32-33  assistant \\n
         34  1 x [PRED], positions 22-22
         35  1 x [PRED], positions 23-23  <- h^_R

target view, 42 tokens
       0-16  <|im_start|> assistant \\n Zoom ·in ·on ·the ·red ·disc . ·[ crop ·12 ·30 ·28 ·46 ]
      17-22  <|im_end|> \\n <|im_start|> user \\n <|vision_start|>
      23-26  4 x <|image_pad|>, image 1, 4 x 4 patches, positions 23-23 / 23-24 / 23-24
      27-37  <|vision_end|> <|im_end|> \\n <|im_start|> assistant \\n The ·digit ·is ·seven .
      38-40  ·Answer : ·seven
         41  <|im_end|>  <- h_R

L_VLM (Eq. 3): the 24 tokens marked s, each from the state before it
L_JEPA (Eq. 1): h^_R, state 35 of the input view, and h_R, state 41 of the target view
L_NextLat (Eq. 2): the states of the 24 tokens marked s, each from the one before it
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The record of data.py's docstring, and one without a tool image, in letters of all kinds."""
    out = tmp_path_factory.mktemp("data") / "folder"
    picture, crop = Image.new("RGB", (128, 128), "grey"), Image.new("RGB", (20, 20), "red")
    texts = ["Zoom in on the red disc. [crop 12 30 28 46]", crop,
             "The digit is seven. Answer: seven"]
    options = ["two", "five", "seven", "nine"]
    question = "Which digit is on the red disc?"
    write_folder(out, [Example("0001", "crop", picture, question, options, "seven", texts),
                       Example("0002", "odd", crop, "Was\x1b it €?", options, "two",
                               ["Answer: two"], "test")])
    return out


@pytest.fixture
def shown(monkeypatch, capsys):
    """The lines that `python data.py --show` prints with these options."""
    def run(*options) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["data.py", "--show", *map(str, options)])
        data.main()
        return capsys.readouterr().out.splitlines()
    return run


def view_of(lines: list[str], name: str) -> list[str]:
    start = next(n for n, line in enumerate(lines) if line.startswith(f"{name} view"))
    return lines[start + 1:lines.index("", start)]


def test_the_worked_example_to_the_token(shown, folder):
    assert shown("--data", folder, "--pred_tokens", 2) == WORKED.splitlines()


def test_a_record_of_a_folder_by_its_row(shown, folder):
    assert shown("--data", folder, "--row", 1, "--method", "sft") == [
        "0002: 'Was\\x1b it €?' 'two'", "",
        "full view, 28 tokens",
        "        0-3  <|im_start|> user \\n <|vision_start|>",
        "        4-7  4 x <|image_pad|>, image 0, 4 x 4 patches, positions 4-4 / 4-5 / 4-5",
        # control characters cannot reach the terminal; bytes of a letter are named as such
        "       8-23  <|vision_end|> W as \\x1b · it · â Ĥ ¬ ? <|im_end|> \\n <|im_start|> "
        "assistant \\n",
        "s     24-27  Answer : ·two <|im_end|>", "",
        "L_VLM (Eq. 3): the 4 tokens marked s, each from the state before it"]


@pytest.mark.parametrize("row", [2, -1])
def test_a_row_that_is_not_there(shown, folder, row):
    with pytest.raises(ValueError, match=f"l has no row {row}: it has 2, counted from 0$"):
        shown("--data", folder, "--row", row)


def test_no_other_record_is_read(shown, folder, tmp_path):
    """To look at one of a hundred thousand must not take as long as to read them all."""
    shutil.copytree(folder, tmp_path / "copy")
    for file in (tmp_path / "copy" / "images").glob("0002*"):
        file.write_bytes(b"no image")
    assert shown("--data", tmp_path / "copy") == shown("--data", folder)
    with pytest.raises(ValueError, match="line 2: image .*0002-0.png cannot be read"):
        shown("--data", tmp_path / "copy", "--row", 1)


@pytest.mark.parametrize("options, message", [
    (["--row", -1], "^--row -1 is not there: rows are counted from 0$"),
    (["--data", "nowhere"], "^nowhere/trajectories.jsonl not found"),
    (["--model", "./nowhere"], "^./nowhere "),
])
def test_what_is_not_there_is_one_sentence(shown, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        shown(*options)
    assert "\n" not in str(error.value)


def test_options_are_checked_as_in_training(shown, capsys):
    for options, message in ((["--pred-tokens", -1], "must be at least 0"),
                             (["--target_view", "all"], "invalid choice: 'all'")):
        with pytest.raises(SystemExit):
            shown(*options)
        assert message in capsys.readouterr().err


def test_the_world_s_rows_are_the_training_examples(shown):
    want = make_example("zoom", "train", 2, 5)
    lines = shown("--regime", "multi", "--seed", 5, "--row", 2)
    assert lines[0] == f"{want.id}: {want.question!r} {want.answer!r}"


def test_a_wide_picture_and_its_rows_of_positions(shown, tmp_path):
    wide = Image.new("RGB", (96, 48), "grey")  # px
    write_folder(tmp_path / "wide", [Example("0003", "wide", wide, "Is it?", ["yes"], "yes",
                                             ["Answer: yes"])])
    assert view_of(shown("--data", tmp_path / "wide"), "full")[1] == (
        "       4-13  10 x <|image_pad|>, image 0, 4 x 10 patches, positions 4-4 / 4-5 / 4-8")


def test_letters_that_the_terminal_does_not_have(folder, monkeypatch):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "argv", ["data.py", "--show", "--data", str(folder), "--row", "1"])
    monkeypatch.setattr(sys, "stdout", ascii_only)
    data.main()
    ascii_only.flush()
    assert rb"s     24-27  Answer : \xb7two <|im_end|>" in ascii_only.buffer.getvalue()


# ---- methods ----


def test_other_target_view_and_no_pred_tokens(shown, folder):
    lines = shown("--data", folder, "--target_view", "trajectory_with_image", "--pred_tokens", 0)
    assert view_of(lines, "input")[-1] == "         33  \\n  <- h^_R"
    assert sum(", image 0, " in line for line in view_of(lines, "target")) == 1
    assert "Which" not in " ".join(view_of(lines, "target"))
    paper = shown("--data", folder, "--recipe", "paper")
    assert paper[-1] == ("L_NextLat (Eq. 2): the states of the target view, each from the one "
                         "before it")


def test_the_views_of_the_release(shown, folder):
    lines = shown("--data", folder, "--recipe", "release", "--strip_calls")
    assert view_of(lines, "input")[-2:] == ["      29-32  4 x [PRED], positions 17-20",
                                            "         33  <|im_end|>  <- h^_R"]
    assert [line for line in lines if line.startswith("s")] == [
        "s     34-42  Zoom ·in ·on ·the ·red ·disc . <|im_end|> \\n",
        "s     57-66  The ·digit ·is ·seven . ·Answer : ·seven <|im_end|> \\n"]
    assert lines[-1] == "L_NextLat, token term: of each such state the token itself, if marked s"


def test_the_latent_view(shown, folder):
    lines = shown("--data", folder, "--method", "recon")
    assert not [line for line in lines if line.startswith(("input", "target"))]
    assert view_of(lines, "full")[-4:] == [
        "s     34-48  Zoom ·in ·on ·the ·red ·disc . ·[ crop ·12 ·30 ·28 ·46 ] <|vision_start|>",
        "      49-52  4 x latent, positions 37-40",
        "         53  <|vision_end|>",
        "s     54-62  The ·digit ·is ·seven . ·Answer : ·seven <|im_end|>"]
    assert lines[-1] == "L_latent: of each latent the visual embedding, from the state before it"
    assert "      49-50  2 x latent, positions 37-38" in shown(
        "--data", folder, "--method", "recon", "--latents", 2)


def test_answers_alone_and_both(shown, folder):
    direct = shown("--data", folder, "--method", "direct")
    assert view_of(direct, "full")[-1] == "s     34-37  Answer : ·seven <|im_end|>"
    both = shown("--data", folder, "--method", "both")
    assert both == shown("--data", folder, "--method", "sft") + direct[1:]


def test_a_record_too_long_to_train_on_is_shown_all_the_same(shown, folder):
    lines = shown("--data", folder, "--max_tokens", 72)
    assert lines[-1] == "too long to train on: 73 tokens, --max_tokens 72"
    assert view_of(lines, "full") == view_of(shown("--data", folder, "--max_tokens", 73), "full")


# ---- families ----


@pytest.mark.parametrize("name", ["qwen3_vl", "idefics3", "gemma3"])
def test_other_families_without_their_weights(shown, folder, tmp_path, name):
    """Against the views and positions that the family with its weights gives."""
    checkpoint = build(name, tmp_path / name)
    family = load_checkpoint(str(checkpoint), torch.float32)[1]
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    example = read_folder(folder)[0]
    store, image_id = ImageStore(family), family.lm.config.image_token_id
    placed = store.add(example)
    full = data.Serializer(family, 4096).views(example, *placed, 4, "trajectory").full
    batch, grids = data.collate([full], 0), [grid for grid in store.grids if grid]
    positions = family.positions(batch.ids, batch.mask, grids)[:, 0]

    supervised, images, end = [], [], 0
    for line in view_of(shown("--data", folder, "--model", checkpoint), "full"):
        first, *last = map(int, line[1:12].strip().split("-"))
        last = last[0] if last else first
        assert first == end  # no token is left out
        end, places = last + 1, range(first, last + 1)
        supervised += places if line[0] == "s" else []
        if found := re.fullmatch(r"(\d+) x (\S+), image (\d),.* positions (.*)", line[13:]):
            assert int(found[1]) == len(places)
            assert found[2] == family.tokenizer.convert_ids_to_tokens(image_id)
            rows = [f"{row[first]}-{row[last]}" for row in positions.tolist()]
            assert found[4] == " / ".join(rows)
            images += [int(found[3])] * len(places)
    assert end == len(full.ids)
    assert supervised == [n for n, label in enumerate(full.labels) if label != -100]
    counts = [family.tokenizer(text, add_special_tokens=False).input_ids.count(image_id)
              for text in store.image_texts]
    assert images == [0] * counts[0] + [1] * counts[1] and sum(counts) == full.ids.count(image_id)


# ---- colour ----


def test_colour_on_a_terminal_alone(shown, folder, monkeypatch):
    options = ["--data", folder, "--pred_tokens", 2]
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    lines = shown(*options)
    green = [line for line in lines if "\033" in line]
    assert [line[:6] for line in green] == ["\033[32ms"] * 2
    assert all(line.endswith("\033[0m") for line in green)
    assert [line.removeprefix("\033[32m").removesuffix("\033[0m") for line in lines] == \
        WORKED.splitlines()
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(*options) == WORKED.splitlines()
