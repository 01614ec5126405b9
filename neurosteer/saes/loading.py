"""Loading SAEs: released (through sae-lens), from a folder, or shipped with NeuroSteer."""

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from neurosteer.errors import MismatchError, ModelError, UsageError
from neurosteer.models.catalog import find_model
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.parts import probe_norm
from neurosteer.progress import Progress, silent
from neurosteer.saes.autoencoder import SparseAutoencoder
from neurosteer.saes.formats import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    SaeRows,
    is_plain,
    layer_of_hook,
    open_with_sae_lens,
    plain_rows,
    read_config,
    read_weights,
    sae_lens_rows,
    without_loading_advice,
)
from neurosteer.saes.offers import EMBEDDED, embedded_folder, embedded_saes, released_for, same_weights
from neurosteer.text import error_line

logger = logging.getLogger(__name__)


def load_sae(
    lm: LanguageModel, source: str | Path | None = None, sae_id: str | None = None, *, progress: Progress = silent
) -> SparseAutoencoder:
    """Load an SAE for `lm`.

    Args:
        source: a folder in sae-lens's format; a release of sae-lens's registry (or a Hub repo `user/repo`), with
            `sae_id` or as `release/id`; `embedded/L` (or None, where there is one) for the one shipped for block L.
        sae_id: the SAE's id within the release.

    Raises:
        UsageError: no such release, id or embedded SAE (the nearest names are given), or a site that is no residual
            stream after a block.
        MismatchError: the SAE was made for a model of another width, or of another name and other weights.
        ModelError: it cannot be fetched or read.
    """
    text = str(source) if source is not None else EMBEDDED
    if text == EMBEDDED or text.startswith(f"{EMBEDDED}/"):
        return _load_folder(lm, embedded_folder(lm, text), text)
    if isinstance(source, Path) or (sae_id is None and _is_path(text)):
        return _load_folder(lm, Path(text).expanduser(), text)
    release, identifier = (text, sae_id) if sae_id is not None else split_reference(text)
    return _load_released(lm, release, identifier, progress)


def _is_path(text: str) -> bool:
    return text.startswith((".", "~")) or Path(text).is_absolute() or Path(text).is_dir()


def split_reference(text: str) -> tuple[str, str]:
    """`release/id` or `user/repo/id` as two. Raises `UsageError` where no id follows."""
    directory = _registry()
    parts = text.split("/")
    head = 1 if parts[0] in directory or len(parts) < 3 else 2
    release, identifier = "/".join(parts[:head]), "/".join(parts[head:])
    if release in directory and not identifier:
        raise UsageError(f"{release!r} holds several SAEs; name one, like {release}/{next(iter(directory[release]))}.")
    if not identifier or (head == 1 and release not in directory):
        raise UsageError(
            f"There is no SAE {text!r}: no such folder, and no such release. {_nearest(parts[0], directory)}"
        )
    return release, identifier


def _load_folder(lm: LanguageModel, folder: Path, name: str) -> SparseAutoencoder:
    if not folder.is_dir():
        raise UsageError(f"There is no SAE {name!r}: no such folder.")
    config = read_config(folder / CONFIG_FILE)
    # Until version 6, sae-lens kept at the top what it now keeps under "metadata".
    metadata = config.get("metadata") or {"hook_name": config.get("hook_point"), "prepend_bos": True, **config}
    if is_plain(config):
        rows = plain_rows(config, read_weights(folder / WEIGHTS_FILE), lm.device, folder)
    else:
        rows = sae_lens_rows(open_with_sae_lens(folder), lm.device)
    return _described(lm, name, metadata, rows)


