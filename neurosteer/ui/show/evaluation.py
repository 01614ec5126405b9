"""What the Evaluate tab shows, as pure functions. Prompts, texts, names and patterns are data: all of it is escaped."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from neurosteer.artifacts.plots import ASIDE, COLOURS, KIND_NAMES, Point, receipt_points
from neurosteer.ui.show.html import signed
from neurosteer.ui.show.theme import AXIS, ON_ANY_PAGE

if TYPE_CHECKING:
    from neurosteer.artifacts.provenance import Receipt
    from neurosteer.evaluation import EvaluatedText

WEAK_JUDGE = "This judge is too weak to conclude from: take what it says as a hint at most, or use a better one."

_DAMAGE = (("kl", "KL p95, nats"), ("perplexity", "perplexity ×"), ("quality", "4-gram quality"))
_KINDS = {"steered": 0, "unsteered": 0, "instruction": 1}
_HEIGHT = 420
_OPEN = 1  # prompts whose texts are shown at once


# --- in words --------------------------------------------------------------------------------------------------------


def summary(receipt: "Receipt", n_texts: int, seconds: float) -> str:
    """What was found, how far the judge is to be trusted, what was lost."""
    data, points = receipt.data, receipt_points(receipt.data)
    name = " + ".join(str(use["name"]) for use in data["recipe"])
    lines = [f"<p class='ns-done'><b>{escape(name)}</b>: {escape(_effect(points))}</p>"]
    lines += [f"<p>{escape(note)}</p>" for note in notes_of(data)]
    if lost := _damage(points.get("steered", [])):
        lines.append(f"<p>{escape(lost)}</p>")
    lines.append(f"<p>{escape(_judge(data['judge']))}</p>")
    if data["judge"]["is_weak"]:
        lines.append(f"<p class='ns-warning'>{escape(WEAK_JUDGE)}</p>")
    done = f"{n_texts:,} texts of at most {data['settings']['max_new_tokens']} tokens in {seconds:.0f} s."
    lines.append(f"<p class='ns-faint'>{escape(done)} {_INTERVALS}</p>")
    return f"<div class='ns-card'>{''.join(lines)}</div>"


def notes_of(data: Mapping[str, Any]) -> list[str]:
    """The receipt's sentences about differences; older receipts have none."""
    notes = data["table"].get("notes")
    return [str(note) for note in notes] if isinstance(notes, list) else []


_INTERVALS = (
    "In brackets the range in which the share would lie for 95 of 100 such sets of prompts: with few prompts it is "
    "wide."
)


def _effect(points: Mapping[str, Sequence[Point]]) -> str:
    """'at strength +1, 88% of the texts show it (75% to 100%); at strength −1, 12% (…); unsteered, 46% (…). For …'."""
    steered = points.get("steered", [])
    ends = [one for one in (_near(steered, 1.0), _near(steered, -1.0)) if one is not None]
    said = [f"at strength {signed(one.strength)}, {_share(one)}" for one in ends]
    said += [f"unsteered, {_share(one)}" for one in steered if one.strength == 0]
    sentence = f"{'; '.join(said)}.".replace(" (", " of the texts show it (", 1) if said else "nothing was measured."
    return f"{sentence}{_beside(points)}"


def _beside(points: Mapping[str, Sequence[Point]]) -> str:
    said = [
        f"{what} {' and '.join(f'{one.share:.0%} at {signed(one.strength)}' for one in reversed(points[kind]))}"
        for kind, what in (
            ("random", "random twins"),
            ("permuted", "built from shuffled labels"),
            ("instruction", "asking in plain words"),
        )
        if points.get(kind)
    ]
    return f" For comparison: {'; '.join(said)}." if said else ""


def _share(point: Point) -> str:
    return f"{point.share:.0%} ({point.low:.0%} to {point.high:.0%})"


def _near(points: Sequence[Point], wanted: float) -> Point | None:
    """The point at `wanted`, or the weakest of its sign."""
    same = [one for one in points if one.strength * wanted > 0]
    return min(same, key=lambda one: (one.strength != wanted, abs(one.strength)), default=None)


def _damage(steered: Sequence[Point]) -> str:
    parts = []
    for point in filter(None, (_near(steered, 1.0), _near(steered, -1.0))):
        figures = [
            ("KL {:.2g} nats", point.kl),
            ("perplexity × {:.2f}", point.perplexity),
            ("4-gram quality {:.2f}", point.quality),
        ]
        told = ", ".join(form.format(value) for form, value in figures if value is not None)
        parts.append(f"at {signed(point.strength)} {told}")
    return f"What it costs: {'; '.join(parts)}." if parts else ""


def _judge(judge: Mapping[str, Any]) -> str:
    accuracy = judge["accuracy"]
    if accuracy is None:
        return f"Judge: {judge['name']}; how often it is right was not measured."
    return f"Judge: {judge['name']}; right on {accuracy:.0%} of {judge['n_accuracy']:,} labelled texts it had not seen."


# --- figures ---------------------------------------------------------------------------------------------------------


