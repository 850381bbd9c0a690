"""Claims: each variant and control changes what its name says and nothing else; what is subtracted
from a target, and who teaches the next token, equal a plain loop."""

import copy
import dataclasses

import pytest
import torch
from plain import cosine, eq1, run, target_state, tokens, turns_of

import baselines
import train
from world import loader
from conftest import assert_same, build, embed, images_of, move, pair_of, terms_of

RECORDS = loader.examples("multi", "train", 6)


def test_the_teacher_follows_slowly(vlm64):
    method, batch = build(vlm64, "ema", RECORDS[:2], ema=0.9, ema_rises=True, steps=10)
    weights = {n: p for n, p in vlm64.named_parameters() if p.requires_grad}
    means = {n: method.teacher.get_buffer(n.replace(".", "/")).clone() for n in weights}
    with torch.no_grad():
        for step in (1, 2):
            move(vlm64)
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
    method, batch = build(copy.deepcopy(loaded64), "pearl", records)
    prediction, (a, b, c) = method(batch).pair
    generators = [torch.Generator().manual_seed(1_000_003 * 2 + n) for n in range(3)]
    random = [torch.randn(128, generator=generator).double() for generator in generators]
    naive = dict(shuffled=[c, a, b], random=random,
                 # the mean of all records of the task, or of those with the same answer
                 task_mean=3 * [(a + b + c) / 3], answer_mean=[(a + b) / 2, (a + b) / 2, c])
    for name, targets in naive.items():
        method, batch = build(copy.deepcopy(loaded64), name, records, seed=2)
        torch.testing.assert_close(method(batch).parts["jepa"], eq1(prediction, targets), rtol=1e-5,
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


def naive_centred(start, rows, records, images, sample, count):
    """Of each record h_R minus the mean h_R of the `count` sampled questions most like it."""
    questions = [embed(start, view, images, rows).embedding[0] for _, view in records]
    states = [target_state(start, record) for record, _ in records]
    mean = sum(questions[n] for n in sample) / len(sample)
    targets = []
    for question, state in zip(questions, states):
        nearest = sorted(sample, key=lambda n: -cosine(question - mean, questions[n] - mean))
        targets.append(state - sum(states[n] for n in nearest[:count]) / count)
    return targets


@pytest.mark.parametrize("name, neighbours, sample, options", [
    ("centred", 2, 4, dict()), ("centred", 0, 5, dict(train_vision=True)),
    ("centred", 9, 3, dict(lora_rank=0)), ("with_answers+centred", 2, 8, dict(share=1.0))])
def test_a_centred_target_is_particular_to_its_trajectory(vlm64, loaded64, name, neighbours, sample,
                                                          options):
    method, batch = build(vlm64, name, RECORDS, neighbours=neighbours, sample=sample, seed=4,
                          **options)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(4)).tolist()
    # bare answers have no trajectory
    numbers = [n for n in order[:sample] if n < len(RECORDS)]
    assert 1 < len(numbers) < len(RECORDS)
    # the rows, the model and the images of before training count, whatever training moves
    rows = method.predictor.pred_embeddings.detach().clone()
    images = images_of(*build(copy.deepcopy(loaded64), "sft", RECORDS))
    # far enough for other neighbours
    move(move(method).predictor, size=1.0)
    with torch.no_grad():
        records = [(record, example.views.input) for record, example in zip(RECORDS, batch)]
        targets = naive_centred(loaded64, rows, records, images, numbers,
                                min(neighbours or 9, len(numbers)))
    prediction = pair_of(method, batch[:len(RECORDS)])[0]
    assert_same(terms_of(method, batch)["jepa"], eq1(prediction, targets), method)


@pytest.mark.parametrize("name, reason", [
    *[(f"centred+{other}", "centred needs the frozen") for other in ("current", "ema", "paper")],
    ("vicreg+ema", "need a gradient through R"), ("sigreg+ema", "need a gradient through R")])
def test_targets_that_cannot_be_joined_are_refused(vlm64, name, reason):
    with pytest.raises(ValueError, match=reason):
        build(vlm64, name, RECORDS[:2])


