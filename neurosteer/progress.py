"""How long work tells its caller where it is, and how a caller stops it."""

import threading
from dataclasses import dataclass
from typing import Protocol, TypedDict

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


class JobArguments(TypedDict):
    """The two keyword arguments that every long function takes."""

    progress: Progress
    cancel: threading.Event | None


@dataclass(frozen=True)
class Job:
    """A caller's `progress` and `cancel`, carried together through the functions that do parts of its work."""

    progress: Progress = silent
    cancel: threading.Event | None = None

    @property
    def named(self) -> JobArguments:
        """For a function that takes the two by name: `f(…, **job.named)`."""
        return {"progress": self.progress, "cancel": self.cancel}

    def check(self, what: str) -> None:
        """Raise `Cancelled` when the caller has cancelled."""
        check_cancelled(self.cancel, what)
