"""Where an artifact comes from, and what was measured of it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from neurosteer.errors import ArtifactError
from neurosteer.text import shown
from neurosteer.validation import check_json, check_text, is_finite, is_int

_MOST = {"candidates": 200, "separation": 1000, "dropped": 1000, "parents": 1000}
"""How many entries each may have: whoever wrote them, cards and plots are drawn from them."""


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
            check_text(f"provenance {key}", getattr(self, key), 1000, empty=True)
        for key in ("n_positive", "n_negative", "n_cut"):
            if not is_int(getattr(self, key)) or getattr(self, key) < 0:
                raise ArtifactError(f"The provenance's {key} is {shown(getattr(self, key))}; it must be a count.")
        if not is_finite(self.hold_out) or not 0 <= self.hold_out < 1:
            raise ArtifactError(f"The provenance's hold_out is {shown(self.hold_out)}; it must be a share below 1.")
        for key, most in _MOST.items():
            if len(getattr(self, key)) > most:
                raise ArtifactError(f"The provenance has {len(getattr(self, key)):,} {key}; at most {most:,} are kept.")
        check_json("provenance's counts and parents", [dict(self.dropped), list(self.parents)])
        check_json("provenance's candidates", [dict(one) for one in self.candidates])
        for layer, value in self.separation.items():
            if not is_int(layer) or not is_finite(value):
                raise ArtifactError(
                    f"The provenance's separation of layer {shown(layer)} is {shown(value)}; it must be a number."
                )


@dataclass(frozen=True)
class Receipt:
    """A measurement of effect and damage, as plain JSON data."""

    data: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_json("receipt", dict(self.data))


def provenance_data(provenance: Provenance) -> dict[str, Any]:
    """`provenance` as JSON-ready data."""
    data = asdict(provenance)
    data["separation"] = {str(layer): value for layer, value in provenance.separation.items()}
    data["parents"] = list(provenance.parents)
    data["candidates"] = [dict(one) for one in provenance.candidates]
    return data
