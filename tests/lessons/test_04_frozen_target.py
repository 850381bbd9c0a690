"""Claims: h_R is the starting model's, whatever trains and however late a row is first used; it is
made once and then looked up."""

import pytest
import torch
from plain import target_state

from support.lora import lora_layers

from conftest import build, images_of, moved, pair_of


def target(method, batch):
    return method.target(batch, images_of(method, batch)).embedding


@pytest.mark.parametrize("options", [
    dict(), dict(lora_rank=0), dict(train_vision=True), dict(train_vision=True, lora_rank=0)],
    ids=str)
def test_h_R_is_the_starting_models(vlm64, loaded64, mixed, options):
    method, batch = build(vlm64, "pearl", mixed[:2], **options)
    with torch.no_grad():
        expected = torch.stack([target_state(loaded64, record) for record in mixed[:2]])
    # one row is used at once, the other after the model has moved
    first = target(moved(method), batch[:1])
    both = target(moved(method), batch)
    torch.testing.assert_close(both, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(both[0], first[0])
    # the moved model's own h_R is another one
    assert not torch.allclose(pair_of(method, batch)[1], expected, rtol=1e-5, atol=1e-5)


def test_a_target_is_made_once_and_looked_up(vlm64, mixed, monkeypatch):
    method, batch = build(vlm64, "pearl", mixed[:3])
    counts, real = [], method.encode_target
    monkeypatch.setattr(method, "encode_target",
                        lambda vlm, rows, *rest: counts.append(len(rows)) or real(vlm, rows, *rest))
    both = target(method, [batch[2], batch[0]])
    # looked up in any order, and beside a new row; a step with known rows alone makes none
    again = target(method, batch)
    assert torch.equal(again[[2, 0]], both) and torch.equal(method(batch).pair[1], again)
    assert counts == [2, 1] and not both.requires_grad
    # in the model's own dtype, by split and row, up to 8 GB
    assert method.targets.limit == 8e9
    assert {h.dtype for h in method.targets.cache.values()} == {torch.float64}
    assert sorted(method.targets.cache) == [("train", n) for n in range(3)]
    # they come to the model's device; one without numbers stands for a GPU
    method.config.device = "meta"
    assert method.target(batch, {}).embedding.device.type == "meta"


def test_the_starting_model_ends_with_its_context(vlm64, mixed):
    build(vlm64, "pearl", mixed[:1])
    layers = lora_layers(vlm64.lm).values()
    for training in (True, False):
        vlm64.train(training)
        # an error inside must not leave the model at its start
        with pytest.raises(KeyError), vlm64.starting_model() as start:
            assert not start.training and not any(layer.active for layer in layers)
            raise KeyError
        assert vlm64.training == training and all(layer.active for layer in layers)
    # LoRA needs no second copy of the model
    assert start is vlm64


def test_full_fine_tuning_keeps_a_copy_that_is_not_trained_or_saved(vlm64, mixed):
    names = len(vlm64.state_dict())
    method, _ = build(vlm64, "pearl", mixed[:1], lora_rank=0)
    with vlm64.train().starting_model() as start:
        assert start is not vlm64 and not start.training and vlm64.training
    assert not {id(p) for p in method.parameters()} & {id(p) for p in start.parameters()}
    assert len(vlm64.state_dict()) == names
