"""Bytes that a decode step has to read, whatever it is computed with: every weight once, and the filled cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheRow:
    """What one layer keeps for a token of one sequence, and for how many tokens at most."""

    nbytes: int
    window: int | None


@dataclass(frozen=True)
class Traffic:
    """A model's weights and cache, as a decode step reads them.

    Of a mixture of experts every expert is counted, so there the figure is above what is read.
    """

    weight_bytes: int
    rows: tuple[CacheRow, ...]

    @classmethod
    def of(cls, model: Any) -> Traffic:
        return cls(_read_weights(model), _cache_rows(model))

    def step(self, batch: int, filled: float) -> float:
        """Bytes of a step that attends to ``filled`` tokens of each sequence."""
        cached = sum(row.nbytes * min(filled, row.window or filled) for row in self.rows)
        return self.weight_bytes + batch * cached


def weight_bytes(model: Any) -> int:
    """Memory that parameters and buffers take; what is shared counts once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({(one.data_ptr(), one.nbytes): one.nbytes for one in tensors}.values())


def _read_weights(model: Any) -> int:
    """All parameters, except an embedding of which a step picks some rows."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and table.weight is head.weight
    return sum(one.nbytes for one in model.parameters() if tied or one is not table.weight)


@torch.no_grad()
def _cache_rows(model: Any) -> tuple[CacheRow, ...]:
    """Looked up in a cache of two tokens."""
    tokens = torch.full((1, 2), 1, device=next(model.parameters()).device)
    cache = getattr(model(tokens, use_cache=True), "past_key_values", None)
    found = []
    for layer in getattr(cache, "layers", ()):
        parts = [part for part in (getattr(layer, "keys", None), getattr(layer, "values", None))]
        nbytes = sum(part.nbytes for part in parts if isinstance(part, Tensor))
        found.append(CacheRow(nbytes // tokens.shape[1], getattr(layer, "sliding_window", None)))
    return tuple(found)
