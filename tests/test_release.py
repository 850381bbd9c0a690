"""Claims: `--recipe release` computes what the authors' release computes. Its rules are written out a second time below,
one example and one position at a time, from whole conversations rendered as text, with transformers' own forward pass, one
unpadded pass a view; every term and every gradient is equal in float64, and with any single rule left out it is not."""

import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import train
from world import scenes

PRED = 4
PAD = "<|image_pad|>"


# ---- the release's rules, a second time ---------------------------------------------------------


class GrownEmbedding(nn.Module):
    """The vocabulary's rows and, after them, one for each [PRED] token: as if they stood in it."""

    def __init__(self, base: nn.Embedding, rows: torch.Tensor):
        super().__init__()
        self.base, self.rows, self.weight = base, [rows], base.weight

    def forward(self, ids):
        return F.embedding(ids, torch.cat([self.base.weight, self.rows[0]]))


def pred_name(k):
    return f"<|predictor_{k}|>"


def conversation(example):
    """A user turn with the image and the question; a turn of the assistant for each text, of the user for each image."""
    turns = [("user", [example.image, example.question])]
    turns += [("assistant" if isinstance(s, str) else "user", [s]) for s in example.trajectory]
    return turns


def tokens(vlm, tokenizer, turns):
    """(text with every image's tokens written out, ids, characters (start, end) of each, images, grids) of a conversation."""
    parts = [part for _, content in turns for part in content if not isinstance(part, str)]
    images = [vlm.family.processor(images=[data.opened(p)], return_tensors="pt") for p in parts]
    merge = vlm.family.processor.merge_size ** 2
    messages = [dict(role=role, content=[dict(type="text", text=p) if isinstance(p, str) else dict(type="image")
                                         for p in content]) for role, content in turns]
    pieces = tokenizer.apply_chat_template(messages, tokenize=False).split(PAD)
    text = pieces[0]
    for image, piece in zip(images, pieces[1:], strict=True):
        text += PAD * (int(image["image_grid_thw"].prod()) // merge) + piece
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return text, found.input_ids, found.offset_mapping, images


def states_of(vlm, ids, images):
    """(T, D) final-layer states and (T, V) logits of one sequence by the model's own forward pass."""
    row = torch.tensor([ids])
    pixels = {key: torch.cat([image[key] for image in images]) for key in ("pixel_values", "image_grid_thw")}
    pixels["pixel_values"] = pixels["pixel_values"].to(vlm.lm.dtype)
    out = vlm.lm(input_ids=row, attention_mask=torch.ones_like(row), output_hidden_states=True, use_cache=False,
                 mm_token_type_ids=(row == vlm.image_token_id).int(), **pixels)
    return out.hidden_states[-1][0], out.logits[0]


def supervised(text, offsets, turns):
    """For each token whether it is of an assistant's turn: its words, its <|im_end|> and the line break after it."""
    spans = [m.span(1) for m in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)", text, re.DOTALL)]
    spans = spans[-1:] if turns == "last" else spans
    return [any(a <= start and end <= b for a, b in spans) for start, end in offsets]


def matrix(layer):
    """What a linear layer multiplies by, its low-rank part added."""
    if isinstance(layer, nn.Linear):
        return layer.weight, layer.bias
    return layer.base.weight + layer.scaling * layer.lora_B @ layer.lora_A, layer.base.bias


def forecast(mlp, state, embedding):
    """h_t + MLP(LayerNorm([h_t ; e_{t+1}])), three linear layers."""
    x = torch.cat([state, embedding])
    x = (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-6).sqrt() * mlp[0].weight + mlp[0].bias
    for n, layer in enumerate((mlp[1], mlp[3], mlp[5])):
        weight, bias = matrix(layer)
        x = weight @ x + bias
        x = x * 0.5 * (1 + torch.erf(x / 2 ** 0.5)) if n < 2 else x
    return state + x


def smooth_l1(a, b):
    gap = (a - b).abs()
    return torch.where(gap < 1, 0.5 * gap * gap, gap - 0.5).mean()


def nll(logits, token):
    return torch.logsumexp(logits, 0) - logits[token]


def naive_terms(vlm, predictor, examples, turns="all"):
    """The release's terms over a batch: vlm, jepa, state and token."""
    tokenizer, table = copy.deepcopy(vlm.tokenizer), vlm.lm.get_input_embeddings()
    tokenizer.add_special_tokens(dict(additional_special_tokens=[pred_name(k) for k in range(PRED, 0, -1)]))
    rows = [tokenizer.convert_tokens_to_ids(pred_name(k)) for k in range(PRED, 0, -1)]  # the highest number first
    spare = {token: len(table.weight) + n for n, token in enumerate(rows)}
    head = vlm.lm.lm_head.weight.detach().clone()
    words, jepa, state_means, decoded = [], [], [], []
    vlm.lm.set_input_embeddings(GrownEmbedding(table, predictor.pred_tokens))
    try:
        for example in examples:
            chat = conversation(example)
            text, ids, offsets, images = tokens(vlm, tokenizer, chat)
            states, logits = states_of(vlm, ids, images)
            own, learn = [], supervised(text, offsets, turns)
            for t in range(len(ids) - 1):
                if learn[t + 1]:
                    words.append(nll(logits[t], ids[t + 1]))
                    ahead = forecast(predictor.latent.mlp, states[t], table.weight[ids[t + 1]].detach())
                    own.append(smooth_l1(ahead, states[t + 1].detach()))
                    decoded.append(nll(head @ ahead, ids[t + 1]))  # the token that it was told
            state_means.append(sum(own) / len(own))
            role, content = chat[0]
            asked = [(role, [*content, "".join(pred_name(k) for k in range(PRED, 0, -1))])]
            _, ids, _, images = tokens(vlm, tokenizer, asked)
            guess = states_of(vlm, [spare.get(token, token) for token in ids], images)[0][-2]  # at <|im_end|>
            _, ids, _, images = tokens(vlm, tokenizer, [(role, [example.image]), *chat[1:]])
            seen = states_of(vlm, ids, images)[0][-2].detach()
            jepa.append(1 - guess @ seen / (guess.norm() * seen.norm()))
    finally:
        vlm.lm.set_input_embeddings(table)
    return dict(vlm=sum(words) / len(words), jepa=sum(jepa) / len(jepa), state=sum(state_means) / len(state_means),
                token=sum(decoded) / len(decoded))


# ---- the same by --recipe release ---------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    """Three trajectories with one, two and three tool images: turns, texts and lengths differ."""
    world = scenes.make_world("all", "train", 12, seed=3)
    return [world[0], world[2], world[5]]


@pytest.fixture
def adapted64(vlm64):
    """The shipped model with LoRA on every linear layer, off its zero start."""
    vlm64.set_trainable(4, 8.0, 0.0, ["all-linear"], True)
    vlm64.lm.double()
    for name, p in vlm64.lm.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.05)
    return vlm64


