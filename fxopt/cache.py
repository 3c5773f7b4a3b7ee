"""The cache that ``generate`` holds while the compiled graphs write into it.

Buffers are allocated once and never move. A handle borrows one set; when the handle is
garbage-collected the set goes back, so every live cache has buffers of its own. Sets come in sizes
of 1, 2, 4, 8 … sequences, and a batch uses the first rows of the smallest that holds it.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from fxopt.errors import CacheMemoryError, InvalidRequestError, first_line
from fxopt.program import Facts, Rows


class BufferSet:
    """Static buffers of every layer for up to ``size`` sequences, and the mask over their rows."""

    def __init__(self, facts: Facts, size: int) -> None:
        with torch.inference_mode(False):  # tensors made in that mode could not be written outside of it
            # Zeros, because a masked row still enters the sum: 0 * NaN is NaN.
            self.tensors = {
                buffer.name: torch.zeros(buffer.shape(size, facts.capacity), dtype=buffer.dtype, device=facts.device)
                for buffer in facts.buffers()
            }
            self.mask = torch.zeros(size, facts.capacity, dtype=torch.long, device=facts.device)
            self.turn = Turn(size, facts.device)
        self.size = size
        self.nbytes = buffer_bytes(facts, size)

    def clear(self) -> None:
        for tensor in (*self.tensors.values(), self.mask):
            tensor.zero_()


class Turn:
    """What changes from one decode step to the next, and the steps that are bound to these addresses."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.tokens = torch.zeros(size, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(size, 1, dtype=torch.long, device=device)
        self.row = torch.zeros(1, dtype=torch.long, device=device)
        self.bound: dict[Hashable, Callable[[], Tensor]] = {}


def buffer_bytes(facts: Facts, size: int) -> int:
    """Memory of the buffers for ``size`` sequences."""
    per_row = sum(buffer.heads * buffer.width * buffer.dtype.itemsize for buffer in facts.buffers())
    return size * facts.capacity * (per_row + torch.long.itemsize)


class BufferPool:
    """Buffer sets that no cache is using, by size."""

    def __init__(self, facts: Facts, *, largest: int | None = None, most_bytes: int | None = None) -> None:
        self._facts = facts
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
            buffers = self._idle[size].pop() if self._idle[size] else self._allocated(size)
            self._lent += buffers.nbytes
            return buffers

    def give_back(self, buffers: BufferSet) -> None:
        buffers.clear()
        with self._lock:
            self._lent -= buffers.nbytes
            self._idle[buffers.size].append(buffers)

    def release(self) -> int:
        """Let go of every set that no cache is using; returns the bytes."""
        with self._lock:
            freed = sum(buffers.nbytes for idle in self._idle.values() for buffers in idle)
            self._idle.clear()
            self.nbytes -= freed
            return freed

    def _allocated(self, size: int) -> BufferSet:
        needed = buffer_bytes(self._facts, size)
        if self._most_bytes is not None and self.nbytes + needed > self._most_bytes:
            self.release()
            if self._lent + needed > self._most_bytes:
                raise CacheMemoryError(
                    self._sentence(size, needed, f"max_cache_bytes={self._most_bytes:,} allows less")
                )
        try:
            buffers = BufferSet(self._facts, size)
        except (RuntimeError, MemoryError):
            self.release()  # sets of other sizes may be in the way
            try:
                buffers = BufferSet(self._facts, size)
            except (RuntimeError, MemoryError) as error:
                raise CacheMemoryError(self._sentence(size, needed, first_line(error))) from error
        self.nbytes += buffers.nbytes
        return buffers

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
        self.pool = pool
        self.batch = batch
        self._facts = facts
        self.tensors = {name: tensor[:batch] for name, tensor in self.buffers.tensors.items()}
        self.mask = self.buffers.mask[:batch]
        kept = [[Kept(rows, self.tensors) for rows in facts.rows(layer)] for layer in range(len(facts.layers))]
        super().__init__(layers=[StaticLayer(key, value, facts.max_len) for key, value in kept])
        self._lease = weakref.finalize(self, pool.give_back, self.buffers)
        self._lease.atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> BufferCache:
        """The same contents in buffers of their own: how a prompt's cache is kept for several answers."""
        twin = BufferCache(self.pool, self._facts, self.batch)
        for target, source in zip(twin._everything(), self._everything(), strict=True):
            target.copy_(source)
        twin.advance(self.length)
        return twin

    @property
    def length(self) -> int:
        return int(self.layers[0].get_seq_length())

    def advance(self, tokens: int) -> None:
        """Count rows that a compiled graph has written."""
        for layer in self.layers:
            layer.length += tokens

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
        """Go on with some of the sequences, in buffers for that many."""
        length = self.length
        kept = [tensor.index_select(0, sequences) for tensor in self._everything()]
        self._lease()  # gives the buffers back
        BufferCache.__init__(self, self.pool, self._facts, len(sequences))
        for target, source in zip(self._everything(), kept, strict=True):
            target.copy_(source)
        self.advance(length)

    def _everything(self) -> tuple[Tensor, ...]:
        return (*self.tensors.values(), self.mask)

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        super().crop(tokens_to_remove)
        self.mask[:, self.length :] = 0

    def rewind(self, length: int) -> None:
        """Forget everything from row ``length`` on, also after a step that ended half way."""
        for layer in self.layers:
            layer.length = length
        self.mask[:, length:] = 0

    def reset(self) -> None:
        self.buffers.clear()
        for layer in self.layers:
            layer.length = 0


class Kept:
    """The K or the V of one layer in its buffers: rows are written, and read back."""

    def __init__(self, rows: Rows, tensors: Mapping[str, Tensor]) -> None:
        self.buffers = [tensors[buffer.name] for buffer in rows.buffers]
        self.dtype = rows.dtype
        self._rows = rows

    def write(self, start: int, rows: Tensor) -> None:
        for buffer, part in zip(self.buffers, self._rows.encode(rows), strict=True):
            buffer[:, :, start : start + rows.shape[2]].copy_(part)

    def read(self, start: int, end: int) -> Tensor:
        """A view where rows are kept as they are, else a new tensor."""
        rows: Tensor = self._rows.decode([buffer[:, :, start:end] for buffer in self.buffers])
        return rows


class StaticLayer(CacheLayerMixin):
    """One layer's buffers, as Hugging Face's eager code expects to use them."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, key: Kept, value: Kept, max_len: int) -> None:
        super().__init__()
        self.kept = (key, value)
        self.keys, self.values = key.buffers[0], value.buffers[0]  # what others look at for sizes
        self.dtype, self.device = key.dtype, self.keys.device
        self.is_initialized = True
        self.max_len = max_len
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
        return int(self.keys.shape[0])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """In place, so that the buffers stay where the compiled graphs write."""
        index = beam_idx.to(self.keys.device)
        for buffer in (buffer for kept in self.kept for buffer in kept.buffers):
            filled = buffer[:, :, : self.length]
            filled.copy_(filled.index_select(0, index))

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        if tokens_to_remove > 0:
            raise InvalidRequestError(f"crop({int(tokens_to_remove)}) is unclear; give minus the number of tokens")
        self.length -= min(self.length, abs(int(tokens_to_remove)))
