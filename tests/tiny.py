"""Tiny random models, tokenizers and texts, and naive re-implementations that the library is held against.

The naive code runs one unpadded row at a time, finds a model's parts by explicit paths and registers its own hooks.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import Module
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3NextConfig,
)

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.features import FeatureEncoder
from neurosteer.artifacts.recipes import Use
from neurosteer.artifacts.strength import Calibration
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.building.build import build as build_and_calibrate
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import describe_model
from neurosteer.models.reference import ModelReference

build = partial(build_and_calibrate, calibrate=False)
"""For tests of what is built, not of how strong it is and which of several choices does most."""

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2")
N_LAYERS, D_MODEL, D_MLP, VOCABULARY = 4, 32, 64, 300
WINDOW = 8

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [
    "a",
    "the",
    "cat",
    "dog",
    "runs",
    "sings",
    "slowly",
    "loudly",
    "over",
    "under",
    "river",
    "mountain",
    "happy",
    "sad",
    "bright",
    "dark",
    "we",
    "they",
    "never",
    "always",
    "thank",
    "you",
    "please",
    "bread",
    "and",
    "cheese",
    "naïve",
    "日本",
    "😀",
    "again,",
    "again.",
    "Why?",
    "Because",
    "it",
    "rained!",
]


# --- tokenizers ------------------------------------------------------------------------------------------------------


@cache
def byte_tokenizer(*, chat: bool = True, bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(200, seed=5), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": "<s>" if bos else None}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    wrapped.chat_template = CHATML if chat else None
    return wrapped


@cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    """One id per word, so that ids can be written down by hand. Texts begin with <s>; the template writes no <s>."""
    words = [
        "<pad>",
        "<s>",
        "<user>",
        "<end>",
        "<bot>",
        "<unk>",
        *["one", "two", "three", "four", "five", "six", "seven", "A", "?"],
    ]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<end>", unk_token="<unk>"
    )
    wrapped.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}<user> {% else %}<bot> {% endif %}{{ m['content'] }} <end> "
        "{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    return wrapped


@cache
def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """BPE that spells unknown characters as byte tokens, as in Llama 2, Mistral and Gemma."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": byte + 3 for byte in range(256)}}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁th", "▁the", "th", "he", "in", "an"]:
        vocabulary.setdefault(piece, len(vocabulary))
    merges = [("t", "h"), ("h", "e"), ("i", "n"), ("a", "n"), ("▁", "th")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Tiny:
    """A tiny model as the library describes it, and its parts by explicit paths."""

    architecture: str
    lm: LanguageModel
    blocks: Sequence[Module]
    downs: Sequence[Module]
    norm: Module

    @property
    def model(self) -> Any:
        return self.lm.model


def tiny_config(architecture: str, **changes: Any) -> Any:
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": D_MODEL,
        "intermediate_size": D_MLP,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.35,
        "tie_word_embeddings": False,  # tied, an untrained model mostly repeats its last token
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    gemma = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
    alternating = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
    kinds: dict[str, Callable[[], Any]] = {
        "llama": lambda: LlamaConfig(**{**common, **changes}),
        "mistral": lambda: MistralConfig(**{**common, "sliding_window": WINDOW, **changes}),
        "qwen2": lambda: Qwen2Config(**{**common, **changes}),
        "qwen3": lambda: Qwen3Config(**{**common, "head_dim": 8, **changes}),
        "gemma2": lambda: Gemma2Config(**{**common, **gemma, **changes}),
        "gemma3": lambda: Gemma3TextConfig(**{**common, **gemma, "layer_types": alternating, **changes}),
        "gpt2": lambda: GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=256,
            n_embd=D_MODEL,
            n_inner=D_MLP,
            n_layer=N_LAYERS,
            n_head=4,
            initializer_range=0.35,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            **changes,
        ),
    }
    return kinds[architecture]()


