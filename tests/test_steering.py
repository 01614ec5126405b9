"""Steering: logits and texts against hooks of our own, on one row at a time, unpadded and without a cache."""

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import (
    D_MODEL,
    N_LAYERS,
    Tiny,
    Writes,
    ablating,
    hook_count,
    make_circuit,
    make_tiny,
    make_vector,
    naive_greedy,
    naive_logits,
    own_hooks,
    tiny,
    tiny_wrapped,
    word_tokenizer,
    writes_of,
)
from torch import Tensor

from neurosteer.artifacts.recipes import UNSTEERED, Positions, Recipe, Use
from neurosteer.artifacts.strength import Calibration
from neurosteer.errors import MismatchError, UsageError
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import describe_model
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.plans import applied, compile_plan
from neurosteer.steering.session import Row, Session, Step, sweep_rows

GREEDY = Sampling(greedy=True)
PROMPTS = ["the cat sings", "we", "bread and cheese under the dark mountain, again. Why?", "日本 😀"]


def fits(this: Tiny, use: Use) -> Use:
    return replace(use, artifact=replace(use.artifact, model=this.lm.reference))


VECTOR, SECOND = make_vector((1, 2), seed=1), make_vector((2, 3), seed=2)
SCALING = make_circuit([(0, 3), (1, 5), (1, 60), (3, 0)], seed=3, calibration=Calibration(4.0))
ALSO_SCALING = make_circuit([(1, 5), (2, 9)], seed=4, calibration=Calibration(-1.0))
SHIFTING = make_circuit([(1, 5), (2, 7), (0, 3)], seed=5, operation="shift", calibration=Calibration(6.0))
ALSO_SHIFTING = make_circuit([(1, 5), (2, 9)], seed=8, operation="shift", calibration=Calibration(4.0))
ABLATING, OVERLAPPING = ablating((0, 2), seed=6), ablating((2, 3), seed=7)

RECIPES: dict[str, tuple[Use, ...]] = {
    "add": (Use(VECTOR, 1.5),),
    "add the opposite": (Use(VECTOR, -2.0),),
    "two vectors that share a layer": (Use(VECTOR, 1.0), Use(SECOND, -0.7)),
    "one vector twice": (Use(VECTOR, 1.0), Use(VECTOR, 0.5)),
    "ablate": (Use(ABLATING),),
    "overlapping ablations": (Use(ABLATING), Use(OVERLAPPING)),
    "one ablation twice": (Use(ABLATING), Use(ABLATING)),
    "scale": (Use(SCALING, 1.0),),
    "scale the other way": (Use(SCALING, -0.5),),
    "scale by a multiplier": (Use(SCALING, multiplier=0.0),),
    "two circuits that share a neuron": (Use(SCALING, 1.0), Use(ALSO_SCALING, 0.8)),
    "shift": (Use(SHIFTING, -1.0),),
    "two shifting circuits that share a neuron": (Use(SHIFTING, 1.0), Use(ALSO_SHIFTING, -3.0)),
    "scale and shift the same neuron": (Use(SHIFTING, 0.5), Use(SCALING, 1.0)),
    "everything": (
        Use(SHIFTING, 0.5),
        Use(SECOND, 0.8),
        Use(SCALING, 0.4),
        Use(ABLATING),
        Use(VECTOR, 1.1),
        Use(OVERLAPPING),
    ),
}
OFF: dict[str, tuple[Use, ...]] = {
    "no artifact": (),
    "add": (Use(VECTOR, 0.0),),
    "ablate": (Use(ABLATING, 0.0),),
    "scale": (Use(SCALING, 0.0),),
    "multiplier 1": (Use(SCALING, multiplier=1.0),),
    "shift": (Use(SHIFTING, 0.0),),
    "all of them": (Use(VECTOR, 0.0), Use(ABLATING, 0.0), Use(SCALING, -0.0), Use(SHIFTING, 0.0)),
}


def recipe_for(this: Tiny, name: str) -> Recipe:
    return Recipe(tuple(fits(this, use) for use in RECIPES[name]))


