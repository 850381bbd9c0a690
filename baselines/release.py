"""The authors' release of Pearl, where it does otherwise than the core: views, NextLat, predictor.

Each rule is an option of its own; `--recipe release` sets them together. What the release does, and
what no option here takes over, stands in docs/differences.md. tests/test_release.py has the same
rules a second time, one position at a time.
Letters: B batch, T sequence, D hidden size, K predictor tokens, n selected positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import losses
from data import Examples, View, Views, collate
from model import VLM, add_lora
from predictor import Predictor
from support.records import Example

# ---- views --------------------------------------------------------------------------------------


def adapt_views(examples: Examples, taught: list[Example], config) -> None:
    """The views as --supervise_turns, --supervise_layout and --pred_position want them.

    taught: the records that the views were made of. Raises ValueError where the model's template
    cannot have it so, and for a view grown too long.
    """
    wanted = (config.supervise_turns, config.supervise_layout, config.pred_position)
    if wanted == ("all", False, "prompt"):
        return
    serializer, adapted = examples.serializer, []
    told = serializer.conversation([("user", ["Q"]), ("assistant", ["Xyz"])], [])
    layout = told.ids[len(told.until_last_label().ids):]
    asked = serializer.conversation([("user", ["Q"])], [], prompt=True)
    opening = behind_last(asked.ids, serializer.end_id)
    for (full, prompt, target), example in zip(examples.views, taught):
        if config.supervise_turns == "last":
            full = last_turn_only(full, serializer.end_id)
        if config.supervise_layout:
            full = with_layout(full, serializer.end_id, layout)
            serializer.check_length(full, example)
        if config.pred_position == "user_turn":
            prompt = in_user_turn(prompt, serializer.end_id, opening)
        adapted.append(Views(full, prompt, target))
    examples.views = adapted


def behind_last(ids: list[int], end: int) -> list[int]:
    """What stands behind the last `end`; everything if there is none."""
    return ids[len(ids) - ids[::-1].index(end):] if end in ids else ids


def last_turn_only(view: View, end: int) -> View:
    """Supervised: the assistant's last turn alone, so what follows the last but one `end`."""
    # a text that holds the end token is refused, so a label equal to it is the end of a turn
    ends = [n for n, label in enumerate(view.labels) if label == end]
    first = ends[-2] + 1 if len(ends) > 1 else 0
    return view._replace(labels=[-100] * first + view.labels[first:])


def with_layout(view: View, end: int, layout: list[int]) -> View:
    """Supervised too: what the template writes behind an assistant's turn (Qwen: a line break).

    A view is cut at its last end of turn; the layout of that one is put back.
    """
    ids, labels = view.ids + layout, view.labels + [-100] * len(layout)
    for n, label in enumerate(view.labels):
        if label == end:
            if ids[n + 1:n + 1 + len(layout)] != layout:
                raise ValueError("this model's tokenizer joins what stands between two turns with "
                                 "the next one: use --supervise_layout false")
            labels[n + 1:n + 1 + len(layout)] = layout
    return view._replace(ids=ids, labels=labels)


def in_user_turn(view: View, end: int, opening: list[int]) -> View:
    """The input view with [PRED] as the last words of the user's turn, embedded at its end.

    opening: what a prompt has behind that end, up to where the model would speak.
    """
    count = len(view.inject_at)
    asked = view.ids[:len(view.ids) - count]
    # where the user's turn ends in another token, the words of the question stand there too
    if end not in asked or behind_last(asked, end) != opening:
        raise ValueError("this model's chat template does not end the user's turn with the token "
                         "that ends the assistant's: use --pred_position prompt")
    words = asked[:len(asked) - len(opening) - 1]
    ids = words + [end] * (count + 1)  # K placeholders for the [PRED] rows, then the end itself
    inject_at = tuple(range(len(words), len(words) + count))
    return View(ids, [-100] * len(ids), view.images, len(ids) - 1, inject_at)


# ---- Eq. 2 --------------------------------------------------------------------------------------


def nextlat_term(term: Tensor, states: Tensor, forecasts: list[tuple[Tensor, Tensor]],
                 labels: Tensor, vlm: VLM, config) -> Tensor:
    """L_NextLat as --nextlat_mean and --nextlat_token want it; by default `term`, the core's own.

    states (B, T, D), forecasts: see losses.nextlat_loss. labels (B, T), -100 = not supervised.
    """
    if config.nextlat_mean == "examples":
        term = sum(mean_of_means(states, *pair) for pair in forecasts) / len(forecasts)
    if config.nextlat_token != "none":
        head = vlm.lm.lm_head.weight  # (V, D)
        parts = [token_loss(*pair, labels, head, config.nextlat_token) for pair in forecasts]
        term = term + sum(parts) / len(parts)
    return term


