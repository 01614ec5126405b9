"""Sparse autoencoders: released (through sae-lens), from a folder, or shipped with NeuroSteer.

An SAE reads the residual stream at one site and writes it as a sum of few features, each with a direction of its own
(its decoder row). Those trained on a model with centred writing weights (TransformerLens's loading option of that name)
expect the residual stream without its mean over `d_model`; what goes into `encode` is always the model's own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neurosteer.artifacts.features import FeatureEncoder
from neurosteer.errors import UsageError
from neurosteer.validation import is_int

MAX_ENCODED_VALUES = 1 << 26
"""How many feature activations one chunk of tokens may make (256 MB in float32)."""


@dataclass(frozen=True, eq=False)
class EncoderColumns:
    """The encoder of an SAE whose features do not look at one another: on an input x, feature f is
    p = x · `weights[:, f]` + `biases[f]` where p is above `thresholds[f]` and above 0, else 0.

    `weights` `[d_model, n_features]`, the others `[n_features]`.
    """

    weights: Tensor
    biases: Tensor
    thresholds: Tensor


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """One SAE. `layer` is the block whose output it reads; `decoder` float32 `[n_features, d_model]`.

    `prepend_bos` says that it was trained on sequences that begin with BOS; `centred`, that its input has no mean over
    `d_model`; `neuronpedia` is its id there, where it has one. `kind` is its architecture in sae-lens's words;
    `columns` its encoder, where each feature can be computed alone.
    """

    name: str
    layer: int
    model_name: str
    decoder: Tensor
    encode_rows: Callable[[Tensor], Tensor]
    decode_rows: Callable[[Tensor], Tensor]
    centred: bool = False
    prepend_bos: bool = False
    neuronpedia: str | None = None
    kind: str = "unknown"
    columns: EncoderColumns | None = None

    @property
    def n_features(self) -> int:
        return self.decoder.shape[0]

    @property
    def d_model(self) -> int:
        return self.decoder.shape[1]

    def encode(self, residual: Tensor) -> Tensor:
        """Feature activations, float32 `[..., n_features]`, of the model's own residual stream `[..., d_model]`.

        A stream in bfloat16 may be multiplied in bfloat16, which it is exact to anyway.
        """
        rows = residual.reshape(-1, residual.shape[-1])
        if self.centred:
            rows = (rows.float() - rows.float().mean(-1, keepdim=True)).to(rows.dtype)
        return self.encode_rows(rows).reshape(*residual.shape[:-1], self.n_features)

    def decode(self, features: Tensor) -> Tensor:
        """What the SAE makes of feature activations, float32 `[..., d_model]`; centred where its input is."""
        rows = features.reshape(-1, self.n_features)
        return self.decode_rows(rows).reshape(*features.shape[:-1], self.d_model)

    def check_index(self, index: int) -> None:
        """Raises `UsageError` unless the SAE has a feature of this number."""
        if not is_int(index) or not 0 <= index < self.n_features:
            raise UsageError(f"There is no feature {index!r:.40} in {self.name}; it has 0 to {self.n_features - 1}.")

    def feature_encoder(self, index: int) -> FeatureEncoder:
        """What tells how active one feature is.

        Its weights stand for the SAE's own input, which is without its mean over `d_model` where the SAE is `centred`.
        Raises `UsageError` where there is no such feature, or a feature cannot be computed without the others.
        """
        self.check_index(index)
        if self.columns is None:
            raise UsageError(
                f"A feature of {self.name} ({self.kind}) cannot be clamped: how active it is depends on more than its "
                "own encoder column; add it instead (operation 'add', or SAE#INDEX without a value)."
            )
        weights = self.columns.weights[:, index].to("cpu", torch.float32, copy=True).contiguous()
        biases, thresholds = self.columns.biases, self.columns.thresholds
        return FeatureEncoder(weights, float(biases[index]), float(thresholds[index]), self.centred)

    def chunk_rows(self) -> int:
        """How many tokens may be encoded at once for memory to stay bounded."""
        return max(1, MAX_ENCODED_VALUES // self.n_features)

    def feature_link(self, index: int) -> str | None:
        """The feature's page on Neuronpedia, where the SAE has one."""
        return f"https://neuronpedia.org/{self.neuronpedia}/{index}" if self.neuronpedia else None
