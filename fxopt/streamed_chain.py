"""A chain whose steps find some of what they read in slots, which are filled while earlier steps run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from fxopt.chain import Chain, Code, Plan
from fxopt.offload.ring import Ring
from fxopt.offload.work import Leave


class Feed(Protocol):
    """Brings weights, or rows of a cache, to the steps of a plan."""

    @property
    def places(self) -> Collection[int]:
        """The positions of the steps that it brings something to."""

    def run(self, kind: str) -> contextlib.AbstractContextManager[None]:
        """One run over all steps."""

    def wait(self, place: int) -> Iterable[tuple[int, Tensor]]:
        """What a step reads, when it is there: numbers of the plan with tensors."""

    def done(self, place: int) -> None:
        """The step has run; what it wrote is stored, and the slot is free."""


#: For each slot, what one step reads when it lies there: numbers of the plan with tensors.
Views = Sequence[Sequence[tuple[int, Tensor]]]


class RingFeed:
    """A feed whose slots are filled by a ring.

    ``views`` by the position of each step; ``look`` is called before every run, and ``leave`` says for a position how
    to store what the step has written.
    """

    def __init__(
        self,
        ring: Ring,
        views: Mapping[int, Views],
        *,
        look: Callable[[], None] | None = None,
        leave: Callable[[int], Leave] | None = None,
    ) -> None:
        self.places = views.keys()
        self._ring, self._views, self._look, self._leave = ring, views, look, leave

    @contextlib.contextmanager
    def run(self, kind: str) -> Iterator[None]:
        if self._look is not None:
            self._look()
        with self._ring.step(kind):
            yield

    def wait(self, place: int) -> Sequence[tuple[int, Tensor]]:
        return self._views[place][self._ring.wait()]

    def done(self, place: int) -> None:
        self._ring.free(None if self._leave is None else self._leave(place))


class StreamedChain(Chain):
    """``feeds`` bring the same to every run, ``own`` what belongs to one; ``kind`` is how runs are counted."""

    def __init__(self, plan: Plan, pieces: Sequence[Code], feeds: Sequence[Feed], kind: str = "") -> None:
        super().__init__(plan, pieces)
        self._feeds, self._kind = tuple(feeds), kind

    def __call__(self, *given: Tensor | None, own: Feed | None = None) -> list[Tensor]:
        feeds = self._feeds if own is None else (*self._feeds, own)
        values: list[Any] = [*given, *self._room]
        with contextlib.ExitStack() as runs:
            for feed in feeds:
                runs.enter_context(feed.run(self._kind))
            for place, (code, reads, writes, frees) in enumerate(self._steps):
                near = [feed for feed in feeds if place in feed.places]
                for feed in near:
                    for number, tensor in feed.wait(place):
                        values[number] = tensor
                made = code(*[values[number] for number in reads])
                for feed in near:
                    feed.done(place)
                for number, value in zip(writes, made, strict=True):
                    values[number] = value
                for number in frees:
                    values[number] = None
        return [values[number] for number in self.plan.results]
