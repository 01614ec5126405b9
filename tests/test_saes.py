"""Sparse autoencoders from wherever they come, against sae-lens, TransformerLens and loops of our own."""

import copy
import dataclasses
import gc
import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from checks import refused
from safetensors.torch import load_file, save_file
from tiny import D_MODEL, N_LAYERS, VOCABULARY, Tiny, build, byte_tokenizer, make_tiny, random_model, texts, tiny
from tiny_saes import N_FEATURES, PlainSae, random_sae
from torch import Tensor
from transformers import AutoConfig, GPT2Config

from neurosteer.artifacts.recipes import Recipe
from neurosteer.artifacts.storage import load, save
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import MismatchError, ModelError, NeuroSteerError, UsageError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import describe_model, load_model
from neurosteer.reading.loop import read_activations, read_tokens
from neurosteer.reading.request import Request
from neurosteer.saes import autoencoder
from neurosteer.saes.autoencoder import MAX_ENCODED_VALUES, SparseAutoencoder
from neurosteer.saes.formats import layer_of_hook
from neurosteer.saes.loading import load_sae
from neurosteer.saes.offers import embedded_saes
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Session

HOOK = "blocks.2.hook_resid_post"
ALL_TEXTS = texts(40, seed=21)
EXAMPLES = ContrastSet(tuple(ALL_TEXTS[:20]), tuple(ALL_TEXTS[20:]), name="moods")


def some_rows(n: int = 40, *, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed)) * scale


def named(this: Tiny, name: str) -> LanguageModel:
    """The same model under another name."""
    return dataclasses.replace(this.lm, name=name)


# --- sae-lens's own reading ------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "standard, bias kept": {"apply_b_dec_to_input": False},
    "jumprelu": {},
    "jumprelu, bias kept": {"apply_b_dec_to_input": False},
    "topk": {"k": 7},
    "topk, bias kept": {"k": 7, "apply_b_dec_to_input": False},
    "topk, rescaled": {"k": 7, "rescale_acts_by_decoder_norm": True},
    "gated": {},
    "gated, bias kept": {"apply_b_dec_to_input": False},
    "standard, layer_norm": {"normalize_activations": "layer_norm"},
    "topk, layer_norm": {"k": 7, "normalize_activations": "layer_norm"},
    "jumprelu, constant_norm_rescale": {"normalize_activations": "constant_norm_rescale"},
    "standard, expected_average_only_in": {"normalize_activations": "expected_average_only_in"},
}


def write_with_sae_lens(folder: Path, kind: str, dtype: str = "float32", **metadata: Any) -> Path:
    """An SAE with random weights, none of them 0, as sae-lens saves it."""
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class
    from sae_lens.saes.sae import SAEMetadata

    sae_class, config_class = get_sae_class(kind.partition(",")[0])
    about = SAEMetadata(**{"model_name": "tiny/llama", "hook_name": HOOK, **metadata})
    config = config_class(d_in=D_MODEL, d_sae=N_FEATURES, dtype=dtype, metadata=about, **KINDS[kind])
    sae: SAE[Any] = sae_class(config)
    generator = torch.Generator().manual_seed(len(kind))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * 0.4
            parameter.copy_(values.abs() if name == "threshold" else values)
    sae.save_model(folder)
    return folder


def read_with_sae_lens(folder: Path) -> Any:
    from sae_lens import SAE

    return SAE.load_from_disk(folder, device="cpu", dtype="float32")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_encodes_and_decodes_as_in_sae_lens(llama: Tiny, tmp_path: Path, kind: str, dtype: str) -> None:
    folder = write_with_sae_lens(tmp_path / "sae", kind, dtype)
    assert {tensor.dtype for tensor in load_file(folder / "sae_weights.safetensors").values()} == {
        getattr(torch, dtype)
    }
    ours, theirs = load_sae(llama.lm, folder), read_with_sae_lens(folder)
    assert (ours.layer, ours.model_name, ours.n_features, ours.d_model) == (2, "tiny/llama", N_FEATURES, D_MODEL)
    assert ours.kind == kind.partition(",")[0]
    for scale in (0.1, 1.0, 30.0):
        rows = some_rows(scale=scale)
        before = rows.clone()
        with torch.no_grad():
            features, made = theirs.encode(rows.clone()), theirs(rows.clone())
        found = ours.encode(rows)
        assert torch.equal(rows, before)
        assert found.dtype == torch.float32 and bool((found != 0).any()) and bool((found == 0).any())
        assert torch.allclose(found, features, rtol=1e-5, atol=1e-5 * scale)
        assert torch.equal(found != 0, features != 0)
        assert torch.allclose(ours.decode(found), made, rtol=1e-5, atol=1e-5 * max(scale, 1.0))


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk, rescaled", "standard, layer_norm"])
def test_features_have_the_shape_of_what_they_are_of(llama: Tiny, tmp_path: Path, kind: str) -> None:
    sae = load_sae(llama.lm, write_with_sae_lens(tmp_path / "sae", kind))
    residual = some_rows(24).reshape(2, 3, 4, D_MODEL)
    features = sae.encode(residual)
    assert features.shape == (2, 3, 4, N_FEATURES)
    assert torch.allclose(features[1, 2, 3], sae.encode(residual[1, 2, 3]), atol=1e-6)
    residual = residual[1, 2]
    assert sae.decode(sae.encode(residual)).shape == residual.shape
    assert torch.equal(sae.encode(residual.double()), sae.encode(residual))
    half = some_rows(200).to(torch.bfloat16)  # may be multiplied in bfloat16, whose rounding is 1 in 256
    exact = sae.encode(half.float())
    assert sae.encode(half).dtype == torch.float32
    assert float((sae.encode(half) - exact).norm() / exact.norm()) < 0.03


