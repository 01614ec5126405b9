"""What texts have lost, as the unsteered model sees it."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from neurosteer.artifacts.recipes import UNSTEERED
from neurosteer.measuring.preference import log_likelihoods
from neurosteer.models.language_model import LanguageModel
from neurosteer.steering.forcing import ForcedText


def surprises(
    lm: LanguageModel,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    *,
    cancel: threading.Event | None = None,
) -> Tensor:
    """How surprising each continuation's tokens `ids[i]` are to the unsteered model after `prompts[i]`: the sum of
    their negative log-likelihoods in nats, float64 `[n]`, 0 where there is no token. Raises `Cancelled` when `cancel`
    is set."""
    starts = {prompt: lm.prompt_ids(prompt) for prompt in dict.fromkeys(prompts)}
    texts = [
        ForcedText([*starts[prompt], *own], len(starts[prompt]), len(starts[prompt]) + len(own))
        for prompt, own in zip(prompts, ids, strict=True)
    ]
    there = [place for place, text in enumerate(texts) if text.count]
    found = torch.zeros(len(texts), dtype=torch.float64)
    read = [texts[place] for place in there]
    found[there] = -log_likelihoods(lm, read, [UNSTEERED], what="Measuring perplexity", cancel=cancel)[0]
    return found
