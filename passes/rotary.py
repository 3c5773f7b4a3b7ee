"""Rotary embedding without ``cat``, its tables computed once per forward.

    half = cat([neg(x[D/2:]), x[:D/2]])                 flipped = flatten(flip(unflatten(x, [2, D/2])))
    y    = x * cos + half * sin             becomes     y       = x * cos + flipped * signed_sin

``signed_sin`` is ``sin`` with its first half negated. It depends on the positions alone, like
``cos``, and nodes that do are merged wherever they compute the same thing, so all layers share
one table however the model's code is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxopt.program import CACHE_POSITION, POSITION_IDS, Program
from fxopt.rewrite import Pass
from fxopt.views import Concat, arguments, memory_of, mutates, shape, written_memory

aten = torch.ops.aten


@dataclass(frozen=True)
class Rotation:
    """``node = mul(cat([neg(x[half:]), x[:half]]), sin)``"""

    node: Node
    x: Node
    sin: Node
    half: int

    @classmethod
    def of(cls, node: Node) -> Rotation | None:
        if node.target is not aten.mul.Tensor:
            return None
        for rotated, sin in (node.args, reversed(node.args)):
            if not isinstance(rotated, Node) or not isinstance(sin, Node):
                continue
            found = _rotated_half(rotated)
            if found is not None and shape(sin)[-1] == 2 * found[1]:
                return cls(node, found[0], sin, found[1])
        return None


@dataclass(frozen=True)
class Rotary(Pass[Rotation]):
    name = "rotary"
    summary = "rotate_half without cat; cos and sin shared by all layers"

    def find(self, program: Program) -> Iterator[Rotation]:
        for node in program.graph.nodes:
            rotation = Rotation.of(node)
            if rotation is not None:
                yield rotation

    def rewrite(self, program: Program, site: Rotation) -> None:
        graph = program.graph
        with graph.inserting_before(site.node):
            first = graph.call_function(aten.slice.Tensor, (site.sin, -1, 0, site.half))
            second = graph.call_function(aten.slice.Tensor, (site.sin, -1, site.half, 2 * site.half))
            negated = graph.call_function(aten.neg.default, (first,))
            signed = graph.call_function(aten.cat.default, ([negated, second], -1))
            halves = graph.call_function(aten.unflatten.int, (site.x, -1, [2, site.half]))
            flipped = graph.call_function(aten.flip.default, (halves, [-2]))
            whole = graph.call_function(aten.flatten.using_ints, (flipped, -2, -1))
            product = graph.call_function(aten.mul.Tensor, (whole, signed))
        site.node.replace_all_uses_with(product)
        graph.erase_node(site.node)

    def finish(self, program: Program, matched: int) -> None:
        merge_position_nodes(program)


def merge_position_nodes(program: Program) -> None:
    """Compute once what depends on nothing but positions and constants."""
    inputs = program.placeholders()
    roots = {inputs[name] for name in (POSITION_IDS, CACHE_POSITION) if name in inputs}
    derived: set[Node] = set(roots)
    written = written_memory(program)
    seen: dict[Any, Node] = {}
    for node in list(program.graph.nodes):
        if memory_of(node) in written:
            continue
        if node.op == "get_attr":
            key: Any = ("get_attr", node.target)
        elif node.op == "call_function" and not mutates(node) and _depends_on_positions(node, derived):
            derived.add(node)
            key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        else:
            continue
        kept = seen.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            program.graph.erase_node(node)
            derived.discard(node)


def _depends_on_positions(node: Node, derived: set[Node]) -> bool:
    operands = node.all_input_nodes
    sources = [n for n in operands if n.op != "get_attr" and n.target is not aten.sym_size.int]
    return bool(sources) and all(operand in derived for operand in sources)


def _frozen(value: Any) -> Any:
    """Arguments as something that can be a key: by type too, since 1 == 1.0 == True."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(item)) for key, item in value.items()))
    return type(value).__name__, value


def _rotated_half(node: Node) -> tuple[Node, int] | None:
    """``x`` and its half width when ``node`` is ``cat([neg(x[half:]), x[:half]], -1)``."""
    concat = Concat.of(node)
    if concat is None or len(concat.parts) != 2 or concat.dim != len(shape(node)) - 1:
        return None
    negated, first = concat.parts
    if negated.target is not aten.neg.default:
        return None
    second = negated.args[0]
    assert isinstance(second, Node)
    if first.target is not aten.slice.Tensor or second.target is not aten.slice.Tensor:
        return None
    low, high = arguments(first), arguments(second)
    half = shape(first)[-1]
    last_dim = {len(shape(node)) - 1, -1}
    takes_halves = (low["start"] or 0) == 0 and high["start"] == half and shape(second)[-1] == half
    same = low["self"] is high["self"] and {low["dim"], high["dim"]} <= last_dim
    return (low["self"], int(half)) if takes_halves and same and isinstance(half, int) else None
