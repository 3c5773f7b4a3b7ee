"""What has to be placed: buffers with lifetimes and bytes. Integers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from fxopt.errors import InvalidRequestError

ALIGN = 64  # bytes: a cache line, and what vector code on CPUs asks for
MOST_BYTES = 2**62  # all buffers together; the compiled search counts in 64 bits


@dataclass(frozen=True)
class Buffer:
    """Bytes that are needed from step ``start`` up to, and without, step ``end``."""

    name: str
    start: int
    end: int
    nbytes: int
    align: int = ALIGN
    kind: str = "activation"  # what it holds, for people
    padded: bool = True  # whether its bytes are rounded up to its alignment, not only its offset

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise InvalidRequestError(f"a buffer is named {self.name!r}; a name is a text with something in it")
        for field in ("start", "end", "nbytes", "align"):
            if type(value := getattr(self, field)) is not int:
                raise InvalidRequestError(f"{self.name}: {field} is {value!r}; give a whole number")
        if self.end <= self.start:
            raise InvalidRequestError(
                f"{self.name} lives from {self.start} up to {self.end}, which is no time; "
                f"a value that nobody reads lives for the step that makes it, up to {self.start + 1}"
            )
        if self.nbytes < 0:
            raise InvalidRequestError(f"{self.name} has {self.nbytes} bytes; give 0 or more")
        if self.align < 1:
            raise InvalidRequestError(f"{self.name} is aligned to {self.align} bytes; give 1 or more")

    @property
    def size(self) -> int:
        """The bytes that it takes of an arena."""
        return rounded(self.nbytes, self.align) if self.padded else self.nbytes

    @property
    def duration(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Problem:
    """Buffers that share one arena. Those without bytes need no place in it."""

    buffers: tuple[Buffer, ...]

    def __init__(self, buffers: Iterable[Buffer]) -> None:
        object.__setattr__(self, "buffers", tuple(buffers))
        twice = [name for name, count in Counter(buffer.name for buffer in self.buffers).items() if count > 1]
        if twice:
            raise InvalidRequestError(f"{twice[0]} is there twice; every buffer needs a name of its own")
        if self.naive >= MOST_BYTES:
            raise InvalidRequestError(f"the buffers have {self.naive:,} bytes; less than {MOST_BYTES:,} can be planned")

    @cached_property
    def placed(self) -> tuple[Buffer, ...]:
        """The buffers that need a place."""
        return tuple(buffer for buffer in self.buffers if buffer.size)

    @cached_property
    def live(self) -> tuple[tuple[int, int], ...]:
        """The steps at which something is born or dies, each with the bytes that are needed from then on."""
        change: Counter[int] = Counter()
        for buffer in self.placed:
            change[buffer.start] += buffer.size
            change[buffer.end] -= buffer.size
        times = sorted(change)
        return tuple(zip(times, accumulate(change[time] for time in times), strict=True))

    @cached_property
    def lower_bound(self) -> int:
        """The most bytes that are needed at once: no arena is smaller."""
        return max((nbytes for _, nbytes in self.live), default=0)

    @cached_property
    def naive(self) -> int:
        """The bytes of an arena in which nothing shares."""
        return sum(buffer.size for buffer in self.buffers)

    @cached_property
    def conflicts(self) -> tuple[tuple[int, ...], ...]:
        """For each placed buffer, the numbers of those that are needed at the same time."""
        found: list[list[int]] = [[] for _ in self.placed]
        for one, other in overlapping(self.placed):
            found[one].append(other)
            found[other].append(one)
        return tuple(map(tuple, found))


def overlapping(buffers: tuple[Buffer, ...]) -> Iterator[tuple[int, int]]:
    """The numbers of every two buffers that are needed at the same time."""
    living: list[int] = []
    for number in sorted(range(len(buffers)), key=lambda number: buffers[number].start):
        living = [other for other in living if buffers[other].end > buffers[number].start]
        yield from ((other, number) for other in living)
        living.append(number)


def rounded(number: int, multiple: int) -> int:
    """``number``, or the next multiple above it."""
    return -(-number // multiple) * multiple
