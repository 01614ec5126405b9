"""What every method is: a pure function from activations to an artifact, with a name and defaults."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from neurosteer.artifacts.artifact import Artifact
from neurosteer.errors import UsageError
from neurosteer.reading.statistics import Activations

Columns = Callable[[int], Tensor]
"""Layer to what its neurons write to the residual stream per unit of activation, float32 `[d_mlp, d_model]`."""


@dataclass(frozen=True)
class Tensors:
    """What of a model and its SAEs a method may use beside activations.

    `decoders[L]` are the directions of the SAE that reads layer L, float32 `[n_features, d_model]`. `output_scores`
    takes a layer and directions `[n, d_model]` and tells how much each moves the model's output, float32 `[n]`.
    """

    columns: Columns
    decoders: Mapping[int, Tensor] = field(default_factory=dict)
    output_scores: Callable[[int, Tensor], Tensor] | None = None


class MethodFunction(Protocol):
    """Computes an artifact named `name` at `layers`, in ascending order."""

    def __call__(
        self,
        activations: Activations,
        layers: tuple[int, ...],
        *,
        name: str,
        tensors: Tensors,
        parameters: Mapping[str, Any],
    ) -> Artifact: ...


@dataclass(frozen=True)
class Method:
    """A method's entry in the registry: its function, what that must be given, and its parameters' defaults."""

    name: str
    function: MethodFunction
    explanation: str
    source: str
    kind: str
    needs_rows: bool = False
    needs_neurons: bool = False
    needs_features: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] | None = None

    def parameters(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`given` over the defaults. Raises `UsageError` for a parameter the method does not have or allow."""
        unknown = sorted(set(given) - set(self.defaults))
        if unknown:
            allowed = ", ".join(self.defaults) or "none"
            raise UsageError(f"The method {self.name!r} has no parameter {unknown[0]!r}; it takes {allowed}.")
        parameters = {**self.defaults, **given}
        if self.check is not None:
            self.check(parameters)
        return parameters
