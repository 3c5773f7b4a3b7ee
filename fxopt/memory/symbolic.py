"""Buffers whose sizes depend on shapes, and the one plan that holds for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from fxopt.memory.order import Order
from fxopt.memory.problem import ALIGN, Buffer, Problem
from fxopt.memory.sizes import Size, Sizes

KEPT = 256  # layouts; the least used is forgotten


class Layout(NamedTuple):
    """Where the buffers lie for one choice of shapes."""

    offsets: dict[str, int]
    size: int


@dataclass(frozen=True)
class SymbolicBuffer:
    """A buffer whose bytes are an int or a sympy expression."""

    name: str
    start: int
    end: int
    nbytes: Size
    align: int = ALIGN
    kind: str = "activation"
    padded: bool = True

    def sized(self, nbytes: int) -> Buffer:
        """The buffer for known shapes."""
        return Buffer(self.name, self.start, self.end, nbytes, self.align, self.kind, self.padded)


@dataclass(frozen=True)
class SymbolicProblem:
    """Buffers that share one arena, whatever the shapes are."""

    buffers: tuple[SymbolicBuffer, ...]

    @cached_property
    def sizes(self) -> Sizes:
        return Sizes([buffer.nbytes for buffer in self.buffers])

    def at(self, values: Mapping[str, int]) -> Problem:
        """The problem for these values of the symbols."""
        sizes = self.sizes.at(self.sizes.key(values))
        return Problem(buffer.sized(nbytes) for buffer, nbytes in zip(self.buffers, sizes, strict=True))


class SymbolicPlan:
    """Offsets for any values of the symbols, computed when they are first met: one step for each pair of the order."""

    def __init__(self, problem: SymbolicProblem, order: Order) -> None:
        self.problem, self.order = problem, order
        self._buffers = problem.buffers
        self._upwards = sorted(range(len(self._buffers)), key=lambda number: order.place[self._buffers[number].name])
        self._kept = lru_cache(KEPT)(self._layout)

    def at(self, values: Mapping[str, int]) -> Layout:
        """Where the buffers lie for these values of the symbols."""
        return self._kept(self.problem.sizes.key(values))

    def _layout(self, key: Sequence[int]) -> Layout:
        sizes = self.problem.sizes.at(key)
        upwards = [self._buffers[number].sized(sizes[number]) for number in self._upwards]
        offsets, size = self.order.layout([one.size for one in upwards], [one.align for one in upwards])
        return Layout(dict(zip(self.order.names, offsets, strict=True)), size)
