"""Claims: every cure equals a second, naive implementation in value and gradient, alone and in the
step; gradients stop and flow where its docstring says; packed = plain under each; a resumed run
ends as an uninterrupted one; a state of R is the one that layer and position name."""

import cmath
import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import losses
import train
from baselines import cures, variants
from model import VLM, lora_layers
from predictor import Predictor
from support import run_folder
from world import scenes

from conftest import TINY
from test_losses import naive_distance, no_gradient, rand, same
from test_train import alone, gradients, same_gradients, setup, stir_lora

B, D = 5, 4
GROUPS = [("zoom", "two"), ("zoom", "six"), ("zoom", "two"), ("path", "two"), ("zoom", "two")]
CURES = {
    "bias": dict(pred_head="bias"), "mlp": dict(pred_head="mlp"),
    "ema": dict(target_encoder="ema"),
    "infonce": dict(distance="infonce"),
    "infonce, all": dict(distance="infonce", infonce_masked=False),
    "vicreg": dict(vicreg=0.7), "vicreg, std": dict(vicreg=0.7, vicreg_terms="std"),
    "sigreg": dict(sigreg=0.3),
    "layer": dict(target_layer=2), "word": dict(target_position="word"),
    "words": dict(target_position="words", target_layer=1, vicreg=0.7),
    "image": dict(target_position="image", target_layer=3),
}


# ---- each formula a second time ----


def naive_infonce(prediction, target, groups, masked):
    terms = []
    for i in range(len(prediction)):
        scores = [(1 - naive_distance(prediction[i], target[j], "cosine")) / 0.07
                  for j in range(len(target))
                  if j == i or not masked or groups[j] != groups[i]]
        own = (1 - naive_distance(prediction[i], target[i], "cosine")) / 0.07
        terms.append(torch.log(sum(score.exp() for score in scores)) - own)
    return sum(terms) / len(terms)


def naive_vicreg(h, terms):
    count, dim = h.shape
    x = [[v * math.sqrt(dim) / sum(w * w for w in row).sqrt() for v in row] for row in h]
    means = [sum(row[d] for row in x) / count for d in range(dim)]

    def covariance(d, e):
        return sum((row[d] - means[d]) * (row[e] - means[e]) for row in x) / (count - 1)

    stds = [(covariance(d, d) + 1e-4).sqrt() for d in range(dim)]
    v = sum((1 - std) if std < 1 else 0 * std for std in stds) / dim
    c = sum(covariance(d, e) ** 2 for d in range(dim) for e in range(dim) if d != e) / dim
    return v if terms == "std" else (25 * v + c) / 25


def naive_epps_pulley(x):
    """One column, or one a slice: the integral over both signs of t, complex numbers and all."""
    knots = [3 * n / 16 for n in range(-16, 17)]
    heights = []
    for t in knots:
        real = sum((t * v).cos() for v in x) / len(x) - math.exp(-t * t / 2)
        imaginary = sum((t * v).sin() for v in x) / len(x)
        heights.append((real ** 2 + imaginary ** 2) * math.exp(-t * t / 2))
    return len(x) * sum((a + b) / 2 * 3 / 16 for a, b in zip(heights, heights[1:]))


def naive_sigreg(module, h, seed):
    first, _, second = module.projection
    z = F.gelu(h @ first.weight.T + first.bias) @ second.weight.T + second.bias
    drawn = torch.randn(64, 256, generator=torch.Generator().manual_seed(
        1_000_003 * seed + int(module.steps)))
    slices = torch.stack([a / a.norm() for a in drawn.T]).to(z)
    return naive_epps_pulley([slices @ row for row in z]).sum() / len(slices)  # all in one loop


@pytest.mark.parametrize("masked", [True, False])
def test_infonce_equals_a_loop_and_stops_at_the_targets(masked):
    prediction, target = rand(B, D), 3 * rand(B, D)
    groups = GROUPS if masked else [None] * B
    kind = cures.partial(cures.infonce, groups=groups)
    same(losses.jepa_loss(prediction, target, kind),
         naive_infonce(prediction, target.detach(), GROUPS, masked), prediction)
    no_gradient(losses.jepa_loss(prediction, target, kind), target)
    same(kind(prediction, target).mean(), naive_infonce(prediction, target, GROUPS, masked),
         prediction, target)


