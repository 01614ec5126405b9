"""What steering does to how likely the model finds texts of one class against texts of the other, without a judge."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.errors import UsageError
from neurosteer.models.language_model import Framing, LanguageModel
from neurosteer.steering.forcing import ForcedText, forced_logits

MAX_TEXT_TOKENS = 128


@dataclass(frozen=True)
class LabelledText(ForcedText):
    """A text of the positive or the negative class."""

    positive: bool


@dataclass(frozen=True)
class Preference:
    """In nats per token. `effect` is the preference for positive over negative texts (the difference of the mean
    log-probability per token) at the first recipe minus that at the second, halved; `damage` is how much less likely
    the texts of both classes become, on average over the two."""

    effect: float
    damage: float


def labelled_texts(
    lm: LanguageModel, positive: Sequence[str], negative: Sequence[str], framing: Framing, *, name: str
) -> list[LabelledText]:
    """The texts under a framing, without those of which no token has one before it. `name` is what to call them.

    Raises `UsageError` where nothing is left of a class.
    """
    both = [(text, True) for text in positive] + [(text, False) for text in negative]
    framed = lm.frame([text for text, _ in both], framing, max_tokens=MAX_TEXT_TOKENS)
    after = _tokens_after_text(lm) if framing == "prompt" else 0
    found = [
        LabelledText(item.ids, max(item.start, 1), len(item.ids) - after, side)
        for item, (_, side) in zip(framed, both, strict=True)
    ]
    texts = [text for text in found if text.count > 0]
    for side in (True, False):
        if not any(text.positive == side for text in texts):
            raise UsageError(
                f"No held-out {'positive' if side else 'negative'} text of {name!r} is longer than one token; "
                "there is nothing to measure an effect on. Give longer texts."
            )
    return texts


def preferences(
    lm: LanguageModel,
    texts: Sequence[LabelledText],
    pairs: Sequence[tuple[Recipe, Recipe]],
    *,
    plain: Tensor | None = None,
    what: str = "Measuring",
    cancel: threading.Event | None = None,
) -> list[Preference]:
    """Effect and damage of each pair of recipes (strength +1 and −1), all in the same batches.

    `plain` `[n_texts]` are the texts' log-likelihoods without steering, where they are known.
    """
    if plain is None:
        plain = log_likelihoods(lm, texts, [UNSTEERED], what=what, cancel=cancel)[0]
    steered = log_likelihoods(lm, texts, [recipe for pair in pairs for recipe in pair], what=what, cancel=cancel)
    return [_preference(texts, plain, two) for two in steered.split(2)]


def log_likelihoods(
    lm: LanguageModel,
    texts: Sequence[ForcedText],
    recipes: Sequence[Recipe],
    *,
    what: str = "Measuring",
    cancel: threading.Event | None = None,
) -> Tensor:
    """Of each text's counted tokens together under each recipe, float64 `[n_recipes, n_texts]`; teacher-forced."""
    rows = [text for _ in recipes for text in texts]
    chosen = [recipe for recipe in recipes for _ in texts]
    found = torch.zeros(len(rows), dtype=torch.float64)
    for read in forced_logits(lm, rows, chosen, what=what, cancel=cancel):
        scores = read.logits.gather(1, read.targets[:, None])[:, 0] - read.logits.logsumexp(1)
        found.index_add_(0, read.rows, scores.double().cpu())
    return found.reshape(len(recipes), len(texts))


def _preference(texts: Sequence[LabelledText], plain: Tensor, steered: Tensor) -> Preference:
    """From log-likelihoods of the texts: `plain` `[n]`, `steered` `[2, n]`."""
    counts = torch.tensor([text.count for text in texts], dtype=torch.float64)
    positive = torch.tensor([text.positive for text in texts])
    likelier = [steered[:, side].sum(1) / counts[side].sum() for side in (positive, ~positive)]
    up, down = (likelier[0] - likelier[1]).tolist()
    damage = (plain.sum() - steered.sum(1)).mean() / counts.sum()
    return Preference((up - down) / 2, float(damage))


def _tokens_after_text(lm: LanguageModel) -> int:
    """How many tokens the chat template writes behind a user's text: what two different prompts end in alike."""
    one, other = (lm.prompt_ids(text)[::-1] for text in ("A", "?"))
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