def padded(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


@torch.no_grad()
def batch_logits(
    lm: LanguageModel, recipes: Sequence[Recipe], ids: Tensor, mask: Tensor | None, positions: Positions = "all"
) -> Tensor:
    """Logits under `applied`; with a mask the rows' positions count from their first token, as in `generate`."""
    named: dict[str, Any] = {}
    if mask is not None:
        named = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    where = (torch.ones_like(ids) if mask is None else mask).bool() & (positions != "generated")
    with applied(lm, compile_plan(lm, recipes, positions), where):
        return lm.model(ids, use_cache=False, **named).logits


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


# --- off is off ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFF)
def test_strength_0_is_bit_for_bit_the_unsteered_model(each: Tiny, name: str) -> None:
    ids, mask = padded([each.lm.prompt_ids(prompt) for prompt in PROMPTS])
    off = Recipe(tuple(fits(each, use) for use in OFF[name]))
    with torch.no_grad():
        plain = each.model(
            ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False
        ).logits
    assert torch.equal(batch_logits(each.lm, [off] * len(PROMPTS), ids, mask), plain)


@pytest.mark.parametrize("name", ["add", "ablate", "overlapping ablations", "scale", "shift", "everything"])
def test_an_unsteered_row_is_bit_for_bit_the_same_beside_steered_ones(each: Tiny, name: str) -> None:
    ids, mask = padded([each.lm.prompt_ids(prompt) for prompt in PROMPTS])
    mixed = [UNSTEERED, recipe_for(each, name), Recipe(OFF["all of them"]), recipe_for(each, "everything")]
    with torch.no_grad():
        plain = batch_logits(each.lm, [UNSTEERED] * 4, ids, mask)
        found = batch_logits(each.lm, mixed, ids, mask)
    real = mask.bool()
    for row in (0, 2):
        assert torch.equal(found[row][real[row]], plain[row][real[row]])
    for row in (1, 3):
        assert relative(found[row][real[row]], plain[row][real[row]]) > 1e-3


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_logits_of_every_recipe_are_those_of_hooks_of_our_own(each: Tiny, name: str) -> None:
    recipe = recipe_for(each, name)
    ids = each.lm.prompt_ids(PROMPTS[2])
    wanted = naive_logits(each, ids, writes_of(recipe.uses))
    plain = naive_logits(each, ids, Writes())
    found = batch_logits(each.lm, [recipe], torch.tensor([ids]), None)[0]
    assert relative(found, wanted) < 1e-4
    assert relative(plain, wanted) > 1e-3, "the recipe does nothing, so this test shows nothing"


def test_mixed_recipes_in_one_padded_batch_are_each_as_if_alone(each: Tiny) -> None:
    names = list(RECIPES)
    prompts = [each.lm.prompt_ids(PROMPTS[place % len(PROMPTS)]) for place in range(len(names))]
    ids, mask = padded(prompts)
    found = batch_logits(each.lm, [recipe_for(each, name) for name in names], ids, mask)
    for row, name in enumerate(names):
        wanted = naive_logits(each, prompts[row], writes_of(RECIPES[name]))
        assert relative(found[row, -len(prompts[row]) :], wanted) < 1e-4, name


def test_a_vectors_layers_share_its_dose(llama: Tiny) -> None:
    norms = {0: 2.0, 1: 5.0, 3: 11.0}
    vector = make_vector((0, 1, 3), seed=8, norms=norms, calibration=Calibration(0.4), model=llama.lm.reference)
    plan = compile_plan(llama.lm, [Recipe.of((vector, 1.5)), UNSTEERED])
    pushes = {layer: plan.additions[layer][0, 0] for layer in norms}
    for layer, push in pushes.items():
        assert float(push.norm()) == pytest.approx(1.5 * 0.4 * norms[layer] / 3, rel=1e-5)
        assert torch.cosine_similarity(push, vector.directions[layer], dim=0) > 0.99999
        assert not plan.additions[layer][1].any()
    doses = sum(float(push.norm()) / norms[layer] for layer, push in pushes.items())
    assert doses == pytest.approx(1.5 * 0.4, rel=1e-5)


def test_the_push_does_not_depend_on_the_vectors_length(llama: Tiny) -> None:
    vector = make_vector(seed=1, model=llama.lm.reference)
    wanted = compile_plan(llama.lm, [Recipe.of(vector)]).additions
    for factor in (1e-30, 1e-20, 0.5, 7.0, 1e20, 1e30):
        found = compile_plan(llama.lm, [Recipe.of(vector * factor)]).additions
        for layer in wanted:
            assert torch.allclose(found[layer], wanted[layer], rtol=1e-4), factor


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_what_is_ablated_does_not_depend_on_the_vectors_length(llama: Tiny, factor: float) -> None:
    vector = ablating((1, 2), seed=1, model=llama.lm.reference)
    ids = torch.tensor([llama.lm.prompt_ids("the dog")])
    wanted, found = (batch_logits(llama.lm, [Recipe.of(use)], ids, None) for use in (vector, vector * factor))
    assert relative(found, wanted) < 1e-4


@pytest.mark.parametrize(("strength", "multiplier"), [(1.0, 2.0), (0.0, 1.0), (-1.0, 0.0), (2.5, 3.5), (-2.0, -1.0)])
def test_strengths_of_a_scaling_circuit_are_multipliers_around_1(strength: float, multiplier: float) -> None:
    circuit = make_circuit(calibration=Calibration(2.0))
    assert Use(circuit, strength).amount == multiplier
    assert Use(circuit, multiplier=multiplier).amount == multiplier
    assert Use(make_circuit(calibration=Calibration(0.0)), 1.0).amount == 0.0  # calibrated to ablate


def test_strengths_of_the_other_operations_multiply_what_is_calibrated() -> None:
    assert Use(make_vector(calibration=Calibration(0.4)), -2.0).amount == pytest.approx(-0.8)
    assert Use(make_circuit(operation="shift", calibration=Calibration(6.0)), 0.5).amount == 3.0


def test_half_an_ablation_takes_out_half_of_what_lies_along_the_direction(llama: Tiny) -> None:
    vector = ablating((2,), seed=6, model=llama.lm.reference)
    ids = torch.tensor([llama.lm.prompt_ids("the cat")])
    unit = vector.directions[2] / vector.directions[2].norm()

    def along(strength: float) -> Tensor:
        """Of what comes out of block 2, seen at the door of block 3."""
        seen: list[Tensor] = []
        with own_hooks([(llama.blocks[3], lambda _, inputs: seen.append(inputs[0].clone()))], before=True):
            batch_logits(llama.lm, [Recipe.of((vector, strength))], ids, None)
        return seen[0] @ unit

    before = along(0.0)
    for strength, share in ((1.0, 0.0), (0.5, 0.5), (-1.0, 2.0), (2.0, -1.0)):
        assert torch.allclose(along(strength), share * before, atol=2e-4 * float(before.abs().max()))


def test_overlapping_ablations_leave_exactly_the_orthogonal_complement(llama: Tiny) -> None:
    vectors = [ablating((1,), seed=seed, model=llama.lm.reference) for seed in range(4)]
    near = ablating(
        (1,),
        seed=9,
        model=llama.lm.reference,
        directions={1: vectors[0].directions[1] + 0.01 * vectors[1].directions[1]},
    )
    ids = torch.tensor([llama.lm.prompt_ids("the cat sings")])
    seen: list[Tensor] = []
    for recipe in (UNSTEERED, Recipe.of(*vectors, near)):
        with own_hooks([(llama.blocks[2], lambda _, inputs: seen.append(inputs[0].clone()))], before=True):
            batch_logits(llama.lm, [recipe], ids, None)
    basis = torch.linalg.qr(torch.stack([vector.directions[1] for vector in vectors], 1).double()).Q
    plain, found = (hidden[0].double() for hidden in seen)
    assert torch.allclose(found, plain - plain @ basis @ basis.T, atol=1e-4 * float(plain.abs().max()))


def test_recipes_scale_all_their_strengths_and_multipliers() -> None:
    recipe = Recipe.of((VECTOR, 2.0), Use(SCALING, multiplier=3.0), SHIFTING).scaled(-0.5)
    # 3 lies 2 above 1; minus half of that lies 1 below.
    assert [use.amount for use in recipe.uses] == pytest.approx([-1.0 * 0.3, 0.0, -0.5 * 6.0])


@pytest.mark.parametrize("given", [float("nan"), float("inf"), "1", None, True])
def test_strengths_and_multipliers_are_finite_numbers(given: Any) -> None:
    with pytest.raises(UsageError, match="finite"):
        Use(VECTOR, given)
    if given is not None:
        with pytest.raises(UsageError, match="finite"):
            Use(SCALING, multiplier=given)
    with pytest.raises(UsageError, match="strength, not a multiplier"):
        Use(SHIFTING, multiplier=2.0)


# --- positions, padding, the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "first:2", "last:2", "last:999"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["with cache", "without cache"])
def test_greedy_steered_texts_are_those_of_a_naive_loop(each: Tiny, positions: Positions, use_cache: bool) -> None:
    """Rows of different prompts and recipes, padded into one batch, each as if written alone."""
    names = ["add", "overlapping ablations", "two circuits that share a neuron", "shift", "everything"]
    prompts = [*PROMPTS, PROMPTS[0]]
    rows = [Row(prompt, recipe_for(each, name)) for prompt, name in zip(prompts, names, strict=True)]
    found = Session(each.lm).generate(
        rows, sampling=GREEDY, max_new_tokens=10, positions=positions, use_cache=use_cache
    )
    tokenizer = each.lm.tokenizer
    stop = [tokenizer.eos_token_id]
    for row, name in zip(found, names, strict=True):
        ids = naive_greedy(
            each, each.lm.prompt_ids(row.prompt), writes_of(RECIPES[name]), 10, stop=stop, positions=positions
        )
        assert row.text == tokenizer.decode(ids, skip_special_tokens=True), (row.prompt, name)
        assert row.tokens == len(ids) and row.finish == ("length" if len(ids) == 10 else "stop")


def test_positions_differ_from_one_another(llama: Tiny) -> None:
    recipe = recipe_for(llama, "everything")
    session, found = Session(llama.lm), {}
    options: dict[str, Any] = {"sampling": GREEDY, "max_new_tokens": 12}
    for positions in ("all", "prompt", "generated"):
        found[positions] = session.generate(PROMPTS[2], recipe, positions=positions, **options)[0].text
    assert len(set(found.values())) == 3


def test_padding_is_never_steered(llama: Tiny) -> None:
    """What a steered block returns at padding is what it would return unsteered."""
    ids, mask = padded([llama.lm.prompt_ids(prompt) for prompt in PROMPTS[:2]])
    seen: list[Tensor] = []
    vector = make_vector((1,), seed=1, model=llama.lm.reference)
    with own_hooks([(llama.blocks[2], lambda _, inputs: seen.append(inputs[0].clone()))], before=True):
        for recipe in (UNSTEERED, Recipe.of((vector, 5.0))):
            batch_logits(llama.lm, [recipe] * 2, ids, mask)
    plain, steered = seen
    moved = (steered - plain).abs().sum(-1) > 0
    assert torch.equal(moved, mask.bool())


def test_a_row_in_a_batch_writes_the_text_it_writes_alone(each: Tiny) -> None:
    recipe = recipe_for(each, "everything")
    session = Session(each.lm)
    rows = [Row(prompt, choice, sample) for prompt in PROMPTS for choice in (UNSTEERED, recipe) for sample in (0, 1)]
    for sampling in (GREEDY, Sampling(seed=3), Sampling(seed=3, repetition_penalty=1.3, top_p=0.8)):
        together = session.generate(rows, sampling=sampling, max_new_tokens=8)
        for row, found in list(zip(rows, together, strict=True))[::3]:
            alone = session.generate([row], sampling=sampling, max_new_tokens=8)[0]
            assert (found.text, found.tokens, found.finish) == (alone.text, alone.tokens, alone.finish)


def test_batches_smaller_than_the_rows_give_the_same_texts_in_order(llama: Tiny) -> None:
    rows = [Row(PROMPTS[place % 4], recipe_for(llama, "add") if place % 3 else UNSTEERED, place) for place in range(11)]
    session = Session(llama.lm)
    seen: list[float] = []
    wanted = session.generate(rows, max_new_tokens=5)
    for size in (1, 4, 11, 64):
        found = session.generate(
            rows, max_new_tokens=5, batch_rows=size, progress=lambda _, fraction=None: seen.append(fraction or 0.0)
        )
        assert found == wanted
    assert seen[-1] == 1.0 and seen[:11] == sorted(seen[:11])


@pytest.mark.embedded
def test_greedy_steered_text_of_the_embedded_model_is_the_same_with_and_without_cache_and_padding(
    embedded_lm: LanguageModel,
) -> None:
    shape, reference = embedded_lm.shape, embedded_lm.reference
    generator = torch.Generator().manual_seed(0)
    direction = {14: torch.randn(shape.d_model, generator=generator)}
    recipe = Recipe.of(make_vector(directions=direction, norms={14: 100.0}, model=reference))
    this = Tiny(
        "llama", embedded_lm, list(embedded_lm.blocks), list(embedded_lm.down_projections), embedded_lm.final_norm
    )
    rows = [Row("Tell me about", recipe), Row("Three colours that I like are red,", recipe), Row("Hello", UNSTEERED)]
    options: dict[str, Any] = {"sampling": GREEDY, "max_new_tokens": 6, "raw": True}
    texts = {}
    for use_cache in (True, False):
        texts[use_cache] = [row.text for row in Session(embedded_lm).generate(rows, use_cache=use_cache, **options)]
    assert texts[True] == texts[False]
    assert Session(embedded_lm).generate(rows[:1], **options)[0].text == texts[True][0]
    assert Session(embedded_lm).generate([Row("Tell me about")], **options)[0].text != texts[True][0]
    ids = naive_greedy(this, embedded_lm.prompt_ids("Tell me about", raw=True), writes_of(recipe.uses), 6, stop=[0, 2])
    assert embedded_lm.tokenizer.decode(ids, skip_special_tokens=True) == texts[True][0]


# --- nothing else has a say ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "theirs",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(100))},
        {"begin_suppress_tokens": list(range(200))},
        {"forced_eos_token_id": 7},
        {"min_new_tokens": 9},
        {"min_length": 400},
        {"max_length": 3},
        {"do_sample": True, "temperature": 5.0, "top_k": 3, "top_p": 0.1},
        {"num_beams": 3},
        {"bad_words_ids": [[place] for place in range(120)]},
        {"exponential_decay_length_penalty": (1, 5.0)},
        {"sequence_bias": [[[5], 50.0]]},
        {"use_cache": False},
        {"num_return_sequences": 2, "do_sample": True},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
        {"max_time": 1e-9},
        {"stop_strings": ["e", "a", " "]},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda theirs: next(iter(theirs)),
)
def test_what_a_models_generation_config_holds_has_no_say(theirs: dict[str, Any]) -> None:
    """Published models bring sampling defaults, such as Qwen's repetition penalty, that nobody here asked for."""
    this = make_tiny("qwen2")
    session = Session(this.lm)
    recipe = recipe_for(this, "add")
    wanted = session.generate(PROMPTS[0], recipe, sampling=GREEDY, max_new_tokens=8)
    for name, value in theirs.items():
        setattr(this.model.generation_config, name, value)
    assert session.generate(PROMPTS[0], recipe, sampling=GREEDY, max_new_tokens=8) == wanted


