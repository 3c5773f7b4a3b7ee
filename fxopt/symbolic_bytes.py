"""The bytes of every storage as an expression in batch, step and window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from fxopt.liveness import Liveness, Storage
from fxopt.program import Program
from fxopt.shape_sets import Axes, ShapeSet


def symbolic_bytes(
    program: Program, sets: Sequence[tuple[ShapeSet, Liveness]], module: GraphModule | None = None
) -> dict[str, sympy.Expr]:
    """By storage, where one expression is right at all these sets.

    There is none where an op lays out its result in another way at another shape.
    """
    axes = Axes(program)
    nodes = {node.name: node for node in (module or program.gm).graph.nodes}
    found: dict[str, sympy.Expr] = {}
    for name in sets[0][1].storages:
        for size in _candidates(axes, nodes, sets[0][1].storages[name]):
            if all(name in live.storages and _at(size, shapes) == live.storages[name].nbytes for shapes, live in sets):
                found[name] = size
                break
    return found


def _candidates(axes: Axes, nodes: dict[str, Node], storage: Storage) -> list[sympy.Expr]:
    """The bytes of the storage that the graph's own fake value has, and those that the tensor spans."""
    _, _, place = storage.name.partition(".")
    leaves = pytree.tree_leaves(nodes[storage.node].meta.get("val"))
    number = int(place) if place.isdigit() else 0
    if storage.kind == "workspace" or number >= len(leaves) or not isinstance(leaves[number], Tensor):
        return []
    tensor = leaves[number]
    last: Any = sum(((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)), 0)
    return [axes.named(tensor.untyped_storage().nbytes()), axes.named((last + 1) * tensor.element_size())]


def _at(size: sympy.Expr, shapes: ShapeSet) -> int | None:
    value = size.subs({symbol: shapes[symbol.name] for symbol in size.free_symbols if symbol.name in shapes})
    return int(value) if value.is_number else None
