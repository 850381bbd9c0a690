"""Claims: a text says an option where only punctuation, case or spelling of numbers tell them
apart; in doubt no option is said. An answer form is exactly the data's own."""

from unicodedata import normalize

import pytest

from support.answers import (AnswerForm, contains, default_form, form_of, forms, has_prefix,
                             option_index, says, stated_answers)
from support.records import Example

# One line: the options, each with other texts that say it behind =, and behind :: what says none.
CASES = r"""
red = “Red!” = **red**. = - red = `red` = ＲＥＤ = <b>red</b> = $\text{red}$ = \(red\) ~ dark red
dark red = dark   red = dark-red ~ red ~ blue :: not red ~ red, I think ~ the red one ~ red or blue
红色 = 「红色。」 ~ 蓝色 ~ लाल = लाल। ~ लाली ~ été = ÉTÉ. ~ étés ~ 3 p.m. = 3 P.M = 3p.m. ~ 2 p.m.
C++ = c++. = (C++) ~ C# ~ C ~ O- = o-. = (O-) ~ O+ ~ O ~ don't ~ do ~ <div> = `<div>`. ~ ...
a = (a) = a. ~ A ~ red ~ Red ~ no ~ no. :: RED ~ no ~ no.
1000 = 1,000 = 1000.0 = 1,000.00 = １，０００ ~ 100 ~ 1/2 = ½ = １/２ ~ 1 :: 1 000 ~ 1'000 ~ 1.000
$1200.50 = $1,200.50 = $1200.5 = \$1,200.50. ~ $120 ~ 3 = 3.0 = 3. = (3) = $3$ = $$3$$ ~ 2 ~ 30
-5 = −5 = –5 = - 5 = **-5** = -5.0 ~ 5 ~ 50% = 50 % = 50\% = ５０％ ~ 5% ~ 5 cm = 5cm = 5\text{ cm}
[3, 4, 10] = [3,4,10] = 3, 4, 10 = (3, 4, 10) ~ [3, 4] ~ 15 ~ 1.5 :: 1,5 ~ 1.50.0
5 ~ 5% ~ 50 :: -5 ~ 5 cm ~ $5 ~ <5 ~ 5° ~ .5 ~ 5‰ ~ 5:00 ~ 5/1
5 ~ 15 ~ 1 or 5 :: 3-5 ~ 3 to 5 ~ 1, 5 ~ 1/5 ~ $1 or $5
2 ~ 12 ~ x :: 1/2 ~ ½ ~ \sqrt{2} ~ \frac{1}{2} ~ -x
52 ~ 105 ~ 1.1.1 ~ 100200 ~ x/y ~ xy :: 5² ~ 10⁵ ~ 1.1.10 ~ [100,200] ~ x*y ~ x
B = b = (B) = B. = **B** = Ｂ = option B = Option (B) = B. red = (B) red = **B.** red ~ A ~ C ~ D
A ~ B ~ C ~ D :: A man is ~ A person ~ A and B ~ A or B ~ A, B ~ A/B ~ (A)(B) ~ A. B ~ E ~ D- ~ C++
red ~ D ~ E ~ F :: reddish ~ red ✓ ~ ... ~ B ~ e.g. ~ e.g
B. red = B = (b) = option B = red = B) Red. = Option B: red ~ A. blue :: B. blue ~ C ~ A) red
(B) -5 = -5 = B = B. -5 ~ (A) 5
"""


@pytest.mark.parametrize("case", CASES.strip().split("\n"))
def test_a_text_says_its_option_and_no_other(case):
    options, *others = [part.split(" ~ ") for part in case.split(" :: ")]
    expected = {text: n for n, texts in enumerate(options) for text in texts.split(" = ")}
    expected |= dict.fromkeys(*others) if others else {}
    options = [texts.split(" = ")[0] for texts in options]
    assert {text: option_index(text, options) for text in expected} == expected


