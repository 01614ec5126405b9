"""Whether a GPU computes what it should, how fast, and in how much memory: one Markdown table, exit code 1 if not.

    python tests/benchmarks/gpu_check.py [--minutes 8] [--device cuda:0] [--only NAME]
    python tests/benchmarks/gpu_check.py --tiny --device cpu

Models have the shapes of Llama 3.1 8B and Gemma 3 4B and random weights made on the card; nothing is fetched. What the
library computes is held against code that reads one row at a time, without a cache, with hooks of its own. In float32
(a few blocks of the same width) they must agree to a thousandth of the logits' standard deviation; in half precision,
where texts written twice may part at a near tie, each token that was written must be within a few hundredths (float16)
or a quarter (bfloat16) of one of the naive code's best. `--tiny` is for trying the script itself, on any device.
"""

import argparse
import gc
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import accelerate
import torch
import transformers
from family_check import check_relp, naive_writes
from tiny import WINDOW, WORDS, byte_tokenizer, first, own_hooks, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3Config, LlamaConfig

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.building.build import build
from neurosteer.circuits import attribute
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import calibration_prompts
from neurosteer.measuring.divergence import kl_percentile, unsteered_texts
from neurosteer.models.batching import length_batches, padded
from neurosteer.models.language_model import LanguageModel, fingerprint_of
from neurosteer.models.loading import describe_model, load_model
from neurosteer.reading.loop import _BATCH_TOKENS, read_activations
from neurosteer.reading.request import Request
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session

WITHIN = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
"""How far below the naive code's best a token that was written may be, in standard deviations of the logits."""

SAME = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}
"""How far means of activations may be from the naive code's, as a share of their length."""

LLAMA: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "sliding_window": 1024,
    "max_position_embeddings": 131072, "query_pre_attn_scalar": 256,
}  # fmt: skip
EYES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
TOKENS = 8
CARD = 24.0  # GB that building on these models must fit
TINY_VOCABULARY = 500  # more than the tokenizer knows, as in the large models
NO_ENDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


class Wrong(Exception):
    """A result is not what it has to be."""


def require(right: bool, what: str) -> None:
    if not right:
        raise Wrong(what)


# --- models and texts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """How large everything is; `few` is how many blocks the models in float32 have."""

    tiny: bool
    device: torch.device

    @property
    def few(self) -> int:
        return 4 if self.tiny else 6

    @property
    def n_texts(self) -> int:
        return 12 if self.tiny else 400

    @property
    def long_prompt(self) -> int:
        """Words of a prompt that is longer than Gemma's sliding window."""
        return 3 * WINDOW if self.tiny else 700

    def llama(self, dtype: torch.dtype, layers: int | None = None, **changes: Any) -> LanguageModel:
        if self.tiny:
            return self._described("llama", tiny_config("llama", vocab_size=TINY_VOCABULARY, **changes), dtype)
        layers = layers or LLAMA["num_hidden_layers"]
        config = LlamaConfig(**{**LLAMA, **NO_ENDS, "num_hidden_layers": layers, **changes})
        return self._described("Llama 3.1 8B's shape", config, dtype)

    def gemma(self, dtype: torch.dtype, layers: int | None = None) -> LanguageModel:
        """Wrapped as every Gemma 3 from 4B on is, its eyes as small as can be."""
        text = {**GEMMA, **NO_ENDS, "num_hidden_layers": layers or GEMMA["num_hidden_layers"]}
        text = tiny_config("gemma3", vocab_size=TINY_VOCABULARY).to_dict() if self.tiny else text
        image = text["vocab_size"] - 1
        # Random weights whose head is their embedding hold on to the last word, whatever is done to a few blocks.
        text["tie_word_embeddings"] = False
        config = Gemma3Config(
            text_config=text, vision_config=EYES, mm_tokens_per_image=4, image_token_index=image,
            tie_word_embeddings=False,
        )  # fmt: skip
        return self._described("Gemma 3 4B's shape", config, dtype)

    def _described(self, name: str, config: Any, dtype: torch.dtype) -> LanguageModel:
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 1:  # norms, which begin as ones
                    weight.add_(torch.randn_like(weight) * 0.2)
        model.generation_config.eos_token_id = None
        return describe_model(model, byte_tokenizer(bos=True), name=name, revision="random")


