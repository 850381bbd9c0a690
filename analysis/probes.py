"""What do h^_R and h_R encode? Embeddings of a run's examples, and linear probes of them.

scikit-learn, an optional package, is imported only where it is used.
Letters: n examples, D hidden size, K predictor tokens.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import evaluate
import losses
import train
from analysis.targets import passes, targets_of
from baselines.variants import EMA, Current
from data import collate
from model import VLM
from predictor import Predictor
from support.files import read_tensors
from support.records import Example
from support.run import finished
from world.tools import CALL

# with fewer examples nothing can be fitted and tested
MINIMUM = 6


@torch.no_grad()
def embeddings(folder: Path | None, config: train.Config,
               examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(h^_R, h_R), (n, D) each, by a run; folder None: by the starting model of config.

    h_R is by the model that the run predicts: the starting model if its target is frozen. A run
    without [PRED] rows has K = 0: h^_R is the state of the last prompt token.
    """
    start = VLM(config.model, getattr(torch, config.dtype), config.min_pixels, config.max_pixels)
    vlm, kind, rows = start.to(config.device), train.find_method(config.method), None
    if folder:
        vlm = evaluate.load_model(folder, config.device)[0]
        file = finished(folder)[1] / Predictor.file_name
        rows = read_tensors(file, config.device)[0]["pred_tokens"] if file.is_file() else None
    config = replace(config, pred_tokens=0 if rows is None else len(rows))  # rows (K, D)
    method, predictions = kind(vlm, config), []
    for batch, images in passes(method, examples):
        views = collate([example.views.input for example in batch], vlm.pad_id)
        predictions.append(vlm(views, images, rows).embedding.float().cpu())
    frozen = rows is not None and not issubclass(kind, (Current, EMA))
    return torch.cat(predictions), targets_of(kind(start, config) if frozen else method, examples)


def probe(h: Tensor, values: list[str] | Tensor) -> float:
    """A linear probe of h (n, D), tested on held-out thirds: accuracy for n names, R^2 for numbers
    (n, d)."""
    from sklearn.linear_model import Ridge, RidgeClassifier
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = Ridge if isinstance(values, Tensor) else RidgeClassifier
    model = make_pipeline(StandardScaler(), regression(alpha=10.0))
    folds = KFold(3, shuffle=True, random_state=0)
    return float(cross_val_score(model, h.numpy(), values, cv=folds).mean())


def separation(h: Tensor, groups: list[str]) -> float:
    """Mean silhouette by cosine distance: 1 for distant clusters, 0 for none, negative if mixed."""
    from sklearn.metrics import silhouette_score

    if not 1 < len(set(groups)) < len(groups):
        return 0.0
    return float(silhouette_score(h.numpy(), groups, metric="cosine"))


def groups_of(examples: Sequence[Example]) -> list[str]:
    """The task of each example, or, if there is one task, the answer; the rarest are "other"."""
    tasks = [example.task for example in examples]
    names = tasks if len(set(tasks)) > 1 else [example.answer for example in examples]
    frequent = dict(Counter(names).most_common(9 if len(set(names)) > 10 else 10))
    return [name if name in frequent else "other" for name in names]


def knowledge(pair: tuple[Tensor, Tensor], examples: Sequence[Example]) -> dict:
    """Probes, separation and retrieval of (h^_R, h_R).

    The answer, and the numbers in the first call (R^2), are probed on the most frequent task;
    `chance` is the share of its most frequent answer.
    """
    tasks, groups = [example.task for example in examples], groups_of(examples)
    (task, count), = Counter(tasks).most_common(1)
    rows = [n for n, other in enumerate(tasks) if other == task]
    answers = [examples[n].answer for n in rows]
    calls = [CALL.search(examples[n].texts[0]) for n in rows]
    places = [[float(x) for x in call[2].split()] if call else [] for call in calls]
    probes = {}
    if len(set(tasks)) > 1:
        probes["task"] = range(len(tasks)), tasks
    if count >= MINIMUM and len(set(answers)) > 1:
        probes["answer"] = rows, answers
    # every call must have as many numbers as the others
    if count >= MINIMUM and len(set(map(len, places))) == 1 and places[0]:
        probes["place_r2"] = rows, torch.tensor(places)
    numbers = {}
    for name, h in zip(("h^_R", "h_R"), pair):
        numbers[name] = dict(separation=separation(h, groups)) | {
            value: probe(h[list(part)], values) for value, (part, values) in probes.items()}
    chance = Counter(answers).most_common(1)[0][1] / count
    numbers["probed"] = dict(task=task, examples=count, chance=chance)
    return numbers | losses.collapse_gauges(*pair)