@pytest.mark.parametrize("text, prefix, stated, option", [
    ("正确答案: red", "答案：", "red", 0), ("answer： blue. Answer: red", "Answer: ", "red", 0),
    ("This is red, island", "is", "red, island", None), ("**Answer:** red", "Answer:", "** red", 0),
    (normalize("NFD", "Réponse : blue"), "Réponse :", "blue", 1), ("Answer:", "Answer:", "", None),
    (r"So \boxed{\text{red}} it is", r"\boxed{", r"\text{red}", 0), ("red", "is", None, 0),
    (r"\boxed{red}. Answer: \boxed{red}, no, \boxed{blue}!", "Answer:", "blue", 1),
    (r"\boxed{red", r"\boxed{", "red", 0), ("<answer>red", "", "red", 0),
    (r"<answer>Now \boxed{red}</answer> Yes", "<answer>", "red", 0),
    ("<answer>Answer: red</answer>", "<answer>Answer:", "red</answer>", 0)])
def test_a_reply_states_one_answer(text, prefix, stated, option):
    assert next(iter(stated_answers(text, prefix)), None) == stated
    assert says(text, ["red", "blue"], prefix) == option


def test_an_option_may_hold_the_prefix():
    options = ["The answer: 5", "The answer: 6"]
    assert says("Answer: 5 Answer: The answer: 5.", options, "answer:") == 0
    assert says("Answer: B. No. Answer: it is C", ["A", "B", "C"], "Answer:") is None


@pytest.mark.parametrize("answer, text, right", [
    ("red", "It is Red.", True), ("red", "reddish", False), ("红色", "它是红色的", True),
    ("1", "1, 2", True), *[("1", text, False) for text in ("1.5", "0,1", "-1", "1/2")],
    ("A", "Option A is", True), ("A", "A man is", False), ("A", "it is a man", False)])
def test_words_are_found_whole(answer, text, right):
    assert contains(text, answer) == right


@pytest.mark.parametrize("text, answer, prefix, form", [
    ("Answer: red.", "red.", "Answer:", ("Answer:", " ", "")), ("It is red", "red", "x", None),
    ("ANSWER:\n(Red).", "red", "Answer: ", ("ANSWER:", "\n(", ").")), ("x", "x", "", ("", "", "")),
    ("答案：红", "红", "答案:", ("答案：", "", "")), ("Answer: -5", "5", "Answer:", None),
    (r"So <b>$\boxed{red}$</b>.", "red", r"\boxed{", (r"<b>$\boxed{", "", "}$</b>.")),
    (r"**Answer:** \boxed{A}", "A", "Answer:", ("**Answer:", r"** \boxed{", "}")),
    (normalize("NFD", "À : été"), "été", "À :", (normalize("NFD", "À :"), " ", ""))])
def test_the_form_is_the_one_that_the_text_has(text, answer, prefix, form):
    assert form_of(text, answer, prefix) == (AnswerForm(*form) if form else None)


@pytest.mark.parametrize("prefix, text", [
    ("Answer: ", "Answer: x"), ("is", "is x"), ("답:", "답: x"), ("=>", "=> x"), ("", "x"),
    ("答案：", "答案：x"), ("答案是", "答案是x"), ("<answer>", "<answer>x</answer>"),
    (r"\boxed{", r"\boxed{x}"), (r"<answer>\boxed{", r"<answer>\boxed{x}</answer>")])
def test_a_prefix_alone_makes_a_form(prefix, text):
    assert default_form(prefix).text("x") == text and says(text, ["y", "x"], prefix) == 1
    assert has_prefix(text, prefix) and not has_prefix("This", "is")


def test_the_most_frequent_form_of_the_data_is_the_common_one():
    texts = ("Answer: red", "", "Answer: red.", "It is red", "So Answer: red.")
    data = [Example("1", "t", None, "q", ["red"], "red", [text] if text else []) for text in texts]
    replies = [form.text("blue") for form in forms(data, "Answer:")]
    assert replies == ["Answer: blue", *["Answer: blue."] * 4]
    alone = [ex.answer_only("Answer:").texts[0] for ex in data[1:4]]
    assert alone == ["Answer: red", "Answer: red.", "Answer: red"]
