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
class Span:
    """What goes on for some time: a layer is read, or runs. Seconds from the start of the step."""

    layer: int
    is_read: bool
    start: float
    end: float


@dataclass(frozen=True)
class Prediction:
    """One step, when many have gone before. Seconds but for ``moved``."""

    moved: int  # bytes from the store
    copy: float  # that moving them takes
    compute: float
    step: float
    timeline: tuple[Span, ...] = ()  # layers that run in this step, and reads that go on meanwhile

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
    ends, spans = _simulated(sizes, frozenset(offloaded), slots, rates)
    half, begin = STEPS // 2, ends[-2]
    step = max(compute, (ends[-1] - ends[half - 1]) / (STEPS - half))
    timeline = [
        Span(one.layer, one.is_read, max(0.0, one.start - begin), min(one.end, ends[-1]) - begin)
        for one in spans
        if one.end > begin and one.start < ends[-1]
    ]
    return Prediction(moved, moved / rates.bandwidth, compute, step, tuple(timeline))


def _simulated(
    sizes: Sequence[int], offloaded: frozenset[int], slots: int, rates: Rates
) -> tuple[list[float], list[Span]]:
    """When each of the steps ends, and what went on."""
    now = reader = 0.0
    freed = [0.0] * slots  # when each slot was last let go of
    turn, ends, spans = 0, [], []
    for _ in range(STEPS + 1):  # in the last one layers are read that are read ahead in the one before
        for layer, seconds in enumerate(rates.compute):
            if layer in offloaded:
                begun = max(reader, freed[turn % slots])
                reader = begun + sizes[layer] / rates.bandwidth
                spans.append(Span(layer, True, begun, reader))
                now = max(now, reader)
            spans.append(Span(layer, False, now, now + seconds))
            now += seconds
            if layer in offloaded:
                freed[turn % slots] = now
                turn += 1
        now += rates.rest
        ends.append(now)
    return ends[:STEPS], spans
