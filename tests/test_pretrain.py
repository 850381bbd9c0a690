"""Claims: the corpus of the shipped model's pretraining stays the same, whatever the world gets
later: the same scenes, questions and labels, and the same texts for its tokenizer."""

import hashlib
import sys
from pathlib import Path

import numpy as np

from world import scenes

sys.path.append(str(Path(scenes.__file__).parent.parent / "tiny-vlm"))
import pretrain  # noqa: E402

CORPUS = ("801cbb44eff6b497", "76f5cf5aa555c8c7")  # scenes, texts


def test_the_corpus_is_the_one_of_the_shipped_model_whatever_the_world_gets(monkeypatch):
    monkeypatch.setattr(scenes, "TASKS", {"new": scenes.TASKS["zoom"], **scenes.TASKS})
    monkeypatch.setattr(scenes, "REGIMES", {"new": ["new"], **scenes.REGIMES})
    corpus = hashlib.sha256()
    for image, labels, questions in pretrain.make_pictures(100, 0):
        values = np.nan_to_num(labels.values, nan=-1).round(3).tolist()
        corpus.update(repr((image.size, values, questions)).encode())  # pixels depend on Pillow
    texts = hashlib.sha256(repr(pretrain.tokenizer_texts(0, 10)).encode())
    assert tuple(digest.hexdigest()[:16] for digest in (corpus, texts)) == CORPUS
