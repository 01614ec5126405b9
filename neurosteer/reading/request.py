"""What to read of texts: which layers and sites, under which framing, pooled how."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

from neurosteer.errors import UsageError
from neurosteer.models.framing import Framing
from neurosteer.validation import check_option

Tokens = Literal["mean", "last"]
TOKENS: tuple[Tokens, ...] = ("mean", "last")
MAX_TOKENS = 512

STRONGEST_TEXTS = 3
"""In how many texts the places where a feature fires strongest are kept."""


class Encoder(Protocol):
    """Features of the residual stream: what a sparse autoencoder is to the reading loop."""

    @property
    def n_features(self) -> int: ...

    def encode(self, residual: Tensor) -> Tensor:
        """`[..., d_model]` to float32 `[..., n_features]`, 0 where a feature does not fire."""
        ...

    def chunk_rows(self) -> int:
        """How many tokens may be encoded at once."""
        ...


@dataclass(frozen=True)
class Request:
    """What to read. Layers are block numbers; `rows` are layers of the residual stream at which every text is kept.

    `encoders` are SAEs by the layer whose residual stream they read; `feature_rows` keeps every text's mean features.
    `prepend_bos` puts a BOS before raw texts where the tokenizer does not.
    """

    residual: tuple[int, ...] = ()
    neurons: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    framing: Framing = "raw"
    tokens: Tokens = "mean"
    max_tokens: int = MAX_TOKENS
    batch_tokens: int | None = None
    encoders: Mapping[int, Encoder] = field(default_factory=dict)
    feature_rows: bool = False
    prepend_bos: bool = False

    def __post_init__(self) -> None:
        check_option("tokens", self.tokens, TOKENS)
        if not self.residual and not self.neurons:
            raise UsageError("Nothing to read: name at least one layer.")
        if not {*self.rows, *self.encoders} <= set(self.residual):
            raise UsageError("Rows and features can only be had at layers of the residual stream that are read.")
