"""What a step costs whose layers are streamed: a clock, a reader and a ring of slots, in numbers.

One reader fills slots in the order of the layers. It begins with a layer when it has finished the one
before and the slot is free; the layer runs when the one before has run and its weights are there.
Steps follow each other without a pause, so what counts is the average over many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STEPS = 64  # simulated; the first half is the start, and does not count


@dataclass(frozen=True)
class Rates:
    """What was measured on a machine."""

    bandwidth: float  # bytes per second from the store into a slot
    compute: tuple[float, ...]  # seconds of each layer, its weights being there
    rest: float = 0.0  # seconds of a step outside of the layers: embedding, head, sampling


@dataclass(frozen=True)
class Prediction:
    """One step, when many have gone before. Seconds but for ``moved``."""

    moved: int  # bytes from the store
    copy: float  # that moving them takes
    compute: float
    step: float

    @property
    def exposed(self) -> float:
        """How long the step waits for weights."""
        return max(0.0, round(self.step - self.compute, 12))

    @property
    def hidden(self) -> float:
        """How much of the copying goes on while something is computed."""
        return max(0.0, self.copy - self.exposed)

    @property
    def ideal(self) -> float:
        """The step if copying and computing never waited for each other."""
        return max(self.copy, self.compute)


def predict(sizes: Sequence[int], offloaded: Sequence[int], slots: int, rates: Rates) -> Prediction:
    """What a step costs with some layers ``offloaded``; ``sizes`` are the bytes of all."""
    moved = sum(sizes[layer] for layer in offloaded)
    compute = sum(rates.compute) + rates.rest
    if not offloaded:
        return Prediction(0, 0.0, compute, compute)
    ends = _ends(sizes, frozenset(offloaded), slots, rates)
    half = STEPS // 2
    step = max(compute, (ends[-1] - ends[half - 1]) / (STEPS - half))
    return Prediction(moved, moved / rates.bandwidth, compute, step)


def _ends(sizes: Sequence[int], offloaded: frozenset[int], slots: int, rates: Rates) -> list[float]:
    """When each of the simulated steps ends."""
    now = reader = 0.0
    freed = [0.0] * slots  # when each slot was last let go of
    turn, ends = 0, []
    for _ in range(STEPS):
        for layer, seconds in enumerate(rates.compute):
            if layer in offloaded:
                reader = max(reader, freed[turn % slots]) + sizes[layer] / rates.bandwidth
                now = max(now, reader)
            now += seconds
            if layer in offloaded:
                freed[turn % slots] = now
                turn += 1
        now += rates.rest
        ends.append(now)
    return ends
