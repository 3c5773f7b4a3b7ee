"""Where every buffer of one problem lies."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fxopt.errors import InvalidRequestError
from fxopt.memory import references
from fxopt.memory.checker import verify
from fxopt.memory.exact import Outcome, minimise
from fxopt.memory.greedy import Candidate, portfolio
from fxopt.memory.problem import Problem

Solver = Literal["auto", "greedy", "exact", "naive", "itrex", "tflite", "executorch"]
Status = Literal["optimal", "feasible"]

BUDGET_S = 5.0

#: The solvers that only build, and never search.
BUILDERS: dict[str, Callable[[Problem], Candidate]] = {
    "greedy": portfolio,
    "naive": references.naive,
    "itrex": references.itrex,
    "tflite": references.tflite,
    "executorch": references.executorch,
}
#: The solvers that search, and where they start: from the best that greedy found, or from nothing.
SEARCHERS: dict[str, Callable[[Problem], Candidate]] = {"auto": portfolio, "exact": references.naive}
SOLVERS = (*SEARCHERS, *BUILDERS)


@dataclass(frozen=True)
class Plan:
    """Offsets into an arena of ``size`` bytes; a buffer without bytes has none."""

    problem: Problem
    offsets: Mapping[str, int]
    size: int
    proven: int  # no plan for this problem is smaller
    maker: str  # what found it
    seconds: float = 0.0
    note: str = ""  # what would have helped

    @property
    def status(self) -> Status:
        """Whether it is known to be the smallest."""
        return "optimal" if self.size <= self.proven else "feasible"

    @property
    def gap(self) -> float:
        """By what part of the least a plan needs this one may be too large."""
        return self.size / self.proven - 1 if self.proven else 0.0

    @property
    def lower_bound(self) -> int:
        """The most bytes that are needed at once."""
        return self.problem.lower_bound

    @property
    def naive(self) -> int:
        """The bytes of an arena in which nothing shares."""
        return self.problem.naive

    @cached_property
    def itrex(self) -> int:
        """The bytes that shared blocks would have taken (see ``references.itrex``)."""
        return references.itrex(self.problem).size

    def verify(self) -> None:
        """Raise a PlanError that names the buffers, if the plan is wrong."""
        verify(self.problem, self.offsets, self.size)


def plan(problem: Problem, solver: Solver = "auto", *, budget_s: float = BUDGET_S, capacity: int | None = None) -> Plan:
    """Place every buffer.

    "auto" takes the best of a dozen greedy plans and, if that is above the lower bound, searches for the
    smallest for up to ``budget_s`` seconds; "exact" is the search alone, "greedy" the dozen alone. The other
    solvers are there to compare with. With ``capacity``, the first plan that fits into it will do.
    """
    check_solver(solver, budget_s)
    started = time.monotonic()
    if solver in SEARCHERS:
        outcome = minimise(problem, SEARCHERS[solver](problem), budget_s, capacity)
    else:
        outcome = Outcome(BUILDERS[solver](problem), problem.lower_bound)
    best, took = outcome.best, time.monotonic() - started
    note = outcome.note if best.size > outcome.proven else ""
    made = Plan(problem, placed(problem, best), best.size, outcome.proven, best.maker, took, note)
    made.verify()
    return made


def placed(problem: Problem, candidate: Candidate) -> dict[str, int]:
    """The offsets by name."""
    return {buffer.name: offset for buffer, offset in zip(problem.placed, candidate.offsets, strict=True)}


def check_solver(solver: str, budget_s: float) -> None:
    """Raise a sentence if there is no such solver, or no time."""
    if solver not in SOLVERS:
        raise InvalidRequestError(f"there is no solver {solver!r}; there are {', '.join(SOLVERS)}")
    if not 0 < budget_s < math.inf:
        raise InvalidRequestError(f"budget_s is {budget_s}; give a number of seconds above 0")
