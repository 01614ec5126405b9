"""Options and arguments that several verbs share: one word, one meaning. Those of one verb alone stand with it.

Where options always come together they are a dataclass, which a verb takes as one parameter (`grammar.flattened`).
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neurosteer.cli.choices import Dtype, Framing, Method, Quantization, ReadTokens
from neurosteer.cli.grammar import OUTPUT
from neurosteer.cli.places import files_place
from neurosteer.errors import NeuroSteerError, UsageError
from neurosteer.progress import Progress
from neurosteer.validation import check_positions

if TYPE_CHECKING:
    from neurosteer.artifacts.artifact import Artifact
    from neurosteer.examples.contrast_set import ContrastSet
    from neurosteer.models.language_model import LanguageModel
    from neurosteer.steering.decoding import Sampling

EXAMPLES = "How the examples are read"
# Options by the panel of the help that lists them. They are called as the parameter is, unless a name is given.
_model, _sampling, _reading, _described = (
    partial(typer.Option, rich_help_panel=name) for name in ("Model", "Sampling", EXAMPLES, "Described instead")
)


def _model_names(incomplete: str) -> Iterator[str]:
    from neurosteer.models.catalog import catalog

    return (model.name for model in catalog() if model.name.lower().startswith(incomplete.lower()))


def artifact_names(incomplete: str) -> Iterator[str]:
    """The released artifacts that begin so, for completion."""
    from neurosteer.examples.files import vectors_folder

    return (folder.name for folder in sorted(vectors_folder().glob(f"{incomplete}*")))


def _set_names(incomplete: str) -> Iterator[str]:
    from neurosteer.examples.files import bundled_sets

    return (name for name in bundled_sets() if name.startswith(incomplete))


ModelOption = Annotated[
    str | None,
    _model("--model", "-m", help="Catalog name, Hub id, folder or GGUF file.", autocompletion=_model_names),
]
RawOption = Annotated[bool, _model("--raw", help="No chat template.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.", rich_help_panel=OUTPUT)]


@dataclass(frozen=True)
class ModelOptions:
    """The model, and how it is loaded."""

    model: ModelOption = None
    revision: Annotated[str | None, _model(help="Branch, tag or commit on the Hub.")] = None
    device: Annotated[str | None, _model(help="cpu, cuda or cuda:N.")] = None
    dtype: Annotated[Dtype | None, _model(help="bfloat16 where that is fast, else float32.")] = None
    quantize: Annotated[Quantization | None, _model(help="Pack the weights, with bitsandbytes.")] = None

    def load(self, progress: Progress, made_on: str | None = None) -> "LanguageModel":
        """The model asked for; else `made_on`, else the default. Raises what `load_model` raises."""
        progress("Starting")  # what follows imports for seconds
        from neurosteer.models.loading import load_model

        return load_model(
            self.model or made_on,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            quantize=self.quantize,
            progress=progress,
        )


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen."""

    greedy: Annotated[bool, _sampling("--greedy", help="Always the likeliest token.")] = False
    temperature: Annotated[float, _sampling(help="Higher is more varied, up to 10; 0 is greedy.")] = 0.8
    top_p: Annotated[float, _sampling(help="Only the likeliest tokens that reach this probability.")] = 0.95
    repetition_penalty: Annotated[float, _sampling(help="Above 1: less of what was there; 1: off.")] = 1.0
    seed: Annotated[int, _sampling("--seed", "-s", help="Same seed, same text.")] = 0

    def sampling(self) -> "Sampling":
        """Raises `UsageError` for a number out of its range."""
        from neurosteer.steering.decoding import Sampling

        greedy = self.greedy or self.temperature == 0
        return Sampling(greedy, self.temperature or 1.0, self.top_p, self.repetition_penalty, self.seed)


