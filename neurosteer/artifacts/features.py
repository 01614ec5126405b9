"""SAE features as artifacts keep them: in words and figures, and with what tells how active they are."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from neurosteer.artifacts.common import check_tensor
from neurosteer.errors import ArtifactError
from neurosteer.text import shown
from neurosteer.validation import check_text, is_finite, is_int

_NEURONPEDIA = re.compile(r"https://(?:www\.)?neuronpedia\.org/[\w./-]{1,300}")
_MAX_FLOAT32 = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class FeatureContext:
    """A place where a feature fires: the token with what stands before and after it, and the activation there."""

    before: str
    token: str
    after: str
    activation: float

    def __post_init__(self) -> None:
        for key in ("before", "token", "after"):
            check_text(f"feature context's {key}", getattr(self, key), 2000, empty=True)
        if not is_finite(self.activation):
            raise ArtifactError(f"A feature context's activation is {shown(self.activation)}; it must be a number.")


@dataclass(frozen=True)
class Feature:
    """One SAE feature that a vector is made of.

    `rates` are the shares of the positive and the negative texts' tokens at which it fires, `means_active` its mean
    activation where it does; `score` is what the method ranked by, `weight` what its decoder row counts. `promoted` and
    `suppressed` are the tokens its decoder row raises and lowers most through the unembedding.
    """

    layer: int
    index: int
    weight: float
    score: float
    rates: tuple[float, float]
    means_active: tuple[float, float]
    output_score: float | None = None
    promoted: tuple[str, ...] = ()
    suppressed: tuple[str, ...] = ()
    contexts: tuple[FeatureContext, ...] = ()
    link: str | None = None

    def __post_init__(self) -> None:
        if not is_int(self.layer) or not is_int(self.index) or self.layer < 0 or self.index < 0:
            raise ArtifactError(f"A feature is {shown(self.index)} of layer {shown(self.layer)}; both are counts.")
        numbers = (self.weight, self.score, *self.rates, *self.means_active)
        if len(self.rates) != 2 or len(self.means_active) != 2 or not all(map(is_finite, numbers)):
            raise ArtifactError(f"Feature {self.index} of layer {self.layer} has figures that are no numbers.")
        if self.output_score is not None and not is_finite(self.output_score):
            raise ArtifactError(f"Feature {self.index} of layer {self.layer} has an output score that is no number.")
        for token in (*self.promoted, *self.suppressed):
            check_text("feature's token", token, 500, empty=True)
        if self.link is not None and not _NEURONPEDIA.fullmatch(self.link):
            raise ArtifactError(f"The link of a feature is {shown(self.link)}; it must lead to Neuronpedia.")


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
