"""A ring of slots that a thread fills ahead of whoever reads them.

    with ring.step():                  # one pass over the layers, in order
        for layer in layers:
            slot = ring.wait()         # the weights of the next layer are in there
            ...                        # run it
            ring.free()                # the slot is free, and is filled with a later layer

The order is known and comes again with every step, so the last layers of a step let the first ones of
the next be read. A step that ends half way leaves the ring somewhere; the next one begins anew.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

from fxopt.offload.errors import StoreError
from fxopt.offload.store import Store

LOOK = 1.0  # seconds after which a waiting thread looks whether the reader is still there


@dataclass
class Counters:
    """What has happened so far. ``exposed`` is how long layers have waited for their weights."""

    steps: int = 0
    reads: int = 0
    nbytes: int = 0
    waits: int = 0  # layers whose weights were not there yet
    exposed: float = 0.0  # seconds
    reading: float = 0.0  # seconds that the reader was busy
    stepping: float = 0.0  # seconds of whole steps
    restarts: int = 0  # after steps that ended half way


@dataclass
class Steps:
    """The steps of one kind, such as those that decode; seconds."""

    count: int = 0
    seconds: float = 0.0
    exposed: float = 0.0
    waits: int = 0


@dataclass
class _Ticket:
    """One slot to be filled with one layer; ``layer`` is None for a question whether all before it is done."""

    layer: int | None
    slot: int
    generation: int
    filled: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class _Work:
    """What the reader holds: nothing that would keep the ring alive."""

    def __init__(self, store: Store, slots: Sequence[memoryview]) -> None:
        self.store, self.slots = store, tuple(slots)
        self.tickets: SimpleQueue[_Ticket | None] = SimpleQueue()
        self.generation = 0  # tickets of earlier ones are not served
        self.counters = Counters()

    def serve(self) -> None:
        while (ticket := self.tickets.get()) is not None:
            try:
                if ticket.layer is not None and ticket.generation == self.generation:
                    self._fill(ticket.layer, self.slots[ticket.slot])
            except BaseException as error:  # whatever it is, somebody waits for it
                ticket.error = error
            ticket.filled.set()
        self.store.close()

    def _fill(self, layer: int, slot: memoryview) -> None:
        started = time.perf_counter()
        self.counters.nbytes += self.store.fill(layer, slot)
        self.counters.reading += time.perf_counter() - started
        self.counters.reads += 1


class Ring:
    """Slots for the layers in ``order``, filled by a thread of their own."""

    def __init__(self, store: Store, order: Sequence[int], slots: Sequence[memoryview]) -> None:
        self.order = tuple(order)
        self.slots = len(slots)
        self._work = _Work(store, slots)
        self._reader = threading.Thread(target=self._work.serve, name="fxopt weights", daemon=True)
        self._reader.start()
        self._lock = threading.RLock()
        self._tickets: deque[_Ticket] = deque()  # in the order of the layers; the first is the next to be read
        self._turn = 0  # tickets given out since the last restart
        self._whole = False  # whether the last step went through
        self._kinds: dict[str, Steps] = {}
        self.close = weakref.finalize(self, self._work.tickets.put, None)

    @property
    def counters(self) -> Counters:
        """A copy."""
        return replace(self._work.counters)

    @property
    def kinds(self) -> dict[str, Steps]:
        """What steps of each kind took; a copy."""
        return {kind: replace(steps) for kind, steps in self._kinds.items()}

    @contextlib.contextmanager
    def step(self, kind: str = "") -> Iterator[None]:
        """One pass over all layers; others wait until it is through."""
        with self._lock:
            started, before = time.perf_counter(), self.counters
            if not self._whole:
                self._restart()
            self._whole = False
            yield
            self._whole = True
            self._count(kind, time.perf_counter() - started, before)

    def count_anew(self) -> None:
        """Forget what was counted so far."""
        with self._lock:
            self._work.counters = Counters()
            self._kinds = {}

    def forget(self) -> None:
        """Read everything anew: the weights have changed."""
        with self._lock:
            self._whole = False

    def wait(self) -> int:
        """The slot with the weights of the next layer, when they are there."""
        ticket = self._tickets[0]
        if not ticket.filled.is_set():
            started = time.perf_counter()
            self._until(ticket)
            self._work.counters.waits += 1
            self._work.counters.exposed += time.perf_counter() - started
        if ticket.error is not None:
            raise _told(ticket.error) from ticket.error
        return ticket.slot

    def free(self) -> None:
        """Let go of the slot that was waited for, and have it filled with the layer whose turn comes next."""
        self._tickets.popleft()
        self._ask()

    def settle(self) -> None:
        """Wait until everything that was asked for is there."""
        with self._lock:
            for ticket in self._tickets:
                self._until(ticket)

    def _count(self, kind: str, seconds: float, before: Counters) -> None:
        now, found = self._work.counters, self._kinds.setdefault(kind, Steps())
        now.steps, now.stepping = now.steps + 1, now.stepping + seconds
        found.count, found.seconds = found.count + 1, found.seconds + seconds
        found.exposed += now.exposed - before.exposed
        found.waits += now.waits - before.waits

    def _ask(self) -> None:
        layer = self.order[self._turn % len(self.order)]
        ticket = _Ticket(layer, self._turn % self.slots, self._work.generation)
        self._turn += 1
        self._tickets.append(ticket)
        self._work.tickets.put(ticket)

    def _restart(self) -> None:
        """Begin with the first layer, when the reader has let go of every slot."""
        if self._turn:
            self._work.counters.restarts += 1
        self._work.generation += 1
        barrier = _Ticket(None, 0, self._work.generation)
        self._work.tickets.put(barrier)
        self._until(barrier)
        self._tickets.clear()
        self._turn = 0
        for _ in range(self.slots):
            self._ask()

    def _until(self, ticket: _Ticket) -> None:
        while not ticket.filled.wait(LOOK):
            if not self._reader.is_alive() and not ticket.filled.is_set():
                raise StoreError(
                    "the thread that reads weights is gone: the model was closed, or this process was forked from the "
                    "one that had it. Call fxopt.optimize in the process that generates"
                )


def _told(error: BaseException) -> StoreError:
    if isinstance(error, StoreError):
        return StoreError(str(error))
    return StoreError(f"weights could not be read ({type(error).__name__}: {error})")
