"""Statistics of embeddings: correlation, a map in two dimensions, separation of groups, probes.

Letters: n examples, D hidden size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pearson(xs: list[float], ys: list[float]) -> float:
    x, y = (torch.tensor(v, dtype=torch.float64) - sum(v) / len(v) for v in (xs, ys))
    return float((x @ y) / (x.norm() * y.norm()).clamp_min(1e-12))


def neighbour_shares(points: Tensor, perplexity: float) -> Tensor:
    """t-SNE's p_ij (n, n): how much each point takes each other for a neighbour, symmetric."""
    n = len(points)
    gaps = torch.cdist(points, points).square()
    low, high = torch.zeros(n, 1), torch.full((n, 1), 1e4) / gaps.mean().clamp_min(1e-9)
    diagonal = torch.eye(n, dtype=torch.bool)
    for _ in range(50):  # bisection for the precision that gives each point the wanted perplexity
        beta = (low + high) / 2
        p = F.softmax((-beta * gaps).masked_fill(diagonal, -math.inf), dim=1)
        wide = -(p * p.clamp_min(1e-30).log()).sum(dim=1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
    return ((p + p.T) / (2 * n)).clamp_min(1e-12)


def tsne(points: Tensor, perplexity: float = 30.0, steps: int = 400) -> Tensor:
    """Exact t-SNE (van der Maaten and Hinton, 2008), started from the first two principal
    components: (n, D) -> (n, 2)."""
    n, p = len(points), neighbour_shares(points, perplexity)
    diagonal = torch.eye(n, dtype=torch.bool)
    _, _, axes = torch.pca_lowrank(points - points.mean(0), q=2, niter=8)
    y = (points - points.mean(0)) @ axes
    y = 1e-2 * y / y.std()
    speed = torch.zeros_like(y)
    for step in range(steps):
        near = 1 / (1 + torch.cdist(y, y).square()).masked_fill(diagonal, math.inf)
        q = (near / near.sum()).clamp_min(1e-12)
        pull = ((4 if step < 100 else 1) * p - q) * near
        gradient = 4 * (pull.sum(dim=1, keepdim=True) * y - pull @ y)
        speed = (0.5 if step < 100 else 0.8) * speed - n / 12 * gradient
        y = y + speed
    return y - y.mean(0)


def separation(points: Tensor, groups: list[str]) -> float:
    """Mean silhouette by cosine distance: 1 clusters far apart, 0 none (or one group), negative
    mixed."""
    names = sorted(set(groups))
    if len(names) < 2:
        return 0.0
    unit = F.normalize(points, dim=1)
    gaps = 1 - unit @ unit.T
    member = torch.tensor([[g == name for name in names] for g in groups], dtype=gaps.dtype)
    count = member.sum(0)  # (groups)
    own = (gaps @ member * member).sum(1) / (member @ count - 1).clamp_min(1)
    other = (gaps @ member / count).masked_fill(member.bool(), math.inf).min(1).values
    return float(((other - own) / torch.maximum(other, own).clamp_min(1e-12)).mean())


def classes(names: list[str]) -> Tensor:
    """(n) the number of each name among the sorted ones."""
    numbers = {name: n for n, name in enumerate(sorted(set(names)))}
    return torch.tensor([numbers[name] for name in names])


def probe(x: Tensor, y: Tensor, ridge: float = 1.0) -> float:
    """Linear probe by ridge regression, fitted on the first two thirds, tested on the rest.

    y (n) classes: accuracy. y (n, d) numbers: R^2.
    """
    cut = 2 * len(x) // 3
    x = (x - x[:cut].mean(0)) / x[:cut].std(0).clamp_min(1e-6)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    target = F.one_hot(y).double() if y.dim() == 1 else y.double()
    damping = ridge * cut / 100 * torch.eye(x.shape[1]).double()
    weight = torch.linalg.solve(x[:cut].T @ x[:cut] + damping, x[:cut].T @ target[:cut])
    guess = x[cut:] @ weight
    if y.dim() == 1:
        return float((guess.argmax(1) == y[cut:]).float().mean())
    error = (guess - target[cut:]).square().sum()
    return float(1 - error / (target[cut:] - target[:cut].mean(0)).square().sum())
