"""Claims: a replaced latent is what the language model reads, in the latent's place and nowhere
else; another question's image is another image; a model that follows the image is told from one
that does not; the table equals one by hand; untrained tasks are found, and their near copies."""

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

from analysis import causal
from baselines import reconstruction
from evaluate import Evaluator
from support import run, splits
from support.images import picture_digest
from train import Config
from world import loader, scenes

LATENTS, PLACES = 3, [1, 2, 3, 7, 8, 9]  # of a run; of the latents behind a prompt
RIGHT, SAME, FOLLOWS, STAYS = causal.RIGHT, causal.SAME, causal.FOLLOWS, causal.STAYS
OTHER = "another question's"


@torch.no_grad()
def test_replaced_latents_are_fed_and_all_else_stays(vlm64, monkeypatch):
    """The shipped model, made to write two runs of latents, one question at a time."""
    evaluator, inputs = Evaluator(vlm64, scenes.make_world("single", "test", 3), batch=1), []
    scale = reconstruction.LatentScale(*(3 + torch.rand(2, vlm64.dim)), torch.tensor(0.1)).double()
    start, end = vlm64.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|im_end|>"])
    # what is written in the place of latents, and of the marker behind them, does not count
    words = itertools.cycle(2 * [start, *[9] * (LATENTS + 2)] + [end])
    monkeypatch.setattr(vlm64.lm.lm_head, "forward", lambda state: torch.nn.functional.one_hot(
        torch.tensor([next(words)])))
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
    feeds["one run"] = {i: latents[:LATENTS] for i, latents in originals.items()}
    inputs_of = {test: ask(feed)[0] for test, feed in feeds.items()}
    for ex, other in causal.partners(evaluator.examples, 0):
        own, all_inputs = torch.stack(originals[ex.id]), own_inputs[ex.id]
        assert own.std() > 0 and torch.equal(own, all_inputs[PLACES])
        assert not torch.isclose(feeds["noise"][ex.id], own).any()
        # a further run gets the last one's again
        expected = {"zeros": own * 0, "noise": feeds["noise"][ex.id], "one run": own[[0, 1, 2] * 2],
                    OTHER: torch.stack(originals[other.id])}
        for test in feeds:
            all_inputs[PLACES] = expected[test]
            assert torch.equal(inputs_of[test][ex.id], all_inputs)


@pytest.mark.parametrize("count", [4000, 0])
def test_only_latents_that_were_fed_are_replaced(shipped, monkeypatch, count):
    """A model that feeds itself so many latents for its first question, whose answer changes if
    they become zero, and that never answers the second one."""
    one, two = world = scenes.make_world("single", "test", 2)
    latents, fed = {one.id: [torch.tensor([n % 4.0]) for n in range(count)], two.id: []}, []

    def latent_choices(evaluator, scale, n, feed):
        fed.append(feed)
        zero = n and one.id in feed and not any(feed[one.id])
        return {one.id: one.options[zero], two.id: None}, latents

    monkeypatch.setattr(causal, "latent_choices", latent_choices)
    monkeypatch.setattr(Evaluator, "direct", lambda self: [dict(option=1)] * 2)
    results = causal.latent_tests(Evaluator(shipped, world), None, 2)
    assert results["latents", "its own", "with latents"] == {one.id: count > 0, two.id: 0}
    same = {test: [*marks.values()] for (_, test, name), marks in results.items() if name == SAME}
    # a question whose partner made no latents is left out; no answer, twice, is not the same one
    assert same == ({"zeros": [0, 0], "noise": [1, 0], OTHER: [0]} if count else {})
    if count:
        noise = fed[3][one.id]  # has the mean and the standard deviation of 0, 1, 2, 3
        assert [float(noise.mean()), float(noise.std())] == pytest.approx([1.5, 1.118], abs=0.1)


def test_partners_and_replaced_pictures():
    world = scenes.make_world("mixed", "test", 20)
    pairs = causal.partners(world, 0)
    assert [one for one, _ in pairs] == world and len({other.id for _, other in pairs}) == 20
    assert all(one.task == other.task for one, other in pairs)
    assert causal.partners([world[0], replace(world[0], id="again")], 0) == []
    world = scenes.make_world("multi", "test", 60)
    for one, other in causal.partners(world, -1, partial(causal.fits, same=False)):
        assert picture_digest(one.images[-1]) != picture_digest(other.images[-1])
        mixed = causal.with_tool_images(one, other)
        assert mixed.texts == one.texts and mixed.image is one.image
        assert all(a is b for a, b in zip(mixed.images[1:], other.images[1:], strict=True))


