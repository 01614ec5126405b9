"""Neurons that keep the model running whatever the text is about, and explain no single answer; and those that everyday
answers are owed to as well: leaving them out makes a circuit specific to its own answer."""

import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from neurosteer.circuits.relp.choices import Choice, likely_choices
from neurosteer.circuits.relp.linearised import batch_tokens_for
from neurosteer.circuits.relp.scores import score_prompts
from neurosteer.circuits.relp.weights import Neuron, edge_weights, super_weights
from neurosteer.examples.files import bundled_lines
from neurosteer.models.batching import length_batches, padded
from neurosteer.models.hooks import InputHook, hooked
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.memory import halving
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.validation import check_count, check_number

TOP_PER_LAYER = 20
SHARE_OF_PROMPTS = 0.8
ANSWERS_TOP, ANSWERS_SHARE = 100, 0.25

_EDGE_PROMPTS = 8  # in how many of the prompts edges are found, evenly spaced
_EDGE_SOURCES, _EDGE_TARGETS = 200, 10
_EDGE_SHARE = 0.5


@dataclass(frozen=True)
class CommonNeurons:
    """Neurons as (layer, neuron) that everyday prompts have in common, so that they explain no single answer.

    `neurons` are among their layer's `top_per_layer` by |activation| at the last token of at least `share` of the
    `n_prompts`; `find_unspecific` adds those that everyday answers are owed to. `super_weights` have edges that are
    outliers in at least half of those prompts that were looked at.
    """

    neurons: tuple[tuple[int, int], ...]
    super_weights: tuple[tuple[int, int], ...] = ()
    n_prompts: int = 0
    top_per_layer: int = TOP_PER_LAYER
    share: float = SHARE_OF_PROMPTS

    @property
    def all(self) -> tuple[tuple[int, int], ...]:
        """Universal neurons and super weights, each once, in order."""
        return tuple(sorted({*self.neurons, *self.super_weights}))


@cache
def everyday_prompts() -> tuple[str, ...]:
    """The beginnings of twenty unremarkable sentences, each about something else."""
    return bundled_lines("everyday_prompts.txt")


_FOUND: "weakref.WeakKeyDictionary[LanguageModel, CommonNeurons]" = weakref.WeakKeyDictionary()


def find_universal(
    lm: LanguageModel,
    prompts: Sequence[str] | None = None,
    *,
    top_per_layer: int = TOP_PER_LAYER,
    share: float = SHARE_OF_PROMPTS,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> CommonNeurons:
    """Find universal neurons and super weights over `prompts`, read without a chat template.

    With everything left at its default the answer is kept for as long as the model is. Raises `UsageError` for an empty
    prompt or an option out of its range, `Cancelled`.
    """
    by_default = prompts is None and (top_per_layer, share) == (TOP_PER_LAYER, SHARE_OF_PROMPTS)
    if by_default and lm in _FOUND:
        return _FOUND[lm]
    check_count("top_per_layer", top_per_layer, 1, lm.shape.d_mlp)
    check_number("share", share, 0, 1, above=True)
    progress("Finding universal neurons")
    choices = likely_choices(lm, everyday_prompts() if prompts is None else prompts)
    counts = torch.zeros(lm.n_layers, lm.shape.d_mlp, dtype=torch.int32)

    def run(indices: list[int]) -> Tensor:
        check_cancelled(cancel, "Finding universal neurons")
        return _among_strongest(lm, [choices[index] for index in indices], top_per_layer)

    for _, among in halving(lm, length_batches(choices, batch_tokens_for(lm)), run, progress=progress):
        counts += among
    found = (counts >= int(share * len(choices))).nonzero().tolist()
    universal = CommonNeurons(
        neurons=tuple((layer, neuron) for layer, neuron in found),
        super_weights=_super_weights(lm, choices, progress, cancel),
        n_prompts=len(choices),
        top_per_layer=top_per_layer,
        share=share,
    )
    if by_default:
        _FOUND[lm] = universal
    return universal


def _among_strongest(lm: LanguageModel, batch: Sequence[Choice], count: int) -> Tensor:
    """For how many of the prompts a neuron is among its layer's `count` strongest at the last token, int32
    `[n_layers, d_mlp]`."""
    counts = torch.zeros(lm.n_layers, lm.shape.d_mlp, dtype=torch.int32)
    lasts = torch.tensor([len(choice.ids) - 1 for choice in batch])

    def add(layer: int, hidden: Tensor) -> None:
        at_last = hidden[torch.arange(len(batch), device=hidden.device), lasts.to(hidden.device)]
        strongest = at_last.float().abs().topk(count).indices.cpu()
        counts[layer] = torch.bincount(strongest.flatten(), minlength=counts.shape[1])

    hooks = [InputHook(down, partial(add, layer)) for layer, down in enumerate(lm.down_projections)]
    with torch.inference_mode(), hooked(hooks):
        lm.decoder(input_ids=padded([choice.ids for choice in batch], lm.pad_id).to(lm.device), use_cache=False)
    return counts


def _super_weights(
    lm: LanguageModel, choices: Sequence[Choice], progress: Progress, cancel: threading.Event | None
) -> tuple[tuple[int, int], ...]:
    longer = [choice for choice in choices if len(choice.ids) > 1]
    looked_at = longer[:: max(1, len(longer) // _EDGE_PROMPTS)][:_EDGE_PROMPTS]
    times: Counter[tuple[int, int]] = Counter()
    for done, one in enumerate(score_prompts(lm, looked_at, cancel=cancel)):
        progress("Finding super weights", done / len(looked_at))
        strongest = zip(one.layers.tolist(), one.positions.tolist(), one.neurons.tolist(), strict=True)
        nodes = [Neuron(*row) for row in strongest][:_EDGE_SOURCES]
        weights = edge_weights(lm, one.choice.ids, nodes, nodes[:_EDGE_TARGETS], cancel=cancel)
        times.update((outlier.layer, outlier.neuron) for outlier in super_weights(weights, nodes))
    return tuple(sorted(key for key, count in times.items() if count >= _EDGE_SHARE * len(looked_at)))


def find_unspecific(
    lm: LanguageModel,
    prompts: Sequence[str] | None = None,
    *,
    top: int = ANSWERS_TOP,
    share: float = ANSWERS_SHARE,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> CommonNeurons:
    """The universal neurons, and those that are among the `top` by relp score, of all layers, of at least `share` of
    everyday prompts' own likeliest tokens (against the second likeliest). For `attribute(..., universal=...)`.

    Ablating a circuit without them takes away less of its answer, but leaves other answers alone. Raises `UsageError`
    for no prompts, an empty one, or an option out of its range, `Cancelled`.
    """
    check_count("top", top, 1, lm.n_layers * lm.shape.d_mlp)
    check_number("share", share, 0, 1, above=True)
    universal = find_universal(lm, progress=progress, cancel=cancel)
    choices = likely_choices(lm, everyday_prompts() if prompts is None else prompts)
    counts: Counter[int] = Counter()
    for one in score_prompts(lm, choices, progress=progress, cancel=cancel):
        counts.update(one.strongest.abs().flatten().topk(top).indices.tolist())
    common = (divmod(key, lm.shape.d_mlp) for key, count in counts.items() if count >= share * len(choices))
    return replace(universal, neurons=tuple(sorted({*universal.neurons, *common})))
