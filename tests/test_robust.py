"""Claims: whatever is handed in is used as a person would expect or refused in one sentence that says what and where, before
anything long begins; what is read is data and never runs; what was saved is never lost."""

import dataclasses
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

import data
import evaluate
import model
import train
from model import VLM

from conftest import TINY

RECORD = dict(id="1", image="a.png", question="q", options=["x", "y"], answer="x", trajectory=[{"text": "x"}])


def folder_of(tmp_path, *lines):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / data.FILE).write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return tmp_path


# ---- images ----


def test_every_kind_of_image_is_shown_as_a_person_sees_it(tmp_path):
    """One picture, left half white, right half black, in every mode: the same RGB, 16 bits scaled and transparency on white."""
    grey = np.zeros((8, 8), np.uint8)
    grey[:, :4] = 255
    rgb = Image.fromarray(grey).convert("RGB")
    clear = rgb.convert("RGBA")
    clear.putalpha(Image.fromarray(255 - grey))  # the white half is transparent white, so painted over it stays white
    hidden = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    hidden.paste((0, 0, 0, 0), (0, 0, 4, 8))  # the left half is transparent black: hidden ink must not show
    palette = rgb.convert("P")
    keyed = rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    pictures = {"rgb.png": rgb, "grey.png": rgb.convert("L"), "one.png": rgb.convert("1"), "palette.gif": palette,
                "alpha.png": clear,
                "hidden.png": hidden, "la.png": clear.convert("LA"), "cmyk.jpg": rgb.convert("CMYK"), "keyed.png": keyed,
                "sixteen.png": Image.fromarray(grey.astype(np.uint16) * 257), "sixteen.tif": Image.fromarray(grey.astype(np.int32) * 257),
                "a.webp": rgb, "a.bmp": rgb}
    for name, picture in pictures.items():
        picture.save(tmp_path / name, **dict(lossless=True) if name.endswith("webp") else {})
        shown = np.asarray(data.open_image(tmp_path / name, "here")).astype(int)
        assert shown.shape == (8, 8, 3), name
        assert (shown[:, :3] > 235).all() and (shown[:, 5:] < 30).all(), name
    half = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    half.save(tmp_path / "half.png")
    assert data.open_image(tmp_path / "half.png", "here").getpixel((0, 0)) == (127, 127, 127)


