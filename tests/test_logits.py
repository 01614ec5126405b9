"""How architectures make logits of hidden states, and normalise: the library held against the models themselves."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    D_MLP,
    D_MODEL,
    N_LAYERS,
    Tiny,
    byte_tokenizer,
    first,
    make_vector,
    own_hooks,
    random_model,
    tiny_config,
)
from torch import Tensor
from transformers import (
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    NemotronConfig,
    Olmo2Config,
    OlmoConfig,
    Qwen3NextConfig,
)

import neurosteer
from neurosteer.artifacts.recipes import Recipe
from neurosteer.circuits import attribute, linear_pass, measure_faithfulness, next_token_probs, top_predictions
from neurosteer.circuits.relp.choices import likely_choices
from neurosteer.measuring.divergence import divergences, kl_percentile, unsteered_texts
from neurosteer.measuring.preference import surprises
from neurosteer.measuring.token_scores import token_divergences
from neurosteer.models.loading import describe_model
from neurosteer.models.logits import last_logits, logits_at
from neurosteer.models.parts import probe_norm
from neurosteer.saes.words import output_scores, promoted_tokens

PROMPT, TEXT = "the cat sings over", " bread and cheese again."
PUSH = 3.0

_BASE = tiny_config("llama").to_dict()
_COMMON = {
    key: _BASE[key]
    for key in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "initializer_range", "tie_word_embeddings", "bos_token_id",
        "eos_token_id", "pad_token_id",
    )
}  # fmt: skip
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
_ALTERNATING = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
_NEXT = {
    "head_dim": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "mlp_only_layers": list(range(N_LAYERS)), "num_experts": 0,
}  # fmt: skip
_GEMMA_4 = {
    "head_dim": 8, "global_head_dim": 8, "sliding_window": 8, "layer_types": _ALTERNATING,
    "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": _COMMON["vocab_size"],
    "num_global_key_value_heads": 2,
}  # fmt: skip

CONFIGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "granite": (GraniteConfig, {"logits_scaling": 8.0, "residual_multiplier": 0.22, "embedding_multiplier": 12.0}),
    "cohere": (CohereConfig, {"logit_scale": 0.0625}),
    "cohere qk": (CohereConfig, {"logit_scale": 4.0, "use_qk_norm": True}),
    "cohere2": (Cohere2Config, {"logit_scale": 0.25, "sliding_window": 8}),
    "gemma2": (Gemma2Config, {**_GEMMA, "final_logit_softcapping": 3.0}),
    "gemma3": (Gemma3TextConfig, {**_GEMMA, "layer_types": _ALTERNATING}),
    "gemma4": (Gemma4TextConfig, _GEMMA_4),
    "olmo": (OlmoConfig, {}),
    "olmo2": (Olmo2Config, {}),
    "glm4": (Glm4Config, {"head_dim": 8}),
    "nemotron": (NemotronConfig, {"head_dim": 8}),
    "next": (Qwen3NextConfig, _NEXT),
}
SCALED = ("granite", "cohere", "cohere qk", "cohere2", "gemma2")  # what their heads give is not what they make of it
NORMS = tuple(name for name in CONFIGS if name != "cohere qk")


@cache
def model_of(name: str) -> Tiny:
    kind, more = CONFIGS[name]
    model = random_model(kind(**{**_COMMON, **more}))
    lm = describe_model(model, byte_tokenizer(chat=False), name=f"tiny/{name}", revision="r1")
    blocks = list(model.model.layers)
    return Tiny(name, lm, blocks, [block.mlp.down_proj for block in blocks], model.model.norm)


@torch.no_grad()
def true_logits(this: Tiny, ids: list[int], push: Tensor | None = None) -> Tensor:
    """`[seq, vocab]`, float64, of transformers alone; `push` is added to what block 1 returns."""

    def add(_module: Any, _inputs: Any, output: Any) -> Any:
        assert push is not None
        return (output[0] + push, *output[1:]) if isinstance(output, tuple) else output + push

    hooks = [] if push is None else [(this.blocks[1], add)]
    with own_hooks(hooks):
        return this.model(torch.tensor([ids]), use_cache=False).logits[0].double()


def steering(this: Tiny) -> tuple[Recipe, Tensor]:
    """A recipe, and what it adds to block 1's output."""
    vector = make_vector((1,), model=this.lm.reference)
    direction = vector.directions[1]
    return Recipe.of((vector, PUSH)), direction / direction.norm() * PUSH * vector.calibration.amount * vector.norms[1]


