"""Rows that join and leave a batch between steps, against one unpadded row at a time without a cache."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tiny import (
    WINDOW,
    Tiny,
    Writes,
    ablating,
    clamping,
    make_circuit,
    make_tiny,
    make_vector,
    naive_greedy,
    naive_logits,
    own_hooks,
    tiny_next,
    writes_of,
)
from torch import Tensor

from neurosteer.artifacts.recipes import UNSTEERED, Positions, Recipe
from neurosteer.artifacts.strength import Calibration
from neurosteer.models.caching import can_change
from neurosteer.steering.batches import Batch, RowInFlight
from neurosteer.steering.decoding import RowText, Sampler, Sampling
from neurosteer.steering.plans import applied, compile_plan, compile_rows, join_plans, steered_places

PROMPTS = ["the cat sings", "we", "bread and cheese under the dark mountain, again. Why?", "日本 😀", "never again, it"]
GREEDY = Sampling(greedy=True)


def recipes(this: Tiny) -> list[Recipe]:
    """One of each operation, and a mixture."""
    model = this.lm.reference
    vector, other = make_vector((1, 2), seed=1, model=model), make_vector((2, 3), seed=2, model=model)
    scaling = make_circuit(seed=3, calibration=Calibration(4.0), model=model)
    shifting = make_circuit([(1, 5), (2, 7)], seed=5, operation="shift", calibration=Calibration(6.0), model=model)
    clamp = clamping((1, 3), seed=4, model=model)
    return [
        UNSTEERED,
        Recipe.of((vector, 1.5)),
        Recipe.of(ablating((0, 2), seed=6, model=model)),
        Recipe.of((scaling, 1.0)),
        Recipe.of((shifting, -1.0)),
        Recipe.of((clamp, 2.0)),
        Recipe.of((other, -0.7), (scaling, 0.5), (clamp, -1.0), ablating((2,), seed=7, model=model)),
    ]


def writing(
    this: Tiny,
    prompt: str,
    recipe: Recipe = UNSTEERED,
    positions: Positions = "all",
    *,
    most: int = 100,
    raw: bool = False,
) -> RowInFlight:
    sampler, text = Sampler(GREEDY, prompt), RowText(this.lm.tokenizer, [])
    return RowInFlight(this.lm.prompt_ids(prompt, raw=raw), recipe, positions, most, sampler, text)


def steered(positions: Positions, prompt: int) -> Any:
    return {
        "all": lambda _: True,
        "prompt": lambda place: place < prompt,
        "generated": lambda place: place >= prompt,
    }[positions]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


class Watched(Batch):
    """A batch that holds every row's logits of every step against those of the row alone."""

    this: Tiny

    def _next_scores(self) -> Tensor:
        self.rows = [(one, one.ids, one.ended) for one in self.writings]
        self.scores = super()._next_scores()
        return self.scores

    def step(self) -> dict[RowInFlight, str]:
        pieces = super().step()
        for (one, ids, ended), scores in zip(self.rows, self.scores, strict=True):
            if ended:
                continue
            where = steered(one.positions, len(one.prompt))
            wanted = naive_logits(self.this, ids, writes_of(one.recipe.uses), where)[-1]
            assert relative(scores, wanted) < 1e-4, (one.positions, len(one.prompt), len(ids))
        return pieces


def watched(this: Tiny, writings: Sequence[RowInFlight]) -> Watched:
    batch = Watched(this.lm, writings)
    batch.this = this
    return batch


