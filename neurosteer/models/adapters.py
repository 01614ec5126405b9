"""Low-rank adapters (LoRA) in PEFT's format, merged into a model's weights; PEFT itself is not needed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Module

from neurosteer.errors import ModelError
from neurosteer.validation import is_finite

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
_PLAIN_OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}


def merge_adapter(model: Module, folder: Path) -> None:
    """Add `lora_alpha` / `r` × B A to every weight that the adapter in `folder` names, in place and in float32.

    A is `[r, in]`, B `[out, r]`, the weight `[out, in]`. Raises `ModelError` when the adapter is missing or damaged, is
    more than a plain LoRA, or does not fit; the model is then as it was.
    """
    settings, weights = _read(folder)
    parameters = dict(model.named_parameters())
    scale = float(settings["lora_alpha"]) / float(settings["r"])
    pairs = {}
    for key in sorted(weights):
        name = key.removeprefix(_PREFIX).removesuffix(_A) + ".weight"
        down, up = weights[key], weights.get(key.removesuffix(_A) + _B)
        if key.endswith(_B) and key.removesuffix(_B) + _A in weights:
            continue
        if not key.endswith(_A) or up is None or not _fits(parameters.get(name), down, up):
            raise ModelError(f"The adapter in {folder} does not fit this model: {key[:200]!r} has no place there.")
        pairs[name] = (down, up)
    with torch.no_grad():
        for name, (down, up) in pairs.items():
            weight = parameters[name]
            delta = scale * (up.float() @ down.float()).to(weight.device)
            weight.copy_(weight.float() + delta)


def _fits(weight: Tensor | None, down: Tensor, up: Tensor) -> bool:
    return (
        weight is not None
        and down.ndim == up.ndim == 2
        and down.shape[0] == up.shape[1]
        and weight.shape == (up.shape[0], down.shape[1])
    )


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(
            f"The adapter in {folder} could not be read ({type(error).__name__}); fetch it anew."
        ) from error
    if not isinstance(settings, dict):
        raise ModelError(f"{CONFIG_FILE} in {folder} is no JSON object; fetch the adapter anew.")
    for key, allowed in _PLAIN_OPTIONS.items():
        if settings.get(key) not in allowed:
            raise ModelError(
                f"The adapter in {folder} has {key}={settings.get(key)!r:.60}; only a plain LoRA can be merged."
            )
    for key in ("r", "lora_alpha"):
        value = settings.get(key)
        if not is_finite(value) or not value > 0:  # type: ignore[operator]
            raise ModelError(f"{CONFIG_FILE} in {folder} has {key}={value!r:.60}; it must be a positive number.")
    return settings, weights
