"""The verbs that show what there is: the page, the models, an artifact."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from neurosteer.cli.circuit_output import rows_of
from neurosteer.cli.options import JsonOption, ModelOption, artifact_names
from neurosteer.cli.output import TABLE_WIDTH, new_table, out, print_json, print_table

if TYPE_CHECKING:
    from neurosteer.artifacts.artifact import Artifact
    from neurosteer.artifacts.combining import Overlap


def open_page(
    model: ModelOption = None,
    host: Annotated[
        str | None,
        typer.Option(envvar="GRADIO_SERVER_NAME", help="Address to listen on; this machine only, if none."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(envvar="GRADIO_SERVER_PORT", min=1, max=65535, help="The first free one from 7860, if none."),
    ] = None,
    trust_visitors: Annotated[
        bool,
        typer.Option(
            "--trust-visitors",
            help="Treat whoever can reach --host as this machine's owner, its login of the Hub included.",
        ),
    ] = False,
) -> None:
    """Open the page on this machine."""
    from neurosteer.ui.page import create_app, launch

    trust = trust_visitors or None  # None: as NEUROSTEER_TRUST_VISITORS says
    launch(create_app(model, host=host, trust_visitors=trust), host=host, port=port, trust_visitors=trust)


def models(as_json: JsonOption = False) -> None:
    """List the models of the catalog."""
    from neurosteer.models.catalog import catalog, default_model

    if as_json:
        print_json({"default": default_model(), "models": [asdict(model) for model in catalog()]})
        return
    table = new_table(("Model", "Hub id", "Kind", "Memory", "Licence"))
    for model in catalog():
        default = " (default)" if model.name == default_model() else ""
        kind = "chat" if model.chat else "base"
        hub_id = model.hub_id or f"{model.base} + adapter"
        table.add_row(model.name + default, hub_id, kind, f"{model.memory_gb:g} GB", model.licence)
    print_table(table)


def inspect(
    references: Annotated[
        list[str],
        typer.Argument(
            metavar="REF...", help="A folder, a name in vectors/ or a Hub repo.", autocompletion=artifact_names
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show what an artifact is, where it comes from and what strength 1 means; of several, how much they overlap."""
    from neurosteer.artifacts.storage import artifact_data
    from neurosteer.hub.references import resolve

    artifacts = [resolve(reference) for reference in references]
    if len(artifacts) == 1:
        if as_json:
            print_json(artifact_data(artifacts[0]))
        else:
            out.print(_inspect_text(artifacts[0]))
        return
    overlaps = _comparable_overlaps(artifacts)
    if as_json:
        print_json({"artifacts": list(map(artifact_data, artifacts)), "cosines": list(map(asdict, overlaps))})
        return
    for artifact in artifacts:
        out.print(_inspect_text(artifact) + "\n")
    _print_cosine_table(overlaps)


def _comparable_overlaps(artifacts: "Sequence[Artifact]") -> "list[Overlap]":
    """Directions can be compared within models of one shape; artifacts of others are shown all the same."""
    from neurosteer.artifacts.combining import cosines

    alike: dict[tuple[int, int], list[Artifact]] = {}
    for artifact in artifacts:
        model = artifact.model
        alike.setdefault((model.n_layers, model.d_model), []).append(artifact)
    return [overlap for group in alike.values() for overlap in cosines(group)]


def _inspect_text(artifact: "Artifact") -> str:
    from neurosteer.artifacts.cards import feature_lines, layers_text, parameter_rows, strength_meaning
    from neurosteer.artifacts.circuit import NeuronCircuit

    source = artifact.provenance
    lines = [
        f"{artifact.name}: {artifact.kind}, {artifact.method}, operation {artifact.operation}",
        f"model: {artifact.model.name} ({artifact.model.revision or 'no revision'}), "
        f"fingerprint {artifact.model.fingerprint}",
        f"layers: {layers_text(artifact)} ({source.layer_choice or 'not recorded'})",
        f"strength: {strength_meaning(artifact)}",
        f"read as: framing {source.framing}, tokens {source.tokens}",
        *(f"{name.lower()}: {value}" for name, value in parameter_rows(artifact)),
    ]
    if source.n_positive or source.n_negative:
        counts = f"{source.n_positive} positive, {source.n_negative} negative"
        lines.insert(4, f"examples: {counts}, sha256 {source.examples_sha256[:16]}")
    if artifact.description:
        lines.insert(1, artifact.description)
    if isinstance(artifact, NeuronCircuit):
        lines.append(f"neurons: {artifact.size} ({artifact.share:.2%} of all); strongest (layer, neuron, score):")
        lines += [f"  {layer:3d} {neuron:6d} {score:+.4f}" for layer, neuron, score in rows_of(artifact)[:10]]
    elif artifact.features:
        lines += feature_lines(artifact.features)
    return "\n".join(lines)


def _print_cosine_table(overlaps: "Sequence[Overlap]") -> None:
    if not overlaps:
        out.print("No two of them are vectors that share a layer.")
        return
    table = new_table(("First", "Second", "Layer", "Cosine"), right=("Layer", "Cosine"))
    for overlap in overlaps:
        table.add_row(overlap.first, overlap.second, str(overlap.layer), f"{overlap.cosine:+.3f}")
    print_table(table, width=2 * TABLE_WIDTH)