def test_every_end_token_of_the_model_and_the_tokenizer_ends_a_text() -> None:
    this = make_tiny("llama")
    session = Session(this.lm)
    free = naive_greedy(this, this.lm.prompt_ids(PROMPTS[0]), Writes(), 8, stop=[])
    assert len(set(free)) == 8
    for stop in (free[3], [free[5], free[2]]):
        this.model.generation_config.eos_token_id = stop
        stops = stop if isinstance(stop, list) else [stop]
        row = session.generate(PROMPTS[0], sampling=GREEDY, max_new_tokens=8)[0]
        kept = free[: min(free.index(token) for token in stops)]
        assert row.text == this.lm.tokenizer.decode(kept) and row.finish == "stop" and row.tokens == len(kept)


def test_a_row_that_ends_early_does_not_change_the_others() -> None:
    this = make_tiny("llama")
    session = Session(this.lm)
    prompts = [this.lm.prompt_ids(prompt) for prompt in PROMPTS]
    free = [naive_greedy(this, ids, Writes(), 9, stop=[]) for ids in prompts]
    this.model.generation_config.eos_token_id = free[1][2]
    found = session.generate([Row(prompt) for prompt in PROMPTS], sampling=GREEDY, max_new_tokens=9)
    for row, ids in zip(found, free, strict=True):
        kept = ids[: ids.index(free[1][2])] if free[1][2] in ids else ids
        assert row.text == this.lm.tokenizer.decode(kept, skip_special_tokens=True)
    assert found[1].finish == "stop" and found[1].tokens == 2


