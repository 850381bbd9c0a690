"""Claims: lambda = 0 is SFT to the last gradient; the JEPA target is a constant; each image is encoded once; [PRED] rows train
under LoRA; one batch can be overfitted; the same seed gives the same run; a run's checkpoint answers as plain transformers do."""

import dataclasses
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import evaluate
import train
from baselines import variants
from support import records, images, packing, run_folder, options
from world import scenes
from conftest import TINY
from model import VLM, read_tensors
from predictor import LatentScale, Predictor


def setup(vlm, examples, config):
    """Everything a step needs, in the model's own precision."""
    vlm.set_trainable(config.lora_rank, config.lora_alpha, 0.0, ["q_proj", "v_proj", "down_proj"], config.train_vision)
    torch.manual_seed(1)
    for name, p in vlm.named_parameters():
        if "lora_B" in name:  # away from zero, so that every gradient is there
            torch.nn.init.normal_(p, std=0.02)
    predictor = Predictor(vlm.dim, config.pred_tokens, torch.randn(vlm.dim), config.nextlat_sees_next)
    torch.nn.init.normal_(predictor.latent.mlp[-1].weight, std=0.02)
    vlm.double(), predictor.double()
    return predictor, train.Examples(examples, vlm, config)


def step_of(vlm, predictor, examples, rows, config):
    return train.train_step(train.Step(vlm, predictor, examples, config), rows, config)


def gradients(loss, vlm, predictor):
    named = [(n, p) for m in (vlm, predictor) for n, p in m.named_parameters() if p.requires_grad]
    return dict(zip([n for n, _ in named], torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)))


def embeddings(vlm, predictor, examples, rows, which, config):
    """h^_R or h_R of the rows, one example at a time: no padding, no cache, no sharing."""
    out = []
    for row in rows:
        view = getattr(examples.views[row], which)
        features = vlm.encode_images([examples.store.inputs(i) for i in view.images])
        states, _ = vlm(data.collate([view], vlm.pad_id), features, [examples.store.grids[i] for i in view.images],
                        predictor.pred_tokens if view.inject_at else None)
        out.append(states[0, -1])
    return torch.stack(out)


def test_lambda_zero_gives_exactly_the_gradients_of_sft(vlm64, mixed, config):
    config.lambda_latent = 0.0
    predictor, examples = setup(vlm64, mixed[:4], config)
    sft, _, _ = train.compute_losses(vlm64, None, examples, [0, 1, 2, 3], config)
    pearl, _, _ = train.compute_losses(vlm64, predictor, examples, [0, 1, 2, 3], config)
    torch.testing.assert_close(sft, pearl, rtol=0, atol=0)
    one, other = gradients(sft, vlm64, predictor), gradients(pearl, vlm64, predictor)
    for name in one:
        a, b = (g if g is not None else torch.zeros(()) for g in (one[name], other[name]))
        assert torch.equal(a.expand_as(b) if a.dim() == 0 else a, b), name


@pytest.mark.parametrize("nextlat_view", ["none", "trajectory"])
def test_the_jepa_target_is_a_constant(vlm64, mixed, config, nextlat_view):
    """Gradient of L_JEPA in the step = gradient with h_R replaced by its numbers, also when the target pass carries gradient."""
    config = dataclasses.replace(config, nextlat_view=nextlat_view)
    predictor, examples = setup(vlm64, mixed[:3], config)
    rows = [0, 1, 2]
    total, parts, (predicted, target) = train.compute_losses(vlm64, predictor, examples, rows, config)
    with torch.no_grad():
        numbers = embeddings(vlm64, predictor, examples, rows, "target", config)
    torch.testing.assert_close(target, numbers)
    jepa = (1 - F.cosine_similarity(embeddings(vlm64, predictor, examples, rows, "input", config), numbers, dim=-1)).mean()
    torch.testing.assert_close(parts["jepa"], jepa.detach())
    vlm_only, _, _ = train.compute_losses(vlm64, None, examples, rows, config)
    if nextlat_view == "none":
        whole, rest, naive = (gradients(x, vlm64, predictor) for x in (total, vlm_only, config.lambda_latent * jepa))
        for name, g in whole.items():
            if g is not None:
                torch.testing.assert_close(g, naive[name] + (rest[name] if rest[name] is not None else 0), msg=name)
        assert whole["pred_tokens"].abs().sum() > 0


def test_the_centre_moves_in_training_and_not_in_validation(vlm64, mixed, config):
    config.center = True
    predictor, examples = setup(vlm64, mixed[:3], config)
    _, parts, (predicted, target) = train.compute_losses(vlm64, predictor, examples, [0, 1, 2], config)
    torch.testing.assert_close(predictor.centre, target.mean(0))
    centred = [x - target.mean(0) for x in (predicted, target)]
    torch.testing.assert_close(parts["jepa"], (1 - F.cosine_similarity(*centred, dim=-1)).mean())
    before = predictor.centre.clone()
    train.validate(vlm64, predictor, examples, config)
    assert torch.equal(predictor.centre, before)
    plain = dataclasses.replace(config, center=False)
    _, parts, (predicted, target) = train.compute_losses(vlm64, predictor, examples, [0, 1, 2], plain)
    torch.testing.assert_close(parts["jepa"], (1 - F.cosine_similarity(predicted, target, dim=-1)).mean())
    assert torch.equal(predictor.centre, before)


