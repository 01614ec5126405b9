"""What an artifact's files say: its `config.json` as data, its tensors by name, and an artifact made of both."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.features import Feature, FeatureEncoder
from neurosteer.artifacts.provenance import Provenance, Receipt
from neurosteer.artifacts.strength import Calibration
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import ArtifactError
from neurosteer.models.reference import ModelReference
from neurosteer.text import error_line

SCHEMA_VERSION = 1

_CIRCUIT_TENSORS = ("layers", "neurons", "scores", "differences")
_DIRECTION, _ENCODER = "layer.", "encoder."


def artifact_data(artifact: Artifact) -> dict[str, Any]:
    """What `config.json` holds: everything about an artifact but its tensors."""
    source = artifact.provenance
    config: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": artifact.kind,
        "name": artifact.name,
        "description": artifact.description,
        "model": _model(artifact.model),
        "method": artifact.method,
        "parameters": dict(artifact.parameters),
        "site": artifact.site,
        "operation": artifact.operation,
        "layers": artifact.layers,
        "calibration": asdict(artifact.calibration),
        "provenance": {**asdict(source), "separation": {str(layer): one for layer, one in source.separation.items()}},
        "receipts": [dict(receipt.data) for receipt in artifact.receipts],
    }
    if isinstance(artifact, SteeringVector):
        config["norms"] = {str(layer): artifact.norms[layer] for layer in artifact.layers}
        if artifact.features:
            config["features"] = [asdict(feature) for feature in artifact.features]
        if artifact.encoders:
            config["encoders"] = {
                str(layer): {"bias": found.bias, "threshold": found.threshold, "centred": found.centred}
                for layer, found in sorted(artifact.encoders.items())
            }
    else:
        config["n_neurons"] = artifact.size
    return config


def tensors_of(artifact: Artifact) -> dict[str, Tensor]:
    """The tensors of `artifact` by their names in its file."""
    if isinstance(artifact, SteeringVector):
        directions = {f"{_DIRECTION}{layer}": artifact.directions[layer] for layer in artifact.layers}
        encoders = {f"{_ENCODER}{layer}": encoder.weights for layer, encoder in artifact.encoders.items()}
        return {name: tensor.contiguous().clone() for name, tensor in (directions | encoders).items()}
    values = (artifact.neuron_layers, artifact.neurons, artifact.scores, artifact.differences)
    return {name: value.contiguous().clone() for name, value in zip(_CIRCUIT_TENSORS, values, strict=True)}


def expected_shapes(config: Mapping[str, Any], path: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
    """The type and the shape of each tensor that belongs to `config`, which lies at `path`."""
    layers, model = config.get("layers"), config.get("model")
    d_model = model.get("d_model") if isinstance(model, dict) else None
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers) or type(d_model) is not int:
        raise ArtifactError(f"{path} names no layers or no model; fetch the artifact again.")
    if config["kind"] == SteeringVector.kind:
        kinds = (_DIRECTION, _ENCODER) if config.get("operation") == "clamp" else (_DIRECTION,)
        return {f"{kind}{layer}": (torch.float32, [d_model]) for kind in kinds for layer in layers}
    count = config.get("n_neurons")
    if type(count) is not int:
        raise ArtifactError(f"{path} has n_neurons {count!r:.40}; it must be a count.")
    kinds = (torch.int32, torch.int32, torch.float32, torch.float32)
    return {name: (kind, [count]) for name, kind in zip(_CIRCUIT_TENSORS, kinds, strict=True)}


def artifact_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> Artifact:
    """The artifact of a config and its tensors. Raises `ArtifactError` that names `path` and what is wrong there."""
    try:
        common = {
            "name": config["name"],
            "description": config.get("description", ""),
            "model": ModelReference(**config["model"]),
            "method": config["method"],
            "parameters": dict(config.get("parameters", {})),
            "operation": config["operation"],
            "calibration": Calibration(**config["calibration"]),
            "provenance": _provenance(config.get("provenance", {})),
            "receipts": tuple(Receipt(dict(data)) for data in config.get("receipts", [])),
        }
        if config["kind"] == SteeringVector.kind:
            return SteeringVector(
                **common,
                directions={
                    int(name.removeprefix(_DIRECTION)): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(_DIRECTION)
                },
                norms={int(layer): value for layer, value in config["norms"].items()},
                features=tuple(Feature(**one) for one in config.get("features", [])),
                encoders=_encoders(config, tensors) if config["operation"] == "clamp" else {},
            )
        values = (tensors[name] for name in _CIRCUIT_TENSORS)
        names = ("neuron_layers", "neurons", "scores", "differences")
        return NeuronCircuit(**common, **dict(zip(names, values, strict=True)))
    except ArtifactError as error:
        raise ArtifactError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else error_line(error)
        raise ArtifactError(f"{path} is not a valid artifact ({what}); fetch it again.") from error


def _encoders(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[int, FeatureEncoder]:
    return {
        int(layer): FeatureEncoder(
            weights=tensors[f"{_ENCODER}{int(layer)}"],
            bias=data["bias"],
            threshold=data["threshold"],
            centred=data["centred"],
        )
        for layer, data in config["encoders"].items()
    }


def _provenance(data: Mapping[str, Any]) -> Provenance:
    """JSON has no numbers for keys."""
    return Provenance(**{**data, "separation": {int(key): value for key, value in data.get("separation", {}).items()}})


def _model(model: ModelReference) -> dict[str, Any]:
    """Plain weights are not said to be so: that is how it always was."""
    kept = asdict(model)
    if model.quantization is None:
        del kept["quantization"]
    return kept
