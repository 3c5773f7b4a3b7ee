"""A graph cut at its layers: like layers become one piece of code that is called once per layer.

The layers of a language model are alike but for their weights and buffers. Handed in as inputs, what
is left of each layer is equal as text; each distinct text is compiled once, and compile time no
longer grows with depth.

No names are trusted for this. A node belongs to the last cache buffer that it depends on, and
between two buffers the graph is cut where the fewest values are alive: behind a residual sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from fxopt.program import INPUT_IDS, Program
from fxopt.symbols import expression, fresh_like


@dataclass(frozen=True)
class Region:
    """One piece of a graph; ``inputs`` and ``outputs`` are nodes of the whole one."""

    module: GraphModule
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    key: str  # equal for pieces that compute the same

    @property
    def examples(self) -> list[Any]:
        """A fake value for every input, each a tensor of its own: nodes with like values may share one."""
        found: list[Any] = []
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                value = node.meta["val"]
                if isinstance(value, FakeTensor) and any(value is other for other in found):
                    with value.fake_mode:
                        value = fresh_like(value)
                found.append(value)
        return found


def outline(program: Program, *, layered: bool) -> list[Region]:
    """The pieces that a graph runs as, each as a graph of its own."""
    return [_region(program, nodes) for nodes in pieces(program, layered=layered)]


def pieces(program: Program, *, layered: bool) -> list[list[Node]]:
    """The calls of a graph by piece: what all layers share, each layer, and the head of the model.

    One piece where that is wanted, and where the layers cannot be told apart.
    """
    calls = _calls(program)
    order = _Order(program, calls) if layered else None
    cuts = order.cuts() if order is not None else []
    if order is None or not cuts:
        return [calls]
    borders = [0, *cuts, len(calls)]
    found = [order.nodes[start:end] for start, end in pairwise(borders)]
    last = found[-1]
    length = _length_of_last_layer(program, found[1:-1], last)
    if length is not None:
        found[-1:] = [last[:length], last[length:]]
    return [nodes for nodes in found if nodes]


def _calls(program: Program) -> list[Node]:
    return [node for node in program.graph.nodes if node.op == "call_function"]


def _buffers(program: Program) -> dict[str, int]:
    """The cache buffers by name, with their layers."""
    return {buffer.name: layer for buffer, layer in program.facts.buffers().items()}


class _Order:
    """The calls of a graph in an order in which each layer is one run."""

    def __init__(self, program: Program, calls: Sequence[Node]) -> None:
        self._layers = len(program.facts.layers)
        buffers = _buffers(program)
        self._level: dict[Node, int] = {}
        for node in program.graph.nodes:
            inherited = max((self._level[source] for source in node.all_input_nodes), default=-1)
            self._level[node] = buffers.get(str(node.target), inherited) if node.op == "placeholder" else inherited
        self._sink(program, calls)
        self._shared = self._read_by_later_layers(calls)
        self._rank = {node: -2 if node in self._shared else self._level[node] for node in calls}
        self.nodes = sorted(calls, key=self._rank.__getitem__)  # stable: within a layer the order stays

    def cuts(self) -> list[int]:
        """Where each layer begins, as positions in ``nodes``; empty if the layers cannot be told apart."""
        if self._layers < 3:  # what two layers share looks like what is handed from one to the other
            return []
        alive = self._alive()
        cuts = []
        for level in range(-1, self._layers - 1):
            ends = [place + 1 for place, node in enumerate(self.nodes) if self._rank[node] == level]
            if not ends:
                return []
            fewest = min(alive[end] for end in ends)
            cuts.append(max(end for end in ends if alive[end] == fewest))
        return cuts

    def _sink(self, program: Program, calls: Sequence[Node]) -> None:
        """Constants go to whoever uses them first, and tables that one layer alone reads go to that layer."""
        tokens = {INPUT_IDS, *_buffers(program)}
        varying = set(program.placeholders().values())
        computed = {node for name, node in program.placeholders().items() if name in tokens}
        for node in calls:
            if not varying.isdisjoint(node.all_input_nodes):
                varying.add(node)
            if not computed.isdisjoint(node.all_input_nodes) and not _is_size(node):
                computed.add(node)
        for node in reversed(calls):
            if node in computed or not node.users:
                continue
            levels = [self._level[user] for user in node.users]
            # One layer spans two levels: what it does before it reads its buffer, and what it does after.
            if node not in varying or max(levels) - min(levels) <= 1:
                self._level[node] = min(levels)

    def _read_by_later_layers(self, calls: Sequence[Node]) -> set[Node]:
        """Values made before the first layer that others read too, and what they are made of: masks, rotary tables."""
        shared: set[Node] = set()
        for node in reversed([node for node in calls if self._level[node] == -1]):
            if any(user in shared or (user.op != "output" and self._level[user] > 0) for user in node.users):
                shared.add(node)
        return shared

    def _alive(self) -> list[int]:
        """How many values are still to be read at each position, other than inputs and shared ones."""
        place = {node: position for position, node in enumerate(self.nodes)}
        change = [0] * (len(self.nodes) + 2)
        for position, node in enumerate(self.nodes):
            readers = [place.get(user, len(self.nodes)) for user in node.users]
            if node in self._shared or not readers or _is_size(node):
                continue
            change[position + 1] += 1
            change[max(readers) + 1] -= 1
        alive, total = [], 0
        for step in change:
            total += step
            alive.append(total)
        return alive


def _length_of_last_layer(program: Program, layers: Sequence[Sequence[Node]], last: Sequence[Node]) -> int | None:
    """How long the last layer is if it is like one before; what is behind it is the head of the model."""
    tried = set()
    for nodes in reversed(layers):
        length = len(nodes)
        if length < len(last) and length not in tried:
            tried.add(length)
            if _region(program, last[:length]).key == _region(program, nodes).key:
                return length
    return None


def _region(program: Program, nodes: Sequence[Node]) -> Region:
    """Cut ``nodes`` out into a graph of their own."""
    inside = set(nodes)
    returned = [node for node in nodes if not _is_size(node) and any(user not in inside for user in node.users)]
    if len(nodes) == len(_calls(program)):
        returned = program.results()
    copier = _Copier()
    for node in nodes:
        if not _is_size(node):
            copier.copy(node)
    copier.finish(returned)
    module = GraphModule(program.gm, copier.graph)
    return Region(module, tuple(nodes), tuple(copier.inputs), tuple(returned), "\n".join(copier.lines))


class _Copier:
    """Copies nodes into a new graph and writes down what they do, the same for the same doing.

    Everything from outside becomes an input, but for sizes: those are read again from a tensor, so
    that compiled pieces hand tensors to each other and nothing else.
    """

    def __init__(self) -> None:
        self.graph = Graph()
        self.inputs: list[Node] = []
        self.lines: list[str] = []
        self._copies: dict[Node, Node] = {}
        self._weights: dict[str, Node] = {}
        self._numbers: dict[Node, int] = {}
        self._last_input = self.graph._root

    def copy(self, node: Node) -> Node:
        if node in self._copies:
            return self._copies[node]
        for source in node.all_input_nodes:
            self._take(source)
        made = self._copies[node] = self.graph.node_copy(node, self._copies.__getitem__)
        arguments = torch.fx.map_arg((made.args, made.kwargs), lambda source: f"%{self._numbers[source]}")
        self._note(made, f"{made.target} {arguments}")
        return made

    def finish(self, returned: Iterable[Node]) -> None:
        results = [self._take(node) for node in returned]
        output = self.graph.output(tuple(results))
        output.meta["val"] = tuple(node.meta["val"] for node in results)
        self.lines.append(f"return {[self._numbers[node] for node in results]}")

    def _take(self, node: Node) -> Node:
        """The twin of a node that is read."""
        if node in self._copies:
            return self._copies[node]
        if _is_size(node) and node.op == "call_function":
            return self.copy(node)
        if node.op == "get_attr" and str(node.target) in self._weights:
            self._copies[node] = self._weights[str(node.target)]
            return self._copies[node]
        with self.graph.inserting_after(self._last_input):
            made = self.graph.placeholder(f"in_{len(self.inputs)}")
        made.meta = dict(node.meta)
        self._last_input = self._copies[node] = made
        if node.op == "get_attr":
            self._weights[str(node.target)] = made
        self.inputs.append(node)
        self._note(made, "input")
        return made

    def _note(self, node: Node, what: str) -> None:
        self._numbers[node] = len(self._numbers)
        self.lines.append(f"%{self._numbers[node]} = {what} {_shape(node.meta['val'])}")


def _is_size(node: Node) -> bool:
    return expression(node) is not None


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.device} {tuple(map(str, value.shape))} {tuple(map(str, value.stride()))}"
    if isinstance(value, (tuple, list)):
        return " ".join(_shape(part) for part in value)
    return str(value)
