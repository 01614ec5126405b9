"""One model for many callers: what they ask for at the same time decodes together."""

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

from neurosteer.artifacts.recipes import UNSTEERED, Positions, Recipe
from neurosteer.models.caching import can_change
from neurosteer.models.framing import Prompt
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Progress, silent
from neurosteer.steering.batches import Batch, RowInFlight
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Options, Row, Session, Step, Writer, in_parts, is_set
from neurosteer.validation import check_count

logger = logging.getLogger(__name__)

MAX_ROWS = 32
PATIENCE_S = 4.0
_IDLE_S = 1.0  # how long the thread stays when there is nothing to do
_LAST_PATIENCE_S = 0.5  # once the program's main thread has ended
_MOST_PADDING = 4096  # columns of a batch that may be padding, over all its rows: beyond, two batches cost less
_PROMPT_PADDING = 512  # the same while prompts are read, where each column costs as much as a step
_PROMPT_COLUMNS = {"cpu": 256}  # that are read before those under way go on: a CPU is busy with that many already
_OTHER_PROMPT_COLUMNS = 2048


class SharedSession(Writer):
    """A session that many threads use at once: their rows decode together and join and leave between two steps.

    Texts are those that `Session` writes alone, but for the rounding of the logits, which depends on the rows beside
    (as in any batch): in float32 that hardly ever decides a token, in bfloat16 now and then. At most `max_rows` rows
    decode at once; other requests wait in the order they came, and one of more than half as many rows takes several
    turns.

    All decoding is done in one thread, which is there only while there is something to do. On a CPU every thread that
    has used the maths library keeps helpers there until it ends, and all slow down when they outnumber the cores: load
    models and build in threads that end.
    """

    def __init__(self, session: Session, *, max_rows: int = MAX_ROWS, patience_s: float = PATIENCE_S) -> None:
        """`patience_s`: after how many seconds in which a consumer asks for no step its rows make room for others; they
        go on where they were when it asks again."""
        check_count("max_rows", max_rows, 1, 4096)
        self.session = session
        self._max_rows = max_rows
        self._patience_s = patience_s
        self._changed = threading.Condition()
        self._queue: deque[_RowsAsked] = deque()
        self._worker: threading.Thread | None = None

    @property
    def lm(self) -> LanguageModel:
        return self.session.lm

    @property
    def is_decoding(self) -> bool:
        """Whether anything is being written, or was until a moment ago."""
        return self._worker is not None

    def stream(
        self,
        rows: Sequence[Row] | Prompt,
        recipe: Recipe = UNSTEERED,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        positions: Positions = "all",
        raw: bool = False,
        cancel: threading.Event | None = None,
        progress: Progress = silent,
    ) -> Generator[Step, None, list[Row]]:
        """Write all rows; yields every step and returns the filled rows, as `Session.stream` does.

        While the request has no place yet, a step with `waiting` set and no text comes whenever that number changes.
        Setting `cancel` or closing the generator frees the rows within a step. An exception while the model runs
        reaches the request that caused it alone. The work begins with the call, not with the first step asked for.

        Raises: as `Session.stream`, at once.
        """
        begun = self.session.begin(rows, recipe, Options(max_new_tokens, sampling or Sampling(), positions, raw))
        part_rows = max(1, self._max_rows // 2)
        at_once = _RowsAsked(0, [one.writing for one in begun[:part_rows]], cancel)
        at_once.left = time.monotonic()
        self._enlist(at_once)

        def decode(first: int, writings: Sequence[RowInFlight]) -> Generator[Step, None, None]:
            request = _RowsAsked(first, writings, cancel) if first else at_once
            try:
                while (step := self._next(request)) is not None:
                    yield step
            finally:
                request.closed = True

        return in_parts(begun, part_rows, decode, cancel, progress)

    def _next(self, request: "_RowsAsked") -> Step | None:
        """What comes next of a request, None at its end. Waits for it."""
        request.left = None
        self._enlist(request)
        message = request.inbox.get()
        request.left = time.monotonic()
        if isinstance(message, Exception):
            raise message
        return message

    def _enlist(self, request: "_RowsAsked") -> None:
        """Have a request waiting or decoding, unless there is something of it to be read yet."""
        with self._changed:
            if not request.enlisted and request.inbox.empty():
                request.enlisted = True
                self._queue.append(request)
                self._changed.notify()
            if self._queue and (self._worker is None or not self._worker.is_alive()):
                worker = threading.Thread(target=self._work, name="neurosteer-decoding")
                worker.start()
                self._worker = worker

    # --- in the thread that decodes ----------------------------------------------------------------------------------

    def _work(self) -> None:
        decoder = _Decoder(self.lm)
        while self._change_rows(decoder):
            try:
                decoder.step()
            except Exception as error:  # a fault of ours: nobody must wait for ever
                logger.exception("Decoding failed")
                decoder.fail(error)

    def _change_rows(self, decoder: "_Decoder") -> bool:
        """Let requests leave and come. False when there has been nothing to do for a while: then the thread ends."""
        with self._changed:
            if not decoder.requests and not self._queue:
                self._changed.wait(_IDLE_S)
                if not self._queue:
                    self._worker = None
                    return False
            patience = self._patience_s if threading.main_thread().is_alive() else _LAST_PATIENCE_S
            leaving = {request for request in (*decoder.requests, *self._queue) if request.leaves(patience)}
            decoder.release(leaving)
            self._queue = deque(request for request in self._queue if request not in leaving)
            for request in leaving:
                request.leave()
            while self._queue and decoder.has_room(len(self._queue[0].live), self._max_rows):
                decoder.requests.append(self._queue.popleft())
            for place, request in enumerate(self._queue):
                request.tell(place)
        return True


class _RowsAsked:
    """Rows of one caller, `first` and those after it, which decode in one batch; and what their reader is to get."""

    def __init__(self, first: int, writings: Sequence[RowInFlight], cancel: threading.Event | None) -> None:
        self.first = first
        self.writings = writings
        self.cancel = cancel
        self.inbox: SimpleQueue[Step | Exception | None] = SimpleQueue()
        self.closed = False
        self.left: float | None = None  # when the reader took the last step; None while it waits for the next
        self.enlisted = False  # waiting or decoding; else nothing happens until the reader asks
        self.started = False
        self.failures = 0  # of steps that it was part of, with others
        self.alone_for = 0  # so many more good steps it does in a batch of its own
        self._told: int | None = None

    @property
    def live(self) -> list[RowInFlight]:
        return [writing for writing in self.writings if not writing.ended]

    def leaves(self, patience: float) -> bool:
        """Whether nobody wants more of it, or nobody has asked for more in `patience` seconds."""
        away = self.left is not None and time.monotonic() - self.left > patience
        return away or self.closed or is_set(self.cancel)

    def leave(self) -> None:
        self.enlisted = self.started = False
        self._told = None
        if is_set(self.cancel):
            self.inbox.put(None)

    def tell(self, place: int) -> None:
        """Say how many requests come before this one, unless that was said already."""
        if place != self._told:
            self._told = place
            self.inbox.put(Step(self.first, ("",) * len(self.writings), waiting=place))

    def set_apart(self) -> None:
        """After a step with others that failed: in a batch of its own, for longer each time, as when only the joint
        batch is too large."""
        self.started = False
        self.failures += 1
        self.alone_for = 2 ** (self.failures - 1)

    def deliver(self, pieces: Mapping[RowInFlight, str]) -> None:
        self.alone_for = max(0, self.alone_for - 1)
        self.inbox.put(Step(self.first, tuple(pieces.get(writing, "") for writing in self.writings)))


@dataclass
class _Group:
    """A batch and the requests whose rows it holds."""

    batch: Batch
    requests: list[_RowsAsked]
    reading: bool = True  # the prompts; until the first step is done

    def step(self) -> None:
        pieces = self.batch.step()
        self.reading = False
        for request in self.requests:
            request.deliver(pieces)

    def join(self, other: "_Group") -> None:
        self.batch.join(other.batch)
        self.requests += other.requests


class _Decoder:
    """Steps the batches under way: one as a rule; more where joining does not pay or cannot be done."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm
        self.requests: list[_RowsAsked] = []
        self._groups: list[_Group] = []
        self._can_join = can_change(lm)
        self._prompt_columns = _PROMPT_COLUMNS.get(lm.device.type, _OTHER_PROMPT_COLUMNS)

    @property
    def rows(self) -> int:
        """How many rows are in batches, those that have ended but are still there included, or about to be."""
        held = sum(len(group.batch.writings) for group in self._groups)
        return held + sum(len(request.live) for request in self.requests if not request.started)

    def has_room(self, rows: int, most: int) -> bool:
        """Whether so many rows more are at most `most`, once those that have ended make room where they are needed."""
        if self.rows + rows > most and self._can_join:
            for group in list(self._groups):
                if not group.reading:
                    self._attempt(group.batch.let_ended_go, group.requests)
        return self.rows + rows <= most

    def step(self) -> None:
        """A token more for every row under way; before that, something of the prompts of newcomers."""
        self._read_prompts()
        for group in list(self._groups):
            if not group.reading and not group.batch.ended and group in self._groups:
                self._step(group)
        for request in [request for request in self.requests if request.started and not request.live]:
            request.inbox.put(None)
            self.requests.remove(request)
        self._forget_ended()

    def release(self, leaving: Collection[_RowsAsked]) -> None:
        """Free the rows of those of the requests that are under way."""
        self.requests = [request for request in self.requests if request not in leaving]
        gone = {writing for request in leaving for writing in request.writings}
        self._forget_ended()
        for group in list(self._groups):
            if gone.isdisjoint(group.batch.writings):
                continue
            if group.reading:
                self._groups.remove(group)  # those left begin anew
                for request in group.requests:
                    request.started = False
            else:
                self._attempt(partial(group.batch.leave, gone), group.requests)

    def fail(self, error: Exception) -> None:
        """End all requests."""
        for request in self.requests:
            request.inbox.put(error)
        self.requests, self._groups = [], []

    def _read_prompts(self) -> None:
        newcomers = self._newcomers() if not any(group.reading for group in self._groups) else []
        if newcomers:
            self._attempt(partial(self._begin, newcomers), newcomers)
        for group in [group for group in self._groups if group.reading]:
            self._attempt(partial(self._read, group), group.requests)

    def _newcomers(self) -> list[_RowsAsked]:
        """The first request that has not begun, and others whose prompts can well be read with its own."""
        new = [request for request in self.requests if not request.started]
        chosen = new[:1]
        for request in new[1:]:
            together = [*chosen, request]
            if self._may_join(together, _PROMPT_PADDING) and _columns(together) <= self._prompt_columns:
                chosen.append(request)
        return chosen

    def _begin(self, requests: list[_RowsAsked]) -> None:
        for request in requests:
            request.started = True
        self._groups.append(_Group(Batch(self.lm, [one for request in requests for one in request.live]), requests))

    def _read(self, group: _Group) -> None:
        columns = max(1, self._prompt_columns // len(group.batch.writings))
        if self._can_join and group.batch.unread > columns:
            group.batch.read(columns)
            return
        group.step()
        self._join_others(group)

    def _step(self, group: _Group) -> None:
        was_alone = any(request.alone_for for request in group.requests)
        self._attempt(group.step, group.requests)
        if was_alone and group in self._groups:
            self._join_others(group)

    def _join_others(self, group: _Group) -> None:
        """Have the rows of `group` go on in another batch, where there is one that they fit in."""
        for other in self._groups:
            together = [*other.requests, *group.requests]
            if other is not group and not other.reading and self._may_join(together, _MOST_PADDING):
                self._groups.remove(group)
                self._attempt(partial(other.join, group), together)
                return

    def _may_join(self, requests: Sequence[_RowsAsked], most_padding: int) -> bool:
        lengths = _lengths(requests)
        fits = _columns(requests) - sum(lengths) <= most_padding
        return self._can_join and fits and not any(request.alone_for for request in requests)

    def _attempt(self, work: Callable[[], None], requests: Sequence[_RowsAsked]) -> None:
        """Do `work` on the batch of `requests`. Where it fails, each goes on from its tokens in a batch of its own for
        a while, so that what one of them causes does not reach the others; one that is alone already gets the error."""
        try:
            work()
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the batch, of which there may be too much
            if len(requests) == 1:
                requests[0].inbox.put(error)
                self.requests = [request for request in self.requests if request is not requests[0]]
            else:
                kind = type(error).__name__
                logger.warning("A step of %d requests failed (%s); each goes on alone", len(requests), kind)
            self._groups = [group for group in self._groups if not any(one in requests for one in group.requests)]
            for request in requests:
                request.set_apart()

    def _forget_ended(self) -> None:
        for group in self._groups:
            group.requests = [request for request in group.requests if request in self.requests]
        self._groups = [group for group in self._groups if group.requests]


def _lengths(requests: Sequence[_RowsAsked]) -> list[int]:
    return [len(writing) for request in requests for writing in request.live]


def _columns(requests: Sequence[_RowsAsked]) -> int:
    """Of a batch of all their rows, padding included."""
    lengths = _lengths(requests)
    return len(lengths) * max(lengths, default=0)
