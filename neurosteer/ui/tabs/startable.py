"""Work that a visitor starts on a tab and may stop: what its handlers, its buttons and its events have in common."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import gradio as gr

from neurosteer.ui.jobs import BUSY, Handlers
from neurosteer.ui.show import html as render
from neurosteer.ui.wiring import Parts, Updates, bound
from neurosteer.ui.work import QUIET


class Startable(Handlers):
    """Handlers of one kind of work."""

    kind: ClassVar[str]

    def begin(self, request: gr.Request) -> Updates:
        """At once, before the work has its turn: Cancel works from here on."""
        self.jobs.begin(request.session_hash, self.kind)
        return {"start": gr.update(interactive=False), "cancel": gr.update(interactive=True), "error": "", "note": ""}

    def give_up(self) -> Updates:
        """When the server could not even begin."""
        return ended(error=render.error_line(BUSY))

    def stop(self, request: gr.Request) -> None:
        self.jobs.cancel(request.session_hash, self.kind)


def ended(error: str = "", note: str = "") -> Updates:
    """The buttons as they were, and what came of it as a line."""
    off, on = gr.update(interactive=False), gr.update(interactive=True)
    return {"start": on, "cancel": off, "error": error, "note": note}


def wire_work(
    tab: Parts,
    starting: Sequence[Any],
    handlers: Startable,
    work: Callable[..., Updates],
    inputs: Sequence[Any],
    outputs: dict[str, Any],
    *,
    at_once: int,
    shown_on: Any,
) -> None:
    """Each of `starting` begins `work`, at most `at_once` of it for all visitors together; Cancel stops it."""
    buttons = tab.pick("start", "cancel", "error", "note")
    gr.on(starting, *bound(handlers.begin, [], buttons), queue=False, **QUIET).then(
        *bound(work, inputs, {**buttons, **outputs}),
        show_progress_on=shown_on,
        concurrency_id=handlers.kind,
        concurrency_limit=at_once,
        api_visibility="private",
    ).failure(*bound(handlers.give_up, [], buttons), queue=False, **QUIET)
    tab.cancel.click(*bound(handlers.stop), queue=False, **QUIET)
