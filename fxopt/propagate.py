"""Keeping ``meta["val"]`` true: fake tensors for new nodes, and for whatever a change reaches."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import sympy
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import py_sym_types

from fxopt.program import Program
from fxopt.symbols import described, expression
from fxopt.views import swap_argument

aten = torch.ops.aten


def snapshot(program: Program) -> dict[Node, Any]:
    """The values known now, by identity, to hand to :func:`propagate` after a change."""
    return {node: node.meta.get("val") for node in program.graph.nodes}


def propagate(program: Program, known: dict[Node, Any] | None = None) -> None:
    """Compute the fake value of every node that is new or downstream of a change.

    ``known`` is an earlier :func:`snapshot`; without one every node is computed afresh.
    """
    changed: set[Node] = set()
    values = _Values(program)
    with program.fake_mode, enable_python_dispatcher(), torch.no_grad():
        for node in program.graph.nodes:
            if node.op == "output":
                continue
            if node.op == "placeholder":
                if known is None or known.get(node) is not node.meta["val"]:
                    changed.add(node)
                continue
            edited = known is None or node not in known or node.meta.get("fxopt_edited", False)
            node.meta.pop("fxopt_edited", None)
            if not edited and changed.isdisjoint(node.all_input_nodes):
                continue
            before = None if known is None else known.get(node)
            node.meta["val"] = values.of(node)
            if values.key(before) != values.key(node.meta["val"]):
                changed.add(node)


def mark_edited(node: Node) -> None:
    """Say that a node that stays has new arguments, so that its value is computed again."""
    node.meta["fxopt_edited"] = True


def fold_constants(program: Program) -> None:
    """Write sizes that turned out to be constants as numbers into whoever reads them."""
    for node in list(program.graph.nodes):
        value = node.meta.get("val")
        if node.op == "call_function" and isinstance(value, (int, bool, float)):
            for user in list(node.users):
                swap_argument(user, node, value)
            program.graph.erase_node(node)


def read_sizes_from_inputs(program: Program) -> None:
    """Read every symbolic size from the graph's inputs, not from values that happen to have it.

    Otherwise a late layer holds on to an early value only to ask how long it is.
    """
    sources: dict[sympy.Expr, tuple[Node, int]] = {}
    for node in program.placeholders().values():
        for dim, size in enumerate(node.meta["val"].shape):
            found = expression(size)
            if isinstance(found, sympy.Symbol):
                sources.setdefault(found, (node, dim))
    readers: dict[sympy.Expr, Node] = {}
    for node in list(program.graph.nodes):
        size = expression(node) if node.op == "call_function" else None
        if size not in sources:
            continue
        if size not in readers:
            with program.graph.inserting_before(program.first_use_point()):
                readers[size] = program.graph.call_function(aten.sym_size.int, sources[size])
            readers[size].meta = dict(node.meta)
        if node is not readers[size]:
            node.replace_all_uses_with(readers[size])
            program.graph.erase_node(node)


class _Values:
    """Fake values of nodes. A call that was made on like values has a like result: layers are evaluated once."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._results: dict[Hashable, Any] = {}
        self._keys: dict[int, tuple[torch.Tensor, Hashable]] = {}  # with the tensor, which keeps its id its own

    def of(self, node: Node) -> Any:
        """What a call gives, or what an attribute holds."""
        if node.op == "get_attr":
            value = self._program.value_of(node)
            is_weight = isinstance(value, torch.Tensor)
            return self._program.fake_mode.from_tensor(value, static_shapes=True) if is_weight else value
        if node.op != "call_function":
            raise TypeError(f"{node} is a {node.op}; a captured graph holds calls of operators only")
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        assert callable(node.target)
        key = (node.target, self.key((args, kwargs)))
        if key not in self._results:
            self._results[key] = node.target(*args, **kwargs)
        return self._results[key]

    def key(self, value: Any) -> Hashable:
        """Equal for values that no operator can tell apart."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._keys:
                self._keys[id(value)] = (value, described(value))
            return self._keys[id(value)][1]
        if isinstance(value, py_sym_types):
            return (type(value), value.node.expr)
        if isinstance(value, Mapping):
            return (type(value), tuple((name, self.key(part)) for name, part in value.items()))
        if isinstance(value, (tuple, list)):
            return (type(value), tuple(map(self.key, value)))
        if isinstance(value, slice):
            return (slice, self.key((value.start, value.stop, value.step)))
        return (type(value), value)
