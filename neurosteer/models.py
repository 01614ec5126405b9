"""Models: loading, the parts that steering needs, and the one place that formats prompts and texts."""

import hashlib
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module, ModuleList
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from neurosteer.adapters import merge_adapter
from neurosteer.artifacts import ModelReference
from neurosteer.catalog import default_model
from neurosteer.errors import ModelError, UsageError
from neurosteer.progress import Progress, silent
from neurosteer.sources import Source, locate

logger = logging.getLogger(__name__)

Framing = Literal["raw", "prompt", "answer"]
FRAMINGS: tuple[Framing, ...] = ("raw", "prompt", "answer")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Message = Mapping[str, str]
Prompt = str | Sequence[Message]

_DOWN_PROJECTIONS = ("down_proj", "c_proj")
_FINAL_NORMS = ("norm", "ln_f", "final_layernorm")
_FINGERPRINT_SAMPLES = 64
_TOKENIZE_AT_ONCE = 500


@dataclass(frozen=True)
class ModelShape:
    """What an artifact needs to agree on with a model."""

    n_layers: int
    d_model: int
    d_mlp: int


@dataclass(frozen=True)
class FramedText:
    """A text as token ids; its own tokens begin at `start`. `cut` says that it was longer than allowed."""

    ids: list[int]
    start: int
    cut: bool


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A decoder-only model of transformers with the parts that reading and writing need.

    `blocks[L]` returns the residual stream after layer L, `[batch, seq, d_model]`; the input of
    `down_projections[L]` holds one number per neuron, `[batch, seq, d_mlp]`. `decoder` is the model
    without its LM head.
    """

    model: Any  # a PreTrainedModel; its type stubs do not know `generate`
    tokenizer: Any
    name: str
    revision: str | None
    chat: bool
    decoder: Module
    blocks: tuple[Module, ...]
    down_projections: tuple[Module, ...]
    final_norm: Module
    shape: ModelShape
    _fingerprint_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def n_layers(self) -> int:
        return self.shape.n_layers

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def pad_id(self) -> int:
        """The id that fills up shorter rows; what it is does not matter, padding is masked everywhere."""
        for candidate in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if candidate is not None:
                return int(candidate)
        return 0

    @property
    def max_positions(self) -> int | None:
        """The longest sequence the model was made for, in tokens."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of a sample of every weight, the same whatever dtype the weights were loaded in."""
        digest = hashlib.sha256()
        with self._fingerprint_lock, torch.no_grad():
            for name, weight in sorted(self.model.named_parameters()):
                flat = weight.detach().flatten()
                step = max(1, flat.numel() // _FINGERPRINT_SAMPLES)
                sample = flat[::step][:_FINGERPRINT_SAMPLES].to("cpu", torch.bfloat16)
                digest.update(f"{name}{tuple(weight.shape)}".encode())
                digest.update(sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def reference(self) -> ModelReference:
        """What artifacts made on this model record of it."""
        shape = self.shape
        return ModelReference(self.name, self.revision, shape.n_layers, shape.d_model, shape.d_mlp, self.fingerprint)

    def write_columns(self, layer: int) -> Tensor:
        """What each neuron of `layer` writes to the residual stream per unit of activation, float32 `[d_mlp, d_model]`.

        Where the MLP's output is normalised before it is added (Gemma 2 and 3), the norm's gain is folded in; its
        scale, which depends on the token, is not.
        """
        module = self.down_projections[layer]
        weight = module.weight.detach()  # type: ignore[union-attr]
        columns = (weight if _is_conv1d(module) else weight.T).float()
        norm = getattr(self.blocks[layer], "post_feedforward_layernorm", None)
        if norm is None:
            return columns
        gain = norm.weight.detach().float()
        return columns * (1.0 + gain if type(norm).__name__.startswith("Gemma") else gain)

    # --- formatting ---------------------------------------------------------------------------------------------

    def prompt_ids(self, prompt: Prompt, *, raw: bool = False, seed_response: str = "") -> list[int]:
        """Token ids of a prompt (or a conversation) up to where the model is to write.

        A chat model gets its chat template unless `raw`. `seed_response` is how the answer begins. Raises `UsageError`
        for a conversation without a template.
        """
        if raw or not self.chat:
            if not isinstance(prompt, str):
                raise UsageError(f"{self.name} is used without a chat template: give the prompt as one text.")
            return self._ids(prompt + seed_response)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        return self._ids(self._render(messages) + seed_response, special=False)

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a text by itself, without special tokens."""
        return self._ids(text, special=False)

    def frame(
        self, texts: Sequence[str], framing: Framing, *, max_tokens: int, prompts: Sequence[str] | None = None
    ) -> list[FramedText]:
        """Texts as token ids under a framing; each text keeps its first `max_tokens` tokens.

        With `answer`, `prompts` are what the texts answer; without them, every text answers an empty turn.
        """
        if framing not in FRAMINGS:
            raise UsageError(f"framing is {framing!r}; it must be one of {', '.join(FRAMINGS)}.")
        if framing != "raw" and not self.chat:
            raise UsageError(f"framing {framing!r} needs a chat model; {self.name} is a base model, use 'raw'.")
        plain = self._batch_ids(texts, special=framing == "raw")
        cut = [len(ids) > max_tokens for ids in plain]
        plain = [ids[:max_tokens] for ids in plain]
        if framing == "raw":
            return [FramedText(ids, 0, was_cut) for ids, was_cut in zip(plain, cut, strict=True)]
        if framing == "answer":
            turns = {turn: self.prompt_ids(turn) for turn in dict.fromkeys(prompts or [""])}
            starts = [turns[turn] for turn in (prompts or [""] * len(texts))]
            return [
                FramedText(start + ids, len(start), was_cut)
                for start, ids, was_cut in zip(starts, plain, cut, strict=True)
            ]
        kept = [
            self.tokenizer.decode(ids) if was_cut else text
            for text, ids, was_cut in zip(texts, plain, cut, strict=True)
        ]
        start = self._user_turn_start()
        rendered = self._batch_ids([self._render([{"role": "user", "content": text}]) for text in kept], special=False)
        return [FramedText(ids, start, was_cut) for ids, was_cut in zip(rendered, cut, strict=True)]

    def _user_turn_start(self) -> int:
        """Where the chat template's fixed beginning ends, in tokens: up to there two different prompts are alike."""
        one, other = (
            self._ids(self._render([{"role": "user", "content": text}]), special=False) for text in ("A", "?")
        )
        return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)

    def _render(self, messages: list[dict[str, str]]) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise whatever they like
            raise ModelError(f"The chat template of {self.name} refused the conversation: {error}") from error

    def _ids(self, text: str, *, special: bool = True) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    def _batch_ids(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        """A few hundred texts at a time, since what a tokenizer returns beside the ids is many times their size; and
        one object per different id, or 20,000 texts would cost a number object for each of their tokens."""
        found: list[list[int]] = []
        known: dict[int, int] = {}
        for first in range(0, len(texts), _TOKENIZE_AT_ONCE):
            chunk = list(texts[first : first + _TOKENIZE_AT_ONCE])
            rows = self.tokenizer(chunk, add_special_tokens=special, return_attention_mask=False)["input_ids"]
            found += [[known.setdefault(token, token) for token in ids] for ids in rows]
        return found


def load_model(
    name: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    chat: bool | None = None,
    progress: Progress = silent,
) -> LanguageModel:
    """Load a model by catalog name, Hub id, folder or GGUF file.

    Args:
        name: the catalog's default when left out.
        revision: branch, tag or commit on the Hub.
        device: `cuda` if there is one, else `cpu`; with several GPUs the model is spread over them.
        dtype: `float32`, `bfloat16` or `float16`; by default bfloat16 where the device computes it fast, else float32.
        chat: whether prompts get the tokenizer's chat template; by default if it has one.
        progress: told what is being fetched and loaded.

    Raises:
        ModelError: no such model, it cannot be fetched, or it lacks a part that steering needs.
        UsageError: an unknown device or dtype.
    """
    chosen = _choose_device(device)
    wanted = _choose_dtype(dtype, chosen)
    source = locate(name if name is not None else default_model(), revision=revision, progress=progress)
    progress(f"Loading {source.name}")
    transformers_logging.disable_progress_bar()
    spread = device is None and chosen.type == "cuda" and torch.cuda.device_count() > 1
    placed = "auto" if spread else None
    if source.adapter is None:
        model, tokenizer = _read(source, wanted, placed)
    else:
        model, tokenizer = _read_merged(source, source.adapter, wanted, placed)
    if not spread:
        _move(model, chosen)
    return describe_model(
        model,
        tokenizer,
        name=source.name,
        revision=source.revision,
        chat=chat if chat is not None else source.chat,
    )


def describe_model(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    name: str,
    revision: str | None = None,
    chat: bool | None = None,
) -> LanguageModel:
    """Wrap a model and tokenizer that are loaded already. Raises `ModelError` naming the part that was not found."""
    if tokenizer.is_fast is False:
        raise ModelError(f"The tokenizer of {name} is a slow one ({type(tokenizer).__name__}); a fast one is needed.")
    decoder = _find_decoder(model, name)
    blocks = _find_blocks(decoder, model.config.get_text_config().num_hidden_layers, name)
    projections = tuple(_find_down_projection(block, index, name) for index, block in enumerate(blocks))
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise UsageError(f"The tokenizer of {name} has no chat template; use it as a base model (--raw).")
    shape = ModelShape(len(blocks), model.config.get_text_config().hidden_size, _input_width(projections[0]))
    return LanguageModel(
        model=model.eval().requires_grad_(False),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        name=name,
        revision=revision,
        chat=has_template if chat is None else chat,
        decoder=decoder,
        blocks=blocks,
        down_projections=projections,
        final_norm=_find_final_norm(decoder, name),
        shape=shape,
    )


def _read(source: Source, dtype: torch.dtype, device_map: str | None) -> tuple[PreTrainedModel, Any]:
    named: dict[str, Any] = {"local_files_only": True}
    packed: dict[str, Any] = {}
    if source.gguf_file:
        named["gguf_file"] = source.gguf_file
        packed["quantization_config"] = GgufConfig(dequantize=True)  # steering needs plain weights
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, **named)
        config = AutoConfig.from_pretrained(source.folder, **named)
        if not source.gguf_file:
            named["use_safetensors"] = True
        model = AutoModelForCausalLM.from_pretrained(
            source.folder, config=config, dtype=dtype, device_map=device_map, trust_remote_code=False, **named, **packed
        )
    except Exception as error:  # transformers raises many kinds for damaged or unsupported folders
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"{source.name} in {source.folder} could not be loaded: {first_line[:300]}") from error
    return model, tokenizer


