r"""What both readers share: files as text, parquet rows, a picture's digest, texts without markup.

Published texts carry the markup of the models they were made for: <think>, <answer>, <image_start>,
\boxed{}. None of it means anything here, and a tag that is left becomes a word that is learned.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Iterator

from support.images import Picture, opened

TAG = re.compile(r"\s*<\s*/?\s*\|?\s*(?:answer|think|image(?:_start|_end|_\d+)?|lvr(?:_\w+)?)"
                 r"\s*\|?\s*/?\s*>\s*", re.IGNORECASE)
ANSWER = re.compile(r"<\s*answer\s*>(.*?)(?:<\s*/\s*answer\s*>|$)", re.DOTALL | re.IGNORECASE)
GIVEN = re.compile(r"(?:^|\s)Answer:\s*(\S.*?)\s*$")  # the last words of a trajectory here
BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
FONT = re.compile(r"\\(?:text|textbf|textit|texttt|mathrm|mathbf|mathit)\s*\{([^{}]*)\}")


# ---- files -----------------------------------------------------------------------------------


def read_text(file: Path) -> str:
    """A text file, with or without a byte order mark. FileNotFoundError, ValueError name it."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} not found") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 (byte {error.start}); save it as UTF-8") from None


def parse(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def parquet_rows(files: list[Path], name: str) -> Iterator[dict]:
    """Rows of parquet files; name: the data set, for the message where no reader is installed."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{name} is published as parquet, which needs one more package: "
                         "pip install pyarrow") from None
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(32):
            yield from batch.to_pylist()


def digest(picture: Picture) -> str:
    """A name for what a picture shows: equal for equal pixels, whatever file they come from."""
    image = opened(picture).convert("RGB")
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32]


# ---- texts -----------------------------------------------------------------------------------


def unboxed(text: str) -> tuple[str, list[str]]:
    r"""The text with every \boxed{...} replaced by what is in it, and what was in them.

    Braces in a box may nest, and a box that the end of the text cuts off reaches to it.
    """
    contents, start = [], 0
    while match := BOX.search(text, start):
        end, depth = match.end(), 1
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        inner = unboxed(text[match.end():end - (depth == 0)])[0]
        inner = FONT.sub(r"\1", inner).strip(" $")
        before, after = text[:match.start()], text[end:]
        if before.endswith("$") and after.startswith("$"):  # the formula is the box alone
            before, after = before[:-1], after[1:]
        contents.append(inner)
        text, start = before + inner + after, len(before) + len(inner)
    return text, contents


def clean(text: str) -> str:
    return unboxed(TAG.sub(" ", text))[0].strip()


def split_answer(text: str) -> tuple[str, str]:
    r"""(words, answer) of a text that gives its answer in <answer> tags, boxed or after "Answer:".

    The last one counts; a box's content stays among the words. Without any the answer is "".
    """
    if tagged := list(ANSWER.finditer(text)):
        last = tagged[-1]
        return clean(text[:last.start()] + " " + text[last.end():]), clean(last[1])
    words, boxes = unboxed(TAG.sub(" ", text).strip())
    if not boxes and (named := GIVEN.search(words)):
        return words[:named.start()].strip(), named[1]
    return words.strip(), boxes[-1] if boxes else ""


def alike(said: str, answer: str) -> bool:
    """Whether two spellings name one answer, marks and case aside; also "(B)" for "B. red"."""
    a, b = (re.sub(r"[\s$().,:;*\"'\[\]]+", " ", text).strip().casefold()
            for text in (said, answer))
    short, long = sorted((a, b), key=len)
    return a == b or (len(short) == 1 and short.isalpha() and long.split(" ")[0] == short)
