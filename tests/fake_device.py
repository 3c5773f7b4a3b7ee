"""A device made of CPU tensors: what is put into its lanes happens later, as late or as early as the lanes allow.

Whoever forgets to wait for something finds other bytes there. Copies between the sides that a real device could
not make by itself are errors.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from fxopt.offload.errors import StoreError
from fxopt.streamed_chain import StreamedChain

#: Who goes first whenever both lanes could go on.
ORDERS = ("copies late", "copies early", "both late", "in turns")

COMPUTE, COPIES = 0, 1


@dataclass
class Mark:
    lane: int
    is_past: bool = False
    time: int = 0


@dataclass
class Wait:
    mark: Mark


@dataclass
class FakeLanes:
    """``deaf`` names a kind of wait that is forgotten."""

    order: str = "copies late"
    deaf: str = ""
    most_pinned: int = 1 << 40
    reached: list[int] = field(default_factory=list)  # lanes that the host has waited for
    pinned: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._queues: tuple[deque[Any], deque[Any]] = (deque(), deque())
        self._rooms: list[tuple[int, int]] = []
        self._lock = threading.RLock()
        self._random = random.Random(0)
        self._now = 0

    # What DeviceLanes asks for

    def computed(self) -> Mark:
        return self._marked(COMPUTE)

    def copied(self) -> Mark:
        return self._marked(COPIES)

    def compute_after(self, mark: Mark) -> None:
        if self.deaf != "compute_after":
            self._put(COMPUTE, Wait(mark))

    def copy_after(self, mark: Mark) -> None:
        if self.deaf != "copy_after":
            self._put(COPIES, Wait(mark))

    def reach(self, mark: Mark) -> None:
        if self.deaf != "reach":
            with self._lock:
                self.reached.append(mark.lane)
                self._until(mark)

    def seconds(self, start: Mark, end: Mark) -> float | None:
        return 1e-6 * (end.time - start.time) if end.is_past else None

    def copy(self, target: Tensor, source: Tensor) -> None:
        if self._is_here(target) != self._is_here(source):
            assert target.is_contiguous()
            assert source.is_contiguous()
            assert target.shape == source.shape
            assert self._is_pinned(source if self._is_here(target) else target)
        self._put(COPIES, lambda: target.copy_(source))

    def clear(self, target: Tensor) -> None:
        assert self._is_here(target)
        self._put(COPIES, target.zero_)

    def room(self, nbytes: int) -> Tensor:
        memory = torch.zeros(nbytes, dtype=torch.uint8)
        self._rooms.append((memory.data_ptr(), memory.data_ptr() + nbytes))
        return memory

    def host(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def pin(self, memory: Tensor) -> Callable[[], None]:
        if sum(end - start for start, end in self.pinned.values()) + memory.nbytes > self.most_pinned:
            raise StoreError("memory cannot be pinned")
        self.pinned[id(memory)] = (memory.data_ptr(), memory.data_ptr() + memory.nbytes)
        return lambda: self.pinned.pop(id(memory), None) and None

    # What tests ask for

    def compute(self, what: Callable[[], Any]) -> None:
        """Put something into the lane that computes."""
        self._put(COMPUTE, what)

    def finish(self) -> None:
        """Wait for everything that was to be computed."""
        with self._lock:
            self._until(self._marked(COMPUTE))

    # How it goes on

    def _marked(self, lane: int) -> Mark:
        mark = Mark(lane)
        self._put(lane, mark)
        return mark

    def _put(self, lane: int, what: Any) -> None:
        with self._lock:
            self._queues[lane].append(what)
            if self.order in ("copies early", "copies late"):
                while self._advance(COPIES if self.order == "copies early" else COMPUTE):
                    pass
            elif self.order == "in turns":
                for _ in range(self._random.randrange(4)):
                    self._advance(self._random.randrange(2))

    def _advance(self, lane: int) -> bool:
        queue = self._queues[lane]
        if not queue or (isinstance(queue[0], Wait) and not queue[0].mark.is_past):
            return False
        what = queue.popleft()
        self._now += 1
        if isinstance(what, Mark):
            what.is_past, what.time = True, self._now
        elif not isinstance(what, Wait):
            what()
        return True

    def _until(self, mark: Mark) -> None:
        while not mark.is_past:
            if not self._advance(mark.lane):
                first = self._queues[mark.lane][0]
                assert isinstance(first, Wait)
                assert first.mark.lane != mark.lane
                self._until(first.mark)

    def _is_here(self, memory: Tensor) -> bool:
        return any(start <= memory.data_ptr() < end for start, end in self._rooms)

    def _is_pinned(self, memory: Tensor) -> bool:
        start = memory.data_ptr()
        return any(low <= start and start + memory.nbytes <= high for low, high in self.pinned.values())


class Later:
    """What a piece will have computed."""

    def __init__(self) -> None:
        self.value: Any = None


class LaterChain(StreamedChain):
    """Pieces are put into the lane that computes; whoever calls it waits for its results."""

    device: Device

    def __init__(self, plan: Any, pieces: Sequence[Any], *more: Any) -> None:
        outputs = {step.piece: len(step.writes) for step in plan.steps}
        super().__init__(plan, [self._later(code, outputs.get(n, 0)) for n, code in enumerate(pieces)], *more)

    def _later(self, code: Any, outputs: int) -> Any:
        def call(*given: Any) -> list[Later]:
            made = [Later() for _ in range(outputs)]

            def run() -> None:
                found = code(*[one.value if isinstance(one, Later) else one for one in given])
                for each, value in zip(made, found, strict=True):
                    each.value = value

            self.device.lanes.compute(run)
            return made

        return call

    def __call__(self, *given: Any, own: Any = None) -> list[Any]:
        results: list[Any] = super().__call__(*given, own=own)
        self.device.lanes.finish()
        return [one.value if isinstance(one, Later) else one for one in results]


@dataclass
class Device:
    """The lanes that rings are made with from now on, and that pieces compute in."""

    lanes: FakeLanes


@contextmanager
def fake_device(lanes: FakeLanes) -> Iterator[Device]:
    """Whatever is optimised within is streamed to this device."""
    device = Device(lanes)
    with pytest.MonkeyPatch.context() as patch:
        for place in ("fxopt.streaming.lanes_of", "fxopt.row_streams.lanes_of"):
            patch.setattr(place, lambda _: device.lanes)
        patch.setattr("fxopt.compiler.StreamedChain", type("LaterChain", (LaterChain,), {"device": device}))
        yield device
