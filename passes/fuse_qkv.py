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
from fxopt.views import Linear, upstream

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

    def find(self, program: Program) -> Iterator[Projections]:
        for layer in LayerAttention.all(program):
            ends = (layer.query, layer.key_write.new, layer.value_write.new)
            sources = tuple(frozenset(upstream(end, LINEAR)) for end in ends)
            if len(set(sources)) > 1:  # one linear for all three: nothing left to do
                yield Projections(layer.node, sources)

    def refuse(self, program: Program, site: Projections) -> str | None:
        if any(len(source) != 1 for source in site.sources) or len({p.node for p in site.parts}) != 3:
            return f"{site.node}: query, key and value do not each come from one linear layer of their own"
        return refuse_merge(program, site.parts)

    def rewrite(self, program: Program, site: Projections) -> None:
        merge_linears(program, site.parts)
