"""A ring of slots: the right weights at the right time, overlap, and steps that end half way."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from fxopt.offload import ring as rings
from fxopt.offload.errors import StoreError
from fxopt.offload.measuring import bandwidth, rates
from fxopt.offload.prediction import predict
from fxopt.offload.ring import Ring
from fxopt.offload.work import Ticket

SIZE = 64


class Patterns:
    """Layer n is n in every byte; a read takes ``seconds``, and an error is raised where it is asked for."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.errors: dict[int, BaseException] = {}
        self.read: list[int] = []
        self.closed = threading.Event()

    def fill(self, layer: int, slot: memoryview) -> int:
        self.read.append(layer)
        half = len(slot) // 2
        slot[:half] = bytes([layer]) * half
        if self.seconds:
            time.sleep(self.seconds)
        if layer in self.errors:
            raise self.errors[layer]
        slot[half:] = bytes([layer]) * (len(slot) - half)
        return len(slot)

    def close(self) -> None:
        self.closed.set()


def ring_of(store: Patterns, layers: int, slots: int) -> tuple[Ring, list[bytearray]]:
    memory = [bytearray(SIZE) for _ in range(slots)]
    return Ring(store, range(layers), [memoryview(one) for one in memory]), memory


def run(ring: Ring, memory: Sequence[bytearray], layers: int, seconds: float = 0.0, stop: int | None = None) -> None:
    """One step; every layer sees its own weights before it runs and after."""
    with ring.step():
        for layer in range(layers):
            slot = ring.wait()
            assert set(memory[slot]) == {layer}
            if layer == stop:
                raise KeyboardInterrupt
            if seconds:
                time.sleep(seconds)
            assert set(memory[slot]) == {layer}
            ring.free()


def several(steps: int, ring: Ring, memory: Sequence[bytearray], layers: int) -> None:
    for _ in range(steps):
        run(ring, memory, layers)


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("layers", [1, 2, 3, 5, 8])
def test_every_layer_sees_its_own_weights(layers: int, slots: int) -> None:
    store = Patterns()
    ring, memory = ring_of(store, layers, slots)
    for _ in range(50):
        run(ring, memory, layers)
    ring.settle()
    assert store.read == [turn % layers for turn in range(50 * layers + slots)]
    counted = ring.tally.counters
    assert (counted.steps, counted.restarts) == (50, 0)
    assert (counted.reads, counted.nbytes) == (len(store.read), SIZE * len(store.read))


def test_a_settled_step_reads_every_layer_once() -> None:
    ring, memory = ring_of(Patterns(), 5, 2)
    run(ring, memory, 5)
    ring.settle()
    before = ring.tally.counters.nbytes
    run(ring, memory, 5)
    ring.settle()
    assert ring.tally.counters.nbytes - before == 5 * SIZE


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("stop", [0, 2, 4])
def test_a_step_that_ends_half_way_is_forgotten(stop: int, slots: int) -> None:
    ring, memory = ring_of(Patterns(0.001), 5, slots)
    for _ in range(3):
        run(ring, memory, 5)
        with pytest.raises(KeyboardInterrupt):
            run(ring, memory, 5, stop=stop)
    run(ring, memory, 5)
    assert ring.tally.counters.restarts == 3


def test_weights_that_changed_are_read_anew() -> None:
    store = Patterns()
    ring, memory = ring_of(store, 3, 2)
    run(ring, memory, 3)
    ring.settle()
    reads = len(store.read)
    ring.forget()
    run(ring, memory, 3)
    assert store.read[reads : reads + 3] == [0, 1, 2]


def test_threads_take_turns() -> None:
    ring, memory = ring_of(Patterns(), 4, 2)
    failed: list[BaseException] = []

    def many() -> None:
        try:
            for _ in range(40):
                run(ring, memory, 4)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert ring.tally.counters.steps == 160


# Overlap


@pytest.mark.parametrize(("slots", "least", "most"), [(1, 0.4, 0.6), (2, 0.8, 1.1), (3, 0.8, 1.1)])
def test_copies_are_hidden_behind_the_layers(slots: int, least: float, most: float) -> None:
    """Copying and computing take the same time; in a row they would reach one half."""
    layers, seconds, steps = 8, 0.01, 6  # reads reach across both ends of what is timed
    ring, memory = ring_of(Patterns(seconds), layers, slots)
    run(ring, memory, layers, seconds)
    before, started = ring.tally.counters, time.perf_counter()
    for _ in range(steps):
        run(ring, memory, layers, seconds)
    took, after = time.perf_counter() - started, ring.tally.counters
    copying, computing = after.reading - before.reading, took - (after.exposed - before.exposed)
    assert least < max(copying, computing) / took < most
    predicted = predict(
        [SIZE] * layers, range(layers), slots, rates(SIZE / (copying / steps / layers), layers, before, after)
    )
    assert predicted.step == pytest.approx(took / steps, rel=0.25)


