"""A matrix times one vector, as the sum that Inductor fuses with its neighbours.

    y = linear(x, W)              becomes      y = sum(x * W, -1)                when x is one row
    y = grouped_mm(x, W, ends)    becomes      y = sum(x * W[expert of row], 1)  when x is few rows
    y = linear(x, codes * scale)  becomes      y = sum(x * codes, -1) * scale    when x is one row

One decode step multiplies every weight with one vector and does nothing else that costs time.
Library matmuls are made for many rows; written as product and sum, Inductor reads each weight
once, at the speed of memory. For a mixture of experts that also replaces the loop over experts:
each row looks its expert up. Half-precision products are summed in float32, as a matmul does. Codes of
``quantize_weights`` are widened where they are read, and never lie in memory as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from fxopt.program import Program
from fxopt.rewrite import Pass, Stage
from fxopt.sums import stored, wide
from fxopt.views import ExpertMatmul, Linear, shape
from fxopt.weight_formats import CodedWeight
from fxopt.written import Written, coded_weight

aten = torch.ops.aten


@dataclass(frozen=True)
class Matvec(Pass[Linear | ExpertMatmul]):
    name = "matvec"
    summary = "decode only: one-row matmuls as fused sums that run at memory speed"
    stage = Stage.DECODE

    #: A mixture feeds its experts one row per token and chosen expert; more rows are left to the library.
    most_expert_rows: int = 16

    def expected(self, program: Program) -> int:
        return len(list(self.find(program))) if program.facts.fuses_sums else 0

    def find(self, program: Program) -> Iterator[Linear | ExpertMatmul]:
        for node in program.graph.nodes:
            linear, experts = Linear.of(node), ExpertMatmul.of(node)
            if linear is not None and math.prod(shape(linear.x)[:-1]) == 1:
                yield linear
            elif experts is not None and shape(experts.x)[0] <= self.most_expert_rows:
                yield experts

    def refuse(self, program: Program, site: Linear | ExpertMatmul) -> str | None:
        return None if program.facts.fuses_sums else program.facts.why_no_fused_sums

    def rewrite(self, program: Program, site: Linear | ExpertMatmul) -> None:
        graph = program.graph
        dtype = site.node.meta["val"].dtype
        with graph.inserting_before(site.node):
            total = _linear_sum(program, site) if isinstance(site, Linear) else _expert_sum(graph, site)
            result = graph.call_function(aten.to.dtype, (total, dtype)) if dtype != torch.float32 else total
        site.node.replace_all_uses_with(result)
        graph.erase_node(site.node)


def _linear_sum(program: Program, site: Linear) -> Node:
    graph = program.graph
    coded = coded_weight(program, site.weight)
    if coded is not None:
        total = _sum_of_codes(program, site, coded)
    else:
        row = stored(graph, site.x, [*shape(site.x)[:-1], 1, shape(site.x)[-1]])
        product = graph.call_function(aten.mul.Tensor, (row, wide(graph, site.weight)))
        total = graph.call_function(aten.sum.dim_IntList, (product, [-1]))
    return total if site.bias is None else graph.call_function(aten.add.Tensor, (total, site.bias))


def _sum_of_codes(program: Program, site: Linear, coded: CodedWeight) -> Node:
    graph, width = program.graph, shape(site.x)[-1]
    parts = [graph.get_attr(name) for name in coded.parts]
    total = coded.format.total(Written(program), stored(graph, site.x, coded.format.fold(width)), parts, width)
    return graph.call_function(aten.view.default, (total, [*shape(site.x)[:-1], shape(site.node)[-1]]))


def _expert_sum(graph: Graph, site: ExpertMatmul) -> Node:
    """The expert of a row is the number of experts whose rows end before it."""
    rows, width = shape(site.x)
    device = site.x.meta["val"].device
    numbers = graph.call_function(aten.arange.default, (rows,), {"device": device})
    column = graph.call_function(aten.unsqueeze.default, (numbers, 1))
    ended = graph.call_function(aten.ge.Tensor, (column, site.offsets))
    expert = graph.call_function(aten.sum.dim_IntList, (ended, [1]))
    weight = graph.call_function(aten.index.Tensor, (site.weight, [expert]))
    spread = stored(graph, site.x, [rows, width, 1])
    product = graph.call_function(aten.mul.Tensor, (spread, wide(graph, weight)))
    return graph.call_function(aten.sum.dim_IntList, (product, [1]))
