"""A question as the turns of a conversation, in the form that the model's chat template takes.

Most templates take a turn as plain text, with the vision placeholder written in; some take it in parts alone
(`{"type": "image"}`, `{"type": "text", "text": ...}`), as transformers gives them, and drop or garble a text. Which
form is right is found out once, by a question of marks that has to come out whole. Where both are, it is the text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from megatron_papo.data.chat_template import TemplateFailed, TemplateTookTooMuch

PLACEHOLDER = "<image>"
"""Stands in a problem's text where a picture belongs."""
VISION_START, IMAGE_PAD, VISION_END, VIDEO_PAD = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"

Form = Literal["text", "parts"]
Turns = list[dict[str, Any]]
Render = Callable[[Turns, bool], str]
"""(turns, whether the assistant's turn is opened behind them) -> the text."""

_MARKS = ("Zq1", "Zq2", "Zq3")
_PROBES = (_MARKS[0], PLACEHOLDER.join(_MARKS))
"""A question without pictures, and one with two."""


def instructed(problem: str, instruction: str) -> str:
    """The question that the user's turn asks: the instruction follows after a blank line, as in PAPO's code."""
    return f"{problem.strip()}\n\n{instruction}" if instruction else problem


def turns_of(question: str, system: str | None, form: Form) -> Turns:
    """`question` with `<image>` where a picture belongs, behind the system turn."""
    spoken = [] if system is None else [{"role": "system", "content": content_of(system, form)}]
    return [*spoken, {"role": "user", "content": content_of(question, form)}]


def content_of(question: str, form: Form) -> str | list[dict[str, str]]:
    if form == "text":
        return question.replace(PLACEHOLDER, VISION_START + IMAGE_PAD + VISION_END)
    content = []
    for number, piece in enumerate(question.split(PLACEHOLDER)):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": piece}] if piece else []
    return content


def find_form(render: Render, system: str | None) -> Form:
    """Raises TemplateFailed for a template that gives no question back in either form, or opens the assistant's turn
    twice."""
    reasons = []
    forms: tuple[Form, ...] = ("text", "parts")
    for form in forms:
        try:
            for question in _PROBES:
                text = render(turns_of(question, system, form), True)
                check_rendered(text, question, system)
                if any(text.count(mark) > 1 for mark in _MARKS):
                    raise TemplateFailed("writes the question twice")
        except TemplateTookTooMuch:
            raise
        except TemplateFailed as error:
            reasons.append(f"{error} (given a turn's {form})")
            continue
        _check_opening(render, turns_of(_MARKS[0], system, form))
        return form
    raise TemplateFailed(", and ".join(reasons))


def check_rendered(text: str, question: str, system: str | None) -> None:
    """Raises TemplateFailed unless the pieces of the question and its pictures stand in `text` whole and in order."""
    pieces = question.split(PLACEHOLDER)
    num_images = text.count(IMAGE_PAD)
    if num_images != len(pieces) - 1:
        raise TemplateFailed(f"writes {num_images} image tokens for {len(pieces) - 1}")
    if system is not None and system.strip() not in text:
        raise TemplateFailed("drops or changes the system turn")
    place = 0
    for number, piece in enumerate(pieces):
        for wanted in [IMAGE_PAD] * (number > 0) + [piece.strip()]:
            place = text.find(wanted, place)
            if place < 0:
                raise TemplateFailed("drops or changes the question, or where its pictures are")
            place += len(wanted)


def _check_opening(render: Render, turns: Turns) -> None:
    """Whether what opens the assistant's turn stands twice: within it, or behind turns that end with it already."""
    closed, opened = render(turns, False), render(turns, True)
    opening = opened.removeprefix(closed).strip()
    if not opening or not opened.startswith(closed):
        return
    first, second = opening[: len(opening) // 2].strip(), opening[(len(opening) + 1) // 2 :].strip()
    if closed.strip().endswith(opening) or (first and first == second):
        raise TemplateFailed("opens the assistant's turn twice")
