"""Claims: a replaced latent is what the language model reads, in the latent's place and nowhere
else; another question's image is another image; a model that follows the image is told from one
that does not; gaps equal hand-computed ones; untrained tasks are found, and their near copies."""

import itertools
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from analysis import causal
from analysis.compare import difference
from baselines import reconstruction
from evaluate import Evaluator
from support.files import read_json
from support.images import picture_digest
from train import Config
from world import scenes

LATENTS, PLACES = 3, [1, 2, 3, 7, 8, 9]  # of a run; of the latents behind a prompt
RIGHT, SAME, FOLLOWS, STAYS = causal.RIGHT, causal.SAME, causal.FOLLOWS, causal.STAYS


@torch.no_grad()
def test_replaced_latents_are_fed_and_all_else_stays(vlm64, monkeypatch):
    """The shipped model, made to write two runs of latents, one question at a time."""
    evaluator, inputs = Evaluator(vlm64, scenes.make_world("single", "test", 3), batch=1), []
    mean, std = 3 + torch.randn(vlm64.dim), 4 + 2 * torch.rand(vlm64.dim)
    scale = reconstruction.LatentScale(mean, std, torch.tensor(0.1)).double()
    start, end = vlm64.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|im_end|>"])
    # what is written in the place of latents, and of the marker behind them, does not count
    words = itertools.cycle(2 * [start, *[9] * (LATENTS + 2)] + [end])
    size = vlm64.lm.config.text_config.vocab_size
    monkeypatch.setattr(vlm64.lm.lm_head, "forward", lambda state: torch.eye(
        size, dtype=state.dtype)[[next(words)]])
    vlm64.lm.get_decoder().register_forward_pre_hook(
        lambda module, args, named: inputs.append(named["inputs_embeds"][0, -1]), with_kwargs=True)

    def ask(feed):
        """For each question the inputs behind its prompt (n, D), and the latents it made."""
        inputs.clear()
        _, originals = causal.latent_choices(evaluator, scale, LATENTS, feed)
        # the first input is the prompt's; the shortest question was asked first
        parts = [part[1:] for part in torch.stack(inputs).split(2 * (LATENTS + 3) + 1)]
        order = sorted(evaluator.examples, key=lambda ex: len(ex.question.split()))
        return {ex.id: part for ex, part in zip(order, parts)}, originals

    own_inputs, originals = ask({})
    feeds = causal.replacements(evaluator.examples, originals, LATENTS)
    assert list(feeds) == ["zeros", "noise", "another question's"]
    feeds["one run"] = {i: latents[:LATENTS] for i, latents in originals.items()}
    inputs_of = {test: ask(feed)[0] for test, feed in feeds.items()}
    for ex, other in causal.partners(evaluator.examples, 0):
        own, fed = own_inputs[ex.id], {test: x[ex.id] for test, x in inputs_of.items()}
        rest = [n for n in range(len(own)) if n not in PLACES]
        assert all(torch.equal(x[rest], own[rest]) for x in fed.values())
        own, latents = own[PLACES], {test: x[PLACES] for test, x in fed.items()}
        assert own.std() > 0 and torch.equal(torch.stack(originals[ex.id]), own)
        assert torch.equal(latents["zeros"], torch.zeros_like(own))
        assert torch.equal(latents["another question's"], torch.stack(originals[other.id]))
        # a further run gets the last one's again
        assert torch.equal(latents["one run"], torch.cat([own[:LATENTS]] * 2))
        assert not torch.isclose(latents["noise"], own).all(dim=1).any()


def test_noise_by_hand():
    world = scenes.make_world("single", "test", 3)
    originals = {ex.id: [] for ex in world} | {world[0].id: [torch.full((1,), float(n % 4))
                                                             for n in range(4000)]}
    feeds = causal.replacements(world, originals, 2)
    # who made none is nobody's partner, and gets noise too
    assert len(feeds["another question's"]) == 1 and len(feeds["noise"][world[1].id]) == 2
    noise = feeds["noise"][world[0].id]
    # the mean and the standard deviation of 0, 1, 2, 3
    assert [float(noise.mean()), float(noise.std())] == pytest.approx([1.5, 1.118], abs=0.1)


