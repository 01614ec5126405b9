"""The verbs about circuits: which neurons an answer is owed to, how they feed one another, whether they do the work."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neurosteer.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    RawOption,
    RevisionOption,
    SeedOption,
    load,
)
from neurosteer.cli.output import err, new_table, out, print_json, print_table, progress_line
from neurosteer.errors import UsageError
from neurosteer.progress import Progress

if TYPE_CHECKING:
    from neurosteer.artifacts.circuit import NeuronCircuit
    from neurosteer.artifacts.vector import SteeringVector
    from neurosteer.circuits import Attribution, CircuitGraph, Faithfulness, Selection
    from neurosteer.models.language_model import LanguageModel

PromptsOption = Annotated[list[str], typer.Option("--prompt", help="May be given more than once.")]
TargetsOption = Annotated[
    list[str],
    typer.Option("--target", help="The next token, like ' Paris'; one for all prompts, or one each."),
]
CounterfactualsOption = Annotated[
    list[str] | None,
    typer.Option("--counterfactual", help="What it is held against; the best other token when left out."),
]
MetricOption = Annotated[str, typer.Option("--metric", help="difference (from the counterfactual) or logit.")]
AttentionOption = Annotated[str, typer.Option("--attention", help="full, or frozen: with a constant pattern.")]
KeepUniversalOption = Annotated[
    bool, typer.Option("--keep-universal", help="Count neurons that fire whatever the text is about, too.")
]
SpecificOption = Annotated[
    bool, typer.Option("--specific", help="Leave out neurons, too, that everyday answers are owed to.")
]
SeedResponseOption = Annotated[str, typer.Option("--seed-response", help="How the answer begins, before the target.")]
TopKOption = Annotated[int | None, typer.Option("--top-k", help="The strongest neurons, this many (200).")]
ShareOption = Annotated[float | None, typer.Option("--share", help="The fewest that make up this share (0 to 1).")]
PercentOption = Annotated[float | None, typer.Option("--percent", help="Those of this percentage of the metric.")]
PerLayerOption = Annotated[int | None, typer.Option("--per-layer", help="The strongest of every layer, this many.")]

_SHOWN = 20


def attribute(
    prompt: PromptsOption,
    target: TargetsOption,
    counterfactual: CounterfactualsOption = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder to write the circuit to.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="The circuit's name.")] = None,
    top_k: TopKOption = None,
    share: ShareOption = None,
    percent: PercentOption = None,
    per_layer: PerLayerOption = None,
    aggregate: Annotated[str, typer.Option("--aggregate", help="Several prompts: mean or union.")] = "mean",
    metric: MetricOption = "difference",
    attention: AttentionOption = "full",
    seed_response: SeedResponseOption = "",
    keep_universal: KeepUniversalOption = False,
    specific: SpecificOption = False,
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    raw: RawOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find the neurons that a next token is owed to, and write them as a circuit. Several prompts: one JSON each."""
    from neurosteer.artifacts.storage import save

    select = selection(top_k, share, percent, per_layer)
    asked: dict[str, Any] = {"metric": metric, "attention": attention, "seed_response": seed_response}
    asked |= {"keep_universal": keep_universal, "specific": specific}
    with progress_line() as progress:
        lm = load(model, revision, device, dtype, progress)
        found = attributed(lm, prompt, target, counterfactual, raw, asked, progress)
        circuit = found.circuit(name, select=select, aggregate=aggregate)  # type: ignore[arg-type]
    _note_parts(found)
    written = save(circuit, folder) if folder is not None else None
    if as_json:
        rows = [found.data(select, prompt=place) for place in range(len(prompt))]
        print_json(rows[0] if len(rows) == 1 else {"prompts": rows})
        return
    for place in range(len(prompt)):
        _print_attribution(found, select, place)
    print_left_out(found)
    if written is not None:
        out.print(f"Written to {written}: {circuit.size} neurons. Try: neurosteer repl --circuit {written}")


