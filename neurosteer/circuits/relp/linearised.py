"""A model whose values stay as they are and whose gradients follow the rules of RelP (arXiv 2508.21258).

In the backward pass
- a norm's coefficient is a constant (RMSNorm: gain / rms; LayerNorm: gain / deviation, its mean kept);
- an activation function is its input times a constant, activation(x) / x (for SiLU, the sigmoid);
- a product gate × up gives half of its gradient to either factor;
- attention is differentiated in full, soft-capping of its scores included, or has a constant pattern (`frozen`), so
  that only values carry gradients;
- what the model makes of its logits (soft-capping, a scale) is, like an activation function, the logit times a
  constant: the shares that neurons have in a logit then add up to the logit that the model uses.

Nothing is replaced: hooks on the norms, activation functions and projections pass on what those computed, with another
gradient. Like all hooks they answer the thread that entered the block only.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Module

from neurosteer.errors import ModelError
from neurosteer.models.batching import padded
from neurosteer.models.hooks import Hook, InputHook, OutputHook, PassHook, hooked
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.logits import logits_at, where_last
from neurosteer.models.memory import budget
from neurosteer.models.parts import NormParts, norm_of, output_width, part_of, probe_norm
from neurosteer.validation import check_option

Attention = Literal["full", "frozen"]
ATTENTIONS: tuple[Attention, ...] = ("full", "frozen")

_GRAPH_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
_ATTENTION_NAMES = ("self_attn", "attn")
_ACTIVATION_NAMES = ("act_fn", "act", "activation_fn", "activation", "gelu_impl")


@dataclass(frozen=True)
class LinearPass:
    """A forward pass whose gradients are linearised.

    `logits` are the model's, float32 `[n, vocabulary]`, at the positions asked for; `neurons[L]` the input of block L's
    down projection, `[batch, seq, d_mlp]`. Gradients reach the neurons from everything above them.
    """

    logits: Tensor
    neurons: tuple[Tensor, ...]


@contextmanager
def linearised(lm: LanguageModel, attention: Attention = "full") -> Iterator[None]:
    """Linearise the gradients of what the calling thread runs through `lm.model` inside the `with` block.

    Values are those of the plain model. Gradients may be asked for after the block. Raises `UsageError` for another
    `attention`, `ModelError` naming a part of the model that no rule is known for.
    """
    check_option("attention", attention, ATTENTIONS)
    hooks = _frozen_attention_hooks(lm) if attention == "frozen" else []
    hooks += [*_norm_hooks(lm), *_mlp_hooks(lm)]
    with hooked(hooks):
        yield


def linear_pass(
    lm: LanguageModel, rows: Sequence[Sequence[int]], attention: Attention = "full", where: Tensor | None = None
) -> LinearPass:
    """Run token ids through the linearised model, as one batch padded on the right, for the logits at the positions
    `where`, bool `[batch, seq]`: by default each row's last.

    A causal model never looks at what stands to the right, so that a row gives what it gives alone; what comes of
    padding means nothing. Weights and what lies below the first neurons get no gradients. Raises as `linearised`.
    """
    neurons: dict[int, Tensor] = {}
    plain: list[Tensor] = []  # what the LM head gives

    def keep(layer: int, hidden: Tensor) -> Tensor:
        neurons[layer] = hidden if layer else hidden.detach().requires_grad_()
        return neurons[layer]

    keeping: list[Hook] = [InputHook(down, partial(keep, layer)) for layer, down in enumerate(lm.down_projections)]
    keeping.append(OutputHook(lm.model.get_output_embeddings(), plain.append))
    with torch.inference_mode(False), torch.enable_grad(), linearised(lm, attention), hooked(keeping):
        ids = padded(rows, lm.pad_id)
        where = where_last(rows, ids.shape[1]) if where is None else where
        logits = logits_at(lm, ids, where)
        logits = _multiple(plain[0].float(), logits, limit=_ratio_near_zero(plain[0], logits))
    return LinearPass(logits, tuple(neurons[layer] for layer in range(lm.n_layers)))


def batch_tokens_for(lm: LanguageModel) -> int:
    """As many tokens as what the backward pass needs of them leaves within a gigabyte (on a GPU eight, or what is
    free)."""
    per_token = lm.n_layers * (6 * lm.shape.d_mlp + 12 * lm.shape.d_model) * lm.dtype.itemsize
    return max(64, budget(lm, _GRAPH_BYTES) // per_token)


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


def _ratio_near_zero(plain: Tensor, logits: Tensor) -> Tensor:
    """What logits come to, per unit of what the LM head gives: a scale is one number, a cap takes least away near 0."""
    return (logits.detach() / plain.detach()).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).amax()


def _multiple(x: Tensor, value: Tensor, *, limit: float | Tensor, share: float = 1.0) -> Tensor:
    """`value` of an element-wise function of `x`; in the backward pass `share` of the constant value / x times `x`.

    `limit` is value / x where x is 0.
    """
    with torch.no_grad():
        ratio = torch.where(x == 0, limit, value / x)
    return _scaled(x, value, ratio * share)


# --- norms -----------------------------------------------------------------------------------------------------------


def _norm_hooks(lm: LanguageModel) -> list[Hook]:
    """For every norm of the decoder, which is asked what it does when it is first run: only then is it known what it
    normalises (the whole stream, a head)."""
    known: dict[Module, NormParts] = {}

    def through(module: Module, x: Tensor, value: Tensor) -> Tensor:
        if module not in known:
            known[module] = _parts_of(lm, module, x)
        return _through_norm(known[module], x, value)

    return [
        PassHook(module, lambda x, y, module=module: through(module, x, y))
        for module in lm.decoder.modules()
        if "RMSNorm" in type(module).__name__ or "LayerNorm" in type(module).__name__
    ]


def _through_norm(parts: NormParts, x: Tensor, value: Tensor) -> Tensor:
    """`value`; in the backward pass the norm's scale is a constant."""
    linear = parts.linear(x)
    return _scaled(linear, value, _scale(parts, linear.detach(), value.detach()) * parts.gain.to(x.device))


