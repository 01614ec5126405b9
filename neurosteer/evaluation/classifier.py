"""A classifier of texts, and how often it is right on labelled texts that it was not trained on."""

import random
import threading
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
    """Words (1 to 2) and characters (2 to 5) weighted by TF-IDF, and logistic regression on both."""

    def __init__(self, features: Any, columns: np.ndarray, regression: Any) -> None:
        self._features, self._columns, self._regression = features, columns, regression

    def probabilities(self, texts: list[str]) -> np.ndarray:
        """Of the positive class, `[n_texts]`."""
        return self._regression.predict_proba(self._features.transform(texts)[:, self._columns])[:, 1]


def fit(examples: ContrastSet, seed: int, cancel: threading.Event | None) -> tuple[Fitted, np.ndarray]:
    """A classifier trained on all of `examples`, and for each of its texts (positive ones first) what another said of
    it that was trained without its part: one of up to 5 parts, drawn with `seed`, in which pairs stay together. Words
    are counted once for all of them: how rare a word is says nothing about labels.

    Raises `UsageError` where the texts hold no word, or too many; `Cancelled` when `cancel` is set between two fits.
    """
    texts, labels = [*examples.positive, *examples.negative], labels_of(examples)
    if (size := sum(map(len, texts))) > MAX_CHARACTERS:
        raise UsageError(
            f"The labelled texts have {size:,} characters; give at most {MAX_CHARACTERS:,} to train a judge on."
        )
    features = _features()
    counted = features.fit_transform(texts)
    if counted[:, :_BUCKETS].nnz == 0:  # nothing but punctuation
        raise UsageError(f"No judge can be trained on the texts of {examples.name[:60]!r}: they hold no word.")
    columns = np.unique(counted.indices)
    counted = counted[:, columns]
    verdicts = np.zeros(len(texts), dtype=bool)
    for part in folds(examples, seed):
        check_cancelled(cancel, "Training the judge")
        rest = np.setdiff1d(np.arange(len(texts)), part)
        other = _regression().fit(counted[rest], labels[rest])
        verdicts[part] = other.predict_proba(counted[part])[:, 1] >= 0.5
    check_cancelled(cancel, "Training the judge")
    return Fitted(features, columns, _regression().fit(counted, labels)), verdicts


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


def _features() -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.pipeline import make_pipeline, make_union

    raw: dict[str, Any] = {"alternate_sign": False, "norm": None, "n_features": _BUCKETS}
    words = HashingVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", **raw)
    characters = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), **raw)
    return make_union(*(make_pipeline(one, TfidfTransformer(sublinear_tf=True)) for one in (words, characters)))


def _regression() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")
