"""Building: the choice of layers, what is recorded, and that the composition computes what its parts promise."""

import threading
import time
import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tiny import (
    D_MLP,
    N_LAYERS,
    Tiny,
    build,
    byte_tokenizer,
    hook_count,
    make_tiny,
    naive_states,
    own_hooks,
    pool,
    texts,
)
from torch import Tensor

from neurosteer.artifacts.cards import render_card
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.storage import load, save
from neurosteer.artifacts.vector import SteeringVector
from neurosteer.building import plan
from neurosteer.building.build import build_each
from neurosteer.building.layers import parse_layers
from neurosteer.building.separation import separation_of
from neurosteer.errors import ArtifactError, Cancelled, ExamplesError, UsageError
from neurosteer.evaluation.matched_twins import permuted_twin
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.progress import Job
from neurosteer.reading.loop import read_activations
from neurosteer.reading.request import Request
from neurosteer.reading.statistics import ClassRows, HeldOut
from neurosteer.ui.show.html import warnings_of
from neurosteer.version import VERSION

ALL_TEXTS = texts(60, seed=11)
EXAMPLES = ContrastSet(
    tuple(ALL_TEXTS[:30]), tuple(ALL_TEXTS[30:]), name="Über moods", dropped={"blank": 2, "duplicate": 1}
)


def vector(*arguments: Any, **named: Any) -> SteeringVector:
    built = build(*arguments, **named)
    assert isinstance(built, SteeringVector)
    return built


def circuit(*arguments: Any, **named: Any) -> NeuronCircuit:
    built = build(*arguments, method="cna", **named)
    assert isinstance(built, NeuronCircuit)
    return built


