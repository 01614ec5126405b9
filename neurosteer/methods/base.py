"""What every method is: a pure function from activations to an artifact, with a name, defaults, and its own rules of
what is read for it and at which layers it may work."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import UsageError
from neurosteer.models.language_model import Framing
from neurosteer.reading.request import Request, Tokens
from neurosteer.reading.statistics import Activations
from neurosteer.saes.autoencoder import SparseAutoencoder

APART = 3
"""How many layers lie at least between two single layers that are both worth comparing."""

Columns = Callable[[int], Tensor]
"""Layer to what its neurons write to the residual stream per unit of activation, float32 `[d_mlp, d_model]`."""

Layers = tuple[int, ...]
"""Block numbers, ascending."""


class Places(NamedTuple):
    """The layers that were `chosen`, or among which to choose: `candidates`, and where `everywhere` is not empty also
    spreads over it."""

    chosen: Layers | None
    candidates: Layers
    everywhere: Layers


@dataclass(frozen=True)
class Given:
    """What a method makes an artifact named `name` of: activations at `layers`, in ascending order, its parameters, and
    what of a model and its SAEs it may use beside them.

    `decoders[L]` are the directions of the SAE that reads layer L, float32 `[n_features, d_model]`. `output_scores`
    takes a layer and directions `[n, d_model]` and tells how much each moves the model's output, float32 `[n]`.
    """

    activations: Activations
    layers: Layers
    name: str
    parameters: Mapping[str, Any]
    columns: Columns
    decoders: Mapping[int, Tensor] = field(default_factory=dict)
    output_scores: Callable[[int, Tensor], Tensor] | None = None

    def vector(self, method: str, directions: Mapping[int, Tensor], **more: Any) -> SteeringVector:
        """The vector of these directions, made by `method` under the parameters given."""
        named: dict[str, Any] = {"name": self.name, "method": method, "parameters": dict(self.parameters), **more}
        norms = {layer: self.activations.norms[layer] for layer in self.layers}
        return SteeringVector(model=self.activations.model, directions=directions, norms=norms, **named)


@dataclass(frozen=True)
class Method:
    """A method's entry in the registry: its function, and its parameters' defaults.

    The other functions are what building asks of it. As they stand here they suit a method that makes a direction of
    the residual stream at each layer by itself; one that works otherwise has its own (`cna`, `sae`).

    `needs_rows`: every text's activations are kept at the layers it works at, not only the class means. `unpaired` is
    what to be wary of where the examples are not paired; empty where that makes no difference.
    """

    name: str
    function: Callable[[Given], Artifact]
    explanation: str
    source: str
    kind: str
    needs_rows: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Mapping[str, Any]], None] | None = None
    unpaired: str = ""

    needs_features = False
    """Whether it works on the features of SAEs, at their layers alone."""

    spreads = True
    """Whether it can work at all layers of the model together."""

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

    def default_framing(self, parameters: Mapping[str, Any], *, chat: bool) -> Framing:
        return "answer" if chat else "raw"

    def default_tokens(self, parameters: Mapping[str, Any], framing: Framing | None) -> Tokens:
        """Which tokens are read under a `framing` that was asked for, or the default one (None)."""
        return "last" if framing == "prompt" else "mean"

    def layers_without_choice(self, parameters: Mapping[str, Any], n_layers: int) -> tuple[Layers, str] | None:
        """With `auto`: the layers to work at, and why, where activations need not be read to know them."""
        return None

    def usable(self, layers: Layers, parameters: Mapping[str, Any]) -> Layers:
        """Those of `layers` at which the method may work. Raises `UsageError` where there are none."""
        return layers

    def request(self, parameters: Mapping[str, Any], places: Places, saes: Mapping[int, SparseAutoencoder]) -> Request:
        """What to read for working there."""
        residual = places.chosen or places.everywhere or tuple(range(places.candidates[-1] + 1))
        return Request(residual=residual, rows=(places.chosen or places.candidates) if self.needs_rows else ())

    def up_to(self, layer: int) -> tuple[Layers, str]:
        """Where to work when `layer` separates best, and how to say so before "separates held-out examples best"."""
        return (layer,), f"layer {layer} separates held-out examples"

    def layer_choices(self, candidates: Layers, everywhere: Layers, best: Sequence[int]) -> list[tuple[str, Layers]]:
        """Choices of layers worth comparing, each with its name; `best` are the single layers that separate best."""
        upper_half = everywhere[len(everywhere) // 2 :]
        return [*single_layers(best), *together(candidates, upper_half, everywhere)]


def single_layers(layers: Iterable[int]) -> list[tuple[str, Layers]]:
    return [(f"layer {layer}", (layer,)) for layer in layers]


def together(*spreads: Layers) -> list[tuple[str, Layers]]:
    """Several layers at once, each such choice with its name."""
    found = []
    for layers in (layers for layers in dict.fromkeys(spreads) if len(layers) > 1):
        whole = len(layers) == layers[-1] - layers[0] + 1
        named = f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
        found.append((f"layers {named} together", layers))
    return found