@pytest.mark.parametrize("fed", [True, False])
def test_only_latents_that_were_fed_are_replaced(monkeypatch, fed):
    """A model that feeds itself a latent for its first question, or none, and whose first answer
    changes if that latent becomes zero."""
    world = scenes.make_world("single", "test", 2)

    def latent_choices(evaluator, scale, n, feed):
        originals = {ex.id: [torch.ones(1)] * (fed and ex is world[0]) * n for ex in world}
        zero = [fed and n and ex.id in feed and not any(feed[ex.id]) for ex in world]
        return {ex.id: ex.options[i == 0 and zero[0]] for i, ex in enumerate(world)}, originals

    model = SimpleNamespace(vlm=None, prefix="", examples=world,
                            direct=lambda: [dict(option=1)] * 2)
    monkeypatch.setattr(causal, "latent_choices", latent_choices)
    monkeypatch.setattr(causal, "Evaluator", lambda *_: model)
    results = causal.latent_tests(model, None, 1)
    assert [*results["latents", "its own", "with latents"].marks.values()] == [fed, 0]
    zeros = results.get(("latents", "zeros", SAME))
    assert zeros is None if not fed else zeros.marks == {world[0].id: 0, world[1].id: 1}
    # the question whose partner made no latents is left out
    other = results.get(("latents", "another question's", SAME))
    assert other is None if not fed else other.marks == {world[1].id: 1}


def test_partners_and_replaced_pictures():
    world = scenes.make_world("mixed", "test", 20)
    pairs = causal.partners(world, 0)
    # everybody's partner is another one's, of the same task
    assert [one for one, _ in pairs] == world and len({other.id for _, other in pairs}) == 20
    assert all(one.task == other.task and picture_digest(one.image) != picture_digest(other.image)
               for one, other in pairs)
    assert causal.partners([world[0], replace(world[0], id="again")], 0) == []
    world = scenes.make_world("multi", "test", 60)
    for same in (True, False):
        for one, other in causal.partners(world, -1, partial(causal.fits, same=same)):
            assert other.answer in one.options and (other.answer == one.answer) == same
            assert picture_digest(one.images[-1]) != picture_digest(other.images[-1])
            mixed = causal.with_tool_images(one, other)
            assert mixed.texts == one.texts and mixed.image is one.image
            assert all(a is b for a, b in zip(mixed.images[1:], other.images[1:], strict=True))


@pytest.mark.parametrize("by_image", [True, False])
def test_a_model_that_follows_the_image_is_told_from_one_that_does_not(monkeypatch, by_image):
    world = scenes.make_world("mixed", "test", 60)
    of_image = {picture_digest(image): ex.answer for ex in world for image in ex.images}
    truth = {ex.id: ex.answer for ex in world}

    def reply(examples, place):  # the answer is read off a picture, or known by the question
        for ex in examples:
            text = of_image.get(picture_digest(ex.images[place])) if by_image else truth[ex.id]
            yield dict(text=f"Answer: {text}",
                       option=ex.options.index(text) if text in ex.options else None)

    def evaluator(vlm, examples, prefix):
        return SimpleNamespace(vlm=vlm, examples=examples, prefix=prefix, tool=lambda: reply(
            examples, -1), direct=lambda: reply(examples, 0))

    monkeypatch.setattr(causal, "Evaluator", evaluator)
    vlm = SimpleNamespace(family=SimpleNamespace(single_image_only=False))
    model = evaluator(vlm, world, "Answer:")
    shares = {key[1:]: sum(marks.values()) / len(marks) for key, (marks, _) in
              (causal.image_tests(model) | causal.tool_tests(model)).items()}
    swapped, follows = "another's, other answer", float(by_image)
    # two questions without an answer have not the same one
    none, same = dict.fromkeys(truth), dict.fromkeys(truth, "x")
    assert [{*causal.matches(world, x, x).values()} for x in (none, same)] == [{0}, {1}]
    assert shares["as it is", RIGHT] == shares["another's, same answer", RIGHT] == 1
    assert shares[swapped, FOLLOWS] == follows and shares[swapped, STAYS] == 1 - follows
    assert shares["grey", RIGHT] == shares["grey", SAME] == 1 - follows
    # another image may have the same answer
    assert shares["another question's", RIGHT] == shares["another question's", SAME]
    assert (shares["another question's", SAME] < 1) == by_image


