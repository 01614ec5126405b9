"""Our vectors and circuits beside steering-vectors and repeng: the same data, model, prompts, samples and KL.

    pip install --no-deps --target PEERS steering-vectors==0.12.2 repeng==0.4.0
    PYTHONPATH=PEERS python tests/benchmarks/peers.py DATA [--samples 6] [--tokens 30] [--kl 1.0] [--layer 19]

Into a folder of its own and without its requirements, because both ask for older packages (transformers below 5, numpy
below 2) than the library; they run with the newer ones. DATA holds `train.csv` (built from), `judge.csv` (the judge's
own texts) and `dev.csv` (the judge's accuracy). The peers build with their own code. Their vectors then steer through
ours, after a check that theirs gives the same logits; each sign is solved by itself to `--kl` nats. Prints Markdown.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
from at_one_nat import HEADING, AtOneNat
from measuring import Judge
from torch import Tensor

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.strength import Calibration
from neurosteer.artifacts.twins import random_twin
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.building.build import build
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import sweep_prompts
from neurosteer.examples.reading import read_examples
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model
from neurosteer.reading.request import Tokens
from neurosteer.steering.plans import applied, compile_plan

Directions = Mapping[int, Tensor]
Steer = Callable[[LanguageModel, Directions, float], AbstractContextManager[Any]]
Pairs = list[tuple[str, str]]
Rows = dict[str, Callable[[], Artifact]]


def as_ours(lm: LanguageModel, directions: Directions) -> SteeringVector:
    """What adding `amount` × every layer's direction is as an artifact: our dose is shared by the layers."""
    norms = {layer: len(directions) * float(row.norm()) for layer, row in directions.items()}
    rows = {layer: row.detach().float().cpu() for layer, row in directions.items()}
    return SteeringVector(
        name="peer", model=lm.reference, method="peer", directions=rows, norms=norms, calibration=Calibration(1.0)
    )


# --- the peers' own code ---------------------------------------------------------------------------------------------


def trained_steering_vector(lm: LanguageModel, pairs: Pairs) -> Directions:
    """steering-vectors: mean difference at the last token of every layer, its defaults."""
    from steering_vectors import train_steering_vector  # pyright: ignore[reportMissingImports]

    found = train_steering_vector(lm.model, deepcopy(lm.tokenizer), pairs, batch_size=16)
    return found.layer_activations


def trained_control_vector(lm: LanguageModel, pairs: Pairs, method: str) -> Directions:
    """repeng: first principal component at the last token, at every layer but the first, its default."""
    repeng = import_repeng()
    entries = [repeng.DatasetEntry(*pair) for pair in pairs]
    found = repeng.ControlVector.train(lm.model, deepcopy(lm.tokenizer), entries, method=method)
    return {layer: torch.tensor(row) for layer, row in sorted(found.directions.items())}


def import_repeng() -> Any:
    numpy.float_ = numpy.float64  # type: ignore[attr-defined]  # an annotation of repeng 0.4 names it
    import repeng  # pyright: ignore[reportMissingImports]

    return repeng


def steered_by_steering_vectors(
    lm: LanguageModel, directions: Directions, multiplier: float
) -> AbstractContextManager[Any]:
    from steering_vectors import SteeringVector as Theirs  # pyright: ignore[reportMissingImports]

    return Theirs(dict(directions)).apply(lm.model, multiplier=multiplier)


@contextmanager
def steered_by_repeng(lm: LanguageModel, directions: Directions, multiplier: float) -> Iterator[None]:
    repeng = import_repeng()
    wrapped = repeng.ControlModel(lm.model, list(directions))
    vector = repeng.ControlVector("llama", {layer: row.numpy() for layer, row in directions.items()})
    try:
        wrapped.set_control(vector, multiplier)
        yield
    finally:
        wrapped.unwrap()


def check_logits(lm: LanguageModel, name: str, directions: Directions, steer: Steer, multiplier: float) -> None:
    """Their steering and ours with the same vector: the same logits, and others than the unsteered ones."""
    ids = torch.tensor([lm.prompt_ids("Describe a street at noon.")])
    with torch.inference_mode():
        plain = lm.model(ids).logits.float()
        with steer(lm, directions, multiplier):
            theirs = lm.model(ids).logits.float()
        plan = compile_plan(lm, [Recipe.of((as_ours(lm, directions), multiplier))])
        with applied(lm, plan):
            ours = lm.model(ids).logits.float()
    moved, apart = float((theirs - plain).abs().max()), float((theirs - ours).abs().max())
    if not apart < 1e-3 < 0.1 < moved:
        raise SystemExit(
            f"{name}: its own steering is {apart:g} from ours in a logit; steering moves them by {moved:g}"
        )
    print(f"{name}: its own steering is within {apart:.1g} of ours in every logit; steering moves them by {moved:.2g}")


