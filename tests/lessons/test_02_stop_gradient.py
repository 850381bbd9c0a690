"""Claims: where every gradient flows and where it stops, in each equation and in the whole step.
The stop-gradient of Eq. 1 and of Eq. 2 is one line each; without the line these tests fail.
"""

import pytest
import torch
from torch import nn

import losses
from baselines.variants import Current
from conftest import assert_close, build, gradients, images_of, terms_of
from predictor import LatentPredictor


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def reaches(value, *leaves):
    """Which of these leaves get a gradient other than zero."""
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return [g is not None and bool(g.any()) for g in grads]


def test_eq1_stops_at_the_target():
    prediction, target = rand(3, 5), rand(3, 5)
    assert reaches(losses.jepa_loss(prediction, target), prediction, target) == [True, False]


def test_the_rivals_loss_stops_at_the_target():
    prediction, target = rand(3, 5), rand(3, 5)
    value = losses.reconstruction_loss(prediction, target)
    assert reaches(value, prediction, target) == [True, False]


def test_eq2_stops_at_the_state_that_it_predicts_and_at_the_token_embeddings():
    states, embeddings, latent = rand(1, 3, 5), rand(1, 3, 5), LatentPredictor(5).double()
    nn.init.normal_(latent.mlp[-1].weight)
    forecasts = latent.forecasts(states, embeddings, torch.tensor([[False, True, False]]), 1)
    value = losses.nextlat_loss(states, forecasts)
    (grad,) = torch.autograd.grad(value, states, retain_graph=True)
    # h_0 predicts h_1: only h_0 may move
    assert grad[0].any(dim=1).tolist() == [True, False, False]
    assert reaches(value, embeddings, *latent.parameters()) == [False] + [True] * 8


def test_eq3_flows_to_the_states_before_supervised_tokens():
    states, head = rand(1, 4, 5), nn.Linear(5, 7).double()
    value = losses.vlm_loss(states, torch.tensor([[1, -100, 3, 2]]), head)
    (grad,) = torch.autograd.grad(value, states)
    assert grad[0].any(dim=1).tolist() == [False, True, True, False]


# ---- the whole step -----------------------------------------------------------------------------


def step(vlm, examples, name="pearl"):
    method, batch = build(vlm, name, examples)
    return method, batch, terms_of(method, batch)


def touched(loss, method):
    """The parts of the method that a loss moves."""
    names = {name for name, g in gradients(loss, method).items() if g.any()}
    part = dict(vlm="lora", predictor="predictor.latent")
    return {"predictor.pred_tokens" if "pred_tokens" in name else part[name.split(".")[0]]
            for name in names}


def test_which_loss_moves_which_weights(vlm64, mixed):
    method, _, terms = step(vlm64, mixed[:2])
    assert touched(terms["vlm"], method) == {"lora"}
    assert touched(terms["jepa"], method) == {"lora", "predictor.pred_tokens"}
    assert touched(terms["nextlat"], method) == {"lora", "predictor.latent"}
    trained = gradients(terms["loss"], method)
    assert all(g.any() for g in trained.values())
    # LoRA is all that trains of the VLM, and it stands in the language model alone
    assert all("language_model" in name and "lora_" in name
               for name in trained if name.startswith("vlm."))


def test_which_positions_each_loss_can_change(vlm64, mixed, monkeypatch):
    """Full and input view share one pass. Even so h^_R must not depend on R, which is behind it in
    the row, and the text not on [PRED]."""
    kept, real = [], vlm64.embed

    def keep(*args):
        kept.append(real(*args))
        kept[-1]["inputs_embeds"].requires_grad_().retain_grad()
        return kept[-1]

    monkeypatch.setattr(vlm64, "embed", keep)
    _, (example,), terms = step(vlm64, mixed[:1])
    full, count = example.views.full, len(example.views.full.ids)
    first = next(n for n, label in enumerate(full.labels) if label != -100)
    # what follows the full view in the row is [PRED]; R begins at the first supervised token
    where = dict(jepa=[*range(first), *range(count, count + 4)], vlm=range(count - 1),
                 nextlat=range(count - 1))
    for name, positions in where.items():
        (grad,) = torch.autograd.grad(terms[name], kept[0]["inputs_embeds"], retain_graph=True)
        assert grad[0].any(dim=1).nonzero().flatten().tolist() == list(positions), name


class WithGraph(Current):
    """The current model's h_R, with a graph that only the stop-gradient keeps from being used."""

    target_needs_grad = True


def test_without_detach_the_target_would_move(vlm64, mixed, monkeypatch):
    """The same gradient with h_R as a constant and with h_R that has a graph; another one as soon
    as the line of the stop-gradient is gone."""
    method, batch, terms = step(vlm64, mixed[:2], "current")
    constant = gradients(terms["jepa"], method)

    def jepa_gradient():
        method.__class__ = WithGraph
        images = images_of(method, batch)
        _, prediction = method.encode_views(batch, images)
        target = method.target(batch, images).embedding
        assert target.requires_grad
        return gradients(method.jepa(prediction, target, batch), method)

    assert_close(jepa_gradient(), constant)
    monkeypatch.setattr(torch.Tensor, "detach", lambda tensor: tensor)
    with pytest.raises(AssertionError):
        assert_close(jepa_gradient(), constant)


@pytest.mark.parametrize("name, graph", [("pearl", False), ("current", False), ("vicreg", True)])
def test_the_target_has_a_graph_only_where_a_term_needs_it(vlm64, mixed, name, graph):
    method, batch = build(vlm64, name, mixed[:2])
    assert method.target(batch, images_of(method, batch)).embedding.requires_grad == graph
