"""Claims: each variant and control changes what its name says and nothing else; what is subtracted
from a target equals a plain loop. (Other states of R as targets: studies/test_figures.py.)"""

import copy
import dataclasses

import pytest
import torch
from plain import cosine, eq1, target_state

import baselines
import train
from world import loader
from conftest import assert_same, build, embed, images_of, move, pair_of, terms_of

RECORDS = loader.examples("multi", "train", 6)


def test_the_teacher_follows_slowly(vlm64):
    method, batch = build(vlm64, "ema", RECORDS[:2], ema=0.9)
    weights = {n: p for n, p in vlm64.named_parameters() if p.requires_grad}
    means = {n: method.teacher.get_buffer(n.replace(".", "/")).clone() for n in weights}
    with torch.no_grad():
        for step in (1, 2):
            move(vlm64)
            method.after_step(step)
            means = {n: 0.9 * means[n] + 0.1 * p for n, p in weights.items()}
        h_R = method(batch).pair[1]
    vlm64.load_state_dict(means, strict=False)
    torch.testing.assert_close(h_R, pair_of(method, batch)[1], rtol=1e-4, atol=1e-5)


def test_controls_put_something_else_in_the_place_of_h_R(loaded64):
    records = [RECORDS[n] for n in (1, 5, 0)]  # zoom: zero, zero and two
    method, batch = build(copy.deepcopy(loaded64), "pearl", records)
    prediction, (a, b, c) = method(batch).pair
    random = [torch.randn(128, generator=torch.Generator().manual_seed(1_000_003 * 2 + n)).double()
              for n in range(3)]
    naive = dict(shuffled=[c, a, b], random=random, task_mean=3 * [(a + b + c) / 3],
                 answer_mean=[(a + b) / 2, (a + b) / 2, c])
    for name, targets in naive.items():
        method, batch = build(copy.deepcopy(loaded64), name, records, seed=2)
        torch.testing.assert_close(method(batch).parts["jepa"], eq1(prediction, targets), rtol=1e-5,
                                   atol=1e-7)


@pytest.mark.parametrize("base, change, term, factor", [
    ("pearl", "no_jepa", "jepa", 0), ("pearl", "no_nextlat", "nextlat", 0),
    ("release", "nextlat_factor", "nextlat", 3)])
def test_an_ablation_weighs_one_term(loaded64, base, change, term, factor):
    parts = []
    for name in (base, f"{base}+{change}"):
        method, batch = build(copy.deepcopy(loaded64), name, RECORDS[:2])
        method.config.nextlat_factor = 3.0
        parts.append(method.eval()(batch).parts)
    whole, other = parts
    whole["loss"] += method.config.lambda_latent * (factor - 1) * whole[term]
    torch.testing.assert_close(other, whole | {term: factor * whole[term]})


@pytest.mark.parametrize("name, k, sample, options", [
    ("centred", 2, 4, dict()), ("centred", 0, 5, dict(train_vision=True)),
    ("centred", 9, 3, dict(lora_rank=0)), ("with_answers+centred", 2, 8, dict(share=1.0))])
def test_a_target_minus_its_neighbours(vlm64, loaded64, name, k, sample, options):
    method, batch = build(vlm64, name, RECORDS, neighbours=k, sample=sample, seed=4, **options)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(4)).tolist()
    numbers = [n for n in order[:sample] if n < len(RECORDS)]  # bare answers have no trajectory
    assert 1 < len(numbers) < len(RECORDS)
    # the rows, the model and the images of before training count, whatever training moves
    rows = method.predictor.pred_embeddings.detach().clone()
    images = images_of(*build(copy.deepcopy(loaded64), "sft", RECORDS))
    move(move(method).predictor, size=1.0)  # far enough for other neighbours
    with torch.no_grad():
        states = [target_state(loaded64, record) for record in RECORDS]
        questions = [embed(loaded64, example.views.input, images, rows).embedding[0]
                     for example in batch[:len(RECORDS)]]
    mean, targets = sum(questions[n] for n in numbers) / len(numbers), []
    for question, state in zip(questions, states):
        nearest = sorted(numbers, key=lambda n: -cosine(question - mean, questions[n] - mean))
        nearest = nearest[:k or len(numbers)]
        targets.append(state - sum(states[n] for n in nearest) / len(nearest))
    prediction = pair_of(method, batch[:len(RECORDS)])[0]
    assert_same(terms_of(method, batch)["jepa"], eq1(prediction, targets), method)


