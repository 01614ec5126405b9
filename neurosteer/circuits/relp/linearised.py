"""A model whose values stay as they are and whose gradients follow the rules of RelP (arXiv 2508.21258).

In the backward pass
- a norm's coefficient is a constant (RMSNorm: gain / rms; LayerNorm: gain / deviation, its mean kept);
- an activation function is its input times a constant, activation(x) / x (for SiLU, the sigmoid);
- a product gate × up gives half of its gradient to either factor;
- attention is differentiated in full, soft-capping of its scores included, or has a constant pattern (`frozen`), so
  that only values carry gradients;
- soft-capping of the logits is, like an activation function, the logit times a constant: the shares that neurons have
  in a logit then add up to the capped logit, the one the model uses.

Nothing is replaced: hooks on the norms, activation functions and projections pass on what those computed, with another
gradient. Like all hooks they answer the thread that entered the block only.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Module

from neurosteer.errors import ModelError, UsageError
from neurosteer.models.hooks import Hook, InputHook, OutputHook, PassHook, hooked
from neurosteer.models.language_model import LanguageModel

Attention = Literal["full", "frozen"]
ATTENTIONS: tuple[Attention, ...] = ("full", "frozen")

_GRAPH_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
_ATTENTION_NAMES = ("self_attn", "attn")
_ACTIVATION_NAMES = ("act_fn", "act")


@dataclass(frozen=True)
class LinearPass:
    """A forward pass whose gradients are linearised.

    `hidden` is what the LM head reads, `[batch, seq, d_model]`; `neurons[L]` the input of block L's down projection,
    `[batch, seq, d_mlp]`. Gradients reach the neurons from everything above them.
    """

    hidden: Tensor
    neurons: tuple[Tensor, ...]


@contextmanager
def linearised(lm: LanguageModel, attention: Attention = "full") -> Iterator[None]:
    """Linearise the gradients of what the calling thread runs through `lm.model` inside the `with` block.

    Values are those of the plain model. Gradients may be asked for after the block. Raises `UsageError` for another
    `attention`, `ModelError` naming a part of the model that no rule is known for.
    """
    if attention not in ATTENTIONS:
        raise UsageError(f"attention is {attention!r:.60}; it must be one of {', '.join(ATTENTIONS)}.")
    hooks = [*_norm_hooks(lm), *_mlp_hooks(lm)]
    if attention == "frozen":
        hooks += _frozen_attention_hooks(lm)
    with hooked(hooks):
        yield


def linear_pass(lm: LanguageModel, rows: Sequence[Sequence[int]], attention: Attention = "full") -> LinearPass:
    """Run token ids through the linearised model, as one batch padded on the right.

    A causal model never looks at what stands to the right, so that a row gives what it gives alone; what comes of
    padding means nothing. Weights and what lies below the first neurons get no gradients. Raises as `linearised`.
    """
    neurons: dict[int, Tensor] = {}

    def keep(layer: int, hidden: Tensor) -> Tensor:
        neurons[layer] = hidden if layer else hidden.detach().requires_grad_()
        return neurons[layer]

    keeping = [
        InputHook(down, lambda hidden, layer=layer: keep(layer, hidden))
        for layer, down in enumerate(lm.down_projections)
    ]
    with torch.inference_mode(False), torch.enable_grad(), linearised(lm, attention), hooked(keeping):
        hidden = lm.decoder(input_ids=padded(lm, rows), use_cache=False)[0]
    return LinearPass(hidden, tuple(neurons[layer] for layer in range(lm.n_layers)))


def padded(lm: LanguageModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """Token ids as one batch filled up on the right, `[batch, seq]`."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[lm.pad_id] * (longest - len(row))] for row in rows], device=lm.device)


