"""How many neurons make a circuit."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from neurosteer.errors import UsageError
from neurosteer.validation import check_option, is_finite

Rule = Literal["top_k", "share", "percent", "per_layer"]
RULES: tuple[Rule, ...] = ("top_k", "share", "percent", "per_layer")


@dataclass(frozen=True)
class Selection:
    """Which scores are kept.

    `top_k`: the `amount` largest in absolute value. `share`: the fewest whose absolute values make up this share (0 to
    1) of the sum of all. `percent`: those of at least this percentage of the metric. `per_layer`: the `amount` largest
    of every layer. Raises `UsageError` for another rule or an amount out of its range.
    """

    rule: Rule = "top_k"
    amount: float = 200

    def __post_init__(self) -> None:
        check_option("The selection's rule", self.rule, RULES)
        number = is_finite(self.amount)
        if self.rule in ("top_k", "per_layer"):
            if not number or self.amount != int(self.amount) or not 1 <= self.amount <= 1e9:
                raise UsageError(f"{self.rule} is {self.amount!r:.40}; give a whole number of neurons, at least 1.")
        elif not number or not 0 < self.amount <= (1 if self.rule == "share" else 1e6):
            allowed = "a share above 0 and up to 1" if self.rule == "share" else "a percentage above 0"
            raise UsageError(f"{self.rule} is {self.amount!r:.40}; give {allowed}.")

    def __call__(self, scores: Tensor, layers: Tensor, metric: float) -> Tensor:
        """Places of the scores kept, strongest first. `scores` and `layers` are `[n]`; scores of 0 never count."""
        sizes = scores.abs()
        order = sizes.argsort(descending=True, stable=True)
        order = order[sizes[order] > 0]
        if self.rule == "top_k":
            return order[: int(self.amount)]
        if self.rule == "percent":
            return order[sizes[order] >= self.amount / 100 * abs(metric)]
        if self.rule == "share":
            sums = sizes[order].double().cumsum(0)
            enough = int((sums < self.amount * sums[-1:]).sum()) + 1
            return order[:enough]
        return order[_rank_within(layers[order]) < self.amount]


def _rank_within(groups: Tensor) -> Tensor:
    """How many of the same group stand before each entry of `groups` `[n]`."""
    by_group = groups.argsort(stable=True)
    sorted_groups = groups[by_group]
    starts = torch.searchsorted(sorted_groups, sorted_groups)
    ranks = torch.empty_like(by_group)
    ranks[by_group] = torch.arange(len(groups), device=groups.device) - starts
    return ranks
