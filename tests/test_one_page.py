"""Claims: docs/one_page.py, which imports nothing of ours, has the losses, gradients and answers of
the project."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import evaluate
from support.records import write_folder
from support.splits import read_folder
from world import loader
from conftest import build

PAGE = Path(__file__).resolve().parent.parent / "docs" / "one_page.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four training records of different tasks and lengths, and two test records."""
    out = tmp_path_factory.mktemp("one_page") / "data"
    write_folder(out, [*loader.examples("mixed", "train", 4, seed=3),
                       *loader.examples("mixed", "test", 2, seed=3)])
    return out


def test_losses_gradients_and_answers_are_those_of_the_project(folder, vlm64):
    # the page as a module, in float64
    spec = importlib.util.spec_from_file_location("one_page", PAGE)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    page.FOLDER = folder
    page.vlm.double(), page.latent.double()
    page.pred.data = page.pred.data.double()
    # away from its start at zero, where most of its gradients are zero
    torch.nn.init.normal_(page.latent[-1].weight, std=0.02)
    # the project's step on the four training records, with the page's weights
    step, batch = build(vlm64, "pearl", read_folder(folder).split("train"), lora_rank=0)
    step.predictor.pred_embeddings.data.copy_(page.pred.data)
    step.predictor.latent.mlp.load_state_dict(page.latent.state_dict())
    result = step(batch)
    expected = dict(result.parts, total=result.total)
    records = [json.loads(line) for line in (folder / "trajectories.jsonl").open(encoding="utf-8")]
    batch = [page.views(record) for record in records[:4]]
    h_R = torch.cat([page.encode([record["target"]])[-1].detach() for record in batch])
    losses = page.losses(batch, h_R)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-10, atol=1e-10)
    losses["total"].backward(), expected["total"].backward()
    # parameters are in one order in both; the model's norms round to float32 inside
    weights = [page.pred, *page.latent.parameters(), *page.vlm.parameters()]
    ours = [*step.predictor.parameters(), *step.vlm.lm.parameters()]
    for one, other in zip(weights, ours, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)
    answers = evaluate.Evaluator(vlm64.eval(), read_folder(folder)).direct()
    for record, answer in zip(records, answers, strict=True):
        assert page.accuracy([record]) == 100 * (answer["text"] == record["answer"])


def test_it_runs_to_its_end_or_says_what_it_needs(folder, monkeypatch, capsys):
    source = PAGE.read_text(encoding="utf-8").replace("150", "2")  # steps
    program = compile(source, PAGE, "exec"), dict(__name__="__main__", __file__=str(PAGE))
    monkeypatch.setattr(sys, "argv", ["one_page.py", str(folder)])
    exec(*program)
    assert capsys.readouterr().out.splitlines()[-1].startswith("direct accuracy")
    sys.argv[1:] = [str(folder / "images")]
    with pytest.raises(SystemExit, match="^Name a data folder: .* writes one.$"):
        exec(*program)
