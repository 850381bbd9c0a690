"""Shared by both readers: text files, parquet rows, texts without markup, which is known by its
place (published/README.md): elsewhere such letters are words ("<image> or <img>?")."""

import json
import re
from pathlib import Path
from typing import Iterator

PLACEHOLDER = r"<\s*/?\s*\|?(?:image|lvr)\w*\|?\s*>"
EDGES = re.compile(rf"(?i)^(?:\s*{PLACEHOLDER})+|(?:{PLACEHOLDER}\s*)+$")
PAIR = re.compile(r"(?is)\s*<\s*(think|answer)\s*>\s*(.*?)\s*<\s*/\s*\1\s*>\s*")
# a prompt may already open a thought, and a limit on tokens may cut off a closing tag
HALF = re.compile(r"(?i)^\s*<\s*(?:think|answer)\s*>\s*|\s*<\s*/\s*(?:think|answer)\s*>\s*")
ANSWER = re.compile(r"(?is)<\s*answer\s*>(.*?)(?:<\s*/\s*answer\s*>|$)")
GIVEN = re.compile(r"(?:^|\s)Answer:\s*(\S.*?)\s*$")  # the end of our trajectories
# with braces nested twice inside; the end of the text may cut a box off
BOX = re.compile(r"(\$?)\\(?:boxed|fbox)\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)(?:\}|$)(\$?)")
FONT = re.compile(r"\\(?:text|textbf|textit|texttt|mathrm|mathbf|mathit)\s*\{([^{}]*)\}")


def read_text(file: Path) -> str:
    """Of a file with or without a byte order mark. Raises ValueError if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 (byte {error.start}); save it as UTF-8") from None


def read_list(file: Path) -> list:
    """The values of a JSON list. Raises ValueError naming the file."""
    try:
        values = json.loads(read_text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON, or cut off ({error})") from None
    if not isinstance(values, list):
        raise ValueError(f"{file} must be a JSON list of records")
    return values


def parquet_rows(files: list[Path]) -> Iterator[dict]:
    try:
        import pyarrow.parquet as parquet  # optional: only ThinkMorph and BLINK need it
    except ImportError:
        raise ValueError(f"{files[0]} needs one more package: pip install pyarrow") from None
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(32):
            yield from batch.to_pylist()


def clean(text: str) -> str:
    return EDGES.sub("", text).strip()  # a question has no other markup than placeholders


def open_boxes(text: str) -> tuple[str, list[str]]:
    r"""A model's turn without markup, and the contents of its boxes, \boxed{...}."""
    contents = []

    def content(match: re.Match) -> str:
        before, inner, after = match.groups()
        contents.append(FONT.sub(r"\1", open_boxes(inner)[0]).strip(" $"))
        # two dollar signs mark a formula, which was the box alone
        return contents[-1] if before and after else before + contents[-1] + after

    # placeholders may be outside and inside a pair of tags
    text = clean(HALF.sub(" ", PAIR.sub(r" \2 ", clean(text)), count=1))
    return BOX.sub(content, text).strip(), contents


def split_answer(text: str) -> tuple[str, str]:
    r"""(words, last answer) of a model's turn; the answer is tagged, boxed or after "Answer:"."""
    if tagged := list(ANSWER.finditer(text)):
        last = tagged[-1]
        return open_boxes(text[:last.start()] + " " + text[last.end():])[0], open_boxes(last[1])[0]
    words, boxes = open_boxes(text)  # the words keep what is in a box: a sentence may need it
    if not boxes and (match := GIVEN.search(words)):
        return words[:match.start()].strip(), match[1]
    return words, boxes[-1] if boxes else ""


def alike(one: str, other: str) -> bool:
    """Whether two spellings are one answer, without marks and case; also "(B)" and "B. red"."""
    one, other = (re.findall(r"[^\s$().,:;*\"'\[\]]+", text.casefold()) for text in (one, other))
    # a letter alone stands for the choice that begins with it
    short, long = sorted((one, other), key=len)
    return one == other or (short == long[:1] and len(short[0]) == 1 and short[0].isalpha())
