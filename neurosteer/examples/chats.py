"""Conversations in a file: `messages` as chat models are trained on. Which of it is the text, and what it answers."""

from collections.abc import Mapping, Sequence
from typing import cast

from neurosteer.examples.refusing import refuse, short
from neurosteer.examples.texts import clean_prompt, clean_text, whole

Turn = tuple[str, str]
"""Who speaks (`system`, `user` or `assistant`), and what."""

Asked = str | tuple[Turn, ...]
"""What a text answers: one request, or a conversation up to the answer. Empty where there is nothing."""

MOST_TURNS = 100
_ROLES = ("system", "user", "assistant")


def is_chat(cell: object) -> bool:
    """Whether a cell holds messages."""
    return isinstance(cell, list) and bool(cell) and isinstance(cell[0], Mapping)


def text_of(cell: object, asked: Asked, where: str) -> tuple[str, Asked]:
    """The text of a cell and what it answers: of a conversation, the assistant's last turn and what comes before it."""
    if not is_chat(cell):
        return clean_text(cell, where), asked
    turns = _turns(cast(list[object], cell), where)
    if turns[-1][0] != "assistant":
        refuse(where, f"the last of the messages is of the {turns[-1][0]}, not of the assistant: end with an answer")
    before = _plain(turns[:-1], where)
    if asked and before and asked != before and (not isinstance(before, tuple) or asked != before[-1][1]):
        refuse(where, "the prompt is not what its messages begin with: leave the column of prompts out")
    return clean_text(turns[-1][1], where), before or asked


def asked_of(cell: object, where: str) -> Asked:
    """What the cell of a prompt holds: a text, or messages that end with the user's."""
    if not is_chat(cell):
        return clean_prompt(cell, where)
    turns = _turns(cast(list[object], cell), where)
    if turns[-1][0] != "user":
        refuse(
            where, f"the last of the prompt's messages is of the {turns[-1][0]}, not of the user: end with a request"
        )
    return _plain(turns, where)


def check_asked(asked: object, where: str) -> Asked:
    """A prompt that was given in Python, or an `ExamplesError`."""
    if isinstance(asked, str):
        return clean_prompt(asked, where)
    if not isinstance(asked, tuple | list):
        refuse(where, f"a prompt is {short(asked)}: give a text, or messages")
    return asked_of([one if isinstance(one, Mapping) else _pair(one, where) for one in asked], where)


def _pair(turn: object, where: str) -> dict[str, object]:
    if not isinstance(turn, tuple | list) or len(turn) != 2:
        refuse(where, f"a turn is {short(turn)}: give who speaks and what")
    return {"role": turn[0], "content": turn[1]}


def _plain(turns: Sequence[Turn], where: str) -> Asked:
    """A single request as its text alone, so that it is the same as one from a column of prompts."""
    kept = tuple((role, clean_prompt(content, where)) for role, content in turns)
    return kept[0][1] if len(kept) == 1 and kept[0][0] == "user" else kept


def _turns(cell: list[object], where: str) -> list[Turn]:
    if len(cell) > MOST_TURNS:
        refuse(where, f"{len(cell)} messages where {MOST_TURNS} are read: shorten the conversation")
    turns = []
    for message in cell:
        if not isinstance(message, Mapping):
            refuse(where, f'a message is {short(message)}: write {{"role": …, "content": …}}')
        fields = cast(Mapping[str, object], message)
        role = fields.get("role")
        if role not in _ROLES:
            refuse(where, f"the role of a message is {short(role)}: use {', '.join(_ROLES)}")
        content = whole(_joined(fields.get("content"), where), where, "a message")
        if not content:
            refuse(where, f"a message of the {role} is empty: leave the conversation out")
        turns.append((str(role), content))
    return turns


def _joined(content: object, where: str) -> object:
    """Content in parts, as some tools write it, in one piece."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(part, str) for part in parts):
        refuse(where, "a message holds more than text: leave the conversation out")
    return "".join(cast(list[str], parts))
