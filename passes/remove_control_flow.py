"""Straight-line ATen: what tracing left behind that computes nothing goes.

    _assert_tensor_metadata(x)                   (gone)
    y = to(x, float32)            becomes        y = x         when x is float32 already
    z = slice(y, 0, 0, MAX)                      z = y
    w = wrap_with_set_grad_enabled(False, f, z)  w = <the body of f>(z)
    c = cond(p, f, g, [z])                       c = where(p, <f>(z), <g>(z))

Every later pass may then match the computation itself. A branch is inlined only when its
predicate is known, or when both branches are free of side effects and can both be run. The loop
over experts of a mixture is already a batched form here: the capture asks the model for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxopt.program import Program
from fxopt.rewrite import Pass
from fxopt.views import arguments, is_tensor, memory_of, mutated_arguments, mutates, shape

aten = torch.ops.aten
hop = torch.ops.higher_order

CHECKS = frozenset(
    {
        aten._assert_async.msg,
        aten._assert_scalar.default,
        aten._assert_tensor_metadata.default,
        aten.sym_constrain_range.default,
        aten.sym_constrain_range_for_size.default,
    }
)
#: Identity ops, or ops that are one whenever the result looks like the operand.
CASTS = frozenset({aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.contiguous.default})
COPIES = frozenset({aten.clone.default, aten.lift_fresh_copy.default, aten._to_copy.default})
RENAMES = frozenset({aten.alias.default, aten.detach.default, aten.detach_.default})
SPREADS = frozenset({aten.slice.Tensor, aten.expand.default})
WRAPPERS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


@dataclass(frozen=True)
class Check:
    """A run-time assertion about something the capture already fixed."""

    node: Node


@dataclass(frozen=True)
class Identity:
    """An op whose result is its first operand."""

    node: Node


@dataclass(frozen=True)
class Wrapper:
    """A higher-order op that runs one body under another mode."""

    node: Node
    body: GraphModule
    operands: tuple[Any, ...]


@dataclass(frozen=True)
class Branch:
    """``cond(predicate, when_true, when_false, operands)``"""

    node: Node
    predicate: Any
    when_true: GraphModule
    when_false: GraphModule
    operands: tuple[Any, ...]


Place = Check | Identity | Wrapper | Branch


@dataclass(frozen=True)
class RemoveControlFlow(Pass[Place]):
    name = "remove_control_flow"
    summary = "inlines wrappers and branches, drops asserts and ops that change nothing"
    required = True

    def find(self, program: Program) -> Iterator[Place]:
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            if node.target in CHECKS:
                yield Check(node)
            elif _changes_nothing(node):
                yield Identity(node)
            elif getattr(node.target, "__name__", "") in WRAPPERS:
                body = next(a for a in node.args if isinstance(a, Node) and a.op == "get_attr")
                position = node.args.index(body)
                yield Wrapper(node, _body(program, body), node.args[position + 1 :])
            elif node.target is hop.cond:
                predicate, when_true, when_false, operands = node.args
                yield Branch(node, predicate, _body(program, when_true), _body(program, when_false), tuple(operands))

    def refuse(self, program: Program, site: Place) -> str | None:
        match site:
            case Identity(node) if _copies(node) and _written_in_place(program, node):
                return f"{node} copies a tensor that is written in place, so the copy is needed"
            case Wrapper(node, _, _) if _switches_autocast_on(node):
                return f"{node} switches autocast on, which changes the dtype of what it wraps"
            case Branch(node, Node() as predicate, _, _, _) if not is_tensor(predicate):
                return f"{node} chooses by {predicate}, which depends on a symbolic size"
            case Branch(node, Node(), when_true, when_false, _) if written := _writes(when_true) + _writes(when_false):
                return f"{node} chooses between branches and {written[0]} in one of them writes in place"
        return None

    def rewrite(self, program: Program, site: Place) -> None:
        match site:
            case Check(node):
                program.graph.erase_node(node)
            case Identity(node):
                source = node.args[0]
                assert isinstance(source, Node)
                node.replace_all_uses_with(source)
                program.graph.erase_node(node)
            case Wrapper(node, body, operands):
                self._replace(program, node, _inline(program, node, body, operands))
            case Branch(node, bool() as known, when_true, when_false, operands):
                self._replace(program, node, _inline(program, node, when_true if known else when_false, operands))
            case Branch(node, predicate, when_true, when_false, operands):
                yes = _inline(program, node, when_true, operands)
                no = _inline(program, node, when_false, operands)
                with program.graph.inserting_before(node):
                    both = [
                        program.graph.call_function(aten.where.self, (predicate, a, b))
                        for a, b in zip(yes, no, strict=True)
                    ]
                self._replace(program, node, both)

    def finish(self, program: Program, matched: int) -> None:
        """What an inlined body wraps in turn."""
        while nested := [
            site
            for site in self.find(program)
            if isinstance(site, (Wrapper, Branch)) and self.refuse(program, site) is None
        ]:
            for site in nested:
                self.rewrite(program, site)

    @staticmethod
    def _replace(program: Program, node: Node, results: list[Any]) -> None:
        """Hand each result to the ``getitem`` that took it out of the wrapper's tuple."""
        for item in list(node.users):
            index = item.args[1]
            assert isinstance(index, int)
            item.replace_all_uses_with(results[index])
            program.graph.erase_node(item)
        program.graph.erase_node(node)