def ours(vlm, rows, *options):
    """Config, examples and predictor of a run by the release's recipe, [PRED] rows and all left to train."""
    config = train.parse_config(["--recipe", "release", "--device", "cpu", "--predictor_weights", "trained", *options])
    examples = train.Examples(rows, vlm, config)
    torch.manual_seed(1)  # the same predictor at every call
    predictor = train.additions(vlm, examples, config).double()
    predictor.latent.mlp[0].eps = 1e-6
    nn.init.normal_(predictor.latent.mlp[-1].weight, std=0.2)  # off its zero start
    return config, examples, predictor


def terms(vlm, rows, *options):
    """Our terms by name; the token term is what NextLat has more with it than without."""
    config, examples, predictor = ours(vlm, rows, *options)
    with torch.no_grad():
        parts = train.compute_losses(vlm, predictor, examples, [0, 1, 2], config)[1]
        without = dataclasses.replace(config, nextlat_token="none")
        state = train.compute_losses(vlm, predictor, examples, [0, 1, 2], without)[1]["nextlat"]
    return dict(vlm=parts["vlm"], jepa=parts["jepa"], state=state, token=parts["nextlat"] - state)


@pytest.mark.parametrize("packed", ["true", "false"])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_every_term_and_gradient_is_the_releases(adapted64, rows, packed, turns):
    options = ("--packed", packed, "--supervise_turns", turns)
    config, examples, predictor = ours(adapted64, rows, *options)
    learned = [p for module in (adapted64, predictor) for p in module.parameters() if p.requires_grad]
    naive = naive_terms(adapted64, predictor, rows, turns)
    for name, value in terms(adapted64, rows, *options).items():
        torch.testing.assert_close(value, naive[name].detach(), rtol=1e-12, atol=0, msg=name)
    total = naive["vlm"] + 0.2 * (naive["jepa"] + naive["state"] + naive["token"])
    loss = train.compute_losses(adapted64, predictor, examples, [0, 1, 2], config)[0]
    torch.testing.assert_close(loss, total, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(loss, learned), torch.autograd.grad(total, learned), strict=True):
        assert other.abs().max() > 0
        # transformers' norms compute in float32, so two orders of summing differ by its rounding
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("option, value, changed", [
    ("nextlat_token", "next", {"token"}),
    ("pred_position", "prompt", {"jepa"}),
    ("supervise_layout", "false", {"vlm", "state", "token"}),
    ("nextlat_mean", "tokens", {"state"}),
    ("distance", "smoothl1", {"jepa"}),
    ("target_view", "trajectory", {"jepa"}),
    ("supervise_turns", "last", {"vlm", "state", "token"}),
    ("nextlat_view", "trajectory", {"state", "token"}),
])
def test_no_rule_is_idle(adapted64, rows, option, value, changed):
    with torch.no_grad():
        naive = naive_terms(adapted64, ours(adapted64, rows)[2], rows)
    found = terms(adapted64, rows, f"--{option}", value)
    gap = {name: abs(float(found[name] - naive[name])) for name in found}
    assert {name for name in gap if gap[name] > 1e-4} == changed
    assert all(gap[name] < 1e-9 for name in gap.keys() - changed)


