"""Sizes that depend on shapes: sympy expressions, evaluated exactly, and as text that is no program.

512*batch*step      floor(step/2)      Max(step, 16)      ceiling(step/16)*16      Mod(step, 8)
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any

import sympy
from sympy.printing.pycode import PythonCodePrinter

from fxopt.errors import InvalidRequestError
from fxopt.memory.errors import PlanError

Size = Any  # an int or a sympy expression; sympy has no types of its own

LONGEST_TEXT = 2000  # characters of one size
HIGHEST_POWER = 8
LARGEST_NUMBER = 2**62


def _floor_of(a: Any, b: Any) -> Any:
    return sympy.floor(a / b)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "floor": sympy.floor,
    "ceiling": sympy.ceiling,
    "Max": sympy.Max,
    "Min": sympy.Min,
    "Mod": sympy.Mod,
    "PythonMod": sympy.Mod,
    "FloorDiv": _floor_of,
    "CleanDiv": _floor_of,
}
#: By name, since PyTorch has classes of its own for some.
_DIVISIONS = {"FloorDiv": "//", "CleanDiv": "//", "PythonMod": "%", "Mod": "%"}
_KNOWN = {"Add", "Mul", "Pow", "Symbol", "Dummy", "Rational", "Half", *_FUNCTIONS}
_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: _floor_of,
    ast.Mod: sympy.Mod,
}


class Sizes:
    """The sizes of many buffers, compiled once into one function of their symbols."""

    def __init__(self, expressions: Sequence[Size]) -> None:
        self.expressions = tuple(sympy.sympify(expression, strict=True) for expression in expressions)
        for expression in self.expressions:
            if (part := _unknown(expression)) is not None:
                raise InvalidRequestError(
                    f"the size {expression} has {part} in it, and bytes cannot be computed of that"
                )
        self.symbols = tuple(sorted({str(symbol) for one in self.expressions for symbol in one.free_symbols}))

    def key(self, values: Mapping[str, int]) -> tuple[int, ...]:
        """What the sizes depend on: the value of each symbol."""
        if missing := [name for name in self.symbols if name not in values]:
            raise InvalidRequestError(
                f"the sizes depend on {missing[0]}, which has no value; give one for each of {', '.join(self.symbols)}"
            )
        return tuple(values[name] for name in self.symbols)

    def at(self, key: Sequence[int]) -> list[int]:
        """The bytes for these values of the symbols, in the order of ``symbols``."""
        found = self._compiled(*key)
        for expression, value in zip(self.expressions, found, strict=True):
            if value < 0 or value != int(value):
                shapes = ", ".join(f"{name} = {given}" for name, given in zip(self.symbols, key, strict=True))
                raise InvalidRequestError(
                    f"the size {expression} is {value} for {shapes}; bytes are 0 or more, and whole"
                )
        return [int(value) for value in found]

    @cached_property
    def _compiled(self) -> Callable[..., list[Any]]:
        # Names of our own: those in a model may be anything.
        place = {name: sympy.Symbol(f"x{number}", integer=True) for number, name in enumerate(self.symbols)}
        renamed = [
            one.xreplace({symbol: place[str(symbol)] for symbol in one.free_symbols}) for one in self.expressions
        ]
        modules = [{"Fraction": Fraction}, "math"]
        function: Callable[..., list[Any]] = sympy.lambdify(
            list(place.values()), renamed, modules=modules, printer=_Exact({"fully_qualified_modules": False}), cse=True
        )
        return function


def read_size(text: str) -> Size:
    """The size that a text says, without running any of it."""
    if len(text) > LONGEST_TEXT:
        raise PlanError(f"a size has {len(text):,} characters; at most {LONGEST_TEXT:,} are read")
    try:
        size = _read(ast.parse(text, mode="eval").body, text)
    except (SyntaxError, RecursionError, TypeError, ValueError, ArithmeticError, MemoryError):
        raise _unreadable(text) from None
    if _unknown(size) is not None:
        raise _unreadable(text)
    return int(size) if size.is_Integer else size


def _read(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int and node.value <= LARGEST_NUMBER:
        return sympy.Integer(node.value)
    if isinstance(node, ast.Name):
        return sympy.Symbol(node.id, integer=True, nonnegative=True)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_read(node.operand, text)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords and node.args:
        function = _FUNCTIONS.get(node.func.id)
        if function is not None:
            return function(*(_read(argument, text) for argument in node.args))
    if isinstance(node, ast.BinOp):
        left, right = _read(node.left, text), _read(node.right, text)
        if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](left, right)
        if isinstance(node.op, ast.Pow) and right.is_Integer and 0 <= right <= HIGHEST_POWER and not left.is_number:
            return left**right
    raise _unreadable(text)


def _unreadable(text: str) -> PlanError:
    known = "+ - * / // % **, " + ", ".join(_FUNCTIONS)
    return PlanError(f"the size {text[:60]!r} cannot be read; sizes are whole numbers, names, and {known}")


def _unknown(expression: Any) -> Any:
    """The first part of an expression of which no bytes can be computed, or None."""
    for part in sympy.preorder_traversal(expression):
        name = type(part).__name__
        if not (name in _KNOWN or part.is_Integer) or (name == "Pow" and not part.exp.is_Integer):
            return part
    return None


class _Exact(PythonCodePrinter):
    """Fractions instead of floats: a third of three is one."""

    def _print_Rational(self, expression: Any) -> str:  # noqa: N802 - sympy looks for this name
        return f"Fraction({expression.p}, {expression.q})"

    def _print_Pow(self, expression: Any, rational: bool = False) -> str:  # noqa: N802
        base, power = self._print(expression.base), int(expression.exp)
        return f"({base})**{power}" if power >= 0 else f"Fraction(1, ({base})**{-power})"

    def _division(self, expression: Any) -> str:
        left, right = map(self._print, expression.args)
        return f"(({left}) {_DIVISIONS[type(expression).__name__]} ({right}))"

    _print_FloorDiv = _print_CleanDiv = _print_PythonMod = _print_Mod = _division  # noqa: N815
