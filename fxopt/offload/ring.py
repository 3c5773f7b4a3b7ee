"""A ring of slots that are filled ahead of whoever reads them.

    with ring.step():                  # one pass over the layers, in order
        for layer in layers:
            slot = ring.wait()         # what the next layer reads is in there
            ...                        # run it
            ring.free()                # the slot is free, and is filled for a later layer

What a layer has left in its slot can be stored before that. The order is known and comes again with
every step, so the last layers of a step let the first ones of the next be read. A step that ends half
way leaves the ring somewhere; the next one begins anew.

Slots may lie on a device. Then the lanes wait for each other, and nobody waits for them: what computes waits
until the slot is filled, and what fills it again until the layer has run (:mod:`fxopt.offload.lanes`).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fxopt.offload.errors import StoreError
from fxopt.offload.lanes import HostLanes, Lanes, Mark
from fxopt.offload.store import Store
from fxopt.offload.tally import Tally
from fxopt.offload.work import AtOnce, Hand, Leave, Reader, Ticket, Work

_rings: weakref.WeakSet[Ring] = weakref.WeakSet()
_readers: weakref.WeakSet[Hand] = weakref.WeakSet()  # also of rings that are gone

LOOK = 1.0  # seconds after which a waiting thread looks whether the reader is still there
LAST_READ = 30.0  # seconds that the end of a process waits for reads that have been asked for
SHORTEST = 20e-6  # seconds; what takes less was no wait, but looking at the clock


@dataclass
class _Step:
    """One that went through, and is not counted yet: where it began and ended, and where it may have waited."""

    kind: str
    start: Mark
    end: Mark
    waits: Sequence[tuple[Mark, Mark]]


class Ring:
    """Slots for the layers in ``order``. ``what`` lies there, for sentences.

    They are filled by a thread, or ``at_once`` if the store only asks the lanes for copies.
    """

    def __init__(
        self,
        store: Store,
        order: Sequence[int],
        slots: Sequence[Any],
        *,
        what: str = "weights",
        tally: Tally | None = None,
        lanes: Lanes | None = None,
        at_once: bool = False,
    ) -> None:
        self.order = tuple(order)
        self.slots = len(slots)
        self.tally = Tally() if tally is None else tally
        self._what = what
        self._lanes: Lanes = HostLanes() if lanes is None else lanes
        self._work = Work(store, slots, self.tally, self._lanes)
        self._reader: Hand = AtOnce(self._work) if at_once else _started(Reader(self._work, f"fxopt {what}"))
        self._lock = threading.RLock()
        self._tickets: deque[Ticket] = deque()  # in the order of the layers; the first is the next to be read
        self._turn = 0  # slots asked for since the last restart
        self._whole = False  # whether the last step went through
        self._waits: list[tuple[Mark, Mark]] = []  # of this step
        self._steps: deque[_Step] = deque()  # that are not counted yet
        self.close = weakref.finalize(self, self._reader.put, None)
        _rings.add(self)
        _readers.add(self._reader)

    @contextlib.contextmanager
    def step(self, kind: str = "") -> Iterator[None]:
        """One pass over all layers; others wait until it is through."""
        with self._lock:
            start = self._lanes.computed()
            if not self._whole:
                self._restart()
            self._whole, self._waits = False, []
            yield
            self._whole = True
            self._steps.append(_Step(kind, start, self._lanes.computed(), self._waits))
            self._count()

    @property
    def is_served(self) -> bool:
        """Whether there is somebody who reads: not after a fork, and not when it was closed."""
        return self._reader.is_alive()

    def stop(self) -> None:
        """Close it, and wait a little until the store is closed, too."""
        self.close()
        self._reader.join(LOOK)

    def forget(self) -> None:
        """Read everything anew: what the store holds has changed."""
        with self._lock:
            self._whole = False

    def wait(self) -> int:
        """The slot of the next layer; what computes from here on finds it filled."""
        ticket, start = self._tickets[0], self._lanes.computed()
        if not ticket.done.is_set():
            self._until(ticket)
        if ticket.error is not None:
            raise self._told(ticket.error) from ticket.error
        self._lanes.compute_after(ticket.past)
        self._waits.append((start, self._lanes.computed()))
        return ticket.slot

    def free(self, leave: Leave | None = None) -> None:
        """Let go of the slot that was waited for, and have it filled for the layer whose turn comes next.

        ``leave`` is called before that, even if this step ends half way.
        """
        slot, after = self._tickets.popleft().slot, self._lanes.computed()
        if leave is not None:
            self._reader.put(Ticket(functools.partial(self._work.keep, leave, slot), after=after))
        self._ask(after)

    def settle(self) -> None:
        """Wait until everything that was asked for is done, and all steps are counted."""
        with self._lock:
            ticket = self._last()
            self._until(ticket)
            self._lanes.reach(ticket.past)
            if self._steps:
                self._lanes.reach(self._steps[-1].end)
            self._count()

    def _ask(self, after: Mark) -> None:
        layer, slot = self.order[self._turn % len(self.order)], self._turn % self.slots
        ticket = Ticket(functools.partial(self._work.fill, layer, slot), slot, self._work.generation, after)
        self._turn += 1
        self._tickets.append(ticket)
        self._reader.put(ticket)

    def _last(self) -> Ticket:
        """A ticket that is done when all before it are."""
        ticket = Ticket()
        self._reader.put(ticket)
        return ticket

    def _restart(self) -> None:
        """Begin with the first layer, when the reader has let go of every slot."""
        if self._turn:
            self.tally.add(restarts=1)
        self._work.generation += 1
        self._until(self._last())
        self._tickets.clear()
        self._turn = 0
        after = self._lanes.computed()
        for _ in range(self.slots):
            self._ask(after)

    def _count(self) -> None:
        """Count the steps that are known to have ended."""
        self._work.count_reading()
        while self._steps:
            step = self._steps[0]
            seconds = self._lanes.seconds(step.start, step.end)
            if seconds is None:
                return
            self._steps.popleft()
            waited = [self._lanes.seconds(*wait) or 0.0 for wait in step.waits]
            long = [each for each in waited if each > SHORTEST]
            self.tally.add_step(step.kind, seconds, sum(long), len(long))

    def _until(self, ticket: Ticket) -> None:
        while not ticket.done.wait(LOOK):
            if not self._reader.is_alive() and not ticket.done.is_set():
                raise StoreError(
                    f"{self._reader.called} {self._what} is gone: the model was closed, or this process was forked "
                    "from the one that had it. Call fxopt.optimize in the process that generates"
                )

    def _told(self, error: BaseException) -> StoreError:
        if isinstance(error, StoreError):
            return StoreError(str(error))
        return StoreError(f"{self._what} could not be read ({type(error).__name__}: {error})")


def _started(reader: Reader) -> Reader:
    reader.start()
    return reader


def _stop_readers() -> None:
    """At the end of the process: a thread that lets go of tensors while the interpreter goes takes it down."""
    for ring in list(_rings):
        ring.close()
    for reader in list(_readers):
        reader.join(LAST_READ)


atexit.register(_stop_readers)
