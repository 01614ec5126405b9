"""The model that an artifact was made on, as the artifact records it."""

from dataclasses import dataclass

from neurosteer.errors import ArtifactError
from neurosteer.text import shown
from neurosteer.validation import check_text, is_int

_MAX_DIMENSION = 1 << 20
_MAX_LAYERS = 4096


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
        check_text("model name", self.name, 300)
        check_text("model fingerprint", self.fingerprint, 100)
        if self.revision is not None:
            check_text("model revision", self.revision, 300)
        for key, limit in (("n_layers", _MAX_LAYERS), ("d_model", _MAX_DIMENSION), ("d_mlp", _MAX_DIMENSION)):
            value = getattr(self, key)
            if not is_int(value) or not 1 <= value <= limit:
                raise ArtifactError(
                    f"The model's {key} is {shown(value)}; it must be a whole number from 1 to {limit}."
                )


def same_shape(one: ModelReference, other: ModelReference) -> bool:
    return (one.n_layers, one.d_model, one.d_mlp) == (other.n_layers, other.d_model, other.d_mlp)


def shape_text(model: ModelReference) -> str:
    return f"{model.n_layers} layers, d_model {model.d_model}, d_mlp {model.d_mlp}"
