"""Random sparse autoencoders for tests, spelled out feature by feature, and written in sae-lens's format."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tiny import D_MODEL
from torch import Tensor

N_FEATURES = 48


@dataclass(frozen=True, eq=False)
class PlainSae:
    """A ReLU SAE, or a JumpReLU one where it has thresholds: `w_enc` `[d, n]`, `w_dec` `[n, d]`, biases."""

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    subtracts: bool = True  # whether b_dec is taken off the input

    def encode(self, vector: Tensor) -> np.ndarray:
        """The features of one vector `[d]`, one after the other, float64 `[n]`."""
        x = vector.double().numpy()
        if self.subtracts:
            x = x - self.b_dec.double().numpy()
        columns, found = self.w_enc.double().numpy().T, np.zeros(self.w_enc.shape[1])
        for feature, column in enumerate(columns):
            before = float((x * column).sum() + float(self.b_enc[feature]))
            least = 0.0 if self.threshold is None else max(0.0, float(self.threshold[feature]))
            found[feature] = before if before > least else 0.0
        return found

    def decode(self, features: np.ndarray) -> np.ndarray:
        made = self.b_dec.double().numpy().copy()
        for value, row in zip(features, self.w_dec.double().numpy(), strict=True):
            made += value * row
        return made

    def tensors(self) -> dict[str, Tensor]:
        named = {"W_enc": self.w_enc, "b_enc": self.b_enc, "W_dec": self.w_dec, "b_dec": self.b_dec}
        return named if self.threshold is None else {**named, "threshold": self.threshold}

    def write(
        self,
        folder: Path,
        hook_name: str = "blocks.2.hook_resid_post",
        *,
        model_name: str | None = None,
        dtype: torch.dtype = torch.float32,
        metadata: Mapping[str, Any] | None = None,
        **config: Any,
    ) -> Path:
        """As sae-lens 6 writes it."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in self.tensors().items()},
                  folder / "sae_weights.safetensors")  # fmt: skip
        written = {
            "d_in": self.w_enc.shape[0],
            "d_sae": self.w_enc.shape[1],
            "dtype": str(dtype).removeprefix("torch."),
            "device": "cpu",
            "apply_b_dec_to_input": self.subtracts,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {
                "sae_lens_version": "6.54.12",
                "model_name": model_name,
                "hook_name": hook_name,
                **(metadata or {}),
            },
            "architecture": "standard" if self.threshold is None else "jumprelu",
            **config,
        }
        (folder / "cfg.json").write_text(json.dumps(written), encoding="utf-8")
        return folder


def random_sae(
    seed: int,
    *,
    d_model: int = D_MODEL,
    n_features: int = N_FEATURES,
    scale: float = 1.0,
    jumps: bool = False,
    subtracts: bool = True,
) -> PlainSae:
    """For inputs whose norm is about `scale`, each feature fires on a fifth of them or so."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    spread = scale / d_model**0.5  # of a unit encoder column's product with the input
    return PlainSae(
        w_enc=torch.nn.functional.normalize(normal(d_model, n_features), dim=0),
        b_enc=(-0.6 + 0.3 * normal(n_features)) * spread,
        w_dec=torch.nn.functional.normalize(normal(n_features, d_model), dim=1),
        b_dec=0.3 * spread * normal(d_model),
        threshold=normal(n_features).abs() * 0.5 * spread if jumps else None,
        subtracts=subtracts,
    )
