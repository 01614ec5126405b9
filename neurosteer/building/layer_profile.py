"""Layer by layer: how well a method separates the examples there, what steering there does, and what it costs.

The effect is measured without a judge, on texts the method did not see: how much strength +1 against −1 shifts what the
model itself finds likely from the held-out negative texts to the held-out positive ones. Beside it stands the same
figure for a random direction (or random neurons) of the same dose, since any push of that size moves something.
"""

import csv
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.artifacts.twins import random_twin
from neurosteer.building.build import build_each
from neurosteer.building.layers import LayerChoice, parse_layers
from neurosteer.building.plan import HELD_OUT_SHARE
from neurosteer.errors import UsageError
from neurosteer.examples.contrast_set import ContrastSet, Split
from neurosteer.measuring.preference import LabelledText, labelled_texts, log_likelihoods, preferences
from neurosteer.methods import find_method
from neurosteer.models.language_model import Framing, LanguageModel
from neurosteer.progress import Progress, silent
from neurosteer.reading.request import Tokens

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

HELD_OUT_TEXTS = 32
"""Per class, at most: every layer costs four forward passes over them."""

STRENGTHS = (1.0, -1.0)
CSV_FILE, HTML_FILE = "layers.csv", "layers.html"

_WHAT = "Measuring layers"


@dataclass(frozen=True)
class LayerFigures:
    """An artifact of one layer alone. `separation` is a ROC AUC (0.5 is chance), the others are in nats per token.

    `effect` is the preference for positive over negative texts (the difference of the mean log-probability per token)
    at strength +1 minus that at −1, halved. `damage` is how much less likely the texts of both classes become, on
    average over the two strengths. The control's figures are those of random directions or neurons of the same dose.
    """

    layer: int
    separation: float
    effect: float
    damage: float
    random_effect: float
    random_damage: float


@dataclass(frozen=True)
class LayerProfile:
    """Figures per layer, ascending, and what they were measured on: numbers of (positive, negative) texts."""

    model: str
    method: str
    kind: str
    examples: str
    framing: str
    n_train: tuple[int, int]
    n_held_out: tuple[int, int]
    seed: int
    layers: tuple[LayerFigures, ...]

    @property
    def best_separation(self) -> int:
        """The layer at which the classes are told apart best, the lowest of several."""
        return max(self.layers, key=lambda figures: figures.separation).layer

    @property
    def best_effect(self) -> int:
        """The layer at which steering shifts the preference most."""
        return max(self.layers, key=lambda figures: figures.effect).layer


def profile_layers(
    lm: LanguageModel,
    examples: ContrastSet,
    *,
    method: str = "caa",
    layers: LayerChoice = "all",
    framing: Framing | None = None,
    tokens: Tokens | None = None,
    seed: int = 0,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
    **parameters: Any,
) -> LayerProfile:
    """Build at every one of `layers` (for `sae`, at every SAE) and measure each artifact by itself.

    A fifth of each class, at most `HELD_OUT_TEXTS`, is kept for effect and damage and takes no part in building.
    Separation is what building reports: measured on a part of the other texts, against the rest of them. Strength 1 is
    the default dose throughout, so that layers can be compared. `seed` draws the random control; other arguments and
    errors as for `building.build_each`.
    """
    chosen = parse_layers(layers, lm.n_layers)
    if chosen is None:
        raise UsageError("layers is 'auto', which is what this view is to help with; name layers, or 'all'.")
    if "contexts" in find_method(method).defaults:
        parameters = {"contexts": 0, **parameters}  # words for features are of no use here and cost a pass
    split = examples.split(HELD_OUT_SHARE, at_most=HELD_OUT_TEXTS)
    artifacts = build_each(
        lm,
        _training_part(examples, split),
        method=method,
        layers="all" if len(chosen) == lm.n_layers else chosen,
        framing=framing,
        tokens=tokens,
        progress=progress,
        cancel=cancel,
        **parameters,
    )
    source = next(iter(artifacts.values()))
    texts = _held_out_texts(lm, examples, split, source.provenance.framing)  # type: ignore[arg-type]
    found = _measure(lm, artifacts, texts, seed, progress, cancel)
    return LayerProfile(
        model=lm.name,
        method=method,
        kind=source.kind,
        examples=examples.name,
        framing=source.provenance.framing,
        n_train=(len(split.train_positive), len(split.train_negative)),
        n_held_out=(len(split.held_out_positive), len(split.held_out_negative)),
        seed=seed,
        layers=tuple(found),
    )


# --- measuring -------------------------------------------------------------------------------------------------------


def _training_part(examples: ContrastSet, split: Split) -> ContrastSet:
    return replace(
        examples,
        positive=tuple(examples.positive[place] for place in split.train_positive),
        negative=tuple(examples.negative[place] for place in split.train_negative),
    )


def _held_out_texts(lm: LanguageModel, examples: ContrastSet, split: Split, framing: Framing) -> list[LabelledText]:
    """The held-out texts as the artifacts' own were read."""
    positive = [examples.positive[place] for place in split.held_out_positive]
    negative = [examples.negative[place] for place in split.held_out_negative]
    return labelled_texts(lm, positive, negative, framing, name=examples.name)


def _measure(
    lm: LanguageModel,
    artifacts: Mapping[int, Artifact],
    texts: Sequence[LabelledText],
    seed: int,
    progress: Progress,
    cancel: threading.Event | None,
) -> Iterator[LayerFigures]:
    plain = log_likelihoods(lm, texts, [UNSTEERED], what=_WHAT, cancel=cancel)[0]
    for done, (layer, artifact) in enumerate(artifacts.items()):
        progress(f"Measuring layer {layer}", done / len(artifacts))
        both = (artifact, random_twin(artifact, seed))
        pairs = [(Recipe.of((which, STRENGTHS[0])), Recipe.of((which, STRENGTHS[1]))) for which in both]
        own, other = preferences(lm, texts, pairs, plain=plain, what=_WHAT, cancel=cancel)
        separation = artifact.provenance.separation[layer]
        yield LayerFigures(layer, separation, own.effect, own.damage, other.effect, other.damage)


# --- showing ---------------------------------------------------------------------------------------------------------


def profile_data(profile: LayerProfile) -> dict[str, Any]:
    """The profile as JSON-ready data, with the best layers."""
    best = {"separation": profile.best_separation, "effect": profile.best_effect}
    return {**asdict(profile), "best": best}


def control_name(profile: LayerProfile) -> str:
    """What the artifacts are compared with, in words."""
    return "random neurons" if profile.kind == NeuronCircuit.kind else "random direction"


def write_profile(profile: LayerProfile, folder: Path) -> tuple[Path, Path]:
    """Write the figures as `layers.csv` and the plot as `layers.html` (which needs no network); returns both paths."""
    table, page = folder / CSV_FILE, folder / HTML_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [entry.name for entry in fields(LayerFigures)])
            writer.writeheader()
            writer.writerows(asdict(figures) for figures in profile.layers)
        html = profile_figure(profile).to_html(include_plotlyjs=True, full_html=True)
        page.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{str(folder)!r} could not be written ({error.strerror}); choose another folder.") from error
    return table, page


def profile_figure(profile: LayerProfile) -> "Figure":
    """Two panels over the layers: separation; effect, the control's effect, and what both cost."""
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=2,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.1,
        subplot_titles=(
            "How well the examples separate (texts kept out of the class means)",
            "What steering at strength ±1 does and costs (texts kept out of building)",
        ),
    )
    layers = [figures.layer for figures in profile.layers]
    control = control_name(profile)
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
