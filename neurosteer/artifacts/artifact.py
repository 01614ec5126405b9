"""What vectors and circuits have in common, and whether one fits a model."""

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import MismatchError
from neurosteer.models.reference import ModelReference, same_shape, shape_text
from neurosteer.text import shown

Artifact = SteeringVector | NeuronCircuit


def check_model(artifact: Artifact, model: ModelReference) -> str | None:
    """Refuse a model of another shape with `MismatchError`; return a warning when only the weights differ."""
    if not same_shape(artifact.model, model, neurons=isinstance(artifact, NeuronCircuit)):
        raise MismatchError(
            f"{artifact.name!r} was made on {shown(artifact.model.name)} ({shape_text(artifact.model)}) and does not "
            f"fit {shown(model.name)} ({shape_text(model)}); load the model it was made on, or build it again."
        )
    if artifact.model.quantization != model.quantization:
        theirs, here = (one.quantization or "not quantised" for one in (artifact.model, model))
        return (
            f"{artifact.name!r} was made on weights that are {shown(theirs)[1:-1]}, and here they are "
            f"{shown(here)[1:-1]}: it steers them much alike, but calibrate it here for figures that hold."
        )
    if artifact.model.fingerprint != model.fingerprint:
        return (
            f"{artifact.name!r} was made on {shown(artifact.model.name)} with other weights "
            f"(fingerprint {shown(artifact.model.fingerprint)}, here {shown(model.fingerprint)}); "
            "its effect may differ."
        )
    return None
