"""A graph as text that a person can read: one line per op, weights by name, shapes in letters."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import sympy
import torch
from torch.fx import Node

from fxopt.lengths import END
from fxopt.program import ATTENTION_MASK, INPUT_IDS, LOGIT_POSITIONS, Program, key_name
from fxopt.symbols import expression

Letters = dict[sympy.Expr, sympy.Symbol]


def readable(program: Program, layers: Collection[int | None] | None = None) -> str:
    """The whole graph, or the part that belongs to some layers; None among them is what is outside any."""
    letters = _letters(program)
    lines = [
        _line(node, letters)
        for node in program.graph.nodes
        if node.op == "call_function" and (layers is None or layer_of(node) in layers)
    ]
    if layers is None:
        inputs = ", ".join(f"{n}: {_shape(n, letters)}" for n in program.placeholders().values())
        lines = [f"def forward({inputs}):", *(f"    {line}" for line in lines), f"    return {program.logits()}"]
    return "\n".join(lines)


def layer_of(node: Node) -> int | None:
    """The index of the decoder layer whose code a node stands for."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        found = re.search(r"\.(?:layers|h|blocks)(?:\.|\[|slice\(.*?\)\.)(\d+)", str(path))
        if found is not None:
            return int(found.group(1))
    return None


def _line(node: Node, letters: Letters) -> str:
    arguments = [_argument(argument, letters) for argument in node.args]
    arguments += [f"{name}={_argument(value, letters)}" for name, value in node.kwargs.items() if name not in _NOISE]
    shape = _shape(node, letters)
    return f"{node} = {_name(node.target)}({', '.join(arguments)})" + (f"  # {shape}" if shape else "")


#: Arguments that tracing spells out and nobody reads.
_NOISE = frozenset({"pin_memory", "device", "layout"})


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def _argument(value: Any, letters: Letters) -> str:
    if isinstance(value, Node):
        if value.op == "get_attr":
            return str(value.target).removeprefix("model.")
        size = expression(value)
        return str(value) if size is None else str(size.subs(letters))
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_argument(item, letters) for item in value) + "]"
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "END" if value == END else str(value)


def _shape(node: Node, letters: Letters) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ""
    sizes = [expression(size) for size in value.shape]
    return "[" + ", ".join(str(size.subs(letters)) if size is not None else "?" for size in sizes) + "]"


def _letters(program: Program) -> Letters:
    """The letter that stands for each symbol: B batch, S step, P past, N window, K logits asked for."""
    inputs = program.placeholders()
    known = {(INPUT_IDS, 0): "B", (INPUT_IDS, 1): "S", (key_name(0), 2): "P"}
    known |= {(ATTENTION_MASK, 1): "N", (LOGIT_POSITIONS, 0): "K"}
    found: Letters = {}
    for (name, dim), letter in known.items():
        size = expression(inputs[name].meta["val"].shape[dim]) if name in inputs else None
        if isinstance(size, sympy.Symbol):
            found.setdefault(size, sympy.Symbol(letter))
    return found
