"""Clamped features: against hooks of our own, on one row at a time, unpadded and without a cache."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    D_MODEL,
    Tiny,
    Writes,
    ablating,
    clamping,
    first,
    make_tiny,
    make_vector,
    naive_feature,
    naive_greedy,
    naive_logits,
    naive_states,
    own_hooks,
    writes_of,
)
from torch import Tensor

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.cards import render_card, strength_meaning
from neurosteer.artifacts.features import FeatureEncoder
from neurosteer.artifacts.recipes import UNSTEERED, Positions, Recipe, Use
from neurosteer.artifacts.storage import load, pack, save, unpack
from neurosteer.artifacts.strength import Calibration
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.errors import ArtifactError, UsageError
from neurosteer.models.loading import describe_model
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.plans import applied, compile_plan
from neurosteer.steering.session import Row, Session

GREEDY = Sampling(greedy=True)
PROMPTS = ["the cat sings", "we", "bread and cheese under the dark mountain, again. Why?", "日本 😀"]
LONG = PROMPTS[2]

CLAMP, SECOND = clamping((1, 2), seed=1), clamping((2,), seed=2, value=9.0)
CENTRED, REMOVING = clamping((1,), seed=3, centred=True), clamping((1, 3), seed=4, value=0.0)
SILENT = clamping((2,), seed=5, encoders={2: FeatureEncoder(torch.zeros(D_MODEL), -1.0)})
ABLATING, PUSHING = ablating((1, 2), seed=6), make_vector((2, 3), seed=7)

RECIPES: dict[str, tuple[Use, ...]] = {
    "one clamp": (Use(CLAMP),),
    "part of the way": (Use(CLAMP, 0.4),),
    "beyond the value": (Use(CLAMP, 2.5),),
    "the other way": (Use(CLAMP, -1.5),),
    "part of the other way": (Use(CLAMP, -0.3),),
    "a feature removed": (Use(REMOVING),),
    "a feature half removed": (Use(REMOVING, 0.5),),
    "a centred SAE": (Use(CENTRED),),
    "a silent feature": (Use(SILENT),),
    "two at a layer": (Use(CLAMP), Use(SECOND, 0.7)),
    "one twice": (Use(CLAMP), Use(CLAMP)),
    "beside a push": (Use(CLAMP), Use(PUSHING, -0.8)),
    "after an ablation": (Use(CLAMP), Use(ABLATING)),
    "everything": (Use(PUSHING, 0.9), Use(REMOVING, 0.6), Use(CLAMP), Use(ABLATING), Use(CENTRED, 1.4), Use(SECOND)),
}


def fits(this: Tiny, name: str) -> Recipe:
    uses = (replace(use, artifact=replace(use.artifact, model=this.lm.reference)) for use in RECIPES[name])
    return Recipe(tuple(uses))


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    return ids, torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])


@torch.no_grad()
def logits_under(this: Tiny, recipes: Sequence[Recipe], ids: Tensor, mask: Tensor | None = None) -> Tensor:
    named: dict[str, Any] = {}
    if mask is not None:
        named = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with applied(this.lm, compile_plan(this.lm, recipes), None if mask is None else mask.bool()):
        return this.lm.model(ids, use_cache=False, **named).logits


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@torch.no_grad()
def around_block(this: Tiny, layer: int, recipe: Recipe, prompt: str = LONG) -> tuple[Tensor, Tensor]:
    """What block `layer` returns and what the next one is given, both `[seq, d_model]`."""
    before, after = [], []
    ids = torch.tensor([this.lm.prompt_ids(prompt)])
    with (
        own_hooks([(this.blocks[layer], lambda _module, _inputs, output: before.append(first(output)[0].clone()))]),
        own_hooks([(this.blocks[layer + 1], lambda _module, inputs: after.append(inputs[0][0].clone()))], before=True),
    ):
        logits_under(this, [recipe], ids)
    return before[0], after[0]


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_logits_of_every_recipe_are_those_of_hooks_of_our_own(each: Tiny, name: str) -> None:
    ids = each.lm.prompt_ids(LONG)
    wanted = naive_logits(each, ids, writes_of(RECIPES[name]))
    found = logits_under(each, [fits(each, name)], torch.tensor([ids]))[0]
    assert relative(found, wanted) < 1e-4
    assert relative(naive_logits(each, ids, Writes()), wanted) > 1e-3, "the recipe does nothing, so this shows nothing"


def test_the_features_of_these_tests_are_active_at_some_tokens_and_silent_at_others(each: Tiny) -> None:
    states, _ = naive_states(each, each.lm.prompt_ids(LONG))
    for artifact in (CLAMP, SECOND, CENTRED, REMOVING):
        for layer, encoder in artifact.encoders.items():
            active = naive_feature(encoder, states[layer]) > 0
            assert active.any() and not active.all(), (artifact.name, layer)


def test_mixed_rows_in_one_padded_batch_are_each_as_if_alone(each: Tiny) -> None:
    names = list(RECIPES)
    recipes = [recipe for name in names for recipe in (fits(each, name), UNSTEERED)]
    prompts = [each.lm.prompt_ids(PROMPTS[place % len(PROMPTS)]) for place in range(len(recipes))]
    ids, mask = padded(prompts)
    found = logits_under(each, recipes, ids, mask)
    plain = logits_under(each, [UNSTEERED] * len(recipes), ids, mask)
    for row, prompt in enumerate(prompts):
        own = slice(-len(prompt), None)
        if row % 2:
            assert torch.equal(found[row, own], plain[row, own])
        else:
            wanted = naive_logits(each, prompt, writes_of(RECIPES[names[row // 2]]))
            assert relative(found[row, own], wanted) < 1e-4, names[row // 2]


def test_all_clamps_of_a_layer_read_the_same_stream_so_their_order_does_not_matter(llama: Tiny) -> None:
    ids = torch.tensor([llama.lm.prompt_ids(LONG)])
    uses = fits(llama, "everything").uses
    wanted = logits_under(llama, [Recipe(uses)], ids)
    assert relative(logits_under(llama, [Recipe(uses[::-1])], ids), wanted) < 1e-5


@pytest.mark.parametrize("strength", [-2.0, -0.5, 0.3, 1.0, 1.7])
def test_a_stream_moves_along_the_decoder_row_by_what_its_activation_lacks(llama: Tiny, strength: float) -> None:
    artifact = replace(clamping((1,), seed=1), model=llama.lm.reference)
    before, after = around_block(llama, 1, Recipe.of((artifact, strength)))
    active = naive_feature(artifact.encoders[1], before).float()
    target, share = {
        -2.0: (-12.0, 1.0), -0.5: (-6.0, 0.5), 0.3: (6.0, 0.3), 1.0: (6.0, 1.0), 1.7: (10.2, 1.0)
    }[strength]  # fmt: skip
    wanted = before + share * (target - active)[:, None] * artifact.directions[1]
    assert torch.allclose(after, wanted, atol=1e-4 * float(before.abs().max()))


def test_the_value_0_takes_out_exactly_what_the_feature_put_in(llama: Tiny) -> None:
    """With a decoder row that the encoder reads as 1, nothing of the feature is left where it was active."""
    generator = torch.Generator().manual_seed(11)
    direction = torch.randn(D_MODEL, generator=generator)
    encoder = FeatureEncoder(direction / direction.square().sum(), 0.0)
    artifact = clamping(
        (1,), seed=1, value=0.0, directions={1: direction}, encoders={1: encoder}, model=llama.lm.reference
    )
    before, after = around_block(llama, 1, Recipe.of(artifact))
    active = naive_feature(encoder, before).float()
    assert (active > 0).any() and (active == 0).any()
    assert torch.allclose(after, before - active[:, None] * direction, atol=1e-4 * float(before.abs().max()))
    assert float((after @ encoder.weights)[active > 0].abs().max()) < 1e-4 * float(active.max())
    assert torch.equal(after[active == 0], before[active == 0])


def test_a_value_is_reached_wherever_the_feature_was_active(llama: Tiny) -> None:
    generator = torch.Generator().manual_seed(12)
    direction = torch.randn(D_MODEL, generator=generator)
    encoder = FeatureEncoder(direction / direction.square().sum(), 0.0, 0.2)
    artifact = clamping(
        (1,), seed=1, value=3.5, directions={1: direction}, encoders={1: encoder}, model=llama.lm.reference
    )
    before, after = around_block(llama, 1, Recipe.of((artifact, 2.0)))
    active = naive_feature(encoder, before) > 0
    reached = naive_feature(encoder, after)[active]
    assert torch.allclose(reached, torch.full_like(reached, 7.0), atol=1e-3)


# --- off, and continuity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("artifact", [CLAMP, REMOVING, CENTRED], ids=["value", "value 0", "centred"])
def test_strength_0_is_off_bit_for_bit(each: Tiny, artifact: SteeringVector) -> None:
    ids, mask = padded([each.lm.prompt_ids(prompt) for prompt in PROMPTS])
    off = Recipe.of((replace(artifact, model=each.lm.reference), 0.0))
    assert compile_plan(each.lm, [off] * 4).is_empty
    plain = logits_under(each, [UNSTEERED] * 4, ids, mask)
    assert torch.equal(logits_under(each, [off] * 4, ids, mask), plain)


@pytest.mark.parametrize("artifact", [CLAMP, REMOVING], ids=["value", "value 0"])
@pytest.mark.parametrize("around", [-1.0, 0.0, 1.0])
def test_the_stream_moves_without_a_jump_as_the_strength_does(
    llama: Tiny, artifact: SteeringVector, around: float
) -> None:
    """At 0 for a feature's value the sign flips, at ±1 the share gives way to the target."""
    fitting = replace(artifact, model=llama.lm.reference)
    middle = around_block(llama, 1, Recipe.of((fitting, around)))[1]
    for step in (1e-2, 1e-3, 1e-4):
        for strength in (around - step, around + step):
            moved = around_block(llama, 1, Recipe.of((fitting, strength)))[1]
            assert float((moved - middle).norm(dim=-1).max()) < step * 200


