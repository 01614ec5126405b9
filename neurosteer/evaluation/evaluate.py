"""What a recipe does and breaks at several strengths, beside its controls: the one measurement that receipts hold."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from neurosteer.artifacts.artifact import Artifact, check_model
from neurosteer.artifacts.provenance import Receipt
from neurosteer.artifacts.recipes import Recipe
from neurosteer.errors import UsageError
from neurosteer.evaluation.controls import Group, Kind, default_instructions, groups
from neurosteer.evaluation.damage import surprises
from neurosteer.evaluation.judges import Judge
from neurosteer.evaluation.metrics import Sampled, figures
from neurosteer.evaluation.receipts import Measured, receipt_of
from neurosteer.evaluation.texts import Writing, write_texts
from neurosteer.examples.files import sweep_prompts
from neurosteer.measuring.divergence import divergences, unsteered_texts
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
MAX_STRENGTHS, MAX_PROMPTS, MAX_SAMPLES, MAX_RANDOM, MAX_TOKENS = 41, 1000, 100, 20, 1024
KL_PROMPTS, KL_TOKENS = 16, 20
"""KL is measured on the first prompts, along their unsteered greedy continuations by so many tokens."""


@dataclass(frozen=True)
class EvaluatedText:
    """One text and the judge's score of it. `prompt` is without the instruction of an instructed text; `draw` numbers
    the random twins from 1."""

    kind: Kind
    strength: float
    draw: int
    prompt: str
    sample: int
    text: str
    ids: tuple[int, ...]
    finish: str
    score: float

    @property
    def tokens(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: the receipt, the texts behind it, and the artifact with the receipt on it where the recipe
    was one artifact at strength 1."""

    receipt: Receipt
    rows: tuple[EvaluatedText, ...]
    artifact: Artifact | None


