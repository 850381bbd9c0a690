"""Claims: a question is answered by the plain VLM: `direct` is the option with the largest
log-probability, `free` and `tool` are transformers' own generate."""

import copy
from dataclasses import replace

import pytest
import torch
from plain import inputs, run, tokens, turns_of

import evaluate
from model import VLM
from world import loader
from conftest import TINY, assert_close, build, merged_weights, move

# of several tokens, and some where one option begins another
OPTIONS = [["seven", "two"], ["red disc", "blue", "nine seven two"], ["red", "red disc", "two"],
           ["left", "top left", "top"]]
QUESTIONS = [replace(question, options=options, answer=options[-1]) for question, options in zip(
    loader.questions("mixed", 1)[-3:] + loader.examples("multi", "validation", 1), OPTIONS)]


@torch.no_grad()
def naive_log_probs(vlm, example, prefix="Answer:", closing=""):
    """log p(option and closing | <I0, Q>, prefix) of each option, by a forward pass of its own."""
    start, scores = len(tokens(vlm, turns_of(example)[:1], prefix).ids), []
    for option in example.options:
        whole = tokens(vlm, turns_of(example)[:1], f"{prefix} {option}{closing}")
        log_p = run(vlm, whole.ids, whole.images)[1].log_softmax(dim=-1)
        scores.append(sum(float(log_p[t - 1, whole.ids[t]]) for t in range(start, len(whole.ids))))
    return scores


def test_direct_is_the_option_with_the_largest_log_probability(vlm64):
    answers = evaluate.Evaluator(vlm64, QUESTIONS, batch=2).direct()
    for example, answer in zip(QUESTIONS, answers, strict=True):
        # the end of the turn counts only where one option begins another
        begins = any(a != b and b.startswith(a) for a in example.options for b in example.options)
        naive = naive_log_probs(vlm64, example, closing="<|im_end|>" * begins)
        assert answer["log_probs"] == pytest.approx(naive, rel=1e-5)
        assert answer["option"] == naive.index(max(naive))
        assert answer["text"] == example.options[answer["option"]]
        assert [answer[name] for name in ("tokens", "images", "passes")] == [0, 1, 1]
    vlm64.lm.lm_head.weight.data[5] = float("nan")  # a model that has broken down chooses nothing
    (answer,) = evaluate.Evaluator(vlm64, QUESTIONS[:1]).direct()
    assert answer["option"] is None and answer["text"] == ""


def test_an_answer_is_asked_for_as_the_last_text_writes_it(loaded64):
    """A record shows its form in its last text; one without texts gets the most frequent form."""
    full = replace(QUESTIONS[-1], options=["two", "two red"], answer="two", trajectory=[
        "Say **Answer: two**", *QUESTIONS[-1].trajectory[1:-1], "So Answer: two."])
    bare = replace(full, trajectory=[])
    other = replace(full, options=["two", "red"], trajectory=["It is **Answer: two**"])
    expected = [("Answer:", ".<|im_end|>"), ("Answer:", ".<|im_end|>"), ("**Answer:", "")]
    answers = evaluate.Evaluator(loaded64, [full, bare, other, full]).direct()
    for example, answer, start_and_end in zip((full, bare, other), answers, expected):
        naive = naive_log_probs(loaded64, example, *start_and_end)
        assert answer["log_probs"] == pytest.approx(naive, rel=1e-5)


@pytest.mark.parametrize("way, count", [("free", 0), ("free", 4), ("tool", 0)])
def test_words_are_those_of_transformers_own_generate(loaded64, monkeypatch, way, count, capsys):
    evaluator, rooms, real = evaluate.Evaluator(loaded64, QUESTIONS, batch=2), [], VLM.generate
    monkeypatch.setattr(VLM, "generate", lambda *args: rooms.append(args[-1]) or real(*args))
    answers = getattr(evaluator, way)(*[count] * (count > 0))
    # room for the longest answer and the end of the turn, or for the longest last text and more
    last = [ex.texts[-1] for ex in QUESTIONS if ex.images[1:]]
    room = dict(free=len("Answer : nine seven two".split()) + 1, tool=8 + max(
        len(loaded64.tokenizer(text).input_ids) for text in last))[way]
    assert set(rooms) == {count or room}
    for example, answer in zip(QUESTIONS, answers, strict=True):
        if way == "tool" and not example.images[1:]:
            assert answer is None
            continue
        # everything but the expert's last text is given
        prompt = tokens(loaded64, turns_of(example)[:-1 if way == "tool" else 1], "")
        token_ids = loaded64.lm.generate(**inputs(loaded64, prompt.ids, prompt.images),
                                         max_new_tokens=count or room)[0, len(prompt.ids):]
        assert answer == dict(text=loaded64.tokenizer.decode(token_ids, skip_special_tokens=True),
                              tokens=len(token_ids), passes=len(token_ids),
                              images=len(example.images) if way == "tool" else 1)
    cut = "free: 3 of 4 questions may need more tokens than --free_tokens 4"
    assert capsys.readouterr().out.partition(";")[0] == (cut if count else "")
    evaluate.Evaluator(loaded64, QUESTIONS[:1]).free()  # at least the paper's four tokens
    assert rooms[-1] == 4


@torch.no_grad()
@pytest.mark.parametrize("rank", [4, 0])
def test_alpha_loads_a_share_of_the_change(shipped, mixed, tmp_path, rank):
    method, _ = build(copy.deepcopy(shipped), "sft", mixed[:1], lora_rank=rank)
    trained, start = move(method.float()).vlm, merged_weights(shipped)
    trained.save_adapter(tmp_path)
    for alpha in (1.0, 0.5, 0.0):
        vlm = VLM(TINY)
        vlm.load_adapter(tmp_path, alpha)
        shares = {name: start[name] + alpha * (weight - start[name])
                  for name, weight in merged_weights(trained).items()}
        assert_close(merged_weights(vlm), shares)
        if alpha == 1:
            # to the bit
            assert all(torch.equal(weight, vlm.state_dict()[name])
                       for name, weight in trained.state_dict().items())
    with pytest.raises(ValueError, match="--alpha is for a run, and .* has no best.json"):
        evaluate.load_model(TINY, "cpu", alpha=0.5)
