"""Whether a circuit does the work: the metric with the circuit alone running, and with everything but the circuit.

The sweep takes the strongest neurons, more and more of them. *Faithfulness* is how much of the metric they keep when
all other neurons are ablated, *completeness* how much is left when they are: both as shares of the way from `empty`
(all neurons ablated) to `full` (none). A good circuit is faithful early, and little is left without it. Neurons that
an attribution leaves out as universal stay running throughout; with `keep_universal` they are neurons like all others.

Unless a circuit from elsewhere is given, neurons are ranked by the attribution of the very prompts that they are
measured on. That flatters them: on other prompts of the kind, the same neurons keep less.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurosteer.artifacts.artifact import check_model
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.twins import draw_neurons
from neurosteer.circuits.checks.ablation import ABLATIONS, Ablation, Bench
from neurosteer.circuits.parts import strongest_first
from neurosteer.circuits.relp.attribution import Attribution
from neurosteer.errors import UsageError
from neurosteer.models.language_model import LanguageModel, Prompt
from neurosteer.progress import Progress, silent
from neurosteer.validation import check_count, check_option

PERCENTS = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 70.0, 100.0)
DRAWS = 3

_NO_RANGE = 1e-6


@dataclass(frozen=True)
class FaithfulnessRow:
    """One size of the circuit: the `neurons` that make up `percent` of all ranked ones.

    `circuit` is the metric with only those running, `complement` with all but those. The random figures are means over
    draws of as many neurons of the same layers; None where none were drawn.
    """

    percent: float
    neurons: int
    circuit: float
    complement: float
    faithfulness: float
    completeness: float
    random_faithfulness: float | None = None
    random_completeness: float | None = None


@dataclass(frozen=True)
class Faithfulness:
    """A sweep over sizes. `full` and `empty` are the metric with no and with all neurons ablated, means over prompts;
    `ranked` counts the neurons that the percentages are of. `same_prompts` says that they were ranked on the prompts
    that they are measured on."""

    full: float
    empty: float
    ranked: int
    ablation: Ablation
    draws: int
    same_prompts: bool
    rows: tuple[FaithfulnessRow, ...]

    @property
    def area(self) -> float:
        """The mean of faithfulness over the range of percentages (the area under its curve, by trapezoids)."""
        return self._area("faithfulness")

    @property
    def random_area(self) -> float | None:
        """The area under the faithfulness of random neurons; None where none were drawn."""
        return self._area("random_faithfulness") if self.draws else None

    def data(self) -> dict[str, Any]:
        """`full`, `empty` and the rows without the random draws, JSON-ready."""
        names = ("percent", "neurons", "faithfulness", "completeness")
        rows = [{name: getattr(row, name) for name in names} for row in self.rows]
        return {"full": self.full, "empty": self.empty, "rows": rows}

    def _area(self, name: str) -> float:
        x = torch.tensor([row.percent for row in self.rows], dtype=torch.float64)
        y = torch.tensor([getattr(row, name) for row in self.rows], dtype=torch.float64)
        return float(torch.trapezoid(y, x) / (x[-1] - x[0])) if len(self.rows) > 1 else float(y[0])


def measure_faithfulness(
    lm: LanguageModel,
    attribution: Attribution,
    *,
    circuit: NeuronCircuit | None = None,
    percents: Sequence[float] = PERCENTS,
    ablation: Ablation = "zero",
    counterfactual_prompts: Sequence[Prompt] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> Faithfulness:
    """Faithfulness and completeness of an attribution's strongest neurons on its own prompts, batched.

    Neurons are ranked by their strongest score over positions, counted from the end, of the mean over prompts. For an
    honest figure, rank on other prompts: give the `circuit` of an attribution of those.

    Args:
        circuit: rank the neurons of this circuit instead, by |score|.
        percents: the sizes, in percent of the neurons ranked.
        ablation: a neuron ablated is set to 0 (`zero`), to its `mean` over the counterfactual prompts (without them,
            over the prompts) at the same distance from the end, or to what it is at the same token of the prompt's own
            counterfactual prompt (`paired`).
        counterfactual_prompts: with `paired`, one for each prompt, of as many tokens.
        draws: of as many random neurons of the same layers, for comparison; 0 for none.
        batch_tokens: how many tokens go through the model at once.

    Raises:
        UsageError: an option out of its range, counterfactual prompts that do not fit, or ablating all neurons leaves
            the metric as it is (as does the mean over a single prompt).
        MismatchError: the circuit was made on a model of another shape.
        Cancelled: `cancel` was set.
    """
    _check(percents, ablation, counterfactual_prompts, draws)
    ranked = _ranked(attribution) if circuit is None else _circuit_ranked(lm, circuit)
    running = _always_running(attribution)
    counts = [math.floor(len(ranked) * percent / 100 + 1e-9) for percent in percents]
    masks = list(_masks(ranked, running, counts, attribution, draws, seed))
    bench = Bench.of(lm, attribution, ablation, counterfactual_prompts, batch_tokens)
    values = bench.measure(masks, progress, cancel)
    full, empty, measured = values[0], values[1], values[2:]
    if abs(full - empty) < _NO_RANGE * max(1.0, abs(full)):
        raise UsageError(
            f"With all neurons ablated the metric stays {full:.6g}, so there is nothing to share; use ablation 'zero', "
            "or other counterfactual prompts."
        )
    return Faithfulness(
        full=full,
        empty=empty,
        ranked=len(ranked),
        ablation=ablation,
        draws=draws,
        same_prompts=circuit is None,
        rows=tuple(_rows(percents, counts, measured, full, empty, draws)),
    )


def _rows(
    percents: Sequence[float], counts: Sequence[int], measured: Sequence[float], full: float, empty: float, draws: int
) -> Iterator[FaithfulnessRow]:
    """From the metrics of each size: circuit, complement, then those of the draws, in turn."""
    width = 2 * (1 + draws)
    for place, (percent, count) in enumerate(zip(percents, counts, strict=True)):
        here = measured[place * width : (place + 1) * width]
        shares = [(value - empty) / (full - empty) for value in here]
        by_chance = [sum(shares[start::2]) / draws for start in (2, 3)] if draws else [None, None]
        yield FaithfulnessRow(float(percent), count, here[0], here[1], shares[0], shares[1], *by_chance)


# --- which neurons run -----------------------------------------------------------------------------------------------


def _ranked(attribution: Attribution) -> Tensor:
    """Neurons as layer × d_mlp + neuron, strongest first, `[n]`."""
    width, size = attribution.model.d_mlp, attribution.model.n_layers * attribution.model.d_mlp
    keys, scores = [], []
    for one in attribution.prompts:
        from_end = len(one.choice.ids) - 1 - one.positions.long()
        keys.append(from_end * size + one.layers.long() * width + one.neurons.long())
        scores.append(one.scores)
    places, inverse = torch.cat(keys).unique(return_inverse=True)
    sums = torch.zeros(len(places), dtype=torch.float64).index_add_(0, inverse, torch.cat(scores).double())
    strongest = torch.full((size,), -1.0, dtype=torch.float64)
    strongest.scatter_reduce_(0, places % size, sums.abs(), "amax")
    strongest[_always_running(attribution).flatten()] = -1.0
    order = strongest.argsort(descending=True, stable=True)
    return order[strongest[order] >= 0]


def _circuit_ranked(lm: LanguageModel, circuit: NeuronCircuit) -> Tensor:
    check_model(circuit, lm.reference)
    return (circuit.neuron_layers.long() * circuit.model.d_mlp + circuit.neurons.long())[strongest_first(circuit)]


def _always_running(attribution: Attribution) -> Tensor:
    """The universal neurons, where they are left out, bool `[n_layers, d_mlp]`."""
    running = torch.zeros(attribution.model.n_layers, attribution.model.d_mlp, dtype=torch.bool)
    if attribution.universal is not None and not attribution.keep_universal:
        for layer, neuron in attribution.universal.all:
            running[layer, neuron] = True
    return running


def _masks(
    ranked: Tensor, running: Tensor, counts: Sequence[int], attribution: Attribution, draws: int, seed: int
) -> Iterator[Tensor]:
    """Which neurons run, bool `[n_layers, d_mlp]`: all; the universal ones; then for each size the circuit, all but the
    circuit, and the same for each draw."""
    yield torch.ones_like(running)
    yield running
    for count in counts:
        circuit = torch.zeros_like(running).flatten()
        circuit[ranked[:count]] = True
        circuit = circuit.view_as(running)
        yield circuit | running
        yield ~circuit | running
        for draw in range(draws):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
            other = _drawn(circuit, ~running, generator)
            yield other | running
            yield ~other | running


def _drawn(circuit: Tensor, allowed: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.zeros_like(circuit)
    for layer, count in enumerate((circuit & allowed).sum(1).tolist()):
        drawn[layer, draw_neurons(allowed[layer], count, generator)] = True
    return drawn


def _check(percents: Sequence[float], ablation: str, counterfactual_prompts: object, draws: object) -> None:
    if not percents or list(percents) != sorted(set(percents)) or not 0 <= percents[0] <= percents[-1] <= 100:
        raise UsageError(f"percents is {list(percents)!r:.100}; give rising percentages from 0 to 100.")
    check_option("ablation", ablation, ABLATIONS)
    if ablation == "paired" and not counterfactual_prompts:
        raise UsageError("Paired ablation needs counterfactual prompts, one for each prompt.")
    if ablation == "zero" and counterfactual_prompts is not None:
        raise UsageError(
            "Ablation 'zero' uses no counterfactual prompts; leave them out, or choose 'mean' or 'paired'."
        )
    check_count("draws", draws, 0, 100)
