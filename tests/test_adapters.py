"""Claims: what --model may name is loaded or refused in one sentence; an adapter changes what PEFT
would change; a merged checkpoint is the base's own files beside other weights."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import train
from checkpoints import build, write
from conftest import TINY, merged_weights, refuses
from model import VLM
from support.adapters import Adapter, merge, read_adapter, resolve, save_merged
from support.families import load_checkpoint, load_family
from support.files import read_json

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def base(folders):
    return folders("qwen2_5_vl")


def prepare(folder, base, dtype=torch.float32, std=0.1, vision=False, rank=4):
    """A model away from its start, saved in `folder`."""
    vlm = VLM(base, dtype)
    vlm.set_trainable(train.Config(lora_rank=rank, train_vision=vision, device="cpu"))
    torch.manual_seed(1)
    for name, p in vlm.lm.named_parameters():
        if "lora_B" in name or p.requires_grad and not rank:
            torch.nn.init.normal_(p, std=std)
    folder.mkdir(parents=True, exist_ok=True)
    vlm.save_adapter(folder)
    return vlm.eval()


def assert_merged(folder, vlm):
    """Every weight is the trained model's, with W + (alpha / r) B A in LoRA's places."""
    lm, family = load_checkpoint(str(folder), vlm.lm.dtype)
    torch.testing.assert_close(dict(lm.state_dict()), merged_weights(vlm))
    return family


@torch.no_grad()
def logits(lm):
    return lm(input_ids=torch.arange(10, 60)[None]).logits.float()


@pytest.mark.parametrize("name, old, new", [
    ("qwen2_5_vl", "model.layers.1.", "model.language_model.layers.1."),
    ("qwen2_5_vl", "visual.blocks.", "model.visual.blocks."),
    ("llava_next", "language_model.model.layers.1.", "model.language_model.layers.1."),
    ("llava_next", "vision_tower.vision_model.encoder.", "model.vision_tower.encoder.")])
def test_an_adapter_by_the_names_of_an_older_transformers(folders, tmp_path, name, old, new):
    vlm = prepare(tmp_path, folders(name), torch.float64, vision=True)
    named = {key.replace(f"base_model.model.{new}", f"base_model.model.{old}"): tensor
             for key, tensor in load_file(tmp_path / ADAPTER).items()}
    assert sum(f"model.{old}" in key for key in named) >= 2
    save_file(named, tmp_path / ADAPTER)
    assert_merged(tmp_path, vlm)


@pytest.mark.parametrize("rank", [4, 0])
def test_what_is_saved_is_merged_from_anywhere(base, tmp_path, monkeypatch, rank):
    monkeypatch.chdir(base.parent)
    vlm = prepare(tmp_path, base.name, torch.float64, rank=rank)
    monkeypatch.chdir(tmp_path)
    # PEFT also writes patterns there: the tensors say which layers are meant
    for names in (["q_proj"], r".*language_model.*\.q_proj", "all-linear"):
        write(tmp_path / CONFIG, target_modules=names, rank_pattern={})
        assert_merged(tmp_path, vlm)


def test_the_same_as_peft_itself(base, tmp_path):
    peft = pytest.importorskip("peft")
    lm, _ = load_checkpoint(str(base), torch.float64)
    wrapped = peft.get_peft_model(lm, peft.LoraConfig(r=3, lora_alpha=7, target_modules=["v_proj"]))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    wrapped.save_pretrained(tmp_path)
    write(tmp_path / CONFIG, base_model_name_or_path=str(base))
    ours = load_checkpoint(str(tmp_path), torch.float64)[0].state_dict()
    torch.testing.assert_close(dict(ours), dict(wrapped.merge_and_unload().state_dict()))


X = "base_model.model.x.lora_{}.weight".format


@pytest.mark.parametrize("config, tensors, message", [
    *[({field: value}, {}, f"sets {field} to {value}, which is not supported: merge that adapter")
      for field, value in dict(use_rslora=True, use_dora=True, modules_to_save="lm_head",
                               rank_pattern="q", alpha_pattern="q", peft_type="IA3",
                               init_lora_weights="pissa", fan_in_fan_out=True).items()],
    (dict(r=0), {}, "of r = 0 in adapter_config"),
    (dict(r=8), {}, "'A': .4, 48., .* of r = 8 in adapter_config.json and .32, 48. in .*: it is f"),
    ({}, {"base_model.model.x.lora_magnitude_vector": torch.ones(32)}, "which is no low-rank pair"),
    ({}, {X("A"): torch.ones(4, 32)}, "has {'A': .4, 32.} for x"),
    ({}, {X("A"): torch.ones(4, 32), X("B"): torch.ones(32, 4)}, "x.weight, .* and .0, 0"),
    *[({}, content, "adapter_model.safetensors is not a whole safetens")
      for content in (b"", b"cos\nsystem\n(S'touch mark'\ntR.", b"cut")]])
def test_other_and_damaged_adapters_are_refused(base, tmp_path, monkeypatch, config, tensors,
                                                message):
    monkeypatch.chdir(tmp_path)
    file, _ = tmp_path / ADAPTER, prepare(tmp_path, base)
    write(tmp_path / CONFIG, **config)
    if isinstance(tensors, dict):
        save_file(load_file(file) | tensors, file)
    else:
        file.write_bytes(file.read_bytes()[:-1] if tensors == b"cut" else tensors)
    refuses(tmp_path, message)
    assert not Path("mark").exists()  # nothing of it runs


def test_what_model_may_name(base, tmp_path, monkeypatch):
    run, later = tmp_path / "run", tmp_path / "later"
    models = []
    for folder, start in ((run, base), (later, run)):  # the second is trained on from the first
        models.append(prepare(folder / "checkpoint-20", start, torch.float64))
        write(folder / "best.json", checkpoint="checkpoint-20")
        write(folder / "config.json", min_pixels=900, max_pixels=2048)
    monkeypatch.chdir(tmp_path)
    for named in (run, run / "checkpoint-20", "run", "./run", "run/checkpoint-20"):
        assert resolve(str(named))[0] == str(base)
    assert resolve(str(later)) == (str(base), [run / "checkpoint-20", later / "checkpoint-20"])
    for name, model in zip(("run", "later"), models):
        assert assert_merged(name, model).path == str(base)
    assert resolve("Qwen/Qwen2.5-VL-3B-Instruct") == ("Qwen/Qwen2.5-VL-3B-Instruct", [])
    # a run brings its size of images
    for options, area in (((), (900, 2048)), ((1000, 4000), (1000, 4000))):
        size = load_family("run", *options).processor.image_processor.size
        assert (size.shortest_edge, size.longest_edge) == area


SEEN = "seen from .*, cannot be loaded"


@pytest.mark.parametrize("named, file, fields, message", [
    *[(name, "", {}, f"^{re.escape(name)}, {SEEN}")
      for name in ("./nothing", "/nothing/there", "Some/Model", "a b//c?")],
    ("empty", "notes.json", {}, "in its config.json"),
    ("outside", "best.json", dict(checkpoint="../a/checkpoint-2"), "^outside/checkpoint-2 .the ba"),
    ("typeless", "config.json", dict(hidden_size=3), "Unrecognized model"),
    ("newer", "config.json", dict(model_type="qwen9_vl"), "has model type `qwen9_vl` but Tran"),
    ("words", "config.json", dict(model_type="qwen2"), "configuration class .*Qwen2Config"),
    ("circle", CONFIG, dict(base_model_name_or_path="circle"), "names 'circle' as its base model;"),
    ("nameless", CONFIG, dict(base_model_name_or_path=""), "names '' as its base model; correct"),
    ("astray", CONFIG, dict(base_model_name_or_path="runs/tiny"),
     f"^runs/tiny .the base of astray., {SEEN}")])
def test_what_model_may_not_name(tmp_path, monkeypatch, named, file, fields, message):
    monkeypatch.chdir(tmp_path)
    if file:
        (tmp_path / named).mkdir()
        write(tmp_path / named / file, **fields)
    refuses(named, message)


def test_a_merge_is_rounded_once():
    lm = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False)).to(torch.bfloat16)
    lm[0].weight.data[:] = 1 + 2 ** -7  # bfloat16's step here
    pair = dict(A=torch.tensor([[2 ** -7]]), B=torch.tensor([[1.501]]))
    share = merge(lm, Adapter(1.0, {"0.weight": pair}, {}))
    assert lm[0].weight.item() == 1 + 3 * 2 ** -7
    assert share == pytest.approx(1 - 0.499 / 1.501, 1e-4)


def test_small_changes_beside_bfloat16_weights(tmp_path):
    """Kept where A and B stay beside the weights, and in float32; lost in a merge into bfloat16."""
    vlm, again = prepare(tmp_path, TINY, torch.bfloat16, 2e-5, rank=64), VLM(TINY, torch.bfloat16)
    again.load_adapter(tmp_path)
    added = [p for name, p in again.lm.named_parameters() if "lora_" in name]
    assert added and all(p.dtype == torch.float32 for p in added)
    # in float32, so that only the weights are rounded
    assert torch.equal(logits(again.lm.float()), logits(vlm.lm.float()))
    for dtype, least, most in ((torch.bfloat16, 0, 0.3), (torch.float32, 0.999, 1)):
        lm = VLM(TINY, torch.bfloat16).lm
        assert least <= merge(lm, read_adapter(tmp_path, lm, TINY), dtype) <= most


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_new", "llava", "gemma3", "idefics3"])
def test_a_merged_checkpoint_is_the_bases_files_and_other_weights(tmp_path, name, capsys):
    """Its config.json too, by the names that transformers 4 and servers read."""
    base, out = build(name, tmp_path / "base"), tmp_path / "merged"
    if name.startswith("qwen"):
        text = read_json(base / "config.json")["text_config"]
        rope = text.pop("rope_parameters")
        text |= dict(rope_theta=rope.pop("rope_theta"), rope_scaling=dict(rope, type="mrope"))
        write(base / "config.json", text_config=text)
    if name == "qwen3_vl_new":  # beside chat_template.json transformers allows no such folder
        (base / "chat_templates").mkdir()
        write(base / "chat_templates" / "tools.jinja")
    for extra in ("merges.txt", "tokenizer.model", "model.safetensors.index.json"):
        write(base / extra)
    if name == "idefics3":
        (base / "generation_config.json").unlink()
    vlm = prepare(tmp_path, base)
    assert save_merged(VLM(base), tmp_path, out) > 0.999
    before, after = ({file.relative_to(folder).as_posix(): file.read_bytes() for file in
                      folder.rglob("*") if file.is_file()} for folder in (base, out))
    del before["model.safetensors.index.json"]
    one, other = (load(files.pop("model.safetensors")) for files in (before, after))
    assert before == after and one.keys() == other.keys()
    assert "mm_token_type_ids" in capsys.readouterr().out
    assert_merged(out, vlm)
    for dtype in (torch.float32, torch.bfloat16):
        plain = VLM(base, dtype)
        save_merged(plain, tmp_path, tmp_path / str(dtype), dtype)
        lm = AutoModelForImageTextToText.from_pretrained(tmp_path / str(dtype))
        assert lm.dtype == dtype and torch.equal(logits(lm), logits(plain.lm))
    if not name.startswith("qwen"):
        AutoProcessor.from_pretrained(out)
    with pytest.raises(FileExistsError, match="merged exists already"):
        save_merged(VLM(base), tmp_path, out)
    assert not [*tmp_path.glob("*.partial")]


@pytest.mark.parametrize("name, tied", [
    ("tiny", True), ("qwen2_5_vl", False), ("qwen3_vl_new", False)])
def test_full_fine_tuning_and_the_size_of_images(folders, tmp_path, name, tied):
    """Tied embeddings stay tied; --min_pixels and --max_pixels become the processor's."""
    base, out = folders(name), tmp_path / "merged"
    vlm, plain = prepare(tmp_path, base, rank=0), VLM(base, min_pixels=900, max_pixels=2048)
    save_merged(plain, tmp_path, out)
    family = assert_merged(out, vlm)
    assert (family.lm.lm_head.weight is family.lm.get_input_embeddings().weight) == tied
    size = family.processor.image_processor.size
    assert (size.shortest_edge, size.longest_edge) == (900, 2048)
    assert family.image_text(500, 300) == plain.family.image_text(500, 300)


def test_a_model_of_the_hubs_cache_needs_no_network(base, tmp_path, monkeypatch):
    """Loaded, and merged, by its name alone."""
    stored, commit = tmp_path / "hub" / "models--some--tiny", "0123456789" * 4
    shutil.copytree(base, stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit, encoding="utf-8")
    # what the variables of these names set when the package is first imported
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    prepare(tmp_path, "some/tiny")
    save_merged(VLM("some/tiny"), tmp_path, tmp_path / "merged")
    for name in ("config.json", "chat_template.json", "video_preprocessor_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == Path(base, name).read_bytes()
