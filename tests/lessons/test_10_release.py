"""Claims: `--method release` computes what the authors' release computes, in loss and gradient, and
none of its rules is idle; `--method paper` computes the paper's text. The release's rules are
written a second time here, one record and one position at a time, from whole conversations."""

import copy
import dataclasses
import re

import pytest
import torch
from plain import eq1, latent, nll, run, smooth_l1, tokens, turns_of

import train
from world import loader
from conftest import assert_same, build, embed, images_of, pair_of, terms_of

PREDS = "<|predictor_4|><|predictor_3|><|predictor_2|><|predictor_1|>"  # the highest number first
TURN = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)", re.DOTALL)
# two and three tool images
RECORDS = [loader.examples("all", "train", 6, seed=3)[n] for n in (0, 5)]


def words_and_states(vlm, predictor, example, turns):
    """Of each supervised token: -log p of it, the forecast state's distance, -log p by that."""
    whole = tokens(vlm, turns_of(example))
    states, logits = run(vlm, whole.ids, whole.images)
    # the assistant's words, <|im_end|> and the line break behind it
    spans = [match.span(1) for match in TURN.finditer(whole.text)][-1 if turns == "last" else 0:]
    table, head = vlm.lm.get_input_embeddings().weight, vlm.lm.lm_head.weight.detach().clone()
    for t, ((start, end), token) in enumerate(zip(whole.spans[1:], whole.ids[1:])):
        if any(a <= start and end <= b for a, b in spans):
            ahead = latent(predictor, states[t], table[token].detach())
            # the forecast is decoded to the token that it was given
            yield (nll(logits[t], token), smooth_l1(ahead, states[t + 1].detach()),
                   nll(head @ ahead, token))


def naive_embeddings(vlm, tokenizer, example):
    """(h^_R, h_R): each the state of the last token but one, the <|im_end|> before a line break."""
    (role, parts), *rest = turns_of(example)
    prompt = tokens(vlm, [(role, [*parts, PREDS])], tokenizer=tokenizer)
    # four new tokens, whose rows stand behind the vocabulary's
    first, size = len(vlm.tokenizer), len(vlm.lm.get_input_embeddings().weight)
    ids = [token if token < first else token - first + size for token in prompt.ids]
    whole = tokens(vlm, [(role, [example.image]), *rest])  # the target has I0 and not the question
    return run(vlm, ids, prompt.images)[0][-2], run(vlm, whole.ids, whole.images)[0][-2].detach()


def naive_loss(method, turns, records):
    vlm, tokenizer = method.vlm, copy.deepcopy(method.vlm.tokenizer)
    tokenizer.add_special_tokens(dict(additional_special_tokens=re.findall("<.*?>", PREDS)))
    # behind the vocabulary's rows one for each [PRED] token, as if they were its own
    table = vlm.lm.get_input_embeddings()
    rows = torch.cat([table.weight, method.predictor.pred_embeddings])
    table.forward = lambda ids: rows[ids]
    words, pairs, states, decoded = [], [], [], []
    for example in records:
        own, gaps, ahead = zip(*words_and_states(vlm, method.predictor.latent, example, turns))
        pairs.append(naive_embeddings(vlm, tokenizer, example))
        # means over the batch's tokens, but of the states over each example's and then the batch
        words, decoded = [*words, *own], [*decoded, *ahead]
        states.append(sum(gaps) / len(gaps))
    del table.forward
    return sum(words) / len(words) + 0.2 * (
        eq1(*zip(*pairs)) + sum(states) / len(states) + sum(decoded) / len(decoded))


@pytest.mark.parametrize("turns, count", [("all", 2), ("last", 1)])
def test_loss_and_gradient_are_the_releases(vlm64, turns, count):
    records = RECORDS[-count:]
    method, batch = build(vlm64, "release", records, lora_dropout=0.0, supervise_turns=turns)
    assert_same(method(batch).total, naive_loss(method, turns, records), method, rtol=1e-6, atol=0)
    # the vision tower learns too; [PRED] and the latent predictor's own weights stay random
    trained = [name for name, p in method.named_parameters() if p.requires_grad]
    assert [name for name in trained if name.startswith("predictor")] == [
        f"predictor.latent.mlp.{n}.lora_{part}" for n in (1, 3, 5) for part in "AB"]
    assert any("visual" in name for name in trained)


@torch.no_grad()
def test_no_rule_is_idle(vlm64):
    method, batch = build(vlm64, "release", RECORDS, lora_dropout=0.0)
    plain, config = method(batch).parts, method.config
    for changed, option in [
            ("jepa", dict(target_image=False)), ("jepa", dict(pred_in_user_turn=False)),
            ("vlm nextlat", dict(supervise_layout=False)), ("nextlat", dict(nextlat_mean="tokens")),
            ("nextlat", dict(nextlat_token="next")), ("nextlat", dict(nextlat_token="none"))]:
        method.config = dataclasses.replace(config, **option)
        (batch,) = train.dataset(method, RECORDS, "train").micro_batches([0, 1], 2)
        parts = method(batch).parts
        other = {name for name in plain if abs(plain[name] - parts[name]) > 1e-5}
        assert other == {"loss", *changed.split()}


def test_the_papers_text(vlm64, mixed):
    """SmoothL1, the current model's h_R, Eq. 2 along R read alone and without the next token."""
    method, batch = build(vlm64, "paper", mixed[:2])
    images, gaps = images_of(method, batch), []
    for example in batch:
        states = embed(method.vlm, example.views.target, images).states[0]
        ahead = [latent(method.predictor.latent, state, None) for state in states[:-1]]
        gaps += map(smooth_l1, ahead, states[1:].detach())
    terms, (prediction, h_R) = terms_of(method, batch), pair_of(method, batch)
    assert_same(terms["jepa"], sum(map(smooth_l1, prediction, h_R.detach())) / 2, method, atol=1e-8)
    assert_same(terms["nextlat"], sum(gaps) / len(gaps), method, atol=1e-8)
    assert_same(terms["loss"], terms["vlm"] + 0.2 * (terms["jepa"] + terms["nextlat"]), method)
