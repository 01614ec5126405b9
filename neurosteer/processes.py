"""Several processes on one job, as `accelerate launch` and `torchrun` start them.

Each takes its share of the forward passes; what is added up or gathered is the same in all of them afterwards, so that
all take the same decisions. Whoever has not called `join_processes` is alone, whatever runs beside it: then nothing
here does anything.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from neurosteer.errors import NeuroSteerError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

A = TypeVar("A")
B = TypeVar("B")

_NAMED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_A_MOMENT = timedelta(seconds=5)
_PATIENCE = timedelta(hours=6)  # the first one may train a judge, or wait for a download, while the others wait


@dataclass
class _State:
    """Who this process is; `group` is None for one that is alone. `store` holds what processes tell of their end."""

    rank: int = 0
    count: int = 1
    group: Any = None
    store: Any = None


_state = _State()


def are_several() -> bool:
    """Whether this process was started as one of several, by what a launcher puts into the environment."""
    return all(os.environ.get(name) for name in _NAMED) and os.environ["WORLD_SIZE"] != "1"


def join_processes() -> int:
    """Share work with the processes that were started beside this one, and take the GPU of one's number; call it in all
    of them before a model is loaded. From then on `build`, `evaluate`, `calibrate`, `profile_layers`, `train_saes` and
    `described_examples` must be called by all of them with the same arguments; each returns the same everywhere.

    Returns the number of this process; 0 is the one that should write. Alone, it does nothing. Raises `UsageError`
    where the others cannot be reached.
    """
    if not are_several():
        return 0
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    try:
        if not distributed.is_initialized():
            store, rank, size = next(iter(rendezvous("env://", timeout=_PATIENCE)))
            distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
            _state.store = store
        _state.group = distributed.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        why = str(error).splitlines()[0]
        raise UsageError(f"The other processes cannot be reached at {where} ({why:.200}).") from error
    _state.rank, _state.count = distributed.get_rank(), distributed.get_world_size()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", _state.rank)) % torch.cuda.device_count())
    return _state.rank


def leave() -> None:
    """Be alone again."""
    if _state.group is None:
        return
    from torch import distributed

    _become(_State())
    distributed.destroy_process_group()


def tell(mistake: str) -> bool:
    """Let the others know why this process ends. Returns whether it has to say so itself: the first always, another one
    where the first does not end for the same reason within a few seconds."""
    if _state.store is None:
        return True
    try:
        _state.store.set(f"mistake/{rank()}", mistake)
        if rank() == 0:
            return True
        _state.store.wait(["mistake/0"], _A_MOMENT)
        return _state.store.get("mistake/0").decode() != mistake
    except RuntimeError:  # it does not end, or has ended already
        return True


def told() -> str | None:
    """Why another process ended, if one said so."""
    if _state.store is None:
        return None
    with suppress(RuntimeError):
        for other in range(count()):
            if other != rank() and _state.store.check([f"mistake/{other}"]):
                return f"Process {other} ended: {_state.store.get(f'mistake/{other}').decode()}"
    return None


def rank() -> int:
    """The number of this process among those that share the work; 0 for one alone."""
    return _state.rank


def count() -> int:
    """How many share the work; 1 for one alone."""
    return _state.count


def own_device() -> str | None:
    """The device of one of several processes: its own GPU, or none as the launcher says; None where that is open."""
    import torch

    if count() == 1 or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"):
        return "cpu" if count() > 1 else None
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else None


def own(items: Sequence[A]) -> Sequence[A]:
    """Which of `items` fall to this process: every `count`-th, so that neighbours of like size are spread."""
    return items[rank() :: count()]


def summed(tensor: "Tensor") -> "Tensor":
    """`tensor` (on the CPU, contiguous) with those of all processes added to it, in place."""
    if count() > 1:
        from torch import distributed

        distributed.all_reduce(tensor, group=_state.group)
    return tensor


def gathered(found: A) -> list[A]:
    """What each process found, in the order of their numbers."""
    if count() == 1:
        return [found]
    from torch import distributed

    everything: list[Any] = [None] * count()
    distributed.all_gather_object(everything, found, group=_state.group)
    return everything


def shared_out(items: Sequence[A], work: Callable[[Sequence[A]], Sequence[B]]) -> list[B]:
    """What `work` makes of `items`, one of each, in their order; every process does its own share."""
    if count() == 1:
        return list(work(items))
    mine = own(items)
    parts = gathered(_tried(lambda: list(work(mine)) if mine else []))
    made = [_outcome(part) for part in parts]
    found: list[Any] = [None] * len(items)
    for place, part in enumerate(made):
        found[place :: count()] = part
    return found


def agreed(work: Callable[[], A]) -> A:
    """What `work` gives the first process, for all of them; or what it raises. While it works that process is alone."""
    if count() == 1:
        return work()
    mine, together = None, _state
    if rank() == 0:
        _become(_State())
        try:
            mine = _tried(work)
        finally:
            _become(together)
    return _outcome(gathered(mine)[0])  # type: ignore[arg-type]


def _become(state: _State) -> None:
    global _state
    _state = state


def _tried(work: Callable[[], A]) -> tuple[A | None, Exception | None]:
    """What came of it, or the error: the others wait for an answer in any case."""
    try:
        return work(), None
    except NeuroSteerError as error:
        return None, error
    except Exception as error:  # which may be of a kind that cannot be sent
        return None, RuntimeError(f"{type(error).__name__}: {error}")


def _outcome(tried: tuple[A | None, Exception | None]) -> A:
    found, error = tried
    if error is not None:
        raise error
    return found  # type: ignore[return-value]
