"""The rival, whole: reconstruction-based latent reasoning (LVR, Mirage; the paper's Fig. 5).

Between two markers the model feeds its own last state back in place of words, as often as the run
has latents; training regresses each latent to a visual embedding of the tool image it stands for.
In reading order: view, targets, scale, loss, decoding.

Letters: B batch, T sequence, D hidden size, P image tokens, n latents of a batch.
Deviation: the paper draws <lat> and </lat>. The markers here are in every Qwen-VL vocabulary and
already mean "what comes next was seen", so no row has to be added under a frozen embedding. The end
marker is written for the model once the run is over, so it is not supervised.
"""

from pathlib import Path
from typing import Callable

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import data
import losses
from model import VLM
from support.files import read_tensors
from support.records import Example

LATENT_START, LATENT_END = "<|vision_start|>", "<|vision_end|>"


# ---- view and targets ---------------------------------------------------------------------------


def add_views(examples: data.Examples, taught: list[Example], config) -> None:
    """examples.latent_views: one view each, a single assistant's turn, tool images as latents."""
    serializer = examples.serializer
    vocabulary = serializer.tokenizer.get_vocab()
    if missing := {LATENT_START, LATENT_END} - vocabulary.keys():
        raise ValueError(f"--method recon marks its latents with {sorted(missing)[0]}, which this "
                         "model's vocabulary lacks: use a Qwen-VL model")
    examples.latent_views = [latent_view(serializer, example, *place, config.latents)
                             for example, place in zip(taught, examples.placed)]


def latent_view(serializer: data.Serializer, example: Example, images: list[int],
                image_texts: list[str], latents: int) -> data.View:
    """Of a tool image with P tokens the run has P latents (LVR), or `latents` if > 0 (Mirage)."""
    serializer.check(example)
    words = "".join(step if isinstance(step, str) else LATENT_START + LATENT_END
                    for step in example.trajectory)
    turns = [*serializer.turns(example)[:1], ("assistant", [words])]
    told = serializer.conversation(turns, image_texts[:1]).until_last_label()
    token = serializer.tokenizer.convert_tokens_to_ids
    image, end = token(serializer.family.placeholder), token(LATENT_END)
    counts = iter(latents or serializer.tokenizer(text, add_special_tokens=False).input_ids
                  .count(image) for text in image_texts[1:])
    ids, labels, inject_at = [], [], ()
    for id, label in zip(told.ids, told.labels):
        if label == end:  # of the model's own turn: the image of the question is not supervised
            count = next(counts)
            inject_at += tuple(range(len(ids), len(ids) + count))
            ids += [serializer.end_id] * count
            labels += [-100] * count
            label = -100
        ids.append(id)
        labels.append(label)
    view = data.View(ids, labels, images[:1], len(ids) - 1, inject_at)
    serializer.check_length(view, example)
    return view


