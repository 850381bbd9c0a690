"""Claims: whatever is handed in is used as a person would expect or refused in one sentence, which
says what and where, before anything long begins; what is read is data and never runs; what was
saved is never lost, and a run goes on only as what it began as."""

import dataclasses
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import evaluate
import train
from model import VLM
from support import files, records, run_folder
from support.files import read_json, write_json
from support.images import open_image, opened
from support.options import TINY, Config
from support.processes import run_program
from support.records import read_folder
from world.loader import load_examples

from test_run_folder import NO_UTF8, forked

ROOT = Path(train.__file__).resolve().parent
RECORD = dict(id="1", image="a.png", question="q", options=["x", "y"], answer="x",
              trajectory=[{"text": "x"}])


def folder_of(folder, *lines):
    """A data folder of these records, or lines of bytes, about one picture."""
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / records.FILE).write_bytes(b"\n".join(lines))
    return folder


def five(**fields):
    """Records of all three splits; fields: of the second one."""
    splits = ["train"] * 2 + ["validation"] * 2 + ["test"]
    return [{**RECORD, "id": str(n), "split": split, **(fields if n == 1 else {})}
            for n, split in enumerate(splits)]


# ---- images ----


def test_every_kind_of_image_is_shown_as_a_person_sees_it(tmp_path):
    """One picture, left half white, right half black, in every mode: the same RGB, 16 bits scaled
    and transparency on white."""
    grey = np.zeros((8, 8), np.uint8)
    grey[:, :4] = 255
    rgb = Image.fromarray(grey).convert("RGB")
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.fromarray(255 - grey))  # the white half is clear, and painted over white
    hidden = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    hidden.paste((0, 0, 0, 0), (0, 0, 4, 8))  # the left half is clear black: it must not show
    keyed = rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    pictures = {"rgb.png": rgb, "grey.png": rgb.convert("L"), "one.png": rgb.convert("1"),
                "palette.gif": rgb.convert("P"), "alpha.png": clear, "hidden.png": hidden,
                "la.png": clear.convert("LA"), "cmyk.jpg": rgb.convert("CMYK"), "keyed.png": keyed,
                "sixteen.png": Image.fromarray(grey.astype(np.uint16) * 257),
                "sixteen.tif": Image.fromarray(grey.astype(np.int32) * 257),
                "a.webp": rgb, "a.bmp": rgb}
    for name, picture in pictures.items():
        picture.save(tmp_path / name, **dict(lossless=True) if name.endswith("webp") else {})
        shown = np.asarray(open_image(tmp_path / name, "here")).astype(int)
        assert shown.shape == (8, 8, 3), name
        assert (shown[:, :3] > 235).all() and (shown[:, 5:] < 30).all(), name
    half = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    half.save(tmp_path / "half.png")
    assert open_image(tmp_path / "half.png", "here").getpixel((0, 0)) == (127, 127, 127)


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bomb(side):
    """A PNG of a few hundred bytes that claims side x side pixels."""
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return (b"\x89PNG\r\n\x1a\n" + head + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000))
            + png_chunk(b"IEND", b""))


def whole_png():
    Image.new("RGB", (32, 32), "red").save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("content", [
    b"", b"\x89PNG", whole_png()[:60], whole_png()[:-30][:70], b"GIF89a" + bytes(9),
    b"\xff\xd8\xff\xe0" + bytes(50), bomb(30_000), bomb(12_000), b"RIFF\0\0\0\0WEBPVP8 ",
    b"<svg/>", pickle.dumps([1])])
def test_bytes_that_are_no_picture_name_file_line_and_mend(tmp_path, content):
    (tmp_path / "b.png").write_bytes(content)
    said = f"{records.FILE}, line 2: image .*b.png cannot be read .*; replace it or drop the record"
    with pytest.raises(ValueError, match=said):
        read_folder(folder_of(tmp_path, RECORD, {**RECORD, "id": "2", "image": "b.png"}))


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="floating-point pixels: save it with 8 or 16 bits"):
        open_image(tmp_path / "f.tif", "here")


