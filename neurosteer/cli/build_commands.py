"""The verbs that make an artifact of examples, or show what each layer would make of them."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neurosteer.artifacts.cards import strength_meaning
from neurosteer.cli.inputs import read_prompts
from neurosteer.cli.options import (
    DeviceOption,
    DtypeOption,
    ExamplesArgument,
    FramingOption,
    JsonOption,
    MethodOption,
    ModelOption,
    NegativeOption,
    RawOption,
    RevisionOption,
    SaeOption,
    TokensOption,
    load,
)
from neurosteer.cli.output import err, new_table, out, print_json, print_table, progress_line
from neurosteer.errors import UsageError

if TYPE_CHECKING:
    from neurosteer.artifacts.artifact import Artifact
    from neurosteer.building.layer_profile import LayerProfile
    from neurosteer.examples.contrast_set import ContrastSet


def build(
    examples: ExamplesArgument,
    negative: NegativeOption = None,
    method: MethodOption = "caa",
    model: ModelOption = None,
    layers: Annotated[str, typer.Option("--layers", help="auto, all, 14, 10-18 or 3,7,9.")] = "auto",
    name: Annotated[str | None, typer.Option("--name", help="The artifact's name.")] = None,
    description: Annotated[str, typer.Option("--description")] = "",
    folder: Annotated[Path | None, typer.Option("--out", help="Folder to write; ./NAME when left out.")] = None,
    framing: FramingOption = None,
    tokens: TokensOption = None,
    rank: Annotated[
        str | None, typer.Option("--rank", help="cna: difference, dprime, write. sae: rate, dprime, probe.")
    ] = None,
    operation: Annotated[str | None, typer.Option("--operation", help="cna: scale or shift.")] = None,
    top_k: Annotated[
        float | None, typer.Option("--top-k", help="cna: a count, or a share below 1. sae: a count.")
    ] = None,
    skip_layers: Annotated[str | None, typer.Option("--skip-layers", help="cna: layers left out, like 0,1.")] = None,
    penalty: Annotated[float | None, typer.Option("--penalty", help="probe: strength of its L2 penalty.")] = None,
    sae: SaeOption = None,
    weight: Annotated[str | None, typer.Option("--weight", help="sae: difference or target.")] = None,
    sides: Annotated[str | None, typer.Option("--sides", help="sae: positive or both.")] = None,
    unit_norm: Annotated[bool, typer.Option("--unit-norm", help="sae: directions of length 1.")] = False,
    min_output_score: Annotated[
        float | None, typer.Option("--min-output-score", help="sae: only features that move the output this much.")
    ] = None,
    contexts: Annotated[
        int | None, typer.Option("--contexts", help="sae: places kept per feature from your texts (0: none; 3).")
    ] = None,
    hold_out: Annotated[
        float, typer.Option("--hold-out", help="Share of each class kept out, to judge with later (evaluate): 0.5.")
    ] = 0.0,
    calibrate: Annotated[
        bool, typer.Option("--calibrate/--no-calibrate", help="Set strength 1 by measurement; else default amounts.")
    ] = True,
    target_kl: Annotated[
        float, typer.Option("--target-kl", help="What strength ±1 is to come to, nats (95th percentile of KL).")
    ] = 1.0,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    raw: RawOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build an artifact from examples."""
    from neurosteer.artifacts.storage import save
    from neurosteer.building.build import build as build_artifact

    contrast = _contrast(examples, negative)
    given = {"rank": rank, "operation": operation, "top_k": _count_or_share(top_k), "penalty": penalty, "sae": sae}
    given |= {"weight": weight, "sides": sides, "min_output_score": min_output_score, "contexts": contexts}
    given |= {"unit_norm": unit_norm or None}
    parameters: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if skip_layers is not None:
        parameters["skip_layers"] = _numbers(skip_layers, "--skip-layers")
    with progress_line() as progress:
        lm = load(model, revision, device, dtype, progress)
        started = time.perf_counter()
        artifact = build_artifact(
            lm, contrast, method=method, layers=layers, name=name, description=description,
            framing=framing or ("raw" if raw else None), tokens=tokens,  # type: ignore[arg-type]
            hold_out=hold_out, calibrate=calibrate, target_kl=target_kl, progress=progress, **parameters,
        )  # fmt: skip
        seconds = time.perf_counter() - started
    written = save(artifact, folder or Path(artifact.name))
    if as_json:
        print_json(_build_data(artifact, written, seconds))
        return
    out.print(_build_text(artifact, seconds))
    out.print(f"Written to {written}. Try: neurosteer steer --use {written}:1 --prompt 'Tell me a story.' --compare")


