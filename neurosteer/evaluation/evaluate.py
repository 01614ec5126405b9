"""What a recipe does and breaks at several strengths, beside its controls: the one measurement that receipts hold."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from neurosteer.artifacts.artifact import Artifact, check_model
from neurosteer.artifacts.provenance import Receipt
from neurosteer.artifacts.recipes import Recipe
from neurosteer.errors import ExamplesError, ModelError, UsageError
from neurosteer.evaluation.controls import Group, Kind, control_strengths, default_instructions, groups, moved
from neurosteer.evaluation.judges import Judge
from neurosteer.evaluation.matched_twins import MATCHED_ON, TwinMaker, Twins
from neurosteer.evaluation.metrics import KL_PERCENTILE, Sampled, difference, difference_from_twins, figures_of
from neurosteer.evaluation.receipts import Compared, Measured, receipt_of
from neurosteer.evaluation.texts import TextPlan, write_texts
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import sweep_prompts
from neurosteer.measuring.divergence import UnsteeredTexts, divergences, unsteered_texts
from neurosteer.measuring.preference import surprises
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Job, Progress, check_cancelled, silent
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row
from neurosteer.text import one_line, shown
from neurosteer.validation import check_count, is_finite

STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
MAX_STRENGTHS, MAX_PROMPTS, MAX_SAMPLES, MAX_TWINS, MAX_TOKENS = 41, 1000, 100, 100, 1024
KL_PROMPTS, KL_TOKENS = 16, 20
"""KL is measured on the first prompts, along their unsteered greedy continuations by so many tokens."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation writes and compares. Raises `UsageError` for what is out of its range.

    Args:
        prompts: what is continued or answered; 16 neutral ones when left out.
        strengths: strength 0 is always written too. Twins are written at −1 and +1 only (or at the weakest strength of
            either sign), for what more would cost.
        samples: texts per prompt.
        instructions: what asks in plain words for the behaviour, and for its opposite; by default what
            `controls.default_instructions` derives from the artifact's name.
        n_random: how many random twins; prompts and samples take them in turn, so that their figure is one of as many
            texts as the others. More than there are prompts to take turns are not made.
        n_permuted: how many twins built from shuffled labels, in turn too, where `evaluate` is given the examples that
            the artifact was built from.
        seed: of samples, twins and intervals: the same seed gives the same receipt.
        sampling: how tokens are drawn (by default at temperature 0.8); its own seed counts for nothing.
    """

    prompts: Sequence[str] | None = None
    strengths: Sequence[float] = STRENGTHS
    samples: int = 1
    max_new_tokens: int = 40
    instructions: tuple[str, str] | None = None
    n_random: int = 10
    n_permuted: int = 1
    seed: int = 0
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", tuple(sweep_prompts() if self.prompts is None else self.prompts))
        _check(self)

    @property
    def turns(self) -> int:
        """Among how many twins prompts and samples can take turns."""
        assert self.prompts is not None
        return len(self.prompts) + self.samples - 1


@dataclass(frozen=True)
class EvaluatedText:
    """One text and the judge's score of it. `prompt` is without the instruction of an instructed text; `draw` numbers
    the twins from 1."""

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
    settings: EvaluationSettings | None = None,
    examples: ContrastSet | None = None,
    out: Path | None = None,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
    **changes: Any,
) -> Evaluation:
    """Write every prompt under `recipe` at every strength and under its controls, and measure effect and damage.

    Args:
        recipe: an artifact at strength 1, or several at their strengths, all of which `strengths` multiply.
        judge: tells whether a text shows the behaviour; `judges.judge_for` makes the default one.
        settings: what to write and compare; any of `EvaluationSettings` can be given by name instead: `prompts`,
            `strengths`, `samples`, `max_new_tokens`, `instructions`, `n_random`, `n_permuted`, `seed`, `sampling`.
        examples: the labelled texts that the artifact was built from: then it is also compared with what the same
            method makes of them with shuffled labels. With others, or none, the receipt says why it is not.
        out: a folder to which texts are written as they come. Called again with the same settings, `evaluate` goes on
            where it was cut; the judge may be another one.

    Raises:
        UsageError: an argument out of its range, a judge whose scores are no numbers from 0 to 1, or `out` cannot be
            used.
        MismatchError: an artifact was made on a model of another shape.
        Cancelled: `cancel` was set; finished texts stay in `out`.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.of(recipe)
    asked = replace(settings or EvaluationSettings(), **changes)
    if not recipe.uses:
        raise UsageError("The recipe is empty; there is nothing to evaluate.")
    for use in recipe.uses:
        check_model(use.artifact, lm.reference)
    assert asked.prompts is not None
    progress("Measuring KL")
    kl_texts = unsteered_texts(lm, asked.prompts[:KL_PROMPTS], KL_TOKENS, cancel=cancel)
    steered = [Group("steered", strength, (recipe.scaled(strength),)) for strength in moved(asked.strengths)]
    kl = dict(zip(steered, _nats(lm, kl_texts, [group.recipes[0] for group in steered], cancel), strict=True))
    maker = TwinMaker(
        lm, recipe, control_strengths(asked.strengths), kl_texts,
        {group.strength: nats for group, nats in kl.items()}, asked.seed, Job(progress, cancel),
    )  # fmt: skip
    twins, why = _twins(maker, asked, examples)
    instructions = asked.instructions or default_instructions(recipe)
    at = {key: tuple(one.recipe for one in some) for key, some in twins.items()}
    plan = TextPlan(
        tuple(groups(recipe, asked.strengths, instructions, at)), tuple(asked.prompts), asked.samples,
        asked.max_new_tokens, replace(asked.sampling or Sampling(), seed=asked.seed),
    )  # fmt: skip
    rows = write_texts(lm, plan, out=out, progress=progress, cancel=cancel)
    progress("Judging the texts")
    texts = _judged(judge, plan, rows)
    progress("Measuring perplexity and repetition")
    nats = surprises(lm, [text.prompt for text in texts], [text.ids for text in texts], cancel=cancel).numpy()
    sampled = _sampled(plan, texts, nats, kl | _in_turn(lm, kl_texts, plan, cancel))
    check_cancelled(cancel, "The evaluation")
    others = {
        "permuted": {"n": max(len(some) if kind == "permuted" else 0 for (kind, _), some in twins.items()),
                     "why_not": why},
        "instructions": list(instructions),
        "kl": {"n_prompts": len(kl_texts.texts), "n_tokens": KL_TOKENS, "percentile": KL_PERCENTILE,
               "matched_on": min(MATCHED_ON, len(kl_texts.texts))},
    }  # fmt: skip
    measured, compared = _measured(sampled, twins, judge, asked.seed), _compared(sampled, asked.seed)
    receipt = receipt_of(lm, recipe, judge, plan, measured, compared, settings=others)
    return Evaluation(receipt, tuple(texts), _measured_artifact(recipe, receipt))


