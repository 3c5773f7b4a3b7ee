"""Inductor's intermediates in one arena: a planner of ours in the place of its own.

Inductor knows which buffers it keeps and for how long; it asks a planner where they lie. Ours gives
it an order, which buffer lies below which, so that the offsets hold for every step and window; the
generated code computes them from the sizes. What a piece hands on is not placed: it belongs to the
caller. Whatever cannot be placed is an error here, and the piece is compiled again without an arena.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.codegen import memory_planning
from torch._inductor.codegen.wrapper import SubgraphPythonWrapperCodegen
from torch._inductor.virtualized import V
from torch.fx import Node

from fxopt.memory import Buffer, MemoryPlan, SymbolicBuffer, SymbolicProblem, plan_symbolic
from fxopt.memory.sets import Values
from fxopt.memory.sizes import Sizes
from fxopt.offset_lines import offset_lines
from fxopt.origin import layer_of, source_of
from fxopt.placement import PlacedBuffer, Placement

IMPORT = "from fxopt.arena_memory import room as fxopt_room"
FORM = "fxopt arena 4"  # of the code that is written here, with its comment

#: What is used of Inductor, whose planner is no public interface.
_NEEDED = {
    "MemoryPlanner": ("plan", "compute_live_ranges", "allocate_groups"),
    "BufferGroup": ("make_allocation", "sym_nbytes", "update_usage"),
    "Allocation": ("finalize", "mark_allocated"),
    "AllocationPools": ("allocate", "allocate_output", "finalize"),
    "LiveRanges": (),
    "DeallocFromPoolLine": (),
}


@dataclass(frozen=True)
class Wanted:
    """An arena on this device, planned for these sizes."""

    device: torch.device
    sets: Sequence[Values]


class _Here(threading.local):
    """What this thread compiles for; None while it compiles something else."""

    wanted: Wanted | None = None


_here = _Here()


def missing() -> str | None:
    """What this version of PyTorch lacks, or None."""
    for name, methods in _NEEDED.items():
        kind = getattr(memory_planning, name, None)
        if kind is None:
            return f"Inductor has no {name} in this version of PyTorch"
        if lacking := [method for method in methods if not hasattr(kind, method)]:
            return f"Inductor's {name} has no {lacking[0]} in this version of PyTorch"
    return "it writes Python, and Inductor was told to write C++ (cpp_wrapper)" if inductor_config.cpp_wrapper else None


@contextlib.contextmanager
def in_one_arena(wanted: Wanted) -> Iterator[None]:
    """Inductor places what it compiles meanwhile in one arena."""
    # Code in Inductor's cache goes by its settings; the tag keeps ours apart from others', and from older forms of it.
    config: Any = torch.compiler.config
    tag = config.patch(cache_key_tag=f"{config.cache_key_tag}{FORM} {wanted}")
    own = memory_planning.MemoryPlanner
    before = _here.wanted
    try:
        _here.wanted = wanted
        memory_planning.MemoryPlanner = ArenaPlanner  # type: ignore[misc]
        with tag, inductor_config.patch(memory_planning=True, memory_pool="none"):
            yield
    finally:
        memory_planning.MemoryPlanner = own  # type: ignore[misc]
        _here.wanted = before


class ArenaPlanner(memory_planning.MemoryPlanner):
    """Inductor's planner, but for where intermediates lie."""

    def compute_live_ranges(self, lines: list[Any]) -> None:
        inductors: Any = super()
        inductors.compute_live_ranges(lines)
        groups: list[Any] = self.buffer_groups or []
        freed = {id(line.group) for line in lines if isinstance(line, memory_planning.DeallocFromPoolLine)}
        for group in groups:
            # Nobody says when it is done with: what is returned may be another view of its memory.
            group.is_output = group.is_output or id(group) not in freed

    def allocate_groups(self) -> None:
        inductors: Any = super()
        groups: list[Any] = self.buffer_groups or []
        if _here.wanted is None:  # another thread of this process compiles something of its own
            inductors.allocate_groups()
            return
        if isinstance(self.wrapper, SubgraphPythonWrapperCodegen):
            raise NotImplementedError("a body of control flow would compute in the arena that its caller is using")
        pool = _planned(groups, _here.wanted)
        for group in groups:
            group.make_allocation()
            if group in pool.groups:
                group.allocation.finalize(pool, pool.places.offsets[group.names[0]])
                group.allocation.mark_allocated()
            elif group.is_output:
                self.pools.allocate_output(group.allocation)
            else:
                self.pools.allocate(group.allocation)
        self.pools.finalize()
        for line in (IMPORT, pool.placement.comment()):
            V.graph.wrapper_code.add_import_once(line)