def _load_released(lm: LanguageModel, release: str, identifier: str, progress: Progress) -> SparseAutoencoder:
    directory = _registry()
    if release in directory and identifier not in directory[release]:
        nearest = difflib.get_close_matches(identifier, directory[release], n=3, cutoff=0.0)
        raise UsageError(f"The release {release!r} has no SAE {identifier!r}; the nearest are {', '.join(nearest)}.")
    if release not in directory and "/" not in release:
        raise UsageError(f"There is no SAE release {release!r}. {_nearest(release, directory)}")
    progress(f"Fetching the SAE {release}/{identifier}")
    from sae_lens import SAE

    try:
        with without_loading_advice():
            sae = SAE.from_pretrained(release, identifier, device="cpu")
    except Exception as error:  # the Hub's client and sae-lens's loaders raise many kinds
        unknown = f" There is no such folder or release. {_nearest(release.split('/')[0], directory, 0.7)}"
        raise ModelError(
            f"The SAE {release}/{identifier} could not be fetched ({error_line(error)})."
            + (unknown if release not in directory else "")
        ) from error
    return _described(lm, f"{release}/{identifier}", sae.cfg.metadata.to_dict(), sae_lens_rows(sae, lm.device))


def _registry() -> dict[str, list[str]]:
    """Every release that sae-lens knows, with the ids in it."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return {name: list(entry.saes_map) for name, entry in get_pretrained_saes_directory().items()}


def _nearest(text: str, directory: Mapping[str, Sequence[str]], cutoff: float = 0.3) -> str:
    nearest = difflib.get_close_matches(text, directory, n=3, cutoff=cutoff)
    return f"The nearest are {', '.join(nearest)}." if nearest else "See sae-lens's list of releases."


def _described(lm: LanguageModel, name: str, metadata: Mapping[str, Any], rows: "SaeRows") -> SparseAutoencoder:
    options = metadata.get("model_from_pretrained_kwargs") or {}
    model_name = str(metadata.get("model_name") or "")
    width = rows.decoder.shape[1]
    if width != lm.shape.d_model:
        raise MismatchError(
            f"The SAE {name!r} reads vectors of width {width}"
            + (f" (of {model_name})" if model_name else "")
            + f"; {lm.name} has width {lm.shape.d_model}. {_fitting(lm)}"
        )
    if not same_weights(lm, metadata):
        _check_model_name(lm, name, model_name)
    layer = layer_of_hook(str(metadata.get("hook_name") or ""))
    if layer >= lm.n_layers:
        raise MismatchError(f"The SAE {name!r} reads block {layer}; {lm.name} has blocks 0 to {lm.n_layers - 1}.")
    return SparseAutoencoder(
        name=name,
        layer=layer,
        model_name=model_name,
        decoder=rows.decoder,
        encode_rows=rows.encode,
        decode_rows=rows.decode,
        # TransformerLens centres only where what reads the stream does not see its mean over `d_model`.
        centred=bool(options.get("center_writing_weights")) and probe_norm(lm.final_norm, [width]).centres,
        prepend_bos=bool(metadata.get("prepend_bos", False)),
        neuronpedia=metadata.get("neuronpedia_id") or None,
        kind=rows.kind,
        columns=rows.columns,
    )


def _check_model_name(lm: LanguageModel, name: str, made_for: str) -> None:
    ours, theirs = (_plain_name(text) for text in (lm.name, made_for))
    known = find_model(lm.name)
    names = {ours, *((_plain_name(known.name), _plain_name(known.recorded_name)) if known else ())}
    if not theirs or theirs in names or any(theirs.startswith(mine) or mine.startswith(theirs) for mine in names):
        return  # one name may only say more than the other, like an instruction-tuned model's
    raise MismatchError(f"The SAE {name!r} was made for {made_for}, not for {lm.name}. {_fitting(lm)}")


def _plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.rsplit("/", 1)[-1].lower())


def _fitting(lm: LanguageModel) -> str:
    fitting = [*(f"{EMBEDDED}/{layer}" for layer in embedded_saes(lm)), *released_for(lm.name)]
    return f"For {lm.name} there are {', '.join(fitting)}." if fitting else f"The catalog names none for {lm.name}."
