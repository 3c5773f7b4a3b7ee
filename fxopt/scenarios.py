"""What a model is asked when a rewritten graph is compared with it, and what the stock model answers.

Mistakes hide where lengths change: at the border of a chunk or of a window of the cache, past the
sliding window of the model's own attention, in the last rows before ``max_len``, and in padding.
Far rows are reached without feeding everything before them: the cache of the scenario is filled
with rows that the stock model computed for a short prompt, then more of them in random order, which
either side must attend to alike.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from fxopt.program import WINDOW, Facts, Rows
from fxopt.wide import WIDER, wide

log = logging.getLogger("fxopt")

DECODE_STEPS = 4
LATER_PROMPT = 5  # tokens fed at once onto a cache that is filled already
PROMPT = WINDOW - 2  # single tokens cross the border of the first window
SINKS = 8  # tokens at the beginning of a text that may be special
MOST_CACHE_BYTES = 2**31  # of a scenario that starts far into the cache


@dataclass(frozen=True)
class Past:
    """What the cache is filled with before a scenario: rows of a prompt, some of them many times."""

    keys: tuple[Tensor, ...] = ()  # [B, H, T, D] for every layer
    values: tuple[Tensor, ...] = ()
    picked: Tensor | None = None  # [start], which row each row is a copy of

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, made anew: all layers at once would be a cache of their own."""
        assert self.picked is not None
        return self.keys[layer].index_select(2, self.picked), self.values[layer].index_select(2, self.picked)


@dataclass(frozen=True)
class Scenario:
    """Tokens to feed, from row ``start`` of the cache on."""

    name: str
    tokens: Tensor  # [B, T]
    mask: Tensor  # [B, start + T]
    feeds: tuple[tuple[int, int], ...]  # which of the tokens are fed together
    start: int = 0
    past: Past = Past()

    @property
    def positions(self) -> Tensor:
        """[B, T]"""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)[:, self.start :]

    @property
    def rows(self) -> int:
        return self.start + self.tokens.shape[1]


@dataclass(frozen=True)
class Answer:
    """Logits of the last token after each feed, and the rows that were added to the cache."""

    logits: tuple[Tensor, ...]  # [B, V]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@dataclass(frozen=True)
class Answered:
    """One scenario with what the stock model says, and what it says in the next wider dtype."""

    scenario: Scenario
    stock: Answer
    truth: Answer | None  # None where nothing is wider
    chooses_experts: bool = False


@torch.no_grad()
def answered(model: PreTrainedModel, *, batch: int, far_batch: int, max_len: int) -> Iterator[Answered]:
    """Every scenario that fits into ``max_len``, answered by the stock model."""
    first = _padded_prompt(model, batch, max_len)
    stock = ask(model, first)
    mixture = _is_mixture(model)
    yield Answered(first, stock, _truth(model, first, stock), mixture)
    row_bytes = sum(rows[:, :, 0].nbytes for rows in (*stock.keys, *stock.values)) * far_batch // batch
    for name, start in _far_starts(model, max_len, first):
        if start * row_bytes > MOST_CACHE_BYTES:
            log.warning("not verified %s: a cache of %d bytes would be needed for it", name, start * row_bytes)
            continue
        scenario = _far(first, stock, name, start, far_batch)
        answer = ask(model, scenario)
        yield Answered(scenario, answer, _truth(model, scenario, answer), mixture)


