"""How fast this machine reads memory: a sum over more numbers than its caches hold."""

from __future__ import annotations

import time

import torch

NBYTES = {"cpu": 512 * 2**20, "cuda": 2 * 2**30}
READS = 3


def read_speed(device: torch.device, nbytes: int | None = None) -> float | None:
    """Bytes per second, the best of a few reads, or None where there is no room; memory is given back afterwards."""
    nbytes = nbytes or NBYTES.get(device.type, NBYTES["cpu"])
    try:
        # Not zeros: pages that were never written are one page, which lies in the cache.
        data = torch.ones(nbytes // 4, dtype=torch.float32, device=device)
    except RuntimeError:
        return None
    return nbytes / min(_seconds(data) for _ in range(READS))


def _seconds(data: torch.Tensor) -> float:
    if data.device.type == "cuda":
        torch.cuda.synchronize(data.device)
    began = time.perf_counter()
    float(data.sum())  # which waits for the device
    return time.perf_counter() - began
