"""Does a rewritten graph compute what the stock model computes? Logits, cache contents and tokens.

How far a graph may be from the truth is measured, not guessed: the stock model is compared with
itself in the next wider dtype, and a rewritten graph may be no further away than FACTOR times that,
or a few roundings where the stock model happens to be exact.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fxopt.engine import Engine, Limits
from fxopt.lower import Lowered, lower
from fxopt.outcome import Check
from fxopt.program import (
    ATTENTION_MASK,
    CACHE_POSITION,
    INPUT_IDS,
    POSITION_IDS,
    Program,
    key_name,
    value_name,
    whole_windows,
)
from fxopt.scenarios import Answer, Answered, Scenario, answered
from fxopt.specialise import Role

FACTOR = 3.0
FLOOR = 2.0  # roundings of the dtype
TOKEN_FACTOR = 2 * 5 * FACTOR  # two logits change places when both are off; five deviations are never seen
#: How far from the truth a stock model is by rounding alone. One that is further away takes decisions
#: that rounding turns over (which expert is chosen): then it is itself the truth.
PLAUSIBLE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
#: Where nothing is wider than the dtype. Models compute rotary tables in float32 also in float64.
WITHOUT_TRUTH = 1e3 * torch.finfo(torch.float32).eps

SMALL_CHUNK = 16  # so that a short prompt crosses the borders of chunks
GRAPH_BATCH = 2  # of the checks of a graph that holds for any batch

Verdict = tuple[Check, str | None]  # and a sentence if it is against the graph


class Judge:
    """Compares graphs and engines with one stock model."""

    def __init__(self, model: PreTrainedModel, max_len: int) -> None:
        self._model = model
        self._max_len = max_len
        self._answered: dict[int, list[Answered]] = {}

    def graph(self, program: Program) -> Verdict:
        """Judge a symbolic graph in eager mode, whether its cache grows already in place or not yet."""
        graph = lower(program, "eager")

        def fed(scenario: Scenario) -> Fed:
            if not program.has_input(CACHE_POSITION):
                return _Growing(graph, scenario)
            return _Static(_engine(program, {}, graph, scenario), scenario)

        return self._compare(GRAPH_BATCH, fed, "the graphs, in eager mode")

    def decode(self, symbolic: Program, decode: Program, batch: int) -> Verdict:
        """Judge a graph for single tokens beside the symbolic one it was made from, in eager mode."""
        graph, single = lower(symbolic, "eager"), lower(decode, "eager")

        def fed(scenario: Scenario) -> Fed:
            return _Static(_engine(symbolic, {1: single}, graph, scenario), scenario)

        return self._compare(batch, fed, "the decode graph, in eager mode")

    def engine(self, engine: Engine) -> Verdict:
        """Judge an engine as it will run, at the batch size it was compiled for."""
        return self._compare(
            engine.limits.max_batch or 1, lambda scenario: _Static(engine, scenario), "the compiled code"
        )

    @torch.no_grad()
    def _compare(self, batch: int, fed: Feeder, what: str) -> Verdict:
        started = time.perf_counter()
        if batch not in self._answered:
            self._answered[batch] = list(answered(self._model, batch=batch, max_len=self._max_len))
        found = [
            difference
            for case in self._answered[batch]
            for difference in _differences(case, _feed(fed(case.scenario), case.scenario))
        ]
        worst = max(found, key=lambda difference: difference.share)
        check = Check(what, worst.error, worst.allowed, worst.label, time.perf_counter() - started)
        wrong = [difference for difference in found if difference.share > 1.0]
        if not wrong:
            return check, None
        # The first is nearest to the cause: caches in the order of the layers, then logits.
        others = f" (and {len(wrong) - 1} more of {len(found)} numbers compared)" if len(wrong) > 1 else ""
        return check, wrong[0].sentence + others


class Fed(Protocol):
    """Something that tokens can be fed to."""

    def feed(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """The logits of the last token, [B, V]."""

    def rows(self, start: int, end: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every layer."""


class Feeder(Protocol):
    def __call__(self, scenario: Scenario) -> Fed: ...


def _feed(fed: Fed, scenario: Scenario) -> Answer:
    logits = []
    for start, end in scenario.feeds:
        mask = scenario.mask[:, : scenario.start + end]
        logits.append(fed.feed(scenario.tokens[:, start:end], mask, scenario.positions[:, start:end]))
    keys, values = fed.rows(scenario.start, scenario.rows)
    return Answer(tuple(logits), tuple(keys), tuple(values))


def _engine(program: Program, special: dict[int, Lowered], graph: Lowered, scenario: Scenario) -> Engine:
    """An engine with buffers just large enough for a scenario; ``special`` graphs by longest step."""
    facts = program.facts
    if all(lowered.windowed for lowered in special.values()):  # the others have the whole capacity written in
        facts = replace(facts, capacity=whole_windows(scenario.rows))

    def source(role: Role) -> Lowered:
        return special.get(role.longest_step, graph)

    return Engine(facts, source, Limits(SMALL_CHUNK, max_batch=scenario.tokens.shape[0]))


