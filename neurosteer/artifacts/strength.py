"""What strength 1 of an artifact means."""

from dataclasses import replace
from typing import Annotated

from pydantic import AfterValidator, Field

from neurosteer.models.records import Count, Finite, Flag, Line, record

DEFAULT_DOSE = 0.3
DEFAULT_MULTIPLIER = 2.0
DEFAULT_SHIFT = 6.0
_DEFAULT_AMOUNTS = {
    "add": DEFAULT_DOSE,
    "ablate": 1.0,
    "clamp": 0.0,
    "scale": DEFAULT_MULTIPLIER,
    "shift": DEFAULT_SHIFT,
}


def _in_order(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError("the lower end comes first")
    return ends


Interval = Annotated[tuple[Finite, Finite], AfterValidator(_in_order)]


@record("calibration")
class Calibration:
    """What strength 1 means. `amount` is a dose (add), a share (ablate), the activation a feature is held at (clamp), a
    multiplier (scale) or a number of class differences (shift); `amount_down`, of the same kind, is what strength −1
    means where it was measured by itself, else the opposite of `amount`.

    `measured` says whether they were found by measurement or are the default. Measured, `kl` and `kl_down` are what the
    amounts came to: the `percentile` of the per-token KL from the unsteered model in nats, over the continuations (by
    `n_tokens` tokens) of the prompts with that SHA-256; `target_kl` is what was aimed at, `note` says why it was not
    reached. `kl_interval` and `kl_down_interval` are the 95% intervals of the two over prompts: other prompts of the
    same kind would have given a KL between the two ends.
    """

    amount: Finite
    measured: Flag = False
    amount_down: Finite | None = None
    target_kl: Finite | None = None
    percentile: Finite | None = None
    n_tokens: Count | None = None
    n_prompts: Count | None = None
    prompts_sha256: Annotated[str, Field(strict=True, max_length=64)] = ""
    kl: Finite | None = None
    kl_down: Finite | None = None
    note: Line = ""
    kl_interval: Interval | None = None
    kl_down_interval: Interval | None = None

    def unmeasured(self) -> "Calibration":
        """The same amounts for an artifact that was changed, on which nothing was measured."""
        return Calibration(self.amount, amount_down=self.amount_down)

    def turned_round(self) -> "Calibration":
        """For a direction that was turned round: what strength 1 did, −1 does now."""
        if self.amount_down is None:
            return self
        return replace(
            self,
            amount=self.amount_down,
            amount_down=self.amount,
            kl=self.kl_down,
            kl_down=self.kl,
            kl_interval=self.kl_down_interval,
            kl_down_interval=self.kl_interval,
        )


def default_calibration(operation: str) -> Calibration:
    """What strength 1 means as long as nothing was measured (dose 0.3, multiplier 2, 6 differences, ablate all, clamp
    to 0)."""
    return Calibration(_DEFAULT_AMOUNTS[operation])
