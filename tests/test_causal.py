"""Claims: a replaced latent is what the language model is fed, in the latent's place and nowhere
else; with the true latents its states are those of training; another's image is another's; who
follows the image is told from who does not; the scenes are as they were but for the dots; gaps and
intervals equal hand-computed ones; a second call says the same."""

import itertools
import json
import sys
import zlib

import pytest
import torch
from PIL import ImageChops

import data
import evaluate
from analysis import causal, causal_report
from analysis.tables import paired_difference
from baselines import reconstruction
from support.images import picture_digest
from world import scenes

from conftest import TINY

LATENTS = 3


# ---- latents ----


class Script:
    """The shipped model made to say the experts' words, latents included, one question at a time;
    `fed` has what its language model is given after the prompt, `states` what it makes of it."""

    def __init__(self, vlm, monkeypatch, family="crop", count=4):
        torch.manual_seed(0)
        self.vlm, self.fed, self.states, self.asked = vlm.eval(), [], [], []
        self.examples = [scenes.make_example(family, "test", i, 0) for i in range(count)]
        self.asker = evaluate.Answerer(vlm, self.examples, batch=1)
        self.views = [reconstruction.latent_view(self.asker.serializer, ex, *place, LATENTS)
                      for ex, place in zip(self.examples, self.asker.placed)]
        self.scale = reconstruction.LatentScale(3 + 5 * torch.randn(20, vlm.dim),
                                                torch.full((vlm.dim,), 0.1)).to(vlm.lm.dtype)
        lengths = [len(prompt.ids) for prompt in self.asker.prompts]
        # the order in which a batch of one is asked (evaluate.Answerer.in_batches)
        self.order = sorted(range(count), key=lambda i: lengths[i])
        self.said = [view.ids[n:] for view, n in zip(self.views, lengths)]
        self.places = [[i - n for i in view.inject_at] for view, n in zip(self.views, lengths)]
        words = itertools.cycle(id for i in self.order for id in self.said[i])
        monkeypatch.setattr(vlm, "logits", lambda state: torch.nn.functional.one_hot(
            torch.tensor([next(words)]), vlm.lm.config.text_config.vocab_size).to(state))
        language_model = vlm.lm.model.language_model
        language_model.register_forward_pre_hook(self.keep, with_kwargs=True)
        language_model.register_forward_hook(lambda module, args, out: self.states.append(
            out.last_hidden_state[0, -1]))

    def keep(self, module, args, kwargs):
        self.fed.append(kwargs["inputs_embeds"][0])

    def ask(self, source=None):
        """Of each question the inputs after its prompt (n, D) and the states before them."""
        self.fed.clear()
        self.states.clear()
        causal.asked_with(self.asker, self.scale, LATENTS, source)
        inputs, states, made, after = {}, {}, iter(list(self.fed)), iter(list(self.states))
        for i in self.order:
            # the first pass reads the prompt, and nothing is made of the last word
            n = len(self.said[i])
            inputs[i] = torch.stack([next(made)[-1] for _ in range(n)])[1:]
            states[i] = torch.stack([next(after) for _ in range(n)])
        return inputs, states

    def latents(self, inputs):
        return {i: made[self.places[i]] for i, made in inputs.items()}


@pytest.fixture
def script(vlm64, monkeypatch):
    return Script(vlm64, monkeypatch)


@torch.no_grad()
def replaced(script):
    """What was fed by test, the model's own first."""
    own = causal.Fed(LATENTS, {})
    plain, _ = script.ask(own.keep)
    return own, {"own": plain} | {test: script.ask(source)[0]
                                  for test, source in causal.sources(script.asker, own).items()}


