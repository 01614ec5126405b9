"""Figures per token, held against naive forwards of one row on every architecture."""

import pytest
import torch
from tiny import Tiny, make_circuit, make_vector, naive_logits, naive_states, writes_of

from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.measuring.token_scores import projections, token_divergences

PROMPT, TEXT = "the cat sings over", " bread and cheese, naïve 日本 😀 again."


def mean_over_pieces(this: Tiny, text: str, figures: torch.Tensor) -> list[tuple[str, float]]:
    """Pieces from decoding one token more at a time: a piece ends where the text so far is whole characters."""
    ids, pieces, waiting, out = this.lm.token_ids(text), [], [], 0
    for count, figure in enumerate(figures.tolist(), start=1):
        waiting.append(figure)
        sofar = this.lm.tokenizer.decode(ids[:count])
        if not sofar.endswith("\ufffd"):
            pieces.append((text[out : len(sofar)], sum(waiting) / len(waiting)))
            out, waiting = len(sofar), []
    return pieces


def check(found: list, wanted: list[tuple[str, float]]) -> None:
    assert "".join(score.text for score in found) == TEXT == "".join(piece for piece, _ in wanted)
    joined = {"".join(piece for piece, _ in wanted[:count]): score for count, (_, score) in enumerate(wanted, 1)}
    start = ""
    for score in found:  # a character of several tokens counts for the first of them or for all: compare the others
        start += score.text
        if score.text.isascii():
            assert score.score == pytest.approx(joined[start], rel=1e-3, abs=1e-4)


def test_the_projection_is_that_of_a_naive_forward(each: Tiny) -> None:
    vector, circuit = make_vector((1, 3), model=each.lm.reference), make_circuit(model=each.lm.reference)
    before = each.lm.prompt_ids(PROMPT)
    residual, neurons = naive_states(each, [*before, *each.lm.token_ids(TEXT)])
    along = [
        residual[layer, len(before) :] @ (direction / direction.norm()) / vector.norms[layer]
        for layer, direction in vector.directions.items()
    ]
    check(projections(each.lm, vector, PROMPT, TEXT), mean_over_pieces(each, TEXT, torch.stack(along).mean(0)))
    parts = [
        neurons[int(layer), len(before) :, int(neuron)] * difference
        for layer, neuron, difference in zip(circuit.neuron_layers, circuit.neurons, circuit.differences, strict=True)
    ]
    wanted = torch.stack(parts).sum(0) / float((circuit.differences**2).sum())
    check(projections(each.lm, circuit, PROMPT, TEXT), mean_over_pieces(each, TEXT, wanted))


def test_the_divergence_is_that_of_naive_distributions(each: Tiny) -> None:
    recipe = Recipe.of((make_vector((1,), model=each.lm.reference), 2.0))
    before = each.lm.prompt_ids(PROMPT)
    ids = [*before, *each.lm.token_ids(TEXT)]
    plain, steered = (
        naive_logits(each, ids, writes_of(uses))[len(before) - 1 : -1].double().log_softmax(-1)
        for uses in ((), recipe.uses)
    )
    wanted = (steered.exp() * (steered - plain)).sum(-1)
    assert float(wanted.max()) > 0.01
    check(token_divergences(each.lm, recipe, PROMPT, TEXT), mean_over_pieces(each, TEXT, wanted))


def test_unsteered_nothing_diverges_and_an_empty_text_has_no_tokens(llama: Tiny) -> None:
    assert max(score.score for score in token_divergences(llama.lm, UNSTEERED, PROMPT, TEXT)) < 1e-5
    assert token_divergences(llama.lm, UNSTEERED, PROMPT, "") == []
    assert projections(llama.lm, make_vector((1,), model=llama.lm.reference), PROMPT, "") == []
