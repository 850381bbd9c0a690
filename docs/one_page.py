"""Pearl (arXiv:2604.08065) on one page, with no other file of ours: `python docs/one_page.py DIR`.

An expert answers a question about an image with a tool: where to look, the crop, the answer. Pearl
trains a vision-language model on such trajectories R for use without the tool: from image I0 and
question Q alone, it also learns to predict the embedding of R. LAMBDA = 0 is SFT; which of the two
forgets less here changes with LR and seed. h: a final-layer state, h^: its prediction; detach():
sg, the stop-gradient; B batch, T tokens, D hidden size, V vocabulary, P image tokens, n learned.
"""

import json
import sys
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

K, LAMBDA, STEPS, BATCH, LR = 4, 5.0, 150, 16, 3e-4  # the paper has lambda 0.2, for larger models
FOLDER, MODEL = Path(*sys.argv[1:2]), Path(__file__).resolve().parent.parent / "tiny-vlm"

# The VLM: a vision tower makes P embeddings of an image, a causal language model reads and writes.
vlm, tokenizer, processor = (kind.from_pretrained(MODEL) for kind in (
    AutoModelForImageTextToText, AutoTokenizer, AutoImageProcessor))
words, D = vlm.get_input_embeddings(), vlm.config.text_config.hidden_size
IMAGE, PRED = vlm.config.image_token_id, vlm.config.video_token_id  # no videos: [PRED] has this id

