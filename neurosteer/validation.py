"""Checks of values that come from files and callers, each refused in one line."""

import json
import math
import re
from collections.abc import Collection
from typing import Any

from neurosteer.errors import ArtifactError, UsageError
from neurosteer.text import shown

POSITIONS = ("all", "prompt", "generated")
_SOME = re.compile(r"(first|last):[1-9][0-9]{0,5}", re.ASCII)


def check_text(what: str, value: object, limit: int, *, empty: bool = False) -> None:
    if not isinstance(value, str) or len(value) > limit or (not value and not empty) or not _encodes(value):
        raise ArtifactError(f"The {what} is {shown(value)}; it must be a text of at most {limit} characters.")


def _encodes(text: str) -> bool:
    """Whether `text` can be written to a file (lone surrogates cannot)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_json(what: str, data: Any) -> None:
    try:
        json.dumps(data, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"The {what} cannot be kept as JSON ({' '.join(str(error).split())[:100]}).") from error


def check_choice(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ArtifactError(f"The {what} is {shown(value)}; it must be one of {', '.join(allowed)}.")


def check_option(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise `UsageError` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UsageError(f"{name} is {shown(value)}; it must be one of {', '.join(allowed)}.")


def check_positions(value: object) -> str:
    """`value`, if it says which tokens are steered: `all`, the `prompt`, what is `generated`, its `first:N` tokens, or
    the prompt's `last:N`. Raises `UsageError`."""
    if isinstance(value, str) and (value in POSITIONS or _SOME.fullmatch(value)):
        return value
    raise UsageError(f"positions is {shown(value)}; it must be one of {', '.join(POSITIONS)}, first:N or last:N.")


def check_count(name: str, value: object, low: int, high: int) -> None:
    """Raise `UsageError` unless `value` is a whole number from `low` to `high`."""
    if not is_int(value) or not low <= value <= high:  # type: ignore[operator]
        raise UsageError(f"{name} is {shown(value)}; it must be a whole number from {low} to {high}.")


def check_number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """Raise `UsageError` unless `value` is a number from `low` (with `above`: above it) to `high`."""
    if not is_finite(value) or not low <= value <= high or (above and value == low):  # type: ignore[operator]
        bounds = f"above {low:g} and at most {high:g}" if above else f"a number from {low:g} to {high:g}"
        raise UsageError(f"{name} is {shown(value)}; it must be {bounds}.")


def is_int(value: object) -> bool:
    """Whether `value` is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether `value` is a number that a float can hold; NaN, True and False are none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # a whole number beyond what a float holds
        return False
