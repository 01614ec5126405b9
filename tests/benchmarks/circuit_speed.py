"""Cost of circuits against doing the same one by one.

    python tests/benchmarks/circuit_speed.py [--rounds 3] [--dtype float32]
    python tests/benchmarks/circuit_speed.py --memory [--dtype float32]

The edges into 30 neurons, against one fresh forward and backward pass through the linearised model for each of them;
the attribution of 32 prompts, against one after the other. Both take turns with what they are compared with in one
process, and give the same figures (the largest difference is printed); medians of the ratios. With `--memory`, how much
the process grows at its peak over what it holds once the model is loaded, for each in a process of its own.

Why edges gain less the longer the prompt is. Nearly all of the work is multiplying weights, and a block takes as many
multiplications for a token forwards as backwards. So count the passages of a token through a block, for a prompt of n
tokens, L blocks and targets at layers l:

- one by one: for each target L n forwards and l n backwards;
- ours: L n forwards once, and for each target l n backwards: at 41 tokens 30,012 instead of 65,682, 2.2 × fewer;
- at least, whatever the way: at a block and token, what is passed on from sources below to targets above has as many
  dimensions as there are of the fewer of both (going backwards passes on the targets, forwards the sources; where one
  meets the other is free): at 41 tokens 15,519, 4.2 × fewer; at 5 tokens 1,382 instead of 8,265, 6.0 × fewer.

What is measured beyond the second figure comes from larger matrices, which a processor multiplies faster, and from
calling each module once instead of thirty times. On a CPU in float32, matrices of 41 rows already run at four fifths of
the full speed, so that five times as fast is out of reach at 41 tokens; the way that gets nearest the third figure
would pass tangents of every source by hand through each architecture's attention. `counted` prints all three.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial

import psutil
import torch

from neurosteer.circuits import (
    Attribution,
    CircuitGraph,
    Neuron,
    Selection,
    attribute,
    edge_weights,
    find_edges,
    linear_pass,
)
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import load_model

TARGETS, CIRCUIT = 30, Selection("top_k", 200)
SHORT = "The capital of France is"
LONG = (
    "The capital of France is a city that many people visit every year because of its museums, its food and its long "
    "history, and the name of that famous city, as every child at school knows, is"
)
COUNTRIES = (
    "France",
    "Italy",
    "Spain",
    "Germany",
    "Russia",
    "China",
    "Japan",
    "India",
    "Egypt",
    "Greece",
    "Norway",
    "Sweden",
    "Poland",
    "Austria",
    "Hungary",
    "Portugal",
    "Ireland",
    "Scotland",
    "Canada",
    "Mexico",
    "Cuba",
    "Peru",
    "Chile",
    "Brazil",
    "Kenya",
    "Turkey",
    "Iran",
    "Iraq",
    "Syria",
    "Korea",
    "Thailand",
    "Vietnam",
)


def attributed(lm: LanguageModel, prompt: str) -> Attribution:
    return attribute(lm, prompt, " Paris", raw=True, keep_universal=True)


def edges(lm: LanguageModel, found: Attribution) -> torch.Tensor:
    """Weights `[TARGETS, 200]`, as `find_edges` gets them."""
    places = [Neuron(*row[:3]) for row in found.rows(CIRCUIT)]
    return edge_weights(lm, found.prompts[0].choice.ids, places, places[:TARGETS])


def edges_one_by_one(lm: LanguageModel, found: Attribution) -> torch.Tensor:
    places = [Neuron(*row[:3]) for row in found.rows(CIRCUIT)]
    weights = torch.zeros(TARGETS, len(places))
    for row, target in enumerate(places[:TARGETS]):
        linear = linear_pass(lm, [found.prompts[0].choice.ids])
        with torch.enable_grad():
            value = linear.neurons[target.layer][0, target.position, target.neuron]
        below = linear.neurons[: target.layer]
        slopes = torch.autograd.grad(value, below) if below else ()
        for column, (layer, at, neuron) in enumerate(places):
            if layer < target.layer:
                weights[row, column] = (slopes[layer][0, at, neuron] * below[layer][0, at, neuron].detach()).float()
    return weights


def prompts_together(lm: LanguageModel) -> torch.Tensor:
    prompts = [f"The capital of {country} is" for country in COUNTRIES]
    found = attribute(lm, prompts, " Paris", " the", raw=True, keep_universal=True)
    return torch.stack([one.strongest for one in found.prompts])


def prompts_one_by_one(lm: LanguageModel) -> torch.Tensor:
    found = []
    for country in COUNTRIES:
        prompt = f"The capital of {country} is"
        found += attribute(lm, prompt, " Paris", " the", raw=True, keep_universal=True).prompts
    return torch.stack([one.strongest for one in found])


def timed(work: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def compare(name: str, ours: Callable[[], torch.Tensor], theirs: Callable[[], torch.Tensor], rounds: int) -> None:
    ours()  # what is prepared once is prepared
    ratios, seconds, difference = [], [], 0.0
    for _ in range(rounds):
        took, mine = timed(ours)
        one_by_one, other = timed(theirs)
        ratios.append(one_by_one / took)
        seconds.append(took)
        difference = float((mine - other).abs().max() / other.abs().max())
    print(
        f"{name:44} {statistics.median(seconds):6.2f} s, {statistics.median(ratios):5.1f} × as fast as one by one "
        f"({min(ratios):.1f} to {max(ratios):.1f}); largest difference {difference:.0e} of the largest figure"
    )


def counted(lm: LanguageModel, found: Attribution) -> str:
    """Passages of a token through a block: one by one, as we do it, and the fewest that could do."""
    places, blocks, length = [Neuron(*row[:3]) for row in found.rows(CIRCUIT)], lm.n_layers, len(found.tokens[0])
    targets = places[:TARGETS]
    backwards = length * sum(target.layer for target in targets)
    one_by_one, ours, least = TARGETS * blocks * length + backwards, blocks * length + backwards, blocks * length
    for layer in range(blocks):
        for at in range(length):
            below = sum(one.layer < layer and one.position <= at for one in places)
            least += min(below, sum(one.layer > layer and one.position >= at for one in targets))
    return (
        f"{'':44} passages of a token through a block: one by one {one_by_one}, here {ours} "
        f"({one_by_one / ours:.1f} × fewer), at least {least} ({one_by_one / least:.1f} × fewer)"
    )


def speed(dtype: str | None, rounds: int) -> None:
    lm = load_model(dtype=dtype)
    print(f"{lm.name}, {lm.dtype}, {lm.device}, {torch.get_num_threads()} threads")
    for prompt in (SHORT, LONG):
        found = attributed(lm, prompt)
        title = f"{TARGETS} targets, {len(found.tokens[0])} tokens"
        compare(f"edges, {title}", partial(edges, lm, found), partial(edges_one_by_one, lm, found), rounds)
        print(counted(lm, found))
    compare("attribution of 32 prompts", partial(prompts_together, lm), partial(prompts_one_by_one, lm), rounds)


def graph(lm: LanguageModel, prompt: str) -> CircuitGraph:
    return find_edges(lm, attributed(lm, prompt), n_targets=TARGETS)


WORK: dict[str, Callable[[LanguageModel], object]] = {
    "attribution of one prompt, short": lambda lm: attributed(lm, SHORT),
    "attribution of one prompt, long": lambda lm: attributed(lm, LONG),
    "attribution of 32 prompts": prompts_together,
    "attribution and edges, short": lambda lm: graph(lm, SHORT),
    "attribution and edges, long": lambda lm: graph(lm, LONG),
}


def measure_growth(name: str, dtype: str | None) -> None:
    lm = load_model(dtype=dtype)
    with torch.inference_mode():
        lm.model(torch.tensor([lm.prompt_ids(SHORT)]))  # so that the weights are in memory
    held = psutil.Process().memory_info().rss
    WORK[name](lm)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{name:44} {(peak - held) / 2**20:6.0f} MiB over the {held / 2**20:.0f} MiB of the loaded model", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    if not arguments.memory:
        return speed(arguments.dtype, arguments.rounds)
    for name in WORK:
        child = multiprocessing.get_context("spawn").Process(target=measure_growth, args=(name, arguments.dtype))
        child.start()
        child.join()


if __name__ == "__main__":
    main()
