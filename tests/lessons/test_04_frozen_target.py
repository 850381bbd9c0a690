"""Claims: h_R is the starting model's, whatever trains and however late a row is first used; it is
made once and then looked up."""

import pytest
import torch

from conftest import build, images_of, moved, stirred
from support.lora import lora_layers


def naive_targets(vlm, batch):
    """h_R of each row by transformers' own forward pass, from pixels."""
    rows = []
    for example in batch:
        ids, images = torch.tensor([example.views.target.ids]), example.images[1:]
        states = vlm.lm.model(
            input_ids=ids, attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == vlm.lm.config.image_token_id).int(),
            pixel_values=torch.cat([image.pixels["pixel_values"] for image in images]).double(),
            image_grid_thw=torch.tensor([image.grid for image in images])).last_hidden_state
        rows.append(states[0, -1])
    return torch.stack(rows).detach()


def target(method, batch):
    return method.target(batch, images_of(method, batch)).embedding


def close(one, other):
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5)


WAYS = [dict(), dict(lora_rank=0), dict(train_vision=True), dict(train_vision=True, lora_rank=0)]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_h_R_is_the_starting_models(vlm64, loaded64, mixed, options):
    method, batch = build(vlm64, "pearl", mixed[:3], **options)
    expected = naive_targets(loaded64, batch)
    # a row that is used at once, and two that are first used after the model has moved
    stirred(moved(method))
    first = target(method, batch[:1])
    moved(method)
    found = target(method, batch)
    assert close(first, expected[:1]) and torch.equal(found[:1], first)
    assert close(found[1:], expected[1:])
    # the moved model's own h_R is another one
    assert not close(naive_targets(vlm64, batch), expected)


def test_a_target_is_made_once_and_looked_up(vlm64, mixed, monkeypatch):
    method, batch = build(vlm64, "pearl", mixed[:3])
    made, real = [], method.encode_target
    monkeypatch.setattr(method, "encode_target",
                        lambda vlm, rows, images: made.append(len(rows)) or real(vlm, rows, images))
    both = target(method, [batch[2], batch[0]])
    # looked up in any order, and beside a new row; a step with known rows alone makes none
    again = target(method, batch)
    method(batch)
    assert made == [2, 1] and torch.equal(again[[2, 0]], both)
    assert not both.requires_grad and both.dtype == torch.float64
    assert close(method(batch).pair[1], again)
    # in the model's own dtype, on the CPU, by split and row
    assert {h.dtype for h in method.targets.kept.values()} == {torch.float64}
    assert sorted(method.targets.kept) == [("train", n) for n in range(3)]


def test_targets_beyond_the_limit_are_made_again(vlm64, loaded64, mixed):
    method, batch = build(vlm64, "pearl", mixed[:3])
    assert method.targets.limit == 8e9
    method.targets.limit = 128 * 8
    expected = naive_targets(loaded64, batch)
    for _ in range(2):
        assert close(target(method, batch), expected) and len(method.targets) == 1


def test_the_starting_model_ends_with_its_context(vlm64, mixed):
    method, _ = build(vlm64, "pearl", mixed[:2])
    layers = lora_layers(vlm64.lm).values()
    for training in (True, False):
        vlm64.train(training)
        with pytest.raises(ZeroDivisionError), vlm64.starting_model() as start:
            assert not start.training and not any(layer.active for layer in layers)
            # an error inside must not leave the model at its start
            1 / 0
        assert vlm64.training == training and all(layer.active for layer in layers)
    # LoRA needs no second copy of the model, full fine-tuning does
    with vlm64.starting_model() as start:
        assert start is vlm64
    assert not any(name.startswith("start") for name in vlm64.state_dict())


def test_full_fine_tuning_keeps_a_copy_that_is_not_trained_or_saved(vlm64, mixed):
    method, _ = build(vlm64, "pearl", mixed[:2], lora_rank=0)
    with vlm64.train().starting_model() as start:
        assert start is not vlm64 and not start.training and vlm64.training
    own = {id(p) for p in method.parameters()}
    assert not own & {id(p) for p in start.parameters()}
    assert len(method.vlm.state_dict()) == len(start.state_dict())


def test_the_loss_compares_with_the_stored_target(vlm64, loaded64, mixed):
    """The step's L_JEPA is the mean of 1 - cos(h^_R, h_R), and its gauges have the same pairs."""
    method, batch = build(vlm64, "pearl", mixed[:3])
    result = method(batch)
    prediction, h_R = result.pair
    assert close(h_R, naive_targets(loaded64, batch))
    cosines = [p @ t / (p.norm() * t.norm()) for p, t in zip(prediction, h_R)]
    torch.testing.assert_close(result.parts["jepa"], 1 - sum(cosines) / 3)
    total = result.parts["vlm"] + 5 * (result.parts["jepa"] + result.parts["nextlat"])
    torch.testing.assert_close(result.parts["loss"], total)
    torch.testing.assert_close(result.total.detach(), total)
