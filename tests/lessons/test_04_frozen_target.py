"""Claims: h_R is the starting model's, whatever trains and however late a row is first used;
targets and features of images are made once and kept, or made again if they do not fit."""

import pytest
import torch
from plain import target_state

from support.adapters import lora_layers
from support.images import ImageEncoder, load_images, with_pixels
from support.step import StoredTargets
from conftest import build, images_of, move, pair_of


def target(method, batch):
    return method.target(batch, images_of(method, batch)).embedding


@pytest.mark.parametrize("train_vision", [False, True])
@pytest.mark.parametrize("rank", [4, 0])
def test_h_R_is_the_starting_models(vlm64, loaded64, mixed, rank, train_vision):
    method, batch = build(vlm64, "pearl", mixed[:2], lora_rank=rank, train_vision=train_vision)
    with torch.no_grad():
        expected = torch.stack([target_state(loaded64, record) for record in mixed[:2]])
    # one row is used at once, the other after the model has moved
    first = target(move(method), batch[:1])
    both = target(move(method), batch)
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


@pytest.mark.parametrize("rank", [4, 0])
def test_the_starting_model_ends_with_its_context(vlm64, mixed, rank):
    names, (method, _) = vlm64.state_dict(), build(vlm64, "pearl", mixed[:1], lora_rank=rank)
    layers = lora_layers(vlm64.lm).values()
    for training in (True, False):
        vlm64.train(training)
        # an error inside must not leave the model at its start
        with pytest.raises(KeyError), vlm64.starting_model() as start:
            assert not start.training and not any(layer.active for layer in layers)
            raise KeyError
        assert vlm64.training == training and all(layer.active for layer in layers)
    # without LoRA it is a second copy of the model, which is neither trained nor saved
    assert (start is vlm64) == bool(rank)
    if not rank:
        assert not {id(p) for p in method.parameters()} & {id(p) for p in start.parameters()}
        assert vlm64.state_dict().keys() == names.keys()


@pytest.fixture
def tower_calls(vlm64, monkeypatch):
    """The number of images in each call of the vision tower."""
    calls, real = [], vlm64.family.features
    monkeypatch.setattr(vlm64.family, "features",
                        lambda images: calls.append(len(images)) or real(images))
    return calls


def test_a_frozen_tower_encodes_each_image_once_within_a_limit(vlm64, mixed, tower_calls):
    images = [image for example in mixed[:2]
              for image in with_pixels(load_images(example, vlm64.family), vlm64.family)]
    encode = ImageEncoder(vlm64.family)
    first, again = encode(images[:2] + images[1:3]), encode(images)
    assert tower_calls == [3, 1] and all(again[key] is first[key] for key in first)
    for image in images:
        (features, grid), alone = again[image.key], ImageEncoder(vlm64.family)([image])[image.key]
        torch.testing.assert_close(features, alone.features)
        assert grid == image.grid and not features.requires_grad
        # no slice: that would keep the features of the whole call in memory
        assert features.untyped_storage().nbytes() == features.nbytes
    # beyond the limit, in bytes, they are made again
    size = sum(kept.features.nbytes for kept in first.values())
    tower_calls.clear()
    for limit, kept in ((size, 3), (size - 1, 2)):
        encode = ImageEncoder(vlm64.family, room=limit)
        assert all(len(encode(images[:3])) == 3 for _ in range(2)) and len(encode.cache) == kept
    assert tower_calls == [3, 3, 1]


@pytest.mark.parametrize("train_vision", [False, True])
def test_a_step_encodes_each_image_once(vlm64, mixed, tower_calls, train_vision):
    method, batch = build(vlm64, "current", [mixed[0]] * 2, train_vision=train_vision)
    tower_calls.clear()
    for _ in range(2):
        method(batch)
    # in every step where the tower trains, and then with a gradient
    assert tower_calls == ([2, 2] if train_vision else [2])
    assert len(method.encode_images.cache) == (0 if train_vision else 2)
    assert all(e.features.requires_grad == train_vision for e in images_of(method, batch).values())


def test_stored_targets_keep_what_fits_and_survive_in_the_state_of_a_run():
    h = {("train", n): torch.full((4,), float(n)) for n in range(3)}
    rows = list(h)
    stored = StoredTargets(limit=2 * 16)
    assert stored.add_and_look_up(rows[::-1], h)[:, 0].tolist() == [2, 1, 0]
    assert list(stored.cache) == rows[:2]
    loaded = StoredTargets(limit=2 * 16)
    loaded.load(stored.state())
    # the kept ones come from memory, beside one that was made again
    h_R = loaded.add_and_look_up(rows, {rows[2]: h[rows[2]] + 5})
    assert h_R[:, 0].tolist() == [0, 1, 7] and list(loaded.cache) == rows[:2]
