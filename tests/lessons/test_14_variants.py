"""Claims: each variant and control changes what its name says and nothing else."""

import copy
import dataclasses

import pytest
import torch
from plain import eq1, run, tokens, turns_of

import baselines
import train
from baselines.training_records import Both, Direct, WithAnswers
from world import loader
from conftest import build, moved, pair_of

RECORDS = loader.examples("multi", "train", 4)


def test_the_teacher_follows_slowly(vlm64):
    method, batch = build(vlm64, "ema", RECORDS[:2], ema=0.9, ema_rises=True, steps=10)
    weights = {n: p for n, p in vlm64.named_parameters() if p.requires_grad}
    means = {n: method.teacher.get_buffer(n.replace(".", "/")).clone() for n in weights}
    with torch.no_grad():
        for step in (1, 2):
            moved(vlm64)
            method.after_step(step)
            # m rises in a straight line to 1 at step 10
            m = 0.9 + 0.1 * step / 10
            means = {n: m * means[n] + (1 - m) * p for n, p in weights.items()}
        h_R = method(batch).pair[1]
        for n, p in weights.items():
            p.copy_(means[n])
    torch.testing.assert_close(h_R, pair_of(method, batch)[1], rtol=1e-4, atol=1e-5)
    assert not any("teacher" in name for name in method.state_dict())


@pytest.mark.parametrize("layer, position", [(2, "end"), (-1, "word"), (1, "words"), (3, "image")])
def test_a_state_of_R_is_the_one_that_layer_and_position_name(vlm64, loaded64, layer, position):
    method, batch = build(vlm64, "target_state", RECORDS[:2], target_layer=layer,
                          target_position=position)
    for record, example, h_R in zip(RECORDS, batch, method(batch).pair[1]):
        view, whole = example.views.target, tokens(loaded64, turns_of(record)[1:])
        words = [n for n, label in enumerate(view.labels) if label not in (-100, view.ids[-1])]
        where = dict(end=[len(view.ids) - 1], word=words[-1:], words=words,
                     image=[n for n, token in enumerate(view.ids) if token == 5])[position]
        states = run(loaded64, view.ids, whole.images, layer)[0]
        torch.testing.assert_close(h_R, states[where].mean(dim=0), rtol=1e-5, atol=1e-5)


def test_controls_put_something_else_in_the_place_of_h_R(loaded64):
    first, *others = loader.examples("multi", "train", 40)
    # three records of one task: the first two have the same answer
    records = [first, next(record for record in others if record.answer == first.answer),
               next(record for record in others if record.answer != first.answer)]
    results = {}
    for name in ("pearl", "shuffled", "random", "task_mean", "answer_mean"):
        method, batch = build(copy.deepcopy(loaded64), name, records, seed=2)
        results[name] = method(batch)
    prediction, (a, b, c) = results["pearl"].pair
    random = [torch.randn(128, generator=torch.Generator().manual_seed(1_000_003 * 2 + n)).double()
             for n in range(3)]
    naive = dict(pearl=[a, b, c], shuffled=[c, a, b], random=random,
                 # the mean of all records of the task, or of those with the same answer
                 task_mean=3 * [(a + b + c) / 3], answer_mean=[(a + b) / 2, (a + b) / 2, c])
    for name, targets in naive.items():
        torch.testing.assert_close(results[name].parts["jepa"], eq1(prediction, targets), rtol=1e-5,
                                   atol=1e-7)


def test_ablations_weigh_one_term_and_dropout_is_loras(loaded64):
    def parts(name, **options):
        method, batch = build(copy.deepcopy(loaded64), name, RECORDS[:2], **options)
        return method.eval()(batch).parts, method.config.lambda_latent

    for base, terms in (("pearl", ("jepa", "nextlat")), ("release", ("nextlat",))):
        whole, weight = parts(base)
        for name in terms:
            other, _ = parts(f"{base}+no_{name}")
            torch.testing.assert_close(other["loss"], whole["loss"] - weight * whole[name])
        other, _ = parts(f"{base}+nextlat_factor", nextlat_factor=3.0)
        torch.testing.assert_close(other["nextlat"], 3 * whole["nextlat"])
        torch.testing.assert_close(other["loss"], whole["loss"] + 2 * weight * whole["nextlat"])
    dropout, _ = build(copy.deepcopy(loaded64), "dropout", RECORDS[:1], lora_dropout=0.3)
    assert {m.p for m in dropout.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}


# ---- what is learned ----------------------------------------------------------------------------


def test_bare_answers():
    options = train.config_class("with_answers")
    bare = [dataclasses.replace(r, bare=True, trajectory=[f"Answer: {r.answer}"]) for r in RECORDS]
    assert list(Direct.records(RECORDS, options())) == bare
    assert list(Both.records(RECORDS, options())) == RECORDS + bare
    # a share is drawn by the seed, and repeated until answers are half of all
    for seed, share, sample in ((0, 0.3, [0, 1]), (1, 0.3, [1, 3]), (0, 0.25, [0]),
                                (0, 1.0, [0, 1, 2, 3]), (0, 0.0, [])):
        records = list(WithAnswers.records(RECORDS, options(seed=seed, share=share)))
        assert records == RECORDS + [bare[n] for n in (sample * 4)[:4]]
    # validation has all of them
    valid = loader.examples("multi", "validation", 3)
    records = WithAnswers.records(valid, options(share=0.3))
    assert [record.id for record in records] == [record.id for record in valid] * 2
    with pytest.raises(ValueError, match="--share is at most 1"):
        WithAnswers.records(RECORDS, options(share=1.5))


def test_bare_answers_are_not_predicted(vlm64):
    method, batch = build(vlm64, "with_answers", RECORDS[:2], share=1.0)
    assert [example.bare for example in batch] == [False, False, True, True]
    mixed, pure, bare = (method([batch[n] for n in rows]) for rows in ([2, 0, 3, 1], [0, 1], [2]))
    torch.testing.assert_close(mixed.pair[1], pure.pair[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed.parts["jepa"], pure.parts["jepa"], rtol=1e-5, atol=1e-7)
    assert bare.parts["jepa"] == 0 and len(bare.pair[0]) == 0


def test_trajectories_are_shown_in_another_way():
    record = next(record for record in RECORDS if len(record.images) == 3)
    t1, i1, t2, i2, t3 = record.trajectory
    assert baselines.ImageFirst.adapt(record, None).trajectory == [i1, t1, i2, f"{t2} {t3}"]
    stripped = baselines.StripCalls.adapt(record, None)
    assert stripped.images == record.images and not any("[" in text for text in stripped.texts)


def test_classes_compose():
    joined = baselines.find("mlp_head+vicreg+with_answers")
    assert [cls.__name__ for cls in joined.__mro__[1:6]] == ["WithAnswers", "MLPHead", "VICReg",
                                                             "Current", "Pearl"]
    # neither the order of the names matters, nor a class that another one includes
    assert baselines.find("vicreg+mlp_head").__bases__ == (baselines.MLPHead, baselines.VICReg)
    assert baselines.find("current+vicreg") is baselines.VICReg
    config = train.config_class("release+infonce+ema")()
    assert (config.lambda_latent, config.infonce_masked, config.ema) == (0.2, True, 0.996)
    with pytest.raises(ValueError, match="unknown method 'nope': choose from with_answers, "):
        train.find_method("pearl+nope")
