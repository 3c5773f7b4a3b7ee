"""Pieces of compiled code in a row: each reads values by number and writes values by number."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Code = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Step:
    """One call of a piece. The numbers of what it is the last to read are in ``frees``."""

    piece: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    frees: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """In which order pieces run, and on what. Numbers count the inputs, then the weights, then what is computed."""

    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]

    @property
    def given(self) -> int:
        return len(self.inputs) + len(self.weights)

    @property
    def size(self) -> int:
        """How many values there are."""
        return 1 + max((n for step in self.steps for n in (*step.reads, *step.writes)), default=self.given - 1)

    def readers(self, inputs: Collection[str]) -> list[int]:
        """The positions of the steps that read any of these inputs."""
        numbers = {self.inputs.index(name) for name in inputs}
        return [place for place, step in enumerate(self.steps) if not numbers.isdisjoint(step.reads)]

    def most_alive(self, nbytes: Mapping[int, int]) -> int:
        """The most bytes of computed values that are there at once; ``nbytes`` of each by number."""
        alive = most = 0
        for step in self.steps:
            alive += sum(nbytes[number] for number in step.writes)
            most = max(most, alive)
            alive -= sum(nbytes[number] for number in step.frees)
        return most

    def freeing(self) -> Plan:
        """The same, letting go of every computed value after its last reader."""
        kept, steps = set(self.results), []
        for step in reversed(self.steps):
            done = {number for number in (*step.reads, *step.writes) if number >= self.given and number not in kept}
            kept |= done
            steps.append(Step(step.piece, step.reads, step.writes, tuple(sorted(done))))
        return Plan(self.inputs, self.weights, tuple(reversed(steps)), self.results)


class Chain:
    """A plan with the code of its pieces."""

    def __init__(self, plan: Plan, pieces: Sequence[Code]) -> None:
        self.plan = plan
        self.pieces = tuple(pieces)
        self._steps = [(pieces[step.piece], step.reads, step.writes, step.frees) for step in plan.steps]
        self._room = [None] * (plan.size - plan.given)

    def __call__(self, *given: Tensor) -> list[Tensor]:
        """Run on the inputs and weights of the plan, in that order."""
        values: list[Any] = [*given, *self._room]
        for code, reads, writes, frees in self._steps:
            made = code(*[values[number] for number in reads])
            for number, value in zip(writes, made, strict=True):
                values[number] = value
            for number in frees:
                values[number] = None
        return [values[number] for number in self.plan.results]
