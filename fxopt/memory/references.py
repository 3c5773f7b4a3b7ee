"""How others place buffers, to compare with: written from what they publish, not from their code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fxopt.memory.greedy import Candidate, Offsets, greedy, height
from fxopt.memory.problem import Buffer, Problem, rounded

BLOCK = 64  # bytes to which the blocks of "itrex" are rounded


def naive(problem: Problem) -> Candidate:
    """One after the other: nothing shares."""
    offsets, top = [], 0
    for buffer in problem.placed:
        offset = rounded(top, buffer.align)
        offsets.append(offset)
        top = offset + buffer.size
    return Candidate(offsets, top, "nothing shares")


def tflite(problem: Problem) -> Candidate:
    """Greedy by size into the smallest gap (Pisarchyk and Lee, 2020, as TensorFlow Lite has it)."""
    offsets = greedy(problem, "size", "best")
    return Candidate(offsets, height(problem, offsets), "greedy by size, best fit")


def itrex(problem: Problem) -> Candidate:
    """Greedy by size over shared blocks, as Intel's static compressed buffer does it.

    The newest block that is large enough and free for the whole lifetime is taken; a block belongs
    to one buffer at a time, so what a small buffer leaves of a large block is lost.
    """
    blocks: list[_Block] = []
    for number in _by_size(problem):
        buffer = problem.placed[number]
        held = (block for block in reversed(blocks) if block.size >= buffer.size and block.is_free(buffer))
        block = next(held, None)
        if block is None:
            block = _Block(rounded(buffer.size, BLOCK))
            blocks.append(block)
        block.put(0, number, buffer)
    return _stacked(problem, blocks, "greedy by size over shared blocks")


def executorch(problem: Problem) -> Candidate:
    """Greedy by size over blocks in which buffers may lie on top of each other, as ExecuTorch does it.

    The oldest block that is free for the whole lifetime is taken from its beginning; failing that, the
    oldest with room above everything that is needed at the same time.
    """
    blocks: list[_Block] = []
    for number in _by_size(problem):
        buffer = problem.placed[number]
        block = next((block for block in blocks if block.is_free(buffer)), None)
        if block is None:
            block = next((block for block in blocks if block.top(buffer) + buffer.size <= block.size), None)
        if block is None:
            block = _Block(buffer.size)
            blocks.append(block)
        block.put(block.top(buffer), number, buffer)
    return _stacked(problem, blocks, "greedy by size over buckets")


@dataclass
class _Block:
    """Bytes of the arena, and which buffer lies where in them."""

    size: int
    held: list[tuple[int, int, Buffer]] = field(default_factory=list)
    align: int = 1

    def put(self, offset: int, number: int, buffer: Buffer) -> None:
        self.held.append((offset, number, buffer))
        self.align = math.lcm(self.align, buffer.align)

    def is_free(self, buffer: Buffer) -> bool:
        return all(other.end <= buffer.start or buffer.end <= other.start for _, _, other in self.held)

    def top(self, buffer: Buffer) -> int:
        """The lowest place above all that is needed at the same time as ``buffer``."""
        tops = (
            offset + other.size
            for offset, _, other in self.held
            if buffer.start < other.end and other.start < buffer.end
        )
        return rounded(max(tops, default=0), buffer.align)


def _by_size(problem: Problem) -> list[int]:
    return sorted(range(len(problem.placed)), key=lambda number: -problem.placed[number].size)


def _stacked(problem: Problem, blocks: list[_Block], maker: str) -> Candidate:
    """The blocks one above the other."""
    offsets: Offsets = [0] * len(problem.placed)
    top = 0
    for block in blocks:
        base = rounded(top, block.align)
        for offset, number, _ in block.held:
            offsets[number] = base + offset
        top = base + block.size
    return Candidate(offsets, top, maker)
