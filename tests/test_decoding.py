"""Choosing tokens and turning them into text, against transformers, numpy and frequencies."""

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny, byte_tokenizer, fallback_tokenizer
from transformers import RepetitionPenaltyLogitsProcessor

from neurosteer.errors import UsageError
from neurosteer.steering import decoding
from neurosteer.steering.decoding import NOT_FINITE, RowText, Sampler, Sampling, draw, next_tokens
from neurosteer.steering.session import Row, Session


def nucleus(scores: np.ndarray, top_p: float) -> dict[int, float]:
    """Tokens of the smallest set whose probability reaches `top_p`, with their probabilities within it."""
    probabilities = np.exp(scores - scores.max())
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p * (1 - 1e-7))) + 1
    kept = order[:count]
    return {int(token): float(probabilities[token] / probabilities[kept].sum()) for token in kept}


def drawn(scores: torch.Tensor, top_p: float, n: int) -> np.ndarray:
    """Shares of each token when the draws are spread evenly over [0, 1)."""
    draws = (torch.arange(n) + 0.5) / n
    tokens = draw(scores.expand(n, -1), top_p, draws)
    return np.bincount(tokens.numpy(), minlength=scores.shape[-1]) / n


def samplers(sampling: Sampling, streams: Iterable[object]) -> list[Sampler]:
    return [Sampler(sampling, str(stream)) for stream in streams]


# --- the nucleus -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.7, 0.95, 1.0])
@pytest.mark.parametrize(("vocabulary", "spread"), [(7, 2.0), (300, 3.0), (1000, 2.0), (1000, 0.01)])
def test_shares_of_the_tokens_are_those_of_the_nucleus(top_p: float, vocabulary: int, spread: float) -> None:
    scores = torch.randn(vocabulary, generator=torch.Generator().manual_seed(vocabulary)) * spread
    n = 4000
    found, wanted = drawn(scores, top_p, n), nucleus(scores.double().numpy(), top_p)
    for token, share in enumerate(found):
        assert share == pytest.approx(wanted.get(token, 0.0), abs=1.5 / n)  # even draws: off by one at either end


def test_seeded_draws_follow_the_nucleus_within_chance() -> None:
    scores = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 1.5
    n = 20_000
    wanted = nucleus(scores.double().numpy(), 0.9)
    rows = samplers(Sampling(temperature=1.0, top_p=0.9, seed=5), range(n))
    found = np.bincount(next_tokens(scores.expand(n, -1), rows, [[0]] * n).numpy(), minlength=40)
    chi_square = sum((found[token] - n * share) ** 2 / (n * share) for token, share in wanted.items())
    assert found.sum() == n == sum(found[token] for token in wanted)
    assert chi_square < len(wanted) - 1 + 5 * np.sqrt(2 * len(wanted))


@pytest.mark.parametrize(
    ("top_p", "count"), [(0.499, 1), (0.501, 2), (0.749, 2), (0.751, 3), (0.874, 3), (0.876, 4), (0.937, 4), (1.0, 5)]
)
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float, count: int) -> None:
    scores = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()
    assert np.count_nonzero(drawn(scores, top_p, 1000)) == count


def test_a_nucleus_that_reaches_top_p_exactly_takes_no_further_token() -> None:
    assert np.count_nonzero(drawn(torch.zeros(2), 0.5, 1000)) == 1
    assert np.count_nonzero(drawn(torch.zeros(4), 0.75, 1000)) == 3
    assert np.count_nonzero(drawn(torch.zeros(512), 0.625, 1000)) == 320