def test_the_running_mean_follows_the_targets_while_training(vlm64):
    method, batch = build(vlm64, "running_mean", RECORDS[:3])
    mean = torch.zeros(128, dtype=torch.float64)
    for training, share in ((False, 0), (True, 1), (True, 0.1), (False, 0)):
        method.train(training)
        prediction, h_R = pair_of(method, batch)
        h_R = h_R.detach()
        # the first passes have their own batch's mean
        subtracted = mean if mean.any() else h_R.mean(dim=0)
        before = method.mean.clone()
        assert_same(terms_of(method, batch)["jepa"], eq1(prediction, h_R - subtracted), method)
        mean = (1 - share) * mean + share * h_R.mean(dim=0)
        torch.testing.assert_close(method.mean, mean, rtol=1e-5, atol=1e-6)
        assert training or torch.equal(method.mean, before)
        move(method)
    assert "mean" not in method.state_dict()


def naive_kl(student, teacher, records):
    """Mean over the tokens with which both texts end of KL(teacher || student)."""
    terms = []
    for record in records:
        full = tokens(student, turns_of(record))
        answer = tokens(student, [turns_of(record)[0], ("assistant", [f"Answer: {record.answer}"])])
        log_p = run(teacher, full.ids, full.images)[1].detach().log_softmax(dim=-1)
        log_q = run(student, answer.ids, answer.images)[1].log_softmax(dim=-1)
        # from the end of the turn on, and without the line break behind it
        n = 2
        while full.ids[-n] == answer.ids[-n]:
            # the logits before a token predict it
            p, q = log_p[-n - 1], log_q[-n - 1]
            terms.append((p.exp() * (p - q)).sum())
            n += 1
        # ": seven" and the end of the turn: "Answer" has a blank before it in the trajectory
        assert n == 5
    return sum(terms) / len(terms)


@pytest.mark.parametrize("options", [
    dict(), dict(teacher="start"), dict(teacher="start", lora_rank=0),
    dict(teacher="start", train_vision=True)], ids=str)
def test_the_student_learns_the_teachers_distributions(vlm64, loaded64, options):
    method, batch = build(vlm64, "self_distill", RECORDS[:3], **options)
    move(method)
    terms, teacher = terms_of(method, batch), loaded64 if options else vlm64
    assert_same(terms["kl"], naive_kl(vlm64, teacher, RECORDS[:3]), method)
    torch.testing.assert_close(terms["loss"], terms["vlm"] + 5 * terms["kl"])
    torch.testing.assert_close(terms["vlm"], train.SFT.forward(method, batch).total)


def test_bare_answers():
    options = train.config_class("with_answers")
    four = RECORDS[:4]
    bare = [dataclasses.replace(r, bare=True, trajectory=[f"Answer: {r.answer}"]) for r in four]
    assert list(baselines.Direct.records(four, options())) == bare
    assert list(baselines.Both.records(four, options())) == four + bare
    # a share is drawn by the seed, and repeated until answers are half of all
    for seed, share, sample in ((0, 0.3, [0, 1]), (1, 0.3, [1, 3]), (0, 0.25, [0]),
                                (0, 1.0, [0, 1, 2, 3]), (0, 0.0, [])):
        records = list(baselines.WithAnswers.records(four, options(seed=seed, share=share)))
        assert records == four + [bare[n] for n in (sample * 4)[:4]]
    # validation has all of them
    valid = loader.examples("multi", "validation", 3)
    records = baselines.WithAnswers.records(valid, options(share=0.3))
    assert [record.id for record in records] == [record.id for record in valid] * 2
    with pytest.raises(ValueError, match="--share is at most 1"):
        baselines.WithAnswers.records(RECORDS, options(share=1.5))


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
    assert baselines.find("release+ema").target is baselines.EMA.target
    config = train.config_class("release+infonce+ema")()
    assert (config.lambda_latent, config.infonce_masked, config.ema) == (0.2, True, 0.996)
    for name in ("recon+ema", "sft+centred", "self_distill+release", "both+task_mean"):
        with pytest.raises(ValueError, match="has none of the terms that"):
            baselines.find(name)
    assert baselines.find("with_answers+dropout+sft").forward is train.SFT.forward
    with pytest.raises(ValueError, match="unknown method 'nope': choose from with_answers, "):
        train.find_method("pearl+nope")