def naive_rows(this: Tiny, framing: str = "answer", tokens: str = "mean") -> tuple[list[Tensor], list[Tensor]]:
    """Per class, rows of the residual stream and of the neurons `[n_layers, n, d]`, one text at a time."""
    tokenizer = this.lm.tokenizer
    residual, neurons = [], []
    for side in (EXAMPLES.positive, EXAMPLES.negative):
        found: list[tuple[Tensor, Tensor]] = []
        for text in side:
            user = f"<|im_start|>user\n{text if framing == 'prompt' else ''}<|im_end|>\n<|im_start|>assistant\n"
            turn = [] if framing == "raw" else tokenizer(user, add_special_tokens=False)["input_ids"]
            own = [] if framing == "prompt" else tokenizer(text, add_special_tokens=framing == "raw")["input_ids"]
            states = naive_states(this, turn + own)
            header = len(tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"])
            start = {"raw": 0, "prompt": header, "answer": len(turn)}[framing]
            found.append(tuple(pool(state, len(turn + own), tokens, start) for state in states))  # type: ignore[arg-type]
        residual.append(torch.stack([row for row, _ in found], 1))
        neurons.append(torch.stack([row for _, row in found], 1))
    return residual, neurons


def naive_separation(residual: list[Tensor]) -> list[float]:
    """Per layer sklearn's ROC AUC of held-out rows along the other rows' class difference."""
    split = EXAMPLES.split(plan.HELD_OUT_SHARE, seed=0, at_most=plan.HELD_OUT_AT_MOST)
    found = []
    for layer in range(N_LAYERS):
        positive, negative = (rows[layer].numpy() for rows in residual)
        direction = positive[list(split.train_positive)].mean(0) - negative[list(split.train_negative)].mean(0)
        held = np.concatenate([positive[list(split.held_out_positive)], negative[list(split.held_out_negative)]])
        labels = [1] * len(split.held_out_positive) + [0] * len(split.held_out_negative)
        found.append(float(roc_auc_score(labels, held @ direction)))
    return found


# --- what is built ---------------------------------------------------------------------------------------------------


def test_caa_at_all_layers_is_the_naive_difference_of_means(each: Tiny) -> None:
    built = vector(each.lm, EXAMPLES, layers="all")
    residual, _ = naive_rows(each)
    assert built.layers == list(range(N_LAYERS))
    for layer in range(N_LAYERS):
        wanted = residual[0][layer].mean(0) - residual[1][layer].mean(0)
        assert torch.allclose(built.directions[layer], wanted, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("rank", ["difference", "dprime", "write"])
def test_cna_over_given_layers_is_the_naive_ranking(each: Tiny, rank: str) -> None:
    built = circuit(
        each.lm, EXAMPLES, layers="0-2", rank=rank, top_k=12, framing="prompt", tokens="last", skip_layers=[0]
    )
    residual, neurons = naive_rows(each, "prompt", "last")
    target = residual[0][2].mean(0) - residual[1][2].mean(0)
    scores: dict[tuple[int, int], float] = {}
    for layer in (1, 2):
        positive, negative = (rows[layer].double() for rows in neurons)
        difference = positive.mean(0) - negative.mean(0)
        score = difference
        if rank == "dprime":
            score = difference / ((positive.var(0, correction=0) + negative.var(0, correction=0)) / 2).sqrt()
        if rank == "write":
            weight: Tensor = each.downs[layer].weight.double()  # type: ignore[operator,union-attr]
            columns = weight if each.architecture == "gpt2" else weight.T
            if each.architecture.startswith("gemma"):
                columns = columns * (1 + each.blocks[layer].post_feedforward_layernorm.weight.double())  # type: ignore
            score = difference * (columns @ (target / target.norm()).double())
        scores.update({(layer, neuron): float(score[neuron]) for neuron in range(D_MLP)})
    if rank == "write":
        scores = {key: value for key, value in scores.items() if value > 0}
    wanted = sorted(scores, key=lambda key: -abs(scores[key]))[:12]
    found = list(zip(built.neuron_layers.tolist(), built.neurons.tolist(), strict=True))
    assert set(found) == set(wanted)
    assert np.allclose(built.scores.numpy(), [scores[key] for key in found], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["pca", "probe"])
def test_methods_of_rows_see_every_text(llama: Tiny, method: str) -> None:
    built = vector(llama.lm, EXAMPLES, method=method, layers=2)
    residual, _ = naive_rows(llama)
    rows = torch.cat([side[2] for side in residual]).double().numpy()
    labels = np.repeat([1, 0], [30, 30])
    if method == "pca":
        wanted = np.linalg.svd(rows - rows.mean(0))[2][0]
        difference = rows[:30].mean(0) - rows[30:].mean(0)
        assert np.allclose(built.directions[2].numpy(), wanted * np.sign(wanted @ difference), atol=1e-3)
    else:
        centred = rows - rows.mean(0)
        centred /= np.sqrt((centred**2).sum(1).mean())  # the penalty is for features of length 1
        wanted = LogisticRegression(C=100.0, max_iter=10_000, tol=1e-9).fit(centred, labels).coef_[0]
        found = built.directions[2].double().numpy()
        assert found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.999


def test_paired_examples_are_read_as_pairs(llama: Tiny) -> None:
    paired = ContrastSet(EXAMPLES.positive, EXAMPLES.negative, name="pairs", paired=True)
    built = vector(llama.lm, paired, method="pca", layers=1)
    residual, _ = naive_rows(llama)
    differences = (residual[0][1] - residual[1][1]).double()
    first = torch.linalg.svd(differences, full_matrices=False).Vh[0]
    assert abs(float(torch.cosine_similarity(first.float(), built.directions[1], dim=0))) > 0.9999
    assert float(built.directions[1].double() @ differences.mean(0)) > 0


# --- separation and the choice of layers -----------------------------------------------------------------------------


def test_separation_is_sklearns_roc_auc_also_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        positive, negative = rng.integers(-2, 3, (7, 3)).astype("f"), rng.integers(-2, 2, (9, 3)).astype("f")
        direction = rng.integers(-1, 2, 3).astype("f")
        rows = ClassRows(torch.from_numpy(positive), torch.from_numpy(negative))
        wanted = roc_auc_score([1] * 7 + [0] * 9, np.concatenate([positive, negative]) @ direction)
        assert separation_of(HeldOut(torch.from_numpy(direction), rows)) == pytest.approx(wanted, abs=1e-6)


def test_auto_records_the_held_out_separation_of_every_layer_read_and_takes_the_best(each: Tiny) -> None:
    built = vector(each.lm, EXAMPLES)
    wanted = naive_separation(naive_rows(each)[0])
    recorded = built.provenance.separation
    assert set(recorded) == set(range(N_LAYERS))
    assert all(recorded[layer] == pytest.approx(wanted[layer], abs=1e-3) for layer in recorded)
    best = max(wanted[1:])  # of four layers, the middle 20 to 80% are 1 to 3
    assert wanted[built.layers[0]] == pytest.approx(best, abs=1e-3)
    assert len(built.layers) == 1 and f"layer {built.layers[0]}" in built.provenance.layer_choice
    assert f"{best:.2f}" in built.provenance.layer_choice


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_auto_picks_the_layer_where_the_classes_are_planted_apart(layer: int) -> None:
    """Classes differ in the share of a token whose embedding moves only dimension 0; from `layer` on it also writes
    dimension 1, where all else is silent, and noise of the embeddings hides it elsewhere."""
    this = make_tiny("llama", chat=False)
    model: Any = this.model
    tokenizer = byte_tokenizer(chat=False)
    rng = np.random.default_rng(layer)
    letters = [chr(code) for code in range(ord("a"), ord("w"))]
    with torch.no_grad():
        # Nothing is written anywhere but by block `layer`, whose first neuron fires on "x" alone, along dimension 1;
        # the block after it turns the whole stream to noise of its own by a large random MLP.
        x = tokenizer("x")["input_ids"][0]
        embeddings = model.model.embed_tokens.weight
        embeddings[:, :2] = 0.0
        embeddings[x] = embeddings[tokenizer("y")["input_ids"][0]]
        embeddings[x, 0] = 3.0
        for place, block in enumerate(model.model.layers):
            block.self_attn.o_proj.weight.zero_()
            block.post_attention_layernorm.weight.fill_(1.0)
            if place <= layer:
                block.mlp.down_proj.weight.zero_()
            else:
                block.mlp.down_proj.weight.mul_(30.0)
                block.mlp.gate_proj.weight[:, :2] = block.mlp.up_proj.weight[:, :2] = 0.0
            if place == layer:
                block.mlp.gate_proj.weight.zero_()
                block.mlp.up_proj.weight.zero_()
                block.mlp.gate_proj.weight[0, 0] = block.mlp.up_proj.weight[0, 0] = 4.0
                block.mlp.down_proj.weight[1, 0] = 10.0

    def text(marks: int) -> str:
        return "".join(["q", *rng.permutation([*rng.choice(letters, 12 - marks), *"x" * marks])])

    examples = ContrastSet(
        tuple({text(2): 0 for _ in range(60)}), tuple({text(1): 0 for _ in range(60)}), name="planted"
    )
    built = vector(this.lm, examples, tokens="mean")
    assert built.layers == [layer], built.provenance
    assert built.provenance.separation[layer] == 1.0
    along = built.directions[layer] / built.directions[layer].norm()
    assert abs(float(along[1])) > 0.8


def test_auto_for_circuits_searches_up_to_the_best_layer(llama: Tiny) -> None:
    built = circuit(llama.lm, EXAMPLES, top_k=10_000, skip_layers=[])
    wanted = naive_separation(naive_rows(llama)[0])
    best = max(range(1, N_LAYERS), key=lambda layer: wanted[layer])
    assert built.parameters["searched_layers"] == list(range(best + 1))
    assert f"up to layer {best}" in built.provenance.layer_choice


def test_as_in_the_paper_a_circuit_is_ranked_over_all_layers_at_the_last_token_of_the_prompt(llama: Tiny) -> None:
    built = circuit(llama.lm, EXAMPLES, rank="difference", operation="scale")
    assert built.parameters["searched_layers"] == [2, 3]
    assert (built.provenance.framing, built.provenance.tokens) == ("prompt", "last")


def test_defaults_of_framing_and_tokens_follow_the_model_and_the_framing(llama: Tiny) -> None:
    def read(lm: Any, **named: Any) -> tuple[str, str]:
        provenance = vector(lm, EXAMPLES, layers=1, **named).provenance
        return provenance.framing, provenance.tokens

    base = make_tiny("llama", chat=False).lm
    assert read(llama.lm) == ("answer", "mean")
    assert read(llama.lm, framing="prompt") == ("prompt", "last")
    assert read(llama.lm, framing="prompt", tokens="mean") == ("prompt", "mean")
    assert read(llama.lm, framing="raw", tokens="last") == ("raw", "last")
    assert read(base) == ("raw", "mean")
    with pytest.raises(UsageError, match="base model"):
        read(base, framing="answer")


@pytest.mark.parametrize("n_layers", [1, 2, 3, 5])
def test_auto_works_for_models_of_few_layers(n_layers: int) -> None:
    this = make_tiny("llama", num_hidden_layers=n_layers, layer_types=None)
    built = vector(this.lm, EXAMPLES)
    assert len(built.layers) == 1 and built.layers[0] < n_layers
    assert circuit(this.lm, EXAMPLES, skip_layers=[]).layers[-1] < n_layers


# --- layers as people write them -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("auto", None),
        (" AUTO ", None),
        ("all", tuple(range(12))),
        (3, (3,)),
        ("3", (3,)),
        ("03", (3,)),
        ("2-5", (2, 3, 4, 5)),
        ("5-5", (5,)),
        ("7,3, 9", (3, 7, 9)),
        ("1-3,2,8-9", (1, 2, 3, 8, 9)),
        (range(4, 7), (4, 5, 6)),
        ([9, 0, 9], (0, 9)),
        ((11,), (11,)),
        ({1, 2}, (1, 2)),
        (iter([2, 1]), (1, 2)),
    ],
)
def test_layers_may_be_written_in_many_ways(given: Any, wanted: tuple[int, ...] | None) -> None:
    assert parse_layers(given, 12) == wanted