# --- chance ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_text_and_another_seed_or_sample_another(llama: Tiny) -> None:
    session = Session(llama.lm)

    def text(seed: int, sample: int) -> str:
        return session.generate([Row("the cat", sample=sample)], sampling=Sampling(seed=seed), max_new_tokens=12)[
            0
        ].text

    assert text(1, 0) == text(1, 0)
    assert len({text(1, 0), text(2, 0), text(1, 1), text(2, 1)}) == 4


def test_an_unsteered_text_and_its_steered_twin_draw_the_same_random_numbers(llama: Tiny) -> None:
    rows = [Row("the cat", UNSTEERED), Row("the cat", Recipe.of((make_vector(model=llama.lm.reference), 1e-9)))]
    plain, twin = Session(llama.lm).generate(rows, max_new_tokens=16, sampling=Sampling(temperature=1.5))
    assert plain.text == twin.text


# --- streaming -------------------------------------------------------------------------------------------------------


def drain(stream: Iterator[Step]) -> tuple[list[Step], list[Row]]:
    steps = []
    while True:
        try:
            steps.append(next(stream))
        except StopIteration as finished:
            return steps, finished.value


def test_the_pieces_of_a_stream_make_up_the_texts(each: Tiny) -> None:
    rows = [Row(PROMPTS[place % 4], recipe_for(each, "add"), place) for place in range(5)]
    steps, found = drain(Session(each.lm).stream(rows, max_new_tokens=20, batch_rows=2))
    joined = [""] * 5
    for step in steps:
        for offset, piece in enumerate(step.pieces):
            joined[step.first + offset] += piece
    assert joined == [row.text for row in found]
    assert all(joined) and [step.first for step in steps] == sorted(step.first for step in steps)
    assert found == Session(each.lm).generate(rows, max_new_tokens=20)


