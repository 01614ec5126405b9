"""Where a model works: in this process, for all visitors together, or on ZeroGPU in one that has a GPU for a while.

On ZeroGPU the page's own process never computes. `spaces` runs a decorated function in a process forked from this one,
which is lent a GPU for some seconds and used again later. What goes there and comes back is pickled; of exceptions only
the name of their class arrives, so the library's are sent as values. Off ZeroGPU nothing of that is in the way.
"""

import inspect
import math
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import gradio as gr

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import UNSTEERED, Positions
from neurosteer.artifacts.storage import pack, unpack
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import NeuroSteerError
from neurosteer.models.catalog import find_model
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Options, Row, Session, Step, is_set
from neurosteer.steering.shared import SharedSession
from neurosteer.ui.gpu_time import BATCH_ROWS, calling_s, writing_s
from neurosteer.ui.limits import on_zero_gpu

_GPU = "cuda"
_BEGIN_S = 10.0  # of a fresh process, until the model is on the GPU
_MOST_S = 120  # that can be asked for

Task = Callable[..., Generator[Any, None, Any]]
"""Work with a model: gets its session and what else was handed over, tells how far it is, and returns a result."""
Result = TypeVar("Result")

_CALLBACKS = ("progress", "cancel")
"""Options that stay with the caller."""


def load(name: str | None, progress: Progress) -> LanguageModel:
    """The model for `session_of`. On ZeroGPU it is placed on the GPU if this is the main thread, which `spaces` lets do
    so before the page is served; otherwise it goes there whenever it is used. Raises as `load_model` does."""
    if not on_zero_gpu():
        return load_model(name, progress=progress)
    lm = load_model(name, device="cpu", dtype="bfloat16", progress=progress)
    _ = lm.fingerprint  # kept: the weights cannot be read here once they are on the GPU
    if threading.current_thread() is threading.main_thread():
        lm.model.to(_GPU)
    return lm


def session_of(lm: LanguageModel, name: str | None) -> "ModelSession":
    """What handlers use of a model, which `load` knows by `name`."""
    return ZeroGpuSession(lm, name) if on_zero_gpu() else LocalSession(Session(lm))


class _Counted:
    """Knows whether anybody works with it."""

    _n_users = 0

    @contextmanager
    def _used(self) -> Iterator[None]:
        with _counting:
            self._n_users += 1
        try:
            yield
        finally:
            with _counting:
                self._n_users -= 1

    @property
    def in_use(self) -> bool:
        return self._n_users > 0


_counting = threading.Lock()