@pytest.mark.parametrize(
    ("strength", "value", "amount", "share"),
    [
        (0.0, 6.0, 6.0, 0.0),
        (0.25, 6.0, 6.0, 0.25),
        (-0.25, 6.0, -6.0, 0.25),
        (1.0, 6.0, 6.0, 1.0),
        (-1.0, 6.0, -6.0, 1.0),
        (2.0, 6.0, 12.0, 1.0),
        (-3.0, 6.0, -18.0, 1.0),
        (5.0, 0.0, 0.0, 1.0),
        (0.5, -2.0, -2.0, 0.5),
    ],
)
def test_strengths_within_1_are_shares_and_those_beyond_multiply_the_value(
    strength: float, value: float, amount: float, share: float
) -> None:
    use = Use(clamping((1,), seed=1, value=value), strength)
    assert (use.amount, use.share) == (amount, share)
    assert use.has_effect == (strength != 0)


def test_a_recipe_with_a_clamp_scales_by_its_strength() -> None:
    (use,) = Recipe.of((CLAMP, 2.0)).scaled(-0.25).uses
    assert (use.amount, use.share) == (-6.0, 0.5)


def test_a_plan_without_clamps_has_no_trace_of_them(llama: Tiny) -> None:
    pushing = replace(PUSHING, model=llama.lm.reference)
    plan = compile_plan(llama.lm, [Recipe.of(pushing), UNSTEERED])
    assert plan.clamps == {} and not plan.is_empty
    plan = compile_plan(llama.lm, [fits(llama, "one clamp"), UNSTEERED, fits(llama, "two at a layer")])
    assert not plan.additions and not plan.projections and not plan.is_empty
    assert plan.clamps[2].encoders.shape == plan.clamps[2].directions.shape == (3, 2, D_MODEL)
    assert plan.clamps[2].shares.tolist() == [[[1.0, 0.0]], [[0.0, 0.0]], [[1.0, pytest.approx(0.7)]]]


