"""Loading models: by catalog name, Hub id, folder or GGUF file."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from neurosteer import processes
from neurosteer.errors import ModelError, UsageError
from neurosteer.models.adapters import merge_adapter
from neurosteer.models.catalog import default_model
from neurosteer.models.framing import template_options as complete_options
from neurosteer.models.language_model import LanguageModel, ModelShape, fingerprint_of, mlp_width
from neurosteer.models.parts import check_stream, find_blocks, find_decoder, find_down_projection, find_final_norm
from neurosteer.models.quantization import bitsandbytes_config, comes_packed, quantization_of
from neurosteer.models.sources import Source, locate
from neurosteer.progress import Progress, silent
from neurosteer.validation import check_option

logger = logging.getLogger(__name__)
_SEEING = AutoModelForImageTextToText
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    chat: bool | None = None,
    template_options: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> LanguageModel:
    """Load a model by catalog name, Hub id, folder or GGUF file.

    Args:
        name: the catalog's default when left out.
        revision: branch, tag or commit on the Hub.
        device: `cuda` if there is one, else `cpu`; with several GPUs the model is spread over them.
        dtype: `float32`, `bfloat16` or `float16`; by default bfloat16 where the device computes it fast, else float32.
        quantize: `4bit` or `8bit` (by bitsandbytes, an extra), for a model whose weights are plain.
        chat: whether prompts get the tokenizer's chat template; by default if it has one.
        template_options: what the chat template is given; by default `enable_thinking=False` where it knows that, and
            a fixed date where it prints one (see `framing.template_options`).
        progress: told what is being fetched and loaded.

    Raises:
        ModelError: no such model, it cannot be fetched, or it lacks a part that steering needs.
        UsageError: an unknown device, dtype or way to quantise, or template options that JSON cannot hold.
    """
    chosen = _choose_device(processes.own_device() if device is None else device)
    wanted = _choose_dtype(dtype, chosen)
    source = locate(name if name is not None else default_model(), revision=revision, progress=progress)
    progress(f"Loading {source.name}")
    transformers_logging.disable_progress_bar()
    spread = device is None and chosen.type == "cuda" and torch.cuda.device_count() > 1 and processes.count() == 1
    packing = _packing(source, quantize, wanted)
    fingerprint = None
    if packing is not None or comes_packed(source.folder):  # and neither moves nor is rounded afterwards
        model, tokenizer = _read(source, wanted, "auto" if spread else {"": chosen}, packing)
    elif source.adapter is not None or wanted == torch.float16:
        model, tokenizer, fingerprint = _read_and_round(source, wanted, chosen, spread)
    else:
        model, tokenizer = _read(source, wanted, "auto" if spread else _straight_to(source, chosen))
    if not spread and quantization_of(model) is None:
        _move(model, chosen)
    lm = describe_model(
        model,
        tokenizer,
        name=source.name,
        revision=source.revision,
        chat=chat if chat is not None else source.chat,
        template_options=template_options,
    )
    return replace(lm, known_fingerprint=fingerprint)


def describe_model(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    name: str,
    revision: str | None = None,
    chat: bool | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Wrap a model and tokenizer that are loaded already. Raises `ModelError` naming the part that was not found."""
    if tokenizer.is_fast is False:
        raise ModelError(f"The tokenizer of {name} is a slow one ({type(tokenizer).__name__}); a fast one is needed.")
    decoder = find_decoder(model, name)
    config = model.config.get_text_config()
    blocks = find_blocks(decoder, config.num_hidden_layers, name)
    projections = tuple(find_down_projection(block, config) for block in blocks)
    if not check_stream(decoder, blocks, projections[0], config.hidden_size, name):
        projections = (None,) * len(blocks)
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise UsageError(f"The tokenizer of {name} has no chat template; use it as a base model (--raw).")
    return LanguageModel(
        model=model.eval().requires_grad_(False),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        name=name,
        revision=revision,
        chat=has_template if chat is None else chat,
        decoder=decoder,
        blocks=blocks,
        projections=projections,
        final_norm=find_final_norm(decoder),
        shape=ModelShape(len(blocks), config.hidden_size, mlp_width(projections)),
        template_options=complete_options(tokenizer, template_options),
    )


DeviceMap = str | dict[str, torch.device] | None


def _straight_to(source: Source, device: torch.device) -> DeviceMap:
    """Weights go to a GPU as they are read, without a copy of them all in the computer's memory; a GGUF file's are
    unpacked there first."""
    return None if device.type == "cpu" or source.gguf_file else {"": device}


