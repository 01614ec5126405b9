"""What every handler needs: stopping a visitor's work, and turning whatever goes wrong into one line."""

import functools
import logging
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.context import LocalContext
from gradio.utils import get_upload_folder

from neurosteer.errors import NeuroSteerError
from neurosteer.ui.show import html as render

if TYPE_CHECKING:
    from neurosteer.ui.loading import Models

logger = logging.getLogger(__name__)

BUSY = "Too many visitors are waiting at the moment; what you entered is kept, so please try again in a minute."


def new_folder() -> Path:
    """A new folder among gradio's uploads: of files elsewhere gradio makes copies."""
    Path(get_upload_folder()).mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=get_upload_folder(), prefix="neurosteer-"))


class Jobs:
    """The cancel events of running work, by visitor and kind of work, and the files that visitors uploaded or
    can download. One visitor never stops another's work nor removes another's file."""

    def __init__(self) -> None:
        self._events: dict[tuple[str | None, str], threading.Event] = {}
        self._files: dict[str | None, set[Path]] = {}
        self._folders: dict[str | None, Path] = {}
        self._lock = threading.Lock()

    def begin(self, visitor: str | None, kind: str) -> threading.Event:
        """A fresh event for work that is about to be queued; what this visitor still had running of it is stopped."""
        event = threading.Event()
        with self._lock:
            previous = self._events.get((visitor, kind))
            self._events[visitor, kind] = event
        if previous is not None:
            previous.set()
        return event

    def current(self, visitor: str | None, kind: str) -> threading.Event:
        """The event that `begin` made, or a fresh one."""
        with self._lock:
            return self._events.setdefault((visitor, kind), threading.Event())

    @contextmanager
    def alone(self, visitor: str | None) -> Iterator[threading.Event]:
        """The event of work beside which the same visitor may have more of its kind; forgotten after."""
        kind = uuid.uuid4().hex
        try:
            yield self.begin(visitor, kind)
        finally:
            with self._lock:
                self._events.pop((visitor, kind), None)

    def cancel(self, visitor: str | None, kind: str) -> None:
        with self._lock:
            event = self._events.get((visitor, kind))
        if event is not None:
            event.set()

    def remove_later(self, visitor: str | None, *files: str | None) -> None:
        """Remember a visitor's files, to remove them when they leave."""
        with self._lock:
            self._files.setdefault(visitor, set()).update(Path(path) for path in files if path)

    def remove_uploads_later(self, visitor: str | None, *files: str | None) -> None:
        """As `remove_later`, for what a visitor says they uploaded. A file that nobody uploaded (another's download,
        say) is left alone when they leave."""
        page = LocalContext.blocks.get(None)  # None where no page called
        self.remove_later(visitor, *(path for path in files if path and (page is None or path in page.upload_file_set)))

    def folder(self, visitor: str | None) -> Path:
        """A folder of the visitor's own, gone when they leave."""
        with self._lock:
            if visitor not in self._folders:
                self._folders[visitor] = new_folder()
            return self._folders[visitor]

    def leave(self, visitor: str | None) -> None:
        """Stop and forget everything of a visitor who closed the page. (A file that two uploaded is one file.)"""
        with self._lock:
            keys = [key for key in self._events if key[0] == visitor]
            events = [self._events.pop(key) for key in keys]
            files = self._files.pop(visitor, set()).difference(*self._files.values())
            folder = self._folders.pop(visitor, None)
        for event in events:
            event.set()
        for file in files:
            with suppress(OSError):
                file.unlink()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


class Handlers:
    """What happens on a part of the page, with its models and the work that visitors have under way."""

    def __init__(self, models: "Models", jobs: Jobs) -> None:
        self.models = models
        self.jobs = jobs


def problem(error: Exception) -> str:
    """One line for people about what went wrong; the traceback of a fault of ours goes to the log."""
    if isinstance(error, NeuroSteerError):
        return str(error)
    logger.error("A handler failed", exc_info=error)
    return f"Something went wrong on our side ({type(error).__name__}); what you entered is kept, so please try again."


def guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
    """`handler`, for components without an error line of their own: what goes wrong pops up as one line."""

    @functools.wraps(handler)
    def run(*values: Any) -> Any:
        try:
            return handler(*values)
        except Exception as error:  # gradio shows the message as HTML
            raise gr.Error(escape(problem(error)), print_exception=False) from error

    return run


def told(where: str, **beside: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A handler of updates by name: what goes wrong becomes one line in the component `where`; `beside` are the updates
    that come with it."""

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def run(*values: Any) -> Any:
            try:
                return handler(*values)
            except Exception as error:
                return {where: render.error_line(problem(error)), **beside}

        return run

    return decorate
