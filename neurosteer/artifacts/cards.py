"""The cards of artifacts and packs: what they are, how to use them, where they come from, as the Hub shows it.

Names, descriptions and tokens come from whoever made the artifact: in a card they are text, never Markdown or HTML.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.features import Feature
from neurosteer.artifacts.metadata import HUB_ID, metadata
from neurosteer.artifacts.provenance import Receipt
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.models.reference import shape_text
from neurosteer.text import flat, printable, quoted
from neurosteer.validation import is_finite

LISTED_FEATURES = 20
SEPARATION_PLOT, EVALUATION_PLOT = "separation.png", "evaluation.png"
PLOTS = (SEPARATION_PLOT, EVALUATION_PLOT)
"""The file names of pictures that NeuroSteer puts beside a card."""

_CAPTIONS = {
    SEPARATION_PLOT: "How well the examples separate at each layer, and what choices of layers do at equal KL",
    EVALUATION_PLOT: "Effect, KL and perplexity by strength, and the controls",
}
_MEANING = {
    "add": "strength 1 adds a push of {amount:.3g} × the median norm of the residual stream",
    "ablate": "strength 1 projects {amount:.3g} of the direction out",
    "clamp": "strength 1 holds the feature's activation at {amount:g}",
    "scale": "strength 1 multiplies the neurons by {amount:.3g}; strength −1 by {opposite:.3g}",
    "shift": "strength 1 adds {amount:.3g} class differences to each neuron",
}
_MARK = "<!-- Written by NeuroSteer; what you change above is kept. SHA-256: {digest} -->\n"
_MARKED = re.compile(re.escape(_MARK.strip()).replace(re.escape("{digest}"), "([0-9a-f]{64})") + r"\s*\Z")
_SPECIAL = re.compile(r"[\\`*_\[\]<>#|~&!@$]|(?<=www)\.|:(?=//)|^[-+=]", re.IGNORECASE)
_NUMBERED = re.compile(r"^(\d{1,9})([.)])(?=\s|$)")
_LONGEST_CELL, _MOST_ROWS, _MOST_COLUMNS = 300, 200, 12
_LISTED_PROMPTS, _LONGEST_PROMPT = 3, 80
_OF_PROMPTS = ("prompts", "targets", "counterfactuals", "metrics")  # parameters of `relp`, one entry a prompt each


def strength_meaning(artifact: Artifact) -> str:
    """What strength 1 of `artifact` does, as a phrase."""
    calibration = artifact.calibration
    down = calibration.amount_down
    scales = artifact.operation == "scale"
    opposite = 2 - calibration.amount if down is None else down
    phrase = _MEANING[artifact.operation].format(amount=calibration.amount, opposite=opposite)
    if down is not None and not scales and down != calibration.amount:
        phrase += f", strength −1 {down:.3g} the other way"
    if not calibration.measured:
        # A clamp's value belongs to its feature.
        return phrase + ("" if artifact.operation == "clamp" else " (the default; not calibrated)")
    if calibration.target_kl is None or calibration.percentile is None:
        return phrase
    reached = [f"{kl:.2f}" for kl in (calibration.kl, calibration.kl_down) if kl is not None]
    known = [ends for ends in (calibration.kl_interval, calibration.kl_down_interval) if ends is not None]
    intervals = " and ".join(f"{low:.2f} to {high:.2f}" for low, high in known)
    phrase += (
        f" (calibrated: the {calibration.percentile:g}th percentile of the KL from the unsteered model is "
        f"{' and '.join(reached) or 'beyond measure'} nats"
        + (f", 95% interval over prompts {intervals}" if intervals else "")
        + f"; {calibration.target_kl:g} was aimed at)"
    )
    return phrase + (f". {calibration.note.rstrip('.')}" if calibration.note else "")


def layers_text(artifact: Artifact) -> str:
    """The layers of `artifact` as a short text: '14', '10-18' or '3, 7, 9'."""
    layers = artifact.layers
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers))


def parameter_rows(artifact: Artifact) -> list[tuple[str, str]]:
    """What `artifact` was made with, as names and one line of plain text each; long lists are told by their number."""
    parameters = dict(artifact.parameters)
    answers = _answers([parameters.get(key) for key in _OF_PROMPTS]) if artifact.method == "relp" else []
    rows = [("Made for", answer) for answer in answers[:_LISTED_PROMPTS]]
    if answers:
        if len(answers) > _LISTED_PROMPTS:
            rows.append(("Made for", f"… {len(answers)} prompts in all"))
        found = [parameters.pop(key, None) for key in ("universal", "super_weights")]
        universal, super_weights = (len(one) if isinstance(one, list) else 0 for one in found)
        verb = "counted too" if parameters.pop("keep_universal", False) else "left out"
        rows.append(("Universal neurons", f"{universal}, and {super_weights} super weights: {verb}"))
        parameters = {key: value for key, value in parameters.items() if key not in _OF_PROMPTS}
    pairs = [f"{printable(key)} {_value_text(value)}" for key, value in parameters.items() if value not in ("", None)]
    if pairs:
        rows.append(("Parameters", "; ".join(pairs)))
    return rows


def render_card(
    artifact: Artifact, *, repo: str | None = None, licence: str | None = None, plots: Sequence[str] = ()
) -> str:
    """The card as Markdown, the Hub's metadata before it. Everything in it comes from the artifact.

    Args:
        repo: where the artifact is published: `user/repo`, or `user/repo/name` in a pack. Without it, the card shows
            how to use a folder of the artifact's name.
        licence: the Hub's name of a licence, like `apache-2.0`.
        plots: file names of pictures beside the card.
    """
    parts = (repo or "").split("/")
    return _rendered(
        "card.md.jinja",
        metadata=metadata([artifact], licence),
        artifact=artifact,
        remote=repo is not None,
        on_hub=HUB_ID.fullmatch(artifact.model.name) is not None,
        reference=repo or f"./{artifact.name}",
        repo="/".join(parts[:2]),
        folder="".join(f"{part}/" for part in parts[2:]),
        plots=[_plot(name) for name in plots if name != EVALUATION_PLOT],
        evaluation=_plot(EVALUATION_PLOT) if EVALUATION_PLOT in plots else None,
        tables=[table for receipt in artifact.receipts if (table := _effect_table(receipt))],
        provenance=_provenance_rows(artifact),
        features=strongest_features(artifact.features) if isinstance(artifact, SteeringVector) else [],
    )


def render_pack_card(artifacts: Sequence[Artifact], *, repo: str, licence: str | None = None) -> str:
    """The card of a repo that holds `artifacts`, one at least, in folders of their names."""
    return _rendered(
        "pack.md.jinja",
        metadata=metadata(artifacts, licence),
        title=repo.rpartition("/")[2],
        artifacts=artifacts,
        reference=f"{repo}/{artifacts[0].name}",
    )


def is_generated(card: str) -> bool:
    """Whether `card` is as NeuroSteer wrote it: then it may be written anew. Any other holds somebody's own words."""
    found = _MARKED.search(card)
    return found is not None and _digest(card[: found.start()]) == found[1]


