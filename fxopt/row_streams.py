"""``offload_kv`` at work: decides for every set of buffers which layers are away, and makes room for them."""

from __future__ import annotations

import torch

from fxopt.away_rows import AwayRows, block_of
from fxopt.device_lanes import lanes_of
from fxopt.device_rows import DeviceRows, stage_bytes
from fxopt.errors import InvalidRequestError
from fxopt.offload.placement import Placement, place
from fxopt.offload.rows import RowStore
from fxopt.offload.tally import Tally
from fxopt.passes.offload_kv import OffloadKV
from fxopt.program import Buffer, Facts


class RowStreams:
    """What is asked of every set of buffers of one model; ``tally`` counts over all of them."""

    def __init__(self, asked: OffloadKV, facts: Facts) -> None:
        self.kind = asked.store
        self.tally = Tally()
        self._asked = asked
        self._capacity = facts.capacity
        self._lanes = lanes_of(facts.device)
        self._layers: list[list[Buffer]] = [[] for _ in facts.layers]
        for buffer, layer in facts.buffers().items():
            self._layers[layer].append(buffer)

    def placed(self, sequences: int) -> Placement:
        """Which layers stay in a set for so many sequences, and which are away."""
        blocks = [block_of(buffers, sequences, self._capacity) for buffers in self._layers]
        sizes = [block.nbytes for block in blocks]
        asked, fixed = self._asked, sequences * self._capacity * torch.long.itemsize  # the mask
        if self._lanes is not None:
            fixed += stage_bytes(blocks)
        try:
            return place(sizes, fixed, budget=asked.budget_bytes, resident=asked.share, depth=asked.depth)
        except InvalidRequestError as error:
            raise InvalidRequestError(f"offload_kv, in a cache for a batch of {sequences}: {error}") from error

    def row_bytes(self, layer: int) -> int:
        """What one token of one sequence takes in a layer."""
        return block_of(self._layers[layer], 1, self._capacity).row_bytes

    def probe(self, sequences: int) -> None:
        """Raise a sentence if a set for so many sequences cannot be had."""
        if self.placed(sequences).offloaded:
            self._store(sequences).close()

    def rows(self, sequences: int) -> AwayRows | None:
        """The layers of a new set that are away; None if all of them fit."""
        placed = self.placed(sequences)
        if not placed.offloaded:
            return None
        layers = [self._layers[layer] for layer in placed.offloaded]
        at_once = self._lanes is not None and self.kind == "cpu"
        return AwayRows(layers, self._store(sequences), placed.slots, self.tally, self._lanes, at_once=at_once)

    def _store(self, sequences: int) -> RowStore | DeviceRows:
        away = (self._layers[layer] for layer in self.placed(sequences).offloaded)
        blocks = [block_of(buffers, sequences, self._capacity) for buffers in away]
        if self._lanes is not None:
            return DeviceRows(blocks, self._lanes, self.kind, self._asked.parent)
        return RowStore(blocks, self.kind, self._asked.parent)
