"""A figure for every token of a text: how far it lies along an artifact, or how much steering changed the choice.

For showing texts in colour. Both read a text that is there already; nothing is generated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.vector import SteeringVector, unit
from neurosteer.measuring.divergence import divergences, read_unsteered
from neurosteer.models.hooks import Hook, InputHook, OutputHook, hooked
from neurosteer.models.language_model import LanguageModel, Prompt
from neurosteer.steering.forcing import ForcedText

_TOKENS_AT_ONCE = 128  # whose logits are held at once


@dataclass(frozen=True)
class TokenScore:
    """A piece of the text (the pieces joined are the text) and its figure."""

    text: str
    score: float


def projections(
    lm: LanguageModel, artifact: Artifact, prompt: Prompt, text: str, *, raw: bool = False
) -> list[TokenScore]:
    """How far each token of `text`, written after `prompt`, lies along `artifact`, read on the unsteered model.

    For a vector: the residual stream's component along the direction over the layer's median norm, the mean over the
    artifact's layers. For a circuit: the neurons' activations along their class differences, 1 for one difference.
    Only differences between tokens mean anything: zero is arbitrary. Raises `UsageError` as `prompt_ids` does.
    """
    ids, n_prompt = _ids(lm, prompt, text, raw)
    if len(ids) == n_prompt:
        return []
    found: dict[int, Tensor] = {}

    def keep(layer: int, hidden: Tensor) -> None:
        found[layer] = hidden[0].float()

    hooks: list[Hook] = [
        InputHook(lm.down_projections[layer], partial(keep, layer))
        if isinstance(artifact, NeuronCircuit)
        else OutputHook(lm.blocks[layer], partial(keep, layer))
        for layer in artifact.layers
    ]
    with torch.inference_mode(), hooked(hooks):
        lm.decoder(input_ids=torch.tensor([ids], device=lm.device), use_cache=False)
    scores = torch.stack([_along(artifact, layer, hidden[n_prompt:]) for layer, hidden in found.items()])
    total = scores.sum(0) if isinstance(artifact, NeuronCircuit) else scores.mean(0)
    return _scored(lm, text, total.tolist())


def token_divergences(
    lm: LanguageModel, recipe: Recipe, prompt: Prompt, text: str, *, raw: bool = False
) -> list[TokenScore]:
    """How much `recipe` changes the choice of each token of `text`: KL(steered ‖ unsteered) of the distributions that
    the token is drawn from, in nats. Raises `UsageError` as `prompt_ids` does, `MismatchError` as steering does.
    """
    ids, n_prompt = _ids(lm, prompt, text, raw)
    if len(ids) == n_prompt:
        return []
    found: list[float] = []
    for first in range(n_prompt, len(ids), _TOKENS_AT_ONCE):  # a long text's beginning is read again for each part
        end = min(first + _TOKENS_AT_ONCE, len(ids))
        unsteered = read_unsteered(lm, [ForcedText(ids[:end], first, end)], end - first)
        found += divergences(lm, unsteered, [recipe]).flatten().tolist()
    return _scored(lm, text, found)


def _along(artifact: Artifact, layer: int, hidden: Tensor) -> Tensor:
    """`hidden` is `[seq, d_model]`, or `[seq, d_mlp]` for a circuit; `[seq]`, on the CPU."""
    hidden = hidden.cpu()
    if isinstance(artifact, SteeringVector):
        return hidden @ unit(artifact.directions[layer]) / artifact.norms[layer]
    assert isinstance(artifact, NeuronCircuit)
    here = artifact.neuron_layers == layer
    differences = artifact.differences.square().sum().clamp(min=1e-12)
    return hidden[:, artifact.neurons[here].long()] @ artifact.differences[here] / differences


def _ids(lm: LanguageModel, prompt: Prompt, text: str, raw: bool) -> tuple[list[int], int]:
    before = lm.prompt_ids(prompt, raw=raw)
    return before + lm.token_ids(text), len(before)


def _scored(lm: LanguageModel, text: str, scores: Sequence[float]) -> list[TokenScore]:
    """The text cut into its tokens' pieces; tokens that share a character are one piece, with their mean."""
    groups: list[tuple[str, list[float]]] = []
    ids = lm.token_ids(text)
    start = 0
    for end, score in zip(_ends(lm, text, ids), scores, strict=True):
        if end > start or not groups:
            groups.append((text[start:end], [score]))
        else:
            groups[-1][1].append(score)
        start = max(start, end)
    if groups and start < len(text):
        groups[-1] = (groups[-1][0] + text[start:], groups[-1][1])
    return [TokenScore(piece, sum(found) / len(found)) for piece, found in groups]


def _ends(lm: LanguageModel, text: str, ids: Sequence[int]) -> list[int]:
    """Up to which character of `text` each token reaches."""
    offsets = lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert len(offsets) == len(ids)
    return [min(int(end), len(text)) for _, end in offsets]