# What Pearl adds while it trains, and drops afterwards. First K input embeddings, [PRED]: they
# start at the token that ends a turn, whose state they must predict, plus noise that differs.
torch.manual_seed(0)
end = words.weight[tokenizer.eos_token_id].detach()  # (D)
pred = nn.Parameter(end + 0.1 * end.square().mean().sqrt() * torch.randn(K, D))  # (K, D)
# Then the latent predictor of Eq. 2: h_t and the next token's embedding (2 D) -> h_{t+1} - h_t (D).
latent = nn.Sequential(nn.LayerNorm(2 * D), nn.Linear(2 * D, D), nn.GELU(),
                       nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
nn.init.zeros_(latent[-1].weight), nn.init.zeros_(latent[-1].bias)  # first forecast: no change


@cache  # the vision tower stays frozen, so each image is encoded once
def features(file):
    """An image as the language model reads it, (P, D), and its patches (1, height, width)."""
    inputs = processor(images=[Image.open(FOLDER / file).convert("RGB")], return_tensors="pt")
    return vlm.get_image_features(**inputs).pooler_output[0].detach(), inputs["image_grid_thw"]


def turn(step):
    """A step of R, or a record's <I0, Q>, in Qwen's chat format: pairs (token id, label)."""
    if "image" in step:  # the question, and what a tool gives back: read, never learned
        image = "<|image_pad|>" * len(features(step["image"])[0])
        role, text = "user", f"<|vision_start|>{image}<|vision_end|>{step.get('question', '')}"
    else:  # the expert's words: learned, with the token that ends the turn
        role, text = "assistant", step["text"]
    parts = [f"<|im_start|>{role}\n", text + "<|im_end|>", "\n"]
    return [(token, token if role == "assistant" and n == 1 else -100)
            for n, part in enumerate(parts) for token in tokenizer(part).input_ids]


def views(record):
    """Full view <I0, Q, R>, prompt <I0, Q> [PRED] x K, target view R; each with its image files."""
    files = [step["image"] for step in (record, *record["trajectory"]) if "image" in step]
    ask, R = turn(record), sum(map(turn, record["trajectory"]), [])[:-1]  # R ends at <|im_end|>
    preds = turn(dict(text="<|video_pad|>" * K))[:-2]  # where the assistant would begin to speak
    return dict(full=(ask + R, files), prompt=(ask + preds, files[:1]), target=(R, files[1:]))


def encode(batch):
    """Enc: views -> labels (B, T), states (B, T, D), states of the last tokens (B, D)."""
    ids, labels = pad_sequence([torch.tensor(view) for view, _ in batch], True, -100).unbind(-1)
    mask, ids = (ids != -100).long(), ids.clamp(min=0)  # all (B, T); 1: a token, 0: padding
    images, grids = zip(*(features(file) for _, files in batch for file in files))
    # image tokens and [PRED] are no words: the tower and `pred` give their embeddings, (B, T, D)
    inputs = words(ids).masked_scatter((ids == IMAGE)[..., None], torch.cat(images))
    inputs = inputs.masked_scatter((ids == PRED)[..., None], pred.repeat(len(batch), 1))
    positions, _ = vlm.model.get_rope_index(  # (3, B, T): time, height, width
        ids, (ids == IMAGE).int(), torch.cat(grids), attention_mask=mask)
    states = vlm.model.language_model(
        inputs_embeds=inputs, position_ids=positions, attention_mask=mask).last_hidden_state
    return labels, states, states[range(len(batch)), mask.sum(dim=1) - 1]


def losses(batch, h_R):
    """The losses of a batch of records' views; h_R (B, D): the embeddings of their trajectories."""
    labels, states, _ = encode([record["full"] for record in batch])
    learned = labels[:, 1:] != -100  # (B, T-1) True: the next token is the expert's
    token, h, h_next = labels[:, 1:][learned], states[:, :-1][learned], states[:, 1:][learned]
    # Eq. 3: -log p(token | <I0, Q> and all before it); states (n, D) become logits (n, V)
    L_vlm = F.cross_entropy(vlm.lm_head(h), token)
    # Eq. 1: D(h^_R, sg[h_R]), (B, D); h^_R is the state of the last [PRED]. D is SmoothL1 in the
    # paper's text and 1 - cosine in its authors' code. The gradient flows to h^_R alone.
    *_, prediction = encode([record["prompt"] for record in batch])
    L_jepa = (1 - F.cosine_similarity(prediction, h_R.detach(), dim=-1)).mean()
    # Eq. 2, d = 1: SmoothL1(sg[h_{t+1}], h^_{t+1}), (n, D). The gradient flows to h_t and to the
    # latent predictor: the next state and the words must not become easier to forecast.
    forecast = h + latent(torch.cat([h, words(token).detach()], dim=-1))
    L_nextlat = F.smooth_l1_loss(forecast, h_next.detach())
    total = L_vlm + LAMBDA * (L_jepa + L_nextlat)  # Eq. 4
    return dict(vlm=L_vlm, jepa=L_jepa, nextlat=L_nextlat, total=total)


@torch.no_grad()
def accuracy(records):
    """Inference, in %: <I0, Q> and the VLM alone; no tool, no [PRED], no latent predictor."""
    right = 0
    for record in records:  # the option with the largest log-probability behind "Answer:"
        answers = [(turn(record) + turn(dict(text=f"Answer: {option}")), [record["image"]])
                   for option in record["options"]]
        labels, states, _ = encode(answers)
        logits = vlm.lm_head(states[:, :-1]).transpose(1, 2)  # (options, V, T-1)
        loss = F.cross_entropy(logits, labels[:, 1:], reduction="none").sum(dim=1)  # (options)
        right += record["options"][loss.argmin()] == record["answer"]
    return 100 * right / len(records)


if __name__ == "__main__":
    if not (FOLDER / "trajectories.jsonl").is_file():
        sys.exit("Name a data folder: `python -m world.loader --out DIR --count 400` writes one.")
    records = [json.loads(line) for line in (FOLDER / "trajectories.jsonl").open(encoding="utf-8")]
    train = [views(record) for record in records if record["split"] == "train"]
    test = [record for record in records if record["split"] == "test"]
    before = accuracy(test)
    # h_R = Enc(R) by the starting model; the current model's, as in the paper, collapse here
    h_R = torch.cat([encode([record["target"]])[-1].detach() for record in train])  # (records, D)
    optimizer = torch.optim.AdamW([*vlm.parameters(), pred, *latent.parameters()], lr=LR)
    for step in range(1, STEPS + 1):
        rows = torch.randperm(len(train))[:BATCH]
        parts = losses([train[row] for row in rows], h_R[rows])
        optimizer.zero_grad()
        parts["total"].backward()
        optimizer.step()
        if step % 25 == 0:
            print(f"step {step:3}", *(f"{name} {loss.item():.3f}" for name, loss in parts.items()))
    print(f"direct accuracy of {len(test)}: {before:.1f}% before, {accuracy(test):.1f}% after")
