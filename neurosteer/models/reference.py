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
    d_mlp: Annotated[int, Field(strict=True, ge=0, le=1 << 20)]  # 0 where a model has no MLPs of one width
    fingerprint: Annotated[str, Field(strict=True, min_length=1, max_length=100)]
    quantization: Annotated[str, Field(strict=True, min_length=1, max_length=100)] | None = None  # in words


def same_shape(one: ModelReference, other: ModelReference, *, neurons: bool) -> bool:
    """Whether an artifact made on one fits the other; only one that is made of `neurons` cares how many there are."""
    alike = (one.n_layers, one.d_model) == (other.n_layers, other.d_model)
    return alike and (not neurons or one.d_mlp == other.d_mlp)


def shape_text(model: ModelReference) -> str:
    width = f", d_mlp {model.d_mlp}" if model.d_mlp else ""
    return f"{model.n_layers} layers, d_model {model.d_model}{width}"
