"""Claims: `--method release` computes what the authors' release computes. Its rules are written a
second time here, one record and one position at a time, from whole conversations as text, with
transformers' own forward pass: the loss and every gradient are equal, and no rule is idle. So is
`--method paper` to the paper's text."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import losses
from baselines.release import ReleasePasses
from conftest import assert_close, build, embeddings, gradients, images_of, terms_of
from data import collate
from support.images import opened
from world import loader

PAD = "<|image_pad|>"
# the highest number first
PREDS = [f"<|predictor_{k}|>" for k in (4, 3, 2, 1)]
TURN = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)", re.DOTALL)
# one, two and three tool images
RECORDS = [loader.examples("all", "train", 6, seed=3)[n] for n in (2, 0, 5)]


# ---- the release's rules, a second time ---------------------------------------------------------


class GrownEmbedding(nn.Module):
    """The vocabulary's rows and behind them one for each [PRED] token, as if they were its own."""

    def __init__(self, base, rows):
        super().__init__()
        self.base, self.rows, self.weight = base, [rows], base.weight

    def forward(self, ids):
        return F.embedding(ids, torch.cat([self.base.weight, self.rows[0]]))


def conversation(example):
    """A user turn of image and question; then one of the assistant a text, of the user an image."""
    return [("user", [example.image, example.question])] + [
        ("assistant" if isinstance(step, str) else "user", [step]) for step in example.trajectory]


