"""Pictures for cards, as PNG. The same figures give the same bytes."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neurosteer.validation import is_finite

_LINE, _BEST = "#6366f1", "#d97706"
COLOURS = {"steered": _LINE, "random": "#9aa3b2", "permuted": "#0d9488", "instruction": _BEST}
"""Of what a receipt holds, on white and on dark grey, in pictures and on the page."""

KIND_NAMES = {
    "steered": "steered",
    "random": "random twins",
    "permuted": "built from shuffled labels",
    "instruction": "the instruction in plain words",
}
ASIDE = {"steered": 0.0, "random": 0.07, "permuted": 0.14, "instruction": -0.07}
"""How far from their strength they are drawn, so that their intervals can be seen."""


@dataclass(frozen=True)
class Point:
    """Figures of a receipt at one strength; shares from 0 to 1, `None` where there is none."""

    strength: float
    share: float
    low: float
    high: float
    kl: float | None
    perplexity: float | None
    quality: float | None


def receipt_points(data: Mapping[str, Any]) -> dict[str, list[Point]]:
    """What a receipt holds to be drawn, by kind (those of `KIND_NAMES`, `steered` with the unsteered point in it),
    ascending in strength. Whoever wrote it: what is no row of
    figures is passed over, and the result may be empty."""
    rows = data.get("rows")
    found: dict[str, dict[float, Point]] = {kind: {} for kind in KIND_NAMES}
    for row in rows if isinstance(rows, list) else []:
        point = _point(row) if isinstance(row, Mapping) else None
        kind = "steered" if point and row.get("kind") == "unsteered" else point and row.get("kind")
        if point is None or not isinstance(kind, str) or kind not in found:
            continue
        found[kind][point.strength] = point
    return {kind: [points[key] for key in sorted(points)] for kind, points in found.items() if points}


def _point(row: Mapping[str, Any]) -> Point | None:
    def number(key: str) -> float | None:
        value = row.get(key)
        usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
        return float(value) if usable and math.isfinite(value) else None  # type: ignore[arg-type]

    strength, share = number("strength"), number("share")
    if strength is None or share is None:
        return None
    low, high = number("share_low"), number("share_high")
    ends = (share if low is None else min(low, share), share if high is None else max(high, share))
    return Point(strength, share, *ends, number("kl_p95"), number("perplexity"), number("quality"))


def receipt_plot(data: Mapping[str, Any]) -> bytes | None:
    """A receipt's effect with its intervals, KL and perplexity over strength, the controls beside them; None where it
    holds nothing to draw."""
    points = receipt_points(data)
    if not points.get("steered"):
        return None
    figure = _canvas(10, 3.4)
    effect, kl, perplexity = figure.subplots(1, 3)
    for kind, found in points.items():
        doses = [point.strength + ASIDE[kind] for point in found]
        style = {"color": COLOURS[kind], "marker": "o", "markersize": 4}
        line = style | {"linestyle": "-" if kind == "steered" else "none", "label": KIND_NAMES[kind]}
        shares = [100 * point.share for point in found]
        bars = [[100 * (one.share - one.low) for one in found], [100 * (one.high - one.share) for one in found]]
        effect.errorbar(doses, shares, yerr=bars, capsize=3, **line)
        for axes, key in ((kl, "kl"), (perplexity, "perplexity")):
            values = [getattr(one, key) for one in found]
            axes.plot(doses, [math.nan if value is None else value for value in values], **line)
    for axes, name in ((effect, "Shows the behaviour, %"), (kl, "KL p95, nats"), (perplexity, "Perplexity ×")):
        axes.set_ylabel(name)
        axes.set_xlabel("Strength")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    effect.set_ylim(-4, 104)
    figure.legend(*effect.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return _png(figure)


def separation_plot(separation: Mapping[int, float], candidates: Sequence[Mapping[str, Any]] = ()) -> bytes:
    """How well the examples separate (ROC AUC, 0.5 is chance) at each layer, the best one marked; beside it, where
    choices of layers were compared, what each does at equal KL (nats per token), the chosen one on top."""
    effects = candidate_effects(candidates)
    figure = _canvas(11 if effects else 7, 3)
    every = figure.subplots(1, 2 if effects else 1, squeeze=False)[0]
    _draw_separation(every[0], separation)
    if effects:
        _draw_effects(every[1], effects)
    return _png(figure)


def _canvas(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def candidate_effects(candidates: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """Choices of layers in the order recorded, which begins with the chosen one: label, effect at equal KL and its
    standard error (0 where none was recorded). What is no such figure is passed over."""
    keys = ("label", "effect", "effect_error")
    found = [[one.get(key) for key in keys] for one in candidates if isinstance(one, Mapping)]
    return [
        (label[:60], effect + 0.0, error + 0.0 if is_finite(error) else 0.0)  # type: ignore[operator]
        for label, effect, error in found
        if isinstance(label, str) and is_finite(effect)
    ]


def _draw_separation(axes: Any, separation: Mapping[int, float]) -> None:
    from matplotlib.ticker import MaxNLocator

    layers = sorted(separation)
    best = max(layers, key=lambda layer: separation[layer])
    axes.plot(layers, [separation[layer] for layer in layers], color=_LINE, marker="o", markersize=3)
    axes.plot([best], [separation[best]], color=_BEST, marker="o", markersize=7, linestyle="none")
    axes.annotate(f"layer {best}", (best, separation[best]), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.margins(x=0.06, y=0.2)
    axes.set_xlabel("Layer")
    axes.set_ylabel("Separation (ROC AUC)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_effects(axes: Any, effects: Sequence[tuple[str, float, float]]) -> None:
    places = range(len(effects), 0, -1)
    labels, values, errors = zip(*effects, strict=True)
    colours = [_BEST, *[_LINE] * (len(effects) - 1)]
    axes.barh(
        places, values, xerr=errors if any(errors) else None, color=colours, height=0.55, ecolor=COLOURS["random"]
    )
    axes.set_yticks(places, [label.replace("$", "\\$") for label in labels])
    axes.set_xlabel("Effect at equal KL (nats per token) ± standard error")
    axes.grid(alpha=0.3, axis="x")
    axes.spines[["top", "right"]].set_visible(False)
