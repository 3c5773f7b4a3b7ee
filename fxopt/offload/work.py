"""Who fills the slots of a ring and stores what layers have left there: a thread, or whoever asks for it.

Reading a file takes a thread of its own. Copies that a device makes by itself are only put into its lane, and
that is done at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any, Protocol

from fxopt.offload.lanes import Lanes, Mark
from fxopt.offload.store import Store
from fxopt.offload.tally import Tally

#: Stores what a layer has left in its slot; returns the bytes.
Leave = Callable[[Any], int]


@dataclass
class Ticket:
    """Something to do; nothing, to ask whether all before it is done."""

    job: Callable[[], None] | None = None
    slot: int = 0
    generation: int | None = None  # None: to be done whatever happens
    after: Mark | None = None  # what computes is done with the slot
    past: Mark | None = None  # of the copies: the job is done, and all before it
    done: threading.Event = field(default_factory=threading.Event)
    error: BaseException | None = None


class Work:
    """What there is to be done; holds nothing that would keep the ring alive."""

    def __init__(self, store: Store, slots: Sequence[Any], tally: Tally, lanes: Lanes) -> None:
        self.store, self.slots, self.tally, self.lanes = store, tuple(slots), tally, lanes
        self.generation = 0  # slots are not filled for earlier ones
        self._reads: deque[tuple[float, Mark, Mark]] = deque()  # that are not counted yet
        self._counting = threading.Lock()

    def do(self, ticket: Ticket) -> None:
        try:
            if ticket.generation in (None, self.generation):
                if ticket.after is not None:
                    self.lanes.copy_after(ticket.after)
                if ticket.job is not None:
                    ticket.job()
                ticket.past = self.lanes.copied()
        except BaseException as error:  # whatever it is, somebody waits for it
            ticket.error = error
        ticket.job = None  # and what it holds
        ticket.done.set()

    def fill(self, layer: int, slot: int) -> None:
        started, start = time.perf_counter(), self.lanes.copied()
        nbytes = self.store.fill(layer, self.slots[slot])
        end, seconds = self.lanes.copied(), time.perf_counter() - started
        self.tally.add(nbytes=nbytes, reads=1)
        self._reads.append((seconds, start, end))
        self.count_reading()

    def keep(self, leave: Leave, slot: int) -> None:
        self.tally.add(stored=leave(self.slots[slot]))

    def count_reading(self) -> None:
        """Count what has come to its end: whatever took longer, the call or the copies that it has asked for."""
        with self._counting:
            while self._reads:
                called, start, end = self._reads[0]
                copying = self.lanes.seconds(start, end)
                if copying is None:
                    return
                self._reads.popleft()
                self.tally.add(reading=max(called, copying))


class Hand(Protocol):
    """Does the work."""

    called: str  # in sentences, before that which is read

    def put(self, ticket: Ticket | None) -> None:
        """Have something done; None: let go of the store, there is nothing more to do."""

    def is_alive(self) -> bool: ...

    def join(self, timeout: float) -> None: ...


class Reader(threading.Thread):
    """Does the work in a thread of its own, one thing after the other."""

    called = "the thread that reads"

    def __init__(self, work: Work, name: str) -> None:
        self._tickets: SimpleQueue[Ticket | None] = SimpleQueue()
        # An argument is let go of while the thread still counts as running. A field would go with this object, in the
        # last moment of the thread, and a tensor that goes while the interpreter does takes the process down.
        super().__init__(target=_serve, args=(work, self._tickets), name=name, daemon=True)

    def put(self, ticket: Ticket | None) -> None:
        self._tickets.put(ticket)


def _serve(work: Work, tickets: SimpleQueue[Ticket | None]) -> None:
    while (ticket := tickets.get()) is not None:
        work.do(ticket)
    work.store.close()


class AtOnce:
    """Does the work when it is asked for."""

    called = "what copies"

    def __init__(self, work: Work) -> None:
        self._work = work
        self._process = os.getpid()
        self._is_open = True

    def put(self, ticket: Ticket | None) -> None:
        if not self.is_alive():
            return
        if ticket is None:
            self._is_open = False
            self._work.store.close()
            return
        self._work.do(ticket)
        if ticket.error is not None and not isinstance(ticket.error, Exception):
            raise ticket.error  # Ctrl-C: nobody else would see it

    def is_alive(self) -> bool:
        return self._is_open and os.getpid() == self._process  # a device does not go along with a fork

    def join(self, timeout: float) -> None:
        """There is nothing to wait for."""
