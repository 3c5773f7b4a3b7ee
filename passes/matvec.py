"""A matrix times one vector, as the sum that Inductor fuses with its neighbours.

    y = linear(x, W)      becomes      y = sum(unsqueeze(x, -2) * W, -1)      when x is one row

One decode step multiplies every weight with one vector and does nothing else that costs time.
Library matmuls are made for many rows; written as product and sum, Inductor reads each weight
once, at the speed of memory, in the kernel of its neighbours. Half-precision products are summed
in float32, as a matmul does. Only for Inductor on CPU: elsewhere the product would be written out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fxopt.program import Program
from fxopt.rewrite import Pass, Stage
from fxopt.sums import stored
from fxopt.views import Linear, shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Matvec(Pass[Linear]):
    name = "matvec"
    summary = "decode only: one-row matmuls as fused sums that run at memory speed"
    stage = Stage.DECODE

    def expected(self, program: Program) -> int:
        return len(list(self.find(program))) if program.facts.fuses_sums else 0

    def find(self, program: Program) -> Iterator[Linear]:
        for linear in Linear.all(program):
            if math.prod(shape(linear.x)[:-1]) == 1:
                yield linear

    def refuse(self, program: Program, site: Linear) -> str | None:
        return None if program.facts.fuses_sums else program.facts.why_no_fused_sums

    def rewrite(self, program: Program, site: Linear) -> None:
        graph = program.graph
        dtype = program.attribute(site.weight).dtype if site.weight.op == "get_attr" else site.node.meta["val"].dtype
        with graph.inserting_before(site.node):
            row = stored(graph, site.x, [*shape(site.x)[:-1], 1, shape(site.x)[-1]])
            weight = site.weight
            if dtype != torch.float32:
                row = graph.call_function(aten.to.dtype, (row, torch.float32))
                weight = graph.call_function(aten.to.dtype, (weight, torch.float32))
            product = graph.call_function(aten.mul.Tensor, (row, weight))
            total = graph.call_function(aten.sum.dim_IntList, (product, [-1]))
            if site.bias is not None:
                total = graph.call_function(aten.add.Tensor, (total, site.bias))
            if dtype != torch.float32:
                total = graph.call_function(aten.to.dtype, (total, dtype))
        site.node.replace_all_uses_with(total)
        graph.erase_node(site.node)
