"""How the page looks: one palette for gradio's components and for the figures, which read well on light and dark."""

from typing import Any

from gradio.themes import Base, Default

ACCENT = "#6366f1"  # indigo: what steers
FAINT, TEXT = "#9aa3b2", "#808a9b"
AXIS: dict[str, Any] = {"gridcolor": "rgba(128,138,155,0.18)", "zeroline": False, "fixedrange": True}
ON_ANY_PAGE: dict[str, Any] = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"color": TEXT, "size": 12},
    "dragmode": False,
}
"""A figure's layout: whatever is behind it shows through."""
AGAINST_TO_TOWARDS = [
    [0.0, "rgb(234,88,12)"],
    [0.4, "rgba(234,88,12,0.45)"],
    [0.5, "rgba(128,138,155,0.05)"],
    [0.6, "rgba(99,102,241,0.45)"],
    [1.0, "rgb(99,102,241)"],
]
"""A colour scale from orange to `ACCENT`, with nothing between."""

_SANS = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
_BLOCKS = {
    "body_text_color_subdued": (500, 400),
    "block_info_text_color": (500, 400),
    "block_title_text_color": (700, 200),
    "block_label_text_color": (700, 200),
}  # shades of the neutral hue, light and dark
_CHOSEN = {
    "checkbox_label_background_fill_selected": (50, 950),
    "checkbox_label_border_color_selected": (500, 400),
    "checkbox_label_text_color_selected": (700, 200),
    "button_primary_background_fill": (600, 600),
    "button_primary_background_fill_hover": (700, 500),
}  # shades of the primary hue, light and dark


def gradio_theme() -> Base:
    """The theme of gradio's components. Plain font names: the page asks no other server for anything."""
    theme = Default(
        primary_hue="indigo", secondary_hue="indigo", neutral_hue="slate", radius_size="lg", font=_SANS, font_mono=_MONO
    )
    shades: dict[str, Any] = {}
    for hue, names in (("neutral", _BLOCKS), ("primary", _CHOSEN)):
        for name, (light, dark) in names.items():
            shades |= {name: f"*{hue}_{light}", f"{name}_dark": f"*{hue}_{dark}"}
    return theme.set(
        body_background_fill="*neutral_50",
        block_title_text_weight="600",
        block_label_text_weight="600",
        checkbox_border_radius="*radius_sm",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        **shades,
    )