def test_the_negatives_of_infonce_are_those_that_the_option_says(shipped, config):
    world = scenes.make_world("mixed", "train", 40, seed=1)
    examples = train.prepared(world, shipped, config)
    rows = [3, 8, 0, 20, 35, 11]
    prediction, target = torch.randn(6, D), torch.randn(6, D)
    for masked in (True, False):
        config = dataclasses.replace(config, distance="infonce", infonce_masked=masked)
        groups = [(world[row].task, world[row].answer) for row in rows]
        torch.testing.assert_close(
            losses.jepa_loss(prediction, target, cures.kind(examples, rows, config)),
            naive_infonce(prediction, target, groups, masked))
    assert cures.kind(examples, rows, dataclasses.replace(config, distance="l2")) == "l2"


@pytest.mark.parametrize("terms", ["both", "std"])
def test_vicreg_equals_a_loop(terms):
    for h in (rand(B, D), 0.1 * rand(B, D) + rand(1, D)):
        same(cures.vicreg(h, terms), naive_vicreg(h, terms), h)


def test_vicreg_is_blind_to_length_and_knows_a_collapse_and_a_copy():
    h = torch.randn(4000, 3, dtype=torch.float64)
    torch.testing.assert_close(cures.vicreg(h), cures.vicreg(7 * h * torch.rand(4000, 1)))
    assert cures.vicreg(h) < 0.01
    one = cures.vicreg(torch.ones(50, 3, dtype=torch.float64))
    torch.testing.assert_close(one, torch.tensor(0.99, dtype=torch.float64))  # 1 - sqrt(eps)
    copied = torch.cat([h[:, :1], h[:, :1], h[:, 2:]], dim=1)
    assert cures.vicreg(copied) > cures.vicreg(copied, "std") + 0.01


def test_sigreg_equals_a_loop_of_complex_numbers():
    x = rand(B, 2)
    same(cures.epps_pulley(x).sum(), sum(naive_epps_pulley(column) for column in x.T), x)
    t, column = 1.3, x.detach()[:, 0].tolist()
    phi = sum(cmath.exp(1j * t * v) for v in column) / B  # what the real parts above stand for
    real, imaginary = sum(math.cos(t * v) for v in column), sum(math.sin(t * v) for v in column)
    assert abs(phi - (real + 1j * imaginary) / B) < 1e-12
    torch.manual_seed(0)
    module, h = cures.SIGReg(D).double(), rand(2, D)
    same(module(h, 5), naive_sigreg(module, h, 5), h, *module.parameters())


def test_sigreg_draws_its_slices_from_seed_and_step_and_knows_a_gaussian():
    module, h = cures.SIGReg(D), torch.randn(6, D)
    state = torch.get_rng_state()
    first = module(h, 1)
    assert torch.equal(first, module(h, 1)) and not torch.equal(first, module(h, 2))
    module.follow(None, None)
    assert not torch.equal(first, module(h, 1))
    assert torch.equal(state, torch.get_rng_state())  # dropout goes on as without
    normal = cures.epps_pulley(torch.randn(500, 20)).mean()
    assert normal < 0.3 * cures.epps_pulley(3 * torch.randn(500, 20)).mean()
    assert normal < 0.01 * cures.epps_pulley(torch.zeros(500, 20)).mean()


def test_heads_start_at_pearls_own_and_equal_a_loop():
    h = rand(B, D)
    for head in (cures.Bias(D).double(), cures.MLP(D).double()):
        assert torch.equal(head(h), h)
        for p in head.parameters():
            nn.init.normal_(p)
        rows = []
        for row in h:
            if isinstance(head, cures.Bias):
                rows.append(row + head.bias)
                continue
            norm, first, _, second = head.layers
            x = (row - row.mean()) / (row.var(unbiased=False) + norm.eps).sqrt()
            x = first.weight @ (x * norm.weight + norm.bias) + first.bias
            x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
            rows.append(row + second.weight @ x + second.bias)
        weight = torch.randn(B, D, dtype=torch.float64)
        same((weight * head(h)).sum(), (weight * torch.stack(rows)).sum(), h, *head.parameters())


# ---- in the step ----


def equipped(vlm, examples, config):
    """predictor, examples as `setup` has them, with what the options add, away from its start."""
    predictor, examples = setup(vlm, examples, config)
    cures.equip(predictor, vlm, config)
    predictor.double()
    for name, p in predictor.cures.named_parameters():
        nn.init.normal_(p, std=0.1)
    for p in predictor.cures["teacher"].buffers() if "teacher" in predictor.cures else ():
        if p.is_floating_point():
            p.add_(0.02 * torch.randn_like(p))
    return predictor, examples


