"""What the page shows, as pure functions. Texts, names and messages are data: all of it is escaped here."""

import re
from collections.abc import Mapping, Sequence
from html import escape, unescape
from typing import TYPE_CHECKING

from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.reading import CONFLICT
from neurosteer.ui.show.features import made_of

if TYPE_CHECKING:
    from neurosteer.artifacts.artifact import Artifact
    from neurosteer.steering.session import Row
    from neurosteer.ui.loading import Status

WEAK_SEPARATION = 0.6
CHANCE = 0.5
FEW_LAYERS = 3

_PLOT_HELP = (
    "The plot shows how well each layer of the model tells the two kinds of text apart, on texts it was not given for "
    f"building: 1 is always right, {CHANCE} is chance."
)
_SAMPLES, _SAMPLE_CHARACTERS = 3, 160
_ALIKE = ((0.1, ""), (0.4, "a little "), (0.8, "partly "), (0.99, "mostly "))


def heading() -> str:
    """The page's title and the one line that says what it is."""
    return (
        "<header class='ns-heading'><h1>NeuroSteer</h1>"
        "<p>Show a language model texts that have a quality and texts that don’t. In seconds you get a slider that "
        "turns that quality up or down while the model writes.</p></header>"
    )


def status_line(status: "Status") -> str:
    """Where loading the model is: 'Model: downloading …, 45 %', 'Model: ready: … on CPU, bfloat16'."""
    kind = "ready" if status.ready else "failed" if status.failed else "busy"
    share = "" if status.fraction is None or status.settled else f", {status.fraction:.0%}".replace("%", " %")
    before = {"ready": "ready: ", "failed": "not loaded: ", "busy": ""}[kind]
    dots = "…" if kind == "busy" and not share else ""
    text = escape(f"Model: {before}{status.text}{share}{dots}")
    return f"<p class='ns-status ns-{kind}' role='status'><span class='ns-dot' aria-hidden='true'></span>{text}</p>"


def error_line(message: str) -> str:
    """One visible line about what went wrong; nothing for an empty message."""
    if not message:
        return ""
    return f"<p class='ns-error' role='alert'>{escape(' '.join(message.split()))}</p>"


def note_line(message: str) -> str:
    """One quiet line about what is going on."""
    return f"<p class='ns-note' role='status'>{escape(message)}</p>" if message else ""


def hint(message: str) -> str:
    """A line of help where there is nothing to show yet."""
    return f"<p class='ns-hint'>{escape(message)}</p>"


# --- examples --------------------------------------------------------------------------------------------------------


def examples_read(examples: ContrastSet) -> str:
    """What was read: counts, what was left out, warnings, and the first texts of each class."""
    counts = f"<b>{len(examples.positive):,}</b> texts show it, <b>{len(examples.negative):,}</b> don’t"
    answered = len({*examples.positive_prompts, *examples.negative_prompts})
    facts = [counts + (", in pairs." if examples.paired else ".")]
    facts += [f"They are read as answers to {answered:,} prompts." if answered else ""]
    facts += [escape(left_out(examples.dropped))]
    lines = [f"<p>{' '.join(fact for fact in facts if fact)}</p>"]
    lines += [f"<p class='ns-warning'>{escape(warning)}</p>" for warning in examples.warnings]
    columns = _samples("Show it", examples.positive) + _samples("Don’t", examples.negative)
    lines.append(f"<div class='ns-samples'>{columns}</div>")
    if examples.source:
        lines.append(f"<p class='ns-faint'>Read as {escape(examples.source)}.</p>")
    return f"<div class='ns-card'>{''.join(lines)}</div>"


def left_out(dropped: Mapping[str, int], cut: int = 0) -> str:
    """What of the examples was not used, as a sentence; empty if all was."""
    words = {"blank": "blank", "duplicate": "repeated", CONFLICT: "in both classes"}
    parts = [f"{count:,} {words.get(kind, kind)}" for kind, count in dropped.items() if count]
    sentences = [f"Left out: {' and '.join(parts)}."] if parts else []
    if cut:
        were = "text was" if cut == 1 else "texts were"
        sentences.append(f"{cut:,} long {were} cut, only the beginning was read.")
    return " ".join(sentences)


def _samples(title: str, texts: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(_shortened(text))}</li>" for text in texts[:_SAMPLES])
    return f"<div><h4>{escape(title)}</h4><ul>{items}</ul></div>"


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SAMPLE_CHARACTERS else line[: _SAMPLE_CHARACTERS - 1].rstrip() + "…"


