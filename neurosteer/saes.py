"""Sparse autoencoders: released (through sae-lens), from a folder, or shipped with NeuroSteer.

An SAE reads the residual stream at one site and writes it as a sum of few features, each with a direction of its own
(its decoder row). Those trained on a model with centred writing weights (TransformerLens's loading option of that name)
expect the residual stream without its mean over `d_model`; what goes into `encode` is always the model's own.
"""

import difflib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from neurosteer.catalog import find_model
from neurosteer.errors import MismatchError, ModelError, UsageError
from neurosteer.examples import assets_folder
from neurosteer.models import LanguageModel
from neurosteer.progress import Progress, silent
from neurosteer.sources import recorded_name

logger = logging.getLogger(__name__)

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
EMBEDDED = "embedded"
MAX_ENCODED_VALUES = 1 << 26
"""How many feature activations one chunk of tokens may make (256 MB in float32)."""

_PRE = re.compile(r"blocks\.(\d+)\.hook_resid_pre")
_POST = (
    re.compile(r"blocks\.(\d+)\.hook_resid_post"),
    re.compile(r"(?:model\.|transformer\.|gpt_neox\.)?(?:language_model\.)?(?:layers|h)\.(\d+)"),
)
_PLAIN_OPTIONS = {
    "normalize_activations": ("none", None),
    "reshape_activations": ("none", None),
    "activation_fn": ("relu", None),  # this and the next until sae-lens 6, where TopK could be one
    "activation_fn_str": ("relu", None),
}


@dataclass(frozen=True, eq=False)
class EncoderColumns:
    """The encoder of an SAE whose features do not look at one another: on an input x, feature f is
    p = x · `weights[:, f]` + `biases[f]` where p is above `thresholds[f]` and above 0, else 0.

    `weights` `[d_model, n_features]`, the others `[n_features]`.
    """

    weights: Tensor
    biases: Tensor
    thresholds: Tensor


