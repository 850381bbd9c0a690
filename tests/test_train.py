"""Claims: lambda = 0 is SFT to the last gradient; the JEPA target is a constant; each image is
encoded once; packed = plain; [PRED] rows train under LoRA; one batch can be overfitted; a run that
is interrupted ends as it would have; several processes train as one; a run's checkpoint answers as
plain transformers do."""

import dataclasses
import gc
import json
import math
import random
import re
import shutil
import signal
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import data
import evaluate
import train
from baselines import reconstruction, variants
from baselines.reconstruction import LatentScale
from model import VLM
from predictor import Predictor
from support import options, packing, processes, records
from support.files import read_tensors
from support.images import EncodedImage
from world import loader, scenes

from conftest import TINY
from programs import Program, together


def setup(vlm, examples, config):
    """Everything a step needs, in the model's own precision, with LoRA away from its zero start so
    that every gradient is there."""
    vlm.set_trainable(config.lora_rank, config.lora_alpha, 0.0, ["q_proj", "v_proj", "down_proj"],
                      config.train_vision)
    torch.manual_seed(1)
    stir_lora(vlm, 0.02)
    predictor = Predictor(vlm.dim, config.pred_tokens, torch.randn(vlm.dim),
                          config.nextlat_sees_next)
    torch.nn.init.normal_(predictor.latent.mlp[-1].weight, std=0.02)
    vlm.double(), predictor.double()
    return predictor, train.prepared(examples, vlm, config)


def stir_lora(vlm, std):
    for name, p in vlm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=std)


def step_of(module, rows):
    """A step that leaves weights as they are and gradients unclipped."""
    config = dataclasses.replace(module.config, clip=1e9)
    parameters = [p for p in module.parameters() if p.requires_grad]
    return train.train_step(module, torch.optim.SGD(parameters, lr=0.0), rows, config)


