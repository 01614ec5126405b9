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


class Cancelled(NeuroSteerError):
    """The caller asked for the work to stop."""