def evaluate(
    lm: LanguageModel,
    recipe: Recipe | Artifact,
    judge: Judge,
    *,
    prompts: Sequence[str] | None = None,
    strengths: Sequence[float] = STRENGTHS,
    samples: int = 1,
    max_new_tokens: int = 40,
    instructions: tuple[str, str] | None = None,
    n_random: int = 3,
    seed: int = 0,
    sampling: Sampling | None = None,
    out: Path | None = None,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> Evaluation:
    """Write every prompt under `recipe` at every strength and under its controls, and measure effect and damage.

    Args:
        recipe: an artifact at strength 1, or several at their strengths, all of which `strengths` multiply.
        judge: tells whether a text shows the behaviour; `judges.judge_for` makes the default one.
        prompts: what is continued or answered; 16 neutral ones when left out.
        strengths: strength 0 is always written too. Random twins are written at −1 and +1 only (or at the weakest
            strength of either sign), for what more would cost.
        samples: texts per prompt.
        instructions: what asks in plain words for the behaviour, and for its opposite; by default what
            `controls.default_instructions` derives from the artifact's name.
        n_random: how many random twins; prompts and samples take them in turn, so that their figure is one of as many
            texts as the others.
        seed: of samples, random twins and intervals: the same seed gives the same receipt.
        sampling: how tokens are drawn (by default at temperature 0.8); its own seed counts for nothing.
        out: a folder to which texts are written as they come. Called again with the same settings, `evaluate` goes on
            where it was cut; the judge may be another one.

    Raises:
        UsageError: an argument out of its range, a judge whose scores are no numbers from 0 to 1, or `out` cannot be
            used.
        MismatchError: an artifact was made on a model of another shape.
        Cancelled: `cancel` was set; finished texts stay in `out`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.of(recipe)
    prompts = tuple(sweep_prompts() if prompts is None else prompts)
    _check(recipe, prompts, strengths, samples, max_new_tokens, n_random, instructions)
    for use in recipe.uses:
        check_model(use.artifact, lm.reference)
    asked = instructions or default_instructions(recipe)
    everything = groups(recipe, strengths, asked, n_random, seed)
    drawn = replace(sampling or Sampling(), seed=seed)
    writing = Writing(tuple(everything), prompts, samples, max_new_tokens, drawn)
    rows = write_texts(lm, writing, out=out, progress=progress, cancel=cancel)
    progress("Judging the texts")
    texts = _judged(judge, writing, rows)
    progress("Measuring perplexity and repetition")
    nats = surprises(lm, [text.prompt for text in texts], [text.ids for text in texts], cancel=cancel).numpy()
    progress("Measuring KL")
    kl = _divergences(lm, writing, cancel)
    check_cancelled(cancel, "The evaluation")
    measured = _measured(_sampled(writing, texts, nats, kl), seed)
    measured_on = {"n_prompts": min(len(prompts), KL_PROMPTS), "n_tokens": KL_TOKENS}
    receipt = receipt_of(lm, recipe, judge, writing, measured, instructions=asked, kl=measured_on)
    return Evaluation(receipt, tuple(texts), _measured_artifact(recipe, receipt))


# --- arguments -------------------------------------------------------------------------------------------------------


def _check(
    recipe: Recipe,
    prompts: Sequence[str],
    strengths: Sequence[float],
    samples: int,
    max_new_tokens: int,
    n_random: int,
    instructions: tuple[str, str] | None,
) -> None:
    if not recipe.uses:
        raise UsageError("The recipe is empty; there is nothing to evaluate.")
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise UsageError("The prompts of an evaluation must be texts that are not empty; give at least one.")
    if len(set(prompts)) < len(prompts):
        raise UsageError("A prompt stands twice; give each once, and ask for more samples instead.")
    for strength in strengths:
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not math.isfinite(strength):
            raise UsageError(f"A strength is {strength!r:.60}; it must be a finite number.")
    if not any(strengths):
        raise UsageError("The strengths hold no other than 0; give at least one, like -1,0,1.")
    counts = (
        ("strengths", len(strengths), MAX_STRENGTHS),
        ("prompts", len(prompts), MAX_PROMPTS),
        ("samples", samples, MAX_SAMPLES),
        ("max_new_tokens", max_new_tokens, MAX_TOKENS),
        ("n_random", n_random, MAX_RANDOM),
    )
    for name, count, most in counts:
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= most:
            raise UsageError(f"The number of {name} is {count!r:.40}; it must be a whole number from 1 to {most}.")
    if instructions is not None and not (len(instructions) == 2 and all(one.strip() for one in instructions)):
        raise UsageError("The instructions must be two texts: what asks for the behaviour, and for its opposite.")


# --- measuring -------------------------------------------------------------------------------------------------------


def _judged(judge: Judge, writing: Writing, rows: Sequence[Row]) -> list[EvaluatedText]:
    scores = list(judge.scores([row.text for row in rows]))
    if len(scores) != len(rows) or not all(isinstance(score, (int, float)) and 0 <= score <= 1 for score in scores):
        raise UsageError(
            f"The judge {judge.name[:80]!r} must return a number from 0 to 1 for each of {len(rows)} texts."
        )
    per_group = len(writing.prompts) * writing.samples
    found = []
    for place, (row, score) in enumerate(zip(rows, scores, strict=True)):
        group, number = writing.groups[place // per_group], place % per_group // writing.samples
        draw = group.turn(number, row.sample) + 1 if group.kind == "random" else 0
        written = (row.sample, row.text, row.ids, row.finish, float(score))
        found.append(EvaluatedText(group.kind, group.strength, draw, writing.prompts[number], *written))
    return found


def _divergences(lm: LanguageModel, writing: Writing, cancel: threading.Event | None) -> dict[Group, np.ndarray]:
    """Nats `[n_prompts, n_tokens]` of the groups that are steered; random twins take the prompts in turn."""
    texts = unsteered_texts(lm, writing.prompts[:KL_PROMPTS], KL_TOKENS, cancel=cancel)
    alone = [group for group in writing.groups if group.kind == "steered"]
    nats = divergences(lm, texts, [group.recipes[0] for group in alone], cancel=cancel)
    found = dict(zip(alone, nats.double().numpy(), strict=True))
    twins = [group for group in writing.groups if group.kind == "random"]
    n_twins = len(twins[0].recipes)
    parts: list[np.ndarray] = []
    for draw in range(min(n_twins, len(texts.texts))):
        nats = divergences(lm, texts[draw::n_twins], [group.recipes[draw] for group in twins], cancel=cancel)
        parts.append(nats.double().numpy())
    return found | dict(zip(twins, np.concatenate(parts, axis=1), strict=True))


def _sampled(
    writing: Writing, texts: Sequence[EvaluatedText], nats: np.ndarray, kl: dict[Group, np.ndarray]
) -> dict[Group, Sampled]:
    shape = len(writing.prompts), writing.samples
    size = shape[0] * shape[1]
    found = {}
    for place, group in enumerate(writing.groups):
        own = slice(place * size, (place + 1) * size)
        found[group] = Sampled(
            writing.prompts,
            tuple(text.text for text in texts[own]),
            tuple(text.ids for text in texts[own]),
            np.array([text.score for text in texts[own]]).reshape(shape),
            nats[own].reshape(shape),
            kl.get(group),
        )
    return found


def _measured(sampled: dict[Group, Sampled], seed: int) -> list[Measured]:
    """Figures of every group."""
    plain = next(found for group, found in sampled.items() if group.kind == "unsteered")
    measured = []
    for group, found in sampled.items():
        n_random = len(group.recipes) if group.kind == "random" else 0
        measured.append(Measured(group.kind, group.strength, n_random, figures(found, plain, group.strength, seed)))
    return measured


def _measured_artifact(recipe: Recipe, receipt: Receipt) -> Artifact | None:
    use = recipe.uses[0]
    if len(recipe.uses) > 1 or use.strength != 1.0 or use.multiplier is not None:
        return None
    return with_receipt(use.artifact, receipt)


def with_receipt(artifact: Artifact, receipt: Receipt) -> Artifact:
    """The artifact with the receipt, in place of an earlier one of the same settings and judge."""
    kept = [one for one in artifact.receipts if not _is_same(one, receipt)]
    return replace(artifact, receipts=(*kept, receipt))


def _is_same(one: Receipt, other: Receipt) -> bool:
    def key(receipt: Receipt) -> tuple[object, object]:
        settings, judge = receipt.data.get("settings"), receipt.data.get("judge")
        return (
            settings.get("sha256") if isinstance(settings, dict) else None,
            judge.get("name") if isinstance(judge, dict) else None,
        )

    return key(one) == key(other)
