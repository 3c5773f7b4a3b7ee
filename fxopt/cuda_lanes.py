"""The lanes of a CUDA device: the current stream computes, a stream of our own copies, and marks are events."""

from __future__ import annotations

import contextlib
import functools
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

from fxopt.offload.amounts import told
from fxopt.offload.errors import StoreError

Event = torch.cuda.Event
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device


class CudaLanes:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def computed(self) -> Event:
        return _mark(torch.cuda.current_stream(self._device))

    def copied(self) -> Event:
        return _mark(self._copies)

    def compute_after(self, mark: Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def copy_after(self, mark: Event) -> None:
        self._copies.wait_event(mark)

    def reach(self, mark: Event) -> None:
        mark.synchronize()

    def seconds(self, start: Event, end: Event) -> float | None:
        return start.elapsed_time(end) / 1000 if end.query() else None

    def copy(self, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def clear(self, target: Tensor) -> None:
        with torch.cuda.stream(self._copies):
            target.zero_()

    def room(self, nbytes: int) -> Tensor:
        with torch.inference_mode(False):  # tensors made in that mode could not be written outside of it
            memory = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        memory.record_stream(self._copies)  # when it is let go of, nobody has it before the copies are through
        return memory

    def host(self, nbytes: int) -> Tensor:
        try:
            memory = mmap.mmap(-1, nbytes)
        except OSError as error:
            raise StoreError(f"there is no memory for {told(nbytes)} that leave {self._device} ({error})") from error
        with torch.inference_mode(False):
            return torch.frombuffer(memory, dtype=torch.uint8)

    def pin(self, memory: Tensor) -> Callable[[], None]:
        """PyTorch's own pinned memory comes in powers of two: up to twice as much as is asked for."""
        code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE))
        if code:
            with contextlib.suppress(RuntimeError):  # the next launch would report it again, and then forget it
                torch.zeros(1, device=self._device)
            raise StoreError(
                f"{told(memory.nbytes)} of memory cannot be pinned for {self._device} (CUDA error {code}), so copies "
                'could not go on by themselves. Stream fewer layers, raise the limit (ulimit -l), or use store="disk"'
            )
        return functools.partial(_unpin, self._copies, memory)


def _mark(stream: torch.cuda.Stream) -> Event:
    event = Event(enable_timing=True)
    event.record(stream)
    return event


def _unpin(copies: torch.cuda.Stream, memory: Tensor) -> None:
    copies.synchronize()  # some may still be under way
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
