"""Training sparse autoencoders on the activations that NeuroSteer itself reads, with sae-lens's trainer.

BatchTopK SAEs (arXiv 2412.06410), saved as JumpReLU ones in sae-lens's format. Several depths train together on one
reading of the texts. The work goes in chunks of texts: a chunk is read, its tokens are shuffled, and every SAE takes
them in batches. Every few minutes, and when training is cancelled, the state is written down, so that training that was
cut goes on from there and ends in the same weights.
"""

import json
import math
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neurosteer import processes
from neurosteer.errors import Cancelled, UsageError
from neurosteer.models.language_model import LanguageModel
from neurosteer.progress import Progress, check_cancelled, silent
from neurosteer.saes.corpus import Corpus, TrainingOptions, TrainingText
from neurosteer.saes.formats import CONFIG_FILE, WEIGHTS_FILE
from neurosteer.saes.loading import load_sae
from neurosteer.saes.measuring import SaeMeasures, measure_saes, read_groups

if TYPE_CHECKING:
    from sae_lens.training.sae_trainer import SAETrainer

_STATE_FOLDER, _STATE_FILE = ".training", "state.json"
_SAVE_SECONDS = 300.0  # from one state to the next: SAEs with their optimisers may have gigabytes
_THRESHOLD_RATE = 0.02


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
        Cancelled: `cancel` was set; the state after the last whole chunk is kept.
    """
    options = options or TrainingOptions()
    layers = sorted(set(layers))
    if not layers or layers[0] < 0 or layers[-1] >= lm.n_layers:
        raise UsageError(f"layers is {layers}; {lm.name} has layers 0 to {lm.n_layers - 1}.")
    corpus = Corpus(lm, texts, options)
    run = _Run(lm, layers, Path(folder), options, corpus)
    try:
        while run.tokens < options.tokens:
            check_cancelled(cancel, "Training")
            run.train_chunk(progress, cancel)
            if time.monotonic() - run.saved_at > _SAVE_SECONDS:
                run.save_state()
    except Cancelled:  # which comes between two chunks, or before a chunk's tokens are trained on
        run.save_state()
        raise
    run.save_state()  # measuring may be cut, too
    return run.finish(progress, cancel)


def measures_of(folder: Path) -> dict[str, float]:
    """What was measured of the SAE in `folder` when it was trained."""
    return json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["metadata"]["measured"]


# --- training --------------------------------------------------------------------------------------------------------


class _Run:
    """SAEs in training: their trainers, and how far they are."""

    def __init__(
        self, lm: LanguageModel, layers: Sequence[int], folder: Path, options: TrainingOptions, corpus: Corpus
    ) -> None:
        self.lm, self.folder, self.options, self.corpus = lm, folder, options, corpus
        self.trainers = {layer: _trainer(lm, options, layer) for layer in layers}
        self.position = self.chunks = self.tokens = 0
        self._load_state()
        self.saved_at, self._saved_chunks = time.monotonic(), self.chunks

    def train_chunk(self, progress: Progress, cancel: threading.Event | None) -> None:
        wanted = min(self.options.chunk_tokens, self.options.tokens - self.tokens)
        framed, position = self.corpus.take(self.position, wanted)
        share = self.tokens / self.options.tokens
        progress(f"Reading activations ({self.tokens:,} of {self.options.tokens:,} tokens)", share)
        rows = read_groups(self.lm, framed, list(self.trainers), cancel)
        progress(f"Training {len(rows)} SAEs ({self.tokens:,} of {self.options.tokens:,} tokens)", share)
        order = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.chunks)
        count = len(next(iter(rows.values())))
        places = torch.randperm(count, generator=order)
        for layer, trainer in self.trainers.items():
            if trainer.activation_scaler.scaling_factor is None:
                _start_at(trainer, rows[layer])
            for batch in places.tensor_split(max(1, round(count / self.options.batch_tokens))):
                trainer.step(rows[layer][batch].to(self.lm.device, torch.float32))
                trainer.n_training_steps += 1
        self.position, self.chunks, self.tokens = position, self.chunks + 1, self.tokens + count

    def finish(self, progress: Progress, cancel: threading.Event | None) -> dict[int, Path]:
        """Write and measure the SAEs: the first process does, for all."""
        return processes.agreed(lambda: self._finish(progress, cancel))

    def _finish(self, progress: Progress, cancel: threading.Event | None) -> dict[int, Path]:
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
        """Write down where training stands, if it has moved since; one of several processes does it for all."""
        if self.chunks == self._saved_chunks or processes.rank() > 0:
            return
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
        self.saved_at, self._saved_chunks = time.monotonic(), self.chunks

    def _load_state(self) -> None:
        kept = self.folder / _STATE_FOLDER
        seen = processes.gathered((kept / _STATE_FILE).is_file())
        if not any(seen):
            return
        if not all(seen):
            raise UsageError(f"Only some of the processes see {kept}; use a folder that all of them can read.")
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
        processes.gathered(None)  # nobody goes on, and removes it, before all have read it


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
