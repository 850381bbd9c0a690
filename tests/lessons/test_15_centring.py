"""Claims: the target minus what similar questions share, or minus a running mean; the trajectory's
next-token distributions as a teacher."""

import copy

import pytest
import torch
from plain import cosine, eq1, run, target_state, tokens, turns_of

import train
from world import loader
from conftest import assert_same, build, embed, images_of, moved, pair_of, terms_of

RECORDS = loader.examples("multi", "train", 6)


# ---- centring -----------------------------------------------------------------------------------


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
    rows = method.predictor.pred_tokens.detach().clone()
    images = images_of(*build(copy.deepcopy(loaded64), "sft", RECORDS))
    moved(method)
    with torch.no_grad():
        records = [(record, example.views.input) for record, example in zip(RECORDS, batch)]
        targets = naive_centred(loaded64, rows, records, images, numbers,
                                min(neighbours or 9, len(numbers)))
    prediction = pair_of(method, batch[:len(RECORDS)])[0]
    assert_same(terms_of(method, batch)["jepa"], eq1(prediction, targets), method)


@pytest.mark.parametrize("other", ["current", "ema", "vicreg", "paper"])
def test_only_a_frozen_target_is_centred_by_neighbours(vlm64, other):
    with pytest.raises(ValueError, match="--method centred needs the frozen target"):
        build(vlm64, f"centred+{other}", RECORDS[:2])


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
        moved(method)
    assert "mean" not in method.state_dict()


# ---- self-distillation --------------------------------------------------------------------------


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
    moved(method)
    terms, teacher = terms_of(method, batch), loaded64 if options else vlm64
    assert_same(terms["kl"], naive_kl(vlm64, teacher, RECORDS[:3]), method)
    torch.testing.assert_close(terms["loss"], terms["vlm"] + 5 * terms["kl"])
    torch.testing.assert_close(terms["vlm"], train.SFT.forward(method, batch).total)
