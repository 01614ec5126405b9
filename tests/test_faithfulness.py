"""Faithfulness and completeness on tiny models, against one unpadded pass per prompt and set of neurons."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from checks import refused
from tiny import D_MLP, N_LAYERS, Tiny, make_circuit, make_tiny, naive_states, own_hooks, texts
from torch import Tensor

from neurosteer.circuits import Attribution, CommonNeurons, Faithfulness, attribute, measure_faithfulness
from neurosteer.errors import Cancelled, MismatchError, UsageError

PROMPTS = ["the cat runs over the river", "we sing", "they never thank the happy dog again."]
PARTNERS = ["the dog sings under the river", "we cry", "you always thank the sad cat."]
TARGETS, OTHERS = ["a", "b", "c"], ["d", "e", "f"]
PERCENTS = [0.0, 3.0, 25.0, 100.0]


def attributed(this: Tiny, prompts: Sequence[str] = PROMPTS, **options: Any) -> Attribution:
    options = {"raw": True, "keep_universal": True, **options}
    count = len(prompts)
    return attribute(this.lm, prompts, TARGETS[:count], OTHERS[:count], **options)


@torch.no_grad()
def naive_metric(this: Tiny, found: Attribution, running: Tensor, instead: Sequence[Tensor] | None = None) -> float:
    """The mean logit difference with the neurons outside `running` set to 0, or to `instead[prompt]`
    `[n_layers, seq, d_mlp]`; one prompt at a time."""
    total = 0.0
    for place, one in enumerate(found.prompts):
        ids = list(one.choice.ids)

        def ablate(layer: int, place: int = place, ids: Sequence[int] = ids) -> Any:
            def hook(_module: Any, inputs: Any) -> Any:
                value = torch.zeros_like(inputs[0]) if instead is None else instead[place][layer][None, -len(ids) :]
                return (inputs[0] * running[layer] + value * ~running[layer],)

            return hook

        with own_hooks([(down, ablate(layer)) for layer, down in enumerate(this.downs)], before=True):
            logits = this.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
        assert one.counterfactual is not None
        total += float(logits[one.target.id] - logits[one.counterfactual.id])
    return total / len(found.prompts)


def naive_order(found: Attribution) -> list[tuple[int, int]]:
    """Neurons by the largest |sum over prompts| at any distance from the end."""
    sums: dict[tuple[int, int, int], float] = {}
    for place, one in enumerate(found.prompts):
        for layer, position, neuron, score in found.rows(prompt=place):
            key = (len(one.choice.ids) - position, layer, neuron)
            sums[key] = sums.get(key, 0.0) + score
    best: dict[tuple[int, int], float] = {}
    for (_, layer, neuron), value in sums.items():
        best[layer, neuron] = max(best.get((layer, neuron), 0.0), abs(value))
    return sorted(best, key=lambda key: (-best[key], key))


def mask(pairs: Sequence[tuple[int, int]]) -> Tensor:
    running = torch.zeros(N_LAYERS, D_MLP, dtype=torch.bool)
    for layer, neuron in pairs:
        running[layer, neuron] = True
    return running


def assert_is(result: Faithfulness, this: Tiny, found: Attribution, instead: Sequence[Tensor] | None = None) -> None:
    order = naive_order(found)
    nothing = mask([])
    full, empty = (naive_metric(this, found, one, instead) for one in (~nothing, nothing))
    assert result.full == pytest.approx(full, rel=1e-3, abs=1e-3)
    assert result.empty == pytest.approx(empty, rel=1e-3, abs=1e-3)
    assert result.ranked == len(order)
    for row in result.rows:
        assert row.neurons == int(len(order) * row.percent / 100)
        running = mask(order[: row.neurons])
        circuit, complement = (naive_metric(this, found, one, instead) for one in (running, ~running))
        assert row.circuit == pytest.approx(circuit, rel=2e-3, abs=2e-3)
        assert row.complement == pytest.approx(complement, rel=2e-3, abs=2e-3)
        assert row.faithfulness == pytest.approx((circuit - empty) / (full - empty), rel=5e-3, abs=5e-3)
        assert row.completeness == pytest.approx((complement - empty) / (full - empty), rel=5e-3, abs=5e-3)


def test_zero_ablation_is_that_of_one_pass_per_prompt_and_set(each: Tiny) -> None:
    found = attributed(each)
    assert_is(measure_faithfulness(each.lm, found, percents=PERCENTS, draws=0), each, found)


def test_mean_ablation_takes_the_mean_at_the_same_distance_from_the_end(each: Tiny) -> None:
    found = attributed(each)
    for counterfactuals in (None, PARTNERS):
        rows = [each.lm.prompt_ids(text, raw=True) for text in counterfactuals or PROMPTS]
        states = [naive_states(each, ids)[1] for ids in rows]
        longest = max(map(len, rows))
        most = max(len(one.choice.ids) for one in found.prompts)
        means = []
        for far in range(most, 0, -1):
            reach = min(far, longest)
            there = [one[:, len(ids) - reach] for one, ids in zip(states, rows, strict=True) if len(ids) >= reach]
            means.append(torch.stack(there).mean(0))
        instead = [torch.stack(means, dim=1)] * len(PROMPTS)
        result = measure_faithfulness(
            each.lm, found, percents=PERCENTS, ablation="mean", counterfactual_prompts=counterfactuals, draws=0
        )
        assert_is(result, each, found, instead)


def test_paired_ablation_takes_each_prompts_own_counterfactual(each: Tiny) -> None:
    prompts = texts(40, seed=3, longest=5)
    lengths = [len(each.lm.prompt_ids(text, raw=True)) for text in prompts]
    length = max((n for n in set(lengths) if n > 2), key=lengths.count)
    one, other, third, fourth = [text for text, n in zip(prompts, lengths, strict=True) if n == length][:4]
    found = attributed(each, [one, other])
    instead = [naive_states(each, each.lm.prompt_ids(text, raw=True))[1] for text in (third, fourth)]
    result = measure_faithfulness(
        each.lm, found, percents=PERCENTS, ablation="paired", counterfactual_prompts=[third, fourth], draws=0
    )
    assert_is(result, each, found, instead)


def test_batches_of_any_size_give_the_same(llama: Tiny) -> None:
    found = attributed(llama)
    whole, small = (measure_faithfulness(llama.lm, found, percents=PERCENTS, batch_tokens=size) for size in (4000, 1))
    for one, other in zip(whole.rows, small.rows, strict=True):
        assert one.circuit == pytest.approx(other.circuit, abs=1e-3)
        assert one.random_faithfulness == pytest.approx(other.random_faithfulness, abs=1e-3)


def test_nothing_ablated_is_fully_faithful_and_nothing_running_not_at_all(llama: Tiny) -> None:
    found = attributed(llama, per_position=D_MLP)
    rows = measure_faithfulness(llama.lm, found, percents=[0, 100]).rows
    assert (rows[0].faithfulness, rows[0].completeness) == pytest.approx((0.0, 1.0), abs=1e-5)
    assert (rows[1].faithfulness, rows[1].completeness) == pytest.approx((1.0, 0.0), abs=1e-5)


def test_the_area_is_the_mean_of_the_curve_by_trapezoids(llama: Tiny) -> None:
    result = measure_faithfulness(llama.lm, attributed(llama), percents=[0, 10, 50])
    one, two, three = (row.faithfulness for row in result.rows)
    assert result.area == pytest.approx(((one + two) / 2 * 10 + (two + three) / 2 * 40) / 50)
    drawn = [row.random_faithfulness for row in result.rows]
    assert None not in drawn and result.random_area is not None
    assert result.random_area == pytest.approx(
        (10 * (drawn[0] + drawn[1]) + 40 * (drawn[1] + drawn[2])) / 100  # type: ignore[operator]
    )


def test_random_neurons_are_drawn_by_the_seed(llama: Tiny) -> None:
    found = attributed(llama)
    one, same, other = (
        measure_faithfulness(llama.lm, found, percents=[25], seed=seed).rows[0].random_faithfulness
        for seed in (0, 0, 1)
    )
    assert one == same != other


def test_universal_neurons_left_out_keep_running(llama: Tiny) -> None:
    universal = CommonNeurons(((0, 3), (2, 11), (3, 40)))
    found = attributed(llama, keep_universal=False, universal=universal)
    always = mask(universal.neurons)
    result = measure_faithfulness(llama.lm, found, percents=[10], draws=0)
    order = [pair for pair in naive_order(found) if pair not in universal.neurons]
    circuit = mask(order[: int(len(order) * 0.1)])
    assert result.ranked == len(order)
    assert result.empty == pytest.approx(naive_metric(llama, found, always), abs=1e-3)
    assert result.rows[0].circuit == pytest.approx(naive_metric(llama, found, circuit | always), abs=1e-3)
    assert result.rows[0].complement == pytest.approx(naive_metric(llama, found, ~circuit | always), abs=1e-3)


def test_a_given_circuit_is_swept_by_its_own_scores(llama: Tiny) -> None:
    pairs = [(0, 3), (1, 5), (1, 60), (3, 0)]
    circuit = make_circuit(pairs, model=llama.lm.reference, scores=torch.tensor([0.1, -3.0, 2.0, 0.5]))
    found = attributed(llama)
    rows = measure_faithfulness(llama.lm, found, circuit=circuit, percents=[50, 100], draws=0).rows
    assert [row.neurons for row in rows] == [2, 4]
    assert rows[0].circuit == pytest.approx(naive_metric(llama, found, mask([(1, 5), (1, 60)])), abs=1e-3)
    assert rows[1].complement == pytest.approx(naive_metric(llama, found, ~mask(pairs)), abs=1e-3)


def test_the_json_has_the_promised_keys_only(llama: Tiny) -> None:
    data = measure_faithfulness(llama.lm, attributed(llama), percents=[0, 50]).data()
    assert set(data) == {"full", "empty", "rows"}
    assert all(set(row) == {"percent", "neurons", "faithfulness", "completeness"} for row in data["rows"])


def test_what_does_not_fit_is_refused_in_one_line(llama: Tiny) -> None:
    found = attributed(llama)

    def measure(**options: Any) -> Any:
        return lambda: measure_faithfulness(llama.lm, found, **options)

    refused(measure(percents=[]), UsageError, "percents")
    refused(measure(percents=[5, 1]), UsageError, "[5, 1]")
    refused(measure(percents=[0, 101]), UsageError, "101")
    refused(measure(percents=[float("nan")]), UsageError, "nan")
    refused(measure(ablation="half"), UsageError, "half", "zero")
    refused(measure(ablation="paired"), UsageError, "counterfactual prompts")
    refused(measure(ablation="zero", counterfactual_prompts=PARTNERS), UsageError, "zero")
    refused(measure(ablation="mean", counterfactual_prompts=["", "", ""]), UsageError, "empty")
    refused(measure(ablation="paired", counterfactual_prompts=PARTNERS[:2]), UsageError, "2", "3")
    refused(measure(ablation="paired", counterfactual_prompts=["a", "a", "a"]), UsageError, "tokens")
    refused(measure(draws=-1), UsageError, "draws")
    refused(measure(circuit=make_circuit(model=make_tiny("llama", num_hidden_layers=6).lm.reference)), MismatchError)
    single = attributed(llama, PROMPTS[:1])
    refused(lambda: measure_faithfulness(llama.lm, single, ablation="mean"), UsageError, "zero")
    other = make_tiny("llama", seed=5)
    refused(lambda: measure_faithfulness(other.lm, found), MismatchError, "attribute again")


def test_it_can_be_cancelled(llama: Tiny) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        measure_faithfulness(llama.lm, attributed(llama), cancel=cancel)
