"""Claims: what --model may name is loaded or refused in one sentence; an adapter changes what PEFT
would change; a merged checkpoint is the base's own files beside other weights."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForImageTextToText

import train
from checkpoints import build, write
from conftest import TINY, merged_weights, move, refuses, stir
from model import VLM
from support.adapters import merge, resolve, save_merged
from support.families import load_checkpoint, load_family

ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def base(folders):
    return folders("qwen2_5_vl")


def prepare(folder, base, dtype=torch.float32, std=0.1, rank=4):
    """A model away from its start, saved in `folder`."""
    vlm = VLM(base, dtype)
    vlm.set_trainable(train.Config(lora_rank=rank, device="cpu"))
    stir(vlm.lm, std) if rank else move(vlm.lm)
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


@pytest.mark.parametrize("name, old", [
    ("qwen2_5_vl", "model.layers.1."), ("llava_next", "language_model.model.layers.1.")])
def test_an_adapter_by_the_names_of_an_older_transformers(folders, tmp_path, name, old):
    vlm, new = prepare(tmp_path, folders(name), torch.float64), "model.language_model.layers.1."
    named = {key.replace(f"base_model.model.{new}", f"base_model.model.{old}"): tensor
             for key, tensor in load_file(tmp_path / ADAPTER).items()}
    assert sum(f"model.{old}" in key for key in named) >= 2
    save_file(named, tmp_path / ADAPTER)
    assert_merged(tmp_path, vlm)


def test_the_same_as_peft_itself(base, tmp_path):
    peft = pytest.importorskip("peft")
    lm, _ = load_checkpoint(str(base), torch.float64)
    lora = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["v_proj"])
    wrapped = stir(peft.get_peft_model(lm, lora))
    wrapped.save_pretrained(tmp_path)
    write(tmp_path / CONFIG, base_model_name_or_path=str(base))
    ours = load_checkpoint(str(tmp_path), torch.float64)[0].state_dict()
    torch.testing.assert_close(dict(ours), dict(wrapped.merge_and_unload().state_dict()))


@pytest.mark.parametrize("config, tensors, message", [
    *[({field: value}, {}, f"sets {field} to {value}, which is not supported: merge that adapter")
      for field, value in dict(use_rslora=True, use_dora=True, modules_to_save="lm_head",
                               rank_pattern="q", alpha_pattern="q", peft_type="IA3",
                               init_lora_weights="pissa", fan_in_fan_out=True).items()],
    (dict(r=8), {}, "'A': .4, 48., .* of r = 8 in adapter_config.json and .32, 48. in .*: it is f"),
    ({}, {"base_model.model.x.lora_magnitude_vector": torch.ones(32)}, "which is no low-rank pair"),
    ({}, {"base_model.model.x.lora_A.weight": torch.ones(4, 32)}, "has {'A': .4, 32.} for x")])
def test_other_adapters_are_refused(base, tmp_path, config, tensors, message):
    prepare(tmp_path, base)
    write(tmp_path / CONFIG, **config)
    save_file(load_file(tmp_path / ADAPTER) | tensors, tmp_path / ADAPTER)
    refuses(tmp_path, message)


def test_what_model_may_name(base, tmp_path, monkeypatch):
    """A run, with its size of images, and one that was trained on from it; from any folder."""
    run, later, models = tmp_path / "run", tmp_path / "later", []
    monkeypatch.chdir(base.parent)
    for folder, start in ((run, base.name), (later, run)):
        models.append(prepare(folder / "checkpoint-20", start, torch.float64))
        # PEFT also writes patterns there: the tensors say which layers are meant
        write(folder / "checkpoint-20" / CONFIG, target_modules="all-linear", rank_pattern={})
        write(folder / "best.json", checkpoint="checkpoint-20")
        write(folder / "config.json", min_pixels=900, max_pixels=2048)
    monkeypatch.chdir(tmp_path)
    assert resolve(str(later)) == (str(base), [run / "checkpoint-20", later / "checkpoint-20"])
    for name, model in zip(("run", "later"), models):
        assert assert_merged(name, model).path == str(base)
    for options, area in (((), (900, 2048)), ((1000, 4000), (1000, 4000))):
        size = load_family("run", *options).processor.image_processor.size
        assert (size.shortest_edge, size.longest_edge) == area


@pytest.mark.parametrize("named, file, fields, message", [
    ("outside", "best.json", dict(checkpoint="../a/checkpoint-2"), "^outside/checkpoint-2 .the ba"),
    ("words", "config.json", dict(model_type="qwen2"), "configuration class .*Qwen2Config"),
    ("circle", CONFIG, dict(base_model_name_or_path="circle"), "names 'circle' as its base model;"),
    ("nameless", CONFIG, dict(base_model_name_or_path=""), "names '' as its base model; correct")])
def test_what_model_may_not_name(tmp_path, monkeypatch, named, file, fields, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / named).mkdir()
    write(tmp_path / named / file, **fields)
    refuses(named, message)


def test_a_merge_is_rounded_once():
    """A merge into float32 keeps all of a change."""
    lm = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False)).to(torch.bfloat16)
    lm[0].weight.data[:] = 1 + 2 ** -7  # bfloat16's step here
    pair = dict(A=torch.tensor([[2 ** -7]]), B=torch.tensor([[1.501]]))
    share = merge(lm, 1.0, {"0.weight": pair})
    assert lm[0].weight.item() == 1 + 3 * 2 ** -7
    assert share == pytest.approx(1 - 0.499 / 1.501, 1e-4)
    assert merge(lm, 1.0, {"0.weight": pair}, torch.float32) > 0.999


def test_a_saved_adapter_stays_beside_bfloat16_weights_and_in_float32(tmp_path):
    vlm, again = prepare(tmp_path, TINY, torch.bfloat16, 2e-5, rank=64), VLM(TINY, torch.bfloat16)
    again.load_adapter(tmp_path)
    # in float32, so that only the weights are rounded
    assert torch.equal(logits(again.lm.float()), logits(vlm.lm.float()))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_new", "llava", "gemma3", "idefics3"])
def test_a_merged_checkpoint_is_the_bases_files_and_other_weights(tmp_path, name):
    """To the byte, config.json too, whatever names it has."""
    base, out = build(name, tmp_path / "base"), tmp_path / "merged"
    if name == "qwen3_vl_new":  # beside chat_template.json transformers allows no such folder
        (base / "chat_templates").mkdir()
        write(base / "chat_templates" / "tools.jinja")
    # config.json is then formatted in another way than transformers would
    for extra in ("config.json", "merges.txt", "tokenizer.model", "model.safetensors.index.json"):
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
    assert_merged(out, vlm)
    plain = VLM(base, "bfloat16")
    save_merged(plain, tmp_path, tmp_path / "small", "bfloat16")
    lm = AutoModelForImageTextToText.from_pretrained(tmp_path / "small")
    assert lm.dtype == torch.bfloat16 and torch.equal(logits(lm), logits(plain.lm))
    with pytest.raises(FileExistsError, match="merged exists already"):
        save_merged(VLM(base), tmp_path, out)


@pytest.mark.parametrize("name, tied", [("tiny", True), ("qwen3_vl_new", False)])
def test_full_fine_tuning_and_the_size_of_images(folders, tmp_path, name, tied):
    """Tied embeddings stay tied; --min_pixels and --max_pixels become the processor's."""
    base, out = folders(name), tmp_path / "merged"
    vlm, plain = prepare(tmp_path, base, rank=0), VLM(base, min_pixels=900, max_pixels=2048)
    save_merged(plain, tmp_path, out)
    family = assert_merged(out, vlm)
    assert (family.lm.lm_head.weight is family.lm.get_input_embeddings().weight) == tied
    size = family.processor.image_processor.size
    assert (size.shortest_edge, size.longest_edge) == (900, 2048)


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
