"""Claims: a text says an option where only punctuation, case or spelling of numbers tell them
apart; in doubt no option is said. An answer form is exactly the data's own."""

import time
from unicodedata import normalize

import pytest

from support.answers import (AnswerForm, contains, default_form, form_of, forms, has_prefix,
                             option_index, says, stated_answers)
from support.records import Example

# One line: the options, of which the first is said, and after :: all the texts that say it.
SAME = r"""
red ~ blue ~ dark red :: red ~ Red! ~ (red) ~ "red." ~ “red” ~ *red* ~ **red**. ~ - red ~ `red`
red ~ blue ~ dark red :: ＲＥＤ ~ red? ~ <b>red</b> ~ \text{red} ~ $\textbf{red}$ ~ \(red\) ~ [red]
dark red ~ red ~ dark :: dark   red ~ dark-red ~ Dark Red!
红色 ~ 蓝色 :: 红色。 ~ 「红色」
लाल ~ लाली :: लाल।
été ~ étés :: été ~ ÉTÉ.
3 p.m. ~ 2 p.m. ~ don't ~ do :: 3 p.m ~ 3 P.M. ~ 3p.m.
C ~ C++ ~ C# :: c. ~ (C)
C++ ~ C# ~ C :: c++. ~ (C++)
O- ~ O+ ~ O :: o-. ~ (O-)
a ~ A :: (a) ~ a.
<div> ~ <span> ~ ... :: <div>. ~ `<div>`
1000 ~ 100 :: 1,000 ~ 1000.0 ~ 1,000.00 ~ １，０００
$1200.50 ~ $120 :: $1,200.50 ~ $1200.5 ~ \$1,200.50.
3 ~ 2 ~ 30 :: 3.0 ~ 3. ~ (3) ~ $3$ ~ $$3$$
50% ~ 5% ~ 50 :: 50 % ~ 50\% ~ ５０％
5 cm ~ 50 cm ~ 5 :: 5cm ~ 5\text{ cm} ~ 5 CM.
-5 ~ 5 :: −5 ~ –5 ~ - 5 ~ **-5** ~ -5.0
1/2 ~ 2 ~ 12 :: ½ ~ １/２
5^2 ~ 52 ~ 5 2 :: 5²
3-5 ~ 35 ~ 3 :: 3–5
[3, 4, 10] ~ [3, 4] :: [3,4,10] ~ 3, 4, 10 ~ (3, 4, 10)
B ~ A ~ C ~ D :: b ~ (B) ~ B. ~ **B** ~ Ｂ ~ option B ~ Option (B) ~ B. red ~ (B) red ~ **B.** red
B. red ~ A. blue :: B ~ (b) ~ option B ~ red ~ B) Red. ~ **B. red** ~ Option B: red
(B) -5 ~ (A) 5 :: -5 ~ B ~ B. -5
"""
# One line: the options, and after :: the texts that say none of them.
NONE = r"""
red ~ blue ~ dark red :: not red ~ no, red ~ red, I think ~ the red one ~ red or blue ~ non-red
A ~ B ~ C ~ D :: A man is ~ A person ~ A and B ~ A or B ~ A, B ~ A/B ~ (A)(B) ~ A. B ~ E ~ D- ~ C++
B. red ~ A. blue :: B. blue ~ C ~ A) red
red ~ D ~ E ~ F :: reddish ~ red ✓ ~ ... ~ B ~ e.g. ~ e.g
red ~ Red ~ no ~ no. :: RED ~ no
15 ~ 1.5 ~ 1000 ~ 1 :: 1,5 ~ 1.000 ~ 1 000 ~ 1'000
5 ~ 5% ~ 50 :: -5 ~ 5 cm ~ $5 ~ <5 ~ 5° ~ .5 ~ 5‰ ~ 5:00 ~ 5/1
5 ~ 15 ~ 1 or 5 :: 3-5 ~ 3 to 5 ~ 1, 5 ~ 1/5 ~ $1 or $5
2 ~ 12 ~ x :: 1/2 ~ ½ ~ \sqrt{2} ~ \frac{1}{2} ~ -x
52 ~ 105 ~ 1.1.1 ~ 100200 ~ x/y ~ xy :: 5² ~ 10⁵ ~ 1.1.10 ~ [100,200] ~ x*y ~ x
"""


@pytest.mark.parametrize("row, index", [(row, index) for rows, index in ((SAME, 0), (NONE, None))
                                        for row in rows.strip().split("\n")])
