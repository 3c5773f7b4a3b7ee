"""Typed windows onto attention and the cache: who writes a buffer, and who reads it back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxopt.program import CACHE_POSITION, Program, key_name, value_name
from fxopt.views import arguments, shape

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