def test_rows_that_join_and_leave_have_the_logits_that_they_have_alone(each: Tiny) -> None:
    """Prompts shorter and longer than a sliding window, read at once or in parts, joining batches shorter and longer
    than it, and leaving so that columns of padding go: before the window is full and after."""
    rng, whole = random.Random(5), recipes(each)
    assert min(len(each.lm.prompt_ids(prompt, raw=True)) for prompt in PROMPTS) < WINDOW
    assert max(len(each.lm.prompt_ids(prompt)) for prompt in PROMPTS) > 2 * WINDOW
    choices: list[Positions] = ["all", "prompt", "generated"]
    for raw in (True, False) * 3:
        batch, waiting = None, rng.sample(whole, len(whole))
        while waiting or (batch is not None and batch.writings):
            new = [
                writing(
                    each,
                    rng.choice(PROMPTS),
                    waiting.pop(),
                    rng.choice(choices),
                    most=rng.randint(1, 14),
                    raw=raw,
                )
                for _ in range(min(rng.randint(0, 2), len(waiting)))
            ]
            if new:
                newcomers = watched(each, new)
                while rng.random() < 0.6 and newcomers.unread > 1:
                    newcomers.read(rng.randint(1, newcomers.unread - 1))
                newcomers.step()
                assert newcomers.unread == 1
                if batch is None or not batch.writings:
                    batch = newcomers
                else:
                    batch.join(newcomers)
            if batch is None or not batch.writings:
                continue
            if rng.random() < 0.3:
                batch.leave([rng.choice(batch.writings)])
            if batch.ended:
                batch.leave(batch.writings[:])
            else:
                batch.step()
                most = max(len(one) for one in batch.writings)
                assert batch.ids.shape[1] == most or any(one.ended for one in batch.writings), "padding was kept"


def test_a_writing_goes_on_in_another_batch_where_it_was(each: Tiny) -> None:
    for positions in ("all", "prompt", "generated"):
        recipe = recipes(each)[-1]
        wanted = naive_greedy(
            each, each.lm.prompt_ids(PROMPTS[2]), writes_of(recipe.uses), 9, stop=[], positions=positions
        )
        one = writing(each, PROMPTS[2], recipe, positions)
        for steps in (1, 3, 5):
            batch = Batch(each.lm, [writing(each, "we"), one])
            for _ in range(steps):
                batch.step()
        assert one.text.ids == wanted


def test_a_row_that_has_ended_leaves_by_itself_and_takes_no_more(llama: Tiny) -> None:
    short, long = writing(llama, PROMPTS[2], most=2), writing(llama, "we", most=6)
    batch = Batch(llama.lm, [short, long])
    pieces = [batch.step() for _ in range(6)]
    assert [set(step) for step in pieces] == [{short, long}] * 2 + [{long}] * 4
    assert batch.writings == [long] and batch.ended and len(short.text.ids) == 2
    assert batch.ids.shape[1] == len(long)
    assert [one.text.ids for one in (short, long)] == [
        naive_greedy(llama, one.prompt, Writes(), one.max_new_tokens, stop=[]) for one in (short, long)
    ]