def test_frozen_targets_are_the_starting_models_and_stay(vlm64, mixed, config, monkeypatch):
    config.target_encoder = "frozen"
    predictor, examples = setup(vlm64, mixed[:3], config)
    train.cache_targets(vlm64, examples, [0, 1, 2], config)
    with torch.no_grad():
        start = embeddings(vlm64, predictor, examples, [0, 1, 2], "target", config)
        torch.testing.assert_close(torch.stack([examples.targets[row] for row in range(3)]), start)
        for name, p in vlm64.named_parameters():
            if "lora_B" in name:
                p.add_(0.1 * torch.randn_like(p))
        assert not torch.allclose(embeddings(vlm64, predictor, examples, [0, 1, 2], "target", config), start)  # the model moves on
    passes, forward = [], vlm64.forward
    monkeypatch.setattr(vlm64, "forward", lambda *a: passes.append(1) or forward(*a))
    _, parts, (predicted, target) = train.compute_losses(vlm64, predictor, examples, [2, 0], config)
    assert len(passes) == 1 and torch.equal(target, torch.stack([examples.targets[2], examples.targets[0]]))  # no pass for the target
    torch.testing.assert_close(parts["jepa"], (1 - F.cosine_similarity(predicted, start[[2, 0]], dim=-1)).mean())


def test_targets_are_cached_for_the_examples_that_the_steps_visit(config):
    config = dataclasses.replace(config, target_encoder="frozen", steps=2, batch=2, train_examples=9)
    *_, examples, valid_examples, _ = train.build(config, world=1)
    order = train.step_rows(examples, config)
    assert examples.targets.keys() == {*next(order), *next(order)} and len(examples.targets) == 4
    assert list(valid_examples.targets) == list(range(len(valid_examples.views)))


@pytest.mark.parametrize("nextlat_view, sees_next, horizon", [("full", True, 1), ("full", False, 2), ("trajectory", False, 1)])
def test_nextlat_runs_along_the_states_it_should(vlm64, mixed, config, nextlat_view, sees_next, horizon):
    config = dataclasses.replace(config, nextlat_view=nextlat_view, nextlat_sees_next=sees_next, horizon=horizon)
    predictor, examples = setup(vlm64, mixed[:2], config)
    _, parts, _ = train.compute_losses(vlm64, predictor, examples, [0, 1], config)
    sums, counts = [0.0] * horizon, [0] * horizon
    for row in range(2):
        view = getattr(examples.views[row], "full" if nextlat_view == "full" else "target")
        features = vlm64.encode_images([examples.store.inputs(i) for i in view.images])
        states, embeds = (x[0] for x in vlm64(data.collate([view], vlm64.pad_id), features,
                                              [examples.store.grids[i] for i in view.images]))
        wanted = [label != -100 for label in view.labels] if nextlat_view == "full" else [True] * len(view.ids)
        for t in range(len(view.ids) - 1):
            state = states[t]
            for i in range(1, horizon + 1):
                if t + i >= len(view.ids) or not all(wanted[t + 1:t + i + 1]):
                    break
                state = predictor.latent(state[None], embeds[t + i][None])[0]
                sums[i - 1] += F.smooth_l1_loss(state, states[t + i]).item()
                counts[i - 1] += 1
    assert float(parts["nextlat"]) == pytest.approx(sum(s / c for s, c in zip(sums, counts)) / horizon, rel=1e-6)


@pytest.mark.parametrize("fields",
                         [dict(), dict(pred_tokens=0), dict(order="image_first"), dict(nextlat_view="trajectory", horizon=2),
                          dict(nextlat_token=True, target_view="trajectory_with_image"), dict(regime="all"),
                          dict(train_vision=True)])
def test_the_packed_pass_gives_the_losses_and_gradients_of_plain_passes(vlm64, mixed, config, fields):
    config = dataclasses.replace(config, **fields)
    world = scenes.make_world("all", "train", 4) if config.regime == "all" else mixed[:5]
    predictor, examples = setup(vlm64, world, config)
    rows, found = list(range(len(world))), []
    for packed in (True, False):
        total, parts, pair = train.compute_losses(vlm64, predictor, examples, rows, dataclasses.replace(config, packed=packed))
        found.append((parts, pair, gradients(total, vlm64, predictor)))
    for one, other in zip(*(f[1] for f in found)):
        torch.testing.assert_close(one, other)
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], msg=name)
    for name, gradient in found[0][2].items():  # the model norms in float32, whatever its weights: hence the tolerance
        other = found[1][2][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-7, msg=lambda text: f"{name}: {text}")


def test_a_packed_row_says_who_sees_whom(vlm64, mixed, config):
    """The mask of a two-row batch, cell by cell."""
    _, examples = setup(vlm64, mixed[:2], config)
    batch = packing.add_branches(data.collate([v.full for v in examples.views], vlm64.pad_id), examples.views)
    features = train.image_features(vlm64, examples, batch.images, config)
    slots = torch.zeros(8, vlm64.dim, dtype=torch.float64)
    inputs = vlm64.embed(batch, [features[i] for i in batch.images], [examples.store.grids[i] for i in batch.images], slots)
    width = batch.ids.shape[1] - 4
    for row, views in enumerate(examples.views):
        prompt, full = len(views.input.ids) - 4, len(views.full.ids)
        assert batch.ids[row, :full].tolist() == views.full.ids and batch.ids[row, :prompt].tolist() == views.input.ids[:-4]
        for query in range(width + 4):
            for key in range(width + 4):
                in_branch = query >= width
                wanted = key <= query and (key < prompt or key >= width if in_branch else key < full)
                assert (inputs["attention_mask"][row, 0, query, key] == 0) == wanted, (row, query, key)
        after_prompt = inputs["position_ids"][:, row, width:] - inputs["position_ids"][:, row, prompt - 1, None]
        assert after_prompt.tolist() == [[1, 2, 3, 4]] * 3


