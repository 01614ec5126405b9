"""What several processes do together, for `test_processes.py`: run by each of them, and by one alone.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=… python tests/shared_work.py FOLDER
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hermetic  # noqa: F401
import torch
from tiny import texts, tiny

from neurosteer import processes
from neurosteer.artifacts.artifact import Artifact
from neurosteer.building.build import build
from neurosteer.building.described import described_examples
from neurosteer.errors import UsageError
from neurosteer.evaluation import CallableJudge, evaluate
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.models import memory
from neurosteer.models.language_model import LanguageModel
from neurosteer.reading import loop
from neurosteer.reading.request import Request
from neurosteer.saes import corpus
from neurosteer.saes.corpus import TrainingOptions, TrainingText
from neurosteer.saes.loading import load_sae
from neurosteer.saes.training import train_saes
from neurosteer.steering import forcing

SAE_OPTIONS = TrainingOptions(
    features=24, active=4, tokens=1500, batch_tokens=128, chunk_tokens=500, held_out_tokens=200, max_tokens=32
)


def examples() -> ContrastSet:
    """Enough of each class for choices of layers to be compared."""
    found = texts(140, seed=3)
    return ContrastSet(tuple(f"happy {text}" for text in found[:70]), tuple(found[70:]), name="shared")


def numbers(artifact: Artifact) -> dict[str, Any]:
    """All that an artifact is, as JSON and tensors can hold it."""
    parts = {name: getattr(artifact, name, None) for name in ("directions", "neurons", "neuron_layers", "differences")}
    return {"layers": artifact.layers, "calibration": vars(artifact.calibration), **parts}


def saes_of(lm: LanguageModel, folder: Path) -> dict[int, Any]:
    written = train_saes(lm, [TrainingText(text) for text in texts(120, seed=5)], [1, 2], folder, SAE_OPTIONS)
    return {layer: load_sae(lm, path).decoder for layer, path in written.items()}


def everything(folder: Path) -> dict[str, Any]:
    """What comes of each verb that can be shared, and how much of the reading fell to this process."""
    loop._BATCH_TOKENS["cpu"], forcing._BATCH_TOKENS["cpu"], corpus._TEXTS_AT_ONCE = 96, 160, 10
    lm, batches = tiny("llama").lm, []
    read = loop._read_batch
    loop._read_batch = lambda *given: (batches.append(given[3]), read(*given))[1]  # type: ignore[func-returns-value]
    found: dict[str, Any] = {}
    for name, options in {
        "caa": {"method": "caa"}, "cna": {"method": "cna", "layers": "0-2"}, "probe": {"method": "probe", "layers": 1},
    }.items():  # fmt: skip
        found[name] = numbers(build(lm, examples(), **options))  # type: ignore[arg-type]
    found["saes"] = saes_of(lm, folder / "saes")
    encoder = load_sae(lm, folder / "saes" / "layer_1")
    activations = loop.read_activations(
        lm, examples().positive, examples().negative,
        Request(residual=(1,), rows=(1,), encoders={1: encoder}, feature_rows=True), held_out_positive=[0, 5],
        held_out_negative=[3],
    )  # fmt: skip
    features, rows = activations.features[1], activations.rows[1]
    found["features"] = {
        "sums": features.sums, "strongest": features.strongest, "n": features.n_tokens, "rows": rows.positive,
        "sparse": features.rows.values if features.rows else None, "norm": activations.norms[1],
        "held": activations.held_out[1].rows.negative,
    }  # fmt: skip
    found["strongest texts"] = features.text_of
    vector = build(lm, examples(), layers=1, calibrate=False)
    judge = CallableJudge("length", lambda text: min(1.0, len(text) / 40))
    asked = {"prompts": ["the cat", "Why?", "red"], "strengths": [-1.0, 0.0, 1.0], "n_random": 2, "n_permuted": 0}
    receipt = evaluate(lm, vector, judge, out=folder / "texts", max_new_tokens=8, samples=30, **asked).receipt.data
    found["receipt"] = [
        {key: row[key] for key in ("kind", "strength", "share", "perplexity", "kl_p95")} for row in receipt["rows"]
    ]
    answers = described_examples(lm, "the cat runs", "red birds", prompts=["sun", "moon", "a"], samples=4)
    found["answers"] = [answers.positive, answers.negative]
    found["little memory"] = little_memory(lm)
    found["batches"], found["texts read"] = len(batches), sorted(text for one in batches for text in one)
    return found


def little_memory(lm: LanguageModel) -> dict[int, Any]:
    """Class means where batches depend on a free memory that differs from process to process."""
    before = memory.free_bytes
    memory.free_bytes = lambda _lm: 40_000 * (1 + 3 * processes.rank())
    try:
        request = Request(residual=(1, 2))
        found = loop.read_activations(lm, examples().positive, examples().negative, request)
        return {layer: found.residual[layer].difference for layer in (1, 2)}
    finally:
        memory.free_bytes = before


def few() -> dict[str, Any]:
    """Less to do than there are processes."""
    lm = tiny("llama").lm
    answers = described_examples(lm, "the cat runs", "red birds", prompts=["sun", "moon"], samples=1)
    vector = build(lm, ContrastSet(("a cat", "happy sun"), ("red birds", "a moon")), layers=1, calibrate=False)
    return {"answers": [answers.positive, answers.negative], "vector": numbers(vector)}


def refusals() -> list[str]:
    """What is raised in one process is raised in all."""

    def refuse() -> None:
        raise UsageError("not here")

    def fail(some: Sequence[str]) -> list[int]:
        return [int(one) for one in some]

    told = []
    for work in (lambda: processes.agreed(refuse), lambda: processes.shared_out(["1", "none"], fail)):
        try:
            work()
        except Exception as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


if __name__ == "__main__":
    where = Path(sys.argv[1])
    rank = processes.join_processes()
    torch.set_num_threads(1)
    result = few() if sys.argv[2:] else everything(where / "shared") | {"refusals": refusals()}
    torch.save(result, where / f"rank{rank}.pt")
    processes.leave()
