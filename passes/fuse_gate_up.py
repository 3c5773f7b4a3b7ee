"""One matmul for the two projections of a gated MLP.

g = linear(x, Wg)                      gu   = linear(x, cat(Wg, Wu))
u = linear(x, Wu)         becomes      g, u = split(gu, rows of Wg, Wu)
h = mul(act(g), u)                     h    = mul(act(g), u)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxopt.merge import merge_linears, refuse_merge
from fxopt.program import Program
from fxopt.rewrite import Pass
from fxopt.views import Linear, Miss, upstream

aten = torch.ops.aten
LINEAR = frozenset({aten.linear.default})


@dataclass(frozen=True)
class Gate:
    """``node = mul(act(gate), up)``, where both come from linears over one input."""

    node: Node
    gate: Linear
    up: Linear

    @classmethod
    def of(cls, node: Node) -> Gate | Miss | None:
        if node.target is not aten.mul.Tensor:
            return None
        operands = [operand for operand in node.args if isinstance(operand, Node)]
        if len(operands) != 2:
            return None
        miss = None
        for activated, plain in (operands, reversed(operands)):
            up, sources = Linear.of(plain), upstream(activated, LINEAR)
            gate = Linear.of(next(iter(sources))) if len(sources) == 1 else None
            if up is None or gate is None or gate.node is up.node:
                continue
            if gate.x is up.x:
                return cls(node, gate, up)
            miss = Miss(node, f"{gate.node} reads {gate.x} and {up.node} reads {up.x}, not one input")
        return miss


@dataclass(frozen=True)
class FuseGateUp(Pass[Gate]):
    name = "fuse_gate_up"
    summary = "one matmul for the gate and up projections of gated MLPs"

    def expected(self, program: Program) -> int:
        return program.facts.gated_mlps

    def find(self, program: Program) -> Iterator[Gate | Miss]:
        taken: set[Node] = set()
        for node in program.graph.nodes:
            gate = Gate.of(node)
            if isinstance(gate, Miss):
                yield gate
            elif gate is not None and taken.isdisjoint({gate.gate.node, gate.up.node}):
                taken |= {gate.gate.node, gate.up.node}
                yield gate

    def refuse(self, program: Program, site: Gate) -> str | None:
        return refuse_merge(program, (site.gate, site.up))

    def rewrite(self, program: Program, site: Gate) -> None:
        merge_linears(program, (site.gate, site.up))