class _Pool:
    """The arena as Inductor sees it: a pool that knows how to make itself."""

    name = "arena"

    def __init__(self, groups: Sequence[Any], device: torch.device, planned: MemoryPlan) -> None:
        self.groups = groups
        self.root = self  # Inductor asks the root of a pool how long it is needed
        self.names_to_del = [self.name]
        self.creation_cache: dict[str, str] = {}
        self.places = offset_lines(planned)
        self._device = device
        self._planned = planned

    def get_live_ranges(self) -> Any:
        return memory_planning.LiveRanges([group.live_range for group in self.groups])

    def codegen_create(self, wrapper: Any, code: Any) -> None:
        code.writelines(self.places.lines)
        code.writeline(f"{self.name} = fxopt_room({self.places.total}, '{self._device}')")

    def codegen_destroy(self, wrapper: Any, code: Any) -> None:
        code.writeline(wrapper.make_free_by_names(self.names_to_del))

    @property
    def placement(self) -> Placement:
        """At the set that needs most."""
        plan, values = max(zip(self._planned.plans, self._planned.values, strict=True), key=lambda one: one[0].size)
        nodes = {group.names[0]: group.node for group in self.groups}
        placed = (
            _placed(buffer, plan.offsets.get(buffer.name, 0), nodes[buffer.name], values)
            for buffer in plan.problem.buffers
        )
        return Placement(self._planned.arena, self._planned.lower_bound, tuple(placed))


def _planned(groups: Sequence[Any], wanted: Wanted) -> _Pool:
    """The intermediates of the arena's device in one pool."""
    placed = [
        group
        for group in groups
        if not group.is_output and group.node.get_device() == wanted.device and _is_known(group)
    ]
    problem = SymbolicProblem(tuple(map(_buffer, placed)))
    return _Pool(placed, wanted.device, plan_symbolic(problem, wanted.sets, "order"))


def _buffer(group: Any) -> SymbolicBuffer:
    begin, end = group.live_range.begin, group.live_range.end
    return SymbolicBuffer(group.names[0], begin, max(end, begin + 1), group.sym_nbytes())


def _placed(buffer: Buffer, offset: int, node: Any, values: Values) -> PlacedBuffer:
    """What is to be known of a buffer when the compiler is gone."""
    sizes = Sizes(node.get_size())
    shape = f"{str(node.get_dtype()).removeprefix('torch.')} {sizes.at(sizes.key(values))}"
    origin = _origin(node)
    layer, source = (layer_of(origin), source_of(origin)) if origin is not None else (None, "")
    return PlacedBuffer(buffer.name, buffer.start, buffer.end, buffer.nbytes, offset, shape, layer, source)


def _is_known(group: Any) -> bool:
    """Whether its size follows from the shapes of the inputs."""
    return not torch.fx.experimental.symbolic_shapes.free_unbacked_symbols(group.sym_nbytes())


def _origin(node: Any) -> Node | None:
    """The call in the graph that a buffer holds the result of."""
    origin = getattr(getattr(node, "data", None), "origin_node", None) or getattr(node, "origin_node", None)
    if isinstance(origin, Node):
        return origin
    origins = [one for one in getattr(node, "origins", ()) if isinstance(one, Node)]
    return max(origins, key=lambda one: one.name, default=None)
