"""Pictures for cards, as PNG. The same figures give the same bytes."""

import io
from collections.abc import Mapping

_LINE, _BEST = "#4f46e5", "#b45309"


def separation_plot(separation: Mapping[int, float]) -> bytes:
    """How well the examples separate (ROC AUC, 0.5 is chance) at each layer, the best one marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = sorted(separation)
    best = max(layers, key=lambda layer: separation[layer])
    figure = Figure(figsize=(7, 3), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(layers, [separation[layer] for layer in layers], color=_LINE, marker="o", markersize=3)
    axes.plot([best], [separation[best]], color=_BEST, marker="o", markersize=7, linestyle="none")
    axes.annotate(f"layer {best}", (best, separation[best]), textcoords="offset points", xytext=(0, 8), ha="center")
    axes.margins(x=0.06, y=0.2)
    axes.set_xlabel("Layer")
    axes.set_ylabel("Separation (ROC AUC)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
