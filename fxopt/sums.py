"""Products and sums that Inductor makes one loop of, shared by the decode passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten


def wide(graph: Graph, node: Node) -> Node:
    """``node`` in float32 at least, in which products are summed whatever the model's dtype."""
    value = node.meta.get("val")
    if value is not None and value.dtype == torch.float64:
        return node
    widened = graph.call_function(aten.to.dtype, (node, torch.float32))
    if value is not None:
        widened.meta["val"] = value.to(torch.float32)
    return widened


def stored(graph: Graph, node: Node, sizes: Sequence[Node | int]) -> Node:
    """``node`` widened and with new sizes, computed once and kept. Only the first size may be a node.

    Left to itself Inductor computes an elementwise operand again for every row it is multiplied
    with: a norm 3072 times, a cosine per key, and the conversion from half precision in any case.
    ``as_strided`` needs memory to point at, so it makes Inductor finish the operand first; it costs
    nothing when the operand lies in memory already.
    """
    strides = [1] * len(sizes)
    for place, size in reversed(list(enumerate(sizes))[1:]):
        assert isinstance(size, int)
        strides[place - 1] = strides[place] * size
    widened = wide(graph, node)
    dense = graph.call_function(aten.contiguous.default, (widened,))
    view = graph.call_function(aten.as_strided.default, (dense, list(sizes), strides))
    known = [size.meta["val"] if isinstance(size, Node) else size for size in sizes]
    view.meta["val"] = widened.meta["val"].reshape(known)
    return view
