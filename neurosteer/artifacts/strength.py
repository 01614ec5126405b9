"""What strength 1 of an artifact means."""

from dataclasses import dataclass, replace

from neurosteer.errors import ArtifactError
from neurosteer.text import shown
from neurosteer.validation import check_text, is_finite, is_int

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


@dataclass(frozen=True)
class Calibration:
    """What strength 1 means. `amount` is a dose (add), a share (ablate), the activation a feature is held at (clamp), a
    multiplier (scale) or a number of class differences (shift); `amount_down`, of the same kind, is what strength −1
    means where it was measured by itself, else the opposite of `amount`.

    `measured` says whether they were found by measurement or are the default. Measured, `kl` and `kl_down` are what the
    amounts came to: the `percentile` of the per-token KL from the unsteered model in nats, over the continuations (by
    `n_tokens` tokens) of the prompts with that SHA-256; `target_kl` is what was aimed at, `note` says why it was not
    reached.
    """

    amount: float
    measured: bool = False
    amount_down: float | None = None
    target_kl: float | None = None
    percentile: float | None = None
    n_tokens: int | None = None
    n_prompts: int | None = None
    prompts_sha256: str = ""
    kl: float | None = None
    kl_down: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if not is_finite(self.amount):
            raise ArtifactError(f"The calibrated amount is {shown(self.amount)}; it must be a finite number.")
        if not isinstance(self.measured, bool):
            raise ArtifactError(f"The calibration's 'measured' is {shown(self.measured)}; it must be true or false.")
        for key in ("amount_down", "target_kl", "percentile", "kl", "kl_down"):
            value = getattr(self, key)
            if value is not None and not is_finite(value):
                raise ArtifactError(f"The calibration's {key} is {shown(value)}; it must be a finite number.")
        for key in ("n_tokens", "n_prompts"):
            value = getattr(self, key)
            if value is not None and not is_int(value):
                raise ArtifactError(f"The calibration's {key} is {shown(value)}; it must be a count.")
        check_text("calibration's note", self.note, 1000, empty=True)
        check_text("calibration's prompts_sha256", self.prompts_sha256, 64, empty=True)

    def unmeasured(self) -> "Calibration":
        """The same amounts for an artifact that was changed, on which nothing was measured."""
        return Calibration(self.amount, amount_down=self.amount_down)

    def turned_round(self) -> "Calibration":
        """For a direction that was turned round: what strength 1 did, −1 does now."""
        if self.amount_down is None:
            return self
        return replace(self, amount=self.amount_down, amount_down=self.amount, kl=self.kl_down, kl_down=self.kl)


def default_calibration(operation: str) -> Calibration:
    """What strength 1 means as long as nothing was measured (dose 0.3, multiplier 2, 6 differences, ablate all, clamp
    to 0)."""
    return Calibration(_DEFAULT_AMOUNTS[operation])
