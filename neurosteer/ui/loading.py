"""The models of the page: each loaded in a thread of its own, so that the page answers while one is on its way.

Importing torch and transformers takes seconds. It happens in that thread too, which is why the page's modules import
them inside functions only.
"""

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosteer.errors import ModelError, NeuroSteerError
from neurosteer.models.catalog import catalog, default_model, find_model
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.ui.limits import on_a_space, on_zero_gpu

if TYPE_CHECKING:
    from neurosteer.models.language_model import LanguageModel
    from neurosteer.ui.gpu import ModelSession

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_IMPORT_LIMIT_S = 120.0
_MOST_LOADED = 2
_SPARE_GB = 1.0  # for activations and whatever else runs on the machine
ZERO_GPU_GB = 40.0  # for a model; what a ZeroGPU process is lent beyond that is for its work
_CGROUP = Path("/sys/fs/cgroup")

Loader = Callable[[str | None, Progress], "LanguageModel"]


@dataclass(frozen=True)
class Status:
    """Where loading is, as a phrase for people, and how it ended if it has."""

    text: str
    fraction: float | None = None
    ready: bool = False
    failed: bool = False

    @property
    def settled(self) -> bool:
        return self.ready or self.failed


class ModelHolder:
    """Loads one model in the background and hands out a session for it, which all visitors share."""

    def __init__(
        self,
        model_name: str | None = None,
        load: Loader | None = None,
        *,
        gate: AbstractContextManager[Any] | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """`gate` is entered while it loads, and `check` then raises where there is no room for it."""
        self._name = model_name
        self._load = load or _load_by_name
        self._gate, self._check = gate or nullcontext(), check or (lambda: None)
        self._lock = threading.Lock()
        self._begun = False
        self._imported = threading.Event()
        self._settled = threading.Event()
        self._status = Status("starting")
        self._session: ModelSession | None = None

    @property
    def status(self) -> Status:
        return self._status

    @property
    def loading(self) -> bool:
        return self._begun and not self._status.settled

    @property
    def in_use(self) -> bool:
        """Whether it loads or works for somebody, so that nothing would be gained by forgetting it."""
        return self.loading or (self._session is not None and self._session.in_use)

    def start(self) -> None:
        """Begin to load, unless that is done or under way. After a failure this tries again.

        In a thread; on ZeroGPU the main thread, which alone can place it on the GPU, waits until it is there.
        """
        with self._lock:
            if self._begun and not self._status.failed:
                return
            self._begun = True
            self._settled.clear()
            self._status = Status("starting")
        if on_zero_gpu() and threading.current_thread() is threading.main_thread():
            self._run()
        else:
            threading.Thread(target=self._run, name="neurosteer-load", daemon=True).start()

    def start_if_new(self) -> None:
        """Begin to load if nobody has asked yet; a load that failed is left to the visitor to repeat."""
        if not self._begun:
            self.start()

    def wait(self, progress: Progress = silent, cancel: threading.Event | None = None) -> "ModelSession":
        """The session, as soon as the model is there; `progress` hears what it is waiting for.

        Raises `ModelError` when loading failed and `Cancelled` when `cancel` is set.
        """
        self.start_if_new()
        while self._session is None or not self._status.ready:
            check_cancelled(cancel, "Waiting for the model")
            status = self._status
            if status.failed:
                raise ModelError(f"The model is not there: {status.text} Press 'Load the model again' to retry.")
            progress(f"Waiting for the model: {status.text}", status.fraction)
            self._settled.wait(_POLL_S)
        return self._session

    def wait_for_libraries(self) -> None:
        """Until the thread has imported torch and the rest: two threads importing at once can trip each other up."""
        self.start_if_new()
        self._imported.wait(_IMPORT_LIMIT_S)

    def _run(self) -> None:
        try:
            self._status = Status("loading the libraries")
            from neurosteer.ui import gpu

            self._imported.set()
            self._status = Status("waiting until another model is loaded")
            with self._gate:
                self._check()
                self._session = gpu.session_of(self._load(self._name, self._report), self._name)
            self._status = Status(_described(self._session.lm), ready=True)
        except NeuroSteerError as error:
            self._status = Status(str(error), failed=True)
        except Exception as error:
            logger.exception("Loading the model failed")
            self._status = Status(f"it could not be loaded ({type(error).__name__}; the log says more).", failed=True)
        finally:
            self._imported.set()
            self._settled.set()

    def _report(self, message: str, fraction: float | None = None) -> None:
        self._status = Status(message[:1].lower() + message[1:], fraction)


class Models:
    """The models that visitors can choose, each loaded once, when it is first asked for.

    They are shared by all visitors. They are loaded one at a time, and each only where there is memory for it beside
    those that are still on their way. At most `most` are held: the one unused for longest makes room, unless somebody
    uses it or waits for it.
    """

    def __init__(self, default: str | None = None, *, load: Loader | None = None, most: int = _MOST_LOADED) -> None:
        self._given = default or default_model()
        self.default = _name_of(self._given)
        self._load, self._most = load, most
        self._holders: OrderedDict[str, ModelHolder] = OrderedDict()
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()

    @staticmethod
    def of(holder: ModelHolder, name: str | None = None) -> "Models":
        """With one model that is there already, or on its way."""
        models = Models(name)
        models._holders[models.default] = holder
        return models

    @property
    def names(self) -> list[str]:
        """The model of this page, and those of the catalog; on a Space those that it could hold at all."""
        most = total_memory_gb() if on_a_space() else math.inf
        fitting = (model.name for model in catalog() if model.memory_gb + _SPARE_GB <= most)
        return list(dict.fromkeys([self.default, *fitting]))

    def check_offered(self, name: str | None) -> str:
        """The name of the model that is meant (the page's own when None). Loads nothing and forgets nothing.

        Raises `ModelError` for a name that is not on offer.
        """
        name, names = name or self.default, self.names
        if name not in names:
            raise ModelError(f"The model {name[:100]!r} is not on offer here; choose one of {', '.join(names)}.")
        return name

    def status(self, name: str | None = None) -> Status:
        """Where loading a model is. Loads nothing and forgets nothing. Raises as `check_offered` does."""
        holder = self._holders.get(self.check_offered(name))
        return holder.status if holder is not None else Status("not loaded yet")

    def holder(self, name: str | None = None) -> ModelHolder:
        """The holder of a model (the page's own when None), which has yet to be started.

        Raises `ModelError` for a name that is not on offer, a model too large for what memory is free, or when all that
        may be held are in use.
        """
        name = self.check_offered(name)
        with self._lock:
            if name not in self._holders:
                self._check_room(name, (other for other, held in self._holders.items() if held.loading))
                self._make_room(name)
                given = self._given if name == self.default else name
                check = partial(self._check_room, name)
                self._holders[name] = ModelHolder(given, self._load, gate=self._one_at_a_time, check=check)
            self._holders.move_to_end(name)
            return self._holders[name]

    def _make_room(self, name: str) -> None:
        """For one model more; the page's own always has its place."""
        while len(self._holders.keys() | {self.default, name}) > self._most:
            others = {other: held for other, held in self._holders.items() if other != self.default}
            oldest = next((other for other, held in others.items() if not held.in_use), None)
            if oldest is None:
                used = ", ".join(others)
                raise ModelError(f"No more models fit beside {used}, which others use; try again in a minute.")
            del self._holders[oldest]

    def _check_room(self, name: str, loading: Iterable[str] = ()) -> None:
        """Raises `ModelError` where there is no memory for a model beside those that are `loading`."""
        known = find_model(name)
        if known is None or name == self.default:
            return
        free = free_memory_gb() - sum(map(_memory_gb, loading))
        if known.memory_gb + _SPARE_GB > free:
            raise ModelError(
                f"{name} needs about {known.memory_gb + _SPARE_GB:.1f} GB of memory and {max(free, 0.0):.1f} GB are "
                "free on this machine; choose a smaller model, or run NeuroSteer on a larger machine."
            )


def _memory_gb(name: str) -> float:
    known = find_model(name)
    return known.memory_gb if known else 0.0


def _name_of(model: str) -> str:
    """What visitors know a model by: for a folder or file of this machine, its last part alone."""
    path = Path(model).expanduser()
    if find_model(model) is not None or not path.exists():
        return model
    return path.stem if path.is_file() else path.resolve().name


def free_memory_gb() -> float:
    """What memory is free for one more model, in GB: the GPU's where there is one, else the machine's."""
    if on_zero_gpu():  # where what CUDA tells is made up: the same whatever is on it
        return ZERO_GPU_GB
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 1e9
    free = psutil.virtual_memory().available
    most, used = container_bytes("memory.max"), container_bytes("memory.current")
    cached = container_bytes("memory.stat", "inactive_file") or 0  # of files; given back when memory is needed
    return (free if most is None or used is None else min(free, most - used + cached)) / 1e9


def total_memory_gb() -> float:
    """What memory there is at all, in GB."""
    import psutil

    if on_zero_gpu():
        return ZERO_GPU_GB
    total = psutil.virtual_memory().total
    return min(total, container_bytes("memory.max") or total) / 1e9


def container_bytes(file: str, line: str = "") -> int | None:
    """What the container says of its own memory, which may be far less than the machine's; None where it says
    nothing. (cgroup v2: https://docs.kernel.org/admin-guide/cgroup-v2.html)"""
    try:
        text = (_CGROUP / file).read_text()
        return int(text if not line else dict(part.split() for part in text.splitlines())[line])
    except (OSError, ValueError, KeyError):  # "max": no limit
        return None


def _load_by_name(name: str | None, progress: Progress) -> "LanguageModel":
    from neurosteer.ui import gpu

    return gpu.load(name, progress)


def _described(lm: "LanguageModel") -> str:
    """'SmolLM2-135M-Instruct on CPU, bfloat16'."""
    kind = lm.device.type
    device = "ZeroGPU" if on_zero_gpu() else {"cpu": "CPU", "cuda": "GPU"}.get(kind, kind)
    return f"{lm.name.rsplit('/', 1)[-1]} on {device}, {str(lm.dtype).removeprefix('torch.')}"
