"""Layer by layer: how well a method separates the examples there, what steering there does, and what it costs.

The effect is measured without a judge, on texts the method did not see: how much strength +1 against −1 shifts what the
model itself finds likely from the held-out negative texts to the held-out positive ones. Beside it stands the same
figure for a random direction (or random neurons) of the same dose, since any push of that size moves something.
"""

import csv
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neurosteer.activations import Tokens, length_batches
from neurosteer.artifacts import Artifact, NeuronCircuit, SteeringVector
from neurosteer.building import HELD_OUT_SHARE, LayerChoice, build_each, parse_layers
from neurosteer.errors import UsageError
from neurosteer.examples import ContrastSet, Split
from neurosteer.hooks import InputHook, hooked
from neurosteer.methods import find_method
from neurosteer.models import Framing, LanguageModel
from neurosteer.plans import applied, compile_plan
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.recipes import UNSTEERED, Recipe

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

HELD_OUT_TEXTS = 32
"""Per class, at most: every layer costs four forward passes over them."""

MAX_TEXT_TOKENS = 128
STRENGTHS = (1.0, -1.0)
CSV_FILE, HTML_FILE = "layers.csv", "layers.html"

_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
_MAX_LOGITS = {"cpu": 1 << 25, "cuda": 1 << 28}  # float32: 128 MB and 1 GB, several times over while they are reduced


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


def random_twin(artifact: Artifact, seed: int) -> Artifact:
    """`artifact` with random directions, or as many random neurons of each layer, at the same dose."""
    seeds = {layer: random.Random(f"{seed}/{layer}").getrandbits(63) for layer in artifact.layers}
    draws = {layer: torch.Generator().manual_seed(number) for layer, number in seeds.items()}
    if isinstance(artifact, SteeringVector):
        width = artifact.model.d_model
        directions = {layer: torch.randn(width, generator=draw) for layer, draw in draws.items()}
        return replace(artifact, directions=directions, receipts=(), features=())
    neurons = artifact.neurons.clone()
    for layer, draw in draws.items():
        here = artifact.neuron_layers == layer
        neurons[here] = torch.randperm(artifact.model.d_mlp, generator=draw)[: int(here.sum())].int()
    return replace(artifact, neurons=neurons, receipts=())


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """Token ids of which those from `first` up to `end` are counted."""

    ids: list[int]
    first: int
    end: int
    positive: bool

    @property
    def count(self) -> int:
        return self.end - self.first


def _training_part(examples: ContrastSet, split: Split) -> ContrastSet:
    return replace(
        examples,
        positive=tuple(examples.positive[place] for place in split.train_positive),
        negative=tuple(examples.negative[place] for place in split.train_negative),
    )


def _held_out_texts(lm: LanguageModel, examples: ContrastSet, split: Split, framing: Framing) -> list[_Text]:
    """The held-out texts as the artifacts' own were read; without those of which no token has one before it."""
    chosen = [(examples.positive[place], True) for place in split.held_out_positive]
    chosen += [(examples.negative[place], False) for place in split.held_out_negative]
    framed = lm.frame([text for text, _ in chosen], framing, max_tokens=MAX_TEXT_TOKENS)
    after = _tokens_after_text(lm) if framing == "prompt" else 0
    found = [
        _Text(item.ids, max(item.start, 1), len(item.ids) - after, positive)
        for item, (_, positive) in zip(framed, chosen, strict=True)
    ]
    texts = [text for text in found if text.count > 0]
    for side in (True, False):
        if not any(text.positive == side for text in texts):
            raise UsageError(
                f"No held-out {'positive' if side else 'negative'} text of {examples.name!r} is longer than one token; "
                "there is nothing to measure an effect on. Give longer texts."
            )
    return texts


def _tokens_after_text(lm: LanguageModel) -> int:
    """How many tokens the chat template writes behind a user's text: what two different prompts end in alike."""
    one, other = (lm.prompt_ids(text)[::-1] for text in ("A", "?"))
    return next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), 0)


