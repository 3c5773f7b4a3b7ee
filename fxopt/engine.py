"""Runs steps: picks the graph, the window and the chunk, and compiles a graph when first needed."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fxopt.arena_memory import SharedArena
from fxopt.cache import BufferCache, BufferPool
from fxopt.errors import InvalidRequestError
from fxopt.lower import Lowered
from fxopt.offload.ring import Ring
from fxopt.program import (
    ATTENTION_MASK,
    CACHE_POSITION,
    INPUT_IDS,
    LOGIT_POSITIONS,
    POSITION_IDS,
    Facts,
    whole_windows,
)
from fxopt.replay import Replays
from fxopt.row_streams import RowStreams
from fxopt.specialise import Role

#: Steps of up to this many tokens whose logits are all asked for are those of assisted decoding.
LONGEST_DRAFT = 32


@dataclass(frozen=True)
class Limits:
    """What one engine serves."""

    chunk: int
    max_batch: int | None
    max_cache_bytes: int | None = None


class Engine:
    """The running model. ``source`` makes the callable of a role when it is first needed."""

    def __init__(
        self,
        facts: Facts,
        source: Callable[[Role], Lowered],
        limits: Limits,
        arena: SharedArena | None = None,
        weight_ring: Ring | None = None,
        row_streams: RowStreams | None = None,
    ) -> None:
        self.facts = facts
        self.arena = arena  # that the graphs compute in, where plan_memory gave them one
        self.weight_ring = weight_ring  # that weights are streamed through, where offload_weights has moved them
        self.row_streams = row_streams  # that rows of the cache are in, where offload_kv was asked for
        self.limits = limits
        self.pool = BufferPool(
            facts, largest=limits.max_batch, most_bytes=limits.max_cache_bytes, row_streams=row_streams
        )
        self.stats: Counter[str] = Counter()
        self.replays = Replays(facts.device)
        self._source = source
        self._lowered: dict[Role, Lowered] = {}
        self._lock = threading.RLock()
        self._rows = torch.arange(facts.capacity, device=facts.device)
        if arena is not None:
            arena.on_growth = functools.partial(self.count, "arena grown")

    def new_cache(self, batch: int) -> BufferCache:
        return BufferCache(self.pool, self.facts, batch)

    def decode_role(self, batch: int) -> Role:
        return Role("decode", _any_from_two(batch), longest_step=1)

    def prefill_role(self, batch: int) -> Role:
        return Role("prefill", _any_from_two(batch), self.limits.chunk)

    def score_role(self, batch: int, tokens: int) -> Role:
        """The graph that gives the logits of every token: of a draft that is checked, or of a whole text."""
        if tokens <= LONGEST_DRAFT < self.limits.chunk:
            return Role("verify", _any_from_two(batch), LONGEST_DRAFT, all_logits=True)
        return Role("score", _any_from_two(batch), self.limits.chunk, all_logits=True)

    def first_roles(self) -> list[Role]:
        """What is compiled before anybody asks: one sequence, and any number of them where a limit was named."""
        batches = {1, self.limits.max_batch or 1}
        return [role(batch) for batch in sorted(batches) for role in (self.prefill_role, self.decode_role)]

    def readiness(self) -> dict[str, str]:
        """For how many sequences there are graphs of their own, and which of them are ready."""
        largest = self.limits.max_batch
        found = {}
        for batch in (1, 2) if largest is None or largest > 1 else (1,):
            ready = [role.name for role in self.compiled if role.batch == _any_from_two(batch)]
            found[self.decode_role(batch).sequences] = ", ".join(ready) or "compiled on first use"
        return found

    @property
    def compiled(self) -> dict[Role, Lowered]:
        """The graphs that are ready to run."""
        with self._lock:
            return dict(self._lowered)

    def lowered(self, role: Role) -> Lowered:
        """The graph of a role, compiled now if this is its first use."""
        if role in self._lowered:
            return self._lowered[role]
        with self._lock:
            if role not in self._lowered:
                self._lowered[role] = self._source(role)
                self.count(f"compiled {role.name} for {role.sequences}")
            return self._lowered[role]

    def adopt(self, role: Role, graph: Lowered) -> None:
        """Take a graph that is ready to run."""
        with self._lock:
            self._lowered[role] = graph
            self.count(f"loaded {role.name} for {role.sequences}")

    def count(self, event: str) -> None:
        """Add one to a counter of ``stats``, from whatever thread."""
        with self._lock:
            self.stats[event] += 1

    @torch.no_grad()
    def step(self, cache: BufferCache, input_ids: Tensor, positions: Tensor, *, keep: int) -> Tensor:
        """Feed tokens chunk by chunk; the mask of the new rows is in the cache already.

        ``input_ids`` and ``positions``: [B, S]. Returns logits [B, keep, V] of the last tokens.
        """
        front = input_ids.shape[1] - keep
        if keep > 1 and front > 0:  # a prompt in front of a draft
            self._chunks(cache, input_ids[:, :front], positions[:, :front], last_only=True)
            input_ids, positions = input_ids[:, front:], positions[:, front:]
        logits = self._chunks(cache, input_ids, positions, last_only=keep == 1)
        return logits[-1] if keep == 1 else torch.cat(logits, dim=1)

    def _chunks(self, cache: BufferCache, input_ids: Tensor, positions: Tensor, *, last_only: bool) -> list[Tensor]:
        parts = zip(input_ids.split(self.limits.chunk, 1), positions.split(self.limits.chunk, 1), strict=True)
        return [self._chunk(cache, tokens, places, last_only) for tokens, places in parts]

    def decoding(self, cache: BufferCache, positions: Tensor) -> Decoding:
        """Decode from here on, one token after the other; ``positions`` [B, 1] of the first."""
        return Decoding(self, cache, positions)

    def _chunk(self, cache: BufferCache, input_ids: Tensor, positions: Tensor, last_only: bool) -> Tensor:
        batch, step = input_ids.shape
        if step == 1:
            return self.decoding(cache, positions)(input_ids)
        role = self.prefill_role(batch) if last_only else self.score_role(batch, step)
        graph = self.lowered(role)
        filled = cache.length + step
        tensors = self.arguments(cache, graph, filled)
        tensors |= {
            INPUT_IDS: input_ids.to(torch.long).contiguous(),  # compiled code reads the memory as it is
            POSITION_IDS: positions.to(device=self.facts.device, dtype=torch.long).contiguous(),
            CACHE_POSITION: self._rows[cache.length : filled],
            LOGIT_POSITIONS: self._rows[:step] if role.all_logits else self._rows[step - 1 : step],
        }
        logits = graph(tensors, cache.writing(range(cache.length, filled)))
        cache.advance(step)
        self.count(role.name)
        return logits[:, -1:] if last_only and logits.shape[1] > 1 else logits

    def arguments(self, cache: BufferCache, graph: Lowered, filled: int) -> dict[str, Tensor]:
        """What a step reads that lies still: the buffers, and the mask over the window that is ``filled``."""
        window = whole_windows(filled) if graph.windowed else self.facts.capacity
        return {ATTENTION_MASK: cache.mask[:, :window], LOGIT_POSITIONS: self._rows[:1], **cache.tensors}


class Decoding:
    """A cache that is decoded token after token; everything that stays the same is looked up once per window."""

    def __init__(self, engine: Engine, cache: BufferCache, positions: Tensor) -> None:
        self._engine, self._cache = engine, cache
        self._graph = engine.lowered(engine.decode_role(cache.batch))
        self._window_end = 0
        turn = cache.buffers.turn
        self._tokens, self._row = turn.tokens[: cache.batch], turn.row
        self._positions = turn.positions[: cache.batch]
        self._positions.copy_(positions)
        self._row.fill_(cache.length)
        self._filled = cache.length

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """The logits [B, 1, V] after ``tokens`` [B, 1]."""
        row = self._filled
        if row >= self._engine.facts.max_len:
            raise InvalidRequestError(
                f"the cache holds {row} tokens and one more was fed, but max_len is {self._engine.facts.max_len}; "
                "call fxopt.optimize with a larger max_len"
            )
        if row >= self._window_end:
            self._open_window(row + 1)
        self._cache.writing(range(row, row + 1))
        self._tokens.copy_(tokens)
        logits = self._run()
        self._positions.add_(1)
        self._row.add_(1)
        self._filled += 1
        self._cache.advance(1)
        self._engine.count("decode")
        return logits

    def _open_window(self, filled: int) -> None:
        """Bind the step to the buffers and to a mask that covers ``filled`` rows."""
        engine, cache, graph = self._engine, self._cache, self._graph
        self._window_end = whole_windows(filled) if graph.windowed else engine.facts.capacity

        def bind() -> Callable[[], Tensor]:
            tensors = engine.arguments(cache, graph, filled)
            turn = {INPUT_IDS: self._tokens, POSITION_IDS: self._positions, CACHE_POSITION: self._row}
            return graph.bound(tensors | turn, cache.away)

        key = (cache.batch, self._window_end)
        # A ring copies other bytes in every step, and decides when; a recording would repeat those of one.
        record = engine.weight_ring is None and cache.away is None
        self._run = engine.replays.of(key, cache.buffers.turn.bound, bind, record=record)


def _any_from_two(batch: int) -> int | None:
    return 1 if batch == 1 else None