def edges(
    prompt: PromptsOption,
    target: TargetsOption,
    counterfactual: CounterfactualsOption = None,
    n_targets: Annotated[int, typer.Option("--targets", help="Edges into this many of the strongest neurons.")] = 30,
    count: Annotated[int | None, typer.Option("--count", help="The strongest edges, this many; else all.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder for edges.json, edges.dot, edges.html.")] = None,
    top_k: TopKOption = None,
    share: ShareOption = None,
    percent: PercentOption = None,
    per_layer: PerLayerOption = None,
    metric: MetricOption = "difference",
    attention: AttentionOption = "full",
    seed_response: SeedResponseOption = "",
    keep_universal: KeepUniversalOption = False,
    specific: SpecificOption = False,
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    raw: RawOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show how the neurons behind a next token feed one another."""
    from neurosteer.circuits import find_edges, text_diagram

    if len(prompt) != 1:
        raise UsageError(f"There are {len(prompt)} prompts; edges are those of one.")
    select = selection(top_k, share, percent, per_layer)
    asked: dict[str, Any] = {"metric": metric, "attention": attention, "seed_response": seed_response}
    asked |= {"keep_universal": keep_universal, "specific": specific}
    with progress_line() as progress:
        lm = load(model, revision, device, dtype, progress)
        found = attributed(lm, prompt, target, counterfactual, raw, asked, progress)
        graph = find_edges(lm, found, select=select, n_targets=n_targets, progress=progress)
    _note_parts(found)
    files = _write_graph(graph, folder) if folder is not None else []
    if as_json:
        print_json(graph.data(count))
        return
    out.print(text_diagram(graph, edges=count or _SHOWN))
    if files:
        out.print(f"Written: {', '.join(map(str, files))}.")


def faithfulness(
    prompt: PromptsOption,
    target: TargetsOption,
    counterfactual: CounterfactualsOption = None,
    circuit: Annotated[
        str | None, typer.Option("--circuit", help="Rank this circuit's neurons (REF); else all by attribution.")
    ] = None,
    percents: Annotated[
        str, typer.Option("--percents", help="Sizes, in percent of the neurons ranked.")
    ] = "0,0.2,0.5,1,2,5,10,20,50,70,100",
    ablation: Annotated[
        str, typer.Option("--ablation", help="zero, mean, or paired (each with its counterfactual prompt).")
    ] = "zero",
    counterfactual_prompt: Annotated[
        list[str] | None, typer.Option("--counterfactual-prompt", help="mean, paired: what ablated neurons come from.")
    ] = None,
    draws: Annotated[
        int | None, typer.Option("--random", help="Draws of random neurons beside it: 3; with --json none.")
    ] = None,
    seed: SeedOption = 0,
    metric: MetricOption = "difference",
    attention: AttentionOption = "full",
    seed_response: SeedResponseOption = "",
    keep_universal: KeepUniversalOption = False,
    specific: SpecificOption = False,
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    raw: RawOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show how much of the answer the strongest neurons keep by themselves, and how much is left without them."""
    from neurosteer.circuits import measure_faithfulness

    sizes = numbers(percents, "--percents")
    chosen = _circuit(circuit) if circuit is not None else None
    asked: dict[str, Any] = {"metric": metric, "attention": attention, "seed_response": seed_response}
    asked |= {"keep_universal": keep_universal, "specific": specific}
    with progress_line() as progress:
        lm = load(model or (chosen.model.name if chosen else None), revision, device, dtype, progress)
        found = attributed(lm, prompt, target, counterfactual, raw, asked, progress)
        result = measure_faithfulness(
            lm, found, circuit=chosen, percents=sizes, ablation=ablation,  # type: ignore[arg-type]
            counterfactual_prompts=counterfactual_prompt, draws=draws if draws is not None else 0 if as_json else 3,
            seed=seed, progress=progress,
        )  # fmt: skip
    _note_parts(found)
    if as_json:
        print_json(_faithfulness_data(result))
        return
    print_faithfulness(result)


def decompose(
    reference: Annotated[str, typer.Argument(metavar="REF", help="A steering vector.")],
    circuit: Annotated[str | None, typer.Option("--circuit", help="Compare it with this circuit (REF).")] = None,
    layer: Annotated[int | None, typer.Option("--layer", help="One of the vector's; its last when left out.")] = None,
    top_k: Annotated[int, typer.Option("--top-k", help="How many neurons.")] = 200,
    folder: Annotated[Path | None, typer.Option("--out", help="Folder to write the neurons to, as a circuit.")] = None,
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which neurons write along a steering vector, and how it compares with a circuit."""
    from dataclasses import asdict

    from neurosteer.artifacts.storage import save
    from neurosteer.circuits import compare_with_circuit
    from neurosteer.circuits import decompose as take_apart

    vector, other = _vector(reference), _circuit(circuit) if circuit is not None else None
    with progress_line() as progress:
        lm = load(model or vector.model.name, revision, device, dtype, progress)
        found = take_apart(lm, vector, top_k, layer=layer)
        compared = compare_with_circuit(lm, vector, other, layer=layer) if other is not None else None
    if folder is not None:
        save(found.circuit, folder)
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
    circuit: Annotated[str | None, typer.Option("--circuit", help="A circuit to begin with (REF).")] = None,
    model: ModelOption = None,
    revision: RevisionOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    raw: RawOption = False,
) -> None:
    """Explore circuits by hand: find one, ablate it, amplify it, sweep, see its edges. `help` lists the commands."""
    from neurosteer.cli.repl import Shell

    chosen = _circuit(circuit) if circuit is not None else None
    with progress_line() as progress:
        lm = load(model or (chosen.model.name if chosen else None), revision, device, dtype, progress)
    Shell(lm, chosen, raw=raw).run()


# --- inputs ----------------------------------------------------------------------------------------------------------


def numbers(text: str, what: str) -> list[float]:
    """Numbers parted by commas or spaces. Raises `UsageError` where there is none or one is no number."""
    try:
        found = [float(one) for one in text.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"{what} is {text[:60]!r}; give numbers parted by commas, like 0,1,2.") from error
    if not found:
        raise UsageError(f"{what} is empty; give numbers parted by commas, like 0,1,2.")
    return found


def selection(
    top_k: int | None, share: float | None, percent: float | None, per_layer: int | None
) -> "Selection | None":
    """The rule of which an amount is given. Raises `UsageError` where several are, or one is out of its range."""
    from neurosteer.circuits import Selection

    rules = {"top_k": top_k, "share": share, "percent": percent, "per_layer": per_layer}
    given = {rule: amount for rule, amount in rules.items() if amount is not None}
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} each say how many neurons to take; give one of them.")
    return next((Selection(rule, amount) for rule, amount in given.items()), None)  # type: ignore[arg-type]


def attributed(
    lm: "LanguageModel",
    prompts: Sequence[str],
    targets: Sequence[str],
    counterfactuals: Sequence[str] | None,
    raw: bool,
    options: dict[str, Any],
    progress: Progress,
) -> "Attribution":
    from neurosteer.circuits import attribute as find

    if options["specific"] and options["keep_universal"]:
        raise UsageError("--specific leaves out neurons that --keep-universal keeps; give one of them.")
    others = _one_or_each(counterfactuals) if counterfactuals else None
    return find(lm, prompts, _one_or_each(targets), others, raw=raw, progress=progress, **options)


def _one_or_each(texts: Sequence[str]) -> str | Sequence[str]:
    return texts[0] if len(texts) == 1 else texts


def _circuit(reference: str) -> "NeuronCircuit":
    from neurosteer.artifacts.circuit import NeuronCircuit
    from neurosteer.hub.references import resolve

    found = resolve(reference)
    if not isinstance(found, NeuronCircuit):
        raise UsageError(f"{reference[:200]!r} is a {found.kind}; a neuron-circuit is needed.")
    return found


def _vector(reference: str) -> "SteeringVector":
    from neurosteer.artifacts.vector import SteeringVector
    from neurosteer.hub.references import resolve

    found = resolve(reference)
    if not isinstance(found, SteeringVector):
        raise UsageError(f"{reference[:200]!r} is a {found.kind}; a steering-vector is needed.")
    return found


# --- outputs ---------------------------------------------------------------------------------------------------------


def rows_of(circuit: "NeuronCircuit") -> list[list[Any]]:
    """A circuit's neurons as [layer, neuron, score]."""
    columns = (circuit.neuron_layers.tolist(), circuit.neurons.tolist(), circuit.scores.tolist())
    return [list(row) for row in zip(*columns, strict=True)]


def print_neurons(circuit: "NeuronCircuit", heading: str = "Score", count: int = _SHOWN) -> None:
    """The circuit's first neurons as a table."""
    table = new_table(("Neuron", heading), right=(heading,))
    for layer, neuron, score in rows_of(circuit)[:count]:
        table.add_row(f"L{layer}/N{neuron}", f"{score:+.4f}")
    print_table(table)


def print_faithfulness(result: "Faithfulness") -> None:
    """The sweep as a table, and its areas."""
    headings = ("Percent", "Neurons", "Faithfulness", "Random", "Completeness", "Random")
    table = new_table(headings, right=headings)
    for row in result.rows:
        by_chance = (row.random_faithfulness, row.random_completeness)
        drawn = ["–" if value is None else f"{value:.3f}" for value in by_chance]
        pair = (f"{row.faithfulness:.3f}", drawn[0], f"{row.completeness:.3f}", drawn[1])
        table.add_row(f"{row.percent:g}", str(row.neurons), *pair)
    print_table(table)
    chance = "" if result.random_area is None else f"; of random neurons of the same layers {result.random_area:.3f}"
    out.print(
        f"Metric: {result.full:+.4f} with all neurons, {result.empty:+.4f} with all ablated. "
        f"Area under faithfulness {result.area:.3f}{chance}."
    )
    if result.same_prompts:
        out.print("The neurons were ranked on the prompts they are measured on; on others they keep less.")


def _faithfulness_data(result: "Faithfulness") -> dict[str, Any]:
    data = result.data()
    if result.draws:
        data["area"], data["random_area"] = result.area, result.random_area
        for row, source in zip(data["rows"], result.rows, strict=True):
            row["random_faithfulness"] = source.random_faithfulness
            row["random_completeness"] = source.random_completeness
    return data


def _note_parts(found: "Attribution") -> None:
    """A line on stderr for every target of which only the first token counts."""
    for note in found.notes:
        err.print(f"Note: {note}")


def _print_attribution(found: "Attribution", select: "Selection | None", prompt: int) -> None:
    from neurosteer.circuits import Selection

    one, tokens = found.prompts[prompt], found.tokens[prompt]
    rows = found.rows(select or Selection(), prompt=prompt)
    against = f" against {one.counterfactual.text!r}" if one.counterfactual else ""
    out.print(f"{one.target.text!r}{against}: metric {one.metric:+.4f}; {len(rows)} neurons at a position, strongest:")
    table = new_table(("Neuron", "Position", "Token", "Score"), right=("Position", "Score"))
    for layer, position, neuron, score in rows[:_SHOWN]:
        table.add_row(f"L{layer}/N{neuron}", str(position), repr(tokens[position]), f"{score:+.4f}")
    print_table(table)


def print_left_out(found: "Attribution") -> None:
    """How many neurons are left out, and which of them are super weights."""
    if not found.left_out or found.universal is None:
        return
    loud = ", ".join(f"L{layer}/N{neuron}" for layer, neuron in found.universal.super_weights)
    named = f", among them the super weights {loud}" if loud else ""
    out.print(f"{len(found.left_out)} universal neurons are left out{named}; --keep-universal counts them.")


def _write_graph(graph: "CircuitGraph", folder: Path) -> list[Path]:
    import json

    from neurosteer.circuits import dot, figure_html

    texts = {
        "edges.json": json.dumps(graph.data(), ensure_ascii=False),
        "edges.dot": dot(graph),
        "edges.html": figure_html(graph),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{str(folder)!r} could not be written ({error.strerror}); choose another --out.") from error
    return [folder / name for name in texts]
