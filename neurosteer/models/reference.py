"""The model that an artifact was made on, as the artifact records it."""

from typing import Annotated

from pydantic import Field

from neurosteer.models.records import record

_Name = Annotated[str, Field(strict=True, min_length=1, max_length=300)]
_Layers = Annotated[int, Field(strict=True, ge=1, le=4096)]
_Dimension = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]


@record("model")
class ModelReference:
    """The model an artifact was made on. A different shape is refused, a different fingerprint warned about."""

    name: _Name
    revision: _Name | None
    n_layers: _Layers
    d_model: _Dimension
    d_mlp: _Dimension
    fingerprint: Annotated[str, Field(strict=True, min_length=1, max_length=100)]


def same_shape(one: ModelReference, other: ModelReference) -> bool:
    return (one.n_layers, one.d_model, one.d_mlp) == (other.n_layers, other.d_model, other.d_mlp)


def shape_text(model: ModelReference) -> str:
    return f"{model.n_layers} layers, d_model {model.d_model}, d_mlp {model.d_mlp}"
