"""The command line: parse, call the library, print. Results on stdout, progress and logs on stderr."""

import csv
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from neurosteer.errors import NeuroSteerError, UsageError
from neurosteer.progress import Progress

if TYPE_CHECKING:
    from neurosteer.artifacts import Artifact
    from neurosteer.combining import Overlap
    from neurosteer.layer_profile import LayerProfile
    from neurosteer.models import LanguageModel
    from neurosteer.recipes import Recipe, Use
    from neurosteer.references import FeatureUse
    from neurosteer.steering import Row

app = typer.Typer(
    name="neurosteer",
    help="Steer language models with vectors and neuron circuits built from examples in seconds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
sae_app = typer.Typer(help="Sparse autoencoders: train one, list those for a model.", no_args_is_help=True)
app.add_typer(sae_app, name="sae")
out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)

_SAE_FIGURES = {
    "explained_variance": "Explained variance",
    "l0": "L0",
    "dead": "Dead",
    "cross_entropy_recovered": "Cross-entropy recovered",
}
_TABLE_WIDTH = 120  # also where the terminal is narrower: a cut model name is of no use

ModelOption = Annotated[
    str | None, typer.Option("--model", help="Catalog name, Hub id, folder or GGUF file.", show_default=False)
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
RawOption = Annotated[bool, typer.Option("--raw", help="No chat template.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
UseOption = Annotated[
    list[str],
    typer.Option(
        "--use",
        metavar="REF[:STRENGTH]",
        help="A folder, a name in vectors/, or one SAE feature: SAE#INDEX adds it, SAE#INDEX=VALUE clamps it (SAE: "
        "embedded/LAYER, RELEASE/ID or a folder). May be given more than once.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Same seed, same text.")]
GreedyOption = Annotated[bool, typer.Option("--greedy", help="Always the likeliest token.")]
TemperatureOption = Annotated[float, typer.Option("--temperature")]
TopPOption = Annotated[float, typer.Option("--top-p")]
PenaltyOption = Annotated[float, typer.Option("--repetition-penalty")]
PositionsOption = Annotated[str, typer.Option("--positions", help="all, prompt or generated.")]
OrthogonaliseOption = Annotated[
    bool, typer.Option("--orthogonalise", help="Remove the overlap between the vectors used.")
]


def main() -> None:
    """Run the command line: exit 0 done, 2 the user's mistake (one line), 1 a fault of ours."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except NeuroSteerError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("Interrupted.", 130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if os.environ.get("NEUROSTEER_DEBUG"):
            raise
        _fail(f"A fault of NeuroSteer: {type(error).__name__}: {error} (NEUROSTEER_DEBUG=1 shows where).", 1)


@app.command("app")
def app_command(
    model: ModelOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on; 7860 or the next free one.")] = None,
) -> None:
    """Open the page on this machine."""
    from neurosteer.ui.page import create_app, launch

    launch(create_app(model), host=host, port=port)


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the models of the catalog."""
    from neurosteer.catalog import catalog, default_model

    if as_json:
        _print_json({"default": default_model(), "models": [asdict(model) for model in catalog()]})
        return
    table = Table(box=None)
    for heading in ("Model", "Hub id", "Kind", "Memory", "Licence"):
        table.add_column(heading, no_wrap=True)
    for model in catalog():
        default = " (default)" if model.name == default_model() else ""
        kind = "chat" if model.chat else "base"
        table.add_row(model.name + default, model.hub_id, kind, f"{model.memory_gb:g} GB", model.licence)
    Console(width=_TABLE_WIDTH, highlight=False).print(table)


@sae_app.command("train")
def sae_train(
    texts: Annotated[list[Path], typer.Argument(help="Text files: .jsonl or .csv (text, prompt), or one text a line.")],
    layers: Annotated[str, typer.Option("--layers", help="14, 9,14,19 or 10-12: one SAE each.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder to write; training that was cut goes on from it.")],
    model: ModelOption = None,
    features: Annotated[int, typer.Option("--features")] = 4096,
    active: Annotated[float, typer.Option("--active", help="Active features per token, on average.")] = 48,
    tokens: Annotated[int, typer.Option("--tokens", help="How many tokens to train on.")] = 3_000_000,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens")] = 512,
    learning_rate: Annotated[float, typer.Option("--learning-rate")] = 1e-3,
    framings: Annotated[str | None, typer.Option("--framings", help="Taken in turns, like raw,answer.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens kept of each text.")] = 256,
    held_out: Annotated[int, typer.Option("--held-out", help="Tokens kept for the figures.")] = 100_000,
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    raw: RawOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train sparse autoencoders on a model's activations, several depths at once; a run that was cut goes on."""
    from neurosteer.building import parse_layers
    from neurosteer.sae_training import TrainingOptions, measures_of, read_training_texts, train_saes

    found = read_training_texts(texts)
    with _progress(logged=True) as progress:
        lm = _load(model, revision, device, dtype, progress)
        numbers = parse_layers(layers, lm.n_layers)
        if numbers is None:
            raise UsageError("Name the layers to train at, like 9,14,19.")
        options = TrainingOptions(
            features=features,
            active=active,
            tokens=tokens,
            batch_tokens=batch_tokens,
            learning_rate=learning_rate,
            framings=_framings(framings, chat=lm.chat and not raw),
            max_tokens=max_tokens,
            held_out_tokens=held_out,
            seed=seed,
        )
        folders = train_saes(lm, found, numbers, folder, options, progress=progress)
    measured = {layer: measures_of(path) for layer, path in folders.items()}
    if as_json:
        _print_json({"saes": {str(layer): {"folder": str(folders[layer]), **measured[layer]} for layer in folders}})
        return
    table = Table(box=None)
    for heading in ("Layer", "Folder", *_SAE_FIGURES.values()):
        table.add_column(heading, no_wrap=heading != "Folder", overflow="fold")
    for layer, path in folders.items():
        figures = measured[layer]
        table.add_row(str(layer), str(path), *(f"{figures[key]:.3f}" for key in _SAE_FIGURES))
    Console(width=_TABLE_WIDTH, highlight=False).print(table)


@sae_app.command("list")
def sae_list(model: ModelOption = None, as_json: JsonOption = False) -> None:
    """List the SAEs for a model: those that come with NeuroSteer, and the catalog's releases."""
    from neurosteer.catalog import default_model
    from neurosteer.saes import offered_saes

    offer = offered_saes(model or default_model())
    if as_json:
        _print_json({"model": offer.model, "embedded": list(map(asdict, offer.shipped)), "releases": offer.releases})
        return
    if offer.shipped:
        table = Table(box=None)
        for heading in ("SAE", "Layer", "Features", *_SAE_FIGURES.values()):
            table.add_column(heading, no_wrap=True)
        for sae in offer.shipped:
            figures = (f"{sae.measured[key]:.3f}" if key in sae.measured else "–" for key in _SAE_FIGURES)
            table.add_row(sae.name, str(sae.layer), str(sae.n_features), *figures)
        Console(width=_TABLE_WIDTH, highlight=False).print(table)
    else:
        out.print(f"None comes with NeuroSteer for {offer.model}.")
    out.print(f"Releases in the catalog (RELEASE/ID): {', '.join(offer.releases) or 'none'}.")


@app.command()
def build(
    examples: Annotated[str, typer.Argument(help="A file of examples, or the name of a bundled set.")],
    negative: Annotated[
        str | None, typer.Option("--negative", help="With two plain text files: the negative one.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="caa, pca, probe, sae or cna.")] = "caa",
    model: ModelOption = None,
    layers: Annotated[str, typer.Option("--layers", help="auto, all, 14, 10-18 or 3,7,9.")] = "auto",
    name: Annotated[str | None, typer.Option("--name", help="The artifact's name.")] = None,
    description: Annotated[str, typer.Option("--description")] = "",
    folder: Annotated[Path | None, typer.Option("--out", help="Folder to write; ./NAME when left out.")] = None,
    framing: Annotated[str | None, typer.Option("--framing", help="raw, prompt or answer.")] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help="mean or last.")] = None,
    rank: Annotated[
        str | None, typer.Option("--rank", help="cna: difference, dprime, write. sae: rate, dprime, probe.")
    ] = None,
    operation: Annotated[str | None, typer.Option("--operation", help="cna: scale or shift.")] = None,
    top_k: Annotated[
        float | None, typer.Option("--top-k", help="cna: a count, or a share below 1. sae: a count.")
    ] = None,
    skip_layers: Annotated[str | None, typer.Option("--skip-layers", help="cna: layers left out, like 0,1.")] = None,
    penalty: Annotated[float | None, typer.Option("--penalty", help="probe: strength of its L2 penalty.")] = None,
    sae: Annotated[
        list[str] | None,
        typer.Option("--sae", help="sae: RELEASE/ID, a folder or embedded/L; else the model's."),
    ] = None,
    weight: Annotated[str | None, typer.Option("--weight", help="sae: difference or target.")] = None,
    sides: Annotated[str | None, typer.Option("--sides", help="sae: positive or both.")] = None,
    unit_norm: Annotated[bool, typer.Option("--unit-norm", help="sae: directions of length 1.")] = False,
    min_output_score: Annotated[
        float | None, typer.Option("--min-output-score", help="sae: only features that move the output this much.")
    ] = None,
    contexts: Annotated[
        int | None, typer.Option("--contexts", help="sae: places kept per feature from your texts (0: none; 3).")
    ] = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    raw: RawOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build an artifact from examples."""
    from neurosteer.building import build as build_artifact
    from neurosteer.examples import read_examples
    from neurosteer.storage import save

    contrast = read_examples(examples, negative)
    for warning in contrast.warnings:
        err.print(f"Warning: {warning}")
    given = {"rank": rank, "operation": operation, "top_k": _count_or_share(top_k), "penalty": penalty, "sae": sae}
    given |= {"weight": weight, "sides": sides, "min_output_score": min_output_score, "contexts": contexts}
    given |= {"unit_norm": unit_norm or None}
    parameters: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if skip_layers is not None:
        parameters["skip_layers"] = _numbers(skip_layers, "--skip-layers")
    with _progress() as progress:
        lm = _load(model, revision, device, dtype, progress)
        started = time.perf_counter()
        artifact = build_artifact(
            lm, contrast, method=method, layers=layers, name=name, description=description,
            framing=framing or ("raw" if raw else None), tokens=tokens, progress=progress, **parameters,  # type: ignore[arg-type]
        )  # fmt: skip
        seconds = time.perf_counter() - started
    written = save(artifact, folder or Path(artifact.name))
    if as_json:
        _print_json(_build_data(artifact, written, seconds))
        return
    out.print(_build_text(artifact, seconds))
    out.print(f"Written to {written}. Try: neurosteer steer --use {written}:1 --prompt 'Tell me a story.' --compare")


@app.command("layers")
def layers_command(
    examples: Annotated[str, typer.Argument(help="A file of examples, or the name of a bundled set.")],
    negative: Annotated[
        str | None, typer.Option("--negative", help="With two plain text files: the negative one.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="caa, pca, probe, sae or cna.")] = "caa",
    model: ModelOption = None,
    layers: Annotated[str, typer.Option("--layers", help="all, 14, 10-18 or 3,7,9; sae: those of its SAEs.")] = "all",
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for layers.csv and layers.html.")] = None,
    framing: Annotated[str | None, typer.Option("--framing", help="raw, prompt or answer.")] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help="mean or last.")] = None,
    rank: Annotated[str | None, typer.Option("--rank", help="As for build.")] = None,
    top_k: Annotated[float | None, typer.Option("--top-k", help="As for build.")] = None,
    sae: Annotated[
        list[str] | None,
        typer.Option("--sae", help="sae: RELEASE/ID, a folder or embedded/L; else the model's."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws the random directions for comparison.")] = 0,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    raw: RawOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build at every layer and show, layer by layer, how well examples separate and what steering does and costs."""
    from neurosteer.examples import read_examples
    from neurosteer.layer_profile import profile_data, profile_layers, write_profile

    contrast = read_examples(examples, negative)
    for warning in contrast.warnings:
        err.print(f"Warning: {warning}")
    given = {"rank": rank, "top_k": _count_or_share(top_k), "sae": sae}
    with _progress() as progress:
        lm = _load(model, revision, device, dtype, progress)
        started = time.perf_counter()
        profile = profile_layers(
            lm, contrast, method=method, layers=layers, framing=framing or ("raw" if raw else None),  # type: ignore[arg-type]
            tokens=tokens, seed=seed, progress=progress,  # type: ignore[arg-type]
            **{key: value for key, value in given.items() if value is not None},
        )  # fmt: skip
    seconds = time.perf_counter() - started
    files = write_profile(profile, folder) if folder is not None else ()
    if as_json:
        _print_json({**profile_data(profile), "files": list(map(str, files)), "seconds": round(seconds, 3)})
        return
    _print_profile(profile)
    if files:
        out.print(f"Written to {' and '.join(map(str, files))} in {seconds:.1f} s.")


@app.command()
def steer(
    use: UseOption,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="May be given more than once.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", help="A text file, one prompt a line.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the unsteered text too.")] = False,
    samples: Annotated[int, typer.Option("--samples", min=1, max=1000)] = 1,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens")] = 64,
    greedy: GreedyOption = False,
    temperature: TemperatureOption = 0.8,
    top_p: TopPOption = 0.95,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = 0,
    positions: PositionsOption = "all",
    orthogonalise: OrthogonaliseOption = False,
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    raw: RawOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write texts under one or more artifacts at their strengths."""
    from neurosteer.decoding import Sampling
    from neurosteer.recipes import UNSTEERED
    from neurosteer.steering import Row, Session

    uses = _uses(use)
    texts = [*(prompt or []), *(_read_prompts(prompts) if prompts else [])]
    if not texts:
        raise UsageError("There is no prompt; give --prompt TEXT or --prompts FILE.")
    sampling = Sampling(greedy, temperature, top_p, repetition_penalty, seed)
    options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "positions": positions, "raw": raw}
    with _progress() as progress:
        lm = _load(model or _model_of(uses), revision, device, dtype, progress)
        recipe, strength = _recipe(uses, lm, progress)
    recipe, overlaps = _combined(recipe, orthogonalise)
    steered = [Row(text, recipe, sample, strength) for text in texts for sample in range(samples)]
    rows = [*(Row(row.prompt, UNSTEERED, row.sample) for row in steered if compare), *steered]
    _print_overlaps(overlaps)
    started = time.perf_counter()
    if len(rows) == 1 and not as_json:
        _print_stream(Session(lm), rows, options)
        return
    with _progress() as progress:
        written = Session(lm).generate(rows, progress=progress, **options)
    _print_rows(lm, written, time.perf_counter() - started, as_json, overlaps)


@app.command()
def sweep(
    use: UseOption,
    strengths: Annotated[str, typer.Option("--strengths", help="Numbers parted by commas.")] = "-2,-1,0,1,2",
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A text file, one prompt a line; 16 neutral ones when left out.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, max=1000)] = 1,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens")] = 30,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for generations.csv.")] = None,
    greedy: GreedyOption = False,
    temperature: TemperatureOption = 0.8,
    top_p: TopPOption = 0.95,
    repetition_penalty: PenaltyOption = 1.0,
    seed: SeedOption = 0,
    positions: PositionsOption = "all",
    orthogonalise: OrthogonaliseOption = False,
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    raw: RawOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the same prompts at several strengths (factors on the strengths given with --use)."""
    from neurosteer.decoding import Sampling
    from neurosteer.examples import sweep_prompts
    from neurosteer.steering import Session

    values = _floats(strengths, "--strengths")
    uses = _uses(use)
    texts = _read_prompts(prompts) if prompts else list(sweep_prompts())
    sampling = Sampling(greedy, temperature, top_p, repetition_penalty, seed)
    with _progress() as progress:
        lm = _load(model or _model_of(uses), revision, device, dtype, progress)
        recipe, overlaps = _combined(_recipe(uses, lm, progress)[0], orthogonalise)
        started = time.perf_counter()
        rows = Session(lm).sweep(
            recipe, values, texts, samples=samples, max_new_tokens=max_new_tokens, sampling=sampling,
            positions=positions, raw=raw, progress=progress,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    _print_overlaps(overlaps)
    if folder is not None:
        _write_generations(rows, folder)
    if as_json or folder is None:
        _print_rows(lm, rows, seconds, as_json, overlaps)
    else:
        out.print(f"Wrote {len(rows)} texts to {folder / 'generations.csv'} in {seconds:.1f} s.")


@app.command()
def inspect(
    references: Annotated[list[str], typer.Argument(metavar="REF...", help="A folder or a name in vectors/.")],
    as_json: JsonOption = False,
) -> None:
    """Show what an artifact is, where it comes from and what strength 1 means; of several, how much they overlap."""
    from neurosteer.references import resolve
    from neurosteer.storage import artifact_data

    artifacts = [resolve(reference) for reference in references]
    if len(artifacts) == 1:
        if as_json:
            _print_json(artifact_data(artifacts[0]))
        else:
            out.print(_inspect_text(artifacts[0]))
        return
    overlaps = _comparable_overlaps(artifacts)
    if as_json:
        _print_json(
            {"artifacts": [artifact_data(artifact) for artifact in artifacts], "cosines": list(map(asdict, overlaps))}
        )
        return
    for artifact in artifacts:
        out.print(_inspect_text(artifact) + "\n")
    _print_cosine_table(overlaps)


# --- inputs ----------------------------------------------------------------------------------------------------------


def _load(
    model: str | None, revision: str | None, device: str | None, dtype: str | None, progress: Progress
) -> "LanguageModel":
    progress("Starting")
    from neurosteer.models import load_model

    return load_model(model, revision=revision, device=device, dtype=dtype, progress=progress)


def _uses(texts: Sequence[str]) -> "list[Use | FeatureUse]":
    """What --use names: mistakes show before the model is loaded; features of SAEs are looked up after."""
    from neurosteer.references import parse_use

    return [parse_use(text) for text in texts]


def _model_of(uses: "Sequence[Use | FeatureUse]") -> str | None:
    """The model that the first artifact was made on; None (the default) where there are features of SAEs only."""
    from neurosteer.recipes import Use

    return next((use.artifact.model.name for use in uses if isinstance(use, Use)), None)


def _recipe(uses: "Sequence[Use | FeatureUse]", lm: "LanguageModel", progress: Progress) -> "tuple[Recipe, float]":
    """The recipe, and the strength to show beside its texts: its own when it is one artifact, else 1 (as given)."""
    from neurosteer.recipes import Recipe
    from neurosteer.references import resolve_uses

    return Recipe.of(*resolve_uses(uses, lm, progress=progress)), uses[0].strength if len(uses) == 1 else 1.0


def _combined(recipe: "Recipe", orthogonalise: bool) -> "tuple[Recipe, list[Overlap] | None]":
    """The recipe to steer with, and how much its vectors overlap as they were given; None where there are not two."""
    from neurosteer.artifacts import SteeringVector
    from neurosteer.combining import cosines, orthogonalised

    several = sum(isinstance(use.artifact, SteeringVector) for use in recipe.uses) > 1
    overlaps = cosines(recipe) if several else None
    return (orthogonalised(recipe) if orthogonalise else recipe), overlaps


def _comparable_overlaps(artifacts: "Sequence[Artifact]") -> "list[Overlap]":
    """Directions can be compared within models of one shape; artifacts of others are shown all the same."""
    from neurosteer.combining import cosines

    alike: dict[tuple[int, int, int], list[Artifact]] = {}
    for artifact in artifacts:
        model = artifact.model
        alike.setdefault((model.n_layers, model.d_model, model.d_mlp), []).append(artifact)
    return [overlap for group in alike.values() for overlap in cosines(group)]


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The prompts file {str(path)!r} could not be read as UTF-8 text ({error}).") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise UsageError(f"The prompts file {str(path)!r} holds no prompt; write one a line.")
    return found


def _floats(text: str, what: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{what} is {text[:60]!r}; give numbers parted by commas, like -1,0,1.") from error


def _numbers(text: str, what: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"{what} is {text[:60]!r}; give layer numbers parted by commas, like 0,1.")
    return [int(part) for part in parts]


def _framings(text: str | None, *, chat: bool) -> Any:
    """Framings to take in turns; the options say which are allowed."""
    return tuple(text.split(",")) if text else ("raw", "answer") if chat else ("raw",)


def _count_or_share(value: float | None) -> int | float | None:
    return int(value) if value is not None and value >= 1 and value == int(value) else value


# --- outputs ---------------------------------------------------------------------------------------------------------


def _print_json(data: Any) -> None:
    sys.stdout.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")


def _build_data(artifact: "Artifact", folder: Path, seconds: float) -> dict[str, Any]:
    source = artifact.provenance
    return {
        "artifact": str(folder),
        "kind": artifact.kind,
        "method": artifact.method,
        "layers": artifact.layers,
        "n_positive": source.n_positive,
        "n_negative": source.n_negative,
        "dropped": dict(source.dropped),
        "n_cut": source.n_cut,
        "layer_choice": source.layer_choice,
        "seconds": round(seconds, 3),
    }


def _build_text(artifact: "Artifact", seconds: float) -> str:
    source = artifact.provenance
    dropped = ", ".join(f"{count} {what}" for what, count in source.dropped.items() if count) or "none"
    return (
        f"Built {artifact.name} ({artifact.kind}) with {artifact.method} in {seconds:.1f} s from "
        f"{source.n_positive} positive and {source.n_negative} negative texts "
        f"(dropped: {dropped}; cut: {source.n_cut}).\n"
        f"Layers: {source.layer_choice}."
    )


def _inspect_text(artifact: "Artifact") -> str:
    from neurosteer.artifacts import NeuronCircuit
    from neurosteer.cards import feature_lines, layers_text, strength_meaning

    source = artifact.provenance
    lines = [
        f"{artifact.name}: {artifact.kind}, {artifact.method}, operation {artifact.operation}",
        f"model: {artifact.model.name} ({artifact.model.revision or 'no revision'}), "
        f"fingerprint {artifact.model.fingerprint}",
        f"layers: {layers_text(artifact)} ({source.layer_choice or 'not recorded'})",
        f"strength: {strength_meaning(artifact)}",
        f"examples: {source.n_positive} positive, {source.n_negative} negative, sha256 {source.examples_sha256[:16]}",
        f"read as: framing {source.framing}, tokens {source.tokens}",
        f"parameters: {json.dumps(dict(artifact.parameters), ensure_ascii=False)}",
    ]
    if artifact.description:
        lines.insert(1, artifact.description)
    if isinstance(artifact, NeuronCircuit):
        top = zip(
            artifact.neuron_layers.tolist()[:10], artifact.neurons.tolist(), artifact.scores.tolist(), strict=False
        )
        lines.append(f"neurons: {artifact.size} ({artifact.share:.2%} of all); strongest (layer, neuron, score):")
        lines += [f"  {layer:3d} {neuron:6d} {score:+.4f}" for layer, neuron, score in top]
    elif artifact.features:
        lines += feature_lines(artifact.features)
    return "\n".join(lines)


def _row_data(row: "Row") -> dict[str, Any]:
    return {
        "prompt": row.prompt,
        "strength": row.strength,
        "sample": row.sample,
        "text": row.text,
        "tokens": row.tokens,
    }


def _print_rows(
    lm: "LanguageModel",
    rows: "Sequence[Row]",
    seconds: float,
    as_json: bool,
    overlaps: "Sequence[Overlap] | None" = None,
) -> None:
    if as_json:
        data = [_row_data(row) for row in rows]
        cosines = {} if overlaps is None else {"cosines": list(map(asdict, overlaps))}
        _print_json({"model": lm.name, "rows": data, "seconds": round(seconds, 3), **cosines})
        return
    for row in rows:
        label = f"strength {row.strength:+g}" if row.recipe.uses else "unsteered"
        out.print(f"[{label}, sample {row.sample}] {row.prompt}\n{row.text}\n")


def _print_overlaps(overlaps: "Sequence[Overlap] | None") -> None:
    """A line on stderr for each two of the vectors used; nothing where there are not two."""
    if overlaps is None:
        return
    pairs: dict[tuple[str, str], list[str]] = {}
    for overlap in overlaps:
        layers = pairs.setdefault((overlap.first, overlap.second), [])
        layers.append(f"{overlap.cosine:+.2f} at layer {overlap.layer}")
    for (one, other), layers in pairs.items():
        err.print(f"Cosine of {one} and {other}: {', '.join(layers)}.")
    if not pairs:
        err.print("The vectors share no layer, so none overlap.")


def _print_cosine_table(overlaps: "Sequence[Overlap]") -> None:
    if not overlaps:
        out.print("No two of them are vectors that share a layer.")
        return
    table = Table(box=None)
    for heading in ("First", "Second", "Layer", "Cosine"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("Layer", "Cosine") else "left")
    for overlap in overlaps:
        table.add_row(overlap.first, overlap.second, str(overlap.layer), f"{overlap.cosine:+.3f}")
    Console(width=2 * _TABLE_WIDTH, highlight=False, markup=False).print(table)


def _print_profile(profile: "LayerProfile") -> None:
    from neurosteer.layer_profile import control_name

    table = Table(box=None)
    control = control_name(profile)
    for heading in ("Layer", "Separation", "Effect", "Damage", f"Effect of {control}", f"Damage of {control}"):
        table.add_column(heading, no_wrap=True, justify="right")
    for one in profile.layers:
        separation = f"{one.separation:.3f}" + ("*" if one.layer == profile.best_separation else " ")
        effect = f"{one.effect:+.3f}" + ("*" if one.layer == profile.best_effect else " ")
        others = (one.damage, one.random_effect, one.random_damage)
        table.add_row(str(one.layer), separation, effect, *(f"{value:+.3f}" for value in others))
    Console(width=_TABLE_WIDTH, highlight=False).print(table)
    positive, negative = profile.n_held_out
    out.print(
        "* best. Separation: ROC AUC. Effect: half of how much more strength +1 than −1 makes the model prefer "
        "positive texts. Damage: how much less likely steering makes any text. Both in nats per token, on "
        f"{positive} positive and {negative} negative texts kept out of building."
    )


def _print_stream(session: Any, rows: "Sequence[Row]", options: dict[str, Any]) -> None:
    for step in session.stream(rows, **options):
        sys.stdout.write(step.pieces[0])
        sys.stdout.flush()
    sys.stdout.write("\n")


def _write_generations(rows: "Sequence[Row]", folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "generations.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["prompt", "strength", "sample", "text", "tokens"])
            writer.writeheader()
            writer.writerows(_row_data(row) for row in rows)
    except OSError as error:
        raise UsageError(f"{str(folder)!r} could not be written ({error.strerror}); choose another --out.") from error


@contextmanager
def _progress(*, logged: bool = False) -> Iterator[Progress]:
    """A progress line on stderr where that is a terminal; elsewhere silence, or a line each where `logged`."""
    if not err.is_terminal:
        yield (lambda message, fraction=None: err.print(message)) if logged else (lambda message, fraction=None: None)
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("Starting", total=None)

        def show(message: str, fraction: float | None = None) -> None:
            bar.update(task, description=message, total=None if fraction is None else 1.0, completed=fraction or 0.0)

        yield show


def _fail(message: str, code: int) -> None:
    err.print("neurosteer: " + " ".join(message.split()))
    sys.exit(code)


if __name__ == "__main__":
    main()
