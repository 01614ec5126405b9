"""One feature of a sparse autoencoder as something to steer with: added, or held at a value."""

from pathlib import PurePath
from typing import Literal, get_args

from neurosteer.artifacts.common import safe_name
from neurosteer.artifacts.provenance import made_now
from neurosteer.artifacts.strength import Calibration, default_calibration
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import MismatchError, UsageError
from neurosteer.examples.files import neutral_prompts
from neurosteer.models.language_model import Framing, LanguageModel
from neurosteer.progress import Progress, silent
from neurosteer.reading.loop import read_activations
from neurosteer.reading.request import Request
from neurosteer.saes.autoencoder import SparseAutoencoder
from neurosteer.text import shown
from neurosteer.validation import check_option, is_finite

FeatureOperation = Literal["add", "clamp"]
METHOD = "sae-feature"


def feature_vector(
    lm: LanguageModel,
    sae: SparseAutoencoder,
    index: int,
    *,
    operation: FeatureOperation = "add",
    value: float | None = None,
    name: str | None = None,
    progress: Progress = silent,
) -> SteeringVector:
    """A steering vector of one SAE feature.

    Args:
        operation: `add` pushes along the feature's decoder row, whether or not the feature is active; `clamp` moves
            the stream along that row by what the feature's activation lacks of `value`, token by token.
        value: with `clamp`, the activation at strength 1, in the feature's own units; 0 removes the feature. When left
            out, the highest activation on the bundled neutral prompts.

    Raises:
        UsageError: no such feature or operation; no value although the feature is silent on the neutral prompts; or a
            clamp with an SAE whose features cannot be computed one by one.
        MismatchError: the SAE is one for a model of another shape.
    """
    _check(lm, sae, index, operation, value)
    encoder = sae.feature_encoder(index) if operation == "clamp" else None
    framing: Framing = "answer" if lm.chat else "raw"
    calibration = default_calibration(operation) if value is None else Calibration(float(value))
    seeking = operation == "clamp" and value is None
    norm, highest = _read(lm, sae, index if seeking else None, framing, progress)
    if seeking:
        calibration = Calibration(_usable(highest, sae, index))
    return SteeringVector(
        name=name or _name(sae, index, operation),
        model=lm.reference,
        method=METHOD,
        parameters={"sae": sae.name, "index": index},
        directions={sae.layer: sae.decoder[index].detach().to("cpu", copy=True).float().contiguous()},
        norms={sae.layer: norm},
        operation=operation,
        description=_description(sae, index, operation, seeking=seeking),
        calibration=calibration,
        provenance=made_now(
            framing=framing,
            tokens="mean",
            layer_choice="the layer that the SAE reads",
        ),
        encoders={sae.layer: encoder} if encoder is not None else {},
    )


def _check(lm: LanguageModel, sae: SparseAutoencoder, index: int, operation: str, value: float | None) -> None:
    check_option("operation", operation, get_args(FeatureOperation))
    sae.check_index(index)
    if value is not None and operation != "clamp":
        raise UsageError(f"value is {value!r:.60}, but a feature that is added has none; use operation='clamp'.")
    if value is not None and not is_finite(value):
        raise UsageError(f"value is {shown(value)}; it must be a finite number.")
    if sae.d_model != lm.shape.d_model or sae.layer >= lm.n_layers:
        raise MismatchError(
            f"{sae.name} reads block {sae.layer} of a model of width {sae.d_model}; {lm.name} has width "
            f"{lm.shape.d_model} and blocks 0 to {lm.n_layers - 1}. Load an SAE that was made for it."
        )


def _read(
    lm: LanguageModel, sae: SparseAutoencoder, index: int | None, framing: Framing, progress: Progress
) -> tuple[float, float]:
    """The median norm of the residual stream on the neutral prompts, and a feature's highest activation there."""
    encoders = {sae.layer: sae} if index is not None else {}
    request = Request(residual=(sae.layer,), framing=framing, encoders=encoders, prepend_bos=sae.prepend_bos)
    found = read_activations(lm, neutral_prompts(), (), request, progress=progress)
    highest = 0.0 if index is None else float(found.features[sae.layer].strongest[index, 0])
    return found.norms[sae.layer], highest


def _usable(highest: float, sae: SparseAutoencoder, index: int) -> float:
    if highest <= 0:
        raise UsageError(
            f"Feature {index} of {sae.name} is active nowhere in the neutral prompts, so there is no value to clamp it "
            "to; give one (value=…, or SAE#INDEX=VALUE)."
        )
    return highest


def _name(sae: SparseAutoencoder, index: int, operation: str) -> str:
    """The number first: where an SAE's name is long, its end is cut."""
    what = f"feature-{index}" if operation == "add" else f"feature-{index}-clamped"
    return safe_name(f"{what}-of-{'-'.join(PurePath(sae.name).parts[-2:])}")


def _description(sae: SparseAutoencoder, index: int, operation: str, *, seeking: bool) -> str:
    link = sae.feature_link(index)
    what = f"Feature {index} of the SAE {sae.name[-300:]}" + (f" ({link})" if link else "")
    if operation == "add":
        return f"{what}, added."
    return f"{what}, clamped" + (" to its highest activation on neutral prompts." if seeking else ".")
