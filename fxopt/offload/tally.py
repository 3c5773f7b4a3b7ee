"""What has happened in rings, in numbers."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace


@dataclass
class Counters:
    """What has happened so far. ``exposed`` is how long layers have waited."""

    steps: int = 0
    reads: int = 0
    nbytes: int = 0  # read
    stored: int = 0  # bytes that layers have left in their slots
    waits: int = 0  # layers whose slot was not filled yet
    exposed: float = 0.0  # seconds
    reading: float = 0.0  # seconds that reading took
    stepping: float = 0.0  # seconds of whole steps
    restarts: int = 0  # after steps that ended half way, and when what is stored has changed


@dataclass
class Steps:
    """The steps of one kind, such as those that decode; seconds."""

    count: int = 0
    seconds: float = 0.0
    exposed: float = 0.0
    waits: int = 0


class Tally:
    """What rings have done: one, or several that are counted together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters = Counters()
        self._kinds: dict[str, Steps] = {}

    @property
    def counters(self) -> Counters:
        """A copy."""
        with self._lock:
            return replace(self._counters)

    @property
    def kinds(self) -> dict[str, Steps]:
        """What steps of each kind took; a copy."""
        with self._lock:
            return {kind: replace(steps) for kind, steps in self._kinds.items()}

    def add(self, **amounts: float) -> None:
        """Add to counters, from whatever thread."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._counters, name, getattr(self._counters, name) + amount)

    def add_step(self, kind: str, seconds: float, exposed: float, waits: int) -> None:
        self.add(steps=1, stepping=seconds, exposed=exposed, waits=waits)
        with self._lock:
            found = self._kinds.setdefault(kind, Steps())
            found.count, found.seconds = found.count + 1, found.seconds + seconds
            found.exposed, found.waits = found.exposed + exposed, found.waits + waits

    def begin_anew(self) -> None:
        """Forget what was counted so far."""
        with self._lock:
            self._counters, self._kinds = Counters(), {}
