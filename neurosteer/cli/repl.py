"""`neurosteer repl`: circuits by hand. Every command calls the library and prints what comes back."""

import cmd
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from neurosteer.artifacts.artifact import check_model
from neurosteer.artifacts.cards import parameter_rows
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.storage import save
from neurosteer.building.build import build
from neurosteer.circuits import (
    Attribution,
    CircuitGraph,
    Selection,
    find_edges,
    part,
    sweep_multipliers,
    text_diagram,
    top_predictions,
)
from neurosteer.cli.build_commands import OperationOption, RankOption, TopKOption, count_or_share
from neurosteer.cli.circuit_options import AttributionOptions, QuestionOptions, SelectionOptions, attributed, circuit_of
from neurosteer.cli.circuit_output import print_effect, print_left_out, print_multipliers, print_neurons
from neurosteer.cli.inputs import numbers
from neurosteer.cli.options import artifact_names
from neurosteer.cli.output import err, new_table, out, print_table, progress_line
from neurosteer.cli.places import artifact_place
from neurosteer.cli.repl_input import (
    begin_history,
    contrast_set,
    count_of,
    keep_history,
    options_like,
    parts_like,
    paths_like,
    read_options,
    words_of,
)
from neurosteer.errors import NeuroSteerError, UsageError
from neurosteer.examples.files import bundled_sets
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.sources import cache_folder

_MULTIPLIERS = "0 0.5 1 1.5 2"
_TARGETS = 30


# What three of the commands take, declared as verbs are.


def _discover(
    *,
    tokens: Annotated[list[str] | None, typer.Argument()] = None,
    how: AttributionOptions,
    selection: SelectionOptions,
) -> None: ...


def _contrast(
    *,
    rank: RankOption = None,
    operation: OperationOption = None,
    top_k: TopKOption = None,
) -> None: ...


def _edges(
    *,
    targets: Annotated[int, typer.Option("--targets")] = _TARGETS,
    count: Annotated[str, typer.Argument()] = "",
) -> None: ...


