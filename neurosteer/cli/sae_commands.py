"""The verbs about sparse autoencoders."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import typer

from neurosteer import processes
from neurosteer.cli.choices import Framing
from neurosteer.cli.grammar import Verbs, add_verb
from neurosteer.cli.options import JsonOption, ModelOption, ModelOptions, RawOption, SeedOption, out_option
from neurosteer.cli.output import alone, new_table, out, print_json, print_table, progress_line, share
from neurosteer.cli.places import files_place
from neurosteer.errors import UsageError

_training = partial(typer.Option, rich_help_panel="Training")
_FIGURES = {
    "explained_variance": "Explained variance",
    "l0": "L0",
    "dead": "Dead",
    "cross_entropy_recovered": "Cross-entropy recovered",
}


def train(
    *,
    texts: Annotated[list[Path], typer.Argument(help="Text files: .jsonl or .csv (text, prompt), or one text a line.")],
    layers: Annotated[str, typer.Option(help="14, 9,14,19 or 10-12: one SAE each.")],
    folder: Annotated[Path, out_option("the SAEs; training that was cut goes on from there")],
    features: Annotated[int, typer.Option(help="How many features an SAE has.")] = 4096,
    active: Annotated[float, typer.Option(help="Active features per token, on average.")] = 48,
    framings: Annotated[str | None, _training(help="Taken in turns, like raw,answer.")] = None,
    max_tokens: Annotated[int, _training(help="Tokens kept of each text.")] = 256,
    tokens: Annotated[int, _training("--train-tokens", help="How many tokens to train on.")] = 3_000_000,
    held_out: Annotated[int, _training("--held-out-tokens", help="How many are kept for the figures.")] = 100_000,
    batch_tokens: Annotated[int, _training(help="Tokens in one step.")] = 512,
    learning_rate: Annotated[float, _training(help="Of Adam, at its highest.")] = 1e-3,
    seed: SeedOption = 0,
    model: ModelOptions,
    raw: RawOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train sparse autoencoders on a model's activations, several depths at once; a run that was cut goes on."""
    from neurosteer.building.layers import parse_layers
    from neurosteer.saes.corpus import TrainingOptions, read_training_texts
    from neurosteer.saes.training import measures_of, train_saes

    place, found = files_place(folder), read_training_texts(texts)
    turns = _framings(framings)
    with progress_line(logged=True) as progress:
        lm = model.load(progress)
        numbers = parse_layers(layers, lm.n_layers)
        if numbers is None:
            raise UsageError("Name the layers to train at, like 9,14,19.")
        options = TrainingOptions(
            features=features,
            active=active,
            tokens=tokens,
            batch_tokens=batch_tokens,
            learning_rate=learning_rate,
            framings=turns or (("raw", "answer") if lm.chat and not raw else ("raw",)),
            max_tokens=max_tokens,
            held_out_tokens=held_out,
            seed=seed,
        )
        folders = train_saes(lm, found, numbers, place or folder, options, progress=progress)
    if processes.rank() > 0:
        return
    measured = {layer: measures_of(path) for layer, path in folders.items()}
    if as_json:
        print_json({"saes": {str(layer): {"folder": str(folders[layer]), **measured[layer]} for layer in folders}})
        return
    table = new_table(("Layer",))
    table.add_column("Folder", overflow="fold")
    for heading in _FIGURES.values():
        table.add_column(heading, no_wrap=True)
    for layer, path in folders.items():
        figures = measured[layer]
        table.add_row(str(layer), str(path), *(f"{figures[key]:.3f}" for key in _FIGURES))
    print_table(table)


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


def _framings(text: str | None) -> "tuple[Framing, ...]":
    """Framings to take in turns; none where none are given. Raises `UsageError` for a word that is none."""
    given = tuple(one.strip() for one in text.split(",")) if text else ()
    wrong = [one for one in given if one not in get_args(Framing)]
    if wrong:
        raise UsageError(f"--framings holds {wrong[0][:60]!r}; give some of {', '.join(get_args(Framing))}.")
    return given  # type: ignore[return-value]


app = typer.Typer(help="Sparse autoencoders: train one, list those for a model.", cls=Verbs, no_args_is_help=True)


@app.callback()
def _start(context: typer.Context) -> None:
    if context.invoked_subcommand == "train":
        share()
    else:
        alone()


add_verb(app, "train", train, tokens="train-tokens", held_out="held-out-tokens")
add_verb(app, "list", list_saes)
