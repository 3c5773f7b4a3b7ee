"""A ring of slots that a thread fills ahead of whoever reads them.

    with ring.step():                  # one pass over the layers, in order
        for layer in layers:
            slot = ring.wait()         # what the next layer reads is in there
            ...                        # run it
            ring.free()                # the slot is free, and is filled for a later layer

What a layer has left in its slot can be stored before that. The order is known and comes again with
every step, so the last layers of a step let the first ones of the next be read. A step that ends half
way leaves the ring somewhere; the next one begins anew.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

from fxopt.offload.errors import StoreError
from fxopt.offload.store import Store

#: Stores what a layer has left in its slot; returns the bytes.
Leave = Callable[[memoryview], int]

_rings: weakref.WeakSet[Ring] = weakref.WeakSet()
_readers: weakref.WeakSet[threading.Thread] = weakref.WeakSet()  # also of rings that are gone

LOOK = 1.0  # seconds after which a waiting thread looks whether the reader is still there


@dataclass
class Counters:
    """What has happened so far. ``exposed`` is how long layers have waited."""

    steps: int = 0
    reads: int = 0
    nbytes: int = 0  # read
    stored: int = 0  # bytes that layers have left in their slots
    waits: int = 0  # layers whose slot was not filled yet
    exposed: float = 0.0  # seconds
    reading: float = 0.0  # seconds that the reader was busy
    stepping: float = 0.0  # seconds of whole steps
    restarts: int = 0  # after steps that ended half way, and when what is stored has changed


@dataclass
class Steps:
    """The steps of one kind, such as those that decode; seconds."""

    count: int = 0
    seconds: float = 0.0
    exposed: float = 0.0
    waits: int = 0


class Tally:
    """What rings have done: one, or several that are counted together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters = Counters()
        self._kinds: dict[str, Steps] = {}

    @property
    def counters(self) -> Counters:
        """A copy."""
        with self._lock:
            return replace(self._counters)

    @property
    def kinds(self) -> dict[str, Steps]:
        """What steps of each kind took; a copy."""
        with self._lock:
            return {kind: replace(steps) for kind, steps in self._kinds.items()}

    def add(self, **amounts: float) -> None:
        """Add to counters, from whatever thread."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._counters, name, getattr(self._counters, name) + amount)

    def add_step(self, kind: str, seconds: float, exposed: float, waits: int) -> None:
        self.add(steps=1, stepping=seconds)
        with self._lock:
            found = self._kinds.setdefault(kind, Steps())
            found.count, found.seconds = found.count + 1, found.seconds + seconds
            found.exposed, found.waits = found.exposed + exposed, found.waits + waits

    def begin_anew(self) -> None:
        """Forget what was counted so far."""
        with self._lock:
            self._counters, self._kinds = Counters(), {}


@dataclass
class _Ticket:
    """Something for the reader to do; nothing, to ask whether all before it is done."""

    job: Callable[[], None] | None = None
    slot: int = 0
    generation: int | None = None  # None: to be done whatever happens
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class _Work:
    """What the reader holds: nothing that would keep the ring alive."""

    def __init__(self, store: Store, slots: Sequence[memoryview], tally: Tally) -> None:
        self.store, self.slots, self.tally = store, tuple(slots), tally
        self.tickets: SimpleQueue[_Ticket | None] = SimpleQueue()
        self.generation = 0  # slots are not filled for earlier ones

    def serve(self) -> None:
        while (ticket := self.tickets.get()) is not None:
            try:
                if ticket.job is not None and ticket.generation in (None, self.generation):
                    ticket.job()
            except BaseException as error:  # whatever it is, somebody waits for it
                ticket.error = error
            ticket.job = None  # and what it holds
            ticket.done.set()
        self.store.close()

    def fill(self, layer: int, slot: int) -> None:
        started = time.perf_counter()
        nbytes = self.store.fill(layer, self.slots[slot])
        self.tally.add(nbytes=nbytes, reads=1, reading=time.perf_counter() - started)

    def keep(self, leave: Leave, slot: int) -> None:
        self.tally.add(stored=leave(self.slots[slot]))


class Ring:
    """Slots for the layers in ``order``, filled by a thread of their own. ``what`` lies there, for sentences."""

    def __init__(
        self,
        store: Store,
        order: Sequence[int],
        slots: Sequence[memoryview],
        *,
        what: str = "weights",
        tally: Tally | None = None,
    ) -> None:
        self.order = tuple(order)
        self.slots = len(slots)
        self.tally = Tally() if tally is None else tally
        self._what = what
        self._work = _Work(store, slots, self.tally)
        self._reader = threading.Thread(target=self._work.serve, name=f"fxopt {what}", daemon=True)
        self._reader.start()
        self._lock = threading.RLock()
        self._tickets: deque[_Ticket] = deque()  # in the order of the layers; the first is the next to be read
        self._turn = 0  # slots asked for since the last restart
        self._whole = False  # whether the last step went through
        self._exposed, self._waits = 0.0, 0  # of this step
        self.close = weakref.finalize(self, self._work.tickets.put, None)
        _rings.add(self)
        _readers.add(self._reader)

    @contextlib.contextmanager
    def step(self, kind: str = "") -> Iterator[None]:
        """One pass over all layers; others wait until it is through."""
        with self._lock:
            started = time.perf_counter()
            if not self._whole:
                self._restart()
            self._whole, self._exposed, self._waits = False, 0.0, 0
            yield
            self._whole = True
            self.tally.add_step(kind, time.perf_counter() - started, self._exposed, self._waits)

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
        """The slot of the next layer, when it is filled."""
        ticket = self._tickets[0]
        if not ticket.done.is_set():
            started = time.perf_counter()
            self._until(ticket)
            waited = time.perf_counter() - started
            self._exposed, self._waits = self._exposed + waited, self._waits + 1
            self.tally.add(exposed=waited, waits=1)
        if ticket.error is not None:
            raise self._told(ticket.error) from ticket.error
        return ticket.slot

    def free(self, leave: Leave | None = None) -> None:
        """Let go of the slot that was waited for, and have it filled for the layer whose turn comes next.

        ``leave`` is called by the reader before that, even if this step ends half way.
        """
        slot = self._tickets.popleft().slot
        if leave is not None:
            self._work.tickets.put(_Ticket(functools.partial(self._work.keep, leave, slot)))
        self._ask()

    def settle(self) -> None:
        """Wait until everything that was asked for is done."""
        with self._lock:
            self._until(self._last())

    def _ask(self) -> None:
        layer, slot = self.order[self._turn % len(self.order)], self._turn % self.slots
        ticket = _Ticket(functools.partial(self._work.fill, layer, slot), slot, self._work.generation)
        self._turn += 1
        self._tickets.append(ticket)
        self._work.tickets.put(ticket)

    def _last(self) -> _Ticket:
        """A ticket that is done when all before it are."""
        ticket = _Ticket()
        self._work.tickets.put(ticket)
        return ticket

    def _restart(self) -> None:
        """Begin with the first layer, when the reader has let go of every slot."""
        if self._turn:
            self.tally.add(restarts=1)
        self._work.generation += 1
        self._until(self._last())
        self._tickets.clear()
        self._turn = 0
        for _ in range(self.slots):
            self._ask()

    def _until(self, ticket: _Ticket) -> None:
        while not ticket.done.wait(LOOK):
            if not self._reader.is_alive() and not ticket.done.is_set():
                raise StoreError(
                    f"the thread that reads {self._what} is gone: the model was closed, or this process was forked "
                    "from the one that had it. Call fxopt.optimize in the process that generates"
                )

    def _told(self, error: BaseException) -> StoreError:
        if isinstance(error, StoreError):
            return StoreError(str(error))
        return StoreError(f"{self._what} could not be read ({type(error).__name__}: {error})")


def _stop_readers() -> None:
    """At the end of the process: a thread that lets go of tensors while the interpreter goes takes it down."""
    for ring in list(_rings):
        ring.close()
    for reader in list(_readers):
        reader.join(LOOK)


atexit.register(_stop_readers)
