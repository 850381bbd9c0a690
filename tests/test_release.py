"""Claims: `--recipe release` computes what the authors' release computes. Its rules are written
out a second time below, one example and one position at a time, from whole conversations rendered
as text, with transformers' own forward pass, one unpadded pass a view; every term and every
gradient is equal in float64, and with any single rule left out it is not."""

import copy
import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from baselines import release, variants
from checkpoints import build
from model import VLM
from predictor import Predictor
from support import options, run_folder
from support.files import read_tensors
from support.images import opened
from support.run_folder import best_checkpoint
from world import scenes

PAD = "<|image_pad|>"
PREDS = [f"<|predictor_{k}|>" for k in (4, 3, 2, 1)]  # the highest number first
TURN = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>\n)", re.DOTALL)


# ---- the release's rules, a second time ---------------------------------------------------------


class GrownEmbedding(nn.Module):
    """The vocabulary's rows and, after them, one for each [PRED] token: as if they stood in it."""

    def __init__(self, base: nn.Embedding, rows: torch.Tensor):
        super().__init__()
        self.base, self.rows, self.weight = base, [rows], base.weight

    def forward(self, ids):
        return F.embedding(ids, torch.cat([self.base.weight, self.rows[0]]))


def conversation(example):
    """A user turn of image and question; then one of the assistant a text, of the user an image."""
    turns = [("user", [example.image, example.question])]
    return turns + [("assistant" if isinstance(step, str) else "user", [step])
                    for step in example.trajectory]


def tokens(vlm, tokenizer, turns):
    """(text, ids, the characters (start, end) of each, images) of a whole conversation."""
    processor = vlm.family.processor
    images = [processor(images=[opened(part)], return_tensors="pt")
              for _, content in turns for part in content if not isinstance(part, str)]
    messages = []
    for role, content in turns:
        parts = [dict(type="text", text=part) if isinstance(part, str) else dict(type="image")
                 for part in content]
        messages.append(dict(role=role, content=parts))
    pieces = tokenizer.apply_chat_template(messages, tokenize=False).split(PAD)
    text = pieces[0]
    for image, piece in zip(images, pieces[1:], strict=True):
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


def supervised(text, offsets, turns):
    """For each token whether it is the assistant's: words, <|im_end|>, the line break after it."""
    spans = [match.span(1) for match in TURN.finditer(text)]
    spans = spans[-1:] if turns == "last" else spans
    return [any(a <= start and end <= b for a, b in spans) for start, end in offsets]


def affine(layer, x):
    """What a linear layer makes of x, its low-rank part added."""
    base = layer if isinstance(layer, nn.Linear) else layer.base
    y = base.weight @ x + base.bias
    return y if base is layer else y + layer.scaling * (layer.lora_B @ (layer.lora_A @ x))


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


def words_and_states(vlm, tokenizer, predictor, example, turns):
    """Of each supervised token: -log p of it, the forecast state's distance, -log p by that."""
    words, distances, decoded = [], [], []
    text, ids, offsets, images = tokens(vlm, tokenizer, conversation(example))
    states, logits = run(vlm, ids, images)
    learn = supervised(text, offsets, turns)
    table, head = vlm.lm.get_input_embeddings().weight, vlm.lm.lm_head.weight.detach().clone()
    for t in range(len(ids) - 1):
        if learn[t + 1]:
            words.append(nll(logits[t], ids[t + 1]))
            ahead = forecast(predictor.latent.mlp, states[t], table[ids[t + 1]].detach())
            distances.append(smooth_l1(ahead, states[t + 1].detach()))
            decoded.append(nll(head @ ahead, ids[t + 1]))  # the token that it was told
    return words, distances, decoded


def embeddings(vlm, tokenizer, example):
    """(h^_R, h_R): each the state of the last token but one, the <|im_end|> before a line break."""
    spare = {tokenizer.convert_tokens_to_ids(name): len(vlm.lm.get_input_embeddings().weight) + n
             for n, name in enumerate(PREDS)}
    (role, content), *rest = conversation(example)
    _, ids, _, images = tokens(vlm, tokenizer, [(role, [*content, "".join(PREDS)])])
    guess = run(vlm, [spare.get(token, token) for token in ids], images)[0][-2]
    _, ids, _, images = tokens(vlm, tokenizer, [(role, [example.image]), *rest])
    return guess, run(vlm, ids, images)[0][-2].detach()


