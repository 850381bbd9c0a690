"""Claims: each equation equals plain loops, in value and in gradient, which stops at the targets of
Eq. 1 and Eq. 2; so does the latent predictor, which starts from "no change"."""

import pytest
import torch
from plain import cosine, latent, nll, rand, same, smooth_l1
from torch import nn

import losses
from predictor import LatentPredictor, Predictor

B, T, D, V = 3, 6, 5, 7  # batch, sequence, hidden size, vocabulary
# where a token is supervised
TARGETS = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 0, 1]]).bool()
DISTANCES = dict(
    cosine=lambda a, b: 1 - cosine(a, b), smoothl1=smooth_l1,
    mse=lambda a, b: sum((a - b) ** 2) / len(a), l2=lambda a, b: sum((a - b) ** 2).sqrt())


def test_eq3_is_the_mean_over_supervised_tokens():
    states, weight, counts = rand(B, T, D), rand(V, D), []
    labels = torch.where(TARGETS, torch.randint(0, V, (B, T)), -100)
    value = losses.vlm_loss(states, labels, lambda h: counts.append(len(h)) or h @ weight.T)
    terms = [nll(weight @ states[b, t - 1], labels[b, t])
             for b in range(B) for t in range(1, T) if labels[b, t] != -100]
    same(value, sum(terms) / len(terms), states, weight)
    # the head runs on the states before supervised tokens, and on no other
    assert counts == [len(terms)]
    # the logarithm is taken in float32 at least
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        value = losses.vlm_loss(states, labels, lambda h, dtype=dtype: (h @ weight.T).to(dtype))
        assert value.dtype == (dtype if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("name", DISTANCES)
def test_eq1_and_the_rivals_loss_are_means_of_distances(name):
    prediction, target = rand(B, D), 2 * rand(B, D)
    naive = sum(map(DISTANCES[name], prediction, target.detach())) / B
    for loss in (losses.jepa_loss, losses.reconstruction_loss):  # the target gets no gradient
        same(loss(prediction, target, name), naive, prediction, target)
    with pytest.raises(ValueError, match="'euclid': choose cosine"):
        losses.distance(prediction, target, "euclid")


@pytest.mark.parametrize("horizon, sees_next", [(1, True), (2, True), (3, False), (5, True)])
def test_eq2_predicts_each_state_from_the_one_before(horizon, sees_next):
    states, words = rand(B, T, D), rand(B, T, D)
    predictor = LatentPredictor(D, sees_next).double()
    nn.init.normal_(predictor.mlp[-1].weight, std=0.5)
    naive = torch.zeros((), dtype=torch.float64)
    for i in range(1, horizon + 1):
        terms = []
        for b in range(B):
            for t in range(T - i):
                if TARGETS[b, t + 1:t + i + 1].all():  # t+1 .. t+i are all supervised
                    forecast = states[b, t]
                    for j in range(1, i + 1):
                        forecast = latent(predictor, forecast, words[b, t + j].detach())
                    # neither the next state nor a token embedding gets a gradient
                    terms.append(smooth_l1(forecast, states[b, t + i].detach()))
        assert bool(terms) == (i < 4)  # no text here has four supervised tokens in a row
        naive = naive + sum(terms) / max(1, len(terms)) / horizon
    value = losses.nextlat_loss(states, predictor.forecasts(states, words, TARGETS, horizon))
    same(value, naive, states, words, *predictor.parameters())


def test_the_predictor_starts_from_no_change_and_from_the_end_of_turn():
    state, start = torch.randn(2, D), torch.randn(900).bfloat16()
    assert torch.equal(LatentPredictor(D)(state, state + 1), state)
    rows = Predictor(900, 3, start).pred_embeddings
    # the start with a tenth of noise, different in each row
    assert rows.dtype == torch.float32 and len(rows.unique(dim=0)) == 3
    noise = (rows - start.float()).square().mean(dim=1) / start.float().square().mean()
    torch.testing.assert_close(noise.sqrt(), torch.full((3,), 0.1), rtol=0.1, atol=0)


def test_eq4_weighs_both_latent_terms():
    vlm, jepa, nextlat = (torch.tensor(v, requires_grad=True) for v in (2.0, 3.0, 5.0))
    total = losses.pearl_loss(vlm, jepa, nextlat, 0.2)
    total.backward()
    assert total.item() == pytest.approx(2 + 0.2 * (3 + 5))
    assert [x.grad.item() for x in (vlm, jepa, nextlat)] == pytest.approx([1, 0.2, 0.2])
    result = losses.Losses.of(total, (vlm, jepa), nextlat=nextlat)
    assert result.total is total and dict(result.parts) == dict(loss=total, nextlat=nextlat)
    assert not any(x.requires_grad for x in (*result.parts.values(), *result.pair))
