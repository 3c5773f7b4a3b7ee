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
        with torch.inference_mode(False):  # a tensor made in that mode could not be written outside of it
            self.memory = torch.empty(0, dtype=torch.uint8)  # let go of the old one first
            self.memory = torch.empty(nbytes, dtype=torch.uint8, device=self.device)


class SharedArena:
    """One arena for all compiled graphs of a model; a thread has its own, for several may run at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_growth: Callable[[], None] = lambda: None
        self._reserved = 0
        self._has_grown = False
        self._own = threading.local()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """What this thread's arena takes: nothing before it has computed anything."""
        return self._here.nbytes

    def reserve(self, nbytes: int) -> None:
        """Have at least so much in every arena that is used from now on."""
        with self._lock:
            self._reserved = max(self._reserved, nbytes)

    def room(self, nbytes: int) -> Tensor:
        """The memory of this thread's arena, at least so much of it."""
        arena = self._here
        if nbytes > self._reserved:
            self._grow(nbytes)
        if arena.nbytes < self._reserved:
            arena.reserve(self._reserved)
        return arena.memory

    def release(self) -> int:
        """Give back this thread's arena; returns the bytes. The next run takes a new one."""
        freed = self.nbytes
        vars(self._own).clear()
        return freed

    def running(self, code: Callable[..., Sequence[Any]]) -> Callable[..., Sequence[Any]]:
        """Compiled code that computes in this arena."""

        def run(*given: Any, **more: Any) -> Sequence[Any]:
            before, _now.arena = _now.arena, self
            try:
                return code(*given, **more)
            finally:
                _now.arena = before

        return run

    @property
    def _here(self) -> Arena:
        arena: Arena | None = getattr(self._own, "arena", None)
        if arena is None:
            arena = self._own.arena = Arena(self.device)
        return arena

    def _grow(self, nbytes: int) -> None:
        """From now on for every thread: one that comes later need not find out again."""
        with self._lock:
            is_first, planned = not self._has_grown, self._reserved
            self._has_grown = True
            self._reserved = max(self._reserved, nbytes)
        self.on_growth()
        if is_first:
            warn(
                f"a run needs an arena of {nbytes:,} bytes, but {planned:,} were planned; it grows now. Name the "
                "largest shapes (max_batch of optimize, max_input_shapes of plan_memory) to have all memory from "
                "the start"
            )


class _Now(threading.local):
    """The arena of the model that this thread is running."""

    arena: SharedArena | None = None


_now = _Now()


def room(nbytes: int, device: str) -> Tensor:
    """Memory for compiled code to compute in; this is what the code itself calls."""
    arena = _now.arena
    if arena is None or arena.device != torch.device(device):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    return arena.room(nbytes)
