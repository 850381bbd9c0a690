"""Claims: where every gradient of the whole step flows and where it stops. (The stop-gradient of
Eq. 1 and of Eq. 2 is one line each; without the line test_01 fails.)"""

import torch
from conftest import build, gradients, terms_of


def parts_moved_by(loss, method):
    """The parts of the method that a loss moves."""
    names = [name for name, g in gradients(loss, method).items() if g.any()]
    return {name.split(".")[0 if name.startswith("vlm") else 1] for name in names}


def test_which_loss_moves_which_weights(vlm64, mixed):
    method, batch = build(vlm64, "pearl", mixed[:2])
    terms = terms_of(method, batch)
    assert parts_moved_by(terms["vlm"], method) == {"vlm"}
    assert parts_moved_by(terms["jepa"], method) == {"vlm", "pred_embeddings"}
    assert parts_moved_by(terms["nextlat"], method) == {"vlm", "latent"}
    assert all(g.any() for g in gradients(terms["loss"], method).values())


def test_which_positions_each_loss_can_change(vlm64, mixed, monkeypatch):
    """Full and input view share one pass. Even so h^_R must not depend on R, which is in the same
    row, and the text not on [PRED]."""
    inputs, real = [], vlm64.lm_inputs

    def lm_inputs(*args):
        inputs.append(real(*args))
        inputs[-1]["inputs_embeds"].requires_grad_()
        return inputs[-1]

    monkeypatch.setattr(vlm64, "lm_inputs", lm_inputs)
    method, (example,) = build(vlm64, "pearl", mixed[:1])
    terms, labels = terms_of(method, [example]), example.views.full.labels
    # R begins at the first supervised token; behind the full view of `count` tokens is [PRED]
    first, count = next(n for n, label in enumerate(labels) if label != -100), len(labels)
    where = dict(jepa=[*range(first), *range(count, count + 4)], vlm=[*range(count - 1)],
                 nextlat=[*range(count - 1)])
    for name, expected in where.items():
        (grad,) = torch.autograd.grad(terms[name], inputs[0]["inputs_embeds"], retain_graph=True)
        assert grad[0].any(dim=1).nonzero().flatten().tolist() == expected, name
