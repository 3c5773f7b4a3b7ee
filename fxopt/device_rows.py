"""Rows of a cache for a device: in memory of the host or in a file they lie in the order of the rows.

    in the host, each buffer of a layer:  | row 0 of all strips | row 1 of all strips | …
    in a slot, as compiled code reads it: | strip 0: row 0, row 1, … | strip 1: row 0, row 1, … | …

So what is filled, and what is new, is one run of bytes: copies between the sides have no gaps, and the device
itself sorts the rows into strips, within its own memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fxopt.device_lanes import PART, DeviceLanes
from fxopt.file_weights import raw
from fxopt.offload.errors import StoreError
from fxopt.offload.row_file import LOST, RowFile
from fxopt.offload.rows import Block, RowBlocks
from fxopt.staging import Staging


def stage_bytes(blocks: Sequence[Block]) -> int:
    """The memory of the device in which rows rest until they are sorted."""
    each = [(block.sequences * one.heads * one.row, block.capacity) for block in blocks for one in block.buffers]
    return max(max(row, min(PART, rows * row)) for row, rows in each)


class DeviceRows(RowBlocks):
    """The blocks of some layers. ``kind`` is "disk", or "cpu" for pinned memory of the host."""

    def __init__(self, blocks: Sequence[Block], lanes: DeviceLanes, kind: str, folder: Path | None = None) -> None:
        super().__init__(blocks)
        self._lanes = lanes
        self._stage = lanes.room(stage_bytes(blocks))
        self._shelf: _Shelf
        if kind == "cpu":
            self._shelf = _Pinned(lanes, self.nbytes)
        else:
            self._shelf = _OnDisk(lanes, RowFile(self.nbytes, kind, folder), self._stage.nbytes)
        self._lost: str | None = None

    def begin(self, sequences: int) -> None:
        super().begin(sequences)
        self._lost = None
        self._shelf.begin()

    def pretend(self, rows: int) -> None:
        """Have so many rows of zeros."""
        for layer, block in enumerate(self.blocks):
            for number in range(len(block.buffers)):
                start, end = self._run(layer, number, 0, rows)
                self._shelf.write_zeros(start, end - start)
        self.filled = [rows] * len(self.blocks)

    def fill(self, layer: int, slot: Tensor) -> int:
        """Have the rows of a layer that are there copied into a slot; returns the bytes."""
        if self._lost is not None:
            raise StoreError(self._lost)
        block, rows = self.blocks[layer], self.filled[layer]
        if self._is_strange(slot.data_ptr(), block):
            self._lanes.clear(slot)
        for at, rested, sorted_rows in self._parts(layer, slot, 0, rows):
            self._shelf.bring(_bytes(rested), at)
            self._lanes.copy(sorted_rows, rested.transpose(0, 1))
        return rows * self.sequences * block.row_bytes

    def put(self, layer: int, start: int, end: int, slot: Tensor) -> int:
        """Have rows that a layer has written into its slot copied to the host; returns the bytes.

        What cannot be stored makes all that is read later an error.
        """
        try:
            for at, rested, sorted_rows in self._parts(layer, slot, start, end):
                self._lanes.copy(rested.transpose(0, 1), sorted_rows)
                self._shelf.take(_bytes(rested), at)
        except RuntimeError as error:
            self._lost = f"rows of the cache could not be stored ({error}); {LOST}"
        self.filled[layer] = end
        return (end - start) * self.sequences * self.blocks[layer].row_bytes

    def read(self, layer: int, number: int, start: int, end: int, target: memoryview) -> None:
        """Rows of one buffer, strip after strip without gaps, when no copy is under way."""
        first, last = self._run(layer, number, start, end)
        rows = torch.empty(last - first, dtype=torch.uint8)
        self._shelf.read(raw(rows), first)
        self._strips(layer, number, _tensor(target), end - start).copy_(self._rows(layer, number, rows).transpose(0, 1))

    def write(self, layer: int, number: int, start: int, end: int, source: memoryview) -> None:
        """The same the other way."""
        first, last = self._run(layer, number, start, end)
        rows = torch.empty(last - first, dtype=torch.uint8)
        self._rows(layer, number, rows).copy_(self._strips(layer, number, _tensor(source), end - start).transpose(0, 1))
        self._shelf.write(raw(rows), first)
        self.filled[layer] = max(self.filled[layer], end)

    def close(self) -> None:
        self._shelf.close()

    def _parts(self, layer: int, slot: Tensor, start: int, end: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Some rows of a layer, as many at once as can rest: where they lie in the host, resting, and in the slot."""
        block = self.blocks[layer]
        for number, (first, one) in enumerate(zip(block.starts, block.buffers, strict=True)):
            whole = slot[first : first + block.sequences * one.heads * block.capacity * one.row]
            strips = self._strips(layer, number, whole, block.capacity)
            row = self.sequences * one.heads * one.row
            for low in range(start, end, self._stage.nbytes // row):
                high = min(end, low + self._stage.nbytes // row)
                at, _ = self._run(layer, number, low, high)
                rested = self._rows(layer, number, self._stage[: (high - low) * row])
                yield at, rested, strips[:, low:high]

    def _run(self, layer: int, number: int, start: int, end: int) -> tuple[int, int]:
        """Where some rows of a buffer begin and end in the host."""
        block = self.blocks[layer]
        first, one = self._places[layer] + block.starts[number], block.buffers[number]
        row = self.sequences * one.heads * one.row
        return first + start * row, first + end * row

    def _strips(self, layer: int, number: int, memory: Tensor, rows: int) -> Tensor:
        """[strips in use, rows, numbers of a row]"""
        one = self.blocks[layer].buffers[number]
        return _numbers(memory, one.row).view(-1, rows, one.row // _wide(one.row))[: self.sequences * one.heads]

    def _rows(self, layer: int, number: int, memory: Tensor) -> Tensor:
        """[rows, strips in use, numbers of a row]"""
        one = self.blocks[layer].buffers[number]
        return _numbers(memory, one.row).view(-1, self.sequences * one.heads, one.row // _wide(one.row))


class _Shelf(Protocol):
    """Where rows lie in the host."""

    def begin(self) -> None:
        """What was there does not matter any more."""

    def bring(self, target: Tensor, at: int) -> None:
        """Ask for a copy to the device."""

    def take(self, source: Tensor, at: int) -> None:
        """Ask for a copy from the device."""

    def read(self, target: memoryview, at: int) -> None: ...

    def write(self, source: memoryview, at: int) -> None: ...

    def write_zeros(self, at: int, nbytes: int) -> None: ...

    def close(self) -> None: ...


class _Pinned:
    """In memory that the device reads and writes by itself."""

    def __init__(self, lanes: DeviceLanes, nbytes: int) -> None:
        self._lanes, self._memory = lanes, lanes.host(nbytes)
        self.close = lanes.pin(self._memory)

    def begin(self) -> None:
        pass

    def bring(self, target: Tensor, at: int) -> None:
        self._lanes.copy(target, self._memory[at : at + target.nbytes])

    def take(self, source: Tensor, at: int) -> None:
        self._lanes.copy(self._memory[at : at + source.nbytes], source)

    def read(self, target: memoryview, at: int) -> None:
        target[:] = raw(self._memory[at : at + len(target)])

    def write(self, source: memoryview, at: int) -> None:
        raw(self._memory[at : at + len(source)])[:] = source

    def write_zeros(self, at: int, nbytes: int) -> None:
        self._memory[at : at + nbytes].zero_()


class _OnDisk:
    """In a file, by way of pinned memory."""

    def __init__(self, lanes: DeviceLanes, file: RowFile, part: int) -> None:
        self._lanes, self._file = lanes, file
        try:
            self._staging = Staging(lanes, part)
        except BaseException:
            file.close()
            raise
        self.read, self.write_zeros = file.read, file.write_zeros

    def begin(self) -> None:
        self._file.lost = None

    def bring(self, target: Tensor, at: int) -> None:
        part = self._staging.next(target.nbytes)
        self._file.read(raw(part), at)
        self._file.forget(at, part.nbytes)
        self._lanes.copy(target, part)
        self._staging.copied()

    def take(self, source: Tensor, at: int) -> None:
        part = self._staging.next(source.nbytes)
        self._lanes.copy(part, source)
        self._lanes.reach(self._staging.copied())
        self._file.write(raw(part), at)

    def write(self, source: memoryview, at: int) -> None:
        self._file.write(source, at)
        self._file.check()

    def close(self) -> None:
        self._staging.close()
        self._file.close()


def _wide(row: int) -> int:
    """The bytes of the largest numbers that a row consists of: fewer of them are moved sooner."""
    return next(nbytes for nbytes in (8, 4, 2, 1) if row % nbytes == 0)


_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def _numbers(memory: Tensor, row: int) -> Tensor:
    return memory.view(_INTEGERS[_wide(row)])


def _bytes(rows: Tensor) -> Tensor:
    return rows.reshape(-1).view(torch.uint8)


def _tensor(memory: memoryview) -> Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8)
