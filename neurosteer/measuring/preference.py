"""What steering does to how likely the model finds texts of one class against texts of the other, without a judge."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from neurosteer import processes
from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.errors import UsageError
from neurosteer.models.language_model import Framing, LanguageModel, Prompt
from neurosteer.steering.forcing import ForcedText, forced_logits

MAX_TEXT_TOKENS = 128


@dataclass(frozen=True)
class LabelledText(ForcedText):
    """A text of the positive or the negative class."""

    positive: bool


@dataclass(frozen=True, eq=False)
class Preference:
    """What a recipe's two signs do to labelled texts, in nats per token. Every text weighs the same, long or short.

    `shifts` `[n_texts]` is how much likelier per token the first recipe makes each text than the second does, halved;
    `losses` `[n_texts]` how much less likely the two make it, on average, than it is without steering. Both float64;
    `positive` `[n_texts]` tells the classes apart.
    """

    shifts: Tensor
    losses: Tensor
    positive: Tensor

    @cached_property
    def effect(self) -> float:
        """How far the preference moves towards the positive texts: their mean shift minus that of the negative ones."""
        return float(self.shifts[self.positive].mean() - self.shifts[~self.positive].mean())

    @cached_property
    def error(self) -> float:
        """The standard error of `effect` over texts; 0 where a class has a single text, which tells nothing of it."""
        return _error(self.shifts, self.positive)

    @cached_property
    def damage(self) -> float:
        """How much less likely texts become: the mean of the two classes' mean losses."""
        return float((self.losses[self.positive].mean() + self.losses[~self.positive].mean()) / 2)

    def error_of_difference(self, other: "Preference") -> float:
        """The standard error of the difference of two effects on the same texts, paired text by text."""
        return _error(self.shifts - other.shifts, self.positive)


def _error(values: Tensor, positive: Tensor) -> float:
    """The standard error of the difference of two means."""
    parts = [values[side] for side in (positive, ~positive)]
    return float(sum(part.var() / len(part) for part in parts if len(part) > 1)) ** 0.5


def labelled_texts(
    lm: LanguageModel,
    positive: Sequence[str],
    negative: Sequence[str],
    framing: Framing,
    *,
    name: str,
    prompts: Sequence[Prompt] | None = None,
) -> list[LabelledText]:
    """The texts under a framing, without those of which no token has one before it. `name` is what to call them,
    `prompts` what the positive ones and then the negative ones answer.

    Raises `UsageError` where nothing is left of a class.
    """
    both = [(text, True) for text in positive] + [(text, False) for text in negative]
    framed = lm.frame([text for text, _ in both], framing, max_tokens=MAX_TEXT_TOKENS, prompts=prompts)
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
    counts = torch.tensor([text.count for text in texts], dtype=torch.float64)
    positive = torch.tensor([text.positive for text in texts])
    return [
        Preference((up - down) / (2 * counts), (plain - (up + down) / 2) / counts, positive)
        for up, down in steered.split(2)
    ]


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
        found.index_add_(0, read.rows, scores.cpu().double())
    return processes.summed(found).reshape(len(recipes), len(texts))


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


def _tokens_after_text(lm: LanguageModel) -> int:
    """How many tokens the chat template writes behind a user's text: what two different prompts end in alike."""
    one, other = (lm.prompt_ids(text)[::-1] for text in ("A", "?"))
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)