ODD_LAYERS: list[Any] = [
    "", "none", "12", "-1", "3-", "-3", "5-2", "1-2-3", "1;2", "1.5", "0-11-", "0-12", "0-999999999", "9" * 5000, "a-b",
    "²", "1,,2", "1 2", 12, -1, [], [1.5], [True, "x"], [12], ["1"], range(10, 14), 3.0, None, [None], [1, "a"],
]  # fmt: skip


@pytest.mark.parametrize("given", ODD_LAYERS, ids=lambda given: str(given)[:20])
def test_layers_that_are_not_the_models_are_refused_in_one_line(given: Any) -> None:
    with pytest.raises(UsageError) as error:
        parse_layers(given, 12)
    assert "layers is" in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


@pytest.mark.parametrize("part", ["0-9999", "0-11", "3", "0-9999999999"])
def test_layers_as_a_long_text_cost_no_more_than_their_length(part: str) -> None:
    text = f"{part}," * (250_000 // (len(part) + 1)) + part
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(UsageError, match=r"layers is"):
        parse_layers(text, 12)
    seconds, (_, most) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 0.5 and most < 1 << 20
    assert parse_layers(",".join(["0-11"] * 200), 12) == tuple(range(12))  # of 999 characters


# --- what is recorded ------------------------------------------------------------------------------------------------


def test_the_artifact_says_where_it_comes_from(llama: Tiny) -> None:
    before = datetime.now(UTC)
    built = vector(llama.lm, EXAMPLES, layers=[2, 1], name="my mood", description="Cheerful.", framing="raw")
    source = built.provenance
    assert built.name == "my-mood" and built.description == "Cheerful."
    assert built.model == llama.lm.reference
    assert (source.examples, source.examples_sha256) == ("Über moods", EXAMPLES.sha256)
    assert (source.n_positive, source.n_negative, source.n_cut) == (30, 30, 0)
    assert source.dropped == {"blank": 2, "duplicate": 1}
    assert (source.framing, source.tokens, source.version) == ("raw", "mean", VERSION)
    assert "given" in source.layer_choice
    assert set(source.separation) == {1, 2}
    assert abs((datetime.fromisoformat(source.created) - before).total_seconds()) < 60
    assert built.receipts == () and built.calibration.measured is False


def test_without_a_name_the_artifact_is_called_after_examples_and_method(llama: Tiny) -> None:
    assert build(llama.lm, EXAMPLES, layers=1).name == "ber-moods-caa"
    nameless = ContrastSet(EXAMPLES.positive, EXAMPLES.negative, name="日本語")
    assert build(llama.lm, nameless, layers=1, method="pca").name == "pca"


def test_texts_that_were_cut_are_counted(llama: Tiny) -> None:
    long = "the cat sings " * 200
    examples = ContrastSet((long, "we run"), (long + "x", long + "y"), name="long")
    this = make_tiny("llama", max_position_embeddings=1024)
    assert build(this.lm, examples, layers=0).provenance.n_cut == 3


def test_parameters_are_recorded_with_their_defaults(llama: Tiny) -> None:
    assert build(llama.lm, EXAMPLES, method="probe", layers=1).parameters == {"penalty": 0.01}
    recorded = build(llama.lm, EXAMPLES, method="cna", layers="2-3", top_k=5, skip_layers=(1,)).parameters
    assert recorded == {
        "rank": "write", "operation": "shift", "top_k": 5, "skip_layers": [1], "searched_layers": [2, 3],
    }  # fmt: skip


def test_pca_of_unpaired_examples_says_that_it_may_find_another_difference(
    llama: Tiny, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    unpaired = build(llama.lm, EXAMPLES, method="pca", layers=1)
    (warning,) = unpaired.provenance.warnings
    assert "not paired" in warning and "caa" in warning and "\n" not in warning
    assert [record.message for record in caplog.records if "paired" in record.message] == [warning]
    assert warning in warnings_of(unpaired) and "The examples are not paired" in render_card(unpaired)
    assert load(save(unpaired, tmp_path / "one")).provenance.warnings == (warning,)
    caplog.clear()
    paired = ContrastSet(EXAMPLES.positive, EXAMPLES.negative, name="pairs", paired=True)
    for quiet in (
        build(llama.lm, paired, method="pca", layers=1),
        *(build(llama.lm, EXAMPLES, method=method, layers=1) for method in ("caa", "probe")),
    ):
        assert quiet.provenance.warnings == ()
    assert not [record for record in caplog.records if "paired" in record.message]


@pytest.mark.parametrize("method", ["pca", "probe"])
def test_rows_too_large_to_keep_at_every_layer_are_read_in_a_second_pass_with_the_same_result(
    llama: Tiny, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = vector(llama.lm, EXAMPLES, method=method)
    monkeypatch.setattr(plan, "MAX_ROW_BYTES", 0)
    twice = vector(llama.lm, EXAMPLES, method=method)
    assert twice.layers == once.layers and twice.norms == once.norms
    for layer in once.layers:
        assert torch.equal(twice.directions[layer], once.directions[layer])
    changed = {"created": once.provenance.created}
    assert {**vars(twice.provenance), **changed} == vars(once.provenance)


# --- refusals, progress, cancelling ----------------------------------------------------------------------------------


def never_called(this: Tiny) -> Any:
    def fail(*_: Any) -> None:
        raise AssertionError("the model was run")

    return own_hooks([(this.blocks[0], fail)], before=True)


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"method": "best"}, ["'best'", "caa"]),
        ({"layers": 99}, ["99", "0 to 3"]),
        ({"framing": "chat"}, ["'chat'", "raw, prompt, answer"]),
        ({"tokens": "first"}, ["'first'", "mean, last"]),
        ({"top_k": 3}, ["top_k", "none"]),
        ({"method": "cna", "rank": "best"}, ["'best'", "difference, dprime, write"]),
        ({"method": "cna", "operation": "add"}, ["'add'", "scale, shift"]),
        ({"method": "cna", "top_k": 0}, ["top_k"]),
        ({"method": "cna", "layers": [1], "skip_layers": [1]}, ["skip_layers"]),
        ({"method": "probe", "penalty": 0}, ["penalty"]),
    ],
)
def test_a_wrong_argument_is_refused_before_the_model_runs(
    llama: Tiny, named: dict[str, Any], words: list[str]
) -> None:
    with never_called(llama), pytest.raises(UsageError) as error:
        build(llama.lm, EXAMPLES, **named)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("named", [{"description": 5}, {"description": "x" * 10_001}])
