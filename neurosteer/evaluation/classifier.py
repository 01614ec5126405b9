"""A classifier of texts, and how often it is right on labelled texts that it was not trained on."""

import random
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from neurosteer.errors import UsageError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.progress import check_cancelled

MAX_CHARACTERS = 5_000_000
"""Of the texts that a classifier is trained on: what it costs, in time and memory, grows with them."""

_FOLDS = 5
_BUCKETS = 1 << 18  # for words and for characters; what is not known beforehand need not be kept to be counted


class Fitted:
    """Words (1 to 2) and characters (2 to 5) weighted by TF-IDF, and logistic regression on both; those that none of
    the texts holds which it was fitted to do not count. Made from those texts' `counts` and labels."""

    def __init__(self, counts: Sequence[Any], labels: np.ndarray) -> None:
        from sklearn.feature_extraction.text import TfidfTransformer
        from sklearn.linear_model import LogisticRegression

        self._columns = [np.unique(kind.indices) for kind in counts]
        self._weights = [
            TfidfTransformer(sublinear_tf=True).fit(kind[:, columns])
            for kind, columns in zip(counts, self._columns, strict=True)
        ]
        self._regression = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")
        self._regression.fit(self._weighted(counts), labels)

    def probabilities(self, counts: Sequence[Any]) -> np.ndarray:
        """Of the positive class, `[n_texts]`."""
        return self._regression.predict_proba(self._weighted(counts))[:, 1]

    def _weighted(self, counts: Sequence[Any]) -> Any:
        from scipy.sparse import hstack

        kinds = zip(counts, self._columns, self._weights, strict=True)
        return hstack([weights.transform(kind[:, columns]) for kind, columns, weights in kinds], format="csr")


def counted(texts: Sequence[str]) -> list[Any]:
    """How often each text holds words and characters: two sparse matrices `[n_texts, buckets]`."""
    from sklearn.feature_extraction.text import HashingVectorizer

    raw: dict[str, Any] = {"alternate_sign": False, "norm": None, "n_features": _BUCKETS}
    words = HashingVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", **raw)
    characters = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), **raw)
    return [kind.transform(list(texts)) for kind in (words, characters)]


def fit(examples: ContrastSet, seed: int, cancel: threading.Event | None) -> tuple[Fitted, np.ndarray]:
    """A classifier fitted to all of `examples`, and for each of its texts (positive ones first) what another said of it
    that was fitted without its part: one of up to 5 parts, drawn with `seed`, in which pairs stay together. Words are
    counted once for all of them.

    Raises `UsageError` where the texts hold no word, or too many; `Cancelled` when `cancel` is set between two fits.
    """
    texts, labels = [*examples.positive, *examples.negative], labels_of(examples)
    if (size := sum(map(len, texts))) > MAX_CHARACTERS:
        raise UsageError(
            f"The labelled texts have {size:,} characters; give at most {MAX_CHARACTERS:,} to train a judge on."
        )
    counts = counted(texts)
    if not all(kind.nnz for kind in counts):  # nothing but punctuation
        raise UsageError(f"No judge can be trained on the texts of {examples.name[:60]!r}: they hold no word.")
    verdicts = np.zeros(len(texts), dtype=bool)
    for part in folds(examples, seed):
        check_cancelled(cancel, "Training the judge")
        rest = np.setdiff1d(np.arange(len(texts)), part)
        if not counts[0][rest].nnz:
            continue  # whose words are all in the part: nothing can be said of it
        other = Fitted([kind[rest] for kind in counts], labels[rest])
        verdicts[part] = other.probabilities([kind[part] for kind in counts]) >= 0.5
    check_cancelled(cancel, "Training the judge")
    return Fitted(counts, labels), verdicts


def folds(examples: ContrastSet, seed: int) -> list[np.ndarray]:
    """Positions in positive + negative texts, in up to 5 parts that each hold about as much of either class."""
    counts = len(examples.positive), len(examples.negative)
    n_folds = min(_FOLDS, *counts)
    rng = random.Random(seed)
    orders = [rng.sample(range(count), count) for count in counts]
    if examples.paired:
        orders[1] = orders[0]
    parts = [
        [*orders[0][fold::n_folds], *(counts[0] + place for place in orders[1][fold::n_folds])]
        for fold in range(n_folds)
    ]
    return [np.array(sorted(part)) for part in parts]


def labels_of(examples: ContrastSet) -> np.ndarray:
    return np.array([1] * len(examples.positive) + [0] * len(examples.negative))
