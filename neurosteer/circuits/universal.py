"""Neurons that fire strongly whatever the text is about: they keep the model running and explain no single answer."""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from neurosteer.circuits.choices import as_prompts
from neurosteer.errors import UsageError
from neurosteer.examples import assets_folder
from neurosteer.hooks import InputHook, hooked
from neurosteer.models import LanguageModel
from neurosteer.progress import Progress, check_cancelled, silent

TOP_PER_LAYER = 20
SHARE_OF_PROMPTS = 0.8


@dataclass(frozen=True)
class UniversalNeurons:
    """Neurons as (layer, neuron), in this order; `top_per_layer`, `share` and `n_prompts` say how they were found."""

    neurons: tuple[tuple[int, int], ...]
    n_prompts: int = 0
    top_per_layer: int = TOP_PER_LAYER
    share: float = SHARE_OF_PROMPTS


@cache
def everyday_prompts() -> tuple[str, ...]:
    """The beginnings of twenty unremarkable sentences, one of each subject."""
    text = (assets_folder() / "examples" / "everyday_prompts.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


_FOUND: "weakref.WeakKeyDictionary[LanguageModel, UniversalNeurons]" = weakref.WeakKeyDictionary()


def find_universal(
    lm: LanguageModel,
    prompts: Sequence[str] | None = None,
    *,
    top_per_layer: int = TOP_PER_LAYER,
    share: float = SHARE_OF_PROMPTS,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> UniversalNeurons:
    """The neurons that are among their layer's `top_per_layer` by |activation| at the last token of at least `share` of
    the prompts, which are read without a chat template.

    With everything left at its default the answer is kept for as long as the model is. Raises `UsageError` for an empty
    prompt or an option out of its range, `Cancelled`.
    """
    by_default = prompts is None and (top_per_layer, share) == (TOP_PER_LAYER, SHARE_OF_PROMPTS)
    if by_default and lm in _FOUND:
        return _FOUND[lm]
    if not 1 <= top_per_layer <= lm.shape.d_mlp or not 0 < share <= 1:
        raise UsageError(
            f"top_per_layer is {top_per_layer!r:.40} and share {share!r:.40}; give 1 to {lm.shape.d_mlp} neurons and a "
            "share above 0 and up to 1."
        )
    texts = [str(prompt) for prompt in as_prompts(everyday_prompts() if prompts is None else prompts)]
    counts = torch.zeros(lm.n_layers, lm.shape.d_mlp, dtype=torch.int32)
    for done, text in enumerate(texts):
        check_cancelled(cancel, "Finding universal neurons")
        progress("Finding universal neurons", done / len(texts))
        counts += _among_strongest(lm, text, top_per_layer)
    found = (counts >= int(share * len(texts))).nonzero().tolist()
    universal = UniversalNeurons(tuple((layer, neuron) for layer, neuron in found), len(texts), top_per_layer, share)
    if by_default:
        _FOUND[lm] = universal
    return universal


def _among_strongest(lm: LanguageModel, text: str, count: int) -> torch.Tensor:
    """1 for the `count` strongest neurons of each layer at the last token, int32 `[n_layers, d_mlp]`."""
    ids = lm.prompt_ids(text, raw=True)
    if not ids:
        raise UsageError("A prompt is empty; write at least one character.")
    strongest = torch.zeros(lm.n_layers, lm.shape.d_mlp, dtype=torch.int32)

    def mark(layer: int, hidden: torch.Tensor) -> None:
        strongest[layer, hidden[0, -1].float().abs().topk(count).indices.cpu()] = 1

    hooks = [
        InputHook(down, lambda hidden, layer=layer: mark(layer, hidden))
        for layer, down in enumerate(lm.down_projections)
    ]
    with torch.inference_mode(), hooked(hooks):
        lm.decoder(input_ids=torch.tensor([ids], device=lm.device), use_cache=False)
    return strongest
