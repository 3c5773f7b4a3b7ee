"""Copies, branches and wrappers that remove_control_flow takes out, and those that it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from edited_programs import CAPACITY, assert_refused, attempt, call
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from fxopt.driver import apply
from fxopt.passes.remove_control_flow import RemoveControlFlow
from fxopt.passes.rotary import Rotary
from fxopt.program import Facts, Program

aten = torch.ops.aten


def traced(function: Callable[[Tensor], Tensor], example: Tensor) -> Program:
    """A function of one tensor as a program, made by hand."""

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return traced_module(Wrapped(), example)


def traced_module(wrapped: nn.Module, example: Tensor) -> Program:
    module = torch.export.export(wrapped, (example,), strict=False).module()
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.users:
            graph.erase_node(node)
    graph.set_codegen(CodeGen())
    facts = Facts((), CAPACITY, 32, torch.float32, torch.device("cpu"), 0, 0, 0, tuple)
    fake_mode = next(node for node in graph.nodes if node.op == "placeholder").meta["val"].fake_mode
    return Program(GraphModule(module, graph), facts, fake_mode)


def copied_then_source_written(x: Tensor) -> Tensor:
    y = x * 1
    kept = y.clone()
    y.add_(1)
    return kept + y


def copied_then_copy_written(x: Tensor) -> Tensor:
    y = x * 1
    kept = y.clone()
    kept.mul_(3)
    return kept + y


@pytest.mark.parametrize("function", [copied_then_source_written, copied_then_copy_written])
def test_a_copy_that_a_later_write_needs(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    program = traced(function, x)
    result, outcome = apply(RemoveControlFlow(), program)
    assert_refused(program, outcome, "clone copies a tensor that is written in place", "needed")
    assert [node.target for node in result.graph.nodes].count(aten.clone.default) == 1
    assert torch.equal(result.gm(x.clone())[0], function(x.clone()))
    assert torch.equal(program.gm(x.clone())[0], function(x.clone()))


def test_a_copy_that_nothing_needs_goes() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    program = traced(lambda x: (x * 1).clone() + 1, x)
    result, outcome = apply(RemoveControlFlow(), program)
    assert (outcome.matched, outcome.refused) == (1, [])
    assert aten.clone.default not in [node.target for node in result.graph.nodes]
    assert torch.equal(result.gm(x)[0], x + 1)


def test_a_write_is_no_dead_code() -> None:
    """Nobody reads the result of the write, but its target is read later."""

    def function(x: Tensor) -> Tensor:
        y = x * 2
        y.add_(1)
        return y

    x = torch.arange(6.0)
    result, _ = apply(RemoveControlFlow(), traced(function, x))
    assert torch.equal(result.gm(x)[0], x * 2 + 1)


def copied_then_written_by_view(x: Tensor) -> Tensor:
    y = x * 1
    kept = y.clone()
    y.view(-1).add_(1)
    return kept + y


def copied_then_row_written(x: Tensor) -> Tensor:
    y = x * 1
    kept = y.clone()
    kept[0].add_(1)
    return kept + y


def copied_then_detached_and_written(x: Tensor) -> Tensor:
    y = x * 1
    kept = y.clone()
    kept.detach().add_(1)
    return kept + y


def copied_by_to(x: Tensor) -> Tensor:
    y = x * 1
    kept = y.to(torch.float32, copy=True)
    kept.add_(1)
    return kept + y


@pytest.mark.parametrize(
    "function",
    [copied_then_written_by_view, copied_then_row_written, copied_then_detached_and_written, copied_by_to],
)
def test_a_copy_that_a_write_through_a_view_needs(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    result, _ = apply(RemoveControlFlow(), traced(function, x))
    assert torch.equal(result.gm(x.clone())[0], function(x.clone()))


def plus_one(x: Tensor) -> Tensor:
    return x + 1


def doubled(x: Tensor) -> Tensor:
    return x * 2


def plus_one_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y.add_(1)
    return y


def pure(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 3, plus_one, doubled, (x,))  # type: ignore[no-any-return]


def mutating(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 3, plus_one_in_place, doubled, (x,))  # type: ignore[no-any-return]


def nested(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 3, pure, doubled, (x,))  # type: ignore[no-any-return]


def nested_mutating(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 3, mutating, doubled, (x,))  # type: ignore[no-any-return]


def targets(program: Program) -> list[Any]:
    return [node.target for node in program.graph.nodes]


BOTH_WAYS = [torch.arange(6.0).reshape(2, 3), -torch.ones(2, 3)]


def test_pure_branches_become_where() -> None:
    result, outcome = attempt(RemoveControlFlow(), program := traced(pure, BOTH_WAYS[0]))
    assert (outcome.matched, outcome.refused) == (1, [])
    assert torch.ops.higher_order.cond not in targets(result)
    assert aten.where.self in targets(result)
    for x in BOTH_WAYS:
        assert torch.equal(result.gm(x)[0], pure(x))
        assert torch.equal(program.gm(x)[0], pure(x))


@pytest.mark.parametrize(("known", "expected"), [(True, plus_one), (False, doubled)])
def test_a_known_predicate(known: bool, expected: Callable[[Tensor], Tensor]) -> None:
    program = traced(pure, BOTH_WAYS[0]).copy()
    cond = call(program, torch.ops.higher_order.cond)
    cond.args = (known, *cond.args[1:])
    result, outcome = attempt(RemoveControlFlow(), program)
    assert outcome.matched == 1
    assert torch.ops.higher_order.cond not in targets(result)
    assert aten.where.self not in targets(result)
    for x in BOTH_WAYS:
        assert torch.equal(result.gm(x)[0], expected(x))


def test_a_branch_that_writes_is_left_alone() -> None:
    program = traced(mutating, BOTH_WAYS[0])
    result, outcome = attempt(RemoveControlFlow(), program)
    assert_refused(program, outcome, "cond chooses between branches", "add_", "writes in place")
    assert torch.ops.higher_order.cond in targets(result)
    for x in BOTH_WAYS:
        assert torch.equal(result.gm(x)[0], mutating(x))


@pytest.mark.parametrize("function", [nested, nested_mutating])
def test_nested_branches(function: Callable[[Tensor], Tensor]) -> None:
    result, _ = attempt(RemoveControlFlow(), traced(function, BOTH_WAYS[0]))
    for x in [*BOTH_WAYS, BOTH_WAYS[0] * 100]:
        assert torch.equal(result.gm(x)[0], function(x))


def without_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x + 1
    return y * 2


def without_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        y = x @ x.T
    return y * 2


def with_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x @ x.T
    return y * 2


@pytest.mark.parametrize("function", [without_grad, without_autocast, with_autocast])
def test_wrappers(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.rand(3, 3)
    result, _ = attempt(RemoveControlFlow(), traced(function, x))
    found, expected = result.gm(x)[0], function(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_tables_that_are_written_later_are_not_shared() -> None:
    class Tables(nn.Module):
        def forward(self, position_ids: Tensor) -> Tensor:
            a, b = position_ids * 1.0, position_ids * 1.0
            a.add_(1)
            return a + b

    x = torch.arange(3)[None]
    program = traced_module(Tables(), x)
    result, _ = apply(Rotary(), program)
    assert torch.equal(result.gm(x)[0], program.gm(x)[0])