def _body(program: Program, node: Any) -> GraphModule:
    body = getattr(program.gm, str(node.target))
    assert isinstance(body, GraphModule)
    return body


def _inline(program: Program, before: Node, body: GraphModule, operands: tuple[Any, ...]) -> list[Any]:
    """Copy a body in front of ``before``, its placeholders bound to ``operands``."""
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    mapping: dict[Node, Any] = dict(zip(inputs, operands, strict=True))
    with program.graph.inserting_before(before):
        for node in body.graph.nodes:
            if node.op == "get_attr":
                name = f"{before.name}_{node.target}".replace(".", "_")
                setattr(program.gm, name, getattr(body, str(node.target)))
                mapping[node] = program.graph.get_attr(name)
            elif node.op == "call_function":
                mapping[node] = program.graph.node_copy(node, lambda n: mapping[n])
    results = next(iter(reversed(body.graph.nodes))).args[0]
    mapped = torch.fx.map_arg(results, lambda n: mapping[n])
    return list(mapped) if isinstance(mapped, (tuple, list)) else [mapped]


def _changes_nothing(node: Node) -> bool:
    if node.target in RENAMES:
        return True
    if node.target is aten.dropout.default:
        return arguments(node)["train"] is False
    source = node.args[0] if node.args else None
    if node.target not in CASTS | COPIES | SPREADS or not isinstance(source, Node) or not is_tensor(node):
        return False
    before, after = source.meta["val"], node.meta["val"]
    alike = before.dtype == after.dtype and before.device == after.device
    return alike and _sizes(source) == _sizes(node) and str(before.stride()) == str(after.stride())


def _sizes(node: Node) -> list[str]:
    return [str(size) for size in shape(node)]


def _copies(node: Node) -> bool:
    """Whether the result is always memory of its own, even when nothing else changes."""
    return node.target in COPIES or (node.target in CASTS and bool(arguments(node).get("copy", False)))


def _written_in_place(program: Program, node: Node) -> bool:
    """Whether the copy or what it copies is written into, under any name."""
    source = node.args[0]
    assert isinstance(source, Node)
    writers = [n for n in program.graph.nodes if n.target not in RENAMES]
    written = {memory_of(tensor) for writer in writers for tensor in mutated_arguments(writer)}
    return not written.isdisjoint({memory_of(node), memory_of(source)})


def _writes(body: GraphModule) -> list[Node]:
    """The calls in a body, or in bodies inside it, that write in place."""
    found = [node for node in body.graph.nodes if mutates(node)]
    inner = [child for child in body.children() if isinstance(child, GraphModule)]
    return found + [node for child in inner for node in _writes(child)]


def _switches_autocast_on(node: Node) -> bool:
    """``wrap_with_autocast(device, dtype, enabled, cache_enabled, body, *operands)``"""
    return getattr(node.target, "__name__", "") == "wrap_with_autocast" and node.args[2] is True
