"""Claims: the world is the same for the same seed and disjoint across splits; each tool, run on the
picture, reveals the answer; a folder survives the round trip; every kind of bad record is refused
with file, line and mend; the views' tokens, labels and positions are those of one rendering of the
whole conversation."""

import copy
import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from baselines import reconstruction
from support import images, records
from support.answers import AnswerForm, default_form
from world import scenes, tools

EVERY = list(scenes.FAMILIES)


# ---- the world ----


@pytest.mark.parametrize("family", EVERY)
def test_same_seed_same_bytes_other_seed_other_bytes(family):
    one, two, other = (scenes.make_example(family, "train", 5, seed) for seed in (1, 1, 2))
    assert [i.tobytes() for i in one.images] == [i.tobytes() for i in two.images]
    assert (one.question, one.options, one.texts) == (two.question, two.options, two.texts)
    assert one.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("family", EVERY)
def test_splits_are_disjoint_by_construction(family):
    for split, buckets in scenes.BUCKETS.items():
        for i in range(8):
            assert zlib.crc32(repr(scenes.make_spec(family, split, i, 0)).encode()) % 16 in buckets
    buckets = sorted(b for r in scenes.BUCKETS.values() for b in r)
    assert buckets == list(range(16))  # each scene belongs to exactly one split


@pytest.mark.parametrize("family", [f for f in EVERY if f != scenes.HELD_OUT])
def test_trajectories_are_what_the_format_says(family):
    for i in range(20):
        ex = scenes.make_example(family, "train", i, 0)
        assert ex.answer in ex.options and len(set(ex.options)) == len(ex.options)
        assert tools.CALL.search(ex.texts[0]) and not tools.CALL.search(ex.texts[-1])
        assert ex.texts[-1].endswith(f"Answer: {ex.answer}")
        # the calls, run again, give the recorded images
        image, steps = ex.image, iter(ex.trajectory)
        for text, output in zip(steps, steps):
            image = tools.call_tool(text, image)
            assert image.tobytes() == output.tobytes()


def test_regimes_have_the_calls_their_names_promise():
    calls = {name: [(len(ex.images) - 1, tools.CALL.search(ex.texts[0])[1])
                    for ex in scenes.make_world(name, "train", 60)] for name in scenes.REGIMES}
    assert set(calls["single"]) == {(1, "crop")}
    assert {n for n, _ in calls["mixed"]} == {1}
    assert {tool for _, tool in calls["mixed"]} == set(tools.TOOLS)
    assert {n for n, _ in calls["multi"]} == {1, 2, 3}
    assert {tool for _, tool in calls["multi"]} == {"crop"}
    assert max(n for n, _ in calls["all"]) == 3 and len({tool for _, tool in calls["all"]}) == 3
    held_out = [scenes.make_example(scenes.HELD_OUT, "test", i, 0) for i in range(3)]
    assert not any(ex.trajectory for ex in held_out)


# ---- the tools ----


def test_crop_cuts_at_full_resolution_and_refuses_an_empty_box():
    pixels = np.arange(100 * 200 * 3, dtype=np.uint32).astype(np.uint8).reshape(100, 200, 3)
    image = Image.fromarray(pixels)
    assert tools.crop(image, 10, 20, 30, 60).tobytes() == image.crop((20, 20, 60, 60)).tobytes()
    with pytest.raises(ValueError, match="empty"):
        tools.crop(image, 30, 20, 30, 60)


def test_highlight_dims_the_rest():
    out = np.asarray(tools.highlight(Image.new("RGB", (10, 10), (200, 100, 40)), 0, 0, 50, 100))
    assert (out[:, :5] == (200, 100, 40)).all() and (out[:, 5:] == (50, 25, 10)).all()


def test_depth_makes_the_nearer_mark_brighter():
    right = []
    for i in range(60):
        spec = scenes.make_spec("depth", "train", i, 0)
        out = np.asarray(tools.depth(scenes.draw_balls(spec)).convert("L"), dtype=float)
        level = {}
        for ball, name in spec["marks"]:
            x, y = spec["balls"][ball][:2]
            ring = [out[y + dy, x + dx] for dx in (-7, 0, 7) for dy in (-7, 0, 7) if dx or dy]
            level[name] = np.median(ring)
        right.append(max(level, key=level.get) == spec["answer"])
    assert np.mean(right) > 0.95


