"""Training sparse autoencoders on the activations that NeuroSteer itself reads, with sae-lens's trainer.

BatchTopK SAEs (arXiv 2412.06410), saved as JumpReLU ones in sae-lens's format. Several depths train together on one
reading of the texts. The work goes in chunks of texts: a chunk is read, its tokens are shuffled, every SAE takes them
in batches, and the state is written down, so that training that was cut goes on from the last whole chunk and ends in
the same weights.
"""

import csv
import hashlib
import json
import math
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neurosteer.errors import UsageError
from neurosteer.models.batching import length_batches
from neurosteer.models.hooks import OutputHook, hooked
from neurosteer.models.language_model import FRAMINGS, FramedText, Framing, LanguageModel
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.reading.loop import read_tokens
from neurosteer.saes.autoencoder import SparseAutoencoder
from neurosteer.saes.formats import CONFIG_FILE, WEIGHTS_FILE
from neurosteer.saes.loading import load_sae

if TYPE_CHECKING:
    from sae_lens.training.sae_trainer import SAETrainer

_STATE_FOLDER, _STATE_FILE, _TEXTS_AT_ONCE = ".training", "state.json", 200
_MAX_TEXT = 1 << 24  # characters in a table's cell; the csv module's own limit is 131,072
_THRESHOLD_RATE = 0.02
CROSS_ENTROPY_TOKENS, _MEASURED_AT_ONCE = 20_000, 1024


@dataclass(frozen=True)
class TrainingText:
    """A text, and the request it answers where it is a chat model's answer."""

    text: str
    prompt: str | None = None


@dataclass(frozen=True)
class TrainingOptions:
    """`features` of each SAE, `active` (on average per token) of them at once, over `tokens` tokens in batches of
    `batch_tokens`. Texts without a prompt take turns under `framings`; each keeps its first `max_tokens` tokens.
    `held_out_tokens` are read for the figures only."""

    features: int = 4096
    active: float = 48
    tokens: int = 3_000_000
    batch_tokens: int = 512
    chunk_tokens: int = 65_536
    learning_rate: float = 1e-3
    framings: tuple[Framing, ...] = ("raw",)
    max_tokens: int = 256
    held_out_tokens: int = 100_000
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "framings", tuple(self.framings))
        for key in ("features", "tokens", "batch_tokens", "chunk_tokens", "max_tokens", "held_out_tokens"):
            if not isinstance(getattr(self, key), int) or getattr(self, key) < 1:
                raise UsageError(f"{key} is {getattr(self, key)!r}; it must be a whole number above 0.")
        if not 0 < self.active <= self.features:
            raise UsageError(f"active is {self.active!r}; it must lie between 0 and the {self.features} features.")
        if not 0 < self.learning_rate < 1:
            raise UsageError(f"learning_rate is {self.learning_rate!r}; it must lie between 0 and 1.")
        if not self.framings or not set(self.framings) <= set(FRAMINGS):
            raise UsageError(f"framings is {self.framings!r}; use some of {', '.join(FRAMINGS)}.")


@dataclass(frozen=True)
class SaeMeasures:
    """Figures of an SAE on held-out text.

    `explained_variance` is 1 − Σ‖x − x̂‖² / Σ‖x − mean‖²; `l0` the active features per token; `dead` the share of
    features that never fired; `cross_entropy_recovered` (CE of mean ablation − CE of the reconstruction) / (CE of mean
    ablation − CE of the model), the stream being replaced at the text's own tokens.
    """

    explained_variance: float
    l0: float
    dead: float
    cross_entropy_recovered: float
    n_tokens: int
    n_tokens_cross_entropy: int


def read_training_texts(paths: Sequence[str | Path]) -> list[TrainingText]:
    """Texts from `.jsonl` (objects with `text` and perhaps `prompt`), `.csv` (those columns) or plain files (one text
    a line). Raises `UsageError` naming the file and line that cannot be read."""
    found = [text for path in paths for text in _texts_of(Path(path)) if text.text.strip()]
    if not found:
        raise UsageError(f"{', '.join(map(str, paths)) or 'no file'} holds no text; give files with texts to train on.")
    return found


