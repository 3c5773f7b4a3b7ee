"""Weights in 8 or 4 bits: half or a quarter of the bytes that a decode step has to read.

    y = linear(x, W)      becomes      y = linear(x, codes * scale)

The graph reads codes, and scales beside them; the model's own weights stay as they are. Where a step
has one row, ``matvec`` widens codes inside the loop that sums them. Where it has many, a weight is
widened in front of its matmul and let go of behind it. Biases, norms and embeddings are left alone, and
so are the head of the model, unless it is asked for, and what chooses experts. The formats are in
``fxopt/weight_formats.py``. What the model says is that of rounded weights: docs/quantize-weights.md
has by how much that is another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fxopt.errors import InvalidRequestError
from fxopt.program import Program
from fxopt.rewrite import Pass
from fxopt.views import ExpertMatmul, Projection, upstream
from fxopt.weight_formats import (
    LEAST_GROUP,
    WEIGHT_FORMATS,
    CodedWeight,
    WeightFormatName,
    weight_format,
)
from fxopt.written import Written, coded_weight

aten = torch.ops.aten


@dataclass(frozen=True)
class QuantizeWeights(Pass[Projection | ExpertMatmul]):
    name = "quantize_weights"
    summary = "keeps the weights of linear layers in 8 or 4 bits, with scales beside them"
    by_default: ClassVar[bool] = False

    dtype: WeightFormatName = "int8"
    group: int | None = None  # numbers with a scale of their own, of int4
    lm_head: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in WEIGHT_FORMATS:
            raise InvalidRequestError(f"dtype={self.dtype!r} is no format; there are {', '.join(WEIGHT_FORMATS)}")
        if self.group is None:
            return
        if self.dtype != "int4":
            raise InvalidRequestError(f"group={self.group!r} is for int4; {self.dtype} has one scale for each row")
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < LEAST_GROUP:
            raise InvalidRequestError(f"group={self.group!r} is no whole number of at least {LEAST_GROUP}")

    def expected(self, program: Program) -> int:
        return sum(isinstance(site, Projection) for site in self.find(program))

    def find(self, program: Program) -> Iterator[Projection | ExpertMatmul]:
        found = {node: site for node in program.graph.nodes if (site := Projection.of(node)) is not None}
        calls = frozenset(node.target for node in found)
        choosing = [node for node in program.graph.nodes if node.target is aten.topk.default]
        left = {linear for node in choosing for linear in upstream(node, calls)}  # one turned over is another expert
        if not self.lm_head:
            left |= upstream(program.logits(), calls)
        for node in program.graph.nodes:
            if (site := found.get(node)) is not None and node not in left:
                if coded_weight(program, site.weight) is None:  # else it was done before
                    yield site
            elif (experts := ExpertMatmul.of(node)) is not None:
                yield experts

    def refuse(self, program: Program, site: Projection | ExpertMatmul) -> str | None:
        if isinstance(site, ExpertMatmul):
            return f"{site.node}: the weights of experts stay as they are so far"
        if program.facts.device.type != "cpu":
            return f"{site.node}: measured on CPU only; on {program.facts.device.type} the library's kernel stays"
        if not site.parts:
            return (
                f"{site.node}: its weight {site.weight} is computed in the graph, so it cannot be rounded ahead of time"
            )
        why = weight_format(self.dtype, self.group).obstacle(site.width)
        return None if why is None else f"{site.node} cannot be kept as {self.dtype}: {why}"

    def rewrite(self, program: Program, site: Projection | ExpertMatmul) -> None:
        assert isinstance(site, Projection)
        coded = self._coded(program, site)
        graph, run = program.graph, Written(program)
        computed = site.node.meta["val"].dtype
        with graph.inserting_before(site.node):
            parts = [graph.get_attr(name) for name in coded.parts]
            weight = coded.format.decode(run, parts, site.width)
            if computed != torch.float32:
                weight = run(aten.to.dtype, weight, computed)
            result = run(aten.linear.default, site.x, weight, site.bias)
        site.node.replace_all_uses_with(result)
        graph.erase_node(site.node)

    def _coded(self, program: Program, site: Projection) -> CodedWeight:
        """The codes of a weight, which are made now unless another layer that shares it has them already."""
        names = tuple(str(part.target) for part in site.parts)
        name = f"coded_{names[0]}".replace(".", "_")
        coded = CodedWeight(name, names, self.dtype, self.group, site.turned)
        if coded not in program.facts.weights:
            parts = coded.encode([program.attribute(part) for part in site.parts])
            for target, part in zip(coded.parts, parts, strict=True):
                program.gm.register_buffer(target, part)
            program.facts = replace(program.facts, weights=(*program.facts.weights, coded))
        return coded
