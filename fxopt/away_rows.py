"""The K and V of some layers that are not on the device: in a store, and in slots while their layers run."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxopt.chain import Plan
from fxopt.file_weights import raw
from fxopt.offload.ring import Ring, Tally
from fxopt.offload.rows import Block, RowStore, Strips
from fxopt.program import Buffer

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
        store: RowStore,
        slots: int,
        tally: Tally,
    ) -> None:
        self.layers = tuple(map(tuple, layers))
        self.batch = 0
        self.store = store
        self._where = {
            buffer.name: (turn, number, buffer)
            for turn, buffers in enumerate(self.layers)
            for number, buffer in enumerate(buffers)
        }
        with torch.inference_mode(False):  # tensors made in that mode could not be written outside of it
            largest = max(block.nbytes for block in store.blocks)
            self.slots = [torch.zeros(largest, dtype=torch.uint8) for _ in range(slots)]
        self.ring = Ring(store, range(len(self.layers)), [raw(slot) for slot in self.slots], what=WHAT, tally=tally)
        self.writes = range(0)  # the rows that the next step will write

    @property
    def names(self) -> frozenset[str]:
        """Of the buffers."""
        return frozenset(self._where)

    @property
    def nbytes(self) -> int:
        """Memory of the device."""
        return sum(slot.nbytes for slot in self.slots)

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
        return rows

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Rows of a buffer from ``start`` on."""
        turn, number, buffer = self._where[name]
        self.ring.settle()
        self.ring.forget()
        whole = rows.to(buffer.dtype).expand(buffer.shape(self.batch, rows.shape[2])).contiguous()
        if whole.nbytes:
            self.store.write(turn, number, start, start + rows.shape[2], raw(whole))

    def crop(self, rows: int) -> None:
        """Have no more than so many rows; slots may hold some of the others, behind the mask."""
        self.ring.settle()
        self.store.crop(rows)

    def feed(self, plan: Plan) -> RowFeed:
        """What brings the rows to the pieces of a graph."""
        return RowFeed(self, plan)


class RowFeed:
    """Hands each layer its slot, and stores the rows that it has written there."""

    def __init__(self, away: AwayRows, plan: Plan) -> None:
        self._away = away
        self._turns: dict[int, int] = {}
        for turn, buffers in enumerate(away.layers):
            readers = plan.readers([buffer.name for buffer in buffers])
            if len(readers) != 1 or readers[0] in self._turns:
                raise RuntimeError(f"the buffers {', '.join(b.name for b in buffers)} are not those of one piece alone")
            self._turns[readers[0]] = turn
        if list(self._turns) != sorted(self._turns):
            raise RuntimeError("layers run in another order than their rows are brought in")
        self.places = self._turns.keys()
        self._views = {
            place: [_views(away, turn, slot, plan) for slot in away.slots] for place, turn in self._turns.items()
        }

    @contextlib.contextmanager
    def run(self, kind: str) -> Iterator[None]:
        with self._away.ring.step(kind):
            yield

    def wait(self, place: int) -> Sequence[tuple[int, Tensor]]:
        return self._views[place][self._away.ring.wait()]

    def done(self, place: int) -> None:
        away, rows = self._away, self._away.writes
        away.ring.free(functools.partial(away.store.put, self._turns[place], rows.start, rows.stop))


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