def test_pieces_come_while_the_model_is_still_writing(llama: Tiny) -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with own_hooks([(llama.blocks[0], count)], before=True):
        stream = Session(llama.lm).stream("the cat", max_new_tokens=200, sampling=GREEDY)
        next(stream)
        at_first_piece = calls
        drain(stream)
    assert (at_first_piece < 150 and calls >= 150) or calls < 200  # it may end early by itself


def test_cancelling_mid_way_keeps_the_text_so_far_and_leaves_no_hooks(llama: Tiny) -> None:
    whole = Session(llama.lm).generate("we", recipe_for(llama, "add"), sampling=GREEDY, max_new_tokens=150)[0]
    cancel = threading.Event()
    stream = Session(llama.lm).stream(
        "we", recipe_for(llama, "add"), sampling=GREEDY, max_new_tokens=150, cancel=cancel
    )
    for _ in range(5):
        next(stream)
    cancel.set()
    _, rows = drain(stream)
    assert rows[0].finish == "cancelled" and 5 <= rows[0].tokens < whole.tokens
    assert whole.text.startswith(rows[0].text.rstrip("�")) and rows[0].text
    assert hook_count(llama.model) == 0


def test_once_cancelled_later_batches_are_not_begun(llama: Tiny) -> None:
    cancel, calls = threading.Event(), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        cancel.set()

    with own_hooks([(llama.blocks[0], count)], before=True):
        rows = Session(llama.lm).generate(
            [Row("we", sample=n) for n in range(6)], batch_rows=1, cancel=cancel, max_new_tokens=9
        )
    assert [row.finish for row in rows] == ["cancelled"] * 6
    assert [row.tokens for row in rows] == [1, 0, 0, 0, 0, 0]
    assert calls == 1


