"""How much neurons vary by themselves, from a short reading of unsteered texts."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from neurosteer.measuring.divergence import UnsteeredTexts
from neurosteer.models.hooks import InputHook, hooked
from neurosteer.models.language_model import LanguageModel


def neuron_spreads(lm: LanguageModel, layers: Sequence[int], texts: UnsteeredTexts) -> dict[int, Tensor]:
    """By layer the standard deviation of each neuron's activation over the tokens of `texts` (prompts and their
    continuations, the first token of each left out), float32 `[d_mlp]`."""
    read: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: int, hidden: Tensor) -> None:
        read[layer].append(hidden.reshape(-1, hidden.shape[-1])[1:].float().cpu())

    hooks = [InputHook(lm.down_projections[layer], partial(keep, layer)) for layer in layers]
    with torch.inference_mode(), hooked(hooks):
        for text in texts.texts:  # one at a time, so that there is no padding
            lm.decoder(input_ids=torch.tensor([text.ids], device=lm.device), use_cache=False)
    return {layer: torch.cat(rows).std(0) for layer, rows in read.items()}
