"""Reading activations: every statistic against a loop that reads one text at a time, unbatched and unpadded."""

import threading
from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from tiny import (
    D_MODEL,
    N_LAYERS,
    Tiny,
    hook_count,
    make_tiny,
    naive_states,
    own_hooks,
    pool,
    positions_read,
    texts,
    tiny_next,
)
from torch import Tensor

from neurosteer.errors import Cancelled, ExamplesError, UsageError
from neurosteer.models.batching import length_batches
from neurosteer.models.framing import MAX_PROMPT_TOKENS, MAX_RAW_PROMPT_TOKENS, FramedText
from neurosteer.reading import tally
from neurosteer.reading.loop import read_activations
from neurosteer.reading.request import Request
from neurosteer.reading.sink import sum_device
from neurosteer.reading.statistics import Activations

ALL = tuple(range(N_LAYERS))
POSITIVE, NEGATIVE = texts(7, seed=1), texts(9, seed=2)
HELD_POSITIVE, HELD_NEGATIVE = (1, 4), (0, 5, 8)
TOKENS: tuple[Literal["mean", "last"], ...] = ("mean", "last")


def request(**changes: Any) -> Request:
    return Request(**{"residual": ALL, "neurons": ALL, "rows": ALL, "batch_tokens": 150, **changes})


class Naive:
    """What a loop over the texts finds: rows by class `[n_layers, n, d]`, and all norms `[n_layers, tokens]`."""

    def __init__(self, this: Tiny, positive: Sequence[str], negative: Sequence[str], tokens: str, framing: str = "raw"):
        self.residual: list[Tensor] = []
        self.neurons: list[Tensor] = []
        norms: list[Tensor] = []
        self.n_tokens = 0
        for side in (positive, negative):
            residual_rows, neuron_rows = [], []
            for text in side:
                ids, start = self.frame(this, text, framing)
                residual, neurons = naive_states(this, ids)
                residual_rows.append(pool(residual, len(ids), tokens, start))
                neuron_rows.append(pool(neurons, len(ids), tokens, start))
                norms.append(torch.linalg.vector_norm(residual, dim=-1)[:, positions_read(len(ids), start)])
                self.n_tokens += len(ids)
            self.residual.append(torch.stack(residual_rows, 1))
            self.neurons.append(torch.stack(neuron_rows, 1))
        self.norms = torch.cat(norms, 1).median(1).values

    @staticmethod
    def frame(this: Tiny, text: str, framing: str) -> tuple[list[int], int]:
        tokenizer = this.lm.tokenizer
        if framing == "raw":
            return tokenizer(text)["input_ids"], 0
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        user = f"<|im_start|>user\n{text if framing == 'prompt' else ''}<|im_end|>\n<|im_start|>assistant\n"
        turn = tokenizer(user, add_special_tokens=False)["input_ids"]
        header = len(tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"])
        return (turn, header) if framing == "prompt" else (turn + plain, len(turn))


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= tolerance * (1 + wanted.abs().max()))


def agree(found: Activations, naive: Naive, layers: Sequence[int] = ALL) -> None:
    for layer in layers:
        rows = [side[layer] for side in naive.residual]
        assert close(found.residual[layer].positive, rows[0].mean(0))
        assert close(found.residual[layer].negative, rows[1].mean(0))
        assert close(found.residual[layer].difference, rows[0].mean(0) - rows[1].mean(0))
        assert found.norms[layer] == pytest.approx(float(naive.norms[layer]), rel=0.005)


def test_the_naive_loop_sees_the_hidden_states_that_transformers_reports(each: Tiny) -> None:
    other = make_tiny(each.architecture, bos=each.architecture.startswith("gemma"))  # asking for them leaves hooks
    ids = each.lm.prompt_ids("the cat sings")
    with torch.no_grad():
        states = other.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    residual, _ = naive_states(each, ids)
    for layer in ALL[:-1]:  # the last entry of hidden_states is behind the final norm
        assert torch.equal(residual[layer], states[layer + 1][0])
    with torch.no_grad():
        assert torch.equal(each.norm(residual[-1]), states[-1][0])