# --- artifacts -------------------------------------------------------------------------------------------------------


def built(artifact: "Artifact", label: str, seconds: float, examples: ContrastSet, worth: Sequence[str] = ()) -> str:
    """What was built, from what, at which layers and why; what it is worth; what was left out; what to be wary of."""
    source = artifact.provenance
    lines = [
        f"<p class='ns-done'><b>{escape(label)}</b> is ready: {escape(what_it_is(artifact))}, built in "
        f"{seconds:.1f} s from {source.n_positive:,} + {source.n_negative:,} texts{escape(calibrated(artifact))}.</p>"
    ]
    lines += [f"<p>{escape(sentence)}</p>" for sentence in worth]
    if reason := why_these_layers(artifact):
        lines.append(f"<p>{escape(reason)}</p>")
    if dropped := left_out(source.dropped, source.n_cut):
        lines.append(f"<p>{escape(dropped)}</p>")
    lines += [f"<p class='ns-warning'>{escape(text)}</p>" for text in (*examples.warnings, *warnings_of(artifact))]
    if source.hold_out:
        share = f"{source.hold_out:.0%} of the examples took no part"
        lines.append(f"<p>{share}: on the Evaluate tab a judge can be trained on them.</p>")
    if receipt := measured(artifact):
        lines.append(f"<p>{escape(receipt)}</p>")
    lines.append(f"<p class='ns-faint'>{escape(meaning(artifact))}</p>")
    if len(source.separation) > 1:
        lines.append(f"<p class='ns-faint'>{escape(_PLOT_HELP)}</p>")
    return f"<div class='ns-card'>{''.join(lines)}</div>"


def what_it_is(artifact: "Artifact") -> str:
    """'a steering vector at layer 16'."""
    from neurosteer.artifacts.cards import layers_text

    layers = f"layer{'s' if len(artifact.layers) > 1 else ''} {layers_text(artifact)}"
    if artifact.kind == "steering-vector":
        return f"a steering vector at {layers}"
    return f"a circuit of {getattr(artifact, 'size', 0):,} neurons in {layers}"


def why_these_layers(artifact: "Artifact") -> str:
    """The reason for the layers as a sentence; empty where there is none to tell."""
    reason = artifact.provenance.layer_choice.strip().rstrip(".")
    if not reason:
        return ""
    if reason.startswith("given"):
        reason = "the layers were given"
    return f"Why there: {reason}."


def meaning(artifact: "Artifact") -> str:
    """What strength 1 does, as a sentence."""
    from neurosteer.artifacts.cards import strength_meaning

    phrase = strength_meaning(artifact)
    return f"{phrase[:1].upper()}{phrase[1:]}."


def calibrated(artifact: "Artifact") -> str:
    """What strength 1 was set to, as the end of a sentence; empty where nothing was measured."""
    known = artifact.calibration
    if not known.measured or known.target_kl is None or known.percentile is None:
        return ""
    nats = f"{known.target_kl:g} nat{'' if known.target_kl == 1 else 's'}"
    missed = " (as near as it comes)" if known.note else ""
    return f"; strength 1 = {known.percentile:g}th percentile KL of {nats}{missed}"


def measured(artifact: "Artifact") -> str:
    """The short form of the newest receipt that holds figures: 'Measured: 88% show it at strength +1, …'."""
    from neurosteer.artifacts.plots import receipt_points

    for receipt in reversed(artifact.receipts):
        points = {point.strength: point for point in receipt_points(receipt.data).get("steered", [])}
        moved = sorted(points.keys() - {0.0}, key=lambda strength: (abs(strength) != 1, -strength))[:2]
        if moved:
            said = [f"{points[strength].share:.0%} show it at strength {signed(strength)}" for strength in moved]
            plain = [f"{points[0.0].share:.0%} unsteered"] if 0.0 in points else []
            return f"Measured: {', '.join([*said, *plain])}{_by_whom(receipt.data.get('judge'))}."
    return ""


def _by_whom(judge: object) -> str:
    if not isinstance(judge, Mapping) or not isinstance(judge.get("name"), str):
        return ""
    weak = ": too weak to conclude from" if judge.get("is_weak") is True else ""
    return f" (judge: {judge['name'][:120]}{weak})"


