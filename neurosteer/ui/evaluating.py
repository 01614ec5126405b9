"""What an evaluation on the page may ask for, and who may judge: the same for the Evaluate tab and for programs."""

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from neurosteer.errors import UsageError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import bundled_sets, neutral_prompts
from neurosteer.ui.limits import (
    MAX_EVALUATED_PROMPTS,
    MAX_EVALUATED_SAMPLES,
    MAX_EVALUATED_STRENGTHS,
    MAX_EVALUATED_TEXTS,
    MAX_EVALUATED_TOKENS,
    MAX_JUDGE_CHARACTERS,
    MAX_PROMPT,
)

if TYPE_CHECKING:
    from neurosteer.artifacts.artifact import Artifact
    from neurosteer.artifacts.recipes import Recipe
    from neurosteer.evaluation import Judge, JudgeRequest

KIND = "evaluate"
N_PROMPTS, N_TOKENS, STRENGTHS = 8, 30, "-2, -1, 0, 1, 2"
MOST_RANDOM = 10


class Plan(NamedTuple):
    """What to write."""

    prompts: str
    n_prompts: float
    strengths: str
    samples: float
    tokens: float
    n_random: float
    more: str
    less: str
    seed: float


def options_of(plan: Plan) -> dict[str, Any]:
    """The arguments of `evaluate`. Raises `UsageError` for what is more than the page takes."""
    lines = list(dict.fromkeys(line.strip() for line in plan.prompts.splitlines() if line.strip()))
    instructions = (plan.more.strip(), plan.less.strip())
    if any(instructions) and not all(instructions):
        raise UsageError("One of the two instructions is empty; write both, or neither.")
    options = {
        "prompts": tuple(lines) if lines else neutral(int(plan.n_prompts)),
        "strengths": strengths_of(plan.strengths),
        "samples": int(plan.samples),
        "max_new_tokens": int(plan.tokens),
        "n_random": int(plan.n_random),
        "instructions": instructions if all(instructions) else None,
        "seed": int(plan.seed or 0),
    }
    check_size(options)
    return options


def strengths_of(text: str) -> tuple[float, ...]:
    """Numbers parted by commas. Raises `UsageError`."""
    try:
        return tuple(float(part.replace("−", "-")) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"The strengths are {text[:60]!r}; give numbers parted by commas, like -1, 0, 1.") from error


def neutral(count: int) -> tuple[str, ...]:
    """So many of the bundled prompts, half of them instructions, half openings."""
    prompts = neutral_prompts()
    half = len(prompts) // 2
    return prompts[: count - count // 2] + prompts[half : half + count // 2]


def check_size(options: dict[str, Any]) -> None:
    """Raise `UsageError` for an evaluation that is larger than the page takes."""
    from neurosteer.evaluation.controls import n_groups

    prompts = options["prompts"]
    for what, count, most in (
        ("prompts", len(prompts), MAX_EVALUATED_PROMPTS),
        ("strengths", len(options["strengths"]), MAX_EVALUATED_STRENGTHS),
        ("samples", options["samples"], MAX_EVALUATED_SAMPLES),
        ("tokens a text", options["max_new_tokens"], MAX_EVALUATED_TOKENS),
        ("random twins", options["n_random"], MOST_RANDOM),
    ):
        if not 1 <= count <= most:
            raise UsageError(f"{count:,} {what} are asked for; give 1 to {most}.")
    longest = max(map(len, prompts))
    if longest > MAX_PROMPT:
        raise UsageError(f"A prompt has {longest:,} characters; this page takes {MAX_PROMPT:,}.")
    texts = n_groups(options["strengths"]) * len(prompts) * options["samples"]
    if texts > MAX_EVALUATED_TEXTS:
        raise UsageError(
            f"That is {texts:,} texts with the controls; this page writes {MAX_EVALUATED_TEXTS}. Give fewer prompts, "
            "strengths or samples."
        )


def made(asked: "JudgeRequest", recipe: "Recipe", cancel: threading.Event) -> "Judge":
    """The judge asked for. Raises the library's errors, and `UsageError` for more texts than the page takes."""
    examples = asked.training
    if examples is not None:
        check_judges_texts(examples)
        if name := built_from_all(recipe, examples):
            raise UsageError(seen(name, examples.name))
    return asked.judge(recipe, cancel)


def check_judges_texts(examples: ContrastSet) -> None:
    """Raises `UsageError` for more texts than the page trains a judge on."""
    characters = sum(map(len, (*examples.positive, *examples.negative)))
    if characters > MAX_JUDGE_CHARACTERS:
        raise UsageError(
            f"The labelled texts have {characters:,} characters; this page takes {MAX_JUDGE_CHARACTERS:,} for a judge."
        )


def built_from_all(recipe: "Recipe", examples: ContrastSet) -> str | None:
    """The name of an artifact that no text of `examples` was held out of."""
    uses = [use.artifact for use in recipe.uses if use.artifact.provenance.examples_sha256 == examples.sha256]
    return next((artifact.name for artifact in uses if artifact.provenance.hold_out <= 0), None)


def seen(name: str, examples: str) -> str:
    """Why texts that the artifact `name` was built from cannot judge it, and what can."""
    return (
        f"{name!r} was built from all texts of {examples[:60]!r}, so they cannot judge it: use other labelled texts, "
        "or build it anew with half of them kept for judging (Build, Advanced; keep_half for programs)."
    )


def sets_about(artifacts: Sequence["Artifact"]) -> list[str]:
    """The ready-made sets that one of `artifacts` was built from, or is named like."""
    sources = {artifact.provenance.examples for artifact in artifacts}
    names = " ".join(artifact.name for artifact in artifacts)
    return [name for name in bundled_sets() if name in sources or name in names]