def test_a_text_says_its_option_and_no_other(row, index):
    options, texts = [part.split(" ~ ") for part in row.split(" :: ")]
    assert {text: option_index(text, options) for text in texts} == dict.fromkeys(texts, index)
    if index == 0:
        assert [option_index(option, options) for option in options] == list(range(len(options)))


@pytest.mark.parametrize("text, prefix, stated, option", [
    ("Blue. Answer: red.", "Answer:", "red.", 0), ("answer： red", "Answer:", "red", 0),
    ("正确答案: red", "答案：", "red", 0), ("Answer: blue. Answer: red", "Answer: ", "red", 0),
    ("This is red, island", "is", "red, island", None), ("**Answer:** red", "Answer:", "** red", 0),
    (normalize("NFD", "Réponse : blue"), "Réponse :", "blue", 1), ("Answer:", "Answer:", "", None),
    (r"So \boxed{\text{red}} it is", r"\boxed{", r"\text{red}", 0), ("red", "", None, 0),
    (r"\boxed{red}. Answer: it is \boxed{blue}", "Answer:", "blue", 1), ("red", "is", None, 0),
    (r"\boxed{red}, no, \boxed{blue}!", "", "blue", 1), (r"\boxed{red", r"\boxed{", "red", 0),
    (r"<answer>Now \boxed{red}</answer> Yes", "<answer>", "red", 0), ("<answer>red", "", "red", 0),
    ("<answer>Answer: red</answer>", "<answer>Answer:", "red</answer>", 0)])
def test_a_reply_states_one_answer(text, prefix, stated, option):
    assert next(iter(stated_answers(text, prefix)), None) == stated
    assert says(text, ["red", "blue"], prefix) == option


def test_an_option_may_hold_the_prefix():
    options = ["The answer: 5", "The answer: 6"]
    for text, prefix in (("Answer: The answer: 5", "Answer:"), ("Answer: 5 Answer: The answer: 5.",
                                                                "answer:")):
        assert says(text, options, prefix) == 0
    assert says("Answer: B. No. Answer: it is C", ["A", "B", "C"], "Answer:") is None


@pytest.mark.parametrize("answer, text, right", [
    ("red", "It is Red.", True), ("red", "reddish", False), ("红色", "它是红色的", True),
    ("1", "1, 2", True), *[("1", text, False) for text in ("1.5", "0,1", "-1", "1/2", "10")],
    ("C", "C++", False), ("C++", "C++ it is", True), ("don", "don't", False), ("A", "(A) x", True),
    ("A", "Option A is", True), ("A", "A man is", False), ("A", "it is a man", False)])
def test_words_are_found_whole(answer, text, right):
    assert contains(text, answer) == right


@pytest.mark.parametrize("text, answer, prefix, form", [
    ("Yes. Answer: red", "red", "Answer:", ("Answer:", " ", "")), ("x 1.5", "1", "x", None),
    ("Answer: red.", "red.", "Answer:", ("Answer:", " ", "")), ("It is red", "red", "x", None),
    ("ANSWER:\n(Red).", "red", "Answer: ", ("ANSWER:", "\n(", ").")), ("x", "x", "", ("", "", "")),
    ("答案：红", "红", "答案:", ("答案：", "", "")), ("Answer: -5", "5", "Answer:", None),
    ("<answer>red</answer>", "red", "<answer>", ("<answer>", "", "</answer>")),
    (r"So $\boxed{red}$.", "red", r"\boxed{", (r"$\boxed{", "", "}$.")),
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
    texts = ("Answer: red", "", "Answer: red.", "It is red", "Answer: red.", "So Answer: red.")
    data = [Example("1", "t", None, "q", ["red"], "red", [text] if text else []) for text in texts]
    replies = [form.text("blue") for form in forms(data, "Answer:")]
    assert replies == ["Answer: blue", *["Answer: blue."] * 5]
    assert forms(data[3:4], "Answer:") == [default_form("Answer:")]


@pytest.mark.parametrize("part", ["( ", "x ", "{", "- *", "\\boxed{", "<a>", "[1,000 $", "**"])
def test_long_texts_take_no_time(part):
    start = time.process_time()
    for prefix in ("Answer:", ""):
        form_of(part * 30_000, "x", prefix)
        says(part * 30_000, ["x", "y"], prefix)
    assert time.process_time() - start < 3