def train_saes(
    lm: LanguageModel,
    texts: Sequence[TrainingText],
    layers: Sequence[int],
    folder: str | Path,
    options: TrainingOptions | None = None,
    *,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> dict[int, Path]:
    """Train an SAE on the output of each block in `layers` and write it to `folder/layer_L`.

    Training that was cut before is taken up where `folder` says it stood, if model, texts, layers and options are the
    same. Returns the SAEs' folders.

    Raises:
        UsageError: too few texts, a layer the model does not have, or another training's state in `folder`.
        Cancelled: `cancel` was set; the last chunk's state is kept.
    """
    options = options or TrainingOptions()
    layers = sorted(set(layers))
    if not layers or layers[0] < 0 or layers[-1] >= lm.n_layers:
        raise UsageError(f"layers is {layers}; {lm.name} has layers 0 to {lm.n_layers - 1}.")
    corpus = _Corpus(lm, texts, options)
    run = _Run(lm, layers, Path(folder), options, corpus)
    while run.tokens < options.tokens:
        check_cancelled(cancel, "Training")
        run.train_chunk(progress, cancel)
        run.save_state()
    return run.finish(progress, cancel)


def measure_sae(
    lm: LanguageModel,
    sae: SparseAutoencoder,
    framed: Sequence[FramedText],
    *,
    cross_entropy_tokens: int = CROSS_ENTROPY_TOKENS,
    cancel: threading.Event | None = None,
) -> SaeMeasures:
    """Measure an SAE on texts it was not trained on."""
    return measure_saes(lm, [sae], framed, cross_entropy_tokens=cross_entropy_tokens, cancel=cancel)[0]


def measure_saes(
    lm: LanguageModel,
    saes: Sequence[SparseAutoencoder],
    framed: Sequence[FramedText],
    *,
    cross_entropy_tokens: int = CROSS_ENTROPY_TOKENS,
    cancel: threading.Event | None = None,
) -> list[SaeMeasures]:
    """Measure SAEs at different layers together, on texts they were not trained on."""
    rows = _read_groups(lm, framed, [sae.layer for sae in saes], cancel)
    means = [rows[sae.layer].float().mean(0) for sae in saes]
    recovered, n_tokens = _cross_entropy_recovered(lm, saes, framed, means, cross_entropy_tokens, cancel)
    return [
        SaeMeasures(
            *_reconstruction(sae, rows[sae.layer], mean),
            cross_entropy_recovered=share,
            n_tokens=len(rows[sae.layer]),
            n_tokens_cross_entropy=n_tokens,
        )
        for sae, mean, share in zip(saes, means, recovered, strict=True)
    ]


def measures_of(folder: Path) -> dict[str, float]:
    """What was measured of the SAE in `folder` when it was trained."""
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["metadata"]["measured"]


# --- texts -----------------------------------------------------------------------------------------------------------


def _texts_of(path: Path) -> Iterator[TrainingText]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from _texts_of_table(path, csv.DictReader(file))
                return
            for number, line in enumerate(file, 1):
                if path.suffix != ".jsonl":
                    yield TrainingText(line.strip())
                elif line.strip():
                    yield _text_of_line(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} cannot be read ({error}); give UTF-8 files of texts.") from error


def _texts_of_table(path: Path, rows: "csv.DictReader[str]") -> Iterator[TrainingText]:
    limit = csv.field_size_limit(_MAX_TEXT)
    try:
        if "text" not in (rows.fieldnames or ()):
            raise UsageError(f"{path} has no column 'text'.")
        for row in rows:
            if row["text"] is None:
                raise UsageError(f"{path}, line {rows.line_num} has fewer columns than the first line.")
            yield TrainingText(row["text"], row.get("prompt") or None)
    finally:
        csv.field_size_limit(limit)


def _text_of_line(line: str, where: str) -> TrainingText:
    try:
        row = json.loads(line)
        text, prompt = row["text"], row.get("prompt")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(f"{where} is no JSON object with a 'text'.") from None
    if not isinstance(text, str) or not isinstance(prompt, str | None):
        raise UsageError(f"{where}: 'text' and 'prompt' must be texts.")
    return TrainingText(text, prompt)


class _Corpus:
    """The texts in a fixed random order, framed a few hundred at a time; its first tokens are held out.

    A position counts texts from the beginning of the training part, round and round if there are too few.
    """

    def __init__(self, lm: LanguageModel, texts: Sequence[TrainingText], options: TrainingOptions) -> None:
        self.lm, self.options = lm, options
        self.texts = list(texts)
        self.sha256 = hashlib.sha256(json.dumps([astuple(item) for item in texts]).encode()).hexdigest()
        random.Random(options.seed).shuffle(self.texts)
        self.held_out: list[FramedText] = []
        first, kept = 0, 0
        while kept < options.held_out_tokens and first < len(self.texts):
            framed = self._frame(range(first, min(first + _TEXTS_AT_ONCE, len(self.texts))))
            self.held_out += framed
            kept += sum(len(item.ids) - item.start for item in framed)
            first += _TEXTS_AT_ONCE
        self.first = min(first, len(self.texts))
        if self.first == len(self.texts):
            raise UsageError(
                f"{len(self.texts)} texts make {kept} tokens, all of which would be held out; give more texts."
            )

    def take(self, position: int, tokens: int) -> tuple[list[FramedText], int]:
        """Texts from `position` on with about `tokens` tokens, and the position after them."""
        taken: list[FramedText] = []
        count, seen, length = 0, 0, len(self.texts) - self.first
        while count < tokens:
            step = range(position, position + min(_TEXTS_AT_ONCE, length))
            framed = self._frame([self.first + place % length for place in step])
            taken += framed
            count += sum(len(item.ids) - item.start for item in framed)
            position += len(step)
            seen += len(step)
            if not taken and seen >= length:
                raise UsageError(f"{length} texts beside those held out are too short to train on; give more texts.")
        return taken, position

    def _frame(self, places: Sequence[int]) -> list[FramedText]:
        kinds: dict[tuple[Framing, bool], list[TrainingText]] = {}
        for place in places:
            item = self.texts[place]
            prompted = item.prompt is not None and self.lm.chat
            turn: Framing = self.options.framings[place % len(self.options.framings)]
            kinds.setdefault(("answer" if prompted else turn, prompted), []).append(item)
        framed: list[FramedText] = []
        for (framing, prompted), items in sorted(kinds.items()):
            prompts = [item.prompt or "" for item in items] if prompted else None
            framed += self.lm.frame(
                [item.text for item in items], framing, max_tokens=self.options.max_tokens, prompts=prompts
            )
        return [item for item in framed if len(item.ids) > item.start + 1]


# --- training --------------------------------------------------------------------------------------------------------


class _Run:
    """SAEs in training: their trainers, and how far they are."""

    def __init__(
        self, lm: LanguageModel, layers: Sequence[int], folder: Path, options: TrainingOptions, corpus: _Corpus
    ) -> None:
        self.lm, self.folder, self.options, self.corpus = lm, folder, options, corpus
        self.trainers = {layer: _trainer(lm, options, layer) for layer in layers}
        self.position = self.chunks = self.tokens = 0
        self._load_state()

    def train_chunk(self, progress: Progress, cancel: threading.Event | None) -> None:
        wanted = min(self.options.chunk_tokens, self.options.tokens - self.tokens)
        framed, position = self.corpus.take(self.position, wanted)
        share = self.tokens / self.options.tokens
        progress(f"Reading activations ({self.tokens:,} of {self.options.tokens:,} tokens)", share)
        rows = _read_groups(self.lm, framed, list(self.trainers), cancel)
        progress(f"Training {len(rows)} SAEs ({self.tokens:,} of {self.options.tokens:,} tokens)", share)
        order = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.chunks)
        count = len(next(iter(rows.values())))
        places = torch.randperm(count, generator=order)
        for layer, trainer in self.trainers.items():
            if trainer.activation_scaler.scaling_factor is None:
                _start_at(trainer, rows[layer])
            for batch in places.tensor_split(max(1, round(count / self.options.batch_tokens))):
                trainer.step(rows[layer][batch].float())
                trainer.n_training_steps += 1
        self.position, self.chunks, self.tokens = position, self.chunks + 1, self.tokens + count

    def finish(self, progress: Progress, cancel: threading.Event | None) -> dict[int, Path]:
        folders = {layer: _write_sae(self, layer, trainer) for layer, trainer in self.trainers.items()}
        progress("Measuring on held-out text")
        saes = [load_sae(self.lm, folder) for folder in folders.values()]
        measured = measure_saes(self.lm, saes, self.corpus.held_out, cancel=cancel)
        for folder, measures in zip(folders.values(), measured, strict=True):
            _write_measures(folder, measures, self.options)
        shutil.rmtree(self.folder / _STATE_FOLDER, ignore_errors=True)
        return folders

    # --- state between two chunks --------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What has to be the same for training to go on."""
        return {
            "model": self.lm.fingerprint,
            "layers": list(self.trainers),
            "texts": len(self.corpus.texts),
            "texts' contents": self.corpus.sha256,
            "options": {**asdict(self.options), "framings": list(self.options.framings)},
        }

    def save_state(self) -> None:
        new = self.folder / f"{_STATE_FOLDER}.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for layer, trainer in self.trainers.items():
            trainer.sae.save_model(new / str(layer))
            trainer.save_trainer_state(new / str(layer))
        state = {"position": self.position, "chunks": self.chunks, "tokens": self.tokens, **self.identity()}
        (new / _STATE_FILE).write_text(json.dumps(state), encoding="utf-8")
        shutil.rmtree(self.folder / _STATE_FOLDER, ignore_errors=True)
        new.rename(self.folder / _STATE_FOLDER)

    def _load_state(self) -> None:
        kept = self.folder / _STATE_FOLDER
        if not (kept / _STATE_FILE).is_file():
            return
        state = json.loads((kept / _STATE_FILE).read_text(encoding="utf-8"))
        mine = self.identity()
        different = [key for key in mine if state.get(key, mine[key]) != mine[key]]
        if different:
            raise UsageError(
                f"{self.folder} holds another training's state (its {' and '.join(different)} differ); "
                f"remove {kept} or choose another folder."
            )
        for layer, trainer in self.trainers.items():
            trainer.sae.load_weights_from_checkpoint(kept / str(layer))
            trainer.load_trainer_state(kept / str(layer))
        self.position, self.chunks, self.tokens = state["position"], state["chunks"], state["tokens"]


