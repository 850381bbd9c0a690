"""Claims: no scene changes; a scene is the same for the same seed, and no two splits share one; a
tool, run on the picture, reveals the answer; calls that do not fit are ValueErrors; a run gets the
splits that its options name, from the world or from a folder."""

import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image

import train
from support import records, splits
from world import loader, scenes, tools

SCENES = {  # of the first three scenes of each split: pixels and specs
    "crop": 1340982213, "highlight": 869897661, "depth": 3914848575, "jigsaw": 2777365829,
    "path": 822093867, "zoom": 2908973273, "highlight+crop": 4049276211, "path+crop": 2430022774,
    "tallest": 3139985734}
CONFIG = partial(train.Config, regime="mixed", train_examples=40, test_per_task=3)


@pytest.mark.parametrize("task", scenes.TASKS)
def test_no_scene_and_no_split_changes(task):
    content = b"".join(scenes.make_example(task, split, i, 0).image.tobytes()
                       + repr(scenes.make_spec(task, split, i, 0)).encode()
                       for split in ("train", "validation", "test", "pretrain") for i in range(3))
    assert zlib.crc32(content) == SCENES[task]
    one, same, other = (scenes.make_example(task, "train", 5, seed) for seed in (1, 1, 2))
    assert one == same and one.image != other.image
    # a scene's hash belongs to exactly one split
    assert sorted(b for buckets in scenes.BUCKETS.values() for b in buckets) == list(range(16))


@pytest.mark.parametrize("task", sorted(scenes.TASKS.keys() - {scenes.HELD_OUT}))
def test_a_trajectory_has_calls_with_their_outputs_and_ends_in_the_answer(task):
    for i in range(20):
        ex = scenes.make_example(task, "train", i, 0)
        assert ex.answer in ex.options and len(set(ex.options)) == len(ex.options)
        assert tools.CALL.search(ex.texts[0]) and not tools.CALL.search(ex.texts[-1])
        assert ex.texts[-1].endswith(f"Answer: {ex.answer}")
        image, steps = ex.image, ex.trajectory[:-1]
        for text, output in zip(steps[::2], steps[1::2], strict=True):
            assert (image := tools.call_tool(text, image)) == output


def test_regimes_have_the_calls_of_their_descriptions():
    worlds = {name: scenes.make_world(name, "train", 60) for name in scenes.REGIMES}
    uses = {name: ({len(ex.images) - 1 for ex in world},
                   {tools.CALL.search(ex.texts[0])[1] for ex in world})
            for name, world in worlds.items()}
    assert uses == dict(single=({1}, {"crop"}), mixed=({1}, {*tools.TOOLS}),
                        multi=({1, 2, 3}, {"crop"}), all=({1, 2, 3}, {"crop", "highlight", "path"}))
    assert not any(scenes.make_example(scenes.HELD_OUT, "test", i, 0).trajectory for i in range(3))
    with pytest.raises(ValueError, match="unknown regime 'none': choose one of single"):
        scenes.make_world("none", "train", 1)


def test_crop_keeps_the_resolution_of_the_file_and_highlight_dims_the_rest():
    """A call acts on the last image, or on the one that it names."""
    image, last = Image.effect_noise((200, 100), 99).convert("RGB"), Image.new("RGB", (32, 32))
    assert tools.call_tool("[crop 10 20 30 60 of 1]", image, last) == image.crop((20, 20, 60, 60))
    assert tools.call_tool("[crop 0 0 50 50]", image, last) == last.crop((0, 0, 16, 16))
    out = np.asarray(tools.highlight(Image.new("RGB", (10, 10), (200, 100, 40)), 0, 0, 50, 100))
    assert (out[:, :5] == (200, 100, 40)).all() and (out[:, 5:] == (50, 25, 10)).all()


def brighter_mark(spec, out):
    # of one pixel beside the mark: before the tool it may be a fleck
    grey, balls = np.asarray(out.convert("L")), spec["balls"]
    return max((grey[balls[n][1], balls[n][0] - 6], name) for n, name in spec["marks"])[1]


