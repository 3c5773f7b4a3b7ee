"""What applying one pass came to: the counts, every place by name, and what it did to a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

from fxopt.listing import Listing
from fxopt.step_cost import StepCost

T = TypeVar("T")


class _WhenRead(Generic[T]):
    """A field that may hold a function instead, which is called when the field is first read."""

    def __init__(self, default: T) -> None:
        self._default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object | None, owner: type) -> T:
        if instance is None:
            return self._default
        value = vars(instance)[self._name]
        if callable(value):
            value = vars(instance)[self._name] = value()
        return cast(T, value)

    def __set__(self, instance: object, value: T) -> None:
        vars(instance)[self._name] = value


def when_read(default: T) -> T:
    """The default of such a field; its type is that of what is read."""
    return cast(T, _WhenRead(default))


@dataclass(frozen=True)
class Spot:
    """One place in a graph: where it is in the model, and what was said about it."""

    node: str
    source: str  # modeling_llama.py:284
    layer: int | None
    reason: str = ""  # empty for a place that was rewritten


@dataclass(frozen=True)
class Check:
    """One comparison with the stock model: the worst error seen and what was allowed."""

    what: str
    error: float
    allowed: float
    where: str = ""  # which of the compared numbers was nearest to its limit
    seconds: float = 0.0
    note: str = ""  # what else should be known about it


@dataclass
class Outcome:
    """A row of the report."""

    name: str
    stage: str = "symbolic"
    summary: str = ""
    expected: int | None = None
    matched: int = 0
    sites: list[Spot] = field(default_factory=list)
    refused: list[Spot] = field(default_factory=list)
    near: list[Spot] = field(default_factory=list)  # what looked like a site up to a point
    nodes_before: int = 0
    nodes_after: int = 0
    ops: dict[str, int] = field(default_factory=dict)  # operator -> how many more (or less) of it
    freed_bytes: int = 0
    seconds: float = 0.0
    step: StepCost | None = when_read(None)  # noqa: RUF009, what one decode step costs after the pass
    verified: Check | None = None
    dropped: str | None = None  # why the whole pass was taken out again
    listing: Listing = when_read(())  # noqa: RUF009, the graph after the pass

    def show_when_read(self, listing: Callable[[], Listing], step: Callable[[], StepCost | None]) -> None:
        """Work out the graph's text and costs when somebody asks; few ever do."""
        vars(self).update(listing=listing, step=step)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or a file, has the text and the costs instead of the graph that they come from."""
        return {**vars(self), "listing": self.listing, "step": self.step}

    @property
    def changed_something(self) -> bool:
        """Sites or not: a pass may also edit the graph as a whole."""
        return bool(self.matched or self.ops or self.nodes_before != self.nodes_after)

    @property
    def is_complete(self) -> bool:
        return self.matched >= (self.expected or 0)
