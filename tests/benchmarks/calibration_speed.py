"""How long calibrating takes, both signs to 1 nat, against one bare pass over the same texts.

    python tests/benchmarks/calibration_speed.py [--model qwen] [--rounds 3]

Embedded model, a vector at one layer, one over all layers, and a circuit, from the bundled formality set. Counted are
the unsteered continuations that the KL is measured along and every amount that is tried; the floor is one unsteered
forward pass over the 24 prompts with their continuations, in one batch.
"""

import argparse
import statistics
from typing import Any

import torch
from measuring import seconds
from packaged import load_any

from neurosteer.building.build import build
from neurosteer.examples.files import calibration_prompts
from neurosteer.examples.reading import read_examples
from neurosteer.measuring.calibration import N_TOKENS, calibrate
from neurosteer.measuring.divergence import unsteered_texts

BUILT: dict[str, dict[str, Any]] = {
    "vector, layer 16": {"layers": 16},
    "vector, all layers": {"layers": "all"},
    "circuit": {"method": "cna", "layers": "0-16"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="a name in packaged.py, or what a model is loaded by (the embedded one)")
    arguments = parser.parse_args()
    lm, examples = load_any(arguments.model), read_examples("formality")
    texts = unsteered_texts(lm, calibration_prompts(), N_TOKENS)
    width = max(len(text.ids) for text in texts.texts)
    rows = torch.tensor([text.ids + [lm.pad_id] * (width - len(text.ids)) for text in texts.texts], device=lm.device)
    artifacts = {name: build(lm, examples, calibrate=False, **options) for name, options in BUILT.items()}
    with torch.inference_mode():
        lm.model(rows)
        for name, artifact in artifacts.items():
            floors, taken = [], []
            for _ in range(arguments.rounds):  # in turn
                floors.append(seconds(lambda: lm.model(rows)))
                taken.append(seconds(lambda artifact=artifact: calibrate(lm, artifact)))
            middle, ratio = statistics.median(taken), statistics.median(taken) / statistics.median(floors)
            print(f"{name}: {middle:.1f} s ({min(taken):.1f} to {max(taken):.1f}), {ratio:.1f} bare passes", flush=True)
    print(f"{lm.dtype}, {torch.get_num_threads()} thread(s)")


if __name__ == "__main__":
    main()
