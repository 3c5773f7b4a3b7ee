"""How long each way of computing the same took on a device: what a choice between them rests on."""

from __future__ import annotations

from dataclasses import dataclass

CLEARLY = 0.9  # of the first form's time: clocks are not sharper, and the same choice should come out every time


@dataclass(frozen=True)
class FormTime:
    """One way, and its median time; or why it could not be timed."""

    form: str
    seconds: float | None
    trouble: str = ""

    def __str__(self) -> str:
        return (
            f"{self.form} failed ({self.trouble})"
            if self.seconds is None
            else f"{self.form} {self.seconds * 1e6:.0f} µs"
        )


@dataclass(frozen=True)
class TimedForms:
    """All ways, timed in turns; the first is what would be taken without a clock."""

    setting: str  # what was timed: "batch 1, 512 rows, 32 layers"
    times: tuple[FormTime, ...]

    @property
    def quickest(self) -> str | None:
        """The form to use, the first unless another is clearly quicker; None where not one of them ran."""
        ran = {one.form: one.seconds for one in self.times if one.seconds is not None}
        if not ran:
            return None
        best, first = min(ran, key=ran.__getitem__), self.times[0].form
        return first if first in ran and ran[best] > CLEARLY * ran[first] else best

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.times))} for {self.setting}"