@dataclass(frozen=True, eq=False)
class SparseAutoencoder:
    """One SAE. `layer` is the block whose output it reads; `decoder` float32 `[n_features, d_model]`.

    `prepend_bos` says that it was trained on sequences that begin with BOS; `centred`, that its input has no mean over
    `d_model`; `neuronpedia` is its id there, where it has one. `kind` is its architecture in sae-lens's words;
    `columns` its encoder, where each feature can be computed alone.
    """

    name: str
    layer: int
    model_name: str
    decoder: Tensor
    encode_rows: Callable[[Tensor], Tensor]
    decode_rows: Callable[[Tensor], Tensor]
    centred: bool = False
    prepend_bos: bool = False
    neuronpedia: str | None = None
    kind: str = "unknown"
    columns: EncoderColumns | None = None

    @property
    def n_features(self) -> int:
        return self.decoder.shape[0]

    @property
    def d_model(self) -> int:
        return self.decoder.shape[1]

    def encode(self, residual: Tensor) -> Tensor:
        """Feature activations, float32 `[..., n_features]`, of the model's own residual stream `[..., d_model]`.

        A stream in bfloat16 may be multiplied in bfloat16, which it is exact to anyway.
        """
        rows = residual.reshape(-1, residual.shape[-1])
        if self.centred:
            rows = (rows.float() - rows.float().mean(-1, keepdim=True)).to(rows.dtype)
        return self.encode_rows(rows).reshape(*residual.shape[:-1], self.n_features)

    def decode(self, features: Tensor) -> Tensor:
        """What the SAE makes of feature activations, float32 `[..., d_model]`; centred where its input is."""
        rows = features.reshape(-1, self.n_features)
        return self.decode_rows(rows).reshape(*features.shape[:-1], self.d_model)

    def check_index(self, index: int) -> None:
        """Raises `UsageError` unless the SAE has a feature of this number."""
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < self.n_features:
            raise UsageError(f"There is no feature {index!r:.40} in {self.name}; it has 0 to {self.n_features - 1}.")

    def feature_encoder(self, index: int) -> tuple[Tensor, float, float]:
        """Weights (float32 `[d_model]`), bias and threshold of one feature, as in `EncoderColumns`.

        They stand for the SAE's own input, which is without its mean over `d_model` where the SAE is `centred`.
        Raises `UsageError` where there is no such feature, or a feature cannot be computed without the others.
        """
        self.check_index(index)
        if self.columns is None:
            raise UsageError(
                f"A feature of {self.name} ({self.kind}) cannot be clamped: how active it is depends on more than its "
                "own encoder column; add it instead (operation 'add', or SAE#INDEX without a value)."
            )
        weights = self.columns.weights[:, index].to("cpu", torch.float32, copy=True).contiguous()
        return weights, float(self.columns.biases[index]), float(self.columns.thresholds[index])

    def chunk_rows(self) -> int:
        """How many tokens may be encoded at once for memory to stay bounded."""
        return max(1, MAX_ENCODED_VALUES // self.n_features)

    def feature_link(self, index: int) -> str | None:
        """The feature's page on Neuronpedia, where the SAE has one."""
        return f"https://neuronpedia.org/{self.neuronpedia}/{index}" if self.neuronpedia else None


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
        return _load_folder(lm, _embedded_folder(lm, text), text)
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


def embedded_saes(lm: LanguageModel) -> dict[int, Path]:
    """The SAEs shipped for this model, by its name or its weights: block to folder, ascending."""
    return _embedded_folders(lambda about: about.get("model_name") == lm.name or _same_weights(lm, about))


def released_for(lm: LanguageModel) -> tuple[str, ...]:
    """The releases that the catalog names for this model."""
    return _releases(lm.name)


@dataclass(frozen=True)
class ShippedSae:
    """An SAE that comes with NeuroSteer, from its description alone. `measured` are its figures on held-out text."""

    name: str
    layer: int
    n_features: int
    measured: Mapping[str, float]


@dataclass(frozen=True)
class Offer:
    """The SAEs there are for the model that artifacts record as `model`: those shipped, and the catalog's releases."""

    model: str
    shipped: tuple[ShippedSae, ...]
    releases: tuple[str, ...]


def offered_saes(model: str | Path) -> Offer:
    """The SAEs for a model by name, which is neither fetched nor loaded. Raises `ModelError` for an unknown name."""
    name = recorded_name(model)
    folders = _embedded_folders(lambda about: about.get("model_name") == name)
    shipped = tuple(_shipped(layer, folder) for layer, folder in folders.items())
    return Offer(name, shipped, _releases(name))


def _shipped(layer: int, folder: Path) -> ShippedSae:
    config = _read_config(folder / CONFIG_FILE)
    measured = config.get("metadata", {}).get("measured", {})
    return ShippedSae(f"{EMBEDDED}/{layer}", layer, int(config.get("d_sae", 0)), dict(measured))


def _embedded_folders(wanted: Callable[[Mapping[str, Any]], bool]) -> dict[int, Path]:
    """Those shipped SAEs whose metadata are `wanted`: block to folder, ascending."""
    root = assets_folder() / "saes"
    found = {}
    for config_file in root.rglob(CONFIG_FILE) if root.is_dir() else ():
        metadata = _read_config(config_file).get("metadata", {})
        if wanted(metadata):
            found[layer_of_hook(str(metadata.get("hook_name")))] = config_file.parent
    return dict(sorted(found.items()))


def _releases(model_name: str) -> tuple[str, ...]:
    known = find_model(model_name)
    return known.sae_releases if known is not None else ()


# --- sites ---------------------------------------------------------------------------------------------------------


def layer_of_hook(hook_name: str) -> int:
    """The block whose output a hook name stands for: `resid_pre` of block L is what block L − 1 returned.

    Raises `UsageError` for any other site.
    """
    before = _PRE.fullmatch(hook_name)
    if before and int(before[1]) > 0:
        return int(before[1]) - 1
    if before:
        raise UsageError(
            f"The SAE reads {hook_name!r}, the embeddings before the first block; steering begins after it. "
            "Use an SAE of a later block."
        )
    for pattern in _POST:
        after = pattern.fullmatch(hook_name)
        if after:
            return int(after[1])
    raise UsageError(
        f"The SAE reads {hook_name!r}; only the residual stream between blocks can be steered "
        "(blocks.L.hook_resid_pre or blocks.L.hook_resid_post)."
    )


# --- sources ---------------------------------------------------------------------------------------------------------


def _embedded_folder(lm: LanguageModel, text: str) -> Path:
    available = embedded_saes(lm)
    if not available:
        releases = ", ".join(released_for(lm)) or "none is in the catalog"
        raise UsageError(f"No SAE is shipped for {lm.name}; name one of a release ({releases}), or a folder.")
    wanted = text.partition("/")[2]
    if not wanted:
        return list(available.values())[len(available) // 2]
    if not wanted.isdecimal() or int(wanted) not in available:
        names = ", ".join(f"{EMBEDDED}/{layer}" for layer in available)
        raise UsageError(f"There is no SAE {text!r} for {lm.name}; there are {names}.")
    return available[int(wanted)]


def _load_folder(lm: LanguageModel, folder: Path, name: str) -> SparseAutoencoder:
    if not folder.is_dir():
        raise UsageError(f"There is no SAE {name!r}: no such folder.")
    config = _read_config(folder / CONFIG_FILE)
    # Until version 6, sae-lens kept at the top what it now keeps under "metadata".
    metadata = config.get("metadata") or {"hook_name": config.get("hook_point"), "prepend_bos": True, **config}
    if _is_plain(config):
        rows = _plain(config, _read_weights(folder / WEIGHTS_FILE), lm.device, folder)
    else:
        rows = _through_sae_lens(_open_with_sae_lens(folder), lm.device)
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
        with _without_loading_advice():
            sae = SAE.from_pretrained(release, identifier, device="cpu")
    except Exception as error:  # the Hub's client and sae-lens's loaders raise many kinds
        unknown = f" There is no such folder or release. {_nearest(release.split('/')[0], directory, 0.7)}"
        raise ModelError(
            f"The SAE {release}/{identifier} could not be fetched ({_one_line(error)})."
            + (unknown if release not in directory else "")
        ) from error
    return _described(lm, f"{release}/{identifier}", sae.cfg.metadata.to_dict(), _through_sae_lens(sae, lm.device))


def _registry() -> dict[str, list[str]]:
    """Every release that sae-lens knows, with the ids in it."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return {name: list(entry.saes_map) for name, entry in get_pretrained_saes_directory().items()}


def _nearest(text: str, directory: Mapping[str, Sequence[str]], cutoff: float = 0.3) -> str:
    nearest = difflib.get_close_matches(text, directory, n=3, cutoff=cutoff)
    return f"The nearest are {', '.join(nearest)}." if nearest else "See sae-lens's list of releases."


def _described(lm: LanguageModel, name: str, metadata: Mapping[str, Any], rows: "_Rows") -> SparseAutoencoder:
    options = metadata.get("model_from_pretrained_kwargs") or {}
    model_name = str(metadata.get("model_name") or "")
    width = rows.decoder.shape[1]
    if width != lm.shape.d_model:
        raise MismatchError(
            f"The SAE {name!r} reads vectors of width {width}"
            + (f" (of {model_name})" if model_name else "")
            + f"; {lm.name} has width {lm.shape.d_model}. {_fitting(lm)}"
        )
    if not _same_weights(lm, metadata):
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
        centred=bool(options.get("center_writing_weights")) and has_layer_norm(lm),
        prepend_bos=bool(metadata.get("prepend_bos", False)),
        neuronpedia=metadata.get("neuronpedia_id") or None,
        kind=rows.kind,
        columns=rows.columns,
    )


def _same_weights(lm: LanguageModel, metadata: Mapping[str, Any]) -> bool:
    """Whether the SAE records that it was made on just these weights, whatever they are called."""
    recorded = metadata.get("model_fingerprint")
    return recorded is not None and recorded == lm.fingerprint


def _check_model_name(lm: LanguageModel, name: str, made_for: str) -> None:
    ours, theirs = (_plain_name(text) for text in (lm.name, made_for))
    known = find_model(lm.name)
    names = {ours, *((_plain_name(known.name), _plain_name(known.recorded_name)) if known else ())}
    if not theirs or theirs in names or any(_is_variant(theirs, mine) for mine in names):
        return
    raise MismatchError(f"The SAE {name!r} was made for {made_for}, not for {lm.name}. {_fitting(lm)}")


def _is_variant(one: str, other: str) -> bool:
    """Whether one name only says more than the other, like an instruction-tuned model's."""
    return one.startswith(other) or other.startswith(one)


def _plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.rsplit("/", 1)[-1].lower())


def _fitting(lm: LanguageModel) -> str:
    fitting = [*(f"{EMBEDDED}/{layer}" for layer in embedded_saes(lm)), *released_for(lm)]
    return f"For {lm.name} there are {', '.join(fitting)}." if fitting else f"The catalog names none for {lm.name}."


def has_layer_norm(lm: LanguageModel) -> bool:
    """Whether what reads the residual stream is a LayerNorm, which does not see its mean over `d_model`: only there
    does TransformerLens centre."""
    return "LayerNorm" in type(lm.final_norm).__name__


# --- weights ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    decoder: Tensor
    kind: str
    columns: EncoderColumns | None


def _is_plain(config: Mapping[str, Any]) -> bool:
    """Whether the SAE is one of the two simple kinds, which need no sae-lens (its import takes seconds)."""
    plain = all(config.get(key) in allowed for key, allowed in _PLAIN_OPTIONS.items())
    return plain and config.get("architecture") in ("standard", "jumprelu")


def _plain(config: Mapping[str, Any], weights: Mapping[str, Tensor], device: torch.device, folder: Path) -> _Rows:
    """ReLU (standard) and JumpReLU (arXiv 2407.14435) SAEs: features of `relu((x − b_dec) W_enc + b_enc)`, kept above
    the threshold."""
    needed = ["W_enc", "W_dec", "b_enc", "b_dec", *(["threshold"] if config["architecture"] == "jumprelu" else [])]
    missing = [key for key in needed if key not in weights]
    if missing:
        raise ModelError(f"{folder / WEIGHTS_FILE} lacks {', '.join(missing)}; it is no {config['architecture']} SAE.")
    w_enc, w_dec, b_enc, b_dec = (weights[key].to(device, torch.float32) for key in needed[:4])
    threshold = weights["threshold"].to(device, torch.float32) if "threshold" in needed else torch.zeros_like(b_enc)
    widths = (b_enc.shape, threshold.shape) != (w_enc.shape[1:], w_enc.shape[1:]) or b_dec.shape != w_dec.shape[1:]
    if w_enc.shape != w_dec.T.shape or widths:
        raise ModelError(f"{folder / WEIGHTS_FILE}: the shapes of its tensors do not belong together.")
    # The decoder's bias is taken off the input before encoding, here folded into the encoder's bias.
    shift = b_dec if config.get("apply_b_dec_to_input", True) else torch.zeros_like(b_dec)
    bias, half = b_enc - shift @ w_enc, w_enc.to(torch.bfloat16)

    def encode(rows: Tensor) -> Tensor:
        rows = rows.to(device)
        if rows.dtype == torch.bfloat16:
            # Taken off first: the product with the mean, which is most of a row, would drown the rest in its rounding.
            before = ((rows.float() - shift).to(torch.bfloat16) @ half).float().add_(b_enc)
        else:
            before = torch.addmm(bias, rows.float(), w_enc)
        return before.masked_fill_(before <= threshold.clamp(min=0), 0.0)

    columns = EncoderColumns(w_enc, bias, threshold)
    return _Rows(
        encode, lambda features: torch.addmm(b_dec, features.to(device), w_dec), w_dec, config["architecture"], columns
    )


def _through_sae_lens(sae: Any, device: torch.device) -> _Rows:
    if sae.cfg.architecture() == "temporal":
        raise UsageError("The SAE is a temporal one, which reads whole sequences; use one that reads one at a time.")
    sae = sae.to(device=str(device), dtype=torch.float32)
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        sae.fold_W_dec_norm()  # so that a feature's activation times its decoder row is what it writes
    decoder = sae.W_dec.detach()

    @torch.no_grad()
    def encode(rows: Tensor) -> Tensor:
        features = sae.encode(rows.to(device).float())
        return features.to_dense() if features.is_sparse else features

    @torch.no_grad()
    def decode(features: Tensor) -> Tensor:
        return sae.decode(features.to(device))

    return _Rows(encode, decode, decoder, sae.cfg.architecture(), _columns_of(sae))


@torch.no_grad()
def _columns_of(sae: Any) -> EncoderColumns | None:
    """None where a feature's activation depends on the others, or on what the input is divided by."""
    config = sae.cfg
    if not _is_plain(
        {**{key: getattr(config, key, None) for key in _PLAIN_OPTIONS}, "architecture": config.architecture()}
    ):
        return None
    bias = sae.b_enc - sae.b_dec @ sae.W_enc if config.apply_b_dec_to_input else sae.b_enc
    threshold = sae.threshold if config.architecture() == "jumprelu" else torch.zeros_like(bias)
    return EncoderColumns(sae.W_enc.detach(), bias.detach(), threshold.detach())


def _open_with_sae_lens(folder: Path) -> Any:
    from sae_lens import SAE

    try:
        with _without_loading_advice():
            return SAE.load_from_disk(folder, device="cpu", dtype="float32")
    except Exception as error:  # sae-lens raises whatever its reading hits
        raise ModelError(f"The SAE in {folder} could not be loaded ({_one_line(error)}).") from error


@contextmanager
def _without_loading_advice() -> Iterator[None]:
    """sae-lens warns that the model must be loaded with centred weights; here its activations are centred instead."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        yield


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path.parent} holds no {path.name}; it is no SAE in sae-lens's format.") from None
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read ({_one_line(error)}); fetch the SAE again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}; an SAE's is an object.")
    if not isinstance(config.get("metadata", {}), dict):
        raise ModelError(f"{path} has metadata {config['metadata']!r:.40}; an SAE's is an object.")
    return config


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ModelError(f"{path.parent} holds no {path.name}; fetch the SAE again.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged ({_one_line(error)}); fetch the SAE again.") from error


def _one_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300].rstrip(".")
