"""Where every activation of a graph lies in one arena, at each set of shapes that it will run at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule

from fxopt.errors import InvalidRequestError
from fxopt.in_place_slots import in_all
from fxopt.in_place_slots import in_place as written_in_place
from fxopt.launches import Layout
from fxopt.liveness import Liveness, liveness
from fxopt.memory import MemoryPlan, Plan, PlanError, SymbolicBuffer, SymbolicProblem, plan, plan_sets, plan_symbolic
from fxopt.memory.planner import BUDGET_S, Solver
from fxopt.memory.sets import Merge
from fxopt.program import Program
from fxopt.shape_sets import ShapeSet, default_shape_sets, examples, shapes_of_inputs
from fxopt.symbolic_bytes import symbolic_bytes

Inputs = Sequence[Layout | None]


@dataclass(frozen=True)
class PlannedSet:
    """One set of shapes: its tensors, and the place of each in the arena."""

    live: Liveness
    plan: Plan


@dataclass(frozen=True)
class ActivationPlan:
    """A memory plan, with what its graph does at the shapes of each set."""

    memory: MemoryPlan
    lives: tuple[Liveness, ...]
    in_place: bool

    @property
    def sets(self) -> tuple[PlannedSet, ...]:
        return tuple(map(PlannedSet, self.lives, self.memory.plans))

    @property
    def device(self) -> torch.device:
        return self.lives[0].device

    def late(self, gm: GraphModule, inputs: Inputs) -> PlannedSet:
        """A plan for shapes that are in no set: by the common table or order if that holds, or a new one."""
        live = lifetimes(gm, inputs, in_place=self.in_place)
        common = self.lives[0].in_place
        if self.memory.merge != "tables" and common.items() <= live.in_place.items():
            alike = replace(live, in_place=common)
            try:
                return PlannedSet(alike, _extended(self.memory, alike))
            except PlanError:
                pass  # a buffer is larger than it ever is in the table, or the graph does other things at these shapes
        return PlannedSet(live, plan(live.problem))


def plan_activations(
    program: Program,
    shape_sets: Sequence[ShapeSet] | None = None,
    *,
    module: GraphModule | None = None,
    in_place: bool = True,
    merge: Merge = "tables",
    solver: Solver = "auto",
    budget_s: float = BUDGET_S,
) -> ActivationPlan:
    """A plan for a specialised program, or for ``module``, a piece that was cut out of it.

    The sizes in it are expressions where they follow from batch, step and window. With ``in_place=False``
    every result has a place of its own.
    """
    gm = module or program.gm
    sets = default_shape_sets(program) if shape_sets is None else list(shape_sets)
    lives = [lifetimes(gm, examples(program, shapes, module), in_place=in_place) for shapes in sets]
    options: dict[str, Any] = {"merge": merge, "solver": solver, "budget_s": budget_s}
    options["shapes"] = [shapes_of_inputs(program, shapes) for shapes in sets]
    sizes = symbolic_bytes(program, list(zip(sets, lives, strict=True)), module)
    return _planned(lives, in_place, options, sizes, sets)


def plan_graph(
    gm: GraphModule, inputs: Sequence[Inputs], *, in_place: bool = True, merge: Merge = "tables"
) -> ActivationPlan:
    """A plan for any graph whose inputs look like this in each set."""
    lives = [lifetimes(gm, each, in_place=in_place) for each in inputs]
    return _planned(lives, in_place, {"merge": merge})


def lifetimes(gm: GraphModule, inputs: Inputs, *, in_place: bool) -> Liveness:
    """The memory of a graph, with or without results that take the place of an operand."""
    live = liveness(gm, inputs)
    return written_in_place(gm, live) if in_place else live


def _planned(
    lives: Sequence[Liveness],
    in_place: bool,
    options: dict[str, Any],
    sizes: Mapping[str, Any] | None = None,
    values: Sequence[ShapeSet] = (),
) -> ActivationPlan:
    if not lives:
        raise InvalidRequestError("there are no shapes to plan for; give at least one set")
    alike = in_all(lives)
    problems = [live.problem for live in alike]
    if sizes is not None and all(buffer.name in sizes for buffer in problems[0].buffers):
        buffers = [
            SymbolicBuffer(buffer.name, buffer.start, buffer.end, sizes[buffer.name], buffer.align, buffer.kind)
            for buffer in problems[0].buffers
        ]
        memory = plan_symbolic(SymbolicProblem(tuple(buffers)), values, **options)
    else:
        memory = plan_sets(problems, **options)
    return ActivationPlan(memory, tuple(alike), in_place)


def _extended(memory: MemoryPlan, live: Liveness) -> Plan:
    """The plan for other sizes of the same buffers, or a PlanError."""
    first = memory.plans[0]
    if memory.order is None:
        found = replace(first, problem=live.problem, proven=live.problem.lower_bound)
    else:
        if set(memory.order.names) != {buffer.name for buffer in live.problem.buffers}:
            raise PlanError("the graph has other buffers at these shapes")
        found = memory.order.plan(live.problem)
    found.verify()
    return found
