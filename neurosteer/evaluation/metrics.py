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
    """Figures of a group (or of several random twins together). Shares and means are of the judge's scores; `change` is
    that of the share from the unsteered texts, over the same prompts. `wrong_way` is a share of prompts, `kl_p95` in
    nats, `perplexity` relative to the unsteered texts', `tokens` a mean per text, `off_script` a share of texts. None
    where there is nothing to compare with, or where numbers left what floats can hold."""

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


def figures(groups: Sequence[Sampled], plain: Sampled, sign: float, seed: int) -> Figures:
    """Figures of `groups`, over the same prompts and pooled, against the unsteered group `plain`. `sign` says which way
    the behaviour was to move; 0 for the unsteered texts themselves."""
    scores = np.concatenate([group.scores for group in groups], axis=1)
    verdicts = (scores >= 0.5).mean(1)
    texts = [text for group in groups for text in group.texts]
    ids = [tokens for group in groups for tokens in group.ids]
    prompts = [prompt for group in groups for prompt in group.prompts for _ in range(group.scores.shape[1])]
    moved = sign != 0
    return Figures(
        n_texts=len(texts),
        share=bootstrap(verdicts, seed),
        mean=bootstrap(scores.mean(1), seed),
        change=bootstrap(verdicts - plain.verdicts, seed) if moved else None,
        wrong_way=wrong_way_rate(scores.mean(1), plain.scores.mean(1), sign) if moved else None,
        kl_p95=_kl_p95([group.kl for group in groups if group.kl is not None]) if moved else 0.0,
        perplexity=_perplexity(groups, plain),
        quality=quality(texts),
        distinct_2=float(np.mean([distinct(group.texts) for group in groups])),
        tokens=float(np.mean(list(map(len, ids)))),
        off_script=float(np.mean([is_off_script(*one) for one in zip(prompts, texts, ids, strict=True)])),
    )


def _kl_p95(found: Sequence[np.ndarray]) -> float | None:
    if not found:
        return None
    with np.errstate(invalid="ignore"):  # between two infinite values lies none
        value = float(np.quantile(np.concatenate([nats.ravel() for nats in found]), KL_PERCENTILE / 100))
    return value if math.isfinite(value) else None


def _perplexity(groups: Sequence[Sampled], plain: Sampled) -> float | None:
    """The ratio of perplexities, each over all tokens of the texts."""
    counts = [sum(len(ids) for group in some for ids in group.ids) for some in (groups, [plain])]
    if not all(counts):
        return None
    means = [
        sum(float(group.nats.sum()) for group in some) / count
        for some, count in zip((groups, [plain]), counts, strict=True)
    ]
    value = float(np.exp(np.float64(means[0] - means[1])))
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