def _trainer(lm: LanguageModel, options: TrainingOptions, layer: int) -> "SAETrainer[Any, Any]":
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, LoggingConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    metadata = SAEMetadata(
        model_name=lm.name,
        model_revision=lm.revision,
        model_fingerprint=lm.fingerprint,
        hook_name=f"blocks.{layer}.hook_resid_post",
        prepend_bos=False,
    )
    sae_config = BatchTopKTrainingSAEConfig(
        d_in=lm.shape.d_model,
        d_sae=options.features,
        k=options.active,
        topk_threshold_lr=_THRESHOLD_RATE,
        decoder_init_norm=0.1,
        normalize_activations="expected_average_only_in",
        apply_b_dec_to_input=True,
        device=str(lm.device),
        metadata=metadata,
    )
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        sae = BatchTopKTrainingSAE(sae_config)
    steps = max(1, math.ceil(options.tokens / options.batch_tokens))
    config = SAETrainerConfig(
        total_training_samples=steps * options.batch_tokens,
        train_batch_size_samples=options.batch_tokens,
        lr=options.learning_rate,
        lr_end=options.learning_rate / 100,
        lr_warm_up_steps=min(200, steps // 10),
        lr_decay_steps=steps // 4,
        dead_feature_window=max(20, min(300, steps // 10)),
        device=str(lm.device),
        autocast=lm.dtype == torch.bfloat16,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(config, sae, data_provider=iter(()))


def _start_at(trainer: "SAETrainer[Any, Any]", rows: Tensor) -> None:
    """Scale what goes in to the norm √d_in, and begin at the mean: SmolLM2's is three quarters of a typical norm."""
    rows = rows.float()
    scale = math.sqrt(rows.shape[1]) / float(rows.norm(dim=-1).mean())
    trainer.activation_scaler.scaling_factor = scale
    with torch.no_grad():
        trainer.sae.b_dec.copy_(rows.mean(0) * scale)


def _read_groups(
    lm: LanguageModel, framed: Sequence[FramedText], layers: Sequence[int], cancel: threading.Event | None
) -> dict[int, Tensor]:
    """Texts under a template apart from the others, whose common beginning is then read once."""
    groups = [[item for item in framed if (item.start > 0) is templated] for templated in (False, True)]
    parts = [read_tokens(lm, group, layers, cancel=cancel) for group in groups if group]
    return {layer: torch.cat([part[layer] for part in parts]) for layer in layers}


# --- results ---------------------------------------------------------------------------------------------------------


def _write_sae(run: _Run, layer: int, trainer: "SAETrainer[Any, Any]") -> Path:
    """The SAE as sae-lens saves it for use, its weights in float16."""
    sae, folder = trainer.sae, run.folder / f"layer_{layer}"
    scale = trainer.activation_scaler.scaling_factor
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
        trainer.activation_scaler.scaling_factor = None
    trainer.set_final_sae_metadata()
    sae.cfg.metadata.training_tokens = run.tokens
    sae.save_inference_model(folder)
    weights = {name: tensor.to(torch.float16).contiguous() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
    save_file(weights, folder / WEIGHTS_FILE)
    return folder


def _write_measures(folder: Path, measures: SaeMeasures, options: TrainingOptions) -> None:
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    config["device"] = "cpu"
    config["metadata"]["measured"] = {key: round(value, 4) for key, value in asdict(measures).items()}
    config["metadata"]["training"] = {**asdict(options), "framings": list(options.framings)}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(config), encoding="utf-8")


def _card(config: Mapping[str, Any]) -> str:
    about = config["metadata"]
    measured, training = about["measured"], about["training"]
    return f"""# SAE for {about["model_name"]}, {about["hook_name"]}

A sparse autoencoder of {config["d_sae"]:,} features on the residual stream ({config["d_in"]} wide) in sae-lens's
format (`{config["architecture"]}`, weights in float16). Trained by `neurosteer sae train` as BatchTopK
(arXiv 2412.06410) on {about["training_tokens"]:,} tokens, {training["active"]:g} active features per token on average.

| On held-out text ({measured["n_tokens"]:,} tokens) | |
|---|---|
| Explained variance (against the mean) | {measured["explained_variance"]:.3f} |
| Active features per token (L0) | {measured["l0"]:.1f} |
| Dead features | {measured["dead"]:.1%} |
| Cross-entropy recovered (against mean ablation, {measured["n_tokens_cross_entropy"]:,} tokens) | \
{measured["cross_entropy_recovered"]:.3f} |

The sequence's first token was never read: the SAE does not reconstruct it.
"""


# --- measuring -------------------------------------------------------------------------------------------------------


def _reconstruction(sae: SparseAutoencoder, rows: Tensor, mean: Tensor) -> tuple[float, float, float]:
    """Explained variance, active features per token, share of features that never fire."""
    error, total, active, fired = 0.0, 0.0, 0.0, torch.zeros(sae.n_features, dtype=torch.bool, device=rows.device)
    for chunk in rows.split(min(sae.chunk_rows(), 8192)):
        features, plain = sae.encode(chunk), _as_read(sae, chunk)
        error += float((plain - sae.decode(features)).square().sum())
        total += float((plain - _as_read(sae, mean)).square().sum())
        active += float((features > 0).sum())
        fired |= (features > 0).any(0)
    return 1 - error / total, active / len(rows), 1 - float(fired.float().mean())


def _as_read(sae: SparseAutoencoder, rows: Tensor) -> Tensor:
    rows = rows.float()
    return rows - rows.mean(-1, keepdim=True) if sae.centred else rows


def _cross_entropy_recovered(
    lm: LanguageModel,
    saes: Sequence[SparseAutoencoder],
    framed: Sequence[FramedText],
    means: Sequence[Tensor],
    at_most: int,
    cancel: threading.Event | None,
) -> tuple[list[float], int]:
    """Of each SAE; every batch of texts runs as it is, then with the stream replaced by its reconstruction, and by its
    mean. The count is of the tokens predicted."""
    texts, count = [], 0
    for item in framed:
        if count >= at_most:
            break
        texts.append(item)
        count += len(item.ids) - 1 - max(1, item.start)
    plain, rebuilt, ablated = 0.0, [0.0] * len(saes), [0.0] * len(saes)
    for places in length_batches(texts, _MEASURED_AT_ONCE):
        batch = [texts[place] for place in places]
        check_cancelled(cancel, "Measuring")
        plain += _loss(lm, batch, 0, None)
        for place, (sae, mean) in enumerate(zip(saes, means, strict=True)):
            rebuilt[place] += _loss(lm, batch, sae.layer, lambda hidden, sae=sae: _reconstructed(sae, hidden))
            ablated[place] += _loss(lm, batch, sae.layer, lambda hidden, mean=mean: mean.expand_as(hidden))
    return [
        (none - new) / (none - plain) if none != plain else 0.0 for none, new in zip(ablated, rebuilt, strict=True)
    ], count


def _reconstructed(sae: SparseAutoencoder, hidden: Tensor) -> Tensor:
    rebuilt = sae.decode(sae.encode(hidden))
    return rebuilt + hidden.float().mean(-1, keepdim=True) if sae.centred else rebuilt


def _loss(
    lm: LanguageModel, batch: Sequence[FramedText], layer: int, change: Callable[[Tensor], Tensor] | None
) -> float:
    """Summed cross-entropy (nats) of what follows the texts' own tokens, the stream of those tokens being changed.

    Rows are padded on the right, where a causal model does not look from any token that counts.
    """
    width = max(len(item.ids) for item in batch)
    ids = torch.full((len(batch), width), lm.pad_id)
    own = torch.zeros((len(batch), width), dtype=torch.bool)
    for row, item in enumerate(batch):
        ids[row, : len(item.ids)] = torch.tensor(item.ids)
        own[row, max(1, item.start) : len(item.ids)] = True
    ids, own = ids.to(lm.device), own.to(lm.device)
    predicting = own[:, :-1] & own[:, 1:]

    def replaced(hidden: Tensor) -> Tensor | None:
        return None if change is None else torch.where(own[..., None], change(hidden).to(hidden.dtype), hidden)

    with torch.inference_mode(), hooked([OutputHook(lm.blocks[layer], replaced)]):
        logits = lm.model(input_ids=ids, use_cache=False).logits[:, :-1][predicting].float()
    return float(torch.nn.functional.cross_entropy(logits, ids[:, 1:][predicting], reduction="sum"))