def frame_colour(spec, out):
    return {rgb: name for name, rgb in scenes.COLOURS.items()}.get(out.getpixel((1, 1)))


def painted_discs(spec, out):
    paint = (np.asarray(out) == tools.ROUTE_PAINT).all(-1)
    ends = [scenes.node_xy(walk[-1]) for walk in spec["walks"]]
    return " ".join(colour for (x, y), colour in zip(ends, spec["colours"])
                    if paint[max(0, y - 11):y + 12, max(0, x - 11):x + 12].any())


@pytest.mark.parametrize("tool, answer, least", [
    ("depth", brighter_mark, 0.95), ("jigsaw", frame_colour, 0.95), ("path", painted_discs, 1)])
def test_a_tool_reveals_the_answer(tool, answer, least):
    examples = [scenes.make_example(tool, "train", i, 0) for i in range(60)]
    before, after = (np.mean([answer(scenes.make_spec(tool, "train", i, 0), ex.images[n])
                              == ex.answer for i, ex in enumerate(examples)]) for n in (0, 1))
    assert after >= least > before


@pytest.mark.parametrize("text, message", [
    ("no call here", "no tool call"), ("[zoom 1 2 3 4]", "no tool call"),
    ("[crop 1 2]", "wrong number of arguments"), ("[highlight 1 2 3]", "four numbers"),
    ("[crop 5 5 5 9]", "is empty"), ("[jigsaw]", "scenes of the small world only"),
    ("[crop 1 2 3 4 of 2]", "there are 1"), ("[crop 1 2 3 4 of 0]", "there are 1")])
def test_calls_that_do_not_fit_are_value_errors(text, message):
    with pytest.raises(ValueError, match=message):
        tools.call_tool(text, Image.new("RGB", (64, 64)))


def test_the_worlds_splits_have_the_sizes_of_the_options():
    training, validation, tests = splits.load_splits(CONFIG())
    assert [ex.id for ex in training] == [ex.id for ex in scenes.make_world("mixed", "train", 40)]
    assert [ex.split for ex in validation] == ["validation"] * 4
    tasks = [task for task in [*scenes.REGIMES["mixed"], scenes.HELD_OUT] for _ in range(3)]
    assert [(ex.task, ex.split) for ex in tests] == [(task, "test") for task in tasks]
    assert len(splits.load_splits(CONFIG(train_examples=4))[1]) == 2
    every = loader.questions("", 1, "validation")
    assert [(ex.task, ex.split) for ex in every] == [(task, "validation") for task in scenes.TASKS]


def test_a_folder_gives_all_of_training_and_no_more_of_the_rest_than_the_world(tmp_path, capsys):
    world = [ex for split, count in (("train", 30), ("validation", 9), ("test", 25))
             for ex in scenes.make_world("mixed", split, count)]
    records.write_folder(tmp_path / "set", world)
    config = CONFIG(data=str(tmp_path / "set"), answer_prefix="So:")
    first, again = (splits.load_splits(config) for _ in range(2))
    assert "note: " in capsys.readouterr().out
    assert [len(part) for part in first[:2]] == [30, 4]
    assert [ex.task for ex in first[2]] == [t for t in scenes.REGIMES["mixed"] for _ in range(3)]
    assert [ex.id for part in again for ex in part] == [ex.id for part in first for ex in part]
    assert len(splits.test_questions(config, 0, "validation")) == 9
    with pytest.raises(ValueError, match='0 records in the validation split, 2 or more .*"split"'):
        splits.limit(dict(train=first[0], validation=[], test=first[2]), config)


def test_the_sample_is_a_folder_that_reads_back(tmp_path, as_program):
    as_program(loader.__file__, "--out", tmp_path / "set", "--regime", "all", "--count", 8)
    named = [ex.split for ex in splits.read_folder(tmp_path / "set")]
    assert named == ["train"] * 8 + ["validation"] * 2 + ["test"] * 2
