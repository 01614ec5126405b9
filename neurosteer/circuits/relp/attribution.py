"""`relp`: which MLP neurons a next token is owed to, by gradient × activation through the linearised model."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from neurosteer.artifacts.artifact import check_model
from neurosteer.artifacts.circuit import NeuronCircuit
from neurosteer.artifacts.common import safe_name
from neurosteer.artifacts.provenance import made_now
from neurosteer.artifacts.strength import default_calibration
from neurosteer.circuits.relp.choices import NextToken, next_tokens
from neurosteer.circuits.relp.linearised import Attention
from neurosteer.circuits.relp.scores import METRICS, PER_POSITION, Metric, NeuronScore, PromptAttribution, score_prompts
from neurosteer.circuits.relp.selection import Selection
from neurosteer.circuits.relp.universal import CommonNeurons, find_universal, find_unspecific
from neurosteer.errors import MismatchError, UsageError
from neurosteer.models.language_model import LanguageModel, Prompt
from neurosteer.models.reference import ModelReference
from neurosteer.progress import Progress, silent
from neurosteer.validation import check_count, check_option

Aggregate = Literal["mean", "union"]
AGGREGATES: tuple[Aggregate, ...] = ("mean", "union")


@dataclass(frozen=True, eq=False)
class Attribution:
    """What `attribute` found. Universal neurons and super weights are there, but left out of rows and circuits unless
    `keep_universal` (`dataclasses.replace` switches it). `tokens` are each prompt's tokens as text."""

    model: ModelReference
    prompts: tuple[PromptAttribution, ...]
    tokens: tuple[tuple[str, ...], ...]
    universal: CommonNeurons | None = None
    keep_universal: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def left_out(self) -> tuple[tuple[int, int], ...]:
        """The neurons, as (layer, neuron), that are in no row and no circuit."""
        return () if self.universal is None or self.keep_universal else self.universal.all

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence for every target and counterfactual of which only the first token counts."""
        tokens = [token for one in self.prompts for token in (one.target, one.counterfactual) if token is not None]
        parts = dict.fromkeys(token for token in tokens if token.is_part)
        return tuple(f"{one.given!r} is {one.n_tokens} tokens; its first, {one.text!r}, is taken." for one in parts)

    def rows(self, select: Selection | None = None, *, prompt: int = 0) -> list[NeuronScore]:
        """The neurons of one prompt by position, strongest first; all that were kept where nothing is selected."""
        one = self.prompts[prompt]
        scores = torch.where(self._excluded()[one.layers.long(), one.neurons.long()], 0.0, one.scores)
        kept = select(scores, one.layers, one.metric) if select is not None else scores.nonzero()[:, 0]
        columns = (one.layers, one.positions, one.neurons, one.scores)
        return [NeuronScore(*row) for row in zip(*(column[kept].tolist() for column in columns), strict=True)]

    def neuron_scores(self, aggregate: Aggregate = "mean") -> Tensor:
        """Every neuron's score, float32 `[n_layers, d_mlp]`; 0 for those left out.

        From what is strongest over each prompt's positions, `mean` takes the mean over prompts, `union` the strongest.
        """
        scores = torch.stack([one.strongest for one in self.prompts])
        strongest = scores.abs().argmax(0, keepdim=True)
        joined = scores.mean(0) if aggregate == "mean" else scores.gather(0, strongest)[0]
        return joined.masked_fill(self._excluded(), 0.0)

    def circuit(
        self,
        name: str | None = None,
        *,
        select: Selection | None = None,
        aggregate: Aggregate = "mean",
        description: str = "",
    ) -> NeuronCircuit:
        """The neurons of all prompts as a circuit that scales; by default the 200 strongest.

        `mean` selects by the mean over prompts; `union` selects in each prompt, by its own metric, and keeps what any
        of them selected with its strongest score. A circuit's `differences` are the neurons' activations, averaged.
        Raises `UsageError` where nothing is selected.
        """
        check_option("aggregate", aggregate, AGGREGATES)
        select = select or Selection()
        if aggregate == "union":
            scores = self._selected(select)
        else:
            scores = _kept(self.neuron_scores(), select, sum(one.metric for one in self.prompts) / len(self.prompts))
        chosen = scores.flatten().abs().argsort(descending=True, stable=True)[: int(scores.count_nonzero())]
        if not len(chosen):
            raise UsageError(f"No neuron reaches {select.rule} {select.amount:g}; choose a smaller amount.")
        activations = torch.stack([one.activations for one in self.prompts]).mean(0)
        return NeuronCircuit(
            name=safe_name(name or f"{self.prompts[0].target.text.strip()}-relp"),
            model=self.model,
            method="relp",
            parameters=self._circuit_parameters(select, aggregate),
            neuron_layers=(chosen // self.model.d_mlp).int(),
            neurons=(chosen % self.model.d_mlp).int(),
            scores=scores.flatten()[chosen],
            differences=activations.flatten()[chosen],
            operation="scale",
            description=description,
            calibration=default_calibration("scale"),
            provenance=made_now(
                framing="raw" if self.parameters.get("raw") else "prompt",
                tokens="last",
            ),
        )

    def data(self, select: Selection | None = None, *, prompt: int = 0) -> dict[str, Any]:
        """One prompt's attribution as JSON-ready data; the 200 strongest neurons unless selected otherwise."""
        one = self.prompts[prompt]
        return {
            "metric": one.metric,
            "target": one.target.text,
            "counterfactual": one.counterfactual.text if one.counterfactual else None,
            "neurons": [list(row) for row in self.rows(select or Selection(), prompt=prompt)],
        }

    def check_model(self, lm: LanguageModel) -> None:
        """Raise `MismatchError` for a model of another shape, or with other weights: scores hold for their own only."""
        theirs = lm.reference
        if (theirs.fingerprint, theirs.n_layers, theirs.d_mlp) != (
            self.model.fingerprint,
            self.model.n_layers,
            self.model.d_mlp,
        ):
            raise MismatchError(
                f"The attribution was made on {self.model.name} and not on {theirs.name} with these weights; attribute "
                "again."
            )

    def _excluded(self) -> Tensor:
        """Which neurons are left out, bool `[n_layers, d_mlp]`."""
        mask = torch.zeros(self.model.n_layers, self.model.d_mlp, dtype=torch.bool)
        for layer, neuron in self.left_out:
            mask[layer, neuron] = True
        return mask

    def _selected(self, select: Selection) -> Tensor:
        """The strongest over prompts of what each prompt's selection keeps, `[n_layers, d_mlp]`."""
        excluded = self._excluded()
        union = torch.zeros_like(self.prompts[0].strongest)
        for one in self.prompts:
            kept = _kept(one.strongest.masked_fill(excluded, 0.0), select, one.metric)
            union = torch.where(kept.abs() > union.abs(), kept, union)
        return union

    def _circuit_parameters(self, select: Selection, aggregate: Aggregate) -> dict[str, Any]:
        found = self.universal or CommonNeurons(())
        return {
            **self.parameters,
            "prompts": [one.choice.prompt for one in self.prompts],
            "targets": [_token_data(one.target) for one in self.prompts],
            "counterfactuals": [_token_data(one.counterfactual) for one in self.prompts],
            "metrics": [round(one.metric, 6) for one in self.prompts],
            "select": [select.rule, select.amount],
            "aggregate": aggregate,
            "keep_universal": self.keep_universal,
            "universal": list(map(list, found.neurons)),
            "super_weights": list(map(list, found.super_weights)),
        }