def test_the_next_step_is_read_while_nothing_runs() -> None:
    ring, memory = ring_of(Patterns(0.02), 4, 2)
    run(ring, memory, 4)
    time.sleep(0.08)  # the head, and sampling
    before = ring.tally.counters
    run(ring, memory, 4, seconds=0.03)
    # A look at the clock that the system interrupts counts as a wait, too; one for a read would take 20 ms.
    assert ring.tally.counters.exposed - before.exposed < 0.005


def test_bandwidth_is_measured() -> None:
    found = bandwidth(Patterns(0.01), [0, 1, 2], memoryview(bytearray(SIZE)))
    assert SIZE / 0.02 < found < SIZE / 0.01


# What can go wrong


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (StoreError("the file has gone"), "^the file has gone$"),
        (OSError(5, "Input/output error"), r"weights could not be read \(OSError: .*Input/output error\)"),
        (MemoryError(), "could not be read .MemoryError"),
        (SystemExit(1), "could not be read .SystemExit"),
    ],
)
def test_an_error_of_the_reader_is_raised_where_its_layer_is_needed(error: BaseException, sentence: str) -> None:
    store = Patterns()
    ring, memory = ring_of(store, 4, 2)
    run(ring, memory, 4)
    store.errors[2] = error
    for _ in range(3):  # and again, as long as it lasts; no layer runs with half of its weights
        with pytest.raises(StoreError, match=sentence):
            several(2, ring, memory, 4)
    store.errors.clear()
    run(ring, memory, 4)


def test_a_reader_that_is_gone_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rings, "LOOK", 0.02)
    ring, memory = ring_of(Patterns(), 3, 2)
    run(ring, memory, 3)
    ring.close()
    with pytest.raises(StoreError, match="the thread that reads weights is gone"):
        several(3, ring, memory, 3)


def test_ctrl_c_reaches_a_thread_that_waits() -> None:
    ring, memory = ring_of(Patterns(0.6), 3, 2)
    threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run(ring, memory, 3)
    assert time.perf_counter() - started < 0.5
    run(ring, memory, 3)


def _child(ring: Ring, memory: list[bytearray], said: Any) -> None:
    rings.LOOK = 0.02
    try:
        for _ in range(3):
            run(ring, memory, 3)
        said.put("it ran")
    except StoreError as error:
        said.put(str(error))


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_forked_process_is_told() -> None:
    fork = multiprocessing.get_context("fork")
    ring, memory = ring_of(Patterns(), 3, 2)
    run(ring, memory, 3)
    ring.settle()
    said = fork.SimpleQueue()
    child = fork.Process(target=_child, args=(ring, memory, said))
    child.start()
    child.join(20)
    assert not child.is_alive()
    assert "forked" in said.get()
    run(ring, memory, 3)


def test_a_ring_that_nobody_holds_ends_its_thread_and_its_store() -> None:
    store = Patterns()
    ring, memory = ring_of(store, 3, 2)
    run(ring, memory, 3)
    reader, gone = ring._reader, weakref.ref(ring)
    del ring
    gc.collect()
    assert gone() is None
    reader.join(5)
    assert not reader.is_alive()
    assert store.closed.is_set()


def test_no_reader_outlives_the_interpreter() -> None:
    ring, memory = ring_of(Patterns(), 3, 2)
    run(ring, memory, 3)
    left, _ = ring_of(Patterns(seconds=0.8), 3, 2)  # two more reads: longer than who only looks would wait
    readers = [ring._reader, left._reader]
    with left.step():
        left.wait()
        left.free()
    del left  # its reader is still busy
    rings._stop_readers()
    assert not any(reader.is_alive() for reader in readers)


def test_slots_are_let_go_of_while_their_reader_can_be_waited_for() -> None:
    """Who ends the process waits for the readers that it finds; a tensor that goes later takes the process down."""
    found: list[bool] = []
    gone = threading.Event()

    class Slot(bytearray):
        def __del__(self) -> None:
            found.append(threading.current_thread() in set[object](rings._readers))
            gone.set()

    def last() -> None:
        gone.wait(0.2)  # the thread goes on when the ring is gone, and is then the last who has the slot

    ring = Ring(Patterns(), [0], [Slot(SIZE)])
    ring._reader.put(Ticket(last))
    del ring
    gc.collect()
    assert gone.wait(5)
    assert found == [True]