def examples(n: int, words: int, seed: int = 0) -> ContrastSet:
    """`n` + `n` different texts of as many words, 2 to 3 tokens each; the positive ones speak of a happy cat."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < 2 * n:
        found[" ".join(rng.choice(WORDS) for _ in range(words))] = None
    texts = list(found)
    return ContrastSet(tuple(f"happy cat {text}" for text in texts[:n]), tuple(texts[n:]), name="random")


def prompts(scale: Scale) -> list[str]:
    rng = random.Random(1)
    return ["the cat runs", "Why?", " ".join(rng.choice(WORDS) for _ in range(scale.long_prompt))]


# --- naive code ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def naive_logits(
    lm: LanguageModel, ids: Sequence[int], first_place: int, uses: Sequence[tuple[Artifact, float]]
) -> Tensor:
    """What foretells the tokens of one row from `first_place` on, float32 `[n, vocabulary]`."""
    writes, before = [], False
    for artifact, strength in uses:
        more, before = naive_writes(lm, artifact, strength)
        writes += more
    with own_hooks(writes, before=before):
        found = lm.model(input_ids=torch.tensor([list(ids)], device=lm.device), use_cache=False).logits[0]
    return found[first_place - 1 : -1].float()


def lacking(lm: LanguageModel, row: Row) -> float:
    """How far a row's tokens are at most below the naive code's best, in standard deviations of the logits."""
    start = lm.prompt_ids(row.prompt)
    uses = [(use.artifact, use.strength) for use in row.recipe.uses]
    logits = naive_logits(lm, [*start, *row.ids], len(start), uses)
    chosen = logits.gather(1, torch.tensor(row.ids, device=logits.device)[:, None])[:, 0]
    return float(((logits.amax(1) - chosen) / logits.std(1)).max())


@torch.no_grad()
def naive_difference(lm: LanguageModel, sets: ContrastSet, layer: int) -> Tensor:
    """The class difference of the residual stream after a block, texts read as answers, one at a time."""
    means = []
    for texts in (sets.positive, sets.negative):
        rows = []
        for item in lm.frame(list(texts), "answer", max_tokens=512):
            seen: list[Tensor] = []
            with own_hooks(
                [(lm.blocks[layer], lambda _module, _inputs, output, seen=seen: seen.append(first(output)))]
            ):
                lm.decoder(input_ids=torch.tensor([item.ids], device=lm.device), use_cache=False)
            rows.append(seen[0][0, max(item.start, 1) :].float().mean(0))
        means.append(torch.stack(rows).mean(0))
    return (means[0] - means[1]).cpu()


# --- measuring -------------------------------------------------------------------------------------------------------


def settle(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def timed(lm: LanguageModel, work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What came of it, seconds, and the peak of the card's memory above what was there before, in GB."""
    settle(lm.device)
    before = torch.cuda.memory_allocated(lm.device) if lm.device.type == "cuda" else 0
    started = time.perf_counter()
    found = work()
    if lm.device.type != "cuda":
        return found, time.perf_counter() - started, 0.0
    torch.cuda.synchronize(lm.device)
    return found, time.perf_counter() - started, (torch.cuda.max_memory_allocated(lm.device) - before) / 1e9


def bare_pass(lm: LanguageModel, sets: ContrastSet) -> Callable[[], None]:
    """The texts' own tokens once through the decoder, in sorted batches, without a hook."""
    framed = lm.frame([*sets.positive, *sets.negative], "raw", max_tokens=512)
    batches = length_batches(framed, _BATCH_TOKENS.get(lm.device.type, 1024))
    ids = [padded([framed[place].ids for place in places], lm.pad_id).to(lm.device) for places in batches]

    def run() -> None:
        with torch.inference_mode():
            for batch in ids:
                lm.decoder(input_ids=batch, use_cache=False)

    return run