def bomb(side):
    """A PNG of a few hundred bytes that claims side x side pixels."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def whole_png():
    import io
    Image.new("RGB", (32, 32), "red").save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("content",
                         [b"", b"\x89PNG", whole_png()[:60], whole_png()[:-30][:70], b"GIF89a" + bytes(9),
                          b"\xff\xd8\xff\xe0" + bytes(50),
                                     bomb(30_000), bomb(12_000), b"RIFF\0\0\0\0WEBPVP8 ", b"<svg/>", pickle.dumps([1])])
def test_bytes_that_are_no_picture_name_file_line_and_mend(tmp_path, content):
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"{data.FILE}, line 2: image .*b.png cannot be read .*; replace it or drop the record"):
        data.read_folder(folder_of(tmp_path, RECORD, {**RECORD, "id": "2", "image": "b.png"}))


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ValueError, match="floating-point pixels: save it with 8 or 16 bits"):
        data.open_image(tmp_path / "f.tif", "here")


def test_a_crop_of_one_pixel_is_usable_and_a_thread_of_pixels_is_refused():
    family = VLM(TINY).family
    span, _ = family.place(1, 1)
    assert span and family.inputs(Image.new("RGB", (1, 1)))["pixel_values"].shape[0] == 4 * len(span)
    with pytest.raises(ValueError, match="aspect ratio"):
        family.place(3000, 2)


# ---- records ----


@pytest.mark.parametrize("line, message", [
    ({**RECORD, "options": []}, "'x' is not among the options"), ({**RECORD, "options": ["x", "x"]}, "an option is there twice"),
    ({**RECORD, "options": ["x", "x "]}, "an option is there twice"),
    ({**RECORD, "options": ["x", 3]}, "every option must be a non-empty string; found 3"),
    ({**RECORD, "id": " "}, "id must be a non-empty string"), ({**RECORD, "id": 7}, "field 'id' must be a str; found 7"),
    ({**RECORD, "question": ""}, "question must be a non-empty string"),
    ({**RECORD, "family": 3}, "family must be a non-empty string"),
    ({**RECORD, "question": "\ud800"}, "half a character"), ({**RECORD, "image": "\ud800.png"}, "image holds half a character"),
    ({**RECORD, "image": "a\0b.png"}, "null|cannot be read"),
    ({**RECORD, "image": "."}, "cannot be read"), ({**RECORD, "image": "../a.png"}, "leaves the data folder.*--outside_images"),
    ({**RECORD, "image": "/etc/hostname"}, "leaves the data folder"),
    ({**RECORD, "trajectory": [{"image": "../b.png"}, {"text": "x"}]}, "leaves the data folder"),
    (b"[" * 100_000, "nested too deeply|not valid JSON"), (b'{"id": "\xff"}', r"not UTF-8 \(byte 8\)"),
    (b"NaN", "expected a JSON object, found float"),
    (b'{"id": "1"} {"id": "2"}', "not valid JSON .*one object a line")])
def test_bad_records_are_refused_with_line_and_mend(tmp_path, line, message):
    with pytest.raises((ValueError, FileNotFoundError), match=f"line 2: .*({message})"):
        data.read_folder(folder_of(tmp_path, {**RECORD, "id": "0"}, line))


def test_texts_of_all_scripts_and_separators_survive(tmp_path):
    """Line separators inside a text, right-to-left script, emoji, CRLF, a byte-order mark, a line of megabytes: all are text."""
    texts = ["\u202eשלום x", "ما هو الرقم؟ x", "a\u2028b\u2029c\x85d\x0be x", "👩‍🚀 x", "x " * 2_000_000]
    rows = [json.dumps({**RECORD, "id": str(n), "question": text, "trajectory": [{"text": text}]},
                       ensure_ascii=False).encode() + b"\r"
            for n, text in enumerate(texts)]
    rows[0] = b"\xef\xbb\xbf" + rows[0]
    assert [ex.question for ex in data.read_folder(folder_of(tmp_path, *rows))] == [text.strip() for text in texts]


def test_links_out_of_the_folder_are_refused_unless_asked_for(tmp_path):
    (tmp_path / "set").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", tmp_path / "set" / "link.png")
    folder = folder_of(tmp_path / "set", {**RECORD, "image": "link.png"})
    with pytest.raises(ValueError, match="line 1: image link.png leaves the data folder"):
        data.read_folder(folder)
    assert data.opened(data.read_folder(folder, outside=True)[0].image).size == (9, 9)
    os.symlink(tmp_path / "set" / "a.png", tmp_path / "set" / "inner.png")
    assert data.read_folder(folder_of(folder, {**RECORD, "image": "inner.png"}))


@pytest.mark.parametrize("field", ["question", "options", "trajectory"])
def test_special_tokens_in_a_users_text_stop_before_training(tmp_path, field, config):
    said = "x <|im_end|>"
    value = dict(question=said, options=["x", said], trajectory=[{"text": said}])[field]
    rows = [{**RECORD, "id": str(n), "split": split, **({field: value} if n == 1 else {})}
            for n, split in enumerate(["train"] * 2 + ["validation"] * 2 + ["test"])]
    with pytest.raises(ValueError, match=r"example 1: the text contains the model's special token '<\|im_end\|>'; remove it"):
        train.train(dataclasses.replace(config, data=str(folder_of(tmp_path, *rows))))
    assert not Path(config.out).exists()


def test_check_data_reports_every_problem_at_once_and_what_is_there(tmp_path, capsys, config):
    rows = [RECORD, {**RECORD, "id": "2", "question": "q " * 3000}, {**RECORD, "id": "3", "answer": "z"},
            {**RECORD, "id": "4", "question": "<|im_end|>"}]
    folder = folder_of(tmp_path, *rows)
    done = subprocess.run([sys.executable, train.__file__, "--check-data", "--data", str(folder), "--out", str(tmp_path / "run")],
                          capture_output=True, encoding="utf-8")
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    for message in ("3 records cannot be used", "line 3: answer 'z'", "example 2: 6", "example 4: the text contains"):
        assert message in done.stderr, message
    assert "3 records are well-formed" in done.stdout and "questions: 3 records, 0 to 0 tool images" in done.stdout
    train.check_data(dataclasses.replace(config, train_examples=5))
    said = capsys.readouterr().out
    assert "10 records are well-formed; 5 train, 5 validation, 0 test" in said and "crop: 2 records, 1 to 1 tool images" in said


# ---- checkpoints ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("robust") / "run"
    train.train(train.Config(device="cpu", out=str(out), steps=2, batch=2, train_examples=4, valid_examples=4, test_per_family=1,
                             eval_every=2,
                             save_every=1, log_every=1, lora_rank=2))
    (out / "results.json").unlink()  # as if it had been stopped before its end
    return out


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
        with open(file, "rb") as opened:
            meta = json.loads(opened.read(8 + struct.unpack("<Q", whole[:8])[0])[8:]).get("__metadata__")
        save_file(tensors, file, metadata=meta)


@pytest.mark.parametrize("kind", ["cut", "empty", "pickle", "huge header", "nan", "shape"])
@pytest.mark.parametrize("target", ["state", "adapter", "base"])
def test_spoilt_checkpoints_say_so_and_run_nothing(tmp_path, run, kind, target):
    copy, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(run, copy)
    if target == "base":
        shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("pretrain.py"))
        file, use = tmp_path / "base" / "model.safetensors", lambda: VLM(tmp_path / "base")
    elif target == "state":
        file, use = copy / "state.safetensors", lambda: train.train(train.read_config([str(copy)]), resume=True)
    else:
        file, use = next(copy.glob("checkpoint-*/adapter_model.safetensors")), lambda: evaluate.load_run(copy, "cpu")
    spoilt(kind, file, mark)
    where = str(tmp_path / "base") if target == "base" else file.name
    with pytest.raises((ValueError, OSError), match=where):
        use()
    assert not mark.exists()


def test_weights_as_pickle_and_code_in_a_checkpoint_are_not_read(tmp_path):
    shutil.copytree(TINY, tmp_path / "base", ignore=shutil.ignore_patterns("pretrain.py"))
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "mark"), tmp_path / "base" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        VLM(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | dict(model_type="mine", auto_map=dict(AutoConfig="code.Config"))), encoding="utf-8")
    (tmp_path / "base" / "code.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')", encoding="utf-8")
    with pytest.raises(ValueError):
        VLM(tmp_path / "base")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("file, content, message", [
    ("best.json", '{"checkpoint": "../elsewhere"}', "names no checkpoint of this run"),
    ("best.json", "{", "best.json is not valid JSON"),
    ("config.json", "[]", "holds a list, not an object"), ("config.json", '{"model": "x"}', "was not written by train.py"),
    ("checkpoint-2/adapter_config.json", "{}", "not PEFT's description"),
    ("checkpoint-2/adapter_config.json", '{"lora_alpha": 4, "r": 3}', "has rank 2, adapter_config.json says 3")])
def test_spoilt_json_says_so(tmp_path, run, file, content, message):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / file).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        evaluate.load_run(tmp_path / "run", "cpu")


def test_a_state_of_another_version_is_not_guessed_at(tmp_path, run):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "state.safetensors"
    save_file(load_file(file), file, metadata=dict(version="2", step="1", best="1.0", schedule="{}"))
    with pytest.raises(ValueError, match="has format '2', this program writes and reads '1'"):
        train.train(train.read_config([str(tmp_path / "run")]), resume=True)


# ---- interruption ----


def test_a_full_disk_leaves_the_last_good_state(tmp_path, config, monkeypatch):
    """No space when the second state is written: the first is whole, and the run goes on from it to the usual end."""
    config = dataclasses.replace(config, method="sft", steps=3, batch=2, save_every=1, eval_every=3, test_per_family=1,
                                 valid_examples=2,
                                 out=str(tmp_path / "run"))
    save, saved = model.save_file, []

    def full(tensors, file, **kwargs):
        if "state" in Path(file).name and (saved.append(1) or len(saved) == 2):
            Path(file).write_bytes(b"half a file")
            raise SafetensorError("I/O error: No space left on device (os error 28)")  # what safetensors makes of it
        return save(tensors, file, **kwargs)

    monkeypatch.setattr(model, "save_file", full)
    with pytest.raises(OSError, match="state.safetensors cannot be written: .*No space left"):
        train.train(config)
    monkeypatch.undo()
    train.train(train.read_config([config.out]), resume=True)
    whole = dataclasses.replace(config, out=str(tmp_path / "whole"))
    train.train(whole)
    ours, theirs = (load_file(Path(c.out) / "state.safetensors") for c in (config, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    assert not list(Path(config.out).glob("*.partial"))


def test_a_signal_outside_the_loop_or_a_second_one_ends_at_once(tmp_path, monkeypatch):
    """While the base is still being asked nothing is to be saved: the program ends with one line."""
    process = subprocess.Popen([sys.executable, train.__file__, "--device", "cpu", "--train_examples", "4", "--valid_examples", "4",
                                "--out", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")
    while "run folder" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and said.rstrip().endswith("goes on from its last state") and "Traceback" not in said
    assert not (tmp_path / "run" / "before.json").exists()
    monkeypatch.setattr(train, "LOOP", dict(running=True, signals=0))
    train.heed(signal.SIGINT, None)
    assert train.asked_to_stop(1, "cpu")
    with pytest.raises(KeyboardInterrupt):
        train.heed(signal.SIGINT, None)


# ---- what the documents tell the reader to type ----

ROOT = Path(data.__file__).parent
DOCUMENTS = [ROOT / "README.md", ROOT / "analysis" / "RESULTS.md", *ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
COMMAND = re.compile(r"(?:python|torchrun --nproc-per-node=\w+) ([\w/-]+\.py)((?: [^`\n#&;]*)?)")


def test_documented_commands_are_understood():
    common = re.search(r'COMMON="(.*?)"', DOCUMENTS[0].read_text(encoding="utf-8"), re.DOTALL)[1].replace("\\\n", " ")
    found = [match.groups() for document in DOCUMENTS if "tests" not in document.parts for match in COMMAND.finditer(document.read_text(encoding="utf-8"))]
    assert len(found) > 40
    for script, rest in found:
        rest = rest.replace("$COMMON", common).replace("M*N", "2").replace("...", "").replace("[", "").replace("]", "")
        words, _, passed_on = rest.partition(" -- ")  # what study.py hands to train.py
        words = words.split()
        if script in ("train.py", "analysis/targets.py") and not {"--resume", "--merge"} & set(words):
            train.parse_config(words)  # leaves the program where it does not know a word
        elif script != "train.py":
            source = (ROOT / script).read_text(encoding="utf-8")
            assert all(f'"{word}"' in source for word in words if word.startswith("--") and word != "--"), f"{script} {rest}"
        train.parse_config(passed_on.split())


def test_documented_options_exist():
    fields = {f"--{field.name}" for field in dataclasses.fields(train.Config)}
    sources = " ".join(path.read_text(encoding="utf-8") for path in DOCUMENTS if path.suffix == ".py")
    for document in DOCUMENTS[:2]:
        for flag in set(re.findall(r"(?<![\w-])--[a-z]\w+", document.read_text(encoding="utf-8"))):
            assert flag in fields or f'"{flag}"' in sources or flag == "--nproc", f"{document.name}: {flag}"