def _scale(parts: NormParts, linear: Tensor, value: Tensor) -> Tensor:
    """What the norm multiplied each row by before its gain, float32 `[..., 1]`, from what went in and came out."""
    weighed = linear.float() * parts.gain.to(linear.device)
    without_bias = value.float() - parts.bias.to(value.device)
    tiny = torch.finfo(torch.float32).tiny
    return (without_bias * weighed).sum(-1, keepdim=True) / weighed.square().sum(-1, keepdim=True).clamp(min=tiny)


def _parts_of(lm: LanguageModel, module: Module, x: Tensor) -> NormParts:
    """What a norm does. Raises `ModelError` where random numbers show that it does something else than norms do."""
    weight = getattr(module, "weight", None)
    shape = x.shape[-1:] if weight is None else weight.shape
    try:
        parts = probe_norm(module, shape)
        numbers = 1.0 + torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(parts.gain.device)
        with torch.no_grad():
            value = norm_of(module, numbers)
        linear = parts.linear(numbers)
        found = _scale(parts, linear, value) * linear * parts.gain + parts.bias
        if torch.allclose(found, value, rtol=0.03, atol=0.03):
            return parts
    except Exception as error:  # a module of another kind fails in its own way
        raise ModelError(f"{lm.name}: its norm {type(module).__name__} is of an unknown kind ({error}).") from error
    raise ModelError(f"{lm.name}: its norm {type(module).__name__} is of an unknown kind; circuits cannot be found.")


# --- MLPs and attention ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mlp:
    """The parts of one block's MLP: the `activation` function; where its neurons are products, what gives the other
    factor (`up`), as all that it returns or (`half` 0 or 1) the one half of it."""

    activation: Module
    up: Module | None = None
    half: int | None = None

    @property
    def hooks(self) -> list[Hook]:
        share = 1.0 if self.up is None else 0.5
        hooks: list[Hook] = [PassHook(self.activation, lambda x, y: _multiple(x, y, limit=0.5, share=share))]
        if self.up is not None:
            hooks.append(OutputHook(self.up, self._halved))
        return hooks

    def _halved(self, y: Tensor) -> Tensor:
        halves = [y] if self.half is None else list(y.chunk(2, dim=-1))
        place = self.half or 0
        halves[place] = 0.5 * halves[place] + 0.5 * halves[place].detach()
        return torch.cat(halves, dim=-1)


def _mlp_hooks(lm: LanguageModel) -> list[Hook]:
    if lm not in _mlps:
        _mlps[lm] = _look_at_mlps(lm)
    return [hook for mlp in _mlps[lm] for hook in mlp.hooks]