def test_jigsaw_finds_the_piece():
    fits = []
    for i in range(60):
        spec = scenes.make_spec("jigsaw", "train", i, 0)
        frame = np.asarray(tools.jigsaw(scenes.draw_jigsaw(spec)))[1, 1]
        fits.append(tuple(frame) == scenes.COLOURS[spec["answer"]])
    assert np.mean(fits) > 0.95


def test_path_paints_the_route_to_its_end_and_no_other():
    for i in range(30):
        spec = scenes.make_spec("path", "train", i, 0)
        out = np.asarray(scenes.tell_path(spec, scenes.draw_routes(spec))[1])
        painted = (out == tools.ROUTE_PAINT).all(-1)
        for n, walk in enumerate(spec["walks"]):
            x, y = scenes.node_xy(walk[-1])
            assert painted[max(0, y - 11):y + 12, max(0, x - 11):x + 12].any() == (n == 0), (i, n)


@pytest.mark.parametrize("text", [
    "no call here", "[crop 1 2]", "[zoom 1 2 3 4]", "[highlight 1 2 3]", "[crop 5 5 5 9]",
    "[crop 1 2 3 4 of 2]", "[crop 1 2 3 4 of 0]"])
def test_malformed_calls_raise_one_kind_of_error(text):
    with pytest.raises(ValueError):
        tools.call_tool(text, Image.new("RGB", (64, 64)))


def test_a_call_works_on_the_last_image_or_on_the_one_it_names():
    shown = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (32, 32), "blue")]
    for text, colour, side in (("[crop 0 0 50 50]", (0, 0, 255), 16),
                               ("[crop 0 0 50 50 of 1]", (255, 0, 0), 32)):
        made = tools.call_tool(text, *shown)
        assert made.getpixel((0, 0)) == colour and made.size == (side, side)


# ---- the format ----


def test_folder_round_trip(tmp_path, mixed):
    records.write_folder(tmp_path / "set", mixed)
    for ex, back in zip(mixed, records.read_folder(tmp_path / "set")):
        assert (ex.id, ex.task, ex.question, ex.options, ex.answer, ex.texts, ex.split) == \
            (back.id, back.task, back.question, back.options, back.answer, back.texts, back.split)
        assert [i.tobytes() for i in ex.images] == [images.opened(i).tobytes() for i in back.images]
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        records.write_folder(tmp_path / "set", mixed)


