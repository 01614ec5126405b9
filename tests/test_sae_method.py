"""The method `sae`: its features, figures and words against loops over texts read one at a time, and planted ones."""

import dataclasses
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from tiny import (
    D_MODEL,
    N_LAYERS,
    Tiny,
    build,
    byte_tokenizer,
    first,
    hook_count,
    make_tiny,
    naive_states,
    own_hooks,
    positions_read,
    texts,
    tiny,
)
from tiny_saes import N_FEATURES, PlainSae, random_sae
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.storage import load, save
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.building.build import build_each
from neurosteer.errors import Cancelled, MismatchError, UsageError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.examples.files import neutral_prompts
from neurosteer.methods.sae import _held_out_fifth
from neurosteer.models.loading import describe_model
from neurosteer.reading.loop import read_activations
from neurosteer.reading.request import Request
from neurosteer.reading.statistics import FeatureStatistics
from neurosteer.saes.loading import load_sae
from neurosteer.saes.words import DESCRIBED, output_scores, promoted_tokens

LAYERS = (1, 2)
ALL_TEXTS = texts(36, seed=31, longest=8)
EXAMPLES = ContrastSet(tuple(ALL_TEXTS[:20]), tuple(ALL_TEXTS[20:]), name="moods")
FRAMINGS, TOKENS, RANKS = ("raw", "answer"), ("mean", "last"), ("rate", "dprime", "probe")


def vector(*arguments: Any, **named: Any) -> SteeringVector:
    built = build(*arguments, method="sae", **named)
    assert isinstance(built, SteeringVector)
    return built


@cache
def sae_of(architecture: str, layer: int) -> PlainSae:
    """For the size that the architecture's residual stream has at this layer."""
    this = tiny(architecture)
    states, _ = naive_states(this, this.lm.prompt_ids("the cat sings over the dark river", raw=True))
    scale = float(states[layer, 1:].norm(dim=-1).median())
    return random_sae(layer, scale=scale, jumps=layer == 2, subtracts=layer == 1)


def written(this: Tiny, folder: Path, layer: int) -> Path:
    name = f"blocks.{layer}.hook_resid_post"
    return sae_of(this.architecture, layer).write(folder / f"layer-{layer}", name, model_name=this.lm.name)


@pytest.fixture
def folders(each: Tiny, tmp_path: Path) -> list[Path]:
    return [written(each, tmp_path, layer) for layer in LAYERS]


@pytest.fixture
def folder(llama: Tiny, tmp_path: Path) -> Path:
    return written(llama, tmp_path, 2)


# --- one text at a time ----------------------------------------------------------------------------------------------