def layers(
    examples: ExamplesArgument,
    negative: NegativeOption = None,
    method: MethodOption = "caa",
    model: ModelOption = None,
    layers: Annotated[str, typer.Option("--layers", help="all, 14, 10-18 or 3,7,9; sae: those of its SAEs.")] = "all",
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for layers.csv and layers.html.")] = None,
    framing: FramingOption = None,
    tokens: TokensOption = None,
    rank: Annotated[str | None, typer.Option("--rank", help="As for build.")] = None,
    top_k: Annotated[float | None, typer.Option("--top-k", help="As for build.")] = None,
    sae: SaeOption = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws the random directions for comparison.")] = 0,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    raw: RawOption = False,
    as_json: JsonOption = False,
) -> None:
    """Build at every layer and show, layer by layer, how well examples separate and what steering does and costs."""
    from neurosteer.building.layer_plot import write_profile
    from neurosteer.building.layer_profile import profile_data, profile_layers

    contrast = _contrast(examples, negative)
    given = {"rank": rank, "top_k": _count_or_share(top_k), "sae": sae}
    with progress_line() as progress:
        lm = load(model, revision, device, dtype, progress)
        started = time.perf_counter()
        profile = profile_layers(
            lm, contrast, method=method, layers=layers, framing=framing or ("raw" if raw else None),  # type: ignore[arg-type]
            tokens=tokens, seed=seed, progress=progress,  # type: ignore[arg-type]
            **{key: value for key, value in given.items() if value is not None},
        )  # fmt: skip
    seconds = time.perf_counter() - started
    files = write_profile(profile, folder) if folder is not None else ()
    if as_json:
        print_json({**profile_data(profile), "files": list(map(str, files)), "seconds": round(seconds, 3)})
        return
    _print_profile(profile)
    if files:
        out.print(f"Written to {' and '.join(map(str, files))} in {seconds:.1f} s.")


# --- inputs ----------------------------------------------------------------------------------------------------------


def _contrast(examples: str, negative: str | None) -> "ContrastSet":
    from neurosteer.examples.reading import read_examples

    contrast = read_examples(examples, negative)
    for warning in contrast.warnings:
        err.print(f"Warning: {warning}")
    return contrast


def _numbers(text: str, what: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"{what} is {text[:60]!r}; give layer numbers parted by commas, like 0,1.")
    return [int(part) for part in parts]


def _count_or_share(value: float | None) -> int | float | None:
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
    source = artifact.provenance
    dropped = ", ".join(f"{count} {what}" for what, count in source.dropped.items() if count) or "none"
    return (
        f"Built {artifact.name} ({artifact.kind}) with {artifact.method} in {seconds:.1f} s from "
        f"{source.n_positive} positive and {source.n_negative} negative texts "
        f"(dropped: {dropped}; cut: {source.n_cut}).\n"
        f"Layers: {source.layer_choice}.\n"
        f"Strength: {strength_meaning(artifact)}."
    )


def calibrate(
    artifact: Annotated[str, typer.Argument(metavar="REF", help="A folder to write into, or any artifact with --out.")],
    folder: Annotated[Path | None, typer.Option("--out", help="Folder to write; REF's own when left out.")] = None,
    target_kl: Annotated[float, typer.Option("--target-kl", help="What strength ±1 is to come to, in nats.")] = 1.0,
    percentile: Annotated[float, typer.Option("--percentile", help="Of the per-token KL, 0 to 100.")] = 95.0,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A text file, one prompt a line; 24 neutral ones when left out.")
    ] = None,
    n_tokens: Annotated[int, typer.Option("--tokens", help="Of each continuation, that count.")] = 20,
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set an artifact's strength 1 by measurement, for +1 and −1 by themselves."""
    from neurosteer.artifacts.storage import save
    from neurosteer.hub.references import resolve
    from neurosteer.measuring.calibration import calibrate as calibrated

    texts = read_prompts(prompts) if prompts else None
    found = resolve(artifact)
    if folder is None and not Path(artifact).is_dir():
        raise UsageError(f"{artifact!r} is not a folder of yours; say with --out where the calibrated one goes.")
    with progress_line() as progress:
        lm = load(model or found.model.name, revision, device, dtype, progress)
        started = time.perf_counter()
        found = calibrated(
            lm, found, target_kl=target_kl, percentile=percentile, prompts=texts, n_tokens=n_tokens,
            progress=progress,
        )  # fmt: skip
        seconds = time.perf_counter() - started
    written = save(found, folder or Path(artifact))
    if as_json:
        data = {"artifact": str(written), "calibration": asdict(found.calibration), "seconds": round(seconds, 3)}
        print_json(data)
        return
    out.print(f"{found.name}: {strength_meaning(found)}. Written to {written} in {seconds:.1f} s.")


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
