"""Claims: docs/one_page.py, which imports nothing of ours, has the losses, gradients and answers of
the project."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import train
from support.records import write_folder
from support.splits import read_folder
from world import loader

PAGE = Path(__file__).resolve().parent.parent / "docs" / "one_page.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four training records of different tasks and lengths, and two test records."""
    out = tmp_path_factory.mktemp("one_page") / "data"
    write_folder(out, [*loader.examples("mixed", "train", 4, seed=3),
                       *loader.examples("mixed", "test", 2, seed=3)])
    return out


@pytest.fixture(scope="module")
def page(folder):
    """The page as a module, in float64."""
    spec = importlib.util.spec_from_file_location("one_page", PAGE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.FOLDER = folder
    module.vlm.double(), module.latent.double()
    module.pred.data = module.pred.data.double()
    # away from its start at zero, where most of its gradients are zero
    torch.nn.init.normal_(module.latent[-1].weight, std=0.02)
    return module


def records_of(folder):
    return [json.loads(line) for line in (folder / "trajectories.jsonl").open(encoding="utf-8")]


def test_losses_gradients_and_answers_are_those_of_the_project(page, folder, vlm64):
    # the project's step on the four training records, with the page's weights
    step = train.Pearl(vlm64, train.Config(device="cpu", lora_rank=0)).double()
    step.predictor.pred_embeddings.data.copy_(page.pred.data)
    step.predictor.latent.mlp.load_state_dict(page.latent.state_dict())
    examples = train.dataset(step, read_folder(folder).split("train"), "train")
    result = step(examples.micro_batches(list(range(4)), batch=4)[0])
    expected = dict(result.parts, total=result.total)
    batch = [page.views(record) for record in records_of(folder) if record["split"] == "train"]
    h_R = torch.cat([page.encode([record["target"]])[-1].detach() for record in batch])
    losses = page.losses(batch, h_R)
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name], rtol=1e-10, atol=1e-10)
    losses["total"].backward(), expected["total"].backward()
    # parameters are in one order in both; the model's norms round to float32 inside
    pairs = [(page.pred, step.predictor.pred_embeddings)]
    for one, other in ((page.latent, step.predictor.latent.mlp), (page.vlm, step.vlm.lm)):
        pairs += zip(one.parameters(), other.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6)
    answers = evaluate.Evaluator(vlm64.eval(), read_folder(folder)).direct()
    for record, answer in zip(records_of(folder), answers, strict=True):
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
