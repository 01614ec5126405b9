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
        for key, least, most in (
            ("n_layers", 1, _MAX_LAYERS),
            ("d_model", 1, _MAX_DIMENSION),
            ("d_mlp", 0, _MAX_DIMENSION),  # 0 where a model has no MLPs of one width
        ):
            value = getattr(self, key)
            if not is_int(value) or not least <= value <= most:
                raise ArtifactError(
                    f"The model's {key} is {shown(value)}; it must be a whole number from {least} to {most}."
                )


def same_shape(one: ModelReference, other: ModelReference, *, neurons: bool) -> bool:
    """Whether an artifact made on one fits the other; only one that is made of `neurons` cares how many there are."""
    alike = (one.n_layers, one.d_model) == (other.n_layers, other.d_model)
    return alike and (not neurons or one.d_mlp == other.d_mlp)


def shape_text(model: ModelReference) -> str:
    width = f", d_mlp {model.d_mlp}" if model.d_mlp else ""
    return f"{model.n_layers} layers, d_model {model.d_model}{width}"
