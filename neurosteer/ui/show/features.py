"""What a vector made of SAE features is made of, as HTML. Words and quotes are data: all of it is escaped here."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from neurosteer.text import flat

if TYPE_CHECKING:
    from neurosteer.artifacts.artifact import Artifact
    from neurosteer.artifacts.features import Feature, FeatureContext

SHOWN_FEATURES, SHOWN_WORDS, SHOWN_PLACES = 12, 8, 3

_FEATURES_HELP = (
    "As it reads, the model notices patterns, such as topics, tones and turns of phrase; each feature is one of them, "
    "and turning the slider up turns those with a weight above 0 up and the others down."
)
_RATES_HELP = "How often one fires is a share of the tokens (words and parts of words) in the texts."
_QUOTES_HELP = "The quotes are from the texts it was built from, and go with it when it is downloaded."
_ELSEWHERE = "target='_blank' rel='noopener noreferrer'"
_COLUMNS = ("Feature", "Found more in", "Fires on: show it vs don’t", "Weight", "Words")


def made_of(artifact: "Artifact") -> str:
    """The SAE features that weigh most, as a table with the places where each fires; empty without features."""
    from neurosteer.artifacts.cards import strongest_features

    features: Sequence[Feature] = getattr(artifact, "features", ())
    if not features:
        return ""
    shown = strongest_features(features, SHOWN_FEATURES)
    several = len({feature.layer for feature in features}) > 1
    quotes = f"<p class='ns-faint'>{_QUOTES_HELP}</p>" if any(feature.contexts for feature in shown) else ""
    heads = "".join(f"<th scope='col' role='columnheader'>{name}</th>" for name in _COLUMNS)
    most = abs(shown[0].weight) or 1.0
    rows = "".join(_feature_row(feature, abs(feature.weight) / most, several) for feature in shown)
    return (
        f"<section class='ns-features'><h3>What it is made of</h3><p>{_FEATURES_HELP}</p>"
        f"<table role='table'><caption>{_feature_count(len(shown), len(features))} <span class='ns-faint'>"
        f"{_RATES_HELP}</span></caption>"
        f"<thead role='rowgroup'><tr role='row'>{heads}</tr></thead><tbody role='rowgroup'>{rows}</tbody></table>"
        f"{quotes}</section>"
    )


def _feature_count(shown: int, total: int) -> str:
    if total == 1:
        return "The one feature it has"
    return f"Its {total} features" if shown == total else f"The {shown} of its {total:,} features that weigh most"


def _feature_row(feature: "Feature", share: float, several_layers: bool) -> str:
    """One feature; `share` is its |weight| against the largest."""
    name = f"#{feature.index}" + (f" at layer {feature.layer}" if several_layers else "")
    link = f" <a href='{escape(feature.link)}' {_ELSEWHERE}>Neuronpedia</a>" if feature.link else ""
    fires = escape(" vs ".join(map(_rate, feature.rates)))
    weight = f"{feature.weight:+.3g}".replace("-", "−") + (
        f"<span class='ns-bar {'ns-up' if feature.weight > 0 else 'ns-down'}' "
        f"style='--share:{share:.0%}' aria-hidden='true'></span>"
    )
    words = _words("promotes", feature.promoted) + _words("suppresses", feature.suppressed) + _places(feature.contexts)
    cells = zip(_COLUMNS[1:], (_side(feature.rates), fires, weight), strict=False)
    shown = "".join(f"<td role='cell' data-label='{escape(column)}'>{content}</td>" for column, content in cells)
    head = f"<th scope='row' role='rowheader'>{name}{link}</th>"
    return f"<tr role='row'>{head}{shown}<td role='cell' class='ns-wide'>{words}</td></tr>"


def _side(rates: tuple[float, float]) -> str:
    if rates[0] == rates[1]:
        return "both alike"
    side, which = ("ns-up", "show it") if rates[0] > rates[1] else ("ns-down", "don’t")
    return f"<span class='ns-side {side}'>texts that {which}</span>"


def _rate(rate: float) -> str:
    """A share of tokens: '12.3%'."""
    return "<0.1%" if 0 < rate < 0.0005 else f"{rate:.1%}"


def _words(what: str, tokens: Sequence[str]) -> str:
    """Tokens, as a line; those that look the same once."""
    seen = dict.fromkeys(map(_visible, tokens[:SHOWN_WORDS]))
    shown = " ".join(f"<bdi class='ns-word'>{escape(word)}</bdi>" for word in seen)
    return f"<p class='ns-words'><span class='ns-faint'>{what}</span> {shown}</p>" if seen else ""


def _visible(token: str) -> str:
    """A token by itself, in printable characters."""
    return flat(token) or ("↵" if "\n" in token else "␣")


def _marked(token: str) -> str:
    """A token within its text: as it is, unless it is blank. A blank before it is not marked."""
    word = token.lstrip()
    blank = token[: len(token) - len(word)] if word else ""
    return f"{escape(blank)}<mark>{escape(word or _visible(token))}</mark>"


def _places(contexts: "Sequence[FeatureContext]") -> str:
    """Where a feature fires, strongest first, to be opened."""
    items = "".join(
        f"<li dir='auto'>{escape(place.before)}{_marked(place.token)}{escape(place.after)}</li>"
        for place in contexts[:SHOWN_PLACES]
    )
    return f"<details><summary>Where it fires most</summary><ul>{items}</ul></details>" if items else ""
