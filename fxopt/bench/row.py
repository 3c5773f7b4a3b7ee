"""What was measured of one contender in one setting."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from fxopt.bench.contender import Tokens
from fxopt.bench.setting import Setting
from fxopt.bench.timing import Run


@dataclass
class Row:
    """Filled while it is measured, so that it can be read at any time."""

    contender: str
    setting: Setting
    axis: str = ""  # along which it took turns with other settings
    is_ours: bool = False
    step_bytes: float = 0.0  # that a decode step must read
    ready_s: float = 0.0  # until the first answer: preparation and compilation
    peak_bytes: int | None = None
    tokens: Tokens | None = None  # of the run before the timed ones
    text_hash: str = ""
    runs: list[Run] = field(default_factory=list)
    trouble: str | None = None  # why it was not measured, or not to the end

    @contextlib.contextmanager
    def getting_ready(self) -> Iterator[None]:
        """What happens inside belongs to the time until the first answer."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.ready_s += time.perf_counter() - began

    @property
    def is_steady(self) -> bool:
        """Whether every run said the same."""
        return all(run.tokens == self.tokens for run in self.runs)
