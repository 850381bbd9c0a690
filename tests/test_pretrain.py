"""Claims: the corpus of the shipped model's pretraining stays the same, whatever the world gets
later: the same scenes, questions and labels, and the same texts for its tokenizer."""

import hashlib
import importlib.util
import sys
from pathlib import Path

import pytest

from world import scenes

PROGRAM = Path(scenes.__file__).parent.parent / "tiny-vlm" / "pretrain.py"
# (scenes, texts)
CORPUS = ("b268cae133edde8c", "76f5cf5aa555c8c7")


@pytest.fixture
def pretrain(monkeypatch):
    # the script puts the repository first
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("pretrain", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digests(pretrain) -> tuple[str, str]:
    """Of forty scenes with their tool pictures: sizes, labels, questions. Pixels depend on the
    version of Pillow."""
    corpus = hashlib.sha256()
    for image, labels, questions in pretrain.make_pictures(0, 40, 0):
        corpus.update(repr((image.shape, labels.digit.tolist(), labels.shape.tolist(),
                            labels.flags.round(3).tolist(), questions)).encode())
    texts = repr(pretrain.tokenizer_texts(0, 10)).encode()
    return corpus.hexdigest()[:16], hashlib.sha256(texts).hexdigest()[:16]


def test_the_corpus_is_the_one_of_the_shipped_model(pretrain):
    assert digests(pretrain) == CORPUS


def test_a_new_task_of_the_world_changes_nothing(pretrain, monkeypatch):
    monkeypatch.setattr(scenes, "TASKS", {"new": scenes.TASKS["zoom"], **scenes.TASKS})
    monkeypatch.setattr(scenes, "REGIMES", {"new": ["new"], **scenes.REGIMES})
    assert digests(pretrain) == CORPUS


def test_labels_are_where_the_objects_are(pretrain):
    spec = scenes.make_spec("crop", "pretrain", 0, 0)
    labels, questions = pretrain.describe(spec)
    for x, y, _, shape, colour, digit in spec["objects"]:
        # a cell of 8 x 8 px as the model sees it has 16 x 16 px of the file
        cell = y // 16, x // 16
        assert labels.flags[cell][pretrain.CHANNEL[colour]] == 1
        assert labels.digit[cell] == digit and scenes.SHAPES[labels.shape[cell]] == shape
    assert (labels.digit >= 0).sum() == len(spec["objects"])
    assert (spec["question"], f"Answer: {spec['answer']}") in questions
