"""One arena for several shapes: the same buffers, of other sizes in each set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from fxopt.errors import InvalidRequestError
from fxopt.memory.greedy import candidates
from fxopt.memory.order import Order, order_of
from fxopt.memory.planner import BUDGET_S, SEARCHERS, Plan, Solver, Status, check_solver, placed, plan
from fxopt.memory.problem import Problem
from fxopt.memory.symbolic import SymbolicPlan, SymbolicProblem

Merge = Literal["tables", "max", "order"]
Mode = Literal["inference", "debug"]
Shapes = Mapping[str, Sequence[int]]  # what people call a set: the shape of each input
Values = Mapping[str, int]  # of the symbols in the sizes


@dataclass(frozen=True)
class MemoryPlan:
    """A plan for each set, all in one arena."""

    merge: Merge
    plans: tuple[Plan, ...]
    order: Order | None = None  # what all sets have in common, with ``merge="order"``
    shapes: tuple[Shapes, ...] = ()
    mode: Mode = "inference"
    symbolic: SymbolicProblem | None = None  # what the sets were made from
    values: tuple[Values, ...] = ()  # with which each was made

    @property
    def arena(self) -> int:
        """The bytes that hold whichever set is running."""
        return max(plan.size for plan in self.plans)

    @property
    def lower_bound(self) -> int:
        """The most bytes that the largest set needs at once."""
        return max(plan.lower_bound for plan in self.plans)

    @property
    def proven(self) -> int:
        """No arena that holds all sets is smaller."""
        return max(plan.proven for plan in self.plans)

    @property
    def naive(self) -> int:
        """The bytes of an arena in which nothing shares."""
        return max(plan.naive for plan in self.plans)

    @property
    def itrex(self) -> int:
        """The bytes that shared blocks would have taken: of the maximum of each buffer, as that algorithm has it."""
        return Plan(largest([plan.problem for plan in self.plans]), {}, 0, 0, "").itrex

    @property
    def status(self) -> Status:
        return "optimal" if self.arena <= self.proven else "feasible"

    @property
    def gap(self) -> float:
        return self.arena / self.proven - 1 if self.proven else 0.0

    @property
    def worst(self) -> float:
        """By what part of its least the plan of some set may be too large."""
        return max(plan.gap for plan in self.plans)

    def verify(self) -> None:
        """Raise a PlanError that names the buffers, if one of the plans is wrong."""
        for each in self.plans:
            each.verify()

    def for_any_shape(self) -> SymbolicPlan:
        """The plan as a function of the symbols in its sizes."""
        if self.symbolic is None or self.order is None:
            raise InvalidRequestError(
                'this plan is for its own shapes alone; plan_symbolic with merge="order" makes one for any'
            )
        return SymbolicPlan(self.symbolic, self.order)


def plan_sets(
    problems: Iterable[Problem],
    merge: Merge = "tables",
    *,
    solver: Solver = "auto",
    budget_s: float = BUDGET_S,
    shapes: Sequence[Shapes] = (),
) -> MemoryPlan:
    """Plan for several sets of sizes.

    "tables" has offsets for each set and the smallest arena. "max" has one table, for the largest that each
    buffer ever is. "order" fixes only which buffer lies below which, so that it holds for sizes that nobody
    thought of as well. ``budget_s`` is for all sets together.
    """
    sets = tuple(problems)
    check_solver(solver, budget_s)
    _check_sets(sets, merge, shapes)
    share = budget_s / (len(sets) + (merge == "order"))
    if merge == "max":
        whole = plan(largest(sets), solver, budget_s=budget_s)
        plans = [replace(whole, problem=each, proven=each.lower_bound) for each in sets]
        made = MemoryPlan(merge, tuple(plans), shapes=tuple(shapes))
    elif merge == "order":
        sources = (source for each in (*sets, largest(sets)) for source in _sources(each, solver, share))
        made = replace(_best_order(sources, sets), shapes=tuple(shapes))
    else:
        plans = [plan(each, solver, budget_s=share) for each in sets]
        made = MemoryPlan(merge, tuple(plans), shapes=tuple(shapes))
    made.verify()
    return made


def plan_symbolic(
    problem: SymbolicProblem,
    values: Sequence[Values],
    merge: Merge = "order",
    *,
    solver: Solver = "auto",
    budget_s: float = BUDGET_S,
    shapes: Sequence[Shapes] = (),
) -> MemoryPlan:
    """``plan_sets`` for sizes that are expressions: one set for each choice of values for their symbols."""
    sets = [problem.at(chosen) for chosen in values]
    made = plan_sets(sets, merge, solver=solver, budget_s=budget_s, shapes=shapes)
    return replace(made, symbolic=problem, values=tuple(dict(chosen) for chosen in values))


def largest(sets: Sequence[Problem]) -> Problem:
    """Each buffer as large as it ever is."""
    rows = zip(*(each.buffers for each in sets), strict=True)
    return Problem(max(row, key=lambda buffer: buffer.nbytes) for row in rows)


def _sources(problem: Problem, solver: Solver, budget_s: float) -> Iterator[Plan]:
    """Plans to take an order from: the smallest, and the dozen of greedy, since a worse one may carry further."""
    yield plan(problem, solver, budget_s=budget_s)
    if solver in (*SEARCHERS, "greedy"):
        for candidate in candidates(problem):
            yield Plan(problem, placed(problem, candidate), candidate.size, problem.lower_bound, candidate.maker)


def _best_order(sources: Iterable[Plan], sets: Sequence[Problem]) -> MemoryPlan:
    """Of the orders that these plans have, the one whose worst set is nearest to its lower bound."""
    best: MemoryPlan | None = None
    for source in sources:
        order = order_of(source)
        tried = MemoryPlan("order", tuple(order.plan(each) for each in sets), order)
        if best is None or tried.worst < best.worst:
            best = tried
        if not best.worst:
            break
    assert best is not None
    return best


def _check_sets(sets: Sequence[Problem], merge: str, shapes: Sequence[Shapes]) -> None:
    if merge not in get_args(Merge):
        raise InvalidRequestError(f"there is no merge {merge!r}; there are {', '.join(get_args(Merge))}")
    if not sets:
        raise InvalidRequestError("there is no set of sizes to plan for; give at least one problem")
    if shapes and len(shapes) != len(sets):
        raise InvalidRequestError(f"there are {len(sets)} sets and shapes for {len(shapes)}; give one for each set")
    first = sets[0]
    for number, other in enumerate(sets[1:], start=1):
        if [buffer.name for buffer in other.buffers] != [buffer.name for buffer in first.buffers]:
            odd = {b.name for b in other.buffers} ^ {b.name for b in first.buffers}
            what = f"{min(odd)} is in one of them only" if odd else "they are in another order"
            raise InvalidRequestError(f"set {number} has other buffers than set 0: {what}; all sets are of one graph")
        for one, two in zip(first.buffers, other.buffers, strict=True):
            if replace(two, nbytes=one.nbytes) != one:
                raise InvalidRequestError(
                    f"{one.name} differs between set 0 and set {number} in more than its bytes: {one} and {two}"
                )
