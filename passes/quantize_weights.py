"""Weights in 8 or 4 bits: half or a quarter of the bytes that a decode step has to read.

    y = linear(x, W)      becomes      y = linear(x, codes * scale)

The graph reads codes, and scales beside them; the model's own weights stay as they are. Where a step
has one row, ``matvec`` widens codes inside the loop that sums them. Where it has many, a weight is
widened in front of its matmul and let go of behind it. Biases, norms and embeddings are left alone, and
so is what chooses experts; the head of the model has a format of its own, which may be None. The formats
are in ``fxopt/weight_formats.py``. What the model says is that of rounded weights: docs/quantize-weights.md
has by how much that is another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import Node

from fxopt.errors import InvalidRequestError
from fxopt.program import Program
from fxopt.rewrite import Pass
from fxopt.views import ExpertMatmul, Projection, upstream
from fxopt.weight_formats import (
    GROUP,
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
    lm_head: WeightFormatName | None = "int8"  # the format of the head of the model; None leaves it as it is

    def __post_init__(self) -> None:
        if self.dtype not in WEIGHT_FORMATS:
            raise InvalidRequestError(f"dtype={self.dtype!r} is no format; there are {', '.join(WEIGHT_FORMATS)}")
        if self.lm_head is not None and self.lm_head not in WEIGHT_FORMATS:
            formats = ", ".join(WEIGHT_FORMATS)
            raise InvalidRequestError(
                f"lm_head={self.lm_head!r} is no format; there are {formats}, and None to leave it"
            )
        if self.group is None:
            return
        if "int4" not in (self.dtype, self.lm_head):
            raise InvalidRequestError(f"group={self.group!r} is for int4; {self.dtype} has one scale for each row")
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < LEAST_GROUP:
            raise InvalidRequestError(f"group={self.group!r} is no whole number of at least {LEAST_GROUP}")

    def expected(self, program: Program) -> int:
        return sum(isinstance(site, Projection) for site in self.find(program))

    def find(self, program: Program) -> Iterator[Projection | ExpertMatmul]:
        every = {node: site for node in program.graph.nodes if (site := Projection.of(node)) is not None}
        found = {node: site for node, site in every.items() if not _is_constant(program, site)}
        calls = frozenset(node.target for node in found)
        choosing = [node for node in program.graph.nodes if node.target is aten.topk.default]
        left = {linear for node in choosing for linear in upstream(node, calls)}  # one turned over is another expert
        if self.lm_head is None:
            left |= _heads(program, calls)
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
        dtype, group = self._format(program, site)
        why = weight_format(dtype, group).obstacle(site.width)
        return None if why is None else f"{site.node} cannot be kept as {dtype}: {why}"

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
        coded = CodedWeight(name, names, *self._format(program, site), site.turned)
        if coded not in program.facts.weights:
            parts = coded.encode([program.attribute(part) for part in site.parts])
            for target, part in zip(coded.parts, parts, strict=True):
                program.gm.register_buffer(target, part)
            program.facts = replace(program.facts, weights=(*program.facts.weights, coded))
        return coded

    def _format(self, program: Program, site: Projection) -> tuple[WeightFormatName, int | None]:
        """The format of one weight, with its group if it has any."""
        is_head = self.lm_head is not None and site.node in _heads(program, frozenset({site.node.target}))
        dtype = self.lm_head if is_head and self.lm_head is not None else self.dtype
        return dtype, (self.group or GROUP) if dtype == "int4" else None


def _heads(program: Program, calls: frozenset[Any]) -> set[Node]:
    """The last of some calls that logits are computed from."""
    return upstream(program.logits(), calls)


def _is_constant(program: Program, site: Projection) -> bool:
    """Whether it multiplies with a matrix that is no parameter, as ``quantize_kv`` has one that turns rows."""
    return any(not isinstance(program.attribute(part), nn.Parameter) for part in site.parts)
