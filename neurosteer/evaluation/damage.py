"""What texts have lost, as the unsteered model sees it."""

import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from neurosteer.forcing import ForcedText, forced_logits
from neurosteer.models import LanguageModel
from neurosteer.recipes import UNSTEERED


def surprises(
    lm: LanguageModel,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    *,
    cancel: threading.Event | None = None,
) -> Tensor:
    """How surprising each continuation's tokens `ids[i]` are to the unsteered model after `prompts[i]`: the sum of
    their negative log-likelihoods in nats, float64 `[n]`, 0 where there is no token."""
    starts = {prompt: lm.prompt_ids(prompt) for prompt in dict.fromkeys(prompts)}
    places = [place for place, tokens in enumerate(ids) if tokens]
    texts = []
    for place in places:
        start = starts[prompts[place]]
        texts.append(ForcedText([*start, *ids[place]], len(start), len(start) + len(ids[place])))
    found = torch.zeros(len(ids), dtype=torch.float64)
    for read in forced_logits(lm, texts, [UNSTEERED] * len(texts), what="Measuring perplexity", cancel=cancel):
        own = read.logits.gather(1, read.targets[:, None])[:, 0]
        surprise = (read.logits.logsumexp(1) - own).double().cpu()
        found.index_add_(0, torch.tensor(places)[read.rows], surprise)
    return found
