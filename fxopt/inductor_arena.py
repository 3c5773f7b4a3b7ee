"""Inductor's intermediates in one arena: a planner of ours in the place of its own.

Inductor knows which buffers it keeps and for how long; it asks a planner where they lie. Ours gives
it an order, which buffer lies below which, so that the offsets hold for every step and window; the
generated code computes them from the sizes. What a piece hands on is not placed: it belongs to the
caller. If anything here fails, Inductor's own planner places the buffers of that piece.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch._inductor import config as inductor_config
from torch._inductor.codegen import memory_planning
from torch._inductor.codegen.wrapper import pexpr
from torch._inductor.virtualized import V
from torch.fx import Node

from fxopt.errors import first_line
from fxopt.memory import Buffer, MemoryPlan, SymbolicBuffer, SymbolicProblem, plan_symbolic
from fxopt.memory.problem import ALIGN, rounded
from fxopt.memory.sets import Values
from fxopt.memory.sizes import Sizes
from fxopt.origin import layer_of, source_of
from fxopt.placement import PlacedBuffer, Placement

log = logging.getLogger("fxopt")

IMPORT = "from fxopt.arena_memory import room as fxopt_room"
FORM = "fxopt arena 3"  # of the code that is written here, with its comment

#: What is used of Inductor, whose planner is no public interface.
_NEEDED = {
    "MemoryPlanner": ("plan", "compute_live_ranges", "allocate_groups"),
    "BufferGroup": ("make_allocation", "sym_nbytes", "update_usage"),
    "Allocation": ("finalize", "mark_allocated"),
    "AllocationPools": ("allocate", "allocate_output", "finalize"),
    "LiveRanges": (),
    "DeallocFromPoolLine": (),
}


class _Here(threading.local):
    """The shapes that this thread plans for; None while it compiles something else."""

    sets: Sequence[Values] | None = None


_here = _Here()


def missing() -> str | None:
    """What this version of PyTorch lacks, or None."""
    for name, methods in _NEEDED.items():
        kind = getattr(memory_planning, name, None)
        if kind is None:
            return f"Inductor has no {name} in this version of PyTorch"
        if lacking := [method for method in methods if not hasattr(kind, method)]:
            return f"Inductor's {name} has no {lacking[0]} in this version of PyTorch"
    return None


@contextlib.contextmanager
def in_one_arena(sets: Sequence[Values]) -> Iterator[None]:
    """Inductor places what it compiles meanwhile in one arena, planned for these sizes."""
    # Code in Inductor's cache goes by its settings; the tag keeps ours apart from others', and from older forms of it.
    config: Any = torch.compiler.config
    tag = config.patch(cache_key_tag=f"{config.cache_key_tag}{FORM} {sets}")
    own = memory_planning.MemoryPlanner
    before = _here.sets
    try:
        _here.sets = sets
        memory_planning.MemoryPlanner = ArenaPlanner  # type: ignore[misc]
        with tag, inductor_config.patch(memory_planning=True, memory_pool="none"):
            yield
    finally:
        memory_planning.MemoryPlanner = own  # type: ignore[misc]
        _here.sets = before


class ArenaPlanner(memory_planning.MemoryPlanner):
    """Inductor's planner, but for where intermediates lie."""

    def compute_live_ranges(self, lines: list[Any]) -> None:
        inductors: Any = super()
        inductors.compute_live_ranges(lines)
        groups: list[Any] = self.buffer_groups or []
        freed = {id(line.group) for line in lines if isinstance(line, memory_planning.DeallocFromPoolLine)}
        last = max((group.live_range.end for group in groups), default=0)
        for group in groups:
            if id(group) not in freed:  # nobody said when it is done with
                group.update_usage(last)

    def allocate_groups(self) -> None:
        inductors: Any = super()
        groups: list[Any] = self.buffer_groups or []
        if _here.sets is None:  # another thread of this process compiles something of its own
            inductors.allocate_groups()
            return
        try:
            pool = _planned(groups, _here.sets)
        except Exception as error:
            log.warning("a piece was not placed in the arena (%s: %s)", type(error).__name__, first_line(error))
            inductors.allocate_groups()
            return
        for group in groups:
            group.make_allocation()
            if group in pool.groups:
                group.allocation.finalize(pool, pool.offsets[group.names[0]])
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

    def __init__(self, groups: Sequence[Any], planned: MemoryPlan) -> None:
        self.groups = groups
        self.root = self  # Inductor asks the root of a pool how long it is needed
        self.names_to_del = [self.name]
        self.creation_cache: dict[str, str] = {}
        self.offsets, self._total, self._lines = _offsets(planned)
        self._planned = planned

    def get_live_ranges(self) -> Any:
        return memory_planning.LiveRanges([group.live_range for group in self.groups])

    def codegen_create(self, wrapper: Any, code: Any) -> None:
        code.writelines(self._lines)
        code.writeline(f"{self.name} = fxopt_room({self._total}, '{self.groups[0].node.get_device()}')")

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