def latent_targets(features: Tensor, latents: int) -> Tensor:
    """(P, D) visual embeddings of a tool image -> the same, or the means of `latents` chunks."""
    if not latents:
        return features
    edges = [n * len(features) // latents for n in range(latents + 1)]
    return torch.stack([features[a:max(b, a + 1)].mean(dim=0) for a, b in zip(edges, edges[1:])])


# ---- scale and loss -----------------------------------------------------------------------------


class LatentScale(nn.Module):
    """Visual embeddings and final-layer states brought to one scale.

    Raw visual embeddings have another size in each dimension than any state behind the final norm.
    A latent is therefore regressed in standard units: target(v) = (v - mean) / std over the
    training set's tool images, predicted(h) = h / size with `size` the RMS of the final norm's
    gain. At inference a state h becomes the next input by input(h), their inverse.
    """

    file_name = "latents.safetensors"

    def __init__(self, embeddings: Tensor, norm_weight: Tensor):
        """embeddings (n, D): visual embeddings of tool images; norm_weight (D)."""
        super().__init__()
        embeddings = embeddings.float()
        self.register_buffer("mean", embeddings.mean(dim=0))
        self.register_buffer("std", embeddings.std(dim=0).clamp_min(1e-6))
        self.register_buffer("size", norm_weight.detach().float().square().mean().sqrt())

    def target(self, embedding: Tensor) -> Tensor:
        return (embedding - self.mean) / self.std

    def predicted(self, state: Tensor) -> Tensor:
        return state / self.size

    def input(self, state: Tensor) -> Tensor:
        return self.predicted(state) * self.std + self.mean


@torch.no_grad()
def make_scale(vlm: VLM, examples: data.Examples, latents: int) -> LatentScale:
    """The scale of a training set's tool images."""
    tool_images = [i for view in examples.views for i in view.full.images[1:]]
    if not tool_images:
        raise ValueError("no trajectory has a tool image: there is nothing for --method recon to "
                         "reconstruct")
    parts = [examples.store.encoded(tool_images[n:n + 64]) for n in range(0, len(tool_images), 64)]
    targets = [latent_targets(image.features[0], latents)
               for part in parts for image in part.values()]
    return LatentScale(torch.cat(targets), vlm.lm.get_decoder().norm.weight)


def load_scale(checkpoint: Path, vlm: VLM) -> LatentScale:
    scale = LatentScale(torch.zeros(2, vlm.dim), torch.ones(vlm.dim))
    scale.load_state_dict(read_tensors(checkpoint / LatentScale.file_name)[0])
    return scale.to(vlm.device)


def compute_losses(vlm: VLM, scale: LatentScale, examples: data.Examples, rows: list[int],
                   config) -> losses.Losses:
    """L_VLM + lambda * L_latent, teacher-forced."""
    views = [examples.latent_views[row] for row in rows]
    tool_images = [i for row in rows for i in examples.views[row].full.images[1:]]
    images = examples.store.encoded([i for view in views for i in view.images] + tool_images)
    latents = torch.cat([latent_targets(images[i].features[0], config.latents)
                         for i in tool_images])  # (n, D) visual embeddings
    batch = data.collate(views, vlm.pad_id).to(vlm.device)
    states, _, _ = vlm(batch, images, latents)
    vlm_term = losses.vlm_loss(states, batch.labels, vlm.logits)
    # the state before each latent regresses the embedding that the latent stands for
    before = batch.inject_at.roll(-1, dims=1)  # (B, T)
    recon_term = losses.reconstruction_loss(scale.predicted(states[before]), scale.target(latents))
    total = vlm_term + config.lambda_latent * recon_term
    parts = dict(loss=total, vlm=vlm_term, recon=recon_term)
    return losses.Losses(total, {name: value.detach() for name, value in parts.items()})


# ---- decoding -----------------------------------------------------------------------------------


@torch.no_grad()
def generate_latent(vlm: VLM, views: list[data.View], store, scale: LatentScale, latents: int,
                    end_id: int, max_new_tokens: int,
                    instead: Callable | None = None) -> list[tuple[list[int], int]]:
    """Greedy words, and after each start marker `latents` latents; (words, latents fed) of each.

    A latent is the last state, brought to the scale of an input and fed back in place of a word;
    after the last one the end marker is written. Every row is fed one position a step, a word or a
    latent, so rows in and out of a run share one batch and one KV cache. instead(inputs (B, D),
    latents fed so far, is a latent (B)) -> inputs: what a control feeds (analysis/causal.py).
    """
    markers = vlm.tokenizer.convert_tokens_to_ids([LATENT_START, LATENT_END])
    batch = data.collate(views, vlm.pad_id, left=True).to(vlm.device)
    inputs = vlm.embed(batch, store.encoded(batch.images))
    position, mask = inputs["position_ids"].amax(dim=(0, 2)) + 1, inputs["attention_mask"]
    cache = DynamicCache()
    words: list[list[int]] = [[] for _ in views]
    # left: latents to feed; 0: the end marker is due; -1: words
    fed, left = [0] * len(views), [-1] * len(views)
    while True:
        out = vlm.family.states(**inputs, past_key_values=cache, use_cache=True)
        state = out.last_hidden_state[:, -1]  # (B, D)
        token = vlm.logits(state).argmax(dim=-1).tolist()
        latent = torch.tensor([n > 0 for n in left], device=vlm.device)
        for row, n in enumerate(left):
            ended = bool(words[row]) and words[row][-1] == end_id
            if n < 0 and not ended and len(words[row]) < max_new_tokens:
                words[row].append(token[row])
                left[row] = latents if token[row] == markers[0] else -1
            elif n == 0:
                token[row] = markers[1]
            fed[row] += n > 0
            left[row] = n - 1 if n >= 0 else left[row]
        if all(n < 0 and (w[-1] == end_id or len(w) == max_new_tokens)
               for n, w in zip(left, words)):
            return list(zip(words, fed))
        embeds = vlm.lm.get_input_embeddings()(torch.tensor(token, device=vlm.device))  # (B, D)
        inputs_now = scale.input(state)
        if instead is not None:
            inputs_now = instead(inputs_now, fed, latent)
        embeds = torch.where(latent[:, None], inputs_now.to(embeds.dtype), embeds)
        mask = torch.cat([mask, mask.new_ones(len(views), 1)], dim=1)
        rows = position.expand(len(inputs["position_ids"]), -1)[..., None]
        inputs |= dict(inputs_embeds=embeds[:, None], attention_mask=mask, position_ids=rows,
                       is_image=torch.zeros_like(mask[:, :1]) > 0, levels=inputs["levels"][:0])
        position = position + 1


def answer(asker, scale: LatentScale, latents: int, tokens: int = 112) -> list[dict]:
    """The rival's way to answer (evaluate.Answerer): one record an example."""
    start = asker.vlm.tokenizer.convert_tokens_to_ids(LATENT_START)

    def decode(part: list[data.View], rows: list[int]) -> list[dict]:
        made = generate_latent(asker.vlm, part, asker.store, scale, latents,
                               asker.serializer.end_id, tokens)
        return [dict(text=asker.decode(ids), tokens=len(ids), latents=fed, images=1,
                     passes=len(ids) + fed + ids.count(start)) for ids, fed in made]

    return asker.in_batches(asker.prompts, decode)
