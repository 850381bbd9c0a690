"""Claims: the corpus of the shipped model's pretraining stays the same, whatever the world gets
later: the same scenes, questions and labels, and the same texts for its tokenizer."""

import hashlib
import sys
from pathlib import Path

import numpy as np

from world import scenes

sys.path.append(str(Path(scenes.__file__).parent.parent / "tiny-vlm"))
import pretrain  # noqa: E402

# (scenes, texts)
CORPUS = ("b268cae133edde8c", "76f5cf5aa555c8c7")


def digit_and_shape(labels) -> list[np.ndarray]:
    """Classes of the cells, -1 where there is none."""
    return [np.nan_to_num(labels.values[..., pretrain.CHANNEL[name]], nan=-1).astype(int)
            for name in ("digit", "shape")]


def test_the_corpus_is_the_one_of_the_shipped_model_whatever_the_world_gets(monkeypatch):
    """Of forty scenes with their tool pictures: sizes, labels, questions. Pixels depend on the
    version of Pillow."""
    monkeypatch.setattr(scenes, "TASKS", {"new": scenes.TASKS["zoom"], **scenes.TASKS})
    monkeypatch.setattr(scenes, "REGIMES", {"new": ["new"], **scenes.REGIMES})
    corpus = hashlib.sha256()
    for image, labels, questions in pretrain.make_pictures(40, 0):
        classes = (part.tolist() for part in digit_and_shape(labels))
        flags = labels.values[..., :len(pretrain.FLAGS)].round(3).tolist()
        corpus.update(repr(((*image.size[::-1], 3), *classes, flags, questions)).encode())
    texts = hashlib.sha256(repr(pretrain.tokenizer_texts(0, 10)).encode())
    assert tuple(digest.hexdigest()[:16] for digest in (corpus, texts)) == CORPUS


def test_labels_are_where_the_objects_are():
    spec = scenes.make_spec("crop", "pretrain", 0, 0)
    labels, questions, _ = pretrain.describe(spec)
    digits, shapes = digit_and_shape(labels)
    for x, y, _, shape, colour, digit in spec["objects"]:
        # a cell of 8 x 8 px as the model sees it has 16 x 16 px of the file
        cell = y // 16, x // 16
        assert labels.values[cell][pretrain.CHANNEL[colour]] == 1
        assert digits[cell] == digit and scenes.SHAPES[shapes[cell]] == shape
    assert (digits >= 0).sum() == len(spec["objects"])
    assert (spec["question"], f"Answer: {spec['answer']}") in questions
