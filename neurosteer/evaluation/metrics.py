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

from neurosteer.measuring.divergence import kl_percentile

N_RESAMPLES = 2000
KL_PERCENTILE = 95
LEVEL = 0.95
_FEWEST_TO_REPEAT = 8


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its bootstrap interval of 95%."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Sampled:
    """A group's texts and what was measured of each: `scores` `[n_prompts, n_samples]` of the judge, `nats` of the same
    shape, how surprising each text is to the unsteered model; `texts` and `ids` in the same order, flat. `kl` is the
    divergence in nats at every token of the prompts' unsteered continuations, where the group is steered."""

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    scores: np.ndarray
    nats: np.ndarray
    kl: np.ndarray | None = None

    @property
    def verdicts(self) -> np.ndarray:
        """Per prompt the share of texts that show the behaviour, `[n_prompts]`."""
        return (self.scores >= 0.5).mean(1)


@dataclass(frozen=True)
class Figures:
    """Figures of a group. Shares and means are of the judge's scores; `change` is that of the share from the unsteered
    texts, over the same prompts. `wrong_way` is a share of prompts, `kl_p95` in nats, `perplexity` relative to the
    unsteered texts', `tokens` a mean per text, `off_script` a share of texts. None where there is nothing to compare
    with, or where numbers left what floats can hold."""

    n_texts: int
    share: Estimate
    mean: Estimate
    change: Estimate | None
    wrong_way: float | None
    kl_p95: float | None
    perplexity: float | None
    quality: float
    distinct_2: float
    tokens: float
    off_script: float


def figures(group: Sampled, plain: Sampled, sign: float, seed: int) -> Figures:
    """Figures of `group` against the unsteered group `plain` of the same prompts. `sign` says which way the behaviour
    was to move; 0 for the unsteered texts themselves."""
    means, moved = group.scores.mean(1), sign != 0
    prompts = [prompt for prompt in group.prompts for _ in range(group.scores.shape[1])]
    return Figures(
        n_texts=len(group.texts),
        share=bootstrap(group.verdicts, seed),
        mean=bootstrap(means, seed),
        change=bootstrap(group.verdicts - plain.verdicts, seed) if moved else None,
        wrong_way=wrong_way_rate(means, plain.scores.mean(1), sign) if moved else None,
        kl_p95=_kl_p95(group.kl) if moved else 0.0,
        perplexity=_perplexity(group, plain),
        quality=quality(group.texts),
        distinct_2=distinct(group.texts),
        tokens=float(np.mean(list(map(len, group.ids)))),
        off_script=float(np.mean([is_off_script(*one) for one in zip(prompts, group.texts, group.ids, strict=True)])),
    )


def _kl_p95(nats: np.ndarray | None) -> float | None:
    if nats is None:
        return None
    value = kl_percentile(nats.flatten().tolist(), KL_PERCENTILE)
    return value if math.isfinite(value) else None


def _perplexity(group: Sampled, plain: Sampled) -> float | None:
    """The ratio of perplexities, each over all tokens of the texts."""
    counts = [sum(map(len, one.ids)) for one in (group, plain)]
    if not all(counts):
        return None
    own, before = (float(one.nats.sum()) / count for one, count in zip((group, plain), counts, strict=True))
    value = float(np.exp(np.float64(own - before)))
    return value if math.isfinite(value) else None


def bootstrap(values: np.ndarray, seed: int) -> Estimate:
    """The mean of `values` `[n_prompts]`, and the middle 95% of the means of 2,000 sets of as many prompts drawn from
    them with replacement. The same seed draws the same sets, so figures of the same prompts are resampled alike.

    Where all values are equal, so are the ends: the interval of a share of 0 or 1 is too narrow.
    """
    places = np.random.default_rng(seed).integers(0, len(values), size=(N_RESAMPLES, len(values)))
    low, high = np.quantile(values[places].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(values.mean()), float(low), float(high))


def wrong_way_rate(scores: np.ndarray, plain: np.ndarray, sign: float) -> float:
    """The share of prompts whose mean score, `[n_prompts]`, moved against `sign` from what it was unsteered. One that
    stayed where it was did not."""
    return float(((scores - plain) * sign < 0).mean())


def quality(texts: Sequence[str], n: int = 4) -> float:
    """Different n-grams of words over all of them, in each text by itself, averaged over the texts that have one; 1
    where none has. 1 means that nothing is repeated."""
    shares = [len(set(grams)) / len(grams) for text in texts if (grams := _grams(text, n))]
    return sum(shares) / len(shares) if shares else 1.0


def distinct(texts: Sequence[str], n: int = 2) -> float:
    """Different n-grams of words over all of them, in all texts together (Li et al., arXiv 1510.03055); 0 where there
    are none. It falls with the number of texts: compare groups of the same size."""
    grams = [gram for text in texts for gram in _grams(text, n)]
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


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return [tuple(words[first : first + n]) for first in range(len(words) - n + 1)]