def test_replaced_latents_are_those_fed_and_all_else_stays(script):
    own, fed = replaced(script)
    for i, places in enumerate(script.places):
        assert len(places) == LATENTS == len(own.kept[i])
        words = [n for n in range(len(fed["own"][i])) if n not in places]
        for test, inputs in fed.items():
            assert torch.equal(inputs[i][words], fed["own"][i][words]), test
    latents = {test: script.latents(inputs) for test, inputs in fed.items()}
    partner = causal.partners(script.examples, causal.other_image)
    for i in range(4):
        mine = torch.stack(own.kept[i])
        assert torch.equal(latents["own"][i], mine) and mine.std() > 0
        assert torch.equal(latents["zeros"][i], torch.zeros_like(mine))
        assert torch.equal(latents["the first one repeated"][i], mine[:1].expand_as(mine))
        assert partner[i] not in (None, i)
        assert torch.equal(latents["another question's"][i], torch.stack(own.kept[partner[i]]))
        numbers = script.asker.placed[i][0]
        features = script.asker.store.encoded(numbers[1:])[numbers[1]].features[0]
        torch.testing.assert_close(latents["the true ones"][i],
                                   reconstruction.latent_targets(features, LATENTS))
        assert not torch.isclose(latents["noise"][i], mine).all(dim=1).any()


def test_noise_has_the_mean_and_std_of_the_models_own_latents(script):
    own = causal.Fed(LATENTS, {0: [torch.tensor([1.0, 10.0]), torch.tensor([3.0, 10.0])]})
    noise = causal.sources(script.asker, own)["noise"]
    feed = noise(0)
    drawn = torch.stack([feed(torch.zeros(2), k) for k in range(4000)])
    assert drawn.mean(0).tolist() == pytest.approx([2, 10], abs=0.1)
    assert drawn.std(0).tolist() == pytest.approx([1, 0], abs=0.05)
    again, other = noise(0), noise(1)
    assert torch.equal(again(torch.zeros(2), 0), drawn[0])
    assert not torch.equal(other(torch.zeros(2), 0), drawn[0])


def test_true_latents_give_the_states_of_training(script):
    own = causal.Fed(LATENTS, {})
    script.ask(own.keep)
    with torch.no_grad():
        _, states = script.ask(causal.sources(script.asker, own)["the true ones"])
        for i, view in enumerate(script.views):
            numbers = script.asker.placed[i][0]
            images = script.asker.store.encoded(numbers)
            targets = reconstruction.latent_targets(images[numbers[1]].features[0], LATENTS)
            batch = data.collate([view], script.vlm.pad_id)
            told = script.vlm(batch, images, targets).states[0]
            # from the state that says the first word to the one that says the end of the turn
            torch.testing.assert_close(states[i], told[-len(states[i]) - 1:-1], rtol=1e-6,
                                       atol=1e-6)


def test_latents_of_two_runs_go_into_their_own(script):
    own = causal.Fed(2, {0: [torch.full((1,), float(n)) for n in range(4)], 1: [torch.ones(1)] * 2,
                         2: [], 3: [torch.zeros(1)] * 4})
    found = causal.sources(script.asker, own)
    partner = causal.partners(script.examples, causal.other_image)
    asks_zero, asks_none = partner.index(0), partner.index(2)
    feed = found["another question's"](asks_zero)
    # a third run has no counterpart: the last one's again
    assert [float(feed(torch.zeros(1), k)) for k in range(6)] == [0, 1, 2, 3, 2, 3]
    assert found["another question's"](asks_none) is None
    first = found["the first one repeated"](0)
    assert [float(first(torch.full((1,), 10.0 + k), k)) for k in range(4)] == [10, 10, 12, 12]


def test_markers_alone_have_no_latent(script):
    counts = []
    made = reconstruction.generate_latent(
        script.vlm, script.asker.prompts[:1], script.asker.store, script.scale, 0,
        script.asker.serializer.end_id, 3,
        lambda inputs, fed, latent: counts.append(latent) or inputs)
    assert made[0][1] == 0 and not torch.cat(counts).any()


