"""Why an artifact steers where it does, as a plotly figure: what each layer tells apart, and the choices compared."""

from collections.abc import Collection, Mapping, Sequence
from html import escape
from typing import Any

from neurosteer.artifacts.plots import candidate_effects
from neurosteer.ui.show.html import CHANCE
from neurosteer.ui.show.theme import ACCENT, AXIS, FAINT, ON_ANY_PAGE, TEXT

_HEIGHT, _BAR_HEIGHT = 260, 30


def layer_figure(
    separation: Mapping[int, float], chosen: Collection[int], candidates: Sequence[Mapping[str, Any]] = ()
) -> Any:
    """How well each layer tells the classes apart, the chosen layers marked; below it, where choices of layers were
    compared, what each does at equal KL. None where there is neither."""
    effects = candidate_effects(candidates)
    if len(separation) < 2 and not effects:
        return None
    from plotly.subplots import make_subplots

    bars = _BAR_HEIGHT * len(effects) + 20 if effects else 0
    below = 90 if effects else 0
    titles = ("", "Effect at equal KL, nats per token, ± its standard error") if effects else ("",)
    figure = make_subplots(
        rows=len(titles), cols=1, subplot_titles=titles, row_heights=[_HEIGHT, bars][: len(titles)],
        vertical_spacing=below / (_HEIGHT + below + bars) if effects else 0,
    )  # fmt: skip
    _add_separation(figure, separation, chosen)
    if effects:
        _add_effects(figure, effects)
    figure.update_annotations(font={"color": TEXT, "size": 12})
    figure.update_layout(
        height=_HEIGHT + below + bars, margin={"l": 52, "r": 16, "t": 34, "b": 44}, hovermode="closest", **ON_ANY_PAGE,
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    )  # fmt: skip
    return figure


def _add_separation(figure: Any, separation: Mapping[int, float], chosen: Collection[int]) -> None:
    layers = sorted(separation)
    values = [separation[layer] for layer in layers]
    marked = [layer for layer in layers if layer in chosen]
    shown = "layer %{x}: %{y:.2f}<extra></extra>"
    figure.add_scatter(
        x=layers, y=values, mode="lines+markers", name="each layer", hovertemplate=shown, row=1, col=1,
        line={"color": FAINT, "width": 2}, marker={"size": 5},
    )  # fmt: skip
    figure.add_scatter(
        x=marked, y=[separation[layer] for layer in marked], mode="markers", name="chosen", hovertemplate=shown,
        row=1, col=1, marker={"color": ACCENT, "size": 11, "line": {"color": "white", "width": 1.5}},
    )  # fmt: skip
    figure.add_hline(
        y=CHANCE, row=1, col=1, line={"color": FAINT, "dash": "dot", "width": 1},  # pyright: ignore[reportArgumentType]
        annotation={"text": "chance", "font": {"color": TEXT}}, annotation_position="bottom right",
    )  # fmt: skip
    figure.update_xaxes(**AXIS, title="layer (0 reads first)", tickformat="d", row=1, col=1)
    lowest = min([0.4, *values]) - 0.02
    figure.update_yaxes(**AXIS, title="told apart (AUC)", range=[lowest, 1.04], row=1, col=1)


def _add_effects(figure: Any, effects: Sequence[tuple[str, float, float]]) -> None:
    """What was chosen on top, in its colour."""
    labels, values = [escape(label) for label, _, _ in effects], [effect for _, effect, _ in effects]
    errors = [error for _, _, error in effects]
    figure.add_bar(
        x=values, y=labels, orientation="h", showlegend=False, row=2, col=1,
        marker={"color": [ACCENT, *[FAINT] * (len(effects) - 1)]}, text=[f" {value:+.3f} " for value in values],
        textposition="auto", error_x={"array": errors, "color": TEXT, "thickness": 1},
        hovertemplate="%{y}: %{x:+.3f}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(**AXIS, showticklabels=False, row=2, col=1)
    figure.update_yaxes(**AXIS, autorange="reversed", automargin=True, row=2, col=1)