def naive_terms(vlm, predictor, examples, turns="all"):
    """The release's terms over a batch: vlm, jepa, state and token."""
    tokenizer, table = copy.deepcopy(vlm.tokenizer), vlm.lm.get_input_embeddings()
    tokenizer.add_special_tokens(dict(additional_special_tokens=PREDS))
    vlm.lm.set_input_embeddings(GrownEmbedding(table, predictor.pred_tokens))
    words, jepa, state, decoded = [], [], [], []
    try:
        for example in examples:
            said, distances, named = words_and_states(vlm, tokenizer, predictor, example, turns)
            guess, seen = embeddings(vlm, tokenizer, example)
            words, decoded = words + said, decoded + named  # means over the batch's tokens
            state.append(sum(distances) / len(distances))  # a mean over the example's
            jepa.append(1 - guess @ seen / (guess.norm() * seen.norm()))
    finally:
        vlm.lm.set_input_embeddings(table)
    return {name: sum(values) / len(values)
            for name, values in dict(vlm=words, jepa=jepa, state=state, token=decoded).items()}


# ---- the same by --recipe release ---------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    """Three trajectories with one, two and three tool images: turns, texts and lengths differ."""
    world = scenes.make_world("all", "train", 12, seed=3)
    return [world[0], world[2], world[5]]


def adapted(vlm):
    """The model with LoRA on every linear layer, off its zero start, in float64."""
    vlm.set_trainable(4, 8.0, 0.0, ["all-linear"], True)
    vlm.lm.double()
    for name, p in vlm.lm.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(p, std=0.05)
    return vlm


@pytest.fixture
def adapted64(vlm64):
    return adapted(vlm64)


def released(*options):
    return train.parse_config(["--recipe", "release", "--device", "cpu", *options])


def new_predictor(vlm, config):
    torch.manual_seed(1)  # the same at every call
    predictor = Predictor(vlm.dim, config.pred_tokens, torch.randn(vlm.dim)).double()
    release.leave_random(predictor, config)
    return predictor.double()


def ours(vlm, rows, *options):
    """Config, examples and predictor of a run by the recipe, with the predictor's all to train."""
    config = released("--predictor_weights", "trained", *options)
    examples = train.prepared(rows, vlm, config)
    predictor = new_predictor(vlm, config)
    predictor.latent.mlp[0].eps = 1e-6
    nn.init.normal_(predictor.latent.mlp[-1].weight, std=0.2)  # off its zero start
    return config, examples, predictor


def terms(vlm, rows, *options):
    """Our terms by name; the token term is what NextLat has more with it than without."""
    config, examples, predictor = ours(vlm, rows, *options)
    without = dataclasses.replace(config, nextlat_token="none")
    with torch.no_grad():
        parts = train.compute_losses(vlm, predictor, examples, [0, 1, 2], config)[1]
        state = train.compute_losses(vlm, predictor, examples, [0, 1, 2], without)[1]["nextlat"]
    return dict(vlm=parts["vlm"], jepa=parts["jepa"], state=state, token=parts["nextlat"] - state)


@pytest.mark.parametrize("packed", ["true", "false"])
@pytest.mark.parametrize("turns", ["all", "last"])
def test_every_term_and_gradient_is_the_releases(adapted64, rows, packed, turns):
    options = ("--packed", packed, "--supervise_turns", turns)
    config, examples, predictor = ours(adapted64, rows, *options)
    learned = [p for module in (adapted64, predictor) for p in module.parameters()
               if p.requires_grad]
    naive = naive_terms(adapted64, predictor, rows, turns)
    for name, value in terms(adapted64, rows, *options).items():
        assert float(value) == pytest.approx(naive[name].item(), rel=1e-12), name
    total = naive["vlm"] + 0.2 * (naive["jepa"] + naive["state"] + naive["token"])
    loss = train.compute_losses(adapted64, predictor, examples, [0, 1, 2], config)[0]
    assert loss.item() == pytest.approx(total.item(), rel=1e-12)
    for one, other in zip(torch.autograd.grad(loss, learned), torch.autograd.grad(total, learned)):
        size = float(other.abs().max())
        assert size > 0
        # transformers' norms compute in float32, so two orders of summing differ by its rounding
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_so_they_are_with_every_generation_of_qwen_vl(name, rows, tmp_path):
    """With a template that begins with a system turn, or features that enter between layers."""
    vlm = VLM(build(name, tmp_path / name), dtype=torch.float64)
    test_every_term_and_gradient_is_the_releases(adapted(vlm), rows, "true", "all")


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
    left = [name for name, module in adapted64.lm.named_modules()
            if isinstance(module, nn.Linear) and not name.endswith(".base")]
    assert left == ["lm_head"]