def gradients(loss, *modules):
    named = [(n, p) for m in modules for n, p in m.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    return dict(zip([n for n, _ in named], found))


def same_gradients(one, other, rtol=1e-7, atol=1e-9):
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert (gradient is None) == (other[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradient, other[name], rtol=rtol, atol=atol,
                                       msg=lambda text: f"{name}: {text}")


def shown(vlm, store, numbers):
    """These images, encoded one by one, past the store's memory."""
    return {i: EncodedImage(vlm.family.features([store.inputs(i)])[0], store.grids[i])
            for i in numbers}


def alone(vlm, predictor, examples, row, which):
    """Enc of one view of one example: no padding, no cache, no sharing."""
    view = getattr(examples.views[row], which)
    return vlm(data.collate([view], vlm.pad_id), shown(vlm, examples.store, view.images),
               predictor.pred_tokens if view.inject_at else None)


def embeddings(vlm, predictor, examples, rows, which):
    """h^_R or h_R of the rows, (B, D), one example at a time."""
    return torch.cat([alone(vlm, predictor, examples, row, which).embedding for row in rows])


def cosine_loss(predicted, target):
    return (1 - F.cosine_similarity(predicted, target, dim=-1)).mean()


@pytest.fixture
def counted(monkeypatch):
    """Of a model: passes, each with whether it carries gradient, and images encoded at once."""
    def watch(vlm):
        passes, encoded = [], []
        forward, features = vlm.forward, vlm.family.features
        monkeypatch.setattr(
            vlm, "forward", lambda *a: passes.append(torch.is_grad_enabled()) or forward(*a))
        monkeypatch.setattr(
            vlm.family, "features", lambda new: encoded.append(len(new)) or features(new))
        return passes, encoded
    return watch


# ---- views, as training sees them ----


def naive_tokens(vlm, example, image_texts):
    """A second serialisation of the full view: by hand, piece after piece, each tokenised alone."""
    ids, labels, shown = [], [], iter(image_texts)

    def say(text, supervised=False):
        tokens = vlm.tokenizer(text, add_special_tokens=False).input_ids
        ids.extend(tokens)
        labels.extend(tokens if supervised else [-100] * len(tokens))

    say(f"<|im_start|>user\n<|vision_start|>{next(shown)}<|vision_end|>{example.question}"
        "<|im_end|>\n")
    for n, part in enumerate(example.trajectory):
        if isinstance(part, str):
            say("<|im_start|>assistant\n")
            say(part + "<|im_end|>", supervised=True)
        else:
            say(f"<|im_start|>user\n<|vision_start|>{next(shown)}<|vision_end|><|im_end|>")
        if n < len(example.trajectory) - 1:
            say("\n")
    return ids, labels


@pytest.mark.parametrize("fields", [dict(), dict(order="image_first"), dict(method="direct")])
def test_a_rows_tokens_are_those_of_a_second_serialisation(shipped, config, fields):
    config = dataclasses.replace(config, **fields)
    world = scenes.make_world("all", "train", 8) + scenes.make_world("multi", "train", 4)
    examples = train.prepared(world, shipped, config)
    taught = variants.as_taught(world, config)
    for example, views in zip(taught, examples.views, strict=True):
        texts = [examples.store.image_texts[i] for i in views.full.images]
        ids, labels = naive_tokens(shipped, example, texts)
        assert (views.full.ids, views.full.labels) == (ids, labels)
        asked = ids.index(shipped.tokenizer.convert_tokens_to_ids("<|im_end|>")) + 2
        header = shipped.tokenizer("<|im_start|>assistant\n", add_special_tokens=False).input_ids
        assert views.input.ids == ids[:asked] + header + [ids[-1]] * config.pred_tokens
        assert views.target.ids == ids[asked:]


def test_both_trains_on_trajectories_and_on_bare_answers(shipped, mixed, config):
    """Every example twice: the views of --method sft, then those of --method direct, which
    supervise the answer alone."""
    sft, direct, both = (train.prepared(mixed, shipped, dataclasses.replace(config, method=m)).views
                         for m in ("sft", "direct", "both"))

    def ids(views):
        return [(view.full.ids, view.full.labels) for view in views]

    assert len(both) == 2 * len(mixed) and ids(both) == ids(sft) + ids(direct)
    for view, example in zip(direct, mixed):
        said = shipped.tokenizer.decode([token for token in view.full.labels if token != -100])
        assert said == f"{config.answer_prefix} {example.answer}<|im_end|>"


def test_steps_show_every_example_once_an_epoch_in_the_seeds_order(shipped, mixed, config):
    examples = train.prepared(mixed, shipped, config)

    def take(seed):
        return list(islice(examples.steps(dataclasses.replace(config, seed=seed)), 5))

    rows = [row for step in take(0) for row in step]
    assert sorted(rows[:10]) == sorted(rows[10:]) == list(range(10))
    assert take(0) == take(0) != take(1)


def test_passes_of_one_step_hold_examples_of_similar_length(shipped, config):
    """Which examples share a step is left to chance; how they share its passes is not."""
    examples = train.prepared(scenes.make_world("multi", "train", 24), shipped, config)
    one, three = (next(examples.steps(dataclasses.replace(config, batch=batch, accumulate=n)))
                  for batch, n in ((12, 1), (4, 3)))
    lengths = [[len(examples.views[row].full.ids) for row in rows] for rows in (one, three)]
    assert set(one) == set(three) and lengths[1] == sorted(lengths[0]) != lengths[0]


@pytest.mark.parametrize("count, batch", [(12, 4), (12, 5), (7, 2), (3, 4)])
def test_processes_share_a_step_without_losing_or_repeating_an_example(count, batch):
    rows = list(range(100, 100 + count))
    for world in (1, 2, 3):
        passes = [part for rank in range(world)
                  for part in processes.own_passes(rows, batch, rank, world)]
        assert sorted(row for part in passes for row in part) == rows
        assert max(map(len, passes)) <= batch


# ---- one step ----


def test_lambda_zero_gives_exactly_the_gradients_of_sft(vlm64, mixed, config):
    config.lambda_latent = 0.0
    predictor, examples = setup(vlm64, mixed[:4], config)
    sft = train.compute_losses(vlm64, None, examples, [0, 1, 2, 3], config).total
    pearl = train.compute_losses(vlm64, predictor, examples, [0, 1, 2, 3], config).total
    torch.testing.assert_close(sft, pearl, rtol=0, atol=0)
    one, other = (gradients(loss, vlm64, predictor) for loss in (sft, pearl))
    for name in one:
        a, b = (g if g is not None else torch.zeros(()) for g in (one[name], other[name]))
        assert torch.equal(a.expand_as(b) if a.dim() == 0 else a, b), name


@pytest.mark.parametrize("nextlat_view", ["none", "trajectory"])
def test_the_jepa_target_is_a_constant(vlm64, mixed, config, nextlat_view):
    """Gradient of L_JEPA in the step = gradient with h_R replaced by its numbers, also when the
    target pass carries gradient."""
    config, rows = dataclasses.replace(config, nextlat_view=nextlat_view), [0, 1, 2]
    predictor, examples = setup(vlm64, mixed[:3], config)
    total, parts, (predicted, target) = train.compute_losses(vlm64, predictor, examples, rows,
                                                             config)
    with torch.no_grad():
        numbers = embeddings(vlm64, predictor, examples, rows, "target")
    torch.testing.assert_close(target, numbers)
    jepa = cosine_loss(embeddings(vlm64, predictor, examples, rows, "input"), numbers)
    torch.testing.assert_close(parts["jepa"], jepa.detach())
    if nextlat_view == "none":
        sft = train.compute_losses(vlm64, None, examples, rows, config).total
        whole, rest, naive = (gradients(loss, vlm64, predictor)
                              for loss in (total, sft, config.lambda_latent * jepa))
        same_gradients({name: g for name, g in whole.items() if g is not None},
                       {name: naive[name] + (0 if rest[name] is None else rest[name])
                        for name, g in whole.items() if g is not None}, rtol=1e-5, atol=1e-8)
        assert whole["pred_tokens"].abs().sum() > 0


def test_frozen_targets_are_the_starting_models_and_stay(vlm64, mixed, config, counted):
    """Made when they are missing, and then only those, however far the model has moved on."""
    config.target_encoder = "frozen"
    predictor, examples = setup(vlm64, mixed[:4], config)
    now = embeddings(vlm64, predictor, examples, [0, 1, 2, 3], "target").detach()
    stir_lora(vlm64, 0.0)
    start = embeddings(vlm64, predictor, examples, [0, 1, 2, 3], "target").detach()
    stir_lora(vlm64, 0.02)
    assert not torch.isclose(now, start).all(dim=1).any()
    passes, _ = counted(vlm64)
    train.cache_targets(vlm64, examples, [2, 0], config)
    assert examples.targets.keys() == {0, 2} and passes == [False]
    first = dict(examples.targets)
    _, parts, (predicted, target) = train.compute_losses(vlm64, predictor, examples, [2, 3, 0],
                                                         config)
    assert passes == [False, True, False]  # the step's own, and one for the target that was missing
    assert examples.targets.keys() == {0, 2, 3}
    assert all(examples.targets[row] is first[row] for row in first)
    torch.testing.assert_close(target, start[[2, 3, 0]])
    torch.testing.assert_close(parts["jepa"], cosine_loss(predicted, start[[2, 3, 0]]))
    train.compute_losses(vlm64, predictor, examples, [3, 2], config)
    assert passes[3:] == [True]  # no pass for the target any more


def test_targets_that_only_the_starting_model_can_make_are_asked_for_in_time(vlm64, mixed, config):
    """Without LoRA the starting model is gone once training has begun."""
    config = dataclasses.replace(config, target_encoder="frozen", lora_rank=0)
    examples = train.prepared(mixed[:3], vlm64, config)
    train.cache_targets(vlm64, examples, [0, 1], config)
    train.cache_targets(vlm64, examples, [1, 0], config)
    with pytest.raises(AssertionError, match="the starting model is gone"):
        train.cache_targets(vlm64, examples, [1, 2], config)


def test_targets_are_cached_for_the_examples_that_the_steps_visit(config):
    config = dataclasses.replace(config, target_encoder="frozen", steps=2, batch=2,
                                 train_examples=9)
    run = train.build(config)
    rows = [row for step in islice(run.step.examples.steps(config), 2) for row in step]
    assert run.step.examples.targets.keys() == set(rows) and len(set(rows)) == 4
    assert list(run.valid_examples.targets) == list(range(len(run.valid_examples.views)))


@pytest.mark.parametrize("nextlat_view, sees_next, horizon",
                         [("full", True, 1), ("full", False, 2), ("trajectory", False, 1)])
def test_nextlat_runs_along_the_states_it_should(vlm64, mixed, config, nextlat_view, sees_next,
                                                 horizon):
    config = dataclasses.replace(config, nextlat_view=nextlat_view, nextlat_sees_next=sees_next,
                                 horizon=horizon)
    predictor, examples = setup(vlm64, mixed[:2], config)
    parts = train.compute_losses(vlm64, predictor, examples, [0, 1], config).parts
    which = "full" if nextlat_view == "full" else "target"
    sums, counts = [0.0] * horizon, [0] * horizon
    for row in range(2):
        view = getattr(examples.views[row], which)
        encoded = alone(vlm64, predictor, examples, row, which)
        states, embeds = encoded.states[0], encoded.inputs[0]
        wanted = [which == "target" or label != -100 for label in view.labels]
        for t in range(len(view.ids) - 1):
            state = states[t]
            for i in range(1, horizon + 1):
                if t + i >= len(view.ids) or not all(wanted[t + 1:t + i + 1]):
                    break
                state = predictor.latent(state[None], embeds[t + i][None])[0]
                sums[i - 1] += F.smooth_l1_loss(state, states[t + i]).item()
                counts[i - 1] += 1
    mean = sum(s / c for s, c in zip(sums, counts)) / horizon
    assert float(parts["nextlat"]) == pytest.approx(mean, rel=1e-6)


def test_control_targets_are_another_examples_or_fixed_noise(config):
    h, rows = torch.randn(4, 6), [7, 8, 9, 10]
    assert variants.control_targets(h, rows, config) is h
    config = dataclasses.replace(config, targets="shuffled")
    shuffled = variants.control_targets(h, rows, config)
    assert sorted(shuffled.tolist()) == sorted(h.tolist())
    assert all(not torch.equal(a, b) for a, b in zip(shuffled, h))
    config = dataclasses.replace(config, targets="random")
    drawn = variants.control_targets(h, rows, config)
    again = variants.control_targets(torch.randn(4, 6), [8, 7, 9, 10], config)
    # row 7's vector, wherever it stands
    torch.testing.assert_close(F.normalize(drawn[0], dim=0), F.normalize(again[1], dim=0))
    torch.testing.assert_close(drawn.norm(dim=1), h.norm(dim=1))
    assert F.cosine_similarity(drawn[0], drawn[1], dim=0).abs() < 0.999


def test_averaged_targets_keep_the_family_or_the_answer(shipped, config, capsys):
    """Against means taken by hand from the targets themselves; rows that were not cached are in no
    mean."""
    world, rows = scenes.make_world("mixed", "train", 40, seed=1), list(range(34))
    own = train.prepared(world, shipped, config)
    train.cache_targets(shipped, own, rows, dataclasses.replace(config, batch=17))
    for by in ("own", "family", "answer"):
        averaged = train.prepared(world, shipped, config)
        averaged.targets = dict(own.targets)
        variants.average_targets(averaged, by)
        assert list(averaged.targets) == rows
        groups = []
        for row in rows:
            groups.append([r for r in rows if r == row or by != "own"
                           and world[r].task == world[row].task
                           and (by == "family" or world[r].answer == world[row].answer)])
            mean = sum(own.targets[r] for r in groups[-1]) / len(groups[-1])
            torch.testing.assert_close(averaged.targets[row], mean)
        assert (max(map(len, groups)) > 1) == (by != "own")
    with pytest.raises(SystemExit):
        train.parse_config(["--targets", "answer", "--target_encoder", "current"])
    assert "only --target_encoder frozen has at hand" in capsys.readouterr().err


def test_shuffled_targets_change_the_loss_and_no_jepa_drops_it(vlm64, mixed, config):
    predictor, examples = setup(vlm64, mixed[:3], config)

    def step(**fields):
        return train.compute_losses(vlm64, predictor, examples, [0, 1, 2],
                                    dataclasses.replace(config, **fields))

    _, parts, (predicted, target) = step(targets="shuffled")
    torch.testing.assert_close(parts["jepa"], cosine_loss(predicted, target[[2, 0, 1]]))
    parts = step(jepa=False).parts
    assert parts["jepa"] == 0
    torch.testing.assert_close(parts["loss"],
                               parts["vlm"] + config.lambda_latent * parts["nextlat"])


def test_one_batch_can_be_overfitted(mixed, config):
    """Under LoRA: every word the expert uses can be said by the frozen embeddings and head."""
    torch.manual_seed(0)
    vlm = VLM(TINY)
    vlm.set_trainable(16, 32.0, 0.0, config.lora_targets.split(","), False)
    examples = train.prepared(mixed[:2], vlm, config)
    predictor = Predictor(vlm.dim, 4, vlm.lm.get_input_embeddings().weight[0])
    step = train.Step(vlm, predictor, examples, config)
    adam = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=5e-3,
                             weight_decay=0.0)
    history = [train.train_step(step, adam, [0, 1], config)[0].parts for _ in range(40)]
    assert history[-1]["vlm"] < 0.1 * history[0]["vlm"] and history[-1]["jepa"] < 0.05


def test_pred_rows_move_under_lora(mixed, config):
    torch.manual_seed(0)
    vlm = VLM(TINY)
    vlm.set_trainable(4, 8.0, 0.0, ["q_proj"], False)
    examples = train.prepared(mixed[:3], vlm, config)
    predictor = Predictor(vlm.dim, 4, vlm.lm.get_input_embeddings().weight[0])
    step, before = train.Step(vlm, predictor, examples, config), predictor.pred_tokens.clone()
    adam = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-2,
                             weight_decay=0.0)
    train.train_step(step, adam, [0, 1, 2], config)
    assert ((predictor.pred_tokens - before).norm(dim=1) > 0.01).all()


