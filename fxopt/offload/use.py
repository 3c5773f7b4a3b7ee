"""What a report says of streamed weights: plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxopt.offload.placement import Placement
from fxopt.offload.prediction import Prediction
from fxopt.offload.ring import Steps


@dataclass
class StreamUse:
    """Where the weights of a model lie, what a decode step was expected to cost, and what steps have cost so far."""

    placement: Placement
    store: str  # "cpu" or "disk"
    written: int  # bytes, to a file of our own
    in_place: int  # bytes that are read where they lay, in the model's own files
    bandwidth: float = 0.0  # bytes per second, measured
    predicted: Prediction | None = None
    measured: dict[str, Steps] = field(default_factory=dict)

    @property
    def schedule(self) -> tuple[str, ...]:
        """One line for each layer: what happens before it runs, and after."""
        placed = self.placement
        turns = {layer: turn for turn, layer in enumerate(placed.offloaded)}
        lines = []
        for layer in range(len(placed.sizes)):
            if layer not in turns:
                lines.append(f"layer {layer}: resident")
                continue
            later = turns[layer] + placed.slots
            ahead = placed.offloaded[later % len(turns)]
            when = " of the next step" if later >= len(turns) else ""
            lines.append(f"layer {layer}: wait for its weights, run, read layer {ahead}{when} into the slot")
        return tuple(lines)
