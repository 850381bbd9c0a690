r"""How the data write an answer, and which option a text says: "B" and "\boxed{x}" say "B. x".

"It is big. Answer: **seven**." has the form: prefix "Answer:", gap " **", closing "**."."""

import re
from functools import cache, lru_cache
from statistics import mode
from typing import NamedTuple
from unicodedata import category, normalize

TAG, COMMAND = r"</?\w[\w-]*>", r"\\(?:boxed|text\w*|math\w*)\s*\{"  # they change no value
OPENED = rf"(?:{TAG}|{COMMAND}|[*_$`\"'“‘„«「『(（\[{{]){{,9}}"
STATED = re.compile(r"(?is)\\boxed\s*{((?:[^{}]|{[^{}]*})*)(?:}|$)|<answer>(.*?)(?:</answer>|$)")
WORD = r"[^\W\d_\u0e00-\U0010ffff]+"  # from Thai on, scripts put no blanks between words
# A number (also a date or range), a word (also p.m, don't, C++, C#, O-), a minus, any other sign.
TOKEN = re.compile(rf"\.?\d+(?:[.,:/-]\d+)*|{WORD}(?:['.]{WORD})*(?:[+#]+|-(?!\w))?"
                   r"|-(?=\s*\d)|(?<!\w)-(?=\S)|[^\s-]")
LETTER = re.compile(r"(?i)^(?:option (?:[*(] )*)?([a-z])(?: [.:)\]](?: [*(])* (.+))?$")  # "B ) red"


class AnswerForm(NamedTuple):
    """How the last texts of a data set write an answer."""
    prefix: str  # without blanks at its ends, with marks that open just before it
    gap: str  # between prefix and answer: blanks, marks that open
    closing: str  # after the answer: a full stop, marks that close

    def text(self, option: str) -> str:
        return self.prefix + self.gap + option + self.closing


def form_of(last_text: str, answer: str, prefix: str) -> AnswerForm | None:
    """How this text writes its answer; None if it does not end in it ("-5" does not end in 5)."""
    match = re.search(rf"(?i)({OPENED}{_pattern(prefix)})((?:{TAG}|{COMMAND}|\W)*?)"
                      rf"({_pattern(answer)})((?:{TAG}|\W)*)$", last_text)
    # a blank and a full stop change no answer; of other signs the comparison decides
    bare = match and (not (match[2] + match[4]).strip(" .")
                      or normalise("".join(match.groups()[1:])) == normalise(match[3]))
    return AnswerForm(match[1], match[2], match[4]) if bare else None


def default_form(prefix: str) -> AnswerForm:
    """The form where no text shows one: a blank, but not in Chinese; tags and braces are closed."""
    closing = "".join(f"</{t}>" if t else "}" for t in re.findall(r"<([\w-]+)>|{", prefix)[::-1])
    tight = re.search(r"^$|\w>$|\{$|[\u3000-\u9fff\uff00-\uffef]\W?$", prefix.strip())
    return AnswerForm(prefix.strip(), "" if tight else " ", closing)


def forms(examples: list, prefix: str) -> list[AnswerForm]:
    """How each example's last text writes its answer; the most frequent form for those whose text
    does not show it, or else the default."""
    own = [form_of(ex.texts[-1], ex.answer, prefix) if ex.texts else None for ex in examples]
    common = mode(filter(None, own)) if any(own) else default_form(prefix)
    return [form or common for form in own]


def has_prefix(text: str, prefix: str) -> bool:
    """Whether the prefix stands in the text; an empty one always does."""
    return re.search(_pattern(prefix), text, re.IGNORECASE) is not None


