"""Delta debugging: the smallest part of a list that still makes something fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

Item = TypeVar("Item")


def smallest(items: Sequence[Item], fails: Callable[[Sequence[Item]], bool]) -> list[Item]:
    """A part of ``items`` that fails while every part with one item less does not.

    ``items`` as a whole is known to fail. A single culprit is found in about 2 log2(n) trials.
    """
    found = list(items)
    parts = 2
    while len(found) > 1:
        pieces = _split(found, parts)
        rests = [[item for other in pieces if other is not piece for item in other] for piece in pieces]
        failing = next((part for part in (*pieces, *(rests if parts > 2 else ())) if fails(part)), None)
        if failing is not None:
            parts = 2 if len(failing) <= len(pieces[0]) else max(parts - 1, 2)
            found = failing
        elif parts >= len(found):
            break
        else:
            parts = min(2 * parts, len(found))
    return found


def _split(items: list[Item], parts: int) -> list[list[Item]]:
    """As even as it gets, none empty."""
    borders = [len(items) * i // parts for i in range(parts + 1)]
    return [items[start:end] for start, end in pairwise(borders) if end > start]
