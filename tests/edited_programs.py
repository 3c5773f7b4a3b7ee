"""Programs of one layer to edit by hand, and a look at what a pass makes of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fxopt.capture import capture
from fxopt.driver import apply
from fxopt.families import VOCABULARY, tiny
from fxopt.listing import readable
from fxopt.outcome import Outcome
from fxopt.passes import DEFAULT_PASSES
from fxopt.passes.remove_control_flow import RemoveControlFlow
from fxopt.passes.static_kv import StaticKV
from fxopt.program import (
    ATTENTION_MASK,
    CACHE_POSITION,
    INPUT_IDS,
    LOGIT_POSITIONS,
    POSITION_IDS,
    Program,
    key_name,
    value_name,
)
from fxopt.propagate import mark_edited, propagate, snapshot
from fxopt.rewrite import Pass, Stage
from fxopt.specialise import Role, specialise

aten = torch.ops.aten
CAPACITY = 64
PAST, STEP, BATCH = 5, 3, 2


Edit = Callable[[Program], None]


@cache
def captured(family: str = "llama", **changes: Any) -> Program:
    """One layer of a family, asserts and identities gone."""
    program = capture(tiny(family, num_hidden_layers=1, **changes), max_len=32, capacity=CAPACITY)
    return apply(RemoveControlFlow(), program)[0]


@cache
def static(family: str = "llama", **changes: Any) -> Program:
    return apply(StaticKV(), captured(family, **changes))[0]


@cache
def decode(batch: int = 1, backend: str = "inductor") -> Program:
    """The graph of one new token, as the decode passes get it."""
    program = captured()
    for kind in DEFAULT_PASSES[1:]:
        if kind.stage is Stage.SYMBOLIC:
            program, _ = apply(kind(), program)
    program = specialise(program, Role("decode", batch, longest_step=1))
    return dataclasses.replace(program, facts=dataclasses.replace(program.facts, backend=backend))


@contextlib.contextmanager
def edited(program: Program) -> Iterator[Program]:
    """A copy to edit; shapes are right again and the code is made anew when the block ends."""
    draft = program.copy()
    known = snapshot(draft)
    yield draft
    propagate(draft, known)
    draft.graph.lint()
    draft.gm.recompile()


def call(program: Program, target: Any, index: int = 0) -> Node:
    """One of the calls of an operator, counted in graph order."""
    found: list[Node] = [node for node in program.graph.nodes if node.target is target]
    return found[index]


def replaced(node: Node, position: int, value: Any) -> None:
    """Give a node another operand."""
    node.args = (*node.args[:position], value, *node.args[position + 1 :])
    mark_edited(node)


def before(program: Program, node: Node, target: Any, *args: Any) -> Node:
    with program.graph.inserting_before(node):
        return program.graph.call_function(target, args)


def parts_of(cat: Node) -> list[Node]:
    """The operands of a cat."""
    parts = cat.args[0]
    assert isinstance(parts, (list, tuple))
    return [part for part in parts if isinstance(part, Node)]


def source_of(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def into_logits(program: Program, value: Node) -> None:
    """Add the sum of a tensor to the logits, so that it counts."""
    logits, output = program.logits(), program.output()
    with program.graph.inserting_before(output):
        total = program.graph.call_function(aten.sum.default, (value,))
        shifted = program.graph.call_function(aten.add.Tensor, (logits, total))
    logits.replace_all_uses_with(shifted, delete_user_cb=lambda user: user is output)


def run(program: Program) -> Tensor:
    """The logits of one step behind a few past tokens, for a graph of any stage."""
    inputs = program.placeholders()
    sizes = inputs[INPUT_IDS].meta["val"].shape
    batch, step = (size if isinstance(size, int) else many for size, many in zip(sizes, (BATCH, STEP), strict=True))
    is_static = CACHE_POSITION in inputs
    generator = torch.Generator().manual_seed(0)
    positions = torch.arange(PAST, PAST + step)
    mask = torch.ones(batch, PAST + step, dtype=torch.long)
    tensors = {
        INPUT_IDS: torch.randint(0, VOCABULARY, (batch, step), generator=generator),
        ATTENTION_MASK: nn.functional.pad(mask, (0, CAPACITY - PAST - step)) if is_static else mask,
        POSITION_IDS: positions.expand(batch, step),
        CACHE_POSITION: positions,
        LOGIT_POSITIONS: torch.arange(step - 1, step),
    }
    for layer, kept in enumerate(program.facts.layers):
        for name, shape in zip((key_name(layer), value_name(layer)), kept.shapes(batch, PAST), strict=True):
            rows = torch.randn(shape, generator=generator)
            tensors[name] = nn.functional.pad(rows, (0, 0, 0, CAPACITY - PAST)) if is_static else rows
    with torch.no_grad():
        logits = program.gm(*(tensors[name] for name in inputs))[0]
    assert isinstance(logits, Tensor)
    return logits


def attempt(rewriter: Pass[Any], program: Program) -> tuple[Program, Outcome]:
    """Apply, and see that the program given is still the same text."""
    text = readable(program)
    result, outcome = apply(rewriter, program)
    assert readable(program) == text
    return result, outcome


def assert_refused(program: Program, outcome: Outcome, *words: str) -> None:
    """One refusal, in a sentence with these words, at a node that the program has."""
    assert len(outcome.refused) == 1, outcome
    refusal = outcome.refused[0]
    assert refusal.node in {node.name for node in program.graph.nodes}
    for word in words:
        assert word in refusal.reason, refusal
    assert refusal.reason[0] != " "
    assert "\n" not in refusal.reason


def assert_same_numbers(program: Program, result: Program) -> None:
    torch.testing.assert_close(run(result), run(program), atol=1e-5, rtol=1e-5)
