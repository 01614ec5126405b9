"""The card of an artifact: what it is, how to use it, where it comes from."""

from neurosteer.artifacts import Artifact, NeuronCircuit, Provenance, SteeringVector

_MEANING = {
    "add": "strength 1 adds a push of {amount:g} × the median norm of the residual stream",
    "ablate": "strength 1 projects the direction out",
    "clamp": "strength 1 holds the feature's activation at {amount:g}",
    "scale": "strength 1 multiplies the neurons by {amount:g}; strength −1 by {opposite:g}",
    "shift": "strength 1 adds {amount:g} class differences to each neuron",
}


def strength_meaning(artifact: Artifact) -> str:
    """What strength 1 of `artifact` does, as a phrase."""
    amount = artifact.calibration.amount
    phrase = _MEANING[artifact.operation].format(amount=amount, opposite=2 - amount)
    chosen = artifact.calibration.measured or artifact.operation == "clamp"  # whose value belongs to the feature
    return phrase + ("" if chosen else " (the default; not calibrated)")


def layers_text(artifact: Artifact) -> str:
    """The layers of `artifact` as a short text: '14', '10-18' or '3, 7, 9'."""
    layers = artifact.layers
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


def render_card(artifact: Artifact) -> str:
    """The card as Markdown. Everything in it comes from the artifact."""
    source = artifact.provenance
    lines = [
        f"# {artifact.name}",
        "",
        artifact.description or "An artifact made by NeuroSteer.",
        "",
        f"A {_what(artifact)} for `{artifact.model.name}`, made with `{artifact.method}` at layers "
        f"{layers_text(artifact)}: {strength_meaning(artifact)}.",
        "",
        "```bash",
        f'neurosteer steer --use ./{artifact.name}:1 --prompt "Tell me about your day." --compare',
        "```",
        "",
        f"{_made_from(source)}Not yet measured: no receipt.",
        "",
    ]
    return "\n".join(lines)


def _made_from(source: Provenance) -> str:
    if not source.n_positive and not source.n_negative:  # a sum, or a single feature
        return ""
    digest = f" (SHA-256 `{source.examples_sha256[:16]}…`)" if source.examples_sha256 else ""
    return f"Made from {source.n_positive} positive and {source.n_negative} negative texts{digest}. "


def _what(artifact: Artifact) -> str:
    if isinstance(artifact, SteeringVector):
        return "steering vector"
    assert isinstance(artifact, NeuronCircuit)
    return f"circuit of {artifact.size} MLP neurons ({artifact.share:.2%} of all)"
