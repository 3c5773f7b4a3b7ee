"""Two lanes of work: in one layers compute, in the other slots are filled beside them.

On a device work is put into a lane and happens some time later, in the order in which it was put there. A
mark is a place in a lane: whatever was put there before it has happened once the mark is past. Lanes wait for
marks of each other, and whoever puts work there goes on.

On a CPU layers compute when they are called, and a thread fills slots. Nothing is put off, so there is
nothing to wait for, and a mark is only the time.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

Mark = Any  # whatever the lanes make of it


class Lanes(Protocol):
    """What a ring has to know of them. May be called from any thread."""

    def computed(self) -> Mark:
        """A mark behind what was put into the lane that computes."""

    def copied(self) -> Mark:
        """A mark behind what was put into the lane of the copies."""

    def compute_after(self, mark: Mark) -> None:
        """What computes from here on waits for a mark."""

    def copy_after(self, mark: Mark) -> None:
        """Copies from here on wait for a mark."""

    def reach(self, mark: Mark) -> None:
        """The calling thread waits for a mark."""

    def seconds(self, start: Mark, end: Mark) -> float | None:
        """What went by between two marks of one lane; None if the second is not past yet."""


class HostLanes:
    """What is asked for has happened when the call returns."""

    def computed(self) -> float:
        return time.perf_counter()

    copied = computed

    def compute_after(self, mark: Mark) -> None:
        pass

    copy_after = reach = compute_after

    def seconds(self, start: float, end: float) -> float:
        return end - start
