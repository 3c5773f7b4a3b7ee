"""The number of past tokens, wherever a graph computes with it, in terms of a static cache.

As a size it becomes the length of the attention mask; as a value it becomes a tensor, the first row
that a step writes. The schema of each operator says which of the two an argument is.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from fxopt.program import ATTENTION_MASK, CACHE_POSITION, INPUT_IDS, Program, key_name, value_name
from fxopt.propagate import mark_edited
from fxopt.rewrite import Refused
from fxopt.symbols import END, dimension, expression, mentions, write_size, write_value
from fxopt.views import arguments, is_tensor, mutates, swap_argument

aten = torch.ops.aten
ROWS = 2  # the dimension of a cache buffer that counts tokens


class Lengths:
    """Rewrites every use of the number of past tokens in one graph."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        inputs = program.placeholders()
        self.past = _symbol(dimension(inputs[key_name(0)], ROWS))
        self.step = dimension(inputs[INPUT_IDS], 1)
        self.batch = dimension(inputs[INPUT_IDS], 0)
        self.masked = dimension(inputs[ATTENTION_MASK], 1)  # maybe a symbol of its own
        self.window = sympy.Symbol("window", integer=True, positive=True)
        with self.graph.inserting_before(program.first_use_point()):
            self.leaves: dict[sympy.Expr, Node] = {
                self.window: self._size_of(inputs[ATTENTION_MASK], 1),
                self.step: self._size_of(inputs[INPUT_IDS], 1),
                self.batch: self._size_of(inputs[INPUT_IDS], 0),
            }
            self.start = self.graph.call_function(aten.select.int, (inputs[CACHE_POSITION], 0, 0))
        self.start.meta["val"] = torch.empty((), dtype=torch.long, device="meta")

    def _size_of(self, node: Node, dim: int) -> Node:
        return self.graph.call_function(aten.sym_size.int, (node, dim))

    def rewrite(self) -> None:
        symbols = {self.past} | self.masked.free_symbols - self.step.free_symbols
        for node in list(self.graph.nodes):
            if node.op != "call_function" or not _takes_tensors_or_sizes(node):
                continue
            if node.target is aten.slice.Tensor:
                self._slice(node, symbols)
            elif node.target is aten.select.int:
                self._select(node, symbols)
            elif any(mentions(operand, symbols) and not is_tensor(operand) for operand in node.all_input_nodes):
                self._operands(node, symbols)
        self._refuse_leftovers()
        self._resize_inputs()

    def _refuse_leftovers(self) -> None:
        """Nothing that still matters may be computed from the number of past tokens, as a float say."""
        useful = {self.program.output()}
        for node in reversed(self.graph.nodes):
            if node in useful or mutates(node):
                useful.update(node.all_input_nodes)
        inputs = self.program.placeholders()
        buffers = {inputs[name(i)] for i in range(len(self.program.facts.layers)) for name in (key_name, value_name)}
        for node in useful:
            if node.target is aten.sym_size.int and node.args == (node.args[0], ROWS) and node.args[0] in buffers:
                reader = next(user for user in node.users if user in useful)
                raise Refused(reader, f"{reader} computes with the number of past tokens in a way that has no rule")

    def _resize_inputs(self) -> None:
        """Past keys and values become whole buffers; the mask covers all their rows."""
        facts = self.program.facts
        inputs = self.program.placeholders()
        batch = inputs[INPUT_IDS].meta["val"].shape[0]
        with self.program.fake_mode:
            for layer, shape in enumerate(facts.layers):
                for name, size in zip(
                    (key_name(layer), value_name(layer)), shape.shapes(0, facts.capacity), strict=True
                ):
                    inputs[name].meta["val"] = torch.empty(batch, *size[1:], dtype=facts.dtype, device=facts.device)
            mask = torch.empty(batch, facts.capacity, dtype=torch.long, device=facts.device)
        inputs[ATTENTION_MASK].meta["val"] = mask

    def _operands(self, node: Node, symbols: set[sympy.Symbol]) -> None:
        """Sizes become sizes of the window, values become tensors: the schema tells which is which."""
        if node.target is aten.arange.start:
            self._arange(node)
            return
        values = arguments(node)
        for parameter in node.target._schema.arguments:  # type: ignore[union-attr]
            operand = values[parameter.name]
            for old in _nodes_in(operand):
                if is_tensor(old) or not mentions(old, symbols):
                    continue
                if _is_size(node, parameter):
                    swap_argument(node, old, self.size(node, old))
                else:
                    self._use_tensor(node)
                    swap_argument(node, old, self.value(node, old))
        mark_edited(node)

    def _use_tensor(self, node: Node) -> None:
        """Call the overload that takes a tensor where this one takes a number."""
        overload = node.target
        assert isinstance(overload, torch._ops.OpOverload)
        if overload._overloadname == "Tensor":
            return
        tensor_form = getattr(overload.overloadpacket, "Tensor", None)
        if tensor_form is None:
            raise Refused(node, f"{node} computes with the number of past tokens, and {overload} takes no tensor")
        node.target = tensor_form

    def _arange(self, node: Node) -> None:
        """``arange(past, past + S)`` becomes ``arange(S) + start``."""
        values = arguments(node)
        first, last = expression(values["start"]), expression(values["end"])
        assert first is not None and last is not None
        with self.graph.inserting_before(node):
            options = {"dtype": node.meta["val"].dtype, "device": self.program.facts.device}
            length = self.graph.call_function(aten.arange.default, (self.size(node, last - first),), options)
            shifted = self.graph.call_function(aten.add.Tensor, (length, self.value(node, first)))
        shifted.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(shifted)
        self.graph.erase_node(node)

    def _slice(self, node: Node, symbols: set[sympy.Symbol]) -> None:
        values = arguments(node)
        source, dim = values["self"], values["dim"]
        length = dimension(source, dim)
        start = self._absolute(values["start"], length, default=sympy.Integer(0))
        end = self._absolute(values["end"], length, default=length)
        touched = [start, end]
        if not any(self._canonical(e).has(self.past) for e in touched):
            return
        total = self.past + self.step
        if start == 0 and self._canonical(end) == total:
            if mentions(values["end"], symbols):
                swap_argument(node, values["end"], self.size(node, end))
                mark_edited(node)
        elif self._canonical(start) == self.past and self._canonical(end) == total:
            rows = self.program.placeholders()[CACHE_POSITION]
            with self.graph.inserting_before(node):
                picked = self.graph.call_function(aten.index_select.default, (source, dim, rows))
            picked.meta["val"] = node.meta["val"]  # as many rows as before, in another place
            node.replace_all_uses_with(picked)
            self.graph.erase_node(node)
        else:
            raise Refused(node, f"{node} takes rows {start} to {end}, which have no fixed place in a static cache")

    def _select(self, node: Node, symbols: set[sympy.Symbol]) -> None:
        values = arguments(node)
        index = values["index"]
        length = dimension(values["self"], values["dim"])
        place = self._absolute(index, length, default=length)
        if self._canonical(place).has(self.past):
            raise Refused(node, f"{node} picks row {place}, which has no fixed place in a static cache")

    def _absolute(self, bound: Any, length: sympy.Expr, default: sympy.Expr) -> sympy.Expr:
        """A slice bound counted from the front: None, END and negative numbers resolved."""
        found = default if bound is None else expression(bound)
        assert found is not None
        if found == END:
            return length
        return length + found if found.is_number and found < 0 else found

    def _canonical(self, expr: sympy.Expr) -> sympy.Expr:
        """With the length of the mask written as what it is: past and step."""
        if isinstance(self.masked, sympy.Symbol):
            expr = expr.subs(self.masked, self.past + self.step)
        return sympy.expand(expr)

    def size(self, at: Node, value: Any) -> Node | int:
        """``value`` as a number, with the window in place of past and step together."""
        expr = value if isinstance(value, sympy.Expr) else expression(value)
        assert expr is not None
        expr = sympy.expand(self._canonical(expr).subs(self.past, self.window - self.step))
        if expr.has(self.window) and expr.coeff(self.window, 0).has(*self.step.free_symbols):
            raise Refused(at, f"{at} uses the number of past tokens alone as a size, and a static cache has none")
        with self.graph.inserting_before(at):
            return write_size(self.graph, expr, lambda symbol: self.leaves[symbol])

    def value(self, at: Node, value: Any) -> Node | int:
        """``value`` as a tensor, with the first row written in place of past."""
        expr = value if isinstance(value, sympy.Expr) else expression(value)
        assert expr is not None
        leaves = {**self.leaves, self.past: self.start}
        with self.graph.inserting_before(at):
            return write_value(self.graph, self._canonical(expr), lambda symbol: leaves[symbol])


def _symbol(expr: sympy.Expr) -> sympy.Symbol:
    if not isinstance(expr, sympy.Symbol):
        raise TypeError(f"the number of past tokens is {expr}, not a symbol")
    return expr


def _takes_tensors_or_sizes(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target is not aten.sym_size.int


def _nodes_in(operand: Any) -> list[Node]:
    found: list[Node] = []
    torch.fx.map_arg(operand, found.append)
    return found


def _is_size(node: Node, parameter: torch.Argument) -> bool:
    """``arange`` counts to a size although its schema says number; elsewhere the schema is right."""
    return node.target is aten.arange.default or "int" in str(parameter.real_type).lower()