@contextmanager
def little_memory(lm: LanguageModel, peak: float, rows: int) -> Iterator[None]:
    """A card with a third of the memory that a pass took; elsewhere, blocks that fail at more than so many rows."""
    if lm.device.type == "cuda":
        settle(lm.device)
        total = torch.cuda.get_device_properties(lm.device).total_memory
        held = torch.cuda.memory_reserved(lm.device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (held + peak * 1e9 / 3) / total), lm.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, lm.device)
        return

    def fail(_module: Any, inputs: Any) -> None:
        if len(inputs[0]) > rows:
            raise torch.OutOfMemoryError("made up")

    with own_hooks([(lm.blocks[lm.n_layers // 2], fail)], before=True):
        yield


# --- checks ----------------------------------------------------------------------------------------------------------


STRENGTHS = (4.0, 32.0, 256.0, 2048.0)
"""Tried until a text changes: random weights can hold on to a word (few blocks over Gemma's large embeddings do)."""


def written(lm: LanguageModel, artifact: Artifact, asked: Sequence[str], strength: float, *, cache: bool) -> list[Row]:
    """Greedy texts, unsteered and steered in turn, all in one padded batch."""
    rows = [Row(prompt, one) for prompt in asked for one in (UNSTEERED, Recipe.of((artifact, strength)))]
    found = Session(lm).generate(rows, use_cache=cache, max_new_tokens=TOKENS, sampling=Sampling(greedy=True))
    require(all(len(row.ids) == TOKENS or row.finish == "stop" for row in found), "texts are cut short")
    return found


def steered(lm: LanguageModel, artifact: Artifact, scale: Scale, *, naive: LanguageModel | None = None) -> str:
    """Texts in one padded batch, with a cache and without, against the naive code (on another model where asked)."""
    asked = prompts(scale)
    for strength in STRENGTHS:
        cached = written(lm, artifact, asked, strength, cache=True)
        if any(plain.ids != pushed.ids for plain, pushed in zip(cached[::2], cached[1::2], strict=True)):
            break
    else:
        raise Wrong("steering changed nothing")
    uncached = written(lm, artifact, asked, strength, cache=False)
    worst = {
        name: max(lacking(naive or lm, row) for row in rows)
        for name, rows in (("cached", cached), ("uncached", uncached))
    }
    within = WITHIN[lm.dtype]
    figures = ", ".join(f"{name} {value:.2g}" for name, value in worst.items())
    require(max(worst.values()) <= within, f"below the naive best by {figures} s.d. (allowed {within})")
    return f"at most {figures} s.d. below the naive best"


def read_right(lm: LanguageModel, vector: SteeringVector, sets: ContrastSet) -> str:
    worst = 0.0
    for layer in sorted({0, lm.n_layers // 2, lm.n_layers - 1}):
        naive = naive_difference(lm, sets, layer)
        worst = max(worst, float((vector.directions[layer] - naive).norm() / naive.norm()))
    require(worst <= SAME[lm.dtype] * 4, f"class differences are off by {worst:.2g} of their length")
    return f"class differences within {worst:.2g} of naive"


def built(lm: LanguageModel, method: str, sets: ContrastSet, **named: Any) -> str:
    """Building at all layers, from texts as answers, against one bare pass of the texts' tokens."""
    bare = bare_pass(lm, sets)
    bare()
    _, before, bare_peak = timed(lm, bare)
    _, took, peak = timed(lm, lambda: build(lm, sets, method=method, layers="all", calibrate=False, **named))
    _, after, _ = timed(lm, bare)
    floor = (before + after) / 2
    weights = sum(weight.nbytes for weight in lm.model.parameters()) / 1e9
    require(weights + peak < CARD, f"{weights:.1f} + {peak:.1f} GB do not fit a card of {CARD:.0f} GB")
    return f"{took:.2f} s, {took / floor:.2f} × a bare pass; {peak:.2f} GB beside the weights (bare {bare_peak:.2f})"


def calibrated(lm: LanguageModel, sets: ContrastSet) -> str:
    """Strength 1 by measurement, and what it comes to by naive code."""
    made = build(lm, sets, layers=lm.n_layers // 2, calibrate=True)
    found = made.calibration
    if found.kl is None:
        raise Wrong(f"nothing was measured ({found.note})")
    values: list[float] = []
    for text in unsteered_texts(lm, calibration_prompts()).texts:
        ids = text.ids[: text.end]
        plain, pushed = (naive_logits(lm, ids, text.first, uses).log_softmax(-1) for uses in ([], [(made, 1.0)]))
        values += (pushed.exp() * (pushed - plain)).sum(-1).tolist()
    naive = kl_percentile(values, 95.0)
    figures = f"{found.kl:.3f} nats at {found.amount:.3g}, by naive code {naive:.3f}"
    require(abs(naive - found.kl) <= 0.15 * found.kl, figures)
    return figures


def streamed(lm: LanguageModel, artifact: Artifact, rows: int = 32, tokens: int = 24) -> str:
    """Rows under different recipes together, as the page streams them."""
    asked = [Row(f"the cat {place}", Recipe.of((artifact, place / 8 - 2)), 0) for place in range(rows)]
    stream = Session(lm).stream(asked, max_new_tokens=tokens, sampling=Sampling(greedy=True))
    (steps, written), took, peak = timed(lm, lambda: drained(stream))
    worst = max(lacking(lm, row) for row in written[::5])
    require(steps >= tokens // 2, f"only {steps} steps were streamed")
    require(worst <= WITHIN[lm.dtype], f"below the naive best by {worst:.2g} s.d.")
    count = sum(row.tokens or 0 for row in written)
    return f"{count / took:.0f} tokens/s, {peak:.2f} GB beside the weights; {worst:.2g} s.d. below the naive best"


def drained(stream: Any) -> tuple[int, list[Row]]:
    steps = 0
    while True:
        try:
            next(stream)
        except StopIteration as ended:
            return steps, ended.value
        steps += 1


def attributed(lm: LanguageModel) -> str:
    asked = [f"the cat {word}" for word in WORDS[:8]]
    found, took, peak = timed(lm, lambda: attribute(lm, asked, " cat", keep_universal=True))
    scores = found.neuron_scores()
    require(bool(scores.isfinite().all()), "scores are not finite")
    require(bool(scores.abs().sum() > 0), "all scores are 0")
    return f"{len(asked)} prompts in {took:.2f} s, {peak:.2f} GB beside the weights"


def exact_rules(lm: LanguageModel) -> str:
    check_relp(lm)
    return "an MLP's inputs add up to what it gives"


def out_of_memory(lm: LanguageModel, sets: ContrastSet) -> str:
    """All texts in one batch, then once more with too little memory for that: the same statistics."""
    layers = tuple(range(lm.n_layers))
    request = Request(residual=layers, neurons=layers[:2], framing="answer", batch_tokens=1 << 22)
    told: list[str] = []

    def read() -> Any:
        tell = lambda message, fraction=None: told.append(message)  # noqa: E731
        return read_activations(lm, sets.positive, sets.negative, request, progress=tell)

    plain, _, peak = timed(lm, read)
    require(not any("out of memory" in message for message in told), "even the whole card was too small for the check")
    with little_memory(lm, peak, rows=max(1, len(sets.positive) // 3)):
        halved = read()
    times = sum("out of memory" in message for message in told)
    require(times == 1, f"that memory ran out was told {times} times")
    worst = 0.0
    for layer in layers:
        one, other = (found.residual[layer].difference for found in (plain, halved))
        worst = max(worst, float((one - other).norm() / one.norm()))
    require(worst <= SAME[lm.dtype], f"what was read in parts is off by {worst:.2g}")
    return f"halved, told once, the same within {worst:.2g}"


def loaded(scale: Scale) -> str:
    """Saved and loaded again: straight to the device, the fingerprint the same in every dtype."""
    lm = scale.llama(torch.bfloat16, layers=2, tie_word_embeddings=True)
    size, mark = sum(weight.nbytes for weight in lm.model.parameters()) / 1e9, fingerprint_of(lm.model)
    with tempfile.TemporaryDirectory() as folder:
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        del lm
        peaks = []
        for dtype in (torch.bfloat16, torch.float16):
            settle(scale.device)
            again = load_model(folder, device=scale.device, dtype=dtype)
            require(again.dtype == dtype and again.device.type == scale.device.type, "loaded to another place or dtype")
            require(again.fingerprint == mark, f"the fingerprint is another one in {dtype}")
            cuda = scale.device.type == "cuda"
            peaks.append(torch.cuda.max_memory_allocated(scale.device) / 1e9 if cuda else 0.0)
            del again
    require(max(peaks) <= 1.6 * size + 0.1, f"loading {size:.2f} GB took {max(peaks):.2f} GB of the card")
    return f"{size:.2f} GB took {peaks[0]:.2f} (bfloat16) and {peaks[1]:.2f} GB (float16) of the card"


def apart(scale: Scale, sets: ContrastSet, *, cards: int) -> str:
    """The upper half of the blocks in the computer's memory, or on the second card: the same as in one piece."""
    whole = scale.llama(torch.float32, layers=scale.few, tie_word_embeddings=True)
    vector = build(whole, sets, layers="all", calibrate=False)
    other = scale.llama(torch.float32, layers=scale.few, tie_word_embeddings=True)
    if scale.device.type == "cpu":
        accelerate.cpu_offload(other.model, execution_device=scale.device)
    else:
        here = scale.device.index or 0
        there = "cpu" if cards == 1 else (here + 1) % torch.cuda.device_count()
        upper = {f"model.layers.{place}": there for place in range(scale.few // 2, scale.few)}
        lower = {f"model.layers.{place}": here for place in range(scale.few // 2)}
        beside = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), here)
        kept = {key: weight.cpu() for key, weight in other.model.state_dict().items() if key.startswith(tuple(upper))}
        accelerate.dispatch_model(other.model, {**beside, **lower, **upper}, state_dict=kept)
    other = describe_model(other.model, other.tokenizer, name=whole.name, revision=whole.revision)
    require(other.fingerprint == whole.fingerprint, "the fingerprint is another one")
    found = build(other, sets, layers="all", calibrate=False)
    for layer, direction in vector.directions.items():  # type: ignore[attr-defined]
        off = float((found.directions[layer] - direction).norm() / direction.norm())  # type: ignore[attr-defined]
        require(off <= SAME[torch.float32], f"layer {layer} is off by {off:.2g}")
    attributed(other)
    return steered(other, vector, scale, naive=whole)


def side_by_side(scale: Scale) -> str:
    """Two processes at once, one a card: nothing may end up on the other's, or need it."""
    devices = ["cpu", "cpu"] if scale.device.type == "cpu" else ["cuda:0", "cuda:1"]
    common = [sys.executable, __file__, "--only", "float32", *(["--tiny"] if scale.tiny else [])]
    running = [
        subprocess.Popen([*common, "--device", device], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for device in devices
    ]
    try:
        printed = [one.communicate(timeout=240)[0] for one in running]
    finally:
        for one in running:
            one.kill()
    for device, one, text in zip(devices, running, printed, strict=True):
        require(one.returncode == 0, f"{device}: {text.strip().splitlines()[-1]:.200}")
    return "both right"


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass
class Table:
    """Runs checks and keeps a line of each; after `until` (`time.monotonic`) none is begun."""

    until: float
    only: str = ""
    lines: list[str] = field(default_factory=list)
    wrong: int = 0

    def check(self, name: str, work: Callable[[], str]) -> None:
        if self.only not in name:
            return
        started = time.monotonic()
        if started > self.until:
            self._add(name, "left out", "no time was left", 0.0)
            return
        try:
            result, figures = "right", work()
        except Exception as error:  # whatever fails is a line of the table
            self.wrong += 1
            why = str(error).strip().splitlines() or [""]
            result, figures = "**wrong**", f"{'' if isinstance(error, Wrong) else type(error).__name__ + ': '}{why[0]}"
        self._add(name, result, figures, time.monotonic() - started)

    def _add(self, name: str, result: str, figures: str, took: float) -> None:
        self.lines.append(f"| {name} | {result} | {figures.replace('|', '/')[:300]} | {took:.0f} |")
        print(self.lines[-1], file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Subject:
    """A model that is made when it is first asked for, and artifacts of it."""

    make: Callable[[], LanguageModel]
    scale: Scale

    @cached_property
    def lm(self) -> LanguageModel:
        return self.make()

    @cached_property
    def sets(self) -> ContrastSet:
        return examples(8, 6)

    @cached_property
    def vector(self) -> SteeringVector:
        made = build(self.lm, self.sets, layers="all", calibrate=False)
        assert isinstance(made, SteeringVector)
        return made

    @cached_property
    def circuit(self) -> Artifact:
        return build(self.lm, self.sets, method="cna", layers="all", top_k=0.02, calibrate=False)


def check_shallow(table: Table, scale: Scale, name: str, subject: Subject) -> None:
    table.check(f"{name}: steered by a vector", lambda: steered(subject.lm, subject.vector, scale))
    table.check(f"{name}: steered by a circuit", lambda: steered(subject.lm, subject.circuit, scale))
    table.check(f"{name}: reading", lambda: read_right(subject.lm, subject.vector, subject.sets))


def check_deep(table: Table, scale: Scale, name: str, subject: Subject) -> None:
    """All that takes a whole model: what is wrong in half precision, slow or large shows here."""
    long, short = examples(scale.n_texts, 25), examples(scale.n_texts, 4)
    check_shallow(table, scale, name, subject)
    both = f"{scale.n_texts} + {scale.n_texts} texts"
    table.check(f"{name}: caa from {both} of 60 tokens", lambda: built(subject.lm, "caa", long))
    table.check(f"{name}: caa from {both} of 10 tokens", lambda: built(subject.lm, "caa", short))
    table.check(f"{name}: cna from {both} of 60 tokens", lambda: built(subject.lm, "cna", long))
    table.check(f"{name}: cna from {both} of 10 tokens", lambda: built(subject.lm, "cna", short))
    table.check(f"{name}: calibration", lambda: calibrated(subject.lm, subject.sets))
    table.check(f"{name}: 32 streamed rows", lambda: streamed(subject.lm, subject.vector))
    table.check(f"{name}: relp", lambda: attributed(subject.lm))
    table.check(f"{name}: out of memory", lambda: out_of_memory(subject.lm, examples(scale.n_texts // 4, 12)))


def check_all(table: Table, scale: Scale) -> None:
    for name, make in (("Llama", scale.llama), ("Gemma", scale.gemma)):
        subject = Subject(lambda make=make: make(torch.float32, scale.few), scale)
        check_shallow(table, scale, f"{name}, float32", subject)
        table.check(f"{name}, float32: rules of relp", lambda subject=subject: exact_rules(subject.lm))
        del subject
        half = Subject(lambda make=make: make(torch.float16, scale.few), scale)
        check_shallow(table, scale, f"{name}, float16", half)
        del half
        settle(scale.device)
        check_deep(table, scale, f"{name}, bfloat16", Subject(lambda make=make: make(torch.bfloat16), scale))
        settle(scale.device)
    cards = torch.cuda.device_count() if scale.device.type == "cuda" else 1
    table.check("loading", lambda: loaded(scale))
    table.check("offloaded", lambda: apart(scale, examples(6, 6), cards=1))
    if cards > 1:
        table.check("over two cards", lambda: apart(scale, examples(6, 6), cards=2))
    if cards > 1 or scale.device.type == "cpu":
        table.check("two processes", lambda: side_by_side(scale))


def heading(device: torch.device) -> str:
    where = "CPU"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        where = f"{torch.cuda.device_count()} × {properties.name}, {properties.total_memory / 1e9:.0f} GB"
    return f"{where}; torch {torch.__version__}, transformers {transformers.__version__}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script itself")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="no check begins after that")
    parser.add_argument("--only", default="", help="checks whose name contains this")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu" and not arguments.tiny:
        parser.error("there is no GPU here; --tiny tries the script itself on a CPU")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    started = time.monotonic()
    table = Table(started + 60 * arguments.minutes, arguments.only)
    check_all(table, Scale(arguments.tiny, device))
    print(
        f"{heading(device)}; {time.monotonic() - started:.0f} s\n\n| check | result | figures | s |\n|---|---|---|---|"
    )
    print("\n".join(table.lines))
    return 1 if table.wrong else 0


if __name__ == "__main__":
    logging.getLogger("neurosteer").setLevel(logging.ERROR)
    sys.exit(main())
