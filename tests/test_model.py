"""Claims: our explicit forward equals transformers' own; padding changes nothing; LoRA starts at
the base model, merges exactly, can be taken off and survives the disk in PEFT's layout.
Other families: test_families.py."""

import json

import pytest
import torch
from safetensors.torch import load_file

import data
from model import VLM, LoRALinear, add_lora, lora_layers
from support import images

from conftest import TINY


def views_of(vlm, examples, pred=0, target="trajectory"):
    serializer, store = data.Serializer(vlm.family, 2048), images.ImageStore(vlm.family)
    return [serializer.views(ex, *store.add(ex), pred, target) for ex in examples], store


@torch.no_grad()
def run(vlm, store, views, pred_tokens=None):
    """The batch of these views and its Encoded."""
    batch = data.collate(views, vlm.pad_id)
    return batch, vlm(batch, store.encoded(batch.images), pred_tokens)


def states_of(vlm, store, views, pred_tokens=None):
    return run(vlm, store, views, pred_tokens)[1].states


def reference(vlm, store, views):
    """The same states by transformers' own forward, from pixels."""
    batch = data.collate(views, vlm.pad_id)
    pixels = torch.cat([store.inputs(i)["pixel_values"] for i in batch.images])
    with torch.no_grad():
        return vlm.lm.model(
            input_ids=batch.ids, attention_mask=batch.mask.long(),
            mm_token_type_ids=(batch.ids == vlm.lm.config.image_token_id).int(),
            pixel_values=pixels.to(vlm.lm.dtype),
            image_grid_thw=torch.tensor([store.grids[i] for i in batch.images])).last_hidden_state


def stir_lora(vlm):
    """LoRA weights away from their zero start."""
    for layer in lora_layers(vlm.lm).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)


def test_forward_equals_transformers(vlm64, mixed):
    views, store = views_of(vlm64, mixed)
    batch, encoded = run(vlm64, store, [v.full for v in views])
    expected = reference(vlm64, store, [v.full for v in views])
    torch.testing.assert_close(encoded.states[batch.mask], expected[batch.mask])
    for row, view in enumerate(views):  # and a view's embedding is the state at its last token
        assert torch.equal(encoded.embedding[row], encoded.states[row, len(view.full.ids) - 1])
    words = vlm64.lm.get_input_embeddings()(batch.ids)
    is_image = batch.ids == vlm64.lm.config.image_token_id
    assert torch.equal(encoded.inputs[~is_image], words[~is_image])
    features = store.encoded(batch.images)
    shown = torch.cat([features[i].features[0] for i in batch.images])
    assert torch.equal(encoded.inputs[is_image], shown)


def test_padding_changes_no_state(vlm64, mixed):
    views, store = views_of(vlm64, mixed)
    short, long = sorted((v.full for v in views), key=lambda v: len(v.ids))[::len(views) - 1]
    together = states_of(vlm64, store, [short, long])
    alone = states_of(vlm64, store, [short])
    assert len(short.ids) < len(long.ids)
    torch.testing.assert_close(together[0, :len(short.ids)], alone[0])


def test_pred_tokens_fill_their_positions_and_leave_the_prompt_alone(vlm64, mixed):
    views, store = views_of(vlm64, mixed[:3], pred=2)
    asked, rows = [v.input for v in views], torch.randn(2, vlm64.dim, dtype=torch.float64)
    batch, encoded = run(vlm64, store, asked, rows)
    _, other = run(vlm64, store, asked, rows + 1)
    _, swapped = run(vlm64, store, asked, rows.flip(0))
    # rows of one example serve for every example
    assert torch.equal(encoded.inputs[batch.inject_at], rows.repeat(3, 1))
    _, each = run(vlm64, store, asked, torch.cat([rows, rows + 1, rows]))
    assert torch.equal(each.inputs[batch.inject_at], torch.cat([rows, rows + 1, rows]))
    for changed in (other, swapped):
        assert not torch.isclose(encoded.embedding, changed.embedding).all(dim=1).any()
    for row, view in enumerate(views):
        prompt = len(view.input.ids) - 2
        torch.testing.assert_close(encoded.states[row, :prompt], other.states[row, :prompt])


