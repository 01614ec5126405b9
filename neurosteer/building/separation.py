"""How well layers tell the classes apart on held-out texts, and the choice of a layer by it."""

from collections.abc import Mapping

import torch

from neurosteer.building.plan import BuildPlan
from neurosteer.reading.statistics import Activations, HeldOut


def separations(activations: Activations) -> dict[int, float]:
    return {layer: separation_of(held_out) for layer, held_out in activations.held_out.items()}


def separation_of(held_out: HeldOut) -> float:
    """How well a layer's class difference orders held-out texts: the share of (positive, negative) pairs in the right
    order along it (ROC AUC; 0.5 is chance)."""
    from scipy.stats import rankdata

    positive, negative = (rows @ held_out.difference for rows in (held_out.rows.positive, held_out.rows.negative))
    n, others = len(positive), len(negative)
    ranks = rankdata(torch.cat([positive, negative]).numpy())[:n]
    return float((ranks.sum() - n * (n + 1) / 2) / (n * others))


def choose(
    plan: BuildPlan, separation: Mapping[int, float], held_out: Mapping[int, HeldOut]
) -> tuple[tuple[int, ...], str]:
    """The layers given, or those for the layer that separates best; and why."""
    if plan.layers is not None:
        return plan.layers, plan.reason
    best = max(plan.candidates, key=lambda layer: (separation[layer], _distance(held_out[layer])))
    first, last, count = plan.candidates[0], plan.candidates[-1], len(plan.candidates)
    among = f"{first} to {last}" if count == last - first + 1 > 1 else ", ".join(map(str, plan.candidates))
    layers, words = plan.method.up_to(best)
    chosen_by = f", the best of {count} on the texts it was chosen by" if count > 1 else ""
    return layers, f"{words} best among layers {among} (AUC {separation[best]:.2f}{chosen_by})"


def _distance(held_out: HeldOut) -> float:
    """Held-out d′ along the class difference: breaks ties where several layers separate perfectly."""
    direction = held_out.difference / held_out.difference.norm().clamp(min=1e-30)
    positive, negative = held_out.rows.positive @ direction, held_out.rows.negative @ direction
    spread = ((positive.var(correction=0) + negative.var(correction=0)) / 2).sqrt().clamp(min=1e-12)
    return float((positive.mean() - negative.mean()) / spread)
