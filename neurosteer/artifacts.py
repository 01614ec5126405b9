"""Steering vectors and neuron circuits: frozen, validated when made, combined into new ones."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from neurosteer.errors import ArtifactError, MismatchError

DEFAULT_DOSE = 0.3
DEFAULT_MULTIPLIER = 2.0
DEFAULT_SHIFT = 6.0

VectorOperation = Literal["add", "ablate", "clamp"]
CircuitOperation = Literal["scale", "shift"]
VECTOR_OPERATIONS = ("add", "ablate", "clamp")
CIRCUIT_OPERATIONS = ("scale", "shift")
_DEFAULT_AMOUNTS = {
    "add": DEFAULT_DOSE,
    "ablate": 1.0,
    "clamp": 0.0,
    "scale": DEFAULT_MULTIPLIER,
    "shift": DEFAULT_SHIFT,
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_NEURONPEDIA = re.compile(r"https://(?:www\.)?neuronpedia\.org/[\w./-]{1,300}")
_MAX_DIMENSION = 1 << 20
_MAX_LAYERS = 4096
_MAX_FLOAT32 = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class ModelReference:
    """The model an artifact was made on. A different shape is refused, a different fingerprint warned about."""

    name: str
    revision: str | None
    n_layers: int
    d_model: int
    d_mlp: int
    fingerprint: str

    def __post_init__(self) -> None:
        _check_text("model name", self.name, 300)
        _check_text("model fingerprint", self.fingerprint, 100)
        if self.revision is not None:
            _check_text("model revision", self.revision, 300)
        for key, limit in (("n_layers", _MAX_LAYERS), ("d_model", _MAX_DIMENSION), ("d_mlp", _MAX_DIMENSION)):
            value = getattr(self, key)
            if not _is_int(value) or not 1 <= value <= limit:
                raise ArtifactError(
                    f"The model's {key} is {_shown(value)}; it must be a whole number from 1 to {limit}."
                )


@dataclass(frozen=True)
class Provenance:
    """Where an artifact comes from: the data, how it was read, and why these layers.

    `candidates` are the choices of layers that were compared at equal KL, a mapping of figures each; `hold_out` is the
    share of each class that took no part in building (`building.held_out_half` tells which).
    """

    created: str = ""
    version: str = ""
    examples: str = ""
    examples_sha256: str = ""
    n_positive: int = 0
    n_negative: int = 0
    n_cut: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    framing: str = ""
    tokens: str = ""
    layer_choice: str = ""
    separation: Mapping[int, float] = field(default_factory=dict)
    candidates: Sequence[Mapping[str, Any]] = ()
    hold_out: float = 0.0
    parents: Sequence[str] = ()

    def __post_init__(self) -> None:
        for key in ("created", "version", "examples", "examples_sha256", "framing", "tokens", "layer_choice"):
            _check_text(f"provenance {key}", getattr(self, key), 1000, empty=True)
        for key in ("n_positive", "n_negative", "n_cut"):
            if not _is_int(getattr(self, key)) or getattr(self, key) < 0:
                raise ArtifactError(f"The provenance's {key} is {_shown(getattr(self, key))}; it must be a count.")
        if not _is_finite(self.hold_out) or not 0 <= self.hold_out < 1:
            raise ArtifactError(f"The provenance's hold_out is {_shown(self.hold_out)}; it must be a share below 1.")
        _check_json("provenance's counts and parents", [dict(self.dropped), list(self.parents)])
        _check_json("provenance's candidates", [dict(one) for one in self.candidates])
        for layer, value in self.separation.items():
            if not _is_int(layer) or not _is_finite(value):
                raise ArtifactError(
                    f"The provenance's separation of layer {_shown(layer)} is {_shown(value)}; it must be a number."
                )


@dataclass(frozen=True)
class Calibration:
    """What strength 1 means. `amount` is a dose (add), a share (ablate), the activation a feature is held at (clamp), a
    multiplier (scale) or a number of class differences (shift); `amount_down`, of the same kind, is what strength −1
    means where it was measured by itself, else the opposite of `amount`.

    `measured` says whether they were found by measurement or are the default. Measured, `kl` and `kl_down` are what the
    amounts came to: the `percentile` of the per-token KL from the unsteered model in nats, over the continuations (by
    `n_tokens` tokens) of the prompts with that SHA-256; `target_kl` is what was aimed at, `note` says why it was not
    reached.
    """

    amount: float
    measured: bool = False
    amount_down: float | None = None
    target_kl: float | None = None
    percentile: float | None = None
    n_tokens: int | None = None
    n_prompts: int | None = None
    prompts_sha256: str = ""
    kl: float | None = None
    kl_down: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not _is_finite(self.amount):
            raise ArtifactError(f"The calibrated amount is {_shown(self.amount)}; it must be a finite number.")
        if not isinstance(self.measured, bool):
            raise ArtifactError(f"The calibration's 'measured' is {_shown(self.measured)}; it must be true or false.")
        for key in ("amount_down", "target_kl", "percentile", "kl", "kl_down"):
            value = getattr(self, key)
            if value is not None and not _is_finite(value):
                raise ArtifactError(f"The calibration's {key} is {_shown(value)}; it must be a finite number.")
        for key in ("n_tokens", "n_prompts"):
            value = getattr(self, key)
            if value is not None and not _is_int(value):
                raise ArtifactError(f"The calibration's {key} is {_shown(value)}; it must be a count.")
        _check_text("calibration's note", self.note, 1000, empty=True)
        _check_text("calibration's prompts_sha256", self.prompts_sha256, 64, empty=True)

    def unmeasured(self) -> "Calibration":
        """The same amounts for an artifact that was changed, on which nothing was measured."""
        return Calibration(self.amount, amount_down=self.amount_down)

    def turned_round(self) -> "Calibration":
        """For a direction that was turned round: what strength 1 did, −1 does now."""
        if self.amount_down is None:
            return self
        return replace(self, amount=self.amount_down, amount_down=self.amount, kl=self.kl_down, kl_down=self.kl)


@dataclass(frozen=True)
class FeatureContext:
    """A place where a feature fires: the token with what stands before and after it, and the activation there."""

    before: str
    token: str
    after: str
    activation: float

    def __post_init__(self) -> None:
        for key in ("before", "token", "after"):
            _check_text(f"feature context's {key}", getattr(self, key), 2000, empty=True)
        if not _is_finite(self.activation):
            raise ArtifactError(f"A feature context's activation is {_shown(self.activation)}; it must be a number.")


@dataclass(frozen=True)
class Feature:
    """One SAE feature that a vector is made of.

    `rates` are the shares of the positive and the negative texts' tokens at which it fires, `means_active` its mean
    activation where it does; `score` is what the method ranked by, `weight` what its decoder row counts. `promoted` and
    `suppressed` are the tokens its decoder row raises and lowers most through the unembedding.
    """

    layer: int
    index: int
    weight: float
    score: float
    rates: tuple[float, float]
    means_active: tuple[float, float]
    output_score: float | None = None
    promoted: tuple[str, ...] = ()
    suppressed: tuple[str, ...] = ()
    contexts: tuple[FeatureContext, ...] = ()
    link: str | None = None

    def __post_init__(self) -> None:
        if not _is_int(self.layer) or not _is_int(self.index) or self.layer < 0 or self.index < 0:
            raise ArtifactError(f"A feature is {_shown(self.index)} of layer {_shown(self.layer)}; both are counts.")
        numbers = (self.weight, self.score, *self.rates, *self.means_active)
        if len(self.rates) != 2 or len(self.means_active) != 2 or not all(map(_is_finite, numbers)):
            raise ArtifactError(f"Feature {self.index} of layer {self.layer} has figures that are no numbers.")
        if self.output_score is not None and not _is_finite(self.output_score):
            raise ArtifactError(f"Feature {self.index} of layer {self.layer} has an output score that is no number.")
        for token in (*self.promoted, *self.suppressed):
            _check_text("feature's token", token, 500, empty=True)
        if self.link is not None and not _NEURONPEDIA.fullmatch(self.link):
            raise ArtifactError(f"The link of a feature is {_shown(self.link)}; it must lead to Neuronpedia.")


@dataclass(frozen=True, eq=False)
class FeatureEncoder:
    """How active one SAE feature is on a residual stream x: p = x · `weights` + `bias` where p is above `threshold` and
    above 0, else 0. `weights` is float32 `[d_model]`; `centred` says that x comes without its mean over `d_model`.
    """

    weights: Tensor
    bias: float
    threshold: float = 0.0
    centred: bool = False

    def __post_init__(self) -> None:
        size = tuple(self.weights.shape[:1]) if isinstance(self.weights, Tensor) else (0,)
        _check_tensor("encoder's weights", self.weights, torch.float32, size)
        for key in ("bias", "threshold"):
            value = getattr(self, key)
            if not _is_finite(value) or abs(value) > _MAX_FLOAT32:
                raise ArtifactError(f"An encoder's {key} is {_shown(value)}; it must be a finite number.")
        if not isinstance(self.centred, bool):
            raise ArtifactError(f"An encoder's 'centred' is {_shown(self.centred)}; it must be true or false.")


@dataclass(frozen=True)
class Receipt:
    """A measurement of effect and damage, as plain JSON data."""

    data: Mapping[str, Any]

    def __post_init__(self) -> None:
        _check_json("receipt", dict(self.data))


@dataclass(frozen=True, eq=False, kw_only=True)
class SteeringVector:
    """One direction in the residual stream per layer.

    `directions[L]` is float32 `[d_model]` as the method computed it. Its length weighs it when vectors are added; the
    size of the push is `strength × dose × norms[L]` along its unit direction, shared equally by the layers.
    `norms[L]` is the median norm of the residual stream after block L over the texts' tokens.

    `features` are the SAE features that directions were added up from, where they were.

    A vector that clamps holds an SAE feature at a value: the direction is the feature's decoder row, whose length
    counts, and `encoders[L]` (there for no other operation) tells how active the feature is.
    """

    name: str
    model: ModelReference
    method: str
    directions: Mapping[int, Tensor]
    norms: Mapping[int, float]
    operation: VectorOperation = "add"
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=lambda: Calibration(DEFAULT_DOSE))
    provenance: Provenance = field(default_factory=Provenance)
    receipts: tuple[Receipt, ...] = ()
    features: tuple[Feature, ...] = ()
    encoders: Mapping[int, FeatureEncoder] = field(default_factory=dict)

    kind = "steering-vector"
    site = "resid_post"

    def __post_init__(self) -> None:
        _check_common(self)
        _check_choice("operation of a vector", self.operation, VECTOR_OPERATIONS)
        if not self.directions:
            raise ArtifactError(f"The vector {self.name!r} has no layers; it needs at least one.")
        if set(self.norms) != set(self.directions):
            raise ArtifactError(
                f"The vector {self.name!r} has norms for layers {sorted(self.norms)} and directions for {self.layers}; "
                "they must be the same layers."
            )
        for layer, direction in self.directions.items():
            _check_layer(self, layer)
            _check_tensor(f"direction of layer {layer}", direction, torch.float32, (self.model.d_model,))
            if not direction.any():
                raise ArtifactError(f"The vector {self.name!r} is zero at layer {layer}; it has no direction there.")
            if not _is_finite(self.norms[layer]) or self.norms[layer] <= 0:
                raise ArtifactError(f"The norm of layer {layer} is {_shown(self.norms[layer])}; it must be above 0.")
        _check_encoders(self)

    @property
    def layers(self) -> list[int]:
        return sorted(self.directions)

    def __add__(self, other: "SteeringVector") -> "SteeringVector":
        """The sum of two vectors of one model, over the layers of either; strength 1 is the default dose again."""
        if not isinstance(other, SteeringVector):
            return NotImplemented
        _check_is_push(self, "added")
        _check_is_push(other, "added")
        if not _same_shape(self.model, other.model):
            raise MismatchError(
                f"{self.name!r} ({_shape_text(self.model)}) and {other.name!r} ({_shape_text(other.model)}) "
                "belong to models of different shape; only vectors of one model can be added."
            )
        directions = {layer: tensor.clone() for layer, tensor in self.directions.items()}
        for layer, tensor in other.directions.items():
            directions[layer] = directions[layer] + tensor if layer in directions else tensor.clone()
        return replace(
            self,
            name=_joined_name(self.name, other.name),
            method="sum",
            parameters={"terms": [self.name, other.name]},
            features=(),
            directions=directions,
            norms={**other.norms, **self.norms},
            calibration=Calibration(DEFAULT_DOSE),
            provenance=Provenance(parents=(self.name, other.name), version=self.provenance.version),
            receipts=(),
        )

    def __mul__(self, factor: float) -> "SteeringVector":
        """A vector `factor` times as long: it weighs more in a sum; a negative factor turns it round."""
        if not _is_finite(factor) or factor == 0:
            raise ArtifactError(f"A vector cannot be scaled by {_shown(factor)}; use a finite number other than 0.")
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


@dataclass(frozen=True, eq=False, kw_only=True)
class NeuronCircuit:
    """A sparse set of MLP neurons: `layers`, `neurons` int32 `[n]`; `scores`, `differences` float32 `[n]`.

    `scores` are what the method ranked by; `differences` the class difference of each neuron's activation.
    """

    name: str
    model: ModelReference
    method: str
    neuron_layers: Tensor
    neurons: Tensor
    scores: Tensor
    differences: Tensor
    operation: CircuitOperation = "scale"
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=lambda: Calibration(DEFAULT_MULTIPLIER))
    provenance: Provenance = field(default_factory=Provenance)
    receipts: tuple[Receipt, ...] = ()

    kind = "neuron-circuit"
    site = "mlp_neurons"

    def __post_init__(self) -> None:
        _check_common(self)
        _check_choice("operation of a circuit", self.operation, CIRCUIT_OPERATIONS)
        size = tuple(self.neurons.shape) if isinstance(self.neurons, Tensor) else ()
        if len(size) != 1 or size[0] == 0:
            raise ArtifactError(f"The circuit {self.name!r} has no neurons; it needs at least one.")
        _check_tensor("layers", self.neuron_layers, torch.int32, size)
        _check_tensor("neurons", self.neurons, torch.int32, size)
        _check_tensor("scores", self.scores, torch.float32, size)
        _check_tensor("differences", self.differences, torch.float32, size)
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


Artifact = SteeringVector | NeuronCircuit


def unit(direction: Tensor) -> Tensor:
    """`direction` `[d]` with length 1, also where its square would leave float32's range."""
    scaled = direction / direction.abs().max()
    return scaled / scaled.norm()


