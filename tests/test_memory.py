"""What batches take, counted in bytes as tensors come and go; and what happens where they do not fit."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from families import family_model
from tiny import Tiny, byte_tokenizer, make_tiny, make_vector, texts, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.circuits import attribute
from neurosteer.circuits.relp.linearised import batch_tokens_for, linear_pass
from neurosteer.errors import ModelError
from neurosteer.models import caching, memory
from neurosteer.models.batching import length_batches
from neurosteer.models.caching import gone_on_from, read_beginning
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import describe_model
from neurosteer.models.memory import footprint_of, halving, row_cost
from neurosteer.reading import loop
from neurosteer.reading.loop import read_activations
from neurosteer.reading.request import Request
from neurosteer.steering.forcing import ForcedText, forced_logits

POSITIVE, NEGATIVE = texts(20, seed=1), texts(20, seed=2)
KINDS = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt2")
GB = 10**9
_ATEN = torch.ops.aten
QUESTIONS = (_ATEN._local_scalar_dense.default, _ATEN.item.default, _ATEN.is_nonzero.default)

# --- counting --------------------------------------------------------------------------------------------------------


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of storages made inside the block that are alive, and the most there were at once.

    Runs models without weights too: a question to their numbers ("does the row end in one text?") is answered yes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage() for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        if function in QUESTIONS and args[0].is_meta:
            return True
        found = function(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor) and (storage := one.untyped_storage()) not in given:
                self._add(storage)
        return found

    def _add(self, storage: Any) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage.nbytes())

    def _gone(self, size: int) -> None:
        self.now -= size


@torch.inference_mode()
def peak_of(lm: LanguageModel, rows: int, length: int, before: int) -> int:
    """Bytes of a bare pass of `rows` × `length` tokens that go on from `before` others."""
    named: dict[str, Any] = {"use_cache": False}
    if before:
        beginning = read_beginning(lm, [1] * before)
        assert beginning is not None
        named = {"cache": gone_on_from(beginning), "use_cache": True}
    ids = torch.ones(rows, length, dtype=torch.long, device=lm.device)
    with PeakBytes() as counted:
        lm.decoder(input_ids=ids, **named)
    return counted.peak


def held(cache: Any) -> int:
    """Bytes of keys and values that a cache keeps."""
    tensors = (getattr(layer, key, None) for layer in cache.layers for key in ("keys", "values"))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("before", [0, 30])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_takes_at_most_what_its_footprint_says_and_not_much_less(kind: str, before: int) -> None:
    lm = tiny(kind).lm
    for rows, length in ((8, 20), (40, 10), (2, 100)):
        promised = rows * footprint_of(lm).of_row(length, before)
        assert promised / 5 < peak_of(lm, rows, length, before) <= promised, (rows, length)


@pytest.mark.parametrize("family", ["Mixtral", "DeepSeek V3", "Gemma 4", "BLOOM", "gpt-oss"])
def test_the_footprint_holds_for_experts_latent_keys_and_attention_that_keeps_its_scores(family: str) -> None:
    lm = describe_model(family_model(family), byte_tokenizer(), name=family)
    for rows, length in ((8, 20), (2, 100)):
        assert peak_of(lm, rows, length, 0) <= 1.5 * rows * footprint_of(lm).of_row(length), (rows, length)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_go_on_from_a_beginning_leave_nothing_behind(kind: str) -> None:
    lm, before = tiny(kind).lm, 12
    beginning = read_beginning(lm, list(range(before)))
    assert beginning is not None
    size, copies = held(beginning), gone_on_from(beginning)
    config = lm.model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers: list[Any] = beginning.layers
    columns = [min(before, layer.sliding_window - 1) if layer.is_sliding else before for layer in layers]
    assert size == sum(columns) * heads * width * 2 * 4
    with torch.inference_mode():
        lm.decoder(input_ids=torch.ones(9, 5, dtype=torch.long), cache=copies, use_cache=True)
    assert held(copies) == 0 and held(beginning) == size


@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_pass_takes_at_most_what_relp_counts(kind: str) -> None:
    lm = tiny(kind).lm
    lm = describe_model(lm.model, lm.tokenizer, name="counted")
    linear_pass(lm, [[1, 2]])  # what it looks at only once
    most = batch_tokens_for(lm)
    with PeakBytes() as counted, torch.enable_grad():
        found = linear_pass(lm, [[1] * 20] * 8)
        torch.autograd.grad(found.logits.sum(), found.neurons)
    assert counted.peak / (8 * 20) * most <= 1 << 30


# --- a card of 24 GB -------------------------------------------------------------------------------------------------

LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
CARD, CONTEXT, TEMPLATE = 24 * GB, GB // 2, 36


@pytest.fixture(scope="module")
def llama_8b() -> LanguageModel:
    """Llama 3.1 8B in bfloat16, of the right shapes, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_8B), dtype=torch.bfloat16)
    lm = describe_model(model, byte_tokenizer(), name="Llama 3.1 8B")
    caching._known[lm] = True
    return lm


