"""Models: the parts that are found, what is refused and how, fingerprints, and prompts and texts as token ids."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    ARCHITECTURES,
    D_MLP,
    D_MODEL,
    N_LAYERS,
    VOCABULARY,
    Tiny,
    byte_tokenizer,
    first,
    make_tiny,
    own_hooks,
    random_model,
    tiny_config,
    word_tokenizer,
)
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig

from neurosteer.errors import ModelError, UsageError
from neurosteer.models import loading
from neurosteer.models.language_model import LanguageModel, ModelShape
from neurosteer.models.loading import describe_model, load_model
from neurosteer.models.sources import Source


def wrap(model: Any, **named: Any) -> LanguageModel:
    return describe_model(model, byte_tokenizer(), name="odd", **named)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 600
    return message


def word_lm(*, chat: bool | None = None) -> LanguageModel:
    """A model whose ids are words: <pad> 0, <s> 1, <user> 2, <end> 3, <bot> 4, <unk> 5, one 6, … seven 12."""
    return describe_model(random_model(tiny_config("llama")), word_tokenizer(), name="words", chat=chat)


# --- the parts -------------------------------------------------------------------------------------------------------


def test_blocks_down_projections_and_final_norm_are_the_models_own(each: Tiny) -> None:
    lm = each.lm
    assert lm.shape == ModelShape(N_LAYERS, D_MODEL, D_MLP)
    assert list(lm.blocks) == each.blocks
    assert list(lm.down_projections) == each.downs
    assert lm.final_norm is each.norm
    assert lm.decoder is (each.model.transformer if each.architecture == "gpt2" else each.model.model)
    assert lm.n_layers == N_LAYERS
    assert lm.max_positions == 256


def test_a_models_weights_ask_for_no_gradients_and_dropout_is_off(each: Tiny) -> None:
    assert not any(parameter.requires_grad for parameter in each.model.parameters())
    assert not each.model.training


def small(kind: type, **named: Any) -> Any:
    return kind(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **named)


def test_neurons_that_cannot_be_told_apart_by_token_are_refused_where_they_are_asked_for() -> None:
    lm = wrap(AutoModelForCausalLM.from_config(small(OPTConfig, ffn_dim=64, word_embed_proj_dim=32)))
    assert lm.shape == ModelShape(2, 32, 0)
    with pytest.raises(ModelError) as error:
        _ = lm.down_projections
    assert "block 0 (OPTDecoderLayer)" in one_line(error) and "Vectors work on it" in one_line(error)


def test_mlps_of_different_widths_are_refused_as_neurons() -> None:
    model = random_model(tiny_config("llama"))
    wide = random_model(tiny_config("llama", intermediate_size=2 * D_MLP))
    model.model.layers[1].mlp = wide.model.layers[1].mlp
    with pytest.raises(ModelError, match=rf"different widths \({D_MLP}, {2 * D_MLP}\)"):
        _ = wrap(model).down_projections


def test_a_model_without_its_list_of_blocks_says_so() -> None:
    model = random_model(tiny_config("llama"))
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(ModelError, match=r"no list of 4 decoder blocks was found; its parts are embed_tokens"):
        wrap(model)


def test_a_model_with_another_number_of_blocks_than_its_config_says_so() -> None:
    model = random_model(tiny_config("llama"))
    model.model.layers = model.model.layers[:3]
    with pytest.raises(ModelError, match="no list of 4 decoder blocks"):
        wrap(model)


def test_where_there_is_no_final_norm_nothing_is_done() -> None:
    lm = wrap(AutoModelForCausalLM.from_config(small(OPTConfig, ffn_dim=64, do_layer_norm_before=False)))
    assert type(lm.final_norm) is nn.Identity


def test_one_odd_block_among_others_is_named_by_its_number() -> None:
    model = random_model(tiny_config("qwen2"))
    model.model.layers[2].mlp.down_proj = None
    with pytest.raises(ModelError, match="block 2"):
        _ = wrap(model).down_projections


def test_a_block_without_any_mlp_has_no_neurons() -> None:
    model = random_model(tiny_config("llama"))
    del model.model.layers[1].mlp
    with pytest.raises(ModelError, match=r"block 1 \(LlamaDecoderLayer\)"):
        _ = wrap(model).down_projections


def test_a_model_that_is_its_own_decoder_says_so() -> None:
    model = random_model(tiny_config("llama"))
    with pytest.raises(ModelError, match="no decoder beneath the LM head"):
        wrap(model.model)


# --- what a neuron writes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 3])
def test_write_columns_are_what_one_unit_of_a_neuron_adds_to_the_residual_stream(each: Tiny, layer: int) -> None:
    """Finite differences: raise one neuron by one and look at what the block returns."""
    ids = torch.tensor([each.lm.prompt_ids("the cat sings")])
    columns = each.lm.write_columns(layer)
    assert columns.shape == (D_MLP, D_MODEL) and columns.dtype == torch.float32

    def after(neuron: int | None, step: float) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def raise_one(_module: Any, inputs: Any) -> Any:
            changed = inputs[0].clone()
            if neuron is not None:
                changed[..., neuron] += step
            return (changed,)

        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            found.append(first(output)[0, -1])

        with (
            torch.no_grad(),
            own_hooks([(each.downs[layer], raise_one)], before=True),
            own_hooks([(each.blocks[layer], keep)]),
        ):
            each.model(ids, use_cache=False)
        return found[0].double()

    normed = each.architecture.startswith("gemma")  # there the MLP's output is normalised before it is added
    for neuron in (0, 17, 63):
        if not normed:
            slope = (after(neuron, 1.0) - after(None, 0.0)).float()
            assert torch.allclose(slope, columns[neuron], atol=2e-4 * float(columns.abs().max()) + 1e-4)
            continue
        # A huge step drowns the rest of the MLP's output, which leaves the neuron's own, normalised: its direction.
        alone = after(neuron, 1e6) - after(neuron, -1e6)
        assert torch.cosine_similarity(alone.float(), columns[neuron], dim=0) > 0.9999


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model as `save_pretrained` writes it, in float32, with weights that bfloat16 can hold."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    model = random_model(tiny_config("llama")).to(torch.bfloat16).float()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_folder_loads_with_the_same_weights_and_parts(architecture: str, tmp_path: Path) -> None:
    original = make_tiny(architecture)
    original.model.save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    lm = load_model(tmp_path / "m", device="cpu", dtype="float32")
    assert lm.name == "m" and lm.revision is None and lm.chat
    assert lm.shape == original.lm.shape
    assert lm.dtype == torch.float32 and lm.device.type == "cpu"
    ids = torch.tensor([lm.prompt_ids("the dog")])
    assert ids.tolist() == [original.lm.prompt_ids("the dog")]
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, original.model(ids).logits)
    assert lm.fingerprint == original.lm.fingerprint


def test_the_fingerprint_is_the_same_in_float32_and_bfloat16(saved: Path) -> None:
    prints = {
        load_model(saved, device="cpu", dtype=dtype).fingerprint for dtype in ("float32", "bfloat16", torch.float32)
    }
    assert len(prints) == 1
    assert len(prints.pop()) == 16


@pytest.mark.parametrize(
    "which", ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight"]
)
def test_the_fingerprint_differs_after_any_weight_is_trained_a_little(saved: Path, which: str) -> None:
    lm = load_model(saved, device="cpu", dtype="float32")
    before = lm.fingerprint
    other = load_model(saved, device="cpu", dtype="float32")
    with torch.no_grad():
        dict(other.model.named_parameters())[which].mul_(1.02)
    assert other.fingerprint != before


def test_the_fingerprint_tells_two_initialisations_and_two_architectures_apart() -> None:
    lms = [make_tiny("llama").lm, make_tiny("llama", seed=1).lm, make_tiny("qwen2").lm]
    assert len({lm.fingerprint for lm in lms}) == 3


def test_the_reference_of_a_model_says_what_artifacts_must_agree_with(llama: Tiny) -> None:
    reference = llama.lm.reference
    assert (reference.name, reference.revision) == ("tiny/llama", "r1")
    assert (reference.n_layers, reference.d_model, reference.d_mlp) == (N_LAYERS, D_MODEL, D_MLP)
    assert reference.fingerprint == llama.lm.fingerprint


def test_a_folder_with_only_pickled_weights_is_refused_unopened(saved: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    for file in saved.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({"model.norm.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError) as error:
        load_model(tmp_path, device="cpu")
    assert "could not be loaded" in one_line(error)
    assert not ran.exists()


def test_a_damaged_weights_file_is_one_clear_line(saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ModelError) as error:
        load_model(tmp_path, device="cpu")
    assert "could not be loaded" in one_line(error)


@pytest.mark.parametrize("dtype", ["float64", "int8", "", "FLOAT32", 16])
def test_an_unknown_dtype_is_refused_naming_the_allowed_ones(saved: Path, dtype: Any) -> None:
    with pytest.raises(UsageError, match="float32, bfloat16, float16"):
        load_model(saved, dtype=dtype)


@pytest.mark.parametrize(
    "device", ["banana", "cpu:x", "gpu", *([] if torch.cuda.is_available() else ["cuda", "cuda:7"])]
)
def test_an_unknown_or_absent_device_is_one_clear_line(saved: Path, device: str) -> None:
    with pytest.raises(UsageError) as error:
        load_model(saved, device=device)
    assert device in one_line(error)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has that device")
def test_a_device_that_torch_knows_but_this_machine_lacks_is_one_clear_line(saved: Path) -> None:
    with pytest.raises((UsageError, ModelError)) as error:
        load_model(saved, device="mps")
    assert "mps" in one_line(error)


def test_a_chat_model_without_a_template_is_a_users_mistake() -> None:
    model = random_model(tiny_config("llama"))
    with pytest.raises(UsageError, match="no chat template"):
        describe_model(model, byte_tokenizer(chat=False), name="base", chat=True)
    assert describe_model(model, byte_tokenizer(chat=False), name="base").chat is False
    assert describe_model(model, byte_tokenizer(), name="chat").chat is True
    assert describe_model(model, byte_tokenizer(), name="chat used as base", chat=False).chat is False


def test_a_slow_tokenizer_is_refused(llama: Tiny) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match="Slow"):
        describe_model(llama.model, Slow(), name="slow")


def test_the_fingerprint_is_the_same_in_every_dtype_and_that_of_float32(tmp_path: Path) -> None:
    """float16 rounds differently, and loses the smallest weights."""
    model = random_model(tiny_config("llama"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e-4)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = {dtype: load_model(tmp_path, device="cpu", dtype=dtype) for dtype in ("float32", "bfloat16", "float16")}
    assert loaded["float16"].dtype == torch.float16
    assert all(weight.dtype == torch.float16 for weight in loaded["float16"].model.parameters())
    assert {lm.fingerprint for lm in loaded.values()} == {describe_model(model, byte_tokenizer(), name="m").fingerprint}


@pytest.mark.parametrize(("supported", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bfloat16_is_the_default_only_on_gpus_that_compute_it(
    supported: bool, wanted: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def is_supported(including_emulation: bool = True) -> bool:
        asked.append(including_emulation)
        return supported

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert loading._choose_dtype(None, torch.device("cuda")) == wanted and asked == [False]


def test_weights_go_straight_to_a_gpu_but_for_a_gguf_files(saved: Path) -> None:
    source = Source(saved, "m")
    gpu = torch.device("cuda", 0)
    assert loading._straight_to(source, torch.device("cpu")) is None
    assert loading._straight_to(source, gpu) == {"": gpu}
    assert loading._straight_to(replace(source, gguf_file="m.gguf"), gpu) is None


def test_a_model_that_refuses_to_be_moved_is_one_clear_line() -> None:
    class Quantised:
        def to(self, device: torch.device) -> None:
            raise ValueError("`.to` is not supported for 8-bit models.\nUse the model as it is.")

    with pytest.raises(UsageError, match="'mps' cannot be used here") as error:
        loading._move(Quantised(), torch.device("mps"))
    one_line(error)


# --- what chat templates are given -----------------------------------------------------------------------------------

THINKING = (
    "{% for m in messages %}<user> {{ m['content'] }} <end> {% endfor %}{% if add_generation_prompt %}<bot>"
    "{% if enable_thinking is defined and not enable_thinking %} seven{% endif %}{% endif %}"
)
DATED = {
    "date_string": "{% if not date_string is defined %}{% set date_string = 'never' %}{% endif %}{{ date_string }}",
    "strftime_now": "{{ strftime_now('%d %b %Y') }}",
}


def with_template(template: str, **given: Any) -> LanguageModel:
    tokenizer = copy.deepcopy(word_tokenizer())
    tokenizer.chat_template = template
    return describe_model(random_model(tiny_config("llama")), tokenizer, name="words", **given)


def test_a_model_that_can_think_is_told_not_to_unless_asked() -> None:
    lm = with_template(THINKING)
    assert lm.template_options == {"enable_thinking": False}
    assert lm.prompt_ids("one") == [2, 6, 3, 4, 12]  # the template's own way to say that there is no thinking
    assert lm.frame(["two"], "answer", max_tokens=9)[0].ids == [2, 3, 4, 12, 7]
    thinking = with_template(THINKING, template_options={"enable_thinking": True})
    assert thinking.template_options == {"enable_thinking": True} and thinking.prompt_ids("one") == [2, 6, 3, 4]


@pytest.mark.parametrize("kind", DATED)
def test_a_template_that_prints_the_date_prints_the_same_one_on_every_day(kind: str) -> None:
    lm = with_template(DATED[kind])
    assert lm.template_options == {"today": "2024-07-26"}
    assert lm._user_turn("one") == "26 Jul 2024"
    assert with_template(DATED[kind], template_options={"today": "2020-02-03"})._user_turn("x") == "03 Feb 2020"
    assert json.loads(json.dumps(lm.template_options)) == lm.template_options


def test_a_plain_template_is_given_nothing_and_odd_options_are_refused() -> None:
    assert word_lm().template_options == {} and word_lm(chat=False).template_options == {}
    for odd in ({"x": object()}, {"today": "yesterday"}, {"today": 3}, {"x": float("nan")}):
        with pytest.raises(UsageError, match="template_options") as error:
            with_template(THINKING, template_options=odd)
        one_line(error)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_a_chat_prompt_is_the_rendered_template_and_a_raw_one_is_the_text() -> None:
    lm = word_lm()
    assert lm.prompt_ids("one two") == [2, 6, 7, 3, 4]  # <user> one two <end> <bot>: the template's own specials only
    assert lm.prompt_ids("one two", raw=True) == [1, 6, 7]  # <s> one two
    assert word_lm(chat=False).prompt_ids("one two") == [1, 6, 7]


def test_a_conversation_is_rendered_turn_by_turn() -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    assert word_lm().prompt_ids(turns) == [2, 6, 3, 4, 7, 3, 2, 8, 3, 4]
    with pytest.raises(UsageError, match="without a chat template"):
        word_lm().prompt_ids(turns, raw=True)
    with pytest.raises(UsageError, match="without a chat template"):
        word_lm(chat=False).prompt_ids(turns)


def test_a_template_that_refuses_a_conversation_is_a_model_error() -> None:
    lm = word_lm()
    template = lm.tokenizer.chat_template
    try:
        lm.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(ModelError, match="roles must alternate"):
            lm.prompt_ids("one")
    finally:
        lm.tokenizer.chat_template = template


# --- framing ---------------------------------------------------------------------------------------------------------


def spans(
    lm: LanguageModel, texts: list[str], framing: Any, max_tokens: int = 512
) -> list[tuple[list[int], int, bool]]:
    return [(item.ids, item.start, item.cut) for item in lm.frame(texts, framing, max_tokens=max_tokens)]


def test_raw_framing_is_the_text_with_the_tokenizers_own_specials() -> None:
    assert spans(word_lm(), ["one two", "three"], "raw") == [([1, 6, 7], 0, False), ([1, 8], 0, False)]


def test_prompt_framing_is_a_user_turn_with_the_generation_prompt() -> None:
    # It is read from the text on: the template's fixed beginning (<user>) says nothing.
    assert spans(word_lm(), ["one two", "three"], "prompt") == [([2, 6, 7, 3, 4], 1, False), ([2, 8, 3, 4], 1, False)]


def test_answer_framing_is_the_assistants_turn_of_which_only_its_own_tokens_are_read() -> None:
    # An empty user turn and the generation prompt (<user> <end> <bot>), then the text.
    assert spans(word_lm(), ["one two", "three"], "answer") == [([2, 3, 4, 6, 7], 3, False), ([2, 3, 4, 8], 3, False)]


def test_long_texts_keep_their_first_tokens_and_say_that_they_were_cut() -> None:
    lm, long = word_lm(), "one two three four five"
    assert spans(lm, [long, "one"], "raw", 3) == [([1, 6, 7], 0, True), ([1, 6], 0, False)]
    assert spans(lm, [long, "one"], "answer", 3) == [([2, 3, 4, 6, 7, 8], 3, True), ([2, 3, 4, 6], 3, False)]
    # The text is cut, not the turn around it: the generation prompt stays.
    assert spans(lm, [long, "one"], "prompt", 3) == [([2, 6, 7, 8, 3, 4], 1, True), ([2, 6, 3, 4], 1, False)]


def test_a_text_of_exactly_the_allowed_length_is_not_cut() -> None:
    assert spans(word_lm(), ["one two three"], "answer", 3) == [([2, 3, 4, 6, 7, 8], 3, False)]
    assert spans(word_lm(), ["one two"], "raw", 3) == [([1, 6, 7], 0, False)]


def test_framings_are_refused_where_they_have_no_meaning() -> None:
    with pytest.raises(UsageError, match="raw, prompt, answer"):
        word_lm().frame(["one"], "chat", max_tokens=9)  # type: ignore[arg-type]
    for framing in ("prompt", "answer"):
        with pytest.raises(UsageError, match="base model"):
            word_lm(chat=False).frame(["one"], framing, max_tokens=9)
    assert word_lm().frame([], "answer", max_tokens=9) == []
