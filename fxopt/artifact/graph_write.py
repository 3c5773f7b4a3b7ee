"""A graph as plain data: what is called on what, the inputs with their shapes, weights by name."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves, tree_map

from fxopt.artifact.operators import WORDS, name_of
from fxopt.artifact.plain import to_plain
from fxopt.errors import ArtifactError
from fxopt.origin import source_of
from fxopt.program import Program
from fxopt.symbols import expression, write_size


def graph_data(program: Program) -> dict[str, Any]:
    """All that :mod:`graph_read` needs to make the same graph again."""
    program = _sizes_as_nodes(program)
    writer = _Writer(program)
    nodes = [writer.node(node) for node in program.graph.nodes if node.op != "output"]
    return {"sizes": writer.hints, "nodes": nodes, "results": writer.value(program.output().args[0])}


class _Writer:
    def __init__(self, program: Program) -> None:
        self.hints: dict[str, int] = {}
        self._program = program
        self._numbers: dict[Node, int] = {}

    def node(self, node: Node) -> dict[str, Any]:
        data: dict[str, Any] = {"name": node.name}
        if node.op == "placeholder":
            data["input"] = self._example(node)
        elif node.op == "get_attr":
            self._program.attribute(node)
            data["weight"] = str(node.target)
        else:
            data |= {"call": name_of(node.target), "args": [self.value(value) for value in node.args]}
            if node.kwargs:
                data["kwargs"] = {name: self.value(value) for name, value in node.kwargs.items()}
        self._numbers[node] = len(self._numbers)
        return data | _origin(node)

    def value(self, value: Any) -> Any:
        """One argument. What JSON has no word for goes as a table with its kind as the only key."""
        if isinstance(value, Node):
            return {"node": self._numbers[value]}
        if isinstance(value, tuple):
            return {"tuple": [self.value(item) for item in value]}
        if isinstance(value, list):
            return [self.value(item) for item in value]
        if isinstance(value, torch.dtype):
            return {"dtype": to_plain(value)}
        if isinstance(value, torch.device):
            return {"device": "model" if value == self._program.facts.device else str(value)}
        if isinstance(value, torch.layout) and value is torch.strided:
            return {"layout": "strided"}
        if isinstance(value, torch.memory_format):
            return {"memory_format": str(value).removeprefix("torch.")}
        if isinstance(value, str) and value not in WORDS:
            raise ArtifactError(f"the graph passes the text {value!r} to an operator; it cannot be saved")
        return to_plain(value)

    def _example(self, node: Node) -> dict[str, Any]:
        value = node.meta["val"]
        example = {"dtype": to_plain(value.dtype), "shape": [self._size(size, node) for size in value.shape]}
        if not value.is_contiguous():
            example["stride"] = [self._size(size, node) for size in value.stride()]
        return example

    def _size(self, size: Any, node: Node) -> int | str:
        found = expression(size)
        if isinstance(found, sympy.Integer):
            return int(found)
        if not isinstance(found, sympy.Symbol):
            raise ArtifactError(f"the input {node} has the computed size {found}, which cannot be saved; report it")
        self.hints[str(found)] = int(size.node.hint)
        return str(found)


def _sizes_as_nodes(program: Program) -> Program:
    """The graph with every symbolic size that stands among arguments read from an input instead."""
    spelled = program.copy()
    graph = spelled.graph
    for node in list(graph.nodes):
        if not any(isinstance(value, torch.SymInt) for value in tree_leaves((node.args, node.kwargs))):
            continue

        def read(symbol: sympy.Symbol) -> Node:
            for source in spelled.placeholders().values():
                for dim, size in enumerate(source.meta["val"].shape):
                    if not isinstance(size, int) and expression(size) == symbol:
                        return graph.call_function(torch.ops.aten.sym_size.int, (source, dim))
            raise ArtifactError(f"the graph computes with a size {symbol} that no input has; it cannot be saved")

        def spell(value: Any) -> Any:
            size = expression(value) if isinstance(value, torch.SymInt) else None
            return value if size is None else write_size(graph, size, read)

        with graph.inserting_before(node):
            node.args, node.kwargs = tree_map(spell, (node.args, node.kwargs))
    return spelled


def _origin(node: Node) -> dict[str, Any]:
    """Where the node comes from, as far as the report and its listings tell it."""
    paths = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    origin: dict[str, Any] = {"path": paths[-1]} if paths else {}
    if (source := source_of(node)) != "?":
        origin["source"] = source
    if node.meta.get("fxopt"):
        origin["made_by"] = list(node.meta["fxopt"])
    return origin
