"""Claims: every equation equals a naive loop, in value and in gradient (float64); gradient stops
where the docstrings say; the gauges have the values worked out by hand."""

import math

import pytest
import torch
from torch import nn

import losses
from predictor import LatentPredictor

B, T, D, V = 3, 6, 5, 7


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def naive_distance(a, b, kind):
    """One pair of vectors, written out."""
    if kind == "cosine":
        dot = sum(x * y for x, y in zip(a, b))
        return 1 - dot / (sum(x * x for x in a).sqrt() * sum(y * y for y in b).sqrt())
    if kind == "l2":
        return sum((x - y) ** 2 for x, y in zip(a, b)).sqrt()
    if kind == "mse":
        return sum((x - y) ** 2 for x, y in zip(a, b)) / len(a)
    gaps = [abs(x - y) for x, y in zip(a, b)]
    return sum(0.5 * g * g if g < 1 else g - 0.5 for g in gaps) / len(a)


def same(value, naive, *inputs):
    """Equal values and equal gradients of two computations on the same leaves."""
    torch.testing.assert_close(value, naive)
    for one, other in zip(torch.autograd.grad(value, inputs, allow_unused=True),
                          torch.autograd.grad(naive, inputs, allow_unused=True)):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other)


def no_gradient(value, *inputs):
    assert torch.autograd.grad(value, inputs, allow_unused=True) == (None,) * len(inputs)


@pytest.mark.parametrize("kind", losses.DISTANCES)
def test_eq1_equals_a_loop_and_stops_at_the_target(kind):
    predicted, target = rand(B, D), 2 * rand(B, D)
    naive = sum(naive_distance(predicted[i], target[i].detach(), kind) for i in range(B)) / B
    same(losses.jepa_loss(predicted, target, kind), naive, predicted)
    no_gradient(losses.jepa_loss(predicted, target, kind), target)


def test_unknown_distance_lists_the_known_ones():
    with pytest.raises(ValueError, match="cosine, smoothl1, mse, l2"):
        losses.distance(rand(D), rand(D), "euclid")


def make_predictor(sees_next=True):
    predictor = LatentPredictor(D, sees_next).double()
    # at its zero start the forecast would be the state itself
    nn.init.normal_(predictor.mlp[-1].weight, std=0.5)
    return predictor


TARGETS = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 1]],
                       dtype=torch.bool)


@pytest.mark.parametrize("horizon", [1, 2, 3, 5])
@pytest.mark.parametrize("sees_next", [True, False])
def test_eq2_equals_a_loop(horizon, sees_next):
    states, predictor = rand(B, T, D), make_predictor(sees_next)
    embeds = torch.randn(B, T, D, dtype=torch.float64)
    forecasts = predictor.forecasts(states, embeds, TARGETS, horizon)
    naive = 0
    for i in range(1, horizon + 1):
        terms = []
        for b in range(B):
            for t in range(T - i):
                if all(TARGETS[b, t + j] for j in range(1, i + 1)):
                    forecast = states[b, t]
                    for j in range(1, i + 1):
                        forecast = predictor(forecast[None], embeds[b, t + j][None])[0]
                    target = states[b, t + i].detach()
                    terms.append(naive_distance(forecast, target, "smoothl1"))
        if terms:  # no run of targets is five long
            naive = naive + (sum(terms) / len(terms)) / horizon
    assert bool(terms) == (horizon < 5)
    same(losses.nextlat_loss(states, forecasts), naive, states, *predictor.parameters())


def test_eq2_stops_at_the_state_it_forecasts():
    states, predictor = rand(1, 2, D), make_predictor()
    embeds, targets = torch.randn(1, 2, D, dtype=torch.float64), torch.tensor([[False, True]])
    losses.nextlat_loss(states, predictor.forecasts(states, embeds, targets, 1)).backward()
    assert states.grad[0, 0].abs().sum() > 0 and states.grad[0, 1].abs().sum() == 0


