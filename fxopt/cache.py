"""The cache that ``generate`` holds while the compiled graphs write into it.

Buffers are allocated once per batch size and never move. A handle borrows one set; when the
handle is garbage-collected the set goes back, so every live cache has buffers of its own.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from fxopt.errors import InvalidRequestError
from fxopt.program import Facts


class BufferSet:
    """Static K and V buffers of every layer for one batch size, and the mask over their rows."""

    def __init__(self, facts: Facts, batch: int) -> None:
        like: dict[str, Any] = {"dtype": facts.dtype, "device": facts.device}
        shapes = [layer.shapes(batch, facts.capacity) for layer in facts.layers]
        with torch.inference_mode(False):  # tensors made in that mode could not be written outside of it
            # Zeros, because a masked row still enters the sum: 0 * NaN is NaN.
            self.keys = [torch.zeros(key, **like) for key, _ in shapes]
            self.values = [torch.zeros(value, **like) for _, value in shapes]
            self.mask = torch.zeros(batch, facts.capacity, dtype=torch.long, device=facts.device)
        self.batch = batch
        self.nbytes = sum(t.nbytes for t in (*self.keys, *self.values, self.mask))

    def clear(self) -> None:
        for tensor in (*self.keys, *self.values, self.mask):
            tensor.zero_()


class BufferPool:
    """Buffer sets that no cache is using, by batch size."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._free: dict[int, list[BufferSet]] = defaultdict(list)
        self._lock = threading.RLock()  # a collection inside `borrow` may end in `give_back`
        self.nbytes = 0

    def borrow(self, batch: int) -> BufferSet:
        with self._lock:
            if self._free[batch]:
                return self._free[batch].pop()
            buffers = BufferSet(self._facts, batch)
            self.nbytes += buffers.nbytes
            return buffers

    def give_back(self, buffers: BufferSet) -> None:
        buffers.clear()
        with self._lock:
            self._free[buffers.batch].append(buffers)


class BufferCache(Cache):
    """A Hugging Face cache over one buffer set.

    The length is a host integer, so asking for it never waits for a device. ``is_compileable`` is
    False to keep ``generate`` from compiling and masking for itself.
    """

    def __init__(self, pool: BufferPool, facts: Facts, batch: int) -> None:
        self.buffers = pool.borrow(batch)
        self.pool = pool
        self._facts = facts
        pairs = zip(self.buffers.keys, self.buffers.values, strict=True)
        super().__init__(layers=[StaticLayer(key, value, facts.max_len) for key, value in pairs])
        weakref.finalize(self, pool.give_back, self.buffers).atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> BufferCache:
        """The same contents in buffers of their own: how a prompt's cache is kept for several answers."""
        twin = BufferCache(self.pool, self._facts, self.buffers.batch)
        sources = (*self.buffers.keys, *self.buffers.values, self.buffers.mask)
        targets = (*twin.buffers.keys, *twin.buffers.values, twin.buffers.mask)
        for target, source in zip(targets, sources, strict=True):
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
            self.buffers.mask[:, : self.length + tokens] = 1  # no mask: everything may be attended to
        else:
            self.buffers.mask[:, : mask.shape[1]].copy_(mask)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.buffers.mask.copy_(self.buffers.mask.index_select(0, beam_idx.to(self.buffers.mask.device)))

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        super().crop(tokens_to_remove)
        self.buffers.mask[:, self.length :] = 0

    def rewind(self, length: int) -> None:
        """Forget everything from row ``length`` on, also after a step that ended half way."""
        for layer in self.layers:
            layer.length = length
        self.buffers.mask[:, length:] = 0

    def reset(self) -> None:
        self.buffers.clear()
        for layer in self.layers:
            layer.length = 0


class StaticLayer(CacheLayerMixin):
    """One layer's buffers, as Hugging Face's eager code expects to use them."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, max_len: int) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.max_len = max_len
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing to do: the buffers are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The eager path: write the rows, hand out what is filled."""
        end = self.length + key_states.shape[2]
        if end > self.max_len:
            raise InvalidRequestError(
                f"the cache holds {self.length} of {self.max_len} tokens and {key_states.shape[2]} more were fed; "
                "call fxopt.optimize with a larger max_len"
            )
        self.keys[:, :, self.length : end].copy_(key_states)
        self.values[:, :, self.length : end].copy_(value_states)
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

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
        for buffer in (self.keys, self.values):
            filled = buffer[:, :, : self.length]
            filled.copy_(filled.index_select(0, index))

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        if tokens_to_remove > 0:
            raise InvalidRequestError(f"crop({int(tokens_to_remove)}) is unclear; give minus the number of tokens")
        self.length -= min(self.length, abs(int(tokens_to_remove)))