def test_accumulation_equals_one_large_batch(vlm64, mixed, config):
    """For rows with equally many supervised tokens; L_VLM is a mean over the tokens of a pass."""
    config = dataclasses.replace(config, nextlat_view="none")
    predictor, examples = setup(vlm64, mixed, config)
    words = [sum(label != -100 for label in v.full.labels) for v in examples.views]
    rows = [i for i, n in enumerate(words) if n == max(set(words), key=words.count)]
    rows = rows[:len(rows) // 2 * 2]
    assert len(rows) >= 2
    found = []
    for batch in (len(rows), len(rows) // 2):
        step = train.Step(vlm64, predictor, examples, dataclasses.replace(config, batch=batch))
        result, norm = step_of(step, rows)
        grads = {n: p.grad.clone() for n, p in step.named_parameters() if p.grad is not None}
        assert len(result.pair[0]) == len(rows) and norm > 0
        found.append((grads, result.parts))
    same_gradients(found[0][0], found[1][0], rtol=1e-5, atol=1e-8)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], msg=name)


def test_a_step_clips_its_gradient_and_skips_one_that_is_not_finite(vlm64, mixed, config):
    predictor, examples = setup(vlm64, mixed[:2], config)
    step = train.Step(vlm64, predictor, examples, dataclasses.replace(config, clip=0.5))
    parameters = [p for p in step.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    _, norm = train.train_step(step, torch.optim.SGD(parameters, lr=1.0), [0, 1], step.config)
    moved = torch.cat([(p - b).detach().flatten() for p, b in zip(parameters, before)]).norm()
    assert norm > 0.5 and float(moved) == pytest.approx(0.5, rel=1e-5)
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        step.vlm.lm.lm_head.weight[0] = float("nan")
    _, norm = train.train_step(step, torch.optim.SGD(parameters, lr=1.0), [0, 1], step.config)
    assert not torch.isfinite(norm) and all(map(torch.equal, parameters, before))


def test_gradient_checkpointing_changes_no_gradient(vlm64, mixed, config):
    predictor, examples = setup(vlm64, mixed[:2], config)
    vlm64.train()

    def step():
        total = train.compute_losses(vlm64, predictor, examples, [0, 1], config).total
        return gradients(total, vlm64, predictor)

    plain = step()
    vlm64.recompute_activations()
    calls, layer = [], vlm64.lm.model.language_model.layers[1]
    layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    again = step()
    # the full and input view, the target view, and the first one anew on the way back
    assert len(calls) > 2
    same_gradients(plain, again)


@pytest.mark.parametrize("recipe", list(options.RECIPES))
def test_every_recipe_steps_in_every_regime(recipe, config):
    """One step with two trajectories of each regime, as the recipe's options have it."""
    config = dataclasses.replace(config, **options.RECIPES[recipe])
    vlm = VLM(TINY)
    vlm.set_trainable(2, 4.0, config.lora_dropout, ["q_proj"], False)
    world = [ex for regime in scenes.REGIMES for ex in scenes.make_world(regime, "train", 2)]
    examples = train.prepared(world, vlm, config)
    predictor = Predictor(vlm.dim, 4, vlm.lm.get_input_embeddings().weight[0],
                          config.nextlat_sees_next)
    step = train.Step(vlm, predictor, examples, dataclasses.replace(config, batch=len(world)))
    (_, parts, pair), _ = step_of(step, list(range(len(world))))
    assert all(torch.isfinite(value) and value > 0 for value in parts.values())
    assert pair[0].shape == (len(world), vlm.dim)
    assert predictor.pred_tokens.grad.abs().sum() > 0
    assert any(p.grad is not None for p in vlm.parameters())


# ---- packing ----


@pytest.mark.parametrize("fields", [
    dict(), dict(pred_tokens=0), dict(order="image_first"),
    dict(nextlat_view="trajectory", horizon=2), dict(target_view="trajectory_with_image"),
    dict(regime="all"), dict(train_vision=True)])
def test_the_packed_pass_gives_the_losses_and_gradients_of_plain_passes(vlm64, mixed, config,
                                                                        fields):
    config = dataclasses.replace(config, **fields)
    world = scenes.make_world("all", "train", 4) if config.regime == "all" else mixed[:3]
    predictor, examples = setup(vlm64, world, config)
    found = []
    for packed in (True, False):
        total, parts, pair = train.compute_losses(
            vlm64, predictor, examples, list(range(len(world))),
            dataclasses.replace(config, packed=packed))
        found.append((parts, pair, gradients(total, vlm64, predictor)))
    for one, other in zip(found[0][1], found[1][1]):
        torch.testing.assert_close(one, other)
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], msg=name)
    # the model norms in float32, whatever its weights: hence the tolerance
    same_gradients(found[0][2], found[1][2], rtol=1e-4, atol=1e-7)