# --- the table -------------------------------------------------------------------------------------------------------


def pairs_of(lm: LanguageModel, examples: ContrastSet, *, framed: bool) -> Pairs:
    """Positive and negative texts side by side, as they are or as the assistant's answer to an empty turn."""
    start = lm.tokenizer.decode(lm.prompt_ids([{"role": "user", "content": ""}])) if framed else ""
    return [(start + one, start + other) for one, other in zip(examples.positive, examples.negative, strict=False)]


def our_rows(lm: LanguageModel, examples: ContrastSet, layer: int) -> Rows:
    def caa(layers: str | int, tokens: Tokens = "mean") -> SteeringVector:
        found = build(lm, examples, method="caa", layers=layers, tokens=tokens, calibrate=False)
        assert isinstance(found, SteeringVector)
        return found

    return {
        f"`caa`, layer {layer}": lambda: caa(layer),
        "`caa`, all layers": lambda: caa("all"),
        "`caa`, all layers, last token": lambda: caa("all", "last"),
        "`caa`, all layers, last token, by size": lambda: as_ours(lm, caa("all", "last").directions),
        "`caa`, layers chosen automatically": lambda: build(lm, examples, method="caa"),
        "`cna`, 0.5% of the neurons": lambda: build(lm, examples, method="cna", calibrate=False),
        f"random direction, layer {layer}": lambda: random_twin(caa(layer), 0),
        "random directions, all layers": lambda: random_twin(caa("all"), 0),
    }


def peer_rows(lm: LanguageModel, examples: ContrastSet, layer: int) -> Rows:
    @cache
    def steering_vector(framed: bool) -> Directions:
        return trained_steering_vector(lm, pairs_of(lm, examples, framed=framed))

    def one_layer(framed: bool) -> Artifact:
        return as_ours(lm, {layer: steering_vector(framed)[layer]})

    def control_vector(framed: bool, method: str) -> Artifact:
        return as_ours(lm, trained_control_vector(lm, pairs_of(lm, examples, framed=framed), method))

    rows: Rows = {}
    for framed, texts in ((False, "texts"), (True, "answers")):
        rows[f"steering-vectors, all layers, {texts}"] = lambda framed=framed: as_ours(lm, steering_vector(framed))
        rows[f"steering-vectors, layer {layer}, {texts}"] = lambda framed=framed: one_layer(framed)
        for method in ("pca_diff", "pca_center"):
            rows[f"repeng `{method}`, {texts}"] = lambda framed=framed, method=method: control_vector(framed, method)
    return rows


def check_peers(examples: ContrastSet, layer: int) -> None:
    """In float32, where nothing but a mistake can make a difference."""
    lm = load_model(dtype="float32")
    few = pairs_of(lm, examples, framed=False)[:6]
    found = trained_steering_vector(lm, few)
    check_logits(lm, "steering-vectors, one layer", {layer: found[layer]}, steered_by_steering_vectors, 0.5)
    check_logits(lm, "steering-vectors, all layers", found, steered_by_steering_vectors, 0.5)
    check_logits(lm, "repeng", trained_control_vector(lm, few, "pca_diff"), steered_by_repeng, 5.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--kl", type=float, default=1.0)
    parser.add_argument("--layer", type=int, default=19, help="for the rows with one layer")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    arguments = parser.parse_args()
    started = time.monotonic()
    examples, judge = read_examples(arguments.data / "train.csv"), Judge(read_examples(arguments.data / "judge.csv"))
    check_peers(examples, arguments.layer)
    lm, prompts = load_model(), sweep_prompts()
    bench = AtOneNat(
        lm, prompts, judge, samples=arguments.samples, tokens=arguments.tokens, target_kl=arguments.kl
    )  # fmt: skip
    print(f"judge right on {judge.accuracy(read_examples(arguments.data / 'dev.csv')):.1f}% of unseen texts")
    print(f"{len(prompts) * arguments.samples} continuations of {arguments.tokens} tokens per figure\n\n{HEADING}")
    rows = our_rows(lm, examples, arguments.layer) | peer_rows(lm, examples, arguments.layer)
    for name, make in rows.items():
        if arguments.only in name:
            print(f"| {name} | {' | '.join(bench.cells(bench.move(make())))} |", flush=True)
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
