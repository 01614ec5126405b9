"""Neurons that everyday answers are owed to as well: leaving them out makes a circuit specific to its own answer."""

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from neurosteer.circuits.relp.choices import likely_choices
from neurosteer.circuits.relp.scores import score_prompts
from neurosteer.circuits.relp.universal import CommonNeurons, everyday_prompts, find_universal
from neurosteer.errors import UsageError
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Progress, silent
from neurosteer.validation import is_int

TOP = 100
SHARE = 0.25


def find_unspecific(
    lm: LanguageModel,
    prompts: Sequence[str] | None = None,
    *,
    top: int = TOP,
    share: float = SHARE,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> CommonNeurons:
    """The universal neurons, and those that are among the `top` by relp score, of all layers, of at least `share` of
    everyday prompts' own likeliest tokens (against the second likeliest). For `attribute(..., universal=...)`.

    Ablating a circuit without them takes away less of its answer, but leaves other answers alone. Raises `UsageError`
    for no prompts, an empty one, or an option out of its range, `Cancelled`.
    """
    n_neurons = lm.n_layers * lm.shape.d_mlp
    if not is_int(top) or not 1 <= top <= n_neurons or not 0 < share <= 1:
        raise UsageError(
            f"top is {top!r:.40} and share {share!r:.40}; give 1 to {n_neurons} neurons and a share above 0 up to 1."
        )
    universal = find_universal(lm, progress=progress, cancel=cancel)
    choices = likely_choices(lm, everyday_prompts() if prompts is None else prompts)
    counts: Counter[int] = Counter()
    for one in score_prompts(lm, choices, progress=progress, cancel=cancel):
        counts.update(one.strongest.abs().flatten().topk(top).indices.tolist())
    common = (divmod(key, lm.shape.d_mlp) for key, count in counts.items() if count >= share * len(choices))
    return replace(universal, neurons=tuple(sorted({*universal.neurons, *common})))
