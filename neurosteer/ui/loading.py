"""The models of the page: each loaded in a thread of its own, so that the page answers while one is on its way.

Importing torch and transformers takes seconds. It happens in that thread too, which is why the page's modules import
them inside functions only.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from neurosteer.errors import ModelError, NeuroSteerError
from neurosteer.models.catalog import catalog, default_model, find_model
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.ui.limits import on_zero_gpu

if TYPE_CHECKING:
    from neurosteer.models.language_model import LanguageModel
    from neurosteer.ui.gpu import ModelSession

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_IMPORT_LIMIT_S = 120.0
_MOST_LOADED = 2
_SPARE_GB = 1.0  # for activations and whatever else runs on the machine

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

    def __init__(self, model_name: str | None = None, load: Loader | None = None) -> None:
        self._name = model_name
        self._load = load or _load_by_name
        self._lock = threading.Lock()
        self._begun = False
        self._imported = threading.Event()
        self._settled = threading.Event()
        self._status = Status("starting")
        self._session: ModelSession | None = None

    @property
    def status(self) -> Status:
        return self._status

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

    They are shared by all visitors. At most `most` stay loaded: the one unused for longest makes room, and what still
    writes with it keeps it until it is done.
    """

    def __init__(self, default: str | None = None, *, load: Loader | None = None, most: int = _MOST_LOADED) -> None:
        self._given = default or default_model()
        self.default = _name_of(self._given)
        self._load, self._most = load, most
        self._holders: OrderedDict[str, ModelHolder] = OrderedDict()
        self._lock = threading.Lock()

    @staticmethod
    def of(holder: ModelHolder, name: str | None = None) -> "Models":
        """With one model that is there already, or on its way."""
        models = Models(name)
        models._holders[models.default] = holder
        return models

    @property
    def names(self) -> list[str]:
        """The model of this page, and those of the catalog."""
        return list(dict.fromkeys([self.default, *(model.name for model in catalog())]))

    def holder(self, name: str | None = None) -> ModelHolder:
        """The holder of a model (the page's own when None), which has yet to be started.

        Raises `ModelError` for a name that is not on offer, or a model too large for what memory is free.
        """
        name = name or self.default
        with self._lock:
            if name not in self._holders:
                self._check(name)
                self._holders[name] = ModelHolder(self._given if name == self.default else name, self._load)
            self._holders.move_to_end(name)
            while len(self._holders) > self._most:
                oldest = next(known for known in self._holders if known != self.default)
                del self._holders[oldest]
            return self._holders[name]

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise ModelError(f"The model {name[:100]!r} is not on offer here; choose one of {', '.join(self.names)}.")
        known = find_model(name)
        if known is None or name == self.default:
            return
        free = free_memory_gb()
        if known.memory_gb + _SPARE_GB > free:
            raise ModelError(
                f"{name} needs about {known.memory_gb + _SPARE_GB:.1f} GB of memory and {free:.1f} GB are free on this "
                "machine; choose a smaller model, or run NeuroSteer on a larger machine."
            )


def _name_of(model: str) -> str:
    """What visitors know a model by: for a folder or file of this machine, its last part alone."""
    path = Path(model).expanduser()
    if find_model(model) is not None or not path.exists():
        return model
    return path.stem if path.is_file() else path.resolve().name


def free_memory_gb() -> float:
    """What memory is free for one more model, in GB: the GPU's where there is one, else the machine's."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0] / 1e9
    return psutil.virtual_memory().available / 1e9


def _load_by_name(name: str | None, progress: Progress) -> "LanguageModel":
    from neurosteer.ui import gpu

    return gpu.load(name, progress)


def _described(lm: "LanguageModel") -> str:
    """'SmolLM2-135M-Instruct on CPU, bfloat16'."""
    kind = lm.device.type
    device = "ZeroGPU" if on_zero_gpu() else {"cpu": "CPU", "cuda": "GPU"}.get(kind, kind)
    return f"{lm.name.rsplit('/', 1)[-1]} on {device}, {str(lm.dtype).removeprefix('torch.')}"
