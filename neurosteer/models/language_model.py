"""A language model with the parts that reading and writing need."""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from neurosteer.errors import ModelError
from neurosteer.models.framing import FRAMINGS, FramedText, Framer, Framing, Message, Prompt
from neurosteer.models.offloading import runs_on, stored_weights
from neurosteer.models.parts import input_width, is_mixture, written_columns
from neurosteer.models.quantization import quantization_of
from neurosteer.models.reference import ModelReference

__all__ = ["FRAMINGS", "FramedText", "Framing", "LanguageModel", "Message", "ModelShape", "Prompt", "fingerprint_of"]

_FINGERPRINT_SAMPLES = 64


@dataclass(frozen=True)
class ModelShape:
    """What an artifact needs to agree on with a model. `d_mlp` is 0 where not all blocks have an MLP of one width, such
    as where they are mixtures of experts: then only circuits, which are of neurons, cannot be had."""

    n_layers: int
    d_model: int
    d_mlp: int


@dataclass(frozen=True, eq=False)
class LanguageModel(Framer):
    """A decoder-only model of transformers with the parts that reading and writing need.

    `blocks[L]` returns the residual stream after layer L, `[batch, seq, d_model]`; `projections[L]` is what the neurons
    of its MLP leave through, None where it has no such MLP. `decoder` is the model without its LM head.
    `template_options` are what the chat template is given (see `framing.template_options`).
    """

    model: Any  # a PreTrainedModel; its type stubs do not know `generate`
    tokenizer: Any
    name: str
    revision: str | None
    chat: bool
    decoder: Module
    blocks: tuple[Module, ...]
    projections: tuple[Module | None, ...]
    final_norm: Module
    shape: ModelShape
    template_options: Mapping[str, Any] = field(default_factory=dict)
    known_fingerprint: str | None = None  # taken before the weights were rounded to float16
    _fingerprint_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def n_layers(self) -> int:
        return self.shape.n_layers

    @cached_property
    def down_projections(self) -> tuple[Module, ...]:
        """One for each block: its input holds one number per neuron, `[batch, seq, d_mlp]`.

        Raises `ModelError` where the model has no neurons that circuits could be of.
        """
        found = tuple(part for part in self.projections if part is not None)
        if self.shape.d_mlp:
            return found
        lacking = next((layer for layer, part in enumerate(self.projections) if part is None), None)
        if lacking is None:
            why = f"its MLPs are of different widths ({', '.join(map(str, sorted(set(map(input_width, found)))))})"
        else:
            block = self.blocks[lacking]
            what = (
                "a mixture of experts"
                if is_mixture(block)
                else "without an MLP whose neurons can be told apart by token"
            )
            why = f"block {lacking} ({type(block).__name__}) is {what}"
        raise ModelError(f"{self.name} has no neurons that circuits could be of: {why}. Vectors work on it.")

    @property
    def device(self) -> torch.device:
        """Where what a pass is given has to be."""
        found = self.model.device
        return (runs_on(self.model) or found) if found.type == "meta" else found

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def layer_device(self, layer: int) -> torch.device:
        """Where a block computes: its weights' device, or that to which they are fetched for each pass."""
        return runs_on(self.blocks[layer]) or self.device

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
        with self._fingerprint_lock:
            return self.known_fingerprint or fingerprint_of(self.model)

    @property
    def reference(self) -> ModelReference:
        """What artifacts made on this model record of it."""
        shape = self.shape
        dimensions = shape.n_layers, shape.d_model, shape.d_mlp
        return ModelReference(self.name, self.revision, *dimensions, self.fingerprint, quantization_of(self.model))

    def write_columns(self, layer: int) -> Tensor:
        """What each neuron of `layer` writes to the residual stream per unit of activation, float32 `[d_mlp, d_model]`.

        Where the MLP's output is normalised before it is added, the norm's gain is folded in (`written_columns`).
        """
        return written_columns(self.blocks[layer], self.down_projections[layer])


def mlp_width(projections: Sequence[Module | None]) -> int:
    """How many neurons every block's MLP has; 0 where that is not one number."""
    widths = {0 if part is None else input_width(part) for part in projections}
    return widths.pop() if len(widths) == 1 else 0


def fingerprint_of(model: Module) -> str:
    """A short hash of a sample of every weight, as bfloat16."""
    digest = hashlib.sha256()
    with torch.no_grad():
        for name, weight in sorted(stored_weights(model), key=itemgetter(0)):
            flat = weight.detach().flatten()
            step = max(1, flat.numel() // _FINGERPRINT_SAMPLES)
            sample = flat[::step][:_FINGERPRINT_SAMPLES].to("cpu", torch.bfloat16)
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