def test_eq2_is_zero_without_targets():
    states = rand(B, T, D)
    nothing = torch.zeros(B, T, dtype=torch.bool)
    assert losses.nextlat_loss(states, make_predictor().forecasts(states, states, nothing, 2)) == 0


def test_eq3_equals_a_loop():
    states, weight = rand(B, T, D), rand(V, D)
    labels = torch.where(TARGETS, torch.randint(0, V, (B, T)), -100)
    value = losses.vlm_loss(states, labels, lambda h: h @ weight.T)
    terms = []
    for b in range(B):
        for t in range(1, T):
            if labels[b, t] != -100:
                logits = weight @ states[b, t - 1]
                terms.append(torch.logsumexp(logits, 0) - logits[labels[b, t]])
    same(value, sum(terms) / len(terms), states, weight)


def test_eq3_takes_the_logarithm_in_float32():
    labels = torch.where(TARGETS, 1, -100)
    value = losses.vlm_loss(rand(B, T, D), labels,
                            lambda h: torch.zeros(len(h), V, dtype=torch.bfloat16))
    assert value.dtype == torch.float32


def test_eq3_applies_the_head_to_labelled_positions_only():
    seen = []
    labels = torch.where(TARGETS, 1, -100)
    losses.vlm_loss(rand(B, T, D), labels,
                    lambda h: seen.append(h.shape) or torch.zeros(len(h), V))
    assert seen == [(int(TARGETS[:, 1:].sum()), D)]


def test_eq4_weighs_both_latent_terms_and_detaches_its_parts():
    vlm, jepa, nextlat = (torch.tensor(v, requires_grad=True) for v in (2.0, 3.0, 5.0))
    total, parts = losses.pearl_loss(vlm, jepa, nextlat, 0.2)
    total.backward()
    assert total.item() == pytest.approx(2 + 0.2 * 8)
    assert [x.grad.item() for x in (vlm, jepa, nextlat)] == pytest.approx([1, 0.2, 0.2])
    assert not any(p.requires_grad for p in parts.values())
    assert {name: p.item() for name, p in parts.items()} == pytest.approx(
        dict(loss=3.6, vlm=2, jepa=3, nextlat=5))


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_reconstruction_loss_equals_a_loop_and_stops_at_the_target(kind):
    predicted, target = rand(4, D), rand(4, D)
    naive = sum(naive_distance(p, t.detach(), kind) for p, t in zip(predicted, target)) / 4
    same(losses.reconstruction_loss(predicted, target, kind), naive, predicted)
    no_gradient(losses.reconstruction_loss(predicted, target, kind), target)


def test_gauges_of_a_perfect_prediction():
    target = torch.eye(4)
    # three times too long: the cosine does not mind, nor do the gauges
    g = losses.collapse_gauges(3 * target, target)
    assert g["r2"] == pytest.approx(1, abs=1e-6)
    assert g["retrieval"] == 1 and g["retrieval_chance"] == 0.25
    assert g["mean_cosine"] == pytest.approx(0)
    assert g["effective_rank"] == pytest.approx(3, rel=1e-4)  # 4 points span 3 directions
    assert g["spread_target"] == pytest.approx(math.sqrt(3 / 4))
    assert g["rms_pred"] == pytest.approx(1.5) and g["rms_target"] == 0.5


def test_gauges_of_a_collapse():
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    g = losses.collapse_gauges(torch.ones(2, 2), target)
    unit = 1 / math.sqrt(2)  # both predictions are (u, u); centred targets are (+-.5, -+.5)
    assert g["r2"] == pytest.approx(1 - 2 * ((1 - unit) ** 2 + unit ** 2) / 1.0, rel=1e-5)
    assert g["spread_pred"] == pytest.approx(0, abs=1e-6) and g["retrieval"] == 0.5
    flat = losses.collapse_gauges(target, torch.ones(2, 2))
    assert flat["spread_target"] == pytest.approx(0, abs=1e-6)
    assert flat["mean_cosine"] == pytest.approx(1) and flat["effective_rank"] < 1.01
    assert losses.collapse_gauges(target[:1], target[:1]) == {}  # one row alone tells nothing
