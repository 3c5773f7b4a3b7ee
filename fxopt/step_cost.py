"""What one decode step costs on a graph: kernels, bytes and operations, counted without running it.

Run as it stands, every kernel is a launch, reads its operands from memory and writes its results there.
Inductor joins the loops between two calls of a library into one launch: what only they use never lies
in memory, and what they read is read once.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from fxopt.joining import Group, apart, joined
from fxopt.kernels import Kernel, Kind, Memory, Step, kernels_of
from fxopt.outline import pieces
from fxopt.program import Program


@dataclass(frozen=True)
class StepCost:
    """One step that feeds one token to each sequence of a batch."""

    launches: int  # kernels launched
    weight_bytes: int  # weights read
    kv_read_bytes: int  # cache rows read
    kv_written_bytes: int  # cache rows written
    copied_bytes: int  # written by ops that only move data
    moved_bytes: int  # everything read and written
    flops: int
    peak_bytes: int  # most activation memory alive at once


def step_cost(program: Program, *, batch: int = 1, context: int) -> StepCost:
    """The cost of a step after which ``context`` rows of the cache are filled."""
    step = kernels_of(program, batch, context)
    groups = _groups(program, step.kernels)
    lives = _Lives(groups, step)
    read = {kind: 0 for kind in Kind}
    written = {kind: 0 for kind in Kind}
    for group in groups:
        for memory, nbytes in lives.read(group).items():
            read[memory.kind] += nbytes
        for memory, nbytes in lives.written(group).items():
            written[memory.kind] += nbytes
    return StepCost(
        launches=sum(not group.fused or bool(lives.written(group)) for group in groups),
        weight_bytes=read[Kind.WEIGHT],
        kv_read_bytes=read[Kind.CACHE],
        kv_written_bytes=written[Kind.CACHE],
        copied_bytes=sum(sum(lives.written(group, copies_alone=True).values()) for group in groups),
        moved_bytes=sum(read.values()) + sum(written.values()),
        flops=sum(kernel.launch.flops for kernel in step.kernels),
        peak_bytes=lives.peak(),
    )


def _groups(program: Program, kernels: list[Kernel]) -> list[Group]:
    """What is launched. Pieces that are compiled by themselves are never joined."""
    if program.facts.backend != "inductor":
        return apart(kernels)
    if not program.facts.layered:
        return joined(kernels)
    piece = {node: place for place, nodes in enumerate(pieces(program, layered=True)) for node in nodes}
    by_piece: dict[int, list[Kernel]] = defaultdict(list)
    for kernel in kernels:
        by_piece[piece[kernel.node] if kernel.node is not None else 0].append(kernel)
    groups = [group for _, part in sorted(by_piece.items()) for group in joined(part)]
    return [replace(group, place=place) for place, group in enumerate(groups)]


class _Lives:
    """From which group to which each memory is needed."""

    def __init__(self, groups: list[Group], step: Step) -> None:
        self._groups = groups
        self._first_write: dict[Memory, int] = {}
        self._last_read: dict[Memory, int] = {}
        for group in groups:
            for kernel in group.kernels:
                self._last_read.update({memory: group.place for memory, _, _ in kernel.reads()})
                for memory, _ in kernel.writes():
                    self._first_write.setdefault(memory, group.place)
        self._last_read.update({memory: len(groups) for memory in step.kept})

    def read(self, group: Group) -> dict[Memory, int]:
        """Bytes that come from memory, each window once."""
        windows: dict[Memory, dict[object, int]] = defaultdict(dict)
        for kernel in group.kernels:
            for memory, window, nbytes in kernel.reads():
                if self._lies_in_memory_before(memory, group):
                    windows[memory][window] = max(nbytes, windows[memory].get(window, 0))
        return {memory: min(sum(parts.values()), memory.nbytes) for memory, parts in windows.items()}

    def written(self, group: Group, *, copies_alone: bool = False) -> dict[Memory, int]:
        """Bytes that go to memory."""
        written: dict[Memory, int] = defaultdict(int)
        for kernel in group.kernels:
            for memory, nbytes in kernel.writes():
                if self._lies_in_memory_after(memory, group) and (kernel.launch.copies or not copies_alone):
                    written[memory] = min(written[memory] + nbytes, memory.nbytes)
        return written

    def peak(self) -> int:
        """Most bytes of activations that lie in memory at once."""
        changes = [0] * (len(self._groups) + 2)
        for memory, first in self._first_write.items():
            if memory.kind is Kind.ACTIVATION and self._lies_in_memory_after(memory, self._groups[first]):
                last = max(first, self._last_read.get(memory, 0))
                changes[first] += memory.nbytes
                changes[last + 1] -= memory.nbytes
        alive, most = 0, 0
        for change in changes:
            alive += change
            most = max(most, alive)
        return most

    def _lies_in_memory_before(self, memory: Memory, group: Group) -> bool:
        made_elsewhere = self._first_write.get(memory, -1) < group.place
        return memory.kind is not Kind.ACTIVATION or made_elsewhere or not group.fused

    def _lies_in_memory_after(self, memory: Memory, group: Group) -> bool:
        needed_later = self._last_read.get(memory, -1) > group.place
        return memory.kind is not Kind.ACTIVATION or needed_later or not group.fused
