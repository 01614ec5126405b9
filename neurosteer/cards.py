"""The card of an artifact: what it is, how to use it, where it comes from."""

from collections.abc import Sequence

from neurosteer.artifacts import Artifact, Feature, NeuronCircuit, Provenance, SteeringVector

LISTED_FEATURES = 20

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


def _feature_table(features: Sequence[Feature]) -> list[str]:
    """As Markdown. The texts where features fire are the builder's own and stay out of the card."""
    shown = strongest_features(features)
    return [
        f"## Features\n\nThe {len(shown)} of {len(features)} SAE features that weigh most:\n",
        "| Layer | Feature | Weight | Fires on positive / negative tokens | Promotes |",
        "|---|---|---|---|---|",
        *(
            f"| {one.layer} | {f'[{one.index}]({one.link})' if one.link else one.index} | {one.weight:+.3g} "
            f"| {one.rates[0]:.2%} / {one.rates[1]:.2%} | {' '.join(map(_code, one.promoted))} |"
            for one in shown
        ),
        "",
    ]


def _code(token: str) -> str:
    """A token as a Markdown code span inside a table."""
    return f"`{_plain(token).replace('`', 'ˋ').replace('|', '¦').strip() or '␣'}`"


def strongest_features(features: Sequence[Feature], count: int = LISTED_FEATURES) -> list[Feature]:
    """The `count` features with the largest |weight|, strongest first."""
    return sorted(features, key=lambda feature: -abs(feature.weight))[:count]


def feature_lines(features: Sequence[Feature]) -> list[str]:
    """Features as plain text: a line of figures, their tokens, the places where they fire, and the link."""
    shown = strongest_features(features)
    lines = [f"features: {len(features)}; the {len(shown)} that weigh most (fires on positive / negative tokens):"]
    for feature in shown:
        fires = " / ".join(f"{rate:.2%}" for rate in feature.rates)
        scored = "" if feature.output_score is None else f", output score {feature.output_score:.3g}"
        lines.append(f"  {feature.layer}#{feature.index}: weight {feature.weight:+.3g}, fires {fires}{scored}")
        for what, tokens in (("promotes", feature.promoted), ("suppresses", feature.suppressed)):
            if tokens:
                lines.append(f"    {what} {' '.join(map(_quoted, tokens))}")
        lines += [
            f"    {place.activation:.1f}: {_plain(place.before)}>>{_plain(place.token)}<<{_plain(place.after)}"
            for place in feature.contexts
        ]
        if feature.link:
            lines.append(f"    {feature.link}")
    return lines


def _quoted(token: str) -> str:
    return repr(token) if token.isprintable() else ascii(token)


def _plain(text: str) -> str:
    """On one line, without what a terminal would act on."""
    return "".join(char if char.isprintable() else " " for char in text)


def _what(artifact: Artifact) -> str:
    if isinstance(artifact, SteeringVector):
        return "steering vector"
    assert isinstance(artifact, NeuronCircuit)
    return f"circuit of {artifact.size} MLP neurons ({artifact.share:.2%} of all)"
