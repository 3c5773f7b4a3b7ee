"""Rows of a cache in a file: what is filled is read into a slot, and the new rows of a layer are written behind it.

    a layer's block, in the file and in a slot:  | strip 0 of K | strip 1 of K | … | strip 0 of V | …
    a strip, one head of one sequence:           | row 0 | row 1 | … | row capacity - 1 |

The file has no name: nobody else can open it, and it goes with its process, however that ends.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fxopt.offload.amounts import told
from fxopt.offload.errors import StoreError
from fxopt.offload.folders import default_parent
from fxopt.offload.memory_files import memory_file
from fxopt.offload.reading import PART, forget, read_whole

ALIGN = 64  # where a buffer begins in its block
LOST = "what this cache held is lost; call generate again, with a new cache"


@dataclass(frozen=True)
class Strips:
    """One buffer of a layer: a strip for each head of each sequence."""

    heads: int
    row: int  # bytes of a row


@dataclass(frozen=True)
class Block:
    """The buffers of one layer, behind each other, for ``sequences`` of ``capacity`` rows."""

    buffers: tuple[Strips, ...]
    sequences: int
    capacity: int

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each buffer begins."""
        ends = self._ends()
        return (0, *ends[:-1])

    @property
    def nbytes(self) -> int:
        return self._ends()[-1]

    @property
    def row_bytes(self) -> int:
        """What one token of one sequence takes in all buffers."""
        return sum(one.heads * one.row for one in self.buffers)

    def runs(self, number: int, sequences: int, start: int, end: int) -> Iterator[tuple[int, int]]:
        """Where in the block some rows of a buffer lie: a place and a length for each strip."""
        one, first = self.buffers[number], self.starts[number]
        for strip in range(sequences * one.heads):
            yield first + (strip * self.capacity + start) * one.row, (end - start) * one.row

    def _ends(self) -> list[int]:
        ends = [0]
        for one in self.buffers:
            nbytes = self.sequences * one.heads * self.capacity * one.row
            ends.append(-(-(ends[-1] + nbytes) // ALIGN) * ALIGN)
        return ends[1:]


class RowStore:
    """The blocks of some layers. ``kind`` is "disk", or "cpu" for a file in memory.

    Only ``sequences`` of a block are in use, and of each layer as many rows as were put there.
    """

    def __init__(self, blocks: Sequence[Block], kind: str, folder: Path | None = None) -> None:
        self.blocks = tuple(blocks)
        self.nbytes = sum(block.nbytes for block in blocks)
        self.sequences = 0
        self.filled = [0] * len(blocks)
        self._lost: str | None = None
        self._places = [sum(block.nbytes for block in self.blocks[:turn]) for turn in range(len(blocks))]
        self._file = _nameless(self.nbytes, kind, folder)
        self._laid: dict[int, Block] = {}  # what lies in each slot, by its address

    def begin(self, sequences: int) -> None:
        """Be empty, for so many sequences."""
        self.sequences = sequences
        self.filled = [0] * len(self.blocks)
        self._lost = None

    def pretend(self, rows: int) -> None:
        """Have so many rows of zeros, written: what never was is read without a look at the disk."""
        zeros = memoryview(bytes(PART))
        for layer, block in enumerate(self.blocks):
            for number in range(len(block.buffers)):
                for at, nbytes in block.runs(number, self.sequences, 0, rows):
                    for done in range(0, nbytes, PART):
                        self._write(layer, zeros[: nbytes - done], at + done)
        os.fdatasync(self._fd)
        self.filled = [rows] * len(self.blocks)

    def fill(self, layer: int, slot: memoryview) -> int:
        """Put the rows of a layer that are there where it will read them; returns the bytes."""
        block, rows = self.blocks[layer], self.filled[layer]
        self._clear_if_strange(slot, block)
        for number in range(len(block.buffers)):
            for at, nbytes in block.runs(number, self.sequences, 0, rows):
                self._read(layer, slot[at : at + nbytes], at)
        forget(self._fd, self._places[layer], block.nbytes)
        return rows * self.sequences * block.row_bytes

    def put(self, layer: int, start: int, end: int, slot: memoryview) -> int:
        """Store rows that a layer has written into its slot; returns the bytes.

        What cannot be written makes all that is read later an error.
        """
        block = self.blocks[layer]
        for number in range(len(block.buffers)):
            for at, nbytes in block.runs(number, self.sequences, start, end):
                self._write(layer, slot[at : at + nbytes], at)
        self.filled[layer] = end
        return (end - start) * self.sequences * block.row_bytes

    def read(self, layer: int, number: int, start: int, end: int, target: memoryview) -> None:
        """Rows of one buffer, strip after strip without gaps."""
        for turn, (at, nbytes) in enumerate(self.blocks[layer].runs(number, self.sequences, start, end)):
            self._read(layer, target[turn * nbytes : (turn + 1) * nbytes], at)

    def write(self, layer: int, number: int, start: int, end: int, source: memoryview) -> None:
        """The same the other way."""
        for turn, (at, nbytes) in enumerate(self.blocks[layer].runs(number, self.sequences, start, end)):
            self._write(layer, source[turn * nbytes : (turn + 1) * nbytes], at)
        self.filled[layer] = max(self.filled[layer], end)
        if self._lost is not None:
            raise StoreError(self._lost)

    def crop(self, rows: int) -> None:
        """Have no more than so many."""
        self.filled = [min(rows, filled) for filled in self.filled]

    def close(self) -> None:
        self._file.close()

    @property
    def _fd(self) -> int:
        return self._file.fileno()

    def _read(self, layer: int, target: memoryview, at: int) -> None:
        if self._lost is not None:
            raise StoreError(self._lost)
        read_whole(self._fd, target, self._places[layer] + at, name="the file with the cache", advice=LOST)

    def _write(self, layer: int, source: memoryview, at: int) -> None:
        offset, done = self._places[layer] + at, 0
        try:
            while done < len(source):
                done += os.pwrite(self._fd, source[done:], offset + done)
        except OSError as error:
            self._lost = f"rows of the cache could not be written ({error.strerror}); {LOST}"

    def _clear_if_strange(self, slot: memoryview, block: Block) -> None:
        """Rows that are not filled are masked, but NaN would come through: other layouts make such numbers."""
        address = id(slot.obj)
        if self._laid.get(address, block) != block:
            slot[:] = bytes(len(slot))
        self._laid[address] = block


def _nameless(nbytes: int, kind: str, folder: Path | None) -> BinaryIO:
    """A file of so many bytes that only this process knows of; there is room for all of them."""
    if kind == "cpu":
        where = "memory"
        file: BinaryIO = os.fdopen(memory_file("fxopt cache"), "r+b", buffering=0)
    else:
        parent = default_parent() if folder is None else folder
        where = str(parent)
        try:
            file = tempfile.TemporaryFile(dir=parent, buffering=0)  # noqa: SIM115 - as long as the store  # type: ignore[assignment]
        except OSError as error:
            raise StoreError(
                f"a cache cannot be put into {parent} ({error.strerror or error}); give a folder that can be written "
                'to and has room for it: passes={"offload_kv": {"folder": …}}'
            ) from error
    try:
        reserve(file.fileno(), nbytes)
    except OSError as error:
        file.close()
        why = "there is no room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "room cannot be reserved"
        raise StoreError(
            f"{why} in {where} for a cache of {told(nbytes)} ({error.strerror}). Make room, give another folder "
            '(passes={"offload_kv": {"folder": …}}), or optimise with a smaller max_len'
        ) from error
    return file


def reserve(fd: int, nbytes: int) -> None:
    """Make a file so long, with room for all of it where the system can promise that."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, nbytes)
    else:
        os.ftruncate(fd, nbytes)
