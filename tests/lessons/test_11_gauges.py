"""Claims: the gauges of a collapse equal plain loops, and stay finite in one; several passes are
averaged by their sizes, and their pairs are joined."""

import math

import pytest
import torch

import losses


def rms(rows):
    return (sum(row @ row for row in rows) / rows.numel()).sqrt()


def naive_gauges(prediction, target):
    """One row, or one pair of rows, at a time."""
    batch = len(target)
    pred, true = (torch.stack([row / row.norm() for row in rows]) for rows in (prediction, target))
    off_pred, off = (rows - sum(rows) / batch for rows in (pred, true))
    eigenvalues = torch.linalg.eigvalsh((off @ off.T).double()).clamp_min(0).tolist()
    shares = [value / sum(eigenvalues) for value in eigenvalues]
    cosines = [true[i] @ true[j] for i in range(batch) for j in range(batch) if i != j]
    nearest = [max(range(batch), key=lambda j: row @ true[j]) for row in pred]
    return dict(
        r2=1 - sum((p - t) @ (p - t) for p, t in zip(pred, true)) / sum(row @ row for row in off),
        spread_pred=rms(off_pred) / rms(pred), spread_target=rms(off) / rms(true),
        effective_rank=math.exp(-sum(s * math.log(s) for s in shares if s > 1e-9)),
        mean_cosine=sum(cosines) / len(cosines),
        retrieval=sum(i == j for i, j in enumerate(nearest)) / batch,
        retrieval_chance=1 / batch, rms_pred=rms(prediction), rms_target=rms(target))


@pytest.mark.parametrize("batch", [2, 3, 5])
def test_gauges_equal_loops(batch):
    torch.manual_seed(batch)
    target = torch.randn(batch, 4) + 1
    prediction = 3 * (target + 0.8 * torch.randn(batch, 4))
    gauges = losses.collapse_gauges(prediction, target)
    naive = naive_gauges(prediction, target)
    assert gauges == pytest.approx({name: float(value) for name, value in naive.items()}, rel=1e-4)
    # one row alone cannot show a collapse
    assert losses.collapse_gauges(prediction[:1], target[:1]) == {}


def test_gauges_of_collapses():
    """Targets that are all alike, or zero: nothing is divided by zero."""
    g = losses.collapse_gauges(torch.eye(2), torch.ones(2, 2))
    assert g["mean_cosine"] == pytest.approx(1) and 0.99 < g["effective_rank"] < 1.01
    zeros = losses.collapse_gauges(torch.zeros(2, 2), torch.zeros(2, 2))
    assert all(map(math.isfinite, [*g.values(), *zeros.values()]))


def test_passes_are_averaged_by_their_sizes():
    """Of losses the mean; a gauge compares each prediction with the targets of all passes."""
    rows = torch.randn(2, 5, 4)
    results = [losses.Losses.of(torch.tensor(1.0), tuple(rows[:, :4]), vlm=torch.tensor(10.0)),
               losses.Losses.of(torch.tensor(2.0), tuple(rows[:, 4:]), vlm=torch.tensor(40.0))]
    gauges = losses.collapse_gauges(*rows)
    assert losses.average(results, [4, 1]) == pytest.approx(dict(loss=1.2, vlm=16.0) | gauges)
    assert losses.average(results) == pytest.approx(dict(loss=1.5, vlm=25.0) | gauges)
    bare = [result._replace(pair=None) for result in results]
    assert losses.average(bare, [1, 3]) == pytest.approx(dict(loss=1.75, vlm=32.5))
