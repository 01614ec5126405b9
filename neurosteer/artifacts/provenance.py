"""Where an artifact comes from, and what was measured of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import Field

from neurosteer.models.records import Count, Finite, Line, record
from neurosteer.validation import check_json
from neurosteer.version import VERSION

_FEW, _MANY = Field(max_length=200), Field(max_length=1000)
"""How many entries there may be: whoever wrote them, cards and plots are drawn from them."""


@record("provenance")
class Provenance:
    """Where an artifact comes from: the data, how it was read, and why these layers.

    `candidates` are the choices of layers that were compared at equal KL, a mapping of figures each; `hold_out` is the
    share of each class that took no part in building (`ContrastSet.parts` with `HOLD_OUT_SEED` tells which);
    `n_prompts` says how many different prompts the texts were read as answers to (0: to none of their own). `warnings`
    are sentences about what made the method weak on these examples; `template_options` are what the model's chat
    template was given.
    """

    created: Line = ""
    version: Line = ""
    examples: Line = ""
    examples_sha256: Line = ""
    n_positive: Count = 0
    n_negative: Count = 0
    n_cut: Count = 0
    dropped: Annotated[Mapping[Line, Count], _MANY] = field(default_factory=dict)
    framing: Line = ""
    tokens: Line = ""
    layer_choice: Line = ""
    separation: Annotated[Mapping[Count, Finite], _MANY] = field(default_factory=dict)
    candidates: Annotated[tuple[Mapping[str, Any], ...], _FEW] = ()
    hold_out: Annotated[Finite, Field(ge=0, lt=1)] = 0.0
    parents: Annotated[tuple[Line, ...], _MANY] = ()
    warnings: Annotated[tuple[Line, ...], _FEW] = ()
    n_prompts: Count = 0
    template_options: Annotated[Mapping[str, Any], _FEW] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_json("provenance's template options", dict(self.template_options))
        check_json("provenance's candidates", [dict(one) for one in self.candidates])


def made_now(**known: Any) -> Provenance:
    """The provenance of what is made by this version at this moment."""
    return Provenance(created=datetime.now(UTC).isoformat(timespec="seconds"), version=VERSION, **known)


@dataclass(frozen=True)
class Receipt:
    """A measurement of effect and damage, as plain JSON data."""

    data: Mapping[str, Any]

    def __post_init__(self) -> None:
        check_json("receipt", dict(self.data))
