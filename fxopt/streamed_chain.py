"""A chain whose layers find their weights in slots that are filled while earlier layers run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from fxopt.chain import Chain, Code, Plan
from fxopt.offload.ring import Ring

#: For each slot, what the weights of one step are when they lie there: numbers of the plan with tensors.
Views = Sequence[Sequence[tuple[int, Tensor]]]


class StreamedChain(Chain):
    """``views`` by the position of each step that streams; ``look`` is called before every run."""

    def __init__(
        self,
        plan: Plan,
        pieces: Sequence[Code],
        ring: Ring,
        views: Mapping[int, Views],
        look: Callable[[], None],
        kind: str = "",
    ) -> None:
        super().__init__(plan, pieces)
        self._ring, self._look, self._kind = ring, look, kind
        self._streamed = [(*step, views.get(place)) for place, step in enumerate(self._steps)]

    def __call__(self, *given: Tensor) -> list[Tensor]:
        values: list[Any] = [*given, *self._room]
        self._look()
        with self._ring.step(self._kind):
            for code, reads, writes, frees, views in self._streamed:
                if views is not None:
                    for number, view in views[self._ring.wait()]:
                        values[number] = view
                made = code(*[values[number] for number in reads])
                if views is not None:
                    self._ring.free()
                for number, value in zip(writes, made, strict=True):
                    values[number] = value
                for number in frees:
                    values[number] = None
        return [values[number] for number in self.plan.results]