def test_what_the_release_leaves_random_stays_so(vlm64, rows):
    config = released()
    examples = train.prepared(rows, vlm64, config)
    vlm64.set_trainable(4, 8.0, 0.0, ["all-linear"], True)
    predictor = new_predictor(vlm64, config)
    learned = {name for name, p in predictor.named_parameters() if p.requires_grad}
    assert learned == {f"latent.mlp.{n}.lora_{part}" for n in (1, 3, 5) for part in "AB"}
    assert predictor.latent.mlp[0].eps == 1e-6
    assert predictor.latent.mlp[5].base.weight.abs().min() > 0
    before = {name: p.clone() for name, p in predictor.named_parameters()}
    step = train.Step(vlm64, predictor, examples, config)
    optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=0.1)
    step([0, 1, 2])[0].backward()
    optimizer.step()
    moved = {name for name, p in predictor.named_parameters() if not torch.equal(p, before[name])}
    assert moved == learned


def supervised_words(vlm, rows, config):
    return [vlm.tokenizer.decode([label for label in views.full.labels if label != -100])
            for views in train.prepared(rows, vlm, config).views]


def test_the_line_break_after_every_turn_is_supervised(vlm64, rows):
    assert supervised_words(vlm64, rows, released()) == [
        "".join(f"{text}<|im_end|>\n" for text in example.texts) for example in rows]
    assert supervised_words(vlm64, rows, released("--supervise_turns", "last")) == [
        f"{example.texts[-1]}<|im_end|>\n" for example in rows]


@pytest.mark.parametrize("count", [0, 1, 4])
def test_pred_stands_inside_the_user_turn(vlm64, rows, count):
    config = released("--pred_tokens", str(count))
    view = train.prepared(rows, vlm64, config).views[0].input
    end = vlm64.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert view.ids[view.embed_at] == end and view.embed_at == len(view.ids) - 1
    assert view.inject_at == tuple(range(view.embed_at - count, view.embed_at))
    asked = vlm64.tokenizer.decode(view.ids[:view.embed_at - count])
    assert asked.endswith(rows[0].question)


OPEN_TURNS = """
{%- for m in messages -%}
  {{- 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' -}}
  {%- for part in m['content'] -%}
    {{- '<|image_pad|>' if part['type'] == 'image' else part['text'] -}}
  {%- endfor -%}
  {{- ' ' if m['role'] == 'user' else '<|im_end|>' -}}
{%- endfor -%}
{{- 'ASSISTANT: ' if add_generation_prompt -}}"""


def test_pred_in_the_user_turn_needs_a_turn_that_ends(vlm64, rows):
    vlm64.family.template = OPEN_TURNS
    train.prepared(rows, vlm64, released("--pred_position", "prompt"))
    with pytest.raises(ValueError, match="--pred_position prompt"):
        train.prepared(rows, vlm64, released())


def test_supervising_the_layout_counts_against_the_limit(vlm64, rows):
    longest = max(len(v.full.ids) for v in train.prepared(rows, vlm64, released()).views)
    train.prepared(rows, vlm64, released("--max_tokens", str(longest)))
    with pytest.raises(ValueError, match=f"{longest} tokens, the limit is {longest - 1}"):
        train.prepared(rows, vlm64, released("--max_tokens", str(longest - 1)))


@pytest.mark.parametrize("which, offset", [("fed", 0), ("next", 1)])
def test_the_token_term_equals_a_loop_and_spares_the_head(which, offset):
    torch.manual_seed(0)
    states, head = torch.randn(3, 6, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    at = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 0, 1, 1], [0, 1, 0, 0, 0, 1]]).bool()
    labels = torch.where(at, torch.randint(0, 7, at.shape), -100)
    value = release.token_loss(states[at], at, labels, head, which)
    naive = [nll(head.detach() @ states[b, p], labels[b, p + offset])
             for b in range(3) for p in range(6 - offset)
             if at[b, p] and labels[b, p + offset] >= 0]
    torch.testing.assert_close(value, sum(naive) / len(naive))
    value.backward()
    assert states.grad.abs().sum() > 0 and head.grad is None
    nothing = release.token_loss(states[at], at, torch.full_like(labels, -100), head, which)
    assert nothing == 0


