"""What a report says of what is streamed: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from fxopt.offload.placement import Placement
from fxopt.offload.prediction import Prediction
from fxopt.offload.tally import Steps


@dataclass(kw_only=True)
class StreamUse:
    """Where layers lie, what a decode step was expected to cost, and what steps have cost so far."""

    turn: ClassVar[str]  # what happens to a layer that is streamed

    placement: Placement
    store: str  # "cpu" or "disk"
    device: str = "cpu"  # that the slots lie on
    context: int  # rows of the cache that were filled when a step was timed
    bandwidth: float = 0.0  # bytes per second, measured
    predicted: Prediction | None = None
    measured: dict[str, Steps] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """The store in words."""
        return "memory of the host" if self.store == "cpu" else "disk"

    @property
    def schedule(self) -> tuple[str, ...]:
        """One line for each layer: what happens before it runs, and after."""
        placed, lines = self.placement, []
        for layer in range(len(placed.sizes)):
            if layer in placed.offloaded:
                ahead, is_next_step = placed.ahead(layer)
                when = " of the next step" if is_next_step else ""
                lines.append(f"layer {layer}: {self.turn}, read layer {ahead}{when} into the slot")
            else:
                lines.append(f"layer {layer}: resident")
        return tuple(lines)


@dataclass(kw_only=True)
class WeightUse(StreamUse):
    """Weights that are streamed."""

    turn: ClassVar[str] = "wait for its weights, run"

    written: int  # bytes, to a file of our own
    in_place: int  # bytes that are read where they lay, in the model's own files


@dataclass(kw_only=True)
class CacheUse(StreamUse):
    """Rows of the cache that are streamed; ``placement`` is that of one sequence, with all rows filled."""

    turn: ClassVar[str] = "wait for its rows, run, store the new ones"

    row_bytes: int  # of one token, in the layers that are streamed
