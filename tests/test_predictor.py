"""Claims: a rollout names the right positions; the latent predictor starts at the identity and sees the next token only
when told to; [PRED] rows start near their seed and apart from each other."""

import torch

from predictor import LatentPredictor, Predictor


def test_rollout_names_row_and_position():
    targets = torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    states = torch.randn(2, 4, 3)
    one, two = LatentPredictor(3).rollout(states, states, targets, 2)
    assert list(zip(one[1].tolist(), one[2].tolist())) == [(0, 1), (0, 2), (1, 2), (1, 3)]
    assert list(zip(two[1].tolist(), two[2].tolist())) == [(0, 2), (1, 3)]  # from t = 0 and t = 1; the others left the targets
    torch.testing.assert_close(one[0], states[[0, 0, 1, 1], [0, 1, 1, 2]])  # zero start: the forecast is the state itself


def test_sees_next_decides_whether_the_next_embedding_matters():
    state, embeds = torch.randn(4, 3), (torch.randn(4, 3), torch.randn(4, 3))
    for sees_next in (True, False):
        predictor = LatentPredictor(3, sees_next)
        torch.nn.init.normal_(predictor.mlp[-1].weight)
        assert torch.equal(predictor(state, embeds[0]), predictor(state, embeds[1])) != sees_next


def test_token_embeddings_get_no_gradient_from_nextlat():
    states, embeds = torch.randn(1, 3, 3, requires_grad=True), torch.randn(1, 3, 3, requires_grad=True)
    predictor = LatentPredictor(3)
    torch.nn.init.normal_(predictor.mlp[-1].weight)
    predictor.rollout(states, embeds, torch.ones(1, 3, dtype=torch.bool), 1)[0][0].sum().backward()
    assert embeds.grad is None and states.grad is not None


def test_centre_is_a_running_mean_that_the_first_batch_sets():
    predictor = Predictor(3, 1, torch.randn(3))
    one, two = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    predictor.update_centre(one)
    torch.testing.assert_close(predictor.centre, one.mean(0).detach())
    predictor.update_centre(two)
    torch.testing.assert_close(predictor.centre, 0.9 * one.mean(0).detach() + 0.1 * two.mean(0))
    assert not predictor.centre.requires_grad and "centre" in predictor.state_dict()


def test_pred_rows_start_near_their_seed_and_differ():
    start = torch.randn(64)
    rows = Predictor(64, 4, start).pred_tokens
    assert rows.shape == (4, 64) and rows.requires_grad
    assert (rows - start).norm(dim=1).max() < 0.2 * start.norm() and (rows[0] - rows[1]).norm() > 0
    assert Predictor(64, 0, start).pred_tokens.shape == (0, 64)
