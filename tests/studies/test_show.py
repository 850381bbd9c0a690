"""Claims: show.py prints the worked example of data.py to the token (the full view of such a record
is tested with docs/walkthrough.md); what it prints of a folder, of the world, of other model
families and of other methods is what their runs read; it needs no weights; only a terminal gets
colour; what is missing is one sentence."""

import itertools
import re
import sys

import pytest
import torch
from PIL import Image

from analysis import show
from data import collate, make_views
from support.chat import Chat
from support.families import load_checkpoint
from support.images import load_images
from support.records import Example, read_record, write_folder

from checkpoints import build

WORKED = """\
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
""".splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The record of data.py's docstring, and one of a wide image, no tool and unusual letters."""
    out = tmp_path_factory.mktemp("data") / "folder"
    picture, crop, wide = (Image.new("RGB", size, "grey") for size in (
        (128, 128), (20, 20), (96, 48)))
    write_folder(out, [
        Example("0001", "crop", picture, "Which digit is on the red disc?", ["five", "seven"],
                "seven", ["Zoom in on the red disc. [crop 12 30 28 46]", crop,
                          "The digit is seven. Answer: seven"]),
        Example("0002", "odd", wide, "Was\x1b it €?", ["two"], "two", ["Answer: two"], "test")])
    return out


@pytest.fixture
def show_lines(monkeypatch, capsys):
    """The lines that `python analysis/show.py` prints with these options."""
    def run(*options) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["show.py", *map(str, options)])
        show.main()
        return capsys.readouterr().out.splitlines()
    return run


def view_of(lines: list[str], name: str) -> list[str]:
    start = next(n for n, line in enumerate(lines) if line.startswith(f"{name} view"))
    return [*itertools.takewhile(bool, lines[start + 1:])]


def test_the_worked_example_and_an_unusual_record_to_the_token(show_lines, folder):
    lines = show_lines("--data", folder, "--pred_tokens", 2)
    assert lines[0] == "0001: 'Which digit is on the red disc?' 'seven'"
    assert lines[-len(WORKED):] == WORKED
    lines = show_lines("--data", folder, "--row", 1, "--method", "sft")
    assert lines[0] == "0002: 'Was\\x1b it €?' 'two'" and lines[4:7] == [
        "       4-13  10 x <|image_pad|>, image 0, 4 x 10 patches, positions 4-4 / 4-5 / 4-8",
        "      14-29  <|vision_end|> W as \\x1b · it · â Ĥ ¬ ? <|im_end|> \\n <|im_start|> "
        "assistant \\n",
        "s     30-33  Answer : ·two <|im_end|>"]


def test_rows_are_counted_from_0_and_what_is_missing_is_one_sentence(show_lines, folder):
    assert show_lines("--regime", "multi", "--row", 2)[0].startswith("zoom-train-00002: ")
    for options, message in ((["--data", folder, "--row", 2], "has no row 2"),
                             (["--data", "nowhere"], "^nowhere/trajectories.jsonl not found"),
                             (["--model", "./nowhere"], "./nowhere")):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
            show_lines(*options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, view, end", [
    ("paper --pred_tokens 0", "input", ["         33  \\n  <- h^_R"]),
    ("strip_calls+release", "input", ["      29-32  4 x [PRED], positions 17-20",
                                      "         33  <|im_end|>  <- h^_R"]),
    ("target_state --target_position word", "target", ["         40  ·seven  <- h_R",
                                                       "         41  <|im_end|>"]),
    ("recon --latents 2", "full", [
        "      49-50  2 x latent, positions 37-38", "         51  <|vision_end|>",
        "s     52-60  The ·digit ·is ·seven . ·Answer : ·seven <|im_end|>"]),
    ("self_distill", "student's", ["s     34-37  Answer : ·seven <|im_end|>"]),
    ("direct", "full", ["s     34-37  Answer : ·seven <|im_end|>"])])
def test_how_the_views_of_a_method_end(show_lines, folder, options, view, end):
    lines = show_lines("--data", folder, "--method", *options.split())
    assert view_of(lines, view)[-len(end):] == end


def test_the_views_of_the_release(show_lines, folder):
    lines = show_lines("--data", folder, "--method", "strip_calls+release")
    assert sum(", image 0, " in line for line in view_of(lines, "target")) == 1
    assert "Which" not in " ".join(view_of(lines, "target"))
    assert [line for line in lines if line.startswith("s")] == [
        "s     34-42  Zoom ·in ·on ·the ·red ·disc . <|im_end|> \\n",
        "s     57-66  The ·digit ·is ·seven . ·Answer : ·seven <|im_end|> \\n"]


def test_views_that_are_not_there_are_not_printed(show_lines, folder):
    image = show_lines("--data", folder, "--method", "target_state", "--target_position", "image")
    assert [line[:11] for line in image if line.endswith("<- h_R")] == ["      23-26"]
    recon, direct = (show_lines("--data", folder, "--method", name) for name in ("recon", "direct"))
    assert not [line for line in recon if line.startswith(("input", "target"))]
    # beside a trajectory a bare answer has no h_R
    for name, alone in (("both", "sft"), ("with_answers", "pearl")):
        assert show_lines("--data", folder, "--method", name) == show_lines(
            "--data", folder, "--method", alone) + direct[1:]
    assert not [line for line in direct if "<- h_R" in line]


@pytest.mark.parametrize("name", ["qwen3_vl", "idefics3", "gemma3"])
def test_other_families_without_their_weights(show_lines, folder, tmp_path, name):
    """Against the view and positions that the family gives with its weights."""
    checkpoint, example = build(name, tmp_path / name), read_record(folder, 0)
    family = load_checkpoint(str(checkpoint), torch.float32)[1]
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    images = load_images(example, family)
    full = make_views(Chat(family, 4096), example, images, 4).full
    batch = collate([full], 0)
    positions = family.positions(batch.ids, batch.mask, [image.grid for image in images])[:, 0]
    supervised, image_tokens, end = [], 0, 0
    for line in view_of(show_lines("--data", folder, "--model", checkpoint), "full"):
        first, *last = map(int, line[1:12].strip().split("-"))
        assert first == end  # no token is left out
        end = (last or [first])[0] + 1
        supervised += range(first, end) if line[0] == "s" else []
        if match := re.fullmatch(r"(\d+) x \S+, image \d,.* positions (.*)", line[13:]):
            rows = [f"{row[first]}-{row[end - 1]}" for row in positions.tolist()]
            assert match[2] == " / ".join(rows) and int(match[1]) == end - first
            image_tokens += end - first
    assert end == len(full.ids) and image_tokens == full.ids.count(family.lm.config.image_token_id)
    assert supervised == [n for n, label in enumerate(full.labels) if label != -100]


def test_only_a_terminal_gets_colour(show_lines, folder, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = show_lines("--data", folder)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    lines = show_lines("--data", folder)
    green = [line for line in lines if "\033" in line]
    assert [line[:6] for line in green] == ["\033[32ms"] * 2
    assert [line.removeprefix("\033[32m").removesuffix("\033[0m") for line in lines] == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert show_lines("--data", folder) == plain