def test_sft_makes_one_pass_and_pearl_two_and_images_are_encoded_once(vlm64, mixed, config, monkeypatch):
    predictor, examples = setup(vlm64, mixed[:2], config)
    passes, encoded = [], []
    forward, encode = vlm64.forward, vlm64.encode_images
    monkeypatch.setattr(vlm64, "forward", lambda *a: passes.append(torch.is_grad_enabled()) or forward(*a))
    monkeypatch.setattr(vlm64, "encode_images", lambda images: encoded.append(len(images)) or encode(images))
    train.compute_losses(vlm64, None, examples, [0, 1], config)
    assert passes == [True] and encoded == [4]  # two scenes and two tool images
    train.compute_losses(vlm64, predictor, examples, [0, 1], config)
    assert passes[1:] == [False, True] and encoded == [4]  # the target's pass comes first, without a graph; nothing encoded again
    train.compute_losses(vlm64, predictor, examples, [0, 1], dataclasses.replace(config, packed=False))
    assert passes[3:] == [False, True, True] and encoded == [4]


def test_a_trained_vision_tower_gets_gradient_and_is_encoded_every_step(vlm64, mixed, config, monkeypatch):
    config.train_vision = True
    predictor, examples = setup(vlm64, mixed[:2], config)
    encoded, encode = [], vlm64.encode_images
    monkeypatch.setattr(vlm64, "encode_images", lambda images: encoded.append(len(images)) or encode(images))
    for _ in range(2):
        loss, _, _ = train.compute_losses(vlm64, predictor, examples, [0, 1], config)
    assert encoded == [4, 4] and not examples.features
    assert any("visual" in name and g is not None and g.abs().sum() > 0 for name, g in gradients(loss, vlm64, predictor).items())


def test_cached_features_change_nothing(vlm64, mixed, config):
    predictor, examples = setup(vlm64, mixed[:3], config)
    first, _, _ = train.compute_losses(vlm64, predictor, examples, [0, 1, 2], config)
    cached, _, _ = train.compute_losses(vlm64, predictor, examples, [0, 1, 2], config)
    config.feature_cache_gb = 0.0
    examples.features.clear()
    without, _, _ = train.compute_losses(vlm64, predictor, examples, [0, 1, 2], config)
    assert not examples.features and torch.equal(first, cached) and torch.equal(first, without)


def test_features_on_disk_serve_the_next_run_and_no_other_image_or_model(vlm64, mixed, config, tmp_path, monkeypatch):
    config.feature_cache = str(tmp_path / "features")
    encoded, encode = [], VLM.encode_images
    monkeypatch.setattr(VLM, "encode_images", lambda vlm, images: encoded.append(len(images)) or encode(vlm, images))

    def features_of(vlm, given):
        examples = train.Examples(given, vlm, config)
        return train.image_features(vlm, examples, [0, 1], config)

    first, again = features_of(vlm64, mixed[:1]), features_of(vlm64, mixed[:1])
    assert encoded == [2] and len(list((tmp_path / "features").iterdir())) == 2
    assert all(torch.equal(first[i], again[i]) for i in (0, 1))
    features_of(vlm64, [dataclasses.replace(mixed[0], image=mixed[1].image)])
    assert encoded == [2, 1]  # I0 is another, the crop the same
    with torch.no_grad():
        next(p for name, p in vlm64.lm.named_parameters() if "visual" in name).add_(1e-3)
    changed = features_of(vlm64, mixed[:1])
    assert encoded == [2, 1, 2] and not torch.equal(changed[0], first[0])


@pytest.mark.parametrize("count, batch", [(12, 4), (12, 5), (7, 2), (3, 4)])
def test_processes_share_a_step_without_losing_or_repeating_an_example(config, count, batch):
    rows, config = list(range(100, 100 + count)), dataclasses.replace(config, batch=batch)
    for world in (1, 2, 3):
        passes = [part for rank in range(world) for part in train.own_passes(rows, config, rank, world)]
        assert sorted(row for part in passes for row in part) == rows and max(map(len, passes)) <= batch


def test_images_made_ready_in_the_background_are_the_same_and_only_the_next_passs(vlm64, mixed, config, monkeypatch):
    plain = train.Examples(mixed[:4], vlm64, dataclasses.replace(config, workers=0))
    ready = train.Examples(mixed[:4], vlm64, dataclasses.replace(config, workers=2))
    ready.prefetch([0, 1])
    assert set(ready.store.coming) == {i for v in ready.views[:2] for i in v.full.images}
    for i in range(len(ready.store.pictures)):
        assert all(torch.equal(t, ready.store.inputs(i)[k]) for k, t in plain.store.inputs(i).items())
    ready.prefetch([2, 3])
    ready.prefetch([3])  # what was begun for 2 and not used is not kept
    assert set(ready.store.coming) == set(ready.views[3].full.images)
    asked = []
    monkeypatch.setattr(train.Examples, "prefetch", lambda self, rows: asked.append(list(rows)))
    module = train.Step(vlm64, None, plain, dataclasses.replace(config, method="sft", batch=2))
    train.train_step(module, [0, 1, 2, 3], module.config, upcoming=[3, 2, 1, 0])
    assert asked == [[2, 3], [3, 2]]


