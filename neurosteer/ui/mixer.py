"""The chosen artifacts and their sliders: one place that several tabs update."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, zip_longest
from typing import TYPE_CHECKING, Any

import gradio as gr

from neurosteer.ui.limits import check_strength
from neurosteer.ui.shelf import Shelf, zip_file
from neurosteer.ui.show import html as render
from neurosteer.ui.wiring import Form, Parts, Updates

if TYPE_CHECKING:
    from neurosteer.artifacts.artifact import Artifact
    from neurosteer.artifacts.recipes import Recipe, Use

MOST = 4
STRENGTHS = (-3.0, 3.0)
MULTIPLIERS = (0.0, 4.0)
DEFAULT_STRENGTH = 1.0

_STRENGTH_HELP = "0 is off, 1 the usual dose, −1 the opposite"
_MULTIPLIER_HELP = "What its neurons are multiplied by: 1 is off, 0 switches them off, 2 doubles them"


_NUMBERS = range(1, MOST + 1)
SLIDERS = tuple(f"slider_{number}" for number in _NUMBERS)


class Mixer(Parts):
    """The components. `shelf` holds the visitor's artifacts by label, `standing` the labels the sliders stand for."""

    @property
    def form(self) -> "Form[Mix]":
        """What they are set to."""
        return Form(Mix.of, self.pick("model", "shelf", "standing", "chosen", "without_overlap", *SLIDERS))

    @property
    def outputs(self) -> dict[str, Any]:
        """What `Mix.updates` changes."""
        rows = [f"{part}_{number}" for part in ("row", "slider", "download") for number in _NUMBERS]
        return self.pick("shelf", "standing", "empty", "chosen", *rows, "overlap", "without_overlap", "about")


@dataclass(frozen=True)
class Mix:
    """What a visitor has (`shelf`), has chosen, the strength of each (the multiplier of a circuit that scales), whether
    to steer `without_overlap` between vectors, and the model to use them on."""

    shelf: Shelf
    chosen: tuple[str, ...]
    strengths: dict[str, float]
    without_overlap: bool = False
    model: str | None = None

    @staticmethod
    def of(
        model: str | None,
        shelf: Shelf,
        standing: Sequence[str],
        chosen: Sequence[str] | None,
        without_overlap: bool,
        **sliders: Any,
    ) -> "Mix":
        """From the values of `Mixer.form`."""
        kept = [label for label in chosen or () if label in shelf]
        strengths = dict(zip(standing, (sliders[name] for name in SLIDERS), strict=False))
        return Mix(shelf, tuple(kept), strengths, bool(without_overlap), model)

    def strength(self, label: str) -> float:
        """Where the slider of `label` stands."""
        artifact = self.shelf.get(label)
        usual = artifact.calibration.amount if artifact is not None and _scales(artifact) else DEFAULT_STRENGTH
        return self.strengths.get(label, usual)

    def recipe(self) -> "Recipe":
        """What is chosen, at where the sliders stand. Raises `UsageError` where the overlap cannot be removed."""
        from neurosteer.artifacts.combining import orthogonalised
        from neurosteer.artifacts.recipes import Recipe

        recipe = Recipe.of(*(use_of(self.shelf[label], float(self.strength(label))) for label in self.chosen))
        return orthogonalised(recipe) if self.without_overlap else recipe

    def in_words(self) -> str:
        """'sentiment +1, formality −0.5'."""
        said = [
            f"{label} × {self.strength(label):g}"
            if _scales(self.shelf[label])
            else f"{label} {render.signed(self.strength(label))}"
            for label in self.chosen
        ]
        return ", ".join(said) + (" (without overlap)" if self.without_overlap and len(said) > 1 else "")

    def at(self, strengths: Mapping[str, float]) -> "Mix":
        """The same choice with some sliders elsewhere."""
        return replace(self, strengths={**self.strengths, **strengths})

    def choosing(self, shelf: Shelf, chosen: Sequence[str]) -> "Mix":
        """The same strengths with another shelf and choice."""
        return replace(self, shelf=shelf, chosen=tuple(chosen[:MOST]))

    def adding(self, shelf: Shelf, label: str) -> "Mix":
        """With `label` chosen too, the last of them, in place of the last one where there are as many as can be."""
        return self.choosing(shelf, [*[one for one in self.chosen if one != label][: MOST - 1], label])

    def updates(self) -> Updates:
        """For `Mixer.outputs`."""
        overlaps = overlaps_of({label: self.shelf[label] for label in self.chosen})
        changes: Updates = {
            "shelf": dict(self.shelf),
            "standing": list(self.chosen),
            "empty": gr.update(visible=not self.shelf),
            "chosen": gr.update(choices=list(self.shelf), value=list(self.chosen), visible=bool(self.shelf)),
            "overlap": render.overlaps(overlaps),
            "without_overlap": gr.update(visible=any(overlaps.values())),
            "about": "".join(render.about(label, self.shelf[label]) for label in self.chosen),
        }
        for number, label in zip_longest(_NUMBERS, self.chosen):
            changes[f"row_{number}"] = gr.update(visible=label is not None)
            if label is not None:
                changes[f"slider_{number}"] = self._slider(label)
                changes[f"download_{number}"] = gr.update(value=zip_file(self.shelf[label]))
        return changes

    def _slider(self, label: str) -> Any:
        scales = _scales(self.shelf[label])
        least, most = MULTIPLIERS if scales else STRENGTHS
        value = self.strength(label)
        return gr.update(
            label=f"{label}: multiplier" if scales else label,
            info=_MULTIPLIER_HELP if scales else _STRENGTH_HELP,
            minimum=min(least, value),
            maximum=max(most, value),
            value=value,
        )