def test_who_feeds_itself_nothing_has_nothing_to_replace(shipped):
    """The shipped model never opens a run; that is said and not counted as a result."""
    world = scenes.make_world("single", "test", 3)
    scale = reconstruction.LatentScale(torch.zeros(2, shipped.dim), torch.ones(shipped.dim))
    rows = causal.latent_tests(causal.Subject(shipped, world, "Answer:"), scale, 2)
    found = {row.key[1:]: len(row.marks) for row in rows}
    assert found["as they are", "right"] == found["none, markers alone", "right"] == 3
    assert found["zeros", "right"] == found["the true ones", "unchanged"] == 3
    assert found["another question's", "right"] == 0
    assert not any(rows[3].marks.values()) and rows[3].measure == "with latents"
    system = causal_report.System("recon", [rows])
    assert "no question fits" in causal_report.as_text(causal_report.table([system], {}))
    assert "another question's (not measured)" in causal_report.of_latents(system)


# ---- images ----


def test_a_swapped_image_is_really_another():
    world = scenes.make_world("mixed", "test", 20)
    twin = world[0].image_first()  # the same picture under another question
    twin.id = "twin"
    rows, others = causal.with_partners([*world, twin], causal.other_image)
    assert rows == list(range(21))
    for row, other in zip(rows, others):
        mine = [*world, twin][row]
        assert mine.task == other.task
        assert picture_digest(mine.image) != picture_digest(other.image)
    assert causal.partners([world[0], twin], causal.other_image) == [None, None]
    assert causal.partners(world[:5], causal.other_image) == [None] * 5  # each family once
    pool = [ex for ex in scenes.make_world("single", "test", 12)]
    found = causal.partners(pool, causal.other_image)
    assert sorted(found) == list(range(12)) and found == causal.partners(pool, causal.other_image)


def test_no_answer_twice_is_not_the_same_answer():
    assert causal.same([None, 1, 1, None], [None, 1, 2, 0]) == [False, True, False, False]


def test_partners_by_answer_and_number_of_tool_images():
    world = scenes.make_world("multi", "test", 60)
    for fits in (causal.same_answer, causal.other_answer):
        rows, others = causal.with_partners(world, fits)
        assert rows
        for row, other in zip(rows, others):
            assert len(other.images) == len(world[row].images) and other.id != world[row].id
            assert other.answer in world[row].options
            assert (other.answer == world[row].answer) == (fits is causal.same_answer)


def test_blanked_is_grey_and_of_the_same_size():
    ex = scenes.make_example("crop", "test", 0, 0)
    grey = causal.blanked(ex)
    assert grey.image.getcolors() == [(128 * 128, (128, 128, 128))]
    assert grey.image.size == ex.image.size and grey.trajectory is ex.trajectory


def test_a_recombined_trajectory_has_its_own_words_and_the_others_images():
    one, other = (next(ex for ex in scenes.make_world("multi", "test", 60, seed)
                       if len(ex.images) == 3) for seed in (0, 1))
    made = causal.with_tool_images(one, other)
    assert made.texts == one.texts and made.image is one.image
    assert [a is b for a, b in zip(made.images[1:], other.images[1:], strict=True)] == [True] * 2


class Reader:
    """A model that answers by the picture it is shown, or by the question alone."""

    family = type("Family", (), dict(alone_only=False))

    def __init__(self, monkeypatch, examples, by_image):
        of_image = {picture_digest(ex.images[-1]): ex.answer for ex in examples}
        of_image |= {picture_digest(ex.image): ex.answer for ex in examples}
        of_question = {ex.id: ex.answer for ex in examples}

        def answer(asker, picture):
            said = []
            for ex in asker.examples:
                text = of_image.get(picture_digest(picture(ex))) if by_image else \
                    of_question[ex.id]
                option = ex.options.index(text) if text in ex.options else None
                said.append(dict(text=f"I see. Answer: {text}", option=option))
            return said

        monkeypatch.setattr(causal.evaluate, "Answerer", lambda vlm, rows, prefix: type(
            "Asker", (), dict(examples=rows, direct=lambda self: answer(self, lambda ex: ex.image),
                              tool=lambda self: answer(self, lambda ex: ex.images[-1])))())
        self.subject = causal.Subject(self, examples, "Answer:")


