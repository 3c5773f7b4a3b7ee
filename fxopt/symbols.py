"""From symbolic sizes to graph nodes and back: the sympy side of a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import sympy
import torch
from torch._dynamo.source import ConstantSource
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

END = 2**63 - 1  # how a slice says "to the end"

Leaf = Callable[[sympy.Symbol], Node | int]


def expression(value: Any) -> sympy.Expr | None:
    """The sympy expression of an int, a SymInt, or of a node that computes one; else None."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    if isinstance(value, torch.SymInt):
        return sympy.sympify(value.node.expr)
    if isinstance(value, int) and not isinstance(value, bool):
        return sympy.Integer(value)
    return None


def dimension(node: Node, dim: int) -> sympy.Expr:
    """The size of a tensor node along ``dim``."""
    size = expression(node.meta["val"].shape[dim])
    if size is None:
        raise TypeError(f"{node} has no size along dimension {dim}")
    return size


def described(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that no operator can tell apart without reading them."""
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    numbers = tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)
    return (tensor.dtype, tensor.device, tensor.layout, tensor.is_conj(), tensor.is_neg(), numbers)


def fresh_like(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same form in memory of its own."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def mentions(value: Any, symbols: Iterable[sympy.Symbol]) -> bool:
    """Whether a value is symbolic in one of ``symbols``."""
    found = expression(value)
    return found is not None and not found.free_symbols.isdisjoint(symbols)


def fresh_size(shape_env: ShapeEnv, name: str, hint: int) -> torch.SymInt:
    """A new symbolic size. ``hint`` must differ from every size it should not be taken for."""
    source = ConstantSource(name)
    symbol = shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
    size = shape_env.create_symintnode(symbol, hint=hint, source=source)
    assert isinstance(size, torch.SymInt)
    return size


def write_size(graph: Graph, expr: sympy.Expr, leaf: Leaf) -> Node | int:
    """Emit nodes that compute ``expr`` as a Python int."""
    return _write(expr, leaf, lambda fn, a, b: graph.call_function(fn, (a, b)))


def write_value(graph: Graph, expr: sympy.Expr, leaf: Leaf) -> Node | int:
    """Emit nodes that compute ``expr`` as a tensor, because one of its leaves is one."""
    tensor_ops = {
        operator.add: torch.ops.aten.add.Tensor,
        operator.mul: torch.ops.aten.mul.Tensor,
    }

    def is_tensor(value: Node | int) -> bool:
        return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)

    def emit(fn: Any, a: Node | int, b: Node | int) -> Node:
        if is_tensor(b) and not is_tensor(a):
            a, b = b, a
        node = graph.call_function(tensor_ops[fn] if is_tensor(a) else fn, (a, b))
        if is_tensor(a):
            assert isinstance(a, Node)
            node.meta["val"] = a.meta["val"]  # a 0-d integer tensor, like its operand
        return node

    return _write(expr, leaf, emit)


def _write(expr: sympy.Expr, leaf: Leaf, emit: Callable[[Any, Node | int, Node | int], Node]) -> Node | int:
    if isinstance(expr, sympy.Integer):
        return int(expr)
    if isinstance(expr, sympy.Symbol):
        return leaf(expr)
    operators = {sympy.Add: operator.add, sympy.Mul: operator.mul}
    for kind, fn in operators.items():
        if isinstance(expr, kind):
            # Constants last, so that the text reads "x + 1".
            terms = sorted(expr.args, key=lambda term: term.is_number)
            result = _write(terms[0], leaf, emit)
            for term in terms[1:]:
                operand = _write(term, leaf, emit)
                both_known = isinstance(result, int) and isinstance(operand, int)
                result = fn(result, operand) if both_known else emit(fn, result, operand)
            return result
    raise NotImplementedError(f"no graph form for the size {expr}")