def test_passes_of_one_step_hold_examples_of_similar_length(config, monkeypatch):
    """Which examples share a step is left to chance; how they share its passes is not."""
    seen, step = [], train.train_step
    lengths = lambda module, rows: [(len(module.examples.views[r].full.ids), r) for r in rows]
    monkeypatch.setattr(train, "train_step",
                        lambda module, rows, *rest: seen.append(lengths(module, rows)) or step(module, rows, *rest))
    train.train(dataclasses.replace(config, regime="multi", steps=1, accumulate=3, eval_every=1))
    order = next(train.batches(12, 12, config.seed))
    assert [n for n, _ in seen[0]] == sorted(n for n, _ in seen[0]) and {r for _, r in seen[0]} == set(order)
    assert len({n for n, _ in seen[0]}) > 1


def test_both_trains_on_trajectories_and_on_bare_answers(vlm64, mixed, config):
    """Every example twice: the views of --method sft, then those of --method direct, which supervise the answer alone."""
    sft, direct, both = (train.Examples(mixed, vlm64, dataclasses.replace(config, method=m)).views for m in ("sft", "direct", "both"))
    ids = lambda views: [(v.full.ids, v.full.labels) for v in views]
    assert len(both) == 2 * len(mixed) and ids(both) == ids(sft) + ids(direct)
    for view, example in zip(direct, mixed):
        said = vlm64.tokenizer.decode([token for token in view.full.labels if token != -100])
        assert said == f"{config.answer_prefix} {example.answer}<|im_end|>"


def test_control_targets_are_another_examples_or_fixed_noise(config):
    h = torch.randn(4, 6)
    own = variants.control_targets(h, [7, 8, 9, 10], config)
    assert own is h
    shuffled = variants.control_targets(h, [7, 8, 9, 10], dataclasses.replace(config, targets="shuffled"))
    assert sorted(shuffled.tolist()) == sorted(h.tolist()) and all(not torch.equal(a, b) for a, b in zip(shuffled, h))
    random = dataclasses.replace(config, targets="random")
    drawn = variants.control_targets(h, [7, 8, 9, 10], random)
    again = variants.control_targets(torch.randn(4, 6), [8, 7, 9, 10], random)
    torch.testing.assert_close(F.normalize(drawn[0], dim=0), F.normalize(again[1], dim=0))  # row 7's vector, wherever it stands
    torch.testing.assert_close(drawn.norm(dim=1), h.norm(dim=1))
    assert F.cosine_similarity(drawn[0], drawn[1], dim=0).abs() < 0.999


def test_averaged_targets_keep_the_family_or_the_answer(vlm64, config):
    """Against means taken by hand from the targets themselves; rows that were not cached are in no mean."""
    world = scenes.make_world("mixed", "train", 60, seed=1)
    rows = list(range(50))
    config = dataclasses.replace(config, target_encoder="frozen", batch=16)
    own = train.Examples(world, vlm64, config)
    train.cache_targets(vlm64, own, rows, config)
    for by in ("family", "answer"):
        averaged = train.Examples(world, vlm64, config)
        train.cache_targets(vlm64, averaged, rows, dataclasses.replace(config, targets=by))
        assert list(averaged.targets) == rows
        sizes = []
        for row in rows:
            alike = [r for r in rows if world[r].family == world[row].family and (by == "family" or world[r].answer == world[row].answer)]
            sizes.append(len(alike))
            torch.testing.assert_close(averaged.targets[row], sum(own.targets[r] for r in alike) / len(alike))
        assert max(sizes) > 1
    with pytest.raises(SystemExit):
        train.parse_config(["--targets", "answer", "--target_encoder", "current"])


def test_shuffled_targets_change_the_loss_and_no_jepa_drops_it(vlm64, mixed, config):
    predictor, examples = setup(vlm64, mixed[:3], config)
    _, parts, (predicted, target) = train.compute_losses(vlm64, predictor, examples, [0, 1, 2],
                                                         dataclasses.replace(config, targets="shuffled"))
    swapped = target[[2, 0, 1]]
    torch.testing.assert_close(parts["jepa"], (1 - F.cosine_similarity(predicted, swapped, dim=-1)).mean())
    _, parts, _ = train.compute_losses(vlm64, predictor, examples, [0, 1, 2], dataclasses.replace(config, jepa=False))
    assert parts["jepa"] == 0
    torch.testing.assert_close(parts["loss"], parts["vlm"] + config.lambda_latent * parts["nextlat"])