def test_a_description_that_cannot_be_kept_is_a_neurosteer_error(llama: Tiny, named: dict[str, Any]) -> None:
    with pytest.raises((ArtifactError, UsageError, ExamplesError)):
        build(llama.lm, EXAMPLES, layers=1, **named)


@pytest.mark.parametrize("method", ["caa", "cna", "pca"])
def test_cancelling_a_build_raises_cancelled_and_leaves_no_hooks(llama: Tiny, method: str) -> None:
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        build(llama.lm, EXAMPLES, method=method, cancel=cancel)
    assert hook_count(llama.model) == 0


def test_cancelling_after_the_last_batch_still_cancels(llama: Tiny) -> None:
    cancel = threading.Event()

    def progress(message: str, fraction: float | None = None) -> None:
        if fraction == 1.0:
            cancel.set()

    with pytest.raises(Cancelled):
        build(llama.lm, EXAMPLES, progress=progress, cancel=cancel)


def test_a_build_says_what_it_is_doing(llama: Tiny) -> None:
    messages: list[str] = []
    build(llama.lm, EXAMPLES, progress=lambda message, fraction=None: messages.append(message))
    assert any("60 texts" in message for message in messages) and any("caa" in message for message in messages)


# --- texts too short to be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["caa", "pca", "probe", "cna"])
def test_texts_too_short_to_be_read_change_nothing_and_are_recorded(method: str) -> None:
    this = make_tiny("llama", chat=False)
    positive, negative = ([one for one in texts(20, seed=seed) if " " in one][:12] for seed in (51, 52))
    plain = ContrastSet(tuple(positive), tuple(negative), name="plain")
    mixed = ContrastSet(("a", *positive), (*negative, "b"), name="mixed", dropped={"blank": 1, "duplicate": 0})
    heard: list[str] = []
    told = build(
        this.lm, mixed, method=method, layers=[1, 2], progress=lambda message, fraction=None: heard.append(message)
    )
    wanted = build(this.lm, plain, method=method, layers=[1, 2])
    if isinstance(wanted, SteeringVector):
        assert isinstance(told, SteeringVector)
        assert all(torch.allclose(told.directions[layer], wanted.directions[layer], atol=1e-6) for layer in (1, 2))
    else:
        assert torch.equal(told.neurons, wanted.neurons)  # type: ignore[union-attr]
    source = told.provenance
    assert source.dropped == {"blank": 1, "duplicate": 0, "too short to be read": 2}
    assert (source.n_positive, source.n_negative, source.examples_sha256) == (12, 12, mixed.sha256)
    assert source.separation == wanted.provenance.separation
    assert "Left out 2 texts that are too short to be read" in heard
    each = build_each(this.lm, mixed, method="caa", layers=[1, 2])
    assert (
        each[1].provenance.dropped["too short to be read"] == 2 and each[1].provenance.examples_sha256 == mixed.sha256
    )