def test_a_strength_beyond_all_bounds_is_refused_in_one_line(llama: Tiny) -> None:
    recipe = Recipe.of((replace(CLAMP, model=llama.lm.reference), 1e300))
    with pytest.raises(UsageError, match=r"strength 1e\+300 comes to more than float32 can hold"):
        compile_plan(llama.lm, [recipe])


# --- positions, padding, the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["all", "prompt", "generated"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["with cache", "without cache"])
def test_greedy_texts_are_those_of_a_naive_loop(each: Tiny, positions: Positions, use_cache: bool) -> None:
    names = ["one clamp", "a feature removed", "two at a layer", "part of the way", "everything"]
    prompts = [*PROMPTS, PROMPTS[0]]
    rows = [Row(prompt, fits(each, name)) for prompt, name in zip(prompts, names, strict=True)]
    rows.insert(2, Row(PROMPTS[1], UNSTEERED))
    names.insert(2, "")
    found = Session(each.lm).generate(rows, sampling=GREEDY, max_new_tokens=8, positions=positions, use_cache=use_cache)
    tokenizer = each.lm.tokenizer
    for row, name in zip(found, names, strict=True):
        writes = writes_of(RECIPES[name]) if name else Writes()
        start = each.lm.prompt_ids(row.prompt)
        ids = naive_greedy(each, start, writes, 8, stop=[tokenizer.eos_token_id], positions=positions)
        assert row.text == tokenizer.decode(ids, skip_special_tokens=True), (row.prompt, name)


