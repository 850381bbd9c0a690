"""Claims: the analyses' numbers equal hand-computed ones; the study plans, skips what is done and
keeps what was interrupted; figures are drawn of its runs, of any regime's and of a data folder's;
Pearl's memory is SFT's (what the timed variants compute: test_train.py, test_release.py)."""

import contextlib
import dataclasses
import functools
import gc
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import evaluate
import losses
import train
from analysis import benchmark, figures, probes, study, targets
from data import collate
from predictor import Predictor
from support import recorded, records
from world import scenes

import programs

ROOT = Path(train.__file__).parent


def step_of(vlm, examples, config):
    """(predictor, examples) with which a step can be made: adapters and forecasts away from zero,
    so that every gradient is there."""
    vlm.set_trainable(4, 8.0, 0.0, ["q_proj", "v_proj", "down_proj"], False)
    torch.manual_seed(1)
    for name, p in vlm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    predictor = Predictor(vlm.dim, config.pred_tokens, torch.randn(vlm.dim))
    torch.nn.init.normal_(predictor.latent.mlp[-1].weight, std=0.02)
    vlm.double(), predictor.double()
    return predictor, train.prepared(examples, vlm, config)


def test_pearson_separation_and_probe_by_hand():
    assert probes.pearson([1, 2, 3, 4], [2, 4, 6, 8]) == pytest.approx(1)
    assert probes.pearson([0, 1, 2], [1, 0, 1]) == pytest.approx(0)
    # unit vectors at 0, 0 and 90, 90 degrees: distance 0 within, 1 between: silhouette 1; mixed
    # groups: within 1 at half, between 0 and 1
    points = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert probes.separation(points, ["a", "a", "b", "b"]) == pytest.approx(1)
    assert probes.separation(points, ["a", "b", "a", "b"]) == pytest.approx(-0.5)
    assert probes.separation(points, ["a"] * 4) == 0  # nothing to be apart from
    torch.manual_seed(0)
    x = torch.randn(300, 8)
    assert probes.probe(x, (x[:, 2] > 0).long()) > 0.9
    assert probes.probe(x, torch.randint(2, (300,))) < 0.7
    assert probes.probe(x, x[:, :2] * 3 + 1) > 0.99 and probes.probe(x, torch.randn(300, 2)) < 0.2


