"""Claims: what a text says is found however it is dressed, and never where it only looks alike; an
answer is asked for in the form in which the data write it."""

import time
import unicodedata

import pytest

from support.answers import (AnswerForm, common_form, contains, default_form, form_of, normalise,
                             option_index, says)
from support.records import Example

COLOURS = ["red", "blue", "dark red"]


def nfc(text):
    return unicodedata.normalize("NFC", text)


def nfd(text):
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize("text, options, prefix, right", [
    ("Answer: seven.", ["seven", "six"], "Answer:", 0),
    ("Answer: seven", ["seven.", "six."], "Answer:", 0),
    ("Answer: 3 p.m.", ["2 p.m.", "3 p.m."], "Answer:", 1),
    ("Answer: 3 p.m", ["2 p.m.", "3 p.m."], "Answer: ", 1),
    ("It is. <answer>red</answer>", COLOURS, "<answer>", 0),
    ("It is. <answer> red </answer>.", COLOURS, "Answer:", 0),
    ("It is. \\boxed{red}", COLOURS, "\\boxed{", 0),
    ("<answer>red</answer> That is all.", COLOURS, "<answer>", 0),
    ("So \\boxed{\\text{red}} it is", COLOURS, "\\boxed{", 0),
    ("It is. $\\boxed{\\text{red}}$.", COLOURS, "Answer:", 0),
    ("\\boxed{1}, no: \\boxed{\\frac{1}{2}}", ["1", "\\frac{1}{2}"], "", 1),
    ("<answer>\\boxed{red}</answer>", COLOURS, "<answer>", 0),
    ("<answer>Answer: red</answer>", COLOURS, "Answer:", 0),
    ("Final Answer: The final answer is $\\boxed{5}$. I hope so.", ["5", "4"], "Answer:", 0),
    ("**Answer:** red", COLOURS, "Answer:", 0), ("**Answer: dark  red**", COLOURS, "Answer:", 2),
    ("(Answer: red)", COLOURS, "Answer:", 0), ("Answer: \"red.\"", COLOURS, "Answer:", 0),
    ("Answer: blue. Answer: red", COLOURS, "Answer:", 0),
    ("Answer: " + nfc("bleu é"), [nfd("bleu é"), "rouge"], "Answer:", 0),
    (nfd("Réponse : bleu"), ["bleu", "rouge"], nfc("Réponse :"), 0),
    ("答案：红色。", ["红色", "蓝色"], "答案：", 0), ("正确答案：红色", ["红色", "蓝色"], "答案：", 0),
    ("उत्तर: लाल।", ["लाल", "नीला"], "उत्तर:", 0),
    ("Answer: Red", COLOURS, "Answer:", 0), ("Answer: a", ["A", "a"], "Answer:", 1),
    ("red", COLOURS, "Answer:", 0), ("red", COLOURS, "", 0), ("Answer: 42.", ["42"], "Answer:", 0),
    ("Answer: A", list("ABCD"), "Answer:", 0), ("Answer: (B)", list("ABCD"), "Answer:", 1),
    ("Answer: B. blue", list("ABCD"), "Answer:", 1), ("B) blue", list("ABCD"), "Answer:", 1),
    ("(B) blue", list("ABCD"), "Answer:", 1), ("b.", list("ABCD"), "Answer:", 1),
    ("Answer: B", ["A. red", "B. blue"], "Answer:", 1), ("blue", ["(A) red", "(B) blue"], "", 1)])
def test_the_option_that_a_text_says_counts_however_it_is_dressed(text, options, prefix, right):
    assert says(text, options, prefix) == right


@pytest.mark.parametrize("text, options", [
    ("Answer: RED", ["red", "Red"]),  # case is all that parts them
    ("Answer: know", ["no", "yes"]), ("Answer: 10", ["1", "100"]), ("Answer: 3.5", ["3", "35"]),
    ("Answer: the red one", ["red", "blue"]), ("Answer:", ["A"]), ("", ["A"]), ("...", ["A"]),
    ("A man is", list("ABCD")), ("A person", list("ABCD")), ("I see", list("HIJK")),
    ("B. red", ["A. red", "B. blue"]), ("E", list("ABCD")), ("e.g", list("DEF")),
    ("red or blue", ["red", "blue"]), ("[3, 4]", ["3, 4"]), ("A*", ["A"]), ("$5", ["5"])])
def test_what_only_looks_alike_is_no_option(text, options):
    assert says(text, options, "Answer:") is None


@pytest.mark.parametrize("text, bare", [
    ("...", "..."), ("wait...", "wait..."), (".5", ".5"), ("3.", "3"), ("0.5", "0.5"),
    ("etc..", "etc"), ("p.m.", "p.m"), ("<div>", "<div>"), ("**", "**"), (" a \n b ", "a b"),
    ("'A' or 'B'", "'A' or 'B'"), ("(1) and (2)", "(1) and (2)"), ("((1))", "1"), ("f(x)", "f(x)"),
    ("{1, 2}", "{1, 2}"), ("„rot“", "rot"), ("`x`", "x"), ("x}", "x"), ("۔", "۔"), ("سرخ۔", "سرخ")])
def test_what_is_taken_off_around_a_text(text, bare):
    assert normalise(text) == bare == normalise(bare)


