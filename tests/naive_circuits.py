"""The rules of `relp` spelled out: every architecture's forward pass written by hand, in float64, one row at a time.

Nothing of the library is used, and nothing of the models but their weights and configurations.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from tiny import Tiny
from torch import Tensor


@dataclass
class Naive:
    """Logits `[seq, vocabulary]`; by layer the neurons `[seq, d_mlp]`, the residual stream between attention and MLP
    and after the block, both `[seq, d_model]`."""

    logits: Tensor
    neurons: list[Tensor]
    middles: list[Tensor]
    ends: list[Tensor]


def naive_pass(this: Tiny, ids: list[int], *, rules: bool = True, frozen: bool = False) -> Naive:
    """The model's forward pass; with `rules`, differentiating it follows them, else it is the plain model."""
    run = _Run(this, rules, frozen)
    return run.gpt2(ids) if this.architecture == "gpt2" else run.others(ids)


class _Run:
    def __init__(self, this: Tiny, rules: bool, frozen: bool) -> None:
        self.this, self.config, self.rules, self.frozen = this, this.model.config, rules, frozen
        self.gemma = this.architecture.startswith("gemma")

    # --- the rules --------------------------------------------------------------------------------------------------

    def constant(self, x: Tensor) -> Tensor:
        return x.detach() if self.rules else x

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (a * b.detach() + a.detach() * b) if self.rules else a * b

    def activation(self, x: Tensor) -> Tensor:
        if self.gemma or self.this.architecture == "gpt2":
            inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
            return x * self.constant(0.5 * (1 + torch.tanh(inner)))
        return x * self.constant(torch.sigmoid(x))

    def rms_norm(self, module: Any, x: Tensor) -> Tensor:
        gain = (1 if self.gemma else 0) + module.weight.double()
        return x * self.constant(1 / torch.sqrt((x**2).mean(-1, keepdim=True) + self.config.rms_norm_eps)) * gain

    def layer_norm(self, module: Any, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = torch.sqrt((centred**2).mean(-1, keepdim=True) + self.config.layer_norm_epsilon)
        return centred * self.constant(1 / deviation) * module.weight.double() + module.bias.double()

    def capped_logits(self, logits: Tensor) -> Tensor:
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else logits * self.constant(cap * torch.tanh(logits / cap) / logits)

    # --- attention --------------------------------------------------------------------------------------------------

    def attend(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """`[heads, seq, head_dim]` each, one after the other head; `[seq, heads × head_dim]`."""
        config, (heads, length, size) = self.config, query.shape
        scaling = getattr(config, "query_pre_attn_scalar", None) or size
        cap = getattr(config, "attn_logit_softcapping", None) if self.this.architecture == "gemma2" else None
        window = self.window(layer)
        seen = torch.tensor([[row - window < column <= row for column in range(length)] for row in range(length)])
        results = []
        for head in range(heads):
            theirs = head * key.shape[0] // heads
            scores = query[head] @ key[theirs].T / math.sqrt(scaling)
            if cap is not None:
                scores = cap * torch.tanh(scores / cap)
            scores = scores.masked_fill(~seen, -torch.inf)
            pattern = scores.softmax(-1)
            results.append((pattern.detach() if self.frozen else pattern) @ value[theirs])
        return torch.cat(results, dim=-1)

    def window(self, layer: int) -> int:
        kinds = getattr(self.config, "layer_types", None) or []
        slides = self.this.architecture == "mistral" or (self.gemma and kinds[layer] == "sliding_attention")
        return self.config.sliding_window if slides else 10**6

    def rotated(self, x: Tensor, layer: int) -> Tensor:
        """Rotary positions for `[heads, seq, head_dim]`."""
        parameters = self.config.rope_parameters
        if "rope_theta" not in parameters:
            parameters = parameters[self.config.layer_types[layer]]
        half = x.shape[-1] // 2
        speeds = parameters["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * speeds
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    # --- whole models -----------------------------------------------------------------------------------------------

    def others(self, ids: list[int]) -> Naive:
        decoder = self.this.model.model
        x = decoder.embed_tokens.weight.double()[ids]
        x = x * math.sqrt(self.config.hidden_size) if self.gemma else x
        found = Naive(torch.empty(0), [], [], [])
        for layer, block in enumerate(decoder.layers):
            mixed = self.attention(block.self_attn, self.rms_norm(block.input_layernorm, x), layer)
            x = x + (self.rms_norm(block.post_attention_layernorm, mixed) if self.gemma else mixed)
            found.middles.append(x)
            before = block.pre_feedforward_layernorm if self.gemma else block.post_attention_layernorm
            inside = self.rms_norm(before, x)
            gate, up = (linear(part, inside) for part in (block.mlp.gate_proj, block.mlp.up_proj))
            neurons = leaf(self.product(self.activation(gate), up), layer)
            written = linear(block.mlp.down_proj, neurons)
            x = x + (self.rms_norm(block.post_feedforward_layernorm, written) if self.gemma else written)
            found.neurons.append(neurons)
            found.ends.append(x)
        logits = linear(self.this.model.lm_head, self.rms_norm(decoder.norm, x))
        found.logits = self.capped_logits(logits)
        return found

    def attention(self, module: Any, x: Tensor, layer: int) -> Tensor:
        size = module.head_dim
        query, key, value = (
            linear(part, x).view(len(x), -1, size).transpose(0, 1)
            for part in (module.q_proj, module.k_proj, module.v_proj)
        )
        if hasattr(module, "q_norm"):
            query, key = self.rms_norm(module.q_norm, query), self.rms_norm(module.k_norm, key)
        query, key = self.rotated(query, layer), self.rotated(key, layer)
        return linear(module.o_proj, self.attend(query, key, value, layer))

    def gpt2(self, ids: list[int]) -> Naive:
        decoder = self.this.model.transformer
        x = decoder.wte.weight.double()[ids] + decoder.wpe.weight.double()[: len(ids)]
        found = Naive(torch.empty(0), [], [], [])
        for layer, block in enumerate(decoder.h):
            fused = turned(block.attn.c_attn, self.layer_norm(block.ln_1, x))
            heads = (part.view(len(ids), self.config.n_head, -1).transpose(0, 1) for part in fused.chunk(3, dim=-1))
            x = x + turned(block.attn.c_proj, self.attend(*heads, layer=layer))
            found.middles.append(x)
            neurons = leaf(self.activation(turned(block.mlp.c_fc, self.layer_norm(block.ln_2, x))), layer)
            x = x + turned(block.mlp.c_proj, neurons)
            found.neurons.append(neurons)
            found.ends.append(x)
        found.logits = linear(self.this.model.lm_head, self.layer_norm(decoder.ln_f, x))
        return found


def leaf(neurons: Tensor, layer: int) -> Tensor:
    """The first layer's neurons are where gradients are asked for last: nothing below them has any."""
    return neurons if layer else neurons.detach().requires_grad_()


def linear(module: Any, x: Tensor) -> Tensor:
    bias = getattr(module, "bias", None)
    result = x @ module.weight.double().T
    return result if bias is None else result + bias.double()


def turned(module: Any, x: Tensor) -> Tensor:
    """GPT-2 keeps its weights as `[in, out]`."""
    return x @ module.weight.double() + module.bias.double()
