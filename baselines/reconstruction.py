"""The rival, whole: reconstruction-based latent reasoning (LVR, Mirage; the paper's Fig. 5).

Between two markers the model feeds its own last state back in place of words, as often as the run
has latents; training regresses each latent to a visual embedding of the tool image it stands for.
Letters: B batch, T sequence, D hidden size, P image tokens, n latents of a batch.
Deviation: the markers are tokens of every Qwen-VL vocabulary, so no row has to be added under a
frozen embedding; all others are in docs/differences.md, last section.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import losses
from baselines.variants import Examples, Images, read_all
from data import Trajectories, Views, collate
from model import VLM
from support.chat import Chat, View
from support.images import LoadedImage
from support.files import read_tensors
from support.options import option
from support.records import Example
from train import Pearl

LATENT_START, LATENT_END = "<|vision_start|>", "<|vision_end|>"


class Recon(Pearl):
    """L_VLM + lambda * L_latent, teacher-forced."""

    class Options:
        latents: int = option(0, "per tool image: 0 one per image token (LVR); k chunk means")
        decode_latents: int = option(8, "latents decoded at inference")

    def build_modules(self) -> None:
        vocabulary = self.vlm.tokenizer.get_vocab()
        if missing := {LATENT_START, LATENT_END} - vocabulary.keys():
            raise ValueError(f"--method recon marks its latents with {sorted(missing)[0]}, which "
                             "this model's vocabulary lacks: use a Qwen-VL model")
        zeros = torch.zeros(self.vlm.dim)
        self.predictor = LatentScale(zeros, zeros + 1, torch.ones(()))  # until `prepare`

    @classmethod
    def views(cls, config, chat: Chat, example: Example, images: list[LoadedImage]) -> Views:
        """The full view has the assistant's part as one turn, with latents in place of tool images:
        one for each token of the image (LVR), or --latents (Mirage)."""
        # the other views stay, though this method does not read them
        views, example = super().views(config, chat, example, images), cls.adapt(example, config)
        counts = (config.latents or one.text.count(chat.family.placeholder) for one in images[1:])
        # a latent replaces the embedding of any token, here of one more end marker
        runs = (LATENT_START + LATENT_END * (count + 1) for count in counts)
        text = "".join(step if isinstance(step, str) else next(runs) for step in example.trajectory)
        whole = chat.conversation([chat.turns(example)[0], ("assistant", [text])], images[:1])
        chat.check_length(len(whole.ids), example)
        # the markers of the question's image are not supervised
        end = chat.tokenizer.convert_tokens_to_ids(LATENT_END)
        latents = tuple(n for n, pair in enumerate(pairwise(whole.labels)) if pair == (end, end))
        labels = [-100 if label == end else label for label in whole.labels]
        full = View(whole.ids, labels, [images[0].key], len(labels) - 1, inject_at=latents)
        return views._replace(full=full)

    @torch.no_grad()
    def prepare(self, datasets: list[Trajectories]) -> None:
        """The scale of the training set's tool images."""
        parts = read_all(self, datasets[0], torch.arange(len(datasets[0])))
        embeddings = torch.cat([self.embeddings(*part) for part in parts]).float()
        if not len(embeddings):
            raise ValueError("no trajectory has a tool image, which --method recon reconstructs")
        gain = self.vlm.lm.get_decoder().norm.weight.float()
        self.predictor = LatentScale(embeddings.mean(dim=0), embeddings.std(dim=0).clamp_min(1e-6),
                                     gain.square().mean().sqrt())

    def embeddings(self, batch: Examples, images: Images) -> Tensor:
        """What the latents of a batch stand for, (n, D)."""
        parts = [latent_targets(images[image.key].features[0], self.config.latents)
                 for example in batch for image in example.images[1:]]
        return torch.cat([torch.zeros(0, self.vlm.dim, device=self.vlm.lm.device), *parts])

    def forward(self, batch: Examples) -> losses.Losses:
        images = self.encode_images([image for example in batch for image in example.images])
        latents = self.embeddings(batch, images)
        full = self.vlm(collate([ex.views.full for ex in batch], self.vlm.pad_id), images, latents)
        L_vlm = losses.vlm_loss(full.states, full.padded.labels, self.vlm.lm.lm_head)
        # the state before each latent regresses the embedding that the latent stands for
        before = full.padded.inject_at.roll(-1, dims=1)  # (B, T)
        scale = self.predictor
        ends = full.states[before] / scale.size, (latents - scale.mean) / scale.std  # (n, D)
        # a pass without tool images has nothing to regress, and the mean of nothing is NaN
        recon = losses.reconstruction_loss(*ends) if len(latents) else L_vlm.new_zeros(())
        total = L_vlm + self.config.lambda_latent * recon
        return losses.Losses.of(total, None, vlm=L_vlm, recon=recon)

    @classmethod
    def ways(cls, config, vlm: VLM, checkpoint: Path) -> dict[str, Callable]:
        scale = load_scale(checkpoint, vlm)
        return dict(latent=lambda evaluator: answer(evaluator, scale, config.decode_latents))


