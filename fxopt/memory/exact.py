"""The smallest plan that can be found in a given time, and how small a plan could be at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, Protocol

from fxopt.memory.greedy import Candidate, Offsets, height
from fxopt.memory.instance import Instance, instances, unit
from fxopt.memory.native import CompiledSearch, NoCompiledSearchError, library
from fxopt.memory.problem import Problem
from fxopt.memory.search import PythonSearch

QUICK = 0.5  # seconds of Python before a compiler is started; graphs of language models need a few hundredths
FEWEST_STEPS = 64  # of one order before the next has its turn, besides one step for each buffer


class Search(Protocol):
    """What both forms of the search can do."""

    offsets: Offsets

    def run(self, steps: int, deadline: float) -> bool | None: ...


MakeSearch = Callable[[Instance, int], Search]


class No(Enum):
    """Why there are no offsets."""

    IMPOSSIBLE = "no plan is that small"
    UNDECIDED = "the time was too short to tell"


class Outcome(NamedTuple):
    """The best plan, and the least that any plan needs, as far as that is proven."""

    best: Candidate
    proven: int
    note: str = ""


def minimise(problem: Problem, best: Candidate, budget_s: float, capacity: int | None = None) -> Outcome:
    """Improve on ``best``: the lower bound first, then halves of what is left; or only down to ``capacity``."""
    deadline = time.monotonic() + budget_s
    proven, step = problem.lower_bound, unit(problem)
    target = proven if capacity is None else capacity // step * step
    if best.size <= target or target < proven:
        return Outcome(best, proven)
    make: MakeSearch = PythonSearch
    answer = decide(problem, target, min(deadline, time.monotonic() + QUICK), make)
    note = ""
    if answer is No.UNDECIDED:
        make, note = _fastest()
        share = 0.5 if capacity is None else 1.0
        answer = decide(problem, target, time.monotonic() + share * (deadline - time.monotonic()), make)
    lowest = proven
    while True:
        if answer is No.UNDECIDED:
            lowest = target + step
        elif answer is No.IMPOSSIBLE:
            proven = lowest = target + step
        else:
            best = Candidate(answer, height(problem, answer), "search")
        left = deadline - time.monotonic()
        if best.size <= proven or left < 0.01 or capacity is not None:
            return Outcome(best, proven, note)
        if lowest >= best.size:
            lowest = proven  # what was left undecided may be decided in the time that is left
        target = lowest + (best.size - step - lowest) // step // 2 * step
        answer = decide(problem, target, time.monotonic() + left / 2, make)


def decide(problem: Problem, capacity: int, deadline: float, make: MakeSearch) -> Offsets | No:
    """Offsets below ``capacity``, or why there are none; every order has its turn, each time a longer one."""
    orders = list(instances(problem))
    searches: list[Search] = []
    steps = len(problem.placed) + FEWEST_STEPS
    while True:
        for place, order in enumerate(orders):
            if place == len(searches):
                searches.append(make(order, capacity))
            found = searches[place].run(steps, deadline)
            if found:
                return order.in_problem(searches[place].offsets)
            if found is not None:
                return No.IMPOSSIBLE
            if time.monotonic() > deadline:
                return No.UNDECIDED
        steps *= 2


def _fastest() -> tuple[MakeSearch, str]:
    try:
        library()
    except NoCompiledSearchError as error:
        return PythonSearch, f"the search ran in Python, which is slow: {error}"
    return CompiledSearch, ""
