"""Slots on a device, driven by a fake one: whatever it puts off, layers see their own bytes, and no wait can go."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from fake_device import COMPUTE, ORDERS, FakeLanes
from torch import Tensor

from fxopt.offload.errors import StoreError
from fxopt.offload.ring import Ring

SIZE = 64


class Blocks:
    """Layer n is n + 1 in every byte, in memory of the host."""

    def __init__(self, lanes: FakeLanes, layers: int, *, keeps: bool = True) -> None:
        self._lanes, self.keeps = lanes, keeps
        self._blocks = [torch.full((SIZE,), layer + 1, dtype=torch.uint8) for layer in range(layers)]
        for block in self._blocks:
            lanes.pin(block)
        self.left: list[Tensor] = []
        self.is_closed = False

    def fill(self, layer: int, slot: Tensor) -> int:
        self._lanes.copy(slot, self._blocks[layer])
        return SIZE

    def keep(self, slot: Tensor) -> int:
        kept = torch.zeros(SIZE, dtype=torch.uint8)
        self._lanes.pin(kept)
        self._lanes.copy(kept, slot)
        self.left.append(kept)
        return SIZE

    def close(self) -> None:
        self.is_closed = True


def run(ring: Ring, slots: Sequence[Tensor], lanes: FakeLanes, store: Blocks, layers: int, stop: int = -1) -> list[int]:
    """One step that is only put into the lane: what every layer found in its slot, and left there with 100 added."""
    seen: list[int] = []

    leave = store.keep if store.keeps else None

    def layer_of(slot: Tensor) -> None:
        seen.append(int(slot[0]) if bool((slot == slot[0]).all()) else -1)
        slot += 100

    with ring.step():
        for layer in range(layers):
            slot = slots[ring.wait()]
            lanes.compute(lambda slot=slot: layer_of(slot))  # type: ignore[misc]
            if layer == stop:
                raise KeyboardInterrupt
            ring.free(leave)
    return seen


def several(lanes: FakeLanes, layers: int, slots: int, *, at_once: bool, stop: int = -1, keeps: bool = True) -> bool:
    """A few steps that nobody waits for, one of them cut short; whether all layers saw and left their own bytes."""
    store = Blocks(lanes, layers, keeps=keeps)
    memory = [lanes.room(SIZE) for _ in range(slots)]
    ring = Ring(store, range(layers), memory, lanes=lanes, at_once=at_once)
    seen = []
    for turn in range(4):
        seen.append(run(ring, memory, lanes, store, layers))
        if turn == 1 and stop >= 0:
            with pytest.raises(KeyboardInterrupt):
                run(ring, memory, lanes, store, layers, stop)
            store.left += [torch.empty(0)] * (layers - stop)
    ring.settle()
    lanes.finish()
    own = list(range(1, layers + 1))
    left = [int(one[0]) for one in store.left if one.numel()]
    expected = [layer + 100 for layer in own] * 2 + [layer + 100 for layer in own[: max(0, stop)]]
    counted = ring.tally.counters
    assert (counted.steps, counted.stored) == (4, SIZE * len(left))
    expected += [layer + 100 for layer in own] * 2
    return seen == [own] * 4 and left == (expected if keeps else [])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("layers", [1, 2, 5, 8])
@pytest.mark.parametrize("at_once", [True, False])
def test_every_layer_sees_its_own_bytes(layers: int, slots: int, order: str, at_once: bool) -> None:
    for stop in (-1, 0, layers - 1):
        for keeps in (True, False):
            assert several(FakeLanes(order), layers, slots, at_once=at_once, stop=stop, keeps=keeps)


@pytest.mark.parametrize("slots", [1, 2, 3, 4])
@pytest.mark.parametrize("wait", ["compute_after", "copy_after"])
def test_no_wait_can_be_left_out(wait: str, slots: int) -> None:
    assert not all(several(FakeLanes(order, deaf=wait), 5, slots, at_once=True) for order in ORDERS)


def test_the_host_waits_for_nothing_in_a_step() -> None:
    lanes = FakeLanes("both late")
    store = Blocks(lanes, 6)
    memory = [lanes.room(SIZE) for _ in range(2)]
    ring = Ring(store, range(6), memory, lanes=lanes, at_once=True)
    for _ in range(3):
        run(ring, memory, lanes, store, 6)
    assert lanes.reached == []
    assert ring.tally.counters.steps == 0  # nothing has ended yet
    ring.settle()
    assert ring.tally.counters.steps == 3
    assert COMPUTE in lanes.reached


def test_waits_are_counted_by_the_device() -> None:
    lanes = FakeLanes("copies early")
    store = Blocks(lanes, 4)
    memory = [lanes.room(SIZE) for _ in range(4)]
    ring = Ring(store, range(4), memory, lanes=lanes, at_once=True)
    lanes.seconds = lambda start, end: 0.5 if end.is_past else None  # type: ignore[method-assign]
    run(ring, memory, lanes, store, 4)
    ring.settle()
    counted = ring.tally.counters
    assert (counted.waits, counted.exposed, counted.stepping) == (4, 2.0, 0.5)
    assert counted.reading == 0.5 * counted.reads


def test_a_ring_without_a_thread_is_closed() -> None:
    lanes = FakeLanes()
    store = Blocks(lanes, 3)
    memory = [lanes.room(SIZE)]
    ring = Ring(store, range(3), memory, lanes=lanes, at_once=True)
    run(ring, memory, lanes, store, 3)
    assert ring.is_served
    ring.stop()
    assert store.is_closed
    assert not ring.is_served
    with pytest.raises(StoreError, match="what copies weights is gone"):
        run(ring, memory, lanes, store, 3)


def test_ctrl_c_in_a_copy_is_not_kept_for_later() -> None:
    lanes = FakeLanes()
    store = Blocks(lanes, 3)
    memory = [lanes.room(SIZE)]
    ring = Ring(store, range(3), memory, lanes=lanes, at_once=True)
    fill = store.fill

    def interrupted(layer: int, slot: Tensor) -> int:
        store.fill = fill  # type: ignore[method-assign]
        raise KeyboardInterrupt

    store.fill = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(ring, memory, lanes, store, 3)
    found = run(ring, memory, lanes, store, 3)
    lanes.finish()
    assert found == [1, 2, 3]
