"""Pearl as the paper's text describes it, and as its authors' code does it: docs/differences.md
lists all rules of the release, and those that no option takes over.
Letters: B batch, T sequence, D hidden size, V vocabulary, K predictor tokens, n forecasts.
"""

from dataclasses import replace
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

import losses
from baselines.variants import Current, Dropout
from data import Views
from model import Encoded
from support.chat import Chat, View
from support.adapters import add_lora
from support.images import LoadedImage
from support.options import option
from support.records import Example


class Paper(Current):
    """The paper's text: SmoothL1, the current model's h_R, Eq. 2 along R, lambda 0.2. SmoothL1 did
    not make the reported numbers; the cosine did."""

    class Options:
        lambda_latent: float = option(0.2, "lambda of Eq. 4")
        distance: Literal["cosine", "smoothl1", "mse", "l2"] = option("smoothl1", "D of Eq. 1")

    sees_next, target_needs_grad = False, True

    def nextlat(self, full: Encoded, target: Encoded) -> Tensor:
        # Eq. 2 along R read alone, where any token may be predicted
        labels = target.padded.ids.masked_fill(~target.padded.mask, -100)
        views = replace(target.padded, labels=labels)
        return super().nextlat(target._replace(padded=views), target)


class Release(Dropout, Current):
    """The authors' code: other views, means and modules."""

    class Options:
        lambda_latent: float = option(0.2, "lambda of Eq. 4")
        lr: float = option(1e-5, "peak learning rate, for billions of parameters")
        train_vision: bool = option(True, "LoRA on the vision tower too")
        warmup: float = option(0.05, "share of the steps with a rising rate (PixelReasoner: 0.3)")
        weight_decay: float = option(0.1, "of AdamW")
        # its single rules, so that a study can leave one out
        target_image: bool = option(True, "the target view has I0 too, in a turn without Q")
        pred_in_user_turn: bool = option(True, "[PRED] as the last words of the user's turn")
        supervise_layout: bool = option(True, "the line break behind a turn is learned too")
        supervise_turns: Literal["all", "last"] = option("all", "last: the answer's (LVR data)")
        nextlat_mean: Literal["tokens", "examples"] = option(
            "examples", "of Eq. 2: over all t, or over an example's t and then over the batch")
        nextlat_token: Literal["none", "fed", "next"] = option(
            "fed", "decode h^_{t+1} too: to the token that it was given (t+1), or to the next one")
        predictor_weights: Literal["trained", "lora"] = option(
            "lora", "the latent predictor is random but for LoRA, the [PRED] rows as they start")

    def build_modules(self) -> None:
        super().build_modules()
        self.warmup, self.weight_decay = self.config.warmup, self.config.weight_decay
        latent, rank = self.predictor.latent, self.config.lora_rank
        if self.config.predictor_weights == "lora":
            if not rank:
                raise ValueError("--predictor_weights lora needs --lora_rank above 0")
            # The release puts LoRA on the latent predictor too, so its own weights stay at their
            # random start; and its [PRED] rows are words of the vocabulary, which is frozen.
            self.predictor.pred_embeddings.requires_grad_(False)
            latent.mlp[0].eps = 1e-6
            # frozen at the core's zero, it would predict h_t itself
            latent.mlp[-1].reset_parameters()
            add_lora(latent, rank, 2.0 * rank, self.lora_dropout)

    @classmethod
    def views(cls, config, chat: Chat, example: Example, images: list[LoadedImage]) -> Views:
        full, prompt, target = super().views(config, chat, example, images)
        example = cls.adapt(example, config)
        if config.target_image:
            # the conversation without the question's text: R behind a user turn with I0 alone
            whole = chat.conversation([("user", [example.image]), *chat.turns(example)[1:]], images)
            target = View(whole.ids, whole.labels, full.images, len(whole.ids) - 1)
        if config.supervise_turns == "last":
            # what follows the last but one end of a turn; no text may hold that token
            ends = [n + 1 for n, label in enumerate(full.labels) if label == chat.end_id]
            first = [0, *ends][-2]
            full = full._replace(labels=[-100] * first + full.labels[first:])
        if config.supervise_layout:
            # what the template writes behind an assistant's turn (Qwen: a line break); behind the
            # last one, the view was cut
            ids = chat.conversation(chat.turns(example), images, layout=True).ids
            layout = len(ids) - len(full.ids)
            labels = full.labels + [-100] * layout
            for n, label in enumerate(full.labels, start=1):
                if label == chat.end_id:
                    labels[n:n + layout] = ids[n:n + layout]
            full = full._replace(ids=ids, labels=labels)
        if config.pred_in_user_turn:
            prompt = in_user_turn(chat, example, images, config.pred_tokens)
        for view in (full, target):
            chat.check_length(len(view.ids), example)
        return Views(full, prompt, target)

    def nextlat(self, full: Encoded, target: Encoded) -> Tensor:
        """Gradient: flows to the forecasts, stops at the states and the head that judge them."""
        term, config = super().nextlat(full, target), self.config
        states, labels = full.states, full.padded.labels  # (B, T, D), (B, T)
        forecasts = self.predictor.latent.forecasts(states, full.input_embeddings, labels != -100,
                                                    config.horizon)
        # labels[where] below: the token that h^ was made with (position p, the release's), or with
        # "next" the one behind it, which the true state of p is trained to predict
        if config.nextlat_token == "next":
            labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        head = self.vlm.lm.lm_head.weight.detach()  # (V, D)
        means, decoded = [], []
        for forecast, where in forecasts:  # (n, D), and the mask (B, T) of its positions
            if config.nextlat_mean == "examples":
                gaps = losses.distance(forecast, states[where].detach(), "smoothl1")  # (n)
                gaps = gaps.new_zeros(where.shape).masked_scatter(where, gaps)  # (B, T)
                # an example without any forecast counts as zero
                means.append((gaps.sum(dim=1) / where.sum(dim=1).clamp_min(1)).mean())
            if config.nextlat_token != "none":
                logits = losses.at_least_float32(F.linear(forecast, head.to(forecast.dtype)))
                total = F.cross_entropy(logits, labels[where], reduction="sum")
                decoded.append(total / (labels[where] != -100).sum().clamp_min(1))
        term = sum(means) / len(means) if means else term
        return term + (sum(decoded) / len(decoded) if decoded else 0)


def in_user_turn(chat: Chat, example: Example, images: list[LoadedImage], count: int) -> View:
    """The input view with [PRED] as the last words of the user's turn, embedded at its end."""
    # end tokens behind the question are placeholders for the K [PRED] rows
    question, end = example.question + chat.family.end_token * count, chat.end_id
    prompt = chat.prompt([("user", [example.image, question])], images[:1])
    last = max((n for n, token in enumerate(prompt.ids) if token == end), default=0)
    if prompt.ids[:last + 1][-count - 1:] != [end] * (count + 1):
        raise ValueError("this model's chat template does not end the user's turn with the token "
                         "that ends the assistant's: use --pred_in_user_turn false")
    return prompt._replace(ids=prompt.ids[:last + 1], labels=prompt.labels[:last + 1],
                           state_at=last, inject_at=tuple(range(last - count, last)))
