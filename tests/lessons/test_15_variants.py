"""Claims: each variant and control changes what its name says and nothing else: whose h_R, which
state of R, what stands in its place, which records are learned; classes compose."""

import copy
import dataclasses

import pytest
import torch

import baselines
import train
from baselines.training_records import Bare, Both, Direct, Joined, WithAnswers
from conftest import build, embeddings, images_of
from data import collate
from world import loader

RECORDS = loader.examples("multi", "train", 4)


def eq1(prediction, target):
    cosines = [p @ t / (p.norm() * t.norm()) for p, t in zip(prediction, target)]
    return 1 - sum(cosines) / len(cosines)


def test_the_teacher_follows_slowly(vlm64):
    method, batch = build(vlm64, "ema", RECORDS[:2], ema=0.9, ema_rises=True, steps=10)
    weights = {n: p for n, p in vlm64.named_parameters() if p.requires_grad}
    means = {n: method.teacher.get_buffer(n.replace(".", "/")).clone() for n in weights}
    with torch.no_grad():
        for step in (1, 2):
            for p in weights.values():
                p += 0.05 * torch.randn_like(p)
            method.after_step(step)
            # m rises in a straight line to 1 at step 10
            m = 0.9 + 0.1 * step / 10
            means = {n: m * means[n] + (1 - m) * p for n, p in weights.items()}
        found = method(batch).pair[1]
        for n, p in weights.items():
            p.copy_(means[n])
    torch.testing.assert_close(found, embeddings(method, batch, 2), rtol=1e-4, atol=1e-5)
    assert not any("teacher" in name for name in method.state_dict())


@pytest.mark.parametrize("layer, position", [(2, "end"), (-1, "word"), (1, "words"), (3, "image")])
def test_a_state_of_R_is_the_one_that_layer_and_position_name(vlm64, layer, position):
    method, batch = build(vlm64, "target_state", RECORDS[:2], target_layer=layer,
                          target_position=position)
    result, end = method(batch), vlm64.family.end_id
    for example, found in zip(batch, result.pair[1]):
        view, words = example.views.target, []
        inputs = vlm64.embed(collate([view], 0), images_of(method, [example]))
        with vlm64.starting_model(), torch.no_grad():
            states = vlm64.family.states(**inputs, output_hidden_states=True).hidden_states
        words = [n for n, label in enumerate(view.labels) if label not in (-100, end)]
        where = dict(end=[len(view.ids) - 1], word=words[-1:], words=words,
                     image=[n for n, token in enumerate(view.ids) if token == 5])[position]
        torch.testing.assert_close(found, states[layer][0, where].mean(dim=0))


def test_controls_put_something_else_in_the_place_of_h_R(loaded64):
    seen = {}
    for name in ("pearl", "shuffled", "random", "task_mean", "answer_mean"):
        method, batch = build(copy.deepcopy(loaded64), name, RECORDS, seed=2)
        seen[name] = method(batch)
    prediction, h_R = seen["pearl"].pair
    parts = {name: result.parts["jepa"] for name, result in seen.items()}
    torch.testing.assert_close(parts["shuffled"], eq1(prediction, h_R[[3, 0, 1, 2]]))
    drawn = [torch.randn(128, generator=torch.Generator().manual_seed(1_000_003 * 2 + n))
             for n in range(4)]
    torch.testing.assert_close(parts["random"], eq1(prediction, [d.double() for d in drawn]))
    # the mean over all rows with the same task, or with the same task and answer
    for name, keys in (("task_mean", [(r.task,) for r in RECORDS]),
                       ("answer_mean", [(r.task, r.answer) for r in RECORDS])):
        means = [sum(h for h, other in zip(h_R, keys) if other == key) / keys.count(key)
                 for key in keys]
        assert 1 < len(set(keys)) or name == "task_mean"
        torch.testing.assert_close(parts[name], eq1(prediction, means), rtol=1e-5, atol=1e-7)
    assert parts["task_mean"] != parts["answer_mean"]


def test_ablations_and_options(loaded64):
    pearl, batch = build(copy.deepcopy(loaded64), "pearl", RECORDS[:2])
    whole = pearl(batch).parts
    for name in ("jepa", "nextlat"):
        other = build(copy.deepcopy(loaded64), f"no_{name}", RECORDS[:2])[0](batch).parts
        assert other[name] == 0 and other["loss"] == whole["loss"] - 5 * whole[name] + 0
    dropout = build(copy.deepcopy(loaded64), "dropout", RECORDS[:2], lora_dropout=0.3)[0]
    assert {m.p for m in dropout.vlm.lm.get_decoder().modules()
            if isinstance(m, torch.nn.Dropout)} == {0.3}


# ---- what is learned ----------------------------------------------------------------------------


def options(**more):
    return dataclasses.replace(train.config_class("with_answers")(), **more)


def test_bare_answers(loaded64):
    bare = [dataclasses.replace(r, bare=True, trajectory=[f"Answer: {r.answer}"]) for r in RECORDS]
    assert list(Direct.records(RECORDS, options())) == bare
    assert list(Both.records(RECORDS, options())) == RECORDS + bare
    # a share is drawn by the seed and repeated until answers are half of all
    drawn = []
    for seed, share, count in ((0, 0.3, 2), (1, 0.3, 2), (0, 0.25, 1), (0, 1.0, 4), (0, 0.0, 0)):
        found = list(WithAnswers.records(RECORDS, options(seed=seed, share=share)))
        answers = found[4:]
        assert found[:4] == RECORDS and len(answers) == (4 if count else 0)
        assert answers == (answers[:count] * 4)[:len(answers)]
        assert sorted(bare.index(r) for r in answers[:count]) == [
            bare.index(r) for r in answers[:count]] and len({r.id for r in answers}) == count
        drawn.append([r.id for r in answers])
    assert drawn[0] != drawn[1]
    # validation has all of them
    valid = loader.examples("multi", "validation", 3)
    assert [r.id for r in WithAnswers.records(valid, options(share=0.3))] == [
        r.id for r in valid] * 2
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
    record, config = next(r for r in RECORDS if len(r.images) == 3), options()
    t1, i1, t2, i2, t3 = record.trajectory
    first = baselines.ImageFirst.shown(record, config).trajectory
    assert first == [i1, t1, i2, f"{t2} {t3}"]
    stripped = baselines.StripCalls.shown(record, config)
    assert stripped.images == record.images and not any("[" in text for text in stripped.texts)


def test_classes_compose():
    found = baselines.find("mlp_head+vicreg+with_answers")
    assert [cls.__name__ for cls in found.__mro__[1:6]] == ["WithAnswers", "MLPHead", "VICReg",
                                                            "Current", "Pearl"]
    # the order of the names does not matter, nor does a class that another one includes
    assert baselines.find("vicreg+mlp_head").__bases__ == (baselines.MLPHead, baselines.VICReg)
    assert baselines.find("current+vicreg") is baselines.VICReg
    assert train.find_method("pearl") is train.Pearl and train.find_method("sft") is train.SFT
    config = train.config_class("release+infonce+ema")()
    assert (config.lambda_latent, config.infonce_masked, config.ema) == (0.2, True, 0.996)
    with pytest.raises(ValueError, match="unknown method 'nope': choose from tracked, "):
        baselines.find("pearl+nope")
    assert Joined([1, 2], [3])[2] == 3 and len(Bare(RECORDS, [1], "A:")) == 1
