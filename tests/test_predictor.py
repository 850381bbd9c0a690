"""Claims: forecasts stand for the right positions; the latent predictor starts at the identity and
sees the next token only when told to; [PRED] rows start near their seed and apart from each other.
"""

import torch

from predictor import LatentPredictor, Predictor


def test_the_mask_says_which_positions_are_forecast():
    """Worked example, two rows of five. One step ahead goes to every target but the first position,
    which has nothing before it; two steps to the targets right behind one of these."""
    targets = torch.tensor([[0, 1, 1, 0, 1],
                            [1, 0, 1, 1, 1]], dtype=torch.bool)
    states = torch.randn(2, 5, 3)
    one, two, three = LatentPredictor(3).forecasts(states, states, targets, 3)
    assert one[1].tolist() == [[False, True, True, False, True], [False, False, True, True, True]]
    assert two[1].tolist() == [[False, False, True, False, False],
                               [False, False, False, True, True]]
    assert three[1].tolist() == [[False] * 5, [False, False, False, False, True]]
    # zero start: the forecast is the state it was made from, i positions to the left
    for i, (forecast, at) in enumerate((one, two, three), start=1):
        row, position = torch.nonzero(at, as_tuple=True)
        torch.testing.assert_close(forecast, states[row, position - i])


def test_each_step_is_made_from_the_forecast_before_it():
    torch.manual_seed(0)
    predictor, states, embeds = LatentPredictor(3), torch.randn(1, 4, 3), torch.randn(1, 4, 3)
    torch.nn.init.normal_(predictor.mlp[-1].weight)
    everywhere = torch.ones(1, 4, dtype=torch.bool)
    one, two = predictor.forecasts(states, embeds, everywhere, 2)
    torch.testing.assert_close(one[0], predictor(states[0, :3], embeds[0, 1:]))
    torch.testing.assert_close(two[0], predictor(one[0][:2], embeds[0, 2:]))


def test_sees_next_decides_whether_the_next_embedding_matters():
    state, embeds = torch.randn(4, 3), (torch.randn(4, 3), torch.randn(4, 3))
    for sees_next in (True, False):
        predictor = LatentPredictor(3, sees_next)
        torch.nn.init.normal_(predictor.mlp[-1].weight)
        same = torch.equal(predictor(state, embeds[0]), predictor(state, embeds[1]))
        assert same != sees_next


def test_token_embeddings_get_no_gradient_from_nextlat():
    states, embeds = (torch.randn(1, 3, 3, requires_grad=True) for _ in range(2))
    predictor = LatentPredictor(3)
    torch.nn.init.normal_(predictor.mlp[-1].weight)
    (forecast, _), = predictor.forecasts(states, embeds, torch.ones(1, 3, dtype=torch.bool), 1)
    forecast.sum().backward()
    assert embeds.grad is None and states.grad is not None


def test_pred_rows_start_near_their_seed_and_differ():
    start = torch.randn(64)
    rows = Predictor(64, 4, start).pred_tokens
    assert rows.shape == (4, 64) and rows.requires_grad
    assert (rows - start).norm(dim=1).max() < 0.2 * start.norm()
    assert (rows[0] - rows[1]).norm() > 0
    assert Predictor(64, 0, start).pred_tokens.shape == (0, 64)
