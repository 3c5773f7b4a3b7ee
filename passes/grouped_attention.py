"""Grouped-query attention without writing every key and value head out several times.

    k = reshape(expand(unsqueeze(k, 2)))     becomes     y = sdpa(q, k, v, mask, enable_gqa=True)
    v = reshape(expand(unsqueeze(v, 2)))
    y = sdpa(q, k, v, mask)

and for attention written as two products, the groups are folded into the rows of the query:

    s = matmul(q, transpose(repeat(k)))      becomes     s = matmul(fold(q), transpose(k)) unfolded
    y = matmul(p, repeat(v))                             y = matmul(fold(p), v)            unfolded

A mask is always present once the cache is static, and Hugging Face then expands K and V of the
whole buffer in every layer and step. On CUDA before sm80 grouped attention falls back to plain
arithmetic, which is slower than the expansion, so the pass stays away there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from fxopt.attention import Attention, LayerAttention, RepeatedHeads
from fxopt.program import Program
from fxopt.rewrite import Pass
from fxopt.views import Miss, shape

aten = torch.ops.aten
FIRST_FAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class GroupedAttention(Pass[LayerAttention]):
    name = "grouped_attention"
    summary = "grouped-query attention without expanding the heads of K and V"

    def expected(self, program: Program) -> int:
        return program.facts.grouped_layers

    def find(self, program: Program) -> Iterator[LayerAttention | Miss]:
        for site in LayerAttention.search(program):
            if isinstance(site, Miss) or (_groups(site) > 1 and not _is_grouped(site)):
                yield site

    def refuse(self, program: Program, site: LayerAttention) -> str | None:
        device = program.facts.device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < FIRST_FAST_CAPABILITY:
            return f"{device} is older than sm80, where grouped attention runs slower than expanded heads"
        if not _reads_cache_directly(site):
            return f"{site.node}: something stands between the cache and the attention that reads it"
        key, value = _repeated(site, site.key), _repeated(site, site.value)
        if key is None or value is None:
            return f"{site.node}: the heads of K and V are not repeated by an expand that can be taken out"
        if key.groups != value.groups:
            return f"{site.node}: K repeats its heads {key.groups} times and V {value.groups} times"
        return None

    def rewrite(self, program: Program, site: LayerAttention) -> None:
        key, value = _repeated(site, site.key), _repeated(site, site.value)
        assert key is not None and value is not None
        attention = Attention.of(site.node)
        if attention is not None:
            node = attention.node
            node.args = (attention.query, key.source, value.source, *node.args[3:])
            node.kwargs = {**node.kwargs, "enable_gqa": True}
            return
        self._fold(program, site.scores, key)
        self._fold(program, site.weighted, value)

    @staticmethod
    def _fold(program: Program, product: Node, repeated: RepeatedHeads) -> None:
        """``[B, H, S, X] @ repeat([B, H/G, X, Y])`` as ``[B, H/G, G*S, X] @ [B, H/G, X, Y]``."""
        graph = program.graph
        left, right = product.args
        assert isinstance(left, Node) and isinstance(right, Node)
        with graph.inserting_before(product):
            step = graph.call_function(aten.sym_size.int, (left, 2))
            folded = graph.call_function(aten.unflatten.int, (left, 1, [-1, repeated.groups]))
            folded = graph.call_function(aten.flatten.using_ints, (folded, 2, 3))
            if right is not repeated.node:  # the transpose between the repeated heads and the product
                right = graph.call_function(aten.transpose.int, (repeated.source, *right.args[1:]))
            else:
                right = repeated.source
            short = graph.call_function(aten.matmul.default, (folded, right))
            split = graph.call_function(aten.unflatten.int, (short, 2, [repeated.groups, step]))
            whole = graph.call_function(aten.flatten.using_ints, (split, 1, 2))
        product.replace_all_uses_with(whole)
        graph.erase_node(product)


def _groups(site: LayerAttention) -> int:
    """Query heads per head of the cache."""
    heads, kept = shape(site.query)[1], shape(site.key_write.new)[1]
    same_rank = len(shape(site.query)) == 4
    return int(heads) // int(kept) if same_rank and isinstance(heads, int) else 1


def _is_grouped(site: LayerAttention) -> bool:
    attention = Attention.of(site.node)
    if attention is not None:
        return attention.grouped
    return bool(shape(site.key)[1] == shape(site.key_write.new)[1])  # products that broadcast already


def _reads_cache_directly(site: LayerAttention) -> bool:
    """Whether K and V come from the cache by passive ops alone, into one sdpa or two products."""
    attention = Attention.of(site.node)
    if attention is not None:
        return site.weighted is site.scores and attention.key is site.key and attention.value is site.value
    products = (site.scores, site.weighted)
    return all(p.target is aten.matmul.default for p in products) and [p.args[1] for p in products] == [
        site.key,
        site.value,
    ]


def _repeated(site: LayerAttention, operand: Node) -> RepeatedHeads | None:
    """The expansion that an operand of attention goes through, looking behind one transpose."""
    if shape(operand)[1] == 1 and Attention.of(site.node) is not None:
        return RepeatedHeads(operand, operand, _groups(site))  # one head for all: broadcast, not expanded
    if operand.target is aten.transpose.int and isinstance(operand.args[0], Node):
        operand = operand.args[0]
    return RepeatedHeads.of(operand)