def naive_kl(steered: Tensor, plain: Tensor) -> Tensor:
    return (steered.softmax(-1) * (steered.log_softmax(-1) - plain.log_softmax(-1))).sum(-1)


# --- logits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_models_own_at_the_positions_asked_for(name: str) -> None:
    this = model_of(name)
    rows = [this.lm.token_ids(PROMPT + TEXT), this.lm.token_ids(PROMPT)]
    wanted = [true_logits(this, ids) for ids in rows]
    with torch.inference_mode():
        last = last_logits(this.lm, rows)
        where = torch.zeros(1, len(rows[0]), dtype=torch.bool)
        where[0, [1, 4]] = True
        two = logits_at(this.lm, torch.tensor([rows[0]]), where)
    assert last.dtype == torch.float32
    torch.testing.assert_close(last.double(), torch.stack([one[-1] for one in wanted]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(two.double(), wanted[0][[1, 4]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCALED)
def test_divergences_are_those_of_the_distributions_that_the_model_draws_from(name: str) -> None:
    this = model_of(name)
    recipe, push = steering(this)
    before, after = this.lm.token_ids(PROMPT), this.lm.token_ids(TEXT)
    plain, steered = (true_logits(this, [*before, *after], how)[len(before) - 1 : -1] for how in (None, push))
    found = token_divergences(this.lm, recipe, PROMPT, TEXT, raw=True)
    assert sum(one.score for one in found) == pytest.approx(float(naive_kl(steered, plain).sum()), rel=1e-3)
    texts = unsteered_texts(this.lm, [PROMPT], 4, raw=True)
    ids = texts.texts[0].ids
    plain, steered = (true_logits(this, ids, how)[len(before) - 1 : -1] for how in (None, push))
    measured = divergences(this.lm, texts, [recipe])[0, 0]
    torch.testing.assert_close(measured.double(), naive_kl(steered, plain), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", SCALED)
def test_next_tokens_have_the_models_own_probabilities(name: str) -> None:
    this = model_of(name)
    ids = this.lm.token_ids(PROMPT)
    recipe, push = steering(this)
    for given, how in ((Recipe(()), None), (recipe, push)):
        wanted = true_logits(this, ids, how)[-1].softmax(-1)
        best = top_predictions(this.lm, PROMPT, given, k=5, raw=True)
        assert [one.probability for one in best] == pytest.approx(wanted.topk(5).values.tolist(), rel=1e-3)
        asked = next_token_probs(this.lm, PROMPT, " bread", given, raw=True)[" bread"]
        assert asked == pytest.approx(float(wanted[this.lm.token_ids(" bread")[0]]), rel=1e-3)
    (choice,) = likely_choices(this.lm, [PROMPT])
    assert choice.counterfactual is not None
    assert [choice.target.id, choice.counterfactual.id] == true_logits(this, ids)[-1].topk(2).indices.tolist()


@pytest.mark.parametrize("name", SCALED)
def test_the_metric_of_an_attribution_is_of_the_models_own_logits(name: str) -> None:
    this = model_of(name)
    logits = true_logits(this, this.lm.token_ids(PROMPT))[-1]
    target, other = (this.lm.token_ids(text)[0] for text in (" bread", " again"))
    found = attribute(this.lm, PROMPT, " bread", " again", raw=True, keep_universal=True)
    assert found.prompts[0].metric == pytest.approx(float(logits[target] - logits[other]), rel=1e-3, abs=1e-5)
    measured = measure_faithfulness(this.lm, found, percents=[0, 100], draws=0)
    assert measured.full == pytest.approx(float(logits[target] - logits[other]), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", ["granite", "cohere", "cohere2"])
def test_scores_are_shares_of_the_scaled_logit(name: str) -> None:
    """The scale is a constant: all scores are what they are of the model without it, times the scale."""
    kind, more = CONFIGS[name]
    key = "logits_scaling" if name == "granite" else "logit_scale"
    this = model_of(name)
    plain = describe_model(random_model(kind(**{**_COMMON, **more, key: 1.0})), byte_tokenizer(chat=False), name="p")
    scale = 1 / more[key] if name == "granite" else more[key]
    ours, theirs = (
        attribute(lm, PROMPT, " bread", " again", raw=True, keep_universal=True).prompts[0].strongest
        for lm in (this.lm, plain)
    )
    torch.testing.assert_close(ours, theirs * scale, rtol=1e-3, atol=1e-4 * scale * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["granite", "gemma2", "gemma4", "olmo"])
def test_shares_of_the_last_neurons_and_of_what_passes_them_by_add_up_to_the_logit(name: str) -> None:
    """Also where a norm has no weight of its own, as OLMo's and some of Gemma 4's."""
    this = model_of(name)
    streams: list[Tensor] = []
    block: Any = this.blocks[-1]
    before_mlp = block.pre_feedforward_layernorm if name.startswith("gemma") else block.post_attention_layernorm
    with (
        own_hooks([(before_mlp, lambda _module, inputs: streams.append(inputs[0]))], before=True),
        own_hooks([(block, lambda _module, _inputs, output: streams.append(first(output)))]),
    ):
        linear = linear_pass(this.lm, [this.lm.token_ids(PROMPT)], "frozen")
    middle, end = streams[-2:]  # before that, the first time, two tokens are looked at
    logit = linear.logits[0, 9]
    to_neurons, to_stream = torch.autograd.grad(logit, (linear.neurons[-1], end))
    by_neurons = float((to_neurons * linear.neurons[-1].detach()).sum())
    by_stream, found = float((to_stream * middle.detach()).sum()), float(logit.detach())
    assert by_neurons + by_stream == pytest.approx(found, rel=1e-3, abs=1e-4)
    wanted = true_logits(this, this.lm.token_ids(PROMPT))[-1, 9]
    assert found == pytest.approx(float(wanted), rel=1e-3, abs=1e-5)
    assert abs(by_neurons) > 1e-3


@pytest.mark.parametrize("name", SCALED)
def test_how_surprising_a_text_is_is_what_the_model_says(name: str) -> None:
    this = model_of(name)
    before, after = this.lm.token_ids(PROMPT), this.lm.token_ids(TEXT)
    logprobs = true_logits(this, [*before, *after])[len(before) - 1 : -1].log_softmax(-1)
    wanted = -float(logprobs.gather(1, torch.tensor(after)[:, None]).sum())
    assert surprises(this.lm, [PROMPT, PROMPT], [after, []]).tolist() == pytest.approx([wanted, 0.0], rel=1e-4)


def test_nobody_calls_the_head_alone_or_knows_what_becomes_of_its_output() -> None:
    for path in Path(neurosteer.__file__).parent.rglob("*.py"):
        found = re.search(
            r"get_output_embeddings\(\)\(|softcapping|logit_scale|logits_scaling", path.read_text("utf-8")
        )
        assert not found, f"{path}: {found}; ask neurosteer.models.logits"


def test_a_percentile_lies_between_its_neighbours_and_is_infinite_where_one_is() -> None:
    assert kl_percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert kl_percentile([1.0, 2.0, torch.inf], 50) == 2.0
    assert kl_percentile([1.0, 2.0, torch.inf], 75) == torch.inf


# --- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_its_gain_on_the_normalised_stream(name: str) -> None:
    this = model_of(name)
    parts = probe_norm(this.norm, [D_MODEL])
    x = torch.randn(5, D_MODEL, generator=torch.Generator().manual_seed(1)) * 7 + 2
    centred = x - x.mean(-1, keepdim=True) if parts.centres else x
    with torch.no_grad():
        wanted = this.norm(x)
    found = parts.gain * centred / centred.square().mean(-1, keepdim=True).sqrt() + parts.bias
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert parts.centres == (name in ("cohere", "cohere2", "olmo", "nemotron"))


@pytest.mark.parametrize("name", NORMS)
def test_a_direction_promotes_the_tokens_that_it_raises_in_the_models_own_logits(name: str) -> None:
    """The logits' derivative along a direction that leaves the norm's scale alone."""
    this = model_of(name)
    seen: list[Tensor] = []
    with own_hooks([(this.norm, lambda _module, inputs: seen.append(inputs[0][0, -1].detach()))], before=True):
        true_logits(this, this.lm.token_ids(PROMPT))
    stream = seen[0].double()
    direction = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2)).double()
    if probe_norm(this.norm, [D_MODEL]).centres:
        stream, direction = stream - stream.mean(), direction - direction.mean()
    direction = direction - stream * (direction @ stream) / (stream @ stream)
    head = this.model.get_output_embeddings().weight.double()
    with torch.no_grad():
        up, down = (this.norm((stream + sign * 1e-2 * direction).float()[None]).double()[0] for sign in (1, -1))
    slope = head @ (up - down)
    raised, lowered = promoted_tokens(this.lm, direction.float(), 3)
    decode = this.lm.tokenizer.decode
    assert list(raised) == [decode([token])[:100] for token in slope.topk(3).indices.tolist()]
    assert list(lowered) == [decode([token])[:100] for token in (-slope).topk(3).indices.tolist()]
    assert output_scores(this.lm, 1, direction.float()[None], 10.0).isfinite().all()


@pytest.mark.parametrize("layer", [0, N_LAYERS - 1])
@pytest.mark.parametrize("name", NORMS)
def test_columns_are_the_derivative_of_the_stream_by_a_neuron(name: str, layer: int) -> None:
    """Where the MLP's output is normalised, up to the norm's scale: a step drowns all but the neuron's own share."""
    this = model_of(name)
    columns = this.lm.write_columns(layer)
    ids = torch.tensor([this.lm.token_ids(PROMPT)])

    def after(neuron: int, step: float) -> Tensor:
        found: list[Tensor] = []

        def change(_module: Any, inputs: Any) -> Any:
            changed = inputs[0].clone()
            changed[..., neuron] += step
            return (changed,)

        keep = [(this.blocks[layer], lambda _module, _inputs, output: found.append(first(output)[0, -1]))]
        with torch.no_grad(), own_hooks([(this.downs[layer], change)], before=True), own_hooks(keep):
            this.model(ids, use_cache=False)
        return found[0].double()

    normed = name in ("gemma2", "gemma3", "gemma4", "olmo2", "glm4")
    for neuron in (0, 17, D_MLP - 1):
        step = 1e6 if normed else 1.0
        slope = (after(neuron, step) - after(neuron, -step)).float() / 2
        assert torch.cosine_similarity(slope, columns[neuron], dim=0) > 0.9999
        if not normed:
            torch.testing.assert_close(slope, columns[neuron], rtol=1e-3, atol=1e-3 * float(columns.abs().max()))


def test_a_scale_on_the_stream_is_in_the_columns() -> None:
    this = model_of("gemma4")
    before = this.lm.write_columns(1)
    block: Any = this.blocks[1]
    block.layer_scalar.fill_(0.5)
    try:
        torch.testing.assert_close(this.lm.write_columns(1), before / 2)
    finally:
        block.layer_scalar.fill_(1.0)
