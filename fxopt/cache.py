"""The cache that ``generate`` holds while the compiled graphs write into it.

Buffers are allocated once and never move. A handle borrows one set; when the handle is
garbage-collected the set goes back, so every live cache has buffers of its own. Sets come in sizes
of 1, 2, 4, 8 … sequences, and a batch uses the first rows of the smallest that holds it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from fxopt.away_rows import AwayRows
from fxopt.errors import CacheMemoryError, InvalidRequestError, first_line
from fxopt.offload.errors import StoreError
from fxopt.program import Facts, Rows
from fxopt.row_streams import RowStreams


class BufferSet:
    """Static buffers of every layer for up to ``size`` sequences, and the mask over their rows.

    With ``row_streams`` some of the layers are ``away``: they have no buffers here.
    """

    def __init__(self, facts: Facts, size: int, row_streams: RowStreams | None = None) -> None:
        self.away = row_streams.rows(size) if row_streams is not None else None
        absent = self.away.names if self.away is not None else frozenset()
        with torch.inference_mode(False):  # tensors made in that mode could not be written outside of it
            # Zeros, because a masked row still enters the sum: 0 * NaN is NaN.
            self.tensors = {
                buffer.name: torch.zeros(buffer.shape(size, facts.capacity), dtype=buffer.dtype, device=facts.device)
                for buffer in facts.buffers()
                if buffer.name not in absent
            }
            self.mask = torch.zeros(size, facts.capacity, dtype=torch.long, device=facts.device)
            self.turn = Turn(size, facts.device)
        self.size = size
        self.nbytes = sum(tensor.nbytes for tensor in (*self.tensors.values(), self.mask))
        self.nbytes += self.away.nbytes if self.away is not None else 0

    @property
    def is_usable(self) -> bool:
        return self.away is None or self.away.is_served

    def clear(self) -> None:
        """What is away is forgotten when the next cache begins: the collector calls this, and may not wait."""
        for tensor in (*self.tensors.values(), self.mask):
            tensor.zero_()

    def close(self) -> None:
        """Let go of files now, not when somebody finds the time."""
        if self.away is not None:
            self.away.close()


class Turn:
    """What changes from one decode step to the next, and the steps that are bound to these addresses."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.tokens = torch.zeros(size, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(size, 1, dtype=torch.long, device=device)
        self.row = torch.zeros(1, dtype=torch.long, device=device)
        self.bound: dict[Hashable, Callable[[], Tensor]] = {}


def buffer_bytes(facts: Facts, size: int, row_streams: RowStreams | None = None) -> int:
    """Memory of the buffers for ``size`` sequences."""
    if row_streams is not None:
        return row_streams.placed(size).device_bytes
    per_row = sum(buffer.heads * buffer.width * buffer.dtype.itemsize for buffer in facts.buffers())
    return size * facts.capacity * (per_row + torch.long.itemsize)


class BufferPool:
    """Buffer sets that no cache is using, by size."""

    def __init__(
        self,
        facts: Facts,
        *,
        largest: int | None = None,
        most_bytes: int | None = None,
        row_streams: RowStreams | None = None,
    ) -> None:
        self._facts = facts
        self._row_streams = row_streams
        self._largest = largest
        self._most_bytes = most_bytes
        self._idle: dict[int, list[BufferSet]] = defaultdict(list)
        self._lock = threading.RLock()  # a collection inside `borrow` may end in `give_back`
        self._lent = 0
        self.nbytes = 0

    def size_for(self, batch: int) -> int:
        """The size of the sets that a batch is put into."""
        power = 1 << (batch - 1).bit_length()
        return power if self._largest is None else max(batch, min(power, self._largest))

    def borrow(self, batch: int) -> BufferSet:
        size = self.size_for(batch)
        with self._lock:
            buffers = self._of_size(size) or self._allocated(size)
            self._lent += buffers.nbytes
            return buffers

    def _of_size(self, size: int) -> BufferSet | None:
        """A set that is idle; those that a fork has left without their reader are let go of."""
        while self._idle[size]:
            buffers = self._idle[size].pop()
            if buffers.is_usable:
                return buffers
            self.nbytes -= buffers.nbytes
        return None

    def give_back(self, buffers: BufferSet) -> None:
        buffers.clear()
        with self._lock:
            self._lent -= buffers.nbytes
            self._idle[buffers.size].append(buffers)

    def release(self) -> int:
        """Let go of every set that no cache is using; returns the bytes."""
        with self._lock:
            found = [buffers for idle in self._idle.values() for buffers in idle]
            self._idle.clear()
            freed = sum(buffers.nbytes for buffers in found)
            self.nbytes -= freed
        for buffers in found:
            buffers.close()
        return freed

    def _allocated(self, size: int) -> BufferSet:
        needed = buffer_bytes(self._facts, size, self._row_streams)
        if self._most_bytes is not None and self.nbytes + needed > self._most_bytes:
            self.release()
            if self._lent + needed > self._most_bytes:
                raise CacheMemoryError(
                    self._sentence(size, needed, f"max_cache_bytes={self._most_bytes:,} allows less")
                )
        buffers = self._attempt(size)
        if buffers is None:
            self.release()  # sets of other sizes may be in the way
            try:
                buffers = BufferSet(self._facts, size, self._row_streams)
            except (RuntimeError, MemoryError) as error:
                raise CacheMemoryError(self._sentence(size, needed, first_line(error))) from error
        self.nbytes += buffers.nbytes
        return buffers

    def _attempt(self, size: int) -> BufferSet | None:
        """A new set, if there is memory and room for it; nothing of one that fails is left behind."""
        with contextlib.suppress(RuntimeError, MemoryError, StoreError):
            return BufferSet(self._facts, size, self._row_streams)
        return None

    def _sentence(self, size: int, needed: int, why: str) -> str:
        return (
            f"a cache for {size} sequences of {self._facts.max_len} tokens takes {needed:,} bytes, and "
            f"{self._lent:,} bytes are in caches that are still held, but {why}. Let go of caches that are no longer "
            "needed (del outputs), use smaller batches, or optimise with a smaller max_len"
        )


