"""The linearised model: the plain model's values, the rules' gradients, and nothing left behind."""

import threading

import pytest
import torch
from checks import refused
from naive_circuits import naive_pass
from tiny import ARCHITECTURES, VOCABULARY, Tiny, first, hook_count, make_tiny, own_hooks, tiny_next
from torch import Tensor

from neurosteer.circuits import linear_pass, linearised
from neurosteer.circuits.relp.linearised import ATTENTIONS, Attention
from neurosteer.errors import ModelError, UsageError

LENGTH = 14  # longer than the sliding windows


def some_ids(seed: int = 0, length: int = LENGTH) -> list[int]:
    return torch.randint(4, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def both(this: Tiny, ids: list[int], attention: Attention) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of two logits' difference with respect to the neurons, by the library and by hand."""
    linear = linear_pass(this.lm, [ids], attention)
    logits = linear.logits[0]
    ours = torch.autograd.grad(logits[7] - logits[11], linear.neurons)
    naive = naive_pass(this, ids, frozen=attention == "frozen")
    theirs = torch.autograd.grad(naive.logits[-1, 7] - naive.logits[-1, 11], naive.neurons)
    return [gradient[0] for gradient in ours], list(theirs)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    scale = float(theirs.abs().max())
    assert scale > 0
    assert float((ours - theirs).abs().max()) < tolerance * scale


def test_the_model_written_by_hand_is_the_model(each: Tiny) -> None:
    ids = some_ids()
    with torch.no_grad():
        plain = each.model(torch.tensor([ids])).logits[0]
    assert_close(naive_pass(each, ids, rules=False).logits.detach(), plain.double())


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_values_are_those_of_the_plain_model(each: Tiny, attention: Attention) -> None:
    ids = some_ids(1)
    with torch.no_grad():
        plain = each.model(torch.tensor([ids])).logits[0]
    with linearised(each.lm, attention):
        inside = each.model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(inside, plain, rtol=1e-6, atol=1e-6)
    linear = linear_pass(each.lm, [ids], attention, torch.ones(1, LENGTH, dtype=torch.bool))
    torch.testing.assert_close(linear.logits.detach(), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradients_are_those_of_the_rules_written_by_hand(each: Tiny, attention: Attention) -> None:
    for ours, theirs in zip(*both(each, some_ids(2), attention), strict=True):
        assert_close(ours, theirs)


def test_gradients_follow_the_rules_and_not_the_plain_model(each: Tiny) -> None:
    ids = some_ids(2)
    ours, _ = both(each, ids, "full")
    plain = naive_pass(each, ids, rules=False)
    theirs = torch.autograd.grad(plain.logits[-1, 7] - plain.logits[-1, 11], plain.neurons)
    assert float((ours[0] - theirs[0]).abs().max()) > 0.01 * float(theirs[0].abs().max())


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_gemma_3_that_caps_its_logits_is_linearised_too(attention: Attention) -> None:
    capped = make_tiny("gemma3", final_logit_softcapping=3.0)
    ids = some_ids(3)
    with torch.no_grad():
        assert capped.model(torch.tensor([ids])).logits.abs().max() > 2.5  # so that capping matters
    for ours, theirs in zip(*both(capped, ids, attention), strict=True):
        assert_close(ours, theirs)


def without_biases(architecture: str) -> Tiny:
    this = make_tiny(architecture, seed=3)
    with torch.no_grad():
        for name, parameter in this.model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return this


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_frozen_attention_and_no_biases_neurons_and_residual_add_up_to_the_logit(architecture: str) -> None:
    """At every block, the last one included: the neurons' shares and those of the stream that passes them by."""
    this, ids = without_biases(architecture), some_ids(4)
    streams: dict[int, Tensor] = {}
    keep = [
        (block, lambda _module, _inputs, output, layer=layer: streams.__setitem__(layer, first(output)))
        for layer, block in enumerate(this.blocks)
    ]
    with own_hooks(keep):
        linear = linear_pass(this.lm, [ids], "frozen")
    middles = naive_pass(this, ids).middles
    logit = linear.logits[0, 9]
    for layer, neurons in enumerate(linear.neurons):
        to_neurons, to_stream = torch.autograd.grad(logit, (neurons, streams[layer]), retain_graph=True)
        by_neurons = float((to_neurons * neurons.detach()).sum())
        by_residual = float((to_stream[0] * middles[layer].detach()).sum())
        assert by_neurons + by_residual == pytest.approx(float(logit.detach()), rel=1e-4, abs=1e-4)
        assert by_neurons != 0


def test_rows_of_a_batch_give_what_they_give_alone(each: Tiny) -> None:
    rows = [some_ids(5, 4), some_ids(6, LENGTH), some_ids(7, 9)]
    together = linear_pass(each.lm, rows)
    logits = together.logits
    gradients = torch.autograd.grad(logits[:, 7].sum(), together.neurons)
    for place, row in enumerate(rows):
        alone = linear_pass(each.lm, [row])
        logit = alone.logits[0, 7]
        assert float(logits[place, 7].detach()) == pytest.approx(float(logit.detach()), rel=1e-4, abs=1e-5)
        for ours, theirs in zip(gradients, torch.autograd.grad(logit, alone.neurons), strict=True):
            assert_close(ours[place, : len(row)], theirs[0])
            assert not ours[place, len(row) :].any()


def test_no_weight_gets_a_gradient(llama: Tiny) -> None:
    linear = linear_pass(llama.lm, [some_ids()])
    linear.logits[0, 0].backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in llama.model.parameters())


def test_it_works_where_gradients_are_switched_off(llama: Tiny) -> None:
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            linear = linear_pass(llama.lm, [some_ids()])
        assert torch.autograd.grad(linear.logits.sum(), linear.neurons)[0].any()


# --- nothing is left behind ------------------------------------------------------------------------------------------


def plain_gradient(this: Tiny, ids: list[int]) -> Tensor:
    """The gradient of the unlinearised model with respect to its embeddings."""
    embedded = this.model.get_input_embeddings()(torch.tensor([ids])).detach().requires_grad_()
    logits = this.model(inputs_embeds=embedded).logits
    return torch.autograd.grad(logits[0, -1, 7], embedded)[0]


def test_another_thread_sees_the_unlinearised_model_meanwhile(each: Tiny) -> None:
    ids, found = some_ids(8), []
    before = plain_gradient(each, ids)
    with linearised(each.lm, "frozen"):
        inside = plain_gradient(each, ids)
        thread = threading.Thread(target=lambda: found.append(plain_gradient(each, ids)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], before)
    assert float((inside - before).abs().max()) > 0.01 * float(before.abs().max())


def test_after_an_exception_the_model_is_as_before(each: Tiny) -> None:
    ids = some_ids(8)
    before, modules = plain_gradient(each, ids), [id(module) for module in each.model.modules()]
    forwards = [module.forward for module in each.model.modules()]
    with pytest.raises(RuntimeError, match="stop"), linearised(each.lm):
        each.model(torch.tensor([ids]))
        raise RuntimeError("stop")
    assert hook_count(each.model) == 0
    assert [id(module) for module in each.model.modules()] == modules
    assert [module.forward for module in each.model.modules()] == forwards
    assert torch.equal(plain_gradient(each, ids), before)


def test_a_forward_pass_that_fails_leaves_no_hook(llama: Tiny) -> None:
    with pytest.raises(IndexError):
        linear_pass(llama.lm, [[1, VOCABULARY + 5]])
    assert hook_count(llama.model) == 0


# --- what cannot be linearised ---------------------------------------------------------------------------------------


def test_another_kind_of_attention_is_refused(llama: Tiny) -> None:
    refused(lambda: linear_pass(llama.lm, [[1, 2]], "half"), UsageError, "'half'", "full, frozen")  # type: ignore[arg-type]


class HalvedRMSNorm(torch.nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class SquashedRMSNorm(HalvedRMSNorm):
    """No multiple of what goes in."""

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (1.0 + x.abs())


def test_a_norm_is_asked_for_its_gain_and_not_its_name() -> None:
    halved, plain = make_tiny("llama"), make_tiny("llama")
    for layer in range(halved.lm.n_layers):
        weight = halved.model.model.layers[layer].input_layernorm.weight.detach()
        halved.model.model.layers[layer].input_layernorm = HalvedRMSNorm(weight)
        plain.model.model.layers[layer].input_layernorm.weight.data.mul_(0.5)
    ours, theirs = (linear_pass(this.lm, [some_ids()]) for this in (halved, plain))
    for one, other in zip(*(torch.autograd.grad(x.logits[0, 7], x.neurons) for x in (ours, theirs)), strict=True):
        assert_close(one, other)


def test_a_norm_of_an_unknown_kind_is_refused() -> None:
    this = make_tiny("llama")
    this.model.model.layers[1].input_layernorm = SquashedRMSNorm(torch.ones(this.lm.shape.d_model))
    refused(lambda: linear_pass(this.lm, [[1, 2]]), ModelError, "SquashedRMSNorm", "tiny/llama")
    assert hook_count(this.model) == 0


def test_a_model_with_norms_that_take_more_than_the_stream_is_refused() -> None:
    refused(lambda: linear_pass(tiny_next().lm, [[1, 2]]), ModelError, "RMSNormGated", "tiny/next")


def test_an_mlp_of_an_unknown_kind_is_refused() -> None:
    this = make_tiny("llama")
    mlp = this.model.model.layers[2].mlp
    del mlp.act_fn
    mlp.act_fn = torch.nn.functional.silu  # no module that a hook could see
    refused(lambda: linear_pass(this.lm, [[1, 2]]), ModelError, "block 2", "LlamaMLP")


def test_an_mlp_that_adds_instead_of_multiplying_is_refused() -> None:
    this = make_tiny("llama")
    mlp = this.model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) + mlp.up_proj(x))
    refused(lambda: linear_pass(this.lm, [[1, 2]]), ModelError, "block 1", "LlamaMLP")


def test_attention_that_has_no_queries_cannot_be_frozen_but_differentiated() -> None:
    this = make_tiny("llama")
    attention = this.model.model.layers[0].self_attn
    attention.queries, query = attention.q_proj, attention.q_proj
    del attention.q_proj
    refused(lambda: linear_pass(this.lm, [[1, 2]], "frozen"), ModelError, "block 0", "full")
    attention.q_proj = query
    assert linear_pass(this.lm, [[1, 2]]).logits.requires_grad