@pytest.mark.parametrize("tokens", TOKENS)
def test_means_variances_rows_and_norms_are_those_of_a_loop(each: Tiny, tokens: Literal["mean", "last"]) -> None:
    found = read_activations(each.lm, POSITIVE, NEGATIVE, request(tokens=tokens))
    naive = Naive(each, POSITIVE, NEGATIVE, tokens)
    agree(found, naive)
    for layer in ALL:
        for name, side in (("positive", 0), ("negative", 1)):
            assert close(getattr(found.rows[layer], name), naive.residual[side][layer])
            neurons = naive.neurons[side][layer]
            assert close(getattr(found.neurons[layer], name), neurons.mean(0))
            variance = neurons.double().var(0, correction=0).float()
            assert close(getattr(found.neurons[layer], f"{name}_variance"), variance, 1e-4)
        assert found.rows[layer].positive.dtype == found.neurons[layer].positive.dtype == torch.float32
    assert (found.n_texts, found.n_tokens, found.n_cut) == (16, naive.n_tokens, 0)
    assert found.model == each.lm.reference


@pytest.mark.parametrize("framing", ["answer", "raw"])
def test_answers_are_read_after_their_own_prompt_and_only_their_own_tokens_count(llama: Tiny, framing: Any) -> None:
    conversation = [turn("user", "we run"), turn("assistant", "they sing"), turn("user", "the cat")]
    prompts: list[Any] = ["the cat sings", conversation, "we run", "the cat sings"]
    answers, tokenizer = ["we never sing", "the dog runs", "they run home", "a bird"], llama.lm.tokenizer
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        turns = [turn("user", prompt)] if isinstance(prompt, str) else prompt
        if framing == "answer":
            rendered = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in turns)
            start = tokenizer(f"{rendered}<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        else:
            start = tokenizer("".join(f"{one['content']}\n" for one in turns))["input_ids"]
        ids = start + tokenizer(answer, add_special_tokens=False)["input_ids"]
        rows.append(naive_states(llama, ids)[0][:, len(start) :].mean(1))
    found = read_activations(llama.lm, answers[:2], answers[2:], request(framing=framing), prompts=prompts)
    for layer in ALL:
        assert close(found.residual[layer].positive, torch.stack([row[layer] for row in rows[:2]]).mean(0))
        assert close(found.residual[layer].negative, torch.stack([row[layer] for row in rows[2:]]).mean(0))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_of_a_prompt_that_is_too_long_the_end_is_kept_and_the_text_counted_as_cut(llama: Tiny) -> None:
    long = " ".join(["the cat sings"] * 2000)
    for framing, most in (("answer", MAX_PROMPT_TOKENS), ("raw", MAX_RAW_PROMPT_TOKENS)):
        cut, whole = llama.lm.frame(["we run", "we run"], framing, max_tokens=512, prompts=[long, "the cat"])  # pyright: ignore[reportArgumentType]
        assert (cut.start, cut.cut, whole.cut) == (most, True, False)
        assert cut.ids[cut.start :] == whole.ids[whole.start :]
    with pytest.raises(UsageError, match="framing 'prompt' reads texts as requests, but these answer prompts"):
        llama.lm.frame(["we run"], "prompt", max_tokens=512, prompts=["the cat"])


@pytest.mark.parametrize("tokens", TOKENS)
def test_held_out_rows_and_the_difference_without_them_are_those_of_a_loop(
    each: Tiny, tokens: Literal["mean", "last"]
) -> None:
    found = read_activations(
        each.lm,
        POSITIVE,
        NEGATIVE,
        request(tokens=tokens),
        held_out_positive=HELD_POSITIVE,
        held_out_negative=HELD_NEGATIVE,
    )
    naive = Naive(each, POSITIVE, NEGATIVE, tokens)
    agree(found, naive)  # the class means are over all texts, held out or not
    for layer in ALL:
        rows = [side[layer] for side in naive.residual]
        left = [[place for place in range(len(side)) if place not in held]
                for side, held in ((POSITIVE, HELD_POSITIVE), (NEGATIVE, HELD_NEGATIVE))]  # fmt: skip
        held_out = found.held_out[layer]
        assert close(held_out.rows.positive, rows[0][list(HELD_POSITIVE)])
        assert close(held_out.rows.negative, rows[1][list(HELD_NEGATIVE)])
        assert close(held_out.difference, rows[0][left[0]].mean(0) - rows[1][left[1]].mean(0))


def test_without_held_out_texts_there_are_none(llama: Tiny) -> None:
    assert read_activations(llama.lm, POSITIVE, NEGATIVE, request()).held_out == {}


@pytest.mark.parametrize("framing", ["prompt", "answer"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_framed_texts_are_read_where_the_framing_says(
    each: Tiny, framing: Literal["prompt", "answer"], tokens: Literal["mean", "last"]
) -> None:
    """Whatever is shared between the rows of a batch, each is read as if it had been alone."""
    naive = Naive(each, POSITIVE, NEGATIVE, tokens, framing)
    for budget in (1, 200, 100_000):
        found = read_activations(
            each.lm, POSITIVE, NEGATIVE, request(framing=framing, tokens=tokens, batch_tokens=budget)
        )
        agree(found, naive)
        assert found.n_tokens == naive.n_tokens
        for layer in ALL:
            assert close(found.rows[layer].positive, naive.residual[0][layer])
            assert close(found.neurons[layer].negative, naive.neurons[1][layer].mean(0))


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_text_without_a_token_to_read_is_in_nothing_and_counted(llama: Tiny, tokens: Literal["mean", "last"]) -> None:
    """In raw framing without a BOS, the one token of a text is where models keep what has nothing to do with it."""
    assert [len(llama.lm.tokenizer(text)["input_ids"]) for text in ("a", "b", "")] == [1, 1, 0]
    positive, negative = [POSITIVE[0], "a", *POSITIVE[1:], ""], ["b", *NEGATIVE]
    held = {"held_out_positive": (1, 2, 5), "held_out_negative": (0, 1)}
    left = {"held_out_positive": (1, 4), "held_out_negative": (0,)}
    found = read_activations(llama.lm, positive, negative, request(tokens=tokens), **held)
    wanted = read_activations(llama.lm, POSITIVE, NEGATIVE, request(tokens=tokens), **left)
    naive = Naive(llama, POSITIVE, NEGATIVE, tokens)
    agree(found, naive)
    assert (found.n_texts, found.n_positive, found.n_tokens, found.n_short) == (16, 7, naive.n_tokens, 3)
    for layer in ALL:
        assert close(found.rows[layer].positive, naive.residual[0][layer])
        assert close(found.rows[layer].negative, naive.residual[1][layer])
        assert close(found.neurons[layer].positive_variance, wanted.neurons[layer].positive_variance)
        assert close(found.held_out[layer].difference, wanted.held_out[layer].difference)
        assert close(found.held_out[layer].rows.positive, wanted.held_out[layer].rows.positive)
        assert close(found.held_out[layer].rows.negative, wanted.held_out[layer].rows.negative)


def test_of_a_pair_with_a_text_too_short_neither_is_read(llama: Tiny) -> None:
    found = read_activations(llama.lm, ["a", *POSITIVE], ["we sing", *NEGATIVE[:7]], request(), paired=True)
    wanted = read_activations(llama.lm, POSITIVE, NEGATIVE[:7], request(), paired=True)
    assert found.n_short == 2
    assert close(found.rows[1].positive - found.rows[1].negative, wanted.rows[1].positive - wanted.rows[1].negative)


def test_a_class_of_texts_too_short_is_refused(llama: Tiny) -> None:
    with pytest.raises(ExamplesError, match="Every negative text is too short"):
        read_activations(llama.lm, POSITIVE, ["a", "b"], request())


@pytest.mark.parametrize("framing", ["prompt", "answer"])
def test_a_beginning_is_shared_only_where_the_model_can_repeat_what_it_remembers(
    framing: Literal["prompt", "answer"],
) -> None:
    this = tiny_next()
    naive = Naive(this, POSITIVE, NEGATIVE, "mean", framing)
    found = read_activations(this.lm, POSITIVE, NEGATIVE, request(framing=framing, batch_tokens=1))
    agree(found, naive)


def test_pooling_in_parts_is_pooling_at_once(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "_POOLED_AT_ONCE", 3 * 12 * D_MODEL)
    agree(
        read_activations(llama.lm, POSITIVE, NEGATIVE, request(batch_tokens=10_000)),
        Naive(llama, POSITIVE, NEGATIVE, "mean"),
    )


def test_sums_of_what_an_apple_gpu_computes_are_kept_where_float64_is() -> None:
    assert sum_device(torch.device("mps")) == torch.device("cpu")
    assert sum_device(torch.device("cuda:1")) == torch.device("cuda:1")


def test_the_longest_texts_come_first_and_batches_keep_to_both_budgets() -> None:
    items = [FramedText([0] * length, 0, False) for length in (3, 9, 1, 9, 4, 30, 2)]
    counts = [1, 5, 1, 5, 1, 2, 1]
    batches = list(length_batches(items, 18, counts=counts, most=6))
    assert sorted(place for batch in batches for place in batch) == list(range(7))
    assert batches[0] == [5] and batches[1] == [1]  # too long by itself; then the two of 9 count 10 together
    for batch in batches[1:]:
        assert len(batch) * max(len(items[place].ids) for place in batch) <= 18
        assert sum(counts[place] for place in batch) <= 6


def test_a_subset_of_layers_is_read_as_it_is_among_all(each: Tiny) -> None:
    found = read_activations(each.lm, POSITIVE, NEGATIVE, request(residual=(0, 2), neurons=(1,), rows=(2,)))
    assert (set(found.residual), set(found.neurons), set(found.rows), set(found.norms)) == ({0, 2}, {1}, {2}, {0, 2})
    naive = Naive(each, POSITIVE, NEGATIVE, "mean")
    agree(found, naive, (0, 2))
    assert close(found.neurons[1].positive, naive.neurons[0][1].mean(0))
    assert close(found.rows[2].negative, naive.residual[1][2])


def test_batches_of_one_text_and_one_big_batch_agree(each: Tiny) -> None:
    held: dict[str, Any] = {"held_out_positive": HELD_POSITIVE, "held_out_negative": HELD_NEGATIVE}
    alone, together = (
        read_activations(each.lm, POSITIVE, NEGATIVE, request(batch_tokens=budget), **held) for budget in (1, 100_000)
    )
    for layer in ALL:
        for one, other in (
            (alone.residual[layer].positive, together.residual[layer].positive),
            (alone.residual[layer].difference, together.residual[layer].difference),
            (alone.neurons[layer].negative, together.neurons[layer].negative),
            (alone.neurons[layer].positive_variance, together.neurons[layer].positive_variance),
            (alone.rows[layer].positive, together.rows[layer].positive),
            (alone.held_out[layer].difference, together.held_out[layer].difference),
            (alone.held_out[layer].rows.negative, together.held_out[layer].rows.negative),
        ):
            assert close(one, other)
        assert alone.norms[layer] == pytest.approx(together.norms[layer], rel=0.005)
    assert alone.n_tokens == together.n_tokens


def shapes_read(this: Tiny, budget: int) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []

    def look(_module: Any, inputs: Any) -> None:
        seen.append(tuple(inputs[0].shape[:2]))

    with own_hooks([(this.downs[0], look)], before=True):
        read_activations(this.lm, POSITIVE, NEGATIVE, request(batch_tokens=budget))
    return seen


def test_a_batch_padded_holds_no_more_tokens_than_its_budget(llama: Tiny) -> None:
    longest = max(len(ids) for ids in llama.lm.tokenizer([*POSITIVE, *NEGATIVE])["input_ids"])
    shapes = shapes_read(llama, 2 * longest)
    assert sum(rows for rows, _ in shapes) == len(POSITIVE) + len(NEGATIVE)
    assert len(shapes) > 2
    assert all(rows * width <= 2 * longest for rows, width in shapes)
    assert all(rows == 1 for rows, _ in shapes_read(llama, 1))


def test_texts_longer_than_max_tokens_are_cut_and_counted(llama: Tiny) -> None:
    long = ["the cat sings slowly under the dark mountain", "a dog"]
    found = read_activations(llama.lm, long, ["we", "bread"], request(max_tokens=5))
    first_five = llama.lm.tokenizer(long[0])["input_ids"][:5]
    states, _ = naive_states(llama, first_five)
    assert found.n_cut == 1
    assert close(found.rows[3].positive[0], states[3, 1:].mean(0))


@pytest.mark.parametrize("last", [0, 1, 3])
def test_the_pass_stops_after_the_last_block_asked_for_and_never_reaches_the_head(each: Tiny, last: int) -> None:
    calls: dict[str, int] = {}

    def count(name: str) -> Any:
        return lambda *_: calls.__setitem__(name, calls.get(name, 0) + 1)

    watched = [(block, count(f"block {place}")) for place, block in enumerate(each.blocks)]
    with own_hooks(
        [*watched, (each.norm, count("norm")), (each.model.get_output_embeddings(), count("head"))], before=True
    ):
        read_activations(
            each.lm, POSITIVE, NEGATIVE, request(residual=(last,), neurons=(0,), rows=(), batch_tokens=10_000)
        )
    assert calls == {f"block {place}": 1 for place in range(last + 1)}


def test_neurons_alone_are_read_to_their_last_block(llama: Tiny) -> None:
    found = read_activations(llama.lm, POSITIVE, NEGATIVE, request(residual=(), neurons=(0, 2), rows=()))
    naive = Naive(llama, POSITIVE, NEGATIVE, "mean")
    assert not found.residual and not found.norms
    assert close(found.neurons[2].difference, naive.neurons[0][2].mean(0) - naive.neurons[1][2].mean(0))


def test_the_model_is_as_it_was_after_reading(llama: Tiny) -> None:
    ids = torch.tensor([llama.lm.prompt_ids("the cat")])
    with torch.no_grad():
        before = llama.model(ids).logits
        read_activations(llama.lm, POSITIVE, NEGATIVE, request(residual=(1,), neurons=(), rows=()))
        assert torch.equal(llama.model(ids).logits, before)
    assert hook_count(llama.model) == 0


def test_progress_never_goes_back_and_ends_at_one(llama: Tiny) -> None:
    seen: list[float] = []

    def progress(message: str, fraction: float | None = None) -> None:
        if fraction is not None:
            seen.append(fraction)

    read_activations(
        llama.lm,
        POSITIVE,
        NEGATIVE,
        request(batch_tokens=60),
        progress=progress,
    )
    assert len(seen) > 3
    assert seen == sorted(seen) and seen[0] > 0 and seen[-1] == 1.0


def test_cancelling_stops_between_two_batches_and_leaves_no_hooks(llama: Tiny) -> None:
    cancel, told = threading.Event(), 0

    def progress(message: str, fraction: float | None = None) -> None:
        nonlocal told
        if fraction is not None:
            told += 1
            cancel.set()

    with pytest.raises(Cancelled, match="cancelled"):
        read_activations(llama.lm, POSITIVE, NEGATIVE, request(batch_tokens=1), progress=progress, cancel=cancel)
    assert told == 1
    assert hook_count(llama.model) == 0


def test_an_error_in_the_model_leaves_no_hooks() -> None:
    this = make_tiny("llama")

    def fail(*_: Any) -> None:
        raise MemoryError("out of memory")

    with own_hooks([(this.blocks[1], fail)], before=True), pytest.raises(MemoryError):
        read_activations(this.lm, POSITIVE, NEGATIVE, request())
    assert hook_count(this.model) == 0


def test_reading_from_two_threads_at_once_gives_each_its_own(llama: Tiny) -> None:
    wanted = [read_activations(llama.lm, *sides, request()) for sides in ((POSITIVE, NEGATIVE), (NEGATIVE, POSITIVE))]
    found: dict[int, Activations] = {}

    def read(place: int) -> None:
        sides = ((POSITIVE, NEGATIVE), (NEGATIVE, POSITIVE))[place]
        for _ in range(5):
            found[place] = read_activations(llama.lm, *sides, request(batch_tokens=40))

    threads = [threading.Thread(target=read, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in (0, 1):
        for layer in ALL:
            assert close(found[place].residual[layer].difference, wanted[place].residual[layer].difference)


def test_requests_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="mean, last"):
        Request(residual=(1,), tokens="first")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least one layer"):
        Request()
    with pytest.raises(UsageError, match="Rows"):
        Request(residual=(1,), rows=(2,))


def test_memory_does_not_grow_with_the_number_of_texts_unless_rows_are_asked_for(llama: Tiny) -> None:
    found = read_activations(
        llama.lm, POSITIVE, NEGATIVE, request(rows=()), held_out_positive=(0,), held_out_negative=(1,)
    )
    kept = [found.residual[1].positive, found.neurons[1].positive, found.held_out[1].difference]
    assert [tensor.dim() for tensor in kept] == [1, 1, 1]
    assert found.rows == {}
    assert found.held_out[1].rows.positive.shape == (1, D_MODEL)
