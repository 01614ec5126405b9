"""How to build, as a visitor or a program says it: names of the library's options, and what the page lets through."""

from typing import TYPE_CHECKING, Any, NamedTuple

from neurosteer.errors import ModelError, UsageError
from neurosteer.ui.limits import strangers

if TYPE_CHECKING:
    from neurosteer.models.language_model import LanguageModel

HELD_FOR_JUDGING = 0.5
MOST_SAE_BYTES = 1 << 30
"""Of an SAE's two matrices, in float32, that strangers may have fetched and held in memory."""


class Settings(NamedTuple):
    """How to build. Empty means automatic."""

    name: str = ""
    method: str = "caa"
    layers: str = "auto"
    framing: str = ""
    tokens: str = ""
    rank: str = ""
    operation: str = ""
    top_k: str = ""
    weight: str = ""
    sides: str = ""
    sae: str = ""
    min_output_score: str = ""
    contexts: bool = True
    calibrate: bool = True
    keep_half: bool = False


OF_SOME_METHODS = ("rank", "operation", "top_k", "weight", "sides", "sae", "min_output_score", "contexts")
"""Those that only some methods have."""


def build_options(settings: Settings) -> dict[str, Any]:
    """The arguments of `build`: what was left automatic, and what the method does not take, is left out."""
    from neurosteer.methods import find_method

    takes = find_method(settings.method).defaults
    own = {
        **{name: getattr(settings, name) for name in ("rank", "operation", "weight", "sides")},
        "sae": settings.sae.strip(),
        "top_k": _number(settings.top_k),
        "min_output_score": _number(settings.min_output_score),
        "contexts": "" if settings.contexts else 0,
    }
    options = {name: value for name, value in own.items() if name in takes}
    options |= {"name": settings.name.strip(), "framing": settings.framing, "tokens": settings.tokens}
    options = {name: value for name, value in options.items() if value != ""}
    always = {"calibrate": settings.calibrate, "hold_out": HELD_FOR_JUDGING if settings.keep_half else 0.0}
    return {"method": settings.method, "layers": settings.layers.strip() or "auto", **always, **options}


def _number(text: str) -> float | str:
    """What stands in a field for a number; what is none is left for the library to refuse."""
    try:
        number = float(text)
    except ValueError:
        return text.strip()
    return int(number) if number.is_integer() else number


def check_sae(named: str, lm: "LanguageModel") -> None:
    """For strangers, only SAEs that fit the model and are not too wide: others are fetched whole, gigabytes at times.

    Raises `UsageError` naming those there are, and `ModelError` where the width cannot be found out.
    """
    from neurosteer.saes.offers import EMBEDDED, embedded_saes, released_for

    if not strangers():
        return
    releases = released_for(lm.name)
    if not any(f"{named}/".startswith(f"{name}/") for name in (EMBEDDED, *releases)):
        offered = [*(f"{EMBEDDED}/{layer}" for layer in embedded_saes(lm)), *(f"{name}/…" for name in releases)]
        raise UsageError(
            f"The SAE {named[:100]!r} is not offered on this page; for {lm.name} there are: "
            f"{', '.join(offered) or 'none'}. Run NeuroSteer on a machine of your own to use any other."
        )
    release, _, identifier = named.partition("/")
    known = release in releases and identifier
    size = 8 * sae_width(release, identifier) * lm.shape.d_model if known else 0
    if size > MOST_SAE_BYTES:
        raise UsageError(
            f"The SAE {named[:100]!r} takes {size / 1e9:.1f} GB and this page loads up to {MOST_SAE_BYTES / 1e9:.1f} "
            "GB: choose one of fewer features, or run NeuroSteer on a machine of your own."
        )


def sae_width(release: str, identifier: str) -> int:
    """How many features an SAE of a release has, from its description alone. Raises `ModelError` where that cannot be
    had."""
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    try:
        return int(load_sae_config_from_huggingface(release, identifier)["d_sae"])
    except Exception as error:  # the Hub's client and sae-lens's readers raise many kinds
        raise ModelError(
            f"How large the SAE {release}/{identifier[:60]} is could not be found out ({type(error).__name__}); "
            "choose another, or try again later."
        ) from error