def test_the_timed_passes_have_the_recipes_numbers(adapted64, rows):
    config, examples, predictor = ours(adapted64, rows)
    learned = [p for module in (adapted64, predictor) for p in module.parameters()
               if p.requires_grad]
    found = [compute(adapted64, predictor, examples, [0, 1, 2], config)[0]
             for compute in (release.padded_losses, train.compute_losses)]
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-12)
    for one, other in zip(*(torch.autograd.grad(loss, learned) for loss in found)):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(other.abs().max()))


def test_calls_are_stripped_and_what_they_gave_stays(rows):
    taught = variants.as_taught(rows, released("--strip_calls"))
    for example, plain in zip(rows, taught):
        assert "[" in example.texts[0] and not any("[" in text for text in plain.texts)
        assert plain.images == example.images and plain.texts[-1] == example.texts[-1]
    assert taught[0].texts[0] == "Highlight the dotted bars."
    assert variants.as_taught(rows, released()) == rows


# ---- the recipe as an option --------------------------------------------------------------------


def test_an_option_beside_the_recipe_wins():
    config = released("--lr", "1e-3", "--pred_position", "prompt")
    assert (config.lr, config.pred_position, config.nextlat_token) == (1e-3, "prompt", "fed")


@pytest.mark.parametrize("written, meant, corrected", [
    ("--nextlat_token", "next", False), ("--nextlat_token=True", "next", True),
    ("--nextlat-token=false", "none", True), ("--nextlat_token=fed", "fed", False)])
def test_the_old_spelling_is_understood_and_corrected(written, meant, corrected, capsys):
    assert train.parse_config([written]).nextlat_token == meant
    said = capsys.readouterr().err
    assert (f"is written --nextlat_token {meant} now" in said) == corrected


def test_frozen_random_weights_need_lora(capsys):
    with pytest.raises(SystemExit):
        released("--lora_rank", "0")
    assert "--predictor_weights lora needs --lora_rank above 0" in capsys.readouterr().err


PAGE = (train.Path(train.__file__).parent / "docs" / "differences.md").read_text(encoding="utf-8")


def test_the_page_names_what_the_recipes_set_and_what_they_leave():
    """Every option of the first two tables is set by the release's recipe or said not to be."""
    tables = PAGE.partition("## What `--recipe release` still does otherwise")[0]
    named = {name for line in tables.splitlines() if line.startswith("|")
             for name in re.findall(r"`--(\w+)", line.rpartition(" | ")[2])}
    left = {"supervise_turns", "batch", "accumulate", "steps", "packed"}
    assert named == options.RECIPES["release"].keys() - {"order"} | left
    assert options.RECIPES["paper"].keys() < named
    for name in left - {"packed"}:
        assert f"--{name} " in tables.partition("COMMON=")[2], name


def weights(run):
    """All tensors of a finished run's best checkpoint."""
    folder = run / best_checkpoint(run)["checkpoint"]
    files = sorted(folder.glob("*.safetensors"))
    assert [file.name for file in files] == ["adapter_model.safetensors", Predictor.file_name]
    return {f"{file.name} {name}": tensor for file in files
            for name, tensor in read_tensors(file)[0].items()}


def test_a_run_by_the_recipe_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """The weights that stay random are in no state: they are drawn again from the seed."""
    small = dict(steps=4, batch=2, train_examples=6, valid_examples=2, test_per_family=1,
                 lora_rank=2, eval_every=4, save_every=2, log_every=1, lr="1e-3", workers=0)
    given = [word for name, value in small.items() for word in (f"--{name}", str(value))]
    train.train(released(*given, "--out", str(tmp_path / "whole")))
    steps = iter([False, True])
    with monkeypatch.context() as patch:
        patch.setattr(train.processes, "asked_to_stop", lambda world, device: next(steps))
        train.train(released(*given, "--out", str(tmp_path / "parts")))
    assert not (tmp_path / "parts" / "results.json").exists()
    train.train(run_folder.read_config(train.Config, [str(tmp_path / "parts")]), resume=True)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and any("visual.merger" in name for name in whole)
    assert f"{Predictor.file_name} latent.mlp.5.lora_B" in whole
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
