"""What streaming asks of a device: copies in a lane of their own, and memory on both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fxopt.offload.lanes import Lanes

#: Bytes of one copy of rows, and of the places where it rests on the way.
PART = 8 << 20


class DeviceLanes(Lanes, Protocol):
    """The lanes of one device. Memory is counted in bytes, and zero at first."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Put a copy into the lane of the copies.

        From side to side both tensors have no gaps, and that of the host is pinned: so the device needs nobody.
        """

    def clear(self, target: Tensor) -> None:
        """Put zeros there, in the lane of the copies."""

    def room(self, nbytes: int) -> Tensor:
        """Memory of the device, for both lanes."""

    def host(self, nbytes: int) -> Tensor:
        """Memory of the host that can be pinned: nothing else lies in its pages."""

    def pin(self, memory: Tensor) -> Callable[[], None]:
        """Let the device copy memory of the host by itself; returns what ends that. An error is a sentence."""


def lanes_of(device: torch.device) -> DeviceLanes | None:
    """The lanes of a device; None for a CPU, which does things as they are asked for."""
    if device.type != "cuda":
        return None
    from fxopt.cuda_lanes import CudaLanes

    return CudaLanes(device)
