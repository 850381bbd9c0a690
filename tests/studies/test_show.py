"""Claims: what show.py prints of a folder, of other model families and of other
methods is what their runs read (a full view to the token is tested with docs/walkthrough.md);
it needs no weights."""

import re
from itertools import takewhile

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


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The record of data.py's docstring, and one of a wide image, no tool and unusual letters."""
    out = tmp_path_factory.mktemp("data") / "folder"
    picture, crop, wide = (Image.new("RGB", size) for size in ((128, 128), (20, 20), (96, 48)))
    write_folder(out, [
        Example("0001", "crop", picture, "Which digit is on the red disc?", ["five", "seven"],
                "seven", ["Zoom in on the red disc. [crop 12 30 28 46]", crop,
                          "The digit is seven. Answer: seven"]),
        Example("0002", "odd", wide, "Was\x1b it €?", ["two"], "two", ["Answer: two"], "test")])
    return out


@pytest.fixture
def show_lines(as_program, capsys, folder):
    """The lines that `python analysis/show.py --data FOLDER` prints with these options."""
    def run(*options) -> list[str]:
        as_program(show.__file__, "--data", folder, *options)
        return capsys.readouterr().out.splitlines()
    return run


def view_of(lines: list[str], name: str) -> list[str]:
    start = next(n for n, line in enumerate(lines) if line.startswith(f"{name} view"))
    return [*takewhile(bool, lines[start + 1:])]


def test_a_row_that_is_an_unusual_record_to_the_token(show_lines):
    lines = show_lines("--row", 1, "--method", "sft")
    assert lines[0] == "0002: 'Was\\x1b it €?' 'two'" and lines[4:7] == [
        "       4-13  10 x <|image_pad|>, image 0, 4 x 10 patches, positions 4-4 / 4-5 / 4-8",
        "      14-29  <|vision_end|> W as \\x1b · it · â Ĥ ¬ ? <|im_end|> \\n <|im_start|> "
        "assistant \\n",
        "s     30-33  Answer : ·two <|im_end|>"]
    # rows are counted from 0; without a folder, in the world
    (first, *_) = show_lines("--data", "", "--regime", "multi", "--row", 2)
    assert first.startswith("zoom-train-00002: ")
    with pytest.raises(SystemExit, match="has no row 2"):
        show_lines("--row", 2)


@pytest.mark.parametrize("options, view, end", [
    ("pearl --pred_tokens 2", "input", ["         34  1 x [PRED], positions 22-22",
                                        "         35  1 x [PRED], positions 23-23  <- h^_R"]),
    ("pearl", "target", ["      38-40  ·Answer : ·seven", "         41  <|im_end|>  <- h_R"]),
    ("paper --pred_tokens 0", "input", ["         33  \\n  <- h^_R"]),
    ("strip_calls+release", "input", ["      29-32  4 x [PRED], positions 17-20",
                                      "         33  <|im_end|>  <- h^_R"]),
    ("target_state --target_position word", "target", ["         40  ·seven  <- h_R",
                                                       "         41  <|im_end|>"]),
    ("recon --latents 2", "full", [
        "      49-50  2 x latent, positions 37-38", "         51  <|vision_end|>",
        "s     52-60  The ·digit ·is ·seven . ·Answer : ·seven <|im_end|>"]),
    ("self_distill", "student's", ["s     34-37  Answer : ·seven <|im_end|>"])])
def test_how_the_views_of_a_method_end(show_lines, options, view, end):
    assert view_of(show_lines("--method", *options.split()), view)[-len(end):] == end


def test_views_that_are_not_there_are_not_printed(show_lines):
    recon, direct, sft, pearl = (
        show_lines("--method", name) for name in ("recon", "direct", "sft", "pearl"))
    assert not [line for line in recon if line.startswith(("input", "target"))]
    # beside a trajectory a bare answer, which has no h_R
    assert show_lines("--method", "both") == sft + direct[1:]
    assert show_lines("--method", "with_answers") == pearl + direct[1:]


@pytest.mark.parametrize("name", ["qwen3_vl", "idefics3", "gemma3"])
def test_other_families_without_their_weights(show_lines, folder, tmp_path, name):
    """Against the views and positions that the family gives with its weights."""
    checkpoint, example = build(name, tmp_path / name), read_record(folder, 0)
    family = load_checkpoint(str(checkpoint), torch.float32)[1]
    for file in checkpoint.glob("*.safetensors"):
        file.unlink()
    images = load_images(example, family)
    grids = {image.key: image.grid for image in images}
    lines = show_lines("--model", checkpoint)
    for name, view in make_views(Chat(family, 4096), example, images, 4)._asdict().items():
        batch, grids_of_view = collate([view], 0), [grids[key] for key in view.images]
        positions = family.positions(batch.ids, batch.mask, grids_of_view)[:, 0].tolist()
        supervised, image_tokens, end = [], 0, 0
        for line in view_of(lines, name):
            first, *last = map(int, line[1:12].strip().split("-"))
            assert first == end  # no token is left out
            end = (last or [first])[0] + 1
            supervised += range(first, end) if line[0] == "s" else []
            if match := re.fullmatch(r"(\d+) x \S+, image \d,.* positions (.*)", line[13:]):
                rows = [f"{row[first]}-{row[end - 1]}" for row in positions]
                assert match[2] == " / ".join(rows) and int(match[1]) == end - first
                image_tokens += end - first
        assert end == len(view.ids)
        assert image_tokens == view.ids.count(family.lm.config.image_token_id)
        # of the views with an embedding no loss reads the labels
        assert supervised == [n for n, x in enumerate(view.labels) if x != -100 and name == "full"]
