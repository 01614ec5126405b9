"""Vectors that other programs wrote, as steering vectors: control vectors (GGUF) and safetensors by layer."""

import hashlib
import threading
from pathlib import Path

from torch import Tensor

from neurosteer.artifacts.common import safe_name
from neurosteer.artifacts.provenance import made_now
from neurosteer.artifacts.strength import Calibration
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import MismatchError
from neurosteer.examples.files import neutral_prompts
from neurosteer.exporting.additions import read_additions
from neurosteer.measuring.calibration import TARGET_KL
from neurosteer.measuring.calibration import calibrate as calibrated
from neurosteer.models.language_model import Framing, LanguageModel
from neurosteer.progress import Progress, silent
from neurosteer.reading.loop import read_activations
from neurosteer.reading.request import Request

METHOD = "imported"


def import_vector(
    lm: LanguageModel,
    file: str | Path,
    *,
    name: str | None = None,
    calibrate: bool = True,
    target_kl: float = TARGET_KL,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> SteeringVector:
    """The steering vector in `file`: a control vector (GGUF, `direction.L`) or safetensors named by layer.

    Layers are blocks counted from 0, after which a vector is added. The lengths of the file's vectors say how the push
    is shared by the layers: `norms` are in proportion to them, and on average those of the residual stream on the
    bundled neutral prompts. Strength 1 is what `calibrate` finds, or else exactly what the file adds.

    Raises:
        ArtifactError: the file is damaged, a pickle (which is never loaded), or no file of vectors.
        MismatchError: its vectors do not fit the model.
    """
    path = Path(file)
    directions = read_additions(path)
    _check_fit(lm, path, directions)
    framing: Framing = "answer" if lm.chat else "raw"
    norms, dose = _shared(lm, directions, framing, progress)
    vector = SteeringVector(
        name=safe_name(path.stem if name is None else name),
        model=lm.reference,
        method=METHOD,
        description=f"Imported from {path.name[:300]}.",
        parameters={"file": path.name[:300], "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        directions=directions,
        norms=norms,
        calibration=Calibration(dose),
        provenance=made_now(framing=framing, tokens="mean", layer_choice="those of the file"),
    )
    if not calibrate:
        return vector
    found = calibrated(lm, vector, target_kl=target_kl, progress=progress, cancel=cancel)
    assert isinstance(found, SteeringVector)
    return found


def _check_fit(lm: LanguageModel, path: Path, directions: dict[int, Tensor]) -> None:
    for layer, direction in directions.items():
        if layer >= lm.n_layers or len(direction) != lm.shape.d_model:
            raise MismatchError(
                f"{path} has a vector of width {len(direction)} for layer {layer}; {lm.name} has width "
                f"{lm.shape.d_model} and layers 0 to {lm.n_layers - 1}. Name the model that it was made on (--model)."
            )


def _shared(
    lm: LanguageModel, directions: dict[int, Tensor], framing: Framing, progress: Progress
) -> tuple[dict[int, float], float]:
    """The norms that share the push as the file does, and the dose at which it is what the file adds.

    A layer's push is dose / layers × norm along its unit direction.
    """
    request = Request(residual=tuple(directions), framing=framing)
    measured = read_activations(lm, neutral_prompts(), (), request, progress=progress).norms
    lengths = {layer: float(direction.double().norm()) for layer, direction in directions.items()}
    ratio = sum(lengths.values()) / sum(measured[layer] for layer in directions)
    return {layer: length / ratio for layer, length in lengths.items()}, ratio * len(directions)
