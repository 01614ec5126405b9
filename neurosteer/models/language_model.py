"""A language model with the parts that reading and writing need, and the one place that formats prompts and texts."""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from neurosteer.errors import ModelError, UsageError
from neurosteer.models.parts import written_columns
from neurosteer.models.reference import ModelReference

Framing = Literal["raw", "prompt", "answer"]
FRAMINGS: tuple[Framing, ...] = ("raw", "prompt", "answer")
Message = Mapping[str, str]
Prompt = str | Sequence[Message]
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

    def layer_device(self, layer: int) -> torch.device:
        """Where a block computes: its weights' device, unless they are only fetched for each pass."""
        weight = next(self.blocks[layer].parameters(), None)
        return self.device if weight is None or weight.device.type == "meta" else weight.device

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

        Where the MLP's output is normalised before it is added, the norm's gain is folded in (`written_columns`).
        """
        return written_columns(self.blocks[layer], self.down_projections[layer])

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
