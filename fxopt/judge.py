"""Does a rewritten graph compute what the stock model computes? Logits, cache contents and tokens.

Whatever can be fed tokens is asked what the stock model was asked (:mod:`fxopt.scenarios`), and the
answers are compared (:mod:`fxopt.distance`).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fxopt.distance import Difference, Moved, differences, differences_over, moved
from fxopt.engine import Engine, Limits
from fxopt.lower import Lowered, lower
from fxopt.outcome import Check
from fxopt.program import (
    ATTENTION_MASK,
    CACHE_POSITION,
    INPUT_IDS,
    POSITION_IDS,
    Facts,
    KVShape,
    Program,
    key_name,
    value_name,
    whole_windows,
)
from fxopt.rounded_weights import RoundedWeights
from fxopt.scenarios import Answer, Answered, Scenario, answered, answered_rounded, ask
from fxopt.specialise import Role
from fxopt.weight_formats import CodedWeight

SMALL_CHUNK = 16  # so that a short prompt crosses the borders of chunks
GRAPH_BATCH = 2  # of the checks of a graph that holds for any batch


@dataclass
class _Answers:
    """What the stock model has said, to batches near the start of a cache and far into it."""

    batches: tuple[int, int]
    weights: tuple[CodedWeight, ...]  # that were rounded
    answered: list[Answered]
    plain: list[Answer]  # with its own weights, if others are rounded
    rounded: list[Answer] = field(default_factory=list)  # over caches in these formats
    formats: tuple[KVShape, ...] = ()


Verdict = tuple[Check, str | None]  # and a sentence if it is against the graph


class Judge:
    """Compares graphs and engines with one stock model."""

    def __init__(self, model: PreTrainedModel, max_len: int) -> None:
        self._model = model
        self._max_len = max_len
        self._last: _Answers | None = None  # graphs are judged in the order of their batches
        self._ahead: list[_Answers] = []  # that were asked for before the weights moved
        self._rounding = RoundedWeights(model, ())

    @torch.no_grad()
    def ask(self, batches: Iterable[int], facts: Facts) -> None:
        """Ask the stock model now what engines are compared with: without its weights it is slow, or cannot run."""
        for batch in batches:
            found = self._answers((batch, batch), facts)
            self._over(found, facts)
            self._ahead.append(found)

    def graph(self, program: Program) -> Verdict:
        """Judge a symbolic graph in eager mode, whether its cache grows already in place or not yet."""
        graph = lower(program, "eager")

        def fed(scenario: Scenario) -> Fed:
            if not program.has_input(CACHE_POSITION):
                return _Growing(graph, scenario)
            return _Static(_engine(program, {}, graph, scenario), scenario)

        # One sequence is enough far into the cache, and takes half of the memory.
        return self._compare((GRAPH_BATCH, 1), fed, "the graphs, in eager mode", program.facts)

    def decode(self, symbolic: Program, decode: Program, batch: int) -> Verdict:
        """Judge a graph for single tokens beside the symbolic one it was made from, in eager mode."""
        graph, single = lower(symbolic, "eager"), lower(decode, "eager")

        def fed(scenario: Scenario) -> Fed:
            return _Static(_engine(symbolic, {1: single}, graph, scenario), scenario)

        return self._compare((batch, batch), fed, "the decode graph, in eager mode", decode.facts)

    def engine(self, engine: Engine, batch: int) -> Verdict:
        """Judge an engine as it will run, with the graphs that serve a batch of this size."""
        what = f"the compiled code, batch {batch}"
        return self._compare((batch, batch), lambda scenario: _Static(engine, scenario), what, engine.facts)

    @torch.no_grad()
    def _compare(self, batches: tuple[int, int], fed: Feeder, what: str, facts: Facts) -> Verdict:
        started = time.perf_counter()
        answers = self._answers(batches, facts)
        found: list[Difference] = []
        cases = list(zip(answers.answered, self._over(answers, facts), strict=True))
        for case, rounded in cases:
            answer = _feed(fed(case.scenario), case.scenario)
            found += differences(case, answer) if rounded is None else differences_over(case, rounded, answer)
        worst = max(found, key=lambda difference: difference.share)
        note = _note(facts, cases, answers.plain)
        check = Check(what, worst.error, worst.allowed, worst.label, time.perf_counter() - started, note)
        wrong = [difference for difference in found if difference.share > 1.0]
        if not wrong:
            return check, None
        # The first is nearest to the cause: caches in the order of the layers, then logits.
        others = f" (and {len(wrong) - 1} more of {len(found)} numbers compared)" if len(wrong) > 1 else ""
        return check, wrong[0].sentence + others

    def _answers(self, batches: tuple[int, int], facts: Facts) -> _Answers:
        """What the stock model says, with weights rounded as in these facts; and without, to say how far that is."""
        wanted = (batches, facts.weights)
        known = (*self._ahead, self._last)
        found = next((one for one in known if one is not None and (one.batches, one.weights) == wanted), None)
        if found is None:
            self._last = None  # what it holds is let go of first
            near, far = batches
            with self._rounded(facts):
                each = list(answered(self._model, batch=near, far_batch=far, max_len=self._max_len))
            plain = [ask(self._model, case.scenario) for case in each] if facts.weights else []
            found = self._last = _Answers(batches, facts.weights, each, plain)
        return found

    def _over(self, answers: _Answers, facts: Facts) -> Sequence[Answer | None]:
        """What the stock model says over caches in these formats; None if rows are kept as they are."""
        if not facts.formats:
            return [None] * len(answers.answered)
        if answers.formats != facts.layers or not answers.rounded:
            with self._rounded(facts):
                answers.rounded = [answered_rounded(self._model, case.scenario, facts) for case in answers.answered]
            answers.formats = facts.layers
        return answers.rounded

    def _rounded(self, facts: Facts) -> contextlib.AbstractContextManager[Any]:
        """The stock model has rounded weights meanwhile, if the graph has."""
        if not facts.weights:
            return contextlib.nullcontext()
        if self._rounding.weights != facts.weights:
            self._rounding = RoundedWeights(self._model, facts.weights)
        return self._rounding


def _note(facts: Facts, cases: Sequence[tuple[Answered, Answer | None]], plain: Sequence[Answer]) -> str:
    """What the formats of weights and of the cache do to the stock model itself."""
    if not facts.rounds:
        return ""
    exact = plain or [case.stock for case, _ in cases]
    each = [
        moved(replace(case, stock=before), rounded or case.stock)
        for (case, rounded), before in zip(cases, exact, strict=True)
    ]
    found = functools.reduce(Moved.__or__, each)
    how = [f"with weights of {' and '.join(facts.weight_formats)}"] if facts.weights else []
    how += [f"over a cache of {' and '.join(facts.formats)}"] if facts.formats else []
    return (
        f"beside the stock model {' '.join(how)}, which itself moves its rows by up to {found.rows:.1e} and its logits "
        f"by up to {found.logits:.1e} of their length"
    )


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
        for layer in range(len(scenario.past.keys)):
            self._cache.layers[layer].write(*scenario.past.of(layer))

    def feed(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        self._cache.record_mask(mask, tokens.shape[1])
        return self._engine.step(self._cache, tokens, positions, keep=1)[:, -1]

    def rows(self, start: int, end: int) -> tuple[list[Tensor], list[Tensor]]:
        # The buffers are zeroed for the next user when the cache goes.
        pairs = [[rows.clone() for rows in layer.read(start, end)] for layer in self._cache.layers]
        return [key for key, _ in pairs], [value for _, value in pairs]


class _Growing:
    """The captured graph: keys and values go in and come out longer."""

    def __init__(self, graph: Lowered, scenario: Scenario) -> None:
        facts, batch = graph.program.facts, scenario.tokens.shape[0]
        self._graph = graph
        if scenario.start:
            pairs = [scenario.past.of(layer) for layer in range(len(facts.layers))]
        else:
            like: dict[str, Any] = {"dtype": facts.dtype, "device": facts.device}
            shapes = [layer.shapes(batch, 0) for layer in facts.layers]
            pairs = [(torch.zeros(key, **like), torch.zeros(value, **like)) for key, value in shapes]
        self._keys, self._values = ([pair[kind] for pair in pairs] for kind in (0, 1))

    def feed(self, tokens: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        tensors = {INPUT_IDS: tokens, ATTENTION_MASK: mask, POSITION_IDS: positions}
        for layer, (key, value) in enumerate(zip(self._keys, self._values, strict=True)):
            tensors[key_name(layer)], tensors[value_name(layer)] = key, value
        logits, *rows = self._graph.outputs(tensors)
        self._keys, self._values = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        return logits[:, -1]

    def rows(self, start: int, end: int) -> tuple[list[Tensor], list[Tensor]]:
        return [key[:, :, start:end] for key in self._keys], [value[:, :, start:end] for value in self._values]
