"""Typed windows onto graph nodes: what passes read instead of ``node.args[1]``."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import Argument

from fxopt.program import CACHE_POSITION, Program, key_name, value_name

aten = torch.ops.aten

#: Ops that only rearrange, cast or copy: following one still leads to the same numbers.
PASSIVE = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.expand.default,
        aten.permute.default,
        aten.repeat_interleave.self_int,
        aten.reshape.default,
        aten.slice.Tensor,
        aten.squeeze.dim,
        aten.to.device,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.transpose.int,
        aten.unflatten.int,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
#: Matrix products that attention written out by hand uses, and where the query stands in each.
MATMULS = {aten.matmul.default: 0, aten.bmm.default: 0, aten.baddbmm.default: 1}


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator call by the names in its schema, defaults filled in."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise TypeError(f"{node} calls {target}, which is no operator overload")
    values: dict[str, Any] = {}
    for position, parameter in enumerate(target._schema.arguments):
        if position < len(node.args):
            values[parameter.name] = node.args[position]
        elif parameter.name in node.kwargs:
            values[parameter.name] = node.kwargs[parameter.name]
        else:
            values[parameter.name] = parameter.default_value
    return values


def shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def mutates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def mutated_arguments(node: Node) -> list[Node]:
    """The nodes whose tensors this call writes into."""
    if not mutates(node):
        return []
    assert isinstance(node.target, torch._ops.OpOverload)
    values = arguments(node)
    written = [p.name for p in node.target._schema.arguments if p.alias_info is not None and p.alias_info.is_write]
    return [values[name] for name in written if isinstance(values[name], Node)]


#: Ops that may hand out their operand's own memory although their schema does not say so.
_MAY_ALIAS = frozenset(
    {aten.contiguous.default, aten.reshape.default, aten.to.device, aten.to.dtype, aten.to.dtype_layout}
)


def memory_of(node: Node) -> Node:
    """The node whose memory ``node`` may be a view of; ``node`` itself when it has its own."""
    while node.op == "call_function" and node.all_input_nodes:
        returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else []
        is_view = any(value.alias_info is not None for value in returns) or node.target in _MAY_ALIAS
        if not is_view and node.target is not operator.getitem:
            return node
        node = node.all_input_nodes[0]
    return node


def written_memory(program: Program) -> set[Node]:
    """Everything that some op of the graph writes into, by :func:`memory_of`."""
    return {memory_of(tensor) for node in program.graph.nodes for tensor in mutated_arguments(node)}


def swap_argument(node: Node, old: Argument, new: Argument) -> None:
    """Replace one operand of ``node``, leaving every other reader of ``old`` alone."""
    node.args = torch.fx.map_arg(node.args, lambda n: new if n is old else n)
    node.kwargs = torch.fx.map_arg(node.kwargs, lambda n: new if n is old else n)


def upstream(node: Node, stop: frozenset[Any]) -> set[Node]:
    """The nearest calls of one of ``stop`` that ``node`` is computed from, itself included."""
    found: set[Node] = set()
    seen: set[Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.target in stop:
            found.add(current)
        else:
            todo.extend(current.all_input_nodes)
    return found


def consumers(node: Node) -> list[tuple[Node, Node]]:
    """Who really computes with ``node``: pairs of (reader, the operand it reads), past passive ops."""
    found: list[tuple[Node, Node]] = []
    todo = [node]
    while todo:
        current = todo.pop()
        for user in current.users:
            if user.target in PASSIVE:
                todo.append(user)
            elif user.target is not aten.sym_size.int and user.op != "output":
                found.append((user, current))
    return found


@dataclass(frozen=True)
class Linear:
    """``node = linear(x, weight, bias)``"""

    node: Node
    x: Node
    weight: Node
    bias: Node | None

    @classmethod
    def of(cls, node: Node) -> Linear | None:
        if node.target is not aten.linear.default:
            return None
        values = arguments(node)
        return cls(node, values["input"], values["weight"], values["bias"])

    @classmethod
    def all(cls, program: Program) -> Iterator[Linear]:
        for node in program.graph.nodes:
            linear = cls.of(node)
            if linear is not None:
                yield linear

    @property
    def rows(self) -> int:
        return int(shape(self.weight)[0])


@dataclass(frozen=True)
class ExpertMatmul:
    """``node = grouped_mm(x, weight, offsets)``: rows of ``x``, sorted by expert, each times its expert's weight."""

    node: Node
    x: Node  # [R, K]
    weight: Node  # [E, K, N]
    offsets: Node  # [E], where each expert's rows end

    @classmethod
    def of(cls, node: Node) -> ExpertMatmul | None:
        # Transformers wraps a loop over experts into an op of its own where ATen has no kernel.
        if (
            node.target is not aten._grouped_mm.default
            and str(node.target) != "transformers.grouped_mm_fallback.default"
        ):
            return None
        x, weight, offsets = node.args[:3]
        assert isinstance(x, Node)
        assert isinstance(weight, Node)
        assert isinstance(offsets, Node)
        return cls(node, x, weight, offsets)


