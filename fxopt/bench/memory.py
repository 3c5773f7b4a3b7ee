"""How much memory is held, and how much was at most: PyTorch's allocator on a GPU, resident memory elsewhere."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path
from typing import Protocol

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"


class Meter(Protocol):
    """Bytes, now and at most."""

    @property
    def what(self) -> str:
        """What is counted, for the reader of a table."""

    def now(self) -> int: ...

    def restart(self) -> None:
        """Forget the peak so far."""

    def peak(self) -> int: ...


class Allocated(Meter):
    """Tensors on a GPU."""

    what = "tensors on the GPU, from PyTorch's allocator"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)


class Resident(Meter):
    """Pages of this process, as Linux counts them."""

    what = "resident memory of the process"

    def now(self) -> int:
        return _status("VmRSS")

    def restart(self) -> None:
        _CLEAR.write_text(_CLEAR_PEAK)

    def peak(self) -> int:
        return _status("VmHWM")


def meter_for(device: torch.device) -> Meter | None:
    """None where nobody counts."""
    if device.type == "cuda":
        return Allocated(device)
    meter = Resident()
    try:
        meter.restart()
        meter.peak()
    except (OSError, LookupError):
        return None
    return meter


def tidy() -> None:
    """Give back what nobody uses, so that what is left is what is held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what was freed
        if trim is not None:
            trim(0)


def _status(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{_STATUS} has no {name}")
