"""What every verb prints with: results on stdout, as text, tables or JSON; progress, notes and mistakes on stderr."""

import io
import json
import logging
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from neurosteer import processes
from neurosteer.progress import Progress, silent

if TYPE_CHECKING:
    from rich.table import Table

TABLE_WIDTH = 120  # also where the terminal is narrower: a cut model name is of no use
_DEBUG = "NEUROSTEER_DEBUG"


@dataclass
class Stream:
    """stdout or stderr as it is at the time, which tests and callers may have put another in the place of."""

    name: Literal["stdout", "stderr"]
    quiet: bool = False
    verbose: bool = False

    def print(self, text: str = "") -> None:
        """A line, or several, as they are."""
        if not self.quiet:
            print(text, file=getattr(sys, self.name), flush=True)

    @property
    def is_terminal(self) -> bool:
        """Whether somebody looks at it."""
        stream = getattr(sys, self.name)
        return stream is not None and stream.isatty()


out, err = Stream("stdout"), Stream("stderr")
_muted = False


def set_loudness(*, quiet: bool = False, verbose: bool = False) -> None:
    """How much is said on stderr: mistakes only, or every step and, of a fault, where it arose."""
    quiet = quiet or _muted
    err.quiet, err.verbose = quiet, verbose and not quiet
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.NOTSET
    logging.getLogger("neurosteer").setLevel(level)


def share() -> None:
    """Share the verb with the processes beside this one, where there are any: the first speaks for all."""
    if processes.join_processes() > 0:
        _mute()


def alone() -> None:
    """The first of several processes does the verb by itself; the others are done."""
    if processes.are_several() and os.environ["RANK"] != "0":
        sys.exit(0)


def _mute() -> None:
    global _muted
    _muted = True
    sys.stdout = io.StringIO()
    set_loudness(quiet=True)


def shows_faults() -> bool:
    """Whether a fault of ours is to be shown with where it arose."""
    return err.verbose or bool(os.environ.get(_DEBUG))


def print_json(data: Any) -> None:
    """One object on one line of stdout."""
    sys.stdout.write(json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")


def new_table(headings: Iterable[str], *, right: Collection[str] = ()) -> "Table":
    """A table without lines whose columns keep their width; those in `right` are ranged right."""
    from rich.table import Table

    table = Table(box=None)
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right" if heading in right else "left")
    return table


def print_table(table: "Table", *, width: int = TABLE_WIDTH) -> None:
    """A table of at most `width` characters on stdout; what is in its cells is shown as it is."""
    from rich.console import Console

    Console(width=width, highlight=False, markup=False, emoji=False).print(table)


@contextmanager
def progress_line(*, logged: bool = False) -> Iterator[Progress]:
    """A progress line on stderr where that is a terminal; elsewhere silence, or a line each where `logged`."""
    if err.quiet or not (err.is_terminal or logged or err.verbose):
        yield silent
        return
    if not err.is_terminal or err.verbose:
        yield lambda message, fraction=None: err.print(message)
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=Console(stderr=True, markup=False, emoji=False), transient=True) as bar:
        task = bar.add_task("Starting", total=None)

        def show(message: str, fraction: float | None = None) -> None:
            bar.update(task, description=message, total=None if fraction is None else 1.0, completed=fraction or 0.0)

        yield show


def fail(message: str, code: int) -> NoReturn:
    """End the process with one line that says why, however quiet it is to be; of several that end for the same
    reason one says so."""
    if processes.tell(message):
        who = f" (process {processes.rank()})" if processes.rank() else ""
        sys.stderr.write(f"neurosteer{who}: {' '.join(message.split())}\n")
    sys.exit(code)