def test_the_prefix_is_found_as_a_word():
    assert parse_answer("This island is red", "is") == "red"
    assert parse_answer("This island", "is") == "This island"
    assert parse_answer("The Answer: red ", "Answer: ") == "red"


def test_two_options_that_are_one_are_none():
    assert option_index("red", ["red", "red."]) is None


@pytest.mark.parametrize("text, answer, right", [
    ("It is Red.", "red", True), ("reddish", "red", False), ("I know", "no", False),
    ("none", "one", False), ("10", "1", False), ("1.5", "1", False), ("0,1", "1", False),
    ("-1", "1", False), ("1/2", "2", False), ("1, 2", "1", True), ("共1个", "1", True),
    ("它是红色的", "红色", True), ("don't", "don", False), ("C++ it is", "C++", True),
    ("A man is", "A", False), ("it is a man", "A", False), ("Option A is right", "A", True),
    ("(A) man", "A", True), ("x is it", "x", True), (nfd("été"), nfc("été"), True)])
def test_words_are_whole(text, answer, right):
    assert contains(text, answer) is right


# ---- forms ----


@pytest.mark.parametrize("text, answer, prefix, form", [
    ("It is. Answer: red", "red", "Answer:", AnswerForm("Answer:", " ", "")),
    ("It is. Answer: red.", "red", "Answer: ", AnswerForm("Answer:", " ", ".")),
    ("It is. Answer: red.", "red.", "Answer:", AnswerForm("Answer:", " ", "")),
    ("答案：红色", "红色", "答案：", AnswerForm("答案：", "", "")),
    ("<answer>red</answer>", "red", "<answer>", AnswerForm("<answer>", "", "</answer>")),
    ("So \\boxed{red}.", "red", "\\boxed{", AnswerForm("\\boxed{", "", "}.")),
    ("Answer:\n(A)", "A", "Answer:", AnswerForm("Answer:", "\n(", ")")),
    ("So **Answer:** \\boxed{A}", "A", "Answer:", AnswerForm("**Answer:", "** \\boxed{", "}")),
    ("Answer: blue. Answer:  red", "red", "Answer:", AnswerForm("Answer:", "  ", "")),
    ("red.", "red", "", AnswerForm("", "", ".")),
    (nfd("Réponse : été"), nfc("été"), nfc("Réponse :"), AnswerForm(nfd("Réponse :"), " ", "")),
    ("It is red", "red", "Answer:", None), ("Answer: 1.5", "1", "Answer:", None),
    ("Answer: red, I think", "red", "Answer:", None), ("It is red", "red", "", None)])
def test_the_form_is_the_one_that_the_text_has(text, answer, prefix, form):
    assert form_of(text, answer, prefix) == form
    if form:
        assert text.endswith(form.text(answer).replace(nfc(answer), answer)) or text == nfd(text)


@pytest.mark.parametrize("prefix, text", [
    ("Answer:", "Answer: x"), ("Answer: ", "Answer: x"), ("Réponse :", "Réponse : x"),
    ("is", "is x"), ("답:", "답: x"), ("=>", "=> x"), ("", "x"), ("答案：", "答案：x"), ("답：", "답：x"),
    ("答案:", "答案:x"),
    ("答案是", "答案是x"), ("คำตอบ", "คำตอบx"), ("<answer>", "<answer>x</answer>"),
    ("\\boxed{", "\\boxed{x}"), ("<answer>\\boxed{", "<answer>\\boxed{x}</answer>"), ("(", "(x)"),
    ("**Answer:**", "**Answer:** x")])
def test_a_prefix_alone_makes_a_form(prefix, text):
    assert default_form(prefix).text("x") == text
    assert says(text, ["y", "x"], prefix) == 1  # what is asked for is what is read


def examples(*texts):
    return [Example("1", "f", None, "q", COLOURS, "red", [text] if text else []) for text in texts]


def test_the_most_frequent_form_of_the_data_is_asked_for():
    many = examples("Answer: red.", "", "Answer: red", "It is red", "Answer: red.")
    assert common_form(many, "Answer:").text("blue") == "Answer: blue."
    assert common_form(examples("It is red", ""), "Answer:") == default_form("Answer:")


def test_the_bare_answer_is_written_as_the_last_text_writes_it():
    for text in ("<answer>red</answer>", "So <answer>red</answer>"):
        assert examples(text)[0].answer_only("<answer>").trajectory == ["<answer>red</answer>"]
    assert examples("So Answer: red.")[0].answer_only("Answer:").trajectory == ["Answer: red."]
    assert examples("It is red")[0].answer_only("Answer: ").trajectory == ["Answer: red"]
    assert examples("")[0].answer_only("").trajectory == ["red"]


@pytest.mark.parametrize("text", ["( " * 200_000, "x " * 500_000, "{" * 200_000 + " Answer: x",
                                  "**" * 200_000, "\\boxed{" * 50_000, "<a>" * 100_000])
def test_long_texts_take_no_time(text):
    start = time.process_time()  # however busy the machine is
    for prefix in ("Answer:", ""):
        form_of(text, "x", prefix)
        says(text, ["x", "y"], prefix)
    contains(text, "y")
    assert time.process_time() - start < 5
