"""What is typed at the shell: words, options as the verbs take them, parts of lines to complete, and the history."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.cli.grammar import flattened, mistake
from neurosteer.cli.output import err
from neurosteer.errors import UsageError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.reading import paste_examples, read_examples

try:
    import readline
except ImportError:  # Windows: no completion and no history
    readline = None

_HISTORY = 1000


def read_options(name: str, function: Callable[..., None], words: Sequence[str]) -> dict[str, Any]:
    """What `function`, declared as a verb is, is to be called with. Raises `UsageError` for words it does not take."""
    try:
        return _command(name, function).main(list(words), prog_name=name, standalone_mode=False)
    except typer.TyperException as error:
        raise UsageError(f"{mistake(error).rstrip('.')}; write help {name} to see what it takes.") from None


def options_like(function: Callable[..., None], text: str) -> list[str]:
    """The options of `function` that begin with `text`."""
    names = (name for one in _command("", function).params for name in one.opts)
    return [name for name in names if name.startswith("--") and text and name.startswith(text)]


def _command(name: str, function: Callable[..., None]) -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(name, add_help_option=False)(flattened(function, dict))
    return typer.main.get_command(app)


def words_of(line: str) -> list[str]:
    """The words of a line, as a shell parts them. Raises `UsageError`."""
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(f"{line[:60]!r} has a quotation mark without its partner; close it.") from error


def contrast_set(line: str) -> ContrastSet:
    """The examples that `A | B // C | D` holds, or a file's or bundled set's. Raises `UsageError`, `ExamplesError`."""
    positive, parted, negative = line.partition("//")
    if parted:
        return paste_examples(*("\n".join(text.strip() for text in side.split("|")) for side in (positive, negative)))
    if not line:
        raise UsageError("Write a file of examples, or texts: contrast good | fine // bad | poor")
    return read_examples(" ".join(words_of(line)))


def count_of(line: str, default: int) -> int:
    """A number of rows. Raises `UsageError`."""
    if not line:
        return default
    if not line.isdecimal() or not 1 <= int(line) <= 10_000:
        raise UsageError(f"{line[:40]!r} is no number of rows; write one from 1 to 10000.")
    return int(line)


def paths_like(text: str) -> list[str]:
    """Files and folders that begin with `text`, folders with a slash behind them."""
    folder, _, name = text.rpartition("/")
    place = Path(f"{folder}/" if "/" in text else ".").expanduser()
    try:
        found = sorted(place.iterdir())
    except OSError:
        return []
    shown = [one for one in found if one.name.startswith(name) and (name or not one.name.startswith("."))]
    start = f"{folder}/" if "/" in text else ""
    return [f"{start}{one.name}{'/' if one.is_dir() else ''}" for one in shown]


def parts_like(circuit: NeuronCircuit, text: str) -> list[str]:
    """The names of parts of the circuit that begin with `text`; single neurons once a slash is typed."""
    pairs = zip(circuit.neuron_layers.tolist(), circuit.neurons.tolist(), strict=True)
    parts = ["all", "top10", "top50", *(f"L{layer}" for layer in circuit.layers)]
    neurons = [f"L{layer}/N{neuron}" for layer, neuron in pairs] if "/" in text else []
    return [one for one in (*parts, *neurons) if one.lower().startswith(text.lower())]


def begin_history(path: Path) -> None:
    """Take up the lines of the last shell, and completion by the tab key."""
    if readline is None:
        return
    readline.set_completer_delims(" \t\n")
    if "libedit" in (readline.__doc__ or ""):
        readline.parse_and_bind("bind ^I rl_complete")
    try:
        readline.read_history_file(path)
    except OSError:  # there is none yet
        readline.clear_history()


def keep_history(path: Path) -> None:
    """Keep the lines for the next shell."""
    if readline is None:
        return
    readline.set_history_length(_HISTORY)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.write_history_file(path)
    except OSError as error:
        err.print(f"The history could not be kept in {path} ({error.strerror}).")