def test_padding_is_never_clamped(llama: Tiny) -> None:
    ids, mask = padded([llama.lm.prompt_ids(prompt) for prompt in PROMPTS[:2]])
    assert not mask.bool().all()
    seen: list[Tensor] = []
    artifact = replace(clamping((1,), seed=1, value=50.0), model=llama.lm.reference)
    with own_hooks([(llama.blocks[2], lambda _, inputs: seen.append(inputs[0].clone()))], before=True):
        for recipe in (UNSTEERED, Recipe.of(artifact)):
            logits_under(llama, [recipe] * 2, ids, mask)
    assert torch.equal((seen[1] - seen[0]).abs().sum(-1) > 0, mask.bool())


# --- precision -------------------------------------------------------------------------------------------------------


def test_activations_are_computed_in_float32_whatever_the_model_computes_in() -> None:
    """A large bias makes the activation a small difference of large numbers, which bfloat16 cannot hold."""
    whole = make_tiny("llama", seed=3)
    model = whole.model.to(torch.bfloat16)
    this = replace(whole, lm=describe_model(model, whole.lm.tokenizer, name="tiny/llama", revision="r1"))
    states = around_block(this, 1, UNSTEERED)[0].double()
    weights = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(1)) * 20
    encoder = FeatureEncoder(weights, -float((states @ weights.double()).median()))
    artifact = clamping((1,), seed=1, encoders={1: encoder}, model=this.lm.reference)
    before, after = around_block(this, 1, Recipe.of(artifact))
    assert before.dtype == after.dtype == torch.bfloat16
    direction = artifact.directions[1].double()

    def error(active: Tensor) -> float:
        wanted = before.double() + (6.0 - active.double())[:, None] * direction
        return float(((after.double() - wanted).abs() / wanted.abs().clamp(min=1)).max())

    assert error(naive_feature(encoder, before)) < 2**-8
    low = (before @ weights.bfloat16()) + torch.tensor(encoder.bias).bfloat16()
    assert error(low.clamp(min=0)) > 2**-5, "bfloat16 would do, so this test shows nothing"


# --- on disk ---------------------------------------------------------------------------------------------------------


def test_a_loaded_clamp_steers_bit_for_bit_as_the_one_that_was_saved(each: Tiny, tmp_path: Path) -> None:
    recipe = fits(each, "everything")
    ids = torch.tensor([each.lm.prompt_ids(LONG)])
    folders = [save(use.artifact, tmp_path / str(place)) for place, use in enumerate(recipe.uses)]
    again = [replace(use, artifact=load(folder)) for use, folder in zip(recipe.uses, folders, strict=True)]
    zipped = [replace(use, artifact=unpack(pack(use.artifact))) for use in recipe.uses]
    wanted = logits_under(each, [recipe], ids)
    for uses in (again, zipped):
        assert torch.equal(logits_under(each, [Recipe(tuple(uses))], ids), wanted)


def test_the_folder_of_a_clamp_holds_the_documented_tensors_and_keys(tmp_path: Path) -> None:
    folder = save(clamping((0, 3), seed=1, centred=True), tmp_path / "clamp")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["schema_version"] == 1 and config["operation"] == "clamp"
    assert config["encoders"] == {layer: {"bias": -0.5, "threshold": 1.0, "centred": True} for layer in ("0", "3")}
    tensors = load_file(folder / "weights.safetensors")
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        f"{kind}.{layer}": (torch.float32, (D_MODEL,)) for kind in ("layer", "encoder") for layer in (0, 3)
    }
    config = json.loads((save(make_vector(), tmp_path / "v") / "config.json").read_text(encoding="utf-8"))
    assert "encoders" not in config


def damaged(config: dict[str, Any], tensors: dict[str, Tensor], what: str) -> None:
    changes: dict[str, Any] = {
        "no encoders": lambda: config.pop("encoders"),
        "a layer lacks its encoder": lambda: config["encoders"].pop("1"),
        "an encoder too many": lambda: config["encoders"].update({"3": config["encoders"]["1"]}),
        "encoders as a list": lambda: config.update(encoders=[1]),
        "an encoder that is none": lambda: config["encoders"].update({"1": None}),
        "no bias": lambda: config["encoders"]["1"].pop("bias"),
        "a bias as text": lambda: config["encoders"]["1"].update(bias="1"),
        "an endless threshold": lambda: config["encoders"]["1"].update(threshold=float("inf")),
        "a bias beyond float32": lambda: config["encoders"]["1"].update(bias=1e300),
        "centred as a number": lambda: config["encoders"]["1"].update(centred=1),
        "a tensor is missing": lambda: tensors.pop("encoder.1"),
        "a tensor is too long": lambda: tensors.update({"encoder.1": torch.ones(D_MODEL + 1)}),
        "a tensor of another type": lambda: tensors.update({"encoder.1": torch.ones(D_MODEL, dtype=torch.float16)}),
        "a tensor that is not finite": lambda: tensors["encoder.1"].fill_(float("nan")),
        "the operation changed": lambda: config.update(operation="add"),
    }
    changes[what]()