def random_model(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases, which begin as ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def make_tiny(architecture: str, *, chat: bool = True, bos: bool = False, seed: int = 0, **changes: Any) -> Tiny:
    model = random_model(tiny_config(architecture, **changes), seed)
    lm = describe_model(model, byte_tokenizer(chat=chat, bos=bos), name=f"tiny/{architecture}", revision="r1")
    if architecture == "gpt2":
        blocks = list(model.transformer.h)
        return Tiny(architecture, lm, blocks, [block.mlp.c_proj for block in blocks], model.transformer.ln_f)
    blocks = list(model.model.layers)
    return Tiny(architecture, lm, blocks, [block.mlp.down_proj for block in blocks], model.model.norm)


@cache
def tiny(architecture: str) -> Tiny:
    """The shared model of an architecture; tests leave its weights alone. The Gemmas' texts begin with a BOS."""
    return make_tiny(architecture, bos=architecture.startswith("gemma"))


@cache
def tiny_next() -> Tiny:
    """A model most of whose layers keep a state that each token changes, instead of keys and values by position."""
    common = tiny_config("qwen3").to_dict()
    given = {key: common[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")}
    config = Qwen3NextConfig(
        **given,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        mlp_only_layers=list(range(N_LAYERS)),
        num_experts=0,
        max_position_embeddings=256,
        initializer_range=0.35,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = random_model(config)
    lm = describe_model(model, byte_tokenizer(), name="tiny/next", revision="r1")
    blocks = list(model.model.layers)
    return Tiny("next", lm, blocks, [block.mlp.down_proj for block in blocks], model.model.norm)


@cache
def tiny_wrapped() -> Tiny:
    """A text model inside a multimodal one, which calls it with other arguments than its own causal model does (what
    every Gemma 3 from 4B on is loaded as)."""
    text = tiny_config("gemma3").to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=VOCABULARY - 1,
        tie_word_embeddings=False,
    )
    model = random_model(config)
    model.generation_config.eos_token_id = None
    lm = describe_model(model, byte_tokenizer(bos=True), name="tiny/wrapped", revision="r1")
    inner = model.model.language_model
    blocks = list(inner.layers)
    return Tiny("wrapped", lm, blocks, [block.mlp.down_proj for block in blocks], inner.norm)


def hook_count(model: Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        for module in model.modules()
    )


def texts(n: int, *, seed: int, longest: int = 12) -> list[str]:
    """Different texts of 1 to `longest` words."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < n:
        found[" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest)))] = None
    return list(found)


# --- naive reading ---------------------------------------------------------------------------------------------------


@contextmanager
def own_hooks(pairs: Sequence[tuple[Module, Callable[..., Any]]], *, before: bool = False) -> Iterator[None]:
    register = "register_forward_pre_hook" if before else "register_forward_hook"
    handles = [getattr(module, register)(function) for module, function in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def naive_states(this: Tiny, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The residual stream after each block, `[n_layers, seq, d_model]`, and the neurons, `[n_layers, seq, d_mlp]`."""
    residual: dict[int, Tensor] = {}
    neurons: dict[int, Tensor] = {}

    def keep(place: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: residual.__setitem__(place, first(output)[0].clone())

    def keep_input(place: int) -> Callable[..., None]:
        return lambda _module, inputs: neurons.__setitem__(place, inputs[0][0].clone())

    with (
        own_hooks([(block, keep(place)) for place, block in enumerate(this.blocks)]),
        own_hooks([(down, keep_input(place)) for place, down in enumerate(this.downs)], before=True),
    ):
        this.model(torch.tensor([list(ids)]), use_cache=False)
    order = range(len(this.blocks))
    return torch.stack([residual[place] for place in order]), torch.stack([neurons[place] for place in order])


def positions_read(length: int, start: int = 0) -> list[int]:
    """Where a text is read: everything of its own but the first position."""
    return [place for place in range(start, length) if place > 0]


def pool(states: Tensor, length: int, tokens: str, start: int = 0) -> Tensor:
    """`[n_layers, seq, d]` to `[n_layers, d]`."""
    return states[:, -1] if tokens == "last" else states[:, positions_read(length, start)].mean(1)


# --- naive steering --------------------------------------------------------------------------------------------------


@dataclass
class Writes:
    """What a recipe comes to, spelled out: pushes, directions to project out, neurons as (layer, neuron, number), and
    clamps as (layer, feature's encoder, its decoder row, target, share of the way)."""

    pushes: list[tuple[int, Tensor]] = field(default_factory=list)
    ablated: list[tuple[int, Tensor]] = field(default_factory=list)
    clamps: list[tuple[int, FeatureEncoder, Tensor, float, float]] = field(default_factory=list)
    scales: list[tuple[int, int, float]] = field(default_factory=list)
    shifts: list[tuple[int, int, float]] = field(default_factory=list)


def writes_of(uses: Sequence[Use]) -> Writes:
    """From the definitions: dose x norm shared by the layers; m = 1 + s (m1 - 1); s x c x difference; full ablation;
    a target s x value for |s| >= 1, the share |s| of the way to +-value for others. Below 0 by the amount for -1, where
    there is one: for a multiplier m = 1 + |s| (m-1 - 1)."""
    writes = Writes()
    for use in uses:
        artifact = use.artifact
        calibrated, towards = artifact.calibration.amount, use.strength
        if use.strength < 0 and artifact.calibration.amount_down is not None:
            calibrated = artifact.calibration.amount_down
            towards = abs(use.strength) if artifact.operation == "scale" else use.strength
        if isinstance(artifact, SteeringVector):
            for layer, direction in artifact.directions.items():
                unit = direction / torch.linalg.vector_norm(direction)
                if artifact.operation == "clamp":
                    sign = 1 if use.strength >= 0 else -1
                    target, share = (
                        (calibrated * use.strength, 1.0)
                        if abs(use.strength) >= 1
                        else (calibrated * sign, abs(use.strength))
                    )
                    writes.clamps.append((layer, artifact.encoders[layer], direction, target, share))
                elif artifact.operation == "ablate":
                    assert use.strength == calibrated == 1.0
                    writes.ablated.append((layer, unit))
                else:
                    dose = use.strength * calibrated * artifact.norms[layer] / len(artifact.directions)
                    writes.pushes.append((layer, unit * dose))
            continue
        for place in range(len(artifact.neurons)):
            where = (int(artifact.neuron_layers[place]), int(artifact.neurons[place]))
            if artifact.operation == "scale":
                multiplier = 1 + towards * (calibrated - 1) if use.multiplier is None else use.multiplier
                writes.scales.append((*where, multiplier))
            else:
                writes.shifts.append((*where, use.strength * calibrated * float(artifact.differences[place])))
    return writes


def naive_feature(encoder: FeatureEncoder, stream: Tensor) -> Tensor:
    """How active a feature is on each row of `[..., d_model]`, in float64."""
    read = stream.double()
    if encoder.centred:
        read = read - read.mean(-1, keepdim=True)
    before = (read * encoder.weights.double()).sum(-1) + encoder.bias
    return torch.where((before > encoder.threshold) & (before > 0), before, torch.zeros_like(before))


@torch.no_grad()
def naive_logits(
    this: Tiny, ids: Sequence[int], writes: Writes, steered: Callable[[int], bool] = lambda position: True
) -> Tensor:
    """Logits `[seq, vocab]` of one row, steered at the positions where `steered` says so."""
    where = torch.tensor([steered(position) for position in range(len(ids))])[None, :, None]

    def after_block(layer: int) -> Callable[..., Any]:
        def hook(_module: Module, _inputs: Any, output: Any) -> Any:
            hidden = changed = first(output)
            spanned = [unit for at, unit in writes.ablated if at == layer]
            if spanned:
                span = torch.stack(spanned, 1).double()
                changed = changed - changed @ (span @ torch.linalg.pinv(span, rtol=1e-6)).float()
            read = changed.double()
            for at, encoder, direction, target, share in writes.clamps:
                if at == layer:
                    active = naive_feature(encoder, read)
                    changed = (changed + share * (target - active)[..., None] * direction.double()).to(hidden.dtype)
            for at, push in writes.pushes:
                changed = changed + push if at == layer else changed
            changed = torch.where(where, changed, hidden)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return hook

    def before_down(layer: int) -> Callable[..., Any]:
        def hook(_module: Module, inputs: Any) -> Any:
            changed = inputs[0].clone()
            for at, neuron, multiplier in writes.scales:
                if at == layer:
                    changed[..., neuron] = changed[..., neuron] * multiplier
            for at, neuron, shift in writes.shifts:
                if at == layer:
                    changed[..., neuron] = changed[..., neuron] + shift
            return (torch.where(where, changed, inputs[0]),)

        return hook

    with (
        own_hooks([(block, after_block(place)) for place, block in enumerate(this.blocks)]),
        own_hooks([(down, before_down(place)) for place, down in enumerate(this.downs)], before=True),
    ):
        return this.model(torch.tensor([list(ids)]), use_cache=False).logits[0]


def naive_greedy(
    this: Tiny, ids: Sequence[int], writes: Writes, n: int, *, stop: Sequence[int], positions: str = "all"
) -> list[int]:
    """New ids of a row written alone, without a cache, recomputing everything at every step."""
    prompt, written = len(ids), list(ids)
    ranges: dict[str, Callable[[int], bool]] = {
        "all": lambda _: True,
        "prompt": lambda position: position < prompt,
        "generated": lambda position: position >= prompt,
        "first:2": lambda position: prompt <= position < prompt + 2,
        "last:2": lambda position: prompt - 2 <= position < prompt,
        "last:999": lambda position: position < prompt,
    }
    for _ in range(n):
        token = int(naive_logits(this, written, writes, ranges[positions])[-1].argmax())
        if token in stop:
            break
        written.append(token)
    return written[prompt:]


# --- artifacts -------------------------------------------------------------------------------------------------------

REFERENCE = ModelReference("tiny/any", "r1", N_LAYERS, D_MODEL, D_MLP, "0123456789abcdef")


def make_vector(layers: Sequence[int] = (1, 2), *, seed: int = 0, **changes: Any) -> SteeringVector:
    generator = torch.Generator().manual_seed(seed)
    given: dict[str, Any] = {
        "name": f"vector-{seed}",
        "model": REFERENCE,
        "method": "caa",
        "directions": {layer: torch.randn(D_MODEL, generator=generator) for layer in layers},
        "norms": {layer: 50.0 + layer for layer in layers},  # as large as a tiny model's residual stream
    }
    return SteeringVector(**{**given, **changes})


def make_circuit(
    pairs: Sequence[tuple[int, int]] = ((0, 3), (1, 5), (1, 60), (3, 0)), *, seed: int = 0, **changes: Any
) -> NeuronCircuit:
    generator = torch.Generator().manual_seed(seed)
    given: dict[str, Any] = {
        "name": f"circuit-{seed}",
        "model": REFERENCE,
        "method": "cna",
        "neuron_layers": torch.tensor([layer for layer, _ in pairs], dtype=torch.int32),
        "neurons": torch.tensor([neuron for _, neuron in pairs], dtype=torch.int32),
        "scores": torch.randn(len(pairs), generator=generator),
        "differences": torch.randn(len(pairs), generator=generator),
    }
    return NeuronCircuit(**{**given, **changes})


def ablating(layers: Sequence[int], *, seed: int, **changes: Any) -> SteeringVector:
    return make_vector(layers, seed=seed, operation="ablate", calibration=Calibration(1.0), **changes)


def clamping(
    layers: Sequence[int], *, seed: int, value: float = 6.0, centred: bool = False, **changes: Any
) -> SteeringVector:
    """A feature per layer that is active at some tokens of a tiny model and not at others."""
    generator = torch.Generator().manual_seed(1000 + seed)
    encoders = {
        layer: FeatureEncoder(torch.randn(D_MODEL, generator=generator) * 0.2, -0.5, 1.0, centred) for layer in layers
    }
    given: dict[str, Any] = {"operation": "clamp", "calibration": Calibration(value), "encoders": encoders}
    return make_vector(layers, seed=seed, **{**given, **changes})
