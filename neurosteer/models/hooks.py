"""The only place that registers hooks on a model."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Module


@dataclass(frozen=True)
class InputHook:
    """Sees the first positional input of `module`; what it returns, unless None, replaces it."""

    module: Module
    function: Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class OutputHook:
    """Sees the hidden states that `module` returns; what it returns, unless None, replaces them."""

    module: Module
    function: Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class PassHook:
    """Sees the first positional input of `module` and the hidden states that it returns; what the function returns,
    unless None, replaces the latter."""

    module: Module
    function: Callable[[Tensor, Tensor], Tensor | None]


Hook = InputHook | OutputHook | PassHook


@contextmanager
def hooked(hooks: Sequence[Hook]) -> Iterator[None]:
    """Attach `hooks` for the length of a `with` block, seen by the calling thread only.

    Another thread that runs the same model meanwhile is not touched: a hook answers only the thread that
    entered the block. All hooks are gone when the block ends, however it ends.
    """
    owner = threading.get_ident()
    handles = []
    try:
        for hook in hooks:
            handles.append(_register(hook, owner))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _register(hook: Hook, owner: int) -> Any:
    if isinstance(hook, InputHook):
        return hook.module.register_forward_pre_hook(_input_hook(hook.function, owner))
    if isinstance(hook, OutputHook):
        return hook.module.register_forward_hook(_output_hook(lambda _input, output: hook.function(output), owner))
    return hook.module.register_forward_hook(_output_hook(hook.function, owner))


def _input_hook(function: Callable[[Tensor], Tensor | None], owner: int) -> Callable[..., Any]:
    def run(_module: Module, arguments: tuple[Any, ...]) -> Any:
        if threading.get_ident() != owner:
            return None
        changed = function(arguments[0])
        return None if changed is None else (changed, *arguments[1:])

    return run


def _output_hook(function: Callable[[Any, Tensor], Tensor | None], owner: int) -> Callable[..., Any]:
    def run(_module: Module, arguments: tuple[Any, ...], output: Any) -> Any:
        if threading.get_ident() != owner:
            return None
        # A block returns its hidden states alone or as the first of a tuple, depending on the architecture.
        given = arguments[0] if arguments else None
        if not isinstance(output, tuple):
            return function(given, output)
        changed = function(given, output[0])
        return None if changed is None else (changed, *output[1:])

    return run