def effect_figure(receipt: "Receipt") -> Any:
    """A plotly figure: the share that shows the behaviour over strength, with its intervals, beside the controls."""
    import plotly.graph_objects as go

    figure, found = go.Figure(), receipt_points(receipt.data)
    for kind, points in found.items():
        figure.add_scatter(
            x=[point.strength + ASIDE[kind] for point in points],
            y=[100 * point.share for point in points],
            error_y={
                "type": "data", "symmetric": False, "thickness": 1.2, "width": 3,
                "array": [100 * (point.high - point.share) for point in points],
                "arrayminus": [100 * (point.share - point.low) for point in points],
            },
            mode="lines+markers" if kind == "steered" else "markers",
            name=KIND_NAMES[kind],
            marker={"color": COLOURS[kind], "size": 8},
            customdata=[signed(point.strength) for point in points],
            hovertemplate="strength %{customdata}: %{y:.0f}%",
        )  # fmt: skip
    for point in found.get("steered", []):
        if point.strength == 0:
            figure.add_hline(100 * point.share, line={"color": COLOURS["random"], "dash": "dot", "width": 1})
    figure.update_layout(
        **ON_ANY_PAGE, height=_HEIGHT, margin={"l": 52, "r": 16, "t": 52, "b": 110},
        title={"text": "Texts that show it, by strength<br>(dotted: unsteered)", "font": {"size": 13}},
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top", "font": {"size": 11}},
        xaxis={**AXIS, "title": "strength"}, yaxis={**AXIS, "title": "%", "range": [-4, 104]},
    )  # fmt: skip
    return figure


def damage_figure(receipt: "Receipt") -> Any:
    """A plotly figure: KL, perplexity and repetition over strength, one above the other, beside the controls."""
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=len(_DAMAGE), cols=1, shared_xaxes=True, vertical_spacing=0.08)
    for kind, points in receipt_points(receipt.data).items():
        for row, (key, _) in enumerate(_DAMAGE, start=1):
            there = [(point, getattr(point, key)) for point in points if getattr(point, key) is not None]
            figure.add_scatter(
                x=[point.strength + ASIDE[kind] for point, _ in there], y=[value for _, value in there], row=row, col=1,
                mode="lines+markers" if kind == "steered" else "markers", name=KIND_NAMES[kind], showlegend=False,
                marker={"color": COLOURS[kind], "size": 7}, hovertemplate="%{y:.2f}",
            )  # fmt: skip
    for row, (_, title) in enumerate(_DAMAGE, start=1):
        figure.update_yaxes(title_text=title, title_font_size=11, row=row, col=1, **AXIS)
        figure.update_xaxes(**AXIS, row=row, col=1)
    figure.update_yaxes(range=[min(0.5, *_qualities(receipt)) - 0.03, 1.03], row=len(_DAMAGE), col=1)
    figure.update_xaxes(title_text="strength", row=len(_DAMAGE), col=1)
    figure.update_layout(
        **ON_ANY_PAGE, height=_HEIGHT, margin={"l": 64, "r": 16, "t": 52, "b": 44},
        title={"text": "What it costs, by strength<br>(KL 0, perplexity 1, quality 1: no harm)", "font": {"size": 13}},
    )  # fmt: skip
    return figure


def _qualities(receipt: "Receipt") -> list[float]:
    points = [point for points in receipt_points(receipt.data).values() for point in points]
    return [1.0, *(point.quality for point in points if point.quality is not None)]


# --- table and texts -------------------------------------------------------------------------------------------------


def table(receipt: "Receipt") -> str:
    """The receipt's table as HTML that scrolls in itself, by keyboard too."""
    found = receipt.data["table"]
    head = "".join(f"<th scope='col'>{escape(str(column)) or 'What'}</th>" for column in found["columns"])
    rows = "".join(
        f"<tr><th scope='row'>{escape(str(first))}</th>{''.join(f'<td>{escape(_minus(cell))}</td>' for cell in rest)}"
        "</tr>"
        for first, *rest in found["rows"]
    )
    return (
        f"<section class='ns-figures'><p class='ns-faint'>{escape(str(found['title']))}</p>"
        "<div tabindex='0' role='region' aria-label='The figures by strength, a table that scrolls sideways'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _minus(cell: object) -> str:
    text = str(cell)
    return f"−{text[1:]}" if text.startswith("-") else text


def texts(rows: "Sequence[EvaluatedText]") -> str:
    """What was written for each prompt (the first sample), by strength, to be opened; the first prompt's is open."""
    shown = [row for row in rows if row.kind in _KINDS and row.sample == 0]
    parts = []
    for number, prompt in enumerate(dict.fromkeys(row.prompt for row in shown)):
        own = sorted((row for row in shown if row.prompt == prompt), key=lambda row: (_KINDS[row.kind], row.strength))
        items = "".join(map(_item, own))
        state = " open" if number < _OPEN else ""
        parts.append(f"<details{state}><summary dir='auto'>{escape(prompt)}</summary><ul>{items}</ul></details>")
    return f"<section class='ns-texts'><h3>What it wrote</h3>{''.join(parts)}</section>" if parts else ""


def _item(row: "EvaluatedText") -> str:
    score = f"<span class='ns-faint'>judge: {row.score:.2f}</span>"
    text = escape(row.text.strip()) or "<i>nothing</i>"
    return f"<li><span class='ns-dose'>{escape(_what(row))} {score}</span><p dir='auto'>{text}</p></li>"


def _what(row: "EvaluatedText") -> str:
    if row.kind == "unsteered":
        return "unsteered"
    if row.kind == "instruction":
        return f"asked in plain words ({'more' if row.strength > 0 else 'less'})"
    return f"strength {signed(row.strength)}"
