"""The verbs that write texts under artifacts: at given strengths, or at several."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neurosteer.cli import options as opt
from neurosteer.cli.evaluate_commands import judge_request, report
from neurosteer.cli.inputs import given_prompts, named_by, numbers, read_prompts, recipe_of, steered_where
from neurosteer.cli.output import err, out, print_json, progress_line
from neurosteer.cli.places import files_place
from neurosteer.errors import UsageError

if TYPE_CHECKING:
    from neurosteer.artifacts.combining import Overlap
    from neurosteer.artifacts.recipes import Recipe
    from neurosteer.models.language_model import LanguageModel
    from neurosteer.steering.session import Row

_FEW_LAYERS = 3
_COLUMNS = ("prompt", "strength", "sample", "text", "tokens")


def steer(
    *,
    use: opt.UseOption,
    prompt: opt.PromptOption = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text file, one prompt a line; - reads standard input.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show the unsteered text too.")] = False,
    samples: opt.SamplesOption = 1,
    max_new_tokens: opt.MaxNewTokensOption = 64,
    positions: opt.PositionsOption = "all",
    orthogonalise: opt.OrthogonaliseOption = False,
    choosing: opt.SamplingOptions,
    model: opt.ModelOptions,
    raw: opt.RawOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Write texts under one or more artifacts at their strengths."""
    from neurosteer.artifacts.recipes import UNSTEERED
    from neurosteer.steering.session import Row, Session

    named = named_by(use)
    positions = steered_where(named, positions)
    texts = given_prompts(prompt, prompts)
    options = {"max_new_tokens": max_new_tokens, "sampling": choosing.sampling(), "positions": positions, "raw": raw}
    with progress_line() as progress:
        lm = model.load(progress, named.model)
        recipe, strength = recipe_of(named, lm, progress)
    recipe, overlaps = _combined(recipe, orthogonalise)
    steered = [Row(text, recipe, sample, strength) for text in texts for sample in range(samples)]
    rows = [*(Row(row.prompt, UNSTEERED, row.sample) for row in steered if compare), *steered]
    _print_overlaps(overlaps)
    started = time.perf_counter()
    if len(rows) == 1 and not as_json:
        _print_stream(Session(lm), rows, options)
        return
    with progress_line() as progress:
        written = Session(lm).generate(rows, progress=progress, **options)
    _print_rows(lm, written, time.perf_counter() - started, as_json, overlaps)


def sweep(
    *,
    use: opt.UseOption,
    strengths: opt.StrengthsOption = "-2,-1,0,1,2",
    prompts: opt.PromptsOption = None,
    samples: opt.SamplesOption = 1,
    max_new_tokens: opt.MaxNewTokensOption = 30,
    folder: Annotated[Path | None, opt.out_option("generations.csv, or what `evaluate` writes")] = None,
    judging: opt.JudgeOptions,
    reading: opt.ColumnOptions,
    positions: opt.PositionsOption = "all",
    orthogonalise: opt.OrthogonaliseOption = False,
    choosing: opt.SamplingOptions,
    model: opt.ModelOptions,
    raw: opt.RawOption = False,
    as_json: opt.JsonOption = False,
) -> None:
    """Write the same prompts at several strengths (factors on the strengths given with --use).

    With a judge, controls are written too, and figures, as `evaluate` does.
    """
    from neurosteer.artifacts.files import csv_text, write_files
    from neurosteer.evaluation import evaluate
    from neurosteer.examples.files import sweep_prompts
    from neurosteer.steering.session import Session

    place = files_place(folder)
    has_judge = judging != opt.JudgeOptions() or reading != opt.ColumnOptions()
    asked = judge_request(judging, reading) if has_judge else None
    named = named_by(use)
    positions = steered_where(named, positions)
    if asked is not None and (raw or positions != "all"):
        raise UsageError("With a judge, sweep takes neither --raw nor positions.")
    values = numbers(strengths, "--strengths")
    texts = read_prompts(prompts) if prompts else list(sweep_prompts())
    sampling = choosing.sampling()
    with progress_line() as progress:
        lm = model.load(progress, named.model)
        recipe, overlaps = _combined(recipe_of(named, lm, progress)[0], orthogonalise)
        options: dict[str, Any] = {
            "samples": samples, "max_new_tokens": max_new_tokens, "sampling": sampling, "progress": progress
        }  # fmt: skip
        started = time.perf_counter()
        if asked is not None:
            options |= {"prompts": texts, "strengths": values, "seed": choosing.seed, "out": place}
            found = evaluate(lm, recipe, asked.judge(recipe), **options)
        else:
            found = Session(lm).sweep(recipe, values, texts, positions=positions, raw=raw, **options)
    seconds = time.perf_counter() - started
    _print_overlaps(overlaps)
    if not isinstance(found, list):
        report(found, place, None, as_json)
        return
    rows = found
    if place is not None:
        write_files(place, {"generations.csv": csv_text(_COLUMNS, map(_row_data, rows))})
    if as_json or place is None:
        _print_rows(lm, rows, seconds, as_json, overlaps)
    else:
        out.print(f"Wrote {len(rows)} texts to {place / 'generations.csv'} in {seconds:.1f} s.")