def naive_state(vlm, examples, row, config):
    """h_R of one row by its layer and position, from transformers' own list of hidden states."""
    view = examples.views[row].target
    batch = train.data.collate([view], vlm.pad_id)
    inputs = vlm.embed(batch, examples.store.encoded(view.images))
    states = vlm.family.states(**inputs, use_cache=False, output_hidden_states=True)
    states = states.hidden_states[config.target_layer][0]
    image = vlm.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    end = vlm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    words = [n for n, label in enumerate(view.labels) if label not in (-100, end)]
    at = dict(end=[len(view.ids) - 1], word=words[-1:], words=words,
              image=[n for n, token in enumerate(view.ids) if token == image])
    assert view.ids[words[-1] + 1] == end and len(at["image"]) > 1
    return torch.stack([states[n] for n in at[config.target_position]]).mean(dim=0)


def naive_target(vlm, predictor, examples, rows, config):
    """h_R (n, D) with gradient, by the teacher's weights if there is one, put in by hand."""
    own = {}
    if "teacher" in predictor.cures:
        for name, mean in predictor.cures["teacher"].weights().items():
            p = vlm.get_parameter(name)
            own[p] = p.detach().clone()
            p.data.copy_(mean)
    states = torch.stack([naive_state(vlm, examples, row, config) for row in rows])
    if own:  # their graph would be that of other weights
        states = states.detach()
    for p, before in own.items():
        p.data.copy_(before)
    return states


def naive_terms(vlm, predictor, examples, rows, config):
    """lambda times everything beside L_VLM, one example at a time; the terms on h_R as above, equal
    to loops that take too long at the model's D."""
    target = naive_target(vlm, predictor, examples, rows, config)
    predicted = torch.cat([alone(vlm, predictor, examples, row, "input").embedding for row in rows])
    if "head" in predictor.cures:
        predicted = predictor.cures["head"](predicted)
    if config.distance == "infonce":
        groups = [(examples.examples[row].task, examples.examples[row].answer) for row in rows]
        jepa = naive_infonce(predicted, target.detach(), groups, config.infonce_masked)
    else:
        jepa = sum(naive_distance(p, t.detach(), "cosine") for p, t in zip(predicted, target))
        jepa = jepa / len(rows)
    parts = dict(jepa=jepa)
    if config.vicreg:
        parts["vicreg"] = config.vicreg * cures.vicreg(target, config.vicreg_terms)
    if config.sigreg:
        parts["sigreg"] = config.sigreg * predictor.cures["sigreg"](target, config.seed)
    return config.lambda_latent * sum(parts.values()), parts


@pytest.mark.parametrize("name", CURES)
def test_the_step_under_a_cure_equals_one_made_by_hand(vlm64, mixed, config, name):
    """Value and gradient: what L_JEPA stops, what VICReg and SIGReg do not, and that R's pass
    carries no graph otherwise; each packed and in plain passes."""
    config = dataclasses.replace(config, nextlat_view="none", **CURES[name])
    predictor, examples = equipped(vlm64, mixed[:3], config)
    rows = [2, 0, 1]
    term, parts = naive_terms(vlm64, predictor, examples, rows, config)
    naive = gradients(term, vlm64, predictor)
    sft = gradients(train.compute_losses(vlm64, None, examples, rows, config).total, vlm64,
                    predictor)
    weights = {n: p.detach().clone() for n, p in vlm64.named_parameters()}
    for packed in (True, False):
        found = train.compute_losses(vlm64, predictor, examples, rows,
                                     dataclasses.replace(config, packed=packed))
        for key, value in parts.items():
            torch.testing.assert_close(found.parts[key], value.detach(), rtol=1e-5, atol=1e-7,
                                       msg=key)
        torch.testing.assert_close(found.total.detach(), found.parts["vlm"] + term.detach(),
                                   rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.parts["loss"], found.total.detach())
        whole = gradients(found.total, vlm64, predictor)
        expected = {n: g if sft[n] is None else g + sft[n] for n, g in naive.items()
                    if g is not None}
        same_gradients({n: whole[n] for n in expected}, expected, rtol=1e-4, atol=1e-7)
        assert not found.pair[0].requires_grad and not found.pair[1].requires_grad
    assert all(torch.equal(weights[n], p) for n, p in vlm64.named_parameters())


