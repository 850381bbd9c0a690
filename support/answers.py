"""Answers: how the data write one, and which option a text says.

One comparison for everything that compares: scoring, tracking, figures and the data check. Both
sides are normalised alike, and what counts is the index of the option, never the raw text.

    last text           "The digit is seven. Answer: seven."
    prefix              "Answer:"
    AnswerForm          prefix "Answer:", gap " ", closing "."
    says(text, ...)     the index of "seven" among the options
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

STOPS = ".。．｡।۔։።"  # full stops of several scripts
CLOSERS = {"**": "**", "$": "$", "`": "`", '"': '"', "'": "'", "“": "”", "‘": "’", "„": "“",
           "«": "»", "「": "」", "『": "』", "(": ")", "（": "）", "[": "]", "{": "}",
           r"\(": r"\)", r"\[": r"\]"}
TAG = r"<(?P<tag>\w[\w-]*)>"
UNSPACED = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
            "\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff")  # kana, Han
LETTER = re.compile(rf"[^\W{UNSPACED}\uac00-\ud7af]")  # Korean has blanks, but endings are attached

# What may be taken off around an answer; [ and { alone belong to it: [3, 4] is a box.
DRESS = re.compile(rf"{TAG}|\\(?:boxed|fbox|text|textbf|mathrm|mathbf)\s*\{{|\\[(\[]|\*\*"
                   r"|[$`\"'“‘„«「『(（]")
STRAY = re.compile(rf"(?<!\.)\.{{1,2}}$|[{STOPS[1:]}]$|</\w[\w-]*>$|\*\*$|^\*\*")
MARKED = re.compile(r"\\(?:boxed|fbox)\s*\{|<(?P<tag>answer)>", re.IGNORECASE)

# Around an answer in a last text, where more marks than the above may open or close something.
OPENING = r"<\w[\w-]*>|\\boxed\s*\{|\*\*|[$`\"'“‘„«「『(（\[{]"
CLOSING = rf"(?:\s|</\w[\w-]*>|\*\*|[{STOPS},;:!?$`\"'”’“»」』)）\]}}])*"


# ---- how the data write an answer ----------------------------------------------------------------


class AnswerForm(NamedTuple):
    """How the last texts of a data set write an answer."""

    prefix: str  # without blanks at its ends, with marks that open just before it
    gap: str  # between prefix and answer: blanks, marks that open
    closing: str  # after the answer: a full stop, marks that close

    def text(self, option: str) -> str:
        return self.prefix + self.gap + option + self.closing


def form_of(last_text: str, answer: str, prefix: str) -> AnswerForm | None:
    """How this text writes its answer; None if it does not end in prefix, answer and closing marks.

    The form is as the text has it, also where its Unicode normal form is another than prefix's.
    """
    for form in ("", "NFC", "NFD"):
        if form:
            prefix, answer = (unicodedata.normalize(form, text) for text in (prefix, answer))
        start = _after_prefix(last_text, prefix)
        if start is not None and (found := re.fullmatch(
                rf"((?:\s|{OPENING})*){re.escape(answer)}({CLOSING})", last_text[start:])):
            before = last_text[:start - len(prefix.strip())][-40:]
            before = re.search(f"(?:{OPENING})*$", before)[0]
            return AnswerForm(before + prefix.strip(), *found.groups())
    return None


def default_form(prefix: str) -> AnswerForm:
    """The form where no text shows one: a blank where the script has blanks, marks closed again."""
    prefix = prefix.strip()
    letters = re.findall(r"\w", prefix)
    closing = "".join(closer for _, closer in reversed(_opened_by(prefix)))
    wide = unicodedata.east_asian_width(prefix[-1:] or " ") == "F"  # such as a full-width colon
    unspaced = bool(letters) and bool(re.match(f"[{UNSPACED}]", letters[-1]))
    return AnswerForm(prefix, "" if not prefix or closing or wide or unspaced else " ", closing)


def common_form(examples: Iterable, prefix: str) -> AnswerForm:
    """The most frequent form among the examples' last texts, or the default if none has one."""
    forms = Counter(form for ex in examples if ex.texts
                    and (form := form_of(ex.texts[-1], ex.answer, prefix)))
    return forms.most_common(1)[0][0] if forms else default_form(prefix)


def _after_prefix(text: str, prefix: str) -> int | None:
    """Where the last prefix ends, as a word of its own. 0 for an empty one; None: not there."""
    prefix = prefix.strip()
    if not prefix:
        return 0
    end = None
    for end in (found.end() for found in re.finditer(_as_word(prefix), text)):
        pass
    return end


def _as_word(text: str) -> str:
    """A pattern for the text, not inside a longer word or number, in scripts that part words."""
    before = after = ""
    if LETTER.match(text[0]):
        before = rf"(?<!{LETTER.pattern})"
    if LETTER.match(text[-1]):
        after = rf"(?!['’]?{LETTER.pattern})"
    if text[0].isdigit():  # nor in 0.5, 1/2 or -5
        before += r"(?<!\d[.,:/])(?<![-−])"
    if text[-1].isdigit():
        after += r"(?![.,:/]\d)"
    return before + re.escape(text) + after


