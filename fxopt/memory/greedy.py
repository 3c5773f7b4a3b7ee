"""One buffer after the other, each into a gap between those that are placed: a dozen plans, and the best."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fxopt.memory.problem import Problem, rounded

Offsets = list[int]  # of the placed buffers, in their order

#: What is placed first; Python's sort keeps what is equal as it was.
ORDERS: dict[str, Callable[[Problem, int], Any]] = {
    "size": lambda problem, number: -problem.placed[number].size,
    "conflicts": lambda problem, number: -len(problem.conflicts[number]),
    "duration": lambda problem, number: -problem.placed[number].duration,
    "area": lambda problem, number: -problem.placed[number].size * problem.placed[number].duration,
    "chronological": lambda problem, number: problem.placed[number].start,
    "size+duration": lambda problem, number: (-problem.placed[number].size, -problem.placed[number].duration),
}
FITS = ("best", "first")


class Candidate(NamedTuple):
    """Offsets, and who thought of them."""

    offsets: Offsets
    size: int
    maker: str


def portfolio(problem: Problem) -> Candidate:
    """The smallest of the dozen; the first that reaches the lower bound ends the search."""
    best: Candidate | None = None
    for candidate in candidates(problem):
        if best is None or candidate.size < best.size:
            best = candidate
        if best.size == problem.lower_bound:
            break
    assert best is not None
    return best


def candidates(problem: Problem) -> Iterator[Candidate]:
    """Every order with every way to choose a gap."""
    for order in ORDERS:
        for fit in FITS:
            offsets = greedy(problem, order, fit)
            yield Candidate(offsets, height(problem, offsets), f"greedy by {order}, {fit} fit")


def greedy(problem: Problem, order: str, fit: str) -> Offsets:
    """Place in this order, each buffer into the lowest gap ("first") or the smallest that holds it ("best")."""
    key = ORDERS[order]
    offsets: list[int | None] = [None] * len(problem.placed)
    for number in sorted(range(len(problem.placed)), key=lambda number: key(problem, number)):
        buffer = problem.placed[number]
        taken = sorted(
            (offset, offset + problem.placed[other].size)
            for other in problem.conflicts[number]
            if (offset := offsets[other]) is not None
        )
        offsets[number] = _gap(taken, buffer.size, buffer.align, fit)
    return [offset for offset in offsets if offset is not None]


def height(problem: Problem, offsets: Offsets) -> int:
    """The bytes of the arena that these offsets need."""
    return max((offset + buffer.size for offset, buffer in zip(offsets, problem.placed, strict=True)), default=0)


def _gap(taken: list[tuple[int, int]], size: int, align: int, fit: str) -> int:
    """Where to put ``size`` bytes beside what is taken, which is sorted."""
    best, room = None, 0
    top = 0
    for low, high in taken:
        offset = rounded(top, align)
        if offset + size <= low and (best is None or low - offset < room):
            best, room = offset, low - offset
            if fit == "first":
                break
        top = max(top, high)
    return rounded(top, align) if best is None else best
