"""Everything that one benchmark has found, as far as it came."""

from __future__ import annotations

from dataclasses import dataclass

from fxopt.bench.figures import Figures, figures
from fxopt.bench.machine import Machine
from fxopt.bench.measuring import Measuring
from fxopt.bench.row import Row
from fxopt.bench.setting import Setting
from fxopt.bench.stock import STOCK


@dataclass(frozen=True)
class Results:
    """Figures, and what they have to be read with."""

    model: str
    dtype: str
    machine: Machine
    figures: tuple[Figures, ...]
    left_out: dict[str, str]
    read_gb_s: float | None
    memory: str | None  # what the peaks count

    @classmethod
    def of(cls, measuring: Measuring, machine: Machine) -> Results:
        speed = max(measuring.read_speeds, default=None)
        stock: dict[Setting, Row] = {row.setting: row for row in measuring.rows if row.contender == STOCK}
        above: dict[Setting, Row] = {}
        found = []
        for row in measuring.rows:
            found.append(figures(row, stock.get(row.setting), above.get(row.setting), speed))
            above[row.setting] = row
        return cls(
            str(measuring.source),
            str(measuring.source.dtype).removeprefix("torch."),
            machine,
            tuple(found),
            dict(measuring.left_out),
            None if speed is None else speed / 1e9,
            None if measuring.meter is None else measuring.meter.what,
        )

    @property
    def wrong(self) -> list[Figures]:
        """Of ours, what failed, and what says other tokens where nothing is rounded away."""
        return [one for one in self.figures if one.is_ours and self._is_wrong(one)]

    def _is_wrong(self, one: Figures) -> bool:
        return one.has_failed or (self.dtype == "float32" and one.is_same is False)

    @property
    def settings(self) -> list[Setting]:
        return list(dict.fromkeys(one.setting for one in self.figures))

    def of_setting(self, setting: Setting) -> list[Figures]:
        return [one for one in self.figures if one.setting == setting]