def test_an_encoder_is_held_in_the_precision_that_is_asked_for_and_no_other(llama: Tiny, tmp_path: Path) -> None:
    def halves() -> int:
        found = (one for one in gc.get_objects() if type(one) is torch.Tensor)
        return sum(one.dtype == torch.bfloat16 and one.shape == (D_MODEL, N_FEATURES) for one in found)

    before = halves()
    sae = load_sae(llama.lm, write_with_sae_lens(tmp_path / "sae", "standard"))
    sae.encode(some_rows())
    assert halves() == before
    for _ in range(2):
        sae.encode(some_rows().to(torch.bfloat16))
        assert halves() == before + 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "norm" not in kind and "average" not in kind])
def test_a_decoder_row_is_what_one_unit_of_its_feature_adds(llama: Tiny, tmp_path: Path, kind: str) -> None:
    """What the method sums up with activations as weights."""
    sae = load_sae(llama.lm, write_with_sae_lens(tmp_path / "sae", kind))
    nothing = sae.decode(torch.zeros(N_FEATURES))
    for feature in range(0, N_FEATURES, 5):
        one = torch.zeros(N_FEATURES)
        one[feature] = 1.0
        assert torch.allclose(sae.decode(one) - nothing, sae.decoder[feature], atol=1e-5)


@pytest.mark.parametrize("jumps", [False, True])
@pytest.mark.parametrize("subtracts", [False, True])
def test_the_plain_kinds_are_their_formulas(llama: Tiny, tmp_path: Path, jumps: bool, subtracts: bool) -> None:
    plain = random_sae(3, scale=5.0, jumps=jumps, subtracts=subtracts)
    sae = load_sae(llama.lm, plain.write(tmp_path / "sae", model_name="tiny/llama"))
    for row in some_rows(30, scale=1.0):
        wanted = plain.encode(row)
        assert np.allclose(sae.encode(row).numpy(), wanted, rtol=1e-4, atol=1e-5)
        assert np.allclose(sae.decode(torch.from_numpy(wanted).float()).numpy(), plain.decode(wanted), atol=1e-4)


def test_a_threshold_below_zero_still_lets_no_negative_feature_through(llama: Tiny, tmp_path: Path) -> None:
    plain = dataclasses.replace(random_sae(4, jumps=True), threshold=torch.full((N_FEATURES,), -5.0))
    folder = plain.write(tmp_path / "sae", model_name="tiny/llama")
    found = load_sae(llama.lm, folder).encode(some_rows())
    assert float(found.min()) == 0.0
    with torch.no_grad():
        assert torch.allclose(found, read_with_sae_lens(folder).encode(some_rows()), atol=1e-5)


def test_an_sae_saved_by_an_sae_lens_before_version_six_is_read_as_sae_lens_reads_it(
    llama: Tiny, tmp_path: Path
) -> None:
    """Everything about the model stood at the top, the site was a hook_point, TopK an activation function."""
    for number, changes in enumerate(
        ({}, {"architecture": "standard"}, {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}})
    ):
        folder = random_sae(5).write(tmp_path / str(number))
        old: dict[str, Any] = {
            "model_name": "tiny-llama",
            "hook_point": "blocks.3.hook_resid_pre",
            "hook_point_layer": 3,
            "d_in": D_MODEL,
            "d_sae": N_FEATURES,
            "dtype": "torch.float32",
            "device": "cpu",
            "normalize_activations": False,
        }
        if number == 1:
            old["normalize_activations"] = "none"
        (folder / "cfg.json").write_text(json.dumps({**old, **changes}), encoding="utf-8")
        sae = load_sae(named(llama, "some/tiny-llama"), folder)
        assert (sae.layer, sae.model_name) == (2, "tiny-llama")
        with torch.no_grad():
            wanted = read_with_sae_lens(folder).encode(some_rows(scale=3.0))
        assert torch.allclose(sae.encode(some_rows(scale=3.0)), wanted, atol=1e-5)


def test_the_plain_kinds_are_read_without_sae_lens(tmp_path: Path) -> None:
    """Its import takes seconds."""
    folders = [
        write_with_sae_lens(tmp_path / str(number), kind, dtype)
        for number, (kind, dtype) in enumerate(
            [("standard", "float32"), ("jumprelu", "float16"), ("jumprelu, bias kept", "float32")]
        )
    ]
    code = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny import tiny
from neurosteer.saes.loading import load_sae
for folder in {[str(folder) for folder in folders]!r}:
    sae = load_sae(tiny("llama").lm, folder)
    sae.decode(sae.encode(torch.ones(3, 32)))
