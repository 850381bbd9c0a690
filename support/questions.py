"""Test questions as tokens, in batches, and the record of an answer."""

from collections.abc import Callable
from typing import NamedTuple

from support import answers
from support.chat import Chat, View
from support.features import LoadedImage
from support.processes import progress
from support.records import Example


class Question(NamedTuple):
    """A test question as tokens."""

    prompt: View  # <I0, Q> and the generation prompt
    started: View  # the same, with the answer started: "Answer:"
    options: list[list[int]]  # the tokens of each option behind it
    # the prompt for the last text of the trajectory, tool images given; None: it has no tool image
    tool: View | None


def make_question(chat: Chat, example: Example, images: list[LoadedImage],
                  form: answers.AnswerForm) -> Question:
    """form: how the answer is written. Raises ValueError naming an example that cannot be asked,
    because of a special token in its texts or its length."""
    chat.check_text(example)
    turns = chat.turns(example)
    started, options = started_answer(chat, example, images[:1], form)
    longest, tool = len(started.ids) + max(map(len, options)), None
    # a family that shows a single image differently from several can only be asked directly
    if len(images) > 1 and not chat.family.single_image_only:
        longest = max(longest, len(chat.conversation(turns, images).without_layout().ids))
        last = max(n for n, (role, _) in enumerate(turns) if role == "user")
        tool = chat.prompt(turns[:last + 1], images)
    chat.check_length(longest, example)
    return Question(chat.prompt(turns[:1], images[:1]), started, options, tool)


def started_answer(chat: Chat, example: Example, images: list[LoadedImage],
                   form: answers.AnswerForm) -> tuple[View, list[list[int]]]:
    """<I0, Q> with the answer started, and the tokens of each option behind it."""
    whole, ends = [], []
    # each option is tokenised as training would: inside the whole answer
    for option in example.options:
        turns = [*chat.turns(example)[:1], ("assistant", [form.text(option)])]
        answer = chat.conversation(turns, images).without_layout()
        whole.append(answer.ids)
        prefix_end = answer.speeches[0].words + len(form.prefix)
        # the option's own tokens end here; its full stop and the end of the turn follow
        ends.append(answer.first_after(prefix_end + len(form.gap) + len(option) - 1) + 1)
    # the prompt is what all options share, up to the end of the prefix
    start = answer.first_after(prefix_end)
    # a tokenizer may join the prefix's last letters with an option's first ones
    while any(ids[:start] != whole[0][:start] for ids in whole):
        start -= 1
    options = [ids[start:end] for ids, end in zip(whole, ends)]
    # where one option begins another ("top", "top left"), the end of the turn decides
    if any(a is not b and b[:len(a)] == a for a in options for b in options):
        options = [ids[start:] for ids in whole]
    keys = [image.key for image in images]
    return View(whole[0][:start], [-100] * start, keys, start - 1), options


def in_batches(views: list[View | None], answer: Callable, batch: int) -> list:
    """answer(views, their numbers) over batches of similar length; results in the views' order,
    None where a view is None."""
    results: list = [None] * len(views)
    # sorted by length, because a short prompt beside a long one is mostly padding
    order = sorted((n for n, view in enumerate(views) if view), key=lambda n: len(views[n].ids))
    for start in progress(range(0, len(order), batch), "answers"):
        numbers = order[start:start + batch]
        for n, result in zip(numbers, answer([views[n] for n in numbers], numbers)):
            results[n] = result
    return results


def answer_record(example: Example, answers_by_way: dict[str, dict], prefix: str) -> dict:
    """What a run keeps of an example's answers: for each way the text, whether it is right, and
    its cost."""
    record = dict(id=example.id, task=example.task, options=example.options, answer=example.answer,
                  cost={})
    for way, answer in answers_by_way.items():
        text, option = answer["text"], answer.get("option")
        # a tool call that fails gives no answer, and the direct one counts
        if answer.get("failed"):
            text, option = f"({answer['failed']})", answers_by_way["direct"]["option"]
        elif "option" not in answer:
            option = answers.says(text, example.options, prefix)
        record[way], record[f"{way}_right"] = text, option == example.options.index(example.answer)
        record["cost"][way] = {name: value for name, value in answer.items()
                               if name not in ("text", "option", "log_probs")}
    return record
