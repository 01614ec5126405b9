"""Cost of steering against plain generation.

    python tests/benchmarks/steering_speed.py [--tokens 64] [--model qwen] [--rounds 5]

The floor is one unsteered `generate` of one prompt and the same number of tokens. Against it: unsteered and steered as
one streamed pair, and a sweep of 16 strengths. They take turns in one process; medians of the ratios are printed.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from measuring import seconds
from packaged import load_any

from neurosteer.artifacts.recipes import Recipe
from neurosteer.building.build import build
from neurosteer.examples.files import neutral_prompts
from neurosteer.examples.reading import read_examples
from neurosteer.models.language_model import LanguageModel
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session, sweep_rows

STRENGTHS = [x / 4 - 2 for x in range(16)]


def plain(lm: LanguageModel, prompt: str, tokens: int) -> Callable[[], object]:
    """transformers' own greedy generate, end tokens ignored so that the length is fixed."""
    ids = torch.tensor([lm.prompt_ids(prompt)], device=lm.device)

    def run() -> object:
        with torch.inference_mode():
            return lm.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", help="a name in packaged.py, or what a model is loaded by (the embedded one)")
    arguments = parser.parse_args()
    lm = load_any(arguments.model)
    vector = build(lm, read_examples("sentiment"), layers=16, framing="raw", calibrate=False)
    circuit = build(lm, read_examples("sentiment"), method="cna", layers="2-16", framing="raw", calibrate=False)
    session, prompt = Session(lm), neutral_prompts()[0]
    options = {"max_new_tokens": arguments.tokens, "sampling": Sampling(greedy=True)}
    bare = plain(lm, prompt, arguments.tokens)
    bare()

    def pair(artifact: object) -> Callable[[], object]:
        rows = [Row(prompt), Row(prompt, Recipe.of(artifact))]  # type: ignore[arg-type]
        return lambda: list(session.stream(rows, **options))

    def sweep(artifact: object) -> Callable[[], object]:
        rows = sweep_rows(Recipe.of(artifact), STRENGTHS, [prompt])  # type: ignore[arg-type]
        return lambda: session.generate(rows, **options)

    work = {
        "pair, vector": pair(vector),
        "pair, circuit": pair(circuit),
        "16 strengths, vector": sweep(vector),
        "16 strengths, circuit": sweep(circuit),
    }
    lm.model.generation_config.eos_token_id = None  # every text runs to its full length
    lm.tokenizer.eos_token = None
    ratios: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(arguments.rounds):
        for name, run in work.items():
            before = seconds(bare)
            took = seconds(run)
            ratios[name].append(took / ((before + seconds(bare)) / 2))
    print(f"{arguments.tokens} tokens, {lm.dtype}; one unsteered generate is 1.00")
    for name, values in ratios.items():
        print(f"  {name:22s} median {statistics.median(values):.2f} x  (min {min(values):.2f}, max {max(values):.2f})")


if __name__ == "__main__":
    main()
