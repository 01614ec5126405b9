"""Figures of a group of texts: what a judge says of them, and what they have lost.

A group is the texts of all prompts and samples under one recipe at one strength. Prompts are what intervals are
about: another set of prompts would have given other figures.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neurosteer.evaluation.intervals import Estimate, difference_interval, mean_interval, share_interval
from neurosteer.evaluation.judges import Judge
from neurosteer.measuring.divergence import kl_percentile

KL_PERCENTILE = 95
_FEWEST_TO_REPEAT = 8
_LEAST_INFORMED = 0.1
"""A judge's sensitivity and specificity must come to so much more than 1, or a share cannot be corrected for them."""


@dataclass(frozen=True, eq=False)
class Sampled:
    """A group's texts and what was measured of each: `scores` `[n_prompts, n_samples]` of the judge, `nats` of the same
    shape, how surprising each text is to the unsteered model; `texts` and `ids` in the same order, flat. `kl` is the
    divergence in nats at every token of the prompts' unsteered continuations, where the group is steered. `twins`, of
    the shape of `scores`, says which twin wrote each text, where several did."""

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    scores: np.ndarray
    nats: np.ndarray
    kl: np.ndarray | None = None
    twins: np.ndarray | None = None

    @property
    def verdicts(self) -> np.ndarray:
        """Whether each text shows the behaviour, 0 or 1, `[n_prompts, n_samples]`."""
        return (self.scores >= 0.5).astype(float)


@dataclass(frozen=True)
class Figures:
    """Figures of a group. Shares and means are of the judge's scores; `corrected` is the share that a judge who is
    always right would have found. `change` is that of the share from the unsteered texts, over the same prompts.
    `wrong_way` is a share of prompts, `kl_p95` in nats, `perplexity` relative to the unsteered texts', `tokens` a mean
    per text, `off_script` a share of texts. None where there is nothing to compare with, or where numbers left what
    floats can hold."""

    n_texts: int
    share: Estimate
    mean: Estimate
    corrected: Estimate | None
    change: Estimate | None
    wrong_way: float | None
    kl_p95: float | None
    perplexity: float | None
    quality: float
    distinct_2: float
    tokens: float
    off_script: float


@dataclass(frozen=True)
class Difference:
    """How much more a group's texts show the behaviour than another's of the same prompts. Where the other are twins',
    `twin_mean` and `twin_sd` are of the twins' changes from the unsteered texts, and `z` says how many `twin_sd` the
    group's own change lies above `twin_mean`, in the direction that was meant."""

    share: Estimate
    twin_mean: float | None = None
    twin_sd: float | None = None
    z: float | None = None

    def is_clear(self, sign: float) -> bool:
        """Whether the whole interval lies in the direction that was meant."""
        return self.share.low > 0 if sign > 0 else self.share.high < 0


def figures_of(group: Sampled, plain: Sampled, sign: float, judge: Judge, seed: int) -> Figures:
    """Figures of `group` against the unsteered group `plain` of the same prompts. `sign` says which way the behaviour
    was to move; 0 for the unsteered texts themselves."""
    moved = sign != 0
    prompts = [prompt for prompt in group.prompts for _ in range(group.scores.shape[1])]
    share = share_interval(group.verdicts, group.twins)
    return Figures(
        n_texts=len(group.texts),
        share=share,
        mean=mean_interval(group.scores, group.twins),
        corrected=corrected(share, judge),
        change=difference(group, plain, seed).share if moved else None,
        wrong_way=wrong_way_rate(group.scores.mean(1), plain.scores.mean(1), sign) if moved else None,
        kl_p95=_kl_p95(group.kl) if moved else 0.0,
        perplexity=_perplexity(group, plain),
        quality=quality(group.ids),
        distinct_2=distinct(group.ids),
        tokens=float(np.mean(list(map(len, group.ids)))),
        off_script=float(np.mean([is_off_script(*one) for one in zip(prompts, group.texts, group.ids, strict=True)])),
    )


def difference(group: Sampled, other: Sampled, seed: int) -> Difference:
    """Of texts of the same prompts and samples, which share their random numbers."""
    if group.scores.shape != other.scores.shape:  # then prompts are all that they share
        return Difference(difference_interval((group.verdicts.mean(1) - other.verdicts.mean(1))[:, None], seed))
    twins = other.twins if other.twins is not None else group.twins
    return Difference(difference_interval(group.verdicts - other.verdicts, seed, twins))


