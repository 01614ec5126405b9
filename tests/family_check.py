"""What works on a family of models, held against code that knows nothing of the library's hooks, batches and caches."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from families import family_model
from tiny import byte_tokenizer, first, own_hooks, texts

from neurosteer.artifacts.artifact import Artifact
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.recipes import UNSTEERED, Recipe
from neurosteer.artifacts.vector import SteeringVector, unit
from neurosteer.building.build import build
from neurosteer.circuits import attribute
from neurosteer.circuits.relp.linearised import linearised
from neurosteer.errors import NeuroSteerError
from neurosteer.examples.contrast_set import ContrastSet
from neurosteer.measuring.token_scores import token_divergences
from neurosteer.models.language_model import LanguageModel
from neurosteer.models.loading import describe_model
from neurosteer.steering.decoding import Sampling
from neurosteer.steering.session import Row, Session

LAYERS = (1, 2)
TOKENS = 8
PROMPTS = ("the cat runs", "Why?", "a happy river sings slowly over the mountain and again, again, again, again.")
EXAMPLES = ContrastSet(tuple(f"happy {text}" for text in texts(12, seed=1)), tuple(texts(12, seed=2)), name="some")
OK = "yes"


@dataclass(frozen=True)
class FamilyRow:
    """What a family can do: "yes", or the one line that says why not. `exact`: a batch with a cache, one without, and
    naive code alike write the same texts."""

    family: str
    load: str = ""
    vector: str = ""
    exact: str = ""
    circuit: str = ""
    relp: str = ""
    token_kl: str = ""

    @property
    def refusals(self) -> dict[str, str]:
        """What does not work, by name, and why."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "family"}
        return {name: value for name, value in values.items() if value not in (OK, "")}


def check_family(family: str) -> FamilyRow:
    """Raises nothing but what is no refusal of ours, `AssertionError` where a figure is wrong."""
    model = family_model(family)
    try:
        lm = describe_model(model, byte_tokenizer(), name=family)
    except NeuroSteerError as error:
        return FamilyRow(family, load=str(error))
    try:
        vector = build(lm, EXAMPLES, method="caa", layers=LAYERS, calibrate=False)
    except NeuroSteerError as error:
        return FamilyRow(family, OK, vector=str(error))
    return FamilyRow(
        family, OK, OK, check_exact(lm, vector), circuit=refused_or(check_circuit, lm), relp=refused_or(check_relp, lm),
        token_kl=refused_or(check_token_kl, lm, vector),
    )  # fmt: skip


def refused_or(check: Any, *arguments: Any) -> str:
    try:
        check(*arguments)
    except NeuroSteerError as error:
        return str(error)
    return OK


def check_exact(lm: LanguageModel, artifact: Artifact, strength: float = 4.0) -> str:
    recipe = Recipe.of((artifact, strength))
    rows = [Row(PROMPTS[0], UNSTEERED), *(Row(prompt, recipe) for prompt in PROMPTS)]
    given: dict[str, Any] = {"max_new_tokens": TOKENS, "sampling": Sampling(greedy=True)}
    try:
        cached = Session(lm).generate(rows, **given)
    except NeuroSteerError as error:
        return str(error)
    uncached = Session(lm).generate(rows, use_cache=False, **given)
    naive = [naive_ids(lm, artifact if row.recipe.uses else None, row.prompt, strength) for row in rows]
    assert [list(row.ids) for row in uncached] == naive, f"{lm.name}: without a cache"
    assert [list(row.ids) for row in cached] == naive, f"{lm.name}: with a cache"
    assert len({tuple(ids) for ids in naive[:2]}) == 2, f"{lm.name}: steering changed nothing"
    return OK


@torch.no_grad()
def naive_ids(lm: LanguageModel, artifact: Artifact | None, prompt: Any, strength: float) -> list[int]:
    """Greedy, one row, every step from the beginning, with hooks of its own."""
    ids = lm.prompt_ids(prompt)
    start, stop = len(ids), lm.tokenizer.eos_token_id
    writes, before = naive_writes(lm, artifact, strength) if artifact is not None else ([], False)
    with own_hooks(writes, before=before):
        while len(ids) < start + TOKENS:
            token = int(
                lm.model(input_ids=torch.tensor([ids], device=lm.device), use_cache=False).logits[0, -1].argmax()
            )
            if token == stop:
                break
            ids = [*ids, token]
    return ids[start:]


