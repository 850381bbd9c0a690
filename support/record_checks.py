"""What a line of trajectories.jsonl must hold, and what is unusual in it and yet used.

Every fault is one sentence that names the fix; support/records.py adds file and line.
"""

import json

from support.answers import contains, has_prefix, normalise, option_index, stated_answer
from support.picture_splits import SPLITS

# kinds of unusual records, and what is said of them
TWICE = "have one option twice, or in two forms that count as one, and are left out"
NO_PREFIX = ("have no {prefix!r} in the last text, with which questions are asked and replies "
             "read: give --answer_prefix as these texts have it")
OTHER_WORDS = ("give the answer in other words than the option's; a reply in such words counts as "
               "wrong")


def checked_record(line: bytes, prefix: str) -> tuple[dict, str]:
    """(fields, kind of unusual record or ""): texts are stripped, steps are (kind, value), and
    `images` are the names of the pictures, the question's first. A record of the kind TWICE cannot
    be used, and not all of it is checked.

    prefix: what last texts put before the answer. Raises ValueError.
    """
    record = _parse(line)
    record.setdefault("task", "questions")
    for key in ("id", "task", "image", "question", "answer"):
        record[key] = _text(record.get(key), f"field {key!r}")
    for key in ("options", "trajectory"):
        if not isinstance(record.get(key), list):
            raise ValueError(f"field {key!r} must be a list; found {record.get(key)!r:.80}")
    if record.get("split") not in (None, *SPLITS):
        raise ValueError(f"split {record['split']!r} is none of {', '.join(SPLITS)}")
    steps = [_step(step, n) for n, step in enumerate(record["trajectory"])]
    if not steps or steps[-1][0] != "text":
        raise ValueError("the trajectory must end in a text that gives the answer")
    answer, options = record["answer"], [_text(text, "every option") for text in record["options"]]
    if len(set(map(normalise, options))) < len(options):
        return record, TWICE
    # most answers are an option to the letter, which takes no comparison of forms
    right = options.index(answer) if answer in options else option_index(answer, options)
    if right is None:
        raise ValueError(f"answer {answer!r:.80} is not among the options {options!r:.200}")
    images = [record["image"], *(value for kind, value in steps if kind == "image")]
    record.update(trajectory=steps, options=options, answer=options[right], images=images)
    return record, _check_last_text(steps[-1][1], options, options[right], prefix)


def _parse(line: bytes) -> dict:
    try:
        # without a byte order mark
        record = json.loads(line.strip().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = str(error).replace("line 1 ", "")
        raise ValueError(f"not valid JSON in UTF-8 ({reason}); write one object a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    return record


def _text(value, name: str) -> str:
    """The value without blanks at its ends. Raises ValueError unless it is text, and not empty."""
    text = value.strip() if isinstance(value, str) else ""
    if not text:
        raise ValueError(f"{name} must be a non-empty string; found {value!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can write what UTF-8 cannot
        raise ValueError(f"{name} holds half of a character, which is not valid Unicode") from None
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
    head, mark, end = text.rpartition(prefix.strip() or "\0")
    if mark and not head[-1:].isalnum() and end.strip(" .") == answer:
        return ""
    stated = stated_answer(text, prefix)
    words = text if stated is None else stated
    option = option_index(words, options)
    right = option is not None and options[option] == answer
    if option is None:
        others = [o for o in options if stated is not None and not contains(answer, o)]
        right = contains(words, answer) and not any(contains(words, o) for o in others)
    if not right:
        raise ValueError(f"the last text says {words!r:.80} but the field 'answer' is "
                         f"{answer!r:.80}; correct one of them")
    if not has_prefix(text, prefix):
        return NO_PREFIX
    return OTHER_WORDS if option is None else ""
