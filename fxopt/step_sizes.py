"""Numbers for the symbolic sizes of a graph, as they are in one decode step."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from fxopt.errors import InvalidRequestError
from fxopt.launches import Layout, dense_where_single
from fxopt.program import (
    ATTENTION_MASK,
    CACHE_POSITION,
    INPUT_IDS,
    LOGIT_POSITIONS,
    Program,
    key_name,
    whole_windows,
)
from fxopt.symbols import expression


class StepSizes:
    """Numbers for the symbols of a graph. What is asked twice is computed once: sympy is slow."""

    def __init__(self, program: Program, batch: int, context: int) -> None:
        self._known: dict[sympy.Symbol, sympy.Integer] = {}
        self._numbers: dict[sympy.Expr, int] = {}
        inputs, capacity = program.placeholders(), program.facts.capacity
        grows = isinstance(inputs[key_name(0)].meta["val"].shape[2], torch.SymInt)
        _admit(inputs, batch, context, None if grows else capacity)
        for name, dim, number in (
            (INPUT_IDS, 0, batch),
            (INPUT_IDS, 1, 1),
            (CACHE_POSITION, 0, 1),
            (LOGIT_POSITIONS, 0, 1),
            (key_name(0), 2, context - 1),
            (ATTENTION_MASK, 1, context if grows else min(whole_windows(context), capacity)),
        ):
            if name in inputs:
                self._bind(inputs[name].meta["val"].shape[dim], number)

    def _bind(self, size: Any, number: int) -> None:
        equation = sympy.sympify(expression(size)).xreplace(self._known) - number
        if len(equation.free_symbols) == 1:
            (symbol,) = equation.free_symbols
            for solution in sympy.solve(equation, symbol)[:1]:
                self._known[symbol] = solution

    def number(self, size: Any) -> Any:
        """A size as a number; anything else as it is."""
        if not isinstance(size, torch.SymInt):
            return size
        expr = size.node.expr
        if expr not in self._numbers:
            value = expr.xreplace(self._known)
            self._numbers[expr] = int(value) if value.is_number else int(size.node.hint or 1)
        return self._numbers[expr]

    def layout(self, tensor: Tensor) -> Layout:
        sizes, strides = (tuple([self.number(n) for n in numbers]) for numbers in (tensor.shape, tensor.stride()))
        return Layout(sizes, dense_where_single(sizes, strides), 0, tensor.dtype, tensor.device)


def _admit(inputs: dict[str, Node], batch: int, context: int, capacity: int | None) -> None:
    if batch < 1 or context < 1:
        raise InvalidRequestError(f"batch={batch} and context={context} were asked for; give at least 1 of each")
    if capacity is not None and context > capacity:
        raise InvalidRequestError(f"context={context} was asked for, but the buffers have {capacity} rows")
    bound = inputs[INPUT_IDS].meta["val"].shape[0]
    if isinstance(bound, int) and bound != batch:
        raise InvalidRequestError(f"batch={batch} was asked for, but this graph serves a batch of {bound} alone")
