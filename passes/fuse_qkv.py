"""One matmul for the query, key and value projections.

    q = linear(x, Wq)                    qkv     = linear(x, cat(Wq, Wk, Wv))
    k = linear(x, Wk)       becomes      q, k, v = split(qkv, rows of Wq, Wk, Wv)
    v = linear(x, Wv)

Decoding reads every weight once per token, so three small matmuls pay three launches to move the
bytes of one. Biases are packed the same way. The model's own parameters become views of the
packed weight: no second copy, and in-place updates are seen by both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxopt.attention import LayerAttention
from fxopt.merge import merge_linears, refuse_merge
from fxopt.program import Program
from fxopt.rewrite import Pass
from fxopt.views import Linear, Miss, upstream

LINEAR = frozenset({torch.ops.aten.linear.default})


@dataclass(frozen=True)
class Projections:
    """The linears nearest to the query, key and value of one layer's attention."""

    node: Node
    sources: tuple[frozenset[Node], ...]

    @property
    def parts(self) -> list[Linear]:
        found = [Linear.of(node) for source in self.sources for node in source]
        return [linear for linear in found if linear is not None]


@dataclass(frozen=True)
class FuseQKV(Pass[Projections]):
    name = "fuse_qkv"
    summary = "one matmul for query, key and value; weights packed without a copy"

    def expected(self, program: Program) -> int:
        return program.facts.split_qkv

    def find(self, program: Program) -> Iterator[Projections | Miss]:
        for layer in LayerAttention.search(program):
            if isinstance(layer, Miss):
                yield layer
                continue
            ends = (layer.query, layer.key_write.new, layer.value_write.new)
            sources = tuple(frozenset(upstream(end, LINEAR)) for end in ends)
            if not any(sources):
                yield Miss(layer.node, f"no linear is in front of it; the query comes from {_path(layer.query)}")
            elif len(set(sources)) > 1:  # one linear for all three: nothing left to do
                yield Projections(layer.node, sources)

    def refuse(self, program: Program, site: Projections) -> str | None:
        for kind, source in zip(("query", "key", "value"), site.sources, strict=True):
            if len(source) != 1:
                names = ", ".join(sorted(str(node) for node in source)) or "no linear"
                return f"{site.node}: the {kind} comes from {names}, not from one linear of its own"
        if len({p.node for p in site.parts}) != 3:
            return f"{site.node}: query, key and value share a linear"
        return refuse_merge(program, site.parts)

    def rewrite(self, program: Program, site: Projections) -> None:
        merge_linears(program, site.parts)


def _path(node: Node, steps: int = 6) -> str:
    """The calls that a node is computed by, the last few, to show where a search ended."""
    calls: list[str] = []
    while node.op == "call_function" and len(calls) < steps:
        calls.append(f"{node} ({node.target})")
        if not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
    return " of ".join(calls) or str(node)