def test_branches_of_different_length_in_one_batch(vlm64, mixed, config):
    """No branch, two [PRED], and [PRED] three tokens before the prompt's end, which then come after
    them: states and embeddings are those of a pass a view."""
    _, examples = setup(vlm64, mixed[:3], dataclasses.replace(config, pred_tokens=0))
    end, views = examples.serializer.end_id, list(examples.views)

    def asked(view, at, count):
        ids = view.ids[:at] + [end] * count + view.ids[at:]
        return data.View(ids, [-100] * len(ids), view.images, len(ids) - 1,
                         tuple(range(at, at + count)))

    lengths = [len(view.input.ids) for view in views]
    for row, (back, count) in enumerate(((0, 0), (0, 2), (3, 4))):
        inputs = asked(views[row].input, lengths[row] - back, count)
        views[row] = views[row]._replace(input=inputs)
    rows = torch.randn(6, vlm64.dim, dtype=torch.float64)
    pictures = shown(vlm64, examples.store, {i for v in views for i in v.full.images})
    full = data.collate([v.full for v in views], vlm64.pad_id)
    batch = packing.add_branches(full, views)
    assert batch.branch == 7 and batch.shared.tolist() == [lengths[0], lengths[1], lengths[2] - 3]
    packed = vlm64(batch, pictures, rows)
    told = vlm64(full, pictures)
    for row, view in enumerate(views):
        count = len(view.full.ids)
        torch.testing.assert_close(packed.states[row, :count], told.states[row, :count])
        injected = {0: None, 1: rows[:2], 2: rows[2:]}[row]
        plain = vlm64(data.collate([view.input], vlm64.pad_id), pictures, injected)
        torch.testing.assert_close(packed.embedding[row], plain.embedding[0])