def test_the_running_mean_follows_the_targets_while_training(vlm64):
    method, batch = build(vlm64, "running_mean", RECORDS[:3])
    mean = torch.zeros(128, dtype=torch.float64)
    for training, share in ((False, 0), (True, 1), (True, 0.1), (False, 0)):
        method.train(training)
        prediction, h_R = pair_of(method, batch)
        h_R = h_R.detach()
        # the first passes have their own batch's mean
        subtracted = mean if mean.any() else h_R.mean(dim=0)
        assert_same(terms_of(method, batch)["jepa"], eq1(prediction, h_R - subtracted), method)
        mean = (1 - share) * mean + share * h_R.mean(dim=0)
        torch.testing.assert_close(method.mean, mean, rtol=1e-5, atol=1e-6)
        move(method)


def test_bare_answers():
    options, four = train.config_class("with_answers"), RECORDS[:4]
    bare = [dataclasses.replace(r, bare=True, trajectory=[f"Answer: {r.answer}"]) for r in four]
    assert list(baselines.Both.records(four, options())) == four + bare
    # a share is drawn by the seed, and repeated until answers are half of all
    for seed, share, sample in ((0, 0.3, [0, 1]), (1, 0.3, [1, 3]), (0, 1.0, [0, 1, 2, 3])):
        records = list(baselines.WithAnswers.records(four, options(seed=seed, share=share)))
        assert records == four + [bare[n] for n in (sample * 4)[:4]]
    # validation has all of them
    valid = loader.examples("multi", "validation", 3)
    records = baselines.WithAnswers.records(valid, options(share=0.3))
    assert [record.id for record in records] == [record.id for record in valid] * 2


def test_bare_answers_are_not_predicted(vlm64):
    method, batch = build(vlm64, "with_answers+infonce", RECORDS[:2], share=1.0)
    assert [example.bare for example in batch] == [False, False, True, True]
    mixed, pure, bare = (method([batch[n] for n in rows]) for rows in ([2, 0, 3, 1], [0, 1], [2]))
    torch.testing.assert_close(mixed.pair[1], pure.pair[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed.parts["jepa"], pure.parts["jepa"], rtol=1e-5, atol=1e-7)
    assert bare.parts["jepa"] == 0 and len(bare.pair[0]) == 0


def test_classes_compose(vlm64):
    # the order of the names does not matter, nor does a class that another one includes
    joined = baselines.find("vicreg+current+mlp_head+with_answers")
    assert joined.__bases__ == (baselines.WithAnswers, baselines.MLPHead, baselines.VICReg)
    assert baselines.find("with_answers+dropout+sft").forward is train.SFT.forward
    # a method has the options of all its classes; one of the release's is the dropout in LoRA
    method, _ = build(vlm64, "release+infonce+ema", RECORDS[:1], lora_dropout=0.3)
    config = method.config
    assert (config.lambda_latent, config.infonce_masked, config.ema) == (0.2, True, 0.996)
    assert {m.p for m in method.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    for name, reason in (("both+task_mean", "Both has none of the terms that TaskMean changes"),
                         ("pearl+nope", "unknown method 'nope': choose from with_answers, "),
                         ("centred+paper", "centred needs the frozen target"),
                         ("vicreg+ema", "need a gradient through R"),
                         ("direct+recon", "no trajectory has a tool image")):
        with pytest.raises(ValueError, match=reason):
            build(vlm64, name, RECORDS[:2])