class _Static:
    """An engine with a cache of its own."""

    def __init__(self, engine: Engine, scenario: Scenario) -> None:
        self._engine = engine
        self._cache = engine.new_cache(scenario.tokens.shape[0])
        for buffers, rows in zip((self._cache.buffers.keys, self._cache.buffers.values), scenario.past, strict=True):
            for buffer, past in zip(buffers, rows, strict=False):
                buffer[:, :, : scenario.start].copy_(past)
        self._cache.advance(scenario.start)

    def feed(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        self._cache.record_mask(mask, tokens.shape[1])
        return self._engine.step(self._cache, tokens, positions, last_only=True)[:, -1]

    def rows(self, start: int, end: int) -> tuple[list[Tensor], list[Tensor]]:
        buffers = self._cache.buffers  # zeroed for the next user when the cache goes
        keys, values = ([b[:, :, start:end].clone() for b in kind] for kind in (buffers.keys, buffers.values))
        return keys, values


class _Growing:
    """The captured graph: keys and values go in and come out longer."""

    def __init__(self, graph: Lowered, scenario: Scenario) -> None:
        facts, batch = graph.program.facts, scenario.tokens.shape[0]
        shapes = [layer.shapes(batch, 0) for layer in facts.layers]
        empty = [
            [torch.zeros(pair[kind], dtype=facts.dtype, device=facts.device) for pair in shapes] for kind in (0, 1)
        ]
        self._graph = graph
        self._keys = list(scenario.past[0]) or empty[0]
        self._values = list(scenario.past[1]) or empty[1]

    def feed(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        tensors = {INPUT_IDS: tokens, ATTENTION_MASK: mask, POSITION_IDS: positions}
        for layer, (key, value) in enumerate(zip(self._keys, self._values, strict=True)):
            tensors[key_name(layer)], tensors[value_name(layer)] = key, value
        logits, *rows = self._graph.outputs(tensors)
        self._keys, self._values = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        return logits[:, -1]

    def rows(self, start: int, end: int) -> tuple[list[Tensor], list[Tensor]]:
        return [key[:, :, start:end] for key in self._keys], [value[:, :, start:end] for value in self._values]


@dataclass(frozen=True)
class _Difference:
    """One kind of number, how far it is off and how far it may be."""

    label: str
    error: float
    allowed: float
    sentence: str = ""

    @property
    def share(self) -> float:
        return self.error / self.allowed if self.error == self.error else float("inf")


def _differences(case: Answered, found: Answer) -> Iterator[_Difference]:
    scenario, stock = case.scenario, case.stock
    real = scenario.mask[:, scenario.start :].bool()
    truth = case.truth or stock
    for layer in range(len(stock.keys)):
        for kind, answers in (("K", "keys"), ("V", "values")):
            ours, theirs, true = (getattr(a, answers)[layer].transpose(1, 2)[real] for a in (found, stock, truth))
            noise = relative_error(theirs, true)
            yield _difference(f"{kind} of layer {layer}, {scenario.name}", noise, ours, theirs, true)
    # One row of logits may be near the truth by luck; the worst of all says how far they usually are.
    noise = max(relative_error(*pair) for pair in zip(stock.logits, truth.logits, strict=True))
    labels = [f"logits after token {scenario.start + end}" for _, end in scenario.feeds]
    for label, ours, theirs, true in zip(labels, found.logits, stock.logits, truth.logits, strict=True):
        yield _difference(f"{label}, {scenario.name}", noise, ours, theirs, true)
        yield _token_difference(f"{label}, {scenario.name}", noise, ours, theirs, true)


def _difference(label: str, noise: float, ours: Tensor, stock: Tensor, truth: Tensor) -> _Difference:
    """``noise`` is how far the stock model is from the truth in numbers of this kind."""
    if truth.dtype == stock.dtype:
        error, allowed = relative_error(ours, stock), WITHOUT_TRUTH
    elif noise > PLAUSIBLE[stock.dtype]:
        error, allowed = relative_error(ours, stock), PLAUSIBLE[stock.dtype]
    else:
        error, allowed = relative_error(ours, truth), max(FACTOR * noise, FLOOR * torch.finfo(stock.dtype).eps)
    sentence = f"{label}, differ from the stock model's by {error:.1e} of their length, and {allowed:.1e} is allowed"
    return _Difference(label, error, allowed, sentence)


def _token_difference(label: str, noise: float, ours: Tensor, stock: Tensor, truth: Tensor) -> _Difference:
    """The greedy token may differ only where the truth has hardly a preference."""
    chosen, wanted = ours.argmax(-1, keepdim=True), stock.argmax(-1, keepdim=True)
    margin = (truth.gather(-1, wanted) - truth.gather(-1, chosen)).abs().double().nan_to_num()
    length = truth.double().nan_to_num().norm(dim=-1, keepdim=True)
    spread = length / truth.shape[-1] ** 0.5  # of one logit, when the error is spread over all of them
    allowed = (TOKEN_FACTOR * max(noise, torch.finfo(stock.dtype).eps) * spread).clamp(min=1e-30)
    row = int((margin / allowed).argmax())
    sentence = f"{label}, lead to token {int(chosen[row])} where the stock model says {int(wanted[row])}"
    return _Difference(f"greedy token, {label}", float(margin[row]), float(allowed[row]), sentence)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """The worst row's difference, as a share of that row's length (or of the mean row's, if longer).

    Row by row, so that one wrong row among many is seen, and by length, so that the rounding of a
    single small entry is not taken for one.
    """
    if wanted.numel() == 0:
        return 0.0
    found, wanted = found.double(), wanted.double()
    if bool((found.isfinite() != wanted.isfinite()).any()):
        return float("inf")
    difference = (found - wanted).nan_to_num().norm(dim=-1)
    length = wanted.nan_to_num().norm(dim=-1)
    return float((difference / length.clamp(min=max(float(length.mean()), 1e-9))).max())
