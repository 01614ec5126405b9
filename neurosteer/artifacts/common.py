"""Names, and the checks that vectors and circuits share."""

import re
from typing import Any

import torch
from torch import Tensor

from neurosteer.errors import ArtifactError
from neurosteer.models.reference import ModelReference
from neurosteer.validation import check_json, check_text

_MOST_RECEIPTS = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def safe_name(name: str) -> str:
    """`name` made fit for an artifact: other characters become dashes."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:96].rstrip("-._")
    return cleaned or "artifact"


# --- checks ----------------------------------------------------------------------------------------------------------


def check_common(artifact: Any) -> None:
    if not isinstance(artifact.name, str) or not _NAME.fullmatch(artifact.name):
        raise ArtifactError(
            f"The name {str(artifact.name)[:100]!r} is not allowed; use up to 96 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit."
        )
    if not isinstance(artifact.model, ModelReference):
        raise ArtifactError("An artifact needs the model it was made on (a ModelReference).")
    check_text("method", artifact.method, 100)
    check_text("description", artifact.description, 10_000, empty=True)
    check_json(f"parameters of {artifact.name!r}", dict(artifact.parameters))
    if len(artifact.receipts) > _MOST_RECEIPTS:
        raise ArtifactError(
            f"{artifact.name!r} has {len(artifact.receipts):,} receipts; at most {_MOST_RECEIPTS} are kept."
        )


def check_tensor(what: str, value: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.dtype != dtype or tuple(value.shape) != shape:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ArtifactError(f"The {what} is {found}; it must be {dtype} {list(shape)}.")
    if value.is_floating_point() and not value.isfinite().all():
        raise ArtifactError(f"The {what} holds values that are not finite (NaN or infinity).")
