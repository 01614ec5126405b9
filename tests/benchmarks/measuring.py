"""Measures shared by the benchmarks: a judge trained on other texts, repetition, and KL from the unsteered model."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union
from torch import Tensor

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.strength import Calibration
from neurosteer.artifacts.twins import random_twin
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.measuring.divergence import divergences, kl_percentile, unsteered_texts
from neurosteer.measuring.equal_kl import at_kl
from neurosteer.measuring.spreads import neuron_spreads
from neurosteer.models.language_model import LanguageModel
from neurosteer.steering.plans import applied, compile_plan


class Judge:
    """TF-IDF (words 1 to 2, characters 2 to 5) and logistic regression: is a text of the positive class?"""

    def __init__(self, examples: ContrastSet) -> None:
        words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
        characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True)
        self.pipeline = make_pipeline(make_union(words, characters), LogisticRegression(C=10.0, max_iter=1000))
        texts = [*examples.positive, *examples.negative]
        self.pipeline.fit(texts, [1] * len(examples.positive) + [0] * len(examples.negative))

    def share_positive(self, texts: Sequence[str]) -> float:
        """Share of `texts` called positive, in percent."""
        return 100.0 * float(self.pipeline.predict(list(texts)).mean())

    def accuracy(self, examples: ContrastSet) -> float:
        """Accuracy on labelled texts it has not seen, in percent."""
        right = self.pipeline.predict(list(examples.positive)).sum()
        right += len(examples.negative) - self.pipeline.predict(list(examples.negative)).sum()
        return 100.0 * float(right) / (len(examples.positive) + len(examples.negative))


def twin_at_same_kl(lm: LanguageModel, artifact: Artifact, prompts: Sequence[str], seed: int = 0) -> Artifact:
    """A random twin whose strengths −1 and +1 come to the KL that the artifact's come to on `prompts`, each by itself;
    neurons are shifted by as much of their own spread as the artifact's are."""
    texts = unsteered_texts(lm, prompts)
    spreads = neuron_spreads(lm, artifact.layers, texts) if isinstance(artifact, NeuronCircuit) else None
    twin = random_twin(artifact, seed, spreads=spreads)
    recipes = [Recipe.of((artifact, strength)) for strength in (1.0, -1.0)]
    targets = [kl_percentile(nats.flatten().tolist(), 95.0) for nats in divergences(lm, texts, recipes)]
    found = at_kl(lm, [Recipe.of((twin, strength)) for strength in (1.0, -1.0)], targets, texts)
    up, down = (abs(one.recipe.uses[0].amount) for one in found)
    return replace(twin, name=f"random-{artifact.name}", calibration=Calibration(up, amount_down=down))


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes by the clock."""
    started = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def quality(texts: Sequence[str], n: int = 4) -> float:
    """Distinct 4-grams of words / 4-grams, over each text by itself, averaged over the texts that have one."""
    shares = []
    for text in texts:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / max(1, len(shares))


@dataclass(frozen=True)
class Continuation:
    """A left-padded batch of prompts with their unsteered greedy continuations and log-probabilities on those."""

    ids: Tensor
    mask: Tensor
    width: int
    logprobs: Tensor


def unsteered_continuation(lm: LanguageModel, prompts: Sequence[str], tokens: int = 20) -> Continuation:
    """Greedy continuations of `tokens` tokens, all kept at that length."""
    encoded = [lm.prompt_ids(prompt) for prompt in prompts]
    width = max(map(len, encoded))
    ids = torch.full((len(encoded), width), lm.pad_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(encoded):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask = ids.to(lm.device), mask.to(lm.device)
    with torch.inference_mode():
        full = lm.model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
    mask = torch.cat([mask, mask.new_ones(len(encoded), full.shape[1] - width)], 1)
    return Continuation(full, mask, width, _logprobs(lm, full, mask, width, None))


def kl_p95(lm: LanguageModel, continuation: Continuation, recipe: Recipe) -> float:
    """95th percentile over tokens of KL(steered ‖ unsteered) of the next token, in nats."""
    steered = _logprobs(lm, continuation.ids, continuation.mask, continuation.width, recipe)
    divergence = (steered.exp() * (steered - continuation.logprobs)).sum(-1)
    return float(divergence.flatten().quantile(0.95))


def _logprobs(lm: LanguageModel, ids: Tensor, mask: Tensor, width: int, recipe: Recipe | None) -> Tensor:
    plan = compile_plan(lm, [recipe or Recipe()] * len(ids))
    with torch.inference_mode(), applied(lm, plan, mask.bool()):
        logits = lm.model(input_ids=ids, attention_mask=mask, logits_to_keep=ids.shape[1] - width + 1).logits
    return torch.log_softmax(logits[:, :-1].float(), -1)
