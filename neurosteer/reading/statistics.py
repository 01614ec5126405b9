"""What reading gives: class means, moments, rows and feature statistics per layer."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neurosteer.models.reference import ModelReference


@dataclass(frozen=True)
class ClassMeans:
    """Mean activation of each class, float32 `[d]`."""

    positive: Tensor
    negative: Tensor

    @property
    def difference(self) -> Tensor:
        return self.positive - self.negative


@dataclass(frozen=True)
class ClassMoments(ClassMeans):
    """Means and variances (over texts) of each class, float32 `[d]`."""

    positive_variance: Tensor
    negative_variance: Tensor


@dataclass(frozen=True)
class ClassRows:
    """One row per text of each class in the order given, float32 `[n, d]`."""

    positive: Tensor
    negative: Tensor


@dataclass(frozen=True)
class SparseRows:
    """Mean features of every text in the order given: a CSR matrix `[n_texts, n_features]`."""

    starts: Tensor
    features: Tensor
    values: Tensor


@dataclass(frozen=True)
class FeatureStatistics:
    """How an SAE's features fire in the tokens read of each class (row 0 positive, row 1 negative).

    `fired` counts tokens, `sums` and `squares` add up activations and their squares, float64 `[2, n_features]`.
    `strongest` float32 `[n_features, STRONGEST_TEXTS]` are each feature's strongest activations, one per text at most,
    `text_of` and `token_of` (from the text's first token) int64 of the same shape say where; 0 where there is none.
    """

    n_tokens: tuple[int, int]
    fired: Tensor
    sums: Tensor
    squares: Tensor
    strongest: Tensor
    text_of: Tensor
    token_of: Tensor
    rows: SparseRows | None = None

    @property
    def rates(self) -> Tensor:
        """Share of each class's tokens at which a feature fires, float64 `[2, n_features]`."""
        return self.fired / self._counts

    @property
    def means(self) -> Tensor:
        """Mean activation over each class's tokens."""
        return self.sums / self._counts

    @property
    def means_active(self) -> Tensor:
        """Mean activation over the tokens at which a feature fires; 0 where it never does."""
        return self.sums / self.fired.clamp(min=1)

    @property
    def variances(self) -> Tensor:
        """Variance of the activation over each class's tokens."""
        return (self.squares / self._counts - self.means.square()).clamp(min=0)

    @property
    def _counts(self) -> Tensor:
        return torch.tensor(self.n_tokens, dtype=torch.float64).clamp(min=1)[:, None]


@dataclass(frozen=True)
class HeldOut:
    """The class difference of the other texts, `[d]`, and the rows of the held-out ones."""

    difference: Tensor
    rows: ClassRows


@dataclass(frozen=True)
class Activations:
    """What a method sees, by layer. `norms` are median norms of the residual stream over tokens; `n_short` texts were
    too short to be read and are in nothing else."""

    model: ModelReference
    residual: Mapping[int, ClassMeans]
    neurons: Mapping[int, ClassMoments]
    rows: Mapping[int, ClassRows]
    held_out: Mapping[int, HeldOut]
    norms: Mapping[int, float]
    n_texts: int
    n_tokens: int
    n_cut: int
    paired: bool = False
    n_positive: int = 0
    n_short: int = 0
    features: Mapping[int, FeatureStatistics] = field(default_factory=dict)
