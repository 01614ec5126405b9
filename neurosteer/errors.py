"""Errors that a caller may want to tell apart. Every message says what was wrong, with what value, and what to do."""


class NeuroSteerError(Exception):
    """The base of every error this package raises on purpose."""


class ExamplesError(NeuroSteerError):
    """Examples could not be read, or do not make a contrast set."""


class ArtifactError(NeuroSteerError):
    """An artifact is damaged, incomplete or not valid."""


class MismatchError(ArtifactError):
    """An artifact does not fit the model it is used with."""


class ModelError(NeuroSteerError):
    """A model could not be found, loaded or understood."""


class UsageError(NeuroSteerError):
    """An argument is not one of the allowed values."""


class HubError(NeuroSteerError):
    """The Hub refused something, or holds something else than was asked for.

    `status` is the HTTP status it answered with, where that was the reason.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class HubUnreachable(HubError):
    """The Hub could not be reached, did not answer in time, or failed."""


class Cancelled(NeuroSteerError):
    """The caller asked for the work to stop."""