def test_untrained_tasks_and_their_distance(monkeypatch):
    assert causal.words_apart("Which bar is tall?", "Which dotted bar is tall?") == 1
    assert causal.words_apart("a b c", "a x c d") == 2
    questions = causal.questions_of(Config(regime="mixed"), 2)
    assert set(questions.untrained) == {"zoom", "highlight+crop", "path+crop", "tallest"}
    # a zoom's question is a crop's, word for word; tallest's is one word from highlight's
    assert questions.distances["zoom"] == 0 and questions.distances["tallest"] == 1
    assert len(questions.trained) == 10
    # every second answer is right
    monkeypatch.setattr(causal, "ask", lambda model, examples: {
        ex.id: ex.answer if n % 2 else None for n, ex in enumerate(examples)})
    results = causal.untrained_tests(None, questions, {})
    together, against = results["untrained", causal.ALL_FAR, RIGHT]
    # what it is compared with is the model before training
    assert not against and causal.untrained_tests(None, questions, results)[
        "untrained", "zoom", RIGHT].against is results["untrained", "zoom", RIGHT].marks
    assert len(together) == 4 and sum(together.values()) == 2
    assert not any(name.startswith(("zoom", "tallest")) for name in together)


def marks(text):
    return {i: int(mark) for i, mark in zip("abcdefgh", text)}


def test_gaps_and_the_table_by_hand():
    # over a, b, c, d; a single seed of the other is compared with each of ours
    ours, theirs = [marks("1101"), marks("1111")], [marks("10001")]
    assert difference(ours, theirs)[0] == difference(ours, theirs * 2)[0] == 62.5
    own, zoom = ("image", "as it is", RIGHT), ("untrained", "zoom", RIGHT)
    run = {key: causal.Result(*map(marks, texts)) for key, *texts in (
        (own, "1111"), (("image", "grey", RIGHT), "0000", "1111"), (zoom, "10", "11"),
        (("image", "grey", SAME), "0001"), (("tool image", "as it is", RIGHT), ""))}
    text = causal.table({"pearl": [run]}, {"zoom": 0})
    assert "| pearl | image | as it is | right | 4 | 100.0 [51.0, 100.0] |  |" in text
    assert "| grey | right | 4 | 0.0 [0.0, 49.0] | -100.0 [-100.0, -100.0] |" in text
    assert "| zoom (0 words apart) | right | 2 | 50.0 [9.5, 90.5] | -50.0 [-100.0, +0.0] |" in text
    assert "no question fits" in text and "\n2 differences. An interval that holds 0" in text
    two = causal.table({"pearl": [run, run | {own: causal.Result(marks("1100"))}]}, {})
    assert "| as it is | right | 4 | 75.0 +/- 35.4 |  |" in two


def test_the_program_asks_a_checkpoint_and_refuses_two_settings(tmp_path, monkeypatch, capsys):
    world, file = scenes.make_world("mixed", "test", 2), tmp_path / "marks.json"
    monkeypatch.setattr(causal, "questions_of", lambda *_: causal.Questions(world, {}, {}))
    monkeypatch.setattr(sys, "argv", ["causal.py", "--model", Config().model, "--json", str(file)])
    causal.main()
    assert "| image | grey | right | 2 |" in capsys.readouterr().out
    (seed,) = read_json(file)[causal.BASE]
    assert set(seed["tool image|as it is|right"]) == {ex.id for ex in world}
    monkeypatch.setattr(causal.run, "config_and_checkpoint", lambda path: (
        Config(regime="mixed" if path.name == "a" else "all"), path))
    monkeypatch.setattr(sys, "argv", ["causal.py", "a", "b"])
    with pytest.raises(ValueError, match="a, b differ in base, data or regime"):
        causal.main()
