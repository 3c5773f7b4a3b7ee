"""The K and V of some layers that are not on the device: in a store, and in slots while their layers run."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fxopt.chain import Plan
from fxopt.device_lanes import DeviceLanes
from fxopt.device_rows import DeviceRows, stage_bytes
from fxopt.file_weights import raw
from fxopt.offload.ring import Ring
from fxopt.offload.rows import Block, RowStore, Strips
from fxopt.offload.tally import Tally
from fxopt.offload.work import Leave
from fxopt.program import Buffer
from fxopt.streamed_chain import RingFeed

WHAT = "rows of the cache"  # in sentences


def block_of(buffers: Sequence[Buffer], sequences: int, capacity: int) -> Block:
    """The bytes of one layer."""
    strips = (Strips(buffer.heads, buffer.width * buffer.dtype.itemsize) for buffer in buffers)
    return Block(tuple(strips), sequences, capacity)


class AwayRows:
    """Those layers of one set of buffers. ``layers`` has the buffers of each, in the order in which they run."""

    def __init__(
        self,
        layers: Sequence[Sequence[Buffer]],
        store: RowStore | DeviceRows,
        slots: int,
        tally: Tally,
        lanes: DeviceLanes | None = None,
        *,
        at_once: bool = False,
    ) -> None:
        self.layers = tuple(map(tuple, layers))
        self.batch = 0
        self.store = store
        self._where = {
            buffer.name: (turn, number, buffer)
            for turn, buffers in enumerate(self.layers)
            for number, buffer in enumerate(buffers)
        }
        largest = max(block.nbytes for block in store.blocks)
        self._rests = stage_bytes(store.blocks) if lanes is not None else 0  # bytes where rows are sorted
        if lanes is not None:
            self.slots = [lanes.room(largest) for _ in range(slots)]
        else:
            with torch.inference_mode(False):  # tensors made in that mode could not be written outside of it
                self.slots = [torch.zeros(largest, dtype=torch.uint8) for _ in range(slots)]
        memories = [raw(slot) for slot in self.slots] if lanes is None else self.slots
        order = range(len(self.layers))
        self.ring = Ring(store, order, memories, what=WHAT, tally=tally, lanes=lanes, at_once=at_once)
        self.writes = range(0)  # the rows that the next step will write

    @property
    def names(self) -> frozenset[str]:
        """Of the buffers."""
        return frozenset(self._where)

    @property
    def nbytes(self) -> int:
        """Memory of the device."""
        return sum(slot.nbytes for slot in self.slots) + self._rests

    @property
    def is_served(self) -> bool:
        return self.ring.is_served

    def close(self) -> None:
        """Let go of the store."""
        self.ring.stop()

    def begin(self, batch: int) -> None:
        """Be empty, for so many sequences."""
        self.ring.settle()
        self.ring.forget()
        self.batch = batch
        self.store.begin(batch)
        for slot in self.slots:  # NaN of whoever had them would come through a mask
            slot.zero_()

    def shown(self, name: str) -> Tensor:
        """A tensor of the size of a buffer, without values."""
        buffer = self._where[name][2]
        return torch.empty(buffer.shape(self.batch, self.store.blocks[0].capacity), dtype=buffer.dtype, device="meta")

    def read(self, name: str, start: int, end: int) -> Tensor:
        """Rows of a buffer, as a tensor of its own."""
        turn, number, buffer = self._where[name]
        self.ring.settle()
        rows = torch.empty(buffer.shape(self.batch, end - start), dtype=buffer.dtype)
        if rows.nbytes:
            self.store.read(turn, number, start, end, raw(rows))
            self.ring.tally.add(nbytes=rows.nbytes)
        return rows.to(self.slots[0].device)

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Rows of a buffer from ``start`` on."""
        turn, number, buffer = self._where[name]
        self.ring.settle()
        self.ring.forget()
        whole = rows.to(buffer.dtype).expand(buffer.shape(self.batch, rows.shape[2])).contiguous().cpu()
        if whole.nbytes:
            self.store.write(turn, number, start, start + rows.shape[2], raw(whole))
            self.ring.tally.add(stored=whole.nbytes)

    def crop(self, rows: int) -> None:
        """Have no more than so many rows; slots may hold some of the others, behind the mask."""
        self.ring.settle()
        self.store.crop(rows)

    def feed(self, plan: Plan) -> RingFeed:
        """What brings the rows to the pieces of a graph, and stores those that they write."""
        turns: dict[int, int] = {}
        for turn, buffers in enumerate(self.layers):
            readers = plan.readers([buffer.name for buffer in buffers])
            if len(readers) != 1 or readers[0] in turns:
                raise RuntimeError(f"the buffers {', '.join(b.name for b in buffers)} are not those of one piece alone")
            turns[readers[0]] = turn
        if list(turns) != sorted(turns):
            raise RuntimeError("layers run in another order than their rows are brought in")
        views = {place: [_views(self, turn, slot, plan) for slot in self.slots] for place, turn in turns.items()}

        def leave(place: int) -> Leave:
            return functools.partial(self.store.put, turns[place], self.writes.start, self.writes.stop)

        return RingFeed(self.ring, views, leave=leave)


def _views(away: AwayRows, turn: int, slot: Tensor, plan: Plan) -> list[tuple[int, Tensor]]:
    """The buffers of a layer as they lie in a slot, with their numbers in the plan."""
    block = away.store.blocks[turn]
    views = []
    for start, buffer in zip(block.starts, away.layers[turn], strict=True):
        shape = buffer.shape(block.sequences, block.capacity)
        nbytes = functools.reduce(int.__mul__, shape) * buffer.dtype.itemsize
        whole = slot[start : start + nbytes].view(buffer.dtype).view(shape)
        views.append((plan.inputs.index(buffer.name), whole[: away.batch]))
    return views
