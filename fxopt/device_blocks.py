"""Streamed weights for a device: copies out of pinned memory, or out of files by way of some."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.device_lanes import DeviceLanes
from fxopt.file_weights import raw
from fxopt.offload.store import Extent, FileStore
from fxopt.staging import Staging


class PinnedBlocks:
    """Layers of a file that lies in memory: the device reads it by itself."""

    def __init__(self, lanes: DeviceLanes, files: FileStore, memory: torch.UntypedStorage) -> None:
        self._lanes, self._files = lanes, files
        self._memory = torch.empty(0, dtype=torch.uint8).set_(memory)
        self._unpin = lanes.pin(self._memory)

    def fill(self, layer: int, slot: Tensor) -> int:
        extents = self._files.layers[layer]
        for one in extents:
            self._lanes.copy(slot[one.at : one.at + one.nbytes], self._memory[one.offset : one.offset + one.nbytes])
        return sum(one.nbytes for one in extents)

    def close(self) -> None:
        self._unpin()
        self._files.close()


class StagedBlocks:
    """Layers of files on disk: read into pinned memory, and copied from there while the next one is read."""

    def __init__(self, lanes: DeviceLanes, files: FileStore) -> None:
        self._lanes, self._files = lanes, files
        self._ends = [_end(extents) for extents in files.layers]
        self._staging = Staging(lanes, max(self._ends))

    def fill(self, layer: int, slot: Tensor) -> int:
        part = self._staging.next(self._ends[layer])
        nbytes = self._files.fill(layer, raw(part))
        self._lanes.copy(slot[: part.nbytes], part)
        self._staging.copied()
        return nbytes

    def close(self) -> None:
        self._staging.close()
        self._files.close()


def blocks_for(
    lanes: DeviceLanes, files: FileStore, memory: torch.UntypedStorage | None
) -> PinnedBlocks | StagedBlocks:
    """What fills the slots of a device; ``memory`` is the file, where that lies in memory."""
    return StagedBlocks(lanes, files) if memory is None else PinnedBlocks(lanes, files, memory)


def _end(extents: Sequence[Extent]) -> int:
    return max(one.at + one.nbytes for one in extents)