def test_a_crop_of_one_pixel_is_usable_and_a_thread_of_pixels_is_refused():
    family = VLM(TINY).family
    text, _ = family.image_text(1, 1)
    patches = family.inputs(Image.new("RGB", (1, 1)))["pixel_values"].shape[0]
    assert text == family.placeholder * (patches // 4) != ""
    with pytest.raises(ValueError, match="aspect ratio"):
        family.image_text(3000, 2)


# ---- records ----


@pytest.mark.parametrize("line, message", [
    ({"options": []}, "'x' is not among the options"),
    ({"options": ["x", "x"]}, "an option is there twice"),
    ({"options": ["x", "x "]}, "an option is there twice"),
    ({"options": ["x", 3]}, "every option must be a non-empty string; found 3"),
    ({"id": " "}, "id must be a non-empty string"),
    ({"id": 7}, "field 'id' must be a str; found 7"),
    ({"question": ""}, "question must be a non-empty string"),
    ({"family": 3}, "task must be a non-empty string"),
    ({"question": "\ud800"}, "question is not valid Unicode text"),
    ({"image": "\ud800.png"}, "image is not valid Unicode text"),
    ({"image": "a\0b.png"}, "null|cannot be read"),
    ({"image": "."}, "cannot be read"),
    ({"image": "../a.png"}, "leaves the data folder.*--outside_images"),
    ({"image": "/etc/hostname"}, "leaves the data folder"),
    ({"trajectory": [{"image": "../b.png"}, {"text": "x"}]}, "leaves the data folder"),
    (b"[" * 100_000, "nested too deeply|not valid JSON"),
    (b'{"id": "\xff"}', "not valid Unicode text; save the file as UTF-8"),
    (b"NaN", "expected a JSON object, found float"),
    (b'{"id": "1"} {"id": "2"}', "not valid JSON .*one object a line")])
def test_bad_records_are_refused_with_line_and_mend(tmp_path, line, message):
    line = line if isinstance(line, bytes) else {**RECORD, **line}
    with pytest.raises((ValueError, FileNotFoundError), match=f"line 2: .*({message})"):
        read_folder(folder_of(tmp_path, {**RECORD, "id": "0"}, line))


def test_texts_of_all_scripts_and_separators_survive(tmp_path):
    """Line separators inside a text, right-to-left script, emoji, CRLF, a byte-order mark, a line
    of megabytes: all are text."""
    texts = ["\u202eשלום x", "ما هو الرقم؟ x", "a\u2028b\u2029c\x85d\x0be x", "👩‍🚀 x",
             "x " * 2_000_000]
    rows = [{**RECORD, "id": str(n), "question": text, "trajectory": [{"text": text}]}
            for n, text in enumerate(texts)]
    rows = [json.dumps(row, ensure_ascii=False).encode() + b"\r" for row in rows]
    rows[0] = b"\xef\xbb\xbf" + rows[0]
    read = read_folder(folder_of(tmp_path, *rows))
    assert [example.question for example in read] == [text.strip() for text in texts]


def test_links_out_of_the_folder_are_refused_unless_asked_for(tmp_path):
    folder = folder_of(tmp_path / "set", {**RECORD, "image": "link.png"})
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    with pytest.raises(ValueError, match="line 1: image link.png leaves the data folder"):
        read_folder(folder)
    assert opened(read_folder(folder, outside=True)[0].image).size == (9, 9)
    os.symlink(folder / "a.png", folder / "inner.png")
    assert read_folder(folder_of(folder, {**RECORD, "image": "inner.png"}))


@pytest.mark.parametrize("field", ["question", "options", "trajectory"])
def test_special_tokens_in_a_users_text_stop_before_training(tmp_path, field, config):
    said = "x <|im_end|>"
    value = dict(question=said, options=["x", said], trajectory=[{"text": said}])[field]
    rows = five(**{field: value})
    with pytest.raises(ValueError, match="example 1: the text contains the model's special token "
                                         r"'<\|im_end\|>'"):
        train.train(dataclasses.replace(config, data=str(folder_of(tmp_path, *rows))))
    assert not Path(config.out).exists()


# ---- checkpoints ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder as if it had been stopped before its end."""
    out = tmp_path_factory.mktemp("robust") / "run"
    train.train(Config(device="cpu", out=str(out), steps=2, batch=2, train_examples=4,
                       valid_examples=4, test_per_family=1, eval_every=2, save_every=1, log_every=1,
                       lora_rank=2))
    (out / "results.json").unlink()
    return out


@pytest.fixture(scope="module")
def built(run):
    """What that run has in memory before its state is loaded."""
    built = train.build(Config(**read_json(run / "config.json")))
    return built.module, built.optimizer, built.schedule


def resumed(folder) -> Config:
    return run_folder.read_config(Config, [str(folder)])


class Bomb:
    """Unpickling this would leave a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def spoilt(kind, file, mark):
    whole = file.read_bytes()
    if kind == "cut":
        file.write_bytes(whole[:len(whole) // 2])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "pickle":
        file.write_bytes(pickle.dumps(Bomb(mark)))
    elif kind == "huge header":
        file.write_bytes(struct.pack("<Q", 1 << 60) + whole[8:])
    else:
        tensors = load_file(file)
        name = next(n for n, t in tensors.items() if t.is_floating_point() and t.dim() > 1)
        tensors[name] = tensors[name] * float("nan") if kind == "nan" else torch.zeros(3, 3)
        header = json.loads(whole[8:8 + struct.unpack("<Q", whole[:8])[0]])
        save_file(tensors, file, metadata=header.get("__metadata__"))


@pytest.mark.parametrize("kind", ["cut", "empty", "pickle", "huge header", "nan", "shape"])
@pytest.mark.parametrize("target", ["state", "adapter", "base"])
def test_spoilt_checkpoints_say_so_and_run_nothing(tmp_path, run, built, kind, target):
    copy, base, mark = tmp_path / "run", tmp_path / "base", tmp_path / "mark"
    shutil.copytree(TINY if target == "base" else run, base if target == "base" else copy)
    file, use = {
        "state": (copy / "state.safetensors", lambda: run_folder.load_state(copy, *built)),
        "base": (base / "model.safetensors", lambda: VLM(base)),
        "adapter": (copy / "checkpoint-2" / "adapter_model.safetensors",
                    lambda: evaluate.load_run(copy, "cpu"))}[target]
    spoilt(kind, file, mark)
    with pytest.raises((ValueError, OSError), match=str(base) if target == "base" else file.name):
        use()
    assert not mark.exists()


def test_weights_as_pickle_and_code_in_a_checkpoint_are_not_read(tmp_path):
    base, mark = tmp_path / "base", tmp_path / "mark"
    shutil.copytree(TINY, base)
    (base / "model.safetensors").unlink()
    torch.save(Bomb(mark), base / "pytorch_model.bin")
    with pytest.raises((OSError, ValueError), match="safetensors"):
        VLM(base)
    mine = dict(model_type="mine", auto_map=dict(AutoConfig="code.Config"))
    write_json(base / "config.json", read_json(base / "config.json") | mine)
    files.write_text(base / "code.py", f"open({str(mark)!r}, 'w')")
    with pytest.raises(ValueError):
        VLM(base)
    assert not mark.exists()


@pytest.mark.parametrize("file, content, message", [
    ("best.json", '{"checkpoint": "../elsewhere"}', "names no checkpoint of this run"),
    ("best.json", "{", "best.json is not valid JSON"),
    ("config.json", "[]", "holds a list, not an object"),
    ("config.json", '{"model": "x"}', "was not written by train.py"),
    ("checkpoint-2/adapter_config.json", "{}", "not PEFT's description")])
def test_spoilt_json_says_so(tmp_path, run, file, content, message):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / file).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        evaluate.load_run(tmp_path / "run", "cpu")


def test_a_state_of_another_version_is_not_guessed_at(tmp_path, run, built):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "state.safetensors"
    meta = dict(version="2", step="1", best="1.0", schedule="{}")
    save_file(load_file(file), file, metadata=meta)
    with pytest.raises(ValueError, match="has format '2', this program writes and reads '1'"):
        run_folder.load_state(tmp_path / "run", *built)


# ---- one run, one process, the same inputs ----


def test_a_folder_in_use_is_refused_before_anything_is_loaded(tmp_path, run, config, monkeypatch):
    """Two starts into one folder, two that resume one run."""
    monkeypatch.setattr(train, "load_examples", None)
    with run_folder.held(Path(config.out), resume=False):
        with pytest.raises(ValueError, match="is in use by process"):
            train.train(config)
    shutil.copytree(run, tmp_path / "copy")
    with run_folder.held(tmp_path / "copy", resume=True):
        with pytest.raises(ValueError, match="is in use by process"):
            train.train(resumed(tmp_path / "copy"), resume=True)


def test_a_run_is_not_resumed_with_other_data_or_another_base(tmp_path, config, monkeypatch):
    """Refused before a model is loaded; what was there when it began is accepted."""
    base, folder = tmp_path / "base", folder_of(tmp_path / "set", *five())
    shutil.copytree(TINY, base)
    config = dataclasses.replace(config, data=str(folder), model=str(base))
    run_folder.start_folder(config, load_examples(config))
    monkeypatch.setattr(train, "build", lambda *args: 1 / 0)

    def resume():
        train.train(resumed(config.out), resume=True)

    with pytest.raises(ZeroDivisionError):
        resume()
    folder_of(folder, *five(question="Which one?"))
    with pytest.raises(ValueError, match="record '1' of the train split: restore it"):
        resume()
    folder_of(folder, *five())
    files.write_text(base / "chat_template.jinja", "another")
    with pytest.raises(ValueError, match="chat_template.jinja of the model .*base: restore it"):
        resume()


def test_a_run_means_the_same_from_another_folder(tmp_path, config, monkeypatch):
    """--data and --out are written down absolute; a run that was moved is resumed where it is."""
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "set", *five())
    monkeypatch.setattr(train, "build", lambda config, *rest: seen.append(config) or 1 / 0)
    seen = []
    with pytest.raises(ZeroDivisionError):
        train.train(dataclasses.replace(config, data="set", out="runs/a"))
    assert (seen[0].data, seen[0].out) == (str(tmp_path / "set"), str(tmp_path / "runs" / "a"))
    assert not (tmp_path / "runs").exists()  # nothing came of it
    run_folder.start_folder(seen[0], load_examples(seen[0]))
    (tmp_path / "runs").rename(tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(ZeroDivisionError):
        train.train(resumed("../moved/a"), resume=True)
    assert seen[1].data == str(tmp_path / "set")
    assert Path(seen[1].out).samefile(tmp_path / "moved" / "a")


def test_a_run_where_the_locale_is_not_utf8(tmp_path):
    """Names and texts of all scripts, in the folder, in the run's place and on the screen."""
    rows = five(question="ما هو الرقم؟", family="цвет", image="é.png")
    folder = folder_of(tmp_path / "données", *rows)
    shutil.copy(folder / "a.png", folder / "é.png")
    out = tmp_path / "läufe" / "a"
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--method", "sft", "--device", "cpu", "--data", folder,
         "--out", out, "--steps", "1", "--batch", "2", "--lora_rank", "2"], capture_output=True,
        encoding="utf-8", env={**os.environ, **NO_UTF8})
    assert done.returncode == 0, done.stderr
    assert "donn\\udcc3\\udca9es: 2 examples" in done.stdout
    assert os.fsencode(read_json(out / "config.json")["data"]) == os.fsencode(folder)
    assert len(read_json(out / "results.json")["answers"]) == 1


