"""Typed windows onto attention and the cache: who writes a buffer, and who reads it back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from fxopt.program import CACHE_POSITION, Program, key_name, value_name
from fxopt.views import Miss, arguments, shape

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
MATMULS: dict[Any, int] = {aten.matmul.default: 0, aten.bmm.default: 0, aten.baddbmm.default: 1}


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
    def search(cls, program: Program) -> Iterator[LayerAttention | Miss]:
        """The attention of every layer, or what about it is not understood."""
        for layer in range(len(program.facts.layers)):
            yield cls._of(program, layer)

    @classmethod
    def _of(cls, program: Program, layer: int) -> LayerAttention | Miss:
        inputs = program.placeholders()
        buffers = inputs[key_name(layer)], inputs[value_name(layer)]
        key_write, value_write = (RowWrite.into(buffer) for buffer in buffers)
        if key_write is None or value_write is None:
            return Miss(buffers[0], "no index_copy_ writes the rows of this step into it")
        readers, summers = consumers(key_write.node), consumers(value_write.node)
        for kind, found, write in (("K", readers, key_write), ("V", summers, value_write)):
            if len(found) != 1:
                return Miss(write.node, f"{kind} is read by {_names(found) or 'nothing'}, not by one op")
        (scores, key), (weighted, value) = readers[0], summers[0]
        attention = Attention.of(scores)
        if attention is not None:
            return cls(layer, key_write, value_write, scores, weighted, attention.query, key, value)
        for kind, node in (("K", scores), ("V", weighted)):
            if node.target not in MATMULS:
                return Miss(node, f"{kind} is read by {node} ({node.target}), which is no attention that is known")
        query = scores.args[MATMULS[scores.target]]
        assert isinstance(query, Node)
        return cls(layer, key_write, value_write, scores, weighted, query, key, value)


def _names(found: list[tuple[Node, Node]]) -> str:
    return ", ".join(f"{reader} ({reader.target})" for reader, _ in found)