def test_a_step_that_fails_leaves_the_writings_as_they_were(llama: Tiny) -> None:
    ones = [writing(llama, prompt) for prompt in PROMPTS[:3]]
    batch = Batch(llama.lm, ones)
    batch.step()
    before = [(one.ids, one.sampler.number, one.text.text) for one in ones]
    handle = llama.blocks[2].register_forward_hook(lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            batch.step()
    finally:
        handle.remove()
    assert [(one.ids, one.sampler.number, one.text.text) for one in ones] == before


def test_a_batch_of_a_model_with_states_that_cannot_be_moved_keeps_its_rows() -> None:
    this = tiny_next()
    assert not can_change(this.lm)
    short, long = writing(this, "the cat sings", most=2), writing(this, "we", most=5)
    batch = Batch(this.lm, [short, long])
    while not batch.ended:
        batch.step()
    assert batch.writings == [short, long]
    for one in (short, long):
        alone = writing(this, "the cat sings" if one is short else "we", most=one.max_new_tokens)
        own = Batch(this.lm, [alone])
        while not own.ended:
            own.step()
        assert alone.text.ids == one.text.ids and len(one.text.ids) == one.max_new_tokens


def test_every_named_architecture_can_change(each: Tiny) -> None:
    assert can_change(each.lm)


# --- plans of rows that differ ---------------------------------------------------------------------------------------


def test_rows_of_one_plan_are_steered_at_their_own_positions(each: Tiny) -> None:
    recipe = recipes(each)[-1]
    ids = each.lm.prompt_ids(PROMPTS[2])
    cases: list[tuple[Positions, int]] = [("all", 0), ("prompt", 3), ("prompt", 6), ("generated", 3), ("generated", 6)]
    plan = compile_plan(each.lm, [recipe] * len(cases), [positions for positions, _ in cases])
    where = steered_places(plan.positions, range(len(ids)), [0] * len(cases), [ends for _, ends in cases])
    with torch.no_grad(), applied(each.lm, plan, where):
        found = each.model(torch.tensor([ids] * len(cases)), use_cache=False).logits
    for row, (positions, ends) in enumerate(cases):
        wanted = naive_logits(each, ids, writes_of(recipe.uses), steered(positions, ends))
        assert relative(found[row], wanted) < 1e-4, (positions, ends)


def test_joined_plans_are_the_plan_of_all_their_rows(llama: Tiny) -> None:
    """Each of one row or several, with and without layers and neurons that others have too."""
    whole = recipes(llama)
    positions: list[Positions] = ["all", "prompt", "generated", "all", "all", "prompt", "all"]
    ids = torch.tensor([llama.lm.prompt_ids(PROMPTS[2])])
    rows = compile_rows(llama.lm, whole, positions)
    for parts in ([[0], [1, 2], [3, 4, 5, 6]], [[6, 1, 6]], [[5], [0]], [[2, 3], [0, 0], [6, 4]]):
        order = [row for part in parts for row in part]
        joined = join_plans([join_plans([rows[row] for row in part]) for part in parts])
        assert joined.positions == tuple(positions[row] for row in order)
        where = steered_places(joined.positions, range(ids.shape[1]), [0] * len(order), [4] * len(order))
        with torch.no_grad(), applied(llama.lm, joined, where):
            found = llama.model(ids.repeat(len(order), 1), use_cache=False).logits
        for place, row in enumerate(order):
            wanted = naive_logits(llama, ids[0].tolist(), writes_of(whole[row].uses), steered(positions[row], 4))
            assert relative(found[place], wanted) < 1e-4, (parts, row)


# --- rows that have ended --------------------------------------------------------------------------------------------


def test_rows_that_have_ended_are_let_go_a_quarter_at_a_time_and_the_others_texts_are_theirs(each: Tiny) -> None:
    """Taking rows out copies all the others, so it must not happen for every single one."""
    ones = [
        writing(each, PROMPTS[place % len(PROMPTS)], recipes(each)[place % 7], most=2 + place) for place in range(8)
    ]
    batch, left = watched(each, ones), []
    real = batch.leave
    batch.leave = lambda rows: (left.append(len(rows)) if rows else None, real(rows))  # type: ignore[assignment,func-returns-value]
    while not batch.ended:
        batch.step()
    assert left == [2, 2, 1, 1, 1]
    assert all(len(one.text.ids) == one.max_new_tokens for one in ones)


def test_a_row_that_has_ended_never_leaves_the_positions_that_the_model_knows() -> None:
    """It stays in the batch for a while, and learned positions (GPT-2's) end."""
    this = make_tiny("gpt2")
    limit = this.lm.max_positions
    assert limit == 256
    short = [writing(this, prompt, most=40) for prompt in PROMPTS]
    long = RowInFlight([5] * (limit - 1), UNSTEERED, "all", 1, Sampler(GREEDY, ""), RowText(this.lm.tokenizer, []))
    batch = watched(this, [long, *short])
    while not batch.ended:
        batch.step()
    assert {len(one.text.ids) for one in short} == {40}


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
def test_a_step_reads_one_column_under_a_cache_and_the_whole_text_without(each: Tiny, positions: Positions) -> None:
    """A cache that a new version of transformers takes no notice of would show here, not in the texts."""
    columns: list[int] = []
    embedding = each.model.get_input_embeddings()
    hook = (embedding, lambda _, inputs: columns.append(inputs[0].shape[1]))
    prompt = len(each.lm.prompt_ids(PROMPTS[0]))
    for use_cache, wanted in ((True, [prompt, 1, 1, 1]), (False, [prompt + step for step in range(4)])):
        columns.clear()
        batch = Batch(each.lm, [writing(each, PROMPTS[0], recipes(each)[1], positions, most=4)], use_cache=use_cache)
        with own_hooks([hook], before=True):
            while not batch.ended:
                batch.step()
        assert columns == wanted