def by_key(rows):
    return {row.key[1:]: causal_report.share(row) for row in rows}


def test_who_follows_the_tool_image_is_told_from_who_does_not(monkeypatch):
    world = scenes.make_world("mixed", "test", 100)
    swapped, alike = "another's, other answer", "another's, same answer"
    found = by_key(causal.tool_tests(Reader(monkeypatch, world, True).subject))
    assert found == {("as it is", "right"): 1, (alike, "right"): 1,
                     (swapped, "as the image"): 1, (swapped, "as the question"): 0}
    found = by_key(causal.tool_tests(Reader(monkeypatch, world, False).subject))
    assert found == {("as it is", "right"): 1, (alike, "right"): 1,
                     (swapped, "as the image"): 0, (swapped, "as the question"): 1}


def test_who_looks_at_the_image_is_told_from_who_does_not(monkeypatch):
    world = scenes.make_world("mixed", "test", 100)
    found = by_key(causal.image_tests(Reader(monkeypatch, world, True).subject))
    assert found["as it is", "right"] == 1
    assert found["grey", "right"] == found["grey", "unchanged"] == 0
    # another's image may happen to have the same answer, and then only
    assert 0 < found["another question's", "right"] == found["another question's", "unchanged"] < 1
    found = by_key(causal.image_tests(Reader(monkeypatch, world, False).subject))
    assert set(found.values()) == {1}


# ---- questions that were not trained ----

SCENES = {  # of the first three of each split: images and specs, before the dots could be left out
    "crop": 1340982213, "highlight": 869897661, "depth": 3914848575, "jigsaw": 2777365829,
    "path": 822093867, "zoom": 2908973273, "highlight+crop": 4049276211, "path+crop": 2430022774,
    "tallest": 3139985734}


def test_no_scene_split_or_corpus_changed():
    for family in scenes.FAMILIES:
        content = b"".join(scenes.make_example(family, split, i, 0).image.tobytes()
                           + repr(scenes.make_spec(family, split, i, 0)).encode()
                           for split in ("train", "validation", "test", "pretrain")
                           for i in range(3))
        assert zlib.crc32(content) == SCENES[family], family
    assert scenes.FAMILIES.keys() == SCENES.keys()  # what the pretraining corpus is drawn from


def test_without_dots_only_the_dots_are_gone():
    for i in range(5):
        spec = scenes.make_spec("tallest", "test", i, 0)
        ex, plain = (scenes.make_example("tallest", "test", i, 0),
                     scenes.tallest_without_dots("test", i, 0))
        assert plain.id != ex.id and plain.task == scenes.NO_DOTS and not plain.trajectory
        assert (plain.question, plain.options, plain.answer) == (ex.question, ex.options, ex.answer)
        dots = [(x + 4, 100, x + 11, 107) for x, _, _, dotted, _ in spec["bars"] if dotted]
        changed = ImageChops.difference(ex.image, plain.image)
        for box in dots:
            assert changed.crop(box).getbbox() is not None
            changed.paste((0, 0, 0), box)
        assert changed.getbbox() is None


