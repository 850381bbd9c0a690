"""Claims: what --model may name (a checkpoint, a run, one of its checkpoints, an adapter as we or
PEFT write it) is loaded or refused in our own sentence; an adapter changes the layers that its
tensors name, as PEFT does; a merged checkpoint has every processor file of its base as it was."""

import os
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from model import VLM, lora_layers
from support.adapters import load_adapter, resolve, save_merged
from support.families import load_checkpoint
from support.files import read_json

from checkpoints import build, write

LAYERS = ["model.language_model.layers.0.self_attn.q_proj",
          "model.language_model.layers.1.self_attn.q_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build("qwen2_5_vl", tmp_path_factory.mktemp("base"))


def adapter(folder, base, target_modules=("q_proj",), tensors=None, **config):
    """As PEFT saves it: short names, or a pattern, in target_modules."""
    torch.manual_seed(0)
    pairs = {f"base_model.model.{name}.lora_{part}.weight": torch.randn(shape, dtype=torch.float64)
             for name in LAYERS for part, shape in (("A", (4, 32)), ("B", (32, 4)))}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(pairs | (tensors or {}), folder / "adapter_model.safetensors")
    named = target_modules if isinstance(target_modules, str) else list(target_modules)
    write(folder / "adapter_config.json", **dict(peft_type="LORA", r=4, lora_alpha=8.0, bias="none",
          target_modules=named, base_model_name_or_path=str(base)) | config)
    return folder


def run_of(folder, base):
    """A run folder as training leaves it."""
    adapter(folder / "checkpoint-20", base)
    write(folder / "config.json", model=str(base), method="pearl", dtype="float32")
    write(folder / "best.json", checkpoint="checkpoint-20", step=20)
    return folder


def changed(lm, base, times=1):
    """Whether `lm` is the base with the pairs above merged `times` over."""
    plain = load_checkpoint(str(base), torch.float64)[0].state_dict()
    torch.manual_seed(0)
    for name in LAYERS:
        low, high = (torch.randn(s, dtype=torch.float64) for s in ((4, 32), (32, 4)))
        plain[f"{name}.weight"] += times * 2.0 * high @ low
    torch.testing.assert_close(dict(lm.state_dict()), dict(plain))
    return True


@pytest.mark.parametrize("names", [["q_proj"], r".*language_model.*\.q_proj", LAYERS, "all-linear"])
def test_an_adapter_as_peft_saves_it(base, tmp_path, names):
    folder = adapter(tmp_path / "adapter", base, names, rank_pattern={}, use_rslora=False)
    assert changed(load_checkpoint(str(folder), torch.float64)[0], base)


def assert_merged(plain, adapted):
    """Every weight of `plain` is that of `adapted`, with W + (alpha / r) B A in LoRA's places."""
    layers = lora_layers(adapted)
    expected = {name.replace(".base.", "."): weight for name, weight in adapted.state_dict().items()
                if "lora_" not in name}
    for name, layer in layers.items():
        expected[f"{name}.weight"] = (
            layer.base.weight + layer.scaling * layer.lora_B @ layer.lora_A)
    torch.testing.assert_close(dict(plain.state_dict()), expected)


@pytest.mark.parametrize("name, old, today", [
    ("qwen2_5_vl", "model.layers.1.", "model.language_model.layers.1."),
    ("qwen2_5_vl", "visual.blocks.", "model.visual.blocks."),
    ("llava_next", "language_model.model.layers.1.", "model.language_model.layers.1."),
    ("llava_next", "vision_tower.vision_model.encoder.", "model.vision_tower.encoder.")])
def test_an_adapter_by_the_names_of_an_older_transformers(tmp_path, name, old, today):
    base = build(name, tmp_path / "base")
    vlm = VLM(base, torch.float64)
    vlm.set_trainable(4, 8.0, 0.0, ["q_proj", "qkv"], vision=True)
    for parameter, p in vlm.lm.named_parameters():
        if "lora_B" in parameter and parameter.startswith(today):
            torch.nn.init.normal_(p)
    vlm.save_adapter(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    named = {key.replace(f"base_model.model.{today}", f"base_model.model.{old}"): tensor
             for key, tensor in load_file(file).items()}
    assert sum(f"model.{old}" in key for key in named) >= 2
    save_file(named, file)
    again, _ = load_checkpoint(str(tmp_path), torch.float64)
    assert_merged(again, vlm.lm)


def test_a_saved_adapter_names_its_base_from_anywhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    vlm = VLM(base.name, torch.float64)
    vlm.set_trainable(4, 8.0, 0.0, ["q_proj"], vision=True)
    with torch.no_grad():
        for name, p in vlm.lm.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
    (tmp_path / "adapter").mkdir()
    vlm.save_adapter(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    again, _ = load_checkpoint("adapter", torch.float64)
    assert_merged(again, vlm.lm)


def test_the_same_as_peft_itself(base, tmp_path):
    peft = pytest.importorskip("peft")
    lm, _ = load_checkpoint(str(base), torch.float64)
    wrapped = peft.get_peft_model(lm, peft.LoraConfig(r=3, lora_alpha=7, target_modules=["v_proj"]))
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    wrapped.save_pretrained(tmp_path / "adapter")
    write(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(base))
    ours = load_checkpoint(str(tmp_path / "adapter"), torch.float64)[0].state_dict()
    torch.testing.assert_close(dict(ours), dict(wrapped.merge_and_unload().state_dict()))


STRANGE = {"base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_magnitude_vector":
           torch.ones(32)}


@pytest.mark.parametrize("config, tensors, message", [
    (dict(use_rslora=True), {}, "sets use_rslora, which is not read here: merge that adapter"),
    (dict(rank_pattern={"q_proj": 2}), {}, "sets rank_pattern"),
    (dict(alpha_pattern={"q_proj": 2}), {}, "sets alpha_pattern"),
    (dict(use_dora=True), {}, "sets use_dora"), (dict(modules_to_save=["lm_head"]), {}, "to_save"),
    (dict(init_lora_weights="pissa"), {}, "sets init_lora_weights"),
    (dict(peft_type="IA3"), {}, "describes a IA3 adapter; only LoRA"),
    (dict(r=8), {}, "has rank 4, adapter_config.json says 8"),
    (dict(r=0), {}, "not PEFT's description"), (dict(lora_alpha="x"), {}, "PEFT's description"),
    ({}, STRANGE, "lora_magnitude_vector, which is no low-rank pair"),
    ({}, {"base_model.model.x.lora_A.weight": torch.ones(4, 32)}, "holds half of the pair for x"),
    ({}, {"base_model.model.x.lora_A.weight": torch.ones(4, 32),
          "base_model.model.x.lora_B.weight": torch.ones(32, 4)}, "do not agree on x; it was")])
def test_other_adapters_are_refused_and_change_nothing(base, tmp_path, config, tensors, message):
    folder = adapter(tmp_path / "adapter", base, tensors=tensors, **config)
    lm, _ = load_checkpoint(str(base), torch.float64)
    with pytest.raises(ValueError, match=message):
        load_adapter(lm, str(base), folder)
    assert changed(lm, base, times=0)


def test_what_model_may_name(base, tmp_path, monkeypatch):
    run = run_of(tmp_path / "run", base)
    later = run_of(tmp_path / "later", run)  # trained on from a run
    monkeypatch.chdir(tmp_path)
    for named in (run, run / "checkpoint-20", "run", "./run", "run/checkpoint-20"):
        lm, family = load_checkpoint(str(named), torch.float64)
        assert changed(lm, base) and family.path == str(base)
    assert resolve(str(later)) == (str(base), [run / "checkpoint-20", later / "checkpoint-20"])
    assert changed(load_checkpoint("later", torch.float64)[0], base, times=2)
    assert resolve("Qwen/Qwen2.5-VL-3B-Instruct") == ("Qwen/Qwen2.5-VL-3B-Instruct", [])


def test_what_model_may_not_name(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    begun, circle = run_of(tmp_path / "begun", base), run_of(tmp_path / "circle", "circle")
    (begun / "best.json").unlink()
    astray = run_of(tmp_path / "astray", "runs/tiny")
    for folder, kind in (("typeless", None), ("newer", "qwen9_vl")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "config.json", hidden_size=3, model_type=kind)
    nameless = adapter(tmp_path / "nameless", None)
    write(nameless / "adapter_config.json", base_model_name_or_path="")
    for named, message in (
            ("./nothing", r"\./nothing is no folder \(seen from /"),
            ("/nothing/there", "/nothing/there is no folder"),
            ("runs/nothing", "runs/nothing is no checkpoint: there is no such folder, seen from /"),
            ("nothing", "nothing is no checkpoint: there is no such folder"),
            ("Some/Model-3B", "Some/Model-3B is no checkpoint: .* the hub, or its copy on this"),
            ("a b//c?", "is no checkpoint: there is no such folder"),
            ("empty", "empty is not a checkpoint folder: it has no config.json"),
            ("typeless", "typeless is of no model type that the installed transformers knows"),
            ("newer", "newer is of no model type that the installed transformers knows"),
            ("begun", "begun is a run that has kept no checkpoint yet"),
            ("circle", "circle names itself as its base model"),
            ("nameless", "does not name its base model"),
            (str(astray), r"runs/tiny \(the base of .*astray\) is no checkpoint")):
        with pytest.raises(ValueError, match=message) as refused:
            load_checkpoint(named, torch.float32)
        assert "connect" not in str(refused.value) and "\n" not in str(refused.value)
    assert circle.is_dir()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl_new", "llava", "gemma3", "idefics3"])
def test_a_merged_checkpoint_has_the_bases_own_files(tmp_path, name, capsys):
    base = build(name, tmp_path / "base")
    more = base / "chat_templates" / "tools.jinja"
    if name == "qwen3_vl_new":  # beside chat_template.json transformers allows no such folder
        more.parent.mkdir()
        more.write_text("{{ 'tools' }}", encoding="utf-8")
    for extra in ("merges.txt", "tokenizer.model", "special_tokens_map.json"):
        (base / extra).write_text("{}", encoding="utf-8")
    (base / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    if name == "idefics3":  # how we ask is no setting of the model's
        (base / "generation_config.json").unlink()
    before = {file.name: file.read_bytes() for file in base.iterdir() if file.is_file()}
    vlm = VLM(base, torch.float32)
    with torch.no_grad():
        vlm.lm.get_input_embeddings().weight += 1
    save_merged(vlm, tmp_path / "merged")
    said = capsys.readouterr().out
    merged = {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()
              if file.is_file()}
    own = {"config.json", "model.safetensors", "model.safetensors.index.json"}
    assert {k: v for k, v in before.items() if k not in own} == {
        k: v for k, v in merged.items() if k not in own}
    assert "model.safetensors.index.json" not in merged
    assert (tmp_path / "merged" / "chat_templates" / "tools.jinja").is_file() == more.is_file()
    assert ("mm_token_type_ids" in said) == name.startswith("qwen") and "AutoProcessor" in said
    assert {file.name: file.read_bytes() for file in base.iterdir() if file.is_file()} == before
    assert load_file(base / "model.safetensors").keys() == load_file(
        tmp_path / "merged" / "model.safetensors").keys()
    assert read_json(tmp_path / "merged" / "config.json")["dtype"] == "float32"  # the base: 64
    again, same = load_checkpoint(str(tmp_path / "merged"), torch.float32)
    torch.testing.assert_close(dict(again.state_dict()), dict(vlm.lm.state_dict()))
    assert same.template == vlm.family.template and same.reserved == vlm.family.reserved
    if not name.startswith("qwen"):
        AutoProcessor.from_pretrained(tmp_path / "merged")
    with pytest.raises(FileExistsError, match="merged exists already"):
        save_merged(vlm, tmp_path / "merged")
    assert not [file for file in os.listdir(tmp_path) if file.endswith(".partial")]


def test_a_model_of_the_hubs_cache_needs_no_network(base, tmp_path, monkeypatch):
    """Loaded, its template's file found, and merged, by its name alone."""
    stored = tmp_path / "hub" / "models--some--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(base, stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit, encoding="utf-8")
    # what the variables of these names set when the package is first imported
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    vlm = VLM("some/tiny")
    assert (vlm.family.template_source, vlm.family.path) == ("chat_template.json", "some/tiny")
    save_merged(vlm, tmp_path / "merged")
    for name in ("chat_template.json", "tokenizer_config.json", "video_preprocessor_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
