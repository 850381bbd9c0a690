"""Claims: the numbers of figures, tables and shares equal hand-computed ones; every figure is drawn
from finished runs; runs of several data sets are refused, and so is a name that exists. An arm's
alpha (shrink.py) is the smallest that keeps 95% of its tool skill on validation; a run is asked
once. The states of targets.py are those that training would predict; a finished run is read by its
own model. What draws is skipped where matplotlib or scikit-learn is missing."""

from types import SimpleNamespace

import pytest
import torch

import evaluate
import train
from analysis import figures, shrink, targets
from support import run, splits
from support.adapters import lora_layers
from support.files import read_json, write_json
from support.tables import HELD_OUT
from world import loader, scenes


def test_probes_and_separation_by_hand():
    pytest.importorskip("sklearn")
    # unit vectors at 0, 0 and 90, 90 degrees: distance 0 within a group, 1 between groups
    points = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert figures.separation(points, ["a", "a", "b", "b"]) == pytest.approx(1)
    torch.manual_seed(0)
    x = torch.randn(300, 8)
    assert figures.probe(x, [str(bool(v > 0)) for v in x[:, 2]]) > 0.9
    assert figures.probe(x, x[:, :2] * 3 + 1) > 0.95 and figures.probe(x, torch.randn(300, 2)) < 0.2


def untrained(name, **options):
    config = train.config_class(name)(method=name, device="cpu", **options)
    return train.find_method(name)(train.VLM(config.model), config)


