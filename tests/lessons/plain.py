"""The plain way to what the lessons compare: a conversation as one text, transformers' own forward
pass on one unpadded sequence with pixels, and the formulas of losses as they are on paper."""

import types

import torch
from torch.nn.functional import gelu

from support.images import opened

PAD = "<|image_pad|>"


def turns_of(example):
    """A user turn of image and question; then one of the assistant a text, of the user an image."""
    return [("user", [example.image, example.question])] + [
        ("assistant" if isinstance(step, str) else "user", [step]) for step in example.trajectory]


def tokens(vlm, turns, more=None, tokenizer=None):
    """The turns as one text, its ids, the characters (start, end) of each, and the inputs of the
    images. more: what the assistant has begun to say behind the generation prompt."""
    tokenizer, processor = tokenizer or vlm.tokenizer, vlm.family.processor.image_processor
    pictures = [opened(part) for _, parts in turns for part in parts if not isinstance(part, str)]
    messages = [dict(role=role, content=[dict(type="text", text=part) if isinstance(part, str)
                                         else dict(type="image") for part in parts])
                for role, parts in turns]
    text, *pieces = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=more is not None).split(PAD)
    images = dict(processor(images=pictures, return_tensors="pt")) if pictures else {}
    for grid, piece in zip(images.get("image_grid_thw", ()), pieces, strict=True):
        text += PAD * (int(grid.prod()) // processor.merge_size ** 2) + piece
    text += more or ""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return types.SimpleNamespace(text=text, ids=encoding.input_ids, spans=encoding.offset_mapping,
                                 images=images)


def inputs(vlm, ids, images):
    """The arguments of transformers' own model for one sequence."""
    row = torch.tensor([ids])
    images = images | dict(pixel_values=images["pixel_values"].to(vlm.lm.dtype))
    return dict(input_ids=row, attention_mask=torch.ones_like(row), **images,
                mm_token_type_ids=(row == vlm.lm.config.image_token_id).int())


def run(vlm, ids, images):
    """(T, D) final-layer states and (T, V) logits of one sequence."""
    out = vlm.lm(**inputs(vlm, ids, images), use_cache=False, output_hidden_states=True)
    return out.hidden_states[-1][0], out.logits[0]


def target_state(vlm, example):
    """h_R: the state of R's last end of turn, with neither I0 nor Q."""
    text = tokens(vlm, turns_of(example)[1:])
    return run(vlm, text.ids[:-1], text.images)[0][-1]


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same(value, naive, *leaves):
    """Equal values and equal gradients at the leaves; zero where none arrives."""
    torch.testing.assert_close(value, naive)
    grads = [torch.autograd.grad(x, leaves, retain_graph=True, allow_unused=True,
                                 materialize_grads=True) for x in (value, naive)]
    torch.testing.assert_close(*grads)


def cosine(a, b):
    return a @ b / (a.norm() * b.norm())


def eq1(prediction, h_R):
    return 1 - sum(map(cosine, prediction, h_R)) / len(h_R)


def smooth_l1(a, b):
    gaps = (a - b).abs()
    return torch.where(gaps < 1, 0.5 * gaps * gaps, gaps - 0.5).mean()


def nll(logits, token):
    return torch.logsumexp(logits, 0) - logits[token]


def eq3_terms(logits, labels):
    """-log p of each supervised token, from the logits before it."""
    return [nll(logits[t - 1], label) for t, label in enumerate(labels) if label != -100]


def latent(predictor, state, embedding):
    """h_t + MLP(LayerNorm([h_t ; e_{t+1}])), three linear layers with GELU between them."""
    norm, first, _, second, _, third = predictor.mlp
    x = norm(torch.cat([state, embedding]) if predictor.sees_next else state)
    return state + third(gelu(second(gelu(first(x)))))