def _plot(name: str) -> dict[str, str]:
    return {"file": name, "caption": _CAPTIONS.get(name, "Plot")}


def _rendered(template: str, **given: Any) -> str:
    text = _templates().get_template(template).render(**given) + "\n"
    return text + _MARK.format(digest=_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates", encoding="utf-8"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # it is Markdown: the filters below escape
    )
    environment.filters |= {
        "text": _text,
        "cell": _cell,
        "code": _code,
        "python": lambda text: json.dumps(text, ensure_ascii=False) if text.isprintable() else repr(text),
        "shell": lambda text: shlex.quote(printable(text)),
        "what": _what,
        "layers": layers_text,
        "meaning": strength_meaning,
        "model": _model_link,
        "feature": lambda one: f"[{one.index}]({one.link})" if one.link else str(one.index),
        "fires": lambda rates: " / ".join(f"{rate:.2%}" for rate in rates),
    }
    return environment


# --- the parts of a card ---------------------------------------------------------------------------------------------


def _effect_table(receipt: Receipt) -> dict[str, Any] | None:
    """The table that a receipt brings for the card, from those that hold `table`: `{title, columns, rows}` and, in
    newer ones, `notes`, a sentence each."""
    table = receipt.data.get("table")
    if not isinstance(table, Mapping) or not isinstance(table.get("columns"), list) or not table["columns"]:
        return None
    columns = table["columns"][:_MOST_COLUMNS]
    found = table.get("rows")
    rows = [row for row in found if isinstance(row, list)] if isinstance(found, list) else []
    padded = [[*row, *[""] * len(columns)][: len(columns)] for row in rows[:_MOST_ROWS]]
    notes = table.get("notes")
    notes = [flat(note) for note in notes[:_MOST_ROWS]] if isinstance(notes, list) else []
    return {"title": flat(table.get("title") or ""), "columns": columns, "rows": padded, "notes": notes}


