"""Claims: SFT, and Pearl with lambda 0, are the loss that transformers computes itself. LoRA, or
all weights, are what trains."""

import pytest
import torch
from plain import inputs, rand, same, tokens, turns_of

from support.adapters import LoRALinear, add_lora, lora_layers
from train import Config
from conftest import assert_same, build, stir


def forward(vlm, example, labels=None):
    """transformers' own forward pass on <I0, Q, R>, without the line break behind it."""
    whole = tokens(vlm, turns_of(example))
    return vlm.lm(**inputs(vlm, whole.ids[:-1], whole.images),
                  labels=None if labels is None else torch.tensor([labels]))


@pytest.mark.parametrize("name, options", [
    ("sft", dict()), ("sft", dict(gradient_checkpointing=True)),
    ("pearl", dict()), ("pearl", dict(lora_rank=0)), ("pearl", dict(train_vision=True))], ids=str)
def test_sft_and_pearl_with_lambda_zero_are_transformers_own_loss(vlm64, mixed, name, options):
    """Value and gradient, so of what Pearl adds nothing moves."""
    method, batch = build(vlm64, name, mixed[:3], lambda_latent=0.0, **options)
    assert vlm64.lm.is_gradient_checkpointing == method.config.gradient_checkpointing
    # a mean over the tokens of the batch, so a long text weighs more
    counts = [sum(label != -100 for label in example.views.full.labels) for example in batch]
    loss = sum(forward(vlm64, record, example.views.full.labels).loss * count
               for record, example, count in zip(mixed, batch, counts)) / sum(counts)
    result = method(batch)
    # transformers takes the logarithm in float32
    assert_same(result.total, loss.double(), method, atol=0, digits=5)
    if name == "sft":
        assert result.parts["loss"] == result.parts["vlm"] == result.total and result.pair is None
        # it adds nothing to the VLM
        assert method.predictor is None and "start" not in vars(vlm64) and not method.targets.cache
        assert all(name.startswith("vlm.") for name, _ in method.named_parameters())


def parts_of(vlm, vision):
    return [vlm.lm.get_decoder()] + [vlm.lm.get_encoder("image")] * vision


@pytest.mark.parametrize("vision", [False, True])
def test_without_lora_all_weights_train(vlm64, mixed, vision):
    build(vlm64, "sft", mixed[:1], lora_rank=0, train_vision=vision)
    trained = {id(p) for p in vlm64.parameters() if p.requires_grad}
    assert trained == {id(p) for part in parts_of(vlm64, vision) for p in part.parameters()}


@pytest.mark.parametrize("vision, rank", [(False, 3), (True, 64)])
def test_lora_is_on_every_linear_layer_and_starts_from_the_base(vlm64, mixed, vision, rank):
    before = forward(vlm64, mixed[0]).logits
    vlm64.set_trainable(Config(lora_rank=rank, train_vision=vision, device="cpu"))
    torch.testing.assert_close(forward(vlm64, mixed[0]).logits, before)
    layers = list(lora_layers(vlm64.lm).values())
    linear = [m for part in parts_of(vlm64, vision) for name, m in part.named_modules()
              if isinstance(m, torch.nn.Linear)]
    assert {id(layer.base) for layer in layers} == {*map(id, linear)}
    # what trains is A and B of each, in float32, with alpha twice the rank
    assert sum(p.requires_grad for p in vlm64.parameters()) == 2 * len(layers)
    for layer in layers:
        assert layer.scaling == 2 and layer.lora_A.dtype == torch.float32
        assert layer.lora_A.shape == (rank, layer.base.in_features) and not layer.lora_B.any()
    layer, x = stir(layers[0].double()), rand(4, layers[0].base.in_features)
    naive = layer.base(x) + 2 * x @ layer.lora_A.T @ layer.lora_B.T
    same(layer(x).square().sum(), naive.square().sum(), x, layer.lora_A, layer.lora_B)
    attention = torch.nn.MultiheadAttention(4, 2)  # it reads a weight without calling the layer
    add_lora(attention, 2, 4.0, 0.0)
    attention(*rand(3, 5, 4).float())
    # a large rank is added to the weights, but not to those of 16 bits
    assert layer.adds_up == (rank == 64)
    assert not LoRALinear(torch.nn.Linear(8, 8).bfloat16(), 4, 8.0).adds_up