@dataclass(frozen=True)
class Concat:
    """``node = cat(parts, dim)``"""

    node: Node
    parts: tuple[Node, ...]
    dim: int

    @classmethod
    def of(cls, node: Node) -> Concat | None:
        if node.target is not aten.cat.default:
            return None
        values = arguments(node)
        rank = len(shape(node))
        return cls(node, tuple(values["tensors"]), values["dim"] % rank)


@dataclass(frozen=True)
class RowWrite:
    """``node = index_copy_(buffer, 2, cache_position, new)``: one layer's K or V of this step."""

    node: Node
    buffer: Node
    new: Node

    @classmethod
    def into(cls, buffer: Node) -> RowWrite | None:
        for user in buffer.users:
            if user.target is aten.index_copy_.default and user.args[0] is buffer:
                values = arguments(user)
                if values["index"].target == CACHE_POSITION:
                    return cls(user, buffer, values["source"])
        return None


@dataclass(frozen=True)
class RepeatedHeads:
    """``node = reshape(expand(unsqueeze(x, 2)))``: every head of ``x`` written out ``groups`` times."""

    node: Node
    source: Node
    groups: int

    @classmethod
    def of(cls, node: Node) -> RepeatedHeads | None:
        if node.target is aten.repeat_interleave.self_int:
            values = arguments(node)
            if values["dim"] == 1 and isinstance(values["repeats"], int):
                return cls(node, values["self"], values["repeats"])
            return None
        flat = node
        while flat.target in (aten.clone.default, aten.contiguous.default):
            flat = flat.all_input_nodes[0]
        if flat.target not in (aten.reshape.default, aten.view.default) or len(shape(flat)) != 4:
            return None
        expanded = flat.args[0]
        if not isinstance(expanded, Node) or expanded.target is not aten.expand.default:
            return None
        single = expanded.args[0]
        if not isinstance(single, Node) or single.target is not aten.unsqueeze.default or single.args[1] != 2:
            return None
        source = single.args[0]
        assert isinstance(source, Node)
        groups = shape(expanded)[2]
        if len(shape(source)) != 4 or shape(flat)[1] != shape(source)[1] * groups:
            return None
        return cls(node, source, int(groups))


@dataclass(frozen=True)
class Attention:
    """``node = scaled_dot_product_attention(query, key, value, mask)``"""

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    scale: float | None
    is_causal: bool
    grouped: bool

    @classmethod
    def of(cls, node: Node) -> Attention | None:
        if node.target is not aten.scaled_dot_product_attention.default:
            return None
        values = arguments(node)
        return cls(
            node,
            values["query"],
            values["key"],
            values["value"],
            values["attn_mask"],
            values["scale"],
            values["is_causal"],
            values["enable_gqa"],
        )


@dataclass(frozen=True)
class LayerAttention:
    """One layer's attention, found from its cache buffers: what was written, and who reads it back."""

    layer: int
    key_write: RowWrite
    value_write: RowWrite
    scores: Node  # the op that multiplies query and key
    weighted: Node  # the op that sums the values; the same node when attention is one op
    query: Node
    key: Node  # the key as ``scores`` reads it
    value: Node  # the value as ``weighted`` reads it

    @property
    def node(self) -> Node:
        return self.scores

    @classmethod
    def all(cls, program: Program) -> Iterator[LayerAttention]:
        inputs = program.placeholders()
        for layer in range(len(program.facts.layers)):
            key_write = RowWrite.into(inputs[key_name(layer)])
            value_write = RowWrite.into(inputs[value_name(layer)])
            if key_write is None or value_write is None:
                continue
            readers = consumers(key_write.node)
            summers = consumers(value_write.node)
            if len(readers) != 1 or len(summers) != 1:
                continue
            (scores, key), (weighted, value) = readers[0], summers[0]
            attention = Attention.of(scores)
            if attention is not None:
                yield cls(layer, key_write, value_write, scores, weighted, attention.query, key, value)
            elif scores.target in MATMULS and weighted.target in MATMULS:
                query = scores.args[MATMULS[scores.target]]
                assert isinstance(query, Node)
                yield cls(layer, key_write, value_write, scores, weighted, query, key, value)