found = [name for name in sys.modules if name.startswith(("sae_lens", "transformer_lens"))]
print(len(found), "modules of sae-lens")
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert ran.stdout == "0 modules of sae-lens\n", ran.stderr


def test_an_sae_says_where_its_features_are_on_neuronpedia(llama: Tiny, tmp_path: Path) -> None:
    folder = random_sae(6).write(tmp_path / "sae", metadata={"neuronpedia_id": "tiny/2-res", "prepend_bos": True})
    sae = load_sae(llama.lm, folder)
    assert sae.feature_link(7) == "https://neuronpedia.org/tiny/2-res/7"
    assert sae.prepend_bos is True
    plain = load_sae(llama.lm, random_sae(6).write(tmp_path / "other"))
    assert plain.feature_link(7) is None and plain.prepend_bos is False


# --- sites -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook_name", "layer"),
    [
        ("blocks.1.hook_resid_pre", 0),
        ("blocks.12.hook_resid_pre", 11),
        ("blocks.0.hook_resid_post", 0),
        ("blocks.25.hook_resid_post", 25),
        ("model.layers.12", 12),
        ("model.language_model.layers.4", 4),
        ("transformer.h.3", 3),
        ("gpt_neox.layers.5", 5),
        ("layers.7", 7),
        ("h.0", 0),
    ],
)
def test_a_hook_name_stands_for_the_block_whose_output_it_is(hook_name: str, layer: int) -> None:
    assert layer_of_hook(hook_name) == layer


@pytest.mark.parametrize(
    "hook_name",
    [
        "blocks.0.hook_resid_pre", "blocks.3.hook_mlp_out", "blocks.3.attn.hook_z", "blocks.3.ln2.hook_normalized",
        "blocks.3.hook_resid_mid", "blocks.3.hook_attn_out", "hook_embed", "blocks.x.hook_resid_post",
        "model.layers.12.mlp", "blocks.3.hook_resid_post.more", "", "None", "blocks.-1.hook_resid_post",
    ],
)  # fmt: skip
def test_any_other_site_is_refused_naming_it(llama: Tiny, tmp_path: Path, hook_name: str) -> None:
    refused(lambda: layer_of_hook(hook_name), UsageError, repr(hook_name))
    folder = random_sae(7).write(tmp_path / "sae", hook_name)
    words = ("embeddings", "later block") if "resid_pre" in hook_name else ("residual stream", "hook_resid_post")
    refused(lambda: load_sae(llama.lm, folder), UsageError, repr(hook_name), *words)


# --- what reaches the encoder, against TransformerLens ---------------------------------------------------------------


def release_options(release: str) -> dict[str, Any]:
    """How sae-lens's registry says the model of a release is to be loaded in TransformerLens."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    overrides: Any = get_pretrained_saes_directory()[release].config_overrides or {}
    return dict(overrides.get("model_from_pretrained_kwargs", {}))


def tiny_gpt2() -> Any:
    """Of GPT-2's shape, four times as wide in its MLP as elsewhere, which TransformerLens takes for granted."""
    config: Any = GPT2Config(
        vocab_size=VOCABULARY, n_positions=256, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=4, initializer_range=0.35,
        bos_token_id=None, eos_token_id=None, architectures=["GPT2LMHeadModel"],
    )  # fmt: skip
    config.n_ctx = 256  # as in GPT-2's own file
    return random_model(config)


@pytest.fixture(scope="module")
def gpt2() -> LanguageModel:
    return describe_model(tiny_gpt2(), byte_tokenizer(chat=False), name="openai-community/gpt2")


@pytest.fixture(scope="module")
def in_transformer_lens(gpt2: LanguageModel) -> Callable[[dict[str, Any]], Any]:
    """The same GPT-2 loaded as sae-lens loads the model of a release with these options."""
    from sae_lens.load_model import load_model

    def load_it(options: dict[str, Any]) -> Any:
        offline = {"hf_model": gpt2.model, "tokenizer": copy.deepcopy(byte_tokenizer(chat=False))}  # it changes it
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: gpt2.model.config)
            return load_model("HookedTransformer", "gpt2-small", "cpu", {**options, **offline})

    return load_it


