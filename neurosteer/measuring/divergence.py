"""How far a recipe moves the model: KL(steered ‖ unsteered) of the next token along texts, in nats.

The one place where KL is computed, and where a percentile of it is taken.
"""

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from neurosteer import processes
from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.errors import UsageError
from neurosteer.models.language_model import LanguageModel, Prompt
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.steering.batches import Batch, RowInFlight
from neurosteer.steering.decoding import RowText, Sampler, Sampling
from neurosteer.steering.forcing import ForcedText, forced_logits
from neurosteer.steering.plans import can_hold
from neurosteer.steering.session import stop_ids

_WHAT = "Measuring KL"
_PROMPTS_AT_ONCE = 64
_POSITIONS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class UnsteeredTexts:
    """Texts in each of which `n_tokens` tokens count (such as prompts with their unsteered greedy continuations), and
    the unsteered log-probabilities of every next token along those, float32 `[n_texts, n_tokens, vocab]`.

    In a continuation that ends earlier, what counts ends with its end-of-text token (`ForcedText.end`): what the model
    writes past its own end says nothing about its texts.
    """

    texts: tuple[ForcedText, ...]
    n_tokens: int
    logprobs: Tensor

    @property
    def counted(self) -> Tensor:
        """Which tokens of the continuations count, bool `[n_prompts, n_tokens]`."""
        return torch.arange(self.n_tokens) < torch.tensor([text.count for text in self.texts])[:, None]

    def __getitem__(self, chosen: slice) -> "UnsteeredTexts":
        return UnsteeredTexts(self.texts[chosen], self.n_tokens, self.logprobs[chosen])


def unsteered_texts(
    lm: LanguageModel,
    prompts: Sequence[Prompt],
    n_tokens: int = 20,
    *,
    raw: bool = False,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> UnsteeredTexts:
    """Continue `prompts` greedily by `n_tokens` tokens, or up to where the model ends its text, and read them.

    Raises `UsageError` where there is no prompt or an empty one.
    """
    if not prompts or not all(prompts):
        raise UsageError("KL needs prompts that are not empty; give at least one.")
    progress("Writing unsteered continuations to measure KL on")
    encoded = [lm.prompt_ids(prompt, raw=raw) for prompt in prompts]
    parts = [encoded[first : first + _PROMPTS_AT_ONCE] for first in range(0, len(encoded), _PROMPTS_AT_ONCE)]
    # By one process for all: what decodes beside a text can show in its last bits, and then in a token.
    texts = processes.agreed(lambda: [text for part in parts for text in _continued(lm, part, n_tokens, cancel)])
    return read_unsteered(lm, texts, n_tokens, cancel=cancel)


def read_unsteered(
    lm: LanguageModel, texts: Sequence[ForcedText], n_tokens: int, *, cancel: threading.Event | None = None
) -> UnsteeredTexts:
    """Read texts, in each of which `n_tokens` tokens count at most, without steering."""
    vocabulary = lm.model.config.get_text_config().vocab_size
    logprobs = torch.zeros(len(texts), n_tokens, vocabulary, device=lm.device)
    for found in forced_logits(lm, texts, [UNSTEERED] * len(texts), what=_WHAT, cancel=cancel):
        rows, steps = found.rows.to(lm.device), found.steps.to(lm.device)
        logprobs[rows, steps] = found.logits.log_softmax(-1).to(lm.device)
    if processes.count() > 1:
        logprobs = processes.summed(logprobs.cpu()).to(lm.device)
    return UnsteeredTexts(tuple(texts), n_tokens, logprobs)


def _continued(
    lm: LanguageModel, prompts: Sequence[list[int]], n_tokens: int, cancel: threading.Event | None
) -> list[ForcedText]:
    greedy = Sampling(greedy=True)
    writings = [
        RowInFlight(ids, UNSTEERED, "all", n_tokens, Sampler(greedy, ""), RowText(lm.tokenizer, ())) for ids in prompts
    ]
    batch = Batch(lm, writings)
    while not batch.ended:
        check_cancelled(cancel, _WHAT)
        batch.step()
    ends = set(stop_ids(lm))
    texts = []
    for one in writings:
        end = next((place + 1 for place, token in enumerate(one.text.ids) if token in ends), len(one.text.ids))
        texts.append(ForcedText(one.ids[: len(one.prompt) + end], len(one.prompt), len(one.prompt) + end))
    return texts


def divergences(
    lm: LanguageModel,
    texts: UnsteeredTexts,
    recipes: Sequence[Recipe],
    *,
    cancel: threading.Event | None = None,
) -> Tensor:
    """KL(steered ‖ unsteered) at every token of the continuations under each recipe, all in the same batches.

    Returns float32 `[n_recipes, n_prompts, n_tokens]`, in nats: infinite where steering drove the model out of what
    its numbers can hold, NaN where a continuation has ended (see `UnsteeredTexts.counted`).
    """
    n_prompts = len(texts.texts)
    possible = [can_hold(lm, recipe) for recipe in recipes]
    if not all(possible):
        values = torch.where(texts.counted, torch.inf, torch.nan).repeat(len(recipes), 1, 1)
        if any(possible):
            values[possible] = divergences(lm, texts, list(compress(recipes, possible)), cancel=cancel)
        return values
    rows = [text for _ in recipes for text in texts.texts]
    found = torch.zeros(len(rows), texts.n_tokens)
    chosen = [recipe for recipe in recipes for _ in range(n_prompts)]
    with torch.inference_mode():
        for read in forced_logits(lm, rows, chosen, what=_WHAT, cancel=cancel):
            prompts = (read.rows % n_prompts).to(lm.device)
            steps = read.steps.to(lm.device)
            values = [
                kl(logits, texts.logprobs[at, step])
                for logits, at, step in zip(
                    *(one.split(_POSITIONS_AT_ONCE) for one in (read.logits, prompts, steps)), strict=True
                )
            ]
            found[read.rows, read.steps] = torch.cat(values).cpu().nan_to_num(nan=torch.inf, posinf=torch.inf)
    found = processes.summed(found).reshape(len(recipes), n_prompts, texts.n_tokens)
    return torch.where(texts.counted, found, torch.nan)


def kl(logits: Tensor, plain: Tensor) -> Tensor:
    """KL(steered ‖ unsteered) in nats, float32 `[n]`, from steered logits and unsteered log-probabilities, both float32
    `[n, vocab]`; never below 0, where rounding might bring it."""
    steered = logits.log_softmax(-1)
    return (steered.exp() * (steered - plain.to(steered.device))).sum(-1).clamp(min=0.0)


def kl_percentile(values: Iterable[float], percentile: float) -> float:
    """The percentile (0 to 100) of those `values` that are no NaN, by linear interpolation; infinite where it touches
    an infinite value."""
    ordered = sorted(value for value in values if not math.isnan(value))
    place = percentile / 100.0 * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low if low == high else low + (high - low) * (place - math.floor(place))
