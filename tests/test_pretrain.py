"""Claims: what the shipped model was pretrained on stays as it is, whatever the world is given
later: the same scenes, questions and labels, and the same texts for its tokenizer."""

import hashlib
import importlib.util
import sys
from pathlib import Path

import pytest

from support.options import TINY
from world import scenes

SCENES = "b268cae133edde8c"
TEXTS = "76f5cf5aa555c8c7"


@pytest.fixture
def pretrain(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script puts the repository first
    spec = importlib.util.spec_from_file_location("pretrain", Path(TINY) / "pretrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def digests(pretrain) -> tuple[str, str]:
    """Of the pictures of forty scenes (sizes, labels, questions; no pixels, which depend on the
    version of Pillow) and of the tokenizer's texts."""
    found = hashlib.sha256()
    for image, labels, questions in pretrain.make_pictures(0, 40, 0):
        found.update(repr((image.shape, labels.digit.tolist(), labels.shape.tolist(),
                           labels.flags.round(3).tolist(), questions)).encode())
    texts = repr(pretrain.tokenizer_texts(0, 10)).encode()
    return found.hexdigest()[:16], hashlib.sha256(texts).hexdigest()[:16]


def test_the_corpus_is_the_one_that_the_shipped_model_saw(pretrain):
    assert digests(pretrain) == (SCENES, TEXTS)


def test_a_family_added_to_the_world_changes_nothing(pretrain, monkeypatch):
    monkeypatch.setattr(scenes, "FAMILIES", {"new": scenes.FAMILIES["zoom"], **scenes.FAMILIES})
    monkeypatch.setattr(scenes, "REGIMES", {"new": ["new"], **scenes.REGIMES})
    assert digests(pretrain) == (SCENES, TEXTS)
