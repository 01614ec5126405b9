"""The command line: parse, call the library, print. Results on stdout, progress and logs on stderr.

The verbs lie in modules by what they are about; `options` and `output` hold what they share.
"""

import logging
import os
import sys

import typer

from neurosteer.cli import (
    build_commands,
    circuit_commands,
    evaluate_commands,
    harness_commands,
    hub_commands,
    sae_commands,
    show_commands,
    steer_commands,
)
from neurosteer.cli.output import fail
from neurosteer.errors import NeuroSteerError

__all__ = ["app", "main"]

app = typer.Typer(
    name="neurosteer",
    help="Steer language models with vectors and neuron circuits built from examples in seconds.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# In the order in which --help lists them.
app.command("app")(show_commands.open_page)
app.command("models")(show_commands.models)
app.command("build")(build_commands.build)
app.command("layers")(build_commands.layers)
app.command("calibrate")(build_commands.calibrate)
app.command("steer")(steer_commands.steer)
app.command("sweep")(steer_commands.sweep)
app.command("evaluate")(evaluate_commands.evaluate)
app.command("harness")(harness_commands.harness)
app.command("attribute")(circuit_commands.attribute)
app.command("edges")(circuit_commands.edges)
app.command("faithfulness")(circuit_commands.faithfulness)
app.command("decompose")(circuit_commands.decompose)
app.command("repl")(circuit_commands.repl)
app.command("inspect")(show_commands.inspect)
app.command("push")(hub_commands.push)
app.command("pull")(hub_commands.pull)
app.command("search")(hub_commands.search)
# A module with a Typer of its own is one line: without a name, its verbs stand beside those above.
app.add_typer(sae_commands.app, name="sae")


def main() -> None:
    """Run the command line: exit 0 done, 2 the user's mistake (one line), 1 a fault of ours."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except NeuroSteerError as error:
        fail(str(error), 2)
    except KeyboardInterrupt:
        fail("Interrupted.", 130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        if os.environ.get("NEUROSTEER_DEBUG"):
            raise
        fail(f"A fault of NeuroSteer: {type(error).__name__}: {error} (NEUROSTEER_DEBUG=1 shows where).", 1)