@pytest.mark.parametrize("name", CURES)
def test_the_targets_pass_carries_a_graph_only_where_a_term_needs_it(vlm64, mixed, config, name,
                                                                     monkeypatch):
    config = dataclasses.replace(config, nextlat_view="none", **CURES[name])
    predictor, examples = equipped(vlm64, mixed[:2], config)
    seen, encode = [], cures.encode
    monkeypatch.setattr(cures, "encode", lambda *a: seen.append(encode(*a)) or seen[-1])
    train.compute_losses(vlm64, predictor, examples, [0, 1], config)
    assert [e.embedding.requires_grad for e in seen] == [bool(config.vicreg or config.sigreg)]
    with torch.no_grad():  # a validation makes none at all
        assert not train.compute_losses(vlm64, predictor, examples, [0, 1],
                                        config).total.requires_grad


def test_the_adapters_switched_off_give_the_cached_target(vlm64, mixed, config):
    """The frozen target without a cache."""
    config = dataclasses.replace(config, target_encoder="frozen")
    predictor, examples = setup(vlm64, mixed[:3], config)
    train.cache_targets(vlm64, examples, [0, 1, 2], config)
    batch = train.data.collate([v.target for v in examples.views], vlm64.pad_id)
    images = examples.store.encoded(batch.images)
    with vlm64.starting_model(), torch.no_grad():
        off = vlm64(batch, images).embedding
    on = vlm64(batch, images).embedding.detach()
    cached = torch.stack([examples.targets[row] for row in range(3)])
    torch.testing.assert_close(off, cached)
    assert not torch.isclose(on, cached).all(dim=1).any()
    assert all(layer.active for layer in lora_layers(vlm64.lm).values())


@pytest.mark.parametrize("fields", [dict(target_layer=2), dict(target_position="words"),
                                    dict(target_layer=1, target_position="image")])
def test_a_frozen_target_of_another_state_is_cached_and_used(vlm64, mixed, config, fields):
    config = dataclasses.replace(config, target_encoder="frozen", nextlat_view="none", **fields)
    predictor, examples = setup(vlm64, mixed[:2], config)
    with vlm64.starting_model(), torch.no_grad():
        states = torch.stack([naive_state(vlm64, examples, row, config) for row in range(2)])
    found = train.compute_losses(vlm64, predictor, examples, [1, 0], config)
    torch.testing.assert_close(found.pair[1], states[[1, 0]])


def test_the_last_layer_has_two_names(vlm64, mixed, config):
    predictor, examples = setup(vlm64, mixed[:2], config)
    layers = len(vlm64.lm.get_decoder().layers)
    one, two = (train.compute_losses(vlm64, predictor, examples, [0, 1],
                                     dataclasses.replace(config, target_layer=n)).pair[1]
                for n in (-1, layers))
    assert torch.equal(one, two)
    with pytest.raises(ValueError, match=f"--target_layer {layers + 1}: .* has {layers} layers"):
        cures.equip(predictor, vlm64, dataclasses.replace(config, target_layer=layers + 1))


def test_positions_do_not_depend_on_padding(vlm64, config):
    """Views of different length in one batch: every row has its own states."""
    world = scenes.make_world("multi", "train", 6)
    _, examples = setup(vlm64, world, config)
    batch = train.data.collate([v.target for v in examples.views], vlm64.pad_id)
    assert not batch.mask.all()
    for position in ("word", "words", "image"):
        config = dataclasses.replace(config, target_position=position)
        with torch.no_grad():
            found = cures.encode(vlm64, batch, examples.store.encoded(batch.images), config)
            for row in range(6):
                torch.testing.assert_close(found.embedding[row],
                                           naive_state(vlm64, examples, row, config))


# ---- the teacher ----