def test_a_nucleus_wider_than_the_candidates_at_hand_is_sorted_whole() -> None:
    assert decoding._CANDIDATES == (256, 4096)
    flat = torch.randn(2000, generator=torch.Generator().manual_seed(3)) * 0.3
    peaked = flat.clone()
    peaked[5] = 50.0
    tokens = draw(torch.stack([flat, peaked]).repeat(2000, 1), 0.95, ((torch.arange(4000) // 2) + 0.5) / 2000)
    wide = set(tokens[::2].tolist())
    assert len(wide) > 256 and wide <= set(nucleus(flat.double().numpy(), 0.95))
    assert set(tokens[1::2].tolist()) == {5}


def test_the_shortcut_and_the_full_sort_choose_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.randn(300, 1500, generator=torch.Generator().manual_seed(4)) * torch.linspace(0.2, 6, 300)[:, None]
    draws = torch.rand(300, generator=torch.Generator().manual_seed(5))
    found = draw(scores, 0.9, draws)
    monkeypatch.setattr(decoding, "_CANDIDATES", ())
    assert torch.equal(found, draw(scores, 0.9, draws))


@pytest.mark.parametrize("at", [0.0, 1.0 - 2**-24, 1.0])
def test_the_ends_of_the_draw_are_the_first_and_the_last_of_the_nucleus(at: float) -> None:
    scores = torch.randn(50, generator=torch.Generator().manual_seed(6))
    kept = list(nucleus(scores.double().numpy(), 0.8))
    token = int(draw(scores[None], 0.8, torch.tensor([at]))[0])
    assert token == (kept[0] if at == 0.0 else kept[-1])


def test_tokens_ruled_out_are_never_drawn() -> None:
    scores = torch.full((1, 600), -torch.inf)
    scores[0, [3, 599]] = 0.0
    found = {int(draw(scores, 1.0, torch.tensor([at]))[0]) for at in (0.0, 0.3, 0.49, 0.51, 0.9, 1.0)}
    assert found == {3, 599}


def test_temperature_divides_the_scores() -> None:
    scores = torch.randn(30, generator=torch.Generator().manual_seed(7))
    n = 5000
    found = next_tokens(scores.expand(n, -1), samplers(Sampling(temperature=0.5, top_p=1.0), range(n)), [[0]] * n)
    shares = np.bincount(found.numpy(), minlength=30) / n
    wanted = torch.softmax(scores.double() * 2, -1).numpy()
    assert np.abs(shares - wanted).max() < 5 * np.sqrt(0.25 / n)


def test_greedy_takes_the_likeliest_token() -> None:
    scores = torch.zeros(3, 30)
    scores[[0, 1, 2], [4, 29, 0]] = 1.0
    assert next_tokens(scores, samplers(Sampling(greedy=True), "abc"), [[0]] * 3).tolist() == [4, 29, 0]


def test_a_rows_draws_depend_on_its_own_stream_alone() -> None:
    scores = torch.randn(1, 200, generator=torch.Generator().manual_seed(8))

    def tokens(streams: list[str], row: int) -> list[int]:
        rows, found = samplers(Sampling(seed=9), streams), []
        for _ in range(20):
            found.append(int(next_tokens(scores.repeat(len(rows), 1), rows, [[0]] * len(rows))[row]))
            for sampler in rows:
                sampler.advance()
        return found

    assert tokens(["x"], 0) == tokens(["a", "b", "x"], 2) == tokens(["x", "a"], 0)
    assert tokens(["x"], 0) != tokens(["y"], 0)
    assert tokens(["x", "x"], 0) == tokens(["x", "x"], 1)


def test_rows_of_one_batch_follow_each_their_own_settings() -> None:
    settings = [
        Sampling(seed=3),
        Sampling(greedy=True),
        Sampling(temperature=3.0, top_p=0.5),
        Sampling(temperature=0.3, repetition_penalty=4.0, seed=1),
        Sampling(greedy=True, repetition_penalty=9.0),
        Sampling(top_p=0.1),
    ]
    scores = torch.randn(6, 300, generator=torch.Generator().manual_seed(2)) * 2
    seen = [[int(scores[row].argmax()), 5, row] for row in range(6)]
    for trial in range(30):
        rows = [Sampler(sampling, f"{trial}") for sampling in settings]
        alone = [int(next_tokens(scores[[row]], [rows[row]], [seen[row]])) for row in range(6)]
        assert next_tokens(scores, rows, seen).tolist() == alone
        assert alone[1] == seen[1][0] and alone[4] != seen[4][0]


def test_the_number_that_decides_a_token_stays_until_the_token_has_come() -> None:
    """A step that failed is tried again, and must then choose as it would have."""
    sampler, again = (Sampler(Sampling(seed=4), "x") for _ in range(2))
    numbers = []
    for _ in range(3):
        numbers.append(sampler.number)
        assert sampler.number == numbers[-1]
        sampler.advance()
    assert len(set(numbers)) == 3 and again.number == numbers[0]


# --- the repetition penalty ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.7, 1.3, 5.0])
def test_the_repetition_penalty_is_that_of_transformers_on_an_unpadded_row(penalty: float) -> None:
    generator = torch.Generator().manual_seed(10)
    prompts = [torch.randint(1, 40, (length,), generator=generator) for length in (3, 9, 1)]
    new = torch.randint(1, 40, (3, 4), generator=generator)
    scores = torch.randn(3, 40, generator=generator)
    kept = scores.clone()
    seen = [torch.cat([prompt, more]) for prompt, more in zip(prompts, new, strict=True)]
    rows = samplers(Sampling(greedy=True, repetition_penalty=penalty), "abc")
    found = decoding._penalised(scores, rows, [ids.tolist() for ids in seen])
    for row, ids in enumerate(seen):
        processor: Any = RepetitionPenaltyLogitsProcessor(penalty)
        assert torch.equal(found[row : row + 1], processor(ids[None], scores[row : row + 1].clone()))
    assert torch.equal(scores, kept), "what generation still holds was changed"
    assert torch.equal(found[0, 0], scores[0, 0]), "a token that has not come was penalised"


def test_a_text_under_a_repetition_penalty_is_that_of_generate_alone(each: Tiny) -> None:
    ids = each.lm.prompt_ids("the cat sings")
    with torch.no_grad():
        wanted = each.model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=12,
            repetition_penalty=1.5,
            eos_token_id=each.lm.tokenizer.eos_token_id,
            pad_token_id=0,
        )[0, len(ids) :]
    rows = [Row("the cat sings"), Row("a much, much longer prompt than the other one")]
    sampling = Sampling(greedy=True, repetition_penalty=1.5)
    found = Session(each.lm).generate(rows, sampling=sampling, max_new_tokens=12)[0]
    assert found.text == each.lm.tokenizer.decode(wanted, skip_special_tokens=True)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["temperature", "top_p", "repetition_penalty"])
@pytest.mark.parametrize(
    "value", [0, -0.1, 10.5, float("nan"), float("inf"), "1", None, True, 10**400], ids=lambda v: str(v)[:10]
)
def test_settings_out_of_their_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name) as error:
        Sampling(**{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seed", [1.5, "1", None, True])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(UsageError, match="seed"):
        Sampling(seed=seed)
    assert Sampling(seed=-(10**30)).seed == -(10**30)


def test_the_ends_of_the_ranges_are_allowed() -> None:
    assert Sampling(temperature=10.0, top_p=1.0, repetition_penalty=10.0, seed=0)
    assert Sampling(temperature=1e-6, top_p=1e-6, repetition_penalty=1e-6)


def test_a_tiny_temperature_is_greedy(llama: Tiny) -> None:
    session = Session(llama.lm)
    greedy = session.generate("we", sampling=Sampling(greedy=True), max_new_tokens=10)
    assert session.generate("we", sampling=Sampling(temperature=1e-6, top_p=1.0), max_new_tokens=10) == greedy
    assert session.generate("we", sampling=Sampling(temperature=10.0, top_p=1e-6), max_new_tokens=10) == greedy


# --- text ------------------------------------------------------------------------------------------------------------

TEXTS = [
    "plain text, with punctuation. Yes?",
    "naïve café — “quotes” …",
    "日本語は一番です",
    "😀👍🏽👩‍👩‍👧 flags 🇩🇪",
    "mixed 日 a 😀 b ñ\nnew line\ttab",
    "عربى हिन्दी ไทย",
    "  leading and  double  blanks ",
]
TOKENIZERS = {"byte-level": byte_tokenizer, "byte fallback": fallback_tokenizer}


def stream_of(tokenizer: Any, ids: list[int], stop: list[int]) -> tuple[RowText, list[str]]:
    """Feed ids as generation does, one token a step."""
    text = RowText(tokenizer, stop)
    return text, [*(text.push(token) for token in ids), text.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_characters_of_many_bytes_come_whole_and_pieces_make_up_the_text(name: str) -> None:
    tokenizer: Any = TOKENIZERS[name]()
    end = tokenizer.eos_token_id
    rows = [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in TEXTS]
    assert any(len(row) > len(text) + 2 for row, text in zip(rows, TEXTS, strict=True)), (
        "no character takes several tokens"
    )
    for place, ids in enumerate(rows):
        text, pieces = stream_of(tokenizer, [*ids, 0, 0], [end])  # what comes after the end is no part of it
        assert "".join(pieces) == text.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert not any("�" in piece for piece in pieces)
        assert text.text.strip() == TEXTS[place].strip()
        assert text.stopped and text.ids == ids[:-1]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_character_appears_with_its_last_byte_and_not_later(name: str) -> None:
    tokenizer: Any = TOKENIZERS[name]()
    ids = tokenizer("x😀y日", add_special_tokens=False)["input_ids"]
    text = RowText(tokenizer, [])
    for count, token in enumerate(ids, start=1):
        text.push(token)
        whole = tokenizer.decode(ids[:count])
        if not whole.endswith("�"):
            assert text.text == whole


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_text_cut_inside_a_character_ends_as_decoding_it_whole_does(name: str) -> None:
    tokenizer: Any = TOKENIZERS[name]()
    ids = tokenizer("ab 😀", add_special_tokens=False)["input_ids"][:-1]
    text, pieces = stream_of(tokenizer, ids, [])
    assert text.text == "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_not_part_of_the_text_and_the_end_ends_it() -> None:
    tokenizer: Any = byte_tokenizer()
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ab, cd = (tokenizer(text)["input_ids"] for text in ("ab", "cd"))
    going_on, ended = (stream_of(tokenizer, [*ab, token, *cd], [end])[0] for token in (start, end))
    assert (going_on.text, going_on.stopped, going_on.ids) == ("abcd", False, [*ab, start, *cd])
    assert (ended.text, ended.stopped, ended.ids) == ("ab", True, ab)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(seed=st.integers(0, 1 << 30), length=st.integers(1, 25))
def test_any_sequence_of_tokens_streams_to_what_decoding_it_whole_gives(name: str, seed: int, length: int) -> None:
    """Models under strong steering write all sorts of things, such as bytes that make no character.

    What such bytes are shown as is open: with byte fallback they turn characters before them into question marks too.
    """
    tokenizer: Any = TOKENIZERS[name]()
    rng = random.Random(seed)
    multibyte = [token for text in TEXTS for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    ids = [rng.choice(multibyte) if rng.random() < 0.5 else rng.randrange(len(tokenizer)) for _ in range(length)]
    text, pieces = stream_of(tokenizer, ids, [])
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(pieces) == text.text
    assert text.ids == ids
    assert text.text == whole or (name == "byte fallback" and "�" in whole)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_stray_byte_after_a_character_written_as_bytes_is_no_error(name: str) -> None:
    """With byte fallback the second byte here makes "I" unreadable in hindsight."""
    tokenizer: Any = TOKENIZERS[name]()
    if name == "byte fallback":
        ids = tokenizer.convert_tokens_to_ids(["<0x49>", "<0xE8>", "th", "<0x49>", "he"])
    else:
        ids = [tokenizer("I")["input_ids"][0], tokenizer("日")["input_ids"][0], *tokenizer("thIhe")["input_ids"]]
    text, pieces = stream_of(tokenizer, ids, [])
    assert "".join(pieces) == text.text
    assert text.text.endswith("thIhe") and "�" in text.text


def test_ids_beyond_the_tokenizer_are_no_text() -> None:
    """A model's vocabulary may be padded beyond its tokenizer's, as Qwen's is."""
    tokenizer: Any = byte_tokenizer()
    ab = tokenizer("ab")["input_ids"]
    assert stream_of(tokenizer, [ab[0], len(tokenizer) + 5, *ab[1:]], [])[0].text == "ab"


@pytest.mark.parametrize("sampling", [Sampling(greedy=True), Sampling(), Sampling(repetition_penalty=1.5)], ids=repr)
def test_scores_that_are_no_numbers_give_no_token_and_change_no_other_rows(sampling: Sampling) -> None:
    scores = torch.randn(5, 700, generator=torch.Generator().manual_seed(9))
    wanted = next_tokens(scores, samplers(sampling, range(5)), [[0]] * 5).tolist()
    scores[1] = float("nan")
    scores[2, 30] = float("nan")
    scores[3, 600] = float("inf")
    scores[4] = -float("inf")
    found = next_tokens(scores, samplers(sampling, range(5)), [[0]] * 5).tolist()
    assert found == [wanted[0], NOT_FINITE, NOT_FINITE, NOT_FINITE, NOT_FINITE]


def test_a_temperature_next_to_0_is_greedy() -> None:
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(10)) * 5
    cold = Sampling(temperature=1e-300)
    assert next_tokens(scores, samplers(cold, range(3)), [[0]] * 3).tolist() == scores.argmax(-1).tolist()