def test_shares_of_an_embedding_are_those_it_was_made_of():
    """Orthogonal parts of known size: what is common, what the family adds, the answer, noise."""
    examples, rows = [], []
    for n in range(1200):
        family, answer = n % 2, n // 2 % 3
        rows.append(torch.zeros(8))
        for place, size in ((0, 3.0), (1 + family, 2.0), (3 + answer, 1.0), (6 + n // 6 % 2, 0.5)):
            rows[-1][place] = size
        examples.append(SimpleNamespace(task=f"family {family}", answer=f"{answer}"))
    h = torch.stack(rows)
    found = targets.shares(7 * h, examples)  # length does not matter
    total = 9 + 4 + 1 + 0.25
    # each part's own mean is common too
    assert found["common"] == pytest.approx((9 + 4 / 2 + 1 / 3 + 0.25 / 2) / total)
    assert found["family"] == pytest.approx(4 / 2 / total)
    assert found["answer"] == pytest.approx(2 / 3 / total)
    assert found["rest"] == pytest.approx(0.25 / 2 / total)
    assert 0 <= found["answer_by_chance"] < 0.02 * found["answer"]
    keep, dealt = [n for n in range(1200) if n % 4 != 3], set()  # families of two sizes
    for name in "abcdefgh":  # Python's own order of strings in a set differs from run to run
        renamed = [SimpleNamespace(task=examples[n].task[-1] + name, answer=examples[n].answer)
                   for n in keep]
        dealt.add(round(targets.shares(h[keep], renamed)["answer_by_chance"], 9))
    assert len(dealt) == 1


def test_targets_of_the_shipped_model_tell_the_answer():
    said = targets.report(train.parse_config(
        ["--train_examples", "150", "--regime", "mixed", "--device", "cpu", "--valid_examples", "2",
         "--test_per_family", "1"]))
    shares = [float(share) for share in
              re.findall(r"^  (\d\.\d+) (?:is|tells)", said, re.MULTILINE)]
    assert len(shares) == 4 and sum(shares) == pytest.approx(1, abs=0.003)
    assert shares[2] > 0.2
    assert "of tiny-vlm on 150 trajectories of mixed" in said.replace(f"{ROOT}/", "")


def test_tsne_keeps_clusters_together():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(40, 10) + 6 * torch.eye(10)[i] for i in range(3)])
    y = probes.tsne(x, perplexity=15, steps=300)
    nearest = torch.cdist(y, y).fill_diagonal_(torch.inf).argmin(1)
    assert (nearest // 40 == torch.arange(120) // 40).float().mean() > 0.95


@pytest.fixture
def newborn():
    """Objects that are there before the test are none of those that LiveTensors goes through."""
    gc.freeze()
    yield
    gc.unfreeze()


def test_the_benchmark_prints_one_json_line(newborn, tmp_path, as_program, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    as_program(benchmark.__file__, "steps", "--device", "cpu", "--steps", 1, "--batch", 2,
               "--train_examples", 4)
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    variants = ("sft", "packed", "packed_cached", "packed_trajectory", "plain", "release")
    assert {f"{name}_{what}" for name in variants for what in ("ms", "gib")} <= numbers.keys()
    assert "packed_over_sft" in numbers and not list(tmp_path.iterdir())


def test_memory_is_counted_by_hand():
    layer, x = torch.nn.Linear(100, 50, bias=False), torch.randn(8, 100)
    weights, given, hidden = 4 * 100 * 50, 4 * 8 * 100, 4 * 8 * 50
    with benchmark.LiveTensors() as count:
        start = count.now
        assert start >= weights + given
        hidden_state = layer(x)
        assert (count.now, count.peak) == (start + hidden,) * 2
        hidden_state.view(-1), hidden_state.mul_(2)  # a view and an operation in place take nothing
        assert count.peak == start + hidden
        hidden_state.sum().backward()
        assert count.peak >= start + hidden + weights  # the gradient
        layer.weight.grad = None
        del hidden_state
    assert count.now == start


def test_a_step_of_pearl_takes_about_the_memory_of_a_step_of_sft(newborn, vlm64, mixed, config):
    predictor, examples = step_of(vlm64, mixed, config)

    rows = list(range(10))
    # the images' features and the frozen targets are cached
    train.compute_losses(vlm64, predictor, examples, rows,
                         dataclasses.replace(config, target_encoder="frozen"))

    def peak(predictor, **settings):  # above what is there before the step
        settings = dataclasses.replace(config, **settings)
        with benchmark.LiveTensors() as count:
            start = count.now
            train.compute_losses(vlm64, predictor, examples, rows, settings).total.backward()
        for module in filter(None, (vlm64, predictor)):
            module.zero_grad()
        return count.peak - start

    sft = peak(None)
    assert peak(predictor, target_encoder="frozen") < 1.06 * sft  # the default: h_R is cached
    assert peak(predictor) < 1.12 * sft  # a pass for h_R, without gradient
    assert peak(predictor, packed=False) > 1.2 * sft
    assert peak(predictor, nextlat_view="trajectory") > 1.2 * sft


@pytest.mark.parametrize("size, parameters", [("3B", 3_754_622_976), ("7B", 8_292_166_656)])
def test_the_random_models_have_the_true_sizes(size, parameters):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(benchmark.true_config(size))
    assert model.num_parameters() == parameters


SMALL = ("--device cpu --steps 2 --batch 4 --train_examples 10 --valid_examples 6 --eval_every 1 "
         "--test_per_family 1 --track 5 --lora_rank 4").split()
PICTURES = {"latents-per-example", "latents-decoded", "embeddings", "skill", "curves", "neighbours"}


@pytest.fixture(scope="module")
def drawn_once():
    """The world's examples, which are the same each time and which the figures only read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "make_world", functools.cache(scenes.make_world))
        yield


@pytest.fixture(scope="module")
def small_study(tmp_path_factory, drawn_once):
    """(the study's folder of one regime, what repeating it said)."""
    out = tmp_path_factory.mktemp("studies") / "study"
    command = ["study.py", "--out", str(out), "--arms", "sft", "recon", "pearl", "--regimes",
               "mixed", "--seeds", "0", "--jobs", "2", "--", *SMALL]
    folder = out / "tiny-vlm" / "mixed"
    (folder / "sft-seed0").mkdir(parents=True)
    (folder / "sft-seed0" / "log.jsonl").write_text("interrupted", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "subprocess", SimpleNamespace(run=programs.run,
                                                           STDOUT=subprocess.STDOUT))
        patch.setattr(sys, "argv", command)
        study.main()
        with contextlib.redirect_stdout(io.StringIO()) as again:
            study.main()
    return folder, again.getvalue()


def test_a_study_keeps_what_was_interrupted_and_repeats_nothing(small_study):
    folder, again = small_study
    kept = folder / "sft-seed0.interrupted-1" / "log.jsonl"
    assert kept.read_text(encoding="utf-8") == "interrupted"
    table = json.loads((folder.parent / "mixed.json").read_text(encoding="utf-8"))
    rows = {row["system"]: row for row in table}
    assert list(rows) == ["no fine-tuning", "sft", "sft + tools", "recon", "pearl"]
    # inference costs what the base model's does
    assert rows["pearl"]["cost"]["passes"] == rows["no fine-tuning"]["cost"]["passes"] == 2
    assert again.count("done before") == 3


def test_the_figures_of_a_study(small_study, as_program):
    folder, _ = small_study
    as_program(figures.__file__, folder, "--per_family", 1, "--count", 30)
    drawn = {file.stem for file in (folder / "figures").glob("*.png")}
    assert drawn == PICTURES
    assert all(Image.open(file).width > 500 for file in (folder / "figures").glob("*.png"))
    numbers = json.loads((folder / "figures" / "analyses.json").read_text(encoding="utf-8"))
    assert set(numbers["what the embedding knows"]) == {"no fine-tuning", "sft", "pearl"}


def as_trained_on(runs: dict[str, Path], out: Path, **fields) -> dict[str, Path]:
    """Copies of the runs whose config says that they were trained on something else."""
    copies = {}
    for name, run in runs.items():
        copies[name] = out / run.name
        shutil.copytree(run, copies[name])
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        (out / run.name / "config.json").write_text(json.dumps(config | fields), encoding="utf-8")
    return copies


def test_runs_are_named_and_of_an_arm_the_lowest_seed_is_drawn(tmp_path):
    for folder, method in (("study/pearl-seed10", "pearl"), ("study/pearl-seed9", "pearl"),
                           ("study/pearl_K=8-seed3", "pearl"), ("a", "sft"), ("b", "sft")):
        finished_run(tmp_path / folder, [1, 1], method=method)
    runs = figures.named_runs([tmp_path / name for name in ("study", "a", "b")])
    assert {name: run.relative_to(tmp_path).as_posix() for name, run in runs.items()} == {
        "pearl": "study/pearl-seed9", "pearl K=8": "study/pearl_K=8-seed3", "sft seed 0": "a",
        str(tmp_path / "b"): "b"}  # one method and one seed: both are there
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        figures.named_runs([tmp_path])


@pytest.mark.parametrize("regime", [*(set(scenes.REGIMES) - {"mixed"})])
def test_figures_of_every_regime(small_study, tmp_path, regime):
    runs = as_trained_on(figures.named_runs([small_study[0]]), tmp_path, regime=regime)
    figures.all_figures(runs, tmp_path / "figures", 2, 12)
    assert {file.stem for file in (tmp_path / "figures").glob("*.png")} == PICTURES
    text = (tmp_path / "figures" / "analyses.json").read_text(encoding="utf-8")
    known = json.loads(text)["what the embedding knows"]["pearl"]
    families = set(scenes.REGIMES[regime])
    assert set(known["probed"]["families"]) <= families and "NaN" not in text
    # of one family the kind of tool is no question, and clusters are those of its answers
    assert ("family" in known["h_R"]) == (len(families) > 1) and known["h_R"]["separation"] != 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder whose records no regime of the world has: one without a tool image, no call."""
    world = [dataclasses.replace(scenes.make_example("depth", split, n, 0), task=f"own {n % 2}",
                                 id=f"{split}-{n}", trajectory=["I look. Answer: x"])
             for split in ("train", "test") for n in range(8)]
    world = [dataclasses.replace(
        ex, trajectory=[f"I look. Answer: {ex.answer}"] if n % 4 == 0 else
        ["I look closer.", ex.image, f"It is so. Answer: {ex.answer}"])
        for n, ex in enumerate(world)]
    out = tmp_path_factory.mktemp("folders") / "mine"
    records.write_folder(out, world)
    return out


def test_figures_of_a_run_on_a_data_folder_show_its_records(small_study, folder, tmp_path,
                                                            monkeypatch):
    runs = as_trained_on(figures.named_runs([small_study[0]]), tmp_path, data=str(folder))
    monkeypatch.setattr(scenes, "make_world", None)  # nothing of the small world is drawn
    figures.all_figures(runs, tmp_path / "figures", 2, 12)
    assert {file.stem for file in (tmp_path / "figures").glob("*.png")} == PICTURES
    numbers = json.loads((tmp_path / "figures" / "analyses.json").read_text(encoding="utf-8"))
    assert list(numbers["latents per example"]) == ["mine"]
    assert numbers["latents per example"]["mine"]["median"] == 16
    known = numbers["what the embedding knows"]["pearl"]
    assert known["probed"] == dict(examples=4, families=["own 0"])
    assert set(known["h_R"]) == {"family", "separation"}  # four are too few to probe for answers


def test_figures_refuse_runs_of_several_data_and_too_few_records(small_study, folder, tmp_path):
    runs = figures.named_runs([small_study[0]])
    other = as_trained_on({"pearl": runs["pearl"]}, tmp_path, data=str(folder))
    with pytest.raises(ValueError, match="several data sets or regimes"):
        figures.all_figures({**runs, "other": other["pearl"]}, tmp_path / "figures", 1, 12)
    config = figures.config_of(other["pearl"])
    with pytest.raises(ValueError, match="has 0 records with a trajectory in the validation split"):
        figures.examples_of(config, "validation", 12)


def test_curves_draw_every_logged_name_of_any_runs(small_study, tmp_path, monkeypatch, as_program):
    runs, titles = figures.named_runs([small_study[0]]), []
    for n, line in enumerate(('{"kind": "valid", "step": 1, "gauge": -2.5}',
                              '{"kind": "valid", "step": 2, "gauge": NaN}')):
        log = tmp_path / f"{n}" / "log.jsonl"
        log.parent.mkdir()
        log.write_text(line + "\n", encoding="utf-8")
    assert figures.logged(tmp_path / "0") == {"valid: gauge": [(1, -2.5)]}
    assert figures.logged(tmp_path / "1") == {}  # not a number
    made = figures.Chart
    monkeypatch.setattr(figures, "Chart", lambda title, *more: titles.append(title)
                        or made(title, *more))
    figures.figure_curves({**runs, "other": tmp_path / "0", "nan": tmp_path / "1"})
    monkeypatch.setattr(figures, "Chart", made)
    names = {f"{record['kind']}: {name}" for run in runs.values() for line in
             (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
             for record in [json.loads(line)] for name in record.keys() - {"kind", "step"}}
    assert set(titles) == names | {"valid: gauge"} and len(titles) == len(set(titles))
    assert {"valid: recon", "valid: jepa", "train: lr", "train: grad_norm"} <= names
    as_program(figures.__file__, "--curves", *runs.values(), "--out", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").height > 330 * len(names) / 2 - 330


def test_the_plan_has_every_system_in_every_regime_and_refuses_unknown_arms(tmp_path):
    args = study.parse_args(["--out", str(tmp_path), "--seeds", "0", "1", "--", "--steps", "3"])
    assert sorted(args.regimes) == sorted(scenes.REGIMES) and args.regimes[0] == "mixed"
    jobs = study.plan(args)
    assert len(jobs) == 2 * (4 * len(study.SYSTEMS) + len(study.ABLATIONS))
    assert len({out for out, _ in jobs}) == len(jobs)
    for out, given in jobs:  # every option is one of train.py's
        config = train.parse_config(given)
        assert Path(config.out) == out and config.steps == 3
        assert config.regime == out.parent.name
    _, given = study.plan(study.parse_args(["--out", "x"]))[0]  # RESULTS.md's number of steps
    assert given[given.index("--steps") + 1] == "300"
    args.arms = ["best"]
    with pytest.raises(ValueError, match="unknown arm 'best'"):
        study.plan(args)


def finished_run(folder: Path, right: list[int], **changes) -> Path:
    """A run folder as train.py leaves it, of two families; right: of four questions each."""
    config = dataclasses.asdict(train.Config(regime="single", steps=200)) | changes
    answers = [dict(task=family, options=["a", "b", "c", "d"], direct_right=n < count,
                    free_right=False) for family, count in zip(("crop", "tallest"), right)
               for n in range(4)]
    folder.mkdir(parents=True)
    for name, content in dict(config=config, results=dict(answers=answers, before=answers),
                              environment=dict(commit="c0ffee", changed_files="")).items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_what_a_study_recorded_is_found_by_a_run_with_the_same_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "FILE", tmp_path / "recorded.json")
    mine = train.Config(regime="single", steps=200)
    assert recorded.recorded(mine) is None  # nothing recorded yet
    for seed, right in enumerate(([1, 4], [2, 3])):
        finished_run(tmp_path / "single" / f"sft-seed{seed}", right, method="sft", seed=seed,
                     call_limit=3, model=f"{ROOT}/world/../tiny-vlm")
    finished_run(tmp_path / "single" / "pearl-seed0", [3, 2])
    finished_run(tmp_path / "mixed" / "sft-seed0", [0, 0], method="sft", regime="mixed")
    study.record([tmp_path / "single"], "python analysis/study.py --record")
    study.record([tmp_path / "mixed"], "another")  # what was recorded before stays

    found = recorded.recorded(dataclasses.replace(mine, seed=7, out="elsewhere", device="cuda",
                                                  lambda_latent=9.0, pred_tokens=1,
                                                  pred_head="mlp", sigreg=0.1))
    assert found["table"]["crop"]["direct"] == [25, 50] and found["seeds"] == [0, 1]
    assert found["table"]["tallest"]["direct"] == [100, 75]
    assert found["table"]["crop"]["chance"] == 25 and found["table"]["crop"]["n"] == 4
    assert found["command"] == "python analysis/study.py --record" and found["commit"] == "c0ffee"
    assert found["before"]["crop"]["direct"] == [25] and found["settings"]["model"] == "tiny-vlm"
    assert recorded.as_text(found).splitlines() == [
        "sft with the same settings, mean of seeds 0, 1: crop direct 37.5, free 0.0; "
        "tallest direct 87.5, free 0.0; all direct 37.5, free 0.0",
        f"({tmp_path.name}/recorded.json: python analysis/study.py --record, commit c0ffee)"]
    assert recorded.recorded(mine, "pearl")["table"]["crop"]["direct"] == [75]
    mixed = recorded.recorded(dataclasses.replace(mine, regime="mixed"))
    assert mixed["table"]["crop"]["direct"] == [0]
    for other in (dict(steps=300), dict(lr=1e-4), dict(regime="all"), dict(test_per_family=5),
                  dict(data="mine"), dict(model="other/model"), dict(lora_dropout=0.1)):
        assert recorded.recorded(dataclasses.replace(mine, **other)) is None, other


def test_the_first_run_finds_the_numbers_of_sft():
    """analysis/recorded.json as it is here, for `python train.py` without options."""
    first = train.Config()
    sft, pearl = (recorded.recorded(first, method) for method in ("sft", "pearl"))
    for record in (sft, pearl):
        assert len(record["seeds"]) == 3 == len(record["table"]["crop"]["direct"])
        assert re.fullmatch("[0-9a-f]{40}", record["commit"]) and "/tmp" not in record["command"]
    # what it is there to show: at equal tool skill SFT loses more of direct answering
    assert max(sft["table"]["crop"]["direct"]) < min(pearl["table"]["crop"]["direct"])
    assert sft["table"]["crop"]["tool"] == pearl["table"]["crop"]["tool"] == [100, 100, 100]


def test_a_record_needs_one_commit_and_one_set_of_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(recorded, "FILE", tmp_path / "recorded.json")
    finished_run(tmp_path / "a" / "sft-seed0", [1, 1], method="sft", seed=0)
    second = finished_run(tmp_path / "a" / "sft-seed1", [1, 1], method="sft", seed=1, steps=100)
    with pytest.raises(ValueError, match="have different settings"):
        study.record([tmp_path / "a"], "")
    shutil.rmtree(second)
    finished_run(second, [1, 1], method="sft", seed=1)
    for environment in (dict(commit="beef", changed_files=""), dict(commit=None, changed_files=""),
                        dict(commit="c0ffee", changed_files=" M train.py")):
        (second / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
        with pytest.raises(ValueError, match="not all made by one commit without changes"):
            study.record([tmp_path / "a"], "")
    assert not (tmp_path / "recorded.json").exists()


def test_the_picture_of_the_views(tmp_path, as_program):
    as_program(figures.__file__, "--views", tmp_path / "views.png")
    assert Image.open(tmp_path / "views.png").width > 1000


@torch.no_grad()
def test_what_a_run_made_of_its_targets_is_measured_by_its_own_model(small_study):
    folder, _ = small_study
    vlm, config, _ = evaluate.load_run(folder / "pearl-seed0", "cpu")
    world = scenes.make_world("mixed", "validation", config["valid_examples"], 0)
    examples = train.prepared(world, vlm, train.Config(**config))
    batch = collate([views.target for views in examples.views], vlm.pad_id)
    own = vlm(batch, examples.store.encoded(batch.images)).embedding
    found = targets.of_run(folder / "pearl-seed0", "cpu")
    gauges = losses.collapse_gauges(own, own)
    assert {name: found[name] for name in gauges} == pytest.approx(gauges, rel=1e-4)
    assert sum(found[name] for name in ("common", "family", "answer", "rest")) == pytest.approx(1)
    lines = targets.runs_report([folder / f"{arm}-seed0" for arm in ("sft", "pearl")], "cpu")
    assert [line.split(" | ")[0] for line in lines.splitlines()[2:]] == ["| sft", "| pearl"]
    assert f"{found['mean_cosine']:.3f} | {found['effective_rank']:.1f} | " in lines
