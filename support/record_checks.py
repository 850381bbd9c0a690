"""What a line of trajectories.jsonl must hold, and what is unusual in it and yet used.

Every fault is one sentence that names the fix; support/records.py adds file and line.
"""

import json

from support.answers import contains, has_prefix, normalise, option_index, stated_answer
from support.picture_splits import SPLITS

FIELDS = dict(id=str, image=str, question=str, options=list, answer=str, trajectory=list)
NOT_UNICODE = "is not valid Unicode text; save the file as UTF-8, without halves of characters"
# kinds of unusual records, and what is said of them
TWICE = "have one option twice, or in two forms that count as one, and are left out"
NO_PREFIX = ("have no {prefix!r} in the last text, with which questions are asked and replies "
             "read: give --answer_prefix as these texts have it")
OTHER_WORDS = ("give the answer in other words than the option's; a reply in such words counts as "
               "wrong")


class SameOptionTwice(ValueError):
    """Leaves out one record, and does not end the reading of a folder."""


def checked_record(line: bytes, prefix: str) -> tuple[dict, str]:
    """(fields, kind of unusual record or ""): texts are stripped, steps are (kind, value), and
    `images` are the names of the pictures, the question's first.

    prefix: what last texts put before the answer. Raises ValueError, or SameOptionTwice.
    """
    record = _parse(line)
    for key, kind in FIELDS.items():
        if not isinstance(record.get(key), kind):
            raise ValueError(f"field {key!r} must be a {kind.__name__}; found "
                             f"{record.get(key)!r:.80}")
    # "family" is an older name of the field
    record["task"] = record.get("task", record.get("family", "questions"))
    for key in ("id", "question", "task", "image"):
        record[key] = _text(record[key], key)
    if record.get("split") not in (None, *SPLITS):
        raise ValueError(f"split {record['split']!r} is none of {', '.join(SPLITS)}")
    steps = [_step(step, n) for n, step in enumerate(record["trajectory"])]
    if not steps or steps[-1][0] != "text":
        raise ValueError("the trajectory must end in a text that gives the answer")
    options = [_text(option, "every option") for option in record["options"]]
    if len(set(map(normalise, options))) < len(options):
        raise SameOptionTwice("an option is there twice, or in two forms that count as one: "
                              f"{options!r:.200}")
    # most answers are an option to the letter, which takes no comparison of forms
    answer = record["answer"].strip()
    right = options.index(answer) if answer in options else option_index(answer, options)
    if right is None:
        raise ValueError(f"answer {answer!r:.80} is not among the options {options!r:.200}")
    images = [record["image"], *(value for kind, value in steps if kind == "image")]
    record.update(trajectory=steps, images=images, options=options, answer=options[right])
    return record, _check_last_text(steps[-1][1], options, options[right], prefix)


def _parse(line: bytes) -> dict:
    """The JSON object in a line; a byte order mark before it is no fault."""
    try:
        record = DECODER.decode(line.removeprefix(b"\xef\xbb\xbf").decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg} at column {error.colno}); write one object "
                         "a line") from None
    except UnicodeDecodeError:
        raise ValueError(f"the line {NOT_UNICODE}") from None
    except RecursionError:
        raise ValueError("nested too deeply; write the object that the README shows") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    return record


def _fields(pairs: list[tuple]) -> dict:
    """Of a field that is there twice, json would keep the last and say nothing."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} is there twice; keep one")
    return record


# made once: json.loads would make one for each line
DECODER = json.JSONDecoder(object_pairs_hook=_fields)


def _text(value, name: str) -> str:
    """The value without blanks at its ends. Raises ValueError unless it is text, and not empty."""
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise ValueError(f"{name} must be a non-empty string; found {value!r:.80}")
    # JSON can write what UTF-8 cannot
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} {NOT_UNICODE}") from None
    return text


def _step(step, n: int) -> tuple[str, str]:
    """("text", its words) or ("image", its file's name)"""
    if not isinstance(step, dict) or len(step) != 1 or not step.keys() <= {"text", "image"}:
        raise ValueError(f"trajectory step {n} must be {{'text': ...}} or {{'image': ...}}; found "
                         f"{step!r:.80}")
    [(kind, value)] = step.items()
    return kind, _text(value, f"trajectory step {n}: {kind}")


def _check_last_text(text: str, options: list[str], answer: str, prefix: str) -> str:
    """The kind of unusual record or "". Raises ValueError if the text says another answer.

    A text that says none of the options literally must contain the answer's words, whole, and no
    other option's.
    """
    # most texts end in the prefix and the very answer, which takes no comparison of forms
    head, found, end = text.rpartition(prefix.strip() or "\0")
    if found and not head[-1:].isalnum() and end.strip(" .") == answer:
        return ""
    stated = stated_answer(text, prefix)
    given = text if stated is None else stated
    said = option_index(given, options)
    right = said is not None and options[said] == answer
    if said is None:
        others = [o for o in options if stated is not None and not contains(answer, o)]
        right = contains(given, answer) and not any(contains(given, o) for o in others)
    if not right and stated is None and said is None:
        raise ValueError(f"the last text of the trajectory does not contain the answer "
                         f"{answer!r:.80}")
    if not right:
        raise ValueError(f"the last text says {given!r:.80} but the field 'answer' is "
                         f"{answer!r:.80}; correct one of them")
    if not has_prefix(text, prefix):
        return NO_PREFIX
    return OTHER_WORDS if said is None else ""