def default_calibration(operation: str) -> Calibration:
    """What strength 1 means as long as nothing was measured (dose 0.3, multiplier 2, 6 differences, ablate all, clamp
    to 0)."""
    return Calibration(_DEFAULT_AMOUNTS[operation])


def safe_name(name: str) -> str:
    """`name` made fit for an artifact: other characters become dashes."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:96].rstrip("-._")
    return cleaned or "artifact"


def check_model(artifact: Artifact, model: ModelReference) -> str | None:
    """Refuse a model of another shape with `MismatchError`; return a warning when only the weights differ."""
    if not _same_shape(artifact.model, model):
        raise MismatchError(
            f"{artifact.name!r} was made on {_shown(artifact.model.name)} ({_shape_text(artifact.model)}) and does not "
            f"fit {_shown(model.name)} ({_shape_text(model)}); load the model it was made on, or build it again."
        )
    if artifact.model.fingerprint != model.fingerprint:
        return (
            f"{artifact.name!r} was made on {_shown(artifact.model.name)} with other weights "
            f"(fingerprint {_shown(artifact.model.fingerprint)}, here {_shown(model.fingerprint)}); "
            "its effect may differ."
        )
    return None


def provenance_data(provenance: Provenance) -> dict[str, Any]:
    """`provenance` as JSON-ready data."""
    data = asdict(provenance)
    data["separation"] = {str(layer): value for layer, value in provenance.separation.items()}
    data["parents"] = list(provenance.parents)
    data["candidates"] = [dict(one) for one in provenance.candidates]
    return data


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_common(artifact: Any) -> None:
    if not isinstance(artifact.name, str) or not _NAME.fullmatch(artifact.name):
        raise ArtifactError(
            f"The name {str(artifact.name)[:100]!r} is not allowed; use up to 96 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit."
        )
    if not isinstance(artifact.model, ModelReference):
        raise ArtifactError("An artifact needs the model it was made on (a ModelReference).")
    _check_text("method", artifact.method, 100)
    _check_text("description", artifact.description, 10_000, empty=True)
    _check_json(f"parameters of {artifact.name!r}", dict(artifact.parameters))


def _check_text(what: str, value: object, limit: int, *, empty: bool = False) -> None:
    if not isinstance(value, str) or len(value) > limit or (not value and not empty) or not _encodes(value):
        raise ArtifactError(f"The {what} is {_shown(value)}; it must be a text of at most {limit} characters.")


def _encodes(text: str) -> bool:
    """Whether `text` can be written to a file (lone surrogates cannot)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_json(what: str, data: Any) -> None:
    try:
        json.dumps(data, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ArtifactError(f"The {what} cannot be kept as JSON ({' '.join(str(error).split())[:100]}).") from error


def _check_choice(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ArtifactError(f"The {what} is {_shown(value)}; it must be one of {', '.join(allowed)}.")


def _check_layer(artifact: SteeringVector, layer: object) -> None:
    if not _is_int(layer) or not 0 <= layer < artifact.model.n_layers:  # type: ignore[operator]
        raise ArtifactError(
            f"The vector {artifact.name!r} names layer {_shown(layer)}; {_shown(artifact.model.name)} has layers 0 to "
            f"{artifact.model.n_layers - 1}."
        )


def _check_encoders(vector: SteeringVector) -> None:
    wanted = vector.layers if vector.operation == "clamp" else []
    if not all(map(_is_int, vector.encoders)) or sorted(vector.encoders) != wanted:
        named = [_shown(layer) for layer in list(vector.encoders)[:8]]
        raise ArtifactError(
            f"The vector {vector.name!r} has encoders for layers [{', '.join(named)}]; with operation "
            f"{vector.operation} they must be those of layers {wanted}."
        )
    for layer, encoder in vector.encoders.items():
        if not isinstance(encoder, FeatureEncoder):
            raise ArtifactError(f"The encoder of layer {layer} is {_shown(encoder)}; it must be a FeatureEncoder.")
        _check_tensor(f"encoder of layer {layer}", encoder.weights, torch.float32, (vector.model.d_model,))


def _check_is_push(vector: SteeringVector, done: str) -> None:
    """A clamp depends on where the stream is, and on its decoder row's length: no arithmetic of directions fits it."""
    if vector.operation == "clamp":
        raise ArtifactError(
            f"{vector.name!r} clamps a feature, so it cannot be {done}; put it into a recipe beside others instead."
        )


def _check_tensor(what: str, value: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.dtype != dtype or tuple(value.shape) != shape:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ArtifactError(f"The {what} is {found}; it must be {dtype} {list(shape)}.")
    if value.is_floating_point() and not value.isfinite().all():
        raise ArtifactError(f"The {what} holds values that are not finite (NaN or infinity).")


def _check_range(what: str, values: Tensor, limit: int) -> None:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= limit:
        raise ArtifactError(f"The circuit names {what} {low if low < 0 else high}; the model has 0 to {limit - 1}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:  # a whole number beyond what a float holds
        return False


def _shown(value: object) -> str:
    """A value for a message: on one line and not too long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _same_shape(one: ModelReference, other: ModelReference) -> bool:
    return (one.n_layers, one.d_model, one.d_mlp) == (other.n_layers, other.d_model, other.d_mlp)


def _shape_text(model: ModelReference) -> str:
    return f"{model.n_layers} layers, d_model {model.d_model}, d_mlp {model.d_mlp}"


def _joined_name(one: str, other: str) -> str:
    return safe_name(f"{one}+{other}")