def tokens(vlm, tokenizer, turns):
    """(text, ids, the characters (start, end) of each, images) of a whole conversation."""
    processor = vlm.family.processor
    images = [processor(images=[opened(part)], return_tensors="pt")
              for _, parts in turns for part in parts if not isinstance(part, str)]
    messages = [dict(role=role, content=[dict(type="text", text=part) if isinstance(part, str)
                                         else dict(type="image") for part in parts])
                for role, parts in turns]
    text, *pieces = tokenizer.apply_chat_template(messages, tokenize=False).split(PAD)
    for image, piece in zip(images, pieces, strict=True):
        text += PAD * int(image["image_grid_thw"].prod() // processor.merge_size ** 2) + piece
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return text, found.input_ids, found.offset_mapping, images


def run(vlm, ids, images):
    """(T, D) final-layer states and (T, V) logits of one sequence by the model's own forward."""
    row = torch.tensor([ids])
    out = vlm.lm(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False,
                 output_hidden_states=True,
                 mm_token_type_ids=(row == vlm.lm.config.image_token_id).int(),
                 pixel_values=torch.cat([image["pixel_values"] for image in images]).double(),
                 image_grid_thw=torch.cat([image["image_grid_thw"] for image in images]))
    return out.hidden_states[-1][0], out.logits[0]


def affine(layer, x):
    """A linear layer with its low-rank part."""
    return (layer.base.weight @ x + layer.base.bias
            + layer.scaling * (layer.lora_B @ (layer.lora_A @ x)))


def forecast(mlp, state, embedding):
    """h_t + MLP(LayerNorm([h_t ; e_{t+1}])), three linear layers, exact GELU between them."""
    x = torch.cat([state, embedding])
    x = x - x.mean()
    x = x / (x.square().mean() + 1e-6).sqrt() * mlp[0].weight + mlp[0].bias
    for n in (1, 3, 5):
        x = affine(mlp[n], x)
        x = x * 0.5 * (1 + torch.erf(x / 2 ** 0.5)) if n < 5 else x
    return state + x


def smooth_l1(a, b):
    gap = (a - b).abs()
    return torch.where(gap < 1, 0.5 * gap * gap, gap - 0.5).mean()


def nll(logits, token):
    return torch.logsumexp(logits, 0) - logits[token]


def words_and_states(vlm, tokenizer, mlp, example, turns):
    """Of each supervised token: -log p of it, the forecast state's distance, -log p by that."""
    words, distances, decoded = [], [], []
    text, ids, offsets, images = tokens(vlm, tokenizer, conversation(example))
    states, logits = run(vlm, ids, images)
    # the assistant's words, <|im_end|> and the line break behind it
    spans = [match.span(1) for match in TURN.finditer(text)][-1 if turns == "last" else 0:]
    table, head = vlm.lm.get_input_embeddings().weight, vlm.lm.lm_head.weight.detach().clone()
    for t, (start, end) in enumerate(offsets[1:]):
        if any(a <= start and end <= b for a, b in spans):
            words.append(nll(logits[t], ids[t + 1]))
            ahead = forecast(mlp, states[t], table[ids[t + 1]].detach())
            distances.append(smooth_l1(ahead, states[t + 1].detach()))
            # decoded to the token that it was given
            decoded.append(nll(head @ ahead, ids[t + 1]))
    return words, distances, decoded


def naive_embeddings(vlm, tokenizer, example):
    """(h^_R, h_R): each the state of the last token but one, the <|im_end|> before a line break."""
    spare = {tokenizer.convert_tokens_to_ids(name): len(vlm.lm.get_input_embeddings().weight) + n
             for n, name in enumerate(PREDS)}
    (role, parts), *rest = conversation(example)
    _, ids, _, images = tokens(vlm, tokenizer, [(role, [*parts, "".join(PREDS)])])
    prediction = run(vlm, [spare.get(token, token) for token in ids], images)[0][-2]
    # the target has I0 and not the question
    _, ids, _, images = tokens(vlm, tokenizer, [(role, [example.image]), *rest])
    return prediction, run(vlm, ids, images)[0][-2].detach()


def naive_terms(method, turns):
    """The release's terms: vlm, jepa, state and token."""
    vlm, tokenizer = method.vlm, copy.deepcopy(method.vlm.tokenizer)
    tokenizer.add_special_tokens(dict(additional_special_tokens=PREDS))
    table = vlm.lm.get_input_embeddings()
    vlm.lm.set_input_embeddings(GrownEmbedding(table, method.predictor.pred_tokens))
    words, jepa, state, decoded = [], [], [], []
    for example in RECORDS:
        found = words_and_states(vlm, tokenizer, method.predictor.latent.mlp, example, turns)
        prediction, h_R = naive_embeddings(vlm, tokenizer, example)
        # means over the batch's tokens, but of the states over each example's and then the batch
        words, decoded = words + found[0], decoded + found[2]
        state.append(sum(found[1]) / len(found[1]))
        jepa.append(1 - prediction @ h_R / (prediction.norm() * h_R.norm()))
    vlm.lm.set_input_embeddings(table)
    return {name: sum(values) / len(values) for name, values in dict(
        vlm=words, jepa=jepa, state=state, token=decoded).items()}


# ---- the same by --method release ---------------------------------------------------------------


@pytest.mark.parametrize("turns", ["all", "last"])
def test_loss_and_gradient_are_the_releases(vlm64, turns):
    method, batch = build(vlm64, "release", RECORDS, lora_dropout=0.0, supervise_turns=turns)
    naive = naive_terms(method, turns)
    total = naive["vlm"] + 0.2 * (naive["jepa"] + naive["state"] + naive["token"])
    expected = gradients(total, method)
    result = method(batch)
    torch.testing.assert_close(result.total, total, rtol=1e-6, atol=0)
    assert_close(gradients(result.total, method), expected, digits=4)
    # the vision tower learns too; [PRED] and the latent predictor's own weights stay random
    names = [name for name in expected if name.startswith("predictor")]
    assert names == [f"predictor.latent.mlp.{n}.lora_{part}" for n in (1, 3, 5) for part in "AB"]
    assert any("visual" in name for name in expected)
    # the passes that analysis/benchmark.py times have the same numbers
    method.__class__ = ReleasePasses
    if turns == "all":
        torch.testing.assert_close(method(batch).total, total, rtol=1e-6, atol=0)


def released(vlm, **options):
    method, batch = build(copy.deepcopy(vlm), "release", RECORDS, lora_dropout=0.0, **options)
    return {name: value.item() for name, value in method(batch).parts.items() if name != "loss"}


@pytest.mark.parametrize("option, changed", [
    (dict(target_image=False), {"jepa"}), (dict(pred_in_user_turn=False), {"jepa"}),
    (dict(supervise_layout=False), {"vlm", "nextlat"}), (dict(nextlat_mean="tokens"), {"nextlat"}),
    (dict(nextlat_token="next"), {"nextlat"}), (dict(nextlat_token="none"), {"nextlat"})], ids=str)
def test_no_rule_is_idle(loaded64, option, changed):
    plain, other = released(loaded64), released(loaded64, **option)
    assert {name for name in plain if abs(plain[name] - other[name]) > 1e-5} == changed


def test_the_papers_text(vlm64, mixed):
    """SmoothL1, the current model's h_R, Eq. 2 along R read alone and without the next token."""
    method, batch = build(vlm64, "paper", mixed[:2])
    vlm, images, gaps = method.vlm, images_of(method, batch), []
    for example in batch:
        states = vlm(collate([example.views.target], 0), images).states[0]
        for t in range(len(states) - 1):
            ahead = method.predictor.latent(states[t], None)
            gaps.append(smooth_l1(ahead, states[t + 1].detach()))
    prediction = embeddings(method, batch, 1, method.predictor.pred_tokens)
    h_R = embeddings(method, batch, 2).detach()
    naive = dict(jepa=sum(map(smooth_l1, prediction, h_R)) / 2, nextlat=sum(gaps) / len(gaps))
    terms = terms_of(method, batch)
    for name, value in naive.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-8)
        assert_close(gradients(terms[name], method), gradients(value, method), digits=4)
    assert terms["loss"] == losses.pearl_loss(*(terms[n] for n in ("vlm", "jepa", "nextlat")), 0.2)
