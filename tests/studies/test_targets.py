"""Claims: shares are those that an embedding was made of; the states of the table are those that
training would predict; the bold one tells most of the answer once centred; a finished run is read
by its own model."""

import sys
from types import SimpleNamespace

import pytest
import torch

import train
from analysis import targets
from support import run, splits
from support.files import write_json
from support.adapters import lora_layers
from world import scenes


def starting(**options):
    name = options.get("method", "pearl")
    config = train.config_class(name)(device="cpu", batch=3, lora_rank=4, **options)
    return train.find_method(name)(train.VLM(config.model), config)


def test_shares_are_those_that_an_embedding_was_made_of():
    """Orthogonal parts of known size: common, the task's, the answer's, something else. Centred:
    without the common part, only the answer's is left."""
    records, h = [], torch.zeros(1200, 8)
    for n in range(1200):
        task, answer, other = n % 2, n // 2 % 3, n // 6 % 2
        h[n, [0, 1 + task, 3 + answer, 6 + other]] = torch.tensor([3.0, 2.0, 1.0, 0.5])
        records.append(SimpleNamespace(task=f"task {task}", answer=f"{answer}"))
    shares, total = targets.shares(7 * h, records), 9 + 4 + 1 + 0.25
    # the mean of each part is common too; the length of the rows does not matter
    assert shares["common"] == pytest.approx((9 + 4 / 2 + 1 / 3 + 0.25 / 2) / total)
    assert [shares[name] * total for name in ("task", "answer", "rest")] == pytest.approx(
        [4 / 2, 2 / 3, 0.25 / 2])
    assert 0 <= shares["answer_by_chance"] < 0.02 * shares["answer"]
    assert shares["above_chance"] == pytest.approx(shares["answer"] - shares["answer_by_chance"])
    records = [SimpleNamespace(task="t", answer=str(n % 2)) for n in range(40)]
    h = torch.tensor([[10.0, 1, 0], [10.0, -1, 0]]).repeat(20, 1)
    assert targets.shares(h, records)["answer"] == pytest.approx(1 / 101)
    text = targets.layers_table({(1, "end"): h, (1, "word"): h + 1}, records)
    (bold,) = [line.strip("|* ").split("** | **") for line in text.splitlines() if "**" in line]
    assert bold[0] == "layer 1, end" and float(bold[1]) < 0.01 and float(bold[2]) > 0.9


@torch.no_grad()
def test_the_states_of_the_table_are_those_that_training_would_predict():
    """Each record alone, by transformers' own list of states, and by --method target_state."""
    world, method = scenes.make_world("mixed", "train", 4, seed=3), starting()
    h_of, vlm = targets.states_of(method, world), method.vlm
    last = len(vlm.lm.get_decoder().layers)
    assert set(h_of) == {(n, p) for n in range(last + 1) for p in targets.POSITIONS}
    end, image = vlm.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|image_pad|>"])
    for row, example in enumerate(world):
        [(batch, images)] = targets.batches_of(method, [example])
        view = batch[0].views.target
        inputs = vlm.lm_inputs(train.collate([view], vlm.pad_id), images)
        hidden = vlm.family.states(**inputs, output_hidden_states=True).hidden_states
        words = [n for n, label in enumerate(view.labels) if label not in (-100, end)]
        at = dict(end=[len(view.ids) - 1], word=words[-1:], words=words,
                  image=[n for n, token in enumerate(view.ids) if token == image])
        for (layer, position), h in h_of.items():
            torch.testing.assert_close(h[row], hidden[layer][0, at[position]].mean(dim=0),
                                       rtol=1e-4, atol=1e-4)
    chosen = starting(method="target_state", target_layer=2, target_position="words")
    torch.testing.assert_close(targets.targets_of(chosen, world), h_of[2, "words"])
    torch.testing.assert_close(targets.targets_of(method, world), h_of[last, "end"])
    bare = [example.answer_only("Answer:") for example in world[:2]]
    assert {position for _, position in targets.states_of(method, bare)} == {"end", "word", "words"}


def test_the_program_prints_a_table(monkeypatch, capsys):
    world = scenes.make_world("mixed", "train", 12)
    monkeypatch.setattr(splits, "load_splits", lambda config: (world, world, world))
    for argv, lines in (([], 1), (["--layers"], 5 * 4)):
        monkeypatch.setattr(sys, "argv", ["targets.py", *argv, "--device", "cpu"])
        targets.main()
        printed = capsys.readouterr().out
        assert "12 trajectories of single" in printed and printed.count("\n| ") == 1 + lines


def test_a_finished_run_is_read_by_its_own_model(tmp_path, monkeypatch):
    world, method = scenes.make_world("single", "train", 12), starting()
    folder, before = tmp_path / "pearl,lr=1-seed0", targets.numbers_of(method, world)
    torch.manual_seed(0)
    for layer in lora_layers(method.vlm.lm).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    trained = targets.numbers_of(method, world)["mean_cosine"]
    folder.mkdir()
    run.save_best(folder, method, 1, {})
    write_json(folder / "config.json", vars(method.config) | dict(steps=2))
    write_json(folder / "results.json", dict(train_seconds=3.0))
    monkeypatch.setattr(splits, "load_splits", lambda config: (world, world, world))
    cells = targets.runs_report([folder], "cpu").splitlines()[2].strip("| ").split(" | ")
    assert cells[0] == "pearl --lr 1" and cells[-1] == "1500"
    assert float(cells[-3]) == pytest.approx(trained, abs=1e-3)
    assert abs(trained - before["mean_cosine"]) > 0.01
