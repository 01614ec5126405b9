"""The verb that asks lm-evaluation-harness what a recipe does to capability."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neurosteer.cli.inputs import everywhere, named_by, recipe_of
from neurosteer.cli.options import JsonOption, ModelOptions, RawOption, UseOption, out_option
from neurosteer.cli.output import new_table, out, print_json, print_table, progress_line
from neurosteer.cli.places import files_place

if TYPE_CHECKING:
    from neurosteer.evaluation.harness import HarnessResult


def harness(
    *,
    use: UseOption,
    tasks: Annotated[
        list[str],
        typer.Option(
            metavar="TASKS", help="Names of lm-evaluation-harness, or YAML files; parted by commas, or given again."
        ),
    ],
    folder: Annotated[Path | None, out_option("harness.json and harness_samples.jsonl")] = None,
    limit: Annotated[int | None, typer.Option(help="Of each task, at most this many documents.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests in one pass.")] = 8,
    model: ModelOptions,
    raw: RawOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure capability on tasks of lm-evaluation-harness (an extra), unsteered and steered."""
    from neurosteer.evaluation.harness import find_tasks, harness, write_harness

    place, named = files_place(folder), everywhere(named_by(use))
    names = [name.strip() for given in tasks for name in given.split(",") if name.strip()]
    find_tasks(names)  # mistakes show before the model is loaded
    with progress_line() as progress:
        lm = model.load(progress, named.model)
        recipe, _ = recipe_of(named, lm, progress)
    found = harness(lm, recipe, names, limit=limit, batch_size=batch_size, raw=raw)
    written = write_harness(found, place) if place is not None else ()
    if as_json:
        print_json(found.data())
        return
    _print_figures(found)
    if written:
        out.print(f"Written: {', '.join(map(str, written))}.")


def _print_figures(found: "HarnessResult") -> None:
    headings = ("task", "metric", "documents", "unsteered", "steered", "difference")
    table = new_table(headings, right=headings[2:])
    for figure in found.figures:
        metric = figure.metric if figure.filter == "none" else f"{figure.metric} ({figure.filter})"
        plain, steered = figure.unsteered, figure.steered
        difference = "–" if plain is None or steered is None else f"{steered - plain:+.4f}"
        both = (_with_error(plain, figure.unsteered_error), _with_error(steered, figure.steered_error))
        table.add_row(figure.task, metric, str(figure.n), *both, difference)
    print_table(table)


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
