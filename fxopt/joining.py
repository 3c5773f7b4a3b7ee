"""Which kernels Inductor makes one launch of on a CPU.

What it has no library call for it writes as loops, and it joins loops that follow each other. Before
that it moves each op right before the first that needs it, and what can be computed element by element
into the loop that reads it. Measured on compiled graphs; its own patterns, such as the one that finds
attention written out by hand, are not modelled.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from fxopt.kernels import Kernel, Memory
from fxopt.launches import EXPERT_PRODUCTS, FLOPS_PER_ELEMENT, Launch, op_name

#: Inductor sorts on a CPU by calling the library, without listing that among its fallbacks.
_SORTS = frozenset({"sort", "topk"})
#: On a CPU Inductor begins a new kernel when one has more arguments.
_MOST_ARGUMENTS = 500
#: What lies in memory between the loops of one op: a softmax has its maximum and its sum.
_INNER_RESULTS = {"_softmax": 2, "_safe_softmax": 2, "_log_softmax": 2}
_COMPUTED_AS_A_WHOLE = frozenset({"cat", *FLOPS_PER_ELEMENT})


@dataclass(frozen=True)
class Group:
    """Kernels that run as one launch."""

    place: int  # among all groups
    kernels: list[Kernel]
    fused: bool


def apart(kernels: list[Kernel]) -> list[Group]:
    """Every kernel by itself, in the order of the graph."""
    return [Group(place, [kernel], fused=False) for place, kernel in enumerate(kernels)]


def joined(kernels: list[Kernel]) -> list[Group]:
    """Loops that come one behind the other as one launch, in the order that Inductor chooses."""
    groups: list[Group] = []
    arguments: set[object] = set()
    inlined: set[Memory] = set()
    for kernel in _ordered(kernels):
        fused = is_loop(kernel.launch)
        if not (fused and groups and groups[-1].fused) or _is_full(groups[-1], arguments):
            groups.append(Group(len(groups), [], fused))
            arguments.clear()
            inlined.clear()
        groups[-1].kernels.append(kernel)
        if _waits(kernel.launch):
            inlined.update(memory for memory, _ in kernel.writes())
        arguments.update(_arguments(kernel, inlined))
    return groups


def _is_full(group: Group, arguments: set[object]) -> bool:
    """Never between what is computed element by element and the loop that reads it."""
    return len(arguments) > _MOST_ARGUMENTS and not _waits(group.kernels[-1].launch)


def _arguments(kernel: Kernel, inlined: set[Memory]) -> Iterator[object]:
    """What a kernel adds to the arguments of the loops it is part of; their results in between are some too."""
    yield from (memory for memory, _, _ in kernel.reads() if memory not in inlined)
    for memory, _ in kernel.writes():
        if memory not in inlined:
            yield memory
            yield from ((memory, inner) for inner in range(_INNER_RESULTS.get(op_name(kernel.launch.op), 0)))


def _ordered(kernels: list[Kernel]) -> list[Kernel]:
    """Every kernel right before the first that needs it; what can wait moves with that one."""
    producers = _producers(kernels)
    users: dict[int, set[int]] = defaultdict(set)
    for user, needed in enumerate(producers):
        for producer in needed:
            users[producer].add(user)
    todo, seen = list(range(len(kernels))), dict[int, None]()
    while todo:
        current = todo.pop()
        if current not in seen:  # else it was moved from here to further down
            seen[current] = None
            todo += [producer for producer in producers[current] if users[producer] <= seen.keys()]
    return [kernels[place] for place in _when_needed(list(reversed(seen)), kernels, producers)]


def _when_needed(order: list[int], kernels: list[Kernel], producers: list[list[int]]) -> list[int]:
    """The same order, but kernels that can wait come right before the first one that cannot and needs them."""
    rank = {place: index for index, place in enumerate(order)}
    placed: dict[int, None] = {}
    for place in order:
        if _waits(kernels[place].launch):
            continue
        needed, todo = {place}, [place]
        while todo:
            more = [producer for producer in producers[todo.pop()] if producer not in placed and producer not in needed]
            needed.update(more)
            todo += more
        placed.update(dict.fromkeys(sorted(needed, key=rank.__getitem__)))
    return [*placed, *(place for place in order if place not in placed)]


def _producers(kernels: list[Kernel]) -> list[list[int]]:
    """For each kernel the ones that last wrote what it reads or writes into."""
    writer: dict[Memory, int] = {}
    producers: list[list[int]] = []
    for place, kernel in enumerate(kernels):
        needed = [memory for memory, _, _ in kernel.reads()] + [memory for memory, _ in kernel.writes()]
        producers.append(list(dict.fromkeys(writer[memory] for memory in needed if memory in writer)))
        writer.update({memory: place for memory, _ in kernel.writes()})
    return producers


def is_loop(launch: Launch) -> bool:
    """Whether Inductor writes loops for it instead of calling a library."""
    return _is_thin_product(launch) or not _in_a_library(launch.op)


def _waits(launch: Launch) -> bool:
    """Whether each element is computed where it is needed, and not before."""
    if _is_thin_product(launch) or _in_a_library(launch.op) or op_name(launch.op) in _COMPUTED_AS_A_WHOLE:
        return False
    return torch.Tag.reduction not in launch.op.tags and not launch.op._schema.is_mutable


def _is_thin_product(launch: Launch) -> bool:
    """A product of one row, one column or one term, which on a CPU is written out."""
    name = op_name(launch.op)
    if name not in ("bmm", "mm") or launch.writes[0].part.layout.device.type != "cpu":
        return False
    (*_, rows, terms), (*_, columns) = (access.part.layout.sizes for access in launch.reads)
    return rows == columns == 1 or (name == "bmm" and 1 in (rows, terms, columns))


@functools.cache
def _in_a_library(op: Any) -> bool:
    """Whether Inductor calls a kernel that somebody else wrote."""
    from torch._inductor.decomposition import decompositions
    from torch._inductor.lowering import fallbacks, lowerings

    if getattr(op, "overloadpacket", None) in flop_registry or op_name(op) in _SORTS | EXPERT_PRODUCTS:
        return True
    if op in decompositions or op in lowerings:
        return op in fallbacks and op not in decompositions
    return getattr(op, "namespace", "") not in ("aten", "prims")