def write_run(out, method, **results):
    """The folder as train.py leaves it."""
    out.mkdir()
    run.save_best(out, method, 1, {})
    write_json(out / "config.json", vars(method.config))
    write_json(out / "results.json", results)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A recon and a Pearl run, untrained, with two validations."""
    folders = [tmp_path_factory.mktemp("study") / name for name in ("recon", "pearl")]
    for out in folders:
        write_run(out, untrained(out.name), answers=[
            dict(task="crop", options=["a", "b"], direct_right=n == 0) for n in range(4)])
        run.log(out, "valid", dict(step=1, direct=0.5, tool=0.25, loss=1.0))
        run.log(out, "valid", dict(step=2, direct=0.4, tool=float("nan"), loss=1.0))
        run.log(out, "train", dict(step=2, lr=1e-3))
    return folders


def test_curves_show_what_was_logged_in_a_new_file(runs, tmp_path, as_program):
    pytest.importorskip("matplotlib")
    command = figures.__file__, "--out", tmp_path / "curves.png", "--curves", *runs
    log, axes = figures.logged(runs[0]), figures.curves(runs).axes
    assert log["valid: direct"] == [(1, 0.5), (2, 0.4)] and log["valid: tool"] == [(1, 0.25)]
    assert [axis.get_title() for axis in axes] == ["valid: direct", "valid: loss", "valid: tool",
                                                   "train: lr"]
    as_program(*command)
    with pytest.raises(SystemExit, match="nothing is overwritten"):
        as_program(*command)


def test_all_figures_of_two_runs(runs, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    world = scenes.make_world("mixed", "test", 10)
    monkeypatch.setattr(splits, "load_splits", lambda config: (world, world[:2], world[:6]))
    # with n latents n answers are right
    monkeypatch.setattr(figures.reconstruction, "answer", lambda evaluator, scale, count: [
        dict(text=f"Answer: {ex.answer if n < count else ''}")
        for n, ex in enumerate(evaluator.examples)])
    figures.all_figures(runs, tmp_path / "out", 3)
    assert {file.stem for file in (tmp_path / "out").glob("*.png")} == {
        "latents-per-example", "latents-decoded", "embeddings", "curves"}
    numbers = read_json(tmp_path / "out" / "analyses.json")
    assert "nan" not in str(numbers) and numbers["latents per example"]["single"]["median"] == 16
    decoded, known = numbers["latents decoded"], numbers["what the embedding knows"]
    right = list(decoded["accuracy"].values())
    assert right == pytest.approx([0, 100 / 6, 200 / 6, 400 / 6, *[100] * 4])
    assert decoded["pearson_r"] == pytest.approx(0.897, abs=1e-3)
    # an untrained method reads R as the starting model does, and predicts it with [PRED]
    assert list(known) == ["no fine-tuning", str(runs[1])]
    base, pearl = known.values()
    assert pearl["h_R"] == base["h_R"] and pearl["h^_R"] != base["h^_R"]
    monkeypatch.setattr(figures, "config_of", lambda out, device: train.Config(data=out.name))
    with pytest.raises(ValueError, match="were trained on different data"):
        figures.all_figures(runs, tmp_path / "new", 3)


def arm(*wrong):
    """Of one run: at each alpha so many of twenty validation answers with the tool are wrong."""
    rows = {"test/crop/direct": [1, 1, 0, 0], "test/crop/free": [0],
            "test/crop/tool": [1, 1, 1, 0], f"test/{HELD_OUT}/direct": [1, 0, 0, 0]}
    return [{alpha: rows | {"validation/crop/tool": [1] * (20 - n) + [0] * n}
             for alpha, n in zip(shrink.ALPHAS, wrong, strict=True)}]


def test_the_table_and_the_figure_have_every_arm_at_the_smallest_alpha_that_keeps_the_skill():
    # the skill that counts is that at alpha 1, and not the best
    assert shrink.smallest_alpha(arm(2, 0, 4, 0, 2)) == 0.35
    arms = dict(a=arm(0, 0, 1, 2, 2), b=arm(0, 0, 0, 0, 0))
    text = shrink.table(arms)
    assert "| a | 1 | 0.65 | 50.0 | 75.0 | 0.0 | 25.0 | - |" in text
    assert "| b | 1 | 0.35 | 50.0 | 75.0 | 0.0 | 25.0 | +0.0 [+0.0, +0.0] |" in text
    pytest.importorskip("matplotlib")
    before = dict.fromkeys(("crop", HELD_OUT), dict(direct=[0.5]))
    (axis,) = shrink.figure(arms, before).axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        "before training", "a (1 seed)", "b (1 seed)"]


def test_a_run_is_asked_at_each_alpha_once(shipped, tmp_path, monkeypatch):
    alphas = []
    monkeypatch.setattr(evaluate, "load_model", lambda run, device, alpha: alphas.append(alpha)
                        or (shipped, train.Config(), {}))
    monkeypatch.setattr(splits, "test_questions",
                        lambda config, count, split: loader.questions("single", count, split))
    first = shrink.answers_of(tmp_path, 3, "cpu")
    assert first == shrink.answers_of(tmp_path, 3, "cpu") and alphas == list(shrink.ALPHAS)
    records = evaluate.answer_questions(evaluate.Evaluator(shipped, loader.questions("single", 3)))
    right = [int(r["direct_right"]) for r in records if r["task"] == HELD_OUT]
    assert first[1.0][f"test/{HELD_OUT}/direct"] == right and len(right) == 3
    # of each split three ways to answer, and two for the held-out task
    assert len(first[1.0]) == 2 * (3 + 2) and "validation/crop/tool" in first[1.0]


def test_shares_are_those_that_an_embedding_was_made_of():
    """Orthogonal parts of known size: common, the task's, the answer's, something else."""
    records, h = [], torch.zeros(1200, 8)
    for n in range(1200):
        task, answer, other = n % 2, n // 2 % 3, n // 6 % 2
        h[n, [0, 1 + task, 3 + answer, 6 + other]] = torch.tensor([3.0, 2.0, 1.0, 0.5])
        records.append(SimpleNamespace(task=f"task {task}", answer=f"{answer}"))
    shares, total = targets.shares(7 * h, records), 9 + 4 + 1 + 0.25
    # the mean of each part is common too; the length of the rows does not matter
    assert [shares[name] * total for name in ("common", "task", "answer", "rest")] == pytest.approx(
        [9 + 4 / 2 + 1 / 3 + 0.25 / 2, 4 / 2, 2 / 3, 0.25 / 2])
    assert 0 <= shares["answer_by_chance"] < 0.02 * shares["answer"]
    # the largest is bold; its last number is the share of what is not common
    text = targets.layers_table({(1, "end"): h, (1, "word"): h[:, :3]}, records)
    (bold,) = [line.strip("|* ").split("** | **") for line in text.splitlines() if "**" in line]
    assert bold[0] == "layer 1, end" and list(map(float, bold[1:])) == pytest.approx(
        [2 / 3 / total, 2 / 3 / (4 / 2 + 2 / 3 + 0.25 / 2)], abs=0.002)


@torch.no_grad()
def test_the_states_of_the_table_are_those_that_training_would_predict():
    """Each record alone, by transformers' own list of states, and by --method target_state."""
    world, method = scenes.make_world("mixed", "train", 4, seed=3), untrained("pearl", batch=3)
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
    chosen = untrained("target_state", batch=3, target_layer=2, target_position="words")
    torch.testing.assert_close(targets.targets_of(chosen, world), h_of[2, "words"])
    bare = targets.states_of(method, [example.answer_only("Answer:") for example in world[:2]])
    assert {position for _, position in bare} == {"end", "word", "words"}


def test_lines_for_h_R_for_every_state_and_for_a_run_read_by_its_own_model(
        tmp_path, monkeypatch, capsys, as_program):
    world, method = scenes.make_world("single", "train", 12), untrained("pearl", steps=2)
    folder = tmp_path / "pearl,lr=1-seed0"
    for layer in lora_layers(method.vlm.lm).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    own = targets.numbers_of(method, world)
    write_run(folder, method)
    monkeypatch.setattr(splits, "load_splits", lambda config: (world, world, world))
    for options, words, lines in (([], "12 trajectories of single", 2), (["--layers"], "of R", 21),
                                  (["--runs", folder], "| pearl --lr 1 |", 1)):
        as_program(targets.__file__, "--device", "cpu", *options)
        printed = capsys.readouterr().out
        assert words in printed and printed.count("\n| ") == lines
    assert printed.endswith(f" | {own['mean_cosine']:.3f} | {own['effective_rank']:.1f} |\n")