class LocalSession(_Counted, SharedSession):
    """A model in this process."""

    @property
    def in_use(self) -> bool:
        return super().in_use or self.is_decoding

    def run(self, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """`function` with the model and what else is given, of which `progress` and `cancel` may be part."""
        with self._used():
            return function(self.lm, *arguments, **options)


class ZeroGpuSession(_Counted):
    """A model that works in processes lent a GPU, one for each request at a time. Does what `LocalSession` does.

    All raise `NeuroSteerError` when no GPU can be had, too, or when it was had for too short.
    """

    def __init__(self, lm: LanguageModel, name: str | None) -> None:
        self.lm = lm  # for its tokenizer, shape and names: its weights are elsewhere
        self._name = name
        self._session = _sessions[name] = Session(lm)
        placed_at_start = threading.current_thread() is threading.main_thread()
        self._work = _work if placed_at_start else _of_its_own()
        if not placed_at_start:
            weakref.finalize(self, _end, self._work)

    def stream(
        self,
        rows: Sequence[Row],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        positions: Positions = "all",
        raw: bool = False,
        cancel: threading.Event | None = None,
    ) -> Generator[Step, None, list[Row]]:
        """As `Session.stream`. Setting `cancel` or closing the generator ends the work there within a step."""
        options = Options(max_new_tokens, sampling or Sampling(), positions, raw)
        self._session.begin(rows, UNSTEERED, options)  # a mistake costs no GPU time
        written, steps_of = [replace(row, text="", tokens=0, finish="cancelled") for row in rows], Counter[int]()
        with self._used(), closing(_answers(self._work, _write, self._name, tuple(rows), options)) as steps:
            while not is_set(cancel):
                try:
                    step = next(steps)
                except StopIteration as finished:
                    return [replace(row, **filled) for row, filled in zip(rows, finished.value, strict=True)]
                steps_of[step.first] += 1
                for number, piece in enumerate(step.pieces, step.first):
                    if piece:
                        text = written[number].text + piece
                        written[number] = replace(written[number], text=text, tokens=steps_of[step.first])
                yield step
        return written

    def run(self, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
        """As `LocalSession.run`. `function` is one of a module's, and it and its result can be pickled; tensors on the
        CPU."""
        progress, cancel = options.get("progress", silent), options.get("cancel")
        callbacks = tuple(name for name in _CALLBACKS if options.pop(name, None) is not None)
        check_cancelled(cancel, "This")
        answers = _answers(self._work, _call, self._name, function, arguments, options, callbacks)
        with self._used(), closing(answers) as told:
            while True:
                try:
                    message, fraction = next(told)
                except StopIteration as finished:
                    return finished.value
                progress(message, fraction)
                check_cancelled(cancel, "This")


ModelSession = LocalSession | ZeroGpuSession


def _answers(work: "Work", task: Task, model: str | None, *arguments: Any) -> Generator[Any, None, Any]:
    """What a task tells in its process; returns its result."""
    result = None
    try:
        with closing(work(task, model, *arguments)) as answers:
            for answer in answers:
                if isinstance(answer, NeuroSteerError):
                    raise answer
                if isinstance(answer, _Done):
                    result = answer.value
                else:
                    yield answer
    except gr.Error as error:
        raise _explained(error) from error
    return result


def _explained(error: gr.Error) -> Exception:
    """What `spaces` says is wrong, as an error of ours."""
    message = " ".join(str(error.message).split())
    if message == "GPU task aborted":
        return NeuroSteerError(
            "The GPU was taken back before this was done: ask for fewer tokens, give fewer texts, or try again."
        )
    if error.title == "ZeroGPU worker error":  # a fault of ours: the message is an exception's class
        return RuntimeError(message)
    return NeuroSteerError(f"There is no GPU for this at the moment: {message}")


# --- in the process that has a GPU -----------------------------------------------------------------------------------


class _Done(NamedTuple):
    value: Any


class _Told(NamedTuple):
    message: str
    fraction: float | None = None


def _write(session: Session, rows: Sequence[Row], options: Options) -> Generator[Step, None, list[dict[str, Any]]]:
    filled = yield from session.stream(rows, **vars(options), batch_rows=BATCH_ROWS)
    return [{"text": row.text, "tokens": row.tokens, "finish": row.finish} for row in filled]


def _call(
    session: Session,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    callbacks: tuple[str, ...],
) -> Generator[_Told, None, Any]:
    """In a thread of its own, because `function` calls back to tell how far it is; closing the generator cancels it."""
    told: SimpleQueue[_Told | None] = SimpleQueue()
    cancel = threading.Event()

    def tell(message: str, fraction: float | None = None) -> None:
        told.put(_Told(message, fraction))

    hearing = {name: value for name, value in zip(_CALLBACKS, (tell, cancel), strict=True) if name in callbacks}
    with ThreadPoolExecutor(1) as executor:
        working = executor.submit(function, session.lm, *arguments, **options, **hearing)
        working.add_done_callback(lambda _: told.put(None))
        try:
            while (message := told.get()) is not None:
                yield message
        finally:
            cancel.set()
    return working.result()


_sessions: WeakValueDictionary[str | None, Session] = WeakValueDictionary()
"""Those of the models that the page holds, by name; in a process forked from the page's, of those it held then."""


def _session(name: str | None) -> Session:
    """The model, on the GPU. It is here since the process was forked: nothing is loaded on GPU time."""
    session = _sessions[name]
    session.lm.model.to(_GPU)
    return session


def _seconds(task: Task, model: str | None, *arguments: Any) -> int:
    """For how long a GPU is asked for: too little ends the work half way, too much has to wait longer for its turn."""
    known = find_model(model) if model else None
    moving = known.memory_gb if known else 0.0
    return min(_MOST_S, math.ceil(_BEGIN_S + moving + _WORK_S[task](*arguments)))


_WORK_S: dict[Task, Callable[..., float]] = {_write: writing_s, _call: calling_s}


Work = Callable[..., Generator[Any, None, None]]


def _on_gpu(function: Callable[..., Iterator[Any]]) -> Work:
    """On ZeroGPU, `function` in a process that has a GPU; elsewhere `function` itself."""
    if on_zero_gpu():
        import spaces

        return spaces.GPU(function, duration=_seconds)  # type: ignore[return-value]
    return function  # type: ignore[return-value]


def _do(task: Task, model: str | None, *arguments: Any) -> Iterator[Any]:
    """The one function that runs there, so that one process serves for all kinds of work with a model."""
    try:
        yield _Done((yield from task(_session(model), *arguments)))
    except NeuroSteerError as error:
        yield error


_work = _on_gpu(_do)
"""With the models that were there before the page was served."""


def _of_its_own() -> Work:
    """For a model that came later: `spaces` forks a process for each function, and only one that is forked after the
    model was loaded (here, on the CPU) has it without loading it on GPU time."""

    def work(task: Task, model: str | None, *arguments: Any) -> Iterator[Any]:
        yield from _do(task, model, *arguments)

    return _on_gpu(work)


def _end(work: Work) -> None:
    """The processes of a model that nobody uses any more would keep its memory: `spaces` forgets none by itself."""
    from spaces.zero.decorator import decorated_cache

    for known in [task for task, decorated in decorated_cache.items() if decorated is work]:
        del decorated_cache[known]
    for worker in inspect.getclosurevars(work).nonlocals.get("workers", {}).values():
        worker.process.terminate()


def _as_zip(artifact: Artifact) -> tuple[Callable[..., Artifact], tuple[bytes]]:
    """How an artifact crosses: its tensors as they are would go through shared memory, an open file each."""
    return unpack, (pack(artifact),)


for _kind in (SteeringVector, NeuronCircuit):
    ForkingPickler.register(_kind, _as_zip)
