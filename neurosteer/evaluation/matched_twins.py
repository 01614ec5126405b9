"""Twins of a recipe, brought to its KL at the strengths they are compared at: random ones, and label-permuted ones."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.twins import random_recipe
from neurosteer.building.build import build
from neurosteer.errors import UsageError
from neurosteer.evaluation.controls import TwinKind
from neurosteer.examples.contrast_set import HOLD_OUT_SEED, ContrastSet
from neurosteer.measuring.calibration import PERCENTILE
from neurosteer.measuring.divergence import UnsteeredTexts, kl_percentile
from neurosteer.measuring.equal_kl import AtKL, at_kl
from neurosteer.measuring.spreads import neuron_spreads
from neurosteer.methods import METHODS
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Job

MATCHED_ON = 8
"""On the continuations of how many prompts each twin is brought to the artifact's KL."""

_TARGETS = 1e-6, 50.0
"""Nats: below, steering is none; above, there is nothing left of the model to compare."""

Twins = dict[tuple[TwinKind, float], tuple[AtKL, ...]]
"""By what they are and the strength they are compared at."""


@dataclass(frozen=True)
class TwinMaker:
    """Makes twins of `recipe` for comparison at `strengths`; `texts` are what KL is measured on, `nats` by strength
    that of the recipe along them, `[n_prompts, n_tokens]`."""

    lm: LanguageModel
    recipe: Recipe
    strengths: Sequence[float]
    texts: UnsteeredTexts
    nats: Mapping[float, np.ndarray]
    seed: int
    job: Job

    def random(self, count: int) -> Twins:
        layers = sorted({layer for use in self.recipe.uses for layer in _shifted(use.artifact)})
        spreads = neuron_spreads(self.lm, layers, self.texts[:MATCHED_ON]) if layers else None
        return self._matched(
            "random", [random_recipe(self.recipe, self._draw(n), spreads=spreads) for n in range(count)]
        )

    def permuted(self, count: int, examples: ContrastSet) -> Twins:
        """Raises `UsageError` (or another of the library's) where the recipe cannot be built anew from `examples`."""
        (use,) = self.recipe.uses
        made = []
        for number in range(count):
            self.job.progress("Building a twin from shuffled labels")
            twin = permuted_twin(self.lm, use.artifact, examples, self._draw(number), self.job)
            made.append(Recipe((replace(use, artifact=twin),)))
        return self._matched("permuted", made)

    def _draw(self, number: int) -> int:
        return self.seed * 1_000_003 + number + 1

    def _matched(self, kind: TwinKind, twins: Sequence[Recipe]) -> Twins:
        """All at the recipe's KL. The first of them is brought there alone: from its strength the others begin."""
        texts, nats = self.texts[:MATCHED_ON], [self.nats[strength][:MATCHED_ON] for strength in self.strengths]
        targets = [float(np.clip(kl_percentile(one.ravel().tolist(), PERCENTILE), *_TARGETS)) for one in nats]
        scaled = [[twin.scaled(strength) for strength in self.strengths] for twin in twins]
        first = at_kl(self.lm, scaled[0], targets, texts, **self.job.named)
        rest = [one for some in scaled[1:] for one in some]
        start = [one.factor for one in first] * (len(twins) - 1)
        every = [*first, *at_kl(self.lm, rest, targets * (len(twins) - 1), texts, start=start, **self.job.named)]
        n_strengths = len(self.strengths)
        return {(kind, at): tuple(every[place::n_strengths]) for place, at in enumerate(self.strengths)}


def permuted_twin(lm: LanguageModel, artifact: Artifact, examples: ContrastSet, seed: int, job: Job) -> Artifact:
    """What `artifact` would be had the labels of its texts been drawn by chance: built by the same method, at the same
    layers, from the same texts. Raises `UsageError` where it was not built from `examples`, or by no method."""
    source = artifact.provenance
    if source.examples_sha256 != examples.sha256:
        raise UsageError(f"{artifact.name!r} was built from other texts than {examples.name[:60]!r}.")
    if artifact.method not in METHODS:
        raise UsageError(
            f"{artifact.name!r} was made by {artifact.method[:40]!r}, which builds from no labelled texts."
        )
    texts = examples.parts(source.hold_out, seed=HOLD_OUT_SEED)[0] if source.hold_out else examples
    given = {key: value for key, value in artifact.parameters.items() if key in METHODS[artifact.method].defaults}
    layers = artifact.parameters.get("searched_layers", artifact.layers)
    if isinstance(given.get("sae"), Mapping):  # as `build` writes it: names by layer
        layers, given["sae"] = sorted(map(int, given["sae"])), list(given["sae"].values())
    built = build(
        lm,
        with_permuted_labels(texts, seed),
        method=artifact.method,
        layers=layers,
        framing=source.framing or None,  # type: ignore[arg-type]
        tokens=source.tokens or None,  # type: ignore[arg-type]
        calibrate=False,
        **job.named,
        **given,
    )
    return replace(built, operation=artifact.operation, calibration=artifact.calibration)  # type: ignore[arg-type]


def with_permuted_labels(examples: ContrastSet, seed: int) -> ContrastSet:
    """The same texts, as many of each class, labelled by chance; of a pair, either text may be the positive one."""
    rng, count = random.Random(seed), len(examples.positive)
    texts = [*examples.positive, *examples.negative]
    prompts = [*examples.positive_prompts, *examples.negative_prompts]
    if examples.paired:
        drawn = [rng.sample((place, count + place), 2) for place in range(count)]
        places = [*(pair[0] for pair in drawn), *(pair[1] for pair in drawn)]
    else:
        places = rng.sample(range(len(texts)), len(texts))
    shuffled = tuple(texts[place] for place in places)
    asked = tuple(prompts[place] for place in places) if prompts else ()
    return replace(
        examples, positive=shuffled[:count], negative=shuffled[count:],
        positive_prompts=asked[:count], negative_prompts=asked[count:],
    )  # fmt: skip


def _shifted(artifact: Artifact) -> list[int]:
    """Layers of which neurons' spreads are wanted."""
    return artifact.layers if isinstance(artifact, NeuronCircuit) and artifact.operation == "shift" else []