def latent_targets(features: Tensor, latents: int) -> Tensor:
    """(P, D) visual embeddings of a tool image -> the same, or the means of `latents` chunks."""
    if not latents:
        return features
    edges = [n * len(features) // latents for n in range(latents + 1)]
    return torch.stack([features[a:max(b, a + 1)].mean(dim=0) for a, b in zip(edges, edges[1:])])


class LatentScale(nn.Module):
    """Visual embeddings and final-layer states brought to one scale.

    Raw visual embeddings have another size in each dimension than any state behind the final norm.
    A latent is therefore regressed in standard units: h / size, with `size` the RMS of the final
    norm's gain, to (v - mean) / std over the training set's tool images v. At inference a state h
    becomes the next input by the inverse, h / size * std + mean.
    """

    file_name = "latents.safetensors"

    def __init__(self, mean: Tensor, std: Tensor, size: Tensor):  # (D), (D), ()
        super().__init__()
        self.mean, self.std, self.size = map(nn.Buffer, (mean, std, size))


def load_scale(checkpoint: Path, vlm: VLM) -> LatentScale:
    return LatentScale(**read_tensors(checkpoint / LatentScale.file_name, vlm.lm.device)[0])


@torch.no_grad()
def generate_latent(evaluator, numbers: list[int], scale: LatentScale, latents: int,
                    tokens: int, instead: Callable | None) -> list[list[int]]:
    """Greedy token ids of these questions, at most `tokens` of each; behind each start marker the
    model is fed `latents` latents.

    A latent is the last state, brought to the scale of an input and fed back in place of a word;
    after the last one the end marker is written. Every row is fed one position a step, a word or a
    latent, so rows in and out of a run share one batch and one KV cache. instead(question's number,
    latent's number, latent (D)) -> (D): what a control feeds (analysis/causal.py).
    """
    vlm, views = evaluator.vlm, [evaluator.questions[n].prompt for n in numbers]
    images = evaluator.encode_images([evaluator.images[n][0] for n in numbers])
    start_marker, end_marker = vlm.tokenizer.convert_tokens_to_ids([LATENT_START, LATENT_END])
    end_id, inputs = vlm.family.end_id, vlm.lm_inputs(collate(views, vlm.pad_id, left=True), images)
    # due: positions up to the model's next word, which are latents, and last the end marker
    cache, words, due = DynamicCache(), [[] for _ in views], [0] * len(views)
    while True:
        out = vlm.family.states(**inputs, past_key_values=cache, use_cache=True)
        state = out.last_hidden_state[:, -1]  # (B, D)
        token_ids = vlm.lm.lm_head(state).argmax(dim=-1).tolist()
        is_latent = torch.tensor([count > 1 for count in due], device=vlm.lm.device)  # (B)
        latent_inputs = state / scale.size * scale.std + scale.mean  # (B, D)
        for row, token in enumerate(token_ids):
            if due[row]:
                token_ids[row] = end_marker
                due[row] -= 1
                if instead and due[row]:
                    # the latent's number in the whole answer
                    k = latents * words[row].count(start_marker) - due[row]
                    latent_inputs[row] = instead(numbers[row], k, latent_inputs[row])
            elif words[row][-1:] != [end_id] and len(words[row]) < tokens:
                words[row].append(token)
                due[row] = latents + 1 if token == start_marker else 0
        if not any(due) and all(row[-1] == end_id or len(row) == tokens for row in words):
            return words
        embeds = vlm.lm.get_input_embeddings()(torch.tensor(token_ids, device=vlm.lm.device))
        embeds = torch.where(is_latent[:, None], latent_inputs.to(embeds.dtype), embeds)
        mask = nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        # each row counts on from its largest position
        position = inputs["position_ids"].amax(dim=(0, 2), keepdim=True) + 1  # (1, B, 1)
        inputs |= dict(inputs_embeds=embeds[:, None], attention_mask=mask,
                       position_ids=position.expand_as(inputs["position_ids"][..., :1]),
                       is_image=torch.zeros_like(is_latent)[:, None], levels=inputs["levels"][:0])


def answer(evaluator, scale: LatentScale, latents: int, instead: Callable | None = None,
           tokens: int = 112) -> list[dict]:
    """The rival's way to answer: one dict per example (evaluate.Evaluator)."""
    start = evaluator.vlm.tokenizer.convert_tokens_to_ids(LATENT_START)
    views, results = [q.prompt for q in evaluator.questions], [{}] * len(evaluator.questions)
    for numbers in evaluator.batches(views):
        rows = generate_latent(evaluator, numbers, scale, latents, tokens, instead)
        for n, ids in zip(numbers, rows):
            runs = ids.count(start)  # each of so many latents and the end marker
            results[n] = dict(text=evaluator.decode(ids), tokens=len(ids), latents=latents * runs,
                              images=1, passes=len(ids) + (latents + 1) * runs)
    return results