def framed(this: Tiny, text: str, framing: str) -> tuple[list[int], int]:
    tokenizer = this.lm.tokenizer
    if framing == "raw":
        return tokenizer(text)["input_ids"], 0
    turn = tokenizer("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    return turn + tokenizer(text, add_special_tokens=False)["input_ids"], len(turn)


@dataclass(frozen=True)
class ReadText:
    """The tokens read of a text: their places in the text, and per layer their features `[n, n_features]`."""

    positive: bool
    own: list[int]
    places: list[int]
    features: dict[int, np.ndarray]


@cache
def read_naively(architecture: str, framing: str) -> tuple[ReadText, ...]:
    this, found = tiny(architecture), []
    for number, text in enumerate(ALL_TEXTS):
        ids, start = framed(this, text, framing)
        states, _ = naive_states(this, ids)
        positions = positions_read(len(ids), start)
        if not positions:  # too short to be read
            continue
        features = {
            layer: np.stack([sae_of(architecture, layer).encode(states[layer, place]) for place in positions])
            for layer in LAYERS
        }
        places = [place - start for place in positions]
        found.append(ReadText(number < len(EXAMPLES.positive), ids[start:], places, features))
    return tuple(found)


@cache
def naive_of(architecture: str, framing: str, tokens: str, layer: int) -> "Naive":
    return Naive(tiny(architecture), framing, tokens, layer)


class Naive:
    """What a loop over the texts finds at one layer."""

    def __init__(self, this: Tiny, framing: str, tokens: str, layer: int) -> None:
        read = read_naively(this.architecture, framing)
        kept = slice(None) if tokens == "mean" else slice(-1, None)
        self.texts = [text.features[layer][kept] for text in read]
        self.places = [text.places[kept] for text in read]
        self.own = [text.own for text in read]
        self.labels = np.array([text.positive for text in read])
        n = int(self.labels.sum())
        self.sides = [np.concatenate(self.texts[:n]), np.concatenate(self.texts[n:])]
        self.rates = np.stack([(side > 0).mean(0) for side in self.sides])
        self.means = np.stack([side.mean(0) for side in self.sides])
        self.means_active = np.stack(
            [[side[side[:, f] > 0, f].mean() if (side[:, f] > 0).any() else 0.0 for f in range(side.shape[1])]
             for side in self.sides]
        )  # fmt: skip

    @cache  # noqa: B019
    def scores(self, rank: str) -> np.ndarray:
        if rank == "rate":
            return self.rates[0] - self.rates[1]
        if rank == "dprime":
            variances = np.stack([side.var(0) for side in self.sides])
            spread = np.sqrt(variances.mean(0))
            return (self.means[0] - self.means[1]) / np.maximum(spread, spread.mean() * 1e-3)
        return probe_weights(np.stack([text.mean(0) for text in self.texts]), self.labels)

    def strongest(self, feature: int) -> list[float]:
        best = sorted((float(text[:, feature].max()) for text in self.texts), reverse=True)
        return [value for value in best[:3] if value > 0]

    def activations_at(self, feature: int, tokenizer: Any) -> dict[tuple[str, str, str], list[float]]:
        """Activations by what stands before, at and after the token."""
        found: dict[tuple[str, str, str], list[float]] = {}
        for text, places, own in zip(self.texts, self.places, self.own, strict=True):
            for row, place in zip(text, places, strict=True):
                begins = int(own[0] == tokenizer.bos_token_id)  # which is no text
                parts = own[max(begins, place - 12) : place], own[place : place + 1], own[place + 1 : place + 7]
                before, token, after = (tokenizer.decode(part) for part in parts)
                found.setdefault((before, token, after), []).append(float(row[feature]))
        return found


def probe_weights(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """L1 logistic regression on features of variance 1, its penalty the strongest that predicts a shuffled fifth of the
    texts best from the others (among those that leave a feature at all)."""
    spread = rows.std(0)
    scaled = rows / np.maximum(spread, spread.mean() * 1e-3)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0)
    held = np.isin(np.arange(len(rows)), next(folds.split(rows, labels, range(len(rows))))[1])
    found = []
    for power in range(-3, 5):
        c = 4.0**power / 100
        probe = LogisticRegression(l1_ratio=1.0, solver="liblinear", C=c, random_state=0, tol=1e-4)
        accuracy = probe.fit(scaled[~held], labels[~held]).score(scaled[held], labels[held])
        weights = probe.fit(scaled, labels).coef_[0]
        if weights.any():
            found.append((accuracy, -c, weights))
    return max(found, key=lambda item: item[:2])[2]


@pytest.mark.parametrize("n_positive", [2, 7, 40])
def test_the_fifth_held_out_is_shuffled_and_parts_no_pair(n_positive: int) -> None:
    labels = np.arange(2 * n_positive) < n_positive
    others, held = _held_out_fifth(labels, paired=True)
    assert sorted([*others, *held]) == list(range(2 * n_positive))
    assert {place % n_positive for place in held}.isdisjoint(place % n_positive for place in others)
    assert len(held) == 2 * (n_positive // min(5, n_positive)) or abs(len(held) - 2 * n_positive / 5) < 2
    if n_positive == 40:
        assert len(set(np.diff(held[held < n_positive]).tolist())) > 1  # no fixed stride
    single, _ = _held_out_fifth(np.arange(30) < 11, paired=False)
    assert 0 < (single < 11).sum() < 11


def check(built: SteeringVector, this: Tiny, layer: int, framing: str, tokens: str, parameters: dict[str, Any]) -> None:
    """The features are the `top_k` best by score, up to ties and rounding; every figure is the loop's."""
    naive, sae = naive_of(this.architecture, framing, tokens, layer), sae_of(this.architecture, layer)
    scores = naive.scores(parameters["rank"])
    one_token = 1.01 / min(len(side) for side in naive.sides)  # a feature just above its threshold may count or not
    off = {"rate": one_token, "dprime": 1e-3, "probe": 0.02 * float(np.abs(scores).max())}[parameters["rank"]]
    features = [feature for feature in built.features if feature.layer == layer]
    ranks = np.maximum(scores, 0) if parameters["sides"] == "positive" else np.abs(scores)
    chosen = [feature.index for feature in features]
    left = [feature for feature in range(N_FEATURES) if feature not in chosen]
    assert len(set(chosen)) == len(chosen) == min(parameters["top_k"], int((ranks > 0).sum()))
    assert ranks[chosen].min() >= max(ranks[left], default=0) - 2 * off
    assert np.all(np.diff(ranks[chosen]) <= 2 * off)
    means = naive.means
    for feature in features:
        at = feature.index
        assert feature.score == pytest.approx(scores[at], abs=off)
        assert feature.rates == pytest.approx(tuple(naive.rates[:, at]), abs=one_token)
        assert feature.means_active == pytest.approx(tuple(naive.means_active[:, at]), rel=0.02, abs=1e-3)
        difference = means[0, at] - means[1, at]
        target = means[0, at] if feature.score > 0 else -means[1, at]
        wanted = difference if parameters["weight"] == "difference" else target
        assert feature.weight == pytest.approx(wanted, abs=1e-3 * float(np.abs(means).max()))
        assert feature.output_score is None
    direction = sum(feature.weight * sae.w_dec[feature.index] for feature in features)
    assert isinstance(direction, Tensor)
    if parameters["unit_norm"]:
        direction = direction / direction.norm()
        assert float(built.directions[layer].norm()) == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(built.directions[layer], direction, atol=1e-4 * float(direction.abs().max()))


CHOICES: list[dict[str, Any]] = [
    {"rank": "rate", "weight": "difference", "sides": "both", "unit_norm": False, "top_k": 9},
    {"rank": "rate", "weight": "target", "sides": "positive", "unit_norm": True, "top_k": 5},
    {"rank": "dprime", "weight": "difference", "sides": "positive", "unit_norm": False, "top_k": 12},
    {"rank": "dprime", "weight": "target", "sides": "both", "unit_norm": False, "top_k": 1},
    {"rank": "dprime", "weight": "difference", "sides": "both", "unit_norm": True, "top_k": 64},
    {"rank": "probe", "weight": "difference", "sides": "both", "unit_norm": False, "top_k": 8},
    {"rank": "probe", "weight": "target", "sides": "positive", "unit_norm": True, "top_k": 64},
]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("framing", FRAMINGS)
def test_features_weights_and_direction_are_those_of_a_loop_over_the_texts(
    each: Tiny, folders: list[Path], framing: str, tokens: str
) -> None:
    for choice in CHOICES if each.architecture == "llama" else CHOICES[:3]:  # what follows reading is the same for all
        options: dict[str, Any] = {"framing": framing, "tokens": tokens, "contexts": 0, **choice}
        if choice["sides"] == "positive" and any(
            (naive_of(each.architecture, framing, tokens, layer).scores(choice["rank"]) <= 0).all() for layer in LAYERS
        ):
            with pytest.raises(UsageError, match="No feature fires more on the positive texts"):
                vector(each.lm, EXAMPLES, layers=LAYERS, sae=folders, **options)
            continue
        built = vector(each.lm, EXAMPLES, layers=LAYERS, sae=folders, **options)
        assert built.layers == list(LAYERS)
        for layer in LAYERS:
            check(built, each, layer, framing, tokens, choice)


def statistics(this: Tiny, folder: Path, framing: str, tokens: str, **more: Any) -> FeatureStatistics:
    sae = load_sae(this.lm, folder)
    request: Any = {"framing": framing, "tokens": tokens, "encoders": {sae.layer: sae}, **more}
    read = read_activations(this.lm, EXAMPLES.positive, EXAMPLES.negative, Request(residual=(sae.layer,), **request))
    return read.features[sae.layer]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("framing", FRAMINGS)
def test_the_statistics_are_those_of_a_loop_and_padding_counts_nowhere(
    each: Tiny, folders: list[Path], framing: str, tokens: str
) -> None:
    for budget in (60, 100_000):
        for layer, folder in zip(LAYERS, folders, strict=True):
            naive = naive_of(each.architecture, framing, tokens, layer)
            found = statistics(each, folder, framing, tokens, batch_tokens=budget, feature_rows=True)
            assert found.n_tokens == tuple(len(side) for side in naive.sides)
            scale = float(np.abs(naive.means).max())
            assert np.abs(found.fired.numpy() - np.stack([(side > 0).sum(0) for side in naive.sides])).max() <= 1
            assert np.allclose(found.means.numpy(), naive.means, atol=1e-4 * scale)
            variances = np.stack([side.var(0) for side in naive.sides])
            assert np.allclose(found.variances.numpy(), variances, rtol=1e-3, atol=1e-4 * scale**2)
            rows = found.rows
            assert rows is not None
            for place, text in enumerate(naive.texts):
                mean, span = np.zeros(N_FEATURES), slice(int(rows.starts[place]), int(rows.starts[place + 1]))
                mean[rows.features[span]] = rows.values[span]
                assert np.allclose(mean, text.mean(0), atol=1e-4 * scale)


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("framing", FRAMINGS)
def test_the_contexts_are_the_strongest_places_one_a_text(
    each: Tiny, folders: list[Path], framing: str, tokens: str
) -> None:
    options: Any = {"framing": framing, "tokens": tokens, "top_k": 20}
    built = vector(each.lm, EXAMPLES, layers=LAYERS[1], sae=folders[1], **options)
    naive = naive_of(each.architecture, framing, tokens, LAYERS[1])
    for feature in built.features:
        found = [context.activation for context in feature.contexts]
        wanted = naive.strongest(feature.index)
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        at = naive.activations_at(feature.index, each.lm.tokenizer)
        for context in feature.contexts:
            there = at[context.before, context.token, context.after]
            assert any(value == pytest.approx(context.activation, rel=1e-3, abs=1e-4) for value in there)
    assert sum(len(feature.contexts) for feature in built.features) > 20


@pytest.mark.parametrize("contexts", [0, 1, 2])
def test_as_many_contexts_are_kept_as_asked_for(llama: Tiny, folder: Path, contexts: int) -> None:
    full = vector(llama.lm, EXAMPLES, sae=folder, top_k=10)
    fewer = vector(llama.lm, EXAMPLES, sae=folder, top_k=10, contexts=contexts)
    assert [feature.contexts for feature in fewer.features] == [
        feature.contexts[:contexts] for feature in full.features
    ]


def test_only_the_strongest_features_keep_words(llama: Tiny, folder: Path) -> None:
    built = vector(llama.lm, EXAMPLES, sae=folder, top_k=N_FEATURES)
    assert len(built.features) > DESCRIBED
    by_weight = sorted(built.features, key=lambda feature: -abs(feature.weight))
    assert all(feature.promoted and feature.suppressed for feature in by_weight[:DESCRIBED])
    assert not any(feature.promoted or feature.contexts for feature in by_weight[DESCRIBED:])


def lens(this: Tiny, direction: Tensor) -> Tensor:
    """What `direction` adds to the logits through the gain of the final norm, float64 `[vocab]`."""
    weight: Any = this.norm.weight
    gain = weight.double()
    if this.architecture.startswith("gemma"):
        gain = 1 + gain
    direction = direction.double()
    if this.architecture == "gpt2":
        direction = direction - direction.mean()  # a LayerNorm takes it away
    return this.model.lm_head.weight.double() @ (gain * direction)


def test_promoted_and_suppressed_tokens_are_those_of_the_logit_lens(each: Tiny, folders: list[Path]) -> None:
    built = vector(each.lm, EXAMPLES, layers=LAYERS[0], sae=folders[0], top_k=6)
    rows = sae_of(each.architecture, LAYERS[0]).w_dec
    for feature in built.features:
        logits = lens(each, rows[feature.index])
        order = logits.argsort(descending=True).tolist()
        assert list(feature.promoted) == [each.lm.tokenizer.decode([token]) for token in order[:8]]
        assert list(feature.suppressed) == [each.lm.tokenizer.decode([token]) for token in order[::-1][:8]]


def test_the_logit_lens_is_what_the_final_norm_and_the_head_make_of_a_push(each: Tiny) -> None:
    """Against the model itself: with the norm's scale held, the push moves the logits by the lens."""
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(D_MODEL, generator=generator)
    stream = torch.randn(D_MODEL, generator=generator) * 50
    raised, _ = promoted_tokens(each.lm, direction, 5)
    with torch.no_grad():
        far, near = (each.model.lm_head(each.norm(stream + push * direction)) for push in (1e-2, -1e-2))
        scale = each.model.lm_head(each.norm(stream))  # what the push changes of the norm's scale, along the stream
    moved, base = (far - near).double(), scale.double()
    exact = lens(each, direction)
    design = torch.stack([exact, base], 1)
    fitted = torch.linalg.lstsq(design, moved[:, None]).solution
    if each.architecture != "gpt2":  # whose norm also has a bias
        assert float((design @ fitted - moved[:, None]).norm() / moved.norm()) < 0.02
    best = exact.argsort(descending=True)[:5].tolist()
    assert list(raised) == [each.lm.tokenizer.decode([token]) for token in best]


# --- output scores ---------------------------------------------------------------------------------------------------


def naive_output_score(this: Tiny, layer: int, direction: Tensor, norm: float) -> float:
    """(1 − rank / |V|) × probability of the best placed of the 20 tokens promoted most: what a push of 0.6 norms at the
    last token adds to it, on average over four prompts."""
    stands_for = lens(this, direction).argsort(descending=True)[:20].tolist()
    push = 0.6 * norm * direction / torch.linalg.vector_norm(direction)

    def pushed(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = first(output).clone()
        hidden[0, -1] += push
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def placed(logits: Tensor) -> float:
        values = logits.tolist()
        best = max(stands_for, key=lambda token: values[token])
        rank = sum(value > values[best] for value in values)
        return (1 - rank / len(values)) * float(torch.softmax(logits.double(), 0)[best])

    total = 0.0
    for prompt in neutral_prompts()[:4]:
        ids = torch.tensor([this.lm.prompt_ids(prompt)])
        with torch.no_grad():
            without = this.model(ids, use_cache=False).logits[0, -1]
            with own_hooks([(this.blocks[layer], pushed)]):
                with_push = this.model(ids, use_cache=False).logits[0, -1]
        total += placed(with_push) - placed(without)
    return total / 4


def test_output_scores_are_those_of_one_feature_and_prompt_at_a_time(each: Tiny) -> None:
    rows = sae_of(each.architecture, 2).w_dec[:6] * torch.tensor([1.0, 3.0, 0.1, 1.0, 1.0, 1.0])[:, None]
    for norm in (5.0, 60.0):
        wanted = [naive_output_score(each, 2, row, norm) for row in rows]
        found = output_scores(each.lm, 2, rows, norm)
        assert found.tolist() == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert hook_count(each.model) == 0


def test_more_directions_than_go_into_one_batch_score_as_each_alone(llama: Tiny) -> None:
    rows = torch.randn(70, D_MODEL, generator=torch.Generator().manual_seed(0))
    found = output_scores(llama.lm, 1, rows, 40.0)
    for row in (0, 63, 64, 69):
        assert float(output_scores(llama.lm, 1, rows[row : row + 1], 40.0)) == pytest.approx(
            float(found[row]), rel=1e-3
        )


def test_only_features_that_move_the_output_enough_are_kept(llama: Tiny, folder: Path) -> None:
    top_k = 5
    options: Any = {"sae": folder, "framing": "raw", "rank": "dprime", "contexts": 0}
    candidates = vector(llama.lm, EXAMPLES, top_k=4 * top_k, **options)
    rows, norm = sae_of("llama", 2).w_dec, candidates.norms[2]
    moved = [
        naive_output_score(llama, 2, rows[feature.index] * (1 if feature.score > 0 else -1), norm)
        for feature in candidates.features
    ]
    ranked = sorted(moved)
    for place in (4, 10, len(moved) - 3):
        least = (ranked[place] + ranked[place - 1]) / 2
        wanted = [
            (feature.index, score) for feature, score in zip(candidates.features, moved, strict=True) if score >= least
        ][:top_k]
        built = vector(llama.lm, EXAMPLES, top_k=top_k, min_output_score=least, **options)
        assert [feature.index for feature in built.features] == [index for index, _ in wanted]
        found = [feature.output_score for feature in built.features]
        assert found == pytest.approx([score for _, score in wanted], rel=1e-3, abs=1e-5)
        direction = sum(feature.weight * rows[feature.index] for feature in built.features)
        assert isinstance(direction, Tensor)
        assert torch.allclose(built.directions[2], direction, atol=1e-3)
    with pytest.raises(UsageError, match=f"{max(moved):.3g}.*lower min_output_score"):
        vector(llama.lm, EXAMPLES, top_k=top_k, min_output_score=0.999, **options)


# --- planted features ------------------------------------------------------------------------------------------------

POSITIVE_LETTERS, NEGATIVE_LETTERS = {"X": 20, "Z": 21}, {"Y": 25, "V": 26}
NOISE_LETTERS = {letter: place for place, letter in enumerate("ACDEFGHIJK")}  # no two of which are one token


def planted_model() -> tuple[Tiny, PlainSae]:
    """A llama whose blocks write nothing, so that the stream is a token's embedding: the decoder row of a feature
    of its own. The SAE's decoder is orthonormal, and its encoder the decoder transposed."""
    this = make_tiny("llama", chat=False)
    rows = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(1)))[0]
    tokenizer, model = byte_tokenizer(chat=False), this.model
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        for letter, feature in {**NOISE_LETTERS, **POSITIVE_LETTERS, **NEGATIVE_LETTERS}.items():
            (token,) = tokenizer(letter)["input_ids"]
            model.model.embed_tokens.weight[token] = rows[feature] * (2.0 + feature / 10)
    half = torch.full((D_MODEL,), -0.5)
    return this, PlainSae(w_enc=rows.T.contiguous(), b_enc=half, w_dec=rows, b_dec=torch.zeros(D_MODEL))


def planted_texts(seed: int, n: int, marks: Sequence[str]) -> tuple[str, ...]:
    """Of twelve letters, the first one not read; each holds one of `marks` twice."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < n:
        mark = marks[len(found) % len(marks)]
        found["Q" + "".join(rng.permutation([*rng.choice(list(NOISE_LETTERS), 9), mark, mark]))] = None
    return tuple(found)


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("rank", RANKS)
def test_planted_features_are_found_with_their_signs_and_rates(tmp_path: Path, rank: str, layer: int) -> None:
    this, plain = planted_model()
    folder = plain.write(tmp_path / "sae", f"blocks.{layer}.hook_resid_post")
    n = 40
    examples = ContrastSet(planted_texts(1, n, "XZ"), planted_texts(2, n, "YV"), name="planted")
    for side in (*examples.positive, *examples.negative):
        assert len(this.lm.tokenizer(side)["input_ids"]) == 12
    built = vector(this.lm, examples, sae=folder, rank=rank, top_k=4, contexts=2)
    found = {feature.index: feature for feature in built.features}
    assert set(found) == {20, 21, 25, 26}
    for letter, index in {**POSITIVE_LETTERS, **NEGATIVE_LETTERS}.items():
        feature, sign = found[index], 1 if letter in POSITIVE_LETTERS else -1
        texts_with, height = examples.positive if sign > 0 else examples.negative, 2.0 + index / 10 - 0.5
        rate = sum(text[1:].count(letter) for text in texts_with) / sum(len(text) - 1 for text in texts_with)
        assert feature.rates == pytest.approx((rate, 0.0) if sign > 0 else (0.0, rate))
        assert feature.means_active == pytest.approx((height, 0.0) if sign > 0 else (0.0, height), rel=1e-5)
        assert feature.weight == pytest.approx(sign * rate * height, rel=1e-5)
        assert np.sign(feature.score) == sign
        assert rank != "rate" or feature.score == pytest.approx(sign * rate)
        for context in feature.contexts:
            assert context.token == letter and context.activation == pytest.approx(height, rel=1e-5)
            assert context.before.startswith("Q") and context.before + letter + context.after in [
                text[: len(context.before) + 1 + len(context.after)] for text in texts_with
            ]
    along = plain.w_dec @ built.directions[layer]
    assert all(float(along[index]) == pytest.approx(found[index].weight, rel=1e-4) for index in found)
    assert float(along[[place for place in range(D_MODEL) if place not in found]].abs().max()) < 1e-5
    positive = vector(this.lm, examples, sae=folder, rank=rank, top_k=4, sides="positive").features[:2]
    assert {feature.index for feature in positive} == {20, 21}


def test_a_text_without_a_token_counts_nowhere(tmp_path: Path) -> None:
    letters = "abcdefgh"
    bpe = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))  # leaves out all others
    lm = describe_model(
        make_tiny("llama").model, PreTrainedTokenizerFast(tokenizer_object=bpe), name="tiny/llama", chat=False
    )
    folder = random_sae(3, scale=30.0).write(tmp_path / "sae")
    some, others = ("abc", "nix", "bed"), ("fedg", "da")
    sae = load_sae(lm, folder)
    for tokens in TOKENS:
        request: Any = {"residual": (2,), "tokens": tokens, "encoders": {2: sae}, "feature_rows": True}
        found = read_activations(lm, some, others, Request(**request)).features[2]
        without = read_activations(lm, [some[0], some[2]], others, Request(**request)).features[2]
        assert found.n_tokens == without.n_tokens
        assert torch.allclose(found.sums, without.sums) and torch.equal(found.fired, without.fired)
        assert found.rows is not None and without.rows is not None
        assert found.rows.starts.tolist() == without.rows.starts.tolist()
        assert not (found.text_of[found.strongest > 0] == 1).any()
        place = torch.tensor([0, 2, 3, 4])  # of the texts that are read among all
        assert torch.equal(found.text_of, place[without.text_of])
    more = tuple(one + other for one in letters[:3] for other in letters[:3])
    examples = ContrastSet((*more, "nix"), ("fed", "def", "gfe", "hhh", "hed"), name="odd")
    assert vector(lm, examples, sae=folder, rank="probe", top_k=3).features


# --- what is recorded ------------------------------------------------------------------------------------------------


def test_an_artifact_keeps_its_features_byte_for_byte(llama: Tiny, folder: Path, tmp_path: Path) -> None:
    odd = ContrastSet((*EXAMPLES.positive, "naïve 日本 😀 \u200b\x07"), EXAMPLES.negative, name="odd")
    built = vector(llama.lm, odd, sae=folder, top_k=40, min_output_score=-1.0)
    loaded = load(save(built, tmp_path / "one"))
    assert isinstance(loaded, SteeringVector)
    assert loaded.features == built.features and len(loaded.features) > DESCRIBED
    assert loaded.parameters == built.parameters
    save(loaded, tmp_path / "two")
    for name in ("config.json", "weights.safetensors", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    kept = json.loads((tmp_path / "one" / "config.json").read_text(encoding="utf-8"))["features"]
    assert kept == json.loads(json.dumps([dataclasses.asdict(feature) for feature in built.features]))


def test_without_contexts_no_text_of_the_users_is_kept(llama: Tiny, folder: Path, tmp_path: Path) -> None:
    secret = "zyzzyva"
    private = ContrastSet(
        tuple(f"{text} {secret} {text}" for text in EXAMPLES.positive), EXAMPLES.negative, name="private"
    )
    for contexts, kept in ((0, False), (3, True)):
        built = vector(llama.lm, private, sae=folder, contexts=contexts)
        target = save(built, tmp_path / str(contexts))
        found = b"".join(file.read_bytes() for file in sorted(target.iterdir())).decode("utf-8", "ignore")
        assert (secret in found) is kept
        assert all(feature.promoted for feature in built.features[:1])
        assert any(text in found for text in private.positive) is False


def test_the_parameters_name_the_saes_that_were_used(llama: Tiny, tmp_path: Path) -> None:
    one, two = written(llama, tmp_path, 1), written(llama, tmp_path, 2)
    for given in (two, str(two), [str(two)], (two,)):
        built = vector(llama.lm, EXAMPLES, sae=given)
        assert built.layers == [2]
        assert built.parameters == {
            "sae": {"2": str(two)}, "rank": "rate", "top_k": 64, "weight": "difference", "sides": "both",
            "unit_norm": False, "min_output_score": None, "contexts": 3,
        }  # fmt: skip
    built = vector(llama.lm, EXAMPLES, sae=[two, one], layers=[1, 2])
    assert built.parameters["sae"] == {"1": str(one), "2": str(two)}
    assert {feature.layer for feature in built.features} == {1, 2}


def test_among_several_saes_the_layer_that_separates_best_is_taken(llama: Tiny, tmp_path: Path) -> None:
    named = [written(llama, tmp_path, layer) for layer in LAYERS]
    built = vector(llama.lm, EXAMPLES, sae=named)
    recorded = built.provenance.separation
    assert set(recorded) == set(LAYERS) and len(built.layers) == 1
    assert recorded[built.layers[0]] == max(recorded.values())
    caa = build(llama.lm, EXAMPLES, layers=list(LAYERS))
    assert recorded == caa.provenance.separation


@pytest.mark.parametrize("layers", ["all", " All ", [1, 2], "1-2"])
def test_all_layers_are_those_with_an_sae(llama: Tiny, tmp_path: Path, layers: Any) -> None:
    named = [written(llama, tmp_path, layer) for layer in LAYERS]
    built = vector(llama.lm, EXAMPLES, sae=named, layers=layers)
    assert built.layers == list(LAYERS)
    assert set(build_each(llama.lm, EXAMPLES, method="sae", sae=named, layers=layers)) == set(LAYERS)


def test_without_a_name_the_shipped_saes_are_used(llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in LAYERS:
        written(llama, tmp_path / "saes", layer)
    monkeypatch.setattr("neurosteer.saes.offers.assets_folder", lambda: tmp_path)
    assert vector(llama.lm, EXAMPLES).layers[0] in LAYERS
    built = vector(llama.lm, EXAMPLES, layers=2)
    assert built.parameters["sae"] == {"2": "embedded/2"}
    with pytest.raises(UsageError, match="embedded/1, embedded/2"):
        vector(llama.lm, EXAMPLES, layers=3)


def test_a_bos_is_put_before_raw_texts_where_the_sae_was_trained_with_one(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(chat=False, bos=True)
    plain = byte_tokenizer(chat=False)
    model = make_tiny("llama").model
    plain_with_bos = PreTrainedTokenizerFast(tokenizer_object=plain.backend_tokenizer, bos_token="<s>")
    adding, lacking = (
        describe_model(model, each, name="tiny/llama", chat=False) for each in (tokenizer, plain_with_bos)
    )
    sae = random_sae(5, scale=30.0)
    trained_with = sae.write(tmp_path / "with", metadata={"prepend_bos": True})
    trained_without = sae.write(tmp_path / "without", metadata={"prepend_bos": False})
    options: Any = {"framing": "raw", "top_k": 8}
    added, own = (
        vector(lacking, EXAMPLES, sae=trained_with, **options),
        vector(adding, EXAMPLES, sae=trained_with, **options),
    )
    assert added.features == own.features
    assert torch.equal(added.directions[2], own.directions[2])
    left_out = vector(lacking, EXAMPLES, sae=trained_without, **options)
    assert not torch.allclose(left_out.directions[2], own.directions[2])
    assert lacking.tokenizer("a")["input_ids"] == plain("a")["input_ids"]


# --- every layer by itself -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("caa", {}),
        ("caa", {"framing": "raw", "tokens": "last"}),
        ("pca", {}),
        ("sae", {}),
        ("sae", {"rank": "probe", "tokens": "last", "min_output_score": -1.0}),
        ("cna", {"rank": "difference", "top_k": 9, "skip_layers": []}),
        ("cna", {"rank": "write", "top_k": 9, "skip_layers": []}),
        ("cna", {"rank": "dprime", "top_k": 0.05, "skip_layers": [1]}),
    ],
)
def test_every_layer_by_itself_is_what_building_at_that_layer_gives(
    llama: Tiny, tmp_path: Path, method: str, parameters: dict[str, Any]
) -> None:
    layers = list(LAYERS if method == "sae" else range(N_LAYERS))
    named = {layer: written(llama, tmp_path, layer) for layer in LAYERS}
    several: Any = {"sae": list(named.values())} if method == "sae" else {}
    found = build_each(llama.lm, EXAMPLES, method=method, **parameters, **several)
    wanted_layers = [layer for layer in layers if layer not in parameters.get("skip_layers", ())]
    assert list(found) == wanted_layers
    for layer in wanted_layers:
        more: Any = {"sae": named[layer]} if method == "sae" else {}
        wanted = build(llama.lm, EXAMPLES, method=method, layers=layer, **parameters, **more)
        one = found[layer]
        assert one.layers == wanted.layers == [layer]
        assert one.name == f"moods-{method}-{layer}"
        assert one.provenance.examples_sha256 == wanted.provenance.examples_sha256
        assert one.provenance.separation[layer] == wanted.provenance.separation.get(
            layer, one.provenance.separation[layer]
        )
        if isinstance(one, SteeringVector) and isinstance(wanted, SteeringVector):
            assert torch.equal(one.directions[layer], wanted.directions[layer])
            assert one.norms == wanted.norms
            assert one.features == wanted.features
            assert one.parameters == wanted.parameters
        else:
            assert isinstance(one, NeuronCircuit) and isinstance(wanted, NeuronCircuit)
            for key in ("neuron_layers", "neurons", "scores", "differences"):
                assert torch.equal(getattr(one, key), getattr(wanted, key))
            assert one.parameters == wanted.parameters


def test_some_layers_by_themselves_are_read_in_one_pass(llama: Tiny) -> None:
    calls: list[int] = []
    with own_hooks([(llama.blocks[0], lambda *_: calls.append(1))]):
        found = build_each(llama.lm, EXAMPLES, layers="1-3")
    once = len(calls)
    calls.clear()
    with own_hooks([(llama.blocks[0], lambda *_: calls.append(1))]):
        build(llama.lm, EXAMPLES, layers=3)
    assert list(found) == [1, 2, 3] and once == len(calls)


# --- refusals --------------------------------------------------------------------------------------------------------


def never_run(this: Tiny) -> Any:
    def fail(*_: Any) -> None:
        raise AssertionError("the model was run")

    return own_hooks([(this.blocks[0], fail)], before=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rank": "best"}, ["'best'", "rate, dprime, probe"]),
        ({"weight": "mean"}, ["'mean'", "difference, target"]),
        ({"sides": "negative"}, ["'negative'", "positive, both"]),
        ({"top_k": 0}, ["top_k", "0", "1 to 10000"]),
        ({"top_k": 10_001}, ["top_k", "10001"]),
        ({"top_k": 2.5}, ["top_k", "2.5"]),
        ({"top_k": True}, ["top_k", "True"]),
        ({"top_k": "many"}, ["top_k", "'many'"]),
        ({"unit_norm": "yes"}, ["unit_norm", "'yes'", "true or false"]),
        ({"unit_norm": 1}, ["unit_norm", "1"]),
        ({"min_output_score": float("nan")}, ["min_output_score", "nan"]),
        ({"min_output_score": "high"}, ["min_output_score", "'high'"]),
        ({"contexts": 4}, ["contexts", "4", "0", "3"]),
        ({"contexts": -1}, ["contexts", "-1"]),
        ({"contexts": True}, ["contexts", "True"]),
        ({"operation": "clamp"}, ["operation", "rank", "top_k", "sae"]),
        ({"layers": 1}, ["layers", "1", "2"]),
        ({"layers": [2, 3]}, ["layers", "3", "2"]),
        ({"layers": 9}, ["9", "0 to 3"]),
        ({"tokens": "first"}, ["'first'", "mean, last"]),
        ({"framing": "chat"}, ["'chat'", "raw, prompt, answer"]),
    ],
)
def test_a_wrong_argument_is_refused_before_the_model_runs(
    llama: Tiny, folder: Path, given: dict[str, Any], words: list[str]
) -> None:
    with never_run(llama), pytest.raises(UsageError) as error:
        vector(llama.lm, EXAMPLES, **{"sae": folder, **given})
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_model_without_saes_says_what_to_do(llama: Tiny) -> None:
    for layers in ("auto", 2, "all"):
        with never_run(llama), pytest.raises(UsageError, match=r"tiny/llama.*release.*folder"):
            vector(llama.lm, EXAMPLES, layers=layers)
    with never_run(llama), pytest.raises(UsageError, match=r"tiny/llama.*release.*folder"):
        build_each(llama.lm, EXAMPLES, method="sae")


def test_two_saes_at_one_layer_are_refused_naming_both(llama: Tiny, tmp_path: Path) -> None:
    one = written(llama, tmp_path, 2)
    other = random_sae(9).write(tmp_path / "other", "blocks.3.hook_resid_pre")
    with never_run(llama), pytest.raises(UsageError) as error:
        vector(llama.lm, EXAMPLES, sae=[one, other])
    assert str(one) in str(error.value) and str(other) in str(error.value) and "layer 2" in str(error.value)


def test_an_sae_of_another_model_is_refused_before_the_model_runs(llama: Tiny, tmp_path: Path) -> None:
    other = random_sae(9).write(tmp_path / "other", model_name="gpt2-small")
    with never_run(llama), pytest.raises(MismatchError, match="gpt2-small"):
        vector(llama.lm, EXAMPLES, sae=other)


def test_features_that_tell_nothing_apart_are_a_clear_error(llama: Tiny, tmp_path: Path) -> None:
    silent = dataclasses.replace(sae_of("llama", 2), b_enc=torch.full((N_FEATURES,), -1e6))
    folder = silent.write(tmp_path / "sae")
    for rank in RANKS:
        with pytest.raises(UsageError, match="No feature"):
            vector(llama.lm, EXAMPLES, sae=folder, rank=rank)


def test_cancelling_leaves_no_hooks(llama: Tiny, folder: Path) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        vector(llama.lm, EXAMPLES, sae=folder, cancel=cancel)
    assert hook_count(llama.model) == 0