@pytest.mark.parametrize("rank, rises", [(4, False), (4, True), (0, False)])
def test_the_teacher_is_the_average_of_what_trains(mixed, config, rank, rises):
    """Over three steps, each average by hand; what does not train is not copied."""
    torch.manual_seed(0)
    config = dataclasses.replace(config, target_encoder="ema", ema=0.9, ema_rises=rises,
                                 lora_rank=rank, steps=3, lr=1e-2)
    vlm = VLM(TINY)
    examples = train.prepared(mixed[:4], vlm, config)
    step = train.trainable(vlm, examples, config)
    trained = {n: p for n, p in vlm.named_parameters() if p.requires_grad}
    means = {n: p.detach().clone() for n, p in trained.items()}
    teacher = step.predictor.cures["teacher"]
    assert teacher.weights().keys() == trained.keys() and len(trained) < len(vlm.state_dict())
    adam = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-2)
    for n in range(1, 4):
        train.train_step(step, adam, [0, 1, 2, 3], config)
        m = 0.9 + 0.1 * n / 3 if rises else 0.9
        for name, p in trained.items():
            means[name] = m * means[name] + (1 - m) * p.detach()
            torch.testing.assert_close(teacher.weights()[name], means[name])
    assert any(not torch.equal(means[n], p) for n, p in trained.items())
    assert not teacher.state_dict() and not any(p.requires_grad for p in teacher.buffers())


def test_a_step_that_is_skipped_leaves_the_teacher(mixed, config):
    torch.manual_seed(0)
    config = dataclasses.replace(config, target_encoder="ema", ema=0.5)
    vlm = VLM(TINY)
    examples = train.prepared(mixed[:2], vlm, config)
    step = train.trainable(vlm, examples, config)
    stir_lora(vlm, 0.02)
    with torch.no_grad():
        vlm.lm.lm_head.weight[0] = float("nan")
    adam = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=1e-2)
    before = {n: t.clone() for n, t in step.predictor.named_buffers()}
    train.train_step(step, adam, [0, 1], config)
    assert all(torch.equal(before[n], t) for n, t in step.predictor.named_buffers())


# ---- whole runs ----


RUN = dict(regime="single", target_encoder="ema", ema=0.9, pred_head="mlp", distance="infonce",
           lora_dropout=0.1, steps=4, save_every=2, eval_every=2, test_per_family=1, lr=5e-3,
           batch=3)
SECOND = dict(RUN, target_encoder="current", sigreg=0.1, vicreg=0.1, pred_head="bias",
              target_position="words")