# --- arguments -------------------------------------------------------------------------------------------------------


def _check(asked: EvaluationSettings) -> None:
    prompts, instructions = asked.prompts, asked.instructions
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise UsageError("The prompts of an evaluation must be texts that are not empty; give at least one.")
    if len(set(prompts)) < len(prompts):
        raise UsageError("A prompt stands twice; give each once, and ask for more samples instead.")
    for strength in asked.strengths:
        if not is_finite(strength):
            raise UsageError(f"A strength is {shown(strength)}; it must be a finite number.")
    if not any(asked.strengths):
        raise UsageError("The strengths hold no other than 0; give at least one, like -1,0,1.")
    check_count("the number of strengths", len(asked.strengths), 1, MAX_STRENGTHS)
    check_count("the number of prompts", len(prompts), 1, MAX_PROMPTS)
    check_count("samples", asked.samples, 1, MAX_SAMPLES)
    check_count("max_new_tokens", asked.max_new_tokens, 1, MAX_TOKENS)
    check_count("n_random", asked.n_random, 1, MAX_TWINS)
    check_count("n_permuted", asked.n_permuted, 0, MAX_TWINS)
    if instructions is not None and not (len(instructions) == 2 and all(one.strip() for one in instructions)):
        raise UsageError("The instructions must be two texts: what asks for the behaviour, and for its opposite.")


# --- controls --------------------------------------------------------------------------------------------------------


def _twins(maker: TwinMaker, asked: EvaluationSettings, examples: ContrastSet | None) -> tuple[Twins, str]:
    """The twins, and why there are none of shuffled labels (empty where there are)."""
    found = maker.random(min(asked.n_random, asked.turns))
    if examples is None or not asked.n_permuted:
        return found, "no labelled texts were given" if examples is None else "none were asked for"
    if len(maker.recipe.uses) > 1:
        return found, "the recipe has several artifacts"
    try:
        return found | maker.permuted(min(asked.n_permuted, asked.turns), examples), ""
    except (ExamplesError, ModelError, UsageError) as error:
        return found, one_line(error)


