"""The memory of an arena, and the arenas that the threads of a process compute in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fxopt.errors import warn
from fxopt.launches import Layout


class Arena:
    """One piece of memory. Graphs that never run at once may share it; it grows, and never shrinks."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.lock = threading.RLock()  # held while a graph runs in it
        self.generation = 0  # how often it has moved
        self.memory = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._former: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def reserve(self, nbytes: int) -> None:
        """Have at least so much. What lay here before is lost if that takes new memory."""
        with self.lock:
            if nbytes > self.nbytes:
                self._take(nbytes)
                self.generation += 1

    def poison(self) -> None:
        """Make everything NaN, so that whoever reads what an earlier run left will show it."""
        with self.lock:
            self.memory.fill_(0xFF)

    def view(self, offset: int, layout: Layout) -> Tensor:
        """A tensor at a place that is aligned for its dtype."""
        width = layout.dtype.itemsize
        whole = self.memory[: self.nbytes // width * width].view(layout.dtype)
        return whole.as_strided(layout.sizes, layout.strides, offset // width + layout.offset)

    def _take(self, nbytes: int) -> None:
        if self.device.type == "cuda" and self.generation:
            self._former.append(self.memory)  # a step that was recorded in it goes on writing there
        self.memory = self.memory[:0].clone()  # let go of the old one first
        with torch.inference_mode(False):  # a tensor made in that mode could not be written outside of it
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)


class SharedArena:
    """One arena for all compiled graphs of a model; a thread has its own, for several may run at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.growths = 0  # how often a run needed more than was reserved
        self._reserved = 0
        self._own = threading.local()
        self._lock = threading.Lock()

    @property
    def reserved(self) -> int:
        """The bytes that every thread's arena has from the start."""
        return self._reserved

    def reserve(self, nbytes: int) -> None:
        """Have at least so much in every arena that is used from now on."""
        with self._lock:
            self._reserved = max(self._reserved, nbytes)

    def here(self) -> Arena:
        """The arena of this thread."""
        arena: Arena | None = getattr(self._own, "arena", None)
        if arena is None:
            arena = self._own.arena = Arena(self.device)
        arena.reserve(self._reserved)
        return arena

    def room(self, nbytes: int) -> Tensor:
        """The memory of this thread's arena, at least so much of it."""
        arena = self.here()
        if nbytes > arena.nbytes:
            self._grow(arena, nbytes)
        return arena.memory

    def running(self, code: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
        """Compiled code that computes in this arena."""

        def run(*given: Tensor) -> Sequence[Any]:
            before, _now.arena = _now.arena, self
            try:
                return code(*given)
            finally:
                _now.arena = before

        return run

    def _grow(self, arena: Arena, nbytes: int) -> None:
        with self._lock:
            self.growths += 1
            first, planned = self.growths == 1, self._reserved
        if first:
            warn(
                f"a run needs an arena of {nbytes:,} bytes, but {planned:,} were planned; it grows now. Name the "
                "largest shapes (max_batch of optimize, max_input_shapes of plan_memory) to have all memory from "
                "the start"
            )
        arena.reserve(nbytes)


class _Now(threading.local):
    """The arena of the model that this thread is running."""

    arena: SharedArena | None = None


_now = _Now()


def room(nbytes: int, device: str) -> Tensor:
    """Memory for compiled code to compute in; this is what the code itself calls."""
    if _now.arena is None:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    return _now.arena.room(nbytes)
