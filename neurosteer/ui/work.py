"""What the page's pieces of work share: their progress in words, their time limits, and how their events are set up."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import gradio as gr

from neurosteer.errors import Cancelled, UsageError
from neurosteer.progress import Progress
from neurosteer.ui.limits import MAX_SECONDS

if TYPE_CHECKING:
    from neurosteer.ui.gpu import ModelSession
    from neurosteer.ui.loading import Models

KIND = "build"
PROGRESS = gr.Progress()  # as a default value it is how gradio knows to pass one in

# How many visitors' events of one kind may run at once. Gradio's default is 1: everybody would wait for the slowest.
LIGHT = 32  # only rearranges what is there
READING = 4  # parses a file, or reads a text or two with the model
HUB = 8  # asks the Hub, which may be slow
LINKED = 4  # fetches what a stranger's link names

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": LIGHT}
"""Options of an event that is done at once."""

_places = threading.BoundedSemaphore(2 * HUB)

SOON_S = 60.0  # that a quick piece of work waits for the model
LINK_S = 60.0  # that is given to what a link names

Result = TypeVar("Result")


def in_words(progress: gr.Progress) -> Progress:
    """Gradio's progress as the library's."""

    def report(message: str, fraction: float | None = None) -> None:
        progress(fraction or 0.0, desc=message)

    return report


@contextmanager
def at_most(cancel: threading.Event, remedy: str, seconds: float | None = None) -> Iterator[None]:
    """Sets `cancel` after so many seconds (`MAX_SECONDS` by default). What is cancelled by that ends as a `UsageError`
    that says so and gives the `remedy`."""
    limit, over = MAX_SECONDS if seconds is None else seconds, threading.Event()

    def stop() -> None:
        over.set()
        cancel.set()

    timer = threading.Timer(limit, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Cancelled as error:
        if over.is_set():
            raise UsageError(f"This took over {limit:g} s and was stopped; {remedy}.") from error
        raise
    finally:
        timer.cancel()


def session_soon(models: "Models", name: str | None) -> "ModelSession":
    """The session of a model for a quick piece of work: one that is still on its way is waited for a minute at most.

    Raises as `ModelHolder.wait` does, and `UsageError` when the model has not come by then.
    """
    cancel = threading.Event()
    with at_most(cancel, "the model is still on its way: try again when it is there", SOON_S):
        return models.holder(name).wait(cancel=cancel)


def within(seconds: float, what: str, function: Callable[[], Result]) -> Result:
    """The result of `function`, which is left to itself after so many seconds. Raises `UsageError` then, and where too
    many are left to themselves already."""
    if not _places.acquire(blocking=False):
        raise UsageError(f"{what} has to wait: others wait for the same, and it is slow today; try again in a minute.")
    found: Future[Result] = Future()

    def run() -> None:
        try:
            found.set_result(function())
        except Exception as error:
            found.set_exception(error)
        finally:
            _places.release()

    threading.Thread(target=run, name="neurosteer-hub", daemon=True).start()
    if not wait([found], seconds).done:
        raise UsageError(f"{what} took over {seconds:g} s and was given up; try again later.")
    return found.result()
