"""A contender in a setting: getting ready, and one timed run after the other."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

from torch import Tensor

from fxopt.bench.answers import hashed
from fxopt.bench.contender import Contender
from fxopt.bench.field import Field
from fxopt.bench.row import Row
from fxopt.bench.timing import timed
from fxopt.bench.traces import Traces
from fxopt.bench.trouble import noted
from fxopt.progress import Progress


@dataclass(frozen=True)
class Entry:
    """Fills ``row``; what goes wrong is its trouble, and nothing more is done then."""

    field: Field
    contender: Contender
    prompt: Tensor
    row: Row
    progress: Progress

    def prepare(self) -> None:
        self.field.prepare(self.contender, self.row)

    def warm_up(self, times: int) -> None:
        """Until everything is compiled; then once more, to see how much memory it takes and what it says."""
        if self.row.trouble is None:
            with noted(self.row):
                self._warm_up(times)

    def settle(self) -> None:
        """One run that nobody times, for what was given back since the warm-up."""
        if self.row.trouble is None:
            with noted(self.row), self.progress.step(f"{self.row.setting}: settle {self.row.contender}"):
                self.contender.generate(self.prompt, self.row.setting.new, None)

    def run(self, read_speed: float | None) -> None:
        """``read_speed`` is that of the round."""
        if self.row.trouble is None:
            with noted(self.row):
                run = timed(self.contender, self.prompt, self.row.setting.new)
                self.row.runs.append(replace(run, read_speed=read_speed))

    def trace(self, traces: Traces) -> None:
        if self.row.trouble is None:
            with noted(self.row), self.progress.step(f"profile {self.row.contender}"):
                traces.record(self.contender, self.prompt, self.row.setting)

    def _warm_up(self, times: int) -> None:
        row, name = self.row, self.row.contender
        for turn in range(times):
            timing = row.getting_ready() if turn == 0 else contextlib.nullcontext()
            with self.progress.step(f"{row.setting}: warm up {name}"), self.field.keeping(self.contender), timing:
                self.contender.generate(self.prompt, row.setting.new, None)
        with self.progress.step(f"{row.setting}: weigh {name}"):
            row.tokens, row.peak_bytes = self.field.weighed(self.contender, self.prompt, row.setting.new)
        row.text_hash = hashed(self.field.subject.texts(self.prompt, row.tokens))
