"""How long work tells its caller where it is, and how a caller stops it."""

import threading
from typing import Protocol

from neurosteer.errors import Cancelled


class Progress(Protocol):
    """Called with a phrase for people and, where it is known, the share done (0 to 1)."""

    def __call__(self, message: str, fraction: float | None = None) -> None: ...


def silent(message: str, fraction: float | None = None) -> None:
    """A `Progress` that says nothing."""


def check_cancelled(cancel: threading.Event | None, what: str) -> None:
    """Raise `Cancelled` when the caller has set `cancel`."""
    if cancel is not None and cancel.is_set():
        raise Cancelled(f"{what} was cancelled; nothing was changed.")