def test_the_callers_cancel_event_is_only_ever_set_by_the_caller(llama: Tiny) -> None:
    """One event may stand for one button: that a text was finished does not press it."""
    cancel = threading.Event()
    first = Session(llama.lm).generate("we", cancel=cancel, max_new_tokens=6, sampling=GREEDY)
    assert not cancel.is_set()
    assert Session(llama.lm).generate("we", cancel=cancel, max_new_tokens=6, sampling=GREEDY) == first


def test_closing_the_iterator_early_stops_the_thread_and_leaves_no_hooks(llama: Tiny) -> None:
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with own_hooks([(llama.blocks[0], count)], before=True):
        stream: Any = Session(llama.lm).stream("we", recipe_for(llama, "add"), max_new_tokens=200, sampling=GREEDY)
        next(stream)
        stream.close()
        at_close = calls
        assert hook_count(llama.model) == 1  # that of this test
    assert calls == at_close < 100


def test_an_interrupt_in_the_consumer_ends_the_work_at_once(llama: Tiny) -> None:
    """As when somebody presses Ctrl-C while waiting for the next piece."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    with own_hooks([(llama.blocks[0], count)], before=True):
        stream: Any = Session(llama.lm).stream(
            "the cat", recipe_for(llama, "add"), max_new_tokens=200, sampling=Sampling(seed=4)
        )
        next(stream)
        with pytest.raises(KeyboardInterrupt):
            stream.throw(KeyboardInterrupt())
    assert calls < 100
    assert hook_count(llama.model) == 0


def test_an_exception_in_the_model_reaches_the_consumer_once_and_leaves_no_hooks(llama: Tiny) -> None:
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise MemoryError("out of memory")

    with own_hooks([(llama.blocks[2], fail)], before=True):
        stream = Session(llama.lm).stream("we", recipe_for(llama, "everything"), max_new_tokens=50, sampling=GREEDY)
        with pytest.raises(MemoryError, match="out of memory"):
            drain(stream)
        assert hook_count(llama.model) == 1  # that of this test
        with pytest.raises(StopIteration):
            next(stream)
    assert Session(llama.lm).generate("we", max_new_tokens=2)[0].tokens > 0


def test_two_threads_that_steer_in_opposite_directions_never_mix(llama: Tiny) -> None:
    vector = make_vector((0, 1, 2, 3), seed=1, model=llama.lm.reference)
    session = Session(llama.lm)
    rows = {sign: [Row(prompt, Recipe.of((vector, 4.0 * sign))) for prompt in PROMPTS] for sign in (1, -1, 0)}
    wanted = {sign: session.generate(batch, sampling=GREEDY, max_new_tokens=6) for sign, batch in rows.items()}
    assert all(len({wanted[sign][row].text for sign in wanted}) == 3 for row in range(len(PROMPTS)))
    wrong: list[tuple[int, list[Row]]] = []
    together = threading.Barrier(3)

    def steer(sign: int) -> None:
        together.wait()
        for _ in range(12):
            found = session.generate(rows[sign], sampling=GREEDY, max_new_tokens=6)
            if found != wanted[sign]:
                wrong.append((sign, found))

    threads = [threading.Thread(target=steer, args=(sign,)) for sign in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert hook_count(llama.model) == 0


# --- sweeps ----------------------------------------------------------------------------------------------------------


def test_a_sweep_is_every_prompt_and_sample_at_every_strength(llama: Tiny) -> None:
    vector = make_vector(seed=1, model=llama.lm.reference)
    found = Session(llama.lm).sweep(vector, [-1.0, 0.0, 2.0], PROMPTS[:2], samples=2, max_new_tokens=5)
    assert [(row.strength, row.prompt, row.sample) for row in found] == [
        (strength, prompt, sample) for strength in (-1.0, 0.0, 2.0) for prompt in PROMPTS[:2] for sample in (0, 1)
    ]
    for row in found[::5]:
        alone = Session(llama.lm).generate(
            [Row(row.prompt, Recipe.of((vector, row.strength)), row.sample)], max_new_tokens=5
        )
        assert alone[0].text == row.text


@pytest.mark.parametrize(("strengths", "prompts", "samples"), [([], ["a"], 1), ([1.0], [], 1), ([1.0], ["a"], 0)])
def test_a_sweep_of_nothing_is_a_users_mistake(strengths: list[float], prompts: list[str], samples: int) -> None:
    with pytest.raises(UsageError, match="at least one"):
        sweep_rows(Recipe.of(VECTOR), strengths, prompts, samples=samples)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"max_new_tokens": 4097}, "max_new_tokens"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": True}, "max_new_tokens"),
        ({"positions": "first"}, "all, prompt, generated"),
        ({"batch_rows": 0}, "batch_rows"),
        ({"batch_rows": -1}, "batch_rows"),
        ({"batch_rows": 2.0}, "batch_rows"),
    ],
    ids=str,
)
def test_an_option_out_of_its_range_is_a_users_mistake(llama: Tiny, options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Session(llama.lm).generate("we", **options)


@pytest.mark.parametrize("prompt", ["", [], [Row("")], [Row("fine"), Row([])]])
def test_an_empty_prompt_is_a_users_mistake(llama: Tiny, prompt: Any) -> None:
    with pytest.raises(UsageError):
        Session(llama.lm).generate(prompt)


def test_a_prompt_without_a_single_token_is_a_users_mistake() -> None:
    tokenizer = word_tokenizer()
    lm = describe_model(tiny("llama").model, tokenizer, name="words", chat=False)
    original = tokenizer.backend_tokenizer.post_processor
    try:
        tokenizer.backend_tokenizer.post_processor = None  # no <s>, so blanks leave nothing
        assert lm.prompt_ids("  ") == []
        with pytest.raises(UsageError):
            Session(lm).generate("  ")
    finally:
        tokenizer.backend_tokenizer.post_processor = original


@pytest.mark.parametrize("prompts", [["the cat", "the dog"], ["the cat", Row("the dog")], [1, 2], 5])
def test_anything_but_rows_or_one_prompt_is_a_users_mistake(llama: Tiny, prompts: Any) -> None:
    with pytest.raises(UsageError):
        Session(llama.lm).generate(prompts)


@pytest.mark.parametrize("message", [{"role": "user"}, {"content": "x"}, {}], ids=str)
def test_a_message_without_role_or_content_is_a_clear_error(llama: Tiny, message: dict[str, str]) -> None:
    from neurosteer.errors import NeuroSteerError

    rows = [Row([{"role": "user", "content": "the cat"}])]
    assert Session(llama.lm).generate(rows, max_new_tokens=2, sampling=GREEDY)[0].text == (
        Session(llama.lm).generate("the cat", max_new_tokens=2, sampling=GREEDY)[0].text
    )
    try:
        Session(llama.lm).generate([Row([message])], max_new_tokens=2)
    except NeuroSteerError as error:
        assert "\n" not in str(error)


def test_a_prompt_too_long_for_the_model_is_a_users_mistake(llama: Tiny) -> None:
    one = len(llama.lm.prompt_ids("a a", raw=True))
    fitting = "a" + " a" * (254 - (one - 1))  # 254 tokens more or less; the model takes 256
    ids = llama.lm.prompt_ids(fitting, raw=True)
    room = 256 - len(ids)
    assert room > 0
    session = Session(llama.lm)
    assert session.generate([Row(fitting)], raw=True, max_new_tokens=room)[0].finish in ("length", "stop")
    with pytest.raises(UsageError) as error:
        session.generate([Row("fine"), Row(fitting)], raw=True, max_new_tokens=room + 1)
    assert str(len(ids)) in str(error.value) and "256" in str(error.value) and "shorten" in str(error.value)


def test_an_artifact_of_another_shape_is_refused_before_anything_is_written(llama: Tiny) -> None:
    wide = replace(llama.lm.reference, d_model=2 * D_MODEL)
    vector = make_vector(directions={1: torch.ones(2 * D_MODEL)}, norms={1: 1.0}, model=wide)
    with (
        own_hooks([(llama.blocks[0], lambda *_: pytest.fail("the model was run"))], before=True),
        pytest.raises(MismatchError),
    ):
        Session(llama.lm).generate("we", Recipe.of(vector))


def test_an_artifact_of_other_weights_is_warned_about_once(llama: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    stranger = make_vector(model=replace(llama.lm.reference, fingerprint="other"))
    session = Session(llama.lm)
    with caplog.at_level(logging.WARNING, logger="neurosteer"):
        for _ in range(3):
            session.generate([Row("we", Recipe.of(stranger)), Row("we", Recipe.of(stranger))], max_new_tokens=1)
    assert [record.getMessage().count("other weights") for record in caplog.records] == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_steers_in_its_own_type(dtype: torch.dtype) -> None:
    this = make_tiny("llama")
    this.model.to(dtype)
    uses = [Use(replace(use.artifact, model=this.lm.reference), use.strength) for use in RECIPES["everything"]]
    ids = torch.tensor([this.lm.prompt_ids("the cat")])
    found = batch_logits(this.lm, [Recipe(tuple(uses)), UNSTEERED], ids.repeat(2, 1), None)
    assert found.dtype == dtype and bool(found.isfinite().all())
    assert Session(this.lm).generate("we", Recipe(tuple(uses)), max_new_tokens=4)[0].tokens > 0
    assert this.lm.n_layers == N_LAYERS


def test_a_stream_goes_on_in_another_thread_as_if_nothing_had_happened(llama: Tiny) -> None:
    """Web servers ask for each item of an iterator in whatever thread is free."""
    rows = [Row("one two"), Row("one two", Recipe.of((make_vector(), 4.0)))]
    options: dict[str, Any] = {"max_new_tokens": 8, "sampling": Sampling(greedy=True)}
    wanted = [row.text for row in Session(llama.lm).generate(rows, **options)]
    assert wanted[0] != wanted[1]
    stream, texts = Session(llama.lm).stream(rows, **options), ["", ""]

    def take() -> None:
        for row, piece in enumerate(next(stream).pieces):
            texts[row] += piece
        assert hook_count(llama.model) == 0

    with ThreadPoolExecutor(max_workers=1) as other:
        for turn in range(9):
            try:
                take() if turn % 2 else other.submit(take).result()
            except StopIteration:
                break
    assert texts == wanted


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["with cache", "without cache"])
def test_positions_are_the_same_inside_a_multimodal_model(positions: Positions, use_cache: bool) -> None:
    """It hands its text model masks as a dict, and the cache by another name."""
    this = tiny_wrapped()
    names = ["add", "overlapping ablations", "shift"]
    rows = [Row(prompt, recipe_for(this, name)) for prompt, name in zip(PROMPTS, names, strict=False)]
    options: dict[str, Any] = {"sampling": GREEDY, "max_new_tokens": 6, "positions": positions, "use_cache": use_cache}
    for row, name in zip(Session(this.lm).generate(rows, **options), names, strict=True):
        wanted = naive_greedy(
            this, this.lm.prompt_ids(row.prompt), writes_of(RECIPES[name]), 6, stop=[], positions=positions
        )
        assert list(row.ids) == wanted, name


def test_a_plan_for_some_positions_only_must_be_told_the_columns(llama: Tiny) -> None:
    plan = compile_plan(llama.lm, [recipe_for(llama, "add")], "prompt")
    with pytest.raises(ValueError, match="columns"), applied(llama.lm, plan):
        pytest.fail("the block must not be entered")


# --- beyond what numbers can hold ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "strength"), [(torch.float32, 1e300), (torch.float16, 1e6), (torch.bfloat16, 1e38)])
@pytest.mark.parametrize("name", ["add", "shift", "scale"])
def test_what_the_models_dtype_cannot_hold_is_refused_before_anything_is_written(
    dtype: torch.dtype, strength: float, name: str
) -> None:
    this = make_tiny("llama")
    this.model.to(dtype)
    recipe = Recipe((fits(this, {"add": Use(VECTOR), "shift": Use(SHIFTING), "scale": Use(SCALING)}[name]),))
    too_strong = recipe.scaled(strength * 1e3 if strength < 1e300 else strength)
    for refused in (compile_plan, lambda lm, recipes: Session(lm).stream([Row("we", recipes[0])])):
        with pytest.raises(UsageError, match="can hold; use a smaller one") as error:
            next(refused(this.lm, [too_strong]))  # type: ignore[call-overload]
        assert "\n" not in str(error.value) and recipe.uses[0].artifact.name in str(error.value)


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(), Sampling(temperature=1e-300)], ids=["greedy", "drawn", "cold"]
)
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_row_whose_logits_are_no_numbers_ends_alone_with_an_error(
    llama: Tiny, sampling: Sampling, broken: float
) -> None:
    """Those of the steered row, from its third token on; the others are written to their end."""
    recipe = recipe_for(llama, "add")
    rows = [Row("we"), Row("the cat sings", recipe), Row("bread"), Row("they")]
    options: dict[str, Any] = {"max_new_tokens": 9, "sampling": sampling}
    wanted = Session(llama.lm).generate(rows, **options)
    steps = 0

    def spoil(_module: Any, _inputs: Any, logits: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == 3:
            logits = logits.clone()
            logits[1, :, 7] = broken
        return logits

    pieces: list[str] = [""] * 4
    with own_hooks([(llama.model.lm_head, spoil)]), pytest.raises(UsageError, match="After 2 tokens") as error:
        for step in Session(llama.lm).stream(rows, **options):
            pieces = [text + piece for text, piece in zip(pieces, step.pieces, strict=True)]
    assert recipe.uses[0].artifact.name in str(error.value) and "\n" not in str(error.value)
    assert [pieces[place] for place in (0, 2, 3)] == [wanted[place].text for place in (0, 2, 3)]
    assert len(pieces[1]) < len(wanted[1].text)


def test_a_stream_of_another_dtype_than_the_models_keeps_it(llama: Tiny) -> None:
    """Some models keep the residual stream in float32 while their weights are in half precision."""
    recipe = Recipe(tuple(fits(llama, use) for use in RECIPES["everything"]))
    seen: list[torch.dtype] = []
    this = make_tiny("llama")
    this.model.to(torch.bfloat16)
    plan = compile_plan(this.lm, [recipe])
    hidden = torch.randn(1, 3, D_MODEL, dtype=torch.float16)
    for layer in plan.additions:
        block = torch.nn.Identity()
        lm = replace(this.lm, blocks=tuple(block if at == layer else other for at, other in enumerate(this.lm.blocks)))
        with applied(lm, plan):
            seen.append(block(hidden).dtype)
    assert set(seen) == {torch.float16}