class Shell(cmd.Cmd):
    """One prompt, one circuit and one multiplier at a time. Ctrl-C stops a command, Ctrl-D ends the shell."""

    prompt = "neuron> "

    def __init__(self, lm: LanguageModel, circuit: NeuronCircuit | None = None, *, raw: bool = False) -> None:
        """Raises `MismatchError` for a circuit of another model."""
        super().__init__()
        if circuit is not None:
            check_model(circuit, lm.reference)
        self.lm = lm
        self.raw = raw
        self.circuit = circuit
        self.text = ""
        self.attribution: Attribution | None = None
        self.select: Selection | None = None
        self.graphs: dict[int, CircuitGraph] = {}
        self.multiplier = 2.0

    def run(self) -> None:
        """Read commands until the end of input or `quit`."""
        history = cache_folder() / "repl_history"
        begin_history(history)
        self.intro = f"{self.lm.name}: help lists the commands, quit ends."
        try:
            while True:
                try:
                    self.cmdloop()
                    return
                except KeyboardInterrupt:  # at the prompt: the line typed so far is dropped
                    self.intro = "^C (quit ends)"
        finally:
            keep_history(history)

    # --- how cmd.Cmd behaves ------------------------------------------------------------------------------------------

    def onecmd(self, line: str) -> bool:
        """Run a line; whatever goes wrong or is interrupted, the shell goes on."""
        try:
            return bool(super().onecmd(line))
        except KeyboardInterrupt:
            err.print("Stopped.")
        except NeuroSteerError as error:
            err.print(" ".join(str(error).split()))
        except Exception as error:
            err.print(f"A fault of NeuroSteer: {type(error).__name__}: {error}")
        return False

    def emptyline(self) -> bool:
        return False

    def default(self, line: str) -> None:
        raise UsageError(f"There is no command {line.split()[0][:40]!r}; help lists them.")

    def do_help(self, arg: str) -> None:
        """help [COMMAND]: what there is."""
        names = [name for name in self.get_names() if name.startswith("do_") and name != "do_EOF"]
        wanted = [name for name in names if not arg or name == f"do_{arg}"]
        if not wanted:
            raise UsageError(f"There is no command {arg[:40]!r}; help lists them.")
        for name in wanted:
            out.print(" ".join((getattr(self, name).__doc__ or "").split()))

    def do_quit(self, arg: str) -> bool:
        """quit: end (so does Ctrl-D)."""
        return True

    def do_EOF(self, arg: str) -> bool:
        out.print()
        return True

    # --- commands -----------------------------------------------------------------------------------------------------

    def do_prompt(self, arg: str) -> None:
        """prompt TEXT: what the model is to go on from; shows what it would write next."""
        if arg:
            predictions = top_predictions(self.lm, arg, k=10, raw=self.raw)
            self.text, self.attribution = arg, None
        else:
            predictions = top_predictions(self.lm, self._text(), k=10, raw=self.raw)
        table = new_table(("Next", "Probability"), right=("Probability",))
        for one in predictions:
            table.add_row(repr(one.text), f"{one.probability:.4f}")
        print_table(table)

    def do_discover(self, arg: str) -> None:
        """discover [--specific] [--keep-universal] [--metric logit] [--attention frozen] [--top-k N | --share S |
        --percent P | --per-layer N] TARGET [COUNTERFACTUAL]: find the circuit behind a next token. Where plain text
        goes on, a word without quotes gets a space before it; " Paris" in quotes is taken as it is. --specific leaves
        out, too, what everyday answers are owed to."""
        given = read_options("discover", _discover, words_of(arg))
        words = self._tokens(given["tokens"] or [], arg)
        if not 1 <= len(words) <= 2:
            raise UsageError("Write discover TARGET [COUNTERFACTUAL], like: discover Paris London")
        select = given["selection"].rule()
        with progress_line() as progress:
            question = QuestionOptions(target=words[:1], counterfactual=words[1:], raw=self.raw)
            found = attributed(self.lm, [self._text()], question, given["how"], progress)
        self.circuit, self.attribution, self.select = found.circuit(select=select), found, select
        self.graphs = {}
        one = found.prompts[0]
        for note in found.notes:
            out.print(note)
        against = f" against {one.counterfactual.text!r}" if one.counterfactual else ""
        out.print(f"{one.target.text!r}{against}: metric {one.metric:+.4f}, circuit of {self.circuit.size} neurons.")
        print_neurons(self.circuit, count=10)
        print_left_out(found)

    def do_contrast(self, arg: str) -> None:
        """contrast [--rank R] [--operation O] [--top-k N] FILE (or a bundled set: sentiment, formality, gratitude), or
        contrast A | B // C | D: find the neurons that tell positive texts from negative ones."""
        leading = re.match(r"(--[\w-]+[ =]\S+\s*)*", arg)  # the texts may hold anything
        options = leading[0] if leading else ""
        given = read_options("contrast", _contrast, options.replace("=", " ").split())
        examples = contrast_set(arg[len(options) :])
        chosen = {name: value for name, value in given.items() if value is not None}
        if "top_k" in chosen:
            chosen["top_k"] = count_or_share(chosen["top_k"])
        with progress_line() as progress:
            # What is multiplied by is said here: there is no strength to calibrate.
            found = build(self.lm, examples, method="cna", calibrate=False, progress=progress, **chosen)
        assert isinstance(found, NeuronCircuit)
        self.circuit, self.attribution = found, None
        out.print(f"{found.name}: circuit of {found.size} neurons.")
        print_neurons(found, count=10)

    def do_ablate(self, arg: str) -> None:
        """ablate [PART]: what is written without the circuit, or without a part: top10, L23, L23/N807."""
        self._compare(self._part(arg), 0.0)

    def do_amplify(self, arg: str) -> None:
        """amplify [PART] [MULTIPLIER]: what is written with the circuit, or a part of it, multiplied."""
        *parts, last = arg.split() or [""]
        try:
            multiplier = float(last)
        except ValueError:
            parts, multiplier = [*parts, last], self.multiplier
        self._compare(self._part(" ".join(parts)), multiplier)

    def do_multiplier(self, arg: str) -> None:
        """multiplier [M]: what amplify multiplies by."""
        if arg:
            value = numbers(arg, "multiplier")[0]
            if not math.isfinite(value):
                raise UsageError(f"multiplier is {arg[:40]!r}; it must be a finite number.")
            self.multiplier = value
        out.print(f"multiplier {self.multiplier:g}")

    def do_sweep(self, arg: str) -> None:
        """sweep [M M ...]: what comes next with the circuit at several multipliers."""
        multipliers = numbers(arg or _MULTIPLIERS, "sweep")
        targets = self._targets()
        points = sweep_multipliers(self.lm, self._circuit(), self._text(), multipliers, targets, 3, raw=self.raw)
        print_multipliers(points, targets)

    def do_edges(self, arg: str) -> None:
        """edges [--targets N] [N]: the strongest edges between the neurons that discover found, into this many of the
        strongest (30)."""
        given = read_options("edges", _edges, words_of(arg))
        out.print(text_diagram(self._graph(given["targets"]), edges=count_of(given["count"], 20)))

    def do_hubs(self, arg: str) -> None:
        """hubs [N]: the neurons that take and give most."""
        headings = ("Neuron", "In", "Out", "Weight in", "Weight out")
        table = new_table(headings, right=headings[1:])
        for hub in self._graph().hubs[: count_of(arg, 10)]:
            weights = (f"{hub.weight_in:.3f}", f"{hub.weight_out:.3f}")
            table.add_row(f"L{hub.layer}/N{hub.neuron}", str(hub.n_in), str(hub.n_out), *weights)
        print_table(table)

    def do_top(self, arg: str) -> None:
        """top [N]: the circuit's strongest neurons."""
        print_neurons(part(self._circuit(), f"top{count_of(arg, 20)}"), count=count_of(arg, 20))

    def do_save(self, arg: str) -> None:
        """save FOLDER: write the circuit."""
        folder = " ".join(words_of(arg))
        if not folder:
            raise UsageError("Write where to save the circuit: save FOLDER.")
        out.print(f"Written to {save(self._circuit(), artifact_place(Path(folder)))}.")

    def do_load(self, arg: str) -> None:
        """load REF: take a circuit from a folder, vectors/ or the Hub."""
        if not arg:
            raise UsageError("Write which circuit to load: load REF.")
        found = circuit_of(" ".join(words_of(arg)))
        warning = check_model(found, self.lm.reference)
        if warning:
            err.print(f"Warning: {warning}")
        self.circuit, self.attribution = found, None
        out.print(f"{found.name}: circuit of {found.size} neurons, {found.method}.")

    def do_info(self, arg: str) -> None:
        """info: the model, the prompt and the circuit at hand."""
        shape = self.lm.shape
        out.print(f"model: {self.lm.name}, {shape.n_layers} layers of {shape.d_mlp} neurons")
        out.print(f"prompt: {self.text or 'none'} ({'plain text' if self._is_plain else 'chat template'})")
        if self.circuit is None:
            out.print("circuit: none")
        else:
            layers = ", ".join(map(str, self.circuit.layers))
            out.print(f"circuit: {self.circuit.name}, {self.circuit.size} neurons in layers {layers}")
            for name, value in parameter_rows(self.circuit):
                out.print(f"{name.lower()}: {value}")
        out.print(f"multiplier: {self.multiplier:g}")

    # --- completion ---------------------------------------------------------------------------------------------------

    def completenames(self, text: str, *ignored: Any) -> list[str]:
        return [name for name in super().completenames(text, *ignored) if name != "EOF"]

    def complete_ablate(self, text: str, *ignored: Any) -> list[str]:
        return [] if self.circuit is None else parts_like(self.circuit, text)

    complete_amplify = complete_ablate

    def complete_discover(self, text: str, *ignored: Any) -> list[str]:
        return options_like(_discover, text)

    def complete_contrast(self, text: str, *ignored: Any) -> list[str]:
        return [
            *options_like(_contrast, text),
            *(name for name in bundled_sets() if name.startswith(text)),
            *paths_like(text),
        ]

    def complete_load(self, text: str, *ignored: Any) -> list[str]:
        return [*artifact_names(text), *paths_like(text)]

    def complete_save(self, text: str, *ignored: Any) -> list[str]:
        return paths_like(text)

    # --- what commands share ------------------------------------------------------------------------------------------

    @property
    def _is_plain(self) -> bool:
        """Whether the model goes on in the prompt's own text."""
        return self.raw or not self.lm.chat

    def _text(self) -> str:
        if not self.text:
            raise UsageError("There is no prompt yet; write one: prompt The capital of France is")
        return self.text

    def _circuit(self) -> NeuronCircuit:
        if self.circuit is None:
            raise UsageError("There is no circuit yet; discover one, or load one.")
        return self.circuit

    def _part(self, text: str) -> NeuronCircuit:
        return part(self._circuit(), text or "all")

    def _graph(self, n_targets: int = _TARGETS) -> CircuitGraph:
        if self.attribution is None:
            raise UsageError("Edges are those of a circuit found for the prompt at hand; discover one first.")
        if n_targets not in self.graphs:
            with progress_line() as progress:
                self.graphs[n_targets] = find_edges(
                    self.lm, self.attribution, select=self.select, n_targets=n_targets, progress=progress
                )
        return self.graphs[n_targets]

    def _tokens(self, words: Sequence[str], arg: str) -> list[str]:
        """The words as tokens that go on from the prompt; those that stand in quotes in `arg` as they are."""
        space = " " if self._is_plain and not self._text()[-1].isspace() else ""
        quoted = {word for word in words for mark in "\"'" if f"{mark}{word}{mark}" in arg}
        return [word if word in quoted else space + word for word in words]

    def _targets(self) -> list[str]:
        """The token that the circuit was found for, and what it was held against."""
        if self.attribution is None:
            return []
        one = self.attribution.prompts[0]
        return [token.text for token in (one.target, one.counterfactual) if token is not None]

    def _compare(self, circuit: NeuronCircuit, multiplier: float) -> None:
        with progress_line() as progress:
            print_effect(self.lm, self._text(), circuit, multiplier, self._targets(), raw=self.raw, progress=progress)
