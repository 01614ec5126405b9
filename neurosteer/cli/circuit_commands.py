"""The verbs about circuits: which neurons an answer is owed to, how they feed one another, whether they do the work."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neurosteer.cli import options as opt
from neurosteer.cli.choices import Ablation, Aggregate
from neurosteer.cli.circuit_options import (
    AttributionOptions,
    CircuitOption,
    QuestionOptions,
    SelectionOptions,
    attributed,
    circuit_of,
    vector_of,
)
from neurosteer.cli.circuit_output import (
    SHOWN,
    faithfulness_data,
    note_parts,
    print_attribution,
    print_faithfulness,
    print_left_out,
    print_neurons,
    rows_of,
    write_graph,
)
from neurosteer.cli.inputs import numbers
from neurosteer.cli.output import out, print_json, progress_line
from neurosteer.cli.places import artifact_place, files_place
from neurosteer.errors import UsageError

if TYPE_CHECKING:
    pass


def attribute(
    *,
    question: QuestionOptions,
    folder: Annotated[Path | None, opt.out_option("the circuit")] = None,
    name: Annotated[str | None, typer.Option(help="The circuit's name.")] = None,
    selection: SelectionOptions,
    aggregate: Annotated[Aggregate, typer.Option(help="How several prompts are put together.")] = "mean",
    how: AttributionOptions,
    model: opt.ModelOptions,
    as_json: opt.JsonOption = False,
) -> None:
    """Find the neurons that a next token is owed to, and write them as a circuit. Several prompts: one JSON each."""
    from neurosteer.artifacts.storage import save

    prompts, select = question.prompts(), selection.rule()
    place = artifact_place(folder) if folder is not None else None
    with progress_line() as progress:
        lm = model.load(progress)
        found = attributed(lm, prompts, question, how, progress)
        circuit = found.circuit(name, select=select, aggregate=aggregate)
    note_parts(found)
    written = save(circuit, place) if place is not None else None
    if as_json:
        rows = [found.data(select, prompt=number) for number in range(len(prompts))]
        print_json(rows[0] if len(rows) == 1 else {"prompts": rows})
        return
    for number in range(len(prompts)):
        print_attribution(found, select, number)
    print_left_out(found)
    if written is not None:
        out.print(f"Written to {written}: {circuit.size} neurons. Try: neurosteer repl --circuit {written}")


def edges(
    *,
    question: QuestionOptions,
    n_targets: Annotated[int, typer.Option("--targets", help="Edges into this many of the strongest neurons.")] = 30,
    count: Annotated[int | None, typer.Option(help="The strongest edges, this many; else all.")] = None,
    folder: Annotated[Path | None, opt.out_option("edges.json, edges.dot and edges.html")] = None,
    selection: SelectionOptions,
    how: AttributionOptions,
    model: opt.ModelOptions,
    as_json: opt.JsonOption = False,
) -> None:
    """Show how the neurons behind a next token feed one another."""
    from neurosteer.circuits import find_edges, text_diagram

    place = files_place(folder)
    prompts, select = question.prompts(), selection.rule()
    if len(prompts) != 1:
        raise UsageError(f"There are {len(prompts)} prompts; edges are those of one.")
    with progress_line() as progress:
        lm = model.load(progress)
        found = attributed(lm, prompts, question, how, progress)
        graph = find_edges(lm, found, select=select, n_targets=n_targets, progress=progress)
    note_parts(found)
    files = write_graph(graph, place) if place is not None else ()
    if as_json:
        print_json(graph.data(count))
        return
    out.print(text_diagram(graph, edges=count or SHOWN))
    if files:
        out.print(f"Written: {', '.join(map(str, files))}.")


def faithfulness(
    *,
    question: QuestionOptions,
    circuit: CircuitOption = None,
    percents: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Sizes, in percent of the neurons ranked.")
    ] = "0,0.2,0.5,1,2,5,10,20,50,70,100",
    ablation: Annotated[Ablation, typer.Option(help="paired: each with its counterfactual prompt.")] = "zero",
    counterfactual_prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="mean, paired: what ablated neurons come from.")
    ] = None,
    draws: opt.RandomOption = None,
    seed: opt.SeedOption = 0,
    how: AttributionOptions,
    model: opt.ModelOptions,
    as_json: opt.JsonOption = False,
) -> None:
    """Show how much of the answer the strongest neurons keep by themselves, and how much is left without them."""
    from neurosteer.circuits import measure_faithfulness

    prompts, sizes = question.prompts(), numbers(percents, "--percents")
    chosen = circuit_of(circuit) if circuit is not None else None
    with progress_line() as progress:
        lm = model.load(progress, chosen.model.name if chosen else None)
        found = attributed(lm, prompts, question, how, progress)
        result = measure_faithfulness(
            lm, found, circuit=chosen, percents=sizes, ablation=ablation,
            counterfactual_prompts=counterfactual_prompt, draws=draws if draws is not None else 0 if as_json else 3,
            seed=seed, progress=progress,
        )  # fmt: skip
    note_parts(found)
    if as_json:
        print_json(faithfulness_data(result))
        return
    print_faithfulness(result)


def decompose(
    *,
    reference: Annotated[
        str, typer.Argument(metavar="REF", help="A steering vector.", autocompletion=opt.artifact_names)
    ],
    circuit: CircuitOption = None,
    layer: Annotated[int | None, typer.Option(help="One of the vector's; its last when left out.")] = None,
    top_k: Annotated[int, typer.Option(help="How many neurons.")] = 200,
    folder: Annotated[Path | None, opt.out_option("the neurons, as a circuit")] = None,
    model: opt.ModelOptions,
    as_json: opt.JsonOption = False,
) -> None:
    """Show which neurons write along a steering vector, and how it compares with a circuit."""
    from dataclasses import asdict

    from neurosteer.artifacts.storage import save
    from neurosteer.circuits import compare_with_circuit
    from neurosteer.circuits import decompose as take_apart

    place = artifact_place(folder) if folder is not None else None
    vector, other = vector_of(reference), circuit_of(circuit) if circuit is not None else None
    with progress_line() as progress:
        lm = model.load(progress, vector.model.name)
        found = take_apart(lm, vector, top_k, layer=layer)
        compared = compare_with_circuit(lm, vector, other, layer=layer) if other is not None else None
    if place is not None:
        save(found.circuit, place)
    figures = {"variance_explained": found.variance_explained, "variance_by_chance": found.variance_by_chance}
    if as_json:
        comparison = {"comparison": asdict(compared)} if compared is not None else {}
        print_json(
            {"vector": vector.name, "layer": found.layer, "neurons": rows_of(found.circuit), **figures} | comparison
        )
        return
    print_neurons(found.circuit, "Cosine")
    out.print(
        f"{top_k} neurons span {found.variance_explained:.1%} of {vector.name} at layer {found.layer}; as many random "
        f"ones of their layers {found.variance_by_chance:.1%}."
    )
    if compared is not None:
        correlation = "–" if compared.rank_correlation is None else f"{compared.rank_correlation:+.3f}"
        out.print(
            f"{compared.circuit}: {compared.shared} of its {compared.neurons} neurons up to layer {compared.layer} are "
            f"among the as many nearest ({compared.expected:.1f} by chance); they span "
            f"{compared.variance_explained:.1%} ({compared.variance_by_chance:.1%} by chance); "
            f"rank correlation {correlation}."
        )


def repl(
    *,
    circuit: CircuitOption = None,
    model: opt.ModelOptions,
    raw: opt.RawOption = False,
) -> None:
    """Explore circuits by hand: find one, ablate it, amplify it, sweep, see its edges. `help` lists the commands."""
    from neurosteer.cli.repl import Shell

    chosen = circuit_of(circuit) if circuit is not None else None
    with progress_line() as progress:
        lm = model.load(progress, chosen.model.name if chosen else None)
    Shell(lm, chosen, raw=raw).run()