@dataclass(frozen=True)
class ColumnOptions:
    """What a file of examples calls its columns, and what becomes of texts in both classes."""

    text: Annotated[str | None, _reading(metavar="COLUMN", help="The column of texts.")] = None
    label: Annotated[str | None, _reading(metavar="COLUMN", help="The column of labels.")] = None
    positive: Annotated[str | None, _reading(metavar="VALUE", help="The label of texts that show the behaviour.")] = (
        None
    )
    prompt_column: Annotated[
        str | None, _reading(metavar="COLUMN", help="What the texts answer; else prompt or question.")
    ] = None
    drop_conflicts: Annotated[bool, _reading("--drop-conflicts", help="Leave out texts in both classes.")] = False

    def read(self, examples: str, negative: str | None = None) -> "ContrastSet":
        """The examples of a file (or two), a bundled set or a data set on the Hub. Raises the library's errors."""
        from neurosteer.examples.columns import Columns
        from neurosteer.examples.reading import read_examples

        columns = Columns(self.text, self.label, self.positive, self.prompt_column)
        if negative is None and "/" in examples:
            from neurosteer.hub.datasets import is_dataset, read_dataset

            if is_dataset(examples):
                return read_dataset(examples, columns=columns, drop_conflicts=self.drop_conflicts)
        return read_examples(examples, negative, columns=columns, drop_conflicts=self.drop_conflicts)


@dataclass(frozen=True)
class DescribedOptions:
    """What the model is told, so that its own answers are the examples."""

    instruct: Annotated[
        str | None, _described(metavar="TEXT", help="What asks for the behaviour: 'Write like a pirate.'")
    ] = None
    against: Annotated[str | None, _described(metavar="TEXT", help="What asks for its opposite: 'Write plainly.'")] = (
        None
    )
    answers: Annotated[int, _described(metavar="N", help="Answers to each of 64 prompts, to either, 1 to 20.")] = 2
    save_examples: Annotated[
        Path | None,
        _described("--save-examples", metavar="FILE", help="Write the answers to a CSV to edit, and build nothing."),
    ] = None

    def check(self, examples: str | None, reading: ColumnOptions, negative: str | None) -> bool:
        """Whether there is a description. Raises `UsageError` unless there is either one or `examples`, and for options
        of the other."""
        if self.instruct is None and self.against is None:
            if examples is None:
                raise UsageError("There are no examples; name a file, or describe it (--instruct and --against).")
            if self.save_examples is not None:
                raise UsageError("--save-examples is for the answers to --instruct and --against; leave it out.")
            return False
        if examples is not None or negative is not None or reading != ColumnOptions():
            raise UsageError("There are both examples, or how to read them, and a description; give one of the two.")
        if self.instruct is None or self.against is None:
            raise UsageError("--instruct and --against go together; give what asks for it, and for its opposite.")
        return True

    def place(self) -> Path | None:
        """Where the answers alone are to be written, looked at before the work. Raises `UsageError` for a file that is
        there already: somebody may have edited it."""
        if self.save_examples is None:
            return None
        if self.save_examples.exists():
            raise UsageError(
                f"{str(self.save_examples)!r} exists; choose a file that does not, so that nothing is lost."
            )
        files_place(self.save_examples.parent)
        return self.save_examples

    def write(self, lm: "LanguageModel", progress: Progress) -> "ContrastSet":
        """The model's answers. Raises as `described_examples` does."""
        from neurosteer.building.described import described_examples

        assert self.instruct is not None and self.against is not None
        return described_examples(
            lm, self.instruct, self.against, samples=self.answers, name=described_name(self.instruct), progress=progress
        )

    def worth(
        self, lm: "LanguageModel", artifact: "Artifact", examples: "ContrastSet", progress: Progress
    ) -> tuple[str, ...]:
        """Sentences that say what an artifact built from the answers is worth; none where there is no description."""
        if self.instruct is None or self.against is None:
            return ()
        from neurosteer.evaluation.worth import worth_of

        try:
            return worth_of(lm, artifact, examples, self.instruct, self.against, progress=progress).sentences
        except NeuroSteerError as error:  # what was built is there all the same
            return (f"What it is worth could not be measured: {error}",)


