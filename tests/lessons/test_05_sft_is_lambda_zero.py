"""Claims: Pearl with lambda 0 is SFT, in loss and gradient; SFT is the loss that transformers
computes itself; it adds nothing to the VLM. LoRA, or all weights, are what trains."""

import copy

import pytest
import torch

import data
from conftest import assert_close, build, gradients, stirred
from support.features import ImageEncoder
from support.lora import LoRALinear, lora_layers
from train import Config


def forward(vlm, example, **more):
    """transformers' own forward pass on one full view, from pixels."""
    ids, images = torch.tensor([example.views.full.ids]), example.images
    return vlm.lm(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True,
                  mm_token_type_ids=(ids == vlm.lm.config.image_token_id).int(),
                  pixel_values=torch.cat([i.pixels["pixel_values"] for i in images]).double(),
                  image_grid_thw=torch.tensor([i.grid for i in images]), **more)


def test_sft_is_transformers_own_loss(vlm64, mixed):
    method, batch = build(vlm64, "sft", mixed[:3])
    loss, counts = 0, []
    for example in batch:
        labels = example.views.full.labels
        counts.append(sum(label != -100 for label in labels))
        loss = loss + forward(vlm64, example, labels=torch.tensor([labels])).loss * counts[-1]
    # a mean over the tokens of the batch, so a long text weighs more
    loss = loss / sum(counts)
    result = method(batch)
    # transformers takes the logarithm in float32
    torch.testing.assert_close(result.total, loss.double(), rtol=1e-5, atol=0)
    assert result.parts["loss"] == result.parts["vlm"] == result.total and result.pair is None
    assert_close(gradients(result.total, method), gradients(loss, method))


def test_states_are_transformers_own_and_padding_changes_none(loaded64, batch3):
    vlm, encode = loaded64, ImageEncoder(loaded64.family)
    images = encode([image for example in batch3 for image in example.images])
    padded = vlm(data.collate([ex.views.full for ex in batch3], vlm.pad_id), images)
    assert len({len(ex.views.full.ids) for ex in batch3}) == 3
    for row, example in enumerate(batch3):
        own = forward(vlm, example).hidden_states[-1][0]
        torch.testing.assert_close(padded.states[row, :len(own)], own, rtol=1e-5, atol=1e-5)
        assert torch.equal(padded.embedding[row], padded.states[row, len(own) - 1])
        # input embeddings: the vocabulary's rows, and the features at the image tokens
        inputs, ids = padded.inputs[row, :len(own)], padded.batch.ids[row, :len(own)]
        is_image = ids == vlm.lm.config.image_token_id
        features = torch.cat([images[image.key].features[0] for image in example.images])
        assert torch.equal(inputs[~is_image], vlm.lm.get_input_embeddings()(ids)[~is_image])
        assert torch.equal(inputs[is_image], features)


@pytest.mark.parametrize("options", [dict(), dict(lora_rank=0), dict(train_vision=True)], ids=str)
def test_pearl_with_lambda_zero_is_sft(loaded64, mixed, options):
    found = []
    for name in ("sft", "pearl"):
        method, batch = build(copy.deepcopy(loaded64), name, mixed[:2], lambda_latent=0.0, **options)
        result = method(batch)
        grads = gradients(result.total, method)
        found.append((result, {n: g for n, g in grads.items() if n.startswith("vlm.")}))
        assert not any(g.any() for n, g in grads.items() if not n.startswith("vlm."))
    (sft, expected), (pearl, grads) = found
    torch.testing.assert_close(pearl.parts["vlm"], sft.parts["vlm"])
    torch.testing.assert_close(pearl.total, sft.total)
    assert_close(grads, expected)
    assert any("visual" in name for name in grads) == bool(options.get("train_vision"))


def test_sft_adds_nothing_to_the_vlm(vlm64, mixed):
    method, batch = build(vlm64, "sft", mixed[:2])
    assert method.predictor is None and "start" not in vars(vlm64)
    assert all(name.startswith("vlm.") for name, _ in method.named_parameters())
    method(batch)
    assert len(method.targets) == 0
    pearl, _ = build(vlm64, "pearl", mixed[:2])
    assert {n.partition(".")[0] for n, _ in pearl.named_parameters()} == {"vlm", "predictor"}
    assert pearl.predictor.pred_tokens.shape == (4, 128)


@pytest.mark.parametrize("vision", [False, True])
def test_without_lora_all_weights_train(vlm64, mixed, vision):
    method, batch = build(vlm64, "sft", mixed[:2], lora_rank=0, train_vision=vision)
    trained = {name for name, p in vlm64.lm.named_parameters() if p.requires_grad}
    inner = vlm64.lm.get_decoder(), *([vlm64.lm.get_encoder("image")] if vision else [])
    assert {id(p) for p in vlm64.lm.parameters() if p.requires_grad} == {
        id(p) for part in inner for p in part.parameters()}
    before = {name: p.clone() for name, p in vlm64.lm.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=0.01)
    method(batch).total.backward()
    optimizer.step()
    changed = {name for name, p in vlm64.lm.named_parameters() if not torch.equal(p, before[name])}
    # all that trains moves; the vision tower's last biases may cancel out
    assert changed <= trained and len(changed) > 0.9 * len(trained)


@pytest.mark.parametrize("vision", [False, True])
def test_lora_is_on_every_linear_layer_and_starts_from_the_base(vlm64, batch3, vision):
    before = forward(vlm64, batch3[0]).logits
    vlm64.set_trainable(Config(lora_rank=3, train_vision=vision, device="cpu"))
    torch.testing.assert_close(forward(vlm64, batch3[0]).logits, before)
    parts = [vlm64.lm.get_decoder()] + [vlm64.lm.get_encoder("image")] * vision
    inside = {id(m) for part in parts for m in part.modules() if isinstance(m, LoRALinear)}
    layers = lora_layers(vlm64.lm)
    assert {id(layer) for layer in layers.values()} == inside and len(inside) > 20
    bare = [n for part in parts for n, m in part.named_modules()
            if isinstance(m, torch.nn.Linear) and not n.endswith(".base")]
    assert not bare
    # what trains is A and B of each, in float32, with alpha twice the rank
    assert sum(p.requires_grad for p in vlm64.parameters()) == 2 * len(layers)
    for layer in layers.values():
        assert layer.scaling == 2 and layer.lora_A.dtype == torch.float32
        assert layer.lora_A.shape == (3, layer.base.in_features) and not layer.lora_B.any()
    layer = stirred(next(iter(layers.values())).double())
    x = torch.randn(4, layer.base.in_features, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.base(x) + 2 * x @ layer.lora_A.T @ layer.lora_B.T)
