"""Options that the verbs about circuits and the shell share, and what is done with them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neurosteer.cli.choices import Attention, Metric
from neurosteer.cli.inputs import given_prompts
from neurosteer.cli.options import PromptOption, RawOption, artifact_names
from neurosteer.errors import UsageError
from neurosteer.progress import Progress

if TYPE_CHECKING:
    from neurosteer.artifacts.circuit import NeuronCircuit
    from neurosteer.artifacts.vector import SteeringVector
    from neurosteer.circuits import Attribution, Selection
    from neurosteer.models.language_model import LanguageModel

_counting = partial(typer.Option, rich_help_panel="What counts")
_taking = partial(typer.Option, rich_help_panel="How many neurons (one of these)")


@dataclass(frozen=True)
class QuestionOptions:
    """What the model is asked, and the next tokens that matter."""

    target: Annotated[
        list[str],
        typer.Option(
            "--target", "-t", metavar="TOKEN", help="The next token, like ' Paris'; one for all prompts, or one each."
        ),
    ]
    prompt: PromptOption = None
    counterfactual: Annotated[
        list[str] | None,
        typer.Option(
            "--counterfactual",
            "-c",
            metavar="TOKEN",
            help="What it is held against; the best other token when left out.",
        ),
    ] = None
    raw: RawOption = False

    def prompts(self) -> list[str]:
        """Raises `UsageError` where there is none."""
        return given_prompts(self.prompt)


@dataclass(frozen=True)
class AttributionOptions:
    """How neurons are given their share in an answer."""

    metric: Annotated[Metric, _counting(help="The difference from the counterfactual, or the logit.")] = "difference"
    attention: Annotated[Attention, _counting(help="frozen: with a constant pattern.")] = "full"
    seed_response: Annotated[str, _counting(metavar="TEXT", help="How the answer begins, before the target.")] = ""
    keep_universal: Annotated[
        bool, _counting("--keep-universal", help="Count neurons that fire whatever the text is about, too.")
    ] = False
    specific: Annotated[
        bool, _counting("--specific", help="Leave out neurons, too, that everyday answers are owed to.")
    ] = False


@dataclass(frozen=True)
class SelectionOptions:
    """How many neurons are taken: one rule at most."""

    top_k: Annotated[int | None, _taking(help="The strongest, this many (200).")] = None
    share: Annotated[float | None, _taking(help="The fewest that make up this share (0 to 1).")] = None
    percent: Annotated[float | None, _taking(help="Those of this percentage of the metric.")] = None
    per_layer: Annotated[int | None, _taking(help="The strongest of every layer, this many.")] = None

    def rule(self) -> "Selection | None":
        """The rule of which an amount is given. Raises `UsageError` where several are, or one is out of its range."""
        from neurosteer.circuits import Selection

        given = {rule: amount for rule, amount in asdict(self).items() if amount is not None}
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} each say how many neurons to take; give one of them.")
        return next((Selection(rule, amount) for rule, amount in given.items()), None)  # type: ignore[arg-type]


CircuitOption = Annotated[
    str | None, typer.Option(metavar="REF", help="A circuit, as for --use.", autocompletion=artifact_names)
]


def attributed(
    lm: "LanguageModel", prompts: Sequence[str], question: QuestionOptions, how: AttributionOptions, progress: Progress
) -> "Attribution":
    """As `circuits.attribute` in the words of the options. Raises `UsageError` for --specific with --keep-universal."""
    from neurosteer.circuits import attribute

    if how.specific and how.keep_universal:
        raise UsageError("--specific leaves out neurons that --keep-universal keeps; give one of them.")
    others = _one_or_each(question.counterfactual) if question.counterfactual else None
    targets = _one_or_each(question.target)
    return attribute(lm, prompts, targets, others, raw=question.raw, progress=progress, **asdict(how))


def _one_or_each(texts: Sequence[str]) -> str | Sequence[str]:
    return texts[0] if len(texts) == 1 else texts


def circuit_of(reference: str) -> "NeuronCircuit":
    """The circuit that `reference` names. Raises `UsageError` where it is a vector."""
    from neurosteer.artifacts.circuit import NeuronCircuit

    return _of_kind(reference, NeuronCircuit)


def vector_of(reference: str) -> "SteeringVector":
    """The vector that `reference` names. Raises `UsageError` where it is a circuit."""
    from neurosteer.artifacts.vector import SteeringVector

    return _of_kind(reference, SteeringVector)


def _of_kind(reference: str, kind: type[Any]) -> Any:
    from neurosteer.hub.references import resolve

    found = resolve(reference)
    if not isinstance(found, kind):
        raise UsageError(f"{reference[:200]!r} is a {found.kind}; a {kind.kind} is needed.")
    return found
