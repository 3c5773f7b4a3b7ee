"""A problem as the search sees it: time cut into sections, buffers in the order in which they are tried."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from fxopt.memory.greedy import Offsets
from fxopt.memory.problem import Problem

#: What is tried first: large size^a · width^b · total^c, total being the most bytes that live beside a buffer.
#: No order is good for every problem, so all of them are followed in turn.
PREFERENCES = (
    (1.0, 1.5, 1.0),
    (1.0, 1.0, 1.0),
    (0.01, 1.0, 1000.0),
    (1.0, 0.5, 1.0),
    (1.0, 0.0, 0.0),
    (0.01, 1.0, 0.0),
    (0.01, 1.0, 20.0),
)


class Item(NamedTuple):
    """A buffer that lives in the sections ``low`` up to, and without, ``high``."""

    low: int
    high: int
    size: int
    align: int


class Instance(NamedTuple):
    """Items in the order of one preference, and their numbers in the problem."""

    items: tuple[Item, ...]
    numbers: tuple[int, ...]
    beside: tuple[tuple[int, ...], ...]  # for each item, those that are needed at the same time
    sections: int

    def in_problem(self, offsets: Offsets) -> Offsets:
        """Offsets of the items as offsets of the problem's buffers."""
        found = [0] * len(offsets)
        for number, offset in zip(self.numbers, offsets, strict=True):
            found[number] = offset
        return found


def instances(problem: Problem) -> Iterator[Instance]:
    """The problem once for each preference."""
    totals = [nbytes for _, nbytes in problem.live]
    section = {time: number for number, (time, _) in enumerate(problem.live)}
    items = [Item(section[b.start], section[b.end], b.size, b.align) for b in problem.placed]
    logs = [
        (math.log(item.size), math.log(item.high - item.low), math.log(max(totals[item.low : item.high])))
        for item in items
    ]
    for preference in PREFERENCES:
        weights = [-sum(power * log for power, log in zip(preference, row, strict=True)) for row in logs]
        numbers = tuple(sorted(range(len(items)), key=weights.__getitem__))
        rank = {number: place for place, number in enumerate(numbers)}
        beside = tuple(tuple(rank[other] for other in problem.conflicts[number]) for number in numbers)
        yield Instance(tuple(items[number] for number in numbers), numbers, beside, len(totals))


def unit(problem: Problem) -> int:
    """A number of which the height of every plan without needless gaps is a multiple."""
    common = math.gcd(*(buffer.size for buffer in problem.placed))
    aligns = {buffer.align for buffer in problem.placed}
    while (finer := math.gcd(common, *(align for align in aligns if common % align))) != common:
        common = finer
    return common
