"""What several test files ask of the command line and of errors."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from neurosteer.errors import NeuroSteerError


class Ran(NamedTuple):
    """What the command line left behind: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


def assert_one_clear_line(ran: Ran, *words: str) -> None:
    """A mistake of the user's: exit code 2, nothing on stdout, and one line that holds `words`, warnings aside."""
    assert ran.code == 2, ran
    assert ran.out == ""
    (line,) = [line for line in ran.err.splitlines() if not line.startswith("Warning: ")]
    assert line.startswith("neurosteer: ")
    for word in words:
        assert word in line, line


def refused(call: Callable[[], object], kind: type[NeuroSteerError], *words: str) -> str:
    """The message of the error that `call` raises: one line of sane length that holds `words`."""
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and len(message) < 500, message
    for word in words:
        assert word in message, message
    return message
