"""Whose turn it is: gradio's queue, in which nobody takes all the places and clients take turns.

Gradio's own queue is one list a kind of work, first come, first served: whoever sends two hundred requests is served
two hundred times before the next visitor. Here the client whose last turn is longest ago comes next, nobody holds more
than their places, and work that nobody listens for any more is dropped.
"""

import asyncio
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import HTTPException
from gradio.queueing import Event, Queue
from gradio.utils import run_coro_in_background

from neurosteer.ui import limits
from neurosteer.ui.jobs import BUSY

SWEEP_S = 5.0
UNHEARD_S = 60.0  # that work may go on while nobody listens: as long as a program may take to come back for it
_REMEMBERED = 10_000


@dataclass(frozen=True)
class Caller:
    """Who sends a request: the address it comes from, and whether it can only come from the page itself."""

    address: str
    from_page: bool

    @staticmethod
    def of(request: Any) -> "Caller":
        """As the guard at the door saw it (`guard.Guard`)."""
        return request.scope.get("neurosteer.caller") or Caller("unknown", False)


@dataclass
class Listeners:
    """Who reads the events of which session or call at the moment, as the guard at the door sees it."""

    open: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def listening(self, name: str) -> Iterator[None]:
        """While somebody reads what is told to a session, or of the call with that id."""
        self.open[name] += 1
        try:
            yield
        finally:
            self.open[name] -= 1
            if not self.open[name]:
                del self.open[name]


class Turns(Queue):
    """Gradio's queue with places for everybody."""

    def __init__(self, like: Queue, listeners: Listeners) -> None:
        """With the settings of a queue that gradio made."""
        super().__init__(
            live_updates=like.live_updates,
            concurrency_count=like.max_thread_count,
            update_intervals=like.update_intervals,
            max_size=like.max_size,
            blocks=like.blocks,
            default_concurrency_limit=like.default_concurrency_limit,
        )
        self.listeners = listeners
        self._served: OrderedDict[tuple[str, str], float] = OrderedDict()  # when a client last had a turn of a kind
        self._logins: OrderedDict[str, str | None] = OrderedDict()  # who was logged in when a session began
        self._unheard: dict[str, float] = {}  # since when nobody has listened to a session

    def start(self) -> None:
        super().start()
        run_coro_in_background(self._sweep_for_ever)

    async def push(self, body: Any, request: Any, username: str | None) -> Any:
        """As gradio's. Refuses with 429 what would take another's place, and with 403 another's session."""
        self._check_login(body.session_hash, request)
        self._check_places(body, request)
        return await super().push(body, request, username)

    def get_events(self) -> tuple[list[Event], bool, str] | None:
        """The event whose turn it is, of any kind of work that has a place free."""
        kinds = list(self.event_queue_per_concurrency_id.items())
        random.shuffle(kinds)  # as gradio does: no kind always comes first
        for kind, waiting in kinds:
            most = waiting.concurrency_limit
            if waiting.queue and (most is None or waiting.current_concurrency < most):
                event = self._next(kind, waiting.queue, most)
                if event is not None:
                    waiting.queue.remove(event)
                    return [event], False, kind
        return None

    def _next(self, kind: str, queue: list[Event], most: int | None) -> Event | None:
        """Of whoever has the fewest under way and, among those, waited longest since the last turn. Strangers never
        hold more than half the places of a kind, so that one is left for the next."""
        running = Counter(address_of(event) for event in self._running() if event.concurrency_id == kind)
        share = max(1, most // 2) if most and limits.strangers() else None
        free = [event for event in queue if share is None or running[address_of(event)] < share]
        if not free:
            return None

        def turn(event: Event) -> tuple[int, float]:
            address = address_of(event)
            return running[address], self._served.get((kind, address), 0.0)

        event = min(free, key=turn)
        _remember(self._served, (kind, address_of(event)), time.monotonic())
        return event

    def compute_analytics_summary(self, records: Any) -> Any:
        """Nothing: gradio would sort all past events with pandas after each one."""
        return self.cached_event_analytics_summary

    # --- places ---

    def _running(self) -> Iterator[Event]:
        return (event for job in self.active_jobs if job for event in job)

    def _held(self) -> Iterator[Event]:
        """All events that wait or are under way."""
        yield from self._running()
        for waiting in self.event_queue_per_concurrency_id.values():
            yield from waiting.queue

    def _check_places(self, body: Any, request: Any) -> None:
        places = limits.places()
        if places is None:
            return
        address = Caller.of(request).address
        function = self.blocks.fns.get(body.fn_index)
        held = list(self._held())
        mine = [event for event in held if address_of(event) == address]
        counts = [(len(mine), places.address)]
        if function is not None and _is_for_programs(function):
            calls = [event for event in held if _is_for_programs(event.fn)]
            counts.append((len(calls), places.all_programs))
            counts.append((sum(_is_for_programs(event.fn) for event in mine), places.programs))
        else:
            counts.append((sum(event.session_hash == body.session_hash for event in mine), places.session))
        if any(number >= most for number, most in counts):
            raise HTTPException(429, TOO_MANY if len(mine) else BUSY)

    def _check_login(self, session: str | None, request: Any) -> None:
        """A session belongs to whoever began it: another's browser, or another login, has no part in it."""
        if session is None or "session" not in request.scope:
            return
        login = (request.scope["session"].get("oauth_info") or {}).get("userinfo", {}).get("sub")
        if self._logins.setdefault(session, login) != login:
            raise HTTPException(403, "This page was opened under another login; reload it.")
        _remember(self._logins, session, login)

    # --- what nobody waits for ---

    async def _sweep_for_ever(self) -> None:
        while not self.stopped:
            await asyncio.sleep(SWEEP_S)
            await self.sweep()

    async def sweep(self) -> None:
        """Drop what nobody has listened for in a while: events, and messages that were never fetched."""
        now, held = time.monotonic(), list(self._held())
        busy = {event.session_hash for event in held}
        quiet = [name for name in self.pending_messages_per_session if not self.listeners.open[name]]
        heard_by_call = {event.session_hash for event in held if self.listeners.open[event._id]}
        self._unheard = {name: self._unheard.get(name, now) for name in quiet if name not in heard_by_call}
        for session, since in list(self._unheard.items()):
            if now - since < UNHEARD_S:
                continue
            if session in busy:
                await self.clean_events(session_hash=session)
            else:
                self.pending_messages_per_session.pop(session, None)
                self.pending_event_ids_session.pop(session, None)
                del self._unheard[session]


TOO_MANY = "There are too many requests from your address at the moment; wait until some of them are done."


def give_turns(page: Any) -> Listeners:
    """Have a page that was given a queue take turns; returns who listens, for the guard to keep."""
    listeners = Listeners()
    page._queue = Turns(page._queue, listeners)
    return listeners


def address_of(event: Event) -> str:
    return Caller.of(event.request).address


def _is_for_programs(function: Any) -> bool:
    return function.api_visibility == "public"


def _remember(kept: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > _REMEMBERED:
        kept.popitem(last=False)
