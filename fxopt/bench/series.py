"""Settings that make one table or one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.bench.setting import Setting


@dataclass(frozen=True)
class Series:
    """Settings that are measured one after the other; those of an axis, which are to be compared, in turns."""

    settings: Sequence[Setting]
    axis: str = ""  # the name of what grows from one to the next

    @property
    def takes_turns(self) -> bool:
        return bool(self.axis) and len(self.settings) > 1