def test_lora_starts_at_the_base_and_merges_exactly(vlm64, mixed, tmp_path):
    views, store = views_of(vlm64, mixed[:2])
    full = [v.full for v in views]
    before = states_of(vlm64, store, full)
    vlm64.set_trainable(4, 8.0, 0.0, ["q_proj", "down_proj"], vision=False)
    vlm64.double()
    torch.testing.assert_close(states_of(vlm64, store, full), before)
    trained = [n for n, p in vlm64.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n and ("q_proj" in n or "down_proj" in n)
                           and "visual" not in n for n in trained)
    stir_lora(vlm64)
    tuned = states_of(vlm64, store, full)
    assert not torch.allclose(tuned, before)
    vlm64.save_adapter(tmp_path)
    merged = VLM(TINY, dtype=torch.float64)
    merged.load_adapter(tmp_path)
    assert not any(isinstance(m, LoRALinear) for m in merged.modules())
    torch.testing.assert_close(states_of(merged, store, full), tuned)


def test_the_starting_model_is_the_model_before_training_bit_for_bit(mixed):
    """float32 as in a run, after an optimiser's step: no cached target could be nearer to it."""
    torch.manual_seed(0)
    vlm = VLM(TINY)
    views, store = views_of(vlm, mixed[:3])
    target = [v.target for v in views]
    before = run(vlm, store, target)[1]
    vlm.set_trainable(4, 8.0, 0.1, ["q_proj", "v_proj", "down_proj"], vision=False)
    vlm.train()
    adam = torch.optim.AdamW([p for p in vlm.parameters() if p.requires_grad], lr=0.1)
    batch = data.collate(target, vlm.pad_id)
    for _ in range(2):  # in the first step only B moves: A's gradient is zero as long as B is
        vlm(batch, store.encoded(batch.images)).embedding.sum().backward()
        adam.step()
    assert not torch.allclose(states_of(vlm, store, target), before.states)
    with pytest.raises(ZeroDivisionError), vlm.starting_model():
        again = run(vlm, store, target)[1]
        assert all(torch.equal(one, other) for one, other in zip(again, before))
        1 / 0  # an error inside does not leave the model at its start
    assert not torch.allclose(states_of(vlm, store, target), before.states)


def test_lora_equals_its_formula():
    linear = torch.nn.Linear(5, 3)
    layer = LoRALinear(linear, rank=2, alpha=6.0, dropout=0.0)
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 5)
    torch.testing.assert_close(layer(x), linear(x) + 3.0 * x @ layer.lora_A.T @ layer.lora_B.T)


def test_adapter_on_disk_is_in_pefts_layout(tmp_path, vlm64, mixed):
    views, store = views_of(vlm64, mixed[:2])
    full = [v.full for v in views]
    vlm64.set_trainable(4, 8.0, 0.0, ["q_proj"], vision=False)
    stir_lora(vlm64)
    vlm64.save_adapter(tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    name = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_"
    assert weights[name + "A.weight"].shape == (4, 128)
    assert weights[name + "B.weight"].shape == (128, 4)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    fresh = VLM(TINY, dtype=torch.float64)
    fresh.load_adapter(tmp_path)
    torch.testing.assert_close(states_of(fresh, store, full), states_of(vlm64, store, full),
                               rtol=1e-5, atol=1e-5)


def test_full_fine_tuning_survives_the_disk(tmp_path, vlm64, mixed):
    """lora_rank 0: all weights of the language model train and are saved, none of the tower's."""
    views, store = views_of(vlm64, mixed[:2])
    full = [v.full for v in views]
    vlm64.set_trainable(0, 1.0, 0.0, [], vision=False)
    with torch.no_grad():
        for p in vlm64.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    vlm64.save_adapter(tmp_path)
    assert not any("visual" in name for name in load_file(tmp_path / "model.safetensors"))
    fresh = VLM(TINY, dtype=torch.float64)
    fresh.load_adapter(tmp_path)
    torch.testing.assert_close(states_of(fresh, store, full), states_of(vlm64, store, full))


def test_errors_say_what_to_do(tmp_path, shipped):
    with pytest.raises(ValueError, match="no config.json"):
        VLM(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    with pytest.raises(ValueError, match="is a bert model, none that transformers offers for "
                                         "images and text"):
        VLM(tmp_path)
    with pytest.raises(ValueError, match="--lora_targets"):
        add_lora(torch.nn.Sequential(torch.nn.Linear(2, 2)), 4, 8.0, 0.0, ["no_such_layer"])
    with pytest.raises(FileNotFoundError, match="not a trained checkpoint"):
        shipped.load_adapter(tmp_path)