def stated_answers(text: str, prefix: str) -> list[str]:
    r"""What follows each prefix, the last one first, or stands in the last \boxed{} or <answer>."""
    prefix = re.sub(r"(?:<answer>|\\boxed\s*\{)*$", "", prefix.strip())  # found by STATED
    ends = [m.end() for m in re.finditer(_pattern(prefix), text, re.IGNORECASE)] if prefix else []
    stated = [text[end:].strip() for end in reversed(ends)]
    for n, inside in enumerate(stated or [text]):
        while marked := STATED.findall(inside):
            inside = "".join(marked[-1]).strip()
            stated[n:n + 1] = [inside]
    return stated


def says(text: str, options: list[str], prefix: str) -> int | None:
    """The index of the option that a reply gives as its answer; None if it gives none of them."""
    stated = stated_answers(text, prefix) or [text]
    # what follows the last prefix counts, unless an option has the prefix in it
    count = len(stated) if any(has_prefix(option, prefix) for option in options) else 1
    indices = [option_index(words, options) for words in stated[:count]]
    return next((n for n in indices if n is not None), None)


def option_index(text: str, options: list[str]) -> int | None:
    """The one option that the text is: normalised, without case unless two differ by it alone."""
    reply, *names = (normalise(words) for words in (text, *options))
    if len({name.casefold() for name in names}) == len(set(names)):
        reply, *names = (name.casefold() for name in (reply, *names))
    (letter, words), *parts = [(LETTER.findall(n) or [("", n)])[0] for n in (reply, *names)]
    # "B" and "blue" are "B. blue", and "B. blue" is "B", but "B. red" is not "B. blue"
    matches = [n for n, (label, rest) in enumerate(parts) if reply and letter in ("", label)
               and (words == rest or letter and (not words or not rest and words not in names))]
    return matches[0] if len(matches) == 1 else None


def contains(text: str, answer: str) -> bool:
    """Whether the answer's words stand in the text, whole. The "A" of "A man" is no answer."""
    text, answer = (re.sub(r"^[AI] (?=[a-z])|\b[ai] (?=[a-z])", "", normalise(words)).casefold()
                    for words in (text, answer))
    return f" {answer} " in f" {text} "


@lru_cache(4096)  # options repeat
def normalise(text: str) -> str:
    """What is compared, in its own case: words and signs, without punctuation around them."""
    text = re.sub(r"(?<=[a-zA-Z\d])(?=[²³¹⁰-₉¼-¾⅐-⅞])", "^", text)  # or 5² would be 52
    text = normalize("NFKC", text).translate(str.maketrans("−–‐’⁄", "---'/"))
    # tags go only where one is closed ("<div>" may be an answer), dollar signs only in LaTeX
    plain = re.sub(rf"{TAG if '</' in text else COMMAND}|{COMMAND}|\\(?=\W)|`", " ", text)
    plain = re.sub(r"\$+([^$]+)\$+(?!\d)|(?<=[^\s\d])\$+(?!\w)", r"\1", plain)
    plain = re.sub(r"\[[^\[\]]*\]", lambda box: box[0].replace(",", ", "), plain)  # [100,200]
    # 1,000 is 1000, and 3.0 is 3; 1.000 may be either
    plain = re.sub(r"(?<=\d)(?<!\d{4}),(?=\d{3}(?!\d))", "", plain)
    plain = re.sub(r"(?<![\w.,:/])(\d+\.(?!\d{3}(?!\d))\d*?)0+(?!\.?\d)", r"\1", plain)
    tokens = TOKEN.findall(plain)
    words = [n for n, t in enumerate(tokens) if t[1:] or t in "%‰-" or category(t)[0] != "P"]
    return " ".join(tokens[words[0]:words[-1] + 1]).replace("- ", "-") if words else text.strip()


@cache
def _pattern(words: str) -> str:
    """Finds whole words, composed or decomposed; for "" the start of a text."""
    words = re.escape(words.strip().replace("：", ":")).replace(":", "[:：]")
    forms = "|".join(normalize(form, words) for form in ("NFC", "NFD"))
    return rf"(?:\b|(?![a-z]))(?:{forms})(?:\b|(?<![a-z]))" if words else "^"
