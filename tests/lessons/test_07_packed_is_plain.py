"""Claims: full and input view in one forward pass, and in one pass for each, give the losses and
gradients of one unpadded pass a record; a branch sees what is shared and itself."""

import pytest
import torch
from plain import eq1, eq3_terms, smooth_l1, target_state

import data
import train
from data import View
from support.step import add_branches, branch_inputs
from conftest import assert_same, build, embed, images_of, terms_of


@pytest.mark.parametrize("options", [
    dict(), dict(pred_tokens=0, horizon=3, train_vision=True), dict(lora_rank=0, pred_tokens=1)],
    ids=str)
@pytest.mark.parametrize("name", ["pearl", "two_passes"])
def test_the_step_equals_one_record_at_a_time(vlm64, loaded64, mixed, monkeypatch, name, options):
    if name == "two_passes":
        monkeypatch.delattr(train, "encode_two_views")  # what a family that cannot pack gets
    method, batch = build(vlm64, name, mixed[:3], **options)
    vlm, images, horizon = method.vlm, images_of(method, batch), method.config.horizon
    words, pairs, nextlat = [], [], [[] for _ in range(horizon)]
    for record, example in zip(mixed, batch):
        encoded, labels = embed(vlm, example.views.full, images), example.views.full.labels
        states, inputs = encoded.states[0], encoded.input_embeddings[0]
        words += eq3_terms(vlm.lm.lm_head(states), labels)
        for t, forecast in enumerate(states):
            for i, terms in enumerate(nextlat, start=1):
                if t + i < len(labels) and -100 not in labels[t + 1:t + i + 1]:
                    forecast = method.predictor.latent(forecast, inputs[t + i].detach())
                    terms.append(smooth_l1(forecast, states[t + i].detach()))
        prediction = embed(vlm, example.views.input, images,
                           method.predictor.pred_embeddings).embedding[0]
        pairs.append((prediction, target_state(loaded64, record).detach()))
    naive = dict(vlm=sum(words) / len(words), jepa=eq1(*zip(*pairs)),
                 nextlat=sum(sum(terms) / len(terms) for terms in nextlat) / horizon)
    naive["loss"] = naive["vlm"] + 5.0 * (naive["jepa"] + naive["nextlat"])
    terms = terms_of(method, batch)
    assert terms.keys() == naive.keys()
    for term, value in naive.items():
        assert_same(terms[term], value, method)


def test_the_branch_sees_what_is_shared_and_itself():
    """Worked example of two rows. The first shares 2 of 4 tokens and has 2 more; the second has the
    same 3 tokens twice, but one is injected, and so not shared."""
    full = [View([1, 2, 3, 4], [-100, -100, 3, 4], [], 3), View([5, 6, 7], [-100] * 3, [], 2)]
    inputs = [View([1, 2, 8, 9], [-100] * 4, [], 3, (2,)), full[1]._replace(inject_at=(2,))]
    batch = add_branches(full, inputs, lambda views: data.collate(views, 0))
    assert batch.ids.tolist() == [[1, 2, 3, 4, 8, 9], [5, 6, 7, 0, 7, 0]]
    assert batch.inject_at.nonzero().tolist() == [[0, 4], [1, 4]]
    assert batch.shared.tolist() == [2, 2] and batch.state_at.tolist() == [5, 4]
    positions = torch.tensor([[[0, 1, 2, 3], [0, 1, 2, 0]]])
    _, mask = branch_inputs(batch, positions, torch.float64)
    assert (mask[0, 0] == 0).int().tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [1, 1, 0, 0, 1, 1]]