def attribute(
    lm: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    targets: str | Sequence[str],
    counterfactuals: str | Sequence[str] | None = None,
    *,
    metric: Metric = "difference",
    attention: Attention = "full",
    raw: bool = False,
    seed_response: str = "",
    keep_universal: bool = False,
    specific: bool = False,
    universal: CommonNeurons | None = None,
    within: NeuronCircuit | None = None,
    per_position: int = PER_POSITION,
    batch_tokens: int | None = None,
    progress: Progress = silent,
    cancel: threading.Event | None = None,
) -> Attribution:
    """Gradient × activation of every MLP neuron towards each prompt's next token, in one pass forth and back per batch.

    Args:
        targets: the next token, its leading space included; one for all prompts, or one each. Of a text of several
            tokens the first is taken (`NextToken.is_part`).
        counterfactuals: what the target is held against; by default each prompt's best other token.
        metric: `difference` (target logit minus counterfactual logit) or `logit` (the target's alone).
        attention: differentiated in `full`, or with its pattern `frozen`.
        raw: no chat template.
        seed_response: how the answer begins, before the target.
        keep_universal: count universal neurons too.
        specific: leave out, too, the neurons that everyday answers are owed to (`find_unspecific`).
        universal: the neurons to leave out; by default what `find_universal`, or `find_unspecific`, finds.
        within: score this circuit's neurons only, all of them at every position.
        per_position: how many neurons of a layer are kept at each position.
        batch_tokens: how many tokens, padding included, go through the model at once.

    Raises:
        UsageError: as `next_tokens`, an option out of its range, or a prompt of one token, whose only position is the
            first.
        MismatchError: `within` was made on a model of another shape.
        Cancelled: `cancel` was set.
    """
    _check(metric, counterfactuals, per_position)
    if specific and keep_universal:
        raise UsageError("specific leaves out neurons that keep_universal keeps; give one of them.")
    choices = next_tokens(lm, prompts, targets, counterfactuals, raw=raw, seed_response=seed_response)
    if any(len(choice.ids) < 2 for choice in choices):
        raise UsageError("A prompt has one token only; the first position is never counted, so write a longer one.")
    if within is not None:
        check_model(within, lm.reference)
    if universal is None and not keep_universal:
        universal = (find_unspecific if specific else find_universal)(lm, progress=progress, cancel=cancel)
    found = score_prompts(
        lm,
        choices,
        metric=metric,
        attention=attention,
        per_position=per_position,
        within=within,
        batch_tokens=batch_tokens,
        progress=progress,
        cancel=cancel,
    )
    return Attribution(
        model=lm.reference,
        prompts=found,
        tokens=tuple(tuple(lm.tokenizer.decode([token]) for token in choice.ids) for choice in choices),
        universal=universal,
        keep_universal=keep_universal,
        parameters={"metric": metric, "attention": attention, "raw": raw, "seed_response": seed_response},
    )


def _kept(scores: Tensor, select: Selection, metric: float) -> Tensor:
    """`scores` `[n_layers, d_mlp]` with 0 for what is not selected."""
    layers = torch.arange(scores.shape[0]).repeat_interleave(scores.shape[1])
    flat = scores.flatten()
    places = select(flat, layers, metric)
    return torch.zeros_like(flat).index_copy(0, places, flat[places]).view_as(scores)


def _token_data(token: NextToken | None) -> dict[str, Any] | None:
    if token is None:
        return None
    return {"id": token.id, "text": token.text, "given": token.given, "n_tokens": token.n_tokens}


def _check(metric: str, counterfactuals: object, per_position: object) -> None:
    check_option("metric", metric, METRICS)
    if metric == "logit" and counterfactuals is not None:
        raise UsageError("The metric 'logit' is the target's alone; leave the counterfactual out.")
    check_count("per_position", per_position, 1, 1_000_000)
