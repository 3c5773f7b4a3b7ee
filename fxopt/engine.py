"""Runs steps: picks the graph, the window and the chunk, and compiles a graph when first needed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.cache import BufferCache, BufferPool
from fxopt.lower import Lowered
from fxopt.program import (
    ATTENTION_MASK,
    CACHE_POSITION,
    INPUT_IDS,
    LOGIT_POSITIONS,
    POSITION_IDS,
    Facts,
    key_name,
    value_name,
    whole_windows,
)
from fxopt.specialise import Role


@dataclass(frozen=True)
class Limits:
    """What one engine serves."""

    chunk: int
    max_batch: int | None


class Engine:
    """The running model. ``source`` makes the callable of a role when it is first needed."""

    def __init__(self, facts: Facts, source: Callable[[Role], Lowered], limits: Limits) -> None:
        self.facts = facts
        self.limits = limits
        self.pool = BufferPool(facts)
        self.stats: Counter[str] = Counter()
        self._source = source
        self._lowered: dict[Role, Lowered] = {}
        self._lock = threading.RLock()
        self._rows = torch.arange(facts.capacity, device=facts.device)

    def new_cache(self, batch: int) -> BufferCache:
        return BufferCache(self.pool, self.facts, batch)

    def decode_role(self, batch: int) -> Role:
        return Role("decode", batch, longest_step=1)

    def prefill_role(self, batch: int, *, all_logits: bool = False) -> Role:
        return Role("score" if all_logits else "prefill", batch, self.limits.chunk, all_logits)

    def lowered(self, role: Role) -> Lowered:
        """The graph of a role, compiled now if this is its first use."""
        with self._lock:
            if role not in self._lowered:
                self._lowered[role] = self._source(role)
                self.stats[f"compiled {role.name} for batch {role.batch}"] += 1
            return self._lowered[role]

    @torch.no_grad()
    def step(self, cache: BufferCache, input_ids: Tensor, positions: Tensor, *, last_only: bool) -> Tensor:
        """Feed tokens chunk by chunk; the mask of the new rows is in the cache already.

        ``input_ids`` and ``positions``: [B, S]. Returns logits [B, 1, V], or [B, S, V] for all.
        """
        logits = []
        for start in range(0, input_ids.shape[1], self.limits.chunk):
            part = slice(start, start + self.limits.chunk)
            logits.append(self._chunk(cache, input_ids[:, part], positions[:, part], last_only))
        return logits[-1] if last_only else torch.cat(logits, dim=1)

    def _chunk(self, cache: BufferCache, input_ids: Tensor, positions: Tensor, last_only: bool) -> Tensor:
        batch, step = input_ids.shape
        role = self.decode_role(batch) if step == 1 else self.prefill_role(batch, all_logits=not last_only)
        graph = self.lowered(role)
        filled = cache.length + step
        window = whole_windows(filled) if graph.windowed else self.facts.capacity
        asked = self._rows[step - 1 : step] if not role.all_logits else self._rows[:step]
        tensors = {
            INPUT_IDS: input_ids.to(torch.long).contiguous(),  # compiled code reads the memory as it is
            ATTENTION_MASK: cache.buffers.mask[:, :window].contiguous(),
            POSITION_IDS: positions.to(device=self.facts.device, dtype=torch.long).contiguous(),
            CACHE_POSITION: self._rows[cache.length : filled],
            LOGIT_POSITIONS: asked,
        }
        for layer, (key, value) in enumerate(zip(cache.buffers.keys, cache.buffers.values, strict=True)):
            tensors[key_name(layer)], tensors[value_name(layer)] = key, value
        logits = graph(tensors)
        cache.advance(step)
        self.stats[role.name] += 1
        return logits[:, -1:] if last_only and logits.shape[1] > 1 else logits