def mean_of_means(states: Tensor, forecast: Tensor, at: Tensor) -> Tensor:
    """SmoothL1(sg[h], h^) as a mean over each example's forecasts, then over the batch.

    forecast (n, D), at (B, T) the positions it stands for. An example without any counts as zero.
    """
    gaps = losses.distance(forecast, states[at].detach(), "smoothl1")  # (n)
    row = torch.nonzero(at)[:, 0]  # (n) the example of each
    total = gaps.new_zeros(len(states)).index_add(0, row, gaps)  # (B)
    return (total / at.sum(dim=1).clamp_min(1)).mean()


def token_loss(forecast: Tensor, at: Tensor, labels: Tensor, head: Tensor, which: str) -> Tensor:
    """Cross-entropy of head(h^_p) for forecasts at positions p, where its token is supervised.

    which: "fed", token p, which the latent predictor was given to make h^_p of (the release's);
    "next", token p+1, which the true h_p is trained to predict.
    Gradient: flows to the forecasts, stops at the head.
    """
    if which == "next":
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)  # (B, T)
    wanted, head = labels[at], head.detach()
    keep = wanted != -100
    if not keep.any():
        return forecast.new_zeros(())
    logits = losses.at_least_float32(F.linear(forecast[keep], head.to(forecast.dtype)))
    return F.cross_entropy(logits, wanted[keep])


# ---- what is trained ----------------------------------------------------------------------------


def leave_random(predictor: Predictor, config) -> None:
    """--predictor_weights lora: LoRA on the latent predictor's layers is all of it that trains.

    The release wraps its latent predictor together with the model, which freezes its own weights
    at their random start, and keeps the [PRED] rows in the embedding matrix, which is frozen too.
    """
    if config.predictor_weights != "lora":
        return
    predictor.pred_tokens.requires_grad_(False)
    predictor.latent.mlp[0].eps = 1e-6
    predictor.latent.mlp[-1].reset_parameters()  # frozen at the core's zero it would forecast h_t
    add_lora(predictor.latent, config.lora_rank, config.lora_alpha, config.lora_dropout,
             ["all-linear"])


# ---- its passes, to be timed --------------------------------------------------------------------


def padded_losses(vlm: VLM, predictor: Predictor, examples: Examples, rows: list[int],
                  config) -> losses.Losses:
    """The losses of --recipe release in the passes that the release makes.

    One batch of all three views, padded to one length, with gradient in all; latent predictor and
    head at every position, the head in all three views and once more on the forecasts. This is the
    release without its fused kernels, which spare the logits' memory but not their arithmetic.
    """
    views, count = [examples.views[row] for row in rows], len(rows)
    images = examples.store.encoded([i for three in views for i in three.full.images])
    batch = collate([three[n] for n in range(3) for three in views], vlm.pad_id).to(vlm.device)
    states, inputs, embedding = vlm(batch, images, predictor.pred_tokens.repeat(count, 1))
    wanted = batch.labels[:, 1:]  # (3B, T-1) the token after each position
    wanted[count:] = -100  # a target view's are supervised in the full view
    logits = losses.at_least_float32(vlm.logits(states[:, :-1]))  # (3B, T-1, V)
    vlm_term = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
    _, predicted, target = embedding.split(count)  # (B, D) each
    jepa_term = losses.jepa_loss(predicted, target, "cosine")

    # every position is forecast and decoded; only those before a supervised token count
    full, wanted = states[:count], wanted[:count]
    ahead = predictor.latent(full[:, :-1], inputs[:count, 1:].detach())  # (B, T-1, D)
    counts = wanted != -100
    state_term = mean_of_means(full, ahead[counts], F.pad(counts, (1, 0)))
    decoded = losses.at_least_float32(F.linear(ahead, vlm.lm.lm_head.weight.detach()))
    token_term = F.cross_entropy(decoded.flatten(0, 1), wanted.flatten())
    return losses.Losses(*losses.pearl_loss(vlm_term, jepa_term, state_term + token_term,
                                            config.lambda_latent))
