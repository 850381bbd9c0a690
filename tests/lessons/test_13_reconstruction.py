"""Claims: the rival's view, targets, scale, loss and decoding equal a second telling, one record
and one position at a time."""

import pytest
import torch
from plain import eq3_terms

import evaluate
from baselines import reconstruction
from data import View
from world import loader
from conftest import assert_same, build, embed, images_of, terms_of

# one, two and three tool images
RECORDS = [loader.examples("all", "train", 6, seed=3)[n] for n in (2, 0, 5)]


@pytest.mark.parametrize("latents", [0, 3])
def test_the_view_has_a_run_of_latents_for_each_tool_image(vlm64, latents):
    (_, batch), decode = build(vlm64, "recon", RECORDS, latents=latents), vlm64.tokenizer.decode
    for record, example in zip(RECORDS, batch):
        view = example.views.full
        marked = "".join("#" if position in view.inject_at else decode([token])
                         for position, token in enumerate(view.ids))
        question, _, answer = marked.partition("<|im_start|>assistant\n")
        # as many as the tool image has tokens, or as the option says
        counts = iter(latents or image.text.count("<|image_pad|>") for image in example.images[1:])
        assert record.question in question and answer == "".join(
            step if isinstance(step, str) else f"<|vision_start|>{'#' * next(counts)}<|vision_end|>"
            for step in record.trajectory) + "<|im_end|>"
        # neither latents nor the end marker are the model's to write
        learned = decode([label for label in view.labels if label != -100])
        assert learned == answer.replace("#", "").replace("<|vision_end|>", "")
        assert view.images == [example.images[0].key] and view.state_at == len(view.ids) - 1


def naive_latents(method, example):
    """The embeddings of each tool image, or the means of its chunks."""
    images, count, parts = images_of(method, [example]), method.config.latents, []
    for image in example.images[1:]:
        rows = images[image.key].features[0]
        edges = [n * len(rows) // (count or len(rows)) for n in range((count or len(rows)) + 1)]
        parts += [rows[a:max(b, a + 1)].mean(dim=0) for a, b in zip(edges, edges[1:])]
    return torch.stack(parts)


@pytest.mark.parametrize("latents", [0, 3])
def test_loss_and_gradient_equal_one_record_at_a_time(vlm64, latents):
    method, batch = build(vlm64, "recon", RECORDS, latents=latents)
    every = torch.cat([naive_latents(method, example) for example in batch])
    mean = every.mean(dim=0)
    std = ((every - mean).square().sum(dim=0) / (len(every) - 1)).sqrt()
    size = vlm64.lm.get_decoder().norm.weight.square().mean().sqrt()
    gaps, words = [], []
    for example in batch:
        view, latent = example.views.full, naive_latents(method, example)
        states = embed(vlm64, view, images_of(method, [example]), latent).states[0]
        gaps += [((states[at - 1] / size - (target - mean) / std) ** 2).mean()
                 for at, target in zip(view.inject_at, latent)]
        words += eq3_terms(vlm64.lm.lm_head(states), view.labels)
    terms, recon, vlm = terms_of(method, batch), sum(gaps) / len(gaps), sum(words) / len(words)
    assert_same(terms["recon"], recon, method, rtol=1e-4, digits=3)
    assert_same(terms["vlm"], vlm, method)
    torch.testing.assert_close(terms["loss"], terms["vlm"] + 5.0 * terms["recon"])


def naive_decode(vlm, view, images, scale, latents, tokens):
    """One row, and all of it again for each token."""
    start, end = vlm.tokenizer.convert_tokens_to_ids(["<|vision_start|>", "<|vision_end|>"])
    ids, at, fed, words = list(view.ids), [], [], []

    def state():
        now = View(ids, ids, view.images, len(ids) - 1, tuple(at))
        return embed(vlm, now, images, torch.stack(fed) if fed else None).embedding[0]

    while len(words) < tokens and words[-1:] != [vlm.family.end_id]:
        words.append(int(vlm.lm.lm_head(state()).argmax()))
        ids.append(words[-1])
        for _ in range(latents if words[-1] == start else 0):
            # the last state, in the units of the embeddings of tool images
            fed.append(state() / scale.size * scale.std + scale.mean)
            at.append(len(ids))
            ids.append(end)
        ids += [end] if words[-1] == start else []
    return words, fed


@torch.no_grad()
def test_decoding_equals_one_row_without_a_cache(vlm64, monkeypatch):
    method, batch = build(vlm64, "recon", RECORDS)
    scale = method.predictor.double()
    real, push = vlm64.lm.lm_head.forward, torch.zeros(704, dtype=torch.float64)
    start = vlm64.tokenizer.convert_tokens_to_ids("<|vision_start|>")
    # a model that writes start markers now and then, and that ends at different times
    push[[start, vlm64.family.end_id]] = torch.tensor([20.0, 7.0], dtype=torch.float64)
    monkeypatch.setattr(vlm64.lm.lm_head, "forward", lambda states: real(states) + push)
    evaluator, images = evaluate.Evaluator(vlm64, RECORDS), images_of(method, batch)
    kept = [[] for _ in RECORDS]
    answers = reconstruction.answer(
        evaluator, scale, 2, lambda n, k, latent: kept[n].append(latent.clone()) or latent, 5)
    naive = [naive_decode(vlm64, q.prompt, images, scale, 2, 5) for q in evaluator.questions]
    for answer, latents, (words, fed) in zip(answers, kept, naive):
        assert answer == dict(text=evaluator.decode(words), tokens=len(words), latents=len(fed),
                              images=1, passes=len(words) + len(fed) + words.count(start))
        torch.testing.assert_close(latents, fed, rtol=1e-4, atol=1e-4)
    assert len({len(words) for words, _ in naive}) > 1 and any(fed for _, fed in naive)
