"""Several linear layers over one input as one: what both fusion passes share."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Node

from fxopt.program import Program
from fxopt.views import Linear

aten = torch.ops.aten


def refuse_merge(program: Program, parts: Sequence[Linear]) -> str | None:
    """Why these linears cannot be one, or None when they can."""
    names = ", ".join(str(part.node) for part in parts)
    if len({part.x for part in parts}) > 1:
        return f"{names} do not read the same input"
    if any(tensor is not None and tensor.op != "get_attr" for p in parts for tensor in (p.weight, p.bias)):
        return f"{names}: a weight or bias is computed in the graph, so it cannot be packed ahead of time"
    if len({part.bias is None for part in parts}) > 1:
        with_bias = ", ".join(str(part.node) for part in parts if part.bias is not None)
        return f"{names}: only {with_bias} has a bias"
    if len({program.attribute(part.weight).dtype for part in parts}) > 1:
        return f"{names}: the weights differ in dtype"
    biases = [part.bias for part in parts if part.bias is not None]
    return _why_not_packed(names, [part.weight for part in parts]) or _why_not_packed(names, biases)


def _why_not_packed(names: str, weights: Sequence[Node]) -> str | None:
    """Why weights cannot lie one behind the other: each has one place, also where layers share it."""
    if len(set(weights)) < len(weights):
        return f"{names}: the weights or biases of two of them are the same memory, which cannot lie in two places"
    for weight in weights:
        for reader in weight.users:
            if reader.target is aten.cat.default and reader.args[0] != list(weights):
                return f"{names}: another layer shares {weight}, and packs it with other weights"
    return None


def merge_linears(program: Program, parts: Sequence[Linear]) -> None:
    """``linear(x, cat(weights))`` and a split in place of one linear per weight.

    The ``cat`` stays in the graph as text; before the graph runs for good it becomes one packed
    storage of which the model's own parameters are views (:mod:`fxopt.weights`).
    """
    graph = program.graph
    first = min(part.node for part in parts)
    biases = [part.bias for part in parts if part.bias is not None]
    for weight in [part.weight for part in parts] + biases:
        if first < weight:  # else another reader, of a layer that shares it, comes earlier still
            first.prepend(weight)
    with graph.inserting_before(first):
        weight = graph.call_function(aten.cat.default, ([part.weight for part in parts],))
        bias = graph.call_function(aten.cat.default, (biases,)) if biases else None
        merged = graph.call_function(aten.linear.default, (parts[0].x, weight, bias))
        split = graph.call_function(aten.split_with_sizes.default, (merged, [part.rows for part in parts], -1))
        outputs: list[Node] = [graph.call_function(operator.getitem, (split, i)) for i in range(len(parts))]
    for part, output in zip(parts, outputs, strict=True):
        part.node.replace_all_uses_with(output)
        graph.erase_node(part.node)