def naive_writes(lm: LanguageModel, artifact: Artifact, strength: float) -> tuple[list[tuple[Any, Any]], bool]:
    amount = artifact.calibration.amount * strength
    if isinstance(artifact, SteeringVector):
        shares = amount / len(artifact.directions)
        return [
            (lm.blocks[layer], _adding(shares * artifact.norms[layer] * unit(direction)))
            for layer, direction in artifact.directions.items()
        ], False
    pairs = []
    for layer in artifact.layers:
        here = artifact.neuron_layers == layer
        shift = torch.zeros(lm.shape.d_mlp)
        shift[artifact.neurons[here].long()] = amount * artifact.differences[here]
        pairs.append((lm.down_projections[layer], _adding_before(shift)))
    return pairs, True


def _adding(push: torch.Tensor) -> Any:
    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        there = push.to(first(output))
        return (output[0] + there, *output[1:]) if isinstance(output, tuple) else output + there

    return hook


def _adding_before(shift: torch.Tensor) -> Any:
    return lambda _module, inputs: (inputs[0] + shift.to(inputs[0]), *inputs[1:])


def check_circuit(lm: LanguageModel) -> None:
    circuit = build(lm, EXAMPLES, method="cna", layers=LAYERS, top_k=0.05, calibrate=False)
    assert isinstance(circuit, NeuronCircuit)
    assert check_exact(lm, circuit, 8.0) == OK


def check_relp(lm: LanguageModel) -> None:
    """Of an MLP without biases, what its inputs are said to contribute adds up to what it gives: that is what the rules
    for activation functions and products are for."""
    found = attribute(lm, PROMPTS[0], " cat", keep_universal=True).neuron_scores()
    assert bool(found.isfinite().all()) and bool(found.abs().sum() > 0), lm.name
    block, down = lm.blocks[LAYERS[0]], lm.down_projections[LAYERS[0]]
    mlp = next(module for module in block.modules() if any(child is down for child in module.children()))
    entry = next(part for part in mlp.children() if hasattr(part, "out_features")) if mlp is block else mlp
    inputs: list[torch.Tensor] = []
    neurons: list[torch.Tensor] = []

    def enter(_module: Any, arguments: Any) -> Any:
        inputs.append(arguments[0].detach().requires_grad_())
        return (inputs[0], *arguments[1:])

    ids = torch.tensor([lm.prompt_ids(PROMPTS[0])], device=lm.device)
    with without_biases(mlp), torch.enable_grad(), linearised(lm):
        with own_hooks([(entry, enter), (down, lambda _, given: neurons.append(given[0]))], before=True):
            lm.decoder(input_ids=ids, use_cache=False)
        (gradient,) = torch.autograd.grad(neurons[0].sum(), inputs[0])
    atol = max(1e-4, 1e-6 * float(neurons[0].detach().abs().sum(-1).max()))
    assert torch.allclose((gradient * inputs[0]).sum(-1), neurons[0].sum(-1), rtol=1e-3, atol=atol), lm.name


@contextmanager
def without_biases(part: Any) -> Iterator[None]:
    before = {name: weight.clone() for name, weight in part.named_parameters() if name.endswith("bias")}
    try:
        with torch.no_grad():
            for name in before:
                part.get_parameter(name).zero_()
        yield
    finally:
        with torch.no_grad():
            for name, weight in before.items():
                part.get_parameter(name).copy_(weight)


def check_token_kl(lm: LanguageModel, vector: SteeringVector) -> None:
    text = " sings slowly over"
    recipe = Recipe.of((vector, 1.0))
    found = [piece.score for piece in token_divergences(lm, recipe, PROMPTS[0], text)]
    prompt, after = lm.prompt_ids(PROMPTS[0]), lm.token_ids(text)
    ids = torch.tensor([prompt + after])
    writes, _ = naive_writes(lm, vector, 1.0)
    with torch.no_grad():
        plain = lm.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        with own_hooks(writes):
            steered = lm.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    at = slice(len(prompt) - 1, len(prompt) + len(after) - 1)
    naive = (steered[at].exp() * (steered[at] - plain[at])).sum(-1)
    assert torch.allclose(torch.tensor(found).sum(), naive.sum(), rtol=1e-3, atol=1e-5), lm.name