def _packing(source: Source, quantize: str | None, dtype: torch.dtype) -> Any:
    """How the weights are to be packed as they are read; None: as they come. Raises `UsageError` where they cannot."""
    if source.adapter is not None and comes_packed(source.folder):
        raise UsageError(f"{source.name} is an adapter on quantised weights; merge it into the plain ones first.")
    if quantize is None:
        return None
    if comes_packed(source.folder):
        raise UsageError(f"{source.name} comes quantised; leave quantize out.")
    if source.gguf_file or source.adapter is not None:
        what = "a GGUF file" if source.gguf_file else "an adapter on another model"
        raise UsageError(f"{source.name} is {what}, which cannot be quantised while it is read; leave quantize out.")
    return bitsandbytes_config(quantize, dtype)


def _read(
    source: Source, dtype: torch.dtype | str, device_map: DeviceMap, packing: Any = None
) -> tuple[PreTrainedModel, Any]:
    named: dict[str, Any] = {"local_files_only": True}
    packed: dict[str, Any] = {} if packing is None else {"quantization_config": packing}
    if source.gguf_file:
        named["gguf_file"] = source.gguf_file
        packed["quantization_config"] = GgufConfig(dequantize=True)  # steering needs plain weights
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, **named)
        config = AutoConfig.from_pretrained(source.folder, **named)
        if not source.gguf_file:
            named["use_safetensors"] = True
        model = _class_for(config).from_pretrained(
            source.folder, config=config, dtype=dtype, device_map=device_map, trust_remote_code=False, **named, **packed
        )
    except Exception as error:  # transformers raises many kinds for damaged or unsupported folders
        raise ModelError(f"{source.name} in {source.folder} could not be loaded: {_why(source, error)}") from error
    return model, tokenizer


def _class_for(config: Any) -> Any:
    """A model that sees may be no causal one to transformers; what writes its text is steered all the same."""
    sees = type(config) not in AutoModelForCausalLM._model_mapping and type(config) in _SEEING._model_mapping
    return _SEEING if sees else AutoModelForCausalLM


def _why(source: Source, error: Exception) -> str:
    """One line, with a remedy where transformers' own has none."""
    text = str(error).strip()
    if "trust_remote_code" in text:
        return (
            "it brings Python code of its own, which NeuroSteer does not run; use a model that transformers knows by "
            "itself."
        )
    folder = Path(source.folder)
    if not any(folder.glob("*.safetensors")) and (found := next(folder.glob("pytorch_model*.bin"), None)) is not None:
        return (
            f"its weights are a pickle ({found.name}), which can run code when it is read; use a revision with "
            "model.safetensors (the Hub's bot offers one at refs/pr/N), or convert it where you trust it."
        )
    return (text.splitlines() or [type(error).__name__])[0][:300]


def _read_and_round(
    source: Source, dtype: torch.dtype, device: torch.device, spread: bool
) -> tuple[PreTrainedModel, Any, str | None]:
    """The model, its tokenizer and, for float16, its fingerprint.

    An adapter is merged in float32 and only then rounded, so that the weights, and their fingerprint, do not depend on
    rounding them twice. float16 cannot hold what bfloat16 can, so the fingerprint is taken of what the file holds.
    Buffers keep the precision that the model gave them. What a file holds in half precision goes straight to `device`.
    """
    first = torch.float32 if source.adapter is not None or source.gguf_file else "auto"
    device_map = _straight_to(source, device) if first == "auto" and _in_half_precision(source) else None
    model, tokenizer = _read(source, first, "auto" if spread else device_map)
    offloaded = any(parameter.is_meta for parameter in model.parameters())
    if source.adapter is not None:
        if offloaded:
            raise ModelError(f"{source.name} does not fit the GPUs, so its adapter cannot be merged; use device='cpu'.")
        merge_adapter(model, source.adapter)
    fingerprint = fingerprint_of(model) if dtype == torch.float16 else None
    if offloaded:  # what is fetched for each pass must be rounded where it is kept
        return *_read(source, dtype, "auto"), fingerprint
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model, tokenizer, fingerprint


def _in_half_precision(source: Source) -> bool:
    try:
        config = AutoConfig.from_pretrained(source.folder, local_files_only=True)
    except Exception:  # `_read` says what is wrong with it
        return False
    return config.dtype in (torch.float16, torch.bfloat16)


def _choose_device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"There is no device {str(device)!r}; use cpu, cuda or cuda:N.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"The device {str(device)!r} was asked for, but no GPU is available; use cpu.")
    with _device_errors(chosen):
        torch.empty(1, device=chosen)
    return chosen


def _move(model: Any, device: torch.device) -> None:
    with _device_errors(device):
        model.to(device)


@contextmanager
def _device_errors(device: torch.device) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise UsageError(
            f"The device {str(device)!r} cannot be used here ({str(error).splitlines()[0][:200]})."
        ) from error


def _choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        check_option("dtype", dtype, DTYPES)
        return DTYPES[dtype]
    return torch.bfloat16 if _has_fast_bfloat16(device) else torch.float32


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":  # older GPUs (T4, V100, RTX 20) emulate it, and slowly
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has_fast_bfloat16()


def cpu_has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware (AVX-512 BF16, AMX or Arm BF16)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