def use_of(artifact: "Artifact", position: float) -> "Use":
    """`artifact` as a slider at `position` stands for it: at that strength, or multiplier where it scales neurons."""
    from neurosteer.artifacts.recipes import Use

    if _scales(artifact):
        return Use(artifact, multiplier=position)
    check_strength(artifact.name, position)
    return Use(artifact, position)


def _scales(artifact: "Artifact") -> bool:
    return artifact.operation == "scale"


def overlaps_of(artifacts: Shelf) -> dict[tuple[str, str], Mapping[int, float]]:
    """The cosines, by layer, of each two vectors that are added: others have no push to share. By their labels."""
    from neurosteer.artifacts.combining import cosines

    adding = [label for label, artifact in artifacts.items() if artifact.operation == "add"]
    return {
        pair: {found.layer: found.cosine for found in cosines([artifacts[label] for label in pair])}
        for pair in combinations(adding, 2)
    }


def lay_out(model: gr.Dropdown, shelf: gr.State, empty: gr.Column) -> Mixer:
    """The dropdown and the rows of sliders, within the current layout; `about` is for its owner to render."""
    mixer = Mixer(model=model, shelf=shelf, empty=empty, standing=gr.State([]))
    mixer.chosen = gr.Dropdown(
        [], value=[], multiselect=True, max_choices=MOST, label=f"Steer with (up to {MOST} at once)", visible=False,
        elem_id="chosen",
    )  # fmt: skip
    for number in _NUMBERS:
        with gr.Row(visible=False, elem_classes="ns-slider", equal_height=True) as row:
            slider = gr.Slider(
                *STRENGTHS, value=DEFAULT_STRENGTH, step=0.1, label=f"Strength {number}", info=_STRENGTH_HELP,
                interactive=True, scale=5,
            )  # fmt: skip
            download = gr.DownloadButton("Download", size="sm", scale=0, min_width=110, elem_classes="ns-download")
        vars(mixer).update({f"row_{number}": row, f"slider_{number}": slider, f"download_{number}": download})
    mixer.overlap = gr.HTML(elem_id="overlap", elem_classes="ns-flush")
    mixer.without_overlap = gr.Checkbox(
        False,
        label="Remove the overlap",
        info="Each slider then turns only what it does not share with the others",
        visible=False,
        elem_id="apart",
    )
    mixer.about = gr.HTML(elem_id="about", elem_classes="ns-flush", render=False)
    return mixer
