"""Neuron circuits: MLP neurons with scores; frozen and validated when made."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from neurosteer.artifacts.common import Made, check_tensor
from neurosteer.artifacts.strength import DEFAULT_MULTIPLIER, Calibration
from neurosteer.errors import ArtifactError
from neurosteer.validation import check_choice

CircuitOperation = Literal["scale", "shift"]
CIRCUIT_OPERATIONS = ("scale", "shift")


@dataclass(frozen=True, eq=False, kw_only=True)
class NeuronCircuit(Made):
    """A sparse set of MLP neurons: `layers`, `neurons` int32 `[n]`; `scores`, `differences` float32 `[n]`.

    `scores` are what the method ranked by; `differences` the class difference of each neuron's activation.
    """

    neuron_layers: Tensor
    neurons: Tensor
    scores: Tensor
    differences: Tensor
    operation: CircuitOperation = "scale"
    calibration: Calibration = field(default_factory=lambda: Calibration(DEFAULT_MULTIPLIER))

    kind = "neuron-circuit"
    site = "mlp_neurons"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("operation of a circuit", self.operation, CIRCUIT_OPERATIONS)
        size = tuple(self.neurons.shape) if isinstance(self.neurons, Tensor) else ()
        if len(size) != 1 or size[0] == 0:
            raise ArtifactError(f"The circuit {self.name!r} has no neurons; it needs at least one.")
        check_tensor("layers", self.neuron_layers, torch.int32, size)
        check_tensor("neurons", self.neurons, torch.int32, size)
        check_tensor("scores", self.scores, torch.float32, size)
        check_tensor("differences", self.differences, torch.float32, size)
        _check_range("layer", self.neuron_layers, self.model.n_layers)
        _check_range("neuron", self.neurons, self.model.d_mlp)
        keys = self.neuron_layers.long() * self.model.d_mlp + self.neurons.long()
        if keys.unique().numel() != keys.numel():
            raise ArtifactError(f"The circuit {self.name!r} names a neuron twice; each may stand once.")

    @property
    def layers(self) -> list[int]:
        return self.neuron_layers.unique().tolist()

    @property
    def size(self) -> int:
        return self.neurons.numel()

    @property
    def share(self) -> float:
        """The circuit's neurons as a share of all MLP neurons of the model."""
        return self.size / (self.model.n_layers * self.model.d_mlp)


def _check_range(what: str, values: Tensor, limit: int) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= limit:
        raise ArtifactError(f"The circuit names {what} {low if low < 0 else high}; the model has 0 to {limit - 1}.")
