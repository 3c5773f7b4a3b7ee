"""Everything that one benchmark has found, as far as it came."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

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
    read_gb_s: float | None  # of plain reads of memory, in the median
    memory: str | None  # what the peaks count
    without_turns: dict[str, str] = field(default_factory=dict)  # axes whose settings ran one by one, and why

    @classmethod
    def of(cls, measuring: Measuring, machine: Machine) -> Results:
        rows = {(row.axis, row.setting, row.contender): row for row in measuring.rows}
        above: dict[tuple[str, Setting], Row] = {}
        start: dict[str, Setting] = {}
        found = []
        for row in measuring.rows:
            place = row.axis, row.setting
            first = rows.get((row.axis, start.setdefault(row.axis, row.setting), row.contender)) if row.axis else None
            found.append(figures(row, rows.get((*place, STOCK)), above.get(place), first))
            above[place] = row
        speeds = [run.read_speed for row in measuring.rows for run in row.runs if run.read_speed]
        return cls(
            str(measuring.source),
            str(measuring.source.dtype).removeprefix("torch."),
            machine,
            tuple(found),
            dict(measuring.left_out),
            statistics.median(speeds) / 1e9 if speeds else None,
            None if measuring.meter is None else measuring.meter.what,
            dict(measuring.without_turns),
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
