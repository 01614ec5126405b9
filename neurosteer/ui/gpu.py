"""Where a model works: in this process, for all visitors together, or on ZeroGPU in one that has a GPU for a while.

On ZeroGPU the page's own process never computes. `spaces` runs a decorated function in a process forked from this one,
which is lent a GPU for some seconds and used again later. What goes there and comes back is pickled; of exceptions only
the name of their class arrives, so the library's are sent as values. Off ZeroGPU nothing of that is in the way.
"""

import math
import threading
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
from neurosteer.artifacts.recipes import UNSTEERED
from neurosteer.artifacts.storage import pack, unpack
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.building.build import build
from neurosteer.errors import NeuroSteerError
from neurosteer.evaluation import evaluate
from neurosteer.evaluation.controls import n_groups
from neurosteer.models.catalog import find_model
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Options, Row, Session, Step, is_set
from neurosteer.steering.shared import SharedSession
from neurosteer.ui.limits import on_zero_gpu

_GPU = "cuda"
_BEGIN_S = 10.0  # of a fresh process, until the model is on the GPU
_STEP_S = 0.05  # of decoding, whatever the model: a step waits for the many small things it launches
_BATCH_ROWS = 64  # that decode in one step
_TOKENS_PER_S = 5_000  # read while building, by a large model
_TEXT_TOKENS, _CHARACTERS_PER_TOKEN = 512, 3
_OTHER_S = 15.0  # whatever else there is to do with a prompt and a text or two
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

    def stream(
        self,
        rows: Sequence[Row],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        raw: bool = False,
        cancel: threading.Event | None = None,
    ) -> Generator[Step, None, list[Row]]:
        """As `Session.stream`. Setting `cancel` or closing the generator ends the work there within a step."""
        options = Options(max_new_tokens, sampling or Sampling(), "all", raw)
        self._session.begin(rows, UNSTEERED, options)  # a mistake costs no GPU time
        written, steps_of = [replace(row, text="", tokens=0, finish="cancelled") for row in rows], Counter[int]()
        with self._used(), closing(_answers(_write, self._name, tuple(rows), options)) as steps:
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
        with self._used(), closing(_answers(_call, self._name, function, arguments, options, callbacks)) as told:
            while True:
                try:
                    message, fraction = next(told)
                except StopIteration as finished:
                    return finished.value
                progress(message, fraction)
                check_cancelled(cancel, "This")


ModelSession = LocalSession | ZeroGpuSession


def _answers(task: Task, model: str | None, *arguments: Any) -> Generator[Any, None, Any]:
    """What a task tells in its process; returns its result."""
    result = None
    try:
        with closing(_work(task, model, *arguments)) as answers:
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
    filled = yield from session.stream(
        rows,
        max_new_tokens=options.max_new_tokens,
        sampling=options.sampling,
        raw=options.raw,
        batch_rows=_BATCH_ROWS,
    )
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
_own: dict[str | None, Session] = {}
"""Those of models that such a process has loaded since."""


def _session(name: str | None) -> Session:
    session = _sessions.get(name) or _own.get(name)
    if session is None:
        session = _own[name] = Session(load_model(name, device="cpu", dtype="bfloat16"))
    session.lm.model.to(_GPU)
    return session


def _seconds(task: Task, model: str | None, *arguments: Any) -> int:
    """For how long a GPU is asked for: too little ends the work half way, too much has to wait longer for its turn."""
    known = find_model(model) if model else None
    moving = known.memory_gb if known else 0.0
    return min(_MOST_S, math.ceil(_BEGIN_S + moving + _WORK_S[task](*arguments)))


def _writing_s(rows: Sequence[Row], options: Options) -> float:
    return math.ceil(len(rows) / _BATCH_ROWS) * options.max_new_tokens * _STEP_S


def _calling_s(
    function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], callbacks: tuple[str, ...]
) -> float:
    if function is build:
        (examples,) = arguments
        texts = (*examples.positive, *examples.negative)
        return sum(min(_TEXT_TOKENS, len(text) / _CHARACTERS_PER_TOKEN) for text in texts) / _TOKENS_PER_S
    if function is evaluate:
        return _evaluating_s(options)
    return _OTHER_S


def _evaluating_s(options: dict[str, Any]) -> float:
    """All texts are written once and read once; so many groups more are read to measure KL, and twins to bring them to
    the same."""
    groups = n_groups(options["strengths"])
    texts = groups * len(options["prompts"]) * options["samples"]
    steps = math.ceil(texts / _BATCH_ROWS) * options["max_new_tokens"]
    matching = 2 * options.get("n_random", 10) * 8 * 3  # signs, twins, prompts, and how often a strength is tried
    return _OTHER_S + steps * _STEP_S + (2 * texts + matching) * _TEXT_TOKENS / 4 / _TOKENS_PER_S


_WORK_S: dict[Task, Callable[..., float]] = {_write: _writing_s, _call: _calling_s}


def _on_gpu(function: Callable[..., Iterator[Any]]) -> Callable[..., Generator[Any, None, None]]:
    """On ZeroGPU, `function` in a process that has a GPU; elsewhere `function` itself."""
    if on_zero_gpu():
        import spaces

        return spaces.GPU(function, duration=_seconds)  # type: ignore[return-value]
    return function  # type: ignore[return-value]


@_on_gpu
def _work(task: Task, model: str | None, *arguments: Any) -> Iterator[Any]:
    """The one function that runs there, so that one process serves for all kinds of work."""
    try:
        yield _Done((yield from task(_session(model), *arguments)))
    except NeuroSteerError as error:
        yield error


def _as_zip(artifact: Artifact) -> tuple[Callable[..., Artifact], tuple[bytes]]:
    """How an artifact crosses: its tensors as they are would go through shared memory, an open file each."""
    return unpack, (pack(artifact),)


for _kind in (SteeringVector, NeuronCircuit):
    ForkingPickler.register(_kind, _as_zip)
