"""One plan for every size: not where buffers lie, but which lies below which.

Two buffers that are needed at the same time never share bytes if one is said to lie below the other. Sizes then
give the offsets: a buffer lies on the highest of what is below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fxopt.memory.errors import PlanError
from fxopt.memory.planner import Plan
from fxopt.memory.problem import Buffer, Problem, overlapping, rounded


@dataclass(frozen=True)
class Order:
    """Buffers from the bottom up, and of each the ones that it lies on, by their place in ``names``."""

    names: tuple[str, ...]
    below: tuple[tuple[int, ...], ...]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Every "this below that"."""
        return [(self.names[low], name) for name, lows in zip(self.names, self.below, strict=True) for low in lows]

    @cached_property
    def place(self) -> dict[str, int]:
        """Where each buffer stands in ``names``."""
        return {name: place for place, name in enumerate(self.names)}

    def layout(self, sizes: Sequence[int], aligns: Sequence[int]) -> tuple[list[int], int]:
        """Offsets and arena for sizes and alignments, all in the order of ``names``; linear in the pairs."""
        tops: list[int] = []
        offsets: list[int] = []
        for size, align, lows in zip(sizes, aligns, self.below, strict=True):
            under = max([tops[low] for low in lows], default=0)
            offset = rounded(under, align) if size else under  # without bytes there is nothing to align
            offsets.append(offset)
            tops.append(offset + size)
        return offsets, max(tops, default=0)

    def plan(self, problem: Problem) -> Plan:
        """The plan for other sizes of the same buffers."""
        named = {buffer.name: buffer for buffer in problem.buffers}
        buffers = [named[name] for name in self.names]
        offsets, size = self.layout([buffer.size for buffer in buffers], [buffer.align for buffer in buffers])
        lying = {buffer.name: offset for buffer, offset in zip(buffers, offsets, strict=True) if buffer.size}
        return Plan(problem, lying, size, problem.lower_bound, "order")


def order_of(plan: Plan) -> Order:
    """What lies below what in this plan. Buffers that have no bytes in it lie on top of all others."""
    buffers = plan.problem.buffers
    upwards = sorted(range(len(buffers)), key=lambda number: plan.offsets.get(buffers[number].name, plan.size))
    place = {number: place for place, number in enumerate(upwards)}
    lows: list[set[int]] = [set() for _ in buffers]
    for one, other in overlapping(buffers):
        low, high = sorted((place[one], place[other]))
        lows[high].add(low)
    return Order(tuple(buffers[number].name for number in upwards), tuple(_needed(lows)))


def order_from(pairs: Sequence[tuple[str, str]], buffers: Sequence[Buffer]) -> Order:
    """An order that somebody wrote down, checked: no circles, and every two buffers that meet are kept apart."""
    lows: dict[str, set[str]] = {buffer.name: set() for buffer in buffers}
    for low, high in pairs:
        for name in (low, high):
            if name not in lows:
                raise PlanError(f"the order speaks of {name}, and there is no such buffer")
        lows[high].add(low)
    names = _upwards(lows)
    place = {name: number for number, name in enumerate(names)}
    order = Order(tuple(names), tuple(tuple(sorted(place[low] for low in lows[name])) for name in names))
    _check_apart(order, buffers)
    return order


def _needed(lows: list[set[int]]) -> list[tuple[int, ...]]:
    """Without the pairs that follow from others: below something that is itself below, and meets both."""
    needed = []
    for under in lows:
        kept: list[int] = []
        for low in sorted(under, reverse=True):
            if not any(low in lows[other] for other in kept):
                kept.append(low)
        needed.append(tuple(sorted(kept)))
    return needed


def _upwards(lows: Mapping[str, set[str]]) -> list[str]:
    """The names from the bottom up, or a sentence that names one of a circle."""
    left = {name: len(under) for name, under in lows.items()}
    highs: dict[str, list[str]] = {name: [] for name in lows}
    for name, under in lows.items():
        for low in under:
            highs[low].append(name)
    ready = [name for name, count in left.items() if not count]
    for name in ready:
        for high in highs[name]:
            left[high] -= 1
            if not left[high]:
                ready.append(high)
    if len(ready) < len(lows):
        name, walked = next(name for name, count in left.items() if count), set[str]()
        while name not in walked:
            walked.add(name)
            name = next(low for low in sorted(lows[name]) if left[low])
        raise PlanError(f"the order runs in a circle: {name} lies below itself")
    return ready


def _check_apart(order: Order, buffers: Sequence[Buffer]) -> None:
    """Raise unless of every two buffers that meet one is, directly or not, below the other."""
    under: list[int] = []  # of each buffer, the set of all below it as bits
    for lows in order.below:
        bits = 0
        for low in lows:
            bits |= under[low] | 1 << low
        under.append(bits)
    for one, other in overlapping(tuple(buffers)):
        a, b = sorted((order.place[buffers[one].name], order.place[buffers[other].name]))
        if not under[b] >> a & 1:
            raise PlanError(
                f"the order does not say which of {order.names[a]} and {order.names[b]} lies below the other, "
                "and both are needed at the same time"
            )
