"""Pinned memory on the way between files and a device, in two parts: one is filled while the other is copied."""

from __future__ import annotations

from torch import Tensor

from fxopt.device_lanes import DeviceLanes
from fxopt.offload.lanes import Mark

PARTS = 2


class Staging:
    """Parts of up to ``nbytes``, handed out in turns."""

    def __init__(self, lanes: DeviceLanes, nbytes: int) -> None:
        self._lanes = lanes
        memory = lanes.host(PARTS * nbytes)
        self.close = lanes.pin(memory)
        self._parts = memory.split(nbytes)
        self._busy: list[Mark | None] = [None] * PARTS
        self._turn = 0

    def next(self, nbytes: int) -> Tensor:
        """The next part, when the copy that it was last used for is through."""
        self._turn = (self._turn + 1) % PARTS
        mark = self._busy[self._turn]
        if mark is not None:
            self._lanes.reach(mark)
        part: Tensor = self._parts[self._turn][:nbytes]
        return part

    def copied(self) -> Mark:
        """Say that the copy of this part was asked for; returns a mark behind it."""
        mark = self._busy[self._turn] = self._lanes.copied()
        return mark
