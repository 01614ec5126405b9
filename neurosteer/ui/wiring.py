"""How components and handlers are connected: handlers get objects and return updates by name, never by position."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import gradio as gr

from neurosteer.ui.work import PROGRESS

T = TypeVar("T")
Updates = dict[str, Any]
"""What a handler changes, by the names of the components; what is not named stays as it is."""

_GIVEN_BY_GRADIO = (gr.Request, gr.Progress, gr.OAuthToken | None)


class Parts(SimpleNamespace):
    """Components by the names they were given."""

    def pick(self, *names: str) -> dict[str, Any]:
        """Some of them, by name."""
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Form(Generic[T]):
    """Components whose values make up one object: `make` is called with them by name."""

    make: Callable[..., T]
    parts: Mapping[str, Any]


def bound(handler: Callable[..., Any], inputs: Sequence[Any] = (), outputs: Any = None) -> tuple[Any, ...]:
    """`(function, inputs, outputs)` of an event, for gradio.

    `handler` first takes what gradio gives by itself (a request, a progress, a login), then an argument for each of
    `inputs`: a component's value, or what a `Form` makes of the values of several. `outputs` are components by name,
    and the handler returns (or yields) a dict of updates, or a named tuple of them; or `outputs` is one component, and
    it returns that one's update.
    """
    parameters = [
        parameter
        for parameter in inspect.signature(handler).parameters.values()
        if any(parameter.annotation == kind for kind in _GIVEN_BY_GRADIO)
    ]
    components = [part for one in inputs for part in (one.parts.values() if isinstance(one, Form) else (one,))]

    def called(*given: Any) -> Any:
        own, values = given[: len(parameters)], iter(given[len(parameters) :])
        return handler(*own, *(_value_of(one, values) for one in inputs))

    def updated(answer: Any) -> Any:
        if not isinstance(outputs, Mapping):
            return answer
        changes = answer._asdict() if hasattr(answer, "_asdict") else answer
        return {outputs[name]: update for name, update in changes.items()} or gr.skip()

    def run(*given: Any) -> Any:
        return updated(called(*given))

    def stream(*given: Any) -> Iterator[Any]:
        answers = called(*given)
        try:
            for answer in answers:
                yield updated(answer)
        finally:
            answers.close()

    function = stream if inspect.isgeneratorfunction(handler) else run
    function.__name__ = getattr(handler, "__name__", "run")
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    function.__signature__ = _signature(parameters)  # type: ignore[attr-defined]
    listed = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    return function, components or None, listed


def _value_of(one: Any, values: Iterator[Any]) -> Any:
    if isinstance(one, Form):
        return one.make(**{name: next(values) for name in one.parts})
    return next(values)


def _signature(parameters: Sequence[inspect.Parameter]) -> inspect.Signature:
    """As gradio reads it: it knows a progress by its default, and puts its own before all values."""
    own = [
        parameter.replace(default=PROGRESS) if parameter.annotation is gr.Progress else parameter
        for parameter in parameters
    ]
    return inspect.Signature([*own, inspect.Parameter("values", inspect.Parameter.VAR_POSITIONAL)])
