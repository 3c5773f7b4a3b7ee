"""The attention of one token, as two sums that Inductor fuses with their neighbours.

    y = sdpa(q, k, v, mask)      becomes      s = sum(q * k, -1) * scale        [B, H/G, G, N]
                                              p = softmax(where(mask, s, MIN))
                                              y = sum(p * v, -2)                [B, H/G, G, D]

A library kernel for attention is made for many queries; for one, most of its time is setting up,
and in half precision converting. The heads of a group share the key and value they read. Sums are
in float32. MIN is finite, so a row that may attend to nothing gives numbers, not NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from fxopt.attention import Attention
from fxopt.program import INPUT_IDS, Program
from fxopt.rewrite import Pass, Stage
from fxopt.sums import stored, wide
from fxopt.views import arguments, shape

aten = torch.ops.aten


@dataclass(frozen=True)
class DecodeAttention(Pass[Attention]):
    name = "decode_attention"
    summary = "decode only: attention of one query as two fused sums"
    stage = Stage.DECODE

    def expected(self, program: Program) -> int:
        return len(list(self.find(program))) if program.facts.fuses_sums else 0

    def find(self, program: Program) -> Iterator[Attention]:
        for node in program.graph.nodes:
            attention = Attention.of(node)
            if attention is not None and shape(attention.query)[2] == 1:
                yield attention

    def refuse(self, program: Program, site: Attention) -> str | None:
        if not program.facts.fuses_sums:
            return program.facts.why_no_fused_sums
        if site.is_causal:
            return f"{site.node} builds its causal mask inside the kernel"
        return None

    def rewrite(self, program: Program, site: Attention) -> None:
        graph = program.graph
        heads, kept = int(shape(site.query)[1]), int(shape(site.key)[1])
        groups, width = heads // kept, int(shape(site.query)[3])
        with graph.inserting_before(site.node):
            batch = _batch(program, site.query)
            (keys, inner), (values, of_value) = _unflattened(site.key), _unflattened(site.value)
            query = stored(graph, site.query, [batch, kept, groups, 1, *inner])
            key = graph.call_function(aten.unsqueeze.default, (keys, 2))
            value = graph.call_function(aten.unsqueeze.default, (values, 2))
            product = graph.call_function(aten.mul.Tensor, (wide(graph, query), wide(graph, key)))
            scores = graph.call_function(aten.sum.dim_IntList, (product, list(range(-len(inner), 0))))
            scale = site.scale if site.scale is not None else width**-0.5
            scores = graph.call_function(aten.mul.Tensor, (scores, scale))
            if site.mask is not None:
                scores = _masked(graph, scores, site.mask, kept, groups)
            weights = graph.call_function(aten.softmax.int, (scores, -1))
            spread = weights
            for _ in of_value:
                spread = graph.call_function(aten.unsqueeze.default, (spread, -1))
            weighted = graph.call_function(aten.mul.Tensor, (spread, wide(graph, value)))
            total = graph.call_function(aten.sum.dim_IntList, (weighted, [-1 - len(of_value)]))
            if len(of_value) > 1:
                total = graph.call_function(aten.flatten.using_ints, (total, -len(of_value), -1))
            flat = graph.call_function(aten.flatten.using_ints, (total, 1, 2))
            result = graph.call_function(aten.unsqueeze.default, (flat, 2))
            result = graph.call_function(aten.to.dtype, (result, site.node.meta["val"].dtype))
        site.node.replace_all_uses_with(result)
        graph.erase_node(site.node)


def _unflattened(rows: Node) -> tuple[Node, list[int]]:
    """Rows [B, H, N, ...] before the sizes of a row were made one, and those sizes.

    Rows that are unpacked have several, and a loop over each of them is quicker than one that divides.
    """
    node = rows
    if node.target is aten.to.dtype:  # made wide anyway
        node = node.all_input_nodes[0]
    if node.target is aten.flatten.using_ints:
        source, values = node.all_input_nodes[0], arguments(node)
        if values["start_dim"] == 3 - len(shape(source)) and values["end_dim"] == -1:
            return source, [int(size) for size in shape(source)[3:]]
    return rows, [int(shape(rows)[3])]


def _batch(program: Program, query: Node) -> Node | int:
    """The number of sequences, read from the tokens where the graph serves any."""
    batch = shape(query)[0]
    if isinstance(batch, int):
        return batch
    size = program.graph.call_function(aten.sym_size.int, (program.placeholders()[INPUT_IDS], 0))
    size.meta["val"] = batch
    return size


def _masked(graph: Graph, scores: Node, mask: Node, kept: int, groups: int) -> Node:
    """Apply a mask of shape [B, 1 or H, 1, N], boolean or additive, to scores [B, H/G, G, N]."""
    if shape(mask)[1] == kept * groups and kept * groups > 1:
        mask_heads = graph.call_function(aten.unflatten.int, (mask, 1, [kept, groups]))
        aligned = graph.call_function(aten.squeeze.dim, (mask_heads, 3))
    else:
        aligned = mask  # [B, 1, 1, N] stands for every head as it is
    if mask.meta["val"].dtype is not torch.bool:
        return graph.call_function(aten.add.Tensor, (scores, wide(graph, aligned)))
    minimum = torch.finfo(torch.float32).min
    lowest = graph.call_function(aten.scalar_tensor.default, (minimum,), {"dtype": torch.float32})
    return graph.call_function(aten.where.self, (aligned, scores, lowest))
