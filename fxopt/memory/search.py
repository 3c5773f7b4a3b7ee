"""Is there a plan of this height? A branch and bound that misses none, in Python.

The idea is Moffitt's (MiniMalloc, ASPLOS 2023, doi 10.1145/3623278.3624752). If there is a plan at all, there
is one in which no buffer can sink any further, and that one can be written down from the bottom up: every
next buffer lies directly on what is below it, and not lower than the buffer before it. So a step of the search
only asks which buffer is the next; where it lies follows. What can be left out:

- a buffer above the whole of another one that is still to be placed: that one could have sunk below it;
- one of two equal buffers while the other is still to be placed;
- everything after a step that leaves some section of time too little room for what is still to be placed there;
- the order of parts that share no section of time: each is solved by itself, once.

``search.cpp`` says the same in C++ and takes the same steps.
"""

from __future__ import annotations

import operator
import time
from bisect import bisect_right
from typing import NamedTuple

from fxopt.memory.instance import Instance
from fxopt.memory.problem import rounded

PLACED = 2**63 - 1  # how low a buffer can lie that has its place


class _Part(NamedTuple):
    """Items that are still to be placed, apart in time from all others."""

    items: list[int]
    floor: int  # none of them lies lower
    last: int  # of those on the floor, the ones up to this were asked before
    parent: _Frame | None  # the choice that made this part: the one to change if the part cannot be placed
    after: _Part | None  # the part that is solved next


class _Frame(NamedTuple):
    """Which item of a part is the next?"""

    part: _Part
    choices: list[int]  # the ones that were not tried yet, the next at the end
    trail: int


class PythonSearch:
    """One search for one capacity; ``run`` goes on where it stopped."""

    def __init__(self, instance: Instance, capacity: int) -> None:
        items = instance.items
        self._items, self._capacity = items, capacity
        self._lowest = [0] * len(items) + [PLACED]  # where each item would lie now
        self._twin = _twins(instance)
        self._beside = instance.beside
        self._total = [0] * instance.sections  # bytes that are still to be placed there
        self._crossing = [0] * instance.sections  # items to be placed that live across the start of a section
        for item in items:
            for section in range(item.low, item.high):
                self._total[section] += item.size
                self._crossing[section] += section > item.low
        self._trail: list[tuple[list[int], int, int]] = []
        self.offsets = [0] * len(items)
        self._frame: _Frame | None = None
        self._found = False
        if max(self._total, default=0) <= capacity:
            cuts = [section for section in range(1, instance.sections) if not self._crossing[section]]
            self._follow(self._split(_Part(list(range(len(items))), 0, -1, None, None), cuts))

    def run(self, steps: int, deadline: float) -> bool | None:
        """Whether there is a plan, or None if that many steps did not show it."""
        while self._frame is not None:
            if self._found or steps == 0 or time.monotonic() > deadline:
                break
            frame = self._frame
            self._undo(frame.trail)
            if not frame.choices:
                self._frame = frame.part.parent
                continue
            steps -= 1
            self._step(frame.part, frame.choices.pop())
        return True if self._found else None if self._frame else False

    def _step(self, part: _Part, chosen: int) -> None:
        item = self._items[chosen]
        offset = self._lowest[chosen]
        if not self._place(chosen, offset):
            return
        rest = [number for number in part.items if number != chosen]
        if not self._can_rest_above(offset, rest):
            return
        cuts = [section for section in range(item.low + 1, item.high) if not self._crossing[section]]
        self._follow(self._split(_Part(rest, offset, chosen, self._frame, part.after), cuts))

    def _place(self, chosen: int, offset: int) -> bool:
        """Put an item where it lies lowest, and lift what lives beside it."""
        item = self._items[chosen]
        top = offset + item.size
        self.offsets[chosen] = offset
        self._set(self._lowest, chosen, PLACED)
        for section in range(item.low, item.high):
            self._set(self._total, section, self._total[section] - item.size)
            if section > item.low:
                self._set(self._crossing, section, self._crossing[section] - 1)
        for number in self._beside[chosen]:
            if self._lowest[number] >= top:
                continue
            other = self._items[number]
            lifted = rounded(top, other.align)
            if lifted + other.size > self._capacity:
                return False
            self._set(self._lowest, number, lifted)
        return True

    def _can_rest_above(self, floor: int, rest: list[int]) -> bool:
        """Whether every section has room for what is to be placed there, now that nothing lies below ``floor``.

        An item that would lie below it has to be lifted by another one, which lies on the floor or higher.
        """
        lowest, items, above = self._lowest, self._items, [self._capacity] * len(self._total)
        first, last = len(above), 0
        for number in rest:
            (start, end, _, align), low = items[number], lowest[number]
            first, last = min(first, start), max(last, end)
            if low < floor:
                supports = [other for other in self._beside[number] if lowest[other] != PLACED]
                if not supports:
                    return False
                low = rounded(min(max(lowest[other], floor) + items[other].size for other in supports), align)
            for section in range(start, end):
                if low < above[section]:
                    above[section] = low
        highest = max(map(operator.add, above[first:last], self._total[first:last]), default=0)
        return highest <= self._capacity

    def _split(self, part: _Part, cuts: list[int]) -> _Part | None:
        """Cut a part at the sections that nothing lives across; what is left to do, small parts first."""
        groups: dict[int, list[int]] = {}
        for number in part.items:
            groups.setdefault(bisect_right(cuts, self._items[number].low) if cuts else 0, []).append(number)
        todo = part.after
        for items in sorted(groups.values(), key=len, reverse=True):
            todo = part._replace(items=items, after=todo)
        return todo

    def _follow(self, part: _Part | None) -> None:
        """Open a part, or be done if there is none left."""
        if part is None:
            self._found = True
            return
        lowest = self._lowest
        ceiling = min(lowest[number] + self._items[number].size for number in part.items)
        choices = [
            number
            for number in part.items
            if part.floor <= lowest[number] < ceiling
            and (lowest[number] > part.floor or number > part.last)
            and lowest[self._twin[number]] == PLACED
        ]
        choices.sort(key=lowest.__getitem__)
        choices.reverse()
        self._frame = _Frame(part, choices, len(self._trail))

    def _set(self, numbers: list[int], place: int, value: int) -> None:
        self._trail.append((numbers, place, numbers[place]))
        numbers[place] = value

    def _undo(self, length: int) -> None:
        while len(self._trail) > length:
            numbers, place, value = self._trail.pop()
            numbers[place] = value


def _twins(instance: Instance) -> list[int]:
    """For each item the one before it that is equal, or the place behind the last item."""
    seen: dict[object, int] = {}
    twins = []
    for number, item in enumerate(instance.items):
        twins.append(seen.get(item, len(instance.items)))
        seen[item] = number
    return twins
