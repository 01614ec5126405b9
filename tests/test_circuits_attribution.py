"""Attribution: scores by definition, prompts together as alone, selection, aggregation, tokens in question."""

import threading
from dataclasses import replace

import pytest
import torch
from checks import refused
from naive_circuits import naive_pass
from tiny import D_MLP, N_LAYERS, Tiny, fallback_tokenizer, hook_count, make_tiny, texts, word_tokenizer
from torch import Tensor

from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.storage import load, save
from neurosteer.circuits import (
    RULES,
    Attribution,
    CommonNeurons,
    Selection,
    attribute,
    everyday_prompts,
    find_universal,
    find_unspecific,
    next_tokens,
)
from neurosteer.errors import Cancelled, MismatchError, UsageError
from neurosteer.models.loading import describe_model

PROMPTS = ["the cat sings", "we never thank the dog, always the bright river and the mountain", "Why? Because it"]
TARGETS = [" over", " cheese", " rained"]


def attributed(this: Tiny, **options: object) -> Attribution:
    given = {"keep_universal": True, "raw": True, "per_position": D_MLP, **options}
    return attribute(this.lm, PROMPTS, TARGETS, **given)  # type: ignore[arg-type]


def naive_scores(this: Tiny, ids: list[int], target: int, other: int | None) -> tuple[float, Tensor]:
    """The metric, and gradient × activation `[n_layers, seq, d_mlp]` with nothing at the first position."""
    naive = naive_pass(this, ids)
    metric = naive.logits[-1, target] - (naive.logits[-1, other] if other is not None else 0.0)
    gradients = torch.autograd.grad(metric, naive.neurons)
    scores = torch.stack(
        [gradient * neurons.detach() for gradient, neurons in zip(gradients, naive.neurons, strict=True)]
    )
    scores[:, 0] = 0
    return float(metric.detach()), scores


