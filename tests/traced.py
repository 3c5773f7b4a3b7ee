"""Small graphs, written as functions over ATen ops."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, symbolic_trace

from fxopt.launches import Layout

aten = torch.ops.aten


def traced(function: Callable[..., Any]) -> GraphModule:
    """The graph of a function, op for op, those included whose results nobody reads."""
    return symbolic_trace(function)


def layouts(*tensors: Tensor) -> list[Layout | None]:
    return [Layout.of(tensor) for tensor in tensors]


def branching() -> GraphModule:
    """A graph of (pred, x) that takes one of two ways; the first needs room for three times x, twice."""

    def large(x: Tensor) -> Any:
        wide = aten.cat.default([x, x, x])
        return (aten.clone.default(aten.slice.Tensor(aten.neg.default(wide), 0, 0, 4)),)

    def small(x: Tensor) -> Any:
        return (aten.clone.default(aten.neg.default(x)),)

    holder, graph = torch.nn.Module(), Graph()
    holder.large, holder.small = traced(large), traced(small)
    pred, x = graph.placeholder("pred"), graph.placeholder("x")
    branches = graph.get_attr("large"), graph.get_attr("small")
    chosen = graph.call_function(torch.ops.higher_order.cond, (pred, *branches, (x,)))
    part = graph.call_function(operator.getitem, (chosen, 0))
    graph.output((graph.call_function(aten.neg.default, (part,)),))
    return GraphModule(holder, graph)