# --- inputs ----------------------------------------------------------------------------------------------------------


def _combined(recipe: "Recipe", orthogonalise: bool) -> "tuple[Recipe, list[Overlap] | None]":
    """The recipe to steer with, and how much its vectors overlap as they were given; None where there are not two."""
    from neurosteer.artifacts.combining import cosines, orthogonalised
    from neurosteer.artifacts.vector import SteeringVector

    several = sum(isinstance(use.artifact, SteeringVector) for use in recipe.uses) > 1
    overlaps = cosines(recipe) if several else None
    return (orthogonalised(recipe) if orthogonalise else recipe), overlaps


# --- outputs ---------------------------------------------------------------------------------------------------------


def _row_data(row: "Row") -> dict[str, Any]:
    return {name: getattr(row, name) for name in _COLUMNS}


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
        print_json({"model": lm.name, "rows": data, "seconds": round(seconds, 3), **cosines})
        return
    for row in rows:
        label = f"strength {row.strength:+g}" if row.recipe.uses else "unsteered"
        out.print(f"[{label}, sample {row.sample}] {row.prompt}\n{row.text}\n")


def _print_overlaps(overlaps: "Sequence[Overlap] | None") -> None:
    """A line on stderr for each two of the vectors used; nothing where there are not two."""
    if overlaps is None:
        return
    pairs: dict[tuple[str, str], dict[int, float]] = {}
    for overlap in overlaps:
        pairs.setdefault((overlap.first, overlap.second), {})[overlap.layer] = overlap.cosine
    for (one, other), found in pairs.items():
        err.print(f"Cosine of {one} and {other}: {_cosines_text(found)}.")
    if not pairs:
        err.print("The vectors share no layer, so none overlap.")


def _cosines_text(cosines: Mapping[int, float]) -> str:
    """Each layer's cosine; of many layers, how far they go and where the largest is."""
    if len(cosines) <= _FEW_LAYERS:
        return ", ".join(f"{cosine:+.2f} at layer {layer}" for layer, cosine in cosines.items())
    most = max(cosines, key=lambda layer: abs(cosines[layer]))
    low, high = min(cosines.values()), max(cosines.values())
    return f"{cosines[most]:+.2f} at layer {most}, the most of {len(cosines)} layers ({low:+.2f} to {high:+.2f})"


def _print_stream(session: Any, rows: "Sequence[Row]", options: dict[str, Any]) -> None:
    for step in session.stream(rows, **options):
        sys.stdout.write(step.pieces[0])
        sys.stdout.flush()
    sys.stdout.write("\n")
