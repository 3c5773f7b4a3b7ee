"""A graph as lines that a person can read: one op each, weights by name, shapes in letters.

Names are kept apart from the text around them, so that two layers that do the same compare equal.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import sympy
import torch
from torch.fx import Node

from fxopt.origin import layer_of, source_of
from fxopt.program import ATTENTION_MASK, INPUT_IDS, LOGIT_POSITIONS, Program, key_name
from fxopt.symbols import END, expression

NAME = "\x1f"  # stands for a name in a template

#: Arguments that tracing spells out and nobody reads.
_NOISE = frozenset({"pin_memory", "device", "layout"})


@dataclass(frozen=True)
class Line:
    """One operator call. ``template`` is its text with NAME wherever one of ``names`` stands."""

    template: str
    names: tuple[str, ...]  # its own first, then what it reads
    layer: int | None
    source: str
    value: str  # what comes out: dtype, shape and bytes
    made_by: tuple[str, ...]  # the passes that wrote it

    @property
    def name(self) -> str:
        return self.names[0]

    @cached_property
    def text(self) -> str:
        first, *rest = self.template.split(NAME)
        return first + "".join(name + part for name, part in zip(self.names, rest, strict=True))


Listing = tuple[Line, ...]


def listing(program: Program) -> Listing:
    """Every operator call of a graph, in order."""
    writer = _Writer(program)
    return tuple(writer.line(node) for node in program.graph.nodes if node.op == "call_function")


def readable(program: Program, layers: Collection[int | None] | None = None) -> str:
    """The whole graph, or the part that belongs to some layers; None among them is what is outside any."""
    lines = [line.text for line in listing(program) if layers is None or line.layer in layers]
    if layers is None:
        writer = _Writer(program)
        inputs = ", ".join(f"{n}: {writer.shape(n)}" for n in program.placeholders().values())
        lines = [f"def forward({inputs}):", *(f"    {line}" for line in lines), f"    return {program.logits()}"]
    return "\n".join(lines)


class _Writer:
    """Writes the nodes of one program; expressions of sizes are written once."""

    def __init__(self, program: Program) -> None:
        self._letters = _letters(program)
        self._sizes: dict[sympy.Expr, str] = {}
        self._names: list[str] = []

    def line(self, node: Node) -> Line:
        self._names = [node.name]
        arguments = [self._argument(argument) for argument in node.args]
        arguments += [f"{name}={self._argument(value)}" for name, value in node.kwargs.items() if name not in _NOISE]
        shape = self.shape(node)
        comment = f"  # {shape}" if shape else ""
        template = f"{NAME} = {_operator(node.target)}({', '.join(arguments)}){comment}"
        made_by = tuple(node.meta.get("fxopt", ()))
        return Line(template, tuple(self._names), layer_of(node), source_of(node), self._value(node), made_by)

    def shape(self, node: Node) -> str:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return ""
        return "[" + ", ".join(self._size(size) for size in value.shape) + "]"

    def _size(self, size: Any) -> str:
        if isinstance(size, int):
            return str(size)
        found = expression(size)
        if found is None:
            return "?"
        if found not in self._sizes:
            self._sizes[found] = str(found.subs(self._letters))
        return self._sizes[found]

    def _value(self, node: Node) -> str:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return "" if value is None else type(value).__name__
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} {self.shape(node)}{self._bytes(value)}"

    def _bytes(self, value: torch.Tensor) -> str:
        known = [size for size in value.shape if isinstance(size, int)]
        symbols = [self._size(size) for size in value.shape if not isinstance(size, int)]
        return ", " + " x ".join([*symbols, f"{math.prod(known) * value.element_size():,} bytes"])

    def _argument(self, value: Any) -> str:
        if isinstance(value, Node):
            return self._reference(value)
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(self._argument(item) for item in value) + "]"
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        return "END" if value == END else str(value)

    def _reference(self, node: Node) -> str:
        if node.op != "get_attr" and expression(node) is not None:
            return self._size(node.meta["val"])
        self._names.append(str(node.target).removeprefix("model.") if node.op == "get_attr" else node.name)
        return NAME


def _operator(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def _letters(program: Program) -> Mapping[sympy.Expr, sympy.Symbol]:
    """The letter that stands for each symbol: B batch, S step, P past, N window, K logits asked for."""
    inputs = program.placeholders()
    known = {(INPUT_IDS, 0): "B", (INPUT_IDS, 1): "S", (key_name(0), 2): "P"}
    known |= {(ATTENTION_MASK, 1): "N", (LOGIT_POSITIONS, 0): "K"}
    found: dict[sympy.Expr, sympy.Symbol] = {}
    for (name, dim), letter in known.items():
        size = expression(inputs[name].meta["val"].shape[dim]) if name in inputs else None
        if isinstance(size, sympy.Symbol):
            found.setdefault(size, sympy.Symbol(letter))
    return found