@pytest.mark.parametrize(
    "what",
    [
        "no encoders", "a layer lacks its encoder", "an encoder too many", "encoders as a list",
        "an encoder that is none", "no bias", "a bias as text", "an endless threshold", "a bias beyond float32",
        "centred as a number", "a tensor is missing", "a tensor is too long", "a tensor of another type",
        "a tensor that is not finite", "the operation changed",
    ],
)  # fmt: skip
def test_a_damaged_clamp_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    folder = save(CLAMP, tmp_path / "clamp")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "weights.safetensors")
    damaged(config, tensors, what)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(tensors, folder / "weights.safetensors")
    with pytest.raises(ArtifactError) as error:
        load(folder)
    assert len(str(error.value).splitlines()) == 1


def test_a_push_whose_config_speaks_of_encoders_loads_without_them(tmp_path: Path) -> None:
    folder = save(make_vector(), tmp_path / "v")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "encoders": {"1": 5}}), encoding="utf-8")
    loaded = load(folder)
    assert isinstance(loaded, SteeringVector) and loaded.encoders == {}


# --- the artifact ----------------------------------------------------------------------------------------------------

ENCODER = FeatureEncoder(torch.ones(D_MODEL), 0.0)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"encoders": {}}, "layers [1, 2]"),
        ({"encoders": {1: ENCODER}}, "layers [1, 2]"),
        ({"encoders": {1: ENCODER, 2: ENCODER, 3: ENCODER}}, "layers [1, 2]"),
        ({"encoders": {"1": ENCODER, "2": ENCODER}}, "layers [1, 2]"),
        ({"operation": "add"}, "layers []"),
        ({"operation": "ablate"}, "layers []"),
        ({"encoders": {1: ENCODER, 2: torch.ones(D_MODEL)}}, "FeatureEncoder"),
        ({"encoders": {1: ENCODER, 2: FeatureEncoder(torch.ones(D_MODEL + 1), 0.0)}}, "encoder of layer 2"),
    ],
)
def test_a_clamp_has_an_encoder_for_exactly_its_layers(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ArtifactError) as error:
        clamping((1, 2), seed=1, **changes)
    assert word in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ((torch.ones(D_MODEL, dtype=torch.float16), 0.0), "float16"),
        ((torch.ones(2, D_MODEL), 0.0), "weights"),
        (([1.0] * D_MODEL, 0.0), "list"),
        ((torch.full((D_MODEL,), float("nan")), 0.0), "not finite"),
        ((torch.ones(D_MODEL), float("nan")), "bias is nan"),
        ((torch.ones(D_MODEL), True), "bias is True"),
        ((torch.ones(D_MODEL), 0.0, float("inf")), "threshold is inf"),
        ((torch.ones(D_MODEL), 0.0, 10**400), "threshold"),
        ((torch.ones(D_MODEL), 0.0, 0.0, None), "'centred' is None"),
    ],
)
def test_an_encoder_checks_every_field(given: tuple[Any, ...], word: str) -> None:
    with pytest.raises(ArtifactError) as error:
        FeatureEncoder(*given)
    assert word in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_clamp_is_no_push_and_takes_no_part_in_arithmetic() -> None:
    other = make_vector((1, 2), seed=9)
    for sum_ in (
        lambda: CLAMP + other,
        lambda: other + CLAMP,
        lambda: other - CLAMP,
        lambda: CLAMP * 2,
        lambda: 0.5 * CLAMP,
        lambda: -CLAMP,
        lambda: CLAMP.normalised(),
    ):
        with pytest.raises(ArtifactError, match=r"clamps a feature.*recipe"):
            sum_()


@pytest.mark.parametrize(("value", "phrase"), [(8.5, "at 8.5"), (0.0, "at 0")])
def test_the_card_says_what_strength_1_holds_the_feature_at(value: float, phrase: str) -> None:
    artifact: Artifact = replace(CLAMP, calibration=Calibration(value))
    assert strength_meaning(artifact) == f"strength 1 holds the feature's activation {phrase}"
    assert phrase in render_card(artifact)