def test_uncovered_families_and_their_distance_by_hand():
    assert causal.words_apart("Which bar is tall?", "Which dotted bar is tall?") == 1
    assert causal.words_apart("a b c", "a x c d") == 2 and causal.words_apart("a", "a") == 0
    assert causal.words_apart("", "a b") == 2
    config = dict(data="", regime="mixed", world_seed=0)
    questions = causal.untrained(config, 5)
    assert set(questions) == {"zoom", "highlight+crop", "path+crop", "tallest", scenes.NO_DOTS}
    assert all(len(rows) == 5 and {ex.split for ex in rows} == {"test"}
               for rows in questions.values())
    apart = causal.distances(questions, causal.trained_questions(config))
    # a zoom's question is a crop's, word for word; tallest's is one word from highlight's
    assert apart["zoom"] == 0 and apart["tallest"] == apart[scenes.NO_DOTS] == 1
    assert min(apart["highlight+crop"], apart["path+crop"]) >= causal_report.NEAR


# ---- table and findings ----


def a_row(marks, test="as it is", measure="right", part="image", ids="abcdefgh"):
    return causal_report.Row(part, test, measure, dict(zip(ids, map(bool, marks))), 0.25)


def test_gaps_by_hand():
    mine, theirs = a_row([1, 1, 0, 1]), a_row([1, 0, 0, 0, 1], test="grey")
    system = causal_report.System("sft", [[mine, theirs]])
    # over a, b, c, d: 0, 100, 0, 100; std 57.735, its interval 1.96 * 57.735 / 2
    mean, half = system.gap(mine.key, system, theirs.key)
    assert mean == 50 and half == pytest.approx(56.58, abs=0.01)
    assert not causal_report.differs((mean, half)) and causal_report.differs((50, 49.9))
    assert system.gap(mine.key, system, ("image", "none", "right")) is None
    seeds = causal_report.System("sft", [[mine, theirs], [a_row([1, 1, 1, 1]), theirs]])
    assert seeds.gap(mine.key, seeds, theirs.key) == paired_difference([75, 100], [25, 25])
    base = causal_report.System("base", [[theirs]])  # asked once, set beside each seed
    assert seeds.gap(mine.key, base, theirs.key) == paired_difference([75, 100], [25, 25])


def test_table_and_sentences_by_hand():
    rows = [a_row([1, 1, 1, 1]), a_row([0, 0, 0, 0], "grey"),
            a_row([0, 0, 0, 1], "grey", "unchanged"),
            a_row([0, 0, 0, 0], "another question's"),
            a_row([0, 0, 1, 1], "another question's", "unchanged"),
            a_row([1, 0], "zoom", part="untrained")]
    one = causal_report.System("pearl", [rows])
    lines = causal_report.table([one], {"zoom": 0})
    text = causal_report.as_text(lines)
    assert "| pearl | image | as it is | right | 4 | 100.0 [51.0, 100.0] | 25 |" in text
    assert "| pearl | untrained | zoom (0 apart) | right | 2 | 50.0 [9.5, 90.5] | 25 |" in text
    assert causal_report.findings([one], {"zoom": 0}) == [
        "Finding, pearl: the image is worth +100.0 [+100.0, +100.0] points over grey and +100.0 "
        "[+100.0, +100.0] over another question's, with which 25.0 and 50.0 in 100 answers stay "
        "the same: the answers depend on the image."]
    two = causal_report.System("pearl", [rows, [a_row([1, 1, 0, 0]), *rows[1:]]])
    assert causal_report.table([two], {})[0]["values"] == [100, 50]
    assert "| 75.0 +/- 35.4 |" in causal_report.as_text(causal_report.table([two], {}))
    # with two seeds the interval is wide: nothing is claimed
    assert "is not shown" in causal_report.findings([two], {})[0]


