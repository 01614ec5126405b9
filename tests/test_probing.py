"""Next tokens with and without a recipe, parts of circuits, sweeps; against naive passes of tiny models."""

import math
from typing import Any

import pytest
import torch
from checks import refused
from tiny import D_MLP, Tiny, make_circuit, make_tiny, make_vector, naive_logits, word_tokenizer, writes_of

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import UNSTEERED, Recipe, Use
from neurosteer.circuits import (
    Choice,
    NextToken,
    at_multiplier,
    everyday_prompts,
    find_universal,
    find_unspecific,
    next_token_probs,
    part,
    random_like,
    sweep_multipliers,
    top_predictions,
)
from neurosteer.circuits.relp.scores import score_prompts
from neurosteer.errors import MismatchError, UsageError
from neurosteer.models.loading import describe_model
from neurosteer.models.reference import ModelReference

PROMPT = "the cat runs over the"
PAIRS = ((0, 3), (1, 5), (1, 60), (3, 0))
SCORES = torch.tensor([0.5, -3.0, 0.1, 2.0])


def circuit_for(this: Tiny, **changes: Any) -> NeuronCircuit:
    return make_circuit(PAIRS, model=this.lm.reference, scores=SCORES, **changes)


def naive_probabilities(this: Tiny, recipe: Recipe, prompt: str = PROMPT, *, raw: bool = True) -> torch.Tensor:
    ids = this.lm.prompt_ids(prompt, raw=raw)
    return naive_logits(this, ids, writes_of(recipe.uses))[-1].softmax(-1)


@pytest.mark.parametrize("kind", ["unsteered", "ablated", "amplified", "mixed"])
def test_probabilities_are_those_of_a_naive_pass(each: Tiny, kind: str) -> None:
    circuit = circuit_for(each)
    vector = make_vector(model=each.lm.reference)
    recipes = {
        "unsteered": UNSTEERED,
        "ablated": at_multiplier(circuit, 0.0),
        "amplified": at_multiplier(circuit, 3.0),
        "mixed": Recipe.of((vector, 1.0), Use(circuit, multiplier=-1.0)),
    }
    wanted = naive_probabilities(each, recipes[kind])
    probabilities = next_token_probs(each.lm, PROMPT, ["a", "t", "!"], recipes[kind], raw=True)
    for token in ("a", "t", "!"):
        assert probabilities[token] == pytest.approx(float(wanted[each.lm.token_ids(token)[0]]), rel=1e-3, abs=1e-6)
    found = top_predictions(each.lm, PROMPT, recipes[kind], 7, raw=True)
    assert [one.probability for one in found] == pytest.approx(wanted.topk(7).values.tolist(), rel=1e-3, abs=1e-6)
    assert [one.id for one in found] == wanted.topk(7).indices.tolist()
    assert [one.text for one in found] == [each.lm.tokenizer.decode([one.id]) for one in found]


def test_the_chat_template_and_a_begun_answer_count(llama: Tiny) -> None:
    for options in ({}, {"seed_response": "we "}, {"raw": True}):
        ids = llama.lm.prompt_ids(PROMPT, **options)  # type: ignore[arg-type]
        wanted = naive_logits(llama, ids, writes_of(()))[-1].softmax(-1)
        (best,) = top_predictions(llama.lm, PROMPT, k=1, **options)  # type: ignore[arg-type]
        assert best.probability == pytest.approx(float(wanted.max()), rel=1e-3)


def test_a_sweep_gives_at_each_multiplier_what_that_multiplier_alone_gives(each: Tiny) -> None:
    circuit = circuit_for(each)
    points = sweep_multipliers(each.lm, circuit, PROMPT, [0, 1, 2.5], ["a", "t"], 3, raw=True)
    assert [point.multiplier for point in points] == [0.0, 1.0, 2.5]
    for point in points:
        wanted = naive_probabilities(each, at_multiplier(circuit, point.multiplier))
        assert [one.text for one in point.asked] == ["a", "t"]
        for one in point.asked:
            assert one.probability == pytest.approx(float(wanted[one.id]), rel=1e-3, abs=1e-6)
        assert [one.id for one in point.predictions] == wanted.topk(3).indices.tolist()


def test_more_multipliers_than_fit_one_batch_are_all_there(llama: Tiny) -> None:
    multipliers = [place / 10 for place in range(70)]
    points = sweep_multipliers(llama.lm, circuit_for(llama), PROMPT, multipliers, "a", 1, raw=True)
    assert [point.multiplier for point in points] == multipliers
    (wanted,) = sweep_multipliers(llama.lm, circuit_for(llama), PROMPT, multipliers[-1:], "a", 1, raw=True)
    assert points[-1].asked[0].probability == pytest.approx(wanted.asked[0].probability, rel=1e-4)


