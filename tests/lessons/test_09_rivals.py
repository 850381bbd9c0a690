"""Claims: InfoNCE, VICReg, SIGReg and the MLP head, with the current model's h_R and the gradient
that each of them needs, and self-distillation equal plain loops in the step."""

import math

import pytest
import torch
from plain import cosine, eq1, run, tokens, turns_of
from torch.nn.functional import gelu

import train
from world import loader
from conftest import assert_same, build, move, pair_of, terms_of

RECORDS = loader.examples("multi", "train", 3)
# task and answer of the records; the first two are a group
GROUPS = [("zoom", "two"), ("zoom", "two"), ("path", "two"), ("zoom", "six")]


def naive_infonce(prediction, target, groups):
    """-log of one's own share among the rows of other groups and oneself."""
    terms = []
    for i, group in enumerate(groups):
        scores = torch.stack([cosine(prediction[i], target[j]) / 0.07 for j in range(len(groups))
                              if i == j or groups[j] != group])
        terms.append(scores.logsumexp(0) - cosine(prediction[i], target[i]) / 0.07)
    return sum(terms) / len(terms)


def naive_vicreg(h):
    count, dim = h.shape
    x = [math.sqrt(dim) * row / row.norm() for row in h]
    mean = sum(x) / count
    cov = sum(torch.outer(row - mean, row - mean) for row in x) / (count - 1)
    v = sum((1 - (cov[d, d] + 1e-4).sqrt()).clamp_min(0) for d in range(dim)) / dim
    c = sum((cov[d] ** 2).sum() - cov[d, d] ** 2 for d in range(dim)) / dim
    return v + c / 25


def naive_epps_pulley(x):
    """One column: the characteristic function with complex numbers, over both signs of t."""
    t = torch.linspace(-3, 3, 33, dtype=x.dtype)
    gauss = torch.exp(-t ** 2 / 2)
    phi = torch.exp(1j * t[:, None] * x).mean(dim=1)
    heights = (phi - gauss).abs() ** 2 * gauss
    return len(x) * ((heights[1:] + heights[:-1]) / 2 * 6 / 32).sum()


def naive_head(head, rows):
    norm, first, _, second = head
    return second(gelu(first(norm(rows))))


def naive_sigreg(method, h):
    """Slices are drawn from the seed (3) and the step (6)."""
    first, _, second = method.projection
    z = second(gelu(first(h)))
    drawn = torch.randn(64, 256, generator=torch.Generator().manual_seed(1_000_003 * 3 + 6))
    slices = [z @ (a / a.norm()).double() for a in drawn.T]
    return sum(map(naive_epps_pulley, slices)) / 256


# L_JEPA of each rival from the method, h^_R and h_R: what stops the gradient, and what does not
STEPS = {
    "current": lambda m, p, h: eq1(p, h.detach()),
    "mlp_head+current": lambda m, p, h: eq1(p + naive_head(m.head, p), h.detach()),
    "infonce+paper": lambda m, p, h: naive_infonce(
        p, h.detach(), GROUPS if m.config.infonce_masked else range(4)),
    "vicreg": lambda m, p, h: eq1(p, h.detach()) + naive_vicreg(h),
    "sigreg+vicreg": lambda m, p, h: STEPS["vicreg"](m, p, h) + 0.05 * naive_sigreg(m, h),
}


@pytest.mark.parametrize("name, options", [
    *[(name, {}) for name in STEPS], ("infonce+paper", dict(infonce_masked=False))])
def test_the_step_under_a_rival_equals_one_by_hand(vlm64, mixed, name, options):
    method, batch = build(vlm64, name, mixed[:4], seed=3, **options)
    batch = [ex._replace(task=task, answer=answer) for ex, (task, answer) in zip(batch, GROUPS)]
    method.after_step(6)
    naive = STEPS[name](method, *pair_of(method, batch))
    assert_same(terms_of(method, batch)["jepa"], naive, method)


def test_where_a_rival_has_nothing_to_do(vlm64, mixed):
    # the head starts at Pearl's own prediction
    method = train.find_method("mlp_head")(vlm64, train.Config(device="cpu", lora_rank=0))
    assert not method.head(torch.randn(3, 128)).any()
    h = torch.randn(1, 128, dtype=torch.float64)  # one row alone has no spread
    for name in ("vicreg", "sigreg"):
        method, batch = build(vlm64, name, mixed[:1], lora_rank=0)
        assert method.jepa(h, h, batch) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="--method infonce needs --batch 2"):
        build(vlm64, "infonce", mixed[:1], lora_rank=0, batch=1)[0](batch)


def naive_kl(student, teacher, records):
    """Mean over the tokens with which both texts end of KL(teacher || student)."""
    terms = []
    for record in records:
        full = tokens(student, turns_of(record))
        answer = tokens(student, [turns_of(record)[0], ("assistant", [f"Answer: {record.answer}"])])
        log_p = run(teacher, full.ids, full.images)[1].detach().log_softmax(dim=-1)
        log_q = run(student, answer.ids, answer.images)[1].log_softmax(dim=-1)
        # ": seven" and the end of the turn, without the line break behind it; "Answer" has a blank
        # before it in the trajectory
        assert full.ids[-4:] == answer.ids[-4:] and full.ids[-5] != answer.ids[-5]
        # the logits before a token predict it
        terms += [(p.exp() * (p - q)).sum() for p, q in zip(log_p[-5:-2], log_q[-5:-2])]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("options", [
    dict(), dict(teacher="start", lora_rank=0), dict(teacher="start", train_vision=True)], ids=str)
def test_the_student_learns_the_teachers_distributions(vlm64, loaded64, options):
    method, batch = build(vlm64, "self_distill", RECORDS, **options)
    move(method)
    terms, teacher = terms_of(method, batch), loaded64 if options else vlm64
    assert_same(terms["kl"], naive_kl(vlm64, teacher, RECORDS), method)
    torch.testing.assert_close(terms["loss"], terms["vlm"] + 5 * terms["kl"])
    torch.testing.assert_close(terms["vlm"], train.SFT.forward(method, batch).total)
