"""The formats that SAEs come in: sae-lens's folders, read here or by sae-lens, and its names of sites."""

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from neurosteer.errors import ModelError, UsageError
from neurosteer.saes.autoencoder import EncoderColumns
from neurosteer.text import error_line

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"

_PRE = re.compile(r"blocks\.(\d+)\.hook_resid_pre")
_POST = (
    re.compile(r"blocks\.(\d+)\.hook_resid_post"),
    re.compile(r"(?:model\.|transformer\.|gpt_neox\.)?(?:language_model\.)?(?:layers|h)\.(\d+)"),
)
_PLAIN_OPTIONS = {
    "normalize_activations": ("none", None),
    "reshape_activations": ("none", None),
    "activation_fn": ("relu", None),  # this and the next until sae-lens 6, where TopK could be one
    "activation_fn_str": ("relu", None),
}


# --- sites ---------------------------------------------------------------------------------------------------------


def layer_of_hook(hook_name: str) -> int:
    """The block whose output a hook name stands for: `resid_pre` of block L is what block L − 1 returned.

    Raises `UsageError` for any other site.
    """
    before = _PRE.fullmatch(hook_name)
    if before and int(before[1]) > 0:
        return int(before[1]) - 1
    if before:
        raise UsageError(
            f"The SAE reads {hook_name!r}, the embeddings before the first block; steering begins after it. "
            "Use an SAE of a later block."
        )
    for pattern in _POST:
        after = pattern.fullmatch(hook_name)
        if after:
            return int(after[1])
    raise UsageError(
        f"The SAE reads {hook_name!r}; only the residual stream between blocks can be steered "
        "(blocks.L.hook_resid_pre or blocks.L.hook_resid_post)."
    )


# --- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SaeRows:
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    decoder: Tensor
    kind: str
    columns: EncoderColumns | None


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether the SAE is one of the two simple kinds, which need no sae-lens (its import takes seconds)."""
    plain = all(config.get(key) in allowed for key, allowed in _PLAIN_OPTIONS.items())
    return plain and config.get("architecture") in ("standard", "jumprelu")


def plain_rows(config: Mapping[str, Any], weights: Mapping[str, Tensor], device: torch.device, folder: Path) -> SaeRows:
    """ReLU (standard) and JumpReLU (arXiv 2407.14435) SAEs: features of `relu((x − b_dec) W_enc + b_enc)`, kept above
    the threshold."""
    needed = ["W_enc", "W_dec", "b_enc", "b_dec", *(["threshold"] if config["architecture"] == "jumprelu" else [])]
    missing = [key for key in needed if key not in weights]
    if missing:
        raise ModelError(f"{folder / WEIGHTS_FILE} lacks {', '.join(missing)}; it is no {config['architecture']} SAE.")
    w_enc, w_dec, b_enc, b_dec = (weights[key].float() for key in needed[:4])
    threshold = weights["threshold"].float() if "threshold" in needed else torch.zeros_like(b_enc)
    widths = (b_enc.shape, threshold.shape) != (w_enc.shape[1:], w_enc.shape[1:]) or b_dec.shape != w_dec.shape[1:]
    if w_enc.shape != w_dec.T.shape or widths:
        raise ModelError(f"{folder / WEIGHTS_FILE}: the shapes of its tensors do not belong together.")
    # The decoder's bias is taken off the input before encoding, here folded into the encoder's bias.
    shift = b_dec if config.get("apply_b_dec_to_input", True) else torch.zeros_like(b_dec)
    columns = EncoderColumns(w_enc, b_enc - shift @ w_enc, threshold)  # stays on the CPU: read a feature at a time
    w_dec, b_enc, b_dec, shift, bias, least = (
        tensor.to(device) for tensor in (w_dec, b_enc, b_dec, shift, columns.biases, threshold.clamp(min=0))
    )

    @cache
    def encoder(dtype: torch.dtype) -> Tensor:
        """The encoder on the device in what is asked for and no more: it may have a gigabyte."""
        return w_enc.to(device, dtype)

    def encode(rows: Tensor) -> Tensor:
        rows = rows.to(device)
        if rows.dtype == torch.bfloat16:
            # Taken off first: the product with the mean, which is most of a row, would drown the rest in its rounding.
            before = ((rows.float() - shift).to(torch.bfloat16) @ encoder(torch.bfloat16)).float().add_(b_enc)
        else:
            before = torch.addmm(bias, rows.float(), encoder(torch.float32))
        return before.masked_fill_(before <= least, 0.0)

    return SaeRows(
        encode, lambda features: torch.addmm(b_dec, features.to(device), w_dec), w_dec, config["architecture"], columns
    )


def sae_lens_rows(sae: Any, device: torch.device) -> SaeRows:
    if sae.cfg.architecture() == "temporal":
        raise UsageError("The SAE is a temporal one, which reads whole sequences; use one that reads one at a time.")
    sae = sae.to(device=str(device), dtype=torch.float32)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        sae.fold_W_dec_norm()  # so that a feature's activation times its decoder row is what it writes
    decoder = sae.W_dec.detach()

    @torch.no_grad()
    def encode(rows: Tensor) -> Tensor:
        features = sae.encode(rows.to(device).float())
        return features.to_dense() if features.is_sparse else features

    @torch.no_grad()
    def decode(features: Tensor) -> Tensor:
        return sae.decode(features.to(device))

    return SaeRows(encode, decode, decoder, sae.cfg.architecture(), _columns_of(sae))


@torch.no_grad()
def _columns_of(sae: Any) -> EncoderColumns | None:
    """None where a feature's activation depends on the others, or on what the input is divided by."""
    config = sae.cfg
    if not is_plain(
        {**{key: getattr(config, key, None) for key in _PLAIN_OPTIONS}, "architecture": config.architecture()}
    ):
        return None
    bias = sae.b_enc - sae.b_dec @ sae.W_enc if config.apply_b_dec_to_input else sae.b_enc
    threshold = sae.threshold if config.architecture() == "jumprelu" else torch.zeros_like(bias)
    return EncoderColumns(sae.W_enc.detach(), bias.detach(), threshold.detach())


def open_with_sae_lens(folder: Path) -> Any:
    from sae_lens import SAE

    try:
        with without_loading_advice():
            return SAE.load_from_disk(folder, device="cpu", dtype="float32")
    except Exception as error:  # sae-lens raises whatever its reading hits
        raise ModelError(f"The SAE in {folder} could not be loaded ({error_line(error)}).") from error


@contextmanager
def without_loading_advice() -> Iterator[None]:
    """sae-lens warns that the model must be loaded with centred weights; here its activations are centred instead."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        yield


def read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path.parent} holds no {path.name}; it is no SAE in sae-lens's format.") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({error_line(error)}); fetch the SAE again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}; an SAE's is an object.")
    if not isinstance(config.get("metadata", {}), dict):
        raise ModelError(f"{path} has metadata {config['metadata']!r:.40}; an SAE's is an object.")
    return config


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path.parent} holds no {path.name}; fetch the SAE again.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({error_line(error)}); fetch the SAE again.") from error