@pytest.mark.slow
@pytest.mark.parametrize("length", [10, 20, 300])
def test_reading_an_8b_models_examples_fits_a_card_of_24_gb(
    llama_8b: LanguageModel, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = llama_8b
    weights = sum(weight.nbytes for weight in lm.model.parameters())
    assert weights == 16_060_522_496
    monkeypatch.setattr(memory, "free_bytes", lambda _lm: CARD - CONTEXT - weights)
    monkeypatch.setitem(loop._BATCH_TOKENS, "meta", loop._BATCH_TOKENS["cuda"])
    texts_read = [loop.FramedText([1] * length, 0, False)] * 4000
    beginning = read_beginning(lm, [1] * TEMPLATE)
    batches = list(loop._batches(lm, texts_read, beginning, None, True))
    rows = max(map(len, batches))
    assert rows * length > 12_000  # as large as the card computes well, almost
    pooled = rows * 20 * LLAMA_8B["intermediate_size"]
    sums = 32 * 8 * (4 * LLAMA_8B["hidden_size"] + 4 * LLAMA_8B["intermediate_size"]) * 2
    assert weights + CONTEXT + peak_of(lm, rows, length, TEMPLATE) + pooled + sums < 0.9 * CARD
    assert rows * footprint_of(lm).of_row(length, TEMPLATE) <= 0.8 * (CARD - CONTEXT - weights)


def test_a_fuller_gpu_gets_smaller_batches_and_a_cpu_the_same_as_ever(
    llama: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    footprint, items = footprint_of(llama.lm), [ForcedText([1] * 10, 1, 2)] * 300

    def sizes() -> list[int]:
        return [len(batch) for batch in length_batches(items, 1024, cost=row_cost(llama.lm, footprint, 1024, before=9))]

    assert sizes() == [102, 102, 96]
    monkeypatch.setattr(memory, "free_bytes", lambda _lm: int(footprint.of_row(10, 9) * 50 / 0.8) + 1)
    assert sizes() == [50] * 6
    monkeypatch.setattr(memory, "free_bytes", lambda _lm: 0)
    assert sizes() == [1] * 300


# --- what does not fit -----------------------------------------------------------------------------------------------


@contextmanager
def room_for(lm: LanguageModel, rows: int, layer: int = 2) -> Iterator[list[int]]:
    """A device that runs out of memory in a block where more than so many rows pass; the sizes tried."""
    tried: list[int] = []

    def look(_module: Any, arguments: Sequence[Any]) -> None:
        tried.append(len(arguments[0]))
        if tried[-1] > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    handle = lm.blocks[layer].register_forward_pre_hook(look)
    try:
        yield tried
    finally:
        handle.remove()


class Squares:
    """Stands in for an SAE."""

    n_features = 64

    def encode(self, residual: torch.Tensor) -> torch.Tensor:
        return torch.cat([residual, -residual], dim=-1).float().clamp(min=0)

    def chunk_rows(self) -> int:
        return 1 << 20


REQUEST = Request(
    residual=(0, 1, 2, 3), neurons=(0, 1, 2, 3), rows=(1,), framing="answer", encoders={1: Squares()},
    feature_rows=True,
)  # fmt: skip


def statistics(lm: LanguageModel, **named: Any) -> list[torch.Tensor]:
    found = read_activations(lm, POSITIVE, NEGATIVE, REQUEST, held_out_positive=(1, 5), held_out_negative=(2,), **named)
    features = found.features[1]
    means = [one for layer in found.residual.values() for one in (layer.positive, layer.negative)]
    moments = [one for layer in found.neurons.values() for one in (layer.difference, layer.positive_variance)]
    rows = [found.rows[1].positive, found.held_out[3].difference, torch.tensor(list(found.norms.values()))]
    counts = [torch.tensor(features.n_tokens), features.fired, features.sums, features.squares, features.strongest]
    return [*means, *moments, *rows, *counts]


def test_a_batch_that_runs_out_of_memory_is_halved_told_once_and_counted_once(
    llama: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[str] = []
    plain = statistics(llama.lm)
    with room_for(llama.lm, 7) as tried:
        found = statistics(llama.lm, progress=lambda message, fraction=None: told.append(message))
    assert max(tried) > 7 and sum(size > 7 for size in tried) <= 4
    assert sum("out of memory" in record.message for record in caplog.records) == 1
    assert sum("smaller batches" in message for message in told) == 1
    for one, other in zip(plain, found, strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-4, atol=2e-4)


def test_what_comes_after_is_read_in_as_small_parts(llama: Tiny) -> None:
    def run(batch: list[int]) -> int:
        if len(batch) > 3:
            raise torch.OutOfMemoryError
        return sum(batch)

    batches = [list(range(10)), list(range(10, 18)), [18]]
    found = list(halving(llama.lm, batches, run))
    assert [place for batch, _ in found for place in batch] == list(range(19))
    assert [total for _, total in found] == [sum(batch) for batch, _ in found]
    assert [len(batch) for batch, _ in found] == [2, 3, 2, 3, 2, 2, 2, 2, 1]


def test_a_single_text_that_does_not_fit_is_said_in_one_line(llama: Tiny) -> None:
    with room_for(llama.lm, 0), pytest.raises(ModelError, match=r"^A single text does not fit .*\.$"):
        read_activations(llama.lm, POSITIVE, NEGATIVE, Request(residual=(3,)))


def test_texts_under_recipes_are_halved_too(llama: Tiny) -> None:
    forced = [ForcedText(list(range(2, 12)), 4, 10)] * 9
    recipes = [Recipe.of((make_vector(model=llama.lm.reference), float(place))) for place in range(8)] + [UNSTEERED]

    def read() -> torch.Tensor:
        found = torch.zeros(9, 6, llama.model.config.vocab_size)
        for part in forced_logits(llama.lm, forced, recipes):
            found[part.rows, part.steps] = part.logits
        return found

    whole = read()
    with room_for(llama.lm, 2) as tried:
        assert torch.allclose(read(), whole, atol=1e-4)
    assert max(tried) == 9


def test_attribution_is_halved_too() -> None:
    this = make_tiny("llama")
    prompts = ["the cat", "a dog runs", "we never sing", "over the river", "bread and cheese"]

    def scores() -> torch.Tensor:
        return attribute(this.lm, prompts, " cat", keep_universal=True).neuron_scores()

    whole = scores()
    with room_for(this.lm, 2) as tried:
        assert torch.allclose(scores(), whole, atol=1e-5)
    assert max(tried) > 2