# ---- interruption ----


def test_a_full_disk_leaves_the_last_good_state(tmp_path, config, monkeypatch):
    """No space when the second state is written: the first is whole, and the run goes on from it to
    the usual end."""
    config = dataclasses.replace(config, method="sft", steps=3, batch=2, save_every=1, eval_every=3,
                                 test_per_family=1, valid_examples=2)
    save, saved = files.save_file, []

    def full(tensors, file, **kwargs):
        if "state" in Path(file).name and (saved.append(1) or len(saved) == 2):
            Path(file).write_bytes(b"half a file")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return save(tensors, file, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(files, "save_file", full)
        with pytest.raises(OSError, match="state.safetensors cannot be written: .*No space left"):
            train.train(config)
    assert not list(Path(config.out).glob("*.partial"))
    train.train(resumed(config.out), resume=True)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train.train(whole)
    ours, theirs = (load_file(Path(c.out) / "state.safetensors") for c in (config, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_signal_before_the_loop_ends_the_program_and_leaves_nothing(tmp_path, monkeypatch):
    """Nothing is to be saved: one line, the signal's own status, no folder that would be in the
    way."""
    monkeypatch.setattr(train, "build", lambda *args: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(sys, "argv", ["train.py", "--train_examples", "2", "--valid_examples", "2",
                                      "--test_per_family", "1", "--out", str(tmp_path / "run")])
    child = forked(tmp_path / "said", lambda: run_program(train.main))
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGINT
    assert (tmp_path / "said").read_text(encoding="utf-8") == "stopped\n"
    assert not (tmp_path / "run").exists()


# ---- what the documents tell the reader to type ----

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")]
PROGRAMS = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"))
            if path.parent.name != "tests"]
COMMAND = re.compile(r"(?:python|torchrun --nproc-per-node=\w+) ([\w/-]+\.py)((?: [^`\n#&;]*)?)")
FIELDS = {field.name for field in dataclasses.fields(Config)}


def options_of(script: str) -> set[str]:
    """The names of its options, from its source, and train.py's where it takes them."""
    source = (ROOT / script).read_text(encoding="utf-8")
    hands_over = {"evaluate.py": "compare_runs.py", "data.py": "token_view.py"}
    if script in hands_over:
        source += (ROOT / "analysis" / hands_over[script]).read_text(encoding="utf-8")
    fields = FIELDS if "parse_config" in source or "given_options" in source else set()
    return fields | set(re.findall(r'"(?:--)?([a-z]\w+)"', source))


def test_documented_commands_are_understood():
    found = []
    for path in (*PAGES, *PROGRAMS):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")  # commands of several lines
        common = re.search(r'COMMON="(.*?)"', text)
        common = common[1] if common else ""
        found += [(path.name, script, rest.replace("$COMMON", common))
                  for script, rest in COMMAND.findall(text)]
    assert len(found) > 40
    for page, script, rest in found:
        for old, new in (("M*N", "2"), ("...", ""), ("[", ""), ("]", "")):
            rest = rest.replace(old, new)
        words, _, passed_on = rest.partition(" -- ")  # what study.py hands to train.py
        words = words.split()
        if script == "train.py" and not {"--resume", "--merge"} & set(words):
            train.parse_config(words)  # leaves the program where it does not know a word
        else:
            given = {word.split("=")[0][2:].replace("-", "_") for word in words if word[:2] == "--"}
            assert given <= options_of(script) | {""}, f"{page}: {script} {rest}"
        train.parse_config(passed_on.split())


def test_documented_options_exist():
    known = FIELDS | {"nproc", "help"}
    known |= set().union(*(options_of(str(path.relative_to(ROOT))) for path in PROGRAMS))
    for page in PAGES:
        flags = re.findall(r"(?<![\w-])--([a-z]\w+)", page.read_text(encoding="utf-8"))
        assert set(flags) <= known, f"{page.relative_to(ROOT)}: {set(flags) - known}"
