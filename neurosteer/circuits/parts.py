"""Smaller circuits out of a circuit, others like it by chance, and recipes that scale one."""

import re
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.common import safe_name
from neurosteer.artifacts.recipes import Recipe, Use
from neurosteer.artifacts.strength import default_calibration
from neurosteer.artifacts.twins import other_neurons
from neurosteer.errors import UsageError

_PART = re.compile(
    r"(?P<all>all)|top(?P<top>[0-9]{1,9})|L(?P<layer>[0-9]{1,9})(?:/N(?P<neuron>[0-9]{1,9}))?", re.IGNORECASE
)


def part(circuit: NeuronCircuit, text: str) -> NeuronCircuit:
    """The part of `circuit` that `text` names: `top10` (the strongest by |score|), `L23` (a layer), `L23/N807` (a
    neuron) or `all`.

    Raises `UsageError` for anything else, a layer or neuron that the model has not, or one that is not in the circuit.
    """
    found = _PART.fullmatch(text.strip())
    if not found:
        raise UsageError(f"{text!r:.60} is no part of a circuit; write top10, L23, L23/N807 or all.")
    if found["all"]:
        return circuit
    if found["top"]:
        count = int(found["top"])
        if count < 1:
            raise UsageError(f"{text!r:.60} is no neuron at all; ask for one at least.")
        return _subset(circuit, strongest_first(circuit)[:count], text)
    chosen = circuit.neuron_layers == _in_range("layer", int(found["layer"]), circuit.model.n_layers)
    if found["neuron"]:
        chosen = chosen & (circuit.neurons == _in_range("neuron", int(found["neuron"]), circuit.model.d_mlp))
    if not chosen.any():
        layers = ", ".join(map(str, circuit.layers))
        raise UsageError(f"{text!r:.60} is not in the circuit {circuit.name!r}, whose layers are {layers:.200}.")
    return _subset(circuit, chosen.nonzero()[:, 0], text)


def random_like(circuit: NeuronCircuit, seed: int = 0, *, leave_out: Collection[tuple[int, int]] = ()) -> NeuronCircuit:
    """As many neurons of each layer as the circuit has, drawn by chance from all of that layer's but those in
    `leave_out`, (layer, neuron). Raises `UsageError` where fewer are left than the circuit has."""
    neurons = other_neurons(circuit, seed, leave_out=leave_out)
    return replace(circuit, name=safe_name(f"{circuit.name}-random-{seed}"), method="random", neurons=neurons)


def at_multiplier(circuit: NeuronCircuit, multiplier: float) -> Recipe:
    """The recipe that multiplies the circuit's neurons (0 ablates, 1 is off, above 1 amplifies), also one that was
    made to shift. Raises `UsageError` where `multiplier` is no finite number."""
    if circuit.operation != "scale":
        circuit = replace(circuit, operation="scale", calibration=default_calibration("scale"))
    return Recipe.of(Use(circuit, multiplier=multiplier))


def strongest_first(circuit: NeuronCircuit) -> Tensor:
    """Places of the circuit's neurons by falling |score|, `[n]`."""
    return circuit.scores.abs().argsort(descending=True, stable=True)


def _subset(circuit: NeuronCircuit, places: Tensor, text: str) -> NeuronCircuit:
    return replace(
        circuit,
        name=safe_name(f"{circuit.name[:70]}-{text.strip()}"),
        neuron_layers=circuit.neuron_layers[places],
        neurons=circuit.neurons[places],
        scores=circuit.scores[places],
        differences=circuit.differences[places],
        parameters={**circuit.parameters, "part": text.strip()},
        calibration=circuit.calibration.unmeasured(),
        receipts=(),
    )


def _in_range(what: str, number: int, limit: int) -> int:
    if number >= limit:
        raise UsageError(f"There is no {what} {number}; the model has 0 to {limit - 1}.")
    return number
