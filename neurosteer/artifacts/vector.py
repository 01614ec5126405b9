"""Steering vectors: one direction in the residual stream per layer, frozen and validated when made."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from neurosteer.artifacts.common import Made, check_tensor, safe_name
from neurosteer.artifacts.features import Feature, FeatureEncoder
from neurosteer.artifacts.provenance import Provenance
from neurosteer.artifacts.strength import DEFAULT_DOSE, Calibration, default_calibration
from neurosteer.errors import ArtifactError, MismatchError
from neurosteer.models.reference import same_shape, shape_text
from neurosteer.text import shown
from neurosteer.validation import check_choice, is_finite, is_int

VectorOperation = Literal["add", "ablate", "clamp"]
VECTOR_OPERATIONS = ("add", "ablate", "clamp")


@dataclass(frozen=True, eq=False, kw_only=True)
class SteeringVector(Made):
    """One direction in the residual stream per layer.

    `directions[L]` is float32 `[d_model]` as the method computed it. Its length weighs it when vectors are added; the
    size of the push is `strength × dose × norms[L]` along its unit direction, shared equally by the layers.
    `norms[L]` is the median norm of the residual stream after block L over the texts' tokens.

    `features` are the SAE features that directions were added up from, where they were.

    A vector that clamps holds an SAE feature at a value: the direction is the feature's decoder row, whose length
    counts, and `encoders[L]` (there for no other operation) tells how active the feature is.
    """

    directions: Mapping[int, Tensor]
    norms: Mapping[int, float]
    operation: VectorOperation = "add"
    calibration: Calibration = field(default_factory=lambda: Calibration(DEFAULT_DOSE))
    features: tuple[Feature, ...] = ()
    encoders: Mapping[int, FeatureEncoder] = field(default_factory=dict)

    kind = "steering-vector"
    site = "resid_post"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("operation of a vector", self.operation, VECTOR_OPERATIONS)
        if not self.directions:
            raise ArtifactError(f"The vector {self.name!r} has no layers; it needs at least one.")
        if set(self.norms) != set(self.directions):
            raise ArtifactError(
                f"The vector {self.name!r} has norms for layers {sorted(self.norms)} and directions for {self.layers}; "
                "they must be the same layers."
            )
        for layer, direction in self.directions.items():
            _check_layer(self, layer)
            check_tensor(f"direction of layer {layer}", direction, torch.float32, (self.model.d_model,))
            if not direction.any():
                raise ArtifactError(f"The vector {self.name!r} is zero at layer {layer}; it has no direction there.")
            if not is_finite(self.norms[layer]) or self.norms[layer] <= 0:
                raise ArtifactError(f"The norm of layer {layer} is {shown(self.norms[layer])}; it must be above 0.")
        _check_encoders(self)

    @property
    def layers(self) -> list[int]:
        return sorted(self.directions)

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        """The sum of two vectors of one model and operation, over the layers of either; strength 1 means the default
        again."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        _check_is_push(self, "added")
        _check_is_push(other, "added")
        if self.operation != other.operation:
            raise ArtifactError(
                f"{self.name!r} has the operation {self.operation} and {other.name!r} {other.operation}; only vectors "
                "of one operation can be added. Put both into a recipe instead."
            )
        if not same_shape(self.model, other.model, neurons=False):
            raise MismatchError(
                f"{self.name!r} ({shape_text(self.model)}) and {other.name!r} ({shape_text(other.model)}) "
                "belong to models of different shape; only vectors of one model can be added."
            )
        directions = {layer: tensor.clone() for layer, tensor in self.directions.items()}
        for layer, tensor in other.directions.items():
            directions[layer] = directions[layer] + tensor if layer in directions else tensor.clone()
        return replace(
            self,
            name=safe_name(f"{self.name}+{other.name}"),
            method="sum",
            parameters={"terms": [self.name, other.name]},
            features=(),
            directions=directions,
            norms={**other.norms, **self.norms},
            calibration=default_calibration(self.operation),
            provenance=Provenance(parents=(self.name, other.name), version=self.provenance.version),
            receipts=(),
        )

    def __mul__(self, factor: float) -> "SteeringVector":
        """A vector `factor` times as long: it weighs more in a sum; a negative factor turns it round."""
        if not is_finite(factor) or factor == 0:
            raise ArtifactError(f"A vector cannot be scaled by {shown(factor)}; use a finite number other than 0.")
        _check_is_push(self, "scaled")
        scaled = {layer: tensor * factor for layer, tensor in self.directions.items()}
        features = tuple(replace(feature, weight=feature.weight * factor) for feature in self.features)
        turned = factor < 0 and self.operation == "add"  # projecting out does not know which way a direction points
        calibration = self.calibration.turned_round() if turned else self.calibration
        return replace(self, directions=scaled, features=features, calibration=calibration, receipts=())

    __rmul__ = __mul__

    def __neg__(self) -> "SteeringVector":
        return self * -1.0

    def __sub__(self, other: "SteeringVector") -> "SteeringVector":
        return self + -other

    def normalised(self) -> "SteeringVector":
        """The same directions with length 1 at every layer, so that vectors added weigh the same."""
        _check_is_push(self, "normalised")
        lengths = {layer: float(tensor.double().norm()) for layer, tensor in self.directions.items()}
        return replace(
            self,
            directions={layer: unit(tensor) for layer, tensor in self.directions.items()},
            features=tuple(replace(one, weight=one.weight / lengths.get(one.layer, 1.0)) for one in self.features),
        )


def unit(direction: Tensor) -> Tensor:
    """`direction` `[d]` with length 1, also where its square would leave float32's range."""
    scaled = direction / direction.abs().max()
    return scaled / scaled.norm()


def _check_layer(artifact: SteeringVector, layer: object) -> None:
    if not is_int(layer) or not 0 <= layer < artifact.model.n_layers:  # type: ignore[operator]
        raise ArtifactError(
            f"The vector {artifact.name!r} names layer {shown(layer)}; {shown(artifact.model.name)} has layers 0 to "
            f"{artifact.model.n_layers - 1}."
        )


def _check_encoders(vector: SteeringVector) -> None:
    wanted = vector.layers if vector.operation == "clamp" else []
    if not all(map(is_int, vector.encoders)) or sorted(vector.encoders) != wanted:
        named = [shown(layer) for layer in list(vector.encoders)[:8]]
        raise ArtifactError(
            f"The vector {vector.name!r} has encoders for layers [{', '.join(named)}]; with operation "
            f"{vector.operation} they must be those of layers {wanted}."
        )
    for layer, encoder in vector.encoders.items():
        if not isinstance(encoder, FeatureEncoder):
            raise ArtifactError(f"The encoder of layer {layer} is {shown(encoder)}; it must be a FeatureEncoder.")
        check_tensor(f"encoder of layer {layer}", encoder.weights, torch.float32, (vector.model.d_model,))


def _check_is_push(vector: SteeringVector, done: str) -> None:
    """A clamp depends on where the stream is, and on its decoder row's length: no arithmetic of directions fits it."""
    if vector.operation == "clamp":
        raise ArtifactError(
            f"{vector.name!r} clamps a feature, so it cannot be {done}; put it into a recipe beside others instead."
        )
