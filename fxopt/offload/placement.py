"""Which layers stay and which are streamed, from a budget or a share.

Streamed layers are spread evenly: then a reader that is as fast as the layers between two of them
is never waited for. Two slots are enough for that; tests compare with every other choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from fxopt.errors import InvalidRequestError
from fxopt.offload.amounts import told

SLOTS = 2  # one is read from while the other is filled
MOST_SLOTS = 4  # that are taken without being asked for


@dataclass(frozen=True)
class Placement:
    """Where each layer lies, and how many slots there are for those that are streamed."""

    sizes: tuple[int, ...]  # bytes of each layer
    fixed: int  # bytes of what belongs to no layer, or to several
    offloaded: tuple[int, ...]  # layers, in order
    slots: int

    @property
    def resident(self) -> tuple[int, ...]:
        """The layers that stay."""
        return tuple(layer for layer in range(len(self.sizes)) if layer not in self._streamed)

    @property
    def slot_bytes(self) -> int:
        return max((self.sizes[layer] for layer in self.offloaded), default=0)

    @property
    def moved(self) -> int:
        """Bytes that one step reads from the store."""
        return sum(self.sizes[layer] for layer in self.offloaded)

    @property
    def device_bytes(self) -> int:
        """What is taken on the device: by all that stays, and by the ring."""
        return self.fixed + sum(self.sizes) - self.moved + self.slots * self.slot_bytes

    def ahead(self, layer: int) -> tuple[int, bool]:
        """What is read into the slot of a streamed layer that has run, and whether it is for the next step."""
        later = self.offloaded.index(layer) + self.slots
        return self.offloaded[later % len(self.offloaded)], later >= len(self.offloaded)

    @property
    def longest_run(self) -> int:
        """The most streamed layers behind each other; the last layer is followed by the first."""
        return _longest_run(len(self.sizes), self._streamed)

    @cached_property
    def _streamed(self) -> frozenset[int]:
        return frozenset(self.offloaded)


def place(
    sizes: Sequence[int],
    fixed: int = 0,
    *,
    budget: int | None = None,
    resident: float | None = None,
    depth: int | None = None,
) -> Placement:
    """Choose the layers that are streamed.

    With ``budget`` as few bytes as possible are streamed, so that what stays and the ring take at most
    so many bytes. With ``resident`` at least that share of the layers stays. ``depth`` is the number of
    slots; left open there are two, and one for each layer of the longest run where there is room.
    """
    _check(sizes, budget, resident, depth)
    layers = len(sizes)
    if resident is not None:
        few = spread(range(layers), layers - math.ceil(resident * layers - 1e-9))
        made = Placement(tuple(sizes), fixed, few, min(depth or SLOTS, len(few)))
        return made if depth is not None else _roomier(made, None)
    assert budget is not None
    if fixed + sum(sizes) <= budget:
        return Placement(tuple(sizes), fixed, (), 0)
    for slots in (depth,) if depth is not None else (SLOTS, 1):
        fitting = [made for made in _candidates(sizes, fixed, slots) if made.device_bytes <= budget]
        if fitting:
            best = min(fitting, key=lambda made: (made.moved, made.slot_bytes, made.offloaded))
            return best if depth is not None else _roomier(best, budget)
    raise InvalidRequestError(_too_small(sizes, fixed, budget, depth))


def spread(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """As many of the layers, with as many others between each two of them as can be."""
    return tuple(layers[(2 * turn + 1) * len(layers) // (2 * count)] for turn in range(count))


def smallest_budget(sizes: Sequence[int], fixed: int, slots: int) -> int:
    """The fewest bytes with which ``slots`` slots can be had."""
    return min(made.device_bytes for made in _candidates(sizes, fixed, slots))


def _candidates(sizes: Sequence[int], fixed: int, slots: int) -> Iterator[Placement]:
    """Any number of layers up to each size; a layer that is larger than a slot has to stay."""
    for largest in sorted(set(sizes)):
        able = [layer for layer, size in enumerate(sizes) if size <= largest]
        for count in range(1, len(able) + 1):
            yield Placement(tuple(sizes), fixed, spread(able, count), min(slots, count))


def _roomier(made: Placement, budget: int | None) -> Placement:
    """The same layers, with a slot for each of the longest run where there is room for it."""
    wanted = min(made.longest_run, MOST_SLOTS) if made.resident else made.slots
    more = (Placement(made.sizes, made.fixed, made.offloaded, slots) for slots in range(wanted, made.slots, -1))
    return next((one for one in more if budget is None or one.device_bytes <= budget), made)


def _longest_run(layers: int, streamed: frozenset[int]) -> int:
    if len(streamed) == layers:
        return layers
    run = longest = 0
    for turn in range(2 * layers):
        run = run + 1 if turn % layers in streamed else 0
        longest = max(longest, run)
    return longest


def _check(sizes: Sequence[int], budget: int | None, resident: float | None, depth: int | None) -> None:
    if not sizes or min(sizes) < 1:
        raise InvalidRequestError("there is no layer that could be moved")
    if (budget is None) == (resident is None):
        raise InvalidRequestError("give either a budget in bytes, or the share of layers that is to stay (resident)")
    if resident is not None and not 0 <= resident <= 1:
        raise InvalidRequestError(f"resident={resident} is no share of the layers; give a number from 0 to 1")
    if depth is not None and depth < 1:
        raise InvalidRequestError(f"depth={depth} is too small; one slot is needed, and two to read while computing")


def _too_small(sizes: Sequence[int], fixed: int, budget: int, depth: int | None) -> str:
    slots = depth if depth is not None else 1
    least = smallest_budget(sizes, fixed, slots)
    sentence = (
        f"budget={told(budget)} holds less than what always stays ({told(fixed)} that no single layer owns) and "
        f"{slots} slot{'s' * (slots > 1)} of a layer ({told(min(sizes))} to {told(max(sizes))}); "
        f"give at least {least:,} bytes"
    )
    if slots > 1 and (one := smallest_budget(sizes, fixed, 1)) < least:
        sentence += f", or depth=1 and {one:,}"
    return sentence
