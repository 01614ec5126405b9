"""The chosen artifacts and their sliders: one place that both tabs update."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import gradio as gr

from neurosteer.ui import render
from neurosteer.ui.shelf import Shelf, zip_file

MOST = 4
STRENGTHS = (-3.0, 3.0)
DEFAULT_STRENGTH = 1.0


@dataclass(frozen=True)
class Mixer:
    """The components. `shelf` holds the visitor's artifacts by label, `shown` the labels the sliders stand for."""

    shelf: gr.State
    shown: gr.State
    empty: gr.Column
    chosen: gr.Dropdown
    rows: tuple[gr.Row, ...]
    sliders: tuple[gr.Slider, ...]
    downloads: tuple[gr.DownloadButton, ...]
    overlap: gr.HTML
    apart: gr.Checkbox
    about: gr.HTML

    @property
    def inputs(self) -> list[Any]:
        """In the order of `Mix`'s fields."""
        return [self.shelf, self.shown, self.chosen, *self.sliders, self.apart]

    @property
    def outputs(self) -> list[Any]:
        """In the order of what `Mix.updates` returns."""
        several = [*self.rows, *self.sliders, *self.downloads]
        return [self.shelf, self.shown, self.empty, self.chosen, *several, self.overlap, self.apart, self.about]


@dataclass(frozen=True)
class Mix:
    """What a visitor has (`shelf`), has chosen, the strength of each, and whether to keep them `apart`: without the
    overlap between vectors."""

    shelf: Shelf
    chosen: tuple[str, ...]
    strengths: dict[str, float]
    apart: bool = False

    @staticmethod
    def of(values: Sequence[Any]) -> "Mix":
        """From the values of `Mixer.inputs`."""
        shelf, shown, chosen, *strengths, apart = values
        kept = [label for label in chosen or () if label in shelf]
        return Mix(shelf, tuple(kept), dict(zip(shown, strengths, strict=False)), bool(apart))

    def strength(self, label: str) -> float:
        return self.strengths.get(label, DEFAULT_STRENGTH)

    def choosing(self, shelf: Shelf, chosen: Sequence[str]) -> "Mix":
        """The same strengths with another shelf and choice."""
        return replace(self, shelf=shelf, chosen=tuple(chosen[:MOST]))

    def updates(self) -> list[Any]:
        """For `Mixer.outputs`."""
        labels = [*self.chosen, *[None] * (MOST - len(self.chosen))]
        overlaps = overlaps_of({label: self.shelf[label] for label in self.chosen})
        return [
            dict(self.shelf),
            list(self.chosen),
            gr.update(visible=not self.shelf),
            gr.update(choices=list(self.shelf), value=list(self.chosen), visible=bool(self.shelf)),
            *(gr.update(visible=label is not None) for label in labels),
            *(gr.skip() if label is None else gr.update(label=label, value=self.strength(label)) for label in labels),
            *(gr.skip() if label is None else gr.update(value=zip_file(self.shelf[label])) for label in labels),
            render.overlaps(overlaps),
            gr.update(visible=any(overlaps.values())),
            "".join(render.about(label, self.shelf[label]) for label in self.chosen),
        ]


def overlaps_of(artifacts: Shelf) -> dict[tuple[str, str], Mapping[int, float]]:
    """The cosines, by layer, of each two vectors that are added: others have no push to share. By their labels."""
    from neurosteer.combining import cosines

    adding = [label for label, artifact in artifacts.items() if artifact.operation == "add"]
    return {
        pair: {found.layer: found.cosine for found in cosines([artifacts[label] for label in pair])}
        for pair in combinations(adding, 2)
    }


def unchanged() -> list[Any]:
    """Updates for `Mixer.outputs` that change nothing."""
    return [gr.skip()] * (4 + 3 * MOST + 3)


def lay_out(shelf: gr.State, empty: gr.Column) -> Mixer:
    """The dropdown and the rows of sliders, within the current layout; `about` is for its owner to render."""
    chosen = gr.Dropdown(
        [],
        value=[],
        multiselect=True,
        max_choices=MOST,
        label=f"Steer with (up to {MOST} at once)",
        visible=False,
        elem_id="chosen",
    )
    rows, sliders, downloads = [], [], []
    for number in range(1, MOST + 1):
        with gr.Row(visible=False, elem_classes="ns-slider", equal_height=True) as row:
            sliders.append(
                gr.Slider(
                    *STRENGTHS,
                    value=DEFAULT_STRENGTH,
                    step=0.1,
                    label=f"Strength {number}",
                    info="0 is off, 1 the usual dose, −1 the opposite",
                    interactive=True,
                    scale=5,
                )
            )
            downloads.append(
                gr.DownloadButton("Download", size="sm", scale=0, min_width=110, elem_classes="ns-download")
            )
        rows.append(row)
    overlap = gr.HTML(elem_id="overlap", elem_classes="ns-flush")
    apart = gr.Checkbox(
        False,
        label="Remove the overlap",
        info="Each slider then turns only what it does not share with the others",
        visible=False,
        elem_id="apart",
    )
    about = gr.HTML(elem_id="about", elem_classes="ns-flush", render=False)
    several = (tuple(rows), tuple(sliders), tuple(downloads))
    return Mixer(shelf, gr.State([]), empty, chosen, *several, overlap, apart, about)