def seen_by_the_encoder(lm: LanguageModel, folder: Path, text: str) -> Tensor:
    """What reaches the encoder of the SAE in `folder`, `[tokens read, d_model]`."""
    sae = dataclasses.replace(load_sae(lm, folder), encode_rows=lambda rows: rows, decoder=torch.eye(D_MODEL))
    framed = lm.frame([text], "raw", max_tokens=512)
    return sae.encode(read_tokens(lm, framed, [sae.layer])[sae.layer])


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm(dim=-1).max() / wanted.norm(dim=-1).min())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("options", ["of the release", {}, {"center_writing_weights": False}], ids=str)
def test_the_encoder_sees_what_transformer_lens_gives_at_the_release_options(
    gpt2: LanguageModel, in_transformer_lens: Callable[[dict[str, Any]], Any], tmp_path: Path, options: Any
) -> None:
    if isinstance(options, str):
        options = release_options("gpt2-small-res-jb")
        assert options == {"center_writing_weights": True}
    theirs = in_transformer_lens(options)
    text = "the cat sings slowly under the dark mountain"
    with torch.no_grad():
        cache = theirs.run_with_cache(torch.tensor([gpt2.prompt_ids(text)]))[1]
    hooks = [f"blocks.{layer}.hook_resid_{site}" for layer in range(N_LAYERS) for site in ("pre", "post")][1:]
    for hook_name in hooks:
        about = {"model_from_pretrained_kwargs": options} if options else {}
        folder = random_sae(8).write(tmp_path / hook_name, hook_name, model_name="gpt2-small", metadata=about)
        assert relative(seen_by_the_encoder(gpt2, folder, text), cache[hook_name][0, 1:]) < 1e-5
    last = cache[hooks[-1]][0, 1:]
    centred = float(last.mean(-1).abs().max()) < 1e-4
    assert centred is bool(options.get("center_writing_weights"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_of_rms_norms_is_never_centred_as_in_transformer_lens(tmp_path: Path) -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights

    this = tiny("gemma2")
    config = HookedTransformerConfig(
        n_layers=N_LAYERS, d_model=D_MODEL, d_head=8, n_heads=4, n_key_value_heads=2, d_mlp=64, n_ctx=256, eps=1e-6,
        d_vocab=VOCABULARY, act_fn="gelu_pytorch_tanh", normalization_type="RMS", final_rms=True, gated_mlp=True,
        positional_embedding_type="rotary", rotary_base=10000, rotary_dim=8, attn_scale=8**0.5, window_size=8,
        use_local_attn=True, attn_types=["local", "global"] * 2, attn_scores_soft_cap=50.0,
        output_logits_soft_cap=30.0, use_normalization_before_and_after=True,
    )  # fmt: skip
    theirs = HookedTransformer(config)
    theirs.load_and_process_state_dict(
        convert_gemma_weights(this.model, config),
        fold_ln=False,
        center_writing_weights=True,
        center_unembed=False,
        fold_value_biases=False,
    )
    text = "the cat sings slowly under the dark mountain and we run over it again"
    with torch.no_grad():
        cache: Any = theirs.run_with_cache(torch.tensor([this.lm.prompt_ids(text, raw=True)]))[1]
    for layer in range(N_LAYERS):
        hook_name = f"blocks.{layer}.hook_resid_post"
        about = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
        folder = random_sae(8).write(tmp_path / hook_name, hook_name, model_name="gemma2", metadata=about)
        assert load_sae(this.lm, folder).centred is False
        assert relative(seen_by_the_encoder(this.lm, folder, text), cache[hook_name][0, 1:]) < 1e-5


def test_a_centred_sae_reads_and_makes_vectors_without_a_mean(gpt2: LanguageModel, tmp_path: Path) -> None:
    plain = random_sae(9, scale=5.0)
    options = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    sae = load_sae(gpt2, plain.write(tmp_path / "sae", model_name="gpt2", metadata=options))
    assert sae.centred is True
    for row in some_rows(10) + 3.0:
        wanted = plain.encode(row - row.mean())
        assert np.allclose(sae.encode(row).numpy(), wanted, atol=1e-5)
        assert not np.allclose(sae.encode(row).numpy(), plain.encode(row), atol=1e-2)
        assert np.allclose(sae.decode(sae.encode(row)).numpy(), plain.decode(wanted), atol=1e-4)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_an_sae_for_another_width_is_refused_naming_both(llama: Tiny, tmp_path: Path) -> None:
    folder = random_sae(10, d_model=24).write(tmp_path / "sae", model_name="gpt2-small")
    refused(lambda: load_sae(llama.lm, folder), MismatchError, "24", "32", "gpt2-small", "tiny/llama")


@pytest.mark.parametrize(
    ("model_name", "lm_name"),
    [("gpt2-small", "EleutherAI/pythia-70m"), ("gemma-2-2b", "google/gemma-3-270m"), ("Qwen2.5-7B", "Qwen/Qwen3-8B")],
)
def test_an_sae_for_another_model_is_refused_naming_both(
    llama: Tiny, tmp_path: Path, model_name: str, lm_name: str
) -> None:
    folder = random_sae(10).write(tmp_path / "sae", model_name=model_name)
    message = refused(lambda: load_sae(named(llama, lm_name), folder), MismatchError, model_name, lm_name)
    if lm_name == "google/gemma-3-270m":
        assert "gemma-scope-2-270m-pt-res" in message


@pytest.mark.parametrize(
    ("model_name", "lm_name"),
    [
        ("gemma-2-2b", "google/gemma-2-2b-it"),
        ("google/gemma-2-2b-it", "gemma-2-2b"),
        ("gpt2-small", "gpt2"),
        ("gpt2-small", "openai-community/gpt2"),
        ("gpt2", "GPT-2-small"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct"),
        (None, "anything/at-all"),
    ],
)
def test_base_and_instruct_variants_of_a_name_are_one_model(
    llama: Tiny, tmp_path: Path, model_name: str | None, lm_name: str
) -> None:
    folder = random_sae(10).write(tmp_path / "sae", model_name=model_name)
    assert load_sae(named(llama, lm_name), folder).layer == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_sae_fits_the_weights_it_was_made_on_whatever_their_folder_is_called(
    model_folder: Path, tmp_path: Path, dtype: str
) -> None:
    shutil.copytree(model_folder, tmp_path / "my-copy")
    lm, copied = (load_model(folder, dtype=dtype, device="cpu") for folder in (model_folder, tmp_path / "my-copy"))
    about = {"model_fingerprint": lm.fingerprint}
    folder = random_sae(10).write(tmp_path / "sae", model_name="tiny-llama", metadata=about)
    sae = load_sae(copied, folder)
    assert (copied.name, sae.layer, sae.model_name) == ("my-copy", 2, "tiny-llama")
    other = named(make_tiny("llama", seed=1), "my-copy")
    refused(lambda: load_sae(other, folder), MismatchError, "tiny-llama", "my-copy")


def test_the_shipped_saes_are_found_for_a_copy_of_their_model_under_another_name(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neurosteer.saes.offers.assets_folder", lambda: tmp_path)
    about = {"model_fingerprint": llama.lm.fingerprint}
    random_sae(8).write(tmp_path / "saes" / "ours", HOOK, model_name="tiny/llama", metadata=about)
    other = {"model_fingerprint": make_tiny("llama", seed=1).lm.fingerprint}
    random_sae(9).write(tmp_path / "saes" / "other", "blocks.1.hook_resid_post", model_name="a/b", metadata=other)
    copied = named(llama, "my-copy")
    assert list(embedded_saes(copied)) == [2]
    assert torch.equal(load_sae(copied).decoder, random_sae(8).w_dec)


def test_an_sae_of_a_block_that_the_model_does_not_have_is_refused(llama: Tiny, tmp_path: Path) -> None:
    folder = random_sae(10).write(tmp_path / "sae", "blocks.4.hook_resid_post")
    refused(lambda: load_sae(llama.lm, folder), MismatchError, "block 4", "0 to 3")
    assert load_sae(llama.lm, random_sae(10).write(tmp_path / "last", "blocks.4.hook_resid_pre")).layer == 3


def test_a_release_that_is_misspelled_is_refused_with_the_nearest_names(llama: Tiny) -> None:
    refused(lambda: load_sae(llama.lm, "gpt2-small-res-j"), UsageError, "'gpt2-small-res-j'", "gpt2-small-res-jb")
    refused(
        lambda: load_sae(llama.lm, "gpt2-small-res-jbb", "blocks.2.hook_resid_pre"),
        UsageError,
        "'gpt2-small-res-jbb'",
        "gpt2-small-res-jb",
    )
    refused(lambda: load_sae(llama.lm, "gpt2-small-res-jbb/blocks.2.hook_resid_pre"), UsageError, "gpt2-small-res-jb,")
    refused(lambda: load_sae(llama.lm, "qqqqqqqqqqqq"), UsageError, "'qqqqqqqqqqqq'", "no such folder")


def test_a_release_without_an_id_is_refused_with_an_example(llama: Tiny) -> None:
    refused(lambda: load_sae(llama.lm, "gpt2-small-res-jb"), UsageError, "several", "gpt2-small-res-jb/blocks.")


def test_an_id_that_the_release_does_not_have_is_refused_with_the_nearest(llama: Tiny) -> None:
    wrong = "gpt2-small-res-jb/blocks.12.hook_resid_pre"
    refused(lambda: load_sae(llama.lm, wrong), UsageError, "'blocks.12.hook_resid_pre'", "blocks.11.hook_resid_pre")
    canonical = "gemma-scope-2b-pt-res-canonical"
    refused(
        lambda: load_sae(llama.lm, canonical, "layer_12/width_16k/canonicl"),
        UsageError,
        canonical,
        "layer_12/width_16k/canonical",
    )


def test_a_folder_that_is_not_there_is_refused_as_one(llama: Tiny, tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such" / "folder"
    refused(lambda: load_sae(llama.lm, str(missing)), UsageError, str(missing)[-20:], "no such folder")
    refused(lambda: load_sae(llama.lm, missing), NeuroSteerError, str(missing)[-20:])
    refused(lambda: load_sae(llama.lm, "./saes/mine"), UsageError, "./saes/mine", "no such folder")


def test_a_folder_that_holds_no_sae_is_refused(llama: Tiny, tmp_path: Path) -> None:
    refused(lambda: load_sae(llama.lm, tmp_path), UsageError, "no cfg.json", "sae-lens")


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", "\x00", "{}", '{"architecture": "unheard-of"}', '{"metadata": 5}', '"\ud800"']
)
def test_a_damaged_cfg_is_a_clear_error(llama: Tiny, tmp_path: Path, text: str) -> None:
    folder = random_sae(11).write(tmp_path / "sae")
    (folder / "cfg.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(lambda: load_sae(llama.lm, folder), NeuroSteerError, "sae")


@pytest.mark.parametrize("kind", ["jumprelu", "gated"])
def test_damaged_or_missing_weights_are_a_clear_error(llama: Tiny, tmp_path: Path, kind: str) -> None:
    folder = write_with_sae_lens(tmp_path / "sae", kind)
    weights = folder / "sae_weights.safetensors"
    whole = weights.read_bytes()
    for damaged in (b"", b"not safetensors", whole[:100], whole[: len(whole) // 2], b"\xff" * 64):
        weights.write_bytes(damaged)
        refused(lambda: load_sae(llama.lm, folder), ModelError, "sae")
    weights.unlink()
    refused(lambda: load_sae(llama.lm, folder), ModelError, "sae")


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk", "gated"])
def test_missing_tensors_are_a_clear_error(llama: Tiny, tmp_path: Path, kind: str) -> None:
    folder = write_with_sae_lens(tmp_path / "sae", kind)
    weights = folder / "sae_weights.safetensors"
    whole = load_file(weights)
    for missing in whole:
        save_file({name: tensor for name, tensor in whole.items() if name != missing}, weights)
        refused(lambda: load_sae(llama.lm, folder), ModelError, missing)


def test_tensors_whose_shapes_do_not_fit_are_a_clear_error(llama: Tiny, tmp_path: Path) -> None:
    for name, shape in (
        ("W_enc", (D_MODEL, 47)), ("W_dec", (47, D_MODEL)), ("b_enc", (47,)), ("b_dec", (31,)), ("threshold", (47,)),
        ("W_enc", (D_MODEL * N_FEATURES,)), ("threshold", (3, N_FEATURES)),
    ):  # fmt: skip
        folder = write_with_sae_lens(tmp_path / "sae", "jumprelu")
        weights = load_file(folder / "sae_weights.safetensors")
        save_file({**weights, name: torch.zeros(shape)}, folder / "sae_weights.safetensors")
        refused(lambda: load_sae(llama.lm, folder), ModelError, "shapes")  # noqa: B023
        shutil.rmtree(folder)


def test_a_kind_that_looks_at_whole_sequences_is_refused(llama: Tiny, tmp_path: Path) -> None:
    from sae_lens import TemporalSAE, TemporalSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    about = SAEMetadata(model_name="tiny/llama", hook_name=HOOK)
    config = TemporalSAEConfig(d_in=D_MODEL, d_sae=N_FEATURES, n_heads=2, bottleneck_factor=1, metadata=about)
    TemporalSAE(config).save_model(tmp_path / "sae")
    refused(lambda: load_sae(llama.lm, tmp_path / "sae"), UsageError, "temporal", "one at a time")


def test_a_model_without_an_sae_says_what_to_do(llama: Tiny) -> None:
    for source in (None, "embedded", "embedded/2"):
        refused(lambda: load_sae(llama.lm, source), UsageError, "tiny/llama", "release", "folder")  # noqa: B023
    lm = named(llama, "openai-community/gpt2")
    refused(lambda: load_sae(lm), UsageError, "gpt2-small-res-jb")


# --- the SAEs that are shipped ---------------------------------------------------------------------------------------


def test_the_shipped_saes_are_found_by_block(llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in (3, 0, 1):
        name = f"blocks.{layer}.hook_resid_post"
        random_sae(layer).write(tmp_path / "saes" / f"any-{layer}", name, model_name="tiny/llama")
    random_sae(9).write(tmp_path / "saes" / "other", HOOK, model_name="tiny/other")
    monkeypatch.setattr("neurosteer.saes.offers.assets_folder", lambda: tmp_path)
    assert list(embedded_saes(llama.lm)) == [0, 1, 3]
    assert load_sae(llama.lm, "embedded/3").layer == 3
    assert load_sae(llama.lm).layer == load_sae(llama.lm, "embedded").layer == 1
    assert torch.equal(load_sae(llama.lm, "embedded/0").decoder, random_sae(0).w_dec)
    for wrong in ("embedded/2", "embedded/x", "embedded/-1"):
        refused(lambda: load_sae(llama.lm, wrong), UsageError, wrong, "embedded/0, embedded/1, embedded/3")  # noqa: B023


# --- releases, through the Hub's own client --------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for the Hub's client, which may not go out."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return cache


def put_in_cache(cache: Path, repo: str, files: Mapping[str, Callable[[Path], object]]) -> None:
    """A snapshot of `repo` as the client lays it out: each file is written by its function."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for name, write in files.items():
        path = root / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)


def gpt2_release(plain: PlainSae) -> dict[str, Callable[[Path], object]]:
    """An SAE as `jbloom/GPT2-Small-SAEs-Reformatted` holds it: a cfg.json older than sae-lens 6."""
    config = {
        "model_name": "gpt2-small",
        "hook_point": "blocks.2.hook_resid_pre",
        "hook_point_layer": 2,
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False,
        "context_size": 128,
        "d_in": plain.w_enc.shape[0],
        "d_sae": plain.w_enc.shape[1],
        "dtype": "torch.float32",
        "device": "mps",
        "l1_coefficient": 8e-05,
        "b_dec_init_method": "geometric_median",
        "architecture": "standard",
    }
    folder = "blocks.2.hook_resid_pre"
    return {
        f"{folder}/cfg.json": lambda path: path.write_text(json.dumps(config)),
        f"{folder}/sae_weights.safetensors": lambda path: save_file(plain.tensors(), path),
        f"{folder}/sparsity.safetensors": lambda path: save_file({"sparsity": torch.zeros(plain.w_enc.shape[1])}, path),
    }


def gemma_release(plain: PlainSae, path: str) -> dict[str, Callable[[Path], object]]:
    """An SAE as `google/gemma-scope-2b-pt-res` holds it."""
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in plain.tensors().items()}
    return {f"{path}/params.npz": lambda file: np.savez(file, **arrays)}


def steered_texts(lm: LanguageModel, vector: SteeringVector) -> list[str]:
    recipe = Recipe.of(vector)
    options: dict[str, Any] = {"max_new_tokens": 12, "sampling": Sampling(greedy=True), "raw": True}
    return [row.text for row in Session(lm).sweep(recipe, [-3.0, 0.0, 3.0], ["the cat", "we run"], **options)]


def the_whole_way(lm: LanguageModel, reference: str, folder: Path, **options: Any) -> SteeringVector:
    """Build on a released SAE, save, load; the loaded one steers to the same text."""
    built = build(lm, EXAMPLES, method="sae", sae=reference, framing="raw", **options)
    assert isinstance(built, SteeringVector)
    loaded = load(save(built, folder))
    assert isinstance(loaded, SteeringVector)
    assert loaded.features == built.features and loaded.parameters == built.parameters
    written = steered_texts(lm, built)
    assert steered_texts(lm, loaded) == written
    assert len(set(written)) == len(written)
    return loaded


def test_a_released_gpt2_sae_goes_the_whole_way(gpt2: LanguageModel, hub_cache: Path, tmp_path: Path) -> None:
    plain = random_sae(12, scale=10.0)
    put_in_cache(hub_cache, "jbloom/GPT2-Small-SAEs-Reformatted", gpt2_release(plain))
    reference = "gpt2-small-res-jb/blocks.2.hook_resid_pre"
    sae = load_sae(gpt2, reference)
    assert (sae.layer, sae.centred, sae.prepend_bos, sae.name) == (1, True, True, reference)
    assert sae.feature_link(3) == "https://neuronpedia.org/gpt2-small/2-res-jb/3"
    row = some_rows(1, scale=3.0)[0] + 1.0
    assert np.allclose(sae.encode(row).numpy(), plain.encode(row - row.mean()), atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vector = the_whole_way(gpt2, reference, tmp_path / "mood", top_k=6)
    assert vector.layers == [1] and vector.parameters["sae"] == {"1": reference}
    found = vector.features[0]
    assert found.link == f"https://neuronpedia.org/gpt2-small/2-res-jb/{found.index}" and found.promoted
    total = sum(feature.weight * plain.w_dec[feature.index] for feature in vector.features)
    assert isinstance(total, Tensor)
    assert torch.allclose(vector.directions[1], total, atol=1e-5 * float(total.abs().max()))


def test_a_released_gemma_sae_goes_the_whole_way(
    hub_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release = "gemma-scope-2b-pt-res-canonical"
    entry = get_pretrained_saes_directory()[release]
    identifier = "layer_2/width_16k/canonical"
    assert (entry.repo_id, entry.saes_map[identifier]) == (
        "google/gemma-scope-2b-pt-res",
        "layer_2/width_16k/average_l0_141",
    )
    # The loader takes the widths from the names; those of this tiny SAE are told to it beside them.
    monkeypatch.setattr(entry, "config_overrides", {"d_in": D_MODEL, "d_sae": N_FEATURES})
    plain = random_sae(13, scale=12.0, jumps=True, subtracts=False)
    put_in_cache(hub_cache, entry.repo_id, gemma_release(plain, entry.saes_map[identifier]))
    lm = named(make_tiny("gemma2", chat=False, bos=True), "google/gemma-2-2b")
    sae = load_sae(lm, release, identifier)
    assert (sae.layer, sae.centred, sae.prepend_bos, sae.kind) == (2, False, True, "jumprelu")
    row = some_rows(1, scale=4.0)[0] + 1.0
    assert np.allclose(sae.encode(row).numpy(), plain.encode(row), atol=1e-4)
    vector = the_whole_way(lm, f"{release}/{identifier}", tmp_path / "mood", top_k=6, rank="dprime")
    assert vector.layers == [2] and vector.parameters["sae"] == {"2": f"{release}/{identifier}"}
    assert (
        vector.features[0].link == f"https://neuronpedia.org/gemma-2-2b/2-gemmascope-res-16k/{vector.features[0].index}"
    )


def test_an_sae_in_a_repository_of_ones_own_is_read(llama: Tiny, hub_cache: Path, tmp_path: Path) -> None:
    plain = random_sae(14)
    source = plain.write(tmp_path / "source", model_name="tiny/llama")
    files = {
        "layer_2/cfg.json": lambda path: shutil.copy(source / "cfg.json", path),
        "layer_2/sae_weights.safetensors": lambda path: shutil.copy(source / "sae_weights.safetensors", path),
        "layer_2/sparsity.safetensors": lambda path: save_file({"sparsity": torch.zeros(N_FEATURES)}, path),
    }
    put_in_cache(hub_cache, "somebody/saes", files)
    sae = load_sae(llama.lm, "somebody/saes/layer_2")
    assert torch.equal(sae.decoder, plain.w_dec) and sae.name == "somebody/saes/layer_2"
    assert torch.equal(load_sae(llama.lm, "somebody/saes", "layer_2").decoder, plain.w_dec)


@pytest.mark.usefixtures("hub_cache")
def test_a_release_that_cannot_be_fetched_is_a_clear_error(gpt2: LanguageModel) -> None:
    reference = "gpt2-small-res-jb/blocks.2.hook_resid_pre"
    refused(lambda: load_sae(gpt2, reference), ModelError, reference, "could not be fetched")
    misspelled = "gemma-scope-2b-pt-res-canonicl/layer_2/width_16k/canonical"
    refused(lambda: load_sae(gpt2, misspelled), NeuroSteerError, "gemma-scope-2b-pt-res-canonical")
    refused(lambda: load_sae(gpt2, "saes/of/mine"), NeuroSteerError, "saes/of/mine", "no such folder")


# --- memory ----------------------------------------------------------------------------------------------------------


class Counting:
    """An SAE that notes how many tokens it is asked for at once, and how many numbers it makes of them."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae, self.n_features = sae, sae.n_features
        self.calls: list[int] = []

    def chunk_rows(self) -> int:
        return self.sae.chunk_rows()

    def encode(self, residual: Tensor) -> Tensor:
        self.calls.append(residual.reshape(-1, residual.shape[-1]).shape[0])
        return self.sae.encode(residual)


def statistics_of(lm: LanguageModel, encoder: Counting, positive: Sequence[str], negative: Sequence[str], **more: Any):
    request = Request(residual=(2,), encoders={2: encoder}, feature_rows=True, **more)
    return read_activations(lm, positive, negative, request).features[2]


@pytest.mark.parametrize("tokens", ["mean", "last"])
@pytest.mark.parametrize("framing", ["raw", "answer"])
@pytest.mark.parametrize("at_once", [1, 3, 7, 20])
def test_statistics_are_the_same_however_few_tokens_are_encoded_at_once(
    llama: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: str, framing: str, at_once: int
) -> None:
    sae = load_sae(llama.lm, random_sae(15, scale=20.0, jumps=True).write(tmp_path / "sae"))
    sides, options = (ALL_TEXTS[:20], ALL_TEXTS[20:]), {"tokens": tokens, "framing": framing}
    whole = statistics_of(llama.lm, Counting(sae), *sides, **options)
    monkeypatch.setattr(autoencoder, "MAX_ENCODED_VALUES", at_once * N_FEATURES)
    counting = Counting(sae)
    parts = statistics_of(llama.lm, counting, *sides, **options)
    assert max(counting.calls) <= at_once
    assert sum(counting.calls) == sum(whole.n_tokens)
    assert parts.n_tokens == whole.n_tokens
    assert torch.equal(parts.fired, whole.fired)
    assert torch.allclose(parts.sums, whole.sums, rtol=1e-5) and torch.allclose(parts.squares, whole.squares, rtol=1e-5)
    assert torch.allclose(parts.strongest, whole.strongest, rtol=1e-5)
    first = 0 if framing == "answer" else 1  # two texts may share their first words, so the places may differ
    alone = [sae.encode(read_tokens(llama.lm, llama.lm.frame([text], framing, max_tokens=512), [2])[2])  # type: ignore
             for text in ALL_TEXTS]  # fmt: skip
    for feature, place in (parts.strongest > 0).nonzero().tolist():
        text, token = int(parts.text_of[feature, place]), int(parts.token_of[feature, place])
        there = alone[text][token - first, feature] if len(alone[text]) > 1 else alone[text][0, feature]
        assert float(there) == pytest.approx(float(parts.strongest[feature, place]), rel=1e-4)
    assert all(len({*row.tolist()}) == 3 for row in parts.text_of[(parts.strongest > 0).all(1)])
    assert parts.rows is not None and whole.rows is not None
    assert torch.equal(parts.rows.starts, whole.rows.starts) and torch.equal(parts.rows.features, whole.rows.features)
    assert torch.allclose(parts.rows.values, whole.rows.values, rtol=1e-4, atol=1e-6)


def test_a_wide_sae_makes_no_tensor_larger_than_its_share(llama: Tiny, tmp_path: Path) -> None:
    """65,536 features, as many released SAEs have: 1,024 tokens at once, also where a text is longer."""
    width = 1 << 16
    generator = torch.Generator().manual_seed(0)
    plain = PlainSae(
        w_enc=torch.randn(D_MODEL, width, generator=generator),
        b_enc=torch.full((width,), -60.0),
        w_dec=torch.randn(width, D_MODEL, generator=generator),
        b_dec=torch.zeros(D_MODEL),
    )
    sae = load_sae(llama.lm, plain.write(tmp_path / "sae"))
    assert sae.chunk_rows() == 1024
    counting = Counting(sae)
    positive, negative = (tuple(" ".join(texts(8, seed=seed)) for seed in range(start, start + 7)) for start in (0, 50))
    request = Request(residual=(2,), encoders={2: counting}, batch_tokens=100_000)
    found = read_activations(llama.lm, positive, negative, request).features[2]
    assert max(counting.calls) * width <= MAX_ENCODED_VALUES
    assert sum(counting.calls) == sum(found.n_tokens) > 1024
    assert 0 < float(found.rates.mean()) < 0.5