def _planned(groups: Sequence[Any], sets: Sequence[Values]) -> _Pool:
    """The intermediates in one arena: those on the device that most of them are on."""
    inner = [group for group in groups if not group.is_output and _is_known(group)]
    devices = [group.node.get_device() for group in inner]
    placed = [group for group in inner if group.node.get_device() == max(devices, key=devices.count)]
    problem = SymbolicProblem(tuple(map(_buffer, placed)))
    return _Pool(placed, plan_symbolic(problem, sets, "order"))


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


def _offsets(planned: MemoryPlan) -> tuple[dict[str, sympy.Expr], int | str, list[str]]:
    """The offset of each buffer, the bytes of the arena, and the lines of code that compute what is no number."""
    assert planned.order is not None and planned.symbolic is not None
    sizes = {buffer.name: sympy.sympify(buffer.nbytes) for buffer in planned.symbolic.buffers}
    tops: list[int | str] = []
    offsets: dict[str, sympy.Expr] = {}
    lines: list[str] = []

    def named(name: str, value: int | str) -> int | str:
        if isinstance(value, int) or value.isidentifier():
            return value
        lines.append(f"{name} = {value}")
        return name

    for number, (buffer, lows) in enumerate(zip(planned.order.names, planned.order.below, strict=True)):
        under = named(f"at{number}", _highest([tops[low] for low in lows]))
        exact = sympy.Integer if isinstance(under, int) else sympy.Symbol
        offsets[buffer] = exact(under)
        tops.append(named(f"top{number}", _above(under, sizes[buffer])))
    return offsets, _highest(tops), lines


def _above(under: int | str, size: sympy.Expr) -> int | str:
    """The first free byte above a buffer."""
    if size.is_number:
        taken = rounded(int(size), ALIGN)
        return under + taken if isinstance(under, int) else f"{under} + {taken}"
    in_lines = all(factor % ALIGN == 0 for factor in sympy.expand(size).as_coefficients_dict().values())
    text = pexpr(size) if in_lines else f"({pexpr(size)} + {ALIGN - 1} & -{ALIGN})"
    return text if under == 0 else f"{under} + {text}"


def _highest(tops: Sequence[int | str]) -> int | str:
    """The largest of numbers and names, as a number if it is one."""
    names = list(dict.fromkeys(top for top in tops if isinstance(top, str)))
    number = max((top for top in tops if isinstance(top, int)), default=0)
    if not names:
        return number
    parts = [*names, *([str(number)] if number else [])]
    return parts[0] if len(parts) == 1 else f"max({', '.join(parts)})"


def _origin(node: Any) -> Node | None:
    """The call in the graph that a buffer holds the result of."""
    origin = getattr(getattr(node, "data", None), "origin_node", None) or getattr(node, "origin_node", None)
    if isinstance(origin, Node):
        return origin
    origins = [one for one in getattr(node, "origins", ()) if isinstance(one, Node)]
    return max(origins, key=lambda one: one.name, default=None)
