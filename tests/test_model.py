"""Claims: our explicit forward equals transformers' own; images are encoded once; padding changes nothing; LoRA starts
at the base model, merges exactly and survives the disk in PEFT's layout. Other families: test_families.py."""

import json

import pytest
import torch
from safetensors.torch import load_file

import data
from support import images
from model import VLM, LoRALinear, add_lora, merge_lora

from conftest import TINY


def views_of(vlm, examples, pred=0, target="trajectory"):
    serializer, store = data.Serializer(vlm.family, 2048), images.ImageStore(vlm.family)
    return [serializer.views(ex, *store.add(ex), pred, target) for ex in examples], store


def run(vlm, store, views, pred_tokens=None):
    batch = data.collate(views, vlm.pad_id)
    with torch.no_grad():
        features = vlm.encode_images([store.inputs(i) for i in batch.images])
        return batch, vlm(batch, features, [store.grids[i] for i in batch.images],
                          None if pred_tokens is None else pred_tokens.repeat(len(views), 1))[0]


def reference(vlm, store, views):
    """The same states by transformers' own forward, from pixels."""
    batch = data.collate(views, vlm.pad_id)
    with torch.no_grad():
        return vlm.lm.model(input_ids=batch.ids, attention_mask=batch.mask.long(),
                            mm_token_type_ids=(batch.ids == vlm.lm.config.image_token_id).int(),
                            pixel_values=torch.cat([store.inputs(i)["pixel_values"] for i in batch.images]).to(vlm.lm.dtype),
                            image_grid_thw=torch.tensor([store.grids[i] for i in batch.images])).last_hidden_state


def test_forward_equals_transformers(vlm64, mixed):
    views, store = views_of(vlm64, mixed)
    batch, states = run(vlm64, store, [v.full for v in views])
    expected = reference(vlm64, store, [v.full for v in views])
    torch.testing.assert_close(states[batch.mask], expected[batch.mask])


def test_padding_changes_no_state(vlm64, mixed):
    views, store = views_of(vlm64, mixed)
    short, long = sorted((v.full for v in views), key=lambda v: len(v.ids))[::len(views) - 1]
    _, together = run(vlm64, store, [short, long])
    _, alone = run(vlm64, store, [short])
    assert len(short.ids) < len(long.ids)
    torch.testing.assert_close(together[0, :len(short.ids)], alone[0])


def test_pred_tokens_fill_their_positions_and_leave_the_prompt_alone(vlm64, mixed):
    views, store = views_of(vlm64, mixed[:3], pred=2)
    rows = torch.randn(2, vlm64.dim, dtype=torch.float64)
    batch, states = run(vlm64, store, [v.input for v in views], rows)
    _, other = run(vlm64, store, [v.input for v in views], rows + 1)
    _, swapped = run(vlm64, store, [v.input for v in views], rows.flip(0))
    at = batch.embed_at
    picked = lambda s: s[torch.arange(3), at]
    assert not torch.allclose(picked(states), picked(other)) and not torch.allclose(picked(states), picked(swapped))
    for row, view in enumerate(views):
        torch.testing.assert_close(states[row, :len(view.input.ids) - 2], other[row, :len(view.input.ids) - 2])


def test_lora_starts_at_the_base_and_merges_exactly(vlm64, mixed):
    views, store = views_of(vlm64, mixed[:2])
    _, before = run(vlm64, store, [v.full for v in views])
    vlm64.set_trainable(4, 8.0, 0.0, ["q_proj", "down_proj"], vision=False)
    vlm64.double()
    torch.testing.assert_close(run(vlm64, store, [v.full for v in views])[1], before)
    trained = [n for n, p in vlm64.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n and ("q_proj" in n or "down_proj" in n) and "visual" not in n for n in trained)
    for layer in vlm64.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B)
    _, tuned = run(vlm64, store, [v.full for v in views])
    assert not torch.allclose(tuned, before)
    merge_lora(vlm64.lm)
    assert not any(isinstance(m, LoRALinear) for m in vlm64.modules())
    torch.testing.assert_close(run(vlm64, store, [v.full for v in views])[1], tuned)


def test_lora_equals_its_formula():
    linear = torch.nn.Linear(5, 3)
    layer = LoRALinear(linear, rank=2, alpha=6.0, dropout=0.0)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 5)
    torch.testing.assert_close(layer(x), linear(x) + 3.0 * x @ layer.lora_A.T @ layer.lora_B.T)


def test_adapter_on_disk_is_in_pefts_layout(tmp_path, vlm64, mixed):
    views, store = views_of(vlm64, mixed[:2])
    vlm64.set_trainable(4, 8.0, 0.0, ["q_proj"], vision=False)
    for layer in vlm64.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B)
    vlm64.save_adapter(tmp_path)
    weights, config = load_file(tmp_path / "adapter_model.safetensors"), json.loads((tmp_path / "adapter_config.json").read_text())
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_"
    assert weights[name + "A.weight"].shape == (4, 128) and weights[name + "B.weight"].shape == (128, 4)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    fresh = VLM(TINY, dtype=torch.float64)
    fresh.load_adapter(tmp_path)
    torch.testing.assert_close(run(fresh, store, [v.full for v in views])[1], run(vlm64, store, [v.full for v in views])[1],
                               rtol=1e-5, atol=1e-5)


def test_full_fine_tuning_survives_the_disk(tmp_path, vlm64, mixed):
    """lora_rank 0: all weights of the language model train and are saved, none of the vision tower's."""
    views, store = views_of(vlm64, mixed[:2])
    vlm64.set_trainable(0, 1.0, 0.0, [], vision=False)
    with torch.no_grad():
        for p in vlm64.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    vlm64.save_adapter(tmp_path)
    assert not any("visual" in name for name in load_file(tmp_path / "model.safetensors"))
    fresh = VLM(TINY, dtype=torch.float64)
    fresh.load_adapter(tmp_path)
    torch.testing.assert_close(run(fresh, store, [v.full for v in views])[1], run(vlm64, store, [v.full for v in views])[1])


def test_errors_say_what_to_do(tmp_path, vlm64):
    with pytest.raises(ValueError, match="no config.json"):
        VLM(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is a bert model, none that transformers offers for images and text"):
        VLM(tmp_path)
    with pytest.raises(ValueError, match="--lora_targets"):
        add_lora(vlm64.lm, 4, 8.0, 0.0, ["no_such_layer"])
    with pytest.raises(FileNotFoundError, match="not a trained checkpoint"):
        vlm64.load_adapter(tmp_path)