def dense(found: Attribution, prompt: int) -> Tensor:
    scores = torch.zeros(N_LAYERS, len(found.tokens[prompt]), D_MLP)
    for layer, position, neuron, score in found.rows(prompt=prompt):
        scores[layer, position, neuron] = score
    return scores


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_of_a_batch_are_gradient_times_activation_of_each_prompt_alone(each: Tiny) -> None:
    found = attributed(each)
    for place, (prompt, target) in enumerate(zip(PROMPTS, TARGETS, strict=True)):
        ids, one = each.lm.prompt_ids(prompt, raw=True), found.prompts[place]
        wanted = each.lm.token_ids(target)[0]
        with torch.no_grad():
            logits = each.model(torch.tensor([ids])).logits[0, -1]
        others = [token for token in logits.argsort(descending=True).tolist() if token != wanted]
        metric, scores = naive_scores(each, ids, wanted, others[0])
        assert (one.target.id, one.counterfactual and one.counterfactual.id) == (wanted, others[0])
        assert one.metric == pytest.approx(metric, rel=1e-4, abs=1e-5)
        scale = float(scores.abs().max())
        torch.testing.assert_close(dense(found, place).double(), scores, rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(one.by_token.double(), scores.sum(-1), rtol=1e-4, atol=1e-4 * scale)
        strongest = scores.gather(1, scores.abs().argmax(1, keepdim=True))[:, 0]
        torch.testing.assert_close(one.strongest.double(), strongest, rtol=1e-4, atol=1e-5 * scale)


def test_batches_of_any_size_give_the_same(llama: Tiny) -> None:
    together, alone = attributed(llama), attributed(llama, batch_tokens=1)
    for one, other in zip(together.prompts, alone.prompts, strict=True):
        assert one.metric == pytest.approx(other.metric, rel=1e-5)
        torch.testing.assert_close(one.strongest, other.strongest, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one.activations, other.activations, rtol=1e-4, atol=1e-5)


def test_a_named_counterfactual_is_taken_from_the_target(llama: Tiny) -> None:
    ids = llama.lm.prompt_ids(PROMPTS[0], raw=True)
    found = attribute(llama.lm, PROMPTS[0], " again", " never", raw=True, keep_universal=True).prompts[0]
    target, other = llama.lm.token_ids(" again")[0], llama.lm.token_ids(" never")[0]
    metric, scores = naive_scores(llama, ids, target, other)
    assert found.metric == pytest.approx(metric, rel=1e-4)
    assert float(found.scores.double().abs().max()) == pytest.approx(float(scores.abs().max()), rel=1e-4)


def test_the_target_s_logit_alone_can_be_attributed(llama: Tiny) -> None:
    ids = llama.lm.prompt_ids(PROMPTS[0], raw=True)
    found = attribute(llama.lm, PROMPTS[0], " over", metric="logit", raw=True, keep_universal=True)
    metric, scores = naive_scores(llama, ids, llama.lm.token_ids(" over")[0], None)
    assert found.prompts[0].metric == pytest.approx(metric, rel=1e-4)
    assert found.prompts[0].counterfactual is None
    assert float(found.prompts[0].by_token.double().sum()) == pytest.approx(float(scores.sum()), rel=1e-3)
    assert found.data()["counterfactual"] is None


def test_the_first_position_is_never_counted_and_few_are_kept_where_few_are_asked_for(llama: Tiny) -> None:
    found = attributed(llama, per_position=3)
    for place, one in enumerate(found.prompts):
        rows, full = found.rows(prompt=place), dense(attributed(llama), place)
        assert min(row.position for row in rows) == 1
        last = 3  # of the last layer, only what the last token is written with can matter
        assert len(rows) == 3 * (N_LAYERS - 1) * (len(one.choice.ids) - 1) + last
        assert [abs(row.score) for row in rows] == sorted((abs(row.score) for row in rows), reverse=True)
        for row in rows:
            larger = full[row.layer, row.position].abs() > abs(row.score) * (1 + 1e-4)
            assert int(larger.sum()) < 3


def test_frozen_attention_scores_otherwise(llama: Tiny) -> None:
    full, frozen = attributed(llama), attributed(llama, attention="frozen")
    assert full.prompts[0].metric == pytest.approx(frozen.prompts[0].metric, rel=1e-5)
    assert not torch.allclose(full.prompts[0].strongest, frozen.prompts[0].strongest, rtol=0.05)
    last = N_LAYERS - 1  # nothing but the head comes after it
    torch.testing.assert_close(full.prompts[0].strongest[last], frozen.prompts[0].strongest[last])


def test_only_a_circuit_s_neurons_are_scored_where_one_is_given(llama: Tiny) -> None:
    whole = attributed(llama)
    circuit = whole.circuit(select=Selection("top_k", 9))
    within = attributed(llama, within=circuit, per_position=1)
    members = set(zip(circuit.neuron_layers.tolist(), circuit.neurons.tolist(), strict=True))
    for place in range(len(PROMPTS)):
        theirs = {row[:3]: row.score for row in whole.rows(prompt=place) if (row.layer, row.neuron) in members}
        ours = {row[:3]: row.score for row in within.rows(prompt=place)}
        assert ours == pytest.approx(theirs)


# --- selection -------------------------------------------------------------------------------------------------------


def naive_selection(select: Selection, scores: list[float], layers: list[int], metric: float) -> list[int]:
    order = [place for place in sorted(range(len(scores)), key=lambda at: -abs(scores[at])) if scores[place]]
    total, sum_so_far, kept, per_layer = sum(map(abs, scores)), 0.0, [], {}
    for place in order:
        size = abs(scores[place])
        per_layer[layers[place]] = per_layer.get(layers[place], 0) + 1
        if select.rule == "top_k" and len(kept) >= select.amount:
            break
        if select.rule == "percent" and size < select.amount / 100 * abs(metric):
            break
        if select.rule == "share" and sum_so_far >= select.amount * total:
            break
        sum_so_far += size
        if select.rule != "per_layer" or per_layer[layers[place]] <= select.amount:
            kept.append(place)
    return kept


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_selects_what_it_says(rule: str) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(60, generator=generator)
    scores[torch.randperm(60, generator=generator)[:10]] = 0
    layers = torch.randint(0, 5, (60,), generator=generator)
    for amount in {"top_k": (1, 7, 50, 900), "share": (0.01, 0.5, 1), "percent": (3, 40, 9e5), "per_layer": (1, 3)}[
        rule
    ]:
        select = Selection(rule, amount)  # type: ignore[arg-type]
        found = select(scores, layers, metric=-1.5).tolist()
        assert found == naive_selection(select, scores.tolist(), layers.tolist(), -1.5)


@pytest.mark.parametrize(
    ("rule", "amount", "words"),
    [
        ("best", 3, ("'best'", "top_k")),
        ("top_k", 0, ("top_k is 0",)),
        ("top_k", 2.5, ("2.5", "whole number")),
        ("per_layer", True, ("True",)),
        ("share", 1.2, ("1.2", "share")),
        ("percent", 0, ("percent is 0",)),
        ("percent", float("nan"), ("nan",)),
    ],
)
def test_selections_that_make_no_sense_are_refused(rule: str, amount: float, words: tuple[str, ...]) -> None:
    refused(lambda: Selection(rule, amount), UsageError, *words)  # type: ignore[arg-type]


# --- several prompts -------------------------------------------------------------------------------------------------


def members(circuit: NeuronCircuit) -> dict[tuple[int, int], float]:
    places = zip(circuit.neuron_layers.tolist(), circuit.neurons.tolist(), strict=True)
    return dict(zip(places, circuit.scores.tolist(), strict=True))


def test_the_mean_circuit_is_selected_by_the_mean_of_each_prompt_s_strongest_scores(llama: Tiny) -> None:
    found = attributed(llama)
    mean = sum(
        dense(found, place).gather(1, dense(found, place).abs().argmax(1, keepdim=True))[:, 0] for place in range(3)
    )
    assert isinstance(mean, Tensor)
    best = (mean / 3).flatten().abs().argsort(descending=True)[:12]
    circuit = found.circuit("mine", select=Selection("top_k", 12))
    assert list(members(circuit)) == [(int(at) // D_MLP, int(at) % D_MLP) for at in best]
    assert circuit.scores.tolist() == pytest.approx((mean / 3).flatten()[best].tolist())
    assert (circuit.name, circuit.method, circuit.operation) == ("mine", "relp", "scale")


def test_the_union_keeps_what_any_prompt_selects_by_its_own_metric(llama: Tiny) -> None:
    found, select = attributed(llama), Selection("percent", 20)
    wanted: dict[tuple[int, int], float] = {}
    for place, one in enumerate(found.prompts):
        for row in found.rows(prompt=place):
            key = (row.layer, row.neuron)
            if abs(row.score) >= 0.2 * abs(one.metric) and abs(row.score) > abs(wanted.get(key, 0.0)):
                wanted[key] = row.score
    assert len(wanted) > 3
    circuit = found.circuit(select=select, aggregate="union")
    assert members(circuit) == pytest.approx(wanted)
    assert len(members(found.circuit(select=select))) != len(wanted)


def test_a_circuit_records_how_it_was_found_and_can_be_kept(llama: Tiny, tmp_path: object) -> None:
    universal = CommonNeurons(((0, 1), (2, 3)), ((1, 5),))
    found = attributed(llama, keep_universal=False, universal=universal, attention="frozen")
    circuit = found.circuit("kept", select=Selection("per_layer", 2), aggregate="union")
    save(circuit, f"{tmp_path}/kept")
    loaded = load(f"{tmp_path}/kept")
    assert isinstance(loaded, NeuronCircuit)
    assert members(loaded) == members(circuit)
    parameters = loaded.parameters
    assert parameters["prompts"] == PROMPTS
    assert [target["given"] for target in parameters["targets"]] == TARGETS
    assert parameters["universal"] == [[0, 1], [2, 3]] and parameters["super_weights"] == [[1, 5]]
    assert parameters["select"] == ["per_layer", 2] and parameters["aggregate"] == "union"
    assert (parameters["attention"], parameters["raw"], parameters["keep_universal"]) == ("frozen", True, False)
    torch.testing.assert_close(
        loaded.differences,
        torch.stack([one.activations for one in found.prompts]).mean(0)[
            loaded.neuron_layers.long(), loaded.neurons.long()
        ],
    )


# --- universal neurons -----------------------------------------------------------------------------------------------


def test_universal_neurons_are_left_out_unless_kept(llama: Tiny) -> None:
    everything = attributed(llama)
    gone = [(row.layer, row.neuron) for row in everything.rows(Selection("top_k", 3))]
    universal = CommonNeurons(tuple(gone[:2]), tuple(gone[2:]))
    found = attributed(llama, keep_universal=False, universal=universal)
    assert not {(row.layer, row.neuron) for row in found.rows()} & set(gone)
    assert not members(found.circuit()).keys() & set(gone)
    assert [row for row in everything.rows() if (row.layer, row.neuron) not in gone] == found.rows()
    switched = replace(found, keep_universal=True)
    assert switched.rows() == everything.rows()
    assert members(switched.circuit()) == members(everything.circuit())


def test_universal_neurons_are_those_strong_on_most_prompts(each: Tiny) -> None:
    prompts = texts(7, seed=2)
    counts: dict[tuple[int, int], int] = {}
    for prompt in prompts:
        naive = naive_pass(each, each.lm.prompt_ids(prompt, raw=True), rules=False)
        for layer, neurons in enumerate(naive.neurons):
            for neuron in neurons[-1].detach().abs().argsort(descending=True)[:10].tolist():
                counts[layer, neuron] = counts.get((layer, neuron), 0) + 1
    wanted = {key for key, count in counts.items() if count >= 4}  # 0.6 of 7, rounded down
    found = find_universal(each.lm, prompts, top_per_layer=10, share=0.6)
    assert wanted and set(found.neurons) == wanted
    assert found.n_prompts == 7


def loud(layer: int, neuron: int, factor: float) -> Tiny:
    """A model one of whose neurons is `factor` times as active as it was."""
    this = make_tiny("llama", seed=5)
    with torch.no_grad():
        this.model.model.layers[layer].mlp.up_proj.weight[neuron] *= factor
    return this


def test_a_neuron_made_loud_is_universal_and_its_edges_are_outliers() -> None:
    found = find_universal(loud(0, 17, 300.0).lm)
    assert (0, 17) in found.neurons
    assert (0, 17) in found.super_weights
    assert (0, 17) in found.all


def test_universal_neurons_are_excluded_by_default_and_found_once() -> None:
    this = loud(0, 17, 300.0)
    found = attribute(this.lm, PROMPTS[0], TARGETS[0], raw=True)
    assert found.universal is find_universal(this.lm)
    assert (0, 17) not in {(row.layer, row.neuron) for row in found.rows()}
    assert (0, 17) in {(row.layer, row.neuron) for row in replace(found, keep_universal=True).rows()}


def test_a_specific_attribution_leaves_out_what_everyday_answers_are_owed_to_as_well(llama: Tiny) -> None:
    found = attribute(llama.lm, PROMPTS[0], TARGETS[0], raw=True, specific=True)
    assert found.universal is not None
    assert set(found.left_out) == set(find_unspecific(llama.lm).all) > set(find_universal(llama.lm).all)
    refused(
        lambda: attribute(llama.lm, PROMPTS[0], TARGETS[0], specific=True, keep_universal=True),
        UsageError, "specific", "keep_universal",
    )  # fmt: skip


def test_there_are_twenty_different_everyday_prompts() -> None:
    assert len(set(everyday_prompts())) == 20
    assert all(prompt == prompt.strip() for prompt in everyday_prompts())


# --- tokens in question ----------------------------------------------------------------------------------------------


def test_of_a_target_of_several_tokens_the_first_one_is_meant_and_it_says_so(llama: Tiny) -> None:
    tokens = llama.lm.token_ids(" over the river")
    (choice,) = next_tokens(llama.lm, "we sing", " over the river", raw=True)
    assert (choice.target.id, choice.target.n_tokens) == (tokens[0], len(tokens))
    assert choice.target.is_part and choice.target.given == " over the river"
    (whole,) = next_tokens(llama.lm, "we sing", llama.lm.tokenizer.decode([tokens[0]]), raw=True)
    assert whole.target.id == tokens[0] and not whole.target.is_part
    found = attribute(llama.lm, ["we sing", "we run"], " over the river", raw=True, keep_universal=True)
    assert found.notes == (f"' over the river' is {len(tokens)} tokens; its first, {choice.target.text!r}, is taken.",)


def test_the_chat_template_and_the_beginning_of_the_answer_stand_before_the_target(llama: Tiny) -> None:
    (choice,) = next_tokens(llama.lm, "Why?", " rained", seed_response="Because it")
    text = llama.lm.tokenizer.decode(list(choice.ids))
    assert text == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nBecause it"
    assert choice.target.id == llama.lm.token_ids(" rained")[0]
    (plain,) = next_tokens(llama.lm, "Why?", " rained", seed_response="Because it", raw=True)
    assert llama.lm.tokenizer.decode(list(plain.ids)) == "Why?Because it"
    conversation = [{"role": "user", "content": "Why?"}]
    (same,) = next_tokens(llama.lm, conversation, " rained", seed_response="Because it")
    assert same.ids == choice.ids
    scored = attribute(llama.lm, "Why?", " rained", seed_response="Because it", keep_universal=True)
    assert len(scored.tokens[0]) == len(choice.ids)


def test_where_a_tokenizer_marks_the_beginnings_of_words_a_target_is_cut_as_it_is_in_the_text() -> None:
    """By itself, such a tokenizer takes any text for the beginning of a word."""
    lm = describe_model(make_tiny("llama").model, fallback_tokenizer(), name="tiny/fallback")
    assert lm.tokenizer.convert_ids_to_tokens(lm.token_ids("the")) == ["▁th", "e"]
    for prompt, target, wanted in (("an", "the", "th"), ("an", " the", "▁th")):
        (choice,) = next_tokens(lm, prompt, target)
        assert lm.tokenizer.convert_ids_to_tokens(choice.target.id) == wanted


# --- what cannot be done ---------------------------------------------------------------------------------------------


def test_bad_input_is_refused_with_what_is_wrong(llama: Tiny) -> None:
    def call(*given: object, **options: object) -> None:
        attribute(llama.lm, *given, **{"raw": True, "keep_universal": True, **options})  # type: ignore[arg-type]

    refused(lambda: call("", " over"), UsageError, "prompt is empty")
    refused(lambda: call([], " over"), UsageError, "no prompt")
    refused(lambda: call(["the cat", ""], " over"), UsageError, "prompt is empty")
    refused(lambda: call("the cat", ""), UsageError, "target", "empty")
    refused(lambda: call("the cat", " over", " over the"), UsageError, "' over'", "same token")
    refused(lambda: call(["the cat", "the dog"], [" over"]), UsageError, "1 targets and 2 prompts")
    refused(lambda: call("the cat", " over", [" a", " the"]), UsageError, "2 counterfactuals and 1 prompts")
    refused(lambda: call("the cat", " over", metric="logits"), UsageError, "'logits'", "difference, logit")
    refused(lambda: call("the cat", " over", " a", metric="logit"), UsageError, "counterfactual")
    refused(lambda: call("the cat", " over", attention="none"), UsageError, "'none'")
    refused(lambda: call("the cat", " over", per_position=0), UsageError, "per_position is 0")
    refused(lambda: call("the cat " * 400, " over"), UsageError, "256 tokens")
    refused(lambda: call("!", " over"), UsageError, "one token")
    refused(lambda: find_universal(llama.lm, ["the cat", ""]), UsageError, "empty")
    refused(lambda: find_universal(llama.lm, ["the cat"], share=0), UsageError, "share")
    refused(lambda: find_universal(llama.lm, ["the cat"], top_per_layer=D_MLP + 1), UsageError, str(D_MLP))
    assert hook_count(llama.model) == 0


def test_a_word_that_the_tokenizer_does_not_know_is_refused() -> None:
    lm = describe_model(make_tiny("llama").model, word_tokenizer(), name="tiny/words", chat=False)
    refused(lambda: next_tokens(lm, "one two", "eleven"), UsageError, "'eleven'", "tiny/words")
    assert next_tokens(lm, "one two", "three")[0].target.text == "three"


def test_a_circuit_of_another_model_is_refused(llama: Tiny) -> None:
    other = make_tiny("llama", num_hidden_layers=2)
    circuit = attribute(other.lm, "the cat", " over", raw=True, keep_universal=True).circuit()
    refused(lambda: attributed(llama, within=circuit), MismatchError, "tiny/llama")


def test_an_amount_that_nothing_reaches_is_refused(llama: Tiny) -> None:
    found = attributed(llama)
    refused(lambda: found.circuit(select=Selection("percent", 1e6)), UsageError, "percent")
    refused(lambda: found.circuit(aggregate="sum"), UsageError, "'sum'", "mean, union")  # type: ignore[arg-type]


def test_it_can_be_cancelled_and_says_how_far_it_is(llama: Tiny) -> None:
    cancel, told = threading.Event(), []
    attributed(llama, batch_tokens=1, progress=lambda message, fraction=None: told.append(fraction))
    assert told == pytest.approx([1 / 3, 2 / 3, 1])
    cancel.set()
    with pytest.raises(Cancelled):
        attributed(llama, cancel=cancel)
    with pytest.raises(Cancelled):
        find_universal(make_tiny("llama").lm, cancel=cancel)
