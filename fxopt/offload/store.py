"""Where streamed layers come from: extents of files, read into a slot.

The file lies on disk, or in memory, where it has no name (``store="cpu"``).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fxopt.offload.watched_file import WatchedFile


class Store(Protocol):
    """Fills slots, from whatever thread."""

    def fill(self, layer: int, slot: Any) -> int:
        """Put the weights of a layer into a slot, or ask for that; returns the bytes."""

    def close(self) -> None:
        """Let go of files; nothing is filled afterwards."""


@dataclass(frozen=True)
class Extent:
    """Bytes of a file, and where in the slot they go."""

    file: WatchedFile
    offset: int
    nbytes: int
    at: int


class FileStore:
    """Layers that are made of extents."""

    def __init__(self, layers: Sequence[Sequence[Extent]]) -> None:
        self.layers = tuple(tuple(extents) for extents in layers)
        self.bytes_read = 0
        self._lock = threading.Lock()

    @property
    def files(self) -> list[WatchedFile]:
        return list({id(one.file): one.file for extents in self.layers for one in extents}.values())

    def fill(self, layer: int, slot: memoryview) -> int:
        nbytes = 0
        for extent in self.layers[layer]:
            extent.file.read_into(slot[extent.at : extent.at + extent.nbytes], extent.offset)
            nbytes += extent.nbytes
        with self._lock:
            self.bytes_read += nbytes
        return nbytes

    def close(self) -> None:
        for file in self.files:
            file.close()
