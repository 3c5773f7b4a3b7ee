"""How fast this machine is: bytes from a store into a slot, and what a ring has seen of its steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from fxopt.offload.lanes import HostLanes, Lanes
from fxopt.offload.prediction import Rates
from fxopt.offload.store import Store
from fxopt.offload.tally import Counters

READS = 3


def bandwidth(store: Store, layers: Sequence[int], slot: Any, lanes: Lanes | None = None) -> float:
    """Bytes per second, from reading a few layers."""
    lanes = HostLanes() if lanes is None else lanes
    found = []
    for turn in range(READS):
        started = time.perf_counter()
        nbytes = store.fill(layers[turn * len(layers) // READS], slot)
        lanes.reach(lanes.copied())
        found.append(nbytes / max(1e-9, time.perf_counter() - started))
    return statistics.median(found)


def rates(bandwidth: float, layers: int, before: Counters, after: Counters) -> Rates:
    """Rates from the steps between two looks at a ring: what was not waited for was computed."""
    steps = max(1, after.steps - before.steps)
    computing = (after.stepping - before.stepping - (after.exposed - before.exposed)) / steps
    return Rates(bandwidth, (max(0.0, computing) / layers,) * layers)
