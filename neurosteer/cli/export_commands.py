"""The verbs that write artifacts for other engines, and read vectors that other programs wrote."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from neurosteer.cli.choices import Format
from neurosteer.cli.inputs import named_by, recipe_of, steered_where
from neurosteer.cli.options import (
    JsonOption,
    ModelOptions,
    PositionsOption,
    TargetKlOption,
    artifact_names,
    out_option,
)
from neurosteer.cli.output import out, print_json, progress_line
from neurosteer.cli.places import artifact_place, files_place


def export(
    *,
    uses: Annotated[
        list[str],
        typer.Argument(
            metavar="REF[:STRENGTH]...",
            help="Artifacts at strengths or a recipe, as for --use of steer; several go into one export.",
            autocompletion=artifact_names,
        ),
    ],
    to: Annotated[
        Format,
        typer.Option(
            "--to",
            help="gguf (control vector for llama.cpp), tensors (safetensors by layer), repeng, steering-vectors, "
            "weights (baked, for any engine) or lora (PEFT).",
        ),
    ],
    place: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="PLACE", help="A file; for steering-vectors, weights and lora a folder."),
    ],
    positions: PositionsOption = "all",
    asked: ModelOptions,
    as_json: JsonOption = False,
) -> None:
    """Write artifacts at strengths for another engine, and check that it steers alike."""
    from neurosteer.artifacts.recipes import Recipe, Use
    from neurosteer.exporting.export import check_export_place
    from neurosteer.exporting.export import export as write_export
    from neurosteer.exporting.formats import check_sayable

    files_place(place.parent)
    check_export_place(place, to)
    named = named_by(uses)
    positions = steered_where(named, positions)
    known = Recipe.of(*(use for use in named.uses if isinstance(use, Use)))
    if len(known.uses) == len(named.uses) or positions != "all":  # features of SAEs are known with the model
        check_sayable(known, to, positions)
    with progress_line() as progress:
        lm = replace(asked, dtype=asked.dtype or "float32").load(progress, named.model)
        started = time.perf_counter()
        recipe, _ = recipe_of(named, lm, progress)
        done = write_export(lm, recipe, to, place, positions=positions, progress=progress)
    seconds = time.perf_counter() - started
    if as_json:
        agreement = asdict(done.agreement)
        data = {"place": str(done.place), "format": to, "model": lm.name, "layers": list(done.layers), **agreement}
        print_json({**data, "seconds": round(seconds, 3)})
        return
    out.print(f"Written to {place} in {seconds:.1f} s.")
    out.print(
        f"Read again, it writes the same text as the recipe does; its logits differ by up to "
        f"{done.agreement.difference:.2g}, where the recipe moves them by up to {done.agreement.effect:.2g}."
    )


def import_file(
    *,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A control vector (GGUF), or safetensors named by layer.")
    ],
    folder: Annotated[Path, out_option("the artifact")],
    name: Annotated[str | None, typer.Option("--name", help="The artifact's name; the file's when left out.")] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate/--no-calibrate", help="Set strength 1 by measurement; else what the file adds.",
            rich_help_panel="What strength 1 means",
        ),
    ] = True,
    target_kl: TargetKlOption = 1.0,
    asked: ModelOptions,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Make a steering vector of one that another program wrote. Pickles are never loaded."""
    from neurosteer.artifacts.cards import strength_meaning
    from neurosteer.artifacts.storage import save
    from neurosteer.exporting.additions import read_additions
    from neurosteer.exporting.importing import import_vector

    artifact_place(folder)
    read_additions(file)  # its mistakes show before the model is loaded
    with progress_line() as progress:
        lm = asked.load(progress)
        started = time.perf_counter()
        vector = import_vector(lm, file, name=name, calibrate=calibrate, target_kl=target_kl, progress=progress)
        seconds = time.perf_counter() - started
    written = save(vector, folder)
    if as_json:
        data = {"artifact": str(written), "name": vector.name, "model": lm.name, "layers": vector.layers}
        print_json({**data, "calibration": asdict(vector.calibration), "seconds": round(seconds, 3)})
        return
    out.print(f"{vector.name}: {strength_meaning(vector)}. Written to {written} in {seconds:.1f} s.")
