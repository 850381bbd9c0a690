"""Claims: the states of the table are those that training would predict; the rule recommends what
its words say; a language model reads R as a target view; nothing is overwritten."""

import sys
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import train
from analysis import states, targets, text_model
from analysis.states import State
from world import scenes

from test_cures import naive_state

TEMPLATE = ("{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s> {% endfor %}"
            "{% if add_generation_prompt %}<s>assistant {% endif %}")


def test_the_states_of_the_table_are_those_of_training(shipped, mixed, config):
    """Each against one example alone, and transformers' own list; the answer's share of the last
    end is that of the report without --layers."""
    config.batch = 3
    found = states.of_model(config, mixed[:4])
    layers = len(shipped.lm.get_decoder().layers)
    assert set(found) == {(n, p) for n in range(layers + 1) for p in states.POSITIONS}
    examples = train.prepared(mixed[:4], shipped, config)
    with torch.no_grad():
        for (layer, position), h in found.items():
            config.target_layer = -1 if layer == layers else layer
            config.target_position = position
            for row in range(4):
                torch.testing.assert_close(h[row], naive_state(shipped, examples, row, config),
                                           rtol=1e-4, atol=1e-4)


def test_without_a_tool_image_there_is_no_mean_over_its_tokens(mixed, config):
    bare = [example.answer_only("Answer:") for example in mixed[:2]]
    assert {position for _, position in states.of_model(config, bare)} == {"end", "word", "words"}


def test_the_centred_shares_are_those_of_what_is_left():
    """A large common vector hides the answer; taken off, the answer is all there is."""
    world = [SimpleNamespace(task="f", answer=str(n % 2)) for n in range(40)]
    h = torch.tensor([[10.0, 1, 0], [10.0, -1, 0]]).repeat(20, 1)
    [row] = states.measured({(1, "end"): h}, world)
    assert row.shares["answer"] == pytest.approx(1 / 101)
    assert row.centred["answer"] == pytest.approx(1) and row.centred["common"] < 1e-9
    assert row.gauges["mean_cosine"] > 0.97
    assert row.excess == row.shares["answer"] - row.shares["answer_by_chance"]


def row_of(layer, position, answer, chance=0.0, cosine=0.5, rank=9.0):
    found = dict(common=0.1, family=0.2, answer=answer, rest=0.1, answer_by_chance=chance)
    return State(layer, position, found, dict(found, answer=0.9),
                 dict(mean_cosine=cosine, effective_rank=rank))


@pytest.mark.parametrize("rows, best", [
    ([row_of(1, "word", 0.9), row_of(2, "end", 0.2), row_of(4, "end", 0.1)], (2, "end")),
    ([row_of(2, "end", 0.3, chance=0.2), row_of(4, "word", 0.2)], (4, "word")),
    ([row_of(2, "end", 0.5, cosine=0.98), row_of(4, "word", 0.2)], (4, "word")),
    ([row_of(2, "end", 0.5, rank=2.0), row_of(4, "word", 0.2)], (4, "word")),
    ([row_of(2, "end", 0.5, cosine=0.98), row_of(4, "word", 0.2, rank=1.0)], (2, "end")),
    ([row_of(3, "end", 0.2), row_of(4, "image", 0.2), row_of(4, "word", 0.2004)], (4, "word")),
    ([row_of(2, "end", 0.2), row_of(3, "end", 0.19), row_of(5, "end", 0.1)], (3, "end"))])
def test_the_rule(rows, best):
    chosen = states.recommended(rows)
    assert (chosen.layer, chosen.position) == best
    marked = [line for line in states.table(rows).splitlines() if line.startswith("| **")]
    assert len(marked) == 1 and f"**{best[0]}" in marked[0] and f"**{best[1]}**" in marked[0]


def test_one_command_prints_a_table_and_draws_it(tmp_path, monkeypatch, capsys):
    figure = tmp_path / "layers.png"
    argv = ["targets.py", "--layers", "--figure", str(figure), "--device", "cpu",
            "--train_examples", "30", "--valid_examples", "2", "--test_per_family", "1",
            "--regime", "mixed"]
    monkeypatch.setattr(sys, "argv", argv)
    targets.main()
    said = capsys.readouterr().out
    assert said.count("\n| ") == 1 + 5 * 4 and "30 trajectories of mixed" in said
    assert "recommended before any training: --target_layer -1 --target_position end" in said
    before = figure.read_bytes()
    assert before.startswith(b"\x89PNG")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        targets.main()
    assert figure.read_bytes() == before
    monkeypatch.setattr(sys, "argv", ["targets.py", "--figure", str(tmp_path / "other.png")])
    with pytest.raises(ValueError, match="write --layers too"):
        targets.main()


@pytest.fixture
def language_model(tmp_path):
    """A folder with a tiny language model whose tokens are words, and its tokenizer."""
    world = scenes.make_world("mixed", "train", 4)
    words = {"<s>": 0, "</s>": 1, "assistant": 2, "user": 3, "(": 4, "image": 5, ")": 6}
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),
                                     pre_tokenizers.Punctuation()])
    for text in [text for ex in world for text in (ex.question, *ex.texts)]:
        for word, _ in split.pre_tokenize_str(text):
            words.setdefault(word, len(words))
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = split
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")
    fast.chat_template = TEMPLATE
    folder = tmp_path / "words"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2,
                                      intermediate_size=16, num_attention_heads=2))
    lm.save_pretrained(folder)
    return folder, world, fast


def test_a_language_model_reads_the_words_of_r(language_model):
    """Each state by hand: the conversation from R's first turn on, one at a time."""
    folder, world, tokenizer = language_model
    found = text_model.of_words(str(folder), world, batch=3)
    assert set(found) == {(n, p) for n in range(3) for p in ("end", "word", "words")}
    lm = LlamaForCausalLM.from_pretrained(folder).eval()
    for row, example in enumerate(world):
        text, spans = "", []
        for step in example.trajectory:
            said = step if isinstance(step, str) else "(image)"
            text += f"<s>{'assistant' if isinstance(step, str) else 'user'} "
            if isinstance(step, str):
                spans.append((len(text), len(text) + len(said)))
            text += f"{said}</s> "
        text = text.rstrip()
        out = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        words = [n for n, (start, _) in enumerate(out["offset_mapping"])
                 if any(first <= start < last for first, last in spans)]
        with torch.no_grad():
            hidden = lm(torch.tensor([out["input_ids"]]), output_hidden_states=True).hidden_states
        for (layer, position), h in found.items():
            at = dict(end=[len(out["input_ids"]) - 1], word=words[-1:], words=words)[position]
            torch.testing.assert_close(h[row], hidden[layer][0, at].mean(dim=0))


def test_what_is_missing_for_a_language_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(text_model, "NEEDED", ("json", "no_such_package"))
    with pytest.raises(ValueError, match="no_such_package not found: pip install"):
        text_model.smollm2()
    with pytest.raises(ValueError, match="no such folder; name one, or smollm2"):
        text_model.TextModel(str(tmp_path / "nowhere"))