def _provenance_rows(artifact: Artifact) -> list[tuple[str, str]]:
    """Names and values as Markdown; what was not recorded is left out."""
    model, source = artifact.model, artifact.provenance
    shape = shape_text(model)
    revision = f", revision {_code(model.revision)}" if model.revision else ""
    weights = f"fingerprint of the weights {_code(model.fingerprint)}"
    rows = [
        ("Base model", f"{_model_link(model.name)}{revision}; {shape}; {weights}"),
        ("Method", _code(artifact.method)),
        *((name, _cell(value)) for name, value in parameter_rows(artifact)),
    ]
    if source.n_positive or source.n_negative:  # neither for a sum nor for a single feature
        cut = f", {source.n_cut} of them cut" if source.n_cut else ""
        name = f"{_cell(source.examples)}: " if source.examples else ""
        rows.append(("Examples", f"{name}{source.n_positive} positive and {source.n_negative} negative texts{cut}"))
    if source.examples_sha256:
        rows.append(("SHA-256 of the whole set", _code(source.examples_sha256)))
    if source.framing:
        asked = f", each after its own prompt ({source.n_prompts} different ones)" if source.n_prompts else ""
        rows.append(("Read as", f"{_cell(source.framing)}, tokens {_cell(source.tokens)}{asked}"))
    if source.layer_choice:
        rows.append(("Layers", _cell(source.layer_choice)))
    rows += [("Be wary", _cell(warning)) for warning in source.warnings]
    if source.parents:
        rows.append(("Made from", ", ".join(map(_code, source.parents))))
    if source.created:
        rows.append(("Made", f"{_cell(source.created)} with NeuroSteer {_cell(source.version)}"))
    return rows


def _answers(columns: Sequence[object]) -> list[str]:
    """Per prompt the token that a circuit was found for; empty where the parameters are not as `relp` writes them."""
    if not all(isinstance(column, list) for column in columns):
        return []
    lines = []
    for prompt, target, other, metric in zip(*columns, strict=False):  # type: ignore[call-overload]
        if not isinstance(target, Mapping) or not is_finite(metric):
            return []
        text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
        shown = text if len(text) <= _LONGEST_PROMPT else "…" + text[-_LONGEST_PROMPT:]
        against = f" rather than {quoted(str(other.get('text')))}" if isinstance(other, Mapping) else ""
        lines.append(f"{quoted(shown)} → {quoted(str(target.get('text')))}{against} ({metric:+.3g} logits)")
    return lines


def _value_text(value: object) -> str:
    """A parameter's value on one line: words, numbers and short lists of them as such, all else as JSON."""
    if isinstance(value, list) and 0 < len(value) <= _MOST_COLUMNS and not any(isinstance(one, list) for one in value):
        return " ".join(map(_value_text, value))
    if isinstance(value, str) and value and " " not in value and value.isprintable():
        return value
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else json.dumps(value)


def _what(artifact: Artifact) -> str:
    if isinstance(artifact, SteeringVector):
        return "steering vector"
    assert isinstance(artifact, NeuronCircuit)
    return f"circuit of {artifact.size} MLP neurons ({artifact.share:.2%} of all)"


def _model_link(name: str) -> str:
    """A model's name as Markdown, with a link where it is a Hub id."""
    return f"[{_code(name)}](https://huggingface.co/{name})" if HUB_ID.fullmatch(name) else _code(name)


# --- other people's words --------------------------------------------------------------------------------------------


def _text(value: object) -> str:
    """`value` as Markdown that shows it as it is, on one line."""
    escaped = _SPECIAL.sub(r"\\\g<0>", flat(value))
    return _NUMBERED.sub(r"\1\\\2", escaped)


def _cell(value: object) -> str:
    """`value` as Markdown inside a table."""
    return f"{value:.4g}" if is_finite(value) else _text(flat(value)[:_LONGEST_CELL])


def _code(token: str) -> str:
    """A token as a Markdown code span, also inside a table."""
    shown = printable(token).replace("`", "ˋ").replace("|", "¦").strip()
    return f"`{shown[:_LONGEST_CELL] or '␣'}`"


# --- features --------------------------------------------------------------------------------------------------------


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
                lines.append(f"    {what} {' '.join(map(quoted, tokens))}")
        lines += [
            f"    {place.activation:.1f}: {printable(place.before)}>>{printable(place.token)}<<{printable(place.after)}"
            for place in feature.contexts
        ]
        if feature.link:
            lines.append(f"    {feature.link}")
    return lines