def test_a_packed_row_says_who_sees_whom(vlm64, mixed, config):
    """The mask of a two-row batch, cell by cell."""
    _, examples = setup(vlm64, mixed[:2], config)
    batch = packing.add_branches(data.collate([v.full for v in examples.views], vlm64.pad_id),
                                 examples.views)
    injected = torch.zeros(8, vlm64.dim, dtype=torch.float64)
    inputs = vlm64.embed(batch, examples.store.encoded(batch.images), injected)
    width = batch.ids.shape[1] - 4
    for row, views in enumerate(examples.views):
        prompt, full = len(views.input.ids) - 4, len(views.full.ids)
        assert batch.ids[row, :full].tolist() == views.full.ids
        assert batch.ids[row, :prompt].tolist() == views.input.ids[:-4]
        sees = inputs["attention_mask"][row, 0] == 0
        for query in range(width + 4):
            for key in range(width + 4):
                allowed = key < prompt or key >= width if query >= width else key < full
                assert sees[query, key] == (key <= query and allowed), (row, query, key)
        positions = inputs["position_ids"][:, row]
        behind = positions[:, width:] - positions[:, prompt - 1, None]
        assert behind.tolist() == [[1, 2, 3, 4]] * 3


# ---- images: each is encoded once ----


def test_sft_makes_one_pass_and_pearl_two_and_images_are_encoded_once(vlm64, mixed, config,
                                                                      counted):
    predictor, examples = setup(vlm64, mixed[:2], config)
    passes, encoded = counted(vlm64)
    train.compute_losses(vlm64, None, examples, [0, 1], config)
    assert passes == [True] and encoded == [4]  # two scenes and two tool images
    train.compute_losses(vlm64, predictor, examples, [0, 1], config)
    # the target's pass carries no graph; nothing is encoded again
    assert passes[1:] == [True, False] and encoded == [4]
    train.compute_losses(vlm64, predictor, examples, [0, 1],
                         dataclasses.replace(config, packed=False))
    assert passes[3:] == [True, True, False] and encoded == [4]


def test_a_trained_vision_tower_gets_gradient_and_is_encoded_every_step(vlm64, mixed, config,
                                                                        counted):
    config.train_vision = True
    predictor, examples = setup(vlm64, mixed[:2], config)
    _, encoded = counted(vlm64)
    for _ in range(2):
        total = train.compute_losses(vlm64, predictor, examples, [0, 1], config).total
    assert encoded == [4, 4] and not examples.store.kept
    assert any("visual" in name and g is not None and g.abs().sum() > 0
               for name, g in gradients(total, vlm64, predictor).items())


def test_cached_features_change_nothing(vlm64, mixed, config):
    predictor, examples = setup(vlm64, mixed[:3], config)

    def loss():
        return train.compute_losses(vlm64, predictor, examples, [0, 1, 2], config).total

    first, cached = loss(), loss()
    assert len(examples.store.kept) == 6
    examples.store.keep_bytes = 0
    examples.store.kept.clear()
    assert torch.equal(first, cached) and torch.equal(first, loss()) and not examples.store.kept


def test_features_on_disk_serve_the_next_run_and_no_other_image_or_model(vlm64, mixed, config,
                                                                         tmp_path, counted):
    config.feature_cache = str(tmp_path / "features")
    _, encoded = counted(vlm64)

    def features_of(world):
        return train.prepared(world, vlm64, config).store.encoded([0, 1])

    first, again = features_of(mixed[:1]), features_of(mixed[:1])
    assert encoded == [2] and len(list((tmp_path / "features").iterdir())) == 2
    assert all(torch.equal(first[i].features, again[i].features) for i in (0, 1))
    features_of([dataclasses.replace(mixed[0], image=mixed[1].image)])
    assert encoded == [2, 1]  # I0 is another, the crop the same
    with torch.no_grad():
        next(p for name, p in vlm64.lm.named_parameters() if "visual" in name).add_(1e-3)
    changed = features_of(mixed[:1])
    assert encoded == [2, 1, 2] and not torch.equal(changed[0].features, first[0].features)


def test_images_made_ready_in_the_background_are_the_same_and_only_the_next_passs(
        vlm64, mixed, config, monkeypatch):
    plain, ready = (train.prepared(mixed[:4], vlm64, dataclasses.replace(config, workers=workers))
                    for workers in (0, 2))
    ready.prefetch([0, 1])
    assert set(ready.store.coming) == {i for v in ready.views[:2] for i in v.full.images}
    for i in range(len(ready.store.pictures)):
        made = ready.store.inputs(i)
        assert all(torch.equal(t, made[k]) for k, t in plain.store.inputs(i).items())
    ready.prefetch([2, 3])
    ready.prefetch([3])  # what was begun for 2 and not used is not kept
    assert set(ready.store.coming) == set(ready.views[3].full.images)
    asked, rows = [], [0, 1, 2, 3]
    monkeypatch.setattr(plain, "prefetch", lambda rows: asked.append(list(rows)))
    step = train.Step(vlm64, None, plain, dataclasses.replace(config, method="sft", batch=2))
    adam = torch.optim.AdamW(vlm64.parameters(), lr=0.0)
    train.train_step(step, adam, rows, step.config, upcoming=rows[::-1])
    assert asked == [[2, 3], [3, 2]]