@pytest.mark.parametrize("fields", [RUN, SECOND], ids=["ema", "terms"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(config, tmp_path, monkeypatch, fields):
    """Averages, their count and the slices' step are in the state: bit for bit the same end."""
    config = dataclasses.replace(config, **fields)
    ends = []
    for stops in ((), (2,)):
        out, step = tmp_path / f"run{len(stops)}", train.train_step
        run = dataclasses.replace(config, out=str(out))
        for stop in stops:
            calls = []

            def interrupted(*args, **kwargs):
                if len(calls) == 2:
                    raise KeyboardInterrupt
                calls.append(1)
                return step(*args, **kwargs)

            monkeypatch.setattr(train, "train_step", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train.train(run)
            assert run_folder.read_tensors(out / "state.safetensors")[1]["step"] == str(stop)
        monkeypatch.setattr(train, "train_step", step)
        train.train(run, resume=bool(stops))
        ends.append(load_file(out / "state.safetensors"))
        kept = load_file(next(out.glob("checkpoint-*")) / Predictor.file_name)
        assert any("head" in name for name in kept)
        assert not any("teacher" in name or "steps" in name for name in kept)
    assert ends[0].keys() == ends[1].keys()
    assert any("teacher" in n or "sigreg" in n for n in ends[0])
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())


def test_nothing_is_added_by_default(shipped, config):
    predictor = Predictor(8, 2, torch.randn(8))
    cures.equip(predictor, shipped, config)
    assert predictor.state_dict().keys() == {"pred_tokens", *(
        f"latent.{name}" for name in predictor.latent.state_dict())}
    assert not list(predictor.buffers())


# ---- Pearl on top of the answers ----


def test_pearl_on_all_answers_without_lambda_is_both(shipped, mixed, config):
    both = dataclasses.replace(config, method="both")
    found = []
    for run in (both, *(dataclasses.replace(config, method=method, with_answers=1.0,
                                            lambda_latent=0.0) for method in ("pearl", "sft"))):
        examples = train.prepared(mixed[:5], shipped, run)
        assert len(examples.views) == 10
        step = train.trainable(VLM(TINY), examples, run)
        assert step.predictor is None
        found.append((examples.views, step([0, 7, 3, 9]).parts))
    for views, parts in found[1:]:
        assert views == found[0][0]
        assert all(torch.equal(value, parts[name]) for name, value in found[0][1].items())


def test_few_answers_are_drawn_by_the_seed_and_repeated(config):
    world = scenes.make_world("mixed", "train", 20)
    drawn = []
    for seed, share, count in ((0, 0.15, 3), (1, 0.15, 3), (0, 0.01, 1), (0, 1.0, 20)):
        run = dataclasses.replace(config, with_answers=share, seed=seed)
        taught = variants.as_taught(world, run)
        assert taught[:20] == world and len(taught) == 40
        bare = [ex.id for ex in taught[20:]]
        assert len(set(bare)) == count and bare == (bare[:count] * 20)[:20]
        assert all(ex.texts == [f"{run.answer_prefix} {ex.answer}"] for ex in taught[20:])
        drawn.append(set(bare))
    assert drawn[0] != drawn[1] and drawn[2] <= drawn[0] | drawn[1] | drawn[3]
    valid = scenes.make_world("mixed", "validation", 6)
    taught = variants.as_taught(valid, dataclasses.replace(config, with_answers=0.01))
    assert [ex.id for ex in taught[6:]] == [ex.id for ex in valid]
    assert variants.as_taught(world, config) == world


@pytest.mark.parametrize("fields", [
    dict(), dict(target_encoder="frozen"), dict(distance="infonce", pred_head="mlp"),
    dict(vicreg=0.5), dict(target_encoder="frozen", targets="family"),
    dict(targets="random"), dict(target_position="image")])
def test_only_trajectories_are_predicted(vlm64, mixed, config, fields):
    """L_JEPA, its terms and gauges are those of the trajectories among the rows; a pass of bare
    answers alone has none."""
    config = dataclasses.replace(config, with_answers=1.0, nextlat_view="none", **fields)
    predictor, examples = equipped(vlm64, mixed[:3], config)
    if config.target_encoder == "frozen":
        train.cache_targets(vlm64, examples, list(range(6)), config)
        variants.average_targets(examples, config.targets)
    mingled = train.compute_losses(vlm64, predictor, examples, [4, 2, 5, 0, 3], config)
    pure = train.compute_losses(vlm64, predictor, examples, [2, 0], config)
    for name in pure.parts.keys() - {"loss", "vlm"}:
        torch.testing.assert_close(mingled.parts[name], pure.parts[name], rtol=1e-5, atol=1e-7)
    for one, other in zip(mingled.pair, pure.pair):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    bare = train.compute_losses(vlm64, predictor, examples, [5, 3], config)
    assert bare.parts["jepa"] == 0 and len(bare.pair[0]) == 0
    torch.testing.assert_close(bare.total.detach(), bare.parts["vlm"])
    assert not losses.collapse_gauges(*bare.pair)


def test_a_run_with_answers_goes_to_its_end(config):
    config = dataclasses.replace(config, target_encoder="frozen", with_answers=0.1, steps=2,
                                 batch=1, eval_every=1, targets="answer")
    train.train(config)
    assert (Path(config.out) / "results.json").is_file()


# ---- what cannot be ----


@pytest.mark.parametrize("argv, message", [
    (["--distance", "infonce", "--batch", "1"], "needs --batch 2 or more"),
    (["--target_encoder", "ema", "--nextlat_view", "trajectory"], "--nextlat_view full or none"),
    (["--vicreg", "1"], "only --target_encoder current"),
    (["--sigreg", "1", "--target_encoder", "ema"], "only --target_encoder current"),
    (["--target_encoder", "ema", "--ema", "1.5"], "--ema is at most 1"),
    (["--with_answers", "1.5"], "at most 1"),
    (["--with_answers", "0.1", "--method", "direct"], "--method pearl or sft"),
    (["--target_position", "image", "--target_view", "trajectory_with_image"],
     "I0 is no tool image")])
def test_options_that_do_not_go_together_are_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        train.parse_config(argv)
    assert message in capsys.readouterr().err


def test_a_trajectory_without_a_tool_image_has_no_mean_over_its_tokens(shipped, mixed, config):
    config = dataclasses.replace(config, target_position="image")
    bare = dataclasses.replace(mixed[0].answer_only("Answer:"), id="lonely")
    with pytest.raises(ValueError, match="example lonely has no tool image"):
        train.prepared([mixed[0], bare], shipped, config)