def test_a_circuit_that_shifts_is_scaled_too_when_given_a_multiplier(llama: Tiny) -> None:
    scaling, shifting = circuit_for(llama), circuit_for(llama, operation="shift")
    one, other = (
        top_predictions(llama.lm, PROMPT, at_multiplier(this, 0.0), 3, raw=True) for this in (scaling, shifting)
    )
    assert one == other


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("top2", [(1, 5), (3, 0)]),
        ("top99", [(1, 5), (3, 0), (0, 3), (1, 60)]),
        ("L1", [(1, 5), (1, 60)]),
        ("l1/n60", [(1, 60)]),
        (" L3 ", [(3, 0)]),
        ("all", list(PAIRS)),
    ],
)
def test_a_part_holds_the_neurons_it_names(llama: Tiny, text: str, pairs: list[tuple[int, int]]) -> None:
    circuit = circuit_for(llama)
    found = part(circuit, text)
    assert list(zip(found.neuron_layers.tolist(), found.neurons.tolist(), strict=True)) == pairs
    of = dict(zip(PAIRS, zip(circuit.scores.tolist(), circuit.differences.tolist(), strict=True), strict=True))
    assert list(zip(found.scores.tolist(), found.differences.tolist(), strict=True)) == [of[pair] for pair in pairs]


def test_ablating_a_part_ablates_that_part_only(llama: Tiny) -> None:
    whole = circuit_for(llama)
    alone = make_circuit([(1, 5)], model=llama.lm.reference)
    one, other = (
        next_token_probs(llama.lm, PROMPT, "a", at_multiplier(this, 0.0), raw=True)
        for this in (part(whole, "L1/N5"), alone)
    )
    assert one == other


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("top10",)),
        ("best", ("best", "L23/N807")),
        ("top0", ("top0",)),
        ("L9", ("layer 9", "0 to 3")),
        ("L1/N64", ("neuron 64", "0 to 63")),
        ("L2", ("L2", "0, 1, 3")),
        ("L1/N6", ("L1/N6",)),
        ("L1/N" + "9" * 40, ("L1/N9",)),
    ],
)
def test_what_is_no_part_is_refused_in_one_line(llama: Tiny, text: str, words: tuple[str, ...]) -> None:
    refused(lambda: part(circuit_for(llama), text), UsageError, *words)


def test_random_neurons_lie_in_the_same_layers_and_spare_what_is_left_out() -> None:
    pairs = [(0, neuron) for neuron in range(20)] + [(2, neuron) for neuron in range(5)]
    circuit = make_circuit(pairs)
    spared = {(0, neuron) for neuron in range(30)}
    seen: set[tuple[int, int]] = set()
    for seed in range(150):
        drawn = random_like(circuit, seed, leave_out=spared)
        found = set(zip(drawn.neuron_layers.tolist(), drawn.neurons.tolist(), strict=True))
        assert len(found) == 25 and sorted(layer for layer, _ in found) == [0] * 20 + [2] * 5
        assert not found & spared
        seen |= found
    assert len(seen) == (D_MLP - 30) + D_MLP  # every other neuron of those layers comes up, also the circuit's own
    assert random_like(circuit, 3).neurons.tolist() == random_like(circuit, 3).neurons.tolist()
    refused(lambda: random_like(circuit, leave_out={(0, n) for n in range(50)}), UsageError, "14", "20")


def test_bad_input_is_refused_in_one_line(llama: Tiny) -> None:
    lm, circuit = llama.lm, circuit_for(llama)
    refused(lambda: top_predictions(lm, ""), UsageError, "empty")
    refused(lambda: top_predictions(lm, "a " * 2000, raw=True), UsageError, "256")
    refused(lambda: top_predictions(lm, PROMPT, k=0), UsageError, "k is 0")
    refused(lambda: next_token_probs(lm, "", "a"), UsageError, "empty")
    refused(lambda: next_token_probs(lm, PROMPT, ["a", ""]), UsageError, "empty")
    refused(lambda: sweep_multipliers(lm, circuit, PROMPT, []), UsageError, "multiplier")
    refused(lambda: sweep_multipliers(lm, circuit, PROMPT, [math.nan]), UsageError, "nan")
    other = ModelReference("other", None, 4, 32, 128, "f")
    foreign = make_circuit(PAIRS, model=other)
    refused(lambda: top_predictions(lm, PROMPT, at_multiplier(foreign, 0)), MismatchError, "other", "d_mlp 128")
    refused(lambda: sweep_multipliers(lm, foreign, PROMPT, [0]), MismatchError, "other")
    words = describe_model(make_tiny("llama").model, word_tokenizer(), name="tiny/words")
    refused(lambda: next_token_probs(words, "one two", "elephant", raw=True), UsageError, "elephant", "tiny/words")


def test_unspecific_neurons_are_those_that_many_everyday_answers_are_owed_to(llama: Tiny) -> None:
    top, share, prompts = 12, 0.25, everyday_prompts()
    counts: dict[tuple[int, int], int] = {}
    for prompt in prompts:
        best, second = (NextToken(one.id, one.text) for one in top_predictions(llama.lm, prompt, k=2, raw=True))
        choice = Choice(prompt, tuple(llama.lm.prompt_ids(prompt, raw=True)), best, second)
        (found_alone,) = score_prompts(llama.lm, [choice])
        for key in found_alone.strongest.abs().flatten().topk(top).indices.tolist():
            counts[divmod(key, D_MLP)] = counts.get(divmod(key, D_MLP), 0) + 1
    wanted = {pair for pair, count in counts.items() if count >= share * len(prompts)}
    found = find_unspecific(llama.lm, top=top, share=share)
    assert wanted and set(found.neurons) == wanted | set(find_universal(llama.lm).neurons)
    refused(lambda: find_unspecific(llama.lm, top=0), UsageError, "top is 0")
    refused(lambda: find_unspecific(llama.lm, share=1.5), UsageError, "1.5")
    refused(lambda: find_unspecific(llama.lm, []), UsageError, "no prompt")