@pytest.mark.parametrize("latents", [0, 3])
def test_reconstruction_step_against_a_loop(vlm64, config, latents):
    """Each latent by hand: its visual embedding in standard units, and the state of the position before it."""
    config = dataclasses.replace(config, method="recon", latents=latents, lambda_latent=0.5)
    world = [ex for ex in scenes.make_world("multi", "train", 9) if len(ex.images) > 2][:2] + scenes.make_world("mixed", "train", 2)
    _, examples = setup(vlm64, world, config)
    scale = train.additions(vlm64, examples, config)
    rows = list(range(len(world)))
    total, parts, _ = train.compute_losses(vlm64, scale, examples, rows, config)
    errors = []
    for row in rows:
        view, full = examples.latent_views[row], examples.views[row].full
        visual = [vlm64.encode_images([examples.store.inputs(i)])[0][0] for i in full.images[1:]]
        if latents:
            chunks = lambda v: torch.tensor_split(v, [len(v) * n // latents for n in range(1, latents)])
            visual = [torch.stack([chunk.mean(0) for chunk in chunks(v)]) for v in visual]
        assert len(view.inject_at) == sum(map(len, visual)) and view.images == full.images[:1]
        features = vlm64.encode_images([examples.store.inputs(view.images[0])])
        states, embeds = vlm64(data.collate([view], vlm64.pad_id), features, [examples.store.grids[view.images[0]]],
                               torch.cat(visual))
        for slot, v in zip(view.inject_at, torch.cat(visual)):
            torch.testing.assert_close(embeds[0, slot], v)
            size = vlm64.lm.model.language_model.norm.weight.square().mean().sqrt()
            errors.append((states[0, slot - 1] / size - (v - scale.mean) / scale.std).square().mean())
    torch.testing.assert_close(parts["recon"], torch.stack(errors).mean().detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.detach(), parts["vlm"] + 0.5 * parts["recon"])


def test_latent_scale_is_standard_units_and_its_input_the_inverse():
    embeddings, norm = torch.randn(50, 6) * 10 + 3, torch.full((6,), 2.0)
    scale = LatentScale(embeddings, norm)
    units = scale.target(embeddings)
    torch.testing.assert_close(units.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(units.std(0), torch.ones(6))
    torch.testing.assert_close(scale.input(units * 2.0), embeddings)  # a state that predicts perfectly is fed back as the embedding


def test_accumulation_equals_one_large_batch(vlm64, mixed, config):
    """For rows with equally many supervised tokens; L_VLM is a mean over the tokens of a pass."""
    config = dataclasses.replace(config, nextlat_view="none")
    predictor, examples = setup(vlm64, mixed, config)
    words = [sum(label != -100 for label in v.full.labels) for v in examples.views]
    rows = [i for i, n in enumerate(words) if n == max(set(words), key=words.count)]
    rows = rows[:len(rows) // 2 * 2]
    assert len(rows) >= 2
    grads = []
    for batch in (len(rows), len(rows) // 2):
        vlm64.zero_grad()
        parts, pair = step_of(vlm64, predictor, examples, rows, dataclasses.replace(config, batch=batch))
        grads.append({n: p.grad.clone() for n, p in vlm64.named_parameters() if p.grad is not None})
        assert len(pair[0]) == len(rows)
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], msg=name)


def test_batches_show_every_example_once_an_epoch_in_the_seeds_order():
    take = lambda seed: [next(gen) for gen in [train.batches(10, 4, seed)] for _ in range(5)]
    rows = [i for batch in take(0) for i in batch]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert take(0) == take(0) != take(1)


def test_one_batch_can_be_overfitted(mixed, config):
    """Under LoRA: every word the expert uses can be said by the frozen embeddings and head."""
    torch.manual_seed(0)
    vlm = VLM(TINY)
    vlm.set_trainable(16, 32.0, 0.0, config.lora_targets.split(","), False)
    examples = train.Examples(mixed[:2], vlm, config)
    predictor = Predictor(vlm.dim, 4, vlm.lm.get_input_embeddings().weight[0])
    adam = torch.optim.AdamW([p for m in (vlm, predictor) for p in m.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    history = []
    for _ in range(40):
        loss, parts, _ = train.compute_losses(vlm, predictor, examples, [0, 1], config)
        adam.zero_grad()
        loss.backward()
        adam.step()
        history.append(float(parts["vlm"]))
    assert history[-1] < 0.1 * history[0] and float(parts["jepa"]) < 0.05


def test_pred_rows_move_under_lora(mixed, config):
    torch.manual_seed(0)
    vlm = VLM(TINY)
    vlm.set_trainable(4, 8.0, 0.0, ["q_proj"], False)
    examples = train.Examples(mixed[:3], vlm, config)
    predictor = Predictor(vlm.dim, 4, vlm.lm.get_input_embeddings().weight[0])
    before = predictor.pred_tokens.detach().clone()
    adam = torch.optim.AdamW([p for m in (vlm, predictor) for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    step_of(vlm, predictor, examples, [0, 1, 2], config)
    adam.step()
    assert ((predictor.pred_tokens - before).norm(dim=1) > 0.01).all()


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_trained_model_is_gone_when_its_checkpoint_is_loaded(config, monkeypatch, gradient_checkpointing):
    """Two models at once would need twice the memory, when training is over and done."""
    gc.collect()
    models = lambda: sum(type(thing) is VLM for thing in gc.get_objects())
    before, at_report = models(), []  # other tests may keep theirs
    monkeypatch.setattr(train, "report", lambda *args: at_report.append(models()))
    train.train(dataclasses.replace(config, steps=2, eval_every=2, gradient_checkpointing=gradient_checkpointing))
    assert at_report == [before]


# ---- whole runs ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    config = train.Config(device="cpu", out=str(out), steps=4, batch=4, train_examples=12, valid_examples=5, test_per_family=2,
                          eval_every=2,
                          log_every=1, lora_rank=4, lora_alpha=8.0, lr=5e-3)
    train.train(config)
    return out, config


def test_the_run_folder_holds_what_the_docstring_says(finished):
    out, config = finished
    names = {path.name for path in out.iterdir()}
    best = json.loads((out / "best.json").read_text())
    assert names == {"config.json", "environment.json", "before.json", "log.jsonl", "state.safetensors", "best.json",
                     "results.json", best["checkpoint"]}
    assert {path.name for path in (out / best["checkpoint"]).iterdir()} == {"adapter_model.safetensors", "adapter_config.json",
                                                                            "predictor.safetensors"}
    assert json.loads((out / "config.json").read_text()) == dataclasses.asdict(config)
    environment = json.loads((out / "environment.json").read_text())
    assert environment["packages"]["torch"] in (torch.__version__.split("+")[0], torch.__version__)
    assert len(environment["commit"] or "0" * 40) == 40 and environment["threads"] == torch.get_num_threads()
    assert environment["command"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if r["kind"] == "train"] == [1, 2, 3, 4]
    assert [r["lr"] for r in log if r["kind"] == "train"] == pytest.approx([0, 5e-3, 3.75e-3, 1.25e-3])  # of that very step
    valid = {r["step"]: r["loss"] for r in log if r["kind"] == "valid"}
    assert best["step"] == min(valid, key=valid.get) and best["valid"]["loss"] == min(valid.values())
    for r in log:
        assert r["loss"] == pytest.approx(r["vlm"] + config.lambda_latent * (r["jepa"] + r["nextlat"]), rel=1e-5)
        assert {"r2", "spread_pred", "spread_target", "effective_rank", "mean_cosine", "retrieval", "retrieval_chance"} <= r.keys()


def test_same_seed_same_run(finished, tmp_path):
    out, config = finished
    again = train.train(dataclasses.replace(config, out=str(tmp_path / "again")))
    strip = lambda folder: [{k: v for k, v in json.loads(line).items() if k not in ("ms", "waited")}
                            for line in (folder / "log.jsonl").read_text().splitlines()]
    assert strip(out) == strip(again)
    files = [folder / json.loads((folder / "best.json").read_text())["checkpoint"] / "adapter_model.safetensors"
             for folder in (out, again)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_merged_folder_answers_in_plain_transformers_as_the_run_does_here(finished, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
    out, config = finished
    evaluate.merge(str(out), str(tmp_path / "merged"))
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        evaluate.merge(str(out), str(tmp_path / "merged"))
    plain, tokenizer, processor = (kind.from_pretrained(tmp_path / "merged")
                                   for kind in (AutoModelForImageTextToText, AutoTokenizer, AutoImageProcessor))
    vlm, _, _ = evaluate.load_run(out, "cpu")
    serializer, store = data.Serializer(vlm.family, 2048), images.ImageStore(vlm.family)
    for ex in scenes.make_world("mixed", "test", 5):
        text = tokenizer.apply_chat_template([dict(role="user", content=[dict(type="image"), dict(type="text", text=ex.question)])],
                                             tokenize=False, add_generation_prompt=True)
        pixels = processor(images=[ex.image], return_tensors="pt")
        count = int(pixels["image_grid_thw"].prod()) // processor.merge_size ** 2
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt",
                        add_special_tokens=False).input_ids
        expected = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                                  mm_token_type_ids=(ids == vlm.lm.config.image_token_id).int(), **pixels,
                                  max_new_tokens=6, do_sample=False)
        images, tokens = store.add(ex)
        assert vlm.generate([serializer.prompt(ex, images[:1], tokens[:1])], store, 6)[0] == expected[0, ids.shape[1]:].tolist()


def test_gradient_checkpointing_changes_no_gradient(vlm64, mixed, config):
    predictor, examples = setup(vlm64, mixed[:2], config)
    vlm64.train()
    plain = gradients(train.compute_losses(vlm64, predictor, examples, [0, 1], config)[0], vlm64, predictor)
    getattr(vlm64.lm, "activation_checkpointing_enable", vlm64.lm.gradient_checkpointing_enable)(dict(use_reentrant=False))
    calls, layer = [], vlm64.lm.model.language_model.layers[1]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    again = gradients(train.compute_losses(vlm64, predictor, examples, [0, 1], config)[0], vlm64, predictor)
    assert len(calls) > 2  # the full and input pass, the target pass, and the first one anew on the way back
    for name, g in plain.items():
        torch.testing.assert_close(g, again[name], msg=name)


def test_inference_does_not_open_the_predictor(finished, tmp_path):
    import shutil
    out, _ = finished
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    tests = scenes.make_world("mixed", "test", 5)
    answers = evaluate.answer_questions(evaluate.load_run(out, "cpu")[0], tests)
    for file in copy.glob("checkpoint-*/predictor.safetensors"):
        file.write_bytes(b"not a predictor")
    assert evaluate.answer_questions(evaluate.load_run(copy, "cpu")[0], tests) == answers


def test_a_run_is_never_overwritten(finished):
    out, config = finished
    with pytest.raises(FileExistsError, match="choose another --out"):
        train.train(config)


def test_a_folder_of_ones_own_trains_and_bad_ones_stop_before_training(tmp_path):
    rows = [ex for split, n in (("train", 6), ("validation", 3), ("test", 2)) for ex in scenes.make_world("all", split, n)]
    records.write_folder(tmp_path / "set", rows)
    small = ["--device", "cpu", "--steps", "2", "--batch", "2", "--lora_rank", "2", "--method", "sft"]
    train.train(train.parse_config(["--data", str(tmp_path / "set"), "--out", str(tmp_path / "run"), *small]))
    assert len(json.loads((tmp_path / "run" / "results.json").read_text())["answers"]) == 2
    capped = train.load_examples(train.parse_config(["--data", str(tmp_path / "set"), "--valid_examples", "2",
                                                     "--test_per_family", "1"]))
    assert [len(part) for part in capped] == [6, 2, 2] and len({ex.family for ex in capped[2]}) == 2
    (tmp_path / "set" / "images").rename(tmp_path / "set" / "pictures")
    done = subprocess.run([sys.executable, train.__file__, "--data", str(tmp_path / "set"), "--out", str(tmp_path / "other"),
                           *small],
                          capture_output=True, text=True)
    assert done.returncode == 1 and "line 1: image" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "other").exists()


# ---- interruption, several processes ----

TINY_RUN = ["--device", "cpu", "--steps", "12", "--batch", "2", "--train_examples", "8", "--valid_examples", "4",
            "--test_per_family", "1", "--eval_every", "3",
            "--save_every", "2", "--log_every", "1", "--lora_rank", "2", "--lora_dropout", "0.1", "--lr", "5e-3"]


def contents(run):
    """What a run must end with, bit for bit: weights, moments, log without times, answers."""
    strip = lambda line: {k: v for k, v in json.loads(line).items() if k not in ("ms", "waited")}
    results = json.loads((run / "results.json").read_text())
    return dict(state={name: t.numpy().tobytes() for name, t in load_file(run / "state.safetensors").items()},
                log=[strip(line) for line in (run / "log.jsonl").read_text().splitlines()],
                best=json.loads((run / "best.json").read_text()), answers=results["answers"],
                adapter=[p.read_bytes() for p in sorted(run.glob("checkpoint-*/*.safetensors"))], names=sorted(p.name for p in run.iterdir()))


def launch(*args):
    return subprocess.Popen([sys.executable, train.__file__, *args], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    said, _ = launch(*TINY_RUN, "--out", str(out)).communicate()
    assert (out / "results.json").is_file(), said
    return contents(out)


def test_a_run_killed_at_random_moments_ends_as_the_uninterrupted_one(uninterrupted, tmp_path):
    """SIGKILL at three random moments of the loop, in a step, a validation or a write, then --resume to the end."""
    run, moments = tmp_path / "run", []
    for n in range(3):
        process = launch(*(["--resume", str(run)] if n else [*TINY_RUN, "--out", str(run)]))
        next((line for line in process.stdout if "ms/step" in line), None)  # None: it was over before
        moments.append(random.uniform(0, 0.3))
        time.sleep(moments[-1])
        process.kill()
        process.communicate()
    if not (run / "results.json").is_file():
        train.train(run_folder.read_config(train.Config, [str(run)]), resume=True)
    ended = contents(run)
    for key, value in uninterrupted.items():
        assert ended[key] == value, (key, moments)
    with pytest.raises(ValueError, match="is finished"):
        run_folder.read_config(train.Config, [str(run)])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_loop_saves_and_says_how_to_go_on(uninterrupted, tmp_path, number):
    run, said = tmp_path / "run", ""
    process = launch(*TINY_RUN, "--out", str(run))
    for line in process.stdout:
        said += line
        if line.lstrip().startswith("3/12"):
            process.send_signal(number)
    assert process.wait() == 0 and "saving after this step" in said and "--resume" in said
    assert int(read_tensors(run / "state.safetensors")[1]["step"]) < 12 and not (run / "results.json").is_file()
    train.train(run_folder.read_config(train.Config, [str(run)]), resume=True)
    assert contents(run) == uninterrupted


def torchrun(*args: str) -> None:
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *args],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def assert_same_weights(*runs: Path) -> None:
    one, two = (load_file(run / "state.safetensors") for run in runs)
    for name in one:
        if name.startswith("weight/"):
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5, msg=lambda text: f"{name}: {text}")


SHARDED = """
import sys
sys.path.insert(0, {root!r})
import train
from model import VLM, read_tensors
shard = VLM.shard_frozen

def watched(vlm, device, processes):
    layers = vlm.lm.get_decoder().layers
    whole = {{name: p.numel() for name, p in layers.named_parameters()}}
    shard(vlm, device, processes)
    for name, p in layers.named_parameters():
        assert p.numel() == whole[name] and (p.requires_grad or p.to_local().numel() == whole[name] // 2), name

VLM.shard_frozen = watched
train.main()
"""


def test_sharding_wants_several_processes_and_frozen_weights(config, monkeypatch):
    with pytest.raises(ValueError, match="with torchrun and two or more"):
        train.train(dataclasses.replace(config, shard=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="with --lora_rank"):
        train.train(dataclasses.replace(config, shard=True, lora_rank=0))


def test_two_processes_train_as_one(tmp_path):
    """torchrun with two gloo processes against one process: the same passes, so the same weights. With --shard, each process
    holds half of every frozen weight of the layers."""
    options = [*TINY_RUN, "--accumulate", "4", "--steps", "3", "--lora_dropout", "0", "--eval_every", "3", "--targets", "shuffled"]
    train.train(train.parse_config([*options, "--out", str(tmp_path / "one")]))
    torchrun(train.__file__, *options, "--out", str(tmp_path / "two"))
    assert_same_weights(tmp_path / "one", tmp_path / "two")
    (tmp_path / "sharded.py").write_text(SHARDED.format(root=str(Path(train.__file__).parent)))
    torchrun(str(tmp_path / "sharded.py"), *options, "--shard", "true", "--gradient_checkpointing", "true", "--track", "2",
             "--out", str(tmp_path / "shards"))
    assert_same_weights(tmp_path / "one", tmp_path / "shards")
    logs = [[json.loads(line) for line in open(tmp_path / name / "log.jsonl")][-1] for name in ("two", "shards")]
    assert logs[0]["kind"] == "valid" and logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-3)
    vlm, _, _ = evaluate.load_run(tmp_path / "shards", "cpu")
    assert evaluate.answer_questions(vlm, scenes.make_world("mixed", "test", 2))


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, config, monkeypatch):
    """Interrupted as one process, ended by two: the weights of one uninterrupted process."""
    config = dataclasses.replace(config, steps=3, accumulate=2, batch=2, save_every=1, eval_every=3, out=str(tmp_path / "whole"))
    train.train(config)
    half = dataclasses.replace(config, out=str(tmp_path / "half"))
    train_step, steps = train.train_step, []
    monkeypatch.setattr(train, "train_step", lambda *args: train_step(*args) if steps.append(1) or len(steps) < 3 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(half)
    torchrun(train.__file__, "--resume", half.out)
    assert_same_weights(tmp_path / "whole", tmp_path / "half")


def test_steps_without_a_finite_gradient_are_skipped_then_stop(tmp_path, config, monkeypatch, capsys):
    calls, compute = [], train.compute_losses

    def broken(vlm, extra, examples, rows, config):
        total, parts, pair = compute(vlm, extra, examples, rows, config)
        calls.append(1)
        return (total * float("nan") if len(calls) != 1 and torch.is_grad_enabled() else total), parts, pair

    monkeypatch.setattr(train, "compute_losses", broken)
    with pytest.raises(ValueError, match="five steps in a row"):
        train.train(dataclasses.replace(config, out=str(tmp_path / "run"), steps=9, eval_every=9, save_every=1, method="sft"))
    assert capsys.readouterr().out.count("step skipped") == 5
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert all(torch.isfinite(t).all() for name, t in state.items() if name.startswith("weight/"))


# ---- the command line ----


def test_help_says_what_every_option_means(capsys):
    with pytest.raises(SystemExit):
        train.parse_config(["--help"])
    said = " ".join(capsys.readouterr().out.partition("\noptions:")[2].split())
    assert "--lr FLOAT peak; linear warm-up, then cosine to zero (default: 0.001)" in said
    for f in dataclasses.fields(train.Config):
        meaning = said.partition(f" --{f.name} ")[2].partition("(default:")[0]
        assert 2 < len(meaning.split()) < 40, f.name


def test_recipes_set_defaults_and_options_win():
    paper = train.parse_config(["--recipe", "paper"])
    assert (paper.distance, paper.nextlat_view, paper.lambda_latent) == ("smoothl1", "trajectory", 0.2)
    mine = train.parse_config(["--recipe", "paper", "--distance", "mse", "--train_vision", "True"])
    assert mine.distance == "mse" and mine.nextlat_view == "trajectory" and mine.train_vision is True
    assert train.parse_config(["--train-vision", "false"]).train_vision is False
    assert train.parse_config(["--method", "sft", "--seed", "3"]).out == "runs/sft-mixed-seed3"
    for fields in options.RECIPES.values():
        assert fields.keys() <= {f.name for f in dataclasses.fields(train.Config)}


@pytest.mark.parametrize("argv, message", [
    (["--regime", "triple"], "single.*mixed.*multi.*all"), (["--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
    (["--steps", "0"], "--steps must be at least 1"), (["--train_vision", "maybe"], "write true or false"), (["--distance", "dot"], "cosine")])
def test_bad_options_name_the_good_ones(argv, message, capsys):
    import re
    with pytest.raises(SystemExit):
        train.parse_config(argv)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("recipe", list(options.RECIPES))
@pytest.mark.parametrize("regime", list(scenes.REGIMES))
def test_every_recipe_steps_in_every_regime(recipe, regime, config):
    fields = {**options.RECIPES[recipe], "regime": regime}
    config = dataclasses.replace(config, **fields)
    vlm = VLM(TINY)
    vlm.set_trainable(2, 4.0, config.lora_dropout, ["q_proj"], False)
    examples = train.Examples(scenes.make_world(regime, "train", 3), vlm, config)
    predictor = Predictor(vlm.dim, 4, vlm.lm.get_input_embeddings().weight[0], config.nextlat_sees_next)
    parts, pair = step_of(vlm, predictor, examples, [0, 1, 2], config)
    assert all(torch.isfinite(value) and value > 0 for value in parts.values()) and pair[0].shape == (3, vlm.dim)
    assert predictor.pred_tokens.grad.abs().sum() > 0 and any(p.grad is not None for p in vlm.parameters())