def warnings_of(artifact: "Artifact") -> list[str]:
    """Sentences about what makes an artifact weak."""
    found = [*artifact.provenance.warnings]
    best = separation_reached(artifact)
    if best is None or best >= WEAK_SEPARATION:
        return found
    return [
        *found,
        f"The model hardly tells the two kinds of text apart (AUC {best:.2f}, {CHANCE} is chance), so expect little "
        "effect: use more examples, or ones that differ more clearly.",
    ]


def separation_reached(artifact: "Artifact") -> float | None:
    """The best held-out AUC among the artifact's layers, or among those measured if its own were not."""
    measured = artifact.provenance.separation
    own = [measured[layer] for layer in artifact.layers if layer in measured]
    return max(own or measured.values(), default=None)


def added(artifact: "Artifact", label: str, warning: str | None) -> str:
    """What an uploaded artifact is."""
    where = f", made on {artifact.model.name} with {artifact.method}"
    lines = [f"<p class='ns-done'><b>{escape(label)}</b> is added: {escape(what_it_is(artifact) + where)}.</p>"]
    if warning:
        lines.append(f"<p class='ns-warning'>{escape(warning)}</p>")
    return "".join(lines)


def about(label: str, artifact: "Artifact") -> str:
    """What an artifact on the shelf is, to be opened."""
    source = artifact.provenance
    texts = f", from {source.n_positive:,} + {source.n_negative:,} texts" if source.n_positive else ""
    what = what_it_is(artifact)
    lines = [
        artifact.description,
        f"{what[:1].upper()}{what[1:]}, made on {artifact.model.name} with {artifact.method}{texts}.",
        why_these_layers(artifact),
        meaning(artifact),
        measured(artifact),
    ]
    shown = "".join(f"<p>{escape(line)}</p>" for line in lines if line)
    return (
        f"<details class='ns-about'><summary>About {escape(label)}</summary>"
        f"<div class='ns-card'>{shown}{made_of(artifact)}</div></details>"
    )


def overlaps(pairs: Mapping[tuple[str, str], Mapping[int, float]]) -> str:
    """How much each two vectors, by label, have in common: cosines by layer, and what that means."""
    items = "".join(
        f"<li><b>{escape(one)}</b> and <b>{escape(other)}</b>: {escape(_overlap(found))}.</li>"
        for (one, other), found in pairs.items()
    )
    return f"<ul class='ns-overlaps'>{items}</ul>" if items else ""


def _overlap(cosines: Mapping[int, float]) -> str:
    """'overlap 0.63 at layer 14: they push partly the same way, or …'."""
    if not cosines:
        return "no overlap, they work at different layers"
    worst = max(cosines, key=lambda layer: abs(cosines[layer]))
    named = sorted(cosines) if len(cosines) <= FEW_LAYERS else [worst]
    figures = ", ".join(f"{_signed(f'{round(cosines[layer], 2) + 0.0:.2f}')} at layer {layer}" for layer in named)
    among = "" if len(named) == len(cosines) else f" (the most of {len(cosines)} layers)"
    return f"overlap {figures}{among}: {_alike(cosines[worst])}"


def _alike(cosine: float) -> str:
    """What a cosine means wherever the sliders stand: they can move after this is shown."""
    ways = ("the same way", "against each other")
    way, other = ways if cosine > 0 else reversed(ways)
    for limit, degree in _ALIKE:
        if abs(cosine) < limit:
            turned = f", or {other} where just one of their sliders is below 0"
            return f"they push {degree}{way}{turned}" if degree else "they hardly touch each other"
    return "they are nearly the same" if cosine > 0 else "they are nearly each other’s opposite"


def signed(number: float) -> str:
    """'+1', '−0.5' or '0', with a true minus."""
    return _signed(f"{number:+g}") if number else "0"


def _signed(number: str) -> str:
    return number.replace("-", "−")


# --- generation ------------------------------------------------------------------------------------------------------


def chat_text(text: str) -> str:
    """A message for gradio's chat, which reads HTML in it even with Markdown off. Only what would be read as a tag or
    an entity is escaped, because the chat's copy button copies what it was given."""
    if unescape(text) != text:
        text = text.replace("&", "&amp;")
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def run_note(rows: "Sequence[Row]", seconds: float) -> str:
    """How much was written and how fast, and whether it was stopped."""
    tokens = sum(row.tokens for row in rows)
    if not tokens:
        return note_line("It ended before anything was written.")
    each = " + ".join(f"{row.tokens}" for row in rows)
    stopped = "Stopped; what was written is kept. " if any(row.finish == "cancelled" for row in rows) else ""
    return note_line(f"{stopped}{each} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-6):.0f} tokens/s).")
