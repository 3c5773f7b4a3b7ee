"""Typed windows onto graph nodes: what passes read instead of ``node.args[1]``."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import Argument

from fxopt.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Miss:
    """A place that looked like what a pass is after, until ``reason``."""

    node: Node
    reason: str


def arguments(node: Node) -> dict[str, Any]:
    """The arguments of an operator call by the names in its schema, defaults filled in."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        raise TypeError(f"{node} calls {target}, which is no operator overload")
    values: dict[str, Any] = {}
    for position, parameter in enumerate(target._schema.arguments):
        if position < len(node.args):
            values[parameter.name] = node.args[position]
        elif parameter.name in node.kwargs:
            values[parameter.name] = node.kwargs[parameter.name]
        else:
            values[parameter.name] = parameter.default_value
    return values


def shape(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def mutates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def mutated_arguments(node: Node) -> list[Node]:
    """The nodes whose tensors this call writes into."""
    if not mutates(node):
        return []
    assert isinstance(node.target, torch._ops.OpOverload)
    values = arguments(node)
    written = [p.name for p in node.target._schema.arguments if p.alias_info is not None and p.alias_info.is_write]
    return [values[name] for name in written if isinstance(values[name], Node)]


#: Ops that may hand out their operand's own memory although their schema does not say so.
_MAY_ALIAS = frozenset(
    {aten.contiguous.default, aten.reshape.default, aten.to.device, aten.to.dtype, aten.to.dtype_layout}
)


def memory_of(node: Node) -> Node:
    """The node whose memory ``node`` may be a view of; ``node`` itself when it has its own."""
    while node.op == "call_function" and node.all_input_nodes:
        returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else []
        is_view = any(value.alias_info is not None for value in returns) or node.target in _MAY_ALIAS
        if not is_view and node.target is not operator.getitem:
            return node
        node = node.all_input_nodes[0]
    return node


def written_memory(program: Program) -> set[Node]:
    """Everything that some op of the graph writes into, by :func:`memory_of`."""
    return {memory_of(tensor) for node in program.graph.nodes for tensor in mutated_arguments(node)}


def swap_argument(node: Node, old: Argument, new: Argument) -> None:
    """Replace one operand of ``node``, leaving every other reader of ``old`` alone."""
    node.args = torch.fx.map_arg(node.args, lambda n: new if n is old else n)
    node.kwargs = torch.fx.map_arg(node.kwargs, lambda n: new if n is old else n)


def upstream(node: Node, stop: frozenset[Any]) -> set[Node]:
    """The nearest calls of one of ``stop`` that ``node`` is computed from, itself included."""
    found: set[Node] = set()
    seen: set[Node] = set()
    todo = [node]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.target in stop:
            found.add(current)
        else:
            todo.extend(current.all_input_nodes)
    return found


@dataclass(frozen=True)
class Linear:
    """``node = linear(x, weight, bias)``"""

    node: Node
    x: Node
    weight: Node
    bias: Node | None

    @classmethod
    def of(cls, node: Node) -> Linear | None:
        if node.target is not aten.linear.default:
            return None
        values = arguments(node)
        return cls(node, values["input"], values["weight"], values["bias"])

    @classmethod
    def all(cls, program: Program) -> Iterator[Linear]:
        for node in program.graph.nodes:
            linear = cls.of(node)
            if linear is not None:
                yield linear

    @property
    def rows(self) -> int:
        return int(shape(self.weight)[0])


#: Calls that hand out a matrix with its dimensions swapped.
_SWAPS = frozenset({aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.permute.default})


@dataclass(frozen=True)
class Projection:
    """``node`` is ``x`` times a weight of the model, plus a bias, by whatever operator."""

    node: Node
    x: Node
    weight: Node  # [N, K]; or [K, N], if it is turned
    bias: Node | None
    turned: bool = False

    @classmethod
    def of(cls, node: Node) -> Projection | None:
        if (linear := Linear.of(node)) is not None:
            return cls(node, linear.x, linear.weight, linear.bias)
        if node.target is aten.addmm.default:
            values = arguments(node)
            if values["beta"] == values["alpha"] == 1 and values["mat2"].op == "get_attr":
                return cls(node, values["mat1"], values["mat2"], values["self"], turned=True)
        if node.target is aten.matmul.default or node.target is aten.mm.default:
            x, weight = node.args
            assert isinstance(x, Node) and isinstance(weight, Node)
            if weight.op == "get_attr" and len(shape(weight)) == 2:
                return cls(node, x, weight, None, turned=True)
            if weight.target in _SWAPS and weight.all_input_nodes[0].op == "get_attr" and len(shape(weight)) == 2:
                return cls(node, x, weight.all_input_nodes[0], None)
        return None

    @property
    def width(self) -> int:
        """The numbers that are summed, K."""
        return int(shape(self.weight)[0 if self.turned else 1])

    @property
    def parts(self) -> list[Node]:
        """The model's own weights that it is made of, row by row; none if it is computed."""
        concat = Concat.of(self.weight)
        if concat is not None and concat.joins_weights:
            return list(concat.parts)
        return [self.weight] if self.weight.op == "get_attr" else []


@dataclass(frozen=True)
class ExpertMatmul:
    """``node = grouped_mm(x, weight, offsets)``: rows of ``x``, sorted by expert, each times its expert's weight."""

    node: Node
    x: Node  # [R, K]
    weight: Node  # [E, K, N]
    offsets: Node  # [E], where each expert's rows end

    @classmethod
    def of(cls, node: Node) -> ExpertMatmul | None:
        # Transformers wraps a loop over experts into an op of its own where ATen has no kernel.
        if (
            node.target is not aten._grouped_mm.default
            and str(node.target) != "transformers.grouped_mm_fallback.default"
        ):
            return None
        x, weight, offsets = node.args[:3]
        assert isinstance(x, Node)
        assert isinstance(weight, Node)
        assert isinstance(offsets, Node)
        return cls(node, x, weight, offsets)


@dataclass(frozen=True)
class Concat:
    """``node = cat(parts, dim)``"""

    node: Node
    parts: tuple[Node, ...]
    dim: int

    @classmethod
    def of(cls, node: Node) -> Concat | None:
        if node.target is not aten.cat.default:
            return None
        values = arguments(node)
        rank = len(shape(node))
        return cls(node, tuple(values["tensors"]), values["dim"] % rank)

    @property
    def joins_weights(self) -> bool:
        """Whether whole weights are joined row by row, which can be done once, before anything runs."""
        return self.dim == 0 and all(part.op == "get_attr" and len(shape(part)) > 0 for part in self.parts)
