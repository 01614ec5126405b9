"""What a few texts say an artifact is worth that was built from the model's own answers to an instruction."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from neurosteer import processes
from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import Recipe
from neurosteer.building.described import asked_to, check_instructions
from neurosteer.evaluation.intervals import Estimate, share_interval
from neurosteer.evaluation.judges import WEAK_BELOW, TextClassifier
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import sweep_prompts
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session

_PROMPTS, _SAMPLES, TEXT_TOKENS = 8, 2, 40
N_TEXTS = 5 * _PROMPTS * _SAMPLES


@dataclass(frozen=True)
class Worth:
    """Shares of texts that read as the answers under `instruct` do, on prompts that the examples do not have.

    `steered` by strength −1, 0 and +1, `told` under the instruction against it (−1) and for it (+1). `judge_right` is
    the judge's accuracy: how often answers under the two instructions are told apart, by words alone.
    """

    steered: dict[float, Estimate]
    told: dict[float, Estimate]
    judge_right: float
    n_texts: int

    @property
    def sentences(self) -> tuple[str, ...]:
        """In words, with what to do where it is worth little."""
        shares = " / ".join(f"{self.steered[strength].value:.0%}" for strength in (-1.0, 0.0, 1.0))
        told = " / ".join(f"{self.told[strength].value:.0%}" for strength in (-1.0, 1.0))
        found = [
            f"On {self.n_texts} texts each, for other prompts, as described: {shares} at −1 / 0 / +1; told in plain "
            f"words {told}. The judge, trained on the answers, is right on {self.judge_right:.0%} of them."
        ]
        if self.judge_right < WEAK_BELOW:
            found.append("The model hardly does what it is told, so this says little: give examples instead.")
        elif self.steered[1.0].low <= self.steered[-1.0].high:
            found.append("That is no clear effect: more answers, other words, or examples may do better.")
        return tuple(found)


def worth_of(
    lm: LanguageModel,
    artifact: Artifact,
    examples: ContrastSet,
    instruct: str,
    against: str,
    *,
    seed: int = 0,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> Worth:
    """Write 16 texts of 40 tokens for each of five ways, on 8 prompts that nothing was built from, and judge them by a
    classifier trained on `examples`, the answers themselves. Raises `UsageError` as training a judge does,
    `ExamplesError` for instructions that say nothing, `MismatchError` as steering does, `Cancelled`."""
    judge = TextClassifier.train(examples, cancel=cancel)
    return judged(judge, worth_texts(lm, artifact, instruct, against, seed=seed, progress=progress, cancel=cancel))


def worth_texts(
    lm: LanguageModel,
    artifact: Artifact,
    instruct: str,
    against: str,
    *,
    seed: int = 0,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> list[str]:
    """The texts that `worth_of` judges, the ways outermost: strength −1, 0, +1, then told otherwise and told so."""
    check_instructions(instruct, against)
    ways = [(Recipe.of((artifact, strength)), "") for strength in (-1.0, 0.0, 1.0)]
    ways += [(Recipe(()), instruction) for instruction in (against, instruct)]
    rows = [
        Row(asked_to(told, prompt) if told else prompt, recipe, sample)
        for recipe, told in ways
        for prompt in sweep_prompts()[::2][:_PROMPTS]
        for sample in range(_SAMPLES)
    ]
    progress("Measuring what it is worth")
    given: dict[str, Any] = {"max_new_tokens": TEXT_TOKENS, "sampling": Sampling(seed=seed), "cancel": cancel}
    written = processes.shared_out(rows, lambda mine: Session(lm).generate(mine, **given))
    check_cancelled(cancel, "Measuring")
    return [row.text for row in written]


def judged(judge: TextClassifier, texts: Sequence[str]) -> Worth:
    """What the texts of `worth_texts` say."""
    verdicts = (np.array(judge.scores(texts)) >= 0.5).astype(float).reshape(-1, _PROMPTS, _SAMPLES)
    shares = [share_interval(group) for group in verdicts]
    assert judge.accuracy is not None
    return Worth(
        dict(zip((-1.0, 0.0, 1.0), shares[:3], strict=True)),
        dict(zip((-1.0, 1.0), shares[3:], strict=True)),
        judge.accuracy,
        _PROMPTS * _SAMPLES,
    )
