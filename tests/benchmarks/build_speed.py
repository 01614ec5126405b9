"""Build time and peak memory against the floor.

    python tests/benchmarks/build_speed.py [EXAMPLES] [--model qwen] [--texts 400] [--rounds 3] [--only caa]
    python tests/benchmarks/build_speed.py [EXAMPLES] [--model qwen] --memory [COUNT …]

The floor is one bare, length-sorted, batched pass of the same tokens through the decoder: no LM head, no hooks. For
`sae`, which reads one layer, the floor stops after that block too, and the SAE's loading is part of building.
Floor and builds take turns in one process; the ratio of each round is taken and the median printed.
`--memory` builds from 400 + 400 and from 10,000 + 10,000 texts in fresh processes and compares their peaks, also with
what the weights take.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from measuring import seconds
from packaged import load_any

from neurosteer.building.build import build
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.reading import read_examples
from neurosteer.models.batching import length_batches
from neurosteer.models.hooks import OutputHook, hooked
from neurosteer.models.language_model import LanguageModel
from neurosteer.reading.loop import _BATCH_TOKENS
from neurosteer.reading.request import MAX_TOKENS

METHODS: dict[str, dict[str, Any]] = {
    "caa": {"method": "caa"},
    "cna (write)": {"method": "cna"},
    "cna (difference)": {"method": "cna", "rank": "difference"},
    **{f"sae (layer {layer})": {"method": "sae", "layers": layer} for layer in (9, 14, 19)},
}


class _Reached(Exception):
    """Leaves the pass after a block."""


def floor(lm: LanguageModel, examples: ContrastSet, last: int | None = None) -> Callable[[], None]:
    """The bare pass over the texts' tokens (up to the block `last`), tokenised and batched beforehand."""
    framed = lm.frame([*examples.positive, *examples.negative], "raw", max_tokens=MAX_TOKENS)
    batches = []
    for indices in length_batches(framed, _BATCH_TOKENS.get(lm.device.type, 1024)):
        batch = [framed[index].ids for index in indices]
        ids = torch.full((len(batch), max(map(len, batch))), lm.pad_id)
        for row, tokens in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        batches.append(ids.to(lm.device))

    def stop(_hidden: torch.Tensor) -> None:
        raise _Reached

    def run() -> None:
        hooks = [OutputHook(lm.blocks[last], stop)] if last is not None else []
        with torch.inference_mode(), hooked(hooks):
            for ids in batches:
                with suppress(_Reached):
                    lm.decoder(input_ids=ids, use_cache=False)

    return run


def speed(examples: ContrastSet, rounds: int, only: str, model: str | None) -> None:
    lm, methods = load_any(model), {name: options for name, options in METHODS.items() if only in name}
    floors = {last: floor(lm, examples, last) for last in {options.get("layers") for options in methods.values()}}
    next(iter(floors.values()))()
    ratios: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, options in methods.items():
            bare = floors[options.get("layers")]
            before = seconds(bare)
            given = {"layers": "all", "framing": "raw", "tokens": "mean", **options}
            took = seconds(lambda given=given: build(lm, examples, calibrate=False, **given))
            after = seconds(bare)
            ratios[name].append(took / ((before + after) / 2))
    print(f"{len(examples.positive)} + {len(examples.negative)} texts, {lm.dtype}; the floor is 1.00")
    for name, values in ratios.items():
        print(f"  {name:18s} median {statistics.median(values):.2f} x  (min {min(values):.2f}, max {max(values):.2f})")


def enlarged(examples: ContrastSet, count: int) -> ContrastSet:
    """`count` different texts per class with the lengths of the given ones: their words in other orders."""
    rng = random.Random(0)

    def texts(source: tuple[str, ...]) -> tuple[str, ...]:
        found: dict[str, None] = {}
        while len(found) < count:
            words = rng.choice(source).split()
            rng.shuffle(words)
            found[" ".join(words)] = None
        return tuple(found)

    positive = texts(examples.positive)
    taken = set(positive)
    negative = tuple(text for text in texts(examples.negative) if text not in taken)
    return ContrastSet(positive, negative, name="enlarged")


def peak(examples: ContrastSet, count: int, model: str | None) -> None:
    """Build once and print the peak of the process's resident memory while building, in MB (Linux)."""
    lm, larger = load_any(model), enlarged(examples, count)
    weights = sum(weight.nbytes for weight in lm.model.parameters()) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading the model
    build(lm, larger, layers="all", framing="raw", tokens="mean", calibrate=False)
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    print(json.dumps({"count": count, "peak_mb": kilobytes / 1024, "weights_mb": weights}))


def memory(path: str, counts: list[int], model: str | None) -> None:
    peaks = []
    for count in counts:
        command = [sys.executable, __file__, path, "--peak", str(count), *(("--model", model) if model else ())]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(printed.splitlines()[-1])
        peaks.append(found["peak_mb"])
        beside = found["peak_mb"] - found["weights_mb"]
        print(f"  {count:6d} + {count:<6d} texts: peak {peaks[-1]:.0f} MB, {beside:.0f} MB beside the weights")
    print(f"  ratio {peaks[-1] / peaks[0]:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("examples", nargs="?", default="sentiment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="methods whose name contains this")
    parser.add_argument("--model", help="a name in packaged.py, or what a model is loaded by (the embedded one)")
    parser.add_argument("--texts", type=int, help="of each class at most")
    parser.add_argument("--memory", type=int, nargs="*", metavar="COUNT", help="texts of each class")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    examples = read_examples(arguments.examples)
    if arguments.peak:
        peak(examples, arguments.peak, arguments.model)
    elif arguments.memory is not None:
        memory(arguments.examples, arguments.memory or [400, 10_000], arguments.model)
    else:
        some = ContrastSet(examples.positive[: arguments.texts], examples.negative[: arguments.texts], name="some")
        speed(some, arguments.rounds, arguments.only, arguments.model)


if __name__ == "__main__":
    main()
