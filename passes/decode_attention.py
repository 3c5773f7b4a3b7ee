"""The attention of one token, in the form that is quickest where it runs.

"sums", two sums that Inductor fuses with their neighbours, is for CPUs:

    y = sdpa(q, k, v, mask)      becomes      s = sum(q * k, -1) * scale        [B, H/G, G, N]
                                              p = softmax(where(mask, s, MIN))
                                              y = sum(p * v, -2)                [B, H/G, G, D]

A library kernel for attention is made for many queries; for one, most of its time is setting up,
and in half precision converting. The heads of a group share the key and value they read. Sums are
in float32. MIN is finite, so a row that may attend to nothing gives numbers, not NaN.

"split" is for GPUs, where one query keeps few multiprocessors busy (:mod:`fxopt.split_attention`):

    y = sdpa(q, k, v, mask)      becomes      y = split_attention(q, k, v, mask, scale, splits)

"library" leaves it. "auto" is sums on a CPU; on a GPU it is what was quickest when all were timed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.fx import Graph, Node

from fxopt.attention import Attention
from fxopt.errors import InvalidRequestError
from fxopt.program import INPUT_IDS, Facts, Program
from fxopt.rewrite import Pass, Stage
from fxopt.split_attention import has_kernels, obstacle, processors_of, splits_for
from fxopt.sums import stored, wide
from fxopt.views import arguments, shape

aten = torch.ops.aten

Form = Literal["auto", "sums", "split", "library"]


@dataclass(frozen=True)
class DecodeAttention(Pass[Attention]):
    name = "decode_attention"
    summary = "decode only: attention of one query in the form that is quickest on the device"
    stage = Stage.DECODE

    form: Form = "auto"

    def __post_init__(self) -> None:
        if self.form not in get_args(Form):
            raise InvalidRequestError(f"form={self.form!r} is no form; there are {', '.join(get_args(Form))}")

    def candidates(self, facts: Facts) -> tuple[Form, ...]:
        """The forms that only timing can choose between. The library's is the one to compare with, and first."""
        if self.form != "auto" or facts.device.type != "cuda":
            return ()
        sums: tuple[Form, ...] = ("sums",) if facts.backend == "inductor" else ()
        split: tuple[Form, ...] = ("split",) if has_kernels(facts.device) else ()
        return ("library", *sums, *split) if sums or split else ()

    def expected(self, program: Program) -> int:
        facts = program.facts
        stays = self._chosen(facts) == "library" or (self._chosen(facts) == "sums" and facts.backend != "inductor")
        return 0 if stays else len(list(self.find(program)))

    def find(self, program: Program) -> Iterator[Attention]:
        for node in program.graph.nodes:
            attention = Attention.of(node)
            if attention is not None and shape(attention.query)[2] == 1:
                yield attention

    def refuse(self, program: Program, site: Attention) -> str | None:
        facts, form = program.facts, self._chosen(program.facts)
        if form == "library":
            return self._why_library(facts)
        if form == "sums" and facts.backend != "inductor":
            return facts.why_no_fused_sums
        if site.is_causal:
            return f"{site.node} builds its causal mask inside the kernel"
        if form == "split":
            return _why_not_split(facts, site)
        return None

    def _chosen(self, facts: Facts) -> str:
        if self.form != "auto":
            return self.form
        if facts.fuses_sums:
            return "sums"
        return (facts.attention.quickest if facts.attention is not None else None) or "library"

    def _why_library(self, facts: Facts) -> str:
        if self.form == "library":
            return 'form="library" was asked for'
        if facts.attention is not None:
            return f"the library's kernel was quickest on {facts.device}: {facts.attention}"
        if facts.device.type == "cuda":
            return f"on {facts.device} the form is chosen by timing, and nothing was timed here"
        return facts.why_no_fused_sums

    def rewrite(self, program: Program, site: Attention) -> None:
        write = _split if self._chosen(program.facts) == "split" else _sums
        with program.graph.inserting_before(site.node):
            result = write(program, site)
        site.node.replace_all_uses_with(result)
        program.graph.erase_node(site.node)


def _why_not_split(facts: Facts, site: Attention) -> str | None:
    if facts.device.type == "cuda" and not has_kernels(facts.device):
        return "the split kernel is compiled by Triton, which is not installed; PyTorch for CUDA brings it"
    return obstacle(site.query.meta["val"].dtype, _groups(site))


def _groups(site: Attention) -> int:
    """Query heads to each head of the cache."""
    return int(shape(site.query)[1]) // int(shape(site.key)[1])


def _scale(site: Attention) -> float:
    return site.scale if site.scale is not None else float(int(shape(site.query)[3]) ** -0.5)


def _split(program: Program, site: Attention) -> Node:
    batch, kept = shape(site.query)[0], int(shape(site.key)[1])
    sequences = batch if isinstance(batch, int) else int(batch.node.hint)
    splits = splits_for(sequences, kept, program.facts.capacity, processors_of(program.facts.device))
    operands = (site.query, site.key, site.value, site.mask, _scale(site), splits)
    return program.graph.call_function(torch.ops.fxopt.split_attention.default, operands)


def _sums(program: Program, site: Attention) -> Node:
    graph, groups = program.graph, _groups(site)
    kept = int(shape(site.key)[1])
    batch = _batch(program, site.query)
    (keys, inner), (values, of_value) = _unflattened(site.key), _unflattened(site.value)
    query = stored(graph, site.query, [batch, kept, groups, 1, *inner])
    key = graph.call_function(aten.unsqueeze.default, (keys, 2))
    value = graph.call_function(aten.unsqueeze.default, (values, 2))
    product = graph.call_function(aten.mul.Tensor, (query, wide(graph, key)))
    scores = graph.call_function(aten.sum.dim_IntList, (product, list(range(-len(inner), 0))))
    scores = graph.call_function(aten.mul.Tensor, (scores, _scale(site)))
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
    return graph.call_function(aten.to.dtype, (result, site.node.meta["val"].dtype))


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
