"""The view by layer on disk: its figures as a table, and their plot as a page that needs no network."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.files import csv_text, write_files
from neurosteer.building.layer_profile import LayerFigures, LayerProfile

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

CSV_FILE, HTML_FILE = "layers.csv", "layers.html"


def control_name(profile: LayerProfile) -> str:
    """What the artifacts are compared with, in words."""
    return "random neurons" if profile.kind == NeuronCircuit.kind else "random direction"


def write_profile(profile: LayerProfile, folder: Path) -> tuple[Path, ...]:
    """Write the figures as `layers.csv` and the plot as `layers.html` (which needs no network); returns both paths."""
    table = csv_text([entry.name for entry in fields(LayerFigures)], [asdict(one) for one in profile.layers])
    page = profile_figure(profile).to_html(include_plotlyjs=True, full_html=True)
    return write_files(folder, {CSV_FILE: table, HTML_FILE: page})


def profile_figure(profile: LayerProfile) -> "Figure":
    """Two panels over the layers: separation; effect at equal KL with its standard error, the control's, and what both
    cost. Layers that could not be brought down to that KL are crosses."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.1,
        subplot_titles=(
            f"How well the examples separate (texts kept out of the class means; the best of {len(profile.layers)} was "
            "chosen by these texts, so is rather high)",
            f"What steering does and costs at equal KL, {profile.target_kl:g} nats (texts kept out of building)",
        ),
    )
    layers = [figures.layer for figures in profile.layers]
    control = control_name(profile)
    symbols = ["x" if profile.beyond(figures) else "circle" for figures in profile.layers]
    lines = (
        (1, "separation", "separation", "solid", "#4f46e5"),
        (2, "effect", f"effect of {profile.method}", "solid", "#4f46e5"),
        (2, "damage", f"damage of {profile.method}", "solid", "#dc2626"),
        (2, "random_effect", f"effect of {control}", "dot", "#818cf8"),
        (2, "random_damage", f"damage of {control}", "dot", "#f87171"),
    )
    for row, key, name, dash, colour in lines:
        values = [getattr(figures, key) for figures in profile.layers]
        style = {"name": name, "mode": "lines+markers", "line": {"dash": dash, "color": colour}}
        if key.endswith("effect"):
            errors = [getattr(figures, f"{key}_error") for figures in profile.layers]
            style |= {"error_y": {"array": errors, "thickness": 1}}
        if key in ("effect", "damage"):
            style |= {"marker": {"symbol": symbols}}
        figure.add_scatter(x=layers, y=values, row=row, col=1, **style)
    figure.add_hline(y=0.5, row=1, col=1, line_dash="dash", line_color="#9ca3af", annotation_text="chance")  # type: ignore[arg-type]
    figure.add_hline(y=0.0, row=2, col=1, line_color="#9ca3af", line_width=1)  # type: ignore[arg-type]
    figure.update_yaxes(title_text="ROC AUC", row=1, col=1)
    figure.update_yaxes(title_text="nats per token", row=2, col=1)
    figure.update_xaxes(title_text="layer (block of the model)", row=2, col=1)
    positive, negative = profile.n_held_out
    figure.update_layout(
        title_text=f"{profile.method} from {profile.examples!r}, layer by layer",
        title_subtitle_text=f"{profile.model}; {positive} positive and {negative} negative texts kept out of building",
        legend={"orientation": "h", "y": -0.12},
        margin={"t": 130},
        template="plotly_white",
        height=760,
    )
    return figure