def test_split_by_image_when_the_record_names_none(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    rows = [dict(id=str(i), image="a.png", question="q", options=["x", "y"], answer="x",
                 trajectory=[{"text": "x"}]) for i in range(20)]
    (tmp_path / records.FILE).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert len({ex.split for ex in records.read_folder(tmp_path)}) == 1  # one image, one side


GOOD = dict(id="1", image="a.png", question="q", options=["x", "y"], answer="x",
            trajectory=[{"text": "call"}, {"image": "a.png"}, {"text": "x"}])
BAD = {
    "not json": ("{", "not valid JSON"),
    "a list": ([], "expected a JSON object"),
    "no question": ({**GOOD, "question": None}, "field 'question' must be a str"),
    "answer not an option": ({**GOOD, "answer": "z"}, "'z' is not among the options"),
    "empty option": ({**GOOD, "options": ["x", " "]}, "non-empty"),
    "missing image": ({**GOOD, "image": "b.png"}, "b.png not found"),
    "broken image": ({**GOOD, "image": "broken.png"}, "broken.png cannot be read"),
    "missing tool image": ({**GOOD, "trajectory": [{"image": "c.png"}, {"text": "x"}]},
                           "c.png not found"),
    "no text": ({**GOOD, "trajectory": [{"image": "a.png"}]}, "must end in a text"),
    "empty trajectory": ({**GOOD, "trajectory": []}, "must end in a text"),
    "blank text": ({**GOOD, "trajectory": [{"text": " "}]},
                   "step 0: text must be a non-empty string"),
    "unknown step": ({**GOOD, "trajectory": [{"sound": "a"}]}, "step 0 must be"),
    "answer not said": ({**GOOD, "trajectory": [{"text": "no idea"}]},
                        "does not contain the answer"),
    "unknown split": ({**GOOD, "split": "dev"}, "'dev' is none of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_records_name_file_line_and_mend(tmp_path, name):
    record, message = BAD[name]
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    line = record if isinstance(record, str) else json.dumps(record)
    text = json.dumps({**GOOD, "id": "0"}) + "\n" + line + "\n"
    (tmp_path / records.FILE).write_text(text, encoding="utf-8")
    with pytest.raises((ValueError, FileNotFoundError), match="line 2.*" + message):
        records.read_folder(tmp_path)


def test_the_readmes_record_is_read(tmp_path):
    """The first record that README, or a page that it names, shows."""
    root = Path(data.__file__).parent
    pages = [page.read_text(encoding="utf-8")
             for page in (root / "README.md", *sorted(root.glob("docs/*.md")))]
    shown = " ".join(next(page for page in pages if '{"id"' in page).partition('{"id"')[2].split())
    record, _ = json.JSONDecoder().raw_decode('{"id"' + shown)
    for name in [record["image"], *(step["image"] for step in record["trajectory"]
                                    if "image" in step)]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    # a byte-order mark and a blank line are nothing to stop at
    text = "\ufeff" + json.dumps(record, ensure_ascii=False) + "\n\n"
    (tmp_path / records.FILE).write_text(text, encoding="utf-8")
    [ex] = records.read_folder(tmp_path)
    assert ex.answer == "seven" and len(ex.images) == 2 and tools.CALL.search(ex.texts[0])


def test_duplicate_ids_and_missing_file(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / records.FILE).write_text((json.dumps(GOOD) + "\n") * 2, encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: id '1' was used on line 1"):
        records.read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=records.FILE):
        records.read_folder(tmp_path / "nowhere")


# ---- the views ----


@pytest.fixture(scope="module")
def serialised(shipped):
    """Model, serializer and store, and of an example all that is made of it."""
    return shipped, data.Serializer(shipped.family, 2048), images.ImageStore(shipped.family)


def whole(vlm, turns, image_texts, prompt=False):
    """The conversation rendered in one piece by the tokenizer's template, each placeholder replaced
    by an image's text, tokenised in one piece."""
    messages = [dict(role=role, content=[
        dict(type="text", text=part) if isinstance(part, str) else dict(type="image")
        for part in parts]) for role, parts in turns]
    text = vlm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    first, *rest = text.split("<|image_pad|>")
    text = first + "".join(shown + piece for shown, piece in zip(image_texts, rest, strict=True))
    return vlm.tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("family", [f for f in EVERY if f != scenes.HELD_OUT])
def test_views_equal_one_rendering_and_labels_decode_to_the_expert(serialised, family):
    vlm, serializer, store = serialised
    ex = scenes.make_example(family, "train", 0, 0)
    numbers, texts = store.add(ex)
    views = serializer.views(ex, numbers, texts, 2, "trajectory")
    end, turns = serializer.end_id, serializer.turns(ex)
    # all but the line break after the last turn
    assert views.full.ids == whole(vlm, turns, texts)[:-1]
    assert views.target.ids == whole(vlm, turns[1:], texts[1:])[:-1]
    assert views.input.ids[:-2] == whole(vlm, turns[:1], texts[:1], prompt=True)
    assert views.input.inject_at == (len(views.input.ids) - 2, len(views.input.ids) - 1)
    for view in (views.full, views.target):
        said = [label for label in view.labels if label != -100]
        assert vlm.tokenizer.decode(said) == "".join(text + "<|im_end|>" for text in ex.texts)
        assert all(label in (-100, token) for label, token in zip(view.labels, view.ids))
        assert view.ids[view.embed_at] == end and view.embed_at == len(view.ids) - 1
    assert set(views.input.labels) == {-100}
    assert views.input.embed_at == len(views.input.ids) - 1
    assert [view.images for view in views] == [numbers, numbers[:1], numbers[1:]]


def test_an_image_is_placed_by_its_size_alone_as_the_processor_would(shipped, tmp_path):
    """Texts and grids need no pixel; a photograph that is to be shown turned counts as turned."""
    for size in [(64, 64), (128, 128), (37, 90), (90, 37), (16, 200), (300, 300), (1000, 701),
                 (8, 8)]:
        text, grid = shipped.family.image_text(*size)
        made = shipped.family.processor(images=[Image.new("RGB", size)], return_tensors="pt")
        theirs = made["image_grid_thw"][0].tolist()
        assert list(grid) == theirs and text == "<|image_pad|>" * (theirs[1] * theirs[2] // 4)
    exif = Image.Exif()
    exif[0x112] = 6  # turn by 90 degrees to show
    file, picture = tmp_path / "turned.png", Image.new("RGB", (40, 20), "red")
    picture.putpixel((0, 0), (0, 0, 255))
    picture.save(file, exif=exif)
    assert images.image_size(file) == (20, 40) == images.opened(file).size
    assert images.opened(file).getpixel((19, 0)) == (0, 0, 255)


def test_worked_example_of_the_docstring(serialised):
    """Every token's role: the supervised pieces of a crop trajectory, by position."""
    vlm, serializer, store = serialised
    ex = scenes.make_example("crop", "train", 1, 0)
    view = serializer.views(ex, *store.add(ex), 2, "trajectory").full
    words = vlm.tokenizer.convert_ids_to_tokens(view.ids)
    runs = "".join("i" if word == "<|image_pad|>" else " " for word in words).split()
    assert [len(run) for run in runs] == [16, 4]
    first_reply = words.index("assistant") + 2
    assert all(label == -100 for label in view.labels[:first_reply])
    first_end = words.index("<|im_end|>", first_reply)
    assert all(label != -100 for label in view.labels[first_reply:first_end + 1])
    second_reply = words.index("assistant", first_end) + 2
    # line break, tool turn, header
    assert all(label == -100 for label in view.labels[first_end + 1:second_reply])
    assert all(label != -100 for label in view.labels[second_reply:])
    assert words[-1] == "<|im_end|>"


def test_a_blank_that_the_template_puts_before_an_answer_has_to_be_said(serialised):
    """The generation prompt ends before it, so the model must write it; here it is a token of its
    own."""
    vlm, _, store = serialised
    family = copy.copy(vlm.family)
    family.template = vlm.family.template.replace("'\\n' -}}", "':' -}}").replace(
        "{{- part['text']", "{{- (' ' if message['role'] == 'assistant' else '') + part['text']"
    ).replace("assistant\\n", "assistant:")
    ex = scenes.make_example("crop", "train", 1, 0)
    view = data.Serializer(family, 2048).views(ex, *store.add(ex), 1, "trajectory")
    text = vlm.tokenizer.decode(view.full.ids)
    assert text.count("<|im_start|>assistant: ") == 2
    said = [label for label in view.full.labels if label != -100]
    assert vlm.tokenizer.convert_ids_to_tokens(said[:2]) == ["\u0120", "Zoom"]
    assert vlm.tokenizer.decode(said) == "".join(f" {part}<|im_end|>" for part in ex.texts)
    assert vlm.tokenizer.decode(view.input.ids[:-1]).endswith("<|im_start|>assistant:")


def test_target_with_image_keeps_i0_and_drops_the_question(serialised):
    vlm, serializer, store = serialised
    ex = scenes.make_example("crop", "train", 0, 0)
    numbers, texts = store.add(ex)
    view = serializer.views(ex, numbers, texts, 0, "trajectory_with_image").target
    assert view.images == numbers
    without = [("user", [ex.image]), *serializer.turns(ex)[1:]]
    assert view.ids == whole(vlm, without, texts)[:-1]
    assert ex.question not in vlm.tokenizer.decode(view.ids)


def test_k0_ends_at_the_generation_prompt(serialised):
    vlm, serializer, store = serialised
    ex = scenes.make_example("crop", "train", 0, 0)
    view = serializer.views(ex, *store.add(ex), 0, "trajectory").input
    assert view.inject_at == () and view.embed_at == len(view.ids) - 1
    assert vlm.tokenizer.decode(view.ids).endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("form", [
    default_form("Answer:"), default_form(""), AnswerForm("Answer:", " ", "."),
    AnswerForm("**Answer:", " ", "**")])
def test_an_answer_is_scored_on_the_tokens_that_training_on_it_has(serialised, form):
    """Prompt and option together are a bare answer as --method direct trains it."""
    vlm, serializer, store = serialised
    for n, family in enumerate(("crop", "highlight", "depth", scenes.HELD_OUT)):
        ex = scenes.make_example(family, "test", n, 0)
        # of several tokens, and one the beginning of another
        ex.options = [*ex.options, "red disc", "red disc two", "no such word"]
        numbers, texts = store.add(ex)
        prompt, options = serializer.answer_prompt(ex, numbers, texts, form)
        assert prompt.images == numbers[:1] and prompt.embed_at == len(prompt.ids) - 1
        asked = serializer.prompt(serializer.turns(ex)[:1], numbers[:1], texts[:1])
        assert prompt.ids[:len(asked.ids)] == asked.ids
        begun = vlm.tokenizer.decode(prompt.ids[len(asked.ids):])
        assert begun == form.prefix
        for option, tokens in zip(ex.options, options, strict=True):
            taught = replace(ex, answer=option, trajectory=[form.text(option)])
            full = serializer.views(taught, numbers[:1], texts[:1], 0, "trajectory").full
            assert prompt.ids + tokens == full.ids
            assert full.labels[len(prompt.ids):] == tokens  # and each of them is supervised
            assert tokens[-1] == serializer.end_id


def test_image_first_moves_each_image_before_its_call():
    number = next(i for i in range(50) if scenes.make_spec("zoom", "train", i, 0)["calls"] == 2)
    ex = scenes.make_example("zoom", "train", number, 0)
    t1, i1, t2, i2, t3 = ex.trajectory
    assert ex.image_first().trajectory == [i1, t1, i2, t2 + " " + t3]
    assert ex.trajectory == [t1, i1, t2, i2, t3]
    assert ex.answer_only("Answer:").trajectory == [f"Answer: {ex.answer}"]


def test_latent_view_is_one_turn_with_a_run_for_each_tool_image(serialised):
    vlm, serializer, store = serialised
    ex = scenes.make_example("crop", "train", 1, 0)
    numbers, texts = store.add(ex)
    token = vlm.tokenizer.convert_tokens_to_ids
    for latents, count in ((0, texts[1].count("<|image_pad|>")), (3, 3)):
        view = reconstruction.latent_view(serializer, ex, numbers, texts, latents)
        first, last = view.inject_at[0], view.inject_at[-1]
        assert view.inject_at == tuple(range(first, first + count))
        assert view.images == numbers[:1]
        start, end = token(reconstruction.LATENT_START), token(reconstruction.LATENT_END)
        assert view.ids[first - 1] == view.labels[first - 1] == start
        assert view.ids[last + 1] == end and view.labels[last + 1] == -100
        assert all(view.labels[position] == -100 for position in view.inject_at)
        said = vlm.tokenizer.decode([label for label in view.labels if label != -100])
        assert said == ex.texts[0] + reconstruction.LATENT_START + ex.texts[1] + "<|im_end|>"


def test_views_refuse_what_they_cannot_serialise(serialised):
    vlm, serializer, store = serialised
    ex = scenes.make_example("crop", "train", 0, 0)
    place = store.add(ex)
    for marked in (replace(ex, question="hi<|im_end|>"),
                   replace(ex, options=[*ex.options, "<|im_end|>"]),
                   replace(ex, trajectory=["<|im_end|>" + ex.texts[0], *ex.trajectory[1:]])):
        with pytest.raises(ValueError, match=r"special token '<\|im_end\|>'"):
            serializer.views(marked, *place, 2, "trajectory")
    with pytest.raises(ValueError, match="without text"):
        serializer.views(replace(ex, trajectory=[]), *place, 2, "trajectory")
    with pytest.raises(ValueError, match="limit is 20 .*--max_tokens.* its images"):
        data.Serializer(vlm.family, 20).views(ex, *place, 2, "trajectory")
    with pytest.raises(ValueError, match="image 0 .*rejected.*crop or drop it"):
        store.add(replace(ex, image=Image.new("RGB", (2000, 4))))


def test_collate_pads_and_points():
    long = data.View([1, 2, 3, 4], [-100, 2, 3, 4], [7], 3, (2, 3))
    short = data.View([5, 6], [-100, 6], [8, 9], 1, (1,))
    batch = data.collate([long, short], pad_id=0)
    assert batch.ids.tolist() == [[1, 2, 3, 4], [5, 6, 0, 0]]
    assert batch.labels.tolist()[1] == [-100, 6, -100, -100]
    assert batch.mask.tolist()[1] == [True, True, False, False]
    assert batch.inject_at.tolist() == [[False, False, True, True], [False, True, False, False]]
    assert batch.embed_at.tolist() == [3, 1] and batch.images == [7, 8, 9]
    left = data.collate([long, short], pad_id=0, left=True)
    assert left.ids.tolist()[1] == [0, 0, 5, 6] and left.embed_at.tolist() == [3, 3]
    assert left.mask.tolist()[1] == [False, False, True, True]
    assert left.inject_at.tolist()[1] == [False, False, False, True]


def test_command_line_writes_a_folder_that_reads_back(tmp_path, as_program):
    out = tmp_path / "set"
    as_program(data.__file__, "--out", out, "--regime", "all", "--count", 8)
    assert Image.open(out / "contact_sheet.png").width > 1000
    splits = [ex.split for ex in records.read_folder(out)]
    assert {split: splits.count(split) for split in splits} == dict(train=8, validation=2, test=2)
    with pytest.raises(SystemExit, match="error: .*nothing is overwritten"):  # no traceback
        as_program(data.__file__, "--out", out, "--regime", "all", "--count", 8)