def described_name(instruct: str) -> str:
    """What examples, and an artifact of them, are called after an instruction."""
    from neurosteer.artifacts.common import safe_name

    name = safe_name(instruct.lower())[:40].strip("-._")
    if re.search("[a-z0-9]", instruct.lower()):
        return name
    return f"described-{hashlib.sha256(instruct.encode()).hexdigest()[:8]}"  # another script has other names


@dataclass(frozen=True)
class JudgeOptions:
    """Who says which texts show the behaviour."""

    judge: Annotated[
        str | None,
        typer.Option(
            metavar="JUDGE", help="refusal, regex:PATTERN or words:ONE,TWO; else a classifier trained on --examples."
        ),
    ] = None
    examples: Annotated[
        str | None,
        typer.Option(
            metavar="EXAMPLES",
            help="Labelled texts for the judge, as for build: others than the artifact's, or held out.",
            autocompletion=_set_names,
        ),
    ] = None


# What an artifact is built from and how.
_examples = typer.Argument(
    metavar="EXAMPLES",
    help="A file of examples, a bundled set, or a data set on the Hub: user/name[:split] or "
    "hf://datasets/user/name/file.csv.",
    autocompletion=_set_names,
)
ExamplesArgument = Annotated[str, _examples]
ExamplesOrNone = Annotated[str | None, _examples]
NegativeOption = Annotated[
    str | None, typer.Option(metavar="FILE", help="With a file for each class: the negative one.")
]
MethodOption = Annotated[Method, typer.Option(help="How an artifact is made of activations.")]
FramingOption = Annotated[Framing | None, _reading(help="Each by itself, as a prompt or as an answer.")]
ReadTokensOption = Annotated[ReadTokens | None, _reading(help="The mean over a text's tokens, or the last one.")]
TargetKlOption = Annotated[
    float,
    typer.Option(
        help="What strength ±1 is to come to, in nats (95th percentile of KL).", rich_help_panel="What strength 1 means"
    ),
]

# Artifacts.
UseOption = Annotated[
    list[str],
    typer.Option(
        "--use", "-u",
        metavar="REF[:STRENGTH]",
        help="A folder, a name in vectors/, a Hub repo (user/repo[/name][@revision], or its address), or one SAE "
        "feature: SAE#INDEX adds it, SAE#INDEX=VALUE clamps it (SAE: embedded/LAYER, RELEASE/ID or a folder). May be "
        "given more than once, or as a recipe: 'sentiment:1 + formality:-0.5 @generated', 'circuit×0', "
        "'orthogonal(sentiment, formality)'.",
        autocompletion=artifact_names,
    ),
]  # fmt: skip
OrthogonaliseOption = Annotated[
    bool, typer.Option("--orthogonalise", help="Remove the overlap between the vectors used.")
]
PositionsOption = Annotated[
    str,
    typer.Option(
        callback=lambda given: check_positions(given),
        metavar="[all|prompt|generated|first:N|last:N]",
        help="Which tokens are steered: the prompt's (or its last ones), what is written (or its first).",
    ),
]
StrengthsOption = Annotated[
    str, typer.Option(metavar="NUMBERS", help="Factors on the strengths given, parted by commas.")
]

# What is written.
PromptOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", metavar="TEXT", help="May be given more than once; - reads standard input."),
]
PromptsOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="A text file, one prompt a line (- reads standard input); bundled ones when left out."
    ),
]
SamplesOption = Annotated[int, typer.Option(min=1, max=1000, help="Texts for each prompt.")]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", help="The most tokens in a text.")]
SeedOption = Annotated[int, typer.Option("--seed", "-s", help="Same seed, same random draws.")]
RandomOption = Annotated[int | None, typer.Option("--random", help="How many random controls to set beside it.")]


def out_option(what: str) -> Any:
    """--out: the folder that `what` is written to. It is looked at before any work begins."""
    return typer.Option("--out", "-o", metavar="FOLDER", help=f"Folder for {what}.")
