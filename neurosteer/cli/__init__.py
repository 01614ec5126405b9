"""The command line: parse, call the library, print. Results on stdout, progress and notes on stderr.

The verbs lie in modules by what they are about; `grammar`, `options`, `inputs`, `places` and `output` hold what they
share. No module here imports torch before a verb needs it: help and mistakes come at once.
"""

import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from neurosteer import processes
from neurosteer.cli import (
    build_commands,
    circuit_commands,
    evaluate_commands,
    export_commands,
    harness_commands,
    hub_commands,
    sae_commands,
    show_commands,
    steer_commands,
)
from neurosteer.cli.grammar import Verbs, add_verb, mistake
from neurosteer.cli.output import alone, fail, set_loudness, share, shows_faults
from neurosteer.errors import NeuroSteerError
from neurosteer.version import VERSION

__all__ = ["app", "main"]

_INTERRUPTED = 130
_SHARED = {"build", "layers", "calibrate", "evaluate"}
"""What several processes do together (`accelerate launch -m neurosteer build …`), as `sae train` is."""

app = typer.Typer(
    name="neurosteer",
    cls=Verbs,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
_PAGE, _MAKE, _STEER, _MEASURE = "See what there is", "Make artifacts", "Steer", "Measure"
_CIRCUITS, _ENGINES, _HUB, _SAES = "Circuits", "Other engines", "Share", "Sparse autoencoders"
# In the order in which --help lists them.
add_verb(app, "app", show_commands.open_page, _PAGE)
add_verb(app, "models", show_commands.models, _PAGE)
add_verb(app, "inspect", show_commands.inspect, _PAGE)
add_verb(app, "build", build_commands.build, _MAKE)
add_verb(app, "layers", build_commands.layers, _MAKE)
add_verb(app, "calibrate", build_commands.calibrate, _MAKE, tokens="max-new-tokens")
add_verb(app, "steer", steer_commands.steer, _STEER)
add_verb(app, "sweep", steer_commands.sweep, _STEER)
add_verb(app, "evaluate", evaluate_commands.evaluate, _MEASURE)
add_verb(app, "harness", harness_commands.harness, _MEASURE)
add_verb(app, "attribute", circuit_commands.attribute, _CIRCUITS)
add_verb(app, "edges", circuit_commands.edges, _CIRCUITS)
add_verb(app, "faithfulness", circuit_commands.faithfulness, _CIRCUITS)
add_verb(app, "decompose", circuit_commands.decompose, _CIRCUITS)
add_verb(app, "repl", circuit_commands.repl, _CIRCUITS)
add_verb(app, "export", export_commands.export, _ENGINES)
add_verb(app, "import", export_commands.import_file, _ENGINES)
add_verb(app, "push", hub_commands.push, _HUB)
add_verb(app, "pull", hub_commands.pull, _HUB)
add_verb(app, "search", hub_commands.search, _HUB)
app.add_typer(sae_commands.app, name="sae", rich_help_panel=_SAES)


@app.callback(invoke_without_command=True)
def _start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    """Steer language models with vectors and neuron circuits built from examples in seconds."""
    if version:
        typer.echo(f"neurosteer {VERSION}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)
    if context.invoked_subcommand in _SHARED:
        share()
    elif context.invoked_subcommand != "sae":  # whose verbs say so themselves
        alone()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line: exit 0 done, 2 the user's mistake (one line), 1 a fault of ours, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    set_loudness()
    try:
        code = app(arguments, prog_name="neurosteer", standalone_mode=False)
    except NeuroSteerError as error:
        fail(str(error), 2)
    except typer.TyperException as error:
        fail(mistake(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        if (ended := processes.told()) is not None:  # so that this one lost it
            fail(ended, 1)
        if shows_faults():
            raise
        fail(f"A fault of NeuroSteer: {type(error).__name__}: {error} (--verbose shows where).", 1)
    if code == _INTERRUPTED:
        fail("Interrupted.", _INTERRUPTED)
    if code:
        sys.exit(code)
