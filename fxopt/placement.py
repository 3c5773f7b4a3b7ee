"""Where the compiled code of one piece keeps what it computes; written into the code itself.

The code may come out of a compiler's cache, long after it was planned. What the plan was is
therefore a comment in it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from fxopt.memory import Buffer, Plan, Problem

MARK = "# fxopt arena: "


@dataclass(frozen=True)
class PlacedBuffer:
    """A buffer of the compiled code at the largest of the planned shapes."""

    name: str
    start: int
    end: int
    nbytes: int
    offset: int
    shape: str
    layer: int | None
    source: str  # modeling_llama.py:284


@dataclass(frozen=True)
class Placement:
    """The arena of one piece."""

    arena: int
    lower_bound: int
    buffers: tuple[PlacedBuffer, ...]

    @property
    def plan(self) -> Plan:
        """The same for the planner's tools."""
        problem = Problem(Buffer(one.name, one.start, one.end, one.nbytes) for one in self.buffers)
        offsets = {one.name: one.offset for one in self.buffers if one.nbytes}
        return Plan(problem, offsets, self.arena, self.lower_bound, "order")

    def comment(self) -> str:
        """One line of Python that says nothing to Python."""
        return MARK + json.dumps(asdict(self))


@dataclass(frozen=True)
class ArenaUse:
    """What one graph keeps in memory while it runs: an arena, and what its pieces hand to each other."""

    pieces: tuple[Placement | None, ...]  # of each that is another; None where the compiler placed the buffers itself
    runs: tuple[int, ...]  # how often each piece runs: once for every layer that is like it
    handed_on: int  # bytes, at most; the result of the graph is in it

    @property
    def placed(self) -> tuple[Placement, ...]:
        return tuple(piece for piece in self.pieces if piece is not None)

    @property
    def arena(self) -> int:
        """The bytes that hold whichever piece is running."""
        return max((piece.arena for piece in self.placed), default=0)

    @property
    def lower_bound(self) -> int:
        return max((piece.lower_bound for piece in self.placed), default=0)


def placement(code: str) -> Placement | None:
    """What the comment in the generated code of a piece says; None if its buffers were not placed."""
    lines = (line.strip() for line in code.splitlines())
    return next((_read(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)), None)


def _read(text: str) -> Placement:
    data = json.loads(text)
    data["buffers"] = tuple(PlacedBuffer(**one) for one in data["buffers"])
    return Placement(**data)