_mlps: WeakKeyDictionary[LanguageModel, list[_Mlp]] = WeakKeyDictionary()


def _look_at_mlps(lm: LanguageModel) -> list[_Mlp]:
    """What each block's MLP is made of, seen from two tokens that run through the model: names do not tell which map
    feeds the activation function. Raises `ModelError` for an MLP that is no `activation(gate) × up`, with gate and up
    from one map or from two, and no `activation(up)`."""
    parents = [_parent(block, down) for block, down in zip(lm.blocks, lm.down_projections, strict=True)]
    activations = [part_of(parent, _ACTIVATION_NAMES) for parent in parents]
    maps = [
        [part for part in parent.children() if output_width(part) is not None and part is not down]
        for parent, down in zip(parents, lm.down_projections, strict=True)
    ]
    seen: dict[Module, Tensor] = {}  # what maps give, and what activation functions and down projections are given
    given: dict[Module, Tensor] = {}  # what activation functions give
    hooks: list[Hook] = [OutputHook(part, partial(seen.__setitem__, part)) for parts in maps for part in parts]
    hooks += [InputHook(down, partial(seen.__setitem__, down)) for down in lm.down_projections]
    for one in filter(None, activations):
        hooks += [InputHook(one, partial(seen.__setitem__, one)), OutputHook(one, partial(given.__setitem__, one))]
    with torch.no_grad(), hooked(hooks):
        lm.decoder(input_ids=torch.tensor([[0, 1]], device=lm.device), use_cache=False)
    found = [_mlp_of(activation, parts, seen) for activation, parts in zip(activations, maps, strict=True)]
    for place, (mlp, parent, down) in enumerate(zip(found, parents, lm.down_projections, strict=True)):
        if mlp is not None and not _makes(
            mlp, parent, given[mlp.activation], None if mlp.up is None else seen[mlp.up], seen[down]
        ):
            found[place] = None
    for layer, (mlp, parent) in enumerate(zip(found, parents, strict=True)):
        if mlp is None:
            raise ModelError(
                f"{lm.name}: no rule is known for the MLP of block {layer} ({type(parent).__name__}); it needs an "
                "activation function that is a module, and one linear map or two that feed it and multiply it."
            )
    return [mlp for mlp in found if mlp is not None]


def _mlp_of(activation: Module | None, maps: Sequence[Module], seen: Mapping[Module, Tensor]) -> _Mlp | None:
    if activation is None or activation not in seen or any(part not in seen for part in maps):
        return None
    wanted = seen[activation]
    feeding = [part for part in maps if torch.equal(seen[part], wanted)]
    if len(feeding) == 1 and len(maps) <= 2:
        return _Mlp(activation, next((part for part in maps if part is not feeding[0]), None))
    if len(maps) == 1 and seen[maps[0]].shape[-1] == 2 * wanted.shape[-1]:
        for place, half in enumerate(seen[maps[0]].chunk(2, dim=-1)):
            if torch.equal(half, wanted):
                return _Mlp(activation, maps[0], half=1 - place)
    return None


def _makes(mlp: _Mlp, parent: Module, activated: Tensor, other: Tensor | None, neurons: Tensor) -> bool:
    """Whether the MLP's neurons are what its parts are taken to make of its input. Where a norm follows, that is as it
    is: norms have rules of their own."""
    if any("norm" in type(part).__name__.lower() for part in parent.children() if part is not mlp.activation):
        return True
    if other is not None:
        activated = activated * (other if mlp.half is None else other.chunk(2, dim=-1)[mlp.half])
    return activated.shape == neurons.shape and torch.allclose(activated, neurons, rtol=0.02, atol=1e-4)


def _parent(block: Module, part: Module) -> Module:
    """The module whose own child `part` is."""
    return next(module for module in block.modules() if any(child is part for child in module.children()))


def _frozen_attention_hooks(lm: LanguageModel) -> list[Hook]:
    """With constant queries and keys the pattern is a constant."""
    hooks: list[Hook] = []
    for layer, block in enumerate(lm.blocks):
        attention = part_of(block, _ATTENTION_NAMES)
        query, key, fused = (part_of(attention, (name,)) for name in ("q_proj", "k_proj", "c_attn"))
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
