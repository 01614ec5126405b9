"""SAE features as artifacts keep them: in words and figures, and with what tells how active they are."""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from neurosteer.artifacts.common import check_tensor
from neurosteer.errors import ArtifactError
from neurosteer.models.records import Count, Finite, record
from neurosteer.text import shown
from neurosteer.validation import is_finite

_Around = Annotated[str, Field(strict=True, max_length=2000)]
_Token = Annotated[str, Field(strict=True, max_length=500)]
_Link = Annotated[
    str, Field(strict=True, max_length=350, pattern=r"^https://(www\.)?neuronpedia\.org/[A-Za-z0-9_./-]+$")
]
_MAX_FLOAT32 = torch.finfo(torch.float32).max


@record("feature context")
class FeatureContext:
    """A place where a feature fires: the token with what stands before and after it, and the activation there."""

    before: _Around
    token: _Around
    after: _Around
    activation: Finite


@record("feature")
class Feature:
    """One SAE feature that a vector is made of.

    `rates` are the shares of the positive and the negative texts' tokens at which it fires, `means_active` its mean
    activation where it does; `score` is what the method ranked by, `weight` what its decoder row counts. `promoted` and
    `suppressed` are the tokens its decoder row raises and lowers most through the unembedding.
    """

    layer: Count
    index: Count
    weight: Finite
    score: Finite
    rates: tuple[Finite, Finite]
    means_active: tuple[Finite, Finite]
    output_score: Finite | None = None
    promoted: tuple[_Token, ...] = ()
    suppressed: tuple[_Token, ...] = ()
    contexts: tuple[FeatureContext, ...] = ()
    link: _Link | None = None


@dataclass(frozen=True, eq=False)
class FeatureEncoder:
    """How active one SAE feature is on a residual stream x: p = x · `weights` + `bias` where p is above `threshold` and
    above 0, else 0. `weights` is float32 `[d_model]`; `centred` says that x comes without its mean over `d_model`.
    """

    weights: Tensor
    bias: float
    threshold: float = 0.0
    centred: bool = False

    def __post_init__(self) -> None:
        size = tuple(self.weights.shape[:1]) if isinstance(self.weights, Tensor) else (0,)
        check_tensor("encoder's weights", self.weights, torch.float32, size)
        for key in ("bias", "threshold"):
            value = getattr(self, key)
            if not is_finite(value) or abs(value) > _MAX_FLOAT32:
                raise ArtifactError(f"An encoder's {key} is {shown(value)}; it must be a finite number.")
        if not isinstance(self.centred, bool):
            raise ArtifactError(f"An encoder's 'centred' is {shown(self.centred)}; it must be true or false.")
