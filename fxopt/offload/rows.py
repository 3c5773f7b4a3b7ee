"""Rows of a cache in a file: what is filled is read into a slot, and the new rows of a layer are written behind it.

a layer's block, in the file and in a slot:  | strip 0 of K | strip 1 of K | … | strip 0 of V | …
a strip, one head of one sequence:           | row 0 | row 1 | … | row capacity - 1 |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fxopt.offload.row_file import RowFile

ALIGN = 64  # where a buffer begins in its block


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


class RowBlocks:
    """What there is of the rows of some layers, wherever they lie.

    Only ``sequences`` of a block are in use, and of each layer as many rows as were put there.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = tuple(blocks)
        self.nbytes = sum(block.nbytes for block in blocks)
        self.sequences = 0
        self.filled = [0] * len(blocks)
        self._places = [sum(block.nbytes for block in self.blocks[:turn]) for turn in range(len(blocks))]
        self._laid: dict[int, Block] = {}  # what lies in each slot, by its address

    def begin(self, sequences: int) -> None:
        """Be empty, for so many sequences."""
        self.sequences = sequences
        self.filled = [0] * len(self.blocks)

    def crop(self, rows: int) -> None:
        """Have no more than so many."""
        self.filled = [min(rows, filled) for filled in self.filled]

    def _is_strange(self, slot: int, block: Block) -> bool:
        """Whether a slot, by its address, held another layout so far.

        Rows that are not filled are masked, but NaN would come through: other layouts make such numbers.
        """
        before, self._laid[slot] = self._laid.get(slot, block), block
        return before != block


class RowStore(RowBlocks):
    """The blocks of some layers in a file. ``kind`` is "disk", or "cpu" for a file in memory."""

    def __init__(self, blocks: Sequence[Block], kind: str, folder: Path | None = None) -> None:
        super().__init__(blocks)
        self._file = RowFile(self.nbytes, kind, folder)

    def begin(self, sequences: int) -> None:
        super().begin(sequences)
        self._file.lost = None

    def pretend(self, rows: int) -> None:
        """Have so many rows of zeros, written: what never was is read without a look at the disk."""
        for place, block in zip(self._places, self.blocks, strict=True):
            for number in range(len(block.buffers)):
                for at, nbytes in block.runs(number, self.sequences, 0, rows):
                    self._file.write_zeros(place + at, nbytes)
        self._file.flush()
        self.filled = [rows] * len(self.blocks)

    def fill(self, layer: int, slot: memoryview) -> int:
        """Put the rows of a layer that are there where it will read them; returns the bytes."""
        block, rows = self.blocks[layer], self.filled[layer]
        if self._is_strange(id(slot.obj), block):
            slot[:] = bytes(len(slot))
        for number in range(len(block.buffers)):
            for at, nbytes in block.runs(number, self.sequences, 0, rows):
                self._read(layer, slot[at : at + nbytes], at)
        self._file.forget(self._places[layer], block.nbytes)
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
        self._file.check()

    def close(self) -> None:
        self._file.close()

    def _read(self, layer: int, target: memoryview, at: int) -> None:
        self._file.read(target, self._places[layer] + at)

    def _write(self, layer: int, source: memoryview, at: int) -> None:
        self._file.write(source, self._places[layer] + at)