def _nats(
    lm: LanguageModel, texts: UnsteeredTexts, recipes: Sequence[Recipe], cancel: threading.Event | None
) -> np.ndarray:
    """`[n_recipes, n_prompts, n_tokens]`."""
    return divergences(lm, texts, recipes, cancel=cancel).double().numpy()


def _in_turn(
    lm: LanguageModel, texts: UnsteeredTexts, plan: TextPlan, cancel: threading.Event | None
) -> dict[Group, np.ndarray]:
    """Nats `[n_prompts, n_tokens]` of the groups that have twins, which take the prompts in turn."""
    found: dict[Group, np.ndarray] = {}
    for group in (group for group in plan.groups if group.has_twins):
        count = len(group.recipes)
        parts = [
            _nats(lm, texts[draw::count], [group.recipes[draw]], cancel)[0]
            for draw in range(min(count, len(texts.texts)))
        ]
        found[group] = np.concatenate(parts)
    return found


# --- measuring -------------------------------------------------------------------------------------------------------


def _judged(judge: Judge, plan: TextPlan, rows: Sequence[Row]) -> list[EvaluatedText]:
    scores = list(judge.scores([row.text for row in rows]))
    if len(scores) != len(rows) or not all(isinstance(score, (int, float)) and 0 <= score <= 1 for score in scores):
        raise UsageError(
            f"The judge {judge.name[:80]!r} must return a number from 0 to 1 for each of {len(rows)} texts."
        )
    per_group = len(plan.prompts) * plan.samples
    found = []
    for place, (row, score) in enumerate(zip(rows, scores, strict=True)):
        group, number = plan.groups[place // per_group], place % per_group // plan.samples
        draw = group.turn(number, row.sample) + 1 if group.has_twins else 0
        written = (row.sample, row.text, row.ids, row.finish, float(score))
        found.append(EvaluatedText(group.kind, group.strength, draw, plan.prompts[number], *written))
    return found


def _sampled(
    plan: TextPlan, texts: Sequence[EvaluatedText], nats: np.ndarray, kl: Mapping[Group, np.ndarray]
) -> dict[Group, Sampled]:
    shape = len(plan.prompts), plan.samples
    size = shape[0] * shape[1]
    found = {}
    for place, group in enumerate(plan.groups):
        own = slice(place * size, (place + 1) * size)
        found[group] = Sampled(
            plan.prompts,
            tuple(text.text for text in texts[own]),
            tuple(text.ids for text in texts[own]),
            np.array([text.score for text in texts[own]]).reshape(shape),
            nats[own].reshape(shape),
            np.zeros(1) if group.kind in ("unsteered", "again") else kl.get(group),
            np.array([text.draw for text in texts[own]]).reshape(shape) if len(group.recipes) > 1 else None,
        )
    return found


def _measured(sampled: Mapping[Group, Sampled], twins: Twins, judge: Judge, seed: int) -> list[Measured]:
    """Figures of every group."""
    plain = _of(sampled, "unsteered", 0.0)
    measured = []
    for group, found in sampled.items():
        sign = 1.0 if group.again else group.strength
        own = twins[group.kind, group.strength] if group.has_twins else ()  # type: ignore[index]
        measured.append(Measured(group.kind, group.strength, figures_of(found, plain, sign, judge, seed), own))
    return measured


def _compared(sampled: Mapping[Group, Sampled], seed: int) -> list[Compared]:
    """The steered texts from those steered the other way, and from the twins at the same strength."""
    plain, found = _of(sampled, "unsteered", 0.0), []
    ends = sorted(group.strength for group in sampled if group.kind == "random")
    if len(ends) == 2:
        up, down = (_of(sampled, "steered", end) for end in reversed(ends))
        found.append(Compared(ends[1], "steered", ends[0], difference(up, down, seed)))
    for group in (group for group in sampled if group.has_twins):
        own, at = _of(sampled, "steered", group.strength), group.strength
        found.append(Compared(at, group.kind, at, difference_from_twins(own, sampled[group], plain, at, seed)))
    return found


def _of(sampled: Mapping[Group, Sampled], kind: Kind, strength: float) -> Sampled:
    return next(found for group, found in sampled.items() if (group.kind, group.strength) == (kind, strength))


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