def test_lora_takes_every_linear_layer_but_the_head(adapted64):
    left = [name for name, module in adapted64.lm.named_modules() if isinstance(module, nn.Linear) and not name.endswith(".base")]
    assert left == ["lm_head"]


def test_what_the_release_leaves_random_stays_so(vlm64, rows):
    config = train.parse_config(["--recipe", "release", "--device", "cpu"])
    examples = train.Examples(rows, vlm64, config)
    vlm64.set_trainable(4, 8.0, 0.0, ["all-linear"], True)
    predictor = train.additions(vlm64, examples, config)
    learned = {name for name, p in predictor.named_parameters() if p.requires_grad}
    assert learned == {f"latent.mlp.{n}.lora_{part}" for n in (1, 3, 5) for part in "AB"}
    assert predictor.latent.mlp[0].eps == 1e-6 and predictor.latent.mlp[5].base.weight.abs().min() > 0
    before = {name: p.clone() for name, p in predictor.named_parameters()}
    step = train.Step(vlm64, predictor.double(), examples, config)
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=0.1)
    step([0, 1, 2])[0].backward()
    optimizer.step()
    moved = {name for name, p in predictor.named_parameters() if not torch.equal(p, before[name].double())}
    assert moved and moved <= learned


def test_the_line_break_after_every_turn_is_supervised(vlm64, rows):
    config = train.parse_config(["--recipe", "release", "--device", "cpu"])
    for example, views in zip(rows, train.Examples(rows, vlm64, config).views):
        words = vlm64.tokenizer.decode([label for label in views.full.labels if label != -100])
        assert words == "".join(f"{text}<|im_end|>\n" for text in example.texts)
    config = dataclasses.replace(config, supervise_turns="last")
    for example, views in zip(rows, train.Examples(rows, vlm64, config).views):
        words = vlm64.tokenizer.decode([label for label in views.full.labels if label != -100])
        assert words == f"{example.texts[-1]}<|im_end|>\n"


@pytest.mark.parametrize("count", [0, 1, 4])
def test_pred_stands_inside_the_user_turn(vlm64, rows, count):
    config = train.parse_config(["--recipe", "release", "--device", "cpu", "--pred_tokens", str(count)])
    views = train.Examples(rows, vlm64, config).views[0]
    end = vlm64.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert views.input.ids[views.input.embed_at] == end and views.input.embed_at == len(views.input.ids) - 1
    assert views.input.slots == tuple(range(views.input.embed_at - count, views.input.embed_at))
    asked = vlm64.tokenizer.decode(views.input.ids[:views.input.embed_at - count])
    assert asked.endswith(rows[0].question)


def test_pred_in_the_user_turn_needs_a_turn_that_ends(vlm64, rows):
    vlm64.tokenizer.chat_template = (
        "{%- for m in messages -%}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}{%- for part in m['content'] -%}"
        "{{ '<|image_pad|>' if part['type'] == 'image' else part['text'] }}{%- endfor -%}"
        "{{ '\n' if m['role'] == 'user' else '<|im_end|>' }}{%- endfor -%}"
        "{{ 'ASSISTANT: ' if add_generation_prompt }}")
    config = train.parse_config(["--recipe", "release", "--device", "cpu"])
    with pytest.raises(ValueError, match="pred_position user_turn"):
        train.Examples(rows, vlm64, config)