def _measure(
    lm: LanguageModel,
    artifacts: Mapping[int, Artifact],
    texts: Sequence[_Text],
    seed: int,
    progress: Progress,
    cancel: threading.Event | None,
) -> Iterator[LayerFigures]:
    plain = _log_likelihoods(lm, texts, [UNSTEERED], cancel)[0]
    for done, (layer, artifact) in enumerate(artifacts.items()):
        progress(f"Measuring layer {layer}", done / len(artifacts))
        twin = random_twin(artifact, seed)
        recipes = [Recipe.of((which, strength)) for which in (artifact, twin) for strength in STRENGTHS]
        steered = _log_likelihoods(lm, texts, recipes, cancel)
        effect, damage = _effect_and_damage(texts, plain, steered[: len(STRENGTHS)])
        random_effect, random_damage = _effect_and_damage(texts, plain, steered[len(STRENGTHS) :])
        separation = artifact.provenance.separation[layer]
        yield LayerFigures(layer, separation, effect, damage, random_effect, random_damage)


def _effect_and_damage(texts: Sequence[_Text], plain: Tensor, steered: Tensor) -> tuple[float, float]:
    """In nats per token, from log-likelihoods of the texts: `plain` `[n]`, `steered` `[2, n]` at `STRENGTHS`."""
    counts = torch.tensor([text.count for text in texts], dtype=torch.float64)
    positive = torch.tensor([text.positive for text in texts])
    likelier = [steered[:, side].sum(1) / counts[side].sum() for side in (positive, ~positive)]
    up, down = (likelier[0] - likelier[1]).tolist()
    damage = (plain.sum() - steered.sum(1)).mean() / counts.sum()
    return (up - down) / 2, float(damage)


def _log_likelihoods(
    lm: LanguageModel, texts: Sequence[_Text], recipes: Sequence[Recipe], cancel: threading.Event | None
) -> Tensor:
    """Of each text's counted tokens together under each recipe, float64 `[n_recipes, n_texts]`; teacher-forced."""
    found = torch.zeros(len(recipes), len(texts), dtype=torch.float64)
    for places in _batches(lm, texts, len(recipes)):
        check_cancelled(cancel, "Measuring layers")
        batch = [texts[place] for place in places]
        rows = [recipe for recipe in recipes for _ in batch]
        sums = _batch_log_likelihoods(lm, batch * len(recipes), rows)
        found[:, places] = sums.reshape(len(recipes), len(batch))
    return found


def _batches(lm: LanguageModel, texts: Sequence[_Text], copies: int) -> Iterator[list[int]]:
    """Positions of texts of similar length, as many at once as their copies' tokens and logits leave room for."""
    kind = lm.device.type if lm.device.type in _BATCH_TOKENS else "cpu"
    vocabulary = lm.model.config.get_text_config().vocab_size
    room = min(_BATCH_TOKENS[kind], _MAX_LOGITS[kind] // vocabulary) // copies
    return length_batches(texts, room)


def _batch_log_likelihoods(lm: LanguageModel, texts: Sequence[_Text], recipes: Sequence[Recipe]) -> Tensor:
    """Row i is `texts[i]` under `recipes[i]`; float64 `[rows]`."""
    width = max(len(text.ids) for text in texts)
    ids = torch.full((len(texts), width), lm.pad_id)
    mask = torch.zeros((len(texts), width), dtype=torch.long)
    foretell = torch.zeros((len(texts), width), dtype=torch.bool)  # the positions before a token that is counted
    for row, text in enumerate(texts):
        ids[row, : len(text.ids)] = torch.tensor(text.ids)
        mask[row, : len(text.ids)] = 1
        foretell[row, text.first - 1 : text.end - 1] = True
    # The head sees those positions alone, [n, d_model]: over the whole vocabulary, logits are what costs most memory.
    head = InputHook(lm.model.get_output_embeddings(), lambda hidden: hidden[foretell.to(hidden.device)])
    plan = compile_plan(lm, recipes, "all")
    with torch.inference_mode(), applied(lm, plan, prompt_width=width), hooked([head]):
        inputs = {"input_ids": ids.to(lm.device), "attention_mask": mask.to(lm.device)}
        logits = lm.model(**inputs, use_cache=False).logits.float()
    targets = ids.roll(-1, dims=1)[foretell].to(logits.device)
    scores = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)
    row_of = foretell.nonzero()[:, 0]
    return torch.zeros(len(texts), dtype=torch.float64).index_add_(0, row_of, scores.double().cpu())


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