def difference_from_twins(group: Sampled, twins: Sampled, plain: Sampled, sign: float, seed: int) -> Difference:
    found = difference(group, twins, seed)
    if twins.twins is None:
        return found
    changes = twins.verdicts - plain.verdicts
    effects = [float(changes[twins.twins == twin].mean()) for twin in np.unique(twins.twins)]
    mean, sd = float(np.mean(effects)), float(np.std(effects, ddof=1)) if len(effects) > 1 else 0.0
    own = float((group.verdicts - plain.verdicts).mean())
    return Difference(found.share, mean, sd, math.copysign(1, sign) * (own - mean) / sd if sd > 0 else None)


def corrected(share: Estimate, judge: Judge) -> Estimate | None:
    """The share with its interval as a judge who is always right would find it: what this one calls positive is
    `sensitivity` of the texts that are, and 1 − `specificity` of the others (Rogan and Gladen 1978). None where the
    judge's are not known, or where it hardly tells the two apart. How well they are known is not in the interval."""
    sensitivity, specificity = (getattr(judge, name, None) for name in ("sensitivity", "specificity"))
    if sensitivity is None or specificity is None or sensitivity + specificity - 1 < _LEAST_INFORMED:
        return None
    informed = sensitivity + specificity - 1
    ends = (min(max((end + specificity - 1) / informed, 0.0), 1.0) for end in (share.value, share.low, share.high))
    return Estimate(*ends)


def _kl_p95(nats: np.ndarray | None) -> float | None:
    value = math.inf if nats is None else kl_percentile(nats.ravel().tolist(), KL_PERCENTILE)
    return value if math.isfinite(value) else None


def _perplexity(group: Sampled, plain: Sampled) -> float | None:
    """The ratio of perplexities, each over all tokens of the texts."""
    counts = [sum(map(len, one.ids)) for one in (group, plain)]
    if not all(counts):
        return None
    own, before = (float(one.nats.sum()) / count for one, count in zip((group, plain), counts, strict=True))
    value = float(np.exp(np.float64(own - before)))
    return value if math.isfinite(value) else None


def wrong_way_rate(scores: np.ndarray, plain: np.ndarray, sign: float) -> float:
    """The share of prompts whose mean score, `[n_prompts]`, moved against `sign` from what it was unsteered. One that
    stayed where it was did not."""
    return float(((scores - plain) * sign < 0).mean())


def quality(ids: Sequence[Sequence[int]], n: int = 4) -> float:
    """Different n-grams of tokens over all of them, in each text by itself, averaged over the texts that have one; 1
    where none has. 1 means that nothing is repeated. Tokens, because not all scripts put spaces between words."""
    shares = [len(set(grams)) / len(grams) for text in ids if (grams := _grams(text, n))]
    return sum(shares) / len(shares) if shares else 1.0


def distinct(ids: Sequence[Sequence[int]], n: int = 2) -> float:
    """Different n-grams of tokens over all of them, in all texts together (Li et al., arXiv 1510.03055); 0 where there
    are none. It falls with the number of texts: compare groups of the same size."""
    grams = [gram for text in ids for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def is_off_script(prompt: str, text: str, ids: Sequence[int] = ()) -> bool:
    """Whether `text` is no answer in the prompt's script at all. That is any of:

    - nothing but white space;
    - fewer than half of its visible characters are letters or digits;
    - fewer than half of its letters are of the scripts of the prompt's letters (Latin, Cyrillic, Han, …; another
      language in the same script is not noticed);
    - at least 8 tokens (`ids`), more than half of them the same one.
    """
    visible = [char for char in text if not char.isspace()]
    if not visible or 2 * sum(map(_is_word_like, visible)) < len(visible):
        return True
    letters = [char for char in visible if char.isalpha()]
    expected = {_script(char) for char in prompt if char.isalpha()}
    if letters and expected and 2 * sum(_script(char) in expected for char in letters) < len(letters):
        return True
    most = max(Counter(ids).values(), default=0)
    return len(ids) >= _FEWEST_TO_REPEAT and 2 * most > len(ids)


def _is_word_like(char: str) -> bool:
    return char.isalnum() or unicodedata.category(char).startswith("M")  # marks belong to the letters before them


def _script(char: str) -> str:
    """The script of a letter, as the first word of its Unicode name ('LATIN', 'CJK'); the three of Japanese are one."""
    name = unicodedata.name(char, "").partition(" ")[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else name


def _grams(ids: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(ids[first : first + n]) for first in range(len(ids) - n + 1)]