class BufferCache(Cache):
    """A Hugging Face cache over the first ``batch`` sequences of one buffer set.

    The length is a host integer, so asking for it never waits for a device. ``is_compileable`` is
    False to keep ``generate`` from compiling and masking for itself.
    """

    def __init__(self, pool: BufferPool, facts: Facts, batch: int) -> None:
        self.buffers = pool.borrow(batch)
        self._lease = self._leased(pool)
        self.pool = pool
        self.batch = batch
        self._facts = facts
        self.tensors = {name: tensor[:batch] for name, tensor in self.buffers.tensors.items()}
        self.away = self.buffers.away
        if self.away is not None:
            self.away.begin(batch)
        self.mask = self.buffers.mask[:batch]
        super().__init__(layers=[self._layer(facts, layer) for layer in range(len(facts.layers))])

    def _leased(self, pool: BufferPool) -> weakref.finalize[..., BufferCache]:
        """Gives the buffers back when it is called, or when this cache is gone."""
        lease = weakref.finalize(self, pool.give_back, self.buffers)
        lease.atexit = False
        return lease

    def _layer(self, facts: Facts, layer: int) -> StaticLayer:
        here, away = Here(self.tensors), self.away
        key, value = (
            Kept(rows, self.batch, away if away is not None and rows.name in away.names else here)
            for rows in facts.rows(layer)
        )
        return StaticLayer(key, value, facts)

    def __deepcopy__(self, memo: dict[int, Any]) -> BufferCache:
        """The same contents in buffers of their own: how a prompt's cache is kept for several answers."""
        return self._copy(torch.arange(self.batch, device=self.mask.device))

    @property
    def length(self) -> int:
        return int(self.layers[0].get_seq_length())

    def advance(self, tokens: int) -> None:
        """Count rows that a compiled graph has written."""
        for layer in self.layers:
            layer.length += tokens

    def writing(self, rows: range) -> AwayRows | None:
        """Say which rows the next step writes; returns the layers that are away."""
        if self.away is not None:
            self.away.writes = rows
        return self.away

    def pretend(self, rows: int) -> None:
        """Be filled with rows of nothing: to see what a step takes."""
        self.rewind(0)
        self.record_mask(None, rows)
        self.advance(rows)
        if self.away is not None:
            self.away.store.pretend(rows)

    def record_mask(self, mask: Tensor | None, tokens: int) -> None:
        """Take over what the caller says about old rows and the next ``tokens`` ones."""
        if mask is None:
            self.mask[:, : self.length + tokens] = 1  # no mask: everything may be attended to
        else:
            self.mask[:, : mask.shape[1]].copy_(mask)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.mask.copy_(self.mask.index_select(0, beam_idx.to(self.mask.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take(torch.arange(self.batch, device=self.mask.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(indices.to(self.mask.device))

    def _take(self, sequences: Tensor) -> None:
        """Go on with some of the sequences, in buffers for that many; an error leaves this cache as it is."""
        twin = self._copy(sequences)
        self._lease()  # gives the buffers back
        twin._lease.detach()
        self.__dict__ = twin.__dict__
        self._lease = self._leased(self.pool)

    def _copy(self, sequences: Tensor) -> BufferCache:
        """Some of the sequences in buffers of their own."""
        twin = BufferCache(self.pool, self._facts, len(sequences))
        for new, old in zip(twin.layers, self.layers, strict=True):
            for target, source in zip(new.kept, old.kept, strict=True):  # one by one: all may be more than fits
                target.put(0, [part.index_select(0, sequences) for part in source.parts(0, self.length)])
        twin.mask.copy_(self.mask.index_select(0, sequences))
        twin.advance(self.length)
        return twin

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        super().crop(tokens_to_remove)
        self._forget_behind()

    def rewind(self, length: int) -> None:
        """Forget everything from row ``length`` on, also after a step that ended half way."""
        for layer in self.layers:
            layer.length = length
        self._forget_behind()

    def _forget_behind(self) -> None:
        self.mask[:, self.length :] = 0
        if self.away is not None:
            self.away.crop(self.length)

    def reset(self) -> None:
        self.buffers.clear()
        if self.away is not None:
            self.away.begin(self.batch)
        for layer in self.layers:
            layer.length = 0


class Holder(Protocol):
    """Where buffers are."""

    def shown(self, name: str) -> Tensor:
        """What others look at for sizes."""

    def read(self, name: str, start: int, end: int) -> Tensor:
        """Rows of a buffer; perhaps a view."""

    def write(self, name: str, start: int, rows: Tensor) -> None:
        """Rows of a buffer from ``start`` on."""


class Here:
    """Buffers that are tensors."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shown(self, name: str) -> Tensor:
        return self._tensors[name]

    def read(self, name: str, start: int, end: int) -> Tensor:
        return self._tensors[name][:, :, start:end]

    def write(self, name: str, start: int, rows: Tensor) -> None:
        self._tensors[name][:, :, start : start + rows.shape[2]].copy_(rows)


class Kept:
    """The K or the V of one layer in its buffers: rows are written, and read back."""

    def __init__(self, rows: Rows, batch: int, holder: Holder) -> None:
        self.rows = rows
        self.batch = batch
        self._holder = holder

    @property
    def shown(self) -> Tensor:
        return self._holder.shown(self.rows.name)

    def write(self, start: int, rows: Tensor) -> None:
        self.put(start, self.rows.encode(rows))

    def read(self, start: int, end: int) -> Tensor:
        """A view where rows are kept as they are, else a new tensor."""
        rows: Tensor = self.rows.decode(self.parts(start, end))
        return rows

    def parts(self, start: int, end: int) -> list[Tensor]:
        """Rows as they are kept, of each buffer."""
        return [self._holder.read(buffer.name, start, end) for buffer in self.rows.buffers]

    def put(self, start: int, parts: Sequence[Tensor]) -> None:
        """Such rows, from ``start`` on."""
        for buffer, part in zip(self.rows.buffers, parts, strict=True):
            self._holder.write(buffer.name, start, part)


class StaticLayer(CacheLayerMixin):
    """One layer's buffers, as Hugging Face's eager code expects to use them."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, key: Kept, value: Kept, facts: Facts) -> None:
        super().__init__()
        self.kept = (key, value)
        self.keys, self.values = key.shown, value.shown
        self.dtype, self.device = facts.dtype, facts.device
        self.is_initialized = True
        self.max_len = facts.max_len
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing to do: the buffers are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The eager path: write the rows, hand out what is filled."""
        self.write(key_states, value_states)
        return self.read(0, self.length)

    def write(self, key_states: Tensor, value_states: Tensor) -> None:
        """Write rows behind those that are there."""
        end = self.length + key_states.shape[2]
        if end > self.max_len:
            raise InvalidRequestError(
                f"the cache holds {self.length} of {self.max_len} tokens and {key_states.shape[2]} more were fed; "
                "call fxopt.optimize with a larger max_len"
            )
        for kept, states in zip(self.kept, (key_states, value_states), strict=True):
            kept.write(self.length, states)
        self.length = end

    def read(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """The keys and values of some rows."""
        key, value = (kept.read(start, end) for kept in self.kept)
        return key, value

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.max_len

    def get_max_cache_shape(self) -> int:
        """What :meth:`get_max_length` was called in transformers 5.17."""
        return self.max_len

    @property
    def batch_size(self) -> int:
        return self.kept[0].batch

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """In place, so that the buffers stay where the compiled graphs write."""
        index = beam_idx.to(self.device)
        for kept in self.kept:
            kept.put(0, [part.index_select(0, index) for part in kept.parts(0, self.length)])

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        if tokens_to_remove > 0:
            raise InvalidRequestError(f"crop({int(tokens_to_remove)}) is unclear; give minus the number of tokens")
        self.length -= min(self.length, abs(int(tokens_to_remove)))