@pytest.mark.parametrize("by_image", [True, False])
def test_a_model_that_follows_the_image_is_told_from_others(shipped, monkeypatch, by_image):
    world = scenes.make_world("mixed", "test", 60)
    of_image = {picture_digest(image): ex.answer for ex in world for image in ex.images}

    def reply(ex, place):  # the answer is read off a picture, or known by the question
        text = of_image.get(picture_digest(ex.images[place])) if by_image else ex.answer
        return dict(text=f"Answer: {text}")

    monkeypatch.setattr(Evaluator, "direct", lambda self: [reply(ex, 0) for ex in self.examples])
    monkeypatch.setattr(Evaluator, "tool", lambda self: [reply(ex, -1) for ex in self.examples])
    model = Evaluator(shipped, world)
    shares = {key[1:]: sum(marks.values()) / len(marks) for key, marks in
              (causal.image_tests(model) | causal.tool_tests(model)).items()}
    swapped, follows = "another's, other answer", float(by_image)
    assert shares["as it is", RIGHT] == shares["another's, same answer", RIGHT] == 1
    assert shares[swapped, FOLLOWS] == follows and shares[swapped, STAYS] == 1 - follows
    assert shares["grey", RIGHT] == shares["grey", SAME] == 1 - follows
    assert shares[causal.GUESS, RIGHT] == pytest.approx(0.3)  # of two or four options
    # another image may have the same answer
    assert shares[OTHER, RIGHT] == shares[OTHER, SAME] and (shares[OTHER, SAME] < 1) == by_image


def test_untrained_tasks_and_their_distance(monkeypatch):
    assert causal.words_apart("a b c", "a x c d") == 2
    questions = causal.questions_of(Config(regime="mixed"), 2)
    assert set(questions.untrained) == {"zoom", "highlight+crop", "path+crop", "tallest"}
    # a zoom's question is a crop's, word for word; tallest's is one word from highlight's
    assert questions.distances["zoom"] == 0 and questions.distances["tallest"] == 1
    monkeypatch.setattr(causal, "ask", lambda model, examples: {
        ex.id: ex.answer if n % 2 else None for n, ex in enumerate(examples)})
    together = causal.untrained_tests(None, questions)["untrained", causal.ALL_FAR, RIGHT]
    assert sorted(together.values()) == [0, 0, 1, 1]
    assert not any(name.startswith(("zoom", "tallest")) for name in together)


def test_the_table_by_hand():
    def results(own="1111", zoom="10"):
        texts = {"image | as it is | right": own, "image | guessing | right": "1000",
                 "image | grey | right": "0000", "image | grey | unchanged": "0001",
                 "tool image | as it is | right": "", f"tool image | other | {STAYS}": "10",
                 f"tool image | other | {FOLLOWS}": "01", "untrained | zoom | right": zoom}
        return {tuple(key.split(" | ")): dict(zip("abcd", map(int, text)))
                for key, text in texts.items()}

    systems = dict(base=[results(zoom="11")], sft=[results()], pearl=[results(), results("1100")])
    text = causal.table(systems, {"zoom": 0})
    for line in ("base | image | as it is | right | 4 | 100.0 [51.0, 100.0] |  |",
                 "guessing | right | 4 | 25.0 | -75.0 [-100.0, -25.0] |", "| no question fits |  |",
                 f"{FOLLOWS} | 2 | 50.0 [9.5, 90.5] | +0.0 [-100.0, +100.0] |",
                 "sft | untrained | zoom (0 words apart) | right | 2 | 50.0 [9.5, 90.5] | -50.0 [",
                 "pearl | image | as it is | right | 4 | 75.0 +/- 35.4 |  |", "\n11 differences. "):
        assert line in text, line


def test_the_program_asks_a_checkpoint_and_refuses_two_settings(monkeypatch, capsys, as_program):
    world = scenes.make_world("mixed", "test", 2)
    monkeypatch.setattr(splits, "load_splits", lambda config: (world, world, world))
    monkeypatch.setattr(loader, "questions", lambda *_: [])
    as_program(causal.__file__, "--model", Config().model)
    assert "| image | grey | right | 2 |" in capsys.readouterr().out
    monkeypatch.setattr(run, "config_and_checkpoint", lambda path: (Config(data=path.name), path))
    with pytest.raises(SystemExit, match="a, b differ in base, data or regime"):
        as_program(causal.__file__, "a", "b")
