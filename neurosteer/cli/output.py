"""What every verb prints with: results on stdout, as text, tables or JSON; progress and mistakes on stderr."""

import json
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from neurosteer.progress import Progress

TABLE_WIDTH = 120  # also where the terminal is narrower: a cut model name is of no use

out = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
err = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


def print_json(data: Any) -> None:
    """One object on one line of stdout."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")


def new_table(headings: Iterable[str], *, right: Collection[str] = ()) -> Table:
    """A table without lines whose columns keep their width; those in `right` are ranged right."""
    table = Table(box=None)
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right" if heading in right else "left")
    return table


def print_table(table: Table, *, width: int = TABLE_WIDTH) -> None:
    """A table of at most `width` characters on stdout; what is in its cells is shown as it is."""
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)


@contextmanager
def progress_line(*, logged: bool = False) -> Iterator[Progress]:
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


def fail(message: str, code: int) -> NoReturn:
    """End the process with one line that says why."""
    err.print("neurosteer: " + " ".join(message.split()))
    sys.exit(code)
