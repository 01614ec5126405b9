"""The verbs about sparse autoencoders."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from neurosteer.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    RawOption,
    RevisionOption,
    SeedOption,
    load,
)
from neurosteer.cli.output import new_table, out, print_json, print_table, progress_line
from neurosteer.errors import UsageError

app = typer.Typer(help="Sparse autoencoders: train one, list those for a model.", no_args_is_help=True)

_FIGURES = {
    "explained_variance": "Explained variance",
    "l0": "L0",
    "dead": "Dead",
    "cross_entropy_recovered": "Cross-entropy recovered",
}


@app.command("train")
def train(
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
    from neurosteer.building.layers import parse_layers
    from neurosteer.saes.corpus import TrainingOptions, read_training_texts
    from neurosteer.saes.training import measures_of, train_saes

    found = read_training_texts(texts)
    with progress_line(logged=True) as progress:
        lm = load(model, revision, device, dtype, progress)
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
        print_json({"saes": {str(layer): {"folder": str(folders[layer]), **measured[layer]} for layer in folders}})
        return
    table = Table(box=None)
    for heading in ("Layer", "Folder", *_FIGURES.values()):
        table.add_column(heading, no_wrap=heading != "Folder", overflow="fold")
    for layer, path in folders.items():
        figures = measured[layer]
        table.add_row(str(layer), str(path), *(f"{figures[key]:.3f}" for key in _FIGURES))
    print_table(table)


@app.command("list")
def list_saes(model: ModelOption = None, as_json: JsonOption = False) -> None:
    """List the SAEs for a model: those that come with NeuroSteer, and the catalog's releases."""
    from neurosteer.models.catalog import default_model
    from neurosteer.saes.offers import offered_saes

    offer = offered_saes(model or default_model())
    if as_json:
        print_json({"model": offer.model, "embedded": list(map(asdict, offer.shipped)), "releases": offer.releases})
        return
    if offer.shipped:
        table = new_table(("SAE", "Layer", "Features", *_FIGURES.values()))
        for sae in offer.shipped:
            figures = (f"{sae.measured[key]:.3f}" if key in sae.measured else "–" for key in _FIGURES)
            table.add_row(sae.name, str(sae.layer), str(sae.n_features), *figures)
        print_table(table)
    else:
        out.print(f"None comes with NeuroSteer for {offer.model}.")
    out.print(f"Releases in the catalog (RELEASE/ID): {', '.join(offer.releases) or 'none'}.")


def _framings(text: str | None, *, chat: bool) -> Any:
    """Framings to take in turns; the options say which are allowed."""
    return tuple(text.split(",")) if text else ("raw", "answer") if chat else ("raw",)