def _read_merged(
    source: Source, adapter: Path, dtype: torch.dtype, device_map: str | None
) -> tuple[PreTrainedModel, Any]:
    """Merged in float32 and only then rounded, so that the weights, and their fingerprint, do not depend on rounding
    them twice. Buffers keep the precision that the model gave them."""
    model, tokenizer = _read(source, torch.float32, device_map)
    merge_adapter(model, adapter)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model, tokenizer


def _choose_device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UsageError(f"There is no device {str(device)!r}; use cpu, cuda or cuda:N.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"The device {str(device)!r} was asked for, but no GPU is available; use cpu.")
    return chosen


def _move(model: Any, device: torch.device) -> None:
    try:
        model.to(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"The device {str(device)!r} cannot be used here ({str(error).splitlines()[0][:200]})."
        ) from error


def _choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is not None:
        if dtype not in DTYPES:
            raise UsageError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    fast = device.type == "cuda" or cpu_has_fast_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def cpu_has_fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices in hardware (AVX-512 BF16, AMX or Arm BF16)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


# --- finding the parts -----------------------------------------------------------------------------------------------


def _find_decoder(model: PreTrainedModel, name: str) -> Module:
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else model.base_model
    if decoder is None or decoder is model:
        raise ModelError(f"{name} ({type(model).__name__}): no decoder beneath the LM head was found.")
    return decoder


def _find_blocks(decoder: Module, n_layers: int, name: str) -> tuple[Module, ...]:
    for child in decoder.children():
        if isinstance(child, ModuleList) and len(child) == n_layers:
            return tuple(child)
    raise ModelError(
        f"{name} ({type(decoder).__name__}): no list of {n_layers} decoder blocks was found; "
        f"its parts are {', '.join(key for key, _ in decoder.named_children()) or 'none'}."
    )


def _find_down_projection(block: Module, layer: int, name: str) -> Module:
    mlp = getattr(block, "mlp", None)
    for key in _DOWN_PROJECTIONS:
        found = getattr(mlp, key, None)
        if isinstance(found, Module):
            return found
    parts = ", ".join(key for key, _ in (mlp if mlp is not None else block).named_children())
    raise ModelError(
        f"{name}: block {layer} ({type(block).__name__}) has no MLP down projection "
        f"({' or '.join('mlp.' + key for key in _DOWN_PROJECTIONS)}); its parts are {parts}."
    )


def _find_final_norm(decoder: Module, name: str) -> Module:
    for key in _FINAL_NORMS:
        found = getattr(decoder, key, None)
        if isinstance(found, Module):
            return found
    raise ModelError(
        f"{name} ({type(decoder).__name__}): no final norm ({', '.join(_FINAL_NORMS)}) was found; "
        f"its parts are {', '.join(key for key, _ in decoder.named_children())}."
    )


def _is_conv1d(module: Module) -> bool:
    return hasattr(module, "nf")  # GPT-2's Conv1D keeps its weight as [in, out]


def _input_width(projection: Module) -> int:
    weight = projection.weight
    return int(weight.shape[0] if _is_conv1d(projection) else weight.shape[1])  # type: ignore[index,union-attr]
