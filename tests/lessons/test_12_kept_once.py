"""Claims: an image is encoded once while the vision tower is frozen, and in every step when it
trains; a target is made once; what does not fit into memory is made again."""

import pytest
import torch

from support.features import ImageEncoder, StoredTargets, load_images, with_pixels

from conftest import build, images_of


@pytest.fixture
def counted(vlm64, monkeypatch):
    """The number of images in each call of the vision tower."""
    calls, real = [], vlm64.family.features
    monkeypatch.setattr(vlm64.family, "features",
                        lambda images: calls.append(len(images)) or real(images))
    return calls


def test_a_frozen_tower_encodes_each_image_once_within_a_limit(vlm64, mixed, counted):
    images = [image for example in mixed[:2]
              for image in with_pixels(load_images(example, vlm64.family), vlm64.family)]
    encode = ImageEncoder(vlm64.family)
    first = encode(images[:2] + images[1:3])
    again = encode(images)
    assert counted == [3, 1] and again.keys() == {image.key for image in images}
    assert all(again[key] is first[key] for key in first)
    for image in images:
        (features, grid), alone = again[image.key], ImageEncoder(vlm64.family)([image])[image.key]
        torch.testing.assert_close(features, alone.features)
        assert grid == image.grid and not features.requires_grad
        # no slice: that would keep the features of the whole call in memory
        assert features.untyped_storage().nbytes() == features.nbytes
    assert encode.size == sum(kept.features.nbytes for kept in again.values())
    # beyond the limit, in bytes, they are made again
    size = sum(kept.features.nbytes for kept in first.values())
    counted.clear()
    for limit, kept in ((size, 3), (size - 1, 2), (0, 0)):
        encode = ImageEncoder(vlm64.family, limit=limit)
        assert all(len(encode(images[:3])) == 3 for _ in range(2)) and len(encode.cache) == kept
    assert counted == [3, 3, 1, 3, 3]


@pytest.mark.parametrize("train_vision", [False, True])
def test_a_step_encodes_each_image_once(vlm64, mixed, counted, train_vision):
    method, batch = build(vlm64, "current", [mixed[0]] * 2, train_vision=train_vision)
    counted.clear()
    for _ in range(2):
        method(batch)
    # in every step where the tower trains, and then with a gradient
    assert counted == ([2, 2] if train_vision else [2])
    assert len(method.encode_images.cache) == (0 if train_vision else 2)
    assert all(e.features.requires_grad == train_vision for e in images_of(method, batch).values())
    with torch.no_grad():
        assert not any(e.features.requires_grad for e in images_of(method, batch).values())


def test_stored_targets_keep_what_fits_and_survive_a_file():
    h = {("train", n): torch.full((4,), float(n)) for n in range(3)}
    rows = list(h)
    stored = StoredTargets(limit=2 * 16)
    assert stored.look_up(rows[::-1], h)[:, 0].tolist() == [2, 1, 0]
    assert list(stored.cache) == rows[:2]
    # later the kept ones come from memory, beside one that was made again
    h_R = stored.look_up(rows, {rows[2]: h[rows[2]] + 5})
    assert h_R[:, 0].tolist() == [0, 1, 7]
    loaded = StoredTargets(limit=2 * 16)
    loaded.load(stored.state())
    assert list(loaded.cache) == rows[:2] and loaded.size == stored.size == 32
    assert loaded.look_up(rows[:2], {})[:, 0].tolist() == [0, 1]
    empty = StoredTargets(8e9)
    empty.load(empty.state())
    assert len(empty) == 0