def _padded_prompt(model: PreTrainedModel, batch: int, max_len: int) -> Scenario:
    """A prompt longer than the chunks of a check, its rows padded on the left by ever more."""
    steps = min(DECODE_STEPS, max(1, max_len // 2))
    prompt = max(1, min(PROMPT, max_len - steps))
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocabulary, (batch, prompt + steps), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(batch):
        mask[row, : (row + (batch == 1)) * prompt // (batch + 1)] = 0
    feeds = ((0, prompt), *((i, i + 1) for i in range(prompt, prompt + steps)))
    return Scenario("a padded prompt", tokens.to(model.device), mask.to(model.device), feeds)


def _far_starts(model: PreTrainedModel, max_len: int, first: Scenario) -> list[tuple[str, int]]:
    """Rows of the cache to go on from, with what is special about each."""
    length = DECODE_STEPS + LATER_PROMPT
    covered, padding = first.rows, _padding(first)
    starts = []
    for window in _sliding_windows(model):
        start = window - 2 + padding  # a window full of padding would hide what is in front of it
        if covered < window + padding + 2 and start + length <= max_len:
            starts.append((f"past the sliding window of {window}", start))
    if max_len > covered:
        starts.append((f"up to token {max_len}", max_len - length))
    return starts


def _is_mixture(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config()
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def _sliding_windows(model: PreTrainedModel) -> list[int]:
    """How far back the layers of a model look, as far as its config says."""
    config = model.config.get_text_config()
    found = {getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")}
    return sorted(window for window in found if isinstance(window, int) and window > 2)


def _far(first: Scenario, stock: Answer, name: str, start: int, batch: int) -> Scenario:
    """Go on from ``start``: single tokens, then several at once, behind the prompt's rows and more like them."""
    tokens = first.tokens[-batch:, -(DECODE_STEPS + LATER_PROMPT) :]
    length, seen = tokens.shape[1], first.tokens.shape[1]
    mask = torch.ones(batch, start + length, dtype=torch.long, device=tokens.device)
    mask[:, :seen] = first.mask[-batch:, : mask.shape[1]]
    keys, values = (tuple(rows[-batch:] for rows in kind) for kind in (stock.keys, stock.values))
    singles = ((i, i + 1) for i in range(DECODE_STEPS))
    past = Past(keys, values, _picked(first, start).to(tokens.device))
    return Scenario(name, tokens, mask, (*singles, (DECODE_STEPS, length)), start, past)


def _padding(first: Scenario) -> int:
    """Of the sequence that has most of it."""
    return int((first.mask == 0).sum(-1).max())


def _picked(first: Scenario, start: int) -> Tensor:
    """Which rows of the prompt a cache of ``start`` rows is made of.

    First all of them as they are: models lean on the first tokens of a text (attention sinks), and a
    cache without, or with several, makes them so unsure that every rounding shows.
    """
    seen = first.tokens.shape[1]
    ordinary = min(_padding(first) + SINKS, seen - 1)
    more = torch.randint(ordinary, seen, (max(0, start - seen),), generator=torch.Generator().manual_seed(1))
    return torch.cat([torch.arange(seen), more])[:start]


def _truth(model: PreTrainedModel, scenario: Scenario, stock: Answer) -> Answer | None:
    dtype = WIDER.get(stock.keys[0].dtype)
    if dtype is None:
        return None
    try:
        return ask(model, scenario, wide(dtype))
    except Exception as error:  # a kernel of the model's own (flash attention) may know one dtype alone
        log.warning("%s does not run in %s (%s): it is compared with as it is", type(model).__name__, dtype, error)
        return None


@torch.no_grad()
def answered_rounded(model: PreTrainedModel, scenario: Scenario, facts: Facts) -> Answer:
    """What the stock model says when its own cache keeps rows in the formats of ``facts``."""
    kept = [facts.rows(layer) for layer in range(len(facts.layers))]
    past = scenario.past
    if past.picked is not None:
        keys, values = zip(*map(_rounded, kept, past.keys, past.values), strict=True)
        past = replace(past, keys=keys, values=values)
    cache = DynamicCache()
    for layer, rows in enumerate(kept):
        behind = _BehindPast(past, layer) if past.picked is not None else DynamicLayer()
        cache.layers.append(_Rounding(rows, behind))
    return ask(model, scenario, cache=cache)


def _rounded(kept: tuple[Rows, Rows], keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as they are read back."""
    key, value = (rows.decode(rows.encode(states)) for rows, states in zip(kept, (keys, values), strict=True))
    return key, value


def ask(
    model: PreTrainedModel,
    scenario: Scenario,
    mode: contextlib.AbstractContextManager[Any] | None = None,
    cache: DynamicCache | None = None,
) -> Answer:
    """Feed a scenario to the stock model, under ``mode`` if one is given."""
    if cache is None:
        cache = DynamicCache()
        for layer in range(len(scenario.past.keys)):
            cache.layers.append(_BehindPast(scenario.past, layer))
    known = set(inspect.signature(model.forward).parameters)
    logits = []
    with mode or contextlib.nullcontext():
        for start, end in scenario.feeds:
            inputs = {
                "input_ids": scenario.tokens[:, start:end],
                "attention_mask": scenario.mask[:, : scenario.start + end],
                "position_ids": scenario.positions[:, start:end],
                "logits_to_keep": 1,
            }
            inputs = {name: value for name, value in inputs.items() if name in known}
            logits.append(model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1])
    return Answer(
        tuple(logits), tuple(layer.keys for layer in cache.layers), tuple(layer.values for layer in cache.layers)
    )


class _BehindPast(DynamicLayer):
    """A layer of a cache that keeps new rows only, and hands them out behind those of the past."""

    def __init__(self, past: Past, layer: int) -> None:
        super().__init__()
        self._past, self._layer = past, layer
        key, value = past.of(layer)
        self.lazy_initialization(key, value)
        self.keys, self.values = key[:, :, :0].clone(), value[:, :, :0].clone()  # views would keep all of it

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys = torch.cat([self.keys.to(key_states.dtype), key_states], dim=2)
        self.values = torch.cat([self.values.to(value_states.dtype), value_states], dim=2)
        key, value = self._past.of(self._layer)
        return torch.cat([key.to(self.keys.dtype), self.keys], dim=2), torch.cat(
            [value.to(self.values.dtype), self.values], dim=2
        )

    def get_seq_length(self) -> int:
        assert self._past.picked is not None
        return len(self._past.picked) + int(self.keys.shape[2])


class _Rounding(DynamicLayer):
    """A layer of a cache that hands out what its formats make of each row."""

    def __init__(self, kept: tuple[Rows, Rows], inner: DynamicLayer) -> None:
        super().__init__()
        self._kept, self._inner = kept, inner
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self._inner.update(*_rounded(self._kept, key_states, value_states))
        self.keys, self.values = self._inner.keys, self._inner.values
        return found

    def get_seq_length(self) -> int:
        return int(self._inner.get_seq_length())