def batch_tokens_for(lm: LanguageModel) -> int:
    """As many tokens as what the backward pass needs of them leaves within a gigabyte (eight on a GPU)."""
    per_token = lm.n_layers * (6 * lm.shape.d_mlp + 12 * lm.shape.d_model) * lm.dtype.itemsize
    return max(64, _GRAPH_BYTES.get(lm.device.type, 1 << 30) // per_token)


def linear_logits(lm: LanguageModel, hidden: Tensor) -> Tensor:
    """Float32 logits `[..., vocabulary]` of what the LM head reads, soft-capped where the model does that."""
    logits = lm.model.get_output_embeddings()(hidden).float()
    cap = getattr(lm.model.config.get_text_config(), "final_logit_softcapping", None)
    return _multiple(logits, cap * (logits / cap).tanh(), limit=1.0) if cap else logits


class _Scaled(torch.autograd.Function):
    """`value`; in the backward pass, `x` times a constant `coefficient`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor, coefficient: Tensor) -> Tensor:
        ctx.save_for_backward(coefficient)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.saved_tensors[0], None, None


def _scaled(x: Tensor, value: Tensor, coefficient: Tensor) -> Tensor:
    result = _Scaled.apply(x, value.detach(), coefficient.detach().to(x.dtype))
    assert isinstance(result, Tensor)
    return result


def _multiple(x: Tensor, value: Tensor, *, limit: float, share: float = 1.0) -> Tensor:
    """`value` of an element-wise function of `x`; in the backward pass `share` of the constant value / x times `x`.

    `limit` is value / x where x is 0.
    """
    with torch.no_grad():
        ratio = torch.where(x == 0, limit, value / x)
    return _scaled(x, value, ratio * share)


# --- norms -----------------------------------------------------------------------------------------------------------


NormRule = Callable[[Module, Tensor], tuple[Tensor, Tensor]]
"""What a norm is linear in, and its coefficient."""


def _norm_hooks(lm: LanguageModel) -> list[Hook]:
    rules: dict[type[Module], NormRule] = {}
    hooks: list[Hook] = []
    for module in lm.decoder.modules():
        kind = type(module)
        if "RMSNorm" not in kind.__name__ and not kind.__name__.endswith("LayerNorm"):
            continue
        rule = rules[kind] = rules.get(kind) or _norm_rule(lm, module)
        hooks.append(PassHook(module, lambda x, y, module=module, rule=rule: _through_norm(rule, module, x, y)))
    return hooks


def _through_norm(rule: NormRule, module: Module, x: Tensor, value: Tensor) -> Tensor:
    linear, coefficient = rule(module, x)
    return _scaled(linear, value, coefficient)


def _norm_rule(lm: LanguageModel, module: Module) -> NormRule:
    """The rule that gives what the norm gives for random numbers."""
    try:
        weight, bias = _gain(module), getattr(module, "bias", None)
        probe = 1.0 + torch.randn(2, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
        with torch.no_grad():
            value = module(probe.to(lm.dtype)).float()
            for rule in (_rms_norm, _shifted_rms_norm, _layer_norm):
                linear, coefficient = rule(module, probe)
                found = linear * coefficient + (0.0 if bias is None else bias.float())
                if torch.allclose(found, value, rtol=0.03, atol=0.03):
                    return rule
    except Exception as error:  # a module of another kind fails in its own way
        raise ModelError(f"{lm.name}: its norm {type(module).__name__} is of an unknown kind ({error}).") from error
    raise ModelError(f"{lm.name}: its norm {type(module).__name__} is of an unknown kind; circuits cannot be found.")


def _rms_norm(module: Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return x, _per_rms(module, x) * _gain(module)


def _shifted_rms_norm(module: Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The Gemmas' gain is 1 + weight."""
    return x, _per_rms(module, x) * (1.0 + _gain(module))


def _layer_norm(module: Module, x: Tensor) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    return centred, _per_rms(module, centred) * _gain(module)


def _gain(module: Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.float()


def _per_rms(module: Module, x: Tensor) -> Tensor:
    epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", 0.0)
    return torch.rsqrt(x.detach().float().square().mean(-1, keepdim=True) + epsilon)


# --- MLPs and attention ----------------------------------------------------------------------------------------------


def _mlp_hooks(lm: LanguageModel) -> list[Hook]:
    hooks: list[Hook] = []
    for layer, block in enumerate(lm.blocks):
        mlp = getattr(block, "mlp", None)
        activation = _part(mlp, _ACTIVATION_NAMES)
        gate, up = _part(mlp, ("gate_proj",)), _part(mlp, ("up_proj",))
        if activation is None or (gate is None) != (up is None) or (gate is None and _part(mlp, ("c_fc",)) is None):
            raise ModelError(
                f"{lm.name}: no rule is known for the MLP of block {layer} ({type(mlp).__name__}); it needs act_fn, "
                "gate_proj and up_proj, or act and c_fc."
            )
        share = 1.0 if up is None else 0.5
        hooks.append(PassHook(activation, lambda x, y, share=share: _multiple(x, y, limit=0.5, share=share)))
        if up is not None:
            hooks.append(OutputHook(up, lambda y: 0.5 * y + 0.5 * y.detach()))
    return hooks


def _frozen_attention_hooks(lm: LanguageModel) -> list[Hook]:
    """With constant queries and keys the pattern is a constant."""
    hooks: list[Hook] = []
    for layer, block in enumerate(lm.blocks):
        attention = _part(block, _ATTENTION_NAMES)
        query, key, fused = (_part(attention, (name,)) for name in ("q_proj", "k_proj", "c_attn"))
        if query is not None and key is not None:
            hooks += [OutputHook(module, lambda y: y.detach()) for module in (query, key)]
        elif fused is not None:
            hooks.append(OutputHook(fused, _values_only))
        else:
            raise ModelError(
                f"{lm.name}: the attention of block {layer} ({type(attention).__name__}) cannot be frozen: it has "
                "neither q_proj and k_proj nor c_attn; use attention 'full'."
            )
    return hooks


def _values_only(fused: Tensor) -> Tensor:
    """GPT-2 computes queries, keys and values at once, in this order."""
    query, key, value = fused.chunk(3, dim=-1)
    return torch.cat([query.detach(), key.detach(), value], dim=-1)


def _part(module: object, names: Sequence[str]) -> Module | None:
    found = (getattr(module, name, None) for name in names)
    return next((part for part in found if isinstance(part, Module)), None)
