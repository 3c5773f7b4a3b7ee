"""Is a plan right? Asked of the bare buffers, by other means than any solver uses."""

from __future__ import annotations

from collections.abc import Mapping

from fxopt.memory.errors import PlanError
from fxopt.memory.problem import Buffer, Problem


def verify(problem: Problem, offsets: Mapping[str, int], size: int) -> None:
    """Raise a sentence that names the buffers, unless an arena of ``size`` bytes holds all of them apart."""
    named = {buffer.name: buffer for buffer in problem.buffers}
    if strange := sorted(set(offsets) - set(named)):
        raise PlanError(f"the plan has a place for {strange[0]}, and the problem has no such buffer")
    for buffer in problem.buffers:
        if buffer.nbytes:
            _check_place(buffer, offsets.get(buffer.name), size)
    # From the lowest up: what lies above the end of a buffer, and all after it, cannot share bytes with it.
    upwards = sorted((offset, name) for name, offset in offsets.items() if named[name].nbytes)
    for place, (low, name) in enumerate(upwards):
        one, end = named[name], low + _bytes(named[name])
        for offset, other in upwards[place + 1 :]:
            if offset >= end:
                break
            two = named[other]
            if one.start < two.end and two.start < one.end:
                raise PlanError(
                    f"{_seen(one, low)} and {_seen(two, offset)} are needed at the same time and share bytes; "
                    "one of them has to lie elsewhere"
                )


def _check_place(buffer: Buffer, offset: int | None, size: int) -> None:
    if offset is None:
        raise PlanError(f"{buffer.name} has {buffer.nbytes:,} bytes and no place; give it an offset")
    if type(offset) is not int or offset < 0:
        raise PlanError(f"{buffer.name} lies at {offset!r}; an offset is a whole number, and not negative")
    if offset % buffer.align:
        raise PlanError(f"{buffer.name} lies at {offset:,}, which is no multiple of its alignment {buffer.align}")
    if offset + _bytes(buffer) > size:
        raise PlanError(f"{_seen(buffer, offset)} ends outside the arena, which has {size:,} bytes")


def _bytes(buffer: Buffer) -> int:
    padding = -buffer.nbytes % buffer.align if buffer.padded else 0
    return buffer.nbytes + padding


def _seen(buffer: Buffer, offset: int) -> str:
    life = f"steps {buffer.start} to {buffer.end}"
    return f"{buffer.name} (bytes {offset:,} to {offset + _bytes(buffer):,}, {life})"
