"""Models whose weights are quantised: asked for by us (bitsandbytes), or come that way (GPTQ, AWQ, FP8, torchao).

A hook on a quantised model sees what it sees on a plain one, activations in the model's dtype; only its weights are
packed, so whatever has to do with them asks the modules (`parts.written_columns`).
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import BitsAndBytesConfig

from neurosteer.errors import UsageError
from neurosteer.validation import check_option

Quantization = Literal["4bit", "8bit"]
QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)


def bitsandbytes_config(quantize: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit is NF4 with its scales quantised too (QLoRA, arXiv 2305.14314), 8-bit is LLM.int8() (arXiv 2208.07339).
    The latter looks for outliers over a whole batch, so that a text can depend on those written beside it.

    Raises `UsageError` for another kind, or where bitsandbytes is not installed.
    """
    check_option("quantize", quantize, QUANTIZATIONS)
    if find_spec("bitsandbytes") is None:
        raise UsageError("quantize needs bitsandbytes; install it with pip install 'neurosteer[quantize]'.")
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def comes_packed(folder: Path | str) -> bool:
    """Whether the weights in a model's folder are quantised there."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # loading says what is wrong with it
        return False
    return isinstance(config, dict) and bool(config.get("quantization_config"))


def quantization_of(model: Any) -> str | None:
    """How a loaded model's weights are quantised, in words; None where they are plain (a GGUF file's are unpacked)."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    known = config if isinstance(config, dict) else config.to_dict()
    method = str(getattr(known.get("quant_method"), "value", known.get("quant_method")))
    if method == "gguf":
        return None
    if method.startswith("bitsandbytes"):
        kind = f"4-bit {known.get('bnb_4bit_quant_type', '')}".strip() if known.get("load_in_4bit") else "8-bit"
        return f"bitsandbytes {kind}"
    bits = known.get("bits", known.get("w_bit"))
    return f"{method} {bits}-bit" if bits else method
