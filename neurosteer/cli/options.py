"""Options and arguments that several verbs share: one word, one meaning. Those of one verb alone stand with it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neurosteer.progress import Progress

if TYPE_CHECKING:
    from neurosteer.models.language_model import LanguageModel

# The model, and how it is loaded and written to.
ModelOption = Annotated[
    str | None, typer.Option("--model", help="Catalog name, Hub id, folder or GGUF file.", show_default=False)
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
RawOption = Annotated[bool, typer.Option("--raw", help="No chat template.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]

# What an artifact is built from and how.
ExamplesArgument = Annotated[str, typer.Argument(help="A file of examples, or the name of a bundled set.")]
NegativeOption = Annotated[str | None, typer.Option("--negative", help="With two plain text files: the negative one.")]
MethodOption = Annotated[str, typer.Option("--method", help="caa, pca, probe, sae or cna.")]
FramingOption = Annotated[str | None, typer.Option("--framing", help="raw, prompt or answer.")]
TokensOption = Annotated[str | None, typer.Option("--tokens", help="mean or last.")]
SaeOption = Annotated[
    list[str] | None, typer.Option("--sae", help="sae: RELEASE/ID, a folder or embedded/L; else the model's.")
]

# What is written, and how.
UseOption = Annotated[
    list[str],
    typer.Option(
        "--use",
        metavar="REF[:STRENGTH]",
        help="A folder, a name in vectors/, a Hub repo (user/repo[/name][@revision]), or one SAE feature: SAE#INDEX "
        "adds it, SAE#INDEX=VALUE clamps it (SAE: embedded/LAYER, RELEASE/ID or a folder). May be given more than "
        "once.",
    ),
]
SamplesOption = Annotated[int, typer.Option("--samples", min=1, max=1000)]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens")]
SeedOption = Annotated[int, typer.Option("--seed", help="Same seed, same text.")]
GreedyOption = Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")]
TemperatureOption = Annotated[float, typer.Option("--temperature")]
TopPOption = Annotated[float, typer.Option("--top-p")]
PenaltyOption = Annotated[float, typer.Option("--repetition-penalty")]
PositionsOption = Annotated[str, typer.Option("--positions", help="all, prompt or generated.")]
StrengthsOption = Annotated[str, typer.Option("--strengths", help="Numbers parted by commas.")]
PromptsOption = Annotated[
    Path | None, typer.Option("--prompts", help="A text file, one prompt a line; 16 neutral ones when left out.")
]
JudgeOption = Annotated[
    str | None,
    typer.Option("--judge", help="refusal, regex:PATTERN or words:ONE,TWO; else a classifier trained on --examples."),
]
JudgeExamplesOption = Annotated[
    str | None,
    typer.Option("--examples", help="Labelled texts for the judge: others than the artifact's, or held out (build)."),
]
OrthogonaliseOption = Annotated[
    bool, typer.Option("--orthogonalise", help="Remove the overlap between the vectors used.")
]


def load(
    model: str | None, revision: str | None, device: str | None, dtype: str | None, progress: Progress
) -> "LanguageModel":
    """The model that --model, --revision, --device and --dtype ask for. Raises what `load_model` raises."""
    progress("Starting")  # what follows imports for seconds
    from neurosteer.models.loading import load_model

    return load_model(model, revision=revision, device=device, dtype=dtype, progress=progress)
