"""Claims: a question is answered by the plain VLM. `direct` is the option with the largest
log-probability, tokenised as training on it would; `free` and `tool` are transformers' own
generate; a saved adapter answers as the trained model did; an answer's record says what it cost."""

from dataclasses import replace

import pytest
import torch

import evaluate
from conftest import TINY, build, moved
from model import VLM
from support.images import opened
from world import loader

QUESTIONS = loader.questions("mixed", 1)[-4:] + loader.examples("multi", "validation", 1)
# of several tokens, and one that begins another
OPTIONS = [["seven", "two"], ["red disc", "blue", "nine seven two"], ["red", "red disc", "two"],
           ["left", "top left", "top"], ["zero", "one", "two seven", "two"]]


def inputs(vlm, turns, continuation=""):
    """What transformers' model takes for a conversation: one text, and pixels."""
    messages = [dict(role=role, content=[dict(type="text", text=part) if isinstance(part, str)
                                         else dict(type="image") for part in parts])
                for role, parts in turns]
    head, *rest = vlm.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True).split("<|image_pad|>")
    pictures = [opened(part) for _, parts in turns for part in parts if not isinstance(part, str)]
    made = vlm.family.processor(images=pictures, return_tensors="pt")
    for grid, text in zip(made["image_grid_thw"], rest, strict=True):
        head += "<|image_pad|>" * (int(grid.prod()) // 4) + text
    ids = torch.tensor([vlm.tokenizer(head + continuation, add_special_tokens=False).input_ids])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), image_grid_thw=made[
        "image_grid_thw"], pixel_values=made["pixel_values"].to(vlm.lm.dtype),
        mm_token_type_ids=(ids == vlm.lm.config.image_token_id).int())


def turns_of(example):
    return [("user", [example.image, example.question]),
            *(("assistant" if isinstance(step, str) else "user", [step])
              for step in example.trajectory)]


@torch.no_grad()
def naive_log_prob(vlm, example, option, prefix="Answer:", closing=""):
    """log p(option and closing | <I0, Q>, prefix), by a forward pass of its own."""
    question = turns_of(example)[:1]
    start = inputs(vlm, question, prefix)["input_ids"].shape[1]
    given = inputs(vlm, question, f"{prefix} {option}{closing}")
    log_p = vlm.lm(**given).logits[0].double().log_softmax(dim=-1)
    return sum(float(log_p[t - 1, given["input_ids"][0, t]]) for t in range(start, len(log_p)))


def asked(options):
    return [replace(question, options=own, answer=own[-1])
            for question, own in zip(QUESTIONS, options, strict=True)]


def test_direct_is_the_option_with_the_largest_log_probability(loaded64):
    examples = asked(OPTIONS)
    for example, answer in zip(examples, evaluate.Evaluator(loaded64, examples, batch=2).direct()):
        # the end of the turn counts only where one option begins another
        begins = any(a != b and b.startswith(a) for a in example.options for b in example.options)
        naive = [naive_log_prob(loaded64, example, option, closing="<|im_end|>" * begins)
                 for option in example.options]
        assert answer["log_probs"] == pytest.approx(naive, rel=1e-5)
        assert answer["option"] == naive.index(max(naive))
        assert answer["text"] == example.options[answer["option"]]
        assert [answer[name] for name in ("tokens", "images", "passes")] == [0, 1, 1]


def test_an_answer_is_asked_for_as_the_last_text_writes_it(loaded64):
    """One record shows its form in its last text; a record without texts takes the common one."""
    shown = replace(QUESTIONS[-1], options=["two", "two red"], answer="two", trajectory=[
        "Say **Answer: two**", *QUESTIONS[-1].trajectory[1:-1], "So Answer: two."])
    bare = replace(shown, trajectory=[])
    other = replace(shown, options=["two", "red"], trajectory=["It is **Answer: two**"])
    evaluator = evaluate.Evaluator(loaded64, [shown, bare, other, shown])
    prefixes = ("Answer:", "Answer:", "**Answer:")
    for question, prefix in zip(evaluator.questions, prefixes):
        count = len(question.prompt.ids)
        assert question.started.ids[:count] == question.prompt.ids
        assert evaluator.chat.tokenizer.decode(question.started.ids[count:]) == prefix
    for n, (prefix, closing) in enumerate(zip(prefixes, (".<|im_end|>", ".<|im_end|>", ""))):
        example = (shown, bare, other)[n]
        naive = [naive_log_prob(loaded64, example, option, prefix, closing)
                 for option in example.options]
        assert evaluator.direct()[n]["log_probs"] == pytest.approx(naive, rel=1e-5)


def test_a_model_that_has_broken_down_chooses_nothing(vlm64):
    with torch.no_grad():
        vlm64.lm.lm_head.weight[5] = float("nan")
    evaluator = evaluate.Evaluator(vlm64, QUESTIONS[:1])
    assert evaluator.direct()[0]["option"] is None and evaluator.direct()[0]["text"] == ""


@torch.no_grad()
def naive_generate(vlm, turns, tokens):
    given = inputs(vlm, turns)
    made = vlm.lm.generate(**given, max_new_tokens=tokens, do_sample=False)
    return made[0, given["input_ids"].shape[1]:].tolist()


@pytest.mark.parametrize("way, tokens", [("free", 0), ("free", 3), ("tool", 0)])
def test_words_are_those_of_transformers_own_generate(loaded64, way, tokens, capsys):
    examples = asked(OPTIONS)
    evaluator = evaluate.Evaluator(loaded64, examples, batch=2)
    found = evaluator.free(tokens) if way == "free" else evaluator.tool()
    # room for the longest answer and the end of the turn, or for the longest last text and more
    count = {"free": len("Answer : nine seven two".split()) + 1, "tool": 0}[way]
    if way == "tool":
        count = 8 + max(len(loaded64.tokenizer(ex.texts[-1]).input_ids)
                        for ex in examples if ex.images[1:])
    for example, answer in zip(examples, found):
        if way == "tool" and not example.images[1:]:
            assert answer is None
            continue
        # everything but the expert's last text is given
        turns = turns_of(example)[:-1] if way == "tool" else turns_of(example)[:1]
        made = naive_generate(loaded64, turns, tokens or count)
        assert answer == dict(text=loaded64.tokenizer.decode(made, skip_special_tokens=True),
                              tokens=len(made), passes=len(made),
                              images=len(example.images) if way == "tool" else 1)
    cut = "free: 5 of 5 questions have options of more than --free_tokens 3"
    assert (cut in capsys.readouterr().out) == (tokens == 3)


@pytest.mark.parametrize("rank", [4, 0])
def test_a_saved_adapter_answers_as_the_trained_model(vlm64, mixed, tmp_path, rank):
    method, _ = build(vlm64, "sft", mixed[:1], lora_rank=rank)
    before = evaluate.Evaluator(vlm64, QUESTIONS).direct()
    moved(method)
    trained = evaluate.Evaluator(vlm64, QUESTIONS).direct()
    vlm64.save_adapter(tmp_path)
    plain = VLM(TINY, torch.float64)
    plain.load_adapter(tmp_path)
    assert "LoRALinear" not in str(plain)
    for one, other, old in zip(trained, evaluate.Evaluator(plain, QUESTIONS).direct(), before):
        assert one["log_probs"] == pytest.approx(other["log_probs"], rel=1e-4)
        assert one["log_probs"] != pytest.approx(old["log_probs"], rel=1e-4)
