"""Names, and what vectors and circuits have in common."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neurosteer.artifacts.provenance import Provenance, Receipt
from neurosteer.errors import ArtifactError
from neurosteer.models.reference import ModelReference
from neurosteer.validation import check_json, check_text

_MOST_RECEIPTS = 100
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


def safe_name(name: str) -> str:
    """`name` made fit for an artifact: other characters become dashes."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:96].rstrip("-._")
    return cleaned or "artifact"


@dataclass(frozen=True, eq=False, kw_only=True)
class Made:
    """Something that was made on a model: its name, where it comes from, and what was measured of it."""

    name: str
    model: ModelReference
    method: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    provenance: Provenance = field(default_factory=Provenance)
    receipts: tuple[Receipt, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise ArtifactError(
                f"The name {str(self.name)[:100]!r} is not allowed; use up to 96 letters, digits, '.', '_' and '-', "
                "beginning with a letter or digit."
            )
        if not isinstance(self.model, ModelReference):
            raise ArtifactError("An artifact needs the model it was made on (a ModelReference).")
        check_text("method", self.method, 100)
        check_text("description", self.description, 10_000, empty=True)
        check_json(f"parameters of {self.name!r}", dict(self.parameters))
        if len(self.receipts) > _MOST_RECEIPTS:
            raise ArtifactError(
                f"{self.name!r} has {len(self.receipts):,} receipts; at most {_MOST_RECEIPTS} are kept."
            )


def check_tensor(what: str, value: object, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if not isinstance(value, Tensor) or value.dtype != dtype or tuple(value.shape) != shape:
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ArtifactError(f"The {what} is {found}; it must be {dtype} {list(shape)}.")
    if value.is_floating_point() and not value.isfinite().all():
        raise ArtifactError(f"The {what} holds values that are not finite (NaN or infinity).")