# ---- the rival ----


@pytest.mark.parametrize("latents", [0, 3])
def test_reconstruction_step_against_a_loop(vlm64, config, latents):
    """Each latent by hand: its visual embedding in standard units, and the state before it."""
    config = dataclasses.replace(config, method="recon", latents=latents, lambda_latent=0.5)
    multi = scenes.make_world("multi", "train", 9)
    world = [ex for ex in multi if len(ex.images) > 2][:2] + scenes.make_world("mixed", "train", 2)
    _, examples = setup(vlm64, world, config)
    scale = reconstruction.make_scale(vlm64, examples, latents)
    rows = list(range(len(world)))
    step = train.Step(vlm64, scale, examples, config)
    total, parts, pair = step(rows)
    errors = []
    for row in rows:
        view, full = examples.latent_views[row], examples.views[row].full
        pictures = shown(vlm64, examples.store, full.images)
        visual = [pictures[i].features[0] for i in full.images[1:]]
        if latents:
            visual = [torch.stack([chunk.mean(0) for chunk in torch.tensor_split(
                v, [len(v) * n // latents for n in range(1, latents)])]) for v in visual]
        assert len(view.inject_at) == sum(map(len, visual)) and view.images == full.images[:1]
        encoded = vlm64(data.collate([view], vlm64.pad_id), pictures, torch.cat(visual))
        size = vlm64.lm.model.language_model.norm.weight.square().mean().sqrt()
        for position, v in zip(view.inject_at, torch.cat(visual)):
            torch.testing.assert_close(encoded.inputs[0, position], v)
            units = (v - scale.mean) / scale.std
            errors.append((encoded.states[0, position - 1] / size - units).square().mean())
    mean = torch.stack(errors).mean().detach()
    torch.testing.assert_close(parts["recon"], mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total.detach(), parts["vlm"] + 0.5 * parts["recon"])
    assert pair is None


def test_latent_scale_is_standard_units_and_its_input_the_inverse():
    embeddings, norm = torch.randn(50, 6) * 10 + 3, torch.full((6,), 2.0)
    scale = LatentScale(embeddings, norm)
    units = scale.target(embeddings)
    torch.testing.assert_close(units.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(units.std(0), torch.ones(6))
    # a state that predicts perfectly is fed back as the embedding
    torch.testing.assert_close(scale.input(units * 2.0), embeddings)


# ---- whole runs ----

TINY_RUN = ["--device", "cpu", "--steps", "12", "--batch", "2", "--train_examples", "8",
            "--valid_examples", "4", "--test_per_family", "1", "--eval_every", "3",
            "--save_every", "2", "--log_every", "1", "--lora_rank", "2", "--lora_dropout", "0.1",
            "--lr", "5e-3"]


def lines_of(run):
    return [json.loads(line) for line in
            (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def json_of(file):
    return json.loads(file.read_text(encoding="utf-8"))


def contents(run):
    """What a run must end with, bit for bit: weights, moments, log without times, answers."""
    return dict(state={name: t.numpy().tobytes()
                       for name, t in load_file(run / "state.safetensors").items()},
                log=[{key: value for key, value in line.items() if key not in ("ms", "waited")}
                     for line in lines_of(run)],
                best=json_of(run / "best.json"), answers=json_of(run / "results.json")["answers"],
                adapter=[p.read_bytes() for p in sorted(run.glob("checkpoint-*/*.safetensors"))],
                names=sorted(p.name for p in run.iterdir()))


def models():
    return sum(type(thing) is VLM for thing in gc.get_objects())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from beginning to end: folder, config, and how many models were there at the report."""
    config = train.parse_config([*TINY_RUN, "--out", str(tmp_path_factory.mktemp("a") / "run")])
    gc.collect()
    others, report, at_report = models(), evaluate.report, []  # other tests may keep theirs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "report",
                      lambda *args: at_report.append(models() - others) or report(*args))
        out = train.train(config)
    return out, config, at_report


def test_the_run_folder_holds_what_the_docstring_says(finished):
    out, config, _ = finished
    best = json_of(out / "best.json")
    assert {path.name for path in out.iterdir()} == {
        "config.json", "inputs.json", "environment.json", "before.json", "log.jsonl",
        "state.safetensors", "best.json", "results.json", best["checkpoint"]}
    assert {path.name for path in (out / best["checkpoint"]).iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "predictor.safetensors"}
    assert json_of(out / "config.json") == dataclasses.asdict(config)
    environment = json_of(out / "environment.json")
    assert environment["packages"]["torch"] in (torch.__version__.split("+")[0], torch.__version__)
    assert len(environment["commit"] or "0" * 40) == 40 and environment["command"]
    assert environment["threads"] == torch.get_num_threads()
    log = lines_of(out)
    trained = [line for line in log if line["kind"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, 13))
    # of that very step: one of warm-up, then a cosine
    assert [line["lr"] for line in trained] == pytest.approx(
        [0] + [2.5e-3 * (1 + math.cos(math.pi * n / 11)) for n in range(11)])
    valid = {line["step"]: line["loss"] for line in log if line["kind"] == "valid"}
    assert list(valid) == [3, 6, 9, 12]
    assert best["step"] == min(valid, key=valid.get)
    assert best["valid"]["loss"] == min(valid.values())
    assert "predictor.pred_tokens" in "".join(load_file(out / "state.safetensors"))
    for line in log:
        total = line["vlm"] + config.lambda_latent * (line["jepa"] + line["nextlat"])
        assert line["loss"] == pytest.approx(total, rel=1e-5)
        assert {"r2", "spread_pred", "spread_target", "effective_rank", "mean_cosine", "retrieval",
                "retrieval_chance"} <= line.keys()


def test_the_trained_model_is_gone_when_its_checkpoint_is_loaded(finished, config, monkeypatch):
    """Two models at once would need twice the memory, when training is over and done."""
    assert finished[2] == [0]
    gc.collect()
    others, at_report = models(), []
    monkeypatch.setattr(evaluate, "report", lambda *args: at_report.append(models() - others))
    train.train(dataclasses.replace(config, steps=1, eval_every=1, gradient_checkpointing=True))
    assert at_report == [0]


def test_the_merged_folder_answers_in_plain_transformers_as_the_run_does_here(
        finished, tmp_path, monkeypatch):
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
    out, merged = finished[0], tmp_path / "merged"
    monkeypatch.setattr(sys, "argv", ["train.py", "--merge", str(out), str(merged)])
    train.main()
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        train.main()
    plain, tokenizer, processor = (kind.from_pretrained(merged) for kind in (
        AutoModelForImageTextToText, AutoTokenizer, AutoImageProcessor))
    vlm, _, _ = evaluate.load_run(out, "cpu")
    tests = scenes.make_world("mixed", "test", 5)
    asker = evaluate.Answerer(vlm, tests)
    for ex, view in zip(tests, asker.prompts):
        messages = [dict(role="user", content=[dict(type="image"),
                                               dict(type="text", text=ex.question)])]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pixels = processor(images=[ex.image], return_tensors="pt")
        count = int(pixels["image_grid_thw"].prod()) // processor.merge_size ** 2
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt",
                        add_special_tokens=False).input_ids
        expected = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), **pixels, max_new_tokens=6,
            mm_token_type_ids=(ids == vlm.lm.config.image_token_id).int(), do_sample=False)
        said = vlm.generate([view], asker.store, 6)[0]
        assert said == expected[0, ids.shape[1]:].tolist()


def test_inference_does_not_open_the_predictor(finished, tmp_path):
    out, copy = finished[0], tmp_path / "copy"
    shutil.copytree(out, copy)
    tests = scenes.make_world("mixed", "test", 5)
    answers = evaluate.answer_questions(evaluate.load_run(out, "cpu")[0], tests)
    for file in copy.glob("checkpoint-*/predictor.safetensors"):
        file.write_bytes(b"not a predictor")
    assert evaluate.answer_questions(evaluate.load_run(copy, "cpu")[0], tests) == answers


def test_a_run_is_never_overwritten(finished):
    with pytest.raises(FileExistsError, match="choose another --out"):
        train.train(finished[1])


def test_a_folder_of_ones_own_trains_and_bad_ones_stop_before_training(tmp_path, as_program):
    rows = [ex for split, n in (("train", 6), ("validation", 3), ("test", 2))
            for ex in scenes.make_world("all", split, n)]
    folder = tmp_path / "set"
    records.write_folder(folder, rows)
    small = ["--data", str(folder), "--device", "cpu", "--steps", "2", "--batch", "2",
             "--lora_rank", "2", "--method", "sft"]
    train.train(train.parse_config([*small, "--out", str(tmp_path / "run")]))
    assert len(json_of(tmp_path / "run" / "results.json")["answers"]) == 2
    capped = loader.load_examples(train.parse_config(
        ["--data", str(folder), "--valid_examples", "2", "--test_per_family", "1"]))
    assert [len(part) for part in capped] == [6, 2, 2]
    assert len({ex.task for ex in capped[2]}) == 2
    (folder / "images").rename(folder / "pictures")
    with pytest.raises(SystemExit, match="error: .*line 1: image"):  # no traceback
        as_program(train.__file__, *small, "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_steps_without_a_finite_gradient_are_skipped_then_stop(config, monkeypatch, capsys):
    calls, compute = [], train.compute_losses

    def broken(*args):
        result = compute(*args)
        calls.append(1)
        if len(calls) == 1 or not torch.is_grad_enabled():
            return result
        return result._replace(total=result.total * float("nan"))

    monkeypatch.setattr(train, "compute_losses", broken)
    config = dataclasses.replace(config, steps=9, batch=2, eval_every=9, save_every=1, method="sft")
    with pytest.raises(ValueError, match="five steps in a row"):
        train.train(config)
    assert capsys.readouterr().out.count("step skipped") == 5
    state = load_file(Path(config.out) / "state.safetensors")
    assert all(torch.isfinite(t).all() for name, t in state.items() if name.startswith("weight/"))


# ---- interruption, several processes ----


def resume(run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", str(run)])
    train.main()


def test_a_run_interrupted_in_every_way_ends_as_the_uninterrupted_one(finished, tmp_path,
                                                                      monkeypatch):
    """Killed at a random moment, in a step, a validation or a write; asked to end by SIGTERM, by
    SIGINT; killed again. Bit for bit, so the same seed gives the same run, too."""
    run, moments = tmp_path / "run", []
    for number, step in ((signal.SIGKILL, 3), (signal.SIGTERM, 5), (signal.SIGINT, 8),
                         (signal.SIGKILL, 10)):
        begun = (run / "config.json").is_file()
        program = Program(*(["--resume", run] if begun else [*TINY_RUN, "--out", run]),
                          log=tmp_path / f"said-{step}")
        program.wait_for_step(step)
        if number == signal.SIGKILL:
            moments.append(random.uniform(0, 0.1))
            time.sleep(moments[-1])
        program.send(number)
        status = program.status()
        if number != signal.SIGKILL:
            assert status == -number, program.said()  # as signals do, so that `a && b` ends, too
            said = program.said()
            assert "saving after this step" in said and "--resume" in said, said
            saved = int(read_tensors(run / "state.safetensors")[1]["step"])
            assert step <= saved < 12 and not (run / "results.json").is_file()
    if not (run / "results.json").is_file():
        resume(run, monkeypatch)
    ended, whole = contents(run), contents(finished[0])
    for key, value in whole.items():
        assert ended[key] == value, (key, moments)
    with pytest.raises(ValueError, match="is finished"):
        resume(run, monkeypatch)


def assert_same_weights(*runs):
    one, two = (load_file(run / "state.safetensors") for run in runs)
    for name in one:
        if name.startswith("weight/"):
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5,
                                       msg=lambda text: f"{name}: {text}")


SHARED_RUN = [*TINY_RUN, "--accumulate", "4", "--steps", "3", "--lora_dropout", "0",
              "--targets", "shuffled"]


@pytest.fixture(scope="module")
def alone_trained(tmp_path_factory):
    """One process makes all four passes of a step; beside it a copy of its state after two."""
    out = tmp_path_factory.mktemp("one") / "run"
    half, step = out.with_name("half"), train.train_step

    def counted(*args, **kwargs):
        if len(calls) == 2:  # the state of step 2 is on disk
            shutil.copytree(out, half)
        calls.append(1)
        return step(*args, **kwargs)

    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", counted)
        train.train(train.parse_config([*SHARED_RUN, "--out", str(out)]))
    return out, half


def test_sharding_wants_several_processes_and_frozen_weights(config, monkeypatch):
    with pytest.raises(ValueError, match="with torchrun and two or more"):
        train.train(dataclasses.replace(config, shard=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="with --lora_rank"):
        train.train(dataclasses.replace(config, shard=True, lora_rank=0))


def test_two_processes_train_as_one(alone_trained, tmp_path):
    """Two gloo processes against one process: the same passes, so the same weights."""
    together(*SHARED_RUN, "--out", tmp_path / "two", log=tmp_path / "said")
    assert_same_weights(alone_trained[0], tmp_path / "two")
    last = lines_of(tmp_path / "two")[-1]
    assert last["kind"] == "valid"
    assert last["loss"] == pytest.approx(lines_of(alone_trained[0])[-1]["loss"], rel=1e-3)


def test_processes_that_share_frozen_weights_train_as_one(alone_trained, tmp_path):
    """With --shard each process holds half of every frozen weight of the layers."""
    together(*SHARED_RUN, "--shard", "true", "--gradient_checkpointing", "true", "--track", "2",
             "--out", tmp_path / "shards", log=tmp_path / "said", watched=True)
    for rank in range(2):
        said = (tmp_path / f"said.{rank}").read_text(encoding="utf-8")
        assert "each process holds its share" in said
    assert_same_weights(alone_trained[0], tmp_path / "shards")
    last = lines_of(tmp_path / "shards")[-1]
    assert last["kind"] == "valid" and "tool" in last
    assert last["loss"] == pytest.approx(lines_of(alone_trained[0])[-1]["loss"], rel=1e-3)
    vlm, _, _ = evaluate.load_run(tmp_path / "shards", "cpu")
    assert evaluate.answer_questions(vlm, scenes.make_world("mixed", "test", 2))


def test_a_run_goes_on_with_another_number_of_processes(alone_trained, as_program, monkeypatch):
    """Begun as one process, ended by two that torchrun starts: the weights of one uninterrupted."""
    from torch.distributed import run as torchrun
    out, half = alone_trained
    assert read_tensors(half / "state.safetensors")[1]["step"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    as_program(torchrun.__file__, "--standalone", "--nproc-per-node=2", train.__file__,
               "--resume", half)
    assert_same_weights(out, half)


# ---- the command line ----


def test_every_option_has_a_name_a_meaning_and_a_value_of_its_own(capsys):
    fields = dataclasses.fields(options.Config)
    with pytest.raises(SystemExit):
        train.parse_config(["--help"])
    said = " ".join(capsys.readouterr().out.partition("\noptions:")[2].split())
    assert "--lr FLOAT peak; linear warm-up, then cosine to zero (default: 0.001)" in said
    for f in fields:
        meaning = f.metadata["help"]
        assert 1 < len(meaning.split()) < 40 and said.count(f" --{f.name} ") == 1, f.name
        assert meaning.replace("%%", "%") in said, f.name
        choices = f.metadata["choices"]
        assert not choices or f.default in choices and len(set(choices)) == len(choices), f.name
    names, helps = ([get(f) for f in fields] for get in (
        lambda f: f.name, lambda f: f.metadata["help"]))
    assert len(set(names)) == len(names)
    twice = {text for text in helps if helps.count(text) > 1}
    assert twice <= {"of a folder, at most so many"}  # of validation and of test questions


def test_recipes_set_defaults_and_options_win():
    paper = train.parse_config(["--recipe", "paper"])
    assert (paper.distance, paper.nextlat_view) == ("smoothl1", "trajectory")
    assert paper.lambda_latent == 0.2
    mine = train.parse_config(["--recipe", "paper", "--distance", "mse", "--train_vision", "True"])
    assert mine.distance == "mse" and mine.nextlat_view == "trajectory"
    assert mine.train_vision is True
    assert train.parse_config(["--train-vision", "false"]).train_vision is False
    assert train.parse_config(["--method", "sft", "--seed", "3"]).out == "runs/sft-single-seed3"
    for fields in options.RECIPES.values():
        assert fields.keys() <= {f.name for f in dataclasses.fields(options.Config)}


@pytest.mark.parametrize("argv, message", [
    (["--regime", "triple"], "single.*mixed.*multi.*all"),
    (["--learning_rate", "1"], "unrecognized arguments: --learning_rate"),
    (["--steps", "0"], "--steps must be at least 1"), (["--distance", "dot"], "cosine"),
    (["--train_vision", "maybe"], "write true or false"),
    (["--targets", "shuffled", "--batch", "1"], "--targets shuffled needs --batch 2"),
    *[([old], f"{old} has moved: ") for old in options.MOVED]])
def test_bad_options_name_the_good_ones(argv, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_config(argv)
    assert re.search(message, capsys.readouterr().err)