def test_examples_of_which_too_few_can_be_read_are_refused_in_one_line() -> None:
    this = make_tiny("llama", chat=False)
    short = ContrastSet(("a", "b", "the cat sings"), ("we run", "they never sing"), name="letters")
    with pytest.raises(ExamplesError, match="Only 1 positive and 2 negative texts of 'letters'") as error:
        build(this.lm, short, layers=1)
    assert "\n" not in str(error.value)
    assert build(make_tiny("llama").lm, short, layers=1).provenance.dropped == {"blank": 0, "duplicate": 0}


def test_what_the_chat_template_was_given_is_recorded() -> None:
    this = make_tiny("llama")
    lm = replace(this.lm, template_options={"enable_thinking": False})
    examples = ContrastSet(tuple(texts(4, seed=51)), tuple(texts(4, seed=52)), name="few")
    assert build(lm, examples, layers=1).provenance.template_options == {"enable_thinking": False}
    assert build(replace(lm, chat=False), examples, layers=1).provenance.template_options == {}


def test_examples_with_prompts_are_built_from_as_answers_to_them(llama: Tiny) -> None:
    few = replace(EXAMPLES, positive=EXAMPLES.positive[:12], negative=EXAMPLES.negative[:12], paired=True)
    prompts = tuple(f"{first} sings" for first in ("the cat", "a dog", "we") * 4)
    asked = replace(few, positive_prompts=prompts, negative_prompts=prompts)
    built, plain = (vector(llama.lm, each, layers=1, calibrate=False) for each in (asked, few))
    assert (built.provenance.n_prompts, plain.provenance.n_prompts) == (3, 0)
    assert built.provenance.examples_sha256 == asked.sha256 != plain.provenance.examples_sha256
    read = read_activations(
        llama.lm, asked.positive, asked.negative, Request((1,), framing="answer"), prompts=asked.prompts
    )
    assert torch.allclose(built.directions[1], read.residual[1].difference, atol=1e-5)
    assert not torch.allclose(built.directions[1], plain.directions[1], atol=1e-3)
    assert "each after its own prompt (3 different ones)" in render_card(built)
    twin = permuted_twin(llama.lm, built, asked, 0, Job())
    assert twin.provenance.n_prompts == 3 and twin.provenance.framing == "answer"
