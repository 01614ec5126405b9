"""The verbs that make an artifact of examples, calibrate one, or show what each layer would make of the examples."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neurosteer import processes
from neurosteer.cli.choices import Operation, Rank, Sides, Weight
from neurosteer.cli.inputs import read_prompts, whole_numbers
from neurosteer.cli.options import (
    EXAMPLES,
    ColumnOptions,
    DescribedOptions,
    ExamplesArgument,
    ExamplesOrNone,
    FramingOption,
    JsonOption,
    MaxNewTokensOption,
    MethodOption,
    ModelOptions,
    NegativeOption,
    RawOption,
    ReadTokensOption,
    SeedOption,
    TargetKlOption,
    artifact_names,
    described_name,
    out_option,
)
from neurosteer.cli.output import err, new_table, out, print_json, print_table, progress_line
from neurosteer.cli.places import artifact_place, files_place, folder_of
from neurosteer.errors import UsageError
from neurosteer.text import flat

if TYPE_CHECKING:
    from neurosteer.artifacts.artifact import Artifact
    from neurosteer.building.layer_profile import LayerProfile
    from neurosteer.examples.contrast_set import ContrastSet

_CNA, _SAE, _BOTH = "With --method cna", "With --method sae", "With --method cna or sae"

RankOption = Annotated[
    Rank | None,
    typer.Option(
        "--rank", help="By what: cna takes the first three; sae rate, dprime or probe.", rich_help_panel=_BOTH
    ),
]
TopKOption = Annotated[
    float | None,
    typer.Option("--top-k", help="How many are kept; cna: a number below 1 is a share.", rich_help_panel=_BOTH),
]
OperationOption = Annotated[
    Operation | None, typer.Option("--operation", help="Multiply neurons, or move them.", rich_help_panel=_CNA)
]
SaeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sae", metavar="SAE", help="RELEASE/ID, a folder or embedded/LAYER; else the model's.", rich_help_panel=_SAE
    ),
]


def build(
    *,
    examples: ExamplesOrNone = None,
    negative: NegativeOption = None,
    reading: ColumnOptions,
    described: DescribedOptions,
    method: MethodOption = "caa",
    layers: Annotated[str, typer.Option("--layers", help="auto, all, 14, 10-18 or 3,7,9.")] = "auto",
    name: Annotated[str | None, typer.Option("--name", help="The artifact's name.")] = None,
    description: Annotated[str, typer.Option("--description", help="What it does, for its card.")] = "",
    folder: Annotated[Path | None, out_option("the artifact; ./NAME when left out")] = None,
    penalty: Annotated[float | None, typer.Option("--penalty", help="probe: strength of its L2 penalty.")] = None,
    framing: FramingOption = None,
    tokens: ReadTokensOption = None,
    hold_out: Annotated[
        float,
        typer.Option(
            "--hold-out", help="Share of each class kept out, to judge with later (evaluate): 0.5.",
            rich_help_panel=EXAMPLES,
        ),
    ] = 0.0,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate", help="Set strength 1 by measurement; else default amounts.",
            rich_help_panel="What strength 1 means",
        ),
    ] = True,
    target_kl: TargetKlOption = 1.0,
    rank: RankOption = None,
    top_k: TopKOption = None,
    operation: OperationOption = None,
    skip_layers: Annotated[
        str | None,
        typer.Option("--skip-layers", metavar="LAYERS", help="Layers left out, like 0,1.", rich_help_panel=_CNA),
    ] = None,
    sae: SaeOption = None,
    weight: Annotated[
        Weight | None, typer.Option("--weight", help="How much of each feature is added.", rich_help_panel=_SAE)
    ] = None,
    sides: Annotated[
        Sides | None, typer.Option("--sides", help="Features of which class.", rich_help_panel=_SAE)
    ] = None,
    unit_norm: Annotated[
        bool, typer.Option("--unit-norm", help="Directions of length 1.", rich_help_panel=_SAE)
    ] = False,
    min_output_score: Annotated[
        float | None,
        typer.Option(
            "--min-output-score", help="Only features that move the output this much.", rich_help_panel=_SAE
        ),
    ] = None,
    contexts: Annotated[
        int | None,
        typer.Option(
            "--contexts", help="Places kept per feature from your texts (0: none; 3).", rich_help_panel=_SAE
        ),
    ] = None,
    asked: ModelOptions,
    raw: RawOption = False,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Build an artifact from examples, or from a description: then the model's own answers are the examples."""
    from neurosteer.artifacts.common import safe_name
    from neurosteer.artifacts.storage import save
    from neurosteer.building.build import build as build_artifact

    contrast = None if described.check(examples, reading, negative) else _contrast(reading, examples or "", negative)
    called = safe_name(name or f"{contrast.name if contrast else described_name(described.instruct or '')}-{method}")
    if name is not None and called != name:
        err.print(f"Note: the name {name[:100]!r} becomes {called}; names are of letters, digits, '.', '_' and '-'.")
    place = described.place() or artifact_place(folder or Path(called))
    given = {"rank": rank, "operation": operation, "top_k": count_or_share(top_k), "penalty": penalty, "sae": sae}
    given |= {"weight": weight, "sides": sides, "min_output_score": min_output_score, "contexts": contexts}
    given |= {"unit_norm": unit_norm or None}
    parameters: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if skip_layers is not None:
        parameters["skip_layers"] = whole_numbers(skip_layers, "--skip-layers")
    with progress_line() as progress:
        lm = asked.load(progress)
        if contrast is None:
            contrast = described.write(lm, progress)
            if described.save_examples is not None:
                if processes.rank() == 0:
                    _save_examples(contrast, place, as_json=as_json)
                return
        started = time.perf_counter()
        artifact = build_artifact(
            lm, contrast, method=method, layers=layers, name=called, description=description,
            framing=framing or ("raw" if raw else None), tokens=tokens, hold_out=hold_out, calibrate=calibrate,
            target_kl=target_kl, progress=progress, **parameters,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        written = save(artifact, place) if processes.rank() == 0 else place
        worth = described.worth(lm, artifact, contrast, progress)
    if as_json:
        more = {"worth": list(worth)} if worth else {}
        print_json({**_build_data(artifact, written, seconds), "source": contrast.source, **more})
        return
    out.print(_build_text(artifact, seconds))
    for sentence in worth:
        out.print(sentence)
    out.print(f"Read: {flat(contrast.source)}.")
    out.print(f"Written to {written}. Try: neurosteer steer --use {written}:1 --prompt 'Tell me a story.' --compare")


def layers(
    *,
    examples: ExamplesArgument,
    negative: NegativeOption = None,
    reading: ColumnOptions,
    method: MethodOption = "caa",
    layers: Annotated[str, typer.Option("--layers", help="all, 14, 10-18 or 3,7,9; sae: those of its SAEs.")] = "all",
    folder: Annotated[Path | None, out_option("layers.csv and layers.html")] = None,
    seed: SeedOption = 0,
    framing: FramingOption = None,
    tokens: ReadTokensOption = None,
    rank: RankOption = None,
    top_k: TopKOption = None,
    sae: SaeOption = None,
    asked: ModelOptions,
    raw: RawOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build at every layer and show, layer by layer, how well examples separate and what steering does and costs."""
    from neurosteer.building.layer_plot import write_profile
    from neurosteer.building.layer_profile import profile_data, profile_layers

    place, contrast = files_place(folder), _contrast(reading, examples, negative)
    given = {"rank": rank, "top_k": count_or_share(top_k), "sae": sae}
    with progress_line() as progress:
        lm = asked.load(progress)
        started = time.perf_counter()
        profile = profile_layers(
            lm, contrast, method=method, layers=layers, framing=framing or ("raw" if raw else None),
            tokens=tokens, seed=seed, progress=progress,
            **{key: value for key, value in given.items() if value is not None},
        )  # fmt: skip
    seconds = time.perf_counter() - started
    files = write_profile(profile, place) if place is not None and processes.rank() == 0 else ()
    if as_json:
        more = {"source": contrast.source, "files": list(map(str, files)), "seconds": round(seconds, 3)}
        print_json({**profile_data(profile), **more})
        return
    _print_profile(profile)
    out.print(f"Read: {flat(contrast.source)}.")
    if files:
        out.print(f"Written to {' and '.join(map(str, files))} in {seconds:.1f} s.")


def calibrate(
    *,
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="REF", help="A folder to write into, or any artifact with --out.", autocompletion=artifact_names
        ),
    ],
    folder: Annotated[Path | None, out_option("the calibrated artifact; REF's own when left out")] = None,
    target_kl: TargetKlOption = 1.0,
    percentile: Annotated[
        float,
        typer.Option(
            "--percentile", help="Of the per-token KL, 0 to 100.", rich_help_panel="What strength 1 means"
        ),
    ] = 95.0,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", metavar="FILE",
            help="A text file, one prompt a line (- reads standard input); 24 bundled ones when left out.",
        ),
    ] = None,
    n_tokens: MaxNewTokensOption = 20,
    asked: ModelOptions,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Set an artifact's strength 1 by measurement, for +1 and −1 by themselves."""
    from neurosteer.artifacts.cards import strength_meaning
    from neurosteer.artifacts.storage import save
    from neurosteer.hub.references import resolve
    from neurosteer.measuring.calibration import calibrate as calibrated

    place = artifact_place(folder) if folder is not None else folder_of(artifact)
    texts = read_prompts(prompts) if prompts else None
    if place is None:
        raise UsageError(f"{artifact[:200]!r} is no folder here; say with --out where the calibrated one goes.")
    found = resolve(artifact)
    with progress_line() as progress:
        lm = asked.load(progress, found.model.name)
        started = time.perf_counter()
        found = calibrated(
            lm, found, target_kl=target_kl, percentile=percentile, prompts=texts, n_tokens=n_tokens,
            progress=progress,
        )  # fmt: skip
        seconds = time.perf_counter() - started
    written = save(found, place) if processes.rank() == 0 else place
    if as_json:
        data = {"artifact": str(written), "calibration": asdict(found.calibration), "seconds": round(seconds, 3)}
        print_json(data)
        return
    out.print(f"{found.name}: {strength_meaning(found)}. Written to {written} in {seconds:.1f} s.")


# --- inputs ----------------------------------------------------------------------------------------------------------


def _contrast(reading: ColumnOptions, examples: str, negative: str | None) -> "ContrastSet":
    contrast = reading.read(examples, negative)
    for warning in contrast.warnings:
        err.print(f"Warning: {warning}")
    return contrast


def _save_examples(contrast: "ContrastSet", path: Path, *, as_json: bool) -> None:
    """As a table of prompts with two answers each, which `build` reads."""
    from neurosteer.artifacts.files import csv_text, write_files

    rows = zip(contrast.positive_prompts, contrast.positive, contrast.negative, strict=True)
    names = ("prompt", "chosen", "rejected")
    (written,) = write_files(
        path.parent, {path.name: csv_text(names, (dict(zip(names, row, strict=True)) for row in rows))}
    )
    if as_json:
        print_json({"n_pairs": len(contrast.positive), "source": contrast.source, "files": [str(written)]})
        return
    out.print(
        f"{len(contrast.positive)} pairs of answers are in {written}. Edit them, then: neurosteer build {written}"
    )


def count_or_share(value: float | None) -> int | float | None:
    """A whole number from 1 on as a count; below 1 it is a share."""
    return int(value) if value is not None and value >= 1 and value == int(value) else value


# --- outputs ---------------------------------------------------------------------------------------------------------


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
        "candidates": [dict(one) for one in source.candidates],
        "hold_out": source.hold_out,
        "calibration": asdict(artifact.calibration),
        "seconds": round(seconds, 3),
    }


def _build_text(artifact: "Artifact", seconds: float) -> str:
    from neurosteer.artifacts.cards import strength_meaning

    source = artifact.provenance
    dropped = ", ".join(f"{count} {what}" for what, count in source.dropped.items() if count) or "none"
    return (
        f"Built {artifact.name} ({artifact.kind}) with {artifact.method} in {seconds:.1f} s from "
        f"{source.n_positive} positive and {source.n_negative} negative texts "
        f"(dropped: {dropped}; cut: {source.n_cut}).\n"
        f"Layers: {source.layer_choice}.\n"
        f"Strength: {strength_meaning(artifact)}."
    )


def _print_profile(profile: "LayerProfile") -> None:
    from neurosteer.building.layer_plot import control_name

    control = control_name(profile)
    headings = ("Layer", "Separation", "Effect", "Damage", f"Effect of {control}", f"Damage of {control}")
    table = new_table(headings, right=headings)
    for one in profile.layers:
        separation = f"{one.separation:.3f}" + ("*" if one.layer == profile.best_separation else " ")
        effect = f"{one.effect:+.3f} ± {one.effect_error:.3f}" + ("*" if one.layer == profile.best_effect else " ")
        others = (one.damage, one.random_effect, one.random_damage)
        table.add_row(str(one.layer), separation, effect, *(f"{value:+.3f}" for value in others))
    print_table(table)
    positive, negative = profile.n_held_out
    out.print(
        f"* best of {len(profile.layers)}; chosen by that very figure, so rather high. Separation: ROC AUC. "
        "Effect (± its standard error): half of how much more strength +1 than −1 makes the model prefer positive "
        "texts. Damage: how much less likely steering makes any text. Both in nats per token, every layer at "
        f"{profile.target_kl:g} nats of KL, on {positive} positive and {negative} negative texts kept out of building."
    )
