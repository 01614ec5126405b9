"""The one place that registers hooks: all of them go, however the block ends, and only its own thread sees them."""

import threading
from typing import Any

import pytest
import torch
from tiny import Tiny, hook_count, make_vector
from torch import Tensor, nn

from neurosteer.artifacts.recipes import Recipe
from neurosteer.models.hooks import InputHook, OutputHook, hooked
from neurosteer.steering.plans import applied, compile_plan


class Doubling(nn.Module):
    def forward(self, x: Tensor, extra: int = 0) -> Tensor:
        return x * 2 + extra


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x * 2, "kept"


ONE = torch.ones(2)


def test_an_input_hook_replaces_the_input_and_keeps_the_other_arguments() -> None:
    module = Doubling()
    with hooked([InputHook(module, lambda x: x + 10)]):
        assert torch.equal(module(ONE, 1), torch.full((2,), 23.0))
        assert torch.equal(module(ONE, extra=2), torch.full((2,), 24.0))
    assert torch.equal(module(ONE), 2 * ONE)


def test_an_output_hook_replaces_the_hidden_states_alone_or_as_the_first_of_a_tuple() -> None:
    alone, pair = Doubling(), Pair()
    with hooked([OutputHook(alone, lambda y: y + 1), OutputHook(pair, lambda y: y + 1)]):
        assert torch.equal(alone(ONE), 3 * ONE)
        changed, rest = pair(ONE)
        assert torch.equal(changed, 3 * ONE) and rest == "kept"


def test_hooks_that_return_none_change_nothing() -> None:
    module, pair = Doubling(), Pair()
    seen: list[Any] = []
    hooks = [
        InputHook(module, lambda x: seen.append(("in", float(x[0])))),
        OutputHook(module, lambda y: seen.append(("out", float(y[0])))),
        OutputHook(pair, lambda y: seen.append(("pair", float(y[0])))),
    ]
    with hooked(hooks):
        assert torch.equal(module(ONE, extra=3), 5 * ONE)
        assert pair(ONE)[1] == "kept"
    assert sorted(seen, key=str) == sorted([("in", 1.0), ("out", 5.0), ("pair", 2.0)], key=str)


def test_hooks_on_one_module_run_in_the_order_given() -> None:
    module = Doubling()
    with hooked([OutputHook(module, lambda y: y + 1), OutputHook(module, lambda y: y * 10)]):
        assert torch.equal(module(ONE), 30 * ONE)


def every_kind(this: Tiny) -> list[InputHook | OutputHook]:
    hooks: list[InputHook | OutputHook] = []
    for block, down in zip(this.blocks, this.downs, strict=True):
        hooks += [OutputHook(block, lambda h: h), InputHook(down, lambda h: h)]
    return hooks


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_no_hook_is_left_after_an_exception_inside_the_block(llama: Tiny, error: BaseException) -> None:
    with pytest.raises(type(error)), hooked(every_kind(llama)):
        assert hook_count(llama.model) == 8
        raise error
    assert hook_count(llama.model) == 0


def test_no_hook_is_left_when_a_hook_itself_raises(llama: Tiny) -> None:
    def fail(_: Tensor) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), hooked([OutputHook(llama.blocks[2], fail)]):
        llama.model(torch.tensor([[1, 2]]))
    assert hook_count(llama.model) == 0


def test_no_hook_is_left_when_one_cannot_be_registered(llama: Tiny) -> None:
    broken: Any = OutputHook(None, lambda h: h)  # type: ignore[arg-type]
    with pytest.raises(AttributeError), hooked([*every_kind(llama), broken]):
        pytest.fail("the block must not be entered")
    assert hook_count(llama.model) == 0


def test_another_thread_that_runs_the_model_inside_the_block_is_not_touched(each: Tiny) -> None:
    ids = torch.tensor([each.lm.prompt_ids("the cat sings")])
    with torch.no_grad():
        plain = each.model(ids).logits
    vector = make_vector((0, 1, 2, 3), model=each.lm.reference)
    plan = compile_plan(each.lm, [Recipe.of((vector, 20.0))])
    found: dict[str, Tensor] = {}

    def run(name: str) -> None:
        with torch.no_grad():
            found[name] = each.model(ids).logits

    with applied(each.lm, plan):
        thread = threading.Thread(target=run, args=("other",))
        thread.start()
        thread.join()
        run("own")
    run("after")
    assert torch.equal(found["other"], plain) and torch.equal(found["after"], plain)
    assert (found["own"] - plain).abs().max() > 0.1


def test_an_empty_plan_registers_nothing(llama: Tiny) -> None:
    with applied(llama.lm, compile_plan(llama.lm, [Recipe()])):
        assert hook_count(llama.model) == 0


def test_a_plan_hooks_each_layer_once_however_many_artifacts_are_mixed(llama: Tiny) -> None:
    vectors = [make_vector((1, 2), seed=seed, model=llama.lm.reference) for seed in range(8)]
    plan = compile_plan(llama.lm, [Recipe.of(*vectors), Recipe()])
    with applied(llama.lm, plan):
        assert hook_count(llama.model) == 2
