"""Caches of fewer bits: the stock model's own, which rounds as ours do, and prompts to compare the two over."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import fxopt
from fxopt.families import VOCABULARY, tiny
from fxopt.kv_formats import FormatName
from fxopt.program import Rows

NAMES: tuple[FormatName, ...] = ("int8", "fp8", "int4")
CHUNK = 16
GREEDY: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


class Rounding(DynamicLayer):
    """A layer of Transformers' own cache that keeps what the format makes of each row."""

    def __init__(self, kept: tuple[Rows, Rows]) -> None:
        super().__init__()
        self.kept = kept

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = self.kept
        states = key.decode(key.encode(key_states)), value.decode(value.encode(value_states))
        found: tuple[Tensor, Tensor] = super().update(*states, *args, **kwargs)
        return found


def rounding_cache(fast: Any) -> DynamicCache:
    """For the stock model: rows as ``fast`` keeps them."""
    facts = fast.fxopt.engine.facts
    cache = DynamicCache()
    cache.layers = [Rounding(facts.rows(layer)) for layer in range(len(facts.layers))]
    return cache


def optimised(stock: PreTrainedModel, name: FormatName, passes: dict[str, Any] | None = None, **options: Any) -> Any:
    """With a cache in this format, and nothing compiled or compared unless it is asked for."""
    options = {"backend": "eager", "verify": "off", "chunk": CHUNK, "passes": (passes or {}) | chosen(name), **options}
    return fxopt.optimize(stock, 100, **options)


@functools.cache
def llama(name: FormatName) -> tuple[Any, Any]:
    """The stock model and the fast one, the same for all tests of a process: leave them as they are."""
    stock = tiny("llama")
    return stock, optimised(stock, name)


def chosen(name: FormatName) -> dict[str, Any]:
    return {"quantize_kv": {"kv_dtype": name}}


def prompt(batch: int = 1, length: int = 21, padded: bool = False) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(tokens)
    for row in range(1, batch if padded else 0):
        mask[row, : row * length // batch] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}