def _opened_by(prefix: str) -> list[tuple[str, str]]:
    """(opener, closer) of the marks that a prefix ends in, the innermost last."""
    tail = re.search(r"(?:<\w[\w-]*>|(?:\\boxed\s*)?[{(\[（“„«「『]|\s)*$", prefix)[0]
    return [_mark(found) for found in re.finditer(rf"{TAG}|\\boxed\s*\{{|\S", tail)]


def _mark(opening: re.Match) -> tuple[str, str]:
    """(opener, closer) of the mark that was found; of a command, such as \\boxed{, the braces."""
    if opening["tag"]:
        return opening[0], f"</{opening['tag']}>"
    opener = "{" if opening[0].endswith("{") else opening[0]
    return opener, CLOSERS[opener]


def _until_closed(text: str, opener: str, closer: str) -> str:
    """The text up to what closes an opener before it, nested ones counted; all if nothing does."""
    depth = 1
    for found in re.finditer(f"{re.escape(opener)}|{re.escape(closer)}", text):
        depth += 1 if found[0] == opener != closer else -1
        if depth == 0:
            return text[:found.start()]
    return text


# ---- which option a text says --------------------------------------------------------------------


def normalise(text: str) -> str:
    """What is compared: NFC, single blanks, no marks around it, no full stop at its end.

    Case is kept. Three dots stay, and nothing is taken off that would leave nothing.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    for _ in range(20):  # nobody dresses deeper, and each layer goes over the whole text
        if (bare := _undressed(text)) == text:
            break
        text = bare
    return text


def _undressed(text: str) -> str:
    """One layer less, if there is one."""
    if opening := DRESS.match(text):
        opener, closer = _mark(opening)
        inner = text[opening.end():]
        bare = inner.removesuffix(closer)
        if bare.strip() and bare != inner and _until_closed(inner, opener, closer) == bare:
            return bare.strip()
    bare = STRAY.sub("", text, count=1).strip()
    for opener, closer in ("{}", "()"):  # of a mark that was opened before the prefix
        if text.endswith(closer) and text.count(closer) > text.count(opener):
            bare = text[:-1].strip()
    return bare or text


def stated_answer(text: str, prefix: str) -> str | None:
    """What a text gives as its answer: what follows the last prefix, or stands in the last
    \\boxed{} or <answer> tag (after that prefix, if there is one). None if it has none of these."""
    text, prefix = (unicodedata.normalize("NFC", t) for t in (text, prefix))
    stated = None
    if prefix.strip() and (start := _after_prefix(text, prefix)) is not None:
        stated = text[start:]
        if opened := _opened_by(prefix.strip()):
            stated = _until_closed(stated, *opened[-1])
    within = text if stated is None else stated
    if marked := list(MARKED.finditer(within)):
        stated = _until_closed(within[marked[-1].end():], *_mark(marked[-1]))
    return None if stated is None else stated.strip()


def has_prefix(text: str, prefix: str) -> bool:
    """Whether the prefix stands in the text; an empty one always does."""
    return _after_prefix(*(unicodedata.normalize("NFC", t) for t in (text, prefix))) is not None


def parse_answer(text: str, prefix: str) -> str:
    """The answer that a text states, or, if it states none, the whole text."""
    stated = stated_answer(text, prefix)
    return text.strip() if stated is None else stated


def option_index(text: str, options: list[str]) -> int | None:
    """The option that `text` is, by normalised words; case counts only where it parts two options.

    Where all options have a letter, the letter alone, "(B)" and "B. blue" name one too. None if the
    text is none of the options, or several.
    """
    said, names = normalise(text), [normalise(option) for option in options]
    for fold in (str, str.casefold):
        folded = [fold(name) for name in names]
        if len(set(folded)) == len(folded) and fold(said) in folded:
            return folded.index(fold(said))
    return _index_by_letter(said, names)


def says(text: str, options: list[str], prefix: str) -> int | None:
    """The index of the option that a reply gives as its answer; None if it gives none of them."""
    return option_index(parse_answer(text, prefix), options)


def contains(text: str, answer: str) -> bool:
    """Whether the answer's words stand in the text, whole. No letter: the A of "A man is"."""
    text, answer = (unicodedata.normalize("NFC", t) for t in (text, normalise(answer)))
    if answer in ("A", "a", "I", "i"):
        return bool(re.search(rf"{_as_word(answer)}(?!\s+[a-z])", text)
                    or re.search(rf"\w\s+{_as_word(answer.upper())}", text))
    return bool(answer and re.search(_as_word(answer.casefold()), text.casefold()))


def _index_by_letter(said: str, names: list[str]) -> int | None:
    parts, own = [_letter_and_rest(name) for name in names], _letter_and_rest(said)
    if None in parts:
        return None
    if own is None:
        found = [i for i, (_, rest) in enumerate(parts) if rest and rest == said.casefold()]
    else:  # a letter with another option's words is no answer
        found = [i for i, (letter, rest) in enumerate(parts)
                 if letter == own[0] and (rest == own[1] or not rest or not own[1])]
    return found[0] if len(found) == 1 else None


def _letter_and_rest(text: str) -> tuple[str, str] | None:
    """("b", "blue") of "B. blue", "B) blue" or "(B) blue", ("b", "") of a letter alone."""
    found = (re.fullmatch(r"\(?([A-Za-z])[.):]?()", text)
             or re.fullmatch(r"\(?([A-Za-z])(?:\)|[.:](?=\s))\s*(\S.*)", text))
    return (found[1].casefold(), normalise(found[2]).casefold()) if found else None