def test_sentences_on_latents_and_tool_images():
    eight = [1, 1, 1, 1, 1, 1, 1, 0]
    latents = [a_row(eight, "as they are", part="latents"),
               a_row(eight, "as they are", "with latents", "latents"),
               a_row(eight, "zeros", part="latents"),
               a_row([0] * 8, "noise", part="latents")]
    told = causal_report.of_latents(causal_report.System("recon", [latents]))
    assert told.endswith("distinguishable from its own: noise") and "zeros +0.0" in told
    assert told.startswith("it fed itself latents for 87.5 in 100 questions and had 87.5 right;")
    told = causal_report.of_latents(causal_report.System("recon", [latents[:3]]))
    assert "none distinguishable" in told
    for follows, stays, verdict in ((eight, [0] * 8, "follows the tool image"),
                                    ([0] * 8, eight, "follows the question"),
                                    (eight, eight, "neither clearly more")):
        rows = [a_row(eight, part="tool image"),
                a_row(eight, "another's, same answer", part="tool image"),
                a_row(follows, "another's, other answer", "as the image", "tool image"),
                a_row(stays, "another's, other answer", "as the question", "tool image")]
        assert verdict in causal_report.of_tool(causal_report.System("sft", [rows]))


def test_what_the_dots_alone_do_is_told_scene_by_scene():
    def system(name, dots, plain, *seeds):
        return causal_report.System(name, [
            [a_row(d, "tallest", part="untrained"),
             a_row(p, scenes.NO_DOTS, part="untrained", ids="stuvwxyz"),
             a_row([1, 1], "zoom", part="untrained"), a_row([1, 1], "path", part="untrained")]
            for d, p in ((dots, plain), *seeds)])

    base = system(causal_report.BASE, [1, 1, 1, 1], [1, 1, 1, 1])
    run = system("pearl", [0, 0, 1, 1], [1, 0, 1, 1])
    apart = {"tallest": 1, scenes.NO_DOTS: 1, "zoom": 0, "path": 4}
    keys = [row.key for row in run.seeds[0][:2]]
    assert causal_report.by_dots(run, base, *keys) == (-25, 1.96 * 25)  # of 0, -100, 0, 0
    told, = causal_report.findings([base, run], apart)
    # together -100 and five times 0: std 40.825, its interval 1.96 * 40.825 / sqrt(6)
    assert ("near copy in training: all together -16.7 [-49.3, +16.0], "
            "tallest without dots -25.0 [-74.0, +24.0], path +0.0") in told
    assert "near copies (fewer than 2 words apart): tallest -50.0" in told and "zoom +0.0" in told
    two = system("pearl", [0, 0, 1, 1], [1, 0, 1, 1], ([1, 1, 1, 1], [1, 1, 1, 1]))
    mean, half = paired_difference([50, 100], [75, 100])
    assert causal_report.by_dots(two, base, *keys) == (mean, half)
    base = system(causal_report.BASE, [1, 1, 1, 0], [1, 1, 1, 1])  # it too has 25 less with dots
    assert causal_report.by_dots(two, base, *keys) == (mean + 25, half)
    assert causal_report.by_dots(run, base, *keys)[0] == 0  # of -100, 0, 0, 100


# ---- the command ----


def call(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args), "--causal", "--per_family",
                                      "2", "--device", "cpu"])
    evaluate.main()
    return capsys.readouterr().out


def test_the_command_says_the_same_twice(tmp_path, monkeypatch, capsys):
    said = [call(monkeypatch, capsys, "--model", TINY, "--json", tmp_path / name)
            for name in ("a.json", "b.json")]
    assert said[0] == said[1]
    written = [(tmp_path / name).read_text(encoding="utf-8") for name in ("a.json", "b.json")]
    assert written[0] == written[1]
    found = json.loads(written[0])
    assert {line["part"] for line in found["table"]} == {"image", "tool image", "untrained"}
    assert all(line["system"] == TINY for line in found["table"])


def test_runs_of_two_settings_are_refused():
    config = dict(model="x/tiny", data="", regime="mixed", world_seed=0)
    causal.one_setting({"a": config, "b": config | dict(model="y/tiny")})
    causal.one_setting({})
    for change in (dict(regime="all"), dict(model="x/other"), dict(data="d"), dict(world_seed=1)):
        with pytest.raises(ValueError, match="a and b differ in base, data or regime"):
            causal.one_setting({"a": config, "b": config | change})
